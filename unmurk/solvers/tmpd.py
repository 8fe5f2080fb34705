r"""TMPD: Tweedie moment projected diffusion, moment matching with a diagonal in place of a system.

Boys, Girolami, Pidstrigach, Reich, Mosca and Akyildiz (2023), arXiv 2310.06721. As in `mmps`,
:math:`p(x \mid x_t)` is replaced by the Gaussian of Tweedie's moments, mean :math:`x_0 = D(x_t,
t)` and covariance :math:`V = t^2\,\partial D/\partial x_t`, so that

.. math::
    \mathbb{E}[x \mid x_t, y] \approx D_y
        = x_0 + V A^\top (\sigma_y^2 I + A V A^\top)^{-1} (y - A x_0).

Here :math:`A V A^\top` is replaced by the diagonal of its row sums, its product with a vector of
ones:

.. math::
    D_y = x_0 + V A^\top \frac{y - A x_0}{\sigma_y^2 + A V A^\top \mathbf 1}.

That takes two products with V, that is two back-propagations, where the system of `mmps` takes a
few more. It is exact if :math:`A V A^\top` is diagonal. Where its values are correlated and
positive the row sums exceed the variances, and y is trusted less than it should be. :math:`D_y`
replaces D in the reverse diffusion.

Row sums below zero (a network's Jacobian is no covariance) count as zero. Where they are too small
the correction would overshoot y, and the more so the less noise y has. A correction after which an
image fits y worse than before is shortened to the length that fits best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..operators.linalg import batch_dot, per_image, squared_norm
from ..problem import Problem
from .base import NoisySolver, Requirement, ReverseSolver
from .data_term import TINY
from .moments import tweedie_moments
from .state import State

__all__ = ["Tmpd", "projected_denoiser"]


@dataclass(frozen=True, kw_only=True)
class Tmpd(NoisySolver, ReverseSolver):
    """Tweedie moment projected diffusion. A step takes one network evaluation and two gradients.

    Raises:
        InputError: An option is out of its bounds, or the prior cannot be differentiated.

    >>> Tmpd(steps=50).noise_floor
    0.001
    """

    name: ClassVar[str] = "tmpd"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@article{boys2024tmpd,
  title = {{Tweedie} Moment Projected Diffusions for Inverse Problems},
  author = {Boys, Benjamin and Girolami, Mark and Pidstrigach, Jakiw and Reich, Sebastian and
            Mosca, Alan and Akyildiz, O. Deniz},
  journal = {Transactions on Machine Learning Research},
  year = {2024},
  eprint = {2310.06721},
  archiveprefix = {arXiv}
}"""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s, x = state.sigma, state.sigma_next, state.x_t
        state.denoised = projected_denoiser(
            state.problem, state.denoise, x, state.y, t, state.sigma_eff
        )
        state.x = state.x_t = state.memory.reverse.step(x, state.denoised, t, s)


def projected_denoiser(
    problem: Problem,
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    y: Tensor,
    sigma: float,
    sigma_eff: float,
) -> Tensor:
    """Estimate the clean image from x at level sigma and y: D_y(x), (B, C, H, W).

    Args:
        problem: A linear operator, bound to the images.
        denoise: The denoiser D(x, sigma).
        x: Noisy images (B, C, H, W).
        y: Measurements (B, ...).
        sigma: Noise level of x.
        sigma_eff: Standard deviation that the noise of y is taken to have.

    Raises:
        InputError: No gradient passes through the prior.

    >>> x = y = torch.ones(1, 1, 1, 2)
    >>> # prior N(0, 1) and noise of variance 0.5: exact, as V is diagonal
    >>> projected_denoiser(
    ...     Problem("identity", 0.1), lambda x, sigma: x / (1 + sigma**2), x, y, 1.0, 0.5**0.5
    ... )
    tensor([[[[0.7500, 0.7500]]]])
    """
    x0, covariance = tweedie_moments(denoise, x, sigma, Tmpd.name)
    with torch.no_grad():
        sums = problem.A(covariance(problem.A_adjoint(torch.ones_like(y)))).clamp_min(0)
        missing = problem.residual(x0, y)
        step = covariance(problem.A_adjoint(missing / (sigma_eff**2 + sums)))
        return x0 + per_image(_length(missing, problem.A(step)), x0) * step


def _length(missing: Tensor, gained: Tensor) -> Tensor:
    """Return the fraction of a step to take, (B,).

    It is 1, or, where the whole step worsens the fit to y, the fraction that fits best.

    Args:
        missing: y - A x0.
        gained: A applied to the step.
    """
    square = squared_norm(gained)
    along = batch_dot(missing, gained)
    best = (along / square.clamp_min(TINY)).clamp(0, 1)
    return torch.where(2 * along < square, best, torch.ones_like(best))
