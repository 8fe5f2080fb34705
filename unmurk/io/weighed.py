"""Measurements under noise maps, as sources: hidden pixels, and weights that make noise white."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .noise_maps import NoiseMaps
from .source import Source

__all__ = ["Hidden", "Weighed"]


class Hidden(Source):
    """Measurements that are NaN where noise maps say that nothing was measured.

    Args:
        given: Measurements (N, C, H, W).
        maps: The noise maps.

    >>> from unmurk.io.noise_maps import as_noise_maps
    >>> maps = as_noise_maps(torch.tensor([[[[0.1, 0.0]]]]))  # a noise of 0: nothing measured
    >>> Hidden(torch.ones(1, 1, 1, 2), maps)[:].flatten().tolist()
    [1.0, nan]
    """

    floats = True

    def __init__(self, given: Tensor | Source, maps: NoiseMaps) -> None:
        self.given, self.maps = given, maps
        _like(self, given)

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        """Return measurements (B, C, H, W) by their indices, NaN where they are hidden."""
        every = range(len(self))
        numbers = list(every[indices] if isinstance(indices, slice) else indices.tolist())
        return self.read(numbers).to(self.device)

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        hidden = self.maps.weights(indices)[1]
        return _read(self.given, indices).masked_fill(hidden, math.nan)

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the measurements; the run folder keeps that of the maps."""
        return fingerprint_of(self.given)


class Weighed(Source):
    """Measurements multiplied by weights that belong to their numbers.

    Args:
        given: Measurements (N, C, H, W).
        weights: Returns the weights of numbered measurements, (B, 1 or C, H, W).

    >>> from unmurk.io.noise_maps import as_noise_maps
    >>> maps = as_noise_maps(torch.tensor([[[[0.1, 0.2, 0.4]]]]))
    >>> y = Weighed(torch.ones(1, 1, 1, 3), lambda numbers: maps.weights(numbers)[0])
    >>> y[:].flatten()
    tensor([2.0000, 1.0000, 0.5000])
    """

    def __init__(self, given: Tensor | Source, weights: Callable[[Sequence[int]], Tensor]) -> None:
        self.given, self.weights = given, weights
        _like(self, given)

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        return self.weights(indices) * _read(self.given, indices)

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the measurements; the run folder keeps that of the maps."""
        return fingerprint_of(self.given)


def fingerprint_of(given: Tensor | Source) -> dict[str, Any]:
    """Return what identifies measurements, fit for JSON."""
    if isinstance(given, Source):
        return given.fingerprint()
    digest = hashlib.sha256(given.contiguous().cpu().numpy().data).hexdigest()
    return {"shape": list(given.shape), "sha256": digest}


def _like(source: Source, given: Tensor | Source) -> None:
    """Give a source the shape, the device and the scale of measurements."""
    source.shape, source.device = tuple(given.shape), given.device
    if isinstance(given, Source):
        source.skipped, source.scale, source.note = given.skipped, given.scale, given.note
        source.endless, source.select = given.endless, given.select


def _read(given: Tensor | Source, indices: list[int]) -> Tensor:
    """Return measurements (B, C, H, W) on the CPU."""
    if isinstance(given, Source):
        return given.read(indices)
    return given[torch.tensor(indices, device=given.device)].cpu()
