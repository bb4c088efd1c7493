"""Rendered pictures: a light glyph on a darker background, of which everything but the glyph varies.

Place, size, turn, stretch, colours, background and noise differ from picture to picture, so that a picture tells which
glyph it shows and nothing else. Drawn with Pillow alone: nothing to download, no licence to mind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from models_zoo.errors import DataError

__all__ = ["NUM_GLYPHS", "render_frames"]

_Point = tuple[float, float]
_Outline = tuple[bool, Sequence[_Point]]
"""Whether the inside is painted or cleared, and the corners, within [-1, 1]."""

_SUPERSAMPLED = 2
_MOST_TURNED = math.radians(20)
_LEAST_CONTRAST = 0.35


def _round(points: int = 40, radius: float = 1.0, centre: _Point = (0.0, 0.0), turn: float = 0.0) -> list[_Point]:
    angles = np.arange(points) * 2 * np.pi / points + turn
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def _box(left: float, top: float, right: float, bottom: float) -> list[_Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _star() -> list[_Point]:
    outer, inner = _round(5, 1.0, turn=-np.pi / 2), _round(5, 0.42, turn=-np.pi / 2 + np.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


_GLYPHS: tuple[tuple[_Outline, ...], ...] = (
    ((True, _round()),),
    ((True, _box(-0.85, -0.85, 0.85, 0.85)), (False, _box(-0.5, -0.5, 0.5, 0.5))),
    ((True, [(0, -1), (0.95, 0.8), (-0.95, 0.8)]),),
    ((True, _box(-0.28, -1, 0.28, 1)), (True, _box(-1, -0.28, 1, 0.28))),
    ((True, _star()),),
    ((True, _round()), (False, _round(radius=0.55))),
    tuple((True, _box(left, -0.95, left + 0.4, 0.95)) for left in (-1.0, -0.2, 0.6)),
    ((True, _round()), (False, _round(radius=0.9, centre=(0.55, -0.15)))),
    ((True, [(-1, -0.85), (0, -0.12), (1, -0.85), (1, 0.85), (0, 0.12), (-1, 0.85)]),),
    ((True, _box(-0.9, -1, -0.35, 1)), (True, _box(-0.9, 0.45, 0.9, 1))),
    tuple((True, _round(radius=0.36, centre=(x, y))) for x in (-0.6, 0.6) for y in (-0.6, 0.6)),
    ((True, [(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3)]),),
)
"""Told apart at any of the turns, at most 20 degrees either way, and stretches they are drawn with."""

_MOST_COPIES = 3

NUM_GLYPHS = len(_GLYPHS) * _MOST_COPIES
"""How many there are: every shape alone, twice and three times side by side."""


def render_frames(glyph: int, count: int, size: int, rng: np.random.Generator) -> list[Image.Image]:
    """Return ``count`` RGB pictures of one glyph that drifts and turns a little from one to the next.

    The short side has ``size`` pixels, the long one up to a quarter more. The glyph stays within the middle square,
    which is what networks look at.

    Args:
        glyph: 0 to NUM_GLYPHS - 1.
        count: of pictures, at least 1.
        size: at least 32.
        rng: the only source of chance.

    Raises:
        DataError: impossible arguments.
    """
    if not 0 <= glyph < NUM_GLYPHS or count < 1 or size < 32:
        raise DataError(
            f"got glyph {glyph}, {count} pictures of {size} pixels; expected one of {NUM_GLYPHS} glyphs, at least one "
            "picture, and 32 pixels or more"
        )
    copies, shape = divmod(glyph, len(_GLYPHS))
    long = round(size * rng.uniform(1.0, 1.25))
    width, height = (long, size) if rng.random() < 0.5 else (size, long)
    background, colour = _background(width, height, rng), _colour(rng)
    while _luminance(colour) - _luminance(background.mean(axis=(0, 1))) < _LEAST_CONTRAST:
        background, colour = _background(width, height, rng), _colour(rng)
    radius = rng.uniform(0.27, 0.4) * size
    room = size / 2 - 1.15 * radius
    starts = np.array([width / 2, height / 2]) + rng.uniform(-room, room, 2)
    ends = np.array([width / 2, height / 2]) + rng.uniform(-room, room, 2)
    turns, stretch = rng.uniform(-_MOST_TURNED, _MOST_TURNED, 2), rng.uniform(-0.12, 0.12)
    noise = rng.uniform(0, 0.06)
    frames = []
    for frame in range(count):
        moved = frame / max(count - 1, 1)
        centre = starts + moved * (ends - starts)
        turn = turns[0] + moved * (turns[1] - turns[0])
        mask = _mask(shape, copies + 1, (width, height), centre, radius, turn, stretch)[..., None]
        picture = background * (1 - mask) + colour * mask + noise * rng.standard_normal((height, width, 3))
        frames.append(Image.fromarray(np.rint(255 * picture.clip(0, 1)).astype(np.uint8)))
    return frames


def _colour(rng: np.random.Generator) -> NDArray[np.float64]:
    return rng.uniform(0, 1, 3)


def _luminance(colour: NDArray[np.float64]) -> float:
    return float(colour @ (0.299, 0.587, 0.114))


def _background(width: int, height: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return ``(height, width, 3)`` in [0, 1], running from one colour to a similar one in some direction."""
    first, angle = _colour(rng), rng.uniform(0, 2 * np.pi)
    second = (first + rng.uniform(-0.25, 0.25, 3)).clip(0, 1)
    across = np.cos(angle) * np.linspace(-0.5, 0.5, width) + np.sin(angle) * np.linspace(-0.5, 0.5, height)[:, None]
    share = ((across - across.min()) / max(float(np.ptp(across)), 1e-9))[..., None]
    return np.asarray(first + share * (second - first), np.float64)


def _mask(
    shape: int,
    copies: int,
    size: tuple[int, int],
    centre: NDArray[np.float64],
    radius: float,
    turn: float,
    stretch: float,
) -> NDArray[np.float64]:
    """Return ``(height, width)`` in [0, 1]: where the glyph is."""
    canvas = Image.new("L", (size[0] * _SUPERSAMPLED, size[1] * _SUPERSAMPLED), 0)
    pen = ImageDraw.Draw(canvas)
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    scale = 0.9 / copies if copies > 1 else 1.0
    for copy in range(copies):
        place = (2 * copy + 1) / copies - 1 if copies > 1 else 0.0
        for painted, corners in _GLYPHS[shape]:
            points = np.asarray(corners, np.float64) * scale + (place, 0.0)
            points = points * (1 + stretch, 1 - stretch) @ turned.T * radius + centre
            pen.polygon([(x * _SUPERSAMPLED, y * _SUPERSAMPLED) for x, y in points.tolist()], fill=255 * painted)
    return np.asarray(canvas.resize(size, Image.Resampling.BOX), np.float64) / 255
