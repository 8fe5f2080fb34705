r"""Batched linear algebra: conjugate gradients, and singular value decompositions with structure.

A decomposition of a linear map is

.. math:: A = U \operatorname{diag}(s) V^T, \qquad V^T V = V V^T = I.

The columns of V span all images; s is 0 for directions that A does not measure. Algorithms in
the spectral domain need the coordinates of images and of measurements, and the way back:

.. math:: \mathrm{into}(x) = V^T x, \qquad \mathrm{out}(c) = V c, \qquad
          \mathrm{measured}(y) = U^T y,

where the last is 0 for directions that y does not have. The structure of A decides the form:

- Masks: V = U = I and s = m.
- Kronecker products: :math:`A = M_c \otimes M_h \otimes M_w` of small matrices on channels, rows
  and columns. V and U are the Kronecker products of the factors' V and U, and s holds the
  products of their singular values. Examples are block averages, bicubic reduction, the mean of
  the channels, blurs whose kernel is a column times a row, and chains of these.
- Convolutions with periodic borders: :math:`A = F^{-1} \operatorname{diag}(H) F` with the unitary
  Fourier transform F, so :math:`V^T = F`, :math:`s = |H|` and
  :math:`U^T = \operatorname{diag}(\bar H / |H|) F`. The coordinates are complex, and only the
  half that real images need is stored. Weights on them must be real, and even as :math:`|H|` is.
- Everything else: the matrix itself, for images of at most `LIMIT` numbers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import filled
from ..interrupts import heed_interrupt

__all__ = [
    "CG_ITERATIONS",
    "LIMIT",
    "Factors",
    "Spectrum",
    "batch_dot",
    "chained",
    "conjugate_gradient",
    "dct_matrix",
    "decompose",
    "diagonal",
    "factored",
    "fourier",
    "matrix_of",
    "per_image",
    "rfft2",
    "squared_norm",
]

CG_ITERATIONS = 100
CG_TOLERANCE = {torch.float64: 1e-12}  # of the residual norm, relative to the right-hand side
SINGLE_TOLERANCE = 1e-6  # the same in float32
CHECK_EVERY = 8  # iterations between two looks at a GPU: each waits for all queued work
LIMIT = 2048  # numbers in an image whose A is decomposed as a matrix: some seconds, 0.1 GB

Factors = tuple[Tensor, Tensor, Tensor]
"""M_c, M_h and M_w of a Kronecker product, in double precision on the CPU."""


# ---------------------------------------------------------------- batches


def per_image(value: float | Tensor, like: Tensor) -> Tensor:
    """Reshape a number, or one number for each image, so that it multiplies a batch.

    Args:
        value: A float or a tensor of shape () or (B,).
        like: The batch (B, ...), which gives the type and the device.

    Returns:
        A tensor of shape (1, 1, ...) or (B, 1, ...) with as many axes as `like`.

    >>> import torch
    >>> from unmurk.operators.linalg import per_image
    >>> per_image(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 1, 1, 1])
    """
    return filled(value, like).reshape(-1, *[1] * (like.ndim - 1))


def batch_dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the inner product of each image of one batch with that of another.

    Args:
        a: A batch (B, ...).
        b: A batch of the same shape.

    Returns:
        A tensor of shape (B,).

    >>> import torch
    >>> from unmurk.operators.linalg import batch_dot
    >>> batch_dot(torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.5))
    tensor([2., 2.])
    """
    return (a * b).flatten(1).sum(1)


