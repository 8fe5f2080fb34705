"""Picture files to pixels and back: PNG, JPEG, BMP and TIFF, one reader for all of them.

`open_pages` gives what every command reads pictures with: an object with a length, a shape, a
number type and `read(page)`. Pixels are turned the way the camera was held (EXIF), a palette
becomes RGB, an opaque alpha channel is dropped, and nothing is rounded: what cannot be read
exactly is refused. The declared size is checked before anything is decoded.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import InputError
from ..limits import check_file, check_numbers, check_pixels, reading
from ..scale import finite
from . import tiff
from .png import SIGNATURE, check_png

__all__ = [
    "ENDINGS",
    "Nan",
    "Pages",
    "Picture",
    "check_finite",
    "describe",
    "encode_picture",
    "number_type",
    "open_pages",
    "page_names",
]

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP")  # a wrong ending is no harm
OPENING = threading.Lock()

Nan = Literal["refuse", "mask"]
"""What to do with numbers that are not finite: refuse them, or count their pixels as hidden."""


class Pages(Protocol):
    """The images of one file.

    Attributes:
        file: The file.
        shape: Height, width and channels of every image.
        dtype: Name of the number type.
        bits: Bits of a number that carry the image, where metadata say fewer than the type has; 0.
    """

    file: Path
    shape: tuple[int, int, int]
    dtype: str
    bits: int

    def __len__(self) -> int: ...

    def read(self, page: int) -> np.ndarray:
        """The pixels of an image, (H, W, C) in the file's numbers."""
        ...


@contextmanager
def open_pages(file: Path) -> Iterator[Pages]:
    """The images of a picture file, while it is open.

    Raises:
        InputError: unreadable, too large, partly transparent, or of a kind that is not read; from
            `Pages.read` too.
    """
    check_file(file)
    if file.suffix.lower() in tiff.ENDINGS:
        with tiff.Stack(file) as stack:
            yield stack
    else:
        yield Picture(file)


def number_type(file: Path) -> str | None:
    """Name of the number type of a PNG, JPEG or BMP file, from its head; None: open it to know."""
    if file.suffix.lower() in tiff.ENDINGS:
        return None
    check_file(file)
    with reading(file), file.open("rb") as stream:
        head = stream.read(25)
    return "uint16" if head.startswith(SIGNATURE) and head[24:] == b"\x10" else "uint8"


def page_names(file: Path, pages: int) -> list[str]:
    """Names of a file's images: its own for one, else stem-00000.tif and so on."""
    if pages == 1:
        return [file.name]
    return [f"{file.stem}-{page:05d}{file.suffix}" for page in range(pages)]


def check_finite(pixels: np.ndarray, where: str, nan: Nan = "refuse") -> np.ndarray:
    """The numbers, if all are finite (see `scale.finite`) or the others are to be masked.

    Raises:
        InputError: some are not finite, or beyond float32; `where` names file and page.
    """
    if nan == "refuse" and pixels.dtype.kind == "f" and not finite(pixels).all():
        what = "not finite" if not np.isfinite(pixels).all() else "beyond float32 (3.4e38)"
        raise InputError(
            f"{where} has values that are {what}: mend it, leave it out with --skip-bad, or "
            "count such pixels as hidden with --nan mask"
        )
    return pixels


def describe(shape: tuple[int, ...], dtype: str) -> str:
    """Size, colour and type of a picture (H, W, C), in words."""
    height, width, channels = shape
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    kind = np.dtype(dtype)
    word = {"f": " float", "i": " signed"}.get(kind.kind, "")
    return f"{height}x{width} {colour} {8 * kind.itemsize}-bit{word}"


class Picture:
    """A PNG, JPEG or BMP file: one image, uint8 or uint16 with 1 or 3 channels.

    Args:
        file: The file.

    Raises:
        InputError: unreadable, too large, several pictures in it, or partly transparent.
    """

    bits = 0

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

    def __len__(self) -> int:
        return 1

    def read(self, page: int) -> np.ndarray:
        """The pixels (H, W, C)."""
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
    """A picture, opened but not decoded. Pillow's own limit, which warns, is ours here."""
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
            raise InputError(f"{file} holds several pictures; save it as a .npy array")
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
    """The PNG file of uint8 or uint16 pixels (H, W, C), C = 1 or 3."""
    pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    if pixels.dtype == np.uint16:
        import imagecodecs

        return bytes(imagecodecs.png_encode(pixels, level=6))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
