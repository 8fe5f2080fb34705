"""Measurements with numbers that are not finite: their positions, and zeros in their place."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .formats.pictures import Nan
from .source import CHUNK, Source

__all__ = ["Filled", "gaps"]


class Filled(Source):
    """Measurements with zeros in place of numbers that are not finite.

    Args:
        given: The measurements.

    >>> import numpy as np
    >>> from unmurk.io.source import of_array
    >>> given = of_array("raw", np.array([[[1.0, np.nan]]], np.float32), None)
    >>> Filled(given)[:].flatten().tolist()
    [1.0, 0.0]
    """

    def __init__(self, given: Source) -> None:
        self.given, self.shape = given, given.shape
        self.skipped, self.scale, self.note = given.skipped, given.scale, given.note

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        y = self.given.read(indices)
        return torch.where(y.isfinite(), y, 0.0)

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the measurements."""
        return self.given.fingerprint()


def gaps(y: Tensor | Source, nan: Nan) -> tuple[Tensor | Source, dict[int, Tensor]]:
    """Replace numbers that are not finite by zeros, and return their positions.

    Args:
        y: Measurements (N, C, H, W). A source of integers is not read.
        nan: "refuse" or "mask".

    Returns:
        y with zeros, and for each image number the positions (row * W + column) of the pixels
        that miss a channel.

    Raises:
        InputError: Some numbers are not finite, and `nan` is "refuse".

    >>> y, pixels = gaps(torch.tensor([[[[1.0, torch.nan]]]]), "mask")
    >>> y.flatten().tolist(), pixels[0].tolist()
    ([1.0, 0.0], [1])
    """
    if isinstance(y, Source) and not y.floats:
        return y, {}
    found: dict[int, Tensor] = {}
    step = max(1, CHUNK // (4 * math.prod(y.shape[1:])))
    for start in range(0, len(y), step):
        part = (
            y.read(list(range(start, min(start + step, len(y)))))
            if isinstance(y, Source)
            else y[start : start + step]
        )
        bad = ~part.isfinite().all(1).flatten(1)
        for number in bad.any(1).nonzero()[:, 0].tolist():
            if nan == "refuse":
                raise InputError(
                    f"measurement {start + number} has values that are not finite: correct it, "
                    "leave it out, or treat such pixels as hidden with nan='mask' (--nan mask)"
                )
            found[start + number] = bad[number].nonzero()[:, 0].cpu()
    if not found:
        return y, {}
    return (Filled(y) if isinstance(y, Source) else torch.where(y.isfinite(), y, 0.0)), found
