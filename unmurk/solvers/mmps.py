r"""MMPS: moment matching posterior sampling, the reverse diffusion with a denoiser that knows y.

Rozet, Andry, Lanusse and Louppe (2024), arXiv 2405.13712, section 4.2. Given :math:`x_t = x + t
n`, Tweedie's formulas give mean and covariance of the clean image,

.. math::
    \mathbb{E}[x \mid x_t] = D(x_t, t),\qquad \mathbb{V}[x \mid x_t] = V = t^2 J,
    \qquad J = \partial D/\partial x_t.

With a Gaussian of these moments for :math:`p(x \mid x_t)`, the measurement :math:`y = A x +
\sigma_y n` turns D into

.. math::
    D_y = D + V A^\top (\sigma_y^2 I + A V A^\top)^{-1} (y - A D)
        \approx \mathbb{E}[x \mid x_t, y].

Conjugate gradients solve the system; each of their iterations takes one product with
:math:`J^\top` (J is symmetric for the exact denoiser). :math:`D_y` then replaces D in the reverse
diffusion.

For a Gaussian prior :math:`D_y` is the exact :math:`\mathbb{E}[x \mid x_t, y]`, so samples are
exact in the limit of many steps and iterations. For any other prior :math:`p(x \mid x_t)` is not
Gaussian, the weights of separate modes are wrong at high noise, and the distribution of the
samples is not known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..problem import Problem
from .base import Count, Requirement, ReverseSolver, Steps, Tolerance
from .moments import correction, tweedie_moments
from .state import State

__all__ = ["Mmps", "conditional_denoiser"]


@dataclass(frozen=True, kw_only=True)
class Mmps(ReverseSolver):
    """Moment matching posterior sampling.

    A step takes one network evaluation and `iterations` + 1 back-propagations.

    Raises:
        InputError: An option is out of its bounds, or the prior cannot be differentiated.

    >>> Mmps(steps=12, iterations=3).tolerance
    0.001
    """

    name: ClassVar[str] = "mmps"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{rozet2024learning,
  title = {Learning Diffusion Priors from Observations by Expectation Maximization},
  author = {Rozet, Fran{\\c{c}}ois and Andry, G{\\'e}r{\\^o}me and Lanusse, Fran{\\c{c}}ois and
            Louppe, Gilles},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2405.13712},
  archiveprefix = {arXiv}
}"""

    steps: Steps = 30
    """Noise levels. The spread of Gaussian posteriors is then right to 3 %."""
    iterations: Count = 5
    """Most iterations of conjugate gradients. Low noise on many correlated pixels needs more."""
    tolerance: Tolerance = 1e-3
    """Residual of the system, relative to y - A D, at which an image takes no more iterations."""

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s, x = state.sigma, state.sigma_next, state.x_t
        state.denoised = conditional_denoiser(
            state.problem, state.denoise, x, state.y, t, self.iterations, self.tolerance
        )
        # the reverse diffusion, with D_y in place of D
        state.x = state.x_t = state.memory.reverse.step(x, state.denoised, t, s)


def conditional_denoiser(
    problem: Problem,
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    y: Tensor,
    sigma: float,
    iterations: int,
    tolerance: float = 1e-3,
) -> Tensor:
    """Estimate the clean image from x at level sigma and y: D_y(x), (B, C, H, W).

    Args:
        problem: A linear operator and Gaussian noise, bound to the images.
        denoise: The denoiser D(x, sigma).
        x: Noisy images (B, C, H, W).
        y: Measurements (B, ...).
        sigma: Noise level of x.
        iterations: Most iterations of conjugate gradients.
        tolerance: Residual of the system, relative to y - A D, at which an image takes no more.

    Raises:
        InputError: No gradient passes through the prior.

    >>> import torch
    >>> x = y = torch.ones(1, 1, 1, 2)
    >>> problem = Problem("identity", noise=0.5**0.5)
    >>> # prior N(0, 1): E[x | x_t, y] = (x_t / 1 + y / 0.5) / (1 + 1 / 1 + 1 / 0.5)
    >>> conditional_denoiser(problem, lambda x, sigma: x / (1 + sigma**2), x, y, 1.0, 5)
    tensor([[[[0.7500, 0.7500]]]])
    """
    x0, covariance = tweedie_moments(denoise, x, sigma, Mmps.name)
    return x0 + correction(problem, x0, covariance, y, problem.sigma, iterations, tolerance)[0]
