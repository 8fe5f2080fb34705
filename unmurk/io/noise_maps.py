r"""Noise maps: a standard deviation of the noise for every pixel of every image.

Telescopes and pipelines deliver them beside the images, in one of four kinds:

=============  =============================================================  ================
kind           map m                                                          extensions
=============  =============================================================  ================
``std``        :math:`\sigma_i = m_i`                                         ERR, all others
``variance``   :math:`\sigma_i = \sqrt{m_i}`                                  VAR, VARIANCE
``ivar``       :math:`\sigma_i = 1 / \sqrt{m_i}`                              IVAR, INVVAR
``weights``    :math:`\sigma_i = \sigma \sqrt{\bar m / m_i}`: weights of any  WHT, WEIGHT
               unit, such as exposure times, beside a known noise
               :math:`\sigma` at the mean weight
=============  =============================================================  ================

The maps are in the numbers of the image files, as is the range of the images. A pixel whose number
is not finite, or not above 0, holds no measurement and counts as hidden.

With one level s for the whole set, the median of all :math:`\sigma_i`,

.. math:: w = s / \sigma_i, \qquad w \odot y = w \odot A x + s\, n,

is white noise of that level under the operator :math:`\operatorname{diag}(w) A`. So learning,
restoring and solving keep their likelihood, exactly (`operators.Weighted`).

A flat field g divides the images, and with them their noise: :math:`\sigma_i/g_i`. Without maps,
the noise of the problem takes the place of :math:`\sigma_i` (`flat_maps`): then w = g, and
:math:`g \odot y` is the image before the division, with its own noise, be it Gaussian or not.

Maps that are known up to a factor get it from the images (`io.map_scale`).
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError, size_text
from ..noise import SIGMA
from ..problem import Problem
from .axes import ALL, Selection
from .capture_set import Captures
from .captures import as_captures, open_captures
from .crops import Crops
from .formats.registry import split_member
from .scale import Ends, along_channels

__all__ = [
    "MapKind",
    "NoiseMaps",
    "as_noise_maps",
    "flat_maps",
    "maps_for",
    "read_noise_maps",
]

MapKind = Literal["std", "variance", "ivar", "weights"]
KINDS = get_args(MapKind)
BY_NAME: dict[str, MapKind] = {
    "VAR": "variance",
    "VARIANCE": "variance",
    "IVAR": "ivar",
    "INVVAR": "ivar",
    "WHT": "weights",
    "WEIGHT": "weights",
    "WEIGHTS": "weights",
}
"""Kind of a map by the name of its FITS extension; all others hold standard deviations."""


@dataclass(frozen=True, eq=False)
class NoiseMaps:
    """Noise maps of a set of images.

    Attributes:
        maps: The maps, one for each image, or one for all of them.
        kind: What the maps hold; see the module.
        gain: Numbers of the files for each unit of intensity, or one for each channel.
        sigma: Standard deviation at the mean weight, for weights.
        level: The level s of the whole set.
        mean: Mean of the weights; 1 for other kinds.
        hides: Whether some pixels hold no measurement.
        factor: What the deviations of the maps are multiplied with.
        flat: Sensitivity g of a flat field that the images were divided by, (C, H, W), or None.
        relative: Whether the deviations are in units of the noise of the problem.
        empty: Numbers of images whose map has no usable number, and which are left out.

    >>> maps = as_noise_maps(torch.tensor([[[[0.1, 0.2, 0.4]]]]))
    >>> round(maps.level, 4)
    0.2
    >>> maps.weights([0])[0].flatten()
    tensor([2.0000, 1.0000, 0.5000])
    """

    maps: Captures
    kind: MapKind = "std"
    gain: Ends = 1.0
    sigma: float = 0.0
    level: float = 1.0
    mean: float = 1.0
    hides: bool = False
    factor: float = 1.0
    flat: Tensor | None = None
    relative: bool = False
    empty: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.maps.total

    @cached_property
    def _places(self) -> dict[int, int]:
        return {number: place for place, number in enumerate(self.maps.numbers)}

    def _place(self, number: int) -> int:
        """Return the position of the map of an image in the set."""
        return self._places[number] if len(self) > 1 else 0

    def deviation(self, number: int, place: tuple[int, int, int, int] | None = None) -> Tensor:
        """Return the standard deviations of an image, infinite where nothing is measured.

        Args:
            number: Number of the image.
            place: First row, first column, height and width; None: the whole image.

        Returns:
            (1 or C, height, width), in units of intensity.
        """
        position = self._place(number)
        if place is None:
            place = (0, 0, *self.maps.sizes[position])
        values = self.maps.region(position, *place).double()
        known = values.isfinite() & (values > 0)
        values = torch.where(known, values, 1.0)
        step = torch.from_numpy(along_channels(self.gain))
        if self.kind == "std":
            found = values / step
        elif self.kind == "variance":
            found = values.sqrt() / step
        elif self.kind == "ivar":
            found = values.rsqrt() / step
        else:
            found = self.sigma * (self.mean / values).sqrt()
        found = self.factor * found
        if self.flat is not None:
            row, column, height, width = place
            found = found / self.flat[..., row : row + height, column : column + width].double()
        return torch.where(known.expand_as(found), found, math.inf).float()

    def scaled(self, factor: float) -> "NoiseMaps":
        """Return the maps with all standard deviations multiplied by a factor.

        Raises:
            InputError: The noise is then out of its bounds.

        >>> round(as_noise_maps(torch.full((1, 1, 2, 2), 0.2)).scaled(1.5).level, 4)
        0.3
        """
        level = factor * self.level
        _check_level(level)
        return replace(self, factor=factor * self.factor, level=level)

    def under(self, flat: Tensor | None) -> "NoiseMaps":
        """Return the maps of the images after their division by a flat field.

        Args:
            flat: Sensitivity (C, H, W), or None.

        Raises:
            InputError: It has another size than the maps.

        >>> maps = as_noise_maps(torch.full((1, 1, 1, 2), 0.2))
        >>> maps.under(torch.tensor([[[0.5, 2.0]]])).deviation(0).flatten()
        tensor([0.4000, 0.1000])
        """
        if flat is None:
            return self
        for number in self.maps.numbers:
            self._check_size(number, (int(flat.shape[-2]), int(flat.shape[-1])))
        return _leveled(replace(self, flat=flat.cpu()))

    def weights(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the weights of whole images, and which of their pixels are hidden.

        Args:
            numbers: Numbers of images of one size.

        Returns:
            s / sigma, 1 where hidden, (B, 1 or C, H, W); and (B, 1, H, W) bool.
        """
        return _weights(torch.stack([self.deviation(n) for n in numbers]), self.level)

    def batch(
        self, numbers: Sequence[int], channels: int, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return what `weights` returns, of images with these channels and this size.

        Raises:
            InputError: There is no map of an image, or it does not fit.
        """
        if len(self) > 1 and max(numbers) >= len(self):
            raise InputError(
                f"image number {max(numbers)} has no noise map, as there are {len(self)}: give one"
                " map for each image, in the same order, or one for all"
            )
        for number in numbers:
            self._check_size(number, size)
        self._check_channels(channels)
        return self.weights(numbers)

    def crops(self, crops: Crops, numbers: Sequence[int]) -> Tensor:
        """Return the weights of numbered crops, as these are turned, 1 where hidden."""
        found = crops.cut(
            numbers,
            lambda position, place: self.deviation(crops.captures.numbers[position], place),
            self.maps.channels,
        )
        return _weights(found, self.level)[0]

    def absent(self, number: int, place: tuple[int, int, int, int]) -> Tensor:
        """Return which pixels of a rectangle hold no measurement, (height, width) bool."""
        return ~self.deviation(number, place).isfinite().all(0)

    def check(
        self,
        sizes: Sequence[tuple[int, int]],
        channels: int,
        numbers: Sequence[int] | None = None,
        total: int | None = None,
    ) -> None:
        """Raise InputError unless there is one map for each image, or one for all, that fits.

        Args:
            sizes: Height and width of each image.
            channels: Their number of channels.
            numbers: Their numbers; None: 0, 1, ...
            total: Number of images, counting those left out; None: there are no others.
        """
        total = len(sizes) if total is None else total
        if len(self) not in (1, total):
            raise InputError(
                f"there are {len(self)} noise maps for {total} images: give one map for each"
                " image, in the same order, or one for all"
            )
        for number, size in zip(numbers or range(len(sizes)), sizes, strict=True):
            if number not in self.empty:
                self._check_size(number, size)
        self._check_channels(channels)

    def _check_size(self, number: int, size: tuple[int, int]) -> None:
        own = self.maps.sizes[self._place(number)]
        if own != tuple(size):
            raise InputError(
                f"the noise map of image number {number} has {size_text(own)} pixels, the image"
                f" {size_text(size)}: give maps of the size of the images"
            )

    def _check_channels(self, channels: int) -> None:
        if self.maps.channels not in (1, channels):
            raise InputError(
                f"the noise maps have {self.maps.channels} channels, the images {channels}: give"
                " maps of one channel, or of as many as the images"
            )

    def record(self) -> dict[str, Any]:
        """Return what identifies the maps, for the run folder and the log of results."""
        kind = "flat" if self.relative else self.kind
        found: dict[str, Any] = {"kind": kind, "level": self.level}
        if self.factor != 1:
            found["factor"] = self.factor
        if self.kind == "weights":
            found |= {"sigma": self.sigma, "mean": self.mean}
        return {**found, **self.maps.fingerprint()}


def _weights(deviation: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return weights (B, C, H, W), 1 where a channel holds no measurement, and these pixels."""
    known = deviation.isfinite()
    hidden = ~known.all(1, keepdim=True)
    return torch.where(known & ~hidden, level / deviation, 1.0), hidden


def as_noise_maps(
    data: Any,
    kind: MapKind = "std",
    *,
    gain: Ends = 1.0,
    sigma: float = 0.0,
    skip_bad: bool = False,
) -> NoiseMaps:
    """Return noise maps from tensors, arrays, captures or noise maps.

    Args:
        data: Maps (N, 1 or C, H, W), a list of maps (C, H, W) of any sizes, `Captures` or
            `NoiseMaps`.
        kind: What they hold: std, variance, ivar or weights.
        gain: Numbers of the maps for each unit of intensity, or one for each channel.
        sigma: Standard deviation of the noise at the mean weight, for weights.
        skip_bad: Whether images are left out whose maps have no usable number.

    Raises:
        InputError: The kind is unknown, a map has no usable number, or the noise is out of bounds.

    >>> variance = as_noise_maps(torch.full((1, 1, 2, 2), 0.04), "variance")
    >>> weights = as_noise_maps(torch.tensor([[[[1.0, 3.0]]]]), "weights", sigma=0.1)
    >>> round(variance.level, 4), weights.deviation(0).flatten()  # 0.1 sqrt(2 / weight)
    (0.2, tensor([0.1414, 0.0816]))
    """
    if isinstance(data, NoiseMaps):
        return data
    if kind not in KINDS:
        raise InputError(f"unknown kind of noise maps '{kind}': choose one of {', '.join(KINDS)}")
    if kind == "weights" and sigma <= 0:
        raise InputError(
            "noise maps of weights need the noise at the mean weight: give --noise a number, or"
            " auto; for inverse variances give --noise-maps ivar:PATH"
        )
    maps = as_captures(data, nan="mask")
    found = NoiseMaps(maps, kind, gain, sigma)
    if kind == "weights":
        sums = [_sums(maps, position) for position in range(len(maps))]
        mean = sum(s for s, _ in sums) / max(1, sum(n for _, n in sums))
        found = NoiseMaps(maps, kind, gain, sigma, mean=mean)
    absent = frozenset(range(len(found))) - {*maps.numbers} if len(found) > 1 else frozenset()
    return _leveled(replace(found, empty=absent), skip_bad)


def flat_maps(flat: Tensor) -> NoiseMaps:
    """Return the noise that a flat field leaves, in units of the noise of the problem: 1 / g.

    Args:
        flat: Sensitivity g, (C, H, W), above 0.

    >>> maps = flat_maps(torch.tensor([[[0.5, 2.0]]]))
    >>> maps.weights([0])[0].flatten()  # g
    tensor([0.5000, 2.0000])
    """
    maps = as_captures((1 / flat.double()).float()[None].cpu())
    return NoiseMaps(maps, relative=True)


def _leveled(found: NoiseMaps, skip_bad: bool = False) -> NoiseMaps:
    """Return the maps with the median of their deviations as their level."""
    levels, hides, empty = [], False, set(found.empty)
    for number in found.maps.numbers:
        values = found.deviation(number)
        known = values[values.isfinite()]
        if not len(known):
            empty.add(number)
            if skip_bad or number in found.empty:
                continue
            raise InputError(
                f"noise map {number} has no number above 0: remove it and its image, or leave the"
                " image out with --skip-bad"
            )
        hides = hides or len(known) < values.numel()
        levels.append(float(known.median()))
    if not levels:
        raise InputError("no noise map has a number above 0: give others")
    level = float(torch.tensor(levels, dtype=torch.float64).median())
    _check_level(level)
    return replace(found, level=level, hides=hides, empty=frozenset(empty))


def _check_level(level: float) -> None:
    if not SIGMA.least <= level <= SIGMA.most:
        raise InputError(
            f"the noise maps have the median {level:.3g} in units of the image range, which is no"
            f" noise from {SIGMA.least:g} to {SIGMA.most:g}: give maps in the numbers of the"
            " images, and --range BLACK WHITE"
        )


def _sums(maps: Captures, position: int) -> tuple[float, int]:
    """Return sum and number of the usable numbers of a map."""
    values = maps.region(position, 0, 0, *maps.sizes[position]).double()
    values = values[values.isfinite() & (values > 0)]
    return float(values.sum()), len(values)


def read_noise_maps(
    text: str,
    *,
    gain: Ends = 1.0,
    sigma: float = 0.0,
    scratch: Path | None = None,
    select: Selection = ALL,
    skip_bad: bool = False,
) -> NoiseMaps:
    """Read noise maps from files.

    Args:
        text: A folder or a file, as for images, such as ``night[ERR]`` or ``weights.npy``; with
            std:, variance:, ivar: or weights: before it, or else of the kind that the name of its
            FITS extension gives.
        gain: See `as_noise_maps`: that of the scale of the images.
        sigma: See `as_noise_maps`.
        scratch: Folder for decoded maps that memory is too small for.
        select: Axes of the files.
        skip_bad: See `as_noise_maps`; maps that cannot be read have no usable number.

    Raises:
        InputError: The maps cannot be read, or are not usable.

    >>> import numpy as np
    >>> np.save("ivar.npy", np.full((1, 4, 4), 25.0, np.float32))
    >>> round(read_noise_maps("ivar:ivar.npy").level, 4)  # 1 / sqrt(25)
    0.2
    """
    kind, path = kind_of(text)
    scratch = scratch or _scratch()
    maps = open_captures(Path(path), skip_bad, (0.0, 1.0), "mask", scratch, select)
    return as_noise_maps(maps, kind, gain=gain, sigma=sigma, skip_bad=skip_bad)


def maps_for(
    given: Any,
    problem: Problem,
    gain: Ends = 1.0,
    select: Selection = ALL,
    skip_bad: bool = False,
) -> NoiseMaps:
    """Return the noise maps of a problem.

    Args:
        given: The text of `read_noise_maps`, a path, or what `as_noise_maps` takes.
        problem: Its noise is that at the mean weight, for weights; for other kinds it must be 0.
        gain: See `as_noise_maps`.
        select, skip_bad: See `read_noise_maps`.

    Raises:
        InputError: The maps are not usable, or the noise does not belong to their kind.

    >>> maps = torch.full((1, 1, 4, 4), 0.3)
    >>> round(maps_for(maps, Problem("identity", 0.0)).level, 4)
    0.3
    >>> maps_for(maps, Problem("identity", 0.1))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: the noise maps hold the noise already, and a noise of 0.1 is ...
    """
    if isinstance(given, NoiseMaps) and given.relative:
        return given
    sigma = problem.sigma
    if isinstance(given, str | Path):
        maps = read_noise_maps(
            str(given), gain=gain, sigma=sigma, select=select, skip_bad=skip_bad
        )
    else:
        maps = as_noise_maps(given, gain=gain)
    if maps.kind != "weights" and sigma > 0:
        raise InputError(
            f"the noise maps hold the noise already, and a noise of {sigma:g} is given: leave out"
            " --noise; for weights of another unit give --noise-maps weights:PATH"
        )
    return maps


def kind_of(text: str) -> tuple[MapKind, str]:
    """Return the kind of noise maps, and their path.

    >>> kind_of("ivar:maps"), kind_of("night[WHT]"), kind_of("err.npy")
    (('ivar', 'maps'), ('weights', 'night[WHT]'), ('std', 'err.npy'))
    """
    word, colon, rest = text.partition(":")
    if colon and word in KINDS:
        return word, rest  # type: ignore[return-value]
    name = split_member(text)[1].partition(",")[0].strip().upper()
    return BY_NAME.get(name, "std"), text


def _scratch() -> Path:
    return Path(tempfile.gettempdir())
