"""What the library for sounds takes on trust: whether a file is whole, and how long it is.

libsndfile reads what is there of a file that was cut short, and of an MP3 no more than a guess at its length. Here the
containers' own numbers are compared with the bytes. Where a header can't know the length (a WAV written to a pipe, an
MP3 without a header of its own), the length is put there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_NEAR = 8192
"""Sizes of WAVs written to pipes lie so near to 2^31 or 2^32: each program has its own."""
_PADDING = 4096
"""Bytes that may lie between an MP3's tag and its first frame."""
_SAMPLE_RATES = (44100, 48000, 32000)
_KBITS_OF_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_OF_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


@dataclass(frozen=True)
class Examined:
    """A sound file whose header tells its length, and what is wrong with it."""

    data: bytes
    wrong: str = ""
    """What the file says it has and what is there; "" for a whole file."""


def examine(data: bytes) -> Examined:
    """Compares what a WAV, an MP3 or an Ogg file says of its length with the bytes that are there.

    Args:
        data: A whole file; of other kinds it is given back as it is.
    """
    if data[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and data[8:12] == b"WAVE":
        return _examine_wav(data)
    if data[:4] == b"OggS":
        return Examined(data, _wrong_with_ogg(data))
    first = _first_mp3_frame(data)
    return _examine_mp3(data, *first) if first is not None else Examined(data)


def _examine_wav(data: bytes) -> Examined:
    """WAV, and RF64 (EBU Tech 3306) with its successor BW64 (ITU-R BS.2088), whose sizes have 64 bits.

    What is given on has the format and the samples alone: libsndfile stumbles over some of the other chunks.
    """
    order, is_long = ">" if data[:4] == b"RIFX" else "<", data[:4] in (b"RF64", b"BW64")
    place, long_size, kept = 12, -1, b""
    while place + 8 <= len(data):
        name, (size,) = data[place : place + 4], struct.unpack_from(f"{order}I", data, place + 4)
        if name == b"data":
            break
        if name in (b"fmt ", b"fact"):
            kept += data[place : place + 8 + size] + bytes(size % 2)
        elif name == b"ds64" and place + 24 <= len(data):
            (long_size,) = struct.unpack_from("<Q", data, place + 16)
        place += 8 + size
        if size % 2 and not (_is_chunk(data, place, order) and not _is_chunk(data, place + 1, order)):
            place += 1  # some programs forget it
    else:
        return Examined(data)  # without sound, which the library says
    start, there = place + 8, len(data) - place - 8
    is_long = is_long and size == 0xFFFFFFFF and long_size >= 0
    size = long_size if is_long else size
    if size > there and not _is_of_pipe(size, is_long):
        return Examined(data, _cut(f"its header says {size} bytes of sound, {there} are there"))
    if size > there or (not size and there and not _is_chunk(data, start, order)):
        size = there
    total = 12 + len(kept) + size
    if total > 0xFFFFFFFF:  # the library finds its way, or says that it doesn't
        return Examined(data)
    head = (b"RIFX" if order == ">" else b"RIFF") + struct.pack(f"{order}I", total) + b"WAVE"
    samples = data[start : start + size]
    return Examined(b"".join([head, kept, b"data", struct.pack(f"{order}I", size), samples, bytes(size % 2)]))


def _cut(why: str) -> str:
    return f"is cut short: {why}; copy or download it again"


def _is_of_pipe(size: int, is_long: bool) -> bool:
    limits = (1 << 63, 1 << 64) if is_long else (1 << 31, 1 << 32)
    return any(abs(limit - size) <= _NEAR for limit in limits)


def _is_chunk(data: bytes, place: int, order: str) -> bool:
    """Whether another chunk begins there, which fits into the file."""
    name = data[place : place + 4]
    if len(data) < place + 8 or not (name.isascii() and name.decode("ascii").isprintable()):
        return False
    (size,) = struct.unpack_from(f"{order}I", data, place + 4)
    return place + 8 + size <= len(data)


def _wrong_with_ogg(data: bytes) -> str:
    """By the pages (RFC 3533): each tells its size, and the last of a stream that it is."""
    place, num_open, has_begun = 0, 0, False
    while data[place : place + 4] == b"OggS":
        num_segments = data[place + 26] if place + 26 < len(data) else 255
        after = place + 27 + num_segments
        size = 27 + num_segments + sum(data[place + 27 : after])
        if after > len(data) or place + size > len(data):
            return _cut(f"its last page needs {size} bytes, {len(data) - place} are there")
        flags = data[place + 5]
        if flags & 2:
            if has_begun:
                return f"holds several sounds, of which the first alone would be read; split it at byte {place}"
            num_open += 1
        else:
            has_begun = True
        num_open -= flags >> 2 & 1
        place += size
    return _cut("its last page has no end mark") if num_open > 0 else ""


@dataclass(frozen=True)
class _Mp3Frame:
    size: int
    kind: tuple[int, int]
    """Version and sample rate, alike in all frames of a file."""
    num_side: int
    """Bytes between header and data."""


def _mp3_frame(data: bytes, place: int) -> _Mp3Frame | None:
    """The frame of MPEG layer III that begins there (ISO/IEC 11172-3, 13818-3; version 2.5 is Fraunhofer's)."""
    header = int.from_bytes(data[place : place + 4], "big")
    version, layer, bitrate, rate = header >> 19 & 3, header >> 17 & 3, header >> 12 & 15, header >> 10 & 3
    if len(data) < place + 4 or header >> 21 != 0x7FF or version == 1 or layer != 1 or rate == 3:
        return None
    if bitrate in (0, 15):
        return None
    is_mpeg1, is_mono = version == 3, header >> 6 & 3 == 3
    bits = 1000 * (_KBITS_OF_MPEG1 if is_mpeg1 else _KBITS_OF_MPEG2)[bitrate]
    hertz = _SAMPLE_RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    size = (144 if is_mpeg1 else 72) * bits // hertz + (header >> 9 & 1)
    return _Mp3Frame(size, (version, rate), (17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17))


def _after_tags(data: bytes, place: int) -> int:
    """Where the ID3 tags that begin there end."""
    while True:
        if data[place : place + 3] == b"ID3" and len(data) >= place + 10:
            size = sum((byte & 127) << 7 * (3 - number) for number, byte in enumerate(data[place + 6 : place + 10]))
            place += 10 + size + (10 if data[place + 5] & 16 else 0)
        elif data[place : place + 3] == b"TAG":
            place += 128
        else:
            return place


def _first_mp3_frame(data: bytes) -> tuple[int, _Mp3Frame] | None:
    """Place and frame, if this is an MP3."""
    start = _after_tags(data, 0)
    frame = _mp3_frame(data, start)
    if frame is None and start and data[start : start + 4] != b"fLaC":
        found = _next_mp3_frame(data, start)
        return found if found is not None and found[0] - start < _PADDING else None
    return (start, frame) if frame is not None else None


def _next_mp3_frame(data: bytes, place: int, kind: tuple[int, int] | None = None) -> tuple[int, _Mp3Frame] | None:
    """The next frame (of a kind) that has another one behind it."""
    place = _after_tags(data, place)
    while place >= 0:
        frame = _mp3_frame(data, place)
        if frame is not None and frame.kind == (kind or frame.kind):
            follower = _mp3_frame(data, place + frame.size)
            if follower is not None and follower.kind == frame.kind:
                return place, frame
        place = data.find(b"\xff", place + 1)
    return None


def _examine_mp3(data: bytes, start: int, first: _Mp3Frame) -> Examined:
    """Counts the frames, and compares them with what the first one tells (Xing's header, or Fraunhofer's VBRI)."""
    place, num_frames, runs = start, 0, [start]
    while True:
        frame = _mp3_frame(data, place)
        if frame is None or frame.kind != first.kind:
            found = _next_mp3_frame(data, place, first.kind)
            if found is None:
                break
            runs += [place, found[0]]  # between them lies something else, such as a tag
            place, frame = found
        if place + frame.size > len(data):
            return Examined(data, _cut(f"its last frame needs {frame.size} bytes, {len(data) - place} are there"))
        num_frames += 1
        place += frame.size
    xing, vbri = start + 4 + first.num_side, start + 36
    has_xing = data[xing : xing + 4] in (b"Xing", b"Info")
    told = -1
    if has_xing and data[xing + 7] & 1:
        told = int.from_bytes(data[xing + 8 : xing + 12], "big")
    elif data[vbri : vbri + 4] == b"VBRI":
        told = int.from_bytes(data[vbri + 14 : vbri + 18], "big")
    if told > num_frames:  # some count the one that tells it, others don't
        return Examined(data, _cut(f"its header says {told} frames, {num_frames} are there"))
    if has_xing and told == num_frames - 1:
        return Examined(data)
    runs[0] += first.size if has_xing else 0
    parts = [data[begin:end] for begin, end in zip(runs[::2], [*runs[1::2], place], strict=True)]
    return Examined(b"".join([_telling_frame(data, start, first, num_frames - has_xing), *parts]))


def _telling_frame(data: bytes, start: int, first: _Mp3Frame, num_frames: int) -> bytes:
    """A silent frame of the same kind, which tells how many follow."""
    header = bytearray(data[start : start + 4])
    header[1] |= 1  # without a checksum
    header[2] = 0x80 | header[2] & 0x0C  # of a bitrate that leaves room for what it tells
    frame = _mp3_frame(bytes(header), 0)
    assert frame is not None
    told = bytes(first.num_side) + b"Xing" + struct.pack(">II", 1, num_frames)
    return (bytes(header) + told).ljust(frame.size, b"\0")
