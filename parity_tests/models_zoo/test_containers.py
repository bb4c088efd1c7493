from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from models_zoo.audio import load_audio, probe_audio, stream_audio
from models_zoo.errors import AudioDecodeError
from models_zoo.presets import get_frontend
from parity_tests.models_zoo.recordings import CODINGS, encoded, signal

SPEC = get_frontend("efficientat")


def code_of(recording: bytes) -> str:
    """Return the code of the refusal, or ``loads``."""
    try:
        load_audio(recording, SPEC)
    except AudioDecodeError as error:
        return error.code if str(error).startswith(f"<{len(recording)} bytes>: ") else f"unnamed: {error}"
    return "loads"


def cuts(size: int) -> list[int]:
    """Return every place in the first 120 and the last 40 bytes, and a hundred in between."""
    between = np.linspace(120, size - 40, 100).astype(int).tolist()
    return sorted(
        {*range(1, min(120, size)), *(place for place in between if 0 < place < size), *range(size - 40, size)}
    )


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("container", "coding"), CODINGS)
def test_no_cut_that_loses_samples_passes(container: str, coding: str, channels: int) -> None:
    recording = encoded(signal(9_000, channels), container, coding, 48000 if coding == "OPUS" else 32000)
    whole = load_audio(recording, SPEC)
    for place in cuts(len(recording)):
        code = code_of(recording[:place])
        if code == "loads":
            np.testing.assert_array_equal(load_audio(recording[:place], SPEC), whole, err_msg=f"cut at {place}")
        else:
            # Cut short, or too short to be recognised at all.
            assert code == "truncated" or (code == "not_audio" and place < 16), place


@pytest.mark.parametrize(("container", "coding"), CODINGS)
def test_a_cut_is_told_by_streaming_and_mostly_by_the_header_alone(container: str, coding: str) -> None:
    recording = encoded(signal(100_000), container, coding, 48000 if coding == "OPUS" else 32000)
    half = recording[: len(recording) // 2]
    with pytest.raises(AudioDecodeError, match="cut short"):
        for _ in stream_audio(half, SPEC):
            pass
    if container != "FLAC":
        with pytest.raises(AudioDecodeError, match="cut short"):
            probe_audio(half)


# RIFF


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(content) if size is None else size) + content + b"\0" * (len(content) % 2)


def wav(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


SAMPLES = (signal(3001) * 32768).astype("<i2")
FORMAT = chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 32000, 64000, 2, 16))
DATA = chunk(b"data", SAMPLES.tobytes())


@pytest.mark.parametrize(
    "recording",
    [
        wav(FORMAT, DATA),
        wav(chunk(b"LIST", b"INFOISFT\x03\0\0\0abc\0"), FORMAT, chunk(b"fact", bytes(4)), DATA),
        wav(chunk(b"bext", bytes(602)), FORMAT, chunk(b"note", b"odd"), DATA),
        wav(FORMAT, DATA, chunk(b"LIST", bytes(31)), chunk(b"id3 ", bytes(7))),
        wav(FORMAT, DATA, chunk(b"LIST", bytes(10), size=5000)),
        wav(FORMAT, DATA) + b"appended by some tool",
        wav(FORMAT, DATA, size=0),
        wav(FORMAT, DATA, size=0xFFFFFFFF),
        wav(FORMAT, DATA, size=len(SAMPLES) * 2 + 8),
        wav(FORMAT, DATA, size=len(SAMPLES) * 2 + 36 + 100),
        wav(FORMAT, chunk(b"data", SAMPLES.tobytes(), size=0xFFFFFFFF), size=0xFFFFFFFF),
        wav(FORMAT, chunk(b"data", SAMPLES.tobytes(), size=0x7FFFF000)),
        wav(FORMAT, chunk(b"data", SAMPLES.tobytes(), size=0)),
        wav(chunk(b"junk", bytes(28)), FORMAT, chunk(b"data", SAMPLES.tobytes(), size=0)),
    ],
    ids=lambda recording: f"{len(recording)}-{zlib.crc32(recording):08x}",
)
def test_whole_wav_files_of_all_sorts_load(recording: bytes) -> None:
    np.testing.assert_array_equal(load_audio(recording, SPEC), SAMPLES / np.float32(32768))


