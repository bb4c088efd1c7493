"""Embeddings of clips, as a second input of a detector in training: stored ones, or those of an exported encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from models_zoo.cards import CARD_KEY, ModelCard
from models_zoo.decoding import legal_segments
from models_zoo.errors import CardError, DataError, MissingDependencyError, ModelFileError
from train_torch.frontend import TorchFrontend, network_inputs

__all__ = ["Embedder", "open_embeddings"]

Embedder: TypeAlias = Callable[[str, NDArray[np.float32]], NDArray[np.float32]]
"""(name of a clip, its samples ``(num_samples,)``) -> ``(size, tokens)`` float32, or ``(size,)``."""


def open_embeddings(path: str | Path, sample_rate: int) -> Embedder:
    """Return what gives the embeddings of clips.

    Args:
        path: an exported encoder, ``.onnx``; or stored embeddings: an ``.npz`` file with an array for each clip, under
            the clip's file name as the table writes it, or a folder with ``strong/00000.npy`` for ``strong/00000.wav``.
        sample_rate: of the samples that the encoder is given.

    Raises:
        DataError: no such file or folder, or an array that is missing or no embedding; when asked for it, its name.
        ModelFileError, CardError: a file without card or embedding, or an encoder at another rate.
        MissingDependencyError: an encoder, and onnxruntime is not installed.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return _encoder(path, sample_rate)
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; give an encoder (.onnx), an .npz file or a folder of .npy files"
        )
    stored: Mapping[str, Any] | None = None
    if path.is_file():
        try:
            stored = np.load(path, allow_pickle=False)
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: cannot be read as .npz: {error}") from error
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: holds one array; expected an .npz file with an array for each clip")

    def of(name: str, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        where = f"{path}: {name}"
        try:
            if stored is not None:
                found = stored[name]
            else:
                where = str((path / name).with_suffix(".npy"))
                found = np.load(where, allow_pickle=False)
        except (KeyError, OSError, ValueError) as error:
            raise DataError(f"{where}: no embeddings that can be read; store an array for each clip") from error
        if found.ndim not in (1, 2) or not found.size or found.dtype.kind != "f" or not np.isfinite(found).all():
            raise DataError(
                f"{where}: got {found.dtype} {found.shape}; expected finite floats, (size, tokens) or (size,)"
            )
        return np.asarray(found, np.float32)

    return of


def _encoder(path: Path, sample_rate: int) -> Embedder:
    """Return what computes embeddings as serving does: of the clip as long as the encoder needs it."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "an encoder is run by onnxruntime, which is not installed; say pip install onnxruntime"
        ) from error
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file; export the encoder with export/pt2onnx.py")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    described = session.get_modelmeta().custom_metadata_map.get(CARD_KEY)
    if described is None:
        raise ModelFileError(
            f"{path}: holds no model card (metadata key {CARD_KEY!r}); export it with export/pt2onnx.py"
        )
    card = ModelCard.from_json(described)
    output = card.embedding_output()
    if output is None or card.frontend is None:
        raise CardError(f"{path}: model {card.name!r} returns no embedding of a clip; use an encoder", field="outputs")
    if card.sample_rate != sample_rate:
        raise CardError(
            f"{path}: {card.name!r} hears {card.sample_rate} Hz, the detector {sample_rate} Hz; expected the same, or "
            "store the embeddings",
            field="frontend.sample_rate",
        )
    frontend = TorchFrontend(card.frontend).eval()

    def of(name: str, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        segments = torch.from_numpy(legal_segments(waveform, card))
        if len(segments) > 1:
            raise DataError(f"{name}: {path.name} takes shorter clips; choose fewer seconds in the recipe")
        with torch.no_grad():
            fed = network_inputs(card.inputs, frontend, segments)
        found = session.run([output.name], {key: value.numpy() for key, value in fed.items()})[0][0]
        return np.asarray(found, np.float32)

    return of
