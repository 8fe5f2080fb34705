r"""Tweedie's moments of the clean image, and the correction of a denoised image by y.

For :math:`x_t = x + t n` the denoiser gives the mean of the clean image, and its derivative the
covariance:

.. math::
    \mathbb{E}[x \mid x_t] = D(x_t, t),\qquad \mathbb{V}[x \mid x_t] = V = t^2 J,
    \qquad J = \partial D/\partial x_t.

Each product with V is one back-propagation through the network. `mmps`, `tmpd` and `tds` use
these moments; the correction is that of `mmps` (Rozet et al. 2024, arXiv 2405.13712, section 4.2).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.linalg import batch_dot, conjugate_gradient
from ..problem import Problem
from .state import denoise_with_grad

__all__ = ["correction", "tweedie_moments"]


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
    x, x0 = denoise_with_grad(denoise, x, sigma, name)

    def covariance(v: Tensor) -> Tensor:
        return sigma**2 * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

    return x0.detach(), covariance
