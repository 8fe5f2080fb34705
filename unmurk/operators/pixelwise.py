r"""Pixel by pixel: clipping of a high dynamic range, and quantization.

**Clipping.** In the units [-1, 1] of the literature :math:`y_u = \operatorname{clip}(f u, -1, 1)`
with f = 2 (Mardani et al. 2023, arXiv 2305.04391). With u = 2 x - 1 and :math:`y_u = 2 y - 1` this
is

.. math:: y = \operatorname{clip}(f x - c, 0, 1), \qquad c = (f - 1) / 2,

so that for f = 2 the range from 1/4 to 3/4 is measured. Of a saturated pixel only the side is
known, and it has no gradient. The prox needs none. Pixel by pixel, it is the best of three values:

.. math::

    x = \begin{cases}
        \min(z, c / f) & \text{below the range, where } A x = 0 \\
        \operatorname{clip}\left( \frac{z + \gamma f (y + c)}{1 + \gamma f^2},
            \frac{c}{f}, \frac{1 + c}{f} \right) & \text{within it} \\
        \max(z, (1 + c) / f) & \text{above the range, where } A x = 1
    \end{cases}

**Quantization.** Every value is rounded to the nearest of :math:`2^{bits}` levels:

.. math:: y = \operatorname{round}(L \operatorname{clip}(x, 0, 1)) / L, \qquad L = 2^{bits} - 1.

The derivative of rounding is 0 wherever it exists. So autograd treats A as the identity: this is
the straight-through estimator of Bengio, Leonard and Courville (2013), arXiv 1308.3432.

The prox does not use that estimator: it is exact. In units of a step 1 / L, let :math:`d_l(z)` be
the distance from z to the values that are rounded to level l. It is
:math:`\max(0, |z - l| - 1/2)`, but 0 below the lowest level and above the highest one. For a value
z that is measured as y, the level becomes

.. math:: l^* = \arg\min_l\; \gamma (l - y)^2 + d_l(z)^2,

and z moves to the nearest of that level's values. Without the two ends, the minimum over all real
l is y if :math:`|z - y| \le 1/2`, and :math:`(\gamma y + z \mp 1/2) / (1 + \gamma)` otherwise. The
cost is convex, so l is one of the two neighbors of that minimum, or an end. Values stay `INSIDE`
away from a level's edge, where the last bit decides the rounding.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import Option, Real, Whole
from .base import NonlinearOperator, Operator
from .compose import Local
from .crops import Window

__all__ = ["ClipRange", "Pixelwise", "Quantize", "nearest_level", "straight_through"]

INSIDE = 1e-3  # of a step


class Pixelwise(Local, NonlinearOperator):
    """Base class of operators that act on each value by itself.

    >>> from unmurk.operators import parse
    >>> from unmurk.operators.crops import Crop
    >>> A = parse("quantise,bits=1")
    >>> A.on_crops([Crop(0, 2, 2, 8, 8)], 4) == A  # a crop determines all of its measurements
    True
    """

    turnable = True

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        return self, window


class ClipRange(Pixelwise):
    """Stretch the contrast about mid-gray and clip the result. Text form: "hdr:clip,factor=2".

    Args:
        factor: The factor f of the contrast, a number from 1 to 1000.

    Raises:
        InputError: The option is out of its bounds.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> parse("hdr:clip,factor=2").A(torch.tensor([[[[0.2, 0.5, 0.9]]]]))
    tensor([[[[0.0000, 0.5000, 1.0000]]]])
    """

    form = "hdr:clip"
    options: ClassVar[dict[str, Option]] = {"factor": Real(1, 1000)}
    factor: float

    def __init__(self, factor: float = 2.0) -> None:
        self._take_options(factor=factor)
        self._shift = (self.factor - 1) / 2

    @property
    def proximal(self) -> bool:
        """True: the prox has a closed form."""
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


def straight_through(value: Tensor, like: Tensor) -> Tensor:
    """Return `value` with the derivative of `like`; both have one shape.

    >>> x = torch.tensor([0.3], requires_grad=True)
    >>> y = straight_through(x.round(), 2 * x)
    >>> y.backward()
    >>> y.detach(), x.grad
    (tensor([0.]), tensor([2.]))
    """
    return value.detach() + (like - like.detach())


def nearest_level(
    z: Tensor, y: Tensor, gamma: Tensor, inside: float, highest: float | None = None
) -> Tensor:
    r"""Compute the prox of rounding, value by value.

    .. math:: \arg\min_x\; \gamma (\operatorname{round}(x) - y)^2 + (x - z)^2

    Args:
        z: The values that x should be close to.
        y: The measured values of round(x), shape of z.
        gamma: Weight of the measurement, >= 0.
        inside: Distance that x keeps from the edges of a level.
        highest: Highest level, if values above it and below 0 are clipped; None has no ends.

    >>> import torch
    >>> from unmurk.operators.pixelwise import nearest_level
    >>> nearest_level(torch.tensor([0.2, 2.0]), torch.ones(2), torch.tensor(1e6), 0.0)
    tensor([0.5000, 1.5000])
    """
    reach = (z - y).clamp(-0.5, 0.5)
    best = y + (z - y - reach) / (1 + gamma)
    levels = torch.stack([best.floor(), best.ceil()])
    low, high = levels - (0.5 - inside), levels + (0.5 - inside)
    if highest is not None:
        ends = torch.stack([torch.zeros_like(z), torch.full_like(z, highest)])
        levels = torch.cat([levels.clamp(0, highest), ends])
        low = torch.where(levels == 0, -torch.inf, levels - (0.5 - inside))
        high = torch.where(levels == highest, torch.inf, levels + (0.5 - inside))
    moved = z.maximum(low).minimum(high)
    cost = gamma * (levels - y).square() + (moved - z).square()
    return moved.gather(0, cost.argmin(0, keepdim=True))[0]


class Quantize(Pixelwise):
    """Round every value to one of a few levels. Text form: "quantise,bits=2".

    Args:
        bits: Number of bits, a whole number from 1 to 12; there are 2^bits levels from 0 to 1.

    Raises:
        InputError: The option is out of its bounds.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> parse("quantise,bits=1").A(torch.tensor([[[[0.2, 0.7]]]]))
    tensor([[[[0., 1.]]]])
    """

    form = "quantise"
    options: ClassVar[dict[str, Option]] = {"bits": Whole(1, 12)}
    bits: int

    def __init__(self, bits: int = 2) -> None:
        self._take_options(bits=bits)
        self._highest = 2**self.bits - 1

    @property
    def proximal(self) -> bool:
        """True: the prox has a closed form."""
        return True

    def _A(self, x: Tensor) -> Tensor:
        return straight_through((self._highest * x.clamp(0, 1)).round() / self._highest, x)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return (
            nearest_level(self._highest * z, self._highest * y, gamma, INSIDE, self._highest)
            / self._highest
        )
