"""``TFAudioClassifier``: recordings, pictures and videos in, predictions out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from infer_tf.members import Members
from infer_tf.streaming import EventStream, JoinedWindows, Scored
from models_zoo.audio import AudioSource, as_waveform, load_audio, stream_audio
from models_zoo.cards import ModelCard, ModelOutput
from models_zoo.decoding import check_window, class_names, decode, legal_segments
from models_zoo.ensembles import Mean
from models_zoo.errors import (
    AudioDecodeError,
    CardError,
    ImageDecodeError,
    ModelFileError,
    UnknownNameError,
    VideoDecodeError,
    WaveformError,
)
from models_zoo.events import EventOptions
from models_zoo.files import opened
from models_zoo.images import ImageSource
from models_zoo.prediction import Event, Prediction, average_predictions
from models_zoo.registry import get_card, list_models, list_shipped, shipped_model
from models_zoo.specs import FrontendSpec
from models_zoo.video import chosen_frames, read_video_audio, read_video_frames

if TYPE_CHECKING:
    from infer_tf.frontend import TFFrontend

__all__ = ["Frames", "Inputs", "Source", "TFAudioClassifier", "find_model"]

Source: TypeAlias = AudioSource | NDArray[Any]
"""One clip: a path, a file's contents, an open file, or an array."""

Inputs: TypeAlias = Mapping[str, Any]
"""What a model takes beside the audio of one clip: the card's name of an input -> array without a batch axis, or a
picture."""

_T = TypeVar("_T")
_Outputs: TypeAlias = dict[str, NDArray[np.float32]]
_Extras: TypeAlias = dict[str, NDArray[Any]]

Frames: TypeAlias = Literal["middle", "all"] | Sequence[int]
"""Which of the ten evenly spaced frames of a video."""

_BATCH_VALUES = 80 * 32000  # as _BATCH_SECONDS, of a model without a sample rate
_SILENCE = np.zeros(0, np.float32)  # what a model that looks at pictures alone hears

_BATCH_SECONDS = 80.0  # what is scored at once, and, four times over, what may wait for clips of equal length

_MOST_SECONDS = 1e9  # of a window or a hop


