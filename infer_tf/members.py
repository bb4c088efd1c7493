"""The network or networks behind a classifier: each distinct front end is computed once, whoever shares it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infer_tf.backend import claim_tensorflow
from infer_tf.session import OnnxSession
from models_zoo.cards import ModelCard, ModelOutput
from models_zoo.ensembles import Mean, check_members, common_policy, mean_scores, normalised_weights
from models_zoo.errors import ModelFileError
from models_zoo.specs import FrontendSpec

__all__ = ["Members"]


class Members:
    """One or several models that answer together.

    Args:
        models: paths of ``.onnx`` files, at least one.
        device, threads: see :class:`OnnxSession`.
        weights: of the answers, one per model; None for equal ones.
        mean: of ``logits`` or ``probabilities``.

    Attributes:
        card: of the model; for several, a card that describes their mean.
        frontends: distinct front ends, the first model's first.

    Raises:
        ModelFileError: see :class:`OnnxSession`; or a model takes inputs other than audio.
        CardError: models that do not go together, or impossible weights; named in ``field``.
    """

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str]],
        device: str,
        threads: int | None,
        *,
        weights: Sequence[float] | None = None,
        mean: Mean = "probabilities",
    ) -> None:
        self._sessions = [OnnxSession(model, device, threads) for model in models]
        self._cards = [session.card for session in self._sessions]
        self._specs = [_spec_of(card) for card in self._cards]
        self._weights = normalised_weights(weights, len(models))
        self._mean: Mean = mean
        if len(models) > 1:
            check_members(self._cards, mean)
            self.card = _card_of(self._cards, self._weights, mean)
        else:
            self.card = self._cards[0]
        tensorflow = claim_tensorflow()
        self._on_cpu: Callable[[], AbstractContextManager[Any]] = lambda: tensorflow.device("/CPU:0")
        from infer_tf.frontend import TFFrontend

        self.frontends: dict[FrontendSpec, Any] = {spec: TFFrontend(spec) for spec in dict.fromkeys(self._specs)}

    def num_classes(self) -> int:
        """Return the number of clip scores, 0 where there are none or the graph does not say."""
        clip = self._cards[0].clip_output()
        size = self._sessions[0].outputs[clip.name][1][-1] if clip else 0
        return size if isinstance(size, int) else 0

    def check_usable(self) -> None:
        """Refuse use after :meth:`close` or in a forked process."""
        for session in self._sessions:
            session.check_usable()

    def close(self) -> None:
        """Release the models. Closing twice is fine."""
        for session in self._sessions:
            session.close()

    def run(self, waveform: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return the outputs on the card for ``(batch, num_samples)`` float32 of a legal length.

        Raises:
            ModelFileError, ClosedError: see :class:`OnnxSession`.
        """
        self.check_usable()
        features: dict[FrontendSpec, NDArray[np.float32]] = {}
        answers: list[dict[str, NDArray[np.float32]]] = []
        for session, card, spec in zip(self._sessions, self._cards, self._specs, strict=True):
            fed: dict[str, NDArray[Any]] = {}
            for part in card.inputs:
                if part.source == "waveform":
                    fed[part.name] = waveform
                    continue
                if spec not in features:
                    with self._on_cpu():
                        features[spec] = self.frontends[spec].features(waveform)
                fed[part.name] = features[spec]
            answers.append(session.run(fed))
        if len(answers) == 1:
            return answers[0]
        scores = [answer[_clip_of(card).name] for answer, card in zip(answers, self._cards, strict=True)]
        return {self._mean: mean_scores(scores, self._cards, self._weights, self._mean)}


def _spec_of(card: ModelCard) -> FrontendSpec:
    foreign = [part.name for part in card.inputs if part.source not in ("frontend", "waveform")]
    if card.frontend is None or foreign:
        raise ModelFileError(
            f"model {card.name!r} cannot be fed from audio alone "
            f"({f'inputs {foreign} come from elsewhere' if foreign else 'its card has no front end'}); "
            "use OnnxSession and feed it yourself"
        )
    return card.frontend


def _clip_of(card: ModelCard) -> ModelOutput:
    output = card.clip_output()
    assert output is not None  # check_members has seen it
    return output


def _card_of(cards: Sequence[ModelCard], weights: Sequence[float], mean: Mean) -> ModelCard:
    """Return the card of several models' mean: what the first says where they agree, and who they are."""
    first = cards[0]
    axes = ("batch", _clip_of(first).axes[-1])
    kind: Literal["logit", "probability"] = "logit" if mean == "logits" else "probability"
    return first.replace(
        name=f"mean-of-{len(cards)}",
        system="crossfade",
        architecture="ensemble",
        options={},
        outputs=(ModelOutput(name=mean, role="clip", kind=kind, axes=axes),),
        length_policy=common_policy(cards),
        metrics={},
        parameters=None,
        macs=None,
        checkpoint=None,
        provenance={
            "members": [{"name": card.name, "weight": weight} for card, weight in zip(cards, weights, strict=True)],
            "mean": mean,
        },
    )
