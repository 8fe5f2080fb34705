r"""Forward models from outside: functions, and objects with the methods of deepinv.

unmurk adds the maps that they lack. With J the Jacobian of A, autograd gives
:math:`v \mapsto J^T v` without knowing how A works inside. For a linear A this is the adjoint, and
:math:`A^+` and the prox follow from it by conjugate gradients.

Whether a function is linear is decided by comparing :math:`A(2 u - v / 2)` with
:math:`2 A(u) - A(v) / 2` for random images u and v, small and large ones.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..devices import physics
from ..errors import InputError, reason
from ..rng import generator
from .base import CACHED, Operator, not_linear
from .linalg import per_image

__all__ = ["External", "Function"]

PROBES = (0.1, 3.0)  # standard deviations of the random images that probe linearity
TOLERANCE = 1e-4  # of the mismatch, relative to A(u)
FAILURES = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)


class Function(Operator):
    """Use a differentiable function as a forward model.

    A linear function has A_adjoint, A_dagger and prox_l2 too; a nonlinear one raises InputError
    there. A function that works in double precision only is given double precision, and its
    result is converted to the type of x.

    Args:
        fn: Maps x (B, C, H, W) to y (B, ...), each image independently.
        linear: Whether fn is linear. None tests it at first use.
        name: Its name in messages and in the label; None takes the function's own.
        shape: Shape (C, H, W) of the images. None leaves it to `bind`; until then, x is assumed
            to have the shape of y.

    Raises:
        InputError: From the maps: the function fails, or returns complex numbers or something
            other than a tensor with one entry for each image.

    >>> import torch
    >>> from unmurk.operators import as_operator
    >>> A = as_operator(lambda x: 2 * x[..., ::2], shape=(1, 1, 4))
    >>> A.linear
    True
    >>> A.A_adjoint(torch.tensor([[[[1.0, 2.0]]]]))
    tensor([[[[2., 0., 4., 0.]]]])
    """

    extent = "its function may depend on the whole image"

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        linear: bool | None = None,
        name: str | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        self.fn = fn
        self.name = name or getattr(fn, "__name__", type(fn).__name__)
        self.shape: tuple[int, ...] | None = None if shape is None else tuple(shape)
        self._linear = linear
        self._probed: dict[tuple[int, ...], bool] = {}  # results of the test, by image shape

    @property
    def spec(self) -> str:
        """A label. A function has no text form, so `parse` does not read it back."""
        return f"python:{self.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.fn is other.fn

    def __hash__(self) -> int:
        return hash(id(self.fn))

    # -- binding ---------------------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator for images of shape (C, H, W), the same for all images."""
        return self if self.shape == tuple(shape[-3:]) else self._with(shape=tuple(shape[-3:]))

    def to(self, device: str | torch.device) -> Operator:
        """Return the operator for images on a device; tensors that the function uses stay."""
        device = torch.device(device)
        return self if device == self.device else self._with(device=device)

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one measurement, found by applying A to a zero image."""
        with torch.no_grad():
            return tuple(self._call(self._zeros(1, x_shape)).shape[1:])

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the images it is bound to, else that of y.

        Raises:
            InputError: It is not bound, and measurements of this shape are no images.
        """
        if self.shape is None and len(y_shape) < 3:
            raise InputError(
                f"{self.spec}: the shape of the images behind measurements of shape"
                f" {tuple(y_shape)} is not known: give shape=, bind it with bind(index, shape), or"
                " give init= to solve"
            )
        return self.shape or tuple(y_shape[-3:])

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        shape = tuple(shape[-3:])
        same = self.shape == shape and self.device == batch.device
        return self if same else self._with(shape=shape, device=batch.device)

    def _zeros(self, batch: int, shape: Sequence[int]) -> Tensor:
        return torch.zeros(batch, *shape[-3:], device=self.device)

    def _call(self, x: Tensor) -> Tensor:
        """Apply the function, check its result, and convert it to the type of x."""
        try:
            y = self.fn(x)
        except RuntimeError as error:
            y = self._in_double(x, error)
        if not isinstance(y, Tensor) or y.ndim < 2 or len(y) != len(x) or y.is_complex():
            kind = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise InputError(
                f"{self.spec} maps images {tuple(x.shape)} to {kind}: return real tensors with one"
                " entry for each image (complex numbers as two channels)"
            )
        return y.to(x.dtype)

    def _in_double(self, x: Tensor, error: RuntimeError) -> Tensor:
        """Apply a function that works in double precision only."""
        try:
            if x.dtype == torch.float64:
                raise error
            return self.fn(x.double())
        except RuntimeError:
            raise InputError(
                f"{self.spec} fails on images of shape {tuple(x.shape[1:])}: {reason(error)} (if"
                " that is not their shape: give shape=, bind it with bind(index, shape), or give"
                " init= to solve)"
            ) from error

    # -- linearity -------------------------------------------------------------------------------

    @property
    def linear(self) -> bool:
        """Whether A is linear, tested at first use.

        Raises:
            InputError: The shape of the images is not known yet.
        """
        if self._linear is not None:
            return self._linear
        if self.shape is None:
            raise InputError(
                f"{self.spec}: the image shape is needed to test whether it is linear: give"
                " shape=, or bind it with bind(index, shape)"
            )
        found = self._probed.get(self.shape)
        if found is None:
            found = self._probe(self.shape)
            if len(self._probed) >= CACHED:
                self._probed.clear()
            self._probed[self.shape] = found
        return found

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
        """Whether the user's object has this method itself."""
        return False

    def _need_linear(self, what: str) -> None:
        if not self._has(what) and not self.linear:
            raise not_linear(self.spec, what)

    # -- the four maps ---------------------------------------------------------------------------

    def _A(self, x: Tensor) -> Tensor:
        return self._call(x)

    @physics
    def A_adjoint(self, y: Tensor) -> Tensor:
        """Apply :math:`A^T` by autograd; see `Operator.A_adjoint`.

        Raises:
            InputError: A is not linear, cannot be differentiated, or takes another image shape.
        """
        return self._ready(y, "A_adjoint")._A_adjoint(y)

    def A_dagger(self, y: Tensor) -> Tensor:
        """Apply :math:`A^+` by conjugate gradients; see `Operator.A_dagger`."""
        return self._ready(y, "A_dagger")._A_dagger(y)

    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        """Compute the prox by conjugate gradients; see `Operator.prox_l2`."""
        bound: Any = self._bound(z, z.shape)
        bound._need_linear("prox_l2")
        return bound._prox(z, y, per_image(gamma, z))

    def _ready(self, y: Tensor, what: str) -> Operator:
        """The operator bound to the images behind y, checked to have this map."""
        bound: Any = self._bound(y, self.x_shape(y.shape[1:]))
        bound._need_linear(what)
        return bound

    def _A_adjoint(self, y: Tensor) -> Tensor:
        shape = self.x_shape(y.shape[1:])
        with torch.enable_grad():
            x = self._zeros(len(y), shape).to(y.dtype).requires_grad_()
            ax = self._call(x)
            if not ax.requires_grad:
                raise InputError(
                    f"{self.spec} cannot be differentiated: use torch operations only"
                )
            if ax.shape != y.shape:
                raise InputError(
                    f"{self.spec} maps an image of shape {shape} to {tuple(ax.shape[1:])} but y"
                    f" is {tuple(y.shape[1:])}: give shape=, or bind it with bind(index, shape)"
                )
            (back,) = torch.autograd.grad(ax, x, y, create_graph=y.requires_grad)
        return back