def test_wav_files_without_samples() -> None:
    assert code_of(wav(FORMAT, chunk(b"data", b""))) == "no_samples"
    assert code_of(wav(FORMAT, chunk(b"data", b""), chunk(b"LIST", b"INFO"))) == "no_samples"
    assert code_of(wav(FORMAT, chunk(b"data", b"", size=6000))) == "truncated"
    assert code_of(wav(FORMAT)) == "truncated"
    assert code_of(wav(chunk(b"fmt ", bytes(4)), DATA)) == "corrupt"
    assert code_of(wav(DATA, FORMAT)) == "corrupt"
    assert code_of(wav(*[chunk(b"junk", b"")] * 10_001, FORMAT, DATA)) == "corrupt"


def test_headers_without_samples() -> None:
    for container, coding in CODINGS:
        if (container, coding) in {("MP3", "MPEG_LAYER_III"), ("CAF", "ALAC_16")}:
            continue  # An MP3 of nothing is a file of nothing; an empty ALAC cannot be written.
        rate = 48000 if coding == "OPUS" else 32000
        assert code_of(encoded(signal(0), container, coding, rate)) in {
            "no_samples",
            "corrupt",
            "empty",
            "truncated",
        }, container


# MP3


def frames(mp3: bytes) -> list[bytes]:
    """Return the frames of a constant-bitrate 44.1 kHz file, the one with the Xing header first."""
    places = [place for place in range(len(mp3) - 1) if mp3[place] == 0xFF and mp3[place + 1] == 0xFB]
    found = []
    begin = 0
    while begin < len(mp3):
        kbits = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[mp3[begin + 2] >> 4]
        end = begin + 144000 * kbits // 44100 + (mp3[begin + 2] >> 1 & 1)
        assert begin in places
        found.append(mp3[begin:end])
        begin = end
    return found


@pytest.fixture(scope="module", params=["CONSTANT", "VARIABLE"])
def mp3(request: pytest.FixtureRequest) -> bytes:
    return encoded(signal(60_000), "MP3", "MPEG_LAYER_III", 44100, bitrate_mode=request.param, compression_level=0.4)


def test_mp3_with_header_may_carry_tags(mp3: bytes) -> None:
    expected = load_audio(mp3, SPEC)
    id3v2 = b"ID3\x04\0\0\0\0\x01\x10" + bytes(144)
    id3v1 = b"TAG".ljust(128, b"\0")
    ape = b"APETAGEX".ljust(64, b"\0")
    for recording in (id3v2 + mp3, id3v2 + id3v2 + mp3, mp3 + id3v1, mp3 + ape + id3v1, id3v2 + mp3 + id3v1):
        np.testing.assert_array_equal(load_audio(recording, SPEC), expected)


def test_mp3_cut_between_frames_is_told_by_its_header(mp3: bytes) -> None:
    parts = frames(mp3)
    assert b"Xing" in parts[0] or b"Info" in parts[0]
    for kept in range(1, len(parts)):
        assert code_of(b"".join(parts[:kept])) == "truncated", kept
        assert code_of(b"".join(parts[:kept]) + b"TAG".ljust(128, b"\0")) == "truncated", kept


def test_mp3_counts_without_bytes_or_frames_still_tell(mp3: bytes) -> None:
    parts = frames(mp3)
    place = max(parts[0].find(b"Xing"), parts[0].find(b"Info")) + 4
    for flags, field in ((1, parts[0][place + 4 : place + 8]), (2, parts[0][place + 8 : place + 12])):
        head = (parts[0][:place] + struct.pack(">I", flags) + field).ljust(len(parts[0]), b"\0")
        assert code_of(head + b"".join(parts[1:])) == "loads"
        assert code_of(head + b"".join(parts[1:-1])) == "truncated"


def test_mp3_with_a_vbri_header(mp3: bytes) -> None:
    parts = frames(mp3)
    size, count = len(mp3), len(parts) - 1
    vbri = struct.pack(">4sHHHIIHHHH", b"VBRI", 1, 0, 75, size, count, 0, 1, 2, 0)
    head = (parts[0][:4] + bytes(32) + vbri).ljust(len(parts[0]), b"\0")
    assert probe_audio(head + b"".join(parts[1:])).num_samples == count * 1152 - 529
    assert code_of(head + b"".join(parts[1:])) == "loads"
    assert code_of(head + b"".join(parts[1:-1])) == "truncated"


