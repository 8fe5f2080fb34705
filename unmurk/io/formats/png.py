"""What a PNG file declares, checked before it is decoded.

Format: W3C, "Portable Network Graphics (PNG) Specification (Third Edition)". Decoders trust the
compressed data to be as long as the header says, and print what else they dislike. So the chunks
are walked first, their checksums compared, the data inflated piece by piece and only counted, and
only the chunks that pixels depend on are handed on.
"""

import math
import struct
import zlib
from pathlib import Path

from ...errors import InputError
from ..limits import check_numbers, check_pixels

__all__ = ["SIGNATURE", "check_png"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: grey, RGB, palette, with alpha
NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
ADAM7 = (*PASSES, (1, 0, 2, 1))  # first row, first column, row step, column step
PIECE = 2**20


def check_png(file: Path) -> tuple[bytes, int]:
    """The chunks of a PNG file that its pixels depend on, as a file, and its bits a sample.

    Raises:
        InputError: too large, damaged, cut short, or data that are not as long as declared.
    """
    check_numbers(file, file.stat().st_size, 1)
    chunks = _chunks(file, file.read_bytes())
    names = [name for name, _ in chunks]
    if not names or names[0] != b"IHDR" or names[-1] != b"IEND" or len(chunks[0][1]) != 13:
        raise InputError(f"cannot read {file}: it is damaged or cut short")
    width, height, bits, colour, _, _, interlace = struct.unpack(">IIBBBBB", chunks[0][1])
    if colour not in CHANNELS or bits not in (1, 2, 4, 8, 16) or interlace > 1:
        raise InputError(f"cannot read {file}: its header is damaged")
    check_pixels(file, height, width)
    expected = _length(width, height, bits * CHANNELS[colour], interlace == 1)
    found = _inflated([content for name, content in chunks if name == b"IDAT"], expected)
    if found != expected:
        more = "more" if found > expected else "fewer"
        raise InputError(f"cannot read {file}: it holds {more} data than {height}x{width} pixels")
    parts = [_chunk(name, content) for name, content in chunks if name in NEEDED]
    return SIGNATURE + b"".join(parts), bits


def _chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def _chunks(file: Path, data: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of all chunks up to the end of the image."""
    chunks, at = [], len(SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        name, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        check = data[at + 8 + length : at + 12 + length]
        if name in NEEDED and struct.pack(">I", zlib.crc32(name + content)) != check:
            raise InputError(f"cannot read {file}: it is damaged or cut short")
        chunks.append((name, content))
        at += 12 + length
        if name == b"IEND":
            break
    return chunks


def _length(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Bytes of the image data: rows of pixels of so many bits, each behind a filter byte."""
    if not interlaced:
        return height * (1 + math.ceil(width * bits / 8))
    sizes = [
        (max(0, -(-(height - top) // down)), max(0, -(-(width - left) // across)))
        for top, left, down, across in ADAM7
    ]
    return sum(h * (1 + math.ceil(w * bits / 8)) for h, w in sizes if w)


def _inflated(parts: list[bytes], most: int) -> int:
    """Bytes that the parts inflate to, counted up to one piece above `most`."""
    stream, count = zlib.decompressobj(), 0
    for part in parts:
        while part and count <= most:
            count += len(stream.decompress(part, PIECE))
            part = stream.unconsumed_tail
    while count <= most and not stream.eof and (more := stream.decompress(b"", PIECE)):
        count += len(more)
    return count
