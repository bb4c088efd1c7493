"""Which clips are drawn: rare classes more often, by weights or class by class.

Source: EfficientAT datasets/audioset.py for the weights; PANNs utils/data_generator.py (BalancedTrainSampler,
AlternateTrainSampler) for drawing class by class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from models_zoo.dataset import Dataset
from models_zoo.errors import DataError
from train_torch.recipes import SamplingRecipe

__all__ = ["ClassDraws", "ClipDraws", "sampling_weights"]


def sampling_weights(dataset: Dataset, sampling: SamplingRecipe) -> NDArray[np.float64]:
    """Return ``(num_clips,)``, how likely a clip is to be drawn next: rare classes more.

    A clip's weight is the sum over its labels of 1000 / (offset + clips with that label). A clip without a label, of
    which only absences are known, has weight 0 and is never drawn.

    Raises:
        DataError: fewer clips could be drawn than an epoch is to have.

    Source: EfficientAT datasets/audioset.py, get_ft_cls_balanced_sample_weights.
    """
    targets = dataset.multi_hot().astype(np.float64)
    counts = targets.sum(axis=0)
    each = np.divide(1000.0, sampling.offset + counts, out=np.zeros_like(counts), where=counts > 0)
    weights: NDArray[np.float64] = targets @ each
    if not sampling.replacement and (sampling.clips_per_epoch or 0) > np.count_nonzero(weights):
        raise DataError(
            f"sampling.clips_per_epoch: got {sampling.clips_per_epoch}; {dataset.root} has "
            f"{np.count_nonzero(weights)} training clips with a label, and they are drawn without replacement; give "
            "at most as many (about half of them lets the weights do something), or set sampling.replacement"
        )
    return weights


class _Cycle:
    """The numbers below ``size`` in random order, then all of them in another, without end.

    What comes at a place follows from the key and the place alone, so a run may begin anywhere.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.key = key
        self._round = -1
        self._order = np.empty(0, np.int64)

    def __getitem__(self, place: int) -> int:
        number, within = divmod(place, self.size)
        if number != self._round:
            self._round = number
            self._order = np.random.default_rng((*self.key, number)).permutation(self.size)
        return int(self._order[within])


class ClipDraws:
    """A run's clips in the order they are drawn: every clip once, in random order, before any comes again.

    Args:
        num_clips: how many there are.
        seed: of the order.
    """

    def __init__(self, num_clips: int, seed: int) -> None:
        self._clips = _Cycle(num_clips, seed, 1)

    def __call__(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the draws ``start`` to ``start + count`` of the run, ``(count,)`` indices."""
        return np.array([self._clips[place] for place in range(start, start + count)], np.int64)


class ClassDraws:
    """A run's clips in the order they are drawn class by class.

    Every class gives one clip, in random order, before any gives another; every clip of a class is given once, in
    random order, before any is given again. A clip with several labels stands in the list of each of them. All of it
    follows from the seed and the number of the draw.

    Args:
        dataset: the training clips.
        seed: of the orders.

    Raises:
        DataError: a class has no clip to give.

    Source: PANNs utils/data_generator.py, BalancedTrainSampler.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        targets = dataset.multi_hot()
        empty = [label for label, count in zip(dataset.labels, targets.sum(axis=0), strict=True) if not count]
        if empty:
            raise DataError(
                f"{dataset.root}: sampling class by class needs a training clip of every class; none of "
                f"{', '.join(map(repr, empty[:5]))}{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}; add "
                "clips, or take the classes out"
            )
        self._members = [np.flatnonzero(column) for column in targets.T]
        self._classes = _Cycle(len(self._members), seed, 2)
        self._clips = [_Cycle(len(members), seed, 3, index) for index, members in enumerate(self._members)]

    def __call__(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the draws ``start`` to ``start + count`` of the run, ``(count,)`` indices."""
        return np.array([self._draw(place) for place in range(start, start + count)], np.int64)

    def _draw(self, place: int) -> int:
        label = self._classes[place]
        return int(self._members[label][self._clips[label][place // self._classes.size]])
