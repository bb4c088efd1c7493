"""Does an exported graph say what the model says? Asked through onnxruntime, never through TensorFlow."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import onnxruntime
import torch
from numpy.typing import NDArray
from scipy import signal
from torch import Tensor, nn
from tqdm import tqdm

from models_zoo.cards import ModelCard, ModelInput, ModelOutput
from models_zoo.errors import ExportError, VerificationError
from train_torch.frontend import TorchFrontend
from train_torch.models import check_card

__all__ = ["TOLERANCE", "Verification", "example_inputs", "legal_lengths", "verify_onnx"]

TOLERANCE = 1e-4
"""Bar on max |a - b| / max(1, standard deviation of the reference), for every output of every case."""

_LOUDNESS = (0.1, 0.01, 0.001)
"""Of the noise the answers are compared on, first that of recordings. A dynamic network of few epochs may answer noise
with 1e8, and in float32 with something else each time, in torch itself as well; quieter noise it then has to answer."""

_POLE = 0.99
"""Of the first-order filter that colours the noise of :func:`example_inputs`."""

_TOKENS = (5, 496)
"""Fewest and most tokens of an encoder."""

_SECONDS = (0.37, 1.003, 2.0, 5.31, 10.0, 30.0)
_ONNX_TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}


@dataclass(frozen=True)
class Verification:
    """What was compared, and how far apart the exported graph and the model were.

    Attributes:
        lengths: clip lengths compared, in samples at the card's rate.
        batches: batch sizes compared.
        cases: number of (length, batch) pairs.
        worst: largest max |a - b| / max(1, standard deviation of the reference) over all cases and outputs.
        worst_case: where that was.
        tolerance: the bar ``worst`` stayed under.
        quieter: cases repeated with quieter noise, because to the first the model's own float32 answer was off.
        versions: of the libraries that ran both sides.
    """

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    cases: int
    worst: float
    worst_case: str
    tolerance: float
    quieter: int
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the JSON document stored in the exported file."""
        return json.dumps(asdict(self))


