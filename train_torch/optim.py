"""Optimisers and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from train_torch.recipes import Recipe

__all__ = ["configure"]


def configure(model: nn.Module, recipe: Recipe, total_steps: int) -> dict[str, Any]:
    """Return the recipe's optimiser and its schedule as Lightning takes them: linear warm-up, then a cosine."""
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    warmup = recipe.warmup_epochs * total_steps / recipe.epochs

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return float(recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