class TFAudioClassifier:
    """An exported model with its front end, for recordings, pictures and arrays; safe to share between threads.

    The way of one clip: ``load_audio`` (or ``as_waveform``), the card's length policy, the TensorFlow front end,
    ``load_image`` for a model that looks at pictures, onnxruntime, the card's activation.

    Pickles as its arguments and is built anew where it is unpickled.

    Several models answer as one, with the mean of their answers: models of the same labels, task and sample rate.
    Those with the same front end share it.

    Args:
        model: path of an ``.onnx`` file, or the name of a shipped model; or several in a list; or a folder, which
            stands for the ``.onnx`` files in it, sorted by name.
        device: where the network runs, ``cpu`` or ``cuda``; the front end always runs on the CPU.
        threads: onnxruntime's threads for one clip, or None for one per core. TensorFlow's threads come from the
            environment (``TF_NUM_INTRAOP_THREADS``, ``TF_NUM_INTEROP_THREADS``).
        max_seconds: longest recording ``predict`` and ``embed`` read; ``predict_windows`` has no limit.
        weights: of several models' answers, in order; None for equal ones.
        mean: of several models' ``probabilities``, or of their ``logits``.
        encoder: for a model that takes embeddings beside audio: path of the ``.onnx`` file that computes them of the
            same audio, with an output of the needed shape, or the name of a shipped model. Without it they are given
            with each clip, in ``inputs``.

    Attributes:
        card: the model's card; of several models, one that describes their mean.
        labels: class names in order.

    Raises:
        ModelFileError: see :class:`infer_tf.OnnxSession`; or the model takes neither audio nor pictures; or a folder
            without models.
        CardError: several models that cannot answer together, or impossible weights; named in ``field``.
        UnknownNameError: neither a path nor a shipped model, or an unknown device.
        DeviceError: the device is not there, or this process was forked after TensorFlow had started.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        device: str = "cpu",
        threads: int | None = None,
        *,
        max_seconds: float = 600.0,
        weights: Sequence[float] | None = None,
        mean: Mean = "probabilities",
        encoder: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(max_seconds, bool) or not isinstance(max_seconds, (int, float)) or not max_seconds > 0:
            raise WaveformError(f"max_seconds: got {max_seconds!r}; expected seconds, more than 0", code="range")
        if mean not in ("probabilities", "logits"):
            raise UnknownNameError("mean", mean, ("probabilities", "logits"))
        given = _several(model)
        self.paths = tuple(find_model(one) for one in given)
        names = [_lasting(one, path) for one, path in zip(given, self.paths, strict=True)]
        beside = None if encoder is None else find_model(encoder)
        self.max_seconds = float(max_seconds)
        self._arguments = (names, device, threads)
        self._options = {
            "max_seconds": self.max_seconds,
            "weights": weights,
            "mean": mean,
            "encoder": None if encoder is None or beside is None else _lasting(encoder, beside),
        }
        self._members = Members(self.paths, device, threads, weights=weights, mean=mean, encoder=beside)
        self.card: ModelCard = self._members.card
        self._spec = self.card.frontend
        self._clip = self.card.clip_output()
        self._embeddings = [output for output in self.card.outputs if output.role == "embedding"]
        self.labels: tuple[str, ...] = self.card.labels or class_names(self.card, self._members.num_classes())

    @property
    def name(self) -> str:
        """What finds the (first) model again: the name of a shipped one, else its whole path."""
        return self._arguments[0][0]

    @property
    def sample_rate(self) -> int:
        """Hz of arrays given without a rate.

        Raises:
            ModelFileError: the model hears nothing.
        """
        return self._frontend_spec().sample_rate

    @property
    def frontend(self) -> TFFrontend:
        """The front end, waveform -> features.

        Raises:
            ModelFileError: the model hears nothing.
        """
        return cast("TFFrontend", self._members.frontends[self._frontend_spec()])

    @property
    def _most_values(self) -> int:
        """Samples and values of pictures that are scored at once."""
        return _BATCH_VALUES if self._spec is None else int(_BATCH_SECONDS * self._spec.sample_rate)

    def _frontend_spec(self) -> FrontendSpec:
        if self._spec is None:
            raise ModelFileError(f"model {self.card.name!r} looks at pictures alone; it has no front end for sound")
        return self._spec

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._arguments, self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the model; a later prediction raises ClosedError. Closing twice is fine."""
        self._members.close()

    def warmup(self, seconds: float | None = None, *, inputs: Inputs | None = None) -> None:
        """Score silence once, so that the first real clip does not pay for the building of graphs.

        Args:
            seconds: length of the silence, or None for the shortest legal clip.
            inputs: as in :meth:`predict`; a picture that is left out is black.

        Raises:
            WaveformError: ``seconds`` is no sensible number.
            ClosedError: after :meth:`close`.
        """
        num_samples = self.card.min_samples if seconds is None else self._samples("seconds", seconds)
        policy = self.card.length_policy
        num_samples = -(-max(num_samples, self.card.min_samples) // policy.multiple_of) * policy.multiple_of
        picture = self._members.picture()
        if picture is not None:
            inputs = {picture.name: np.zeros((1, 1, 3), np.uint8), **(inputs or {})}
        silence = np.zeros((1, num_samples if self._members.hears() else 0), np.float32)
        self._run(silence, _repeated(self._members.checked(inputs), 1))

    @overload
    def predict(
        self,
        audio: AudioSource,
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: ImageSource | None = None,
        events: EventOptions | None = None,
        inputs: Inputs | None = None,
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        audio: list[Any] | tuple[Any, ...],
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: ImageSource | Sequence[Any] | None = None,
        events: EventOptions | None = None,
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> list[Prediction]: ...
    @overload
    def predict(
        self,
        audio: NDArray[Any] | None = None,
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: Any = None,
        video: Any = None,
        frames: Frames = "middle",
        events: EventOptions | None = None,
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> Any: ...
    def predict(
        self,
        audio: Any = None,
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: Any = None,
        video: Any = None,
        frames: Frames = "middle",
        events: EventOptions | None = None,
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> Any:
        """Return a Prediction, or a list of them for a list or a 2-D array.

        A batch never changes an answer: clips of equal length are scored together, others apart.

        Args:
            audio: a path, a file's bytes, an open file, a ``(num_samples,)`` array, a ``(batch, num_samples)``
                array, or a list or tuple of any of the first four. Integer arrays are scaled by their type
                (see ``models_zoo.audio.as_waveform``); floats are taken to be in [-1, 1]. None for a model that looks
                at pictures alone.
            sample_rate: rate of arrays, Hz, if it is not the model's; recordings state their own.
            channels_first: a 2-D array is ``(channels, num_samples)`` of one clip, not a batch.
            image: for a model that looks at pictures: one, as ``models_zoo.images.read_image`` takes it; for several
                clips a list of as many, or one that goes for all.
            video: in place of both: a path, a file's bytes or an open file (extra ``video``), or a list of those. The
                model is given what it takes of the sound and the pictures, which are turned as a player shows them.
            frames: which of a video's ten evenly spaced frames: ``middle``, ``all``, or indices 0 to 9. Of several the
                answer is the mean of the probabilities, as published.
            events: how to find events, for a model of that task; what is left out is the card's.
            inputs: what else the model takes, of one clip and without a batch axis, as ``{"classes_mask": mask}``; for
                several clips a list of them, or one that goes for all.

        Raises:
            AudioDecodeError, ImageDecodeError, VideoDecodeError: a file cannot be read; ``code`` says why.
            WaveformError: an array is no waveform, or something is not what the model takes, or is missing; ``code``
                says why.
            ClipLengthError: shorter or longer than the card allows, and it declares no rule for it.
            ModelFileError: the model has no clip scores, or returned NaN.
            CardError: ``events`` for a model of another task.
            UnknownNameError: an event option for a label the model does not have.
            MissingDependencyError: a video without PyAV.
            ClosedError: after :meth:`close`.
        """
        if self._clip is None:
            raise ModelFileError(f"model {self.card.name!r} has no clip scores to predict from; use embed")
        options = self._event_options(events)
        if video is not None:
            _refuse_beside_video(audio, image, sample_rate, channels_first)

            def mean(clips: list[dict[str, Any]]) -> Prediction:
                answers = [self.predict(**clip, events=events) for clip in clips]
                return answers[0] if len(answers) == 1 else average_predictions(answers)

            return self._of_videos(video, frames, inputs, mean)
        _refuse_frames(frames)

        def answer(outputs: _Outputs, num_samples: int) -> Prediction:
            if self.card.length_policy.long == "crop":
                num_samples = min(num_samples, self.card.length_policy.max or num_samples)
            end = num_samples / self.sample_rate if num_samples else 0.0
            return decode(self.card, outputs, end=end, events=options)

        return self._answer(audio, sample_rate, channels_first, answer, inputs, image)

    def _event_options(self, events: EventOptions | None) -> EventOptions | None:
        """Return how to find events in a clip, or None where the model is not for that."""
        if self.card.task == "event_detection":
            return events or EventOptions()
        if events is not None:
            raise CardError(
                f"events: model {self.card.name!r} is for {self.card.task}; events are found by models for "
                "event_detection",
                field="task",
            )
        return None

    @overload
    def embed(
        self,
        audio: AudioSource,
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: ImageSource | None = None,
        inputs: Inputs | None = None,
    ) -> NDArray[np.float32]: ...
    @overload
    def embed(
        self,
        audio: list[Any] | tuple[Any, ...],
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: ImageSource | Sequence[Any] | None = None,
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> list[NDArray[np.float32]]: ...
    @overload
    def embed(
        self,
        audio: NDArray[Any] | None = None,
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: Any = None,
        video: Any = None,
        frames: Frames = "middle",
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> Any: ...
    def embed(
        self,
        audio: Any = None,
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        image: Any = None,
        video: Any = None,
        frames: Frames = "middle",
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> Any:
        """Return an embedding, ``(size,)`` float32, or a list of them for a list or a 2-D array.

        The mean over the windows where the card cuts long clips into windows, and over the frames of a video. A model
        with an embedding for sound and one for pictures is asked for that of what is given.

        Args and Raises: as :meth:`predict`; ModelFileError where the model has no embedding.
        """
        if video is not None:
            _refuse_beside_video(audio, image, sample_rate, channels_first)
            self._embedding_of(None)
            return self._of_videos(
                video,
                frames,
                inputs,
                lambda clips: np.mean([self.embed(**clip) for clip in clips], axis=0, dtype=np.float32),
            )
        _refuse_frames(frames)
        output = self._embedding_of(None if len(self._embeddings) < 2 else (audio is not None, image is not None))
        return self._embed(output, audio, sample_rate, channels_first, image, inputs)

    def embed_audio(
        self,
        audio: Any,
        sample_rate: int | None = None,
        channels_first: bool = False,
        *,
        inputs: Inputs | Sequence[Inputs] | None = None,
    ) -> Any:
        """Return the embedding of sound alone, ``(size,)`` float32, or a list of them for a list or a 2-D array.

        What looks at pictures is not computed.

        Args and Raises: as :meth:`embed`; ModelFileError where no embedding of the model is of sound alone.
        """
        return self._embed(self._embedding_of((True, False)), audio, sample_rate, channels_first, None, inputs)

    def embed_image(self, image: Any, *, inputs: Inputs | Sequence[Inputs] | None = None) -> Any:
        """Return the embedding of a picture alone, ``(size,)`` float32, or a list of them for a list of pictures.

        What hears is not computed.

        Args and Raises: as :meth:`embed`; ModelFileError where no embedding of the model is of pictures alone.
        """
        return self._embed(self._embedding_of((False, True)), None, None, False, image, inputs)

    def _embed(
        self,
        output: ModelOutput,
        audio: Any,
        sample_rate: int | None,
        channels_first: bool,
        image: Any,
        inputs: Inputs | Sequence[Inputs] | None,
    ) -> Any:
        name = output.name
        return self._answer(
            audio,
            sample_rate,
            channels_first,
            lambda outputs, _: outputs[name].mean(axis=0),
            inputs,
            image,
            None if output.needs is None else (name,),
        )

    def _embedding_of(self, of: tuple[bool, bool] | None) -> ModelOutput:
        """Return the embedding computed from (sound, pictures) and nothing else, or, of None, the only one."""
        if not self._embeddings:
            raise ModelFileError(
                f"model {self.card.name!r} has no embedding output; its outputs: "
                f"{', '.join(output.name for output in self.card.outputs)}"
            )
        fitting = [
            output
            for output in self._embeddings
            if of is None
            or of == (self._members.hears([output.name]), self._members.picture([output.name]) is not None)
        ]
        if len(fitting) == 1:
            return fitting[0]
        offered = "; ".join(
            f"{output.name} of {' and '.join(part.name for part in self.card.inputs_of([output.name]))}"
            for output in self._embeddings
        )
        raise ModelFileError(
            f"model {self.card.name!r} has {offered}; ask for what it has with embed_audio, embed_image, or embed of "
            "all it needs"
        )

    def predict_windows(
        self,
        audio: Source,
        window: float = 10.0,
        hop: float = 5.0,
        *,
        sample_rate: int | None = None,
        channels_first: bool = False,
        events: EventOptions | None = None,
        inputs: Inputs | None = None,
    ) -> Iterator[Prediction]:
        """Yield a Prediction for each window of a recording of any length, in constant memory.

        Windows begin every ``hop`` seconds from the start; the last one ends exactly with the recording and so may
        overlap its neighbour by more than the others do (``Prediction.start`` and ``end`` say where each lies). A
        recording no longer than one window is scored whole, by the card's length policy.

        Of a model for event detection, the windows are joined: ``Prediction.events`` are the events of the recording
        that became final with a window, so that each event is in one of them, whole. ``hop`` is rounded down to whole
        frames of the output; the last window begins on a frame, and so may end before the recording, by less than one.

        Args:
            audio: a path, a file's bytes, an open file, or a ``(num_samples,)`` array.
            window: seconds.
            hop: seconds between the beginnings of windows.
            sample_rate, channels_first, events: as in :meth:`predict`.
            inputs: as in :meth:`predict`, those that go for every window; embeddings come from ``encoder``.

        Raises:
            WaveformError: ``window`` or ``hop`` is no sensible number; or as :meth:`predict`.
            ClipLengthError: ``window`` is not a legal clip length for this model.
            AudioDecodeError, ModelFileError, CardError, UnknownNameError, ClosedError: as :meth:`predict`.
        """
        if self._clip is None:
            raise ModelFileError(f"model {self.card.name!r} has no clip scores to predict from; use embed_windows")
        if self._event_options(events) is not None:
            return self._predictions(self._joined(audio, window, hop, sample_rate, channels_first, events, inputs))
        windows = self._windows_of(audio, window, hop, sample_rate, channels_first, inputs)
        return (decode(self.card, outputs, start=start, end=end) for outputs, start, end in windows)

    def _predictions(self, windows: Iterator[Scored]) -> Iterator[Prediction]:
        """Yield the prediction of each window, the last events with the last one."""
        held: Prediction | None = None
        for scored in windows:
            found = tuple(scored.events)
            if scored.outputs is None:
                assert held is not None  # a recording that ended with a window
                held = replace(held, events=(*(held.events or ()), *found))
                continue
            if held is not None:
                yield held
            start, end = scored.start / self.sample_rate, scored.end / self.sample_rate
            held = replace(decode(self.card, scored.outputs, start=start, end=end), events=found)
        if held is not None:
            yield held

    def detect(
        self,
        audio: Source,
        window: float = 10.0,
        hop: float = 5.0,
        *,
        sample_rate: int | None = None,
        channels_first: bool = False,
        events: EventOptions | None = None,
        inputs: Inputs | None = None,
    ) -> Iterator[Event]:
        """Yield the events of a recording of any length as they become final, in constant memory.

        Windows overlap, and their frame scores are cross-faded into those of the recording before anything else is
        done with them: no event is cut or doubled where a window ends. For any model that scores frames.

        Args:
            audio: a path, a file's bytes, an open file, or a ``(num_samples,)`` array.
            window: seconds; best the length of the clips the model was trained on.
            hop: seconds between the beginnings of windows, at most ``window``; rounded down to whole frames.
            sample_rate, channels_first: of an array, as in :meth:`predict`.
            events: how to find events; what is left out is the card's.
            inputs: as in :meth:`predict`, those that go for every window; embeddings come from ``encoder``.

        Raises:
            CardError: the model scores no frames.
            UnknownNameError: an event option for a label the model does not have.
            WaveformError: ``window`` or ``hop`` is no sensible number; or as :meth:`predict`.
            ClipLengthError: ``window`` is not a legal clip length for this model.
            AudioDecodeError, ModelFileError, ClosedError: as :meth:`predict`.
        """
        joined = self._joined(audio, window, hop, sample_rate, channels_first, events, inputs)
        return (event for scored in joined for event in scored.events)

    def stream(
        self,
        window: float = 10.0,
        hop: float = 5.0,
        *,
        sample_rate: int | None = None,
        channels_first: bool = False,
        events: EventOptions | None = None,
        inputs: Inputs | None = None,
    ) -> EventStream:
        """Return a stream that takes audio in chunks and returns events as they become final.

        Args:
            window, hop, events, inputs: as in :meth:`detect`. Shorter ones answer sooner, from less context: see
                :attr:`EventStream.latency`.
            sample_rate: of the chunks, Hz; None for the model's.
            channels_first: chunks are ``(channels, num_samples)``.

        Raises:
            CardError, UnknownNameError, WaveformError, ClipLengthError, ClosedError: as :meth:`detect`.
        """
        windows = self._joiner(window, hop, events, inputs)
        return EventStream(windows, self.card, sample_rate=sample_rate, channels_first=channels_first)

    def _joiner(self, window: float, hop: float, events: EventOptions | None, inputs: Inputs | None) -> JoinedWindows:
        self._members.check_usable()
        size, step = self._samples("window", window), self._samples("hop", hop)
        options = (events or EventOptions()).over(self.card)
        return JoinedWindows(self.card, self._window_runner(inputs), size, step, self.labels, options)

    def _window_runner(
        self, inputs: Inputs | None, outputs: Sequence[str] | None = None
    ) -> Callable[[NDArray[np.float32]], _Outputs]:
        """Return what scores the segments of a window, given inputs that go for every window."""
        self._check_hears(outputs)
        self._refuse_of_one_clip(inputs)
        extras = self._members.checked(inputs, outputs)
        return lambda segments: self._run(segments, _repeated(extras, len(segments)), outputs)

    def _refuse_of_one_clip(self, inputs: Inputs | None) -> None:
        """Refuse inputs that go for a whole clip, where parts of it are scored by themselves."""
        for name in inputs or ():
            part = self._members.extras.get(name)
            if part is not None and (part.source == "encoder" or not all(axis.isdigit() for axis in part.axes[1:])):
                raise WaveformError(
                    f"input {name!r} belongs to one clip, and every window is another one; "
                    + ("compute it with encoder=..." if part.source == "encoder" else "use predict"),
                    code="type",
                )

    def _joined(
        self,
        audio: Source,
        window: float,
        hop: float,
        sample_rate: int | None,
        channels_first: bool,
        events: EventOptions | None,
        inputs: Inputs | None,
    ) -> Iterator[Scored]:
        """Return the joined windows of a recording; refuse bad arguments at once."""
        joined = self._joiner(window, hop, events, inputs)
        blocks = self._blocks(audio, sample_rate, channels_first)

        def scored() -> Iterator[Scored]:
            for block in blocks:
                yield from joined.feed(block)
            yield from joined.close()

        return scored()

    def predict_average(
        self,
        audio: Source,
        window: float = 10.0,
        hop: float = 5.0,
        *,
        sample_rate: int | None = None,
        channels_first: bool = False,
        inputs: Inputs | None = None,
    ) -> Prediction:
        """Return one Prediction for a recording of any length: the mean over its windows, in constant memory.

        What :func:`models_zoo.prediction.average_predictions` makes of :meth:`predict_windows`: every window counts
        once. A network that was trained on 10 s clips is thus asked about 10 s clips only.

        Args and Raises: as :meth:`predict_windows`.
        """
        windows = self.predict_windows(
            audio, window, hop, sample_rate=sample_rate, channels_first=channels_first, inputs=inputs
        )
        return average_predictions(windows)

    def embed_windows(
        self,
        audio: Source,
        window: float = 10.0,
        hop: float = 5.0,
        *,
        sample_rate: int | None = None,
        channels_first: bool = False,
        inputs: Inputs | None = None,
    ) -> Iterator[tuple[float, float, NDArray[np.float32]]]:
        """Yield (start, end, embedding) for each window of a recording of any length, in constant memory.

        Start and end are seconds, embeddings ``(size,)`` float32; the windows are those of :meth:`predict_windows`.

        Args and Raises: as :meth:`predict_windows`; ModelFileError where the model has no embedding.
        """
        output = self._embedding_of(None if len(self._embeddings) < 2 else (True, False))
        name = output.name
        asked = None if output.needs is None else (name,)
        windows = self._windows_of(audio, window, hop, sample_rate, channels_first, inputs, asked)
        return ((start, end, outputs[name].mean(axis=0)) for outputs, start, end in windows)

    def _windows_of(
        self,
        audio: Source,
        window: float,
        hop: float,
        sample_rate: int | None,
        channels_first: bool,
        inputs: Inputs | None,
        outputs: Sequence[str] | None = None,
    ) -> Iterator[tuple[_Outputs, float, float]]:
        """Return the outputs for each window with its start and end in seconds; refuse bad arguments at once."""
        self._members.check_usable()
        size, step = self._samples("window", window), self._samples("hop", hop)
        check_window(size, self.card)
        run = self._window_runner(inputs, outputs)
        windows = _windows(self._blocks(audio, sample_rate, channels_first), size, step)
        return (
            (
                run(legal_segments(waveform, self.card)),
                start / self.sample_rate,
                (start + len(waveform)) / self.sample_rate,
            )
            for waveform, start in windows
        )

    def _blocks(self, source: Source, sample_rate: int | None, channels_first: bool) -> Iterable[NDArray[np.float32]]:
        """Return a recording of any length in blocks at the model's rate, or an array as one."""
        if _is_array(source):
            return [self._waveform(source, sample_rate, channels_first)]
        _refuse_rate(sample_rate)
        return stream_audio(cast(AudioSource, source), self._frontend_spec())

    def _samples(self, name: str, seconds: float) -> int:
        number = isinstance(seconds, (int, float, np.integer, np.floating)) and not isinstance(seconds, bool)
        if not number or not abs(seconds) <= _MOST_SECONDS:
            raise WaveformError(f"{name}: got {seconds!r}; expected seconds, at most {_MOST_SECONDS:.0e}", code="range")
        samples = round(float(seconds) * self.sample_rate)
        if samples < 1:
            raise WaveformError(f"{name}: got {seconds!r} s; expected more than 0", code="range")
        return samples

    def _of_videos(
        self,
        video: Any,
        frames: Frames,
        inputs: Inputs | Sequence[Inputs] | None,
        answer: Callable[[list[dict[str, Any]]], _T],
    ) -> _T | list[_T]:
        """Return ``answer`` of what the model takes of a video, a clip for each frame, or of each of several videos."""
        chosen = chosen_frames(frames)
        several = isinstance(video, (list, tuple))
        videos = video if several else [video]
        if inputs is None or isinstance(inputs, Mapping):
            inputs = [inputs or {}] * len(videos)
        self._check_count(inputs, len(videos))
        if not several:
            return answer(self._clips_of_video(video, chosen, inputs[0]))
        answers = []
        for position, (one, own) in enumerate(zip(videos, inputs, strict=True)):
            with _naming(position):
                answers.append(answer(self._clips_of_video(one, chosen, own)))
        return answers

    def _clips_of_video(self, video: Any, chosen: Sequence[int], inputs: Inputs) -> list[dict[str, Any]]:
        """Return what ``predict`` and ``embed`` are given for each chosen frame of a video, one by itself."""
        given: dict[str, Any] = {"inputs": inputs}
        pictures: list[dict[str, Any]] = [{}]
        with ExitStack() as stack:
            if callable(getattr(video, "read", None)):  # one that cannot seek could not be read a second time
                video, _ = stack.enter_context(opened(video, VideoDecodeError, "an open file"))
            if self._members.picture() is not None:
                frames = read_video_frames(video, chosen, self.card.image)
                pictures = [{"image": np.asarray(frame)} for frame in frames]
            if self._members.hears():
                given["audio"] = read_video_audio(video, self._frontend_spec(), max_seconds=self.max_seconds)
        return [{**given, **picture} for picture in pictures]

    def _answer(
        self,
        audio: Any,
        sample_rate: int | None,
        channels_first: bool,
        answer: Callable[[_Outputs, int], _T],
        inputs: Inputs | Sequence[Inputs] | None,
        image: Any = None,
        outputs: Sequence[str] | None = None,
    ) -> _T | list[_T]:
        """Return ``answer(outputs, num_samples)`` of one clip, or the list of them for several."""
        several: Iterable[NDArray[np.float32]] | None = None
        count = 1
        if audio is None:
            if self._members.hears(outputs):
                raise WaveformError(
                    f"audio: missing; expected a recording, which model {self.card.name!r} hears"
                    f"{' beside the picture' if self._members.picture(outputs) else ''}: pass audio=..., or video=...",
                    code="missing",
                )
            _refuse_rate(sample_rate)
            if isinstance(image, (list, tuple)):
                count = len(image)
                several = repeat(_SILENCE, count)
        else:
            self._check_hears(outputs)
            if isinstance(audio, (list, tuple)):
                several, count = self._waveforms(audio, sample_rate, channels_first), len(audio)
            elif _is_array(audio) and (array := _array(audio)).ndim == 2 and not channels_first:
                several, count = as_waveform(array, self._frontend_spec(), sample_rate=sample_rate), len(array)
        extras = self._extras(self._with_pictures(inputs, image, count, outputs), count, outputs)
        if several is not None:
            return self._answer_in_groups(several, extras, answer, outputs)
        waveform = _SILENCE if audio is None else self._waveform(audio, sample_rate, channels_first)
        segments, stacked = self._segments(waveform, next(extras))
        return answer(self._run(segments, stacked, outputs), len(waveform))

    def _check_hears(self, outputs: Sequence[str] | None = None) -> None:
        if not self._members.hears(outputs):
            raise WaveformError(
                f"audio: model {self.card.name!r} looks at pictures alone{'' if outputs is None else ' for this'}; "
                "pass image=... and leave the audio out",
                code="type",
            )

    def _with_pictures(
        self, inputs: Inputs | Sequence[Inputs] | None, image: Any, count: int, outputs: Sequence[str] | None
    ) -> Inputs | Sequence[Inputs] | None:
        """Return ``inputs`` with the pictures among them."""
        if image is None:
            return inputs
        part = self._members.picture(outputs)
        if part is None:
            raise WaveformError(
                f"image: model {self.card.name!r} looks at no pictures{'' if outputs is None else ' for this'}; leave "
                "it out, or use a model that does",
                code="type",
            )
        if not isinstance(image, (list, tuple)):
            if inputs is None or isinstance(inputs, Mapping):
                return {**(inputs or {}), part.name: image}
            image = [image] * count
        if len(image) != count:
            raise WaveformError(
                f"image: got {len(image)} pictures for {count} clip{'' if count == 1 else 's'}; expected one for each, "
                "in their order, or one by itself for all",
                code="shape",
            )
        if inputs is None or isinstance(inputs, Mapping):
            return [{**(inputs or {}), part.name: one} for one in image]
        self._check_count(inputs, count)
        return [{**(own or {}), part.name: one} for own, one in zip(inputs, image, strict=True)]

    def _check_count(self, inputs: Sequence[Inputs], count: int) -> None:
        if not isinstance(inputs, (list, tuple)) or len(inputs) != count:
            got = f"{len(inputs)} of them" if isinstance(inputs, (list, tuple)) else type(inputs).__name__
            raise WaveformError(
                f"inputs: got {got} for {count} clips; expected a mapping of name -> array for each, or one for all",
                code="type",
            )
        for position, own in enumerate(inputs):
            if own is not None and not isinstance(own, Mapping):
                raise WaveformError(
                    f"inputs: got {type(own).__name__} for clip {position} (counted from 0); expected a mapping of "
                    "name -> array",
                    code="type",
                )

    def _extras(
        self, inputs: Inputs | Sequence[Inputs] | None, count: int, outputs: Sequence[str] | None
    ) -> Iterator[_Extras]:
        """Return the checked inputs of each of ``count`` clips, read one by one."""
        if inputs is None or isinstance(inputs, Mapping):
            # Of no clips nothing is missing.
            return repeat(self._members.checked(inputs, outputs) if count else {}, count)
        self._check_count(inputs, count)
        return self._checked_each(inputs, outputs)

    def _checked_each(self, inputs: Sequence[Inputs], outputs: Sequence[str] | None) -> Iterator[_Extras]:
        for position, one in enumerate(inputs):
            with _naming(position):
                checked = self._members.checked(one, outputs)
            yield checked

    def _segments(self, waveform: NDArray[np.float32], extras: _Extras) -> tuple[NDArray[np.float32], _Extras]:
        """Return what is scored of a clip, with the inputs beside it for each segment."""
        segments = legal_segments(waveform, self.card) if len(waveform) else waveform[None]
        if len(segments) > 1:
            self._refuse_of_one_clip(extras)
        return segments, _repeated(extras, len(segments))

    def _answer_in_groups(
        self,
        waveforms: Iterable[NDArray[np.float32]],
        extras: Iterable[_Extras],
        answer: Callable[[_Outputs, int], _T],
        outputs: Sequence[str] | None,
    ) -> list[_T]:
        """Score clips of equal length together, holding a bounded amount of audio and pictures at any time."""
        answers: dict[int, _T] = {}
        waiting: dict[Any, list[tuple[int, int, NDArray[np.float32], _Extras]]] = {}
        limit = self._most_values
        held = 0

        def size(group: Iterable[tuple[int, int, NDArray[np.float32], _Extras]]) -> int:
            return sum(segments.size + sum(map(np.size, beside.values())) for _, _, segments, beside in group)

        def score(group: list[tuple[int, int, NDArray[np.float32], _Extras]]) -> int:
            stacked = {name: np.concatenate([beside[name] for *_, beside in group]) for name in group[0][3]}
            found = self._run(np.concatenate([segments for _, _, segments, _ in group]), stacked, outputs)
            first = 0
            for position, num_samples, segments, _ in group:
                part = slice(first, first + len(segments))
                answers[position] = answer({name: value[part] for name, value in found.items()}, num_samples)
                first += len(segments)
            return size(group)

        for position, (waveform, own) in enumerate(zip(waveforms, extras, strict=True)):
            with _naming(position):
                segments, stacked = self._segments(waveform, own)
            alike = (segments.shape[1], *((name, value.shape[1:]) for name, value in stacked.items()))
            waiting.setdefault(alike, []).append((position, len(waveform), segments, stacked))
            held += size(waiting[alike][-1:])
            if size(waiting[alike]) >= limit:
                held -= score(waiting.pop(alike))
            if held > 4 * limit:
                held -= sum(score(waiting.pop(alike)) for alike in list(waiting))
        for group in waiting.values():
            score(group)
        return [answers[position] for position in range(len(answers))]

    def _waveforms(
        self, sources: Iterable[Any], sample_rate: int | None, channels_first: bool
    ) -> Iterator[NDArray[np.float32]]:
        for position, source in enumerate(sources):
            with _naming(position):
                waveform = self._waveform(source, sample_rate, channels_first)
            yield waveform

    def _waveform(self, source: Any, sample_rate: int | None, channels_first: bool) -> NDArray[np.float32]:
        if not _is_array(source):
            _refuse_rate(sample_rate)
            return load_audio(source, self._frontend_spec(), max_seconds=self.max_seconds)
        array = _array(source)
        if array.ndim != 1 and not (channels_first and array.ndim == 2):
            raise WaveformError(
                f"got an array of shape {array.shape} for one clip; expected (num_samples,), or, with "
                "channels_first=True, (channels, num_samples)",
                code="rank",
            )
        return as_waveform(array, self._frontend_spec(), sample_rate=sample_rate, channels_first=channels_first)

    def _run(self, segments: NDArray[np.float32], extras: _Extras, outputs: Sequence[str] | None = None) -> _Outputs:
        """Return the outputs of ``(segments, num_samples)`` waveforms of a legal length, a bounded part at a time."""
        values = segments.shape[1] + sum(value[0].size for value in extras.values())
        rows = max(1, self._most_values // values)
        if len(segments) > rows:
            cuts = [slice(first, first + rows) for first in range(0, len(segments), rows)]
            parts = [
                self._run(segments[cut], {name: value[cut] for name, value in extras.items()}, outputs) for cut in cuts
            ]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._members.run(segments, extras, outputs)


def _lasting(given: str | os.PathLike[str], path: Path) -> str:
    """Return what finds the model again wherever this is unpickled: the name of a shipped one, else the whole path."""
    return str(given if path != Path(given) else path.resolve())


def _rebuild(arguments: tuple[list[str], str, int | None], options: dict[str, Any]) -> TFAudioClassifier:
    return TFAudioClassifier(*arguments, **options)


def _windows(blocks: Iterable[NDArray[np.float32]], size: int, step: int) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Yield the windows of a recording with the samples at which they begin; the last one ends with the recording."""
    kept = np.zeros(0, np.float32)  # samples from `offset` on: the next window and the last `size` received
    offset = following = 0
    scored = -1  # beginning of the last window yielded
    for block in blocks:
        kept = np.concatenate([kept, block])
        received = offset + len(kept)
        while following + size <= received:
            yield kept[following - offset : following - offset + size], following
            scored, following = following, following + step
        keep_from = max(offset, min(following, received - size))
        kept, offset = kept[keep_from - offset :], keep_from
    received = offset + len(kept)
    last = max(0, received - size)
    if scored != last:
        yield kept[last - offset :], last


def _repeated(extras: _Extras, count: int) -> _Extras:
    """Return the inputs of one clip with a batch axis, for each of its segments."""
    return {name: np.repeat(value[None], count, axis=0) for name, value in extras.items()}


def _several(model: Any) -> list[str | os.PathLike[str]]:
    """Return the models meant by one, a list of them, or a folder of them."""
    if isinstance(model, (list, tuple)) and model and all(isinstance(one, (str, os.PathLike)) for one in model):
        return list(model)
    if not isinstance(model, (str, os.PathLike)):
        raise ModelFileError(
            f"got {type(model).__name__}; expected the path of an .onnx file, a model's name, a folder of .onnx files, "
            "or a list of models, at least one"
        )
    if not os.path.isdir(model):
        return [model]
    found = sorted(path for path in Path(model).iterdir() if path.suffix == ".onnx")
    if not found:
        raise ModelFileError(f"{model} is a folder without .onnx files; expected a model, or a folder of models")
    return list(found)


def find_model(model: str | os.PathLike[str]) -> Path:
    """Return the file of a model given by path or by the name of a shipped model.

    Raises:
        UnknownNameError: no such file, and no model of that name; near names are suggested.
        ModelFileError: the name of a published model whose weights do not ship.
    """
    name = os.fspath(model)
    if not isinstance(model, str) or os.path.isfile(name):
        return Path(model)
    if name in list_shipped():
        return shipped_model(name)
    if os.path.exists(name) or Path(name).name != name or Path(name).suffix:
        return Path(name)
    if name in list_models():
        checkpoint = get_card(name).checkpoint
        raise ModelFileError(
            f"the weights of {name!r} ({checkpoint.file if checkpoint else 'no file'}) do not ship with crossfade; in "
            f"a checkout, python export/pt2onnx.py {name} -o {name}.onnx downloads and exports them"
        )
    raise UnknownNameError("model", name, [*list_shipped(), *list_models()])


@contextmanager
def _naming(position: int) -> Iterator[None]:
    """Say in an error which clip of a batch it is about."""
    try:
        yield
    except (AudioDecodeError, ImageDecodeError, VideoDecodeError, WaveformError) as error:
        error.args = (f"clip {position} (counted from 0): {error}",)
        raise


def _is_array(source: object) -> bool:
    return isinstance(source, np.ndarray) or hasattr(source, "__array__")


def _array(source: Any) -> NDArray[Any]:
    try:
        return np.asarray(source)
    except Exception as error:  # whatever a foreign array raises, e.g. a tensor that requires gradients
        raise WaveformError(
            f"got {type(source).__name__}, which is not readable as an array: {error}", code="type"
        ) from error


def _refuse_beside_video(audio: Any, image: Any, sample_rate: int | None, channels_first: bool) -> None:
    if audio is not None or image is not None:
        raise WaveformError(
            f"video: got {'audio' if audio is not None else 'image'} beside it; a video holds both: leave that out, or "
            "pass audio and image without video",
            code="type",
        )
    _refuse_rate(sample_rate)
    if channels_first:
        raise WaveformError("channels_first: got it with a video; it is said of arrays: leave it out", code="type")


def _refuse_frames(frames: Any) -> None:
    if not isinstance(frames, str) or frames != "middle":
        raise WaveformError(f"frames: got {frames!r} without a video; pass video=..., or leave it out", code="type")


def _refuse_rate(sample_rate: int | None) -> None:
    if sample_rate is not None:
        raise WaveformError(
            f"sample_rate: got {sample_rate!r} with a recording, which states its own rate; leave it out",
            code="sample_rate",
        )