def verify_onnx(
    path: str | Path,
    model: nn.Module,
    card: ModelCard,
    *,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    progress: bool = False,
) -> Verification:
    """Return the comparison of an ONNX file with the model it was exported from.

    Names, types and axes of the graph are compared with the card, then output shapes and values with the model, on
    noise that went through the card's own front end.

    Args:
        path: of the file.
        model: the network, on any device; a copy of it is evaluated on the CPU.
        card: of the model.
        lengths: clip lengths in samples; None for a spread from the legal minimum to 30 s.
        batches: every length is compared at every one of these batch sizes; None for 1 and one of 2, 3, 5 in turn.
        progress: show a bar on stderr.

    Raises:
        VerificationError: external data, another interface than the card's, other shapes, or values too far apart.
        CardError: the card does not describe the model.
    """
    path = Path(path)
    check_card(model, card)
    reference = copy.deepcopy(model).cpu().eval()
    _check_graph(path)
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise VerificationError(f"onnxruntime cannot load {path.name}: {error}") from error
    _check_interface(session, card)

    worst, worst_case, quieter = 0.0, "", 0
    done: list[tuple[int, int]] = []
    cases = list(_cases(card, lengths, batches))
    for num_samples, batch in tqdm(cases, desc="verifying", unit="case", disable=not progress):
        for loudness in _LOUDNESS:
            inputs = example_inputs(card, num_samples, batch, loudness=loudness)
            with torch.no_grad():
                expected = reference(**inputs)
            got = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            differences = {
                f"{output.name} of {batch} x {num_samples} samples": (expected[output.name].numpy(), actual)
                for output, actual in zip(card.outputs, got, strict=True)
            }
            case, difference = max(
                ((case, _difference(case, *pair)) for case, pair in differences.items()), key=lambda found: found[1]
            )
            if difference <= TOLERANCE or _is_reproducible(reference, inputs, expected):
                break
            quieter += 1
        if difference >= worst:
            worst, worst_case = difference, case
        done.append((num_samples, batch))
    _check_needs(session, card, reference)
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"{card.name!r} exported with {card.exporter!r} departs from the model: {worst:.3g} in {worst_case}; "
            f"expected at most {TOLERANCE:g}; try the other exporter"
        )
    return Verification(
        lengths=tuple(sorted({num_samples for num_samples, _ in done})),
        batches=tuple(sorted({batch for _, batch in done})),
        cases=len(done),
        worst=worst,
        worst_case=worst_case,
        tolerance=TOLERANCE,
        quieter=quieter,
        versions={"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
    )


def _check_needs(session: onnxruntime.InferenceSession, card: ModelCard, reference: nn.Module) -> None:
    """Refuse a graph whose outputs need more inputs than the card says, or that cannot take the others empty."""
    partial = [output for output in card.outputs if len(card.inputs_of([output.name])) < len(card.inputs)]
    if not partial:
        return
    given = example_inputs(card, legal_lengths(card)[0], 2)
    with torch.no_grad():
        expected = reference(**given)
    for output in partial:
        needed = {part.name for part in card.inputs_of([output.name])}
        fed = {
            part.name: given[part.name].numpy() if part.name in needed else np.zeros(card.empty_shape(part), part.dtype)
            for part in card.inputs
        }
        alone = f"{output.name} of {', '.join(sorted(needed))} alone"
        try:
            (got,) = session.run([output.name], fed)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise VerificationError(
                f"{alone}: the graph refuses other inputs without a row: {error}; try the other exporter"
            ) from error
        if not _difference(alone, expected[output.name].numpy(), got) <= TOLERANCE:
            raise VerificationError(f"{alone}: the graph departs from the model; outputs.needs on the card is wrong")


def _is_reproducible(model: nn.Module, inputs: dict[str, Tensor], answers: dict[str, Tensor]) -> bool:
    """Return whether ``model`` answers in float32 as it does in float64, so that anybody else could."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(
            **{name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        )
    return all(
        float((answer - exact[name]).abs().max()) <= TOLERANCE / 2 * max(1.0, float(exact[name].std(correction=0)))
        for name, answer in answers.items()
    )


def example_inputs(card: ModelCard, num_samples: int, batch: int, *, loudness: float = 0.1) -> dict[str, Tensor]:
    """Return inputs by name for ``(batch, num_samples)`` of seeded noise, each item half as loud as the one before.

    The noise falls by 6 dB per octave above 50 Hz at 32 kHz, as recordings do; ``loudness`` is the root of the mean
    square of the first item. Pictures are noise, and so are embeddings of an encoder, of 5 to 496 tokens where their
    number is free. A mask of the caller's is true from some place on, in each item from another, and nowhere in some.

    Raises:
        ExportError: an input is neither audio nor a picture, an embedding or a mask.
    """
    noise = np.random.default_rng(num_samples).standard_normal((batch, num_samples))
    noise = signal.lfilter([1 - _POLE**2], [1, -_POLE], noise)
    noise *= loudness * 0.5 ** np.arange(batch)[:, None] / np.sqrt(1 - _POLE**2)
    waveform = torch.from_numpy(noise.clip(-1, 1).astype(np.float32))
    inputs = {}
    rng = np.random.default_rng([num_samples, batch])
    sizes = {"batch": batch, "tokens": int(rng.integers(*_TOKENS, endpoint=True))}
    for part in card.inputs:
        if part.source == "frontend" and card.frontend is not None:
            with torch.no_grad():
                inputs[part.name] = TorchFrontend(card.frontend).eval()(waveform)
            frames = card.frame_output()
            time = inputs[part.name].shape[card.frontend.layout.split(" ").index("t")]
            sizes["frames"] = time // (1 if frames is None else frames.hop)
        elif part.source == "waveform":
            inputs[part.name] = waveform
        elif part.source in ("encoder", "image") or (part.source == "caller" and part.dtype == "bool"):
            shape = [int(axis) if axis.isdecimal() else sizes[axis] for axis in part.axes]
            drawn = _mask(rng, shape) if part.dtype == "bool" else rng.standard_normal(shape).astype(np.float32)
            inputs[part.name] = torch.from_numpy(drawn)
        else:
            raise ExportError(
                f"input {part.name!r} comes from {part.source!r}; export knows audio, pictures, embeddings and masks"
            )
    return inputs


def _mask(rng: np.random.Generator, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Return a mask that is true at the end of its last axis, from a random place on that is never the first."""
    first = rng.integers(1, shape[-1], shape[:-1], endpoint=True)
    return np.arange(shape[-1]) >= first[..., None]


def _cases(card: ModelCard, lengths: Sequence[int] | None, batches: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    others = cycle((2, 3, 5))
    for num_samples in lengths or legal_lengths(card):
        for batch in batches or (1, next(others)):
            yield num_samples, batch


def legal_lengths(card: ModelCard) -> list[int]:
    """Return clip lengths in samples from the shortest legal one to 30 s, three at least where three are legal.

    Where the card makes every clip as long as those of training, but the network takes any, longer ones stand in for
    others: an axis that the exporter froze at the one length would go unnoticed. A card without a front end has clips
    of no length, which 1 stands for.
    """
    if card.frontend is None:
        return [1]
    policy = card.length_policy
    step = policy.multiple_of
    if policy.min == policy.max is not None and any("time" in part.axes for part in card.inputs):
        return [policy.max * quarters // 4 // step * step for quarters in (4, 5, 7)]
    low = -(-card.min_samples // step) * step
    high = (policy.max or max(low, int(_SECONDS[-1] * card.sample_rate))) // step * step
    inside = [int(seconds * card.sample_rate) for seconds in _SECONDS if low < seconds * card.sample_rate < high]
    wanted = [low, *(inside or [(low + high) // 2]), high]
    return sorted({num_samples // step * step for num_samples in wanted})


def _check_graph(path: Path) -> None:
    """Refuse weights in a second file, and recurrences that reset their state after the product instead of before."""
    graph = onnx.load(path, load_external_data=False).graph
    for node in graph.node:
        given = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "GRU" and given.get("linear_before_reset", 0) != 1:
            raise VerificationError(
                f"{path.name}: GRU {node.name!r} has linear_before_reset {given.get('linear_before_reset', 0)}; torch "
                "computes with 1, and the other answers almost alike; export with another version of torch"
            )
    tensors = _tensors(graph)
    outside = [tensor.name for tensor in tensors if onnx.external_data_helper.uses_external_data(tensor)]
    if outside:
        raise VerificationError(f"{path.name} keeps weights in a second file ({outside[0]}, ...); expected one file")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the weights of a graph and of the graphs inside its nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from _tensors(attribute.g)


def _check_interface(session: onnxruntime.InferenceSession, card: ModelCard) -> None:
    """Compare names, types and axes of the graph with the card: a frozen axis answers wrongly without an error."""
    for kind, parts, nodes in (
        ("inputs", card.inputs, session.get_inputs()),
        ("outputs", card.outputs, session.get_outputs()),
    ):
        expected = [_described(part) for part in parts]
        actual = [(node.name, node.type, list(node.shape)) for node in nodes]
        if actual != expected:
            raise VerificationError(f"{kind} of the graph are {actual}; card {card.name!r} says {expected}")


def _described(part: ModelInput | ModelOutput) -> tuple[str, str, list[int | str]]:
    dtype = part.dtype if isinstance(part, ModelInput) else "float32"
    return part.name, _ONNX_TYPES[dtype], [int(axis) if axis.isdecimal() else axis for axis in part.axes]


def _difference(case: str, expected: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    if actual.shape != expected.shape:
        raise VerificationError(f"{case}: the graph returns shape {actual.shape}; the model {expected.shape}")
    if not np.isfinite(expected).all():
        raise VerificationError(f"{case}: the model itself returns NaN or infinity; its weights are unusable")
    if not np.isfinite(actual).all():
        raise VerificationError(f"{case}: the graph returns NaN or infinity; the model does not")
    return float(np.abs(actual - expected).max() / max(1.0, float(expected.std())))
