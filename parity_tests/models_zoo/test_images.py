"""The image front end: the published crops bit for bit, and pictures nobody expects."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageOps

from models_zoo.errors import ImageDecodeError, SpecError
from models_zoo.images import ImageSpec, crop_image, load_image, normalise_image, read_image

SPEC = ImageSpec()


def encoded(picture, kind="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def colours(height, width, seed=0):
    """Return a smooth coloured picture, which lossy formats keep."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def goldens(contracts):
    return np.load(contracts / "cav_mae" / "golden_image.npz")


@pytest.mark.contracts
def test_crops_are_the_published_ones_bit_for_bit(goldens):
    frame = goldens["frame_real_144x256"]
    assert np.array_equal(crop_image(read_image(frame), SPEC), goldens["u8_real"])
    extracted = crop_image(read_image(frame), SPEC.replace(resample="bilinear"))
    assert np.array_equal(extracted[80:144, 80:144], goldens["recipe_extract_u8_crop"])
    for seed, height, width in ((500, 240, 321), (501, 480, 640)):
        picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        name = f"n{height}x{width}"
        assert SPEC.resized(width, height) == tuple(goldens[f"size_{name}"])
        crop = crop_image(read_image(picture), SPEC)
        assert np.array_equal(crop[80:144, 80:144], goldens[f"u8_{name}"])
        values = normalise_image(crop, SPEC)
        assert np.array_equal(values[:, 100:116, 100:116], goldens[f"norm_{name}"])
        assert np.allclose(values.mean((1, 2)), goldens[f"mean_{name}"], atol=1e-6)


@pytest.mark.contracts
def test_the_recorded_jpeg_comes_out_as_published(goldens):
    values = load_image(goldens["recipe_jpeg_bytes"].tobytes(), SPEC)
    # libjpeg builds may differ by one level of 255.
    level = 1.01 / 255 / min(SPEC.std)
    assert np.abs(values[:, 100:132, 100:132] - goldens["recipe_norm_crop"]).max() <= level
    assert np.abs(values.mean((1, 2)) - goldens["recipe_norm_mean"]).max() <= level / 10


def test_shape_and_values():
    values = load_image(colours(300, 400), SPEC)
    assert (values.shape, values.dtype) == ((3, 224, 224), np.float32)
    white = load_image(np.full((50, 60, 3), 255, np.uint8), SPEC)
    assert np.allclose(white[:, 0, 0], (1 - np.array(SPEC.mean)) / np.array(SPEC.std), atol=1e-6)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})])
def test_formats_agree(kind, options, tmp_path):
    picture = colours(240, 320)
    data = encoded(Image.fromarray(picture), kind, **options)
    path = tmp_path / "picture"
    path.write_bytes(data)
    with open(path, "rb") as stream:
        stream.read(3)
        ways = [load_image(source, SPEC) for source in (path, str(path), data, memoryview(data), stream)]
        assert not stream.closed
    assert all(np.array_equal(way, ways[0]) for way in ways)
    levels = 0 if kind != "JPEG" else 6
    assert np.abs(ways[0] - load_image(picture, SPEC)).max() <= (levels + 0.01) / 255 / min(SPEC.std)


def test_pictures_are_turned_upright():
    picture = Image.fromarray(colours(240, 320))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned = load_image(encoded(picture, "PNG", exif=exif), SPEC)
    assert np.array_equal(turned, load_image(np.asarray(picture.rotate(-90, expand=True)), SPEC))


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_that_of_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(colours(24, 32)), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(read_image(data)), np.asarray(expected))


