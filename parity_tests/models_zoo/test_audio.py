from __future__ import annotations

import io
import math
import struct
import time
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from models_zoo.audio import MAX_CHANNELS, as_waveform, load_audio, probe_audio, stream_audio
from models_zoo.errors import AudioDecodeError, WaveformError
from models_zoo.presets import get_frontend
from parity_tests.models_zoo.recordings import CODINGS, encoded, signal

SPEC = get_frontend("efficientat")
FIRST_CHANNEL = get_frontend("cav_mae").replace(sample_rate=32000)


def refusal(source: object, **options: float) -> AudioDecodeError:
    with pytest.raises(AudioDecodeError) as caught:
        load_audio(source, SPEC, **options)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize(("container", "coding"), CODINGS)
def test_every_coding_loads_and_streams_bit_for_bit(container: str, coding: str) -> None:
    rate = 48000 if coding == "OPUS" else 32000
    recording = encoded(signal(70_001, channels=2), container, coding, rate)
    waveform = load_audio(recording, SPEC)
    assert waveform.dtype == np.float32
    assert waveform.ndim == 1
    assert waveform.flags.c_contiguous
    decoded, _ = soundfile.read(io.BytesIO(recording), dtype="float32")
    expected = decoded.mean(axis=1, dtype=np.float32)
    if rate != 32000:
        expected = soxr.resample(expected, rate, 32000, quality="HQ")
    np.testing.assert_array_equal(waveform, expected)
    for block_seconds in (0.013, 0.5, 60.0):
        blocks = list(stream_audio(recording, SPEC, block_seconds=block_seconds))
        np.testing.assert_array_equal(np.concatenate(blocks), waveform)
        length = round(block_seconds * 32000)
        assert [len(block) for block in blocks[:-1]] == [length] * (len(blocks) - 1)
    info = probe_audio(recording)
    assert (info.sample_rate, info.channels, info.num_samples) == (rate, 2, len(decoded))
    assert info.duration == pytest.approx(len(decoded) / rate)
    assert info.format == f"{container} {coding}"


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_streamed_resampling_is_soxr_hq_of_the_whole(rate: int) -> None:
    samples = signal(200_003)
    waveform = load_audio(encoded(samples, "WAV", "FLOAT", rate), SPEC)
    np.testing.assert_array_equal(waveform, soxr.resample(samples, rate, 32000, quality="HQ"))
    np.testing.assert_array_equal(waveform, as_waveform(samples, SPEC, sample_rate=rate))


def test_a_block_is_at_least_one_sample() -> None:
    blocks = list(stream_audio(encoded(signal(100), "WAV", "PCM_16"), SPEC, block_seconds=1e-9))
    assert [len(block) for block in blocks] == [1] * 100


def test_path_bytes_and_file_objects_are_read_alike(tmp_path: Path) -> None:
    recording = encoded(signal(5000), "FLAC", "PCM_16")
    path = tmp_path / "clip with no suffix"
    path.write_bytes(recording)
    expected = load_audio(path, SPEC)

    class Socket(io.RawIOBase):
        """Reads in short pieces and cannot seek."""

        def __init__(self) -> None:
            self.rest = io.BytesIO(recording)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:
            return self.rest.readinto(memoryview(buffer)[:777])

    class OnlyRead:
        read = io.BytesIO(recording).read

    advanced = io.BytesIO(recording)
    advanced.seek(100)
    with open(path, "rb") as buffered, open(path, "rb", buffering=0) as unbuffered:
        sources = [str(path), recording, bytearray(recording), memoryview(recording), buffered, unbuffered]
        for source in [*sources, advanced, advanced, Socket(), io.BufferedReader(Socket()), OnlyRead()]:
            np.testing.assert_array_equal(load_audio(source, SPEC), expected)
        assert not buffered.closed


def test_channels_become_one_as_the_spec_says() -> None:
    samples = signal(4000, channels=3)
    recording = encoded(samples, "WAV", "FLOAT")
    np.testing.assert_array_equal(load_audio(recording, SPEC), samples.mean(axis=1, dtype=np.float32))
    np.testing.assert_array_equal(load_audio(recording, FIRST_CHANNEL), samples[:, 0])
    np.testing.assert_array_equal(as_waveform(samples.T, SPEC, channels_first=True), load_audio(recording, SPEC))
    np.testing.assert_array_equal(as_waveform(samples.T, FIRST_CHANNEL, channels_first=True), samples[:, 0])


