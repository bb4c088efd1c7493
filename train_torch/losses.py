"""The losses of a batch of clips: cross-entropy, its class-balanced form, KL divergence, supervised contrast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from models_zoo.errors import DataError

__all__ = ["balancing_weights", "clip_loss", "smoothed_positives", "supcon_loss"]

Task = Literal["single_label", "multi_label", "label_distribution"]


def clip_loss(
    scores: Tensor,
    targets: Tensor,
    task: Task,
    *,
    kind: str | None = "logit",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Return the mean loss over the batch, a scalar.

    With ``class_weights`` a clip of class y counts ``class_weights[y]`` times, and the sum is still divided by the
    number of clips. What is linear in the targets stays so: a mixed clip costs what its parts would cost, each with
    the weight of its own class. Multi-label: the term of every class is multiplied by the weight of that class,
    present or absent.

    Args:
        scores: ``(batch, num_classes)``, as the model answers.
        targets: ``(batch, num_classes)`` in [0, 1]: one-hot, several-hot, a distribution, or mixed.
        task: ``single_label``: softmax cross-entropy; ``multi_label``: binary cross-entropy, mean over classes;
            ``label_distribution``: Kullback-Leibler divergence of the softmax from the target, the cross-entropy less
            the target's own entropy, so that 0 is right.
        kind: of the scores. ``logit``, or ``log_probability``, which is its own log-softmax; or ``probability``, each
            class by itself: binary cross-entropy whatever the task, as PANNs' decision-level models are trained.
        label_smoothing: share of the target replaced by 1 / 2 (multi label) or 1 / num_classes (the others).
        class_weights: ``(num_classes,)``, see :func:`balancing_weights`; None for equal weights.
        known: ``(batch, num_classes)`` in [0, 1], how far each label of a multi-label batch is known (see
            :func:`train_torch.augment.mix_labels`), None where all are. The mean is then over what is known: an
            unknown label adds nothing to the loss, to its gradient or to what the sum is divided by.
    """
    scores = scores.float()
    if kind == "probability":
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
        # torch refuses it under autocast, although in float32 it is as good there.
        with torch.autocast(device_type=scores.device.type, enabled=False):
            each = functional.binary_cross_entropy(scores, targets, reduction="none")
        return _mean_over_known(each, class_weights, known)
    if task == "single_label":
        weighted = targets if class_weights is None else targets * class_weights
        spread = weighted.sum(dim=1, keepdim=True) / scores.shape[1]
        weighted = (1 - label_smoothing) * weighted + label_smoothing * spread
        return -(weighted * scores.log_softmax(dim=1)).sum(dim=1).mean()
    if task == "label_distribution":
        smoothed = (1 - label_smoothing) * targets + label_smoothing / scores.shape[1]
        return functional.kl_div(scores.log_softmax(dim=1), smoothed, reduction="batchmean")
    targets = targets * (1 - label_smoothing) + label_smoothing / 2
    each = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return _mean_over_known(each, class_weights, known)


def smoothed_positives(targets: Tensor, mixed: Tensor, smoothing: float) -> Tensor:
    """Return ``(batch, num_classes)`` targets as CAV-MAE smooths them.

    Every class begins at smoothing / num_classes. The classes of a clip by itself are set to 1 - smoothing; those of a
    mix get (1 - smoothing) times their weight in it on top.

    Args:
        targets: in [0, 1], mixed or not.
        mixed: ``(batch,)`` bool.
        smoothing: share that is taken from the positives.

    Source: YuanGongND/cav-mae src/dataloader.py.
    """
    floor = smoothing / targets.shape[1]
    added = floor + (1 - smoothing) * targets
    return torch.where(mixed[:, None] | (targets == 0), added, (1 - smoothing) * targets)


def _mean_over_known(each: Tensor, class_weights: Tensor | None, known: Tensor | None) -> Tensor:
    """Return the mean of ``(batch, num_classes)`` losses, each weighed by its class, over the labels known."""
    if class_weights is not None:
        each = each * class_weights
    return each.mean() if known is None else (each * known).sum() / known.sum().clamp(min=1e-6)


def balancing_weights(class_counts: Mapping[str, int], beta: float) -> Tensor:
    """Return ``(num_classes,)`` float32 weights by the effective number of clips, summing to the number of classes.

    The effective number of n clips is (1 - beta**n) / (1 - beta): n for few clips, at most 1 / (1 - beta) for many.

    Args:
        class_counts: label -> clips in the training split.
        beta: in [0, 1); 0 weighs all classes alike, the nearer to 1 the nearer to weights of 1 / n.

    Raises:
        DataError: a class has no clip, so no weight can make up for it.

    Source: Cui et al., Class-Balanced Loss Based on Effective Number of Samples (CVPR 2019), as used with beta 0.9999
    by refreshment-coffee/EfficientAT_tensorflow, which computes in float32; its weights are within 5e-5.
    """
    absent = [label for label, count in class_counts.items() if count < 1]
    if absent:
        raise DataError(
            f"a class-balanced loss needs training clips of every class; none of {', '.join(map(repr, absent[:5]))}"
            f"{f' and {len(absent) - 5} more' if len(absent) > 5 else ''}; add clips, leave the class out of the data, "
            "or train without loss.class_balanced"
        )
    counts = torch.tensor(list(class_counts.values()), dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**counts)
    return (weights * len(counts) / weights.sum()).float()


def supcon_loss(embedding: Tensor, targets: Tensor, task: Task, *, temperature: float = 0.07) -> Tensor:
    """Return the supervised contrastive loss of a batch, a scalar: clips of one class together, others apart.

    Every clip is an anchor. Over the other clips of its class, the mean of the log-softmax (over all other clips) of
    the cosine similarities is taken; an anchor without such a clip contributes 0 and still counts in the mean.
    Computed in float32 also under autocast.

    Args:
        embedding: ``(batch, size)``, of any length; one view of each clip.
        targets: ``(batch, num_classes)`` in [0, 1]. Single label: the class of a mixed clip is that of its louder
            part, the largest target. Multi label: two clips belong together where they share a class whose target is
            at least one half in both.
        task: of the targets; the class of a distribution is its largest.
        temperature: the similarities are divided by it.

    Source: Khosla et al., Supervised Contrastive Learning (NeurIPS 2020), in the form of
    refreshment-coffee/EfficientAT_tensorflow: one view, no projection head, 1e-12 added to the denominator.
    """
    if task != "multi_label":
        classes = targets.argmax(dim=1)
        same = classes[:, None] == classes[None, :]
    else:
        present = (targets >= 0.5).float()
        same = present @ present.T > 0
    with torch.autocast(device_type=embedding.device.type, enabled=False):
        unit = functional.normalize(embedding.float(), dim=1)
        similarity = unit @ unit.T / temperature
        itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        others = similarity.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
        log_share = similarity - torch.logaddexp(others, others.new_tensor(1e-12).log())
        positive = same & ~itself
        per_anchor = (log_share * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
        return -per_anchor.mean()
