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
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..bounds import Real
from ..diffusion.samplers import Reverse
from ..errors import InputError
from ..operators.linalg import batch_dot, conjugate_gradient
from ..problem import Problem
from .base import AnnealedSolver, Count, Level, Requirement, Steps
from .state import State

__all__ = ["Mmps", "Tolerance", "conditional_denoiser", "correction", "tweedie_moments"]

Tolerance = Annotated[float, Real(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Mmps(AnnealedSolver):
    """Moment matching posterior sampling.

    A step takes one network evaluation and `iterations` + 1 back-propagations.

    Raises:
        InputError: An option is out of its bounds, or the prior cannot be differentiated.

    >>> Mmps(steps=12, iterations=3).tolerance
    0.001
    """

    name: ClassVar[str] = "mmps"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{rozet2024mmps,
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
    sigma_max: Level = 5.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: Level = 0.002
    """Last noise level; well below that of the measurement, or the spread becomes too small."""

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`."""
        super().start(state, init)
        state.memory.reverse = Reverse(state.generator)

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

    >>> x = y = torch.ones(1, 1, 1, 2)
    >>> problem = Problem("identity", noise=0.5**0.5)
    >>> # prior N(0, 1): E[x | x_t, y] = (x_t / 1 + y / 0.5) / (1 + 1 / 1 + 1 / 0.5)
    >>> conditional_denoiser(problem, lambda x, sigma: x / (1 + sigma**2), x, y, 1.0, 5)
    tensor([[[[0.7500, 0.7500]]]])
    """
    x0, covariance = tweedie_moments(denoise, x, sigma, Mmps.name)
    return x0 + correction(problem, x0, covariance, y, problem.sigma, iterations, tolerance)[0]


@torch.no_grad()
def correction(
    problem: Problem,
    x0: Tensor,
    covariance: Callable[[Tensor], Tensor],
    y: Tensor,
    sigma_eff: float,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    r"""Compute the correction of the denoised image by y, and the surprise of y.

    With :math:`\delta = y - A D` and :math:`\Sigma = \sigma_{\text{eff}}^2 I + A V A^\top` these
    are :math:`V A^\top \Sigma^{-1} \delta` and :math:`\delta^\top \Sigma^{-1} \delta`.

    Args:
        problem: A linear operator, bound to the images.
        x0: Denoised images D (B, C, H, W).
        covariance: The map v -> V v on images, as from `tweedie_moments`.
        y: Measurements (B, ...).
        sigma_eff: Standard deviation that the noise of y is taken to have.
        iterations: Most iterations of conjugate gradients.
        tolerance: Residual of the system, relative to y - A D, at which an image takes no more.

    Returns:
        Images (B, C, H, W), and numbers (B,) in float64.

    >>> x0, y = torch.full((1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 2)
    >>> # V = 0.5 and sigma_eff^2 = 0.5, so Sigma = 1
    >>> correction(Problem("identity", 0.1), x0, lambda v: v / 2, y, 0.5**0.5, 5, 1e-3)
    (tensor([[[[0.2500, 0.2500]]]]), tensor([0.5000], dtype=torch.float64))
    """

    def back(v: Tensor) -> Tensor:
        return covariance(problem.A_adjoint(v))

    def system(v: Tensor) -> Tensor:
        return sigma_eff**2 * v + problem.A(back(v))

    missing = problem.residual(x0, y)
    v = conjugate_gradient(system, missing, iterations, tolerance)
    return back(v), batch_dot(missing.double(), v.double())


def tweedie_moments(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigma: float, name: str
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute mean and covariance of the clean image given x at level sigma.

    Args:
        denoise: The denoiser D(x, sigma).
        x: Noisy images (B, C, H, W).
        sigma: Noise level of x.
        name: The solver that needs the moments, for the message.

    Returns:
        The mean (B, C, H, W), and the map v -> V v on images.

    Raises:
        InputError: No gradient passes through the prior.

    >>> x = torch.ones(1, 1, 1, 2)
    >>> mean, covariance = tweedie_moments(lambda x, sigma: x / (1 + sigma**2), x, 1.0, "mmps")
    >>> mean, covariance(x)  # prior N(0, 1): mean x / 2, variance 1 / 2
    (tensor([[[[0.5000, 0.5000]]]]), tensor([[[[0.5000, 0.5000]]]]))
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, sigma)
    if not x0.requires_grad:
        raise InputError(
            f"{name} needs a prior that autograd can differentiate: use pnp-dm or daps"
        )

    def covariance(v: Tensor) -> Tensor:
        return sigma**2 * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

    return x0.detach(), covariance