@pytest.mark.parametrize(("width", "dtype"), [(1, np.uint8), (2, np.int16), (4, np.int32)])
def test_integer_files_and_integer_arrays_mean_the_same(width: int, dtype: type[np.generic]) -> None:
    limits = np.iinfo(dtype)
    samples = np.random.default_rng(0).integers(limits.min, limits.max, 3000, dtype, endpoint=True)
    samples[:2] = limits.min, limits.max
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, width, 32000, 0, "NONE", ""))
        writer.writeframes(samples.tobytes())
    waveform = load_audio(file.getvalue(), SPEC)
    np.testing.assert_array_equal(waveform, as_waveform(samples, SPEC))
    assert waveform[0] == -1
    assert 0.99 < waveform[1] <= 1


def test_nothing_is_clipped() -> None:
    loud = 3 * signal(4000)
    np.testing.assert_array_equal(load_audio(encoded(loud, "WAV", "FLOAT"), SPEC), loud)
    np.testing.assert_array_equal(as_waveform(loud, SPEC), loud)


def test_missing_unreadable_and_wrong_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty.wav"
    empty.touch()
    assert refusal(tmp_path / "missing.wav").code == "not_found"
    assert refusal(empty / "below_a_file.wav").code == "not_found"
    assert refusal(tmp_path).code == "not_readable"
    assert refusal("nul\0byte.wav").code == "not_readable"
    assert refusal("x" * 5000).code == "not_readable"
    assert refusal(empty).code == "empty"
    assert refusal(b"").code == "empty"
    assert refusal(io.BytesIO()).code == "empty"
    for wrong in (None, 3, 0.5, [1, 2], np.zeros(10), io.StringIO("text")):
        assert refusal(wrong).code == "type"
    closed = io.BytesIO(b"x")
    closed.close()
    assert refusal(closed).code == "not_readable"

    class Broken:
        def read(self, size: int = -1) -> bytes:
            raise KeyError("gone")

    assert refusal(Broken()).code == "not_readable"

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("models_zoo.files.open", forbidden, raising=False)
    error = refusal(empty)
    assert error.code == "not_readable"
    assert str(empty) in str(error)
    assert "Permission denied" in str(error)


@pytest.mark.parametrize("option", [0, -1, float("nan"), True, "600", None])
def test_impossible_durations_are_refused(option: object) -> None:
    recording = encoded(signal(100), "WAV", "PCM_16")
    assert refusal(recording, max_seconds=option).code == "type"  # type: ignore[arg-type]
    with pytest.raises(AudioDecodeError, match="block_seconds"):
        next(stream_audio(recording, SPEC, block_seconds=option))  # type: ignore[arg-type]


def _wav(sample_rate: int = 32000, channels: int = 1) -> bytes:
    data = bytes(2 * min(channels, 2000) * 10)
    block = min(2 * channels, 65535)
    layout = struct.pack("<HHIIHH", 1, channels, sample_rate, min(sample_rate * 2, 2**32 - 1), block, 16)
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 2**31, 2**32 - 1])
def test_impossible_rates_are_refused_before_reading(rate: int) -> None:
    error = refusal(_wav(sample_rate=rate))
    assert error.code == "sample_rate"
    for word in (str(rate), "1000", "768000"):
        assert word in str(error)


@pytest.mark.parametrize("channels", [0, 65, 1000, 1025, 65535])
def test_impossible_channel_counts_are_refused_before_reading(channels: int) -> None:
    error = refusal(_wav(channels=channels))
    assert error.code == "channels"
    assert str(channels) in str(error)
    assert str(MAX_CHANNELS) in str(error)


def test_sixty_four_channels_and_the_lowest_rate_are_taken() -> None:
    assert len(load_audio(_wav(channels=64), SPEC)) == 10
    assert len(load_audio(_wav(sample_rate=1000), SPEC)) == 320


