r"""Losses of a denoiser: score matching, by which a prior is learned, and the evidence bound.

**Denoising score matching.** A network that minimizes

.. math::
    \mathcal L = \mathbb E_{x, \sigma, n}\; w(s)\; \frac4d\,
        \lVert D(x + \sigma n, \sigma) - x \rVert^2,
    \qquad s = 2\sigma, \quad w(s) = \frac{1 + s^2}{s^2},

has :math:`D(x_\sigma, \sigma) = \mathbb E[x \mid x_\sigma]` (Vincent, 2011, Neural Computation
23). The factor 4 / d makes it the mean squared error per pixel of images in [-1, 1], so that one
learning rate serves images of any size. The levels are drawn as :math:`\log s \sim N(0, 1.2^2)`.
Weights and levels are those of Karras et al. (2022, arXiv 2206.00364, section 5) for
sigma_data = 1. Their mean of log s is -0.5; a mean of 0 gave better samples (docs/experiments.md).

**Negative evidence bound.** With :math:`\log\sigma` uniform on
:math:`[\log\sigma_{\min}, \log\sigma_{\max}]` and
:math:`L = \ln(\sigma_{\max} / \sigma_{\min})`, Kingma et al. (2021, arXiv 2107.00630, eqs. 11-15)
give in nats

.. math::
    \begin{aligned}
    -\log p_D(x) \le{}& L\; \mathbb E\,
        \frac{\lVert D(x + \sigma n, \sigma) - x\rVert^2}{\sigma^2}
        && \text{(diffusion)} \\
    &+ \mathbb E\, \frac{\lVert D(x + \sigma_{\min} n, \sigma_{\min}) - x\rVert^2}
        {2\sigma_{\min}^2} + \frac d2 \ln(2\pi\sigma_{\min}^2)
        && \text{(decoder)} \\
    &+ \mathrm{KL}\bigl(N(x, \sigma_{\max}^2) \,\Vert\, N(1/2, \sigma_{\max}^2)\bigr)
        && \text{(end)}.
    \end{aligned}

:math:`p_D` is the density of the model's own reverse diffusion, which D defines, and not that of
the data: the bound says how likely x is under the model. For the exact denoiser the two densities
are equal. Drawing :math:`\log\sigma` uniformly is the importance sampling of Song et al. (2021,
arXiv 2101.09258).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operators.base import per_image
from ..operators.linalg import squared_norm
from ..rng import global_batch, normal, permutation, uniform

__all__ = ["Denoiser", "gaussian", "levels", "nelbo", "score_matching", "weighted"]

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""A denoiser D(x, sigma): images (B, C, H, W) and levels (B,) to images (B, C, H, W)."""


