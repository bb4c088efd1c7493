"""onnxruntime behind one door: the card is read and checked before anything runs."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infer_tf.modelfile import check_model_bytes
from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.errors import (
    CardError,
    ClosedError,
    DeviceError,
    MissingDependencyError,
    ModelFileError,
    UnknownNameError,
    WaveformError,
)

__all__ = ["OnnxSession"]

_MAX_THREADS = 1024
_MAX_BYTES = 1 << 31  # protobuf's own limit
_NUMPY_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(bool)": "bool"}

# Without TF32 and with a plain cuDNN search: the same numbers as on the CPU to 1e-4, and no search of seconds for
# every new clip length.
_CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}


def _load_runtime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingDependencyError(
            "onnxruntime is not installed; install crossfade[infer] (CPU) or crossfade[infer-gpu] (CUDA)"
        ) from None
    return onnxruntime


def _read(model: str | os.PathLike[str] | bytes) -> tuple[bytes, str]:
    if isinstance(model, bytes):
        return model, "the model"
    path = Path(model)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not path.is_dir():  # a device or a pipe may never end
            raise ModelFileError(f"{path} is no regular file; expected an ONNX file written by export/pt2onnx.py")
        size = status.st_size
        if size > _MAX_BYTES:
            raise ModelFileError(f"{path} has {size} bytes; an ONNX model in one file has at most {_MAX_BYTES}")
        return path.read_bytes(), str(path)
    except ModelFileError:
        raise
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; expected an ONNX file written by export/pt2onnx.py") from None
    except IsADirectoryError:
        raise ModelFileError(f"{path} is a folder; expected an ONNX file written by export/pt2onnx.py") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ModelFileError(f"{path} cannot be read: {error}") from None


def _providers(runtime: Any, device: str) -> list[Any]:
    if device not in ("cpu", "cuda"):
        raise UnknownNameError("device", device, ("cpu", "cuda"))
    if device == "cpu":
        return ["CPUExecutionProvider"]
    available = runtime.get_available_providers()
    if "CUDAExecutionProvider" not in available:
        raise DeviceError(
            f"device 'cuda' was asked for, but the installed onnxruntime {runtime.__version__} has only "
            f"{', '.join(available)}; install crossfade[infer-gpu] (onnxruntime-gpu) in place of crossfade[infer], "
            "or use device='cpu'"
        )
    return [("CUDAExecutionProvider", _CUDA_OPTIONS), "CPUExecutionProvider"]


def _options(runtime: Any, threads: int | None) -> Any:
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= _MAX_THREADS
    ):
        raise DeviceError(f"threads: got {threads!r}; expected a whole number from 1 to {_MAX_THREADS}, or None")
    options = runtime.SessionOptions()
    # A memory plan is kept for every input shape met, so it grows with every new clip length.
    options.enable_mem_pattern = False
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised; nothing is printed besides
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


class OnnxSession:
    """A model file, ready to run; safe to share between threads.

    Args:
        model: path or contents of an ``.onnx`` file that holds its card.
        device: ``cpu`` or ``cuda``; never replaced by the other.
        threads: onnxruntime's threads for one run, or None for one per core.

    Attributes:
        card: the model's card.
        metadata: all of the file's metadata, key -> text.
        inputs, outputs: name -> (NumPy type name, axes), as the graph declares them.

    Raises:
        ModelFileError: no such file, not a whole self-contained ONNX model, no card, or a card that disagrees with
            the graph.
        DeviceError: the device is not there, or ``threads`` is no sensible number.
        UnknownNameError: no such device.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, device: str = "cpu", threads: int | None = None) -> None:
        runtime = _load_runtime()
        providers = _providers(runtime, device)
        options = _options(runtime, threads)
        data, self._name = _read(model)
        check_model_bytes(data, self._name)
        if device == "cuda" and hasattr(runtime, "preload_dlls"):
            runtime.preload_dlls()
        try:
            self._session: Any = runtime.InferenceSession(data, options, providers=providers)
        except Exception as error:  # onnxruntime's errors share no base class
            if device == "cuda" and "CUDA" in str(error):
                raise DeviceError(f"device 'cuda' could not be used: {_first_line(error)}") from error
            raise ModelFileError(f"onnxruntime cannot load {self._name}: {_first_line(error)}") from error
        self._session.disable_fallback()
        if device == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
            raise DeviceError(
                "device 'cuda' was asked for, but onnxruntime fell back to the CPU: its CUDA libraries or the driver "
                "are missing or of another version; repair them, or use device='cpu'"
            )
        self.device = device
        self._process = os.getpid()
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.inputs = _describe(self._session.get_inputs())
        self.outputs = _describe(self._session.get_outputs())
        self.card = self._read_card()
        self._check_card()
        self._output_names = [output.name for output in self.card.outputs]
        self._may_be_minus_infinity = {o.name for o in self.card.outputs if o.kind == "log_probability"}

    def _read_card(self) -> ModelCard:
        if CARD_KEY not in self.metadata:
            raise ModelFileError(
                f"{self._name} holds no model card (metadata key {CARD_KEY!r}); export it with export/pt2onnx.py, "
                "which writes one"
            )
        try:
            return ModelCard.from_json(self.metadata[CARD_KEY])
        except CardError as error:
            raise ModelFileError(f"the card inside {self._name} is not valid: {error}; export it again") from error

    def _check_card(self) -> None:
        for kind, declared, found in (
            ("input", self.card.inputs, self.inputs),
            ("output", self.card.outputs, self.outputs),
        ):
            names = [part.name for part in declared]
            if set(names) != set(found):
                self._disagree(f"the card's {kind}s are {sorted(names)}, the graph's are {sorted(found)}")
        dynamic = {axis for part in self.card.inputs for axis in part.axes if not axis.isdigit()}
        for kind, name, dtype, axes in [
            *(("input", part.name, part.dtype, part.axes) for part in self.card.inputs),
            *(("output", part.name, "float32", part.axes) for part in self.card.outputs),
        ]:
            found_dtype, found_axes = (self.inputs if kind == "input" else self.outputs)[name]
            if found_dtype != dtype:
                self._disagree(f"{kind} {name!r} is {dtype} in the card, {found_dtype} in the graph")
            if len(found_axes) != len(axes):
                self._disagree(f"{kind} {name!r} has axes {axes} in the card, {found_axes} in the graph")
            for axis, size in zip(axes, found_axes, strict=True):
                fixed = isinstance(size, int)
                wrong = (fixed and size != int(axis)) if axis.isdigit() else (fixed and axis in dynamic)
                if wrong or (kind == "input" and axis.isdigit() and not fixed):
                    self._disagree(f"{kind} {name!r} has axes {axes} in the card, {found_axes} in the graph")
        self._check_fed()
        clip = self.card.clip_output()
        if clip is not None and self.card.labels is not None:
            size = self.outputs[clip.name][1][-1]
            if isinstance(size, int) and size != len(self.card.labels):
                self._disagree(f"the card has {len(self.card.labels)} labels, output {clip.name!r} has {size} classes")

    def _check_fed(self) -> None:
        """Refuse a card whose front end makes other features than the graph takes."""
        shortest = self.card.min_samples
        for part in self.card.inputs:
            if part.source == "frontend" and self.card.frontend is not None:
                made = self.card.frontend.output_shape(shortest)
            elif part.source == "waveform":
                made = (1, shortest)
            else:
                continue
            taken = self.inputs[part.name][1]
            fits = len(made) == len(taken) and all(
                axis == size for axis, size in zip(taken[1:], made[1:], strict=True) if isinstance(axis, int)
            )
            if not fits:
                self._disagree(f"{part.source} makes {made} of the shortest clip, input {part.name!r} takes {taken}")

    def _disagree(self, what: str) -> None:
        raise ModelFileError(f"the card inside {self._name} disagrees with its graph: {what}; export it again")

    def check_usable(self) -> None:
        """Raise what :meth:`run` would raise whatever it is given.

        Raises:
            ClosedError: after :meth:`close`.
            DeviceError: in a child forked after the session was built.
        """
        if self._session is None:
            raise ClosedError(f"the session of {self._name} is closed; build another one")
        if os.getpid() != self._process:
            raise DeviceError(
                f"the session of {self._name} was built before this process was forked, and its threads did not "
                "follow; build it in the child, or start children with the 'spawn' method"
            )

    def run(
        self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float32]]:
        """Return the card's outputs by name.

        Args:
            inputs: the card's inputs by name, of the card's types and axes.
            outputs: names of those wanted, or None for all. Only the inputs they need are given, and only what they
                need is computed.

        Raises:
            WaveformError: a missing or unknown input, or one of the wrong type or shape.
            ModelFileError: the model returned NaN or infinity.
            ClosedError: after :meth:`close`.
            DeviceError: in a child forked after the session was built.
        """
        self.check_usable()
        needed = {part.name for part in self.card.inputs_of(outputs)}
        if set(inputs) != needed:
            raise WaveformError(f"got inputs {sorted(inputs)}; expected {sorted(needed)}", code="type")
        for name, array in inputs.items():
            dtype, axes = self.inputs[name]
            if array.dtype != dtype:
                raise WaveformError(f"input {name!r}: got {array.dtype}; expected {dtype}", code="dtype")
            if array.ndim != len(axes):
                raise WaveformError(f"input {name!r}: got shape {array.shape}; expected {axes}", code="rank")
        names = self._output_names if outputs is None else list(outputs)
        # onnxruntime computes every node whatever is fetched, but of no rows that is no work.
        idle = {
            part.name: np.zeros(self.card.empty_shape(part), part.dtype)
            for part in self.card.inputs
            if part.name not in needed
        }
        try:
            values = self._session.run(names, {**inputs, **idle})
        except Exception as error:  # onnxruntime's errors share no base class
            shapes = {name: array.shape for name, array in inputs.items()}
            raise WaveformError(
                f"{self._name} refused inputs of shape {shapes}: {_first_line(error)}", code="type"
            ) from error
        answers: dict[str, NDArray[np.float32]] = dict(zip(names, values, strict=True))
        for name, value in answers.items():
            finite = np.isfinite(value)
            if not finite.all() and not (name in self._may_be_minus_infinity and (finite | np.isneginf(value)).all()):
                raise ModelFileError(
                    f"output {name!r} of {self._name} holds NaN or infinity; the samples are out of any sensible range "
                    "(expected [-1, 1]), or the weights are damaged"
                )
        return answers

    def close(self) -> None:
        """Release the model; a later :meth:`run` raises ClosedError. Closing twice is fine."""
        self._session = None


def _describe(parts: Any) -> dict[str, tuple[str, tuple[int | str | None, ...]]]:
    return {part.name: (_NUMPY_TYPES.get(part.type, part.type), tuple(part.shape)) for part in parts}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
