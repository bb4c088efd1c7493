"""What is trained, how fast, and when: frozen parts, learning rates by depth, schedules by step and epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from models_zoo.errors import SpecError
from train_torch.models import Model
from train_torch.models.cavmae_blocks import Towers
from train_torch.recipes import Recipe

__all__ = [
    "check_layer_decay",
    "check_temperature",
    "configure",
    "factor_at",
    "freeze",
    "keep_frozen",
    "layers_of",
    "published_factor",
    "set_norm_momentum",
]


_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Recipe], torch.optim.Optimizer]] = {
    "adamw": lambda groups, recipe: torch.optim.AdamW(
        groups, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=recipe.betas, amsgrad=recipe.amsgrad
    ),
    "adam": lambda groups, recipe: torch.optim.Adam(
        groups, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=recipe.betas, amsgrad=recipe.amsgrad
    ),
    "sgd": lambda groups, recipe: torch.optim.SGD(
        groups, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    ),
}


def configure(model: nn.Module, recipe: Recipe, total_steps: int) -> dict[str, Any]:
    """Return the recipe's optimiser and its schedule as Lightning takes them.

    Args:
        model: its parameters that need no gradient (:func:`freeze`) are left out, and so have no optimiser state.
        recipe: what to do.
        total_steps: of the run, all epochs together.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = cast(Model, model).head_prefix
    groups: list[dict[str, Any]] = []
    if recipe.layer_decay is not None:
        layers = layers_of(model)
        # The head comes first, so that the first group's rate is the recipe's.
        for distance, layer in enumerate(reversed(layers)):
            members = [(name, parameter) for name, parameter in trained if _is_below(name, [layer])]
            groups += _by_head(members, recipe.lr * recipe.layer_decay**distance, head, recipe.head_lr)
    else:
        groups = _by_head(trained, recipe.lr, head, recipe.head_lr)
    optimizer = _OPTIMIZERS[recipe.optimizer](groups, recipe)
    # One function of the step: a schedule that Lightning steps by epochs is behind by one after a resumed run.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor_at(step, recipe, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _by_head(members: Iterable[tuple[str, nn.Parameter]], lr: float, head: str, factor: float) -> list[dict[str, Any]]:
    """Return groups of parameters: those behind the embedding at ``factor`` times the rate, if that is another."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in members:
        groups.setdefault(lr * factor if name.startswith(head) else lr, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in sorted(groups.items())]


def factor_at(step: int, recipe: Recipe, total_steps: int) -> float:
    """Return the factor on the learning rate in a step, counted from 0."""
    if recipe.schedule == "published":
        return published_factor(step * recipe.epochs // total_steps, recipe)
    if recipe.schedule == "steps":
        done = step * recipe.epochs // total_steps
        taken = 0 if done < recipe.steps_start else (done - recipe.steps_start) // recipe.steps_every + 1
        return float(recipe.steps_factor**taken)
    warmup = recipe.warmup_epochs * total_steps / recipe.epochs
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return float(recipe.final_lr + (1 - recipe.final_lr) * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0))))


def published_factor(epoch: int, recipe: Recipe) -> float:
    """Return EfficientAT's factor on the learning rate in an epoch, counted from 0.

    exp(-5 (1 - max(epoch, 0.5) / warmup)^2) before ``warmup_epochs``; 1 up to ``ramp_down_start``; then a straight
    line over ``ramp_down_epochs`` to ``final_lr``, which stays. Where rise and fall overlap, they multiply.

    Source: EfficientAT helpers/utils.py, exp_warmup_linear_down.
    """
    rise = 1.0
    if epoch < recipe.warmup_epochs:
        rise = math.exp(-5.0 * (1.0 - max(epoch, 0.5) / recipe.warmup_epochs) ** 2)
    left = min(1.0, max(0.0, 1.0 - (epoch - recipe.ramp_down_start) / recipe.ramp_down_epochs))
    return rise * (recipe.final_lr + (1.0 - recipe.final_lr) * left)


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of the parts that get one learning rate each, from the stem to the head.

    A child of the model is one part; a container of containers is a stack, whose children are parts each; the head is
    one part.
    """
    head = cast(Model, model).head_prefix
    children = dict(model.named_children())
    layers = []
    for name in getattr(model, "children_in_order", children):
        if name not in children:
            continue
        child = children[name]
        inner = list(child.named_children())
        stack = isinstance(child, (nn.Sequential, nn.ModuleList)) and any(
            len(list(part.children())) for _, part in inner
        )
        if f"{name}." == head or not stack:
            layers.append(name)
        else:
            layers += [f"{name}.{part}" for part, _ in inner]
    return layers


