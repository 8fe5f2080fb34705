"""Tags of TIFF files, adapted to images of another size or number type, and OME-XML for new files.

OME-XML: Goldberg and others, "The Open Microscopy Environment (OME) Data Model and XML file",
Genome Biology 6, R47, 2005; schema 2016-06.
"""

import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import tifffile

from .registry import Pages
from .scaled import scenes_along

__all__ = ["fitted", "ome_description", "turn_of", "turned"]

LONG = 2**32  # a number of a rational tag is below it
TYPE = re.compile(rb'(<Pixels\b[^>]*?\bType=")[^"]*(")')
BITS = re.compile(rb'\s+SignificantBits="[^"]*"')
SHOWN = re.compile(rb"(?m)^(?:min|max)=[^\n]*\n?")  # limits of ImageJ's display
ORIENTATION = 274
FLIPS = {  # orientation -> flips of rows and columns, after a transposition from 5 on
    **{1: (False, False), 2: (False, True), 3: (True, True), 4: (True, False)},
    **{5: (False, False), 6: (False, True), 7: (True, True), 8: (True, False)},
}


def turn_of(page: Any) -> int:
    """Return the orientation of a page of tifffile, from 1 (upright) to 8.

    >>> tifffile.imwrite("a.tif", np.zeros((4, 6), np.uint8), extratags=[(274, 3, 1, 6, True)])
    >>> with tifffile.TiffFile("a.tif") as file:
    ...     turn_of(file.pages[0])
    6
    """
    tag = page.tags.get(ORIENTATION)
    return int(tag.value) if tag is not None and tag.value in FLIPS else 1


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Turn pixels (H, W, C) as the orientation tag says.

    >>> turned(np.arange(6).reshape(2, 3, 1), 3)[..., 0].tolist()
    [[5, 4, 3], [2, 1, 0]]
    """
    rows, columns = FLIPS[turn]
    pixels = pixels.swapaxes(0, 1) if turn > 4 else pixels
    pixels = pixels[::-1] if rows else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if columns else pixels)


def fitted(
    tags: dict[str, Any], old: Sequence[int], new: Sequence[int], dtype: str | None
) -> dict[str, Any]:
    """Return the tags of a page for an image of another size or type.

    Args:
        tags: Tags for `tifffile.TiffWriter.write`; the description is bytes.
        old, new: Height and width before and now.
        dtype: Name of the number type that the description may state; None: the numbers are
            float32 now.

    >>> tags = {"description": b"", "resolution": ((100, 1), (100, 1))}
    >>> fitted(tags, (64, 64), (128, 128), "uint8")["resolution"]  # twice as many pixels
    ((200, 1), (200, 1))
    """
    text, down, across = tags["description"], Fraction(new[0], old[0]), Fraction(new[1], old[1])
    if text and dtype is None:
        text = SHOWN.sub(b"", BITS.sub(b"", TYPE.sub(rb"\g<1>float\g<2>", text)))
    if (down, across) != (1, 1):
        if tags["resolution"] is not None:
            sides = zip(tags["resolution"], (across, down), strict=True)
            tags = tags | {"resolution": tuple(_finer(side, factor) for side, factor in sides)}
        if text:
            text = _resized(text, new, (down, across))
    return tags | {"description": text}


def _finer(side: Any, factor: Fraction) -> Any:
    """Return pixels per unit, a rational or a number, times a factor."""
    numerator, denominator = side if isinstance(side, tuple) else Fraction(side).as_integer_ratio()
    found = factor * (Fraction(int(numerator), int(denominator)) if denominator else 0)
    if max(found.numerator, found.denominator) < LONG:
        return found.numerator, found.denominator
    return float(found)


def _resized(text: bytes, new: Sequence[int], factors: tuple[Fraction, Fraction]) -> bytes:
    """Return a description, OME-XML or tifffile's own, for images of another size."""
    if b"<OME" in text:
        for name, side, factor in zip((b"Y", b"X"), new, factors, strict=True):
            text = re.sub(rb'\bSize%b="\d+"' % name, b'Size%b="%d"' % (name, side), text)
            size = re.search(rb'\bPhysicalSize%b="([0-9.eE+-]+)"' % name, text)
            if size is not None:  # of the first image; the others of a file have the same size
                finer = repr(float(size[1]) / float(factor)).encode()
                text = text.replace(size[0], b'PhysicalSize%b="%b"' % (name, finer))
        return text
    try:
        found = json.loads(text)
        shape = list(found["shape"])
        place = len(shape) - (3 if str(found.get("axes", "")).endswith(("S", "C")) else 2)
        shape[place : place + 2] = [int(side) for side in new]
    except (ValueError, TypeError, KeyError, AttributeError):
        return text
    return json.dumps(found | {"shape": shape}).encode()


