"""The loss of a batch of clips."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

__all__ = ["clip_loss"]


def clip_loss(
    logits: Tensor, targets: Tensor, task: Literal["single_label", "multi_label"], *, label_smoothing: float = 0.0
) -> Tensor:
    """Return the mean loss over the batch, a scalar.

    Args:
        logits: ``(batch, num_classes)``.
        targets: ``(batch, num_classes)`` in [0, 1]: one-hot, several-hot, or mixed.
        task: ``single_label``: softmax cross-entropy; ``multi_label``: binary cross-entropy, mean over classes.
        label_smoothing: share of the target replaced by 1 / num_classes (single label) or 1 / 2 (multi label).
    """
    if task == "single_label":
        return functional.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)
    targets = targets * (1 - label_smoothing) + label_smoothing / 2
    return functional.binary_cross_entropy_with_logits(logits.float(), targets)
