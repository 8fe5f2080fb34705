r"""The loss of the released RED-diff: its gradients by the data and by the prior.

Mardani, Song, Kautz and Vahdat (2023), arXiv 2305.04391. For images :math:`u = 2\mu - 1` in the
range [-1, 1],

.. math::
    \mathcal{L}(u) = \frac v2 \operatorname{mean}\bigl((y_u - A(u))^2\bigr) + \lambda\,g(2\sigma)
        \operatorname{mean}\bigl(\operatorname{stop}[\hat\epsilon - e]\,u\bigr),

where no gradient passes through the denoiser. `red_diff_paper` descends it with fresh noise e,
and `hrdis` with noise that follows the network's estimate.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..problem import Problem
from .data_term import likelihood_grad

__all__ = ["WEIGHTS", "PriorWeight", "data_grad", "prior_grad"]

WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda sigma: sigma,
    "sqrt": lambda sigma: sigma**0.5,
    "square": lambda sigma: sigma**2,
    "log": lambda sigma: float(torch.tensor(sigma).double().log1p()),
    "trunc_linear": lambda sigma: min(sigma, 1.0),
    "power2over3": lambda sigma: sigma ** (2 / 3),
    "const": lambda sigma: 1.0,
}
"""g(sigma), the weight of (eps_hat - e) in the prior's term; sigma in units of [-1, 1] images."""

PriorWeight = Literal["linear", "sqrt", "square", "log", "trunc_linear", "power2over3", "const"]


def data_grad(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    r"""Compute the gradient of :math:`\operatorname{mean}((y_u - A(u))^2)/2` in u = 2 x - 1.

    Args:
        problem: Operator and noise, bound to the images.
        x: Images (B, C, H, W).
        y: Measurements (B, ...).

    Returns:
        Images (B, C, H, W).

    >>> x, y = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> data_grad(Problem("identity", 0.1), x, y)  # -2 (y - x) / 2
    tensor([[[[-1., -1.]]]])
    """
    return -2 / y[0].numel() * likelihood_grad(problem, x, y)


def prior_grad(
    x: Tensor, denoised: Tensor, sigma: float, lam: float, weight: PriorWeight
) -> Tensor:
    r"""Compute the gradient of the prior's term in u, with :math:`\hat\epsilon - e` held fixed.

    .. math:: \nabla_u\, \lambda g(2\sigma) \operatorname{mean}\bigl((\hat\epsilon - e)\, u\bigr)
        = \frac{\lambda g(2\sigma)}{d}\, \frac{\mu - D(\mu + \sigma e, \sigma)}{\sigma}

    Args:
        x: The image (B, C, H, W); u = 2 x - 1.
        denoised: D(x + sigma e, sigma), which is held fixed.
        sigma: Noise level in units of [0, 1] images; g takes twice that.
        lam: lambda, the weight of the prior.
        weight: A name in `WEIGHTS`: g.

    Returns:
        Images (B, C, H, W).

    >>> x, denoised = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    >>> prior_grad(x, denoised, sigma=0.5, lam=0.25, weight="linear")  # 0.25 x 1 x 2 / 2
    tensor([[[[0.2500, 0.2500]]]])
    """
    excess = (x - denoised) / sigma  # eps_hat - e
    return lam * WEIGHTS[weight](2 * sigma) / x[0].numel() * excess
