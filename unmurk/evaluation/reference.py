r"""A reference restoration without learning: the sliding-window cosine transform.

Every window of 8 x 8 pixels is transformed by the orthonormal DCT-II. Coefficients below
:math:`3 \sigma` are set to zero, and the overlapping windows are averaged with weights
:math:`1 / N`, where N is the number of coefficients that a window keeps. It needs nothing but the
noise level, so a learned restoration should be better than it.

Source: L. P. Yaroslavsky, K. O. Egiazarian, J. T. Astola, "Transform domain image restoration
methods: review, comparison, and interpretation", Proc. SPIE 4304, 2001.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..noise_estimation import SIDE, cosines

__all__ = ["cosine_filter"]

THRESHOLD = 3.0  # standard deviations of the noise


def cosine_filter(y: Tensor, variance: Tensor | float) -> Tensor | None:
    """Denoise images by thresholding the cosine coefficients of overlapping windows.

    Args:
        y: Noisy images (B, C, H, W).
        variance: Variance of the noise of every value, a number or a tensor that broadcasts to y.
            Its mean over a window is used there.

    Returns:
        Denoised images (B, C, H, W); None if a side is below 8 pixels.

    >>> y = 0.5 + 0.1 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> float((cosine_filter(y, 0.01) - 0.5).square().mean()) < 0.001
    True
    """
    height, width = y.shape[-2:]
    if min(height, width) < SIDE:
        return None
    level = torch.as_tensor(variance).to(y).expand_as(y)
    basis = cosines(SIDE).to(y)
    planes = zip(y.flatten(0, 1)[:, None], level.flatten(0, 1)[:, None], strict=True)
    return torch.stack([_plane(image, v, basis) for image, v in planes]).view_as(y)


def _plane(image: Tensor, variance: Tensor, basis: Tensor) -> Tensor:
    """Denoise one plane (1, H, W)."""
    size = image.shape[-2:]
    windows = F.unfold(image[None], SIDE)[0].T @ basis.T
    limit = THRESHOLD * F.unfold(variance[None], SIDE)[0].mean(0).clamp_min(0).sqrt()
    kept = windows.abs() > limit[:, None]
    kept[:, 0] = True  # the mean of the window
    weight = 1 / kept.sum(1, keepdim=True)
    total = F.fold(((windows * kept) @ basis * weight).T[None], size, SIDE)
    return (total / F.fold(weight.expand_as(windows).T[None], size, SIDE))[0]
