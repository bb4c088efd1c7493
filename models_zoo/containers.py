"""Is an audio file whole? Containers are read here, because decoders do not tell.

libsndfile opens WAV, MP3 and Ogg files that were cut short without complaint and reports the shortened length as the
declared one. So the sizes a container states are compared with the bytes that are there, before anything is decoded:

==========  ========================================================================================================
WAV, W64    chunk sizes of RIFF, RIFX, RF64 and Wave64. A ``data`` size of 0 or 0xFFFFFFFF (or SoX's 0x7FFFF000) is what
            a program writing into a pipe leaves behind; such a file is read to its end. *Limit:* a cut in it cannot be
            told. Only the ``data`` chunk must be whole; sizes of RIFF itself and of chunks after it may lie.
AIFF, CAF   chunk sizes; CAF's -1 means "to the end of the file".
AU          its data size; 0xFFFFFFFF means "to the end of the file".
FLAC        the number of samples in STREAMINFO, compared with what is decoded. Where it is 0 (written into a pipe), the
            last frame, whose checksum must be right, tells. *Limit:* such a file cut exactly between two frames.
Ogg         every page's checksum and number; the last page of each stream must be flagged as its end. Several
            recordings joined into one file are refused, as only the first would be decoded.
MP3         frames are followed to the end of the file: none may be missing between them, the last must be whole, and
            there must be as many frames and bytes as the Xing, Info or VBRI header states. *Limits:* an MP3 without
            such a header that was cut exactly between two frames is, by itself, a valid shorter MP3, and nothing can
            tell; nor is damage inside a whole frame found, as MP3 has no checksum. Layers I and II and free-format
            bitrates are not read.
==========  ========================================================================================================

Where a header leaves out a length that libsndfile needs (it guesses that of an MP3 by the bitrate of its first frame
and drops the rest), ``Container.head`` holds a header that states it.

Source: Microsoft RIFF and EBU Tech 3306 (RF64), Apple AIFF-C and CAF 1.0, RFC 3533 (Ogg), RFC 7845 (Opus), RFC 9639
(FLAC), ISO 11172-3 with the Xing/LAME and Fraunhofer VBRI headers as encoders write them.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from models_zoo.errors import AudioDecodeError

__all__ = ["FORMATS", "Container", "inspect_container", "is_cut_flac"]

FORMATS = ("WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "Ogg", "MP3")
"""What can be read: names of the containers."""

_MAX_CHUNKS = 10_000
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_MAGICS = (b"RIFF", b"RIFX", b"RF64", b"FORM", b"fLaC", b"OggS", b"ID3", b"caff", b".snd", _W64_RIFF)
_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_PIPED_SIZES = frozenset({0, 0xFFFFFFFF, *range(0x7FFFEFC0, 0x7FFFF001)})


@dataclass(frozen=True)
class Container:
    """What a file states about itself.

    Attributes:
        format: one of :data:`FORMATS`.
        sample_rate: Hz, or None where only the decoder knows.
        channels: their number, or None where only the decoder knows.
        num_samples: samples per channel the file must hold at least, or None where it does not say.
        head: bytes a decoder should be given in place of the first :attr:`head_length` of the file.
        head_length: how many bytes of the file ``head`` replaces.
    """

    format: str
    sample_rate: int | None = None
    channels: int | None = None
    num_samples: int | None = None
    head: bytes = b""
    head_length: int = 0


def inspect_container(stream: BinaryIO) -> Container:
    """Return what the recording in ``stream`` (seekable, read from its beginning) states, once it is known to be whole.

    Raises:
        AudioDecodeError: ``empty``, ``not_audio``, ``truncated``, ``corrupt``, ``unsupported``; the message has no
            file name.
    """
    size = stream.seek(0, 2)
    if size == 0:
        raise AudioDecodeError("the file is empty (0 bytes)", code="empty")
    start = _after_id3(stream, 0)
    magic = _read_at(stream, start, 16)
    if magic[:4] in (b"RIFF", b"RIFX", b"RF64") and (magic[8:12] == b"WAVE" or len(magic) < 12):
        return _inspect_wav(stream, start, size)
    if magic == _W64_RIFF:
        return _inspect_w64(stream, start, size)
    if magic[:4] == b"FORM" and (magic[8:12] in (b"AIFF", b"AIFC") or len(magic) < 12):
        return _inspect_aiff(stream, start, size)
    if magic[:4] in (b".snd", b"dns."):
        return _inspect_au(stream, start, size)
    if magic[:4] == b"caff":
        return _inspect_caf(stream, start, size)
    if magic[:4] == b"fLaC":
        return _inspect_flac(stream, start, size)
    if magic[:4] == b"OggS":
        return _inspect_ogg(stream, start, size)
    if start > 0 or _Mp3Header.parse(magic[:4]) is not None:
        return _inspect_mp3(stream, start, size)
    if any(known.startswith(magic) for known in _MAGICS):
        raise _truncated(f"the file ends after {size} bytes, inside its header")
    raise AudioDecodeError(
        f"not an audio file: it begins with {magic!r}; expected one of {', '.join(FORMATS)}", code="not_audio"
    )


def _truncated(what: str) -> AudioDecodeError:
    return AudioDecodeError(f"the recording is cut short: {what}; get the whole file again", code="truncated")


def _corrupt(what: str) -> AudioDecodeError:
    return AudioDecodeError(f"the recording is damaged: {what}; get an undamaged copy", code="corrupt")


def _read_at(stream: BinaryIO, offset: int, count: int) -> bytes:
    """Return up to ``count`` bytes at ``offset``; fewer at the end of the file."""
    stream.seek(min(offset, 1 << 62))  # A 64-bit size in a damaged header may lead further than seek can express.
    return stream.read(count)


def _fields(layout: str, stream: BinaryIO, offset: int, what: str) -> tuple[int, ...]:
    """Return the integers laid out at ``offset`` as :mod:`struct` names them."""
    data = _read_at(stream, offset, struct.calcsize(layout))
    if len(data) < struct.calcsize(layout):
        raise _truncated(f"it ends inside {what}")
    return struct.unpack(layout, data)


def _after_id3(stream: BinaryIO, start: int) -> int:
    """Return the offset behind any ID3v2 tags at ``start``."""
    while True:
        tag = _read_at(stream, start, 10)
        if len(tag) < 10 or tag[:3] != b"ID3" or max(tag[6:10]) > 127:
            return start
        length = tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]
        start += 10 + length + (10 if tag[5] & 0x10 else 0)


def _chunks(stream: BinaryIO, offset: int, size: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, offset of the content, stated size) of IFF chunks: 4-byte name, 4-byte size, padded to even."""
    for _ in range(_MAX_CHUNKS):
        header = _read_at(stream, offset, 8)
        if len(header) < 8:
            return
        name, (length,) = header[:4], struct.unpack(order + "I", header[4:])
        yield name, offset + 8, length
        offset += 8 + length
        if length % 2 and _read_at(stream, offset, 1) == b"\0":
            offset += 1  # Some writers forget the padding byte; chunk names never begin with 0.
    raise _corrupt(f"more than {_MAX_CHUNKS} chunks")