def _is_below(key: str, prefixes: Iterable[str]) -> bool:
    """Whether a prefix is ``key`` or names whole parts of it: ``features.1`` is above ``features.1.0``, not .10."""
    return any(key == prefix.rstrip(".") or key.startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def set_norm_momentum(model: nn.Module, momentum: float) -> None:
    """Set the share of a batch in the running statistics of every batch norm of ``model``."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum


def freeze(model: nn.Module, prefixes: Iterable[str]) -> tuple[str, ...]:
    """Keep what ``prefixes`` name as it is, and return the state_dict keys that this holds for.

    Parameters get no gradient; norms whose statistics are among the keys use them, as in evaluation, and must be kept
    from updating them by :func:`keep_frozen` whenever the model is put into training mode.

    Args:
        model: changed in place.
        prefixes: of state_dict keys, whole parts between dots: ``features.1`` is not ``features.10``.

    Raises:
        SpecError: a prefix that matches nothing (the message lists what there is), or nothing left to train.
    """
    prefixes = tuple(prefixes)
    keys = tuple(model.state_dict())
    for prefix in prefixes:
        if not any(_is_below(key, [prefix]) for key in keys):
            there = list(dict.fromkeys(part for name in layers_of(model) for part in (name.split(".")[0], name)))
            raise SpecError(
                f"freeze: nothing in the model is called {prefix!r}; there are {', '.join(there)}, and what lies below "
                "them; a prefix names whole parts between dots",
                field="freeze",
            )
    frozen = tuple(key for key in keys if _is_below(key, prefixes))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise SpecError(
            f"freeze: {', '.join(prefixes)} leave nothing to train; leave out {layers_of(model)[-1]!r}, the head",
            field="freeze",
        )
    keep_frozen(model, frozen)
    return frozen


def keep_frozen(model: nn.Module, frozen: Iterable[str]) -> None:
    """Put the norms whose statistics are frozen into evaluation mode, where they stay as they are.

    Args:
        model: whatever mode it is in.
        frozen: keys, as :func:`freeze` returned them.
    """
    ending = ".running_mean"
    for key in frozen:
        if key.endswith(ending):
            model.get_submodule(key.removesuffix(ending)).eval()


def check_layer_decay(model: nn.Module, recipe: Recipe) -> None:
    """Check that learning rates by depth reach everything that is trained.

    Raises:
        SpecError: the recipe has them, and the model is a CAV-MAE, whose blocks stand beside each other, or has trained
            parameters in none of its layers.
    """
    if recipe.layer_decay is None:
        return
    layers = layers_of(model)
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    left = [name for name in trained if not _is_below(name, layers)]
    if left or isinstance(model, Towers):
        reason = f"{left[0]} and {len(left) - 1} more belong to no layer" if left else "its blocks are not in a row"
        raise SpecError(
            f"layer_decay: got {recipe.layer_decay}; of a {type(model).__name__} {reason}; leave it out, and set the "
            "head's rate with head_lr",
            field="layer_decay",
        )


def check_temperature(model: nn.Module, recipe: Recipe) -> None:
    """Check that a temperature schedule has something to schedule.

    Raises:
        SpecError: the recipe has one, and the model has no dynamic convolutions (or has them switched off).
    """
    dynamic = any(hasattr(part, "temperature") for part in model.modules() if part is not model)
    if recipe.temperature_schedule is not None and not (dynamic and hasattr(model, "set_temperature")):
        raise SpecError(
            f"temperature_schedule: a {type(model).__name__} has no dynamic convolutions, so no temperature; use a "
            "dymn model, or leave the schedule out",
            field="temperature_schedule",
        )