class External(Function):
    """Use an object with a method `A`, and with A_adjoint, A_dagger, prox_l2 where it has them.

    Where the object's own A_dagger or prox_l2 fails (that of deepinv's `Downsampling` needs a
    filter), conjugate gradients on its A and A_adjoint compute the same.

    Args:
        obj: A deepinv physics, or an object with the same methods. If it has
            `index_select(positions)`, this method selects its parameters for some images of a
            batch. Otherwise it is assumed to treat all images alike.
        shape: Shape (C, H, W) of the images. None leaves it to `bind`, or to the object's own
            adjoint.

    Raises:
        InputError: The object has a `sensor_model` (which deepinv applies after the noise) other
            than the identity; it would be lost.

    >>> import torch
    >>> from unmurk.operators import as_operator
    >>> class Half:
    ...     def A(self, x):
    ...         return x / 2
    ...     def A_adjoint(self, y):
    ...         return y / 2
    >>> A = as_operator(Half())
    >>> A.spec, A.A_dagger(torch.ones(1, 1, 1, 2))
    ('python:Half', tensor([[[[2., 2.]]]]))
    """

    def __init__(self, obj: Any, shape: Sequence[int] | None = None) -> None:
        adjoint = callable(getattr(obj, "A_adjoint", None))
        linear = getattr(obj, "linear", None)
        if not isinstance(linear, bool):
            linear = True if adjoint else None
        super().__init__(obj.A, linear, type(obj).__name__, shape)
        self.obj = obj
        if not _is_identity(getattr(obj, "sensor_model", None)):
            raise InputError(
                f"{self.spec} has a sensor_model, which acts after the noise and would be lost:"
                " remove it, or make it a part of A if the noise comes after it"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, External) and self.obj is other.obj

    def __hash__(self) -> int:
        return hash(id(self.obj))

    def _has(self, name: str) -> bool:
        return callable(getattr(self.obj, name, None))

    @property
    def _shared(self) -> bool:
        return not self._has("index_select")

    def index_select(self, positions: Iterable[int] | Tensor) -> Operator:
        """Return the operator of some images of the batch, if the object has `index_select`."""
        if not self._has("index_select"):
            return self
        picked = self.obj.index_select(positions)
        return self._with(obj=picked, fn=picked.A)

    def to(self, device: str | torch.device) -> Operator:
        """Return the operator with the object on a device; a torch module is copied there."""
        device = torch.device(device)
        if isinstance(self.obj, torch.nn.Module):
            moved: Any = self._cached(("to", device), lambda: _module_on(self.obj, device))
        else:
            moved = self.obj.to(device) if self._has("to") else self.obj
        if moved is self.obj and device == self.device:
            return self
        return self._with(obj=moved, fn=moved.A, device=device)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of x, found by the object's own adjoint if necessary."""
        if self.shape is None and self._has("A_adjoint"):
            with torch.no_grad():
                zeros = torch.zeros(1, *y_shape[-3:], device=self.device)
                return tuple(self._own("A_adjoint", zeros).shape[1:])
        return super().x_shape(y_shape)

    def _own(self, name: str, *values: Any) -> Tensor:
        """Call a method of the object. Raises one of `FAILURES` if the method fails."""
        found = getattr(self.obj, name)(*values)
        if not isinstance(found, Tensor):
            raise TypeError(f"{self.spec}.{name} returns {type(found).__name__}, not a tensor")
        return found.to(values[0].dtype)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        if not self._has("A_adjoint"):
            return super()._A_adjoint(y)
        try:
            return self._own("A_adjoint", y)
        except FAILURES as error:
            raise InputError(
                f"{self.spec}: its A_adjoint fails on measurements of shape"
                f" {tuple(y.shape[1:])}: {reason(error)}"
            ) from error

    def _A_dagger(self, y: Tensor) -> Tensor:
        if self._has("A_dagger"):
            try:
                return self._own("A_dagger", y)
            except FAILURES:
                self._need_adjoint("A_dagger")
        return super()._A_dagger(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        # an object's own prox may know one gamma for the whole batch only, and divide by it
        if self._has("prox_l2") and gamma.numel() == 1 and float(gamma) > 0:
            try:
                return self._own("prox_l2", z, y, float(gamma))
            except FAILURES:
                self._need_adjoint("prox_l2")
        return super()._prox(z, y, gamma)

    def _need_adjoint(self, what: str) -> None:
        """Raise InputError where conjugate gradients cannot replace a method that fails."""
        if not self.linear:
            raise InputError(f"{self.spec}: its own {what} fails, and it is not linear")


def _module_on(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A copy of a torch module on a device, or the module itself if it is there."""
    tensors = [*module.parameters(), *module.buffers()]
    there = all(tensor.device == device for tensor in tensors)
    return module if there else copy.deepcopy(module).to(device)


def _is_identity(fn: Any) -> bool:
    """Whether a function returns its argument."""
    if fn is None:
        return True
    probe = torch.linspace(-1, 2, 16).reshape(1, 1, 4, 4)
    try:
        found = fn(probe)
    except FAILURES:
        return False
    return isinstance(found, Tensor) and found.shape == probe.shape and torch.equal(found, probe)
