"""A first pass over a set of files that finds the range of their numbers.

It reads as little as possible: integers until one number shows that the set fills its type, and a
few images of floats. 8-bit files are not opened.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .axes import ALL, Selection
from .formats.pictures import Pages, has_number_type, number_type, open_pages
from .scale import Extent, Spans, check_units, span_for

__all__ = ["survey"]

FLOATS = 64  # images of floats that are examined
PIXELS = 4096  # numbers of each of them


def survey(
    files: Sequence[Path],
    spans: Spans = None,
    sigma: float | None = None,
    select: Selection = ALL,
) -> dict[str, Extent]:
    """Find the largest numbers of a set of files, by number type.

    Args:
        files: Pictures; files that cannot be read are passed over.
        spans: Numbers of black and white that are known already.
        sigma: Standard deviation of the noise, for `scale.check_units`; None: no check.
        select: Their axes, and the channels to read.

    Returns:
        The extents of the types of more than 8 bits for which no span is known, and of those
        whose black and white the files define.

    Raises:
        InputError: The files hold floats that are not images in units of [0, 1].

    >>> from unmurk.io.saving import save_images
    >>> from unmurk.io.scale import Scale
    >>> twelve = Scale.of("uint16", (0, 4095))
    >>> files = save_images(torch.rand(2, 1, 8, 8), "twelve", scale=twelve, format="tif")
    >>> survey(files)["uint16"].bits
    12
    """
    extents: dict[str, Extent] = {}
    floats: list[torch.Tensor] = []
    for file in files:
        try:
            if has_number_type(file) and not _open(number_type(file), spans, extents):
                continue
            with open_pages(file, select) as pages:
                _look(pages, spans, extents, floats)
        except InputError:
            continue  # reported, or left out, when the file itself is processed
    if floats and sigma is not None:
        check_units(files[0] if len(files) == 1 else files[0].parent, torch.cat(floats), sigma)
    return extents


def _open(dtype: str, spans: Spans, extents: dict[str, Extent]) -> bool:
    """Whether further images of a type can still change the result."""
    if span_for(spans, dtype) is not None:
        return False
    return not extents.setdefault(dtype, Extent(dtype)).full


def _look(
    pages: Pages, spans: Spans, extents: dict[str, Extent], floats: list[torch.Tensor]
) -> None:
    if pages.bits or span_for(spans, pages.dtype) is not None:
        return
    if pages.span is not None:
        extents.setdefault(pages.dtype, Extent(pages.dtype)).declare(pages.span)
        return
    for page in range(len(pages)):
        if np.dtype(pages.dtype).kind == "f":
            if len(floats) >= FLOATS:
                return
            values = pages.read(page).ravel()
            thinned = values[:: max(1, len(values) // PIXELS)]
            with np.errstate(over="ignore"):  # reported when the file is read
                floats.append(torch.from_numpy(thinned.astype(np.float32)))
        elif _open(pages.dtype, spans, extents):
            extents[pages.dtype].add(pages.read(page))
        else:
            return