def _check_data(held: int, stated: int, unit: str = "bytes of samples") -> None:
    if held < stated:
        raise _truncated(f"its header states {stated} {unit}, {max(held, 0)} are there")


def _wave_format(stream: BinaryIO, offset: int, length: int, order: str) -> tuple[int, int, int | None]:
    """Return (sample rate, channels, bytes per sample of all channels or None for compressed) of a ``fmt`` chunk."""
    if length < 14:
        raise _corrupt(f"its format chunk has {length} bytes instead of at least 14")
    tag, channels, rate, _, block = _fields(order + "HHIIH", stream, offset, "its format chunk")
    return rate, channels, block if tag in (1, 3, 6, 7, 0xFFFE) and block else None


def _inspect_wav(stream: BinaryIO, start: int, size: int) -> Container:
    magic = _read_at(stream, start, 4)
    order = ">" if magic == b"RIFX" else "<"
    wide = magic == b"RF64"
    stated_wide: int | None = None
    layout: tuple[int, int, int | None] | None = None
    for name, offset, length in _chunks(stream, start + 12, size, order):
        if name == b"ds64" and wide:
            _, stated_wide = _fields("<QQ", stream, offset, "its 64-bit sizes")
        elif name == b"fmt ":
            layout = _wave_format(stream, offset, length, order)
        elif name == b"data":
            if layout is None:
                raise _corrupt("its samples come before their format")
            rate, channels, block = layout
            stated = stated_wide if wide and length == 0xFFFFFFFF and stated_wide is not None else length
            held = size - offset
            head = b""
            if stated in _PIPED_SIZES:
                if stated > 0:
                    stated = held
                elif not _is_chunk_list(stream, offset, size, order):
                    stated = held
                    head = _read_at(stream, 0, offset - 4) + struct.pack(order + "I", min(held, 0xFFFFFFFF))
            _check_data(held, stated)
            samples = stated // block if block else None
            return Container("RF64" if wide else "WAV", rate, channels, samples, head, len(head))
    raise _truncated("it ends before its samples")