def test_rates_of_other_containers_are_checked_too() -> None:
    aiff = bytearray(encoded(signal(100), "AIFF", "PCM_16"))
    place = aiff.index(b"COMM") + 16
    aiff[place : place + 10] = struct.pack(">HQ", 16383 + 31, 1 << 63)
    assert refusal(bytes(aiff)).code == "sample_rate"
    au = encoded(signal(100), "AU", "PCM_16")
    order = ">" if au[:4] == b".snd" else "<"
    assert refusal(au[:16] + struct.pack(order + "I", 1) + au[20:]).code == "sample_rate"
    assert refusal(au[:20] + struct.pack(order + "I", 1000) + au[24:]).code == "channels"
    caf = encoded(signal(100), "CAF", "PCM_16")
    place = caf.index(b"desc") + 12
    assert refusal(caf[:place] + struct.pack(">d", 2.0**31) + caf[place + 8 :]).code == "sample_rate"


def test_an_hour_of_silence_is_refused_quickly_and_without_memory(tmp_path: Path) -> None:
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(36):
            file.write(np.zeros(800_000, np.int16))
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    begin = time.perf_counter()
    error = refusal(path)
    seconds = time.perf_counter() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.code == "too_long"
    for word in ("3600", "600", "max_seconds", "--max-seconds"):
        assert word in str(error)
    assert seconds < 2
    assert peak < 4e6
    assert probe_audio(path).duration == 3600


def test_the_cap_is_on_what_is_decoded_and_can_be_moved() -> None:
    recording = encoded(signal(64_000), "WAV", "PCM_16")
    assert refusal(recording, max_seconds=1.999).code == "too_long"
    assert len(load_audio(recording, SPEC, max_seconds=2)) == 64_000
    assert len(load_audio(recording, SPEC, max_seconds=math.inf)) == 64_000
    # A header that states no length (written into a pipe) does not get round the cap.
    flac = bytearray(encoded(signal(64_000), "FLAC", "PCM_16"))
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    assert refusal(bytes(flac), max_seconds=1.9).code == "too_long"


