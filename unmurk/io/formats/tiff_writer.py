"""TIFF files written image by image, with the tags of the stack that the images came from."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

from ..atomic import Partial, unwritable
from ..scale import Scale
from .tiff_copy import TaggedPages, copying
from .tiff_tags import fitted

__all__ = ["StackWriter"]

WHITE_IS_ZERO, RGB, PALETTE, YCBCR = 0, 2, 3, 6
REDUCED = 1  # type of a page that is a smaller copy of another
IMAGEJ = (50838, 50839)


class StackWriter:
    """Write a TIFF file image by image; the file appears under its name on `close`.

    Pages are written in the order of the stack they come from. If the channels of that stack are
    not its innermost axis, the later channels of an image wait in memory.

    Args:
        out: The file.
        like: The stack whose tags are copied; None: no tags.
        floats: Whether the pixels are float32 whatever the stack holds: standard deviations.
        description: The description of the first page, if it is not copied.
        tags: Further tags of every page, if they are not copied.

    >>> writer = StackWriter(Path("written.tif"))
    >>> for value in (1, 2):
    ...     writer.write(np.full((3, 4, 1), value, np.uint16))
    >>> writer.close()
    >>> tifffile.imread("written.tif")[:, 0, 0].tolist()
    [1, 2]
    """

    def __init__(
        self,
        out: Path,
        like: TaggedPages | None = None,
        floats: bool = False,
        description: str | None = None,
        tags: dict[str, Any] | None = None,
    ) -> None:
        self.out, self.like, self.images, self.pages = out, like, 0, 0
        self.floats, self.description, self.given = floats, description, tags or {}
        self._waiting: dict[int, np.ndarray] = {}
        layout = {} if like is None else like.layout()
        self._part = Partial(out)
        self._writer = tifffile.TiffWriter(self._part.file, **layout)

    def write(self, pixels: np.ndarray) -> None:
        """Write the next image, (H, W, C)."""
        like = self.like
        if self.floats:
            pixels = pixels.astype(np.float32)
        elif like is not None and like.kind == WHITE_IS_ZERO:
            pixels = like.inverted(pixels)
        if like is not None and pixels.shape[-1] == like.shape[-1]:
            places = like.places(self.images)
        elif self.description is not None:  # every channel is a page of its own
            places = [self.images * pixels.shape[-1] + c for c in range(pixels.shape[-1])]
        else:
            places = [self.images]
        if len(places) == 1:
            self._waiting[places[0]] = pixels
        else:
            self._waiting |= {p: pixels[..., c : c + 1] for c, p in enumerate(places)}
        self.images += 1
        while self.pages in self._waiting:
            self._write_page(self._waiting.pop(self.pages))
            self.pages += 1

    def _write_page(self, pixels: np.ndarray) -> None:
        with copying(self.out if self.like is None else self.like.file):
            self._copy_page(pixels)

    def _copy_page(self, pixels: np.ndarray) -> None:
        like, channels = self.like, pixels.shape[-1]
        white = like is not None and like.kind == WHITE_IS_ZERO and not self.floats
        planes = channels > 1 and (like.planes if like is not None else channels != 3)
        color = channels == 3 and (like is None or like.kind in (RGB, PALETTE, YCBCR))
        gray = "miniswhite" if white else "minisblack"
        how: dict[str, Any] = {
            "photometric": "rgb" if color else gray,
            "planarconfig": None if channels == 1 else "separate" if planes else "contig",
            "metadata": None,
        }
        levels = []
        if like is not None:
            levels = like.levels()
            packed = like.compression()
            how |= {"compression": packed, "predictor": packed is not None and like.predicted()}
            how |= {"tile": like.tile(), "contiguous": like.contiguous()}
        page = _as_stored(pixels, planes)
        tags = self._tags(pixels)
        shape = _shape_in(tags.get("description"))
        if shape and shape[-page.ndim :] != page.shape:  # a palette has become colors
            tags["description"], shape = None, ()
        more = {"subifds": len(levels)} if levels else {}
        self._write(page, **how, **more, **tags)
        for down, across in levels:
            size = (max(1, round(pixels.shape[0] * down)), max(1, round(pixels.shape[1] * across)))
            smaller = _as_stored(_smaller(pixels, size), planes)
            if shape:
                said = {"shape": [*shape[: -page.ndim], *smaller.shape]}
                how["description"] = json.dumps(said).encode()
            self._write(smaller, subfiletype=REDUCED, **how)

    def _tags(self, pixels: np.ndarray) -> dict[str, Any]:
        """Return the tags of the next page, for pixels of this size and type."""
        like = self.like
        if like is None:
            text = self.description if self.pages == 0 else None
            about = {} if text is None else {"description": text.encode(), "software": False}
            return self.given | about
        tags = like.tags(self.pages)
        if pixels.shape[-1] not in (1, like.shape[-1]):  # its axes are not those of the stack
            tags["description"] = None
        old = None if self.floats else like.dtype
        if self.floats:
            kept = [tag for tag in tags["extratags"] if tag[0] not in IMAGEJ]
            tags["extratags"] = kept + (like.imagej_tags() if self.pages == 0 else [])
        return fitted(tags, like.shape[:2], pixels.shape[:2], old)

    def _write(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._writer.write(*args, **kwargs)
        except OSError as error:
            raise unwritable(self.out, error) from error

    def close(self) -> None:
        """Write the remaining pages and give the file its name."""
        for page in sorted(self._waiting):
            self._write_page(self._waiting.pop(page))
        try:
            self._writer.close()
        except OSError as error:
            raise unwritable(self.out, error) from error
        self._part.finish()

    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""
        with suppress(OSError, ValueError):  # of a full disk: the file goes anyway
            self._writer.close()
        self._part.abandon()


def _as_stored(pixels: np.ndarray, planes: bool) -> np.ndarray:
    """Return pixels (H, W, C) as they are stored: (H, W), (H, W, C) or (C, H, W)."""
    if pixels.shape[-1] == 1:
        return pixels[..., 0]
    return np.moveaxis(pixels, -1, 0) if planes else pixels


def _smaller(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return means over areas of pixels (H, W, C), in their number type."""
    image = torch.from_numpy(pixels.astype(np.float64)).movedim(-1, 0)
    found = torch.nn.functional.adaptive_avg_pool2d(image, size).movedim(0, -1).numpy()
    if pixels.dtype.kind not in "iu":
        return found.astype(pixels.dtype)
    return Scale(dtype=pixels.dtype.name).to_file(torch.from_numpy(found))


def _shape_in(description: bytes | None) -> tuple[int, ...]:
    """Return the shape that tifffile's own description of a series names; () for others."""
    if not description or not description.startswith(b'{"shape"'):
        return ()
    try:
        return tuple(int(side) for side in json.loads(description)["shape"])
    except (ValueError, TypeError, KeyError):
        return ()
