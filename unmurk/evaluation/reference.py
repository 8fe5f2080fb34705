r"""Reference restorations without learning: the sliding-window DCT, and non-local means.

**Sliding-window cosine transform.** Every window of 8 x 8 pixels is transformed by the orthonormal
DCT-II. Coefficients below :math:`3 \sigma` are set to zero, and the overlapping windows are
averaged with weights :math:`1 / N`, where N is the number of coefficients that a window keeps. It
needs nothing but the noise level, so a learned restoration should be better than it (L. P.
Yaroslavsky, K. O. Egiazarian, J. T. Astola, "Transform domain image restoration methods: review,
comparison, and interpretation", Proc. SPIE 4304, 2001).

**Non-local means.** A pixel becomes the mean of the pixels j around it, with the weights

.. math:: w_{ij} = \exp\Bigl(-\frac{\max(d_{ij}^2 - 2 \sigma^2, 0)}{h^2}\Bigr),

where :math:`d_{ij}^2` is the mean squared difference of the patches around i and j (A. Buades, B.
Coll, J.-M. Morel, "A review of image denoising algorithms, with a new one", Multiscale Model.
Simul. 4, 2005). It is written here because `unmurk demo` compares with it, and scikit-image, which
has it too, is a dependency of the tests and benchmarks alone. `tests/evaluation/test_verdict.py`
compares the two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, size_text
from ..patches import SIDE, cosines

__all__ = ["cosine_filter", "non_local_means"]

THRESHOLD = 3.0  # standard deviations of the noise
STRIP = 256  # rows of windows that are filtered together
PATCH, REACH = 2, 6  # pixels from the center of a patch, and of the search window, to its edge
STRENGTH = 0.8  # h in standard deviations of the noise


def cosine_filter(y: Tensor, variance: Tensor | float) -> Tensor:
    """Denoise images by thresholding the cosine coefficients of overlapping windows.

    Args:
        y: Noisy images (B, C, H, W).
        variance: Variance of the noise of every value, a number or a tensor that broadcasts to y.
            Its mean over a window is used there.

    Returns:
        Denoised images (B, C, H, W).

    Raises:
        InputError: A side is below 8 pixels.

    >>> y = 0.5 + 0.1 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> float((cosine_filter(y, 0.01) - 0.5).square().mean()) < 0.001
    True
    """
    height, width = y.shape[-2:]
    if min(height, width) < SIDE:
        raise InputError(
            f"images of {size_text((height, width))} are smaller than a window of"
            f" {size_text((SIDE, SIDE))}"
        )
    level = torch.as_tensor(variance).to(y).expand_as(y)
    basis = cosines(SIDE).to(y)
    planes = zip(y.flatten(0, 1)[:, None], level.flatten(0, 1)[:, None], strict=True)
    return torch.stack([_plane(image, v, basis) for image, v in planes]).view_as(y)


def _plane(image: Tensor, variance: Tensor, basis: Tensor) -> Tensor:
    """Denoise one plane (1, H, W), in strips of rows that bound the memory."""
    total, weights = torch.zeros_like(image), torch.zeros_like(image)
    for first in range(0, image.shape[-2] - SIDE + 1, STRIP):
        rows = slice(first, min(first + STRIP + SIDE - 1, image.shape[-2]))
        part, level = image[:, rows], variance[:, rows]
        windows = F.unfold(part[None], SIDE)[0].T @ basis.T
        limit = THRESHOLD * F.unfold(level[None], SIDE)[0].mean(0).clamp_min(0).sqrt()
        kept = windows.abs() > limit[:, None]
        kept[:, 0] = True  # the mean of the window
        weight = 1 / kept.sum(1, keepdim=True).to(image)
        size = part.shape[-2:]
        total[:, rows] += F.fold(((windows * kept) @ basis * weight).T[None], size, SIDE)[0]
        weights[:, rows] += F.fold(weight.expand_as(windows).T[None], size, SIDE)[0]
    return total / weights


def non_local_means(y: Tensor, sigma: float) -> Tensor:
    """Denoise images by non-local means, with patches of 5 x 5 and a search of 13 x 13 pixels.

    Args:
        y: Noisy images (B, C, H, W); the channels of an image share their weights.
        sigma: Standard deviation of the noise.

    Returns:
        Denoised images (B, C, H, W).

    >>> y = 0.5 + 0.1 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> float((non_local_means(y, 0.1) - 0.5).square().mean()) < 0.001
    True
    """
    height, width = y.shape[-2:]
    reach = min(REACH, height - 1, width - 1)
    around = F.pad(y, (reach,) * 4, mode="reflect")
    total, weights = torch.zeros_like(y), torch.zeros_like(y[:, :1])
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            other = around[..., down : down + height, right : right + width]
            square = (y - other).square().mean(1, keepdim=True)
            size = 2 * PATCH + 1
            square = F.avg_pool2d(square, size, 1, PATCH, count_include_pad=False)
            weight = (-(square - 2 * sigma**2).clamp_min(0) / (STRENGTH * sigma) ** 2).exp()
            total, weights = total + weight * other, weights + weight
    return total / weights