def tiff(*tags):
    """Return EXIF of (tag, type, count, four bytes)."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
def test_odd_exif_is_no_reason_to_refuse_a_picture():
    picture = Image.fromarray(colours(24, 32))
    lying = (0x0112, 3, 1, b"\x06\0\0\0")
    odd = tiff(lying, (0x010E, 11, 1, struct.pack("<f", 1.5)))  # a description that is a float
    assert read_image(encoded(picture, "JPEG", exif=odd)).size == (24, 32)
    rng = np.random.default_rng(0)
    for _ in range(300):
        tags = [
            (int(rng.choice([0x0112, 0x010E, 0x8769, 0x8825, 0x927C])), *map(int, rng.integers(0, 14, 2)), rng.bytes(4))
            for _ in range(rng.integers(1, 4))
        ]
        size = read_image(encoded(picture, "JPEG", exif=tiff(lying, *tags))).size
        assert size in ((24, 32), (32, 24))
    for data in (b"", b"Exif\0\0", b"Exif\0\0II*\0", rng.bytes(64)):
        assert read_image(encoded(picture, "JPEG", exif=data)).size == (32, 24)


def test_sixteen_bits_keep_their_shades():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(256, 0)
    crop = crop_image(read_image(encoded(Image.fromarray(ramp))), SPEC.replace(size=256))
    assert np.abs(crop[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_other_modes_become_colours():
    picture = Image.fromarray(colours(230, 230))
    grey = load_image(encoded(picture.convert("L")), SPEC)
    assert np.array_equal(grey, load_image(np.asarray(picture.convert("L")), SPEC))
    transparent = picture.copy()
    transparent.putalpha(7)
    assert np.array_equal(load_image(encoded(transparent), SPEC), load_image(encoded(picture), SPEC))
    inks = crop_image(read_image(encoded(picture.convert("CMYK"), "JPEG", quality=95)), SPEC)
    assert np.abs(inks.astype(int) - crop_image(picture, SPEC)).mean() < 4
    pale = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(load_image(encoded(pale), SPEC), load_image(np.asarray(pale.convert("RGB")), SPEC))


def test_one_pixel_fills_the_crop():
    assert np.array_equal(
        crop_image(read_image(np.array([[[9, 8, 7]]], np.uint8)), SPEC), np.full((224, 224, 3), (9, 8, 7), np.uint8)
    )


def animation():
    frames = [Image.fromarray(colours(20, 20, seed)) for seed in (0, 1)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def test_a_second_view_is_left_alone():
    views = [Image.fromarray(colours(240, 240, seed)) for seed in (0, 1)]
    both = encoded(views[0], "MPO", save_all=True, append_images=views[1:])
    assert np.abs(load_image(both, SPEC) - load_image(np.asarray(views[0]), SPEC)).max() < 0.3


BAD = {
    "type": 3,
    "not_found": "no/such/picture.png",
    "empty": b"",
    "not_image": b"RIFF....WAVEfmt " * 9,
    "unsupported": encoded(Image.fromarray(colours(20, 20)), "BMP"),
    "corrupt": encoded(Image.fromarray(colours(300, 300)), "JPEG")[:2000],
    "animated": animation(),
    "too_large": encoded(Image.new("1", (20_000, 20_000))),
    "a little too_large": encoded(Image.new("1", (9_000, 8_000))),
    "far too_large": encoded(Image.new("1", (11_000, 11_000))),
    "aspect": np.zeros((1, 65, 3), np.uint8),
    "dtype": np.zeros((9, 9, 3), np.float32),
    "shape": np.zeros((9, 9, 4), np.uint8),
}


@pytest.mark.parametrize("code", BAD)
def test_bad_pictures_have_a_code(code):
    with pytest.raises(ImageDecodeError) as caught:
        load_image(BAD[code], SPEC)
    assert caught.value.code == code.split()[-1]


def test_a_folder_is_not_readable(tmp_path):
    with pytest.raises(ImageDecodeError) as caught:
        load_image(tmp_path, SPEC)
    assert caught.value.code == "not_readable"


def test_a_huge_picture_is_refused_before_it_is_decoded():
    tracemalloc.start()
    try:
        with pytest.raises(ImageDecodeError, match="400000000 pixels"):
            load_image(BAD["too_large"], SPEC)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", [{"size": 0}, {"std": (0.2, 0.0, 0.2)}, {"mean": (0.5,)}, {"resample": "nearest"}])
def test_impossible_specs_name_their_field(change):
    with pytest.raises(SpecError) as caught:
        ImageSpec(**change)
    assert caught.value.field == next(iter(change))


def test_specs_travel_as_json():
    spec = ImageSpec(size=96, resample="bilinear", mean=(0.5, 0.5, 0.5))
    assert ImageSpec.from_json(spec.to_json()) == spec