def squared_norm(a: Tensor) -> Tensor:
    """Compute the squared Euclidean norm of each image of a batch.

    Args:
        a: A batch (B, ...).

    Returns:
        A tensor of shape (B,).

    >>> import torch
    >>> from unmurk.operators.linalg import squared_norm
    >>> squared_norm(torch.full((2, 1, 2, 2), 0.5))
    tensor([1., 1.])
    """
    return a.square().flatten(1).sum(1)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int = CG_ITERATIONS,
    tolerance: float | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    r"""Solve M x = b for a symmetric positive semi-definite M by conjugate gradients.

    Each image has its own step sizes, so its result does not depend on the rest of the batch.
    The iteration starts from zero. On :math:`A^T A x = A^T y` it tends to the pseudo-inverse
    solution. The algorithm is that of M. R. Hestenes and E. Stiefel (1952), "Methods of conjugate
    gradients for solving linear systems".

    It is written here because the images of a batch have to stop one by one, on any device and in
    float32 or float64, which torch has no solver for.

    Args:
        apply: The map M on a batch (B, ...).
        b: The right-hand side (B, ...).
        iterations: The largest number of products with M.
        tolerance: An image is finished when
            :math:`\|b - M x\| \le \mathrm{tolerance}\, \|b\|`. None is what the rounding of b
            allows: 1e-6 in float32 and 1e-12 in float64.
        precondition: A symmetric positive map near :math:`M^{-1}`. None is the identity.

    Returns:
        x, shape of b.

    >>> import torch
    >>> from unmurk.operators.linalg import conjugate_gradient
    >>> conjugate_gradient(lambda x: 4 * x, torch.tensor([[8.0, 2.0]]))
    tensor([[2.0000, 0.5000]])
    """
    if tolerance is None:
        tolerance = CG_TOLERANCE.get(b.dtype, SINGLE_TOLERANCE)
    x, r = torch.zeros_like(b), b
    p = s = r if precondition is None else precondition(r)
    rs = batch_dot(r, s)
    goal = tolerance**2 * batch_dot(b, b)
    active = batch_dot(r, r) > goal
    every = 1 if b.device.type == "cpu" else CHECK_EVERY  # finished images do not change anyway
    for number in range(iterations):
        if number % every == every - 1 and not bool(active.any()):
            break
        heed_interrupt()
        q = apply(p)
        curvature = batch_dot(p, q)
        # a finished image takes no more steps: its result must not depend on its neighbors
        active = active & (curvature > 0) & (rs > 0)
        step = torch.where(active, rs / torch.where(active, curvature, 1.0), 0.0)
        x = x + per_image(step, x) * p
        r = r - per_image(step, x) * q
        s = r if precondition is None else precondition(r)
        # its direction must not grow either: infinity times a step of zero is not a number
        before, rs = torch.where(active, rs, torch.inf), batch_dot(r, s)
        p = s + per_image(rs / before, x) * p
        active = active & (batch_dot(r, r) > goal)
    return x


# ---------------------------------------------------------------- decompositions


@dataclass(frozen=True)
class Spectrum:
    r"""A singular value decomposition :math:`A = U \operatorname{diag}(s) V^T`.

    Coordinates have a shape of their own, which s broadcasts to.

    >>> from unmurk.operators import parse
    >>> found = parse("sr:average,factor=2").svd(torch.zeros(1, 1, 2, 2))
    >>> found.s.flatten()
    tensor([0.5000, 0.0000, 0.0000, 0.0000])
    """

    s: Tensor
    """Singular values, >= 0, in no particular order."""
    into: Callable[[Tensor], Tensor]
    r""":math:`V^T x`: coordinates of images (B, C, H, W)."""
    out: Callable[[Tensor], Tensor]
    """V c: images from coordinates."""
    measured: Callable[[Tensor], Tensor]
    r""":math:`U^T y`: coordinates of measurements (B, ...); those of A x are :math:`s V^T x`."""


def diagonal(mask: Tensor, apply_mask: Callable[[Tensor], Tensor]) -> Spectrum:
    """Return the decomposition of a mask.

    Args:
        mask: Zeros and ones, (B or 1, 1, H, W).
        apply_mask: Sets the hidden entries of measurements to zero.

    >>> mask = torch.tensor([[[[1.0, 0.0]]]])
    >>> diagonal(mask, lambda y: mask * y).into(torch.ones(1, 1, 1, 2)).shape
    torch.Size([1, 1, 1, 2])
    """
    return Spectrum(mask, lambda x: x, lambda c: c, apply_mask)


def factored(factors: Factors, like: Tensor) -> Spectrum:
    """Return the decomposition of a Kronecker product, in the type and on the device of `like`.

    Args:
        factors: The three matrices.
        like: Any tensor of the wanted type on the wanted device.

    >>> half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)  # A averages 2 x 2 pixels
    >>> factored((torch.eye(1, dtype=torch.float64), half, half), torch.zeros(1)).s.flatten()
    tensor([0.5000, 0.0000, 0.0000, 0.0000])
    """
    parts = [_svd(m, like) for m in factors]
    (sc, sh, sw), ut, vt = ([part[k] for part in parts] for k in range(3))
    v = [m.mT for m in vt]
    return Spectrum(
        sc[:, None, None] * sh[:, None] * sw,
        lambda x: _kronecker(vt, x),
        lambda c: _kronecker(v, c),
        lambda y: _kronecker(ut, y),
    )


def chained(first: Factors, then: Factors) -> Factors:
    """Return the factors of one Kronecker product followed by another.

    >>> eye, two = torch.eye(1), 2 * torch.eye(1)
    >>> chained((eye, two, eye), (eye, two, two))
    (tensor([[1.]]), tensor([[4.]]), tensor([[2.]]))
    """
    (c, h, w), (c2, h2, w2) = first, then
    return c2 @ c, h2 @ h, w2 @ w


