"""From a picture to what a network takes: the one way in, for training, parity and serving alike.

Decoding and resizing are Pillow's. Source: YuanGongND/cav-mae ``src/dataloader.py`` (short side to 224, bicubic with
antialiasing, centre crop, ImageNet statistics), whose rounding of sizes and offsets is torchvision's.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from models_zoo.errors import ImageDecodeError, SpecError
from models_zoo.files import opened
from models_zoo.schema import Declaration, Sequence

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "ImageSource",
    "ImageSpec",
    "crop_image",
    "is_picture",
    "load_image",
    "normalise_image",
    "read_image",
]

ImageSource: TypeAlias = str | Path | bytes | bytearray | memoryview | BinaryIO | NDArray[np.uint8]
"""A path, the bytes of a file, a file object open for reading bytes, or a ``(height, width[, 3])`` uint8 array."""

MAX_PIXELS = 64_000_000
"""Most pixels of a picture that is decoded: 192 MB of RGB."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""By which files are taken for pictures where nothing else says so."""

_MOST_STRETCHED = 64
"""Greatest ratio of a picture's sides: more would be resized to a strip far larger than what is cropped out of it."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class ImageSpec(Declaration):
    """How a picture becomes what a network takes: short side to ``size``, centre crop, values normalised.

    Attributes:
        size: side of the crop in pixels.
        resample: filter, antialiased.
        mean, std: per channel (red, green, blue) of values in [0, 1]; a value v becomes (v - mean) / std.
    """

    size: int = Field(default=224, ge=1, le=4096)
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    mean: Sequence[float] = Field(default=(0.485, 0.456, 0.406), min_length=3, max_length=3)
    std: Sequence[float] = Field(default=(0.229, 0.224, 0.225), min_length=3, max_length=3)

    def model_post_init(self, _: object) -> None:
        """Refuse spreads that cannot be divided by."""
        if min(self.std) <= 0:
            raise SpecError(f"std: got {self.std}; expected numbers above 0", field="std")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the (width, height) of a picture whose short side is brought to ``size``; the long one is cut off."""
        short, long = sorted((width, height))
        scaled = int(self.size * long / short)
        return (self.size, scaled) if width <= height else (scaled, self.size)


def is_picture(source: object) -> bool:
    """Return whether a path names a picture, by its suffix."""
    return isinstance(source, (str, Path)) and Path(source).suffix.lower() in IMAGE_SUFFIXES


def load_image(source: ImageSource, spec: ImageSpec) -> NDArray[np.float32]:
    """Return a picture as ``(3, size, size)`` float32, normalised as ``spec`` says.

    Args and Raises: as :func:`read_image` and :func:`crop_image`.
    """
    return normalise_image(crop_image(read_image(source), spec), spec)


def read_image(source: ImageSource) -> Image.Image:
    """Return a decoded picture in RGB, upright.

    A picture that states how it is to be turned (EXIF) is turned; EXIF that cannot be read is passed over. Transparency
    is dropped. 16 bits become 8 by leaving out the lower ones, grey becomes red = green = blue, CMYK is converted
    without a colour profile.

    Args:
        source: path, bytes or file object of a JPEG, PNG or WebP; or an array, ``(height, width, 3)`` or
            ``(height, width)`` uint8.

    Raises:
        ImageDecodeError: with ``code`` ``type``, ``not_found``, ``not_readable``, ``empty``, ``not_image``,
            ``unsupported`` (another format), ``corrupt``, ``animated``, ``too_large`` (more than MAX_PIXELS),
            ``dtype`` or ``shape``.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    with opened(source, ImageDecodeError, "a path, bytes, an open file, or a uint8 array") as (stream, name):
        return _decoded(stream, name)


def _decoded(stream: BinaryIO, name: str) -> Image.Image:
    try:
        with Image.open(stream, formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ImageDecodeError(
                    f"{name}: {picture.width} x {picture.height} pixels are more than {MAX_PIXELS}; make it smaller",
                    code="too_large",
                )
            frames = getattr(picture, "n_frames", 1)
            # MPO is what some cameras write for a JPEG, with a second view behind it.
            if picture.format != "MPO" and frames > 1:
                raise ImageDecodeError(
                    f"{name}: holds {frames} pictures, one after the other; give one of them as a file of its own",
                    code="animated",
                )
            picture.load()
            return _in_rgb(_upright(picture))
    except UnidentifiedImageError:
        code = _code_of(stream)
        what = "of another format" if code == "unsupported" else "no picture"
        raise ImageDecodeError(f"{name}: is {what}; use JPEG, PNG or WebP", code=code) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageDecodeError(f"{name}: {error}; make it smaller", code="too_large") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, ImageDecodeError):
            raise
        raise ImageDecodeError(f"{name}: cannot be decoded: {error}; get a whole copy", code="corrupt") from None


def crop_image(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """Return the middle of ``image``, short side resized, as ``(size, size, 3)`` uint8.

    Raises:
        ImageDecodeError: with ``code`` ``aspect``: one side is more than 64 times the other.
    """
    width, height = image.size
    if max(width, height) > _MOST_STRETCHED * min(width, height):
        raise ImageDecodeError(
            f"the picture has {width} x {height} pixels; one side is more than {_MOST_STRETCHED} times the other, and "
            "its middle says little about it: cut it before",
            code="aspect",
        )
    resized = image.resize(spec.resized(width, height), _FILTERS[spec.resample])
    # round: halves go to the even side, as torchvision's do.
    left, top = (round((side - spec.size) / 2) for side in resized.size)
    return np.asarray(resized.crop((left, top, left + spec.size, top + spec.size)), np.uint8)


def normalise_image(crop: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.float32]:
    """Return ``(..., 3, size, size)`` float32 of ``(..., size, size, 3)`` uint8."""
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    values = (crop.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def _code_of(stream: BinaryIO) -> Literal["unsupported", "not_image"]:
    stream.seek(0)
    try:
        with Image.open(stream):
            return "unsupported"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return "not_image"


def _upright(picture: Image.Image) -> Image.Image:
    """Return the picture turned as its EXIF says; as it is where that cannot be read."""
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow raises on odd EXIF: struct.error, TypeError, AttributeError among others
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _in_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Pillow would clip 16 bits at 255 instead of scaling them.
        return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8:
        raise ImageDecodeError(
            f"got an array of {array.dtype}; expected uint8, values 0 to 255 (floats in [0, 1]: (255 * x).round())",
            code="dtype",
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        raise ImageDecodeError(
            f"got an array of shape {array.shape}; expected (height, width, 3), red green blue, or (height, width)",
            code="shape",
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ImageDecodeError(
            f"{array.shape[1]} x {array.shape[0]} pixels are more than {MAX_PIXELS}; make it smaller", code="too_large"
        )
    return Image.fromarray(array).convert("RGB")
