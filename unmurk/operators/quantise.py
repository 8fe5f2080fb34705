"""Quantisation: every value is rounded to the nearest of 2^bits levels.

    y = round(L clip(x, 0, 1)) / L,    L = 2^bits - 1

Rounding has the derivative 0 wherever it has one, so autograd is told that A is the identity: the
straight-through estimator of Bengio, Leonard and Courville (2013), arXiv 1308.3432.

The prox takes no part in that: it is exact. In units of a step 1 / L let d_l(z) be the distance
from z to the values that level l stands for, which is max(0, |z - l| - 1/2), but 0 below the
lowest level and above the highest. Of a value z that is measured as y the level becomes

    l = argmin gamma (l - y)^2 + d_l(z)^2

and z moves to the nearest of that level's values. Without the two ends the minimum over all real l
is y if |z - y| <= 1/2 and (gamma y + z -+ 1/2) / (1 + gamma) else; the cost is convex, so l is one
of its two neighbours, or an end. Values keep INSIDE of a level's edge, where rounding is a matter
of the last bit.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import Option, Whole
from .base import NonlinearOperator

__all__ = ["Quantise", "nearest", "straight_through"]

INSIDE = 1e-3  # of a step


def straight_through(value: Tensor, like: Tensor) -> Tensor:
    """`value`, with the derivative of `like`, both of one shape."""
    return value.detach() + (like - like.detach())


def nearest(
    z: Tensor, y: Tensor, gamma: Tensor, inside: float, top: float | None = None
) -> Tensor:
    """argmin_x gamma (round(x) - y)^2 + (x - z)^2, each value for itself.

    Args:
        z: Where to stay close to.
        y: What the rounded value is measured as.
        gamma: Weight of the measurement, >= 0.
        inside: How far from the edges of a level's values to keep.
        top: Highest level, where values above it and below 0 are clipped; None has no ends.
    """
    reach = (z - y).clamp(-0.5, 0.5)
    best = y + (z - y - reach) / (1 + gamma)
    levels = torch.stack([best.floor(), best.ceil()])
    low, high = levels - (0.5 - inside), levels + (0.5 - inside)
    if top is not None:
        ends = torch.stack([torch.zeros_like(z), torch.full_like(z, top)])
        levels = torch.cat([levels.clamp(0, top), ends])
        low = torch.where(levels == 0, -torch.inf, levels - (0.5 - inside))
        high = torch.where(levels == top, torch.inf, levels + (0.5 - inside))
    moved = z.maximum(low).minimum(high)
    cost = gamma * (levels - y).square() + (moved - z).square()
    return moved.gather(0, cost.argmin(0, keepdim=True))[0]


class Quantise(NonlinearOperator):
    """Few levels of grey, or of each colour. Text form: "quantise,bits=2".

    Args:
        bits: A whole number from 1 to 12; there are 2^bits levels from 0 to 1.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "quantise"
    options: ClassVar[dict[str, Option]] = {"bits": Whole(1, 12)}
    bits: int

    def __init__(self, bits: int = 2) -> None:
        self._take_options(bits=bits)
        self._top = 2**self.bits - 1

    @property
    def proximal(self) -> bool:
        """True."""
        return True

    def _A(self, x: Tensor) -> Tensor:
        return straight_through((self._top * x.clamp(0, 1)).round() / self._top, x)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return nearest(self._top * z, self._top * y, gamma, INSIDE, self._top) / self._top
