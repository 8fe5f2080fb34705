"""PNG, JPEG, WebP and BMP files to pixels, and pixels to PNG files with their metadata.

8-bit files are decoded by Pillow, 16-bit PNG files by imagecodecs, which keeps every number.
"""

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ...errors import InputError
from ..limits import check_numbers, check_pixels, reading
from . import tiff
from .png import SIGNATURE, check_png, chunks_in
from .registry import Pages, register

__all__ = ["Picture", "chunks_of", "declared", "encode_picture"]

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP")  # the suffix may be that of another format
OPENING = threading.Lock()
COPIED = (b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tIME")
ORIENTATION = 274  # a tag of Exif
METER = 39.3701  # inches
PROFILES = {1: b"GRAY", 3: b"RGB "}  # kinds of color profiles by the number of channels


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

    >>> _ = Path("p.png").write_bytes(encode_picture(np.full((4, 6, 3), 200, np.uint8)))
    >>> picture = Picture(Path("p.png"))
    >>> picture.shape, picture.dtype, int(picture.read(0).min())
    ((4, 6, 3), 'uint8', 200)
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


def declared(file: Path) -> tuple[int, int, int, int, int]:
    """Read the header of a picture.

    Returns:
        Height, width, channels, bytes of a number, and 1 image. A camera that was held upright may
        exchange height and width.

    Raises:
        InputError: It cannot be read.

    >>> _ = Path("p.png").write_bytes(encode_picture(np.zeros((4, 6, 3), np.uint8)))
    >>> declared(Path("p.png"))
    (4, 6, 3, 1, 1)
    """
    wide = 2 if _number_type(file) == "uint16" else 1
    with reading(file), _opened(file) as opened:
        channels = 3 if opened.mode == "P" else len(opened.getbands())
        return opened.height, opened.width, channels, wide, 1


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


def chunks_of(file: Path, shape: tuple[int, ...]) -> list[tuple[bytes, bytes]]:
    """Return the metadata of a picture as chunks of a PNG file.

    Those are the texts, the time and the color space of a PNG file; and, of any format, the
    resolution, the Exif data without the orientation (the pixels are turned already), the comment
    and the color profile, if it is for this number of channels.

    Args:
        file: The picture.
        shape: Height, width and channels of the pixels that are written.

    >>> Image.new("L", (6, 4)).save("c.jpg", comment=b"by me")
    >>> chunks = dict(chunks_of(Path("c.jpg"), (4, 6, 1)))
    >>> chunks[b"tEXt"].startswith(b"Comment"), chunks[b"tEXt"].endswith(b"by me")
    (True, True)
    """
    with reading(file), _opened(file) as opened:
        info, chunks = opened.info, []
        factors = shape[1] / opened.width, shape[0] / opened.height
        exif = opened.getexif()
        if exif.get(ORIENTATION, 1) > 4:
            factors = shape[0] / opened.width, shape[1] / opened.height
        if opened.format == "PNG":
            chunks = [found for found in chunks_in(file, COPIED) if found[0] != b"pHYs"]
            physical = [content for _, content in chunks_in(file, [b"pHYs"])]
            sides = [struct.unpack(">IIB", content) for content in physical if len(content) == 9]
            per_meter = sides[0] if sides else None
        else:
            dpi = info.get("dpi")
            per_meter = None if not dpi or min(dpi) <= 1 else (*(s * METER for s in dpi), 1)
        if per_meter is not None:
            across, down = (
                round(float(s) * f) for s, f in zip(per_meter[:2], factors, strict=True)
            )
            if exif.get(ORIENTATION, 1) > 4:
                across, down = down, across
            if 0 < max(across, down) < 2**31:
                chunks.append((b"pHYs", struct.pack(">IIB", across, down, int(per_meter[2]))))
        profile = info.get("icc_profile")
        if profile and profile[16:20] == PROFILES.get(shape[2]):
            chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)))
        if exif:
            exif.pop(ORIENTATION, None)
            chunks.append((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
        comment = info.get("comment")
        if isinstance(comment, bytes) and opened.format != "PNG":
            chunks.append((b"tEXt", b"Comment\0" + comment.replace(b"\0", b" ")))
    return chunks


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
