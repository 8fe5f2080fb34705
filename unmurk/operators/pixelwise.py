"""High dynamic range: the contrast is stretched, and what leaves the range is lost.

In the units [-1, 1] of the literature y_u = clip(f u, -1, 1), with f = 2 (Mardani et al. 2023,
arXiv 2305.04391). With u = 2 x - 1 and y_u = 2 y - 1 that is

    y = clip(f x - c, 0, 1),    c = (f - 1) / 2

so that for f = 2 intensities from 1/4 to 3/4 are seen. Of a saturated pixel only the side is
known, and no gradient comes from it. The prox needs none: pixel by pixel it is the best of three,

    below the range    x = min(z, c / f)                                     where A x = 0
    within             x = (z + gamma f (y + c)) / (1 + gamma f^2), clipped to the range
    above the range    x = max(z, (1 + c) / f)                               where A x = 1
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import Option, Real
from .base import NonlinearOperator

__all__ = ["ClipRange"]


class ClipRange(NonlinearOperator):
    """Stretched about grey and clipped. Text form: "hdr:clip,factor=2".

    Args:
        factor: f, how far the contrast is stretched, a number from 1 to 1000.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "hdr:clip"
    options: ClassVar[dict[str, Option]] = {"factor": Real(1, 1000)}
    factor: float

    def __init__(self, factor: float = 2.0) -> None:
        self._take_options(factor=factor)
        self._shift = (self.factor - 1) / 2

    @property
    def proximal(self) -> bool:
        """True."""
        return True

    def _A(self, x: Tensor) -> Tensor:
        return (self.factor * x - self._shift).clamp(0, 1)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        f, c = self.factor, self._shift
        low, high = c / f, (1 + c) / f
        within = ((z + gamma * f * (y + c)) / (1 + gamma * f**2)).clamp(low, high)
        choices = torch.stack([z.clamp_max(low), within, z.clamp_min(high)])
        cost = gamma * (self._A(choices) - y).square() + (choices - z).square()
        return choices.gather(0, cost.argmin(0, keepdim=True))[0]