def test_streaming_takes_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for seed in range(12):
            file.write(signal(800_000, seed=seed))
    seconds = 1200
    tracemalloc.start()
    count = sum(len(block) for block in stream_audio(path, SPEC, block_seconds=2.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == seconds * 32000
    assert peak < 8e6 < count * 4 / 10


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("coding", ["FLOAT", "DOUBLE"])
def test_samples_that_are_no_numbers_are_refused_with_their_place(value: float, coding: str) -> None:
    samples = signal(90_000, channels=2)
    samples[80_000, 1] = value
    for spec in (SPEC, FIRST_CHANNEL):
        with pytest.raises(AudioDecodeError, match=r"sample 80000 \(2\.5000 s\) of channel 1") as caught:
            load_audio(encoded(samples, "WAV", coding), spec)
        assert caught.value.code == "non_finite"


@pytest.mark.filterwarnings("ignore:overflow encountered")  # NumPy says so before we do.
def test_samples_too_large_to_mix_are_refused() -> None:
    huge = np.full((1000, 4), 3e38, np.float32)
    assert refusal(encoded(huge, "WAV", "FLOAT")).code == "non_finite"
    with pytest.raises(WaveformError) as caught:
        as_waveform(huge.T, SPEC, channels_first=True)
    assert caught.value.code == "range"


def test_a_clip_that_vanishes_in_resampling_is_refused() -> None:
    assert refusal(encoded(signal(1), "WAV", "PCM_16", 96000)).code == "no_samples"


def test_stopping_early_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_bytes(encoded(signal(640_000), "WAV", "PCM_16"))
    stream = stream_audio(path, SPEC, block_seconds=0.1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    stream_audio(tmp_path / "missing.wav", SPEC)


# Arrays


def problem(array: object, **options: object) -> str:
    with pytest.raises(WaveformError) as caught:
        as_waveform(array, SPEC, **options)  # type: ignore[arg-type]
    return caught.value.code


def test_conversion_rule() -> None:
    for array, expected in (
        (np.array([-32768, 0, 16384], np.int16), [-1, 0, 0.5]),
        (np.array([-(2**31), 0, 2**30], np.int32), [-1, 0, 0.5]),
        (np.array([0, 128, 192], np.uint8), [-1, 0, 0.5]),
        (np.array([-1.5, 0, 0.25], np.float64), [-1.5, 0, 0.25]),
        (np.array([-1.5, 0, 0.25], np.float16), [-1.5, 0, 0.25]),
        (np.array([-1.5, 0, 0.25], ">f4"), [-1.5, 0, 0.25]),
        (np.array([-32768, 0, 16384], ">i2"), [-1, 0, 0.5]),
        ([-1.5, 0.0, 0.25], [-1.5, 0, 0.25]),
    ):
        waveform = as_waveform(array, SPEC)
        assert waveform.dtype == np.dtype("float32")
        assert waveform.dtype.isnative
        assert waveform.tolist() == expected


def test_two_dimensions_are_a_batch_unless_said_otherwise() -> None:
    batch = signal(3000, channels=2).T
    np.testing.assert_array_equal(as_waveform(batch, SPEC), batch)
    np.testing.assert_array_equal(as_waveform(batch[:1], SPEC, channels_first=True), batch[0])
    resampled = as_waveform(batch, SPEC, sample_rate=16000)
    assert resampled.shape == (2, 6000)
    for row, clip in zip(resampled, batch, strict=True):
        np.testing.assert_array_equal(row, as_waveform(np.ascontiguousarray(clip), SPEC, sample_rate=16000))


def test_the_callers_array_is_never_written_to() -> None:
    for array in (signal(1000), signal(1000).astype(np.float64), signal(2000)[::2], signal(1000, channels=2).T):
        before = array.copy()
        array.flags.writeable = False
        waveform = as_waveform(array, SPEC, sample_rate=32000)
        np.testing.assert_array_equal(array, before)
        np.testing.assert_array_equal(waveform, before.astype(np.float32))
        assert waveform.flags.c_contiguous


@pytest.mark.parametrize(
    "dtype", ["int8", "int64", "uint16", "uint32", "uint64", "bool", "complex64", "object", "U4", "S4"]
)
def test_other_dtypes_are_refused(dtype: str) -> None:
    assert problem(np.zeros(1000).astype(dtype)) == "dtype"


def test_the_dtype_message_names_what_converts() -> None:
    with pytest.raises(WaveformError, match=r"int64.*float32.*int16.*32768.*uint8"):
        as_waveform(np.zeros(10, np.int64), SPEC)


def test_wrong_arrays() -> None:
    assert problem(np.float32(0.5)) == "rank"
    assert problem(np.zeros((1, 2, 3))) == "rank"
    assert problem(np.zeros(1000), channels_first=True) == "rank"
    assert problem(np.zeros(0, np.float32)) == "empty"
    assert problem(np.zeros((3, 0), np.float32)) == "empty"
    assert problem([[0.0, 1.0], [0.0]]) == "dtype"
    assert problem("waveform") == "dtype"
    assert problem(None) == "dtype"
    assert problem({"a": 1}) == "dtype"
    assert problem([0.0, math.nan]) == "non_finite"
    assert problem(np.array([[0.0, 1.0], [0.0, math.inf]], np.float32)) == "non_finite"
    assert problem(np.array([1e300])) == "range"
    assert problem(np.zeros((65, 100), np.float32), channels_first=True) == "channels"
    assert problem(np.zeros(1, np.float32), sample_rate=192000) == "empty"


@pytest.mark.parametrize(
    "rate", ["44100", 44100.5, math.nan, math.inf, True, False, 0, -1, -44100, 999, 2**31, [1], None.__class__]
)
def test_wrong_rates(rate: object) -> None:
    assert problem(np.zeros(100, np.float32), sample_rate=rate) == "sample_rate"


@pytest.mark.parametrize("rate", [44100, 44100.0, np.int32(44100), np.float64(44100)])
def test_whole_rates_of_any_type_are_taken(rate: float) -> None:
    assert as_waveform(signal(441), SPEC, sample_rate=rate).shape == (320,)  # type: ignore[arg-type]
