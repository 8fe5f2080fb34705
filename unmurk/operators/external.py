"""Forward models that users bring: functions, and objects in the dialect of deepinv.

What they lack is made up for. With J the Jacobian of A, autograd gives v -> J^T v without A's
inner workings; for a linear A that is the adjoint, and A^+ and the prox follow from it by
conjugate gradients. Whether a function is linear is found by comparing A(2 u - v / 2) with
2 A(u) - A(v) / 2 for random images u and v, small and large ones.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..devices import physics
from ..errors import InputError
from ..seeds import generator
from .base import Operator, not_linear, per_image

__all__ = ["External", "Function"]

PROBES = (0.1, 3.0)  # sizes of the random images that linearity is tried with
TOLERANCE = 1e-4  # of the mismatch, relative to A(u)


class Function(Operator):
    """A differentiable function as the forward model.

    Args:
        fn: Maps x (B, C, H, W) to y (B, ...), every image for itself. A linear function has
            A_adjoint, A_dagger and prox_l2 too; a nonlinear one raises InputError there.
        linear: Whether it is; None finds out at first use.
        name: What messages and the text form call it.

    The shape of x is learnt from `at` or the latest A(x); an adjoint asked for before that takes
    x to have the shape of y.
    """

    def __init__(
        self, fn: Callable[[Tensor], Tensor], linear: bool | None = None, name: str | None = None
    ) -> None:
        self.fn = fn
        self.name = name or getattr(fn, "__name__", type(fn).__name__)
        self.shape: tuple[int, ...] | None = None
        self._linear = linear

    @property
    def spec(self) -> str:
        """A label. A function cannot be written as text, so `parse` does not read it back."""
        return f"python:{self.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.fn is other.fn

    def __hash__(self) -> int:
        return hash(id(self.fn))

    # -- binding ---------------------------------------------------------------------------------

    def at(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """The operator for images of shape (C, H, W); what it applies is the same for all."""
        return self._with(shape=tuple(shape[-3:]))

    def to(self, device: str | torch.device) -> Operator:
        """The operator with its probes on a device; what the function holds is its own affair."""
        return self._with(device=torch.device(device))

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one measurement, found by applying A to a zero image."""
        with torch.no_grad():
            return tuple(self.fn(self._zeros(1, x_shape)).shape[1:])

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, H, W) of the images it was bound to, else that of y."""
        return self.shape or tuple(y_shape[-3:])

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        self.shape, self.device = tuple(shape[-3:]), batch.device
        return self

    def _zeros(self, batch: int, shape: Sequence[int]) -> Tensor:
        return torch.zeros(batch, *shape[-3:], device=self.device)

    # -- linearity -------------------------------------------------------------------------------

    @property
    def linear(self) -> bool:
        """Whether A is linear, tried out when first asked.

        Raises:
            InputError: if the shape of x is not known yet.
        """
        if self._linear is None:
            if self.shape is None:
                raise InputError(
                    f"{self.spec}: whether it is linear is not known before the image shape is; "
                    f"bind it with at(index, shape)"
                )
            self._linear = self._probe(self.shape)
        return self._linear

    @torch.no_grad()
    def _probe(self, shape: tuple[int, ...]) -> bool:
        stream = generator(0)
        for scale in PROBES:
            u, v = (scale * torch.randn(2, 1, *shape, generator=stream)).to(self.device)
            whole, parts = self.fn(2 * u - 0.5 * v), 2 * self.fn(u) - 0.5 * self.fn(v)
            if not float((whole - parts).norm()) <= TOLERANCE * float(whole.norm()):
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
        return self.fn(x)

    @physics
    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y by autograd. Raises InputError if A is not linear or takes another shape."""
        self._bound(y, self.x_shape(y.shape))
        self._need_linear("A_adjoint")
        return self._A_adjoint(y)

    def A_dagger(self, y: Tensor) -> Tensor:
        """A^+ y by conjugate gradients. Raises InputError if A is not linear."""
        self._bound(y, self.x_shape(y.shape))
        self._need_linear("A_dagger")
        return self._A_dagger(y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        """See `Operator.prox_l2`, by conjugate gradients."""
        self._bound(z, z.shape)
        self._need_linear("prox_l2")
        return self._prox(z, y, per_image(gamma, z))

    def _A_adjoint(self, y: Tensor) -> Tensor:
        shape = self.x_shape(y.shape)
        with torch.enable_grad():
            x = self._zeros(len(y), shape).to(y.dtype).requires_grad_()
            ax = self.fn(x)
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
        obj: A deepinv physics or anything that speaks like one. If it has `take(rows)`, that picks
            its parameters for some rows of a batch; else it is taken to treat all images alike.
    """

    def __init__(self, obj: Any) -> None:
        adjoint = callable(getattr(obj, "A_adjoint", None))
        linear = getattr(obj, "linear", None)
        if not isinstance(linear, bool):
            linear = True if adjoint else None
        super().__init__(obj.A, linear, type(obj).__name__)
        self.obj = obj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, External) and self.obj is other.obj

    def __hash__(self) -> int:
        return hash(id(self.obj))

    def _has(self, name: str) -> bool:
        return callable(getattr(self.obj, name, None))

    def take(self, rows: Iterable[int] | Tensor) -> Operator:
        """The operator of some rows of the batch, if the object can tell them apart."""
        if not self._has("take"):
            return self
        picked = self.obj.take(rows)
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
                return tuple(self.obj.A_adjoint(zeros).shape[1:])
        return super().x_shape(y_shape)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self.obj.A_adjoint(y) if self._has("A_adjoint") else super()._A_adjoint(y)

    def _A_dagger(self, y: Tensor) -> Tensor:
        return self.obj.A_dagger(y) if self._has("A_dagger") else super()._A_dagger(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        # an object's own prox may know one gamma for the whole batch only
        if self._has("prox_l2") and gamma.numel() == 1:
            return self.obj.prox_l2(z, y, float(gamma))
        return super()._prox(z, y, gamma)
