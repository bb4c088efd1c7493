"""Videos: the published choice of frames, sound as that of a recording, and files that lack one or the other."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from models_zoo.audio import load_audio
from models_zoo.errors import VideoDecodeError
from models_zoo.images import ImageSpec, crop_image, load_image
from models_zoo.presets import get_frontend
from models_zoo.video import MIDDLE, chosen_frames, frame_indices, read_video_audio, read_video_frames

SPEC = get_frontend("cav_mae")
RATE = 25


def sound(seconds, rate=44100, channels=2):
    """Return ``(channels, samples)`` int16, another tone in each channel."""
    time = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * 300 * (channel + 1) * time) for channel in range(channels)]
    return (np.stack(tones) * 8000).astype(np.int16)


def video(seconds=5.0, *, pictures=True, shown=True, heard=True, container="matroska", codec="ffv1"):
    """Return the bytes of a video whose frame i is a grey of level 2 i, without loss."""
    stream = io.BytesIO()
    with av.open(stream, "w", format=container) as output:
        if pictures:
            track = output.add_stream(codec, rate=RATE)
            track.width, track.height, track.pix_fmt = 64, 48, "yuv420p" if codec != "ffv1" else "bgr0"
        if heard:
            samples = sound(seconds)
            line = output.add_stream("flac" if container == "matroska" else "aac", rate=44100)
            line.layout = "stereo"
        for index in range(round(seconds * RATE) if pictures and shown else 0):
            grey = np.full((48, 64, 3), 2 * index % 256, np.uint8)
            output.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        if pictures and shown:
            output.mux(track.encode())
        if heard:
            packed = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).copy(), format="s16", layout="stereo")
            packed.sample_rate = 44100
            fitting = av.AudioResampler(
                format=line.format, layout="stereo", rate=44100, frame_size=line.frame_size or 0
            )
            for part in (*fitting.resample(packed), *fitting.resample(None)):
                output.mux(line.encode(part))
            output.mux([packet for packet in line.encode() if packet.size])
    return stream.getvalue()


def damaged(data):
    """Return ``data`` with noise in its second half."""
    half = len(data) // 2
    return data[:half] + np.random.default_rng(0).integers(0, 256, len(data) - half, dtype=np.uint8).tobytes()


def level(picture):
    values = np.asarray(picture)
    assert values.shape == (48, 64, 3)
    assert np.ptp(values) == 0
    return int(values[0, 0, 0])


def test_the_published_frames():
    assert frame_indices(125, 25)[:4] == [0, 11, 24, 36]
    assert frame_indices(10_000, 25) == frame_indices(250, 25), "of the first ten seconds alone"
    assert frame_indices(3, 25) == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_frames_are_those_asked_for():
    data = video()
    indices = frame_indices(125, RATE)
    assert [level(picture) for picture in read_video_frames(data)] == [2 * indices[MIDDLE]]
    chosen = [9, 0, 3, 3]
    assert [level(picture) for picture in read_video_frames(data, chosen)] == [2 * indices[i] % 256 for i in chosen]


def test_one_frame_stands_for_all():
    assert [level(picture) for picture in read_video_frames(video(1 / RATE, heard=False), range(10))] == [0] * 10


def test_sound_is_that_of_a_recording(tmp_path):
    samples = sound(2.0)
    path = tmp_path / "same.wav"
    soundfile.write(path, samples.T, 44100, subtype="PCM_16")
    assert np.array_equal(read_video_audio(video(2.0), SPEC), load_audio(path, SPEC))
    mean = SPEC.replace(channels="mean")
    assert np.array_equal(read_video_audio(video(2.0), mean), load_audio(path, mean))


def test_an_mp4_from_disk(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(video(2.0, container="mp4", codec="mpeg4"))
    picture = np.asarray(read_video_frames(path)[0]).astype(int)
    assert np.abs(picture - 2 * frame_indices(50, RATE)[MIDDLE]).max() <= 3
    heard = read_video_audio(path, SPEC)
    assert abs(len(heard) - 32000) <= 3000  # AAC adds its own lead and tail
    with open(path, "rb") as stream:
        stream.read(9)
        assert np.array_equal(read_video_audio(stream, SPEC), heard)


BAD = {
    "type": (3, read_video_frames),
    "not_found": ("no/such.mp4", read_video_frames),
    "empty": (b"", read_video_audio),
    "not_video": (b"nothing of the kind" * 50, read_video_frames),
    "no_video": (video(0.5, pictures=False), read_video_frames),
    "no_audio": (video(0.5, heard=False), read_video_audio),
    "no_frames": (video(0.5, shown=False), read_video_frames),
    "corrupt": (damaged(video(0.5, pictures=False)), read_video_audio),
}


@pytest.mark.parametrize("code", BAD)
def test_bad_videos_have_a_code(code):
    source, read = BAD[code]
    with pytest.raises(VideoDecodeError) as caught:
        read(source, SPEC) if read is read_video_audio else read(source)
    assert caught.value.code == code


def test_the_promised_containers_are_read_and_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for container, codec in (
        ("mp4", "mpeg4"),
        ("mov", "mpeg4"),
        ("matroska", "ffv1"),
        ("webm", "vp8"),
        ("avi", "ffv1"),
    ):
        data = video(0.2, heard=False, container=container, codec=codec)
        assert len(read_video_frames(data)) == 1, container
        (tmp_path / f"ok.{container}").write_bytes(data)
    others = [b"ffconcat version 1.0\nfile ok.mp4\n"]
    for kind in ("PNG", "GIF"):
        stream = io.BytesIO()
        Image.new("RGB", (64, 48)).save(stream, kind)
        others.append(stream.getvalue())
    (tmp_path / "list.mp4").write_bytes(others[0])
    for source in (*others, tmp_path / "list.mp4"):
        for read in (read_video_frames, lambda source: read_video_audio(source, SPEC)):
            with pytest.raises(VideoDecodeError, match="MP4, MOV, Matroska, WebM or AVI") as caught:
                read(source)
            assert caught.value.code == "not_video"


def test_a_frame_larger_than_stated_is_refused():
    def jpeg(width, height):
        stream = io.BytesIO()
        Image.new("L", (width, height)).save(stream, "JPEG")
        return stream.getvalue()

    small, large, huge = (32, 32), (8200, 8000), (16000, 9000)
    for sizes, code in (
        ((small, large, small), "too_large"),
        ((large, small, small), "too_large"),
        ((small, huge, small), "corrupt"),
        ((huge, small, small), "corrupt"),
    ):
        stream = io.BytesIO()
        with av.open(stream, "w", format="avi") as output:
            track = output.add_stream("mjpeg", rate=5)
            track.width, track.height, track.pix_fmt = 32, 32, "yuvj420p"
            for index, data in enumerate(jpeg(*size) for size in sizes):
                packet = av.Packet(data)
                packet.stream, packet.pts, packet.dts, packet.is_keyframe = track, index, index, True
                output.mux(packet)
        with pytest.raises(VideoDecodeError) as caught:
            read_video_frames(stream.getvalue(), range(10))
        assert caught.value.code == code


def test_frames_are_cropped_as_they_come(monkeypatch):
    spec = ImageSpec(size=20)
    data = video()
    whole = read_video_frames(data, range(10))
    seen, most = [], []

    def watched(picture, spec):
        seen.append(weakref.ref(picture))
        most.append(sum(one() is not None for one in seen))
        return crop_image(picture, spec)

    monkeypatch.setattr("models_zoo.video.crop_image", watched)
    cropped = read_video_frames(data, range(10), spec)
    assert most == [1] * 10, "no whole frame is kept"
    for one, other in zip(whole, cropped, strict=True):
        assert other.size == (20, 20)
        assert np.array_equal(load_image(np.asarray(one), spec), load_image(np.asarray(other), spec))


@pytest.mark.parametrize(
    ("turns", "matrix"), [(1, (0, -1, 0, 1, 0)), (2, (-1, 0, 0, 0, -1)), (3, (0, 1, 0, -1, 0)), (0, (1, 0, 0, 0, 1))]
)
def test_frames_are_turned_as_they_are_shown(turns, matrix):
    grey = np.zeros((48, 64, 3), np.uint8)
    grey[:24, :32] = 200
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as output:
        track = output.add_stream("mpeg4", rate=5)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        output.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        output.mux(track.encode())
    data = stream.getvalue()
    at = data.index(b"tkhd") + 44  # the track's matrix: 16.16 numbers, the last 2.30
    turned = struct.pack(">9i", *(value << 16 for value in (*matrix, 0, 0, 0)), 1 << 30)
    shown = np.asarray(read_video_frames(data[:at] + turned + data[at + 36 :])[0])
    expected = np.rot90(grey, turns)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 10


def test_sound_that_changes_midway_is_refused():
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as output:
        line = output.add_stream("mp2", rate=44100, layout="stereo", format="s16")
        for rate, layout, channels in ((44100, "stereo", 2), (22050, "mono", 1)):
            encoder = av.CodecContext.create("mp2", "w")
            encoder.sample_rate, encoder.layout, encoder.format = rate, layout, "s16"
            encoder.time_base = Fraction(1, rate)
            encoder.open()
            packed = av.AudioFrame.from_ndarray(np.zeros((1, 1152 * channels), np.int16), format="s16", layout=layout)
            packed.sample_rate = rate
            for _ in range(5):
                for packet in encoder.encode(packed):
                    packet.stream = line
                    output.mux(packet)
    with pytest.raises(VideoDecodeError, match="changes its rate, channels") as caught:
        read_video_audio(stream.getvalue(), SPEC)
    assert caught.value.code == "corrupt"


def test_long_sound_is_refused():
    with pytest.raises(VideoDecodeError, match=r"longer than 0\.3 s"):
        read_video_audio(video(0.5), SPEC, max_seconds=0.3)


def test_frames_are_named_counted_or_listed():
    for frames, expected in (("middle", (5,)), (3, (3,)), (np.int64(3), (3,)), ([9, 0], (9, 0))):
        assert chosen_frames(frames) == expected
    assert chosen_frames(np.array([1, 2])) == (1, 2)
    assert chosen_frames("all") == tuple(range(10))


@pytest.mark.parametrize(
    "chosen", [[], [10], [-1], [1.5], None, 1.0, "first", "", np.array(1.0), np.array([0.5]), [[1]]]
)
def test_frames_that_are_none_of_the_ten_are_refused(chosen):
    with pytest.raises(VideoDecodeError, match="frames 0 to 9"):
        read_video_frames(b"never read", chosen)


def test_a_cut_video_is_refused_or_read_to_its_end():
    whole = video(2.0)
    for length in range(200, len(whole), len(whole) // 7):
        try:
            assert read_video_audio(whole[:length], SPEC).size
        except VideoDecodeError as error:
            assert error.code in ("corrupt", "not_video", "no_audio")


def test_without_the_extra_the_error_names_it():
    script = (
        "import sys; sys.modules['av'] = None\n"
        "from models_zoo.errors import MissingDependencyError\n"
        "from models_zoo.presets import get_frontend\n"
        "from models_zoo.video import read_video_audio, read_video_frames\n"
        "for read in (read_video_frames, lambda source: read_video_audio(source, get_frontend('cav_mae'))):\n"
        "    try:\n"
        "        read(b'x')\n"
        "    except MissingDependencyError as error:\n"
        "        print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.count("crossfade[video]") == 2
