"""The network or networks behind a classifier: each distinct front end is computed once, whoever shares it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infer_tf.backend import claim_tensorflow
from infer_tf.extras import as_declared, check_axes, extras_of, shown
from infer_tf.session import OnnxSession
from models_zoo.cards import ModelCard, ModelInput, ModelOutput
from models_zoo.decoding import legal_segments
from models_zoo.ensembles import Mean, check_members, common_policy, mean_scores, normalised_weights
from models_zoo.errors import CardError, ClipLengthError, ModelFileError, WaveformError
from models_zoo.events import FrameGrid
from models_zoo.specs import FrontendSpec

__all__ = ["Members"]

_FRAMES = "frame_scores"
"""Output of several models that holds the mean of their frame scores."""


class Members:
    """One or several models that answer together.

    Args:
        models: paths of ``.onnx`` files, at least one.
        device, threads: see :class:`OnnxSession`.
        weights: of the answers, one per model; None for equal ones.
        mean: of ``logits`` or ``probabilities``.
        encoder: path of an ``.onnx`` file that computes the inputs of source ``encoder``, or None.

    Attributes:
        card: of the model; for several, a card that describes their mean.
        frontends: distinct front ends, the first model's first; none of models that hear nothing.
        extras: name -> the inputs that do not come from audio: pictures, embeddings and masks.

    Raises:
        ModelFileError: see :class:`OnnxSession`; or a model takes neither sound nor pictures.
        CardError: models that do not go together, or impossible weights, or an encoder that does not fit; named in
            ``field``.
    """

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str]],
        device: str,
        threads: int | None,
        *,
        weights: Sequence[float] | None = None,
        mean: Mean = "probabilities",
        encoder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._sessions = [OnnxSession(model, device, threads) for model in models]
        self._cards = [session.card for session in self._sessions]
        for card in self._cards:
            _check_sources(card)
        self._weights = normalised_weights(weights, len(models))
        self._mean: Mean = mean
        if len(models) > 1:
            check_members(self._cards, mean)
            self.card = _card_of(self._cards, self._weights, mean)
        else:
            self.card = self._cards[0]
        specs = [card.frontend for card in self._cards if card.frontend is not None]
        self.frontends: dict[FrontendSpec, Any] = {}
        if specs:
            tensorflow = claim_tensorflow()
            self._on_cpu: Callable[[], AbstractContextManager[Any]] = lambda: tensorflow.device("/CPU:0")
            from infer_tf.frontend import TFFrontend

            self.frontends = {spec: TFFrontend(spec) for spec in dict.fromkeys(specs)}
        self.extras = extras_of(self._cards)
        encoded = [part for part in self.extras.values() if part.source == "encoder"]
        if encoder is not None and not encoded:
            raise CardError(f"encoder: model {self.card.name!r} takes no embeddings; leave it out", field="inputs")
        self._encoder = None if encoder is None else Members([encoder], device, threads)
        self._encoded = {} if self._encoder is None else {part.name: self._fitting(part) for part in encoded}
        # By place: to hash and compare a spec for every member of every clip takes a tenth of a millisecond each.
        places = list(self.frontends)
        self._places = [None if card.frontend is None else places.index(card.frontend) for card in self._cards]

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
        if self._encoder is not None:
            self._encoder.close()

    def _fitting(self, taken: ModelInput) -> str:
        """Return the name of the encoder's output that an input takes."""
        assert self._encoder is not None
        card = self._encoder.card
        if card.sample_rate != self.card.sample_rate:
            raise CardError(
                f"encoder: {card.name!r} hears {card.sample_rate} Hz, {self.card.name!r} {self.card.sample_rate} Hz; "
                "expected the same, or compute the embeddings yourself and pass inputs=...",
                field="frontend.sample_rate",
            )
        for output in card.outputs:
            pairs = zip(output.axes[1:], taken.axes[1:], strict=False)
            if len(output.axes) == len(taken.axes) and all(own == axis or not axis.isdigit() for own, axis in pairs):
                return output.name
        offered = ", ".join(f"{output.name} {shown(output.axes)}" for output in card.outputs)
        raise CardError(
            f"encoder: {card.name!r} returns {offered}; input {taken.name!r} of {self.card.name!r} takes "
            f"{shown(taken.axes)}",
            field="inputs",
        )

    def hears(self, outputs: Sequence[str] | None = None) -> bool:
        """Return whether outputs, by name, or all of them are computed from audio."""
        return any(
            part.source in ("frontend", "waveform") or (part.source == "encoder" and part.name in self._encoded)
            for card in self._cards
            for part in card.inputs_of(outputs)
        )

    def picture(self, outputs: Sequence[str] | None = None) -> ModelInput | None:
        """Return the input that outputs, by name, or all of them take a picture through, or None."""
        return next((part for part in self.needed(outputs).values() if part.source == "image"), None)

    def needed(self, outputs: Sequence[str] | None = None) -> dict[str, ModelInput]:
        """Return the inputs that do not come from audio of outputs, by name, or of all of them."""
        asked = {part.name for card in self._cards for part in card.inputs_of(outputs)}
        return {name: part for name, part in self.extras.items() if name in asked}

    def checked(self, given: Mapping[str, Any] | None, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Return the inputs of one clip that do not come from audio, as the card wants them, without a batch axis.

        Args:
            given: name -> array, or a picture; may leave out what the encoder computes.
            outputs: names of those asked for, or None for all.

        Raises:
            WaveformError: an input that the model does not take, one that is missing, or one of another type or shape.
            ImageDecodeError: a picture that cannot be read.
        """
        given = given or {}
        needed = self.needed(outputs)
        strangers = sorted(set(given) - set(needed))
        if strangers:
            raise WaveformError(
                f"inputs: got {', '.join(strangers)}; model {self.card.name!r} takes "
                f"{', '.join(needed) or 'nothing but audio'}{'' if outputs is None else f' for {outputs[0]}'}",
                code="type",
            )
        for name, part in needed.items():
            if name not in given and part.source == "image":
                raise WaveformError(
                    f"image: missing; model {self.card.name!r} looks at a picture"
                    f"{' beside the audio' if self.hears(outputs) else ''}; pass image=... (or inputs={{{name!r}: "
                    "picture}, which goes for every window), or video=...",
                    code="missing",
                )
            if name not in given and name not in self._encoded:
                encoder = "encoder=... or " if part.source == "encoder" else ""
                raise WaveformError(
                    f"input {name!r} is missing: model {self.card.name!r} takes {part.dtype} {shown(part.axes[1:])} "
                    f"beside the audio; pass {encoder}inputs={{{name!r}: array}}",
                    code="missing",
                )
        return {name: as_declared(self.extras[name], value, self.card.image) for name, value in given.items()}

    def run(
        self,
        waveform: NDArray[np.float32],
        extras: Mapping[str, NDArray[Any]] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Return the outputs on the card for ``(batch, num_samples)`` float32 of a legal length.

        Args:
            waveform: at the model's rate; of no samples where nothing that is asked for comes from audio.
            extras: the inputs that do not come from audio, checked, each with a batch axis.
            outputs: of one model: names of those wanted, or None for all.

        Raises:
            ModelFileError, ClosedError: see :class:`OnnxSession`.
            WaveformError: an input whose axes do not go with those of the others.
            ClipLengthError: clips the encoder does not take.
        """
        self.check_usable()
        beside = self._with_encoded(waveform, extras or {})
        frontends = list(self.frontends.values())
        features: dict[int, NDArray[np.float32]] = {}
        answers: list[dict[str, NDArray[np.float32]]] = []
        for session, card, place in zip(self._sessions, self._cards, self._places, strict=True):
            fed: dict[str, NDArray[Any]] = {}
            for part in card.inputs_of(outputs):
                if part.source == "waveform":
                    fed[part.name] = waveform
                    continue
                if part.name in beside:
                    fed[part.name] = beside[part.name]
                    continue
                assert place is not None  # what is left comes from the front end
                if place not in features:
                    with self._on_cpu():
                        features[place] = frontends[place].features(waveform)
                fed[part.name] = features[place]
            answers.append(session.run(fed, outputs))
            check_axes(card, beside, answers[-1])
        if len(answers) == 1:
            return answers[0]
        pairs = list(zip(answers, self._cards, strict=True))
        scores = [answer[_clip_of(card).name] for answer, card in pairs]
        means: dict[str, NDArray[np.float32]] = {
            self._mean: mean_scores(scores, self._cards, self._weights, self._mean)
        }
        if self.card.frame_output() is not None:
            framed = [_frames_of(answer, card) for answer, card in pairs]
            if len({scores.shape for scores in framed}) > 1:
                raise WaveformError(
                    f"the models score {', '.join(str(scores.shape[1]) for scores in framed)} frames of the clip; "
                    "expected as many: use clips of another length, or another ensemble",
                    code="shape",
                )
            means[_FRAMES] = mean_scores(framed, self._cards, self._weights, self._mean, frames=True)
        return means

    def _with_encoded(
        self, waveform: NDArray[np.float32], extras: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Return ``extras`` with what the encoder computes of the rest."""
        wanted = {name: output for name, output in self._encoded.items() if name not in extras}
        if self._encoder is None or not wanted:
            return extras
        card = self._encoder.card
        heard = np.concatenate([legal_segments(row, card) for row in waveform])
        if len(heard) != len(waveform):
            raise ClipLengthError(
                f"the clip has {waveform.shape[1]} samples; the encoder {card.name!r} takes at most "
                f"{card.length_policy.max}: use a shorter clip, or windows",
                code="too_long",
            )
        outputs = self._encoder.run(heard)
        return {**extras, **{name: outputs[output] for name, output in wanted.items()}}


def _check_sources(card: ModelCard) -> None:
    """Refuse a model that is fed neither from audio nor from pictures."""
    sources = {part.source for part in card.inputs}
    hears = bool(sources & {"frontend", "waveform"})
    if (hears and card.frontend is None) or not (hears or "image" in sources):
        raise ModelFileError(
            f"model {card.name!r} cannot be fed from audio or pictures: no input of it comes from either; use "
            "OnnxSession and feed it yourself"
        )


def _clip_of(card: ModelCard) -> ModelOutput:
    output = card.clip_output()
    assert output is not None  # check_members has seen it
    return output


def _frames_of(answer: Mapping[str, NDArray[np.float32]], card: ModelCard) -> NDArray[np.float32]:
    """Return frame scores as ``(batch, frames, classes)``."""
    frame = card.frame_output()
    assert frame is not None  # _frame_output has seen it
    return np.moveaxis(answer[frame.name], frame.time_axis, 1)


def _frame_output(cards: Sequence[ModelCard], kind: Literal["logit", "probability"]) -> tuple[ModelOutput, ...]:
    """Return the frame scores of models for event detection that answer together; none of others.

    Raises:
        CardError: frames of another length than the first model's, or of another kind than is averaged.
    """
    if cards[0].task != "event_detection":
        return ()
    grids = [FrameGrid.of(card) for card in cards]
    for card, grid in zip(cards, grids, strict=True):
        if grid != grids[0]:
            raise CardError(
                f"{card.name!r} scores frames of {grid.seconds:g} s, {cards[0].name!r} of {grids[0].seconds:g} s; "
                "members share them",
                field="outputs",
            )
    frames = [card.frame_output() for card in cards]
    first = frames[0]
    assert first is not None  # FrameGrid.of has seen it
    if kind == "logit" and any(frame is not None and frame.kind != "logit" for frame in frames):
        raise CardError(
            "a mean of logits needs frame scores that are logits: take that of probabilities", field="outputs"
        )
    classes = first.axes[3 - first.time_axis]
    return (first.replace(name=_FRAMES, kind=kind, axes=("batch", "frames", classes)),)


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
        outputs=(ModelOutput(name=mean, role="clip", kind=kind, axes=axes), *_frame_output(cards, kind)),
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
