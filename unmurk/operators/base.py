"""Forward models: what an imaging system does to an image before noise is added.

A measurement is y = A(x) + sigma n. For a linear A three more maps are needed, all of them
batched over images and in the notation of the deepinv library, so that objects of either library
work in the other:

    A_adjoint     A^T y              <A x, y> = <x, A^T y>
    A_dagger      A^+ y              the least-squares solution of smallest norm
    A_vjp         J(x)^T v           the same as A_adjoint(v) for a linear A
    prox_l2       argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2
                  = (I + gamma A^T A)^-1 (z + gamma A^T y)

Members without a closed form get the last two by conjugate gradients, with separate step sizes
for every image, so that the result for an image does not depend on the batch it is in.

An A that is not linear has no adjoint and no pseudo-inverse. What solvers need of it is autograd
through `A`; a few have the prox in closed form.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bounds import Option
from ..devices import physics
from ..errors import InputError
from .gradients import CG_ITERATIONS, conjugate_gradient, per_image
from .linalg import Factors, Spectrum, dense, factored

__all__ = [
    "NonlinearOperator",
    "Operator",
    "conjugate_gradient",
    "not_linear",
    "per_image",
    "size_text",
]

SMALL_MATRIX = 1024  # numbers in an image whose A is decomposed as a matrix without being asked
FACTORED = 1024  # sides above which small matrices are no longer small


def size_text(size: Sequence[int]) -> str:
    """A size as people write it: (28, 32) -> "28x32"."""
    return "x".join(str(int(n)) for n in size)


class Operator:
    """A forward model A, for batches of images x (B, C, H, W) and measurements y (B, ...).

    Members define `_A`, `_A_adjoint` and, where there is a closed form, `_A_dagger`, `_prox` and
    `_structured` or `_factors`.
    Operators are values: `bind`, `index_select` and `to` return another one and leave this one as
    it is.

    Attributes:
        linear: Whether A is linear.
        ambiguous: Whether A gives the same y for images that `symmetries` knows of.
        form: First word of the text form.
        options: The text form's options by name, with their bounds; each is also an attribute.
        tensors: Names of the attributes that hold parameters of the images, of shape (B, ...), or
            (1, ...) where all images share one; None until `bind` has drawn or read them.
        pictorial: Whether measurements are images in units of [0, 1], which picture files can
            hold; else they are numbers that must not be rescaled.
        dagger_iterations: Conjugate gradients for A^+ stop after so many steps; early where A
            passes much only just, because bringing that back would multiply the noise.
    """

    ambiguous: ClassVar[bool] = False
    form: ClassVar[str] = ""
    options: ClassVar[dict[str, Option]] = {}
    tensors: ClassVar[tuple[str, ...]] = ()
    pictorial: bool = True
    dagger_iterations: int = CG_ITERATIONS
    device: torch.device = torch.device("cpu")
    _kept: dict[Any, Any] = {}

    @property
    def linear(self) -> bool:
        """Whether A is linear."""
        return True

    @property
    def proximal(self) -> bool:
        """Whether there is a `prox_l2`: A is linear, or has it in closed form."""
        return self.linear

    # -- the four maps ---------------------------------------------------------------------------

    @physics
    def A(self, x: Tensor) -> Tensor:
        """The noiseless measurement of x (B, C, H, W)."""
        return self._bound(x, x.shape)._A(x)

    @physics
    def A_adjoint(self, y: Tensor) -> Tensor:
        """A^T y, shape (B, C, H, W). Raises InputError if A is not linear."""
        return self._bound(y, self.x_shape(y.shape))._A_adjoint(y)

    @physics
    def A_dagger(self, y: Tensor) -> Tensor:
        """The pseudo-inverse A^+ y, shape (B, C, H, W). Raises InputError if A is not linear."""
        return self._bound(y, self.x_shape(y.shape))._A_dagger(y)

    @physics
    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """J^T v, with J the Jacobian of A at x (B, C, H, W), for v (B, ...)."""
        if self.linear:
            return self.A_adjoint(v)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.A(x), x, v)[0]

    @physics
    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        """argmin_x gamma/2 ||A x - y||^2 + 1/2 ||x - z||^2, shape of z.

        Args:
            z: Images (B, C, H, W).
            y: Measurements (B, ...).
            gamma: Weight of the data, >= 0; a number, or one for each image, shape (B,).

        Raises:
            InputError: if A is not `proximal`.
        """
        return self._bound(z, z.shape)._prox(z, y, per_image(gamma, z))

    @physics
    def svd(self, x: Tensor) -> Spectrum:
        """The singular value decomposition of A for images like x; see `operators.spectral`.

        Args:
            x: Images (B, C, H, W), of which shape, type and device are taken.

        Raises:
            InputError: if A is not linear, or has no structure to go by and x is large.
        """
        op = self._bound(x, x.shape)
        if not op.linear:
            raise InputError(f"{op.spec} is not linear, so it has no singular values")
        return op._svd(x)

    @physics
    def decomposed(self, x: Tensor) -> Spectrum | None:
        """`svd` where it is at hand: from the structure of A, or from the matrix of small images
        if all images share it. None elsewhere.

        Args:
            x: Images (B, C, H, W), of which shape, type and device are taken.
        """
        op = self._bound(x, x.shape)
        if not op.linear:
            return None
        found = op._structured(x)
        if found is not None or not op._shared or x[0].numel() > SMALL_MATRIX:
            return found
        key = "dense", tuple(x.shape[-3:]), x.dtype, x.device
        if key not in op._kept:
            with torch.inference_mode(False), torch.no_grad():
                op._kept = {**op._kept, key: dense(op, x[:1])}
        return op._kept[key]

    @physics
    def norm(self, x: Tensor, iterations: int = 30) -> Tensor:
        """The largest singular value of a linear A for each image, shape (B,).

        Exact where it is known in closed form or all that are not 0 are equal. Else it comes from
        power iteration on A^T A, and may be a little low.

        Args:
            x: Images (B, C, H, W) with something of every direction in them (noise).
            iterations: Products with A^T A.

        Raises:
            InputError: if A is not linear.
        """
        found = self._bound(x, x.shape)._factored(x)
        if found is not None:
            return found.s.amax().clamp_min(1e-6).expand(len(x))
        for _ in range(iterations):
            x = self.A_adjoint(self.A(x))
            square = x.flatten(1).norm(dim=1).clamp_min(1e-12)  # where nothing is seen, A = 0
            x = x / per_image(square, x)
        return square.sqrt()

    @physics
    def normal(self, x: Tensor) -> Tensor:
        """A^T A x, shape of x: by small matrices where A is a product of such."""
        op = self._bound(x, x.shape)
        found = op._factored(x)
        if found is None:
            return op._A_adjoint(op._A(x))
        return found.out(found.s.square() * found.into(x))

    def near_inverse(self, like: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor] | None:
        """A preconditioner: a symmetric positive map near (I + gamma A^T A)^-1, if one is known.

        Args:
            like: Images (B, C, H, W) of the shape it is for.
            gamma: (B or 1, 1, 1, 1), >= 0.
        """
        found = self._factored(like)
        if found is None:
            return None
        gain = 1 / (1 + gamma * found.s.square())
        return lambda r: found.out(gain * found.into(r))

    # -- binding to images -----------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> "Operator":
        """The operator of the images with these numbers.

        Args:
            index: Numbers of the images, >= 0, one for each row of the batch. Parameters that
                differ from image to image are drawn from (seed, image number), so the same image
                meets the same corruption in any batch.
            shape: Shape (C, H, W) of the images.

        Raises:
            InputError: if the operator does not fit images of this shape.
        """
        return self

    def index_select(self, rows: Iterable[int] | Tensor) -> "Operator":
        """The operator of some rows of the batch; rows may repeat. Self if nothing differs."""
        index = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows)).long()
        held = {name: getattr(self, name) for name in self.tensors}
        own = {name: v for name, v in held.items() if v is not None and len(v) > 1}
        picked = {name: value[index.to(value.device)] for name, value in own.items()}
        return self._with(**picked) if picked else self

    def to(self, device: str | torch.device) -> "Operator":
        """The operator with its parameters on a device; self, with all it keeps, if they are."""
        device = torch.device(device)
        held = [getattr(self, name) for name in self.tensors]
        if device == self.device and all(v is None or v.device == device for v in held):
            return self
        moved = {
            name: getattr(self, name).to(device)
            for name in self.tensors
            if getattr(self, name) is not None
        }
        return self._with(device=device, **moved)

    # -- what y leaves open ----------------------------------------------------------------------

    def symmetries(self, x: Tensor, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The map that makes of images those that A cannot tell from them, nor from each other.

        It takes (B, C, H, W) to (T, B, C, H, W), and white noise to white noise.

        Args:
            x: Images (B, C, H, W) whose twins are looked for.
            like: What the twins should resemble, of the same shape.
        """
        return lambda images: images[None]

    # -- shapes ----------------------------------------------------------------------------------

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one measurement, given that of an image, (C, H, W) or (B, C, H, W)."""
        return tuple(x_shape[-3:])

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, H, W) of the image behind a measurement of this shape, with or without B."""
        return tuple(y_shape[-3:])

    # -- what is seen ----------------------------------------------------------------------------

    @property
    def mask(self) -> Tensor | None:
        """1 where a pixel is seen, 0 where not: (B or 1, 1, H, W), or None without such a mask."""
        return None

    def apply_mask(self, y: Tensor) -> Tensor:
        """y with entries that measure nothing (masked pixels) set to zero."""
        return y

    @property
    def gram(self) -> float | None:
        """g where A A^T = g I on what is seen; None where it is no multiple of I."""
        return None

    def count(self, y: Tensor) -> Tensor:
        """How many numbers each y measures, shape (B,): masked pixels do not count."""
        return self.apply_mask(torch.ones_like(y)).flatten(1).sum(1)

    # -- text form -------------------------------------------------------------------------------

    @property
    def spec(self) -> str:
        """The text form; `parse` reads it back to an equal operator."""
        values = {name: getattr(self, name) for name in self.options}
        parts = [f"{name}={_text(value)}" for name, value in values.items() if value is not None]
        return ",".join([self.form, *parts])

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that the text form names, by its path: what `spec` does not say."""
        path = getattr(self, "path", None)
        if path is None or not Path(path).is_file():
            return {}
        return {str(path): hashlib.sha256(Path(path).read_bytes()).hexdigest()}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Operator) or self.spec != other.spec:
            return False
        return type(self) is type(other) and all(
            _same(getattr(self, name), getattr(other, name)) for name in self.tensors
        )

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return f"<operator {self.spec}>"

    # -- for members -----------------------------------------------------------------------------

    def _take_options(self, **values: Any) -> None:
        """Check the values of options against their bounds, and keep them as attributes.

        Raises:
            InputError: for the first that is out of bounds; the message states these.
        """
        for name, value in values.items():
            setattr(self, name, self.options[name].check(f"{self.form}: {name}", value))

    def _A(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _A_adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _A_dagger(self, y: Tensor) -> Tensor:
        return conjugate_gradient(
            lambda x: self._A_adjoint(self._A(x)), self._A_adjoint(y), self.dagger_iterations
        )

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """`prox_l2` with gamma of shape (B or 1, 1, 1, 1). From z, so that gamma = 0 gives z."""
        found = self._factored(z)
        if found is not None:
            gain = gamma * found.s / (1 + gamma * found.s.square())
            return z + found.out(gain * (found.measured(y) - found.s * found.into(z)))
        step = conjugate_gradient(
            lambda x: x + gamma * self._A_adjoint(self._A(x)),
            gamma * self._A_adjoint(y - self._A(z)),
        )
        return z + step

    def _svd(self, x: Tensor) -> Spectrum:
        found = self._structured(x)
        return dense(self, x) if found is None else found

    @property
    def _shared(self) -> bool:
        """Whether A is the same for all images, whatever they are."""
        return not self.tensors

    def _structured(self, x: Tensor) -> Spectrum | None:
        """The decomposition that the structure of A gives; None if it gives none."""
        return self._factored(x)

    def _factored(self, like: Tensor) -> Spectrum | None:
        """The decomposition by `_factors`, kept for images like these; None if there is none."""
        if max(like.shape[-2:]) > FACTORED:
            return None
        key = tuple(like.shape[-3:]), like.dtype, like.device
        if key not in self._kept:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # it outlives the mode it is made in
                factors = self._factors(key[0])
                found = None if factors is None else factored(factors, like)
            self._kept = {**self._kept, key: found}
        return self._kept[key]

    def _factors(self, shape: tuple[int, ...]) -> Factors | None:
        """A on images of shape (C, H, W) as a Kronecker product, if it is one."""
        return None

    def _with(self, **changes: Any) -> "Operator":
        other = copy.copy(self)
        other.__dict__.update({"_kept": {}} | changes)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_kept"}

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> "Operator":
        """Self, bound to the rows of the batch if that has not been done, and checked."""
        shape = tuple(shape[-3:])
        op = self
        if any(getattr(self, name) is None for name in self.tensors):
            op = self.to(batch.device).bind(range(len(batch)), shape)
        for name in op.tensors:
            rows = len(getattr(op, name))
            if rows > 1 and len(batch) > 1 and rows != len(batch):
                raise InputError(
                    f"{op.form}: it holds the {name} of {rows} images but the batch has "
                    f"{len(batch)}; bind it with at(index, shape) or take(rows)"
                )
        op._check(shape)
        return op

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raise InputError if bound parameters do not fit images of shape (C, H, W)."""


class NonlinearOperator(Operator):
    """A forward model that is not linear: `A`, and autograd through it.

    Members define `_A` and, where the prox is known in closed form, `_prox` with `proximal`.
    """

    @property
    def linear(self) -> bool:
        """False."""
        return False

    def _A_adjoint(self, y: Tensor) -> Tensor:
        raise not_linear(self.spec, "A_adjoint")

    def _A_dagger(self, y: Tensor) -> Tensor:
        raise not_linear(self.spec, "A_dagger")

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        raise not_linear(self.spec, "prox_l2")


def not_linear(spec: str, what: str) -> InputError:
    """What a map that needs a linear A raises for an operator of this text form."""
    return InputError(
        f"{spec} is not linear, so it has no {what}; use a solver that needs only gradients "
        f"through A"
    )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if value[0] == value[-1] else size_text(value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
