"""Search among sounds and pictures by what a two-tower model makes of them."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm

from infer_tf.classifier import TFAudioClassifier, find_model
from models_zoo.dataset import AUDIO_SUFFIXES, read_dataset
from models_zoo.errors import DataError, IndexFileError, MissingDependencyError, ModelFileError, VideoDecodeError
from models_zoo.files import replacing
from models_zoo.images import IMAGE_SUFFIXES
from models_zoo.schema import Declaration
from models_zoo.schema import Sequence as Parts
from models_zoo.video import VIDEO_SUFFIXES, read_video_audio, read_video_frames

__all__ = ["AudioVisualIndex", "Entry", "Kind", "Match", "kind_of", "list_files"]

Kind: TypeAlias = Literal["audio", "image"]
"""Sound or picture."""

_MARGIN = 1e-6  # of a cosine in float32: what may tie with the last match is looked at too
_MOST_BYTES = 1 << 31


class Entry(Declaration):
    """One thing in an index.

    Attributes:
        path: of its file, as it was given.
        kind: which side of the file: a video may be in an index with its sound and with its picture.
        label: what is known of it, or None.
    """

    path: str
    kind: Kind
    label: str | None = None


class _Header(Declaration):
    version: Literal[1] = 1
    model: str
    model_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    entries: Parts[Entry]


@dataclass(frozen=True)
class Match:
    """Something found: the path and label of its entry, its kind, and the cosine with the query."""

    path: str
    label: str | None
    kind: Kind
    cosine: float


class AudioVisualIndex:
    """Embeddings of sounds and pictures, searched by cosine.

    ::

        index = AudioVisualIndex.build(classifier, ["dog.wav", "dog.jpg", "clip.mp4"])
        index.save("pairs.index")
        AudioVisualIndex.load("pairs.index", classifier).search(audio="bark.wav", k=3)

    Args:
        classifier: the model whose embeddings these are; queries go through it.
        entries: what is in the index, in the order in which equal matches are listed.
        vectors: ``(num_entries, size)`` float32, of any length but 0; brought to length 1 here.

    Raises:
        DataError: no entry, or an embedding of zeros, which points nowhere.
        ModelFileError: a model without an embedding, e.g. several that answer together, or one that needs an encoder.
    """

    suffixes: ClassVar[frozenset[str]] = AUDIO_SUFFIXES | IMAGE_SUFFIXES | VIDEO_SUFFIXES

    def __init__(self, classifier: TFAudioClassifier, entries: Sequence[Entry], vectors: NDArray[np.float32]) -> None:
        _check_embeds(classifier)
        if not entries or len(entries) != len(vectors):
            raise DataError(f"got {len(entries)} entries and {len(vectors)} vectors; an index needs one each, at least")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        nowhere = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))[:, 0])
        if nowhere.size:
            raise DataError(f"the embedding of {entries[nowhere[0]].path} is zero or not finite; it points nowhere")
        self.classifier = classifier
        self.entries = tuple(entries)
        # What has been brought to length 1 before stays as it is, so that a loaded index answers as the saved one.
        self.vectors = np.ascontiguousarray(vectors / np.where(np.abs(lengths - 1) < _MARGIN, 1, lengths), np.float32)
        self._searchers: dict[tuple[Kind, ...], tuple[Any, NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        return len(self.entries)

    @classmethod
    def build(
        cls,
        classifier: TFAudioClassifier,
        files: Iterable[str | os.PathLike[str] | tuple[str | os.PathLike[str], str | None]],
        *,
        progress: bool = True,
    ) -> Self:
        """Return the index of files: sounds, pictures, and videos, whose sound and middle picture are both entered.

        Args:
            classifier: a model with an embedding for sound, for pictures, or one for each.
            files: paths, or pairs of a path and a label; their suffixes say what they are.
            progress: show a bar on standard error where that is a terminal.

        Raises:
            DataError: no file, no path, one whose suffix tells nothing, or a name that is not UTF-8.
            ModelFileError: a file of a kind the model has no embedding for; or as the class.
            AudioDecodeError, ImageDecodeError, VideoDecodeError, WaveformError: a file that cannot be read or embedded.
        """
        if isinstance(files, (str, bytes)) or not isinstance(files, Iterable):
            raise DataError(f"files: got {type(files).__name__}; expected paths, or pairs of a path and a label")
        given = [_path_and_label(one) for one in files]
        _check_embeds(classifier)
        _check_text(classifier.name)
        kinds = [kind_of(path) for path, _ in given]
        entries: list[Entry] = []
        vectors: list[NDArray[np.float32]] = []
        bar = tqdm(zip(given, kinds, strict=True), total=len(given), unit="file", disable=None if progress else True)
        for (path, label), kind in bar:
            for side, vector in _embedded(classifier, path, kind):
                entries.append(Entry(path=path, kind=side, label=label))
                vectors.append(vector)
        if not vectors:
            raise DataError("no file to enter; an index needs at least one")
        return cls(classifier, entries, np.stack(vectors))

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the index to one file, completely or not at all.

        Raises:
            OutputExistsError: ``path`` exists and ``force`` is false.
            OutputWriteError: the operating system refused the write.
        """
        header = _Header(
            model=self.classifier.name,
            model_sha256=_sha256_of(find_model(self.classifier.name)),
            entries=self.entries,
        )
        text = np.frombuffer(header.to_json().encode("utf-8"), np.uint8)
        with replacing(Path(path), force=force) as partial, partial.open("wb") as file:
            np.savez(file, header=text, vectors=self.vectors)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        classifier: TFAudioClassifier | str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """Return the index in a file; inverse of :meth:`save`.

        Args:
            path: of the file.
            classifier: the model it was built with, or where that is; None for the one it names, from where that was.
            **options: of :class:`TFAudioClassifier`, where one is made here; its file is opened once it is known to be
                the index's model.

        Raises:
            IndexFileError: no such file, not an index, damaged, or built with another model; ``code`` says which.
            ModelFileError, UnknownNameError: the model it names is not there any more.
        """
        header, vectors = _read(Path(path))
        given = classifier if isinstance(classifier, TFAudioClassifier) else None
        model = header.model if classifier is None else classifier
        model = model.name if isinstance(model, TFAudioClassifier) else model
        sha256 = _sha256_of(find_model(model))
        if sha256 != header.model_sha256:
            raise IndexFileError(
                f"{path}: was built with another model (sha256 {header.model_sha256[:12]}...) than {model} "
                f"({sha256[:12]}...), whose embeddings mean something else; build it again, or use its own model",
                code="model",
            )
        used = TFAudioClassifier(model, **options) if given is None else given
        try:
            sizes = {output.axes[-1] for output in used.card.outputs if output.role == "embedding"}
            if all(size.isdigit() for size in sizes) and str(vectors.shape[1]) not in sizes:
                raise DataError(f"vectors of {vectors.shape[1]} numbers; its model's have {', '.join(sizes)}")
            return cls(used, header.entries, vectors)
        except BaseException as error:
            if given is None:
                used.close()
            if isinstance(error, DataError):
                raise _corrupt(Path(path), str(error)) from None
            raise

    def search(
        self, *, audio: Any = None, image: Any = None, k: int = 10, among: Kind | None = None, **options: Any
    ) -> list[Match]:
        """Return the ``k`` entries nearest to a sound or a picture, nearest first, equal ones in their order.

        Args:
            audio, image: the query, one of them, as :meth:`TFAudioClassifier.embed_audio` and ``embed_image`` take it.
            k: how many.
            among: search ``audio`` or ``image`` entries alone; None for those of the other kind than the query's where
                there are any (sounds find pictures, and pictures sounds), else all.
            **options: of ``embed_audio`` or ``embed_image``, e.g. ``sample_rate``.

        Raises:
            DataError: two queries or none, an option that is not the query's, ``k`` is less than 1 or more than there
                are entries to search, or an embedding of zeros.
            MissingDependencyError: faiss is not installed.
            AudioDecodeError, ImageDecodeError, WaveformError, ModelFileError: as the embeddings.
        """
        if (audio is None) == (image is None):
            raise DataError("a search is by sound or by picture: pass audio=..., or image=...")
        taken = {"inputs"} if audio is None else {"inputs", "sample_rate", "channels_first"}
        if strangers := sorted(set(options) - taken):
            raise DataError(
                f"a search by {'picture' if audio is None else 'sound'} takes {', '.join(sorted(taken))}; got "
                f"{', '.join(strangers)}"
            )
        if audio is not None:
            vector = self.classifier.embed_audio(audio, **options)
        else:
            vector = self.classifier.embed_image(image, **options)
        return self.nearest(vector, k, kinds=self.searched("audio" if image is None else "image", among))

    def count(self, kinds: Sequence[Kind]) -> int:
        """Return the number of entries of some kinds."""
        return sum(entry.kind in kinds for entry in self.entries)

    def searched(self, asked: Kind, among: Kind | None = None) -> tuple[Kind, ...]:
        """Return the kinds of entries that :meth:`search` looks at for a query of a kind."""
        there = {entry.kind for entry in self.entries}
        if among is not None:
            return (among,)
        other: Kind = "image" if asked == "audio" else "audio"
        return (other,) if other in there else (asked,)

    def nearest(
        self, vector: NDArray[np.float32], k: int = 10, *, kinds: Sequence[Kind] = ("audio", "image")
    ) -> list[Match]:
        """Return the ``k`` entries of ``kinds`` nearest to an embedding ``(size,)``; see :meth:`search`.

        Raises:
            DataError, MissingDependencyError: as :meth:`search`.
        """
        searcher, places = self._searcher(tuple(kinds))
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(places):
            raise DataError(f"k: got {k!r}; the index has {len(places)} entries of {' and '.join(kinds)} to search")
        query = np.asarray(vector, np.float32).reshape(1, -1)
        length = float(np.linalg.norm(query))
        if query.shape[1] != self.vectors.shape[1] or not 0 < length < np.inf:
            raise DataError(
                f"got an embedding of {query.shape[1]} numbers and length {length:g}; expected "
                f"{self.vectors.shape[1]} that point somewhere"
            )
        query /= length
        cosines, _ = searcher.search(query, k)
        # faiss keeps any of those that tie for the last place.
        _, cosines_there, there = searcher.range_search(query, float(cosines[0, -1]) - _MARGIN)
        best = np.lexsort((there, -cosines_there))[:k]
        return [
            Match(entry.path, entry.label, entry.kind, float(cosine))
            for entry, cosine in ((self.entries[places[there[i]]], cosines_there[i]) for i in best)
        ]

    def _searcher(self, kinds: tuple[Kind, ...]) -> tuple[Any, NDArray[np.int64]]:
        """Return faiss's index of the entries of some kinds, and their places."""
        if kinds not in self._searchers:
            places = np.array([i for i, entry in enumerate(self.entries) if entry.kind in kinds], np.int64)
            searcher = _faiss().IndexFlatIP(self.vectors.shape[1])
            searcher.add(self.vectors[places])
            self._searchers[kinds] = searcher, places
        return self._searchers[kinds]


