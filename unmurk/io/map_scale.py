"""Noise maps that are known up to a factor, which the images give."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise_scale import NoiseScale, noise_scale
from ..operators import Operator
from ..problem import Problem
from .capture_set import Captures
from .crops import tile_crops
from .noise_maps import NoiseMaps

__all__ = ["measured_scale", "scaled_maps"]


def scaled_maps(
    maps: NoiseMaps,
    y: Tensor | Captures,
    operator: Operator,
    numbers: Sequence[int] | None = None,
) -> tuple[NoiseMaps, NoiseScale]:
    """Multiply noise maps by the factor that the images show.

    Args:
        maps: The noise maps.
        y: Images (N, C, H, W), or captures.
        operator: How they were made.
        numbers: Numbers of the images; None: 0, 1, ...; captures know theirs.

    Returns:
        The maps, and their factor with its standard error.

    Raises:
        InputError: The maps do not fit the images, or see `noise_scale`.

    >>> from unmurk.io.noise_maps import as_noise_maps
    >>> from unmurk.operators import as_operator
    >>> y = 0.5 + 0.2 * torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> maps, scale = scaled_maps(
    ...     as_noise_maps(torch.full((1, 1, 64, 64), 0.1)), y, as_operator("identity")
    ... )
    >>> abs(scale.factor - 2) < 3 * scale.error < 0.1, maps.factor == scale.factor
    (True, True)
    """
    scale = measured_scale(maps, y, operator, numbers)
    return maps.scaled(scale.factor), scale


def measured_scale(
    maps: NoiseMaps,
    y: Tensor | Captures,
    operator: Operator,
    numbers: Sequence[int] | None = None,
) -> NoiseScale:
    """Return the noise of images in units of their maps; see `scaled_maps`.

    >>> from unmurk.io.noise_maps import as_noise_maps
    >>> from unmurk.operators import as_operator
    >>> y = 0.5 + 0.2 * torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> maps = as_noise_maps(torch.full((1, 1, 64, 64), 0.1))
    >>> abs(measured_scale(maps, y, as_operator("identity")).factor - 2) < 0.1
    True
    """
    if isinstance(y, Captures):
        maps.check(y.sizes, y.channels, y.numbers, y.total)
        mapped = y.without(maps.empty, "")
        crops = tile_crops(mapped, operator)
        crops.lost = lambda position, place: maps.absent(mapped.numbers[position], place)
        chosen = list(range(len(crops)))
        sigma = maps.level / maps.crops(crops, chosen)
        hidden = crops.hidden(chosen)
        sigma = sigma if hidden is None else sigma.masked_fill(hidden > 0, torch.inf)
        return noise_scale(crops[:], sigma, crops.problem(Problem(operator, 0.0)).operator)
    numbers = list(range(len(y))) if numbers is None else list(numbers)
    known = [place for place, number in enumerate(numbers) if number not in maps.empty]
    y, numbers = y[known], [numbers[place] for place in known]
    weights, hidden = maps.batch(numbers, int(y.shape[1]), (int(y.shape[-2]), int(y.shape[-1])))
    return noise_scale(y, (maps.level / weights).masked_fill(hidden, torch.inf), operator)