def _is_chunk_list(stream: BinaryIO, offset: int, size: int, order: str) -> bool:
    """Whether chunks fill the file from ``offset`` exactly, so that an empty ``data`` chunk before them is empty."""
    ends = [start + length for _, start, length in _chunks(stream, offset, size, order)]
    return 0 <= size - (ends[-1] if ends else offset) <= 1


def _inspect_w64(stream: BinaryIO, start: int, size: int) -> Container:
    offset = start + 40
    layout: tuple[int, int, int | None] | None = None
    for _ in range(_MAX_CHUNKS):
        guid = _read_at(stream, offset, 16)
        (length,) = _fields("<Q", stream, offset + 16, "its chunks, before its samples")
        if length < 24:
            raise _corrupt(f"a chunk of {length} bytes, less than its own header")
        if guid == b"fmt " + _W64_TAIL:
            layout = _wave_format(stream, offset + 24, length - 24, "<")
        elif guid == b"data" + _W64_TAIL:
            if layout is None:
                raise _corrupt("its samples come before their format")
            rate, channels, block = layout
            _check_data(size - offset - 24, length - 24)
            return Container("W64", rate, channels, (length - 24) // block if block else None)
        offset += (length + 7) // 8 * 8
    raise _corrupt(f"more than {_MAX_CHUNKS} chunks")


def _inspect_aiff(stream: BinaryIO, start: int, size: int) -> Container:
    declared: tuple[int, int, int] | None = None
    whole = False
    for name, offset, length in _chunks(stream, start + 12, size, ">"):
        if name == b"COMM":
            channels, frames, _, exponent, mantissa = _fields(">HIHHQ", stream, offset, "its format chunk")
            power = (exponent & 0x7FFF) - 16383 - 63
            rate = 0 if exponent & 0x8000 or power > 0 else int(math.ldexp(mantissa, power))
            declared = rate, channels, frames
        elif name == b"SSND":
            _check_data(size - offset, length)
            whole = True
    if declared is None:
        raise _truncated("it ends before its format chunk")
    rate, channels, frames = declared
    if frames and not whole:
        raise _truncated("it ends before its samples")
    return Container("AIFF", rate, channels, frames)


def _inspect_au(stream: BinaryIO, start: int, size: int) -> Container:
    order = ">" if _read_at(stream, start, 4) == b".snd" else "<"
    offset, stated, _, rate, channels = _fields(order + "5I", stream, start + 4, "its header")
    if stated != 0xFFFFFFFF:
        _check_data(size - start - offset, stated)
    return Container("AU", rate, channels)


def _inspect_caf(stream: BinaryIO, start: int, size: int) -> Container:
    offset = start + 8
    rate = channels = None
    for _ in range(_MAX_CHUNKS):
        name = _read_at(stream, offset, 4)
        (length,) = _fields(">q", stream, offset + 4, "its chunks, before its samples")
        if name == b"desc":
            bits, _, _, _, _, channels = _fields(">Q5I", stream, offset + 12, "its format chunk")
            (exact,) = struct.unpack(">d", struct.pack(">Q", bits))
            rate = int(exact) if 0 <= exact < 2**63 else 0
        elif name == b"data":
            if length != -1:
                _check_data(size - offset - 12, length)
            return Container("CAF", rate, channels)
        if length < 0:
            raise _corrupt(f"a chunk of {length} bytes")
        offset += 12 + length
    raise _corrupt(f"more than {_MAX_CHUNKS} chunks")


def _inspect_flac(stream: BinaryIO, start: int, size: int) -> Container:
    head = _read_at(stream, start, 26)
    if len(head) < 26:
        raise _truncated("it ends inside its STREAMINFO")
    if head[4] & 0x7F != 0:
        raise _corrupt("its first block is not STREAMINFO")
    packed = int.from_bytes(head[18:26])
    rate, channels, total = packed >> 44, (packed >> 41 & 7) + 1, packed & _FLAC_TOTAL
    if total:
        return Container("FLAC", rate, channels, total)
    end, whole = _last_flac_frame(stream, start, size)
    if not whole:
        raise _truncated("its last frame is incomplete")
    return Container("FLAC", rate, channels, end, head[:18] + (packed | end).to_bytes(8), start + 26)


_FLAC_TOTAL = (1 << 36) - 1
_FLAC_REACH = 1 << 18


def is_cut_flac(stream: BinaryIO, total: int) -> bool:
    """Whether a FLAC that does not decode ends before its last frame or inside it, rather than being damaged within.

    Args:
        stream: the file.
        total: number of samples per channel it states.
    """
    end, whole = _last_flac_frame(stream, _after_id3(stream, 0), stream.seek(0, 2))
    return end < total or not whole


def _last_flac_frame(stream: BinaryIO, start: int, size: int) -> tuple[int, bool]:
    """Return the number of the first sample after the last frame that begins, and whether it ends at the file's end."""
    block_size = int.from_bytes(_read_at(stream, start + 10, 2))
    reach = min(size - start, _FLAC_REACH)
    tail = _read_at(stream, size - reach, reach)
    place = len(tail)
    while (place := tail.rfind(b"\xff", 0, place)) >= 0:
        end = _flac_frame_end(tail[place : place + 16], block_size)
        if end is not None:
            return end, _crc(tail[place:], 0x8005, 16) == 0
    return 0, False


def _flac_frame_end(header: bytes, block_size: int) -> int | None:
    """Return the number of the first sample after the frame with this header; None if it is no frame header."""
    if len(header) < 6 or header[1] & 0xFE != 0xF8 or header[2] >> 4 == 0:
        return None
    more = 0 if header[4] < 0x80 else 7 - (header[4] ^ 0xFF).bit_length()
    number = header[4] & (0x3F >> more) if more else header[4]
    for byte in header[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    offset = 5 + more
    code = header[2] >> 4
    extra = {6: 1, 7: 2}.get(code, 0)
    if extra:
        length = int.from_bytes(header[offset : offset + extra]) + 1
    else:
        length = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    offset += extra + {12: 1, 13: 2, 14: 2}.get(header[2] & 0xF, 0)
    if len(header) <= offset or _crc(header[: offset + 1], 0x07, 8) != 0:
        return None
    # Frames of a fixed size (but for the last) are numbered, others state their first sample.
    return (number if header[1] & 1 else number * block_size) + length


def _crc(data: bytes, polynomial: int, width: int) -> int:
    """Return FLAC's checksums, not reflected and from 0; that of data followed by its own checksum is 0."""
    register = 0
    for byte in data:
        register ^= byte << width - 8
        for _ in range(8):
            register = register << 1 ^ (polynomial if register >> width - 1 else 0)
            register &= (1 << width) - 1
    return register


_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page: bytes) -> int:
    """Return Ogg's CRC-32 (not reflected, from 0) by way of zlib's (reflected, from -1)."""
    reflected = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def _inspect_ogg(stream: BinaryIO, start: int, size: int) -> Container:
    offset = start
    pages: dict[int, int] = {}
    open_streams: set[int] = set()
    in_headers = True
    found = Container("Ogg")
    while offset < size:
        header = _read_at(stream, offset, 27)
        if not header.startswith(b"OggS"):
            if b"OggS".startswith(header) or open_streams:
                break
            return found  # Something appended behind the last stream, such as a tag.
        lacing = stream.read(header[26]) if len(header) == 27 else b""
        length = 27 + (header[26] if len(header) == 27 else 0) + sum(lacing)
        page = _read_at(stream, offset, length)
        if len(header) < 27 or len(page) < length:
            raise _truncated(f"its page at byte {offset} is incomplete")
        flags, serial, number, checksum = struct.unpack("<5xB8xIII", page[:26])
        if _ogg_checksum(page[:22] + b"\0\0\0\0" + page[26:]) != checksum:
            raise _corrupt(f"the checksum of its page at byte {offset} is wrong")
        if number != pages.get(serial, number - 1) + 1 and not flags & 2:
            raise _corrupt(f"pages are missing before byte {offset}")
        in_headers = in_headers and bool(flags & 2)
        if flags & 2 and not in_headers:
            raise AudioDecodeError(
                f"several Ogg recordings are joined, the second from byte {offset}; only the first would be read: "
                "split the file",
                code="unsupported",
            )
        if not pages and page[27 + len(lacing) :][:7] == b"\x01vorbis":
            channels, rate = _fields("<BI", stream, offset + 27 + len(lacing) + 11, "its header")
            found = Container("Ogg", rate, channels)
        pages[serial] = number
        (open_streams.discard if flags & 4 else open_streams.add)(serial)
        offset += length
    if open_streams or offset < size:
        raise _truncated("its last page is not flagged as the end of the stream")
    return found


@dataclass(frozen=True)
class _Mp3Header:
    """A frame header of layer III: MPEG ``version`` bits (3: 1, 2: 2, 0: 2.5), and what follows from the rest."""

    version: int
    sample_rate: int
    channels: int
    length: int

    @classmethod
    def parse(cls, data: bytes) -> _Mp3Header | None:
        """Return the header in the first four bytes; None where there is none or the bitrate is free."""
        if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE6 != 0xE2:
            return None
        version, bitrate, rate = data[1] >> 3 & 3, data[2] >> 4, data[2] >> 2 & 3
        if version == 1 or bitrate in (0, 15) or rate == 3:
            return None
        sample_rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
        bits = 1000 * _MP3_KBITS[version == 3][bitrate - 1]
        length = (144 if version == 3 else 72) * bits // sample_rate + (data[2] >> 1 & 1)
        return cls(version, sample_rate, 1 if data[3] >> 6 == 3 else 2, length)

    @property
    def samples(self) -> int:
        """Samples per channel in a frame."""
        return 1152 if self.version == 3 else 576

    @property
    def side_length(self) -> int:
        """Bytes of side information, behind which a Xing header stands."""
        return {(True, 2): 32, (True, 1): 17, (False, 2): 17, (False, 1): 9}[self.version == 3, self.channels]

    def continues(self, other: _Mp3Header) -> bool:
        """Whether this frame can belong to the stream of ``other``."""
        return (self.version, self.sample_rate) == (other.version, other.sample_rate)


_MP3_KBITS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_MP3_DECODER_DELAY = 529
"""Samples every decoder of layer III is late; mpg123 leaves them out at the beginning."""
_MP3_TAGS = (b"TAG", b"APE", b"LYR", b"ID3", b"3DI")


def _inspect_mp3(stream: BinaryIO, start: int, size: int) -> Container:
    if start >= size:
        raise _truncated("it ends inside its ID3 tag")
    if size - start >= 128 and _read_at(stream, size - 128, 3) == b"TAG":
        size -= 128
    first_offset = start
    first = _Mp3Header.parse(_read_at(stream, start, 4))
    if first is None:
        resumed = _next_frame(stream, start, size, None)
        if resumed is None:
            raise AudioDecodeError("not an audio file: no MPEG frame follows its ID3 tag", code="not_audio")
        first_offset, first = resumed
    kind, stated_frames, stated_bytes = _mp3_counts(_read_at(stream, first_offset, 256), first)
    frames, end, rest = _follow_frames(stream, first_offset, size, first)
    if frames == 1 and rest and not rest.startswith(_MP3_TAGS):
        raise AudioDecodeError("not an audio file: one MPEG frame header and no second one", code="not_audio")
    if stated_frames is None:
        _check_data(end - first_offset, stated_bytes or 0, "bytes")
    elif stated_bytes is None or end - first_offset < stated_bytes or not _is_no_junk(rest):
        _check_data(frames - 1, stated_frames, "frames")
    else:
        # Some encoders count the frame that holds the header, too.
        _check_data(frames, stated_frames, "frames")
    if kind == "Xing" and stated_frames == frames - 1:
        return Container("MP3", first.sample_rate, first.channels)
    skipped = 1 if kind == "VBRI" else 0  # libsndfile does not know this header: it would be a frame of silence.
    frames -= skipped
    head = _xing_frame(_read_at(stream, first_offset, 4), first, frames)
    decoded = max(0, frames * first.samples - _MP3_DECODER_DELAY)
    head_length = first_offset + skipped * first.length
    return Container("MP3", first.sample_rate, first.channels, decoded, head, head_length)


def _follow_frames(stream: BinaryIO, offset: int, size: int, first: _Mp3Header) -> tuple[int, int, bytes]:
    """Return (number of frames from ``offset``, their end, up to four bytes of what follows)."""
    frames, header = 0, first
    while True:
        if offset + header.length > size:
            raise _truncated(f"its last frame needs {header.length} bytes, {size - offset} are there")
        offset += header.length
        frames += 1
        following = _read_at(stream, offset, min(4, size - offset))
        parsed = _Mp3Header.parse(following)
        if parsed is not None and parsed.continues(first):
            header = parsed
            continue
        if 0 < len(following) < 4 and following[0] == 0xFF:
            raise _truncated("it ends inside a frame header")
        resumed = _next_frame(stream, offset, size, first)
        if resumed is None:
            return frames, offset, following
        if not _is_no_junk(following):
            raise _corrupt(f"{resumed[0] - offset} bytes from byte {offset} are no MPEG frame")
        offset, header = resumed  # Behind a tag or padding, as where files were joined.


def _is_no_junk(following: bytes) -> bool:
    """Whether what follows a frame is nothing, padding or a tag."""
    return not following.strip(b"\0") or following.startswith(_MP3_TAGS)


def _next_frame(stream: BinaryIO, offset: int, size: int, like: _Mp3Header | None) -> tuple[int, _Mp3Header] | None:
    """Return the first frame after ``offset`` that another one follows, within 64 KiB; None if there is none."""
    window = _read_at(stream, offset, min(65536, size - offset))
    place = window.find(b"\xff")
    while place >= 0:
        header = _Mp3Header.parse(window[place : place + 4])
        if header is not None and (like is None or header.continues(like)):
            follower = _Mp3Header.parse(_read_at(stream, offset + place + header.length, 4))
            if follower is not None and follower.continues(header):
                return offset + place, header
        place = window.find(b"\xff", place + 1)
    return None


def _xing_frame(like: bytes, header: _Mp3Header, frames: int) -> bytes:
    """Return a silent frame that states the number of ``frames`` after it, at 64 (MPEG 1) or 40 kbit/s."""
    start = bytes((0xFF, like[1] | 1, 0x50 | like[2] & 0x0C, like[3]))
    parsed = _Mp3Header.parse(start)
    length = parsed.length if parsed is not None else 0
    return (start + bytes(header.side_length) + b"Xing" + struct.pack(">II", 1, frames)).ljust(length, b"\0")


def _mp3_counts(frame: bytes, header: _Mp3Header) -> tuple[str, int | None, int | None]:
    """Return (kind of header, frames, bytes) that the first frame states, None where it does not."""
    for place in (4 + header.side_length, 6 + header.side_length):
        if frame[place : place + 4] in (b"Xing", b"Info") and len(frame) >= place + 16:
            flags, *counts = struct.unpack(">3I", frame[place + 4 : place + 16])
            stated_frames = counts.pop(0) if flags & 1 else None
            return "Xing", stated_frames, counts.pop(0) if flags & 2 else None
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        stated_bytes, stated_frames = struct.unpack(">II", frame[46:54])
        return "VBRI", stated_frames, stated_bytes
    return "", None, None