def ome_description(
    pages: Pages, shape: Sequence[int], dtype: str, repeats: int = 1
) -> str | None:
    """Return OME-XML for the images of a file, one page for each channel.

    The axes T and Z are kept. Other axes that number images become T.

    Args:
        pages: The open file, with the metadata to write.
        shape: Height, width and channels of the images that are written.
        dtype: Their number type.
        repeats: Number of images of the file that each of these stands for.

    Returns:
        The description, or None where the file has no metadata that OME-XML holds (size of a
        pixel, names of channels, axes T and Z), its images are RGB, or OME-XML has no such type.

    >>> pages = Pages()
    >>> pages.shape, pages.axes, pages.metadata = (64, 64, 1), "YX", {"pixel_size": (0.2, 0.2)}
    >>> xml = ome_description(pages, (128, 128, 1), "uint8")  # twice as many pixels
    >>> re.findall('PhysicalSizeX="[^"]*"', xml)
    ['PhysicalSizeX="0.1"']
    """
    about = dict(pages.metadata)
    height, width, channels = shape
    known = "pixel_size" in about or "channels" in about or bool({"T", "Z"} & {*pages.axes})
    if not known or (channels == 3 and "channels" not in about) or dtype in ("int64", "uint64"):
        return None
    letters, lead = _lead(pages, repeats)
    tags: dict[str, Any] = {}
    if "pixel_size" in about:
        side_y, side_x = (float(side) for side in about["pixel_size"])
        down, across = height / pages.shape[0], width / pages.shape[1]
        tags |= {"PhysicalSizeX": side_x / across, "PhysicalSizeXUnit": "\u00b5m"}
        tags |= {"PhysicalSizeY": side_y / down, "PhysicalSizeYUnit": "\u00b5m"}
    if "z_step" in about and "Z" in letters:
        tags |= {"PhysicalSizeZ": float(about["z_step"]), "PhysicalSizeZUnit": "\u00b5m"}
    if "time_step" in about and "T" in letters and "T" in pages.axes:
        tags |= {"TimeIncrement": float(about["time_step"]), "TimeIncrementUnit": "s"}
        if repeats > 1:
            tags["TimeIncrement"] *= pages.lead[pages.axes.index("T")] / lead[letters.index("T")]
    if pages.bits and np.dtype(dtype).kind in "iu":
        tags["SignificantBits"] = pages.bits
    names = about.get("channels")
    if names is not None and len(names) == channels:
        tags["Channel"] = {"Name": [str(name) for name in names]}
    found = tifffile.OmeXml()
    found.addimage(
        dtype=dtype,
        shape=(*lead, channels, height, width),
        storedshape=(math.prod(lead) * channels, 1, 1, height, width, 1),
        axes=f"{letters}CYX",
        **tags,
    )
    return str(found.tostring(declaration=True))


def _lead(pages: Pages, repeats: int) -> tuple[str, tuple[int, ...]]:
    """Return the axes that number results, as OME-XML names them, and their lengths."""
    axes = "".join(axis for axis in pages.axes if axis not in "YXCS")
    lead = scenes_along(pages.lead or (len(pages),), repeats, pages.axes)
    alone = "Z" if axes in ("", "Z") else "T"
    if lead is None or len(lead) != len(axes) or math.prod(lead) * repeats != len(pages):
        return alone, (len(pages) // repeats,)
    if set(axes) <= {"T", "Z"}:
        return axes, lead
    if axes.endswith("Z"):
        return "TZ", (math.prod(lead[:-1]), lead[-1])
    return "T", (math.prod(lead),)