def test_mp3_without_header_is_decoded_to_its_end(mp3: bytes) -> None:
    """libsndfile guesses the length of such a file by the bitrate of its first frame, and drops the rest."""
    bare = b"".join(frames(mp3)[1:])
    count = len(frames(mp3)) - 1
    assert probe_audio(bare).num_samples == count * 1152 - 529
    waveform, whole = load_audio(bare, SPEC), load_audio(mp3, SPEC)
    # The header's file begins later: it also states how many samples the encoder put in front.
    shift = int(np.argmax(np.correlate(waveform[:4000], whole[:2000], "valid")))
    overlap = min(len(waveform) - shift, len(whole))
    assert overlap > 0.98 * len(whole)
    np.testing.assert_allclose(waveform[shift + 500 : shift + overlap - 500], whole[500 : overlap - 500], atol=0.2)


def test_mp3_without_header_cut_inside_a_frame_is_told_and_between_frames_cannot_be(mp3: bytes) -> None:
    parts = frames(mp3)[1:]
    bare = b"".join(parts)
    for kept in (3, len(parts) // 2, len(parts) - 1):
        place = len(b"".join(parts[:kept]))
        for more in (1, 2, 3, 4, 50, len(parts[kept]) - 1):
            assert code_of(bare[: place + more]) == "truncated", (kept, more)
        assert code_of(bare[:place]) == "loads"


def test_mp3_with_bytes_lost_in_the_middle_is_refused(mp3: bytes) -> None:
    parts = frames(mp3)
    broken = parts[10][: len(parts[10]) // 2]
    assert code_of(b"".join([*parts[:10], broken, *parts[11:]])) in {"corrupt", "truncated"}
    assert code_of(b"".join([*parts[:10], b"\x11" * 64, *parts[10:]])) == "corrupt"
    assert code_of(b"".join([*parts[:-1], b"\x11" + parts[-1][1:]])) in {"corrupt", "truncated"}


def test_joined_mp3_files_are_one_recording(mp3: bytes) -> None:
    count = 2 * len(frames(mp3))
    assert probe_audio(mp3 + mp3).num_samples == count * 1152 - 529
    assert code_of(mp3 + mp3) == "loads"
    assert code_of(mp3 + mp3[:-10]) == "truncated"


# FLAC


def stated_length(flac: bytes, num_samples: int) -> bytes:
    """Return the file with another number of samples in its STREAMINFO."""
    packed = int.from_bytes(flac[18:26]) >> 36 << 36 | num_samples
    return flac[:18] + packed.to_bytes(8) + flac[26:]


def test_flac_written_into_a_pipe_loads_and_a_cut_inside_a_frame_is_told() -> None:
    for num_samples in (100, 4096, 60_000):
        recording = encoded(signal(num_samples, channels=2), "FLAC", "PCM_16")
        piped = stated_length(recording, 0)
        assert probe_audio(piped).num_samples == num_samples
        np.testing.assert_array_equal(load_audio(piped, SPEC), load_audio(recording, SPEC))
        for lost in (1, 2, 100, len(recording) // 3):
            assert code_of(piped[:-lost]) == "truncated"


def test_flac_that_states_more_than_it_holds_is_cut_short() -> None:
    assert code_of(stated_length(encoded(signal(9000), "FLAC", "PCM_16"), 9001)) == "truncated"


def test_flac_damaged_inside_is_corrupt_not_cut_short() -> None:
    recording = bytearray(encoded(signal(60_000), "FLAC", "PCM_16"))
    for place in np.linspace(300, len(recording) - 20_000, 12).astype(int):
        damaged = recording.copy()
        damaged[place] ^= 0x10
        assert code_of(bytes(damaged)) == "corrupt", place


# Ogg


@pytest.mark.parametrize(("coding", "rate"), [("VORBIS", 32000), ("OPUS", 48000)])
def test_ogg_damage_is_found_and_the_end_must_be_flagged(coding: str, rate: int) -> None:
    recording = encoded(signal(60_000), "OGG", coding, rate)
    for place in np.linspace(0, len(recording) - 1, 40).astype(int):
        damaged = bytearray(recording)
        damaged[place] ^= 0x04
        assert code_of(bytes(damaged)) in {"corrupt", "truncated", "not_audio"}, place
    pages = [b"OggS" + rest for rest in recording.split(b"OggS")[1:]]
    assert len(pages) >= 4
    assert code_of(b"".join(pages[:-1])) == "truncated"
    assert code_of(b"".join([*pages[:-2], pages[-1]])) == "corrupt"
    assert code_of(recording + b"TAG".ljust(128, b"\0")) == "loads"
    assert code_of(recording + b"Og") == "truncated"


def test_joined_ogg_files_are_refused_not_half_read() -> None:
    recording = encoded(signal(9000), "OGG", "VORBIS")
    other = encoded(signal(9000, seed=1), "OGG", "VORBIS")
    assert code_of(recording + other) == "unsupported"


# What is no recording


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"Not audio at all, but some text.\n" * 50, "not_audio"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1000), "not_audio"),
        (b"\xff\xd8\xff\xe0" + bytes(1000), "not_audio"),
        (b"%PDF-1.7\n" + bytes(1000), "not_audio"),
        (b"PK\x03\x04" + bytes(1000), "not_audio"),
        (bytes(1000), "not_audio"),
        (b"\xff" * 1000, "not_audio"),
        (b"\0", "not_audio"),
        (b"RIFF\x10\0\0\0AVI LIST", "not_audio"),
        (b"FORM\0\0\0\x10ILBMBMHD", "not_audio"),
        (b"ID3\x03\0\0\0\0\0\x14" + bytes(300), "not_audio"),
        (b"\xff\xfb\x90\x64" + bytes(4000), "not_audio"),
        (b"ID3\x03\0\0\0\0\x7f\x7f", "truncated"),
        (b"RIFF", "truncated"),
        (b"fLaC", "truncated"),
        (b"OggS", "truncated"),
        (b"FORM\0\0\0\x10AIFF", "truncated"),
        (b"caff\0\1\0\0", "truncated"),
    ],
)
def test_what_is_no_recording(content: bytes, code: str) -> None:
    assert code_of(content) == code


