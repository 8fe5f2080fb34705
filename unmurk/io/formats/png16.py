"""PNG files with 16 bits a sample, colour too.

Pillow reads a 16-bit colour PNG as 8 bits and cannot write one; this module does both, in numpy.
Format: W3C, "Portable Network Graphics (PNG) Specification (Third Edition)". A row is stored as
differences to a prediction from the bytes to the left (a), above (b) and above left (c); the five
filters predict 0, a, b, (a + b) // 2 and Paeth(a, b, c). A byte needs its left and upper
neighbours, so the bytes along an anti-diagonal of the image are independent of each other, and
are decoded together.
"""

import struct
import zlib

import numpy as np

__all__ = ["decode", "encode", "is_png16"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type: grey, RGB, grey + alpha, RGB + alpha
COLOURS = {1: 0, 3: 2}


def is_png16(head: bytes) -> bool:
    """Whether a file that starts with these (26 or more) bytes is a PNG of 16 bits a sample."""
    return head.startswith(SIGNATURE) and len(head) > 25 and head[24] == 16


def encode(pixels: np.ndarray) -> bytes:
    """The PNG file of a uint16 array (H, W, C), C = 1 or 3."""
    height, width, channels = pixels.shape
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])
    header = struct.pack(">IIBBBBB", width, height, 16, COLOURS[channels], 0, 0, 0)
    data = zlib.compress(filtered.tobytes(), 6)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def decode(data: bytes) -> np.ndarray:
    """The pixels of a 16-bit PNG, uint16 (H, W, C) with C = 1, 2, 3 or 4 (2 and 4: with alpha).

    Raises:
        ValueError: a damaged file, or an interlaced one.
    """
    header, body = b"", []
    for kind, content in _chunks(data):
        if kind == b"IHDR":
            header = content
        elif kind == b"IDAT":
            body.append(content)
    width, height, _, colour, _, _, interlace = struct.unpack(">IIBBBBB", header)
    if interlace or colour not in CHANNELS:
        raise ValueError("interlaced 16-bit PNG is not supported")
    step = 2 * CHANNELS[colour]
    raw = np.frombuffer(zlib.decompress(b"".join(body)), np.uint8)
    if raw.size != height * (1 + width * step):
        raise ValueError("the image data have the wrong length")
    raw = raw.reshape(height, 1 + width * step)
    pixels = _unfilter(raw[:, 0], raw[:, 1:].reshape(height, width, step))
    return np.ascontiguousarray(pixels).view(">u2").astype(np.uint16)


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], len(SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if data[at + 8 + length : at + 12 + length] != _chunk(kind, content)[-4:]:
            raise ValueError("the file is damaged or cut short")
        chunks.append((kind, content))
        at += 12 + length
    if not chunks or chunks[-1][0] != b"IEND":
        raise ValueError("the file is cut short")
    return chunks


def _unfilter(kinds: np.ndarray, filtered: np.ndarray) -> np.ndarray:
    """Undo the row filters of bytes (H, W, step)."""
    height, width, step = filtered.shape
    out = np.zeros((height + 1, width + 1, step), np.int16)  # with a border of zeros
    for diagonal in range(height + width - 1):
        i = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        j = diagonal - i
        a, b, c = out[i + 1, j], out[i, j + 1], out[i, j]
        kind = kinds[i][:, None]
        guess = np.select(
            [kind == 1, kind == 2, kind == 3, kind == 4],
            [a, b, (a + b) // 2, _paeth(a, b, c)],
            np.int16(0),
        )
        out[i + 1, j + 1] = (filtered[i, j] + guess) & 255
    return out[1:, 1:].astype(np.uint8)


def _paeth(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Whichever of a, b, c is nearest to a + b - c; ties in this order."""
    near_a, near_b, near_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    left = (near_a <= near_b) & (near_a <= near_c)
    return np.where(left, a, np.where(near_b <= near_c, b, c))
