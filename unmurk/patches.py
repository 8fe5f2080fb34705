"""Square patches of images, and what is left of them without their slow part.

The slow part is the span of the discrete cosine functions of low frequencies. Noise is measured in
what is left (`noise_estimation`, `noise_scale`), since images have little at high frequencies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators.linalg import dct_matrix

__all__ = [
    "SIDE",
    "blocks",
    "cosines",
    "cut_patches",
    "fast_part",
    "slow_functions",
    "slow_span",
]

SIDE = 8
"""Side of a patch in pixels."""


def cut_patches(y: Tensor, stride: int = SIDE) -> Tensor:
    """Cut images (N, C, H, W) into patches (P, C, SIDE^2), every `stride` pixels.

    >>> cut_patches(torch.zeros(2, 3, 16, 24)).shape
    torch.Size([12, 3, 64])
    """
    n, c, h, w = y.shape
    if h < SIDE or w < SIDE:
        return y.new_zeros(0, c, SIDE**2)
    blocks = F.unfold(y, SIDE, stride=stride).reshape(n, c, SIDE**2, -1)
    return blocks.permute(0, 3, 1, 2).flatten(0, 1)


def blocks(y: Tensor) -> Tensor:
    """View images (N, C, H, W) as adjacent patches (N, rows, columns, C, SIDE, SIDE).

    Nothing is copied, so a few patches of a large image need little memory.

    >>> y = torch.rand(2, 3, 17, 24)
    >>> blocks(y).shape, torch.equal(blocks(y).flatten(-2).flatten(0, 2), cut_patches(y))
    (torch.Size([2, 2, 3, 3, 8, 8]), True)
    """
    rows, columns = (size // SIDE for size in y.shape[-2:])
    cut = y[..., : rows * SIDE, : columns * SIDE]
    return cut.unflatten(-1, (columns, SIDE)).unflatten(-3, (rows, SIDE)).permute(0, 2, 4, 1, 3, 5)


def cosines(side: int) -> Tensor:
    """Return the orthonormal cosine functions on a patch, (side^2, side^2), by frequency (u, v).

    >>> basis = cosines(4)
    >>> torch.allclose(basis @ basis.T, torch.eye(16, dtype=torch.float64))
    True
    """
    cosine = dct_matrix(side)
    return torch.einsum("ui,vj->uvij", cosine, cosine).reshape(side**2, side**2)


def slow_functions(below: int) -> Tensor:
    """Return the orthonormal cosine functions with u + v < below on a patch, (K, SIDE^2).

    >>> slow_functions(3).shape
    torch.Size([6, 64])
    """
    number = torch.arange(SIDE)
    return cosines(SIDE)[(number[:, None] + number < below).flatten()]


def fast_part(values: Tensor, inside: Tensor, below: int) -> tuple[Tensor, Tensor]:
    """Remove the slow part of patches, by least squares on their measured pixels.

    Args:
        values: Patches (P, C, SIDE^2), 0 where a pixel is not measured.
        inside: 1 where a pixel is measured, (P, SIDE^2).
        below: The slow part is spanned by the cosine functions with u + v < below.

    Returns:
        What is left, (P, C, SIDE^2), and its degrees of freedom for each channel, (P,).

    >>> ramp = torch.linspace(0, 1, SIDE, dtype=torch.float64).repeat(SIDE)
    >>> fast, freedom = fast_part(ramp.view(1, 1, -1), torch.ones(1, SIDE**2).double(), below=6)
    >>> bool(fast.abs().max() < 1e-2), freedom.tolist()
    (True, [43.0])
    """
    full = inside.sum(1) == SIDE**2
    slow = slow_functions(below)
    fast = values - values @ slow.T @ slow
    freedom = torch.full((len(values),), float(SIDE**2 - len(slow)), dtype=values.dtype)
    if full.all():
        return fast, freedom
    part, observed = values[~full], inside[~full]
    span, known = slow_span(observed, below)
    fast[~full] = part - torch.einsum("ncp,nrp,nrq->ncq", part, span, span)
    freedom[~full] = observed.sum(1) - known
    return fast, freedom


def slow_span(weights: Tensor, below: int) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of the slow part, weighted pixel by pixel.

    Args:
        weights: Weights of the pixels, 0 where one is not measured, (P, SIDE^2).
        below: See `fast_part`.

    Returns:
        Rows (P, K, SIDE^2), some of which may be zero, and the number of others, (P,).

    >>> span, known = slow_span(torch.ones(1, SIDE**2).double(), below=2)
    >>> torch.allclose(span[0] @ span[0].T, torch.eye(3).double()), known.tolist()
    (True, [3])
    """
    slow = slow_functions(below)
    size, axes = torch.linalg.eigh(torch.einsum("kp,np,lp->nkl", slow, weights.square(), slow))
    nonzero = size > 1e-9
    scale = torch.where(nonzero, size, 1).rsqrt() * nonzero
    return torch.einsum("nkr,kp,np->nrp", axes * scale[:, None], slow, weights), nonzero.sum(1)