def test_random_bytes_are_no_recording() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert code_of(rng.bytes(int(rng.integers(1, 3000)))) in {"not_audio", "truncated"}


@pytest.mark.parametrize(
    ("container", "coding"), [coding for coding in CODINGS if coding[0] != "WAV"] + [CODINGS[1], CODINGS[4]]
)
def test_mutated_files_load_or_are_refused(container: str, coding: str) -> None:
    """Whatever the bytes, nothing but an AudioDecodeError and finite samples may come out, and soon."""
    rng = np.random.default_rng(7)
    original = encoded(signal(4000), container, coding, 48000 if coding == "OPUS" else 32000)
    outcomes = set()
    for i in range(60):
        recording = bytearray(original)
        zone = len(recording) if i % 2 else min(len(recording), 160)
        for _ in range(int(rng.integers(1, 6))):
            recording[int(rng.integers(0, zone))] = int(rng.integers(0, 256))
        if i % 5 == 0:
            place = int(rng.integers(0, len(recording)))
            recording[place : place + int(rng.integers(0, 40))] = rng.bytes(int(rng.integers(0, 40)))
        try:
            waveform = load_audio(bytes(recording), SPEC, max_seconds=60)
        except AudioDecodeError as error:
            outcomes.add(error.code)
        else:
            assert np.isfinite(waveform).all()
    assert len(outcomes) >= 2


@pytest.mark.parametrize("place", range(4, 60, 4))
def test_huge_sizes_in_headers_are_refused(place: int) -> None:
    for container in ("WAV", "RF64", "W64", "CAF", "AIFF"):
        recording = bytearray(encoded(signal(100), container, "PCM_16"))
        recording[place : place + 8] = b"\x7f" + b"\xff" * 7
        assert code_of(bytes(recording)) in {
            "loads",
            "corrupt",
            "truncated",
            "not_audio",
            "channels",
            "sample_rate",
            "no_samples",
        }
