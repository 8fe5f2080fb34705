r"""Compressed sensing: a few random linear measurements of the whole image.

A structured random matrix acts on every channel,

.. math:: A x = m \odot T (d \odot x),

where d holds random signs +1 and -1, one for each pixel; T is the two-dimensional discrete Hartley
transform, :math:`\operatorname{Re} F - \operatorname{Im} F` with F the orthonormal Fourier
transform, so :math:`T = T^T = T^{-1}`; and m is a random mask of zeros and ones that keeps `ratio`
of the coefficients.

T. T. Do, L. Gan, N. H. Nguyen and T. D. Tran (2012), "Fast and efficient compressive sensing using
structurally random matrices", arXiv 1106.5037, with their "local randomiser" d and without their
factor sqrt(n / measurements). T is that of R. N. Bracewell (1983), "Discrete Hartley transform":
it is real, its own inverse, and as fast as F for images of any size. Only d and m are stored.

The rows of T d are orthonormal, so :math:`A A^T = m`, all singular values are 1, and

.. math::

    A^T y = A^+ y = d \odot T (m \odot y), \qquad
    \mathrm{prox}(z, y, \gamma) = z + \frac{\gamma}{1 + \gamma} A^T (y - A z).

Measurements keep the shape of the image, as those of inpainting do, so y alone tells the size of
the image. A coefficient that is not selected holds zero, carries no noise and does not count.
"""

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import SEED, Option, Real, check_tables
from ..errors import InputError, size_text
from ..rng import StreamId, generator
from .base import Operator

__all__ = ["StructuredSensing"]


class StructuredSensing(Operator):
    """Measure a random subset of the coefficients of the image in a random basis.

    Text form: "cs:structured,ratio=0.25,seed=0". All images and channels share one matrix.

    Args:
        ratio: Number of measurements as a fraction of the pixels of a channel, a number from 1e-06
            to 1; there is at least one measurement.
        seed: Seed of the matrix, a whole number from 0 to 9223372036854775807.

    Attributes:
        signs: d, (1, 1, H, W); None before `bind`.
        selected: m, (1, 1, H, W); None before `bind`.

    Raises:
        InputError: An option is out of its bounds; from `bind`, the images are above the limit of
            `bounds.TABLES`.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("cs:structured,ratio=0.25")
    >>> A.count(A.A(torch.rand(1, 1, 8, 8)))
    tensor([16.])
    """

    form = "cs:structured"
    extent = "every measurement mixes all pixels of the image"
    pictorial = False
    options: ClassVar[dict[str, Option]] = {"ratio": Real(1e-6, 1), "seed": SEED}
    ratio: float
    seed: int
    tensors = ("signs", "selected")
    signs: Tensor | None = None
    selected: Tensor | None = None

    def __init__(self, ratio: float, seed: int = 0) -> None:
        self._take_options(ratio=ratio, seed=seed)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator with the matrix for images of this size, the same for all images."""
        size = (1, 1, *shape[-2:])
        pixels = shape[-2] * shape[-1]
        check_tables(
            self.form,
            f"the matrix for images of {size_text(shape[-2:])}",
            24.0 * pixels,  # signs, mask, and the order that the mask is drawn by
            "use smaller images",
        )
        stream = generator(self.seed, StreamId.MASK)
        signs = 2.0 * torch.randint(2, size, generator=stream) - 1
        selected = torch.zeros(pixels)
        selected[
            torch.randperm(pixels, generator=stream)[: max(1, round(self.ratio * pixels))]
        ] = 1
        return self._with(
            signs=signs.to(self.device), selected=selected.reshape(size).to(self.device)
        )

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.selected is not None
        if self.selected.shape[-2:] != tuple(shape[-2:]):
            raise InputError(
                f"{self.form}: the matrix is for images of {size_text(self.selected.shape[-2:])}"
                f" but this one is {size_text(shape[-2:])}: bind it again with bind(index, shape)"
            )

    def apply_mask(self, y: Tensor) -> Tensor:
        """Set the coefficients of y that are not selected to zero."""
        op = self._bound(y, y.shape)
        assert isinstance(op, StructuredSensing) and op.selected is not None
        return torch.where(op.selected > 0, y, torch.zeros((), dtype=y.dtype, device=y.device))

    def _A(self, x: Tensor) -> Tensor:
        assert self.signs is not None and self.selected is not None
        return self.selected * _hartley(self.signs * x)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        assert self.signs is not None
        return self.signs * _hartley(self.apply_mask(y))

    def _A_dagger(self, y: Tensor) -> Tensor:
        return self._A_adjoint(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return z + gamma / (1 + gamma) * self._A_adjoint(y - self._A(z))


def _hartley(x: Tensor) -> Tensor:
    """Apply T over the last two axes."""
    spectrum = torch.fft.fft2(x, norm="ortho")
    return spectrum.real - spectrum.imag
