"""Forward models that users bring: matrices, functions, and objects in the dialect of deepinv.

What they lack is made up for. With J the Jacobian of A, autograd gives v -> J^T v without A's
inner workings; for a linear A that is the adjoint, and A^+ and the prox follow from it by
conjugate gradients. Whether a function is linear is found by comparing A(2 u - v / 2) with
2 A(u) - A(v) / 2 for random images u and v, small and large ones.

A matrix M acts on the numbers of an image in the order (C, H, W): A x = M vec(x).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bounds import check_tables
from ..devices import physics
from ..errors import InputError
from ..rng import generator
from .base import Operator, not_linear, per_image
from .linalg import LIMIT, Spectrum, decomposed, dense

__all__ = ["External", "Function", "Matrix"]

PROBES = (0.1, 3.0)  # sizes of the random images that linearity is tried with
TOLERANCE = 1e-4  # of the mismatch, relative to A(u)
CANNOT = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


class Function(Operator):
    """A differentiable function as the forward model.

    Args:
        fn: Maps x (B, C, H, W) to y (B, ...), every image for itself. A linear function has
            A_adjoint, A_dagger and prox_l2 too; a nonlinear one raises InputError there. It may
            compute in double precision only: then it is fed with that, and y has the type of x.
        linear: Whether it is; None finds out at first use.
        name: What messages and the text form call it.

    The shape of x comes from `bind`; where that is not known, x is taken to have the shape of y.
    No call changes the operator.

    Raises:
        InputError: from the maps, where the function fails, returns no tensor with a row for each
            image, or complex numbers.
    """

    def __init__(
        self, fn: Callable[[Tensor], Tensor], linear: bool | None = None, name: str | None = None
    ) -> None:
        self.fn = fn
        self.name = name or getattr(fn, "__name__", type(fn).__name__)
        self.shape: tuple[int, ...] | None = None
        self._linear = linear
        self._found: dict[tuple[int, ...], bool] = {}  # what probes have found, by shape

    @property
    def spec(self) -> str:
        """A label. A function cannot be written as text, so `parse` does not read it back."""
        return f"python:{self.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.fn is other.fn

    def __hash__(self) -> int:
        return hash(id(self.fn))

    # -- binding ---------------------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """The operator for images of shape (C, H, W); what it applies is the same for all."""
        return self._with(shape=tuple(shape[-3:]))

    def to(self, device: str | torch.device) -> Operator:
        """The operator with its probes on a device; what the function holds is its own affair."""
        return self._with(device=torch.device(device))

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one measurement, found by applying A to a zero image."""
        with torch.no_grad():
            return tuple(self._call(self._zeros(1, x_shape)).shape[1:])

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, H, W) of the images it was bound to, else that of y.

        Raises:
            InputError: it is not bound, and measurements of this shape are no images.
        """
        if self.shape is None and len(y_shape) < 3:
            raise InputError(
                f"{self.spec}: the shape of the images behind measurements of shape"
                f" {tuple(y_shape)} is not known: bind it with at(index, shape), or give init="
            )
        return self.shape or tuple(y_shape[-3:])

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        shape = tuple(shape[-3:])
        same = self.shape == shape and self.device == batch.device
        return self if same else self._with(shape=shape, device=batch.device)

    def _zeros(self, batch: int, shape: Sequence[int]) -> Tensor:
        return torch.zeros(batch, *shape[-3:], device=self.device)

    def _call(self, x: Tensor) -> Tensor:
        """The function's y of x, checked, in the type of x."""
        try:
            y = self.fn(x)
        except RuntimeError as error:
            y = self._in_double(x, error)
        if not isinstance(y, Tensor) or y.ndim < 2 or len(y) != len(x) or y.is_complex():
            kind = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise InputError(
                f"{self.spec} maps images {tuple(x.shape)} to {kind}: return real tensors with one"
                " row for each image (complex numbers as two channels)"
            )
        return y.to(x.dtype)

    def _in_double(self, x: Tensor, error: RuntimeError) -> Tensor:
        """The same for a function that computes in double precision only."""
        try:
            if x.dtype == torch.float64:
                raise error
            return self.fn(x.double())
        except RuntimeError:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.spec} fails on images of shape {tuple(x.shape[1:])}: {reason} (if that is"
                " not their shape, bind it with at(index, shape), or give init=)"
            ) from error

    # -- linearity -------------------------------------------------------------------------------

    @property
    def linear(self) -> bool:
        """Whether A is linear, tried out when first asked.

        Raises:
            InputError: if the shape of x is not known yet.
        """
        if self._linear is not None:
            return self._linear
        if self.shape is None:
            raise InputError(
                f"{self.spec}: whether it is linear is not known before the image shape is; "
                f"bind it with at(index, shape)"
            )
        if self.shape not in self._found:
            self._found[self.shape] = self._probe(self.shape)
        return self._found[self.shape]

    @torch.no_grad()
    def _probe(self, shape: tuple[int, ...]) -> bool:
        stream = generator(0)
        for scale in PROBES:
            u, v = (scale * torch.randn(2, 1, *shape, generator=stream)).to(self.device)
            full = self._call(2 * u - 0.5 * v)
            parts = 2 * self._call(u) - 0.5 * self._call(v)
            if not float((full - parts).norm()) <= TOLERANCE * float(full.norm()):
                return False
        return True

    def _has(self, name: str) -> bool:
        """Whether the user's object brings this method itself."""
        return False

    def _need_linear(self, what: str) -> None:
        if not self._has(what) and not self.linear:
            raise not_linear(self.spec, what)

    # -- the four maps ---------------------------------------------------------------------------

    def _A(self, x: Tensor) -> Tensor:
        return self._call(x)

    @physics
    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y by autograd. Raises InputError if A is not linear or takes another shape."""
        return self._ready(y, "A_adjoint")._A_adjoint(y)

    def A_dagger(self, y: Tensor) -> Tensor:
        """A^+ y by conjugate gradients. Raises InputError if A is not linear."""
        return self._ready(y, "A_dagger")._A_dagger(y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        """See `Operator.prox_l2`, by conjugate gradients."""
        bound: Any = self._bound(z, z.shape)
        bound._need_linear("prox_l2")
        return bound._prox(z, y, per_image(gamma, z))

    def _ready(self, y: Tensor, what: str) -> Operator:
        """The operator bound to the images behind y, which has this map."""
        bound: Any = self._bound(y, self.x_shape(y.shape[1:]))
        bound._need_linear(what)
        return bound

    def _A_adjoint(self, y: Tensor) -> Tensor:
        shape = self.x_shape(y.shape[1:])
        with torch.enable_grad():
            x = self._zeros(len(y), shape).to(y.dtype).requires_grad_()
            ax = self._call(x)
            if not ax.requires_grad:
                raise InputError(f"{self.spec} cannot be differentiated; write it with torch")
            if ax.shape != y.shape:
                raise InputError(
                    f"{self.spec} maps an image of shape {shape} to {tuple(ax.shape[1:])} but y "
                    f"is {tuple(y.shape[1:])}; bind it with at(index, shape) of the image"
                )
            (back,) = torch.autograd.grad(ax, x, y, create_graph=y.requires_grad)
        return back


class External(Function):
    """An object with `A`, and with A_adjoint, A_dagger, prox_l2 where it has them.

    Args:
        obj: A deepinv physics or anything that speaks like one. If it has `index_select(rows)`,
            that picks its parameters for some rows of a batch; else it is taken to treat all
            images alike.

    Where the object's own A_dagger or prox_l2 cannot run (that of deepinv's `Downsampling` needs a
    filter), conjugate gradients on its A and A_adjoint compute the same.

    Raises:
        InputError: an object whose `sensor_model` (what deepinv applies after the noise) is not
            the identity: it would be dropped.
    """

    def __init__(self, obj: Any) -> None:
        adjoint = callable(getattr(obj, "A_adjoint", None))
        linear = getattr(obj, "linear", None)
        if not isinstance(linear, bool):
            linear = True if adjoint else None
        super().__init__(obj.A, linear, type(obj).__name__)
        self.obj = obj
        if not _is_identity(getattr(obj, "sensor_model", None)):
            raise InputError(
                f"{self.spec} has a sensor_model, which acts after the noise and would be dropped:"
                " leave it out, or put it into A where the noise comes after it"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, External) and self.obj is other.obj

    def __hash__(self) -> int:
        return hash(id(self.obj))

    def _has(self, name: str) -> bool:
        return callable(getattr(self.obj, name, None))

    def index_select(self, rows: Iterable[int] | Tensor) -> Operator:
        """The operator of some rows of the batch, if the object can tell them apart."""
        if not self._has("take"):
            return self
        picked = self.obj.index_select(rows)
        return self._with(obj=picked, fn=picked.A)

    def to(self, device: str | torch.device) -> Operator:
        """The operator with the object on a device (a torch module is moved in place)."""
        moved = self.obj.to(device) if self._has("to") else self.obj
        return self._with(obj=moved, fn=moved.A, device=torch.device(device))

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, H, W) of x, found by applying the object's own adjoint if need be."""
        if self.shape is None and self._has("A_adjoint"):
            with torch.no_grad():
                zeros = torch.zeros(1, *y_shape[-3:], device=self.device)
                return tuple(self._own("A_adjoint", zeros).shape[1:])
        return super().x_shape(y_shape)

    def _own(self, name: str, *values: Any) -> Tensor:
        """What a method of the object returns. Raises one of `CANNOT` as it does."""
        found = getattr(self.obj, name)(*values)
        if not isinstance(found, Tensor):
            raise TypeError(f"{self.spec}.{name} returns {type(found).__name__}, not a tensor")
        return found.to(values[0].dtype)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        if not self._has("A_adjoint"):
            return super()._A_adjoint(y)
        try:
            return self._own("A_adjoint", y)
        except CANNOT as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"{self.spec}: its A_adjoint fails on measurements of shape"
                f" {tuple(y.shape[1:])}: {reason}"
            ) from error

    def _A_dagger(self, y: Tensor) -> Tensor:
        if self._has("A_dagger"):
            try:
                return self._own("A_dagger", y)
            except CANNOT:
                self._need_adjoint("A_dagger")
        return super()._A_dagger(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        # an object's own prox may know one gamma for the whole batch only, and divide by it
        if self._has("prox_l2") and gamma.numel() == 1 and float(gamma) > 0:
            try:
                return self._own("prox_l2", z, y, float(gamma))
            except CANNOT:
                self._need_adjoint("prox_l2")
        return super()._prox(z, y, gamma)

    def _need_adjoint(self, what: str) -> None:
        """Raises InputError where conjugate gradients cannot stand in for a method that fails."""
        if not self.linear:
            raise InputError(f"{self.spec}: its own {what} fails, and it is not linear")


def _is_identity(fn: Any) -> bool:
    """Whether a function returns what it is given."""
    if fn is None:
        return True
    probe = torch.linspace(-1, 2, 16).reshape(1, 1, 4, 4)
    try:
        found = fn(probe)
    except CANNOT:
        return False
    return isinstance(found, Tensor) and found.shape == probe.shape and torch.equal(found, probe)


class Matrix(Operator):
    """A matrix M (m, d) as the forward model of images of d = C H W numbers: y = M vec(x), (B, m).

    A^T y = M^T y. A^+ and the prox come from the singular value decomposition M = U diag(s) V^T
    where m or d is at most `spectral.LIMIT`, with s below 1e-6 of the largest taken for 0;

        A^+ y = V (U^T y / s),    prox_l2 = z + V [gamma s / (1 + gamma s^2) U^T (y - M z)]

    and from conjugate gradients for larger ones.

    Args:
        matrix: M, a tensor or an array (m, d) of real, finite numbers.

    Raises:
        InputError: another number of axes, complex or non-finite numbers, or a matrix above the
            limit of `bounds.TABLES`.
    """

    pictorial = False

    def __init__(self, matrix: Tensor | np.ndarray) -> None:
        values = torch.as_tensor(matrix)
        if values.ndim != 2 or not values.numel() or values.is_complex():
            raise InputError(
                f"a matrix as operator has shape (m, d), d = C H W numbers of an image, and real"
                f" entries, this one is {values.dtype} {tuple(values.shape)}"
            )
        size = f"{values.shape[0]}x{values.shape[1]}"
        check_tables(
            "matrix", f"a matrix of {size}", 8.0 * values.numel(), "give a function x -> y"
        )
        values = values.detach().double()
        if not bool(values.isfinite().all()):
            raise InputError(f"the matrix of {size} has entries that are not finite")
        self.matrix = values
        self.shape: tuple[int, ...] | None = None

    @property
    def spec(self) -> str:
        """A label. A matrix cannot be written as text, so `parse` does not read it back."""
        return f"python:matrix {self.matrix.shape[0]}x{self.matrix.shape[1]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Matrix) and torch.equal(self.matrix, other.matrix)

    def __hash__(self) -> int:
        return hash(self.spec)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """The operator for images of shape (C, H, W); the same for all numbers."""
        self._check(tuple(shape))
        return self._with(shape=tuple(shape[-3:]))

    def to(self, device: str | torch.device) -> Operator:
        """The operator with its matrix on a device."""
        return self._with(matrix=self.matrix.to(device), device=torch.device(device))

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """(m,)."""
        self._check(tuple(x_shape))
        return (self.matrix.shape[0],)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, H, W) of the images it was bound to. Raises InputError if there is none."""
        if self.shape is None:
            raise InputError(
                f"{self.spec}: images of {self.matrix.shape[1]} numbers may have many shapes: bind"
                " it with at(index, shape), or give init="
            )
        return self.shape

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        shape = tuple(shape[-3:])
        if self.shape == shape and self.matrix.device == batch.device:
            return self
        return self.to(batch.device).bind((), shape)

    def _check(self, shape: tuple[int, ...]) -> None:
        size = math.prod(shape[-3:])
        if size != self.matrix.shape[1]:
            raise InputError(
                f"{self.spec} is for images of {self.matrix.shape[1]} numbers, but those of shape"
                f" {tuple(shape[-3:])} have {size}"
            )

    def _held(self, like: Tensor) -> Tensor:
        """M in the type of a batch."""
        key = "matrix", like.dtype, like.device
        if key not in self._kept:
            self._kept = {**self._kept, key: self.matrix.to(like)}
        return self._kept[key]

    def _A(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self._held(x).mT

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self._held(y)).reshape(-1, *self.x_shape(y.shape))

    def _A_dagger(self, y: Tensor) -> Tensor:
        if not self._small():
            return super()._A_dagger(y)
        found = self._svd(y.new_empty(1, *self.x_shape(y.shape)))
        observed = found.s > 1e-6 * found.s.amax()
        gain = torch.where(observed, 1 / torch.where(observed, found.s, 1.0), 0.0)
        return found.out(gain * found.measured(y))

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        if not self._small():
            return super()._prox(z, y, gamma)
        found = self._svd(z)
        weight = gamma.reshape(-1, 1)
        gain = weight * found.s / (1 + weight * found.s.square())
        return z + found.out(gain * (found.measured(y) - found.s * found.into(z)))

    def _small(self) -> bool:
        return self.matrix.shape[1] <= LIMIT

    def _svd(self, x: Tensor) -> Spectrum:
        if not self._small():
            return dense(self, x)  # says that it is too large
        key = "svd", tuple(x.shape[1:]), x.dtype, x.device
        if key not in self._kept:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # it outlives the mode it is made in
                found = decomposed(self.matrix, tuple(x.shape[1:]), x)
            self._kept = {**self._kept, key: found}
        return self._kept[key]
