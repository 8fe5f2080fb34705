"""Checks of a PNG file before it is decoded.

Format: W3C, "Portable Network Graphics (PNG) Specification (Third Edition)". This code is our own
because decoders trust the compressed data to be as long as the header says. We walk the chunks,
compare their checksums, inflate the data piece by piece only to count it, and pass on the chunks
that the pixels depend on.
"""

import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...errors import InputError, size_text
from ..limits import check_numbers, check_pixels

__all__ = ["SIGNATURE", "check_png", "chunk", "chunks_in", "with_chunks"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by color type: gray, RGB, palette, with alpha
NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
ADAM7 = (*PASSES, (1, 0, 2, 1))  # first row, first column, row step, column step
PIECE = 2**20


def check_png(file: Path) -> tuple[bytes, int]:
    """Return a PNG file reduced to the chunks that its pixels depend on, and its bits per sample.

    Raises:
        InputError: The file is too large, damaged or cut short, or its data are not as long as
            declared.

    >>> import numpy as np
    >>> from unmurk.io.formats.raster import encode_picture
    >>> data = encode_picture(np.zeros((4, 6, 1), np.uint8))
    >>> _ = Path("whole.png").write_bytes(data), Path("cut.png").write_bytes(data[:-20])
    >>> check_png(Path("whole.png"))[1]
    8
    >>> check_png(Path("cut.png"))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot read cut.png: it is damaged or cut short
    """
    check_numbers(file, file.stat().st_size, 1)
    chunks = _chunks(file, file.read_bytes())
    names = [name for name, _ in chunks]
    if not names or names[0] != b"IHDR" or names[-1] != b"IEND" or len(chunks[0][1]) != 13:
        raise InputError(f"cannot read {file}: it is damaged or cut short")
    width, height, bits, color, _, _, interlace = struct.unpack(">IIBBBBB", chunks[0][1])
    if color not in CHANNELS or bits not in (1, 2, 4, 8, 16) or interlace > 1:
        raise InputError(f"cannot read {file}: its header is damaged")
    check_pixels(file, height, width)
    expected = _length(width, height, bits * CHANNELS[color], interlace == 1)
    found = _inflated([content for name, content in chunks if name == b"IDAT"], expected)
    if found != expected:
        more = "more" if found > expected else "fewer"
        raise InputError(
            f"cannot read {file}: it holds {more} data than {size_text((height, width))} pixels"
        )
    parts = [chunk(name, content) for name, content in chunks if name in NEEDED]
    return SIGNATURE + b"".join(parts), bits


def chunks_in(file: Path, names: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the chunks of a PNG file that have one of these names, with their contents.

    Raises:
        InputError: The file is too large or damaged.

    >>> import numpy as np
    >>> from unmurk.io.formats.raster import encode_picture
    >>> plain = encode_picture(np.zeros((4, 6, 1), np.uint8))
    >>> _ = Path("text.png").write_bytes(with_chunks(plain, [(b"tEXt", b"Author me")]))
    >>> chunks_in(Path("text.png"), [b"tEXt"])
    [(b'tEXt', b'Author me')]
    """
    check_numbers(file, file.stat().st_size, 1)
    return [found for found in _chunks(file, file.read_bytes()) if found[0] in names]


def with_chunks(data: bytes, chunks: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Insert chunks into the bytes of a PNG file, after its header.

    >>> from unmurk.io.formats.raster import encode_picture
    >>> import numpy as np
    >>> plain = encode_picture(np.zeros((2, 2, 1), np.uint8))
    >>> len(with_chunks(plain, [(b"tEXt", b"Author me")])) - len(plain)  # 12 bytes frame a chunk
    21
    """
    place = len(SIGNATURE) + 25  # length, name, 13 bytes of content and checksum of IHDR
    more = b"".join(chunk(name, content) for name, content in chunks)
    return data[:place] + more + data[place:]


def chunk(name: bytes, content: bytes) -> bytes:
    """Return the bytes of a chunk: its length, name, content and checksum.

    >>> chunk(b"tEXt", b"a").hex(" ", 4)  # its length, name, content and checksum
    '00 00000174 45587461 75f38b29'
    """
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def _chunks(file: Path, data: bytes) -> list[tuple[bytes, bytes]]:
    """Return the names and contents of all chunks up to the end of the image."""
    chunks, start = [], len(SIGNATURE)
    while start + 12 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        name, content = data[start + 4 : start + 8], data[start + 8 : start + 8 + length]
        check = data[start + 8 + length : start + 12 + length]
        if name in NEEDED and struct.pack(">I", zlib.crc32(name + content)) != check:
            raise InputError(f"cannot read {file}: it is damaged or cut short")
        chunks.append((name, content))
        start += 12 + length
        if name == b"IEND":
            break
    return chunks


def _length(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Return the bytes of the image data: rows of pixels, each preceded by a filter byte."""
    if not interlaced:
        return height * (1 + math.ceil(width * bits / 8))
    sizes = [
        (max(0, -(-(height - y) // down)), max(0, -(-(width - x) // across)))
        for y, x, down, across in ADAM7
    ]
    return sum(h * (1 + math.ceil(w * bits / 8)) for h, w in sizes if w)


def _inflated(parts: list[bytes], most: int) -> int:
    """Count the bytes that the parts inflate to, up to one piece above `most`."""
    stream, count = zlib.decompressobj(), 0
    for part in parts:
        while part and count <= most:
            count += len(stream.decompress(part, PIECE))
            part = stream.unconsumed_tail
    while count <= most and not stream.eof and (more := stream.decompress(b"", PIECE)):
        count += len(more)
    return count