def kind_of(path: str | os.PathLike[str]) -> Literal["audio", "image", "video"]:
    """Return what a file is by its suffix.

    Raises:
        DataError: the suffix tells nothing.
    """
    suffix = Path(path).suffix.lower()
    for kind, suffixes in (("audio", AUDIO_SUFFIXES), ("image", IMAGE_SUFFIXES), ("video", VIDEO_SUFFIXES)):
        if suffix in suffixes:
            return kind  # type: ignore[return-value]
    raise DataError(
        f"{os.fspath(path)}: its suffix {suffix!r} is none of a sound, a picture or a video; expected "
        f"{', '.join(sorted(AudioVisualIndex.suffixes))}"
    )


def list_files(inputs: Sequence[str | os.PathLike[str]], split: str | None = None) -> list[tuple[Path, str | None]]:
    """Return the files that paths and folders name, with their labels where these are known.

    A folder with a ``metadata.csv`` stands for the sounds and pictures in it, or those of a ``split``, labelled as it
    says; any other folder for the sounds, pictures and videos below it, sorted by path. A file that is named twice is
    listed once, with its label.

    Raises:
        DataError: a folder without any, or with a table that cannot be read.
    """
    found: dict[Path, str | None] = {}
    for item in map(Path, inputs):
        if (item / "metadata.csv").is_file():
            named = [
                (path, ";".join(record.labels) or None)
                for record in read_dataset(item).select(split).records
                for path in (record.file, *record.images)
            ]
        elif item.is_dir():
            suffixes = AudioVisualIndex.suffixes
            below = sorted(path for path in item.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
            if not below:
                raise DataError(f"{item}: no sound, picture or video in this folder")
            named = [(path, None) for path in below]
        else:
            named = [(item, None)]
        for path, label in named:
            found[path] = found.get(path) or label
    return list(found.items())


def _path_and_label(one: object) -> tuple[str, str | None]:
    """Return what :meth:`AudioVisualIndex.build` is given of one file, once it is known that an index can hold it."""
    pair = one if isinstance(one, (tuple, list)) else (one, None)
    path, label = pair if len(pair) == 2 else (None, None)
    path = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(path, str) or not (label is None or isinstance(label, str)):
        raise DataError(f"files: got {one!r:.120}; expected a path, or a pair of a path and a label (a str, or None)")
    _check_text(path)
    _check_text(label or "")
    return path, label


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{text!r} is not UTF-8, which an index is written in; rename it") from None


def _embedded(
    classifier: TFAudioClassifier, path: str, kind: Literal["audio", "image", "video"]
) -> Iterator[tuple[Kind, NDArray[np.float32]]]:
    """Yield what is entered of a file."""
    if kind == "audio":
        yield "audio", classifier.embed_audio(path)
    elif kind == "image":
        yield "image", classifier.embed_image(path)
    else:
        yield from _sides_of(classifier, path)


def _sides_of(classifier: TFAudioClassifier, path: str) -> Iterator[tuple[Kind, NDArray[np.float32]]]:
    """Yield the sound and the middle picture of a video, or the one it has."""
    missing: VideoDecodeError | None = None
    try:
        waveform = read_video_audio(path, classifier.frontend.spec, max_seconds=classifier.max_seconds)
        yield "audio", classifier.embed_audio(waveform)
    except VideoDecodeError as error:
        if error.code != "no_audio":
            raise
        missing = error
    try:
        (frame,) = read_video_frames(path)
    except VideoDecodeError as error:
        if error.code != "no_video" or missing is not None:
            raise
        return
    yield "image", classifier.embed_image(np.asarray(frame))


def _check_embeds(classifier: TFAudioClassifier) -> None:
    """Refuse a model whose file alone does not say what its embeddings mean."""
    card = classifier.card
    embeddings = [output.name for output in card.outputs if output.role == "embedding"]
    if not embeddings:
        raise ModelFileError(f"model {card.name!r} has no embedding output, which an index is made of")
    if any(part.source == "encoder" for part in card.inputs_of(embeddings)):
        raise ModelFileError(
            f"the embeddings of model {card.name!r} depend on an encoder too, and an index belongs to one model file; "
            "use a model that needs none"
        )


def _sha256_of(path: Path) -> str:
    try:
        if not path.is_file():
            raise ModelFileError(f"{path}: the model of the index is not there; say where it is now")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:  # ValueError: a null character
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{path}: the model of the index cannot be read: {error}") from None


def _corrupt(path: Path, why: str) -> IndexFileError:
    return IndexFileError(f"{path}: is no index, or a damaged one ({why}); build it again", code="corrupt")


def _read(path: Path) -> tuple[_Header, NDArray[np.float32]]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise IndexFileError(f"{path}: no such file; crossfade index makes one", code="not_found") from None
    except OSError as error:
        raise IndexFileError(f"{path}: cannot be read: {error.strerror or error}", code="not_readable") from None
    with file:
        try:
            _check_members(file, os.fstat(file.fileno()).st_size)
            with np.load(file, allow_pickle=False) as held:
                header, vectors = _Header.from_json(held["header"].tobytes()), held["vectors"]
            if vectors.dtype != np.float32 or vectors.ndim != 2:
                raise ValueError(f"vectors of {vectors.dtype} {vectors.shape}")
        except Exception as error:  # zipfile and numpy raise a dozen types on bytes that are no index
            raise _corrupt(path, " ".join(str(error).split())[:200] or type(error).__name__) from None
    return header, vectors


def _check_members(file: BinaryIO, size: int) -> None:
    """Refuse what would take more memory than the file has bytes; go back to the beginning."""
    if size > _MOST_BYTES:
        raise ValueError(f"{size} bytes, more than {_MOST_BYTES}")
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("a member is compressed")
    if sum(member.file_size for member in members) > size:
        raise ValueError(f"members of more than the file's {size} bytes")
    file.seek(0)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise MissingDependencyError("searching needs faiss; install crossfade[search]") from None
    return faiss
