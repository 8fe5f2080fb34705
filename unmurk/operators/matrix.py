r"""Matrices as forward models: dense, sparse, or known by their products only.

A matrix M of shape (m, d) acts on images of d = C H W numbers in the order (C, H, W):

.. math:: A x = M \operatorname{vec}(x), \qquad A^T y = M^T y, \qquad y \in \mathbb{R}^m.

With the singular value decomposition :math:`M = U \operatorname{diag}(s) V^T`,

.. math::

    A^+ y = V (U^T y / s), \qquad
    \mathrm{prox}(z, y, \gamma) = z + V \left[ \frac{\gamma s}{1 + \gamma s^2} U^T (y - M z)
    \right],

where s below 1e-6 of the largest counts as 0 in :math:`A^+`. Matrices of more than
`linalg.LIMIT` columns, and maps whose entries are not known, use conjugate gradients instead.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bounds import check_tables, shown
from ..errors import InputError, reason, size_text
from .base import Operator
from .linalg import LIMIT, Spectrum, decompose

__all__ = ["LinearMap", "Matrix", "is_linear_map"]

CUTOFF = 1e-6  # smallest singular value that A^+ inverts, relative to the largest


class VectorOperator(Operator):
    """Base class of linear maps on images that are read as vectors of d = C H W numbers.

    Attributes:
        size: (m, d).
        shape: Shape (C, H, W) of the images, or None if it is not known yet.
    """

    extent = "it is a matrix that acts on the whole image"

    pictorial = False
    size: tuple[int, int]
    shape: tuple[int, ...] | None = None

    def _set_size(self, size: Sequence[int], shape: Sequence[int] | None) -> None:
        self.size = int(size[0]), int(size[1])
        if shape is not None:
            self._check(tuple(shape))
            self.shape = tuple(shape)

    def __hash__(self) -> int:
        return hash(self.spec)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator for images of shape (C, H, W), the same for all images."""
        self._check(tuple(shape))
        return self if self.shape == tuple(shape[-3:]) else self._with(shape=tuple(shape[-3:]))

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (m,)."""
        self._check(tuple(x_shape))
        return (self.size[0],)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the images. Raises InputError if it is not known."""
        if self.shape is None:
            raise InputError(
                f"{self.spec}: images of {self.size[1]} numbers may have many shapes: give shape=,"
                " bind it with bind(index, shape), or give init= to solve"
            )
        return self.shape

    def _check(self, shape: tuple[int, ...]) -> None:
        numbers = math.prod(shape[-3:])
        if numbers != self.size[1]:
            raise InputError(
                f"{self.spec} is for images of {self.size[1]} numbers, but those of shape"
                f" {tuple(shape[-3:])} have {numbers}: give the shape (C, H, W) of its images"
            )

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        return self.to(batch.device).bind((), shape)


class Matrix(VectorOperator):
    """Use a dense matrix M as the forward model of images of d = C H W numbers.

    Args:
        matrix: M, a tensor or an array (m, d) of real, finite numbers. It is copied.
        shape: Shape (C, H, W) of the images. None leaves it to `bind`.

    Raises:
        InputError: The matrix has another number of axes, complex or non-finite numbers, or it is
            above the limit of `bounds.TABLES`; or the shape does not fit.

    >>> import torch
    >>> import unmurk
    >>> A = unmurk.operator(torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]]),
    ...                     shape=(1, 2, 2))
    >>> A.A(torch.arange(4.0).reshape(1, 1, 2, 2))
    tensor([[1., 4.]])
    >>> A.A_adjoint(torch.tensor([[1.0, 1.0]]))
    tensor([[[[1., 1.],
              [2., 0.]]]])
    """

    def __init__(self, matrix: Tensor | np.ndarray, shape: Sequence[int] | None = None) -> None:
        try:
            values = torch.as_tensor(matrix)
        except (TypeError, ValueError) as error:  # an array of objects or of texts
            raise InputError(
                f"a matrix as operator holds real numbers, not {shown(matrix)}"
            ) from error
        if values.ndim != 2 or not values.numel() or values.is_complex():
            raise InputError(
                f"a matrix as operator has shape (m, d), d = C H W numbers of an image, and real"
                f" entries, this one is {values.dtype} {tuple(values.shape)}"
            )
        size = size_text(values.shape)
        check_tables(
            "matrix", f"a matrix of {size}", 8.0 * values.numel(), "give a function x -> y"
        )
        values = values.detach().to_dense().to(torch.float64, copy=True)
        if not bool(values.isfinite().all()):
            raise InputError(f"the matrix of {size} has entries that are not finite: replace them")
        self.values = values
        self._set_size(values.shape, shape)

    @property
    def spec(self) -> str:
        """A label. A matrix has no text form, so `parse` does not read it back."""
        return f"python:matrix {size_text(self.size)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Matrix) and torch.equal(self.values, other.values)

    __hash__ = VectorOperator.__hash__

    def to(self, device: str | torch.device) -> Operator:
        """Return the operator with its matrix on a device."""
        device = torch.device(device)
        if self.values.device == device:
            return self
        return self._with(values=self.values.to(device), device=device)

    def _values_like(self, like: Tensor) -> Tensor:
        """M in the type of a batch."""
        return self._cached(("matrix", like.dtype, like.device), lambda: self.values.to(like))

    def _A(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self._values_like(x).mT

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self._values_like(y)).reshape(-1, *self.x_shape(y.shape))

    def _A_dagger(self, y: Tensor) -> Tensor:
        if self.size[1] > LIMIT:
            return super()._A_dagger(y)
        found = self._svd(y.new_empty(1, *self.x_shape(y.shape)))
        measured = found.s > CUTOFF * found.s.amax()
        gain = torch.where(measured, 1 / torch.where(measured, found.s, 1.0), 0.0)
        return found.out(gain * found.measured(y))

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        if self.size[1] > LIMIT:
            return super()._prox(z, y, gamma)
        found = self._svd(z)
        weight = gamma.reshape(-1, 1)
        gain = weight * found.s / (1 + weight * found.s.square())
        return z + found.out(gain * (found.measured(y) - found.s * found.into(z)))

    def _svd(self, x: Tensor) -> Spectrum:
        if self.size[1] > LIMIT:
            return self._dense(x)  # raises: it is too large
        shape = tuple(x.shape[1:])
        key = "svd", shape, x.dtype, x.device
        return self._cached(key, lambda: decompose(self.values, shape, x))