def fourier(transfer: Tensor, shape: Sequence[int]) -> Spectrum:
    """Return the decomposition of a convolution with periodic borders.

    Args:
        transfer: H at the frequencies of `torch.fft.rfft2`, (B or 1, 1, H, W // 2 + 1).
        shape: Shape of the images; the last two numbers are height and width.

    >>> found = fourier(torch.ones(1, 1, 4, 3), (1, 1, 4, 4))  # H = 1: the identity
    >>> bool((found.s - 1).abs().max() < 1e-6)
    True
    """
    gain = transfer.abs()
    phase = torch.where(gain > 0, transfer.conj() / torch.where(gain > 0, gain, 1.0), 0.0)
    size = tuple(shape[-2:])
    return Spectrum(
        gain,
        lambda x: rfft2(x, norm="ortho"),
        lambda c: torch.fft.irfft2(c, s=size, norm="ortho"),
        lambda y: phase * rfft2(y, norm="ortho"),
    )


def dct_matrix(n: int) -> Tensor:
    """Build the orthonormal cosine transform (DCT-II) of length n.

    Args:
        n: Number of samples.

    Returns:
        A matrix of shape (n, n) in float64 with one frequency in each line.

    >>> import torch
    >>> from unmurk.operators.linalg import dct_matrix
    >>> c = dct_matrix(4)
    >>> torch.allclose(c @ c.mT, torch.eye(4, dtype=torch.float64))
    True
    """
    k = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(math.pi / n * k[:, None] * (k[None, :] + 0.5)) * (2 / n) ** 0.5
    waves[0] /= 2**0.5
    return waves


def rfft2(x: Tensor, norm: str = "backward") -> Tensor:
    """Return `torch.fft.rfft2`, which in torch 2.6 fails for expanded tensors on the CPU.

    >>> rfft2(torch.ones(1, 2, 2).expand(3, 2, 2)).real[:, 0, 0]
    tensor([4., 4., 4.])
    """
    return torch.fft.rfft2(x.contiguous(), norm=norm)


def decompose(m: Tensor, shape: Sequence[int], like: Tensor) -> Spectrum:
    """Decompose dense matrices that act on images.

    Args:
        m: Matrices (B or 1, m, d), or one matrix (m, d), with d = C H W.
        shape: Shape (C, H, W) of an image.
        like: A tensor whose type and device the decomposition takes.

    >>> found = decompose(torch.tensor([[0.0, 3.0], [0.0, 0.0]]), (1, 1, 2), torch.zeros(1))
    >>> found.s.flatten().tolist()
    [3.0, 0.0]
    """
    s, ut, vt = _svd(m, like)
    return Spectrum(
        s,
        lambda x: _products(vt, x),
        lambda c: _products(vt.mT, c).reshape(-1, *shape),
        lambda y: _products(ut, y),
    )


def matrix_of(apply: Callable[[Tensor], Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    """Write a linear map on images as a dense matrix, by applying it to every unit image.

    Args:
        apply: The map on batches of images (d, C, H, W) with d = C H W.
        shape: Shape (C, H, W) of an image.
        like: A tensor whose type and device the unit images take.

    Returns:
        The matrix (m, d) in the type of `like`.

    >>> import torch
    >>> from unmurk.operators.linalg import matrix_of
    >>> matrix_of(lambda x: x.sum(-1), (1, 1, 3), torch.zeros(1))
    tensor([[1., 1., 1.]])
    """
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=like.dtype, device=like.device).reshape(size, *shape)
    return apply(basis).reshape(size, -1).T


def _svd(m: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, U^T and V^T of matrices (.., m, n), with n values in s and n rows in U^T."""
    u, values, vt = torch.linalg.svd(m.double())
    rows, columns = m.shape[-2:]
    s, ut = vt.new_zeros(vt.shape[:-1]), vt.new_zeros(*vt.shape[:-1], rows)
    k = min(rows, columns)
    s[..., :k], ut[..., :k, :] = values, u.mT[..., :k, :]
    return s.to(like), ut.to(like), vt.to(like)


def _kronecker(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Apply M_c (x) M_h (x) M_w to a batch of images."""
    channels, rows, columns = factors
    return torch.einsum("ij,bjhw->bihw", channels, rows @ x @ columns.mT)


def _products(m: Tensor, x: Tensor) -> Tensor:
    """Multiply matrices (B or 1, i, j), or one, with the images of a batch of j numbers each."""
    return (m @ x.flatten(1)[..., None])[..., 0]