def gaussian(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal noise of the shape, type and device of a batch.

    >>> gaussian(torch.zeros(2, 1, 4, 4), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 4, 4])
    """
    return normal(like.shape, generator, device=like.device, dtype=like.dtype)


def levels(
    n: int, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Tensor:
    r"""Draw training noise levels, stratified over the batch.

    .. math:: \sigma = \tfrac12 \exp(1.2\, \Phi^{-1}(u)), \qquad u \sim U(0, 1)

    with the normal distribution function :math:`\Phi`; u is kept within 1e-4 and 1 - 1e-4.

    Args:
        n: Number of levels.
        generator: Source of the draws; None takes torch's global one.
        device: Where the levels are made if no generator says it.

    Returns:
        Noise levels in units of images in [0, 1], shape (n,), float32.

    >>> levels(3, torch.Generator().manual_seed(0)).shape
    torch.Size([3])
    """
    device = generator.device if generator is not None else device
    place = permutation((n,), generator, device) + uniform((n,), generator, device=device)
    place = place / global_batch(n, generator)
    return (1.2 * torch.special.ndtri(place.clamp(1e-4, 1 - 1e-4))).exp() / 2


def weighted(error: Tensor, sigma: Tensor) -> Tensor:
    r"""Average the weighted squared error of a denoiser over pixels and images.

    .. math:: \frac1B \sum_i \frac{1 + s_i^2}{s_i^2}\, \frac4d\, \lVert e_i \rVert^2,
        \qquad s_i = 2\sigma_i

    Args:
        error: Errors D(x + sigma n, sigma) - x, shape (B, C, H, W).
        sigma: Noise levels, shape (B,).

    Returns:
        The loss, a scalar.

    >>> weighted(torch.full((2, 1, 4, 4), 0.1), torch.tensor([0.5, 0.5]))
    tensor(0.0800)
    """
    s = 2 * sigma
    return ((1 + s**2) / s**2 * 4 * error.square().flatten(1).mean(1)).mean()


def score_matching(
    denoise: Denoiser,
    x: Tensor,
    sigma: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Compute the denoising score matching loss of a denoiser at given noise levels.

    Args:
        denoise: The denoiser D(x, sigma).
        x: Clean images, shape (B, C, H, W).
        sigma: Noise levels, shape (B,).
        generator: Source of the noise; None takes torch's global one.

    Returns:
        The loss, a scalar; see the head of this module.

    >>> x, sigma = torch.full((4, 1, 2, 2), 0.5), torch.full((4,), 0.1)
    >>> score_matching(lambda noisy, sigma: x, x, sigma)  # an exact denoiser of one image
    tensor(0.)
    """
    noisy = x + per_image(sigma, x) * gaussian(x, generator)
    return weighted(denoise(noisy, sigma) - x, sigma)


def nelbo(
    denoise: Denoiser,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    generator: torch.Generator | None = None,
    draws: int = 1,
    constants: bool = True,
) -> Tensor:
    """Estimate the negative evidence bound of each image; see the head of this module.

    The bound holds for the density of the model's own sampler, not for that of the data. The
    levels are stratified over draws and batch. This lowers the variance, and the estimate of every
    image stays unbiased. The gradient with respect to x flows through the denoiser's input.

    Args:
        denoise: The denoiser D(x, sigma).
        x: Images, shape (B, C, H, W).
        sigma_min: Lowest noise level.
        sigma_max: Highest noise level.
        generator: Source of the draws; None takes torch's global one.
        draws: Noise levels for each image.
        constants: Whether to add the decoder and end terms. Their gradient in x is zero but for
            that of the network at sigma_min. Without them the estimate costs one evaluation for
            each draw.

    Returns:
        Nats of density per unit of intensity, shape (B,).

    >>> shrink = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)  # of N(0, I)
    >>> nelbo(shrink, torch.zeros(2, 1, 4, 4), 0.01, 20.0, draws=8).shape
    torch.Size([2])
    """
    b, d = len(x), x[0].numel()
    span = math.log(sigma_max / sigma_min)
    kind: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    offset = uniform((b, draws), generator, **kind)
    order = permutation((b, draws), generator, x.device)
    n = global_batch(b, generator) * draws
    sigma = sigma_min * torch.exp(span * (order + offset).flatten() / n)
    repeated = x.repeat_interleave(draws, 0)
    noise = normal((b, draws, *x.shape[1:]), generator, **kind).reshape(repeated.shape)
    error = denoise(repeated + per_image(sigma, repeated) * noise, sigma) - repeated
    bound = span * (squared_norm(error) / sigma**2).view(b, draws).mean(1)
    if not constants:
        return bound
    noise = normal(x.shape, generator, **kind)
    sigma = torch.full((b,), sigma_min, dtype=x.dtype, device=x.device)
    error = denoise(x + sigma_min * noise, sigma) - x
    decoder = squared_norm(error) / (2 * sigma_min**2)
    decoder = decoder + d / 2 * math.log(2 * math.pi * sigma_min**2)
    end = squared_norm(x - 0.5) / (2 * sigma_max**2)
    return bound + decoder + end
