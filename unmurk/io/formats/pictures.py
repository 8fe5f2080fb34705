"""One picture file to pixels and back: PNG, JPEG, TIFF and BMP, grey or RGB, 8 or 16 bits.

Pixels are turned the way the camera was held (EXIF), a palette becomes RGB, an opaque alpha
channel is dropped, and nothing is rounded: what cannot be read exactly is refused.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ...errors import InputError
from . import png16, tiff

__all__ = ["ENDINGS", "encode_picture", "read_pages", "read_picture"]

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
BITS_PER_SAMPLE = 258  # TIFF tag


def read_pages(file: Path) -> list[tuple[str, np.ndarray]]:
    """Name and pixels (H, W, C), C = 1 or 3, of every picture in a file.

    One picture is called after its file, the pages of a TIFF stem-00000.tif and so on. TIFFs of
    several pages, of 16-bit colour and of other numbers need tifffile.

    Raises:
        InputError: see `read_picture` and `tiff.Stack`.
    """
    try:
        return [(file.name, read_picture(file))]
    except InputError:
        if file.suffix.lower() not in tiff.ENDINGS:
            raise
    with tiff.Stack(file) as stack:
        if len(stack) == 1:
            return [(file.name, stack.read(0))]
        names = [f"{file.stem}-{page:05d}{file.suffix}" for page in range(len(stack))]
        return [(name, stack.read(page)) for page, name in enumerate(names)]


def read_picture(file: Path) -> np.ndarray:
    """The pixels of a file, uint8 or uint16 (H, W, C) with C = 1 or 3.

    Raises:
        InputError: unreadable, several pictures, transparent, or a number type other than these.
    """
    try:
        data = file.read_bytes()
        pixels = png16.decode(data) if png16.is_png16(data[:32]) else _read_pillow(file)
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        KeyError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(
            f"cannot read {file}: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    if pixels.shape[-1] in (2, 4):
        if (pixels[..., -1] < np.iinfo(pixels.dtype).max).any():
            raise InputError(f"{file} is partly transparent; save it without an alpha channel")
        pixels = pixels[..., :-1]
    return pixels


def _read_pillow(file: Path) -> np.ndarray:
    with Image.open(file) as opened:
        if getattr(opened, "n_frames", 1) > 1:
            raise InputError(f"{file} holds several pictures; save it as a .npy array")
        bits = getattr(opened, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise InputError(f"{file} has 32 bits a sample; save it with 8 or 16")
        return pixels.astype(np.uint16)[..., None]
    if image.mode == "F" or max(bits) > 8:
        raise InputError(f"{file} has {max(bits)} bits a sample; save it as a .npy array")
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode_picture(pixels: np.ndarray) -> bytes:
    """The PNG file of uint8 or uint16 pixels (H, W, C), C = 1 or 3."""
    if pixels.dtype == np.uint16:
        return png16.encode(pixels)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
