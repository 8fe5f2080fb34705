"""PNG, JPEG, WebP and BMP files to pixels, and pixels to PNG files.

8-bit files are decoded by Pillow, 16-bit PNG files by imagecodecs, which keeps every number.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import InputError
from ..limits import check_numbers, check_pixels, reading
from . import tiff
from .png import SIGNATURE, check_png
from .registry import Pages, register

__all__ = ["Picture", "encode_picture"]

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP")  # the suffix may be that of another format
OPENING = threading.Lock()


def _number_type(file: Path) -> str:
    """Name of the number type of a file, from its first 25 bytes."""
    with reading(file), file.open("rb") as stream:
        head = stream.read(25)
    return "uint16" if head.startswith(SIGNATURE) and head[24:] == b"\x10" else "uint8"


@register(
    "picture", (".png", ".jpg", ".jpeg", ".bmp", ".webp"), single=True, number_type=_number_type
)
class Picture(Pages):
    """A PNG, JPEG, WebP or BMP file: one image, uint8 or uint16, with 1 or 3 channels.

    Args:
        file: The file.

    Raises:
        InputError: The file is unreadable, too large or partly transparent, or holds several
            pictures.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with reading(file):
            check_numbers(file, file.stat().st_size, 1)
            self.pixels = _read(file)
        if self.pixels.shape[-1] in (2, 4):
            self.pixels = tiff.without_alpha(file, self.pixels)
        height, width, channels = self.pixels.shape
        self.shape: tuple[int, int, int] = (height, width, channels)
        self.dtype = self.pixels.dtype.name
        self.axes = "YX" if channels == 1 else "YXC"

    def read(self, page: int) -> np.ndarray:
        """Return the pixels (H, W, C)."""
        return self.pixels


def _read(file: Path) -> np.ndarray:
    with file.open("rb") as stream:
        png = stream.read(len(SIGNATURE)) == SIGNATURE
    if png:
        data, bits = check_png(file)
        if bits == 16:
            import imagecodecs

            pixels = np.asarray(imagecodecs.png_decode(data))
            return pixels[..., None] if pixels.ndim == 2 else pixels
    return _read_pillow(file)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """A picture, opened but not decoded. Our own limit takes the place of Pillow's warning."""
    with OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            opened = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise InputError(f"cannot read {file}: it is no picture, or damaged") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with opened:
        yield opened


def _read_pillow(file: Path) -> np.ndarray:
    with _opened(file) as opened:
        check_pixels(file, opened.height, opened.width)
        if getattr(opened, "n_frames", 1) > 1:
            raise InputError(f"{file} holds several pictures: save it as a .npy array")
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def encode_picture(pixels: np.ndarray) -> bytes:
    """Encode uint8 or uint16 pixels (H, W, C), C = 1 or 3, as a PNG file.

    >>> import numpy as np
    >>> encode_picture(np.zeros((2, 2, 1), np.uint8))[:4]
    b'\\x89PNG'
    """
    pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if pixels.dtype == np.uint16:
        import imagecodecs

        return bytes(imagecodecs.png_encode(pixels, level=6))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