def is_linear_map(obj: Any) -> bool:
    """Return whether an object is a matrix by its methods: `shape` (m, d), `@`, and `T`.

    This holds for `scipy.sparse` matrices and arrays, `scipy.sparse.linalg.LinearOperator`, and
    the operators of pylops.

    >>> is_linear_map(torch.eye(2)), is_linear_map("identity")
    (True, False)
    """
    shape = getattr(obj, "shape", None)
    named = all(hasattr(type(obj), name) for name in ("__matmul__", "T"))
    return named and isinstance(shape, tuple) and len(shape) == 2


class LinearMap(VectorOperator):
    """Use a sparse matrix, or a scipy `LinearOperator`, as the forward model.

    The object computes its products on the CPU with numpy. Autograd works, because the gradient of
    M x is a product with the transpose.

    Args:
        obj: A real matrix (m, d) with products `obj @ X` and `obj.T @ Y` for numpy arrays.
        shape: Shape (C, H, W) of the images. None leaves it to `bind`.

    Raises:
        InputError: The shape does not fit; from the maps: a product fails (a `LinearOperator`
            without `rmatvec` has no adjoint), or is not real.

    >>> import torch
    >>> import unmurk
    >>> class Twice:  # any object with these three, such as scipy.sparse.diags_array(...)
    ...     shape = (4, 4)
    ...     T = property(lambda self: self)
    ...     def __matmul__(self, x):
    ...         return 2 * x
    >>> A = unmurk.operator(Twice(), shape=(1, 2, 2))
    >>> A.A(torch.ones(1, 1, 2, 2))
    tensor([[2., 2., 2., 2.]])
    >>> A.A_adjoint(torch.ones(1, 4))
    tensor([[[[2., 2.],
              [2., 2.]]]])
    """

    def __init__(self, obj: Any, shape: Sequence[int] | None = None) -> None:
        self.obj = obj
        self._set_size(obj.shape, shape)

    @property
    def spec(self) -> str:
        """A label. The object has no text form, so `parse` does not read it back."""
        return f"python:{type(self.obj).__name__} {size_text(self.obj.shape)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinearMap) and self.obj is other.obj

    __hash__ = VectorOperator.__hash__

    def _A(self, x: Tensor) -> Tensor:
        return _Product.apply(x.flatten(1), self.obj, self.obj.T, self.spec)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        vectors = _Product.apply(y.flatten(1), self.obj.T, self.obj, self.spec)
        return vectors.reshape(-1, *self.x_shape(y.shape))


class _Product(torch.autograd.Function):
    """Multiply vectors (B, n) with a matrix of numpy's kind, with gradients of any order."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, matrix: Any, transpose: Any, spec: str) -> Tensor:
        ctx.saved = matrix, transpose, spec
        try:
            found = np.asarray(matrix @ vectors.detach().cpu().numpy().T)
        except Exception as error:  # whatever the object raises
            raise InputError(
                f"{spec}: a product with it or its transpose fails: {reason(error)}"
            ) from error
        if found.shape != (matrix.shape[0], len(vectors)) or found.dtype.kind not in "fiub":
            raise InputError(
                f"{spec}: a product with it or its transpose is {found.dtype} {found.shape}:"
                " give a real matrix"
            )
        return torch.from_numpy(np.ascontiguousarray(found.T)).to(vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        matrix, transpose, spec = ctx.saved
        return _Product.apply(grad, transpose, matrix, spec), None, None, None
