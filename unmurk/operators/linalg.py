"""Singular value decompositions of operators, each in the form that its structure allows.

    A = U diag(s) V^T,    V^T V = V V^T = I

V holds all directions of an image; s is 0 for those that A does not see. What algorithms in the
spectral domain need are the coordinates of images and of measurements, and the way back:

    into(x) = V^T x,    out(c) = V c,    measured(y) = U^T y    (0 where A has no such direction)

masks            V = U = I and s = m.
factors          A = M_c (x) M_h (x) M_w, a Kronecker product of small matrices on the channels,
                 rows and columns: V and U are the Kronecker products of theirs, s the products of
                 their singular values. Block averages, bicubic reduction, loss of colour, blurs
                 whose kernel is a column times a row, and chains of these.
circular blurs   A = F^-1 diag(H) F with F the unitary Fourier transform: V^T = F, s = |H| and
                 U^T = diag(conj(H) / |H|) F. Coordinates are complex, and only the half that real
                 images need; weights on them must be real, and even as |H| is.
anything else    the matrix itself, for images of at most LIMIT numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from .base import Operator

__all__ = [
    "LIMIT",
    "Factors",
    "Spectrum",
    "chained",
    "decomposed",
    "dense",
    "diagonal",
    "factored",
    "fourier",
    "matrix",
]

LIMIT = 2048  # numbers in an image whose A is decomposed as a matrix: some seconds, 0.1 GB

Factors = tuple[Tensor, Tensor, Tensor]
"""M_c, M_h and M_w, in double precision on the CPU."""


@dataclass(frozen=True)
class Spectrum:
    """A = U diag(s) V^T. Coordinates have a shape of their own, which s broadcasts to."""

    s: Tensor
    """Singular values, >= 0, in no order."""
    into: Callable[[Tensor], Tensor]
    """V^T x: coordinates of images (B, C, H, W)."""
    out: Callable[[Tensor], Tensor]
    """V c: images from coordinates."""
    measured: Callable[[Tensor], Tensor]
    """U^T y: coordinates of measurements (B, ...); those of A x are s V^T x."""


def diagonal(mask: Tensor, observed: Callable[[Tensor], Tensor]) -> Spectrum:
    """That of a mask (B or 1, 1, H, W) of zeros and ones; `observed` applies it to
    measurements."""
    return Spectrum(mask, lambda x: x, lambda c: c, observed)


def factored(factors: Factors, like: Tensor) -> Spectrum:
    """That of a Kronecker product, in the type and on the device of `like`."""
    parts = [_decompose(m, like) for m in factors]
    (sc, sh, sw), ut, vt = ([part[k] for part in parts] for k in range(3))
    v = [m.mT for m in vt]
    return Spectrum(
        sc[:, None, None] * sh[:, None] * sw,
        lambda x: _along(vt, x),
        lambda c: _along(v, c),
        lambda y: _along(ut, y),
    )


def chained(first: Factors, then: Factors) -> Factors:
    """The factors of one Kronecker product after another."""
    (c, h, w), (c2, h2, w2) = first, then
    return c2 @ c, h2 @ h, w2 @ w


def fourier(transfer: Tensor, shape: Sequence[int]) -> Spectrum:
    """That of a convolution with periodic borders of images of height and width `shape`.

    Args:
        transfer: H at the frequencies of `torch.fft.rfft2`, (B or 1, 1, H, W // 2 + 1).
    """
    gain = transfer.abs()
    turn = torch.where(gain > 0, transfer.conj() / torch.where(gain > 0, gain, 1.0), 0.0)
    size = tuple(shape[-2:])
    return Spectrum(
        gain,
        lambda x: torch.fft.rfft2(x, norm="ortho"),
        lambda c: torch.fft.irfft2(c, s=size, norm="ortho"),
        lambda y: turn * torch.fft.rfft2(y, norm="ortho"),
    )


def dense(operator: "Operator", like: Tensor) -> Spectrum:
    """That of any linear operator on images (B, C, H, W) of at most LIMIT numbers.

    Raises:
        InputError: The images are larger.
    """
    shape = like.shape[1:]
    if shape.numel() > LIMIT:
        raise InputError(
            f"operator '{operator.spec}' has no singular value decomposition at hand for images of"
            f" {shape.numel()} numbers, above {LIMIT}: use ddnm, diffpir or pnp-dm"
        )
    return decomposed(matrix(operator, shape, like), tuple(shape), like)


def decomposed(m: Tensor, shape: Sequence[int], like: Tensor) -> Spectrum:
    """That of matrices (B or 1, m, d) or one (m, d) on images of shape (C, H, W), d = C H W."""
    s, ut, vt = _decompose(m, like)
    return Spectrum(
        s,
        lambda x: _times(vt, x),
        lambda c: _times(vt.mT, c).reshape(-1, *shape),
        lambda y: _times(ut, y),
    )


def matrix(operator: "Operator", shape: Sequence[int], like: Tensor) -> Tensor:
    """A linear operator, bound to the rows of `like`, as dense matrices in double precision.

    Args:
        shape: Shape (C, H, W) of an image.
        like: A batch (B, ...); its type is what the operator is fed with.

    Returns:
        (B, m, d) with d = C H W, or (1, m, d) where all images share one operator.
    """
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *shape)
    shared = operator.index_select([0]) is operator
    rows = [0] if shared else range(len(like))
    columns = [operator.index_select([row] * size).A(basis) for row in rows]
    return torch.stack([c.reshape(size, -1).T for c in columns]).double()


def _decompose(m: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, U^T and V^T of matrices (.., m, n), with n values in s and n rows in U^T."""
    u, values, vt = torch.linalg.svd(m.double())
    rows, columns = m.shape[-2:]
    s, ut = vt.new_zeros(vt.shape[:-1]), vt.new_zeros(*vt.shape[:-1], rows)
    k = min(rows, columns)
    s[..., :k], ut[..., :k, :] = values, u.mT[..., :k, :]
    return s.to(like), ut.to(like), vt.to(like)


def _along(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """(M_c (x) M_h (x) M_w) x."""
    channels, rows, columns = factors
    return torch.einsum("ij,bjhw->bihw", channels, rows @ x @ columns.mT)


def _times(m: Tensor, x: Tensor) -> Tensor:
    """Matrices (B or 1, i, j) times the rows of x (B, ...) with j numbers each."""
    return (m @ x.flatten(1)[..., None])[..., 0]
