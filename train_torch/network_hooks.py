"""Changes to what passes inside a network in training: masks and mixing where PANNs have them.

They are torch's forward hooks on parts the network names, so that a network knows nothing of training recipes: its
state_dict, its answers in evaluation mode and what is traced for an export are the same with and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models_zoo.errors import SpecError
from train_torch.frontend import Mixing, PairMixing, SpecMasks, masked

__all__ = ["NetworkHooks"]


class NetworkHooks:
    """Masks, then mixes, in training mode only.

    Args:
        model: names the places: ``masked_at``, parts whose output is ``(batch, n_mels, time, 1)``, and ``mixed_at``,
            parts whose output has the clips in its first axis. Hooks stay on it for good.
        masks: what to hide, zeros coming in; None for nothing.
        mixes: whether :meth:`mixing` is to be used.

    Raises:
        SpecError: the model names no place for what is asked.

    Source: PANNs pytorch/models.py: SpecAugmentation behind ``bn0``, then do_mixup there and, where a waveform comes
    in, behind ``pre_block4``.
    """

    def __init__(self, model: nn.Module, *, masks: SpecMasks | None = None, mixes: bool = False) -> None:
        self._model = model
        self._masks = masks
        self._mixing: Mixing | PairMixing | None = None
        self._places: list[tuple[str, Any]] = []
        self._handles: list[RemovableHandle] = []
        for wanted, places, hook, field in (
            (masks is not None, "masked_at", self._mask, "masks_at"),
            (mixes, "mixed_at", self._mix, "mixup_at"),
        ):
            if not wanted:
                continue
            names: tuple[str, ...] = getattr(model, places, ())
            if not names:
                raise SpecError(
                    f"augmentation.{field}: got 'norm'; a {type(model).__name__} has no place for it inside; PANNs "
                    "with features have, other networks take it at 'features'",
                    field=f"augmentation.{field}",
                )
            self._places += [(name, hook) for name in names]
        self.attach()

    def attach(self) -> None:
        """Put the hooks where they belong, again where parts have been replaced since (by norms that synchronise)."""
        for handle in self._handles:
            handle.remove()
        self._handles = [self._model.get_submodule(name).register_forward_hook(hook) for name, hook in self._places]

    @contextmanager
    def mixing(self, mixing: Mixing | PairMixing | None) -> Iterator[None]:
        """Mix what passes the network inside the ``with`` block by this draw."""
        self._mixing = mixing
        try:
            yield
        finally:
            self._mixing = None

    # The mode is the whole model's: a frozen norm is in evaluation mode while the rest is trained.
    def _mask(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self._model.training or self._masks is None:
            return output
        return masked(output.transpose(1, 3), self._masks).transpose(1, 3)

    def _mix(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._mixing(output) if self._model.training and self._mixing is not None else output
