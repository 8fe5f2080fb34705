r"""The interface of forward models: what an imaging system does to an image before noise is added.

A measurement is :math:`y = A(x) + \sigma n`. Algorithms need A and, where A is linear, a few more
maps. All of them work on batches of images and bear the names of the deepinv library, so that
objects of either library work in the other:

.. math::

    \mathtt{A\_adjoint}(y) &= A^T y, \qquad \langle A x, y \rangle = \langle x, A^T y \rangle \\
    \mathtt{A\_dagger}(y)  &= A^+ y, \quad \text{the least-squares solution of smallest norm} \\
    \mathtt{A\_vjp}(x, v)  &= J(x)^T v, \quad \text{equal to } A^T v \text{ for a linear } A \\
    \mathtt{prox\_l2}(z, y, \gamma)
        &= \arg\min_x \tfrac{\gamma}{2} \|A x - y\|^2 + \tfrac{1}{2} \|x - z\|^2 \\
        &= (I + \gamma A^T A)^{-1} (z + \gamma A^T y)

An operator without a closed form gets :math:`A^+` and the prox by conjugate gradients, with
separate step sizes for every image. So the result for an image does not depend on its batch.

An A that is not linear has no adjoint and no pseudo-inverse. Solvers differentiate through `A`
instead; a few nonlinear operators have the prox in closed form.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bounds import Option
from ..devices import physics
from ..errors import InputError, size_text
from ..io.limits import file_digest
from .crops import Crop, Window
from .linalg import (
    CG_ITERATIONS,
    LIMIT,
    Factors,
    Spectrum,
    conjugate_gradient,
    decompose,
    factored,
    matrix_of,
    per_image,
)

__all__ = [
    "NonlinearOperator",
    "Operator",
    "as_index",
    "conjugate_gradient",
    "not_linear",
    "per_image",
]

SMALL_MATRIX = 1024  # numbers in an image whose A is decomposed as a matrix without being asked
FACTORED = 1024  # pixels of a side above which the matrices of a Kronecker product are not small
CACHED = 16  # entries of an operator's cache


class Operator:
    """A forward model A for batches of images x (B, C, H, W) and measurements y (B, ...).

    A subclass defines `_A` and `_A_adjoint`, and where it has closed forms also `_A_dagger`,
    `_prox`, and `_structured` (with `_has_structure`) or `_factors` (with `_has_factors`). These
    private methods get operators that are bound and checked.

    Operators are values: no call changes one. `bind`, `index_select` and `to` return another
    operator. What an operator caches (decompositions, by image size) never changes a result.

    Attributes:
        ambiguous: Whether A gives the same y for several images that `symmetries` knows.
        form: First word of the text form.
        options: The options of the text form by name, with their bounds. Each is an attribute too.
        tensors: Names of the attributes that hold parameters of the images, of shape (B, ...), or
            (1, ...) where all images share one. They are None until `bind` draws or reads them.
        pictorial: Whether measurements are images in units of [0, 1], which picture files can
            hold. Other measurements are numbers that must not be rescaled.
        dagger_iterations: The largest number of conjugate gradient iterations for
            :math:`A^+`. It is small where A has small singular values: inverting them would
            amplify the noise.
        device: Where the parameters are.
        crop_grid: The positions of crops are multiples of it, in pixels of x; see `on_crops`.
        turnable: Whether crops may be flipped and turned: with its masks and weights turned too, A
            commutes with the eight orientations of a square.
        blurs: Whether A takes fine detail away everywhere and leaves what is coarse, so that less
            of it is missing in images at half scale.
        extent: Why A has no model on crops, for messages.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("sr:average,factor=2")
    >>> A.A(torch.arange(4.0).reshape(1, 1, 2, 2))
    tensor([[[[1.5000]]]])
    >>> A.spec, A.linear, A.y_shape((3, 8, 6))
    ('sr:average,factor=2', True, (3, 4, 3))
    """

    ambiguous: ClassVar[bool] = False
    form: ClassVar[str] = ""
    options: ClassVar[dict[str, Option]] = {}
    tensors: ClassVar[tuple[str, ...]] = ()
    pictorial: bool = True
    dagger_iterations: int = CG_ITERATIONS
    device: torch.device = torch.device("cpu")
    crop_grid: int = 1
    turnable: bool = False
    blurs: bool = False
    extent: ClassVar[str] = "its measurements may depend on all pixels of the image"
    _cache: dict[Any, Any] = {}

    @property
    def linear(self) -> bool:
        """Whether A is linear."""
        return True

    @property
    def proximal(self) -> bool:
        """Whether `prox_l2` exists: A is linear, or has the prox in closed form."""
        return self.linear

    # -- the maps --------------------------------------------------------------------------------

    @physics
    def A(self, x: Tensor) -> Tensor:
        """Compute the noiseless measurements of images.

        Args:
            x: Images (B, C, H, W).

        Returns:
            Measurements (B, ...) in the type of x.

        Raises:
            InputError: The operator does not fit images of this shape.
        """
        return self._bound(x, x.shape)._A(x)

    @physics
    def A_adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint :math:`A^T` to measurements (B, ...).

        Returns:
            Images (B, C, H, W).

        Raises:
            InputError: A is not linear.
        """
        return self._bound(y, self.x_shape(y.shape))._A_adjoint(y)

    @physics
    def A_dagger(self, y: Tensor) -> Tensor:
        """Apply the pseudo-inverse :math:`A^+` to measurements (B, ...).

        Returns:
            Images (B, C, H, W).

        Raises:
            InputError: A is not linear.
        """
        return self._bound(y, self.x_shape(y.shape))._A_dagger(y)

    @physics
    def A_vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the transposed Jacobian of A at x (B, C, H, W) to v (B, ...).

        Returns:
            :math:`J(x)^T v`, shape of x.
        """
        if self.linear:
            return self.A_adjoint(v)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.A(x), x, v)[0]

    @physics
    def prox_l2(self, z: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        r"""Compute the proximal operator of the data term.

        .. math:: \arg\min_x \tfrac{\gamma}{2} \|A x - y\|^2 + \tfrac{1}{2} \|x - z\|^2

        Args:
            z: Images (B, C, H, W).
            y: Measurements (B, ...).
            gamma: Weight of the data, >= 0; a number, or one for each image, shape (B,).

        Returns:
            The minimizer, shape of z.

        Raises:
            InputError: The operator is not `proximal`.
        """
        return self._bound(z, z.shape)._prox(z, y, per_image(gamma, z))

    @physics
    def normal(self, x: Tensor) -> Tensor:
        """Apply :math:`A^T A` to images (B, C, H, W).

        Kronecker products use their small matrices.
        """
        op = self._bound(x, x.shape)
        if not op._is_factored(x):
            return op._A_adjoint(op._A(x))
        found = op._factored(x)
        return found.out(found.s.square() * found.into(x))

    # -- decompositions --------------------------------------------------------------------------

    @physics
    def svd(self, x: Tensor) -> Spectrum:
        """Return the singular value decomposition of A for images like x; see `linalg.Spectrum`.

        It is cheap where `has_cheap_svd`.

        Args:
            x: Images (B, C, H, W), which give shape, type and device.

        Raises:
            InputError: A is not linear, or it has no known structure and x is large.
        """
        op = self._bound(x, x.shape)
        if not op.linear:
            raise InputError(f"{op.spec} is not linear, so it has no singular values")
        if op._has_structure(x):
            return op._structured(x)
        if not op._is_small(x):
            return op._svd(x)
        key = "dense", tuple(x.shape[-3:]), x.dtype, x.device
        return op._cached(key, lambda: op._svd(x[:1]))

    @physics
    def has_cheap_svd(self, x: Tensor) -> bool:
        """Whether the structure of A gives `svd`, or the images are small (at most 1,024 numbers)
        and all share one linear A.

        Args:
            x: Images (B, C, H, W), which give shape, type and device.

        >>> import torch
        >>> from unmurk.operators import parse
        >>> parse("blur:gaussian,sigma=2").has_cheap_svd(torch.zeros(1, 1, 64, 64))
        True
        """
        op = self._bound(x, x.shape)
        return op.linear and (op._has_structure(x) or op._is_small(x))

    def matrix(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Write a linear operator as dense matrices in double precision.

        Args:
            shape: Shape (C, H, W) of an image.
            like: A batch (B, ...). The operator is bound to its images; its type and device are
                those of the unit images that the operator is applied to.

        Returns:
            (B, m, d) with d = C H W, or (1, m, d) where all images share one operator.

        >>> import torch
        >>> from unmurk.operators import parse
        >>> parse("sr:average,factor=2").matrix((1, 2, 2), torch.zeros(1, 1, 1, 1))
        tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]], dtype=torch.float64)
        """
        size = torch.Size(shape).numel()
        index = [0] if self.index_select([0]) is self else range(len(like))
        each = [matrix_of(self.index_select([i] * size).A, shape, like) for i in index]
        return torch.stack(each).double()

    @physics
    def norm(self, x: Tensor, iterations: int = 30) -> Tensor:
        """Return the operator norm: the largest singular value of a linear A, shape (B,).

        The value is exact for Kronecker products and where all singular values that are not 0 are
        equal. Elsewhere it comes from power iteration on :math:`A^T A`, and may be a little low.

        Args:
            x: Images (B, C, H, W) that have a part in every direction, such as white noise.
            iterations: Number of products with :math:`A^T A`.

        Raises:
            InputError: A is not linear.
        """
        op = self._bound(x, x.shape)
        if op._is_factored(x):
            return op._factored(x).s.amax().clamp_min(1e-6).expand(len(x))
        for _ in range(iterations):
            x = self.A_adjoint(self.A(x))
            square = x.flatten(1).norm(dim=1).clamp_min(1e-12)  # A = 0 where nothing is measured
            x = x / per_image(square, x)
        return square.sqrt()

    def preconditioner(self, like: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        r"""Return a symmetric positive map near :math:`(I + \gamma A^T A)^{-1}`.

        Where the structure of A gives none, it is the identity.

        Args:
            like: Images (B, C, H, W) of the shape that the map is for.
            gamma: Weights (B or 1, 1, 1, 1), >= 0.
        """
        if not self._is_factored(like):
            return lambda r: r
        found = self._factored(like)
        gain = 1 / (1 + gamma * found.s.square())
        return lambda r: found.out(gain * found.into(r))

    # -- binding to images -----------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> "Operator":
        """Return the operator of the images with these numbers.

        Args:
            index: Numbers of the images, >= 0, one for each image of the batch. Parameters that
                differ from image to image are drawn from (seed, image number), so the same image
                gets the same corruption in any batch.
            shape: Shape (C, H, W) of the images.

        Raises:
            InputError: The operator does not fit images of this shape.

        >>> from unmurk.operators import parse
        >>> bound = parse("inpaint:box,size=2,seed=0").bind([3, 7], (1, 4, 4))
        >>> bound.mask.shape
        torch.Size([2, 1, 4, 4])
        """
        return self

    def index_select(self, positions: Iterable[int] | Tensor) -> "Operator":
        """Return the operator of some images of the batch.

        Args:
            positions: Positions in the batch; they may repeat.

        Returns:
            The operator, or self where all images share one.
        """
        index = as_index(positions)
        values = {name: getattr(self, name) for name in self.tensors}
        own = {name: v for name, v in values.items() if v is not None and len(v) > 1}
        picked = {name: value[index.to(value.device)] for name, value in own.items()}
        return self._with(**picked) if picked else self

    def to(self, device: str | torch.device) -> "Operator":
        """Return the operator with its parameters on a device; self if they are there."""
        device = torch.device(device)
        values = {name: getattr(self, name) for name in self.tensors}
        own = {name: v for name, v in values.items() if v is not None}
        if device == self.device and all(v.device == device for v in own.values()):
            return self
        return self._with(device=device, **{name: v.to(device) for name, v in own.items()})

    # -- crops -----------------------------------------------------------------------------------

    def on_crops(
        self,
        crops: Sequence[Crop],
        side: int | tuple[int, int],
        hidden: Tensor | None = None,
        channels: int | None = None,
    ) -> "Operator":
        """Return the operator of a batch of crops, instead of their images; see `crops`.

        It measures those pixels of the crops of y that the crops of x determine. The others count
        as hidden: `apply_mask` sets them to zero, and `count` leaves them out.

        Args:
            crops: The places of the crops, one for each image of the batch. Their turns, not 0,
                need an operator that is `turnable`.
            side: Side of the crops of x in pixels, or height and width.
            hidden: Not 0 where a pixel of the crops of y, as they are turned, is to be hidden too,
                (B, 1, h, w).
            channels: Number of channels of x. Without it, an operator whose margin depends on the
                channels (color JPEG) takes the wider one.

        Raises:
            InputError: A depends on the whole image, it leaves nothing of crops of this size, it
                cannot be turned, a crop is not on the grid, or A is bound to images already.

        >>> from unmurk.operators import parse
        >>> from unmurk.operators.crops import Crop
        >>> A = parse("blur:uniform,size=3").on_crops([Crop(0, 0, 8, 32, 32)], 8)
        >>> A.mask[0, 0].int()[:, :4]
        tensor([[0, 1, 1, 1],
                [0, 1, 1, 1],
                [0, 1, 1, 1],
                [0, 1, 1, 1],
                [0, 1, 1, 1],
                [0, 1, 1, 1],
                [0, 1, 1, 1],
                [0, 0, 0, 0]], dtype=torch.int32)
        """
        if type(self)._crop is Operator._crop:
            raise self._whole_only()
        return self._hidden_crop(self._window(crops, side, channels), hidden)

    def _hidden_crop(self, window: Window, hidden: Tensor | None) -> "Operator":
        """The operator on crops of the image, whose y leaves out what is hidden or unknown."""
        raise self._whole_only()

    def _crop(self, window: Window) -> tuple["Operator", Window]:
        """The operator on crops, border model and turns included, and the window after it."""
        raise self._whole_only()

    @property
    def _reduction(self) -> int:
        """Pixels of x along each axis for a pixel of y."""
        return 1

    def _whole_only(self) -> InputError:
        return InputError(
            f"operator '{self.spec}' does not work on crops, because {self.extent}: use whole"
            " images (--crop 0)"
        )

    def _window(
        self, crops: Sequence[Crop], side: int | tuple[int, int], channels: int | None
    ) -> Window:
        """The window of crops that this operator can take."""
        window = Window.of(crops, side, channels)
        grid = self.crop_grid
        if any(c.top % grid or c.left % grid for c in crops):
            raise InputError(
                f"operator '{self.spec}' takes crops whose first rows and columns are multiples of"
                f" {grid}"
            )
        if window.turned and not self.turnable:
            raise InputError(
                f"operator '{self.spec}' does not commute with flips and quarter turns: leave the"
                " crops as they are (--augment off)"
            )
        return window

    # -- what y does not determine ---------------------------------------------------------------

    def symmetries(self, x: Tensor, like: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the map from images to all images that have the same measurement.

        The map takes (B, C, H, W) to (T, B, C, H, W), and white noise to white noise.

        Args:
            x: Images (B, C, H, W) whose equivalent images are wanted.
            like: Images of the same shape that the equivalent images should be aligned with.
        """
        return lambda images: images[None]

    # -- shapes ----------------------------------------------------------------------------------

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one measurement of an image (C, H, W) or of a batch (B, C, H, W)."""
        return tuple(x_shape[-3:])

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the image behind a measurement, with or without B."""
        return tuple(y_shape[-3:])

    # -- which entries of y are measured ---------------------------------------------------------

    @property
    def mask(self) -> Tensor | None:
        """1 where a pixel is measured and 0 where it is hidden, (B or 1, 1, H, W); None if A has
        no such mask."""
        return None

    def apply_mask(self, y: Tensor) -> Tensor:
        """Set the entries of y (B, ...) that measure nothing, such as hidden pixels, to zero."""
        return y

    @property
    def orthogonal_rows(self) -> bool:
        """Whether :math:`A A^T = g I` on the measured entries, with the number `gram`."""
        return False

    @property
    def gram(self) -> float:
        """The number g of `orthogonal_rows`.

        Raises:
            InputError: The rows of A are not orthogonal, or differ in length.
        """
        raise InputError(f"the rows of {self.spec} are not orthogonal and of one length")

    def count(self, y: Tensor) -> Tensor:
        """Count the numbers that each y measures, shape (B,): hidden pixels do not count."""
        return self.apply_mask(torch.ones_like(y)).flatten(1).sum(1)

    # -- text form -------------------------------------------------------------------------------

    @property
    def spec(self) -> str:
        """The text form; `parse` reads it back to an equal operator."""
        values = {name: getattr(self, name) for name in self.options}
        parts = [f"{name}={_text(value)}" for name, value in values.items() if value is not None]
        return ",".join([self.form, *parts])

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that the text form names, by path: `spec` holds the path only."""
        path = getattr(self, "path", None)
        if path is None or not Path(path).is_file():
            return {}
        return {str(path): file_digest(Path(path))}

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

    # -- for subclasses --------------------------------------------------------------------------

    def _take_options(self, **values: Any) -> None:
        """Check options against their bounds and keep them as attributes.

        Raises:
            InputError: An option is out of its bounds. The message states the bounds.
        """
        for name, value in values.items():
            setattr(self, name, self.options[name].check(f"{self.form}: {name}", value))

    def _A(self, x: Tensor) -> Tensor:
        raise InputError(f"operator {self.spec} has no map A: define _A(self, x)")

    def _A_adjoint(self, y: Tensor) -> Tensor:
        raise InputError(
            f"operator {self.spec} has no adjoint: define _A_adjoint(self, y), or derive the class"
            " from NonlinearOperator"
        )

    def _A_dagger(self, y: Tensor) -> Tensor:
        return conjugate_gradient(
            lambda x: self._A_adjoint(self._A(x)), self._A_adjoint(y), self.dagger_iterations
        )

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """`prox_l2` with gamma of shape (B or 1, 1, 1, 1), as a step from z: gamma = 0 gives z."""
        if self._is_factored(z):
            found = self._factored(z)
            gain = gamma * found.s / (1 + gamma * found.s.square())
            return z + found.out(gain * (found.measured(y) - found.s * found.into(z)))
        step = conjugate_gradient(
            lambda x: x + gamma * self._A_adjoint(self._A(x)),
            gamma * self._A_adjoint(y - self._A(z)),
        )
        return z + step

    def _svd(self, x: Tensor) -> Spectrum:
        return self._structured(x) if self._has_structure(x) else self._dense(x)

    @property
    def _shared(self) -> bool:
        """Whether A is the same for all images, whatever their numbers are."""
        return not self.tensors

    def _is_small(self, x: Tensor) -> bool:
        """Whether one dense decomposition serves all images like x, and takes little time."""
        return self._shared and x[0].numel() <= SMALL_MATRIX

    def _has_structure(self, x: Tensor) -> bool:
        """Whether the structure of A gives a decomposition, `_structured`."""
        return self._is_factored(x)

    def _structured(self, x: Tensor) -> Spectrum:
        """The decomposition that the structure of A gives, where it gives one."""
        return self._factored(x)

    def _is_factored(self, like: Tensor) -> bool:
        """Whether A is a Kronecker product of matrices that are small for images like these."""
        return max(like.shape[-2:]) <= FACTORED and self._has_factors(tuple(like.shape[-3:]))

    def _factored(self, like: Tensor) -> Spectrum:
        """The decomposition by `_factors`, cached for images like these."""
        shape = tuple(like.shape[-3:])
        key = shape, like.dtype, like.device
        return self._cached(key, lambda: factored(self._factors(shape), like))

    def _has_factors(self, shape: tuple[int, ...]) -> bool:
        """Whether A on images of shape (C, H, W) is a Kronecker product, `_factors`."""
        return False

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        """The matrices of A on channels, rows and columns of images (C, H, W)."""
        raise NotImplementedError

    def _dense(self, x: Tensor) -> Spectrum:
        """The decomposition of the matrix of A for images (B, C, H, W) of at most LIMIT numbers.

        Raises:
            InputError: The images are larger.
        """
        shape = x.shape[1:]
        if shape.numel() > LIMIT:
            raise InputError(
                f"operator '{self.spec}' has no known singular value decomposition for images of"
                f" {shape.numel()} numbers, above {LIMIT}: use ddnm, diffpir or pnp-dm"
            )
        return decompose(self.matrix(shape, x), tuple(shape), x)

    def _cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value for a key, which must decide it; the newest `CACHED` values are kept."""
        if key in self._cache:
            return self._cache[key]
        with torch.inference_mode(False), torch.no_grad():  # the value outlives the caller's mode
            value = make()
        self._cache = dict([*self._cache.items(), (key, value)][-CACHED:])
        return value

    def _with(self, **changes: Any) -> "Operator":
        """A copy with other attributes and an empty cache."""
        other = copy.copy(self)
        other.__dict__.update({"_cache": {}} | changes)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_cache"}

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> "Operator":
        """Self, bound to the images 0, 1, ... of the batch if it is not bound, and checked."""
        shape = tuple(shape[-3:])
        op = self
        if any(getattr(self, name) is None for name in self.tensors):
            op = self.to(batch.device).bind(range(len(batch)), shape)
        for name in op.tensors:
            images = len(getattr(op, name))
            if images > 1 and len(batch) > 1 and images != len(batch):
                raise InputError(
                    f"{op.form}: it holds the {name} of {images} images but the batch has"
                    f" {len(batch)}: use bind(index, shape) or index_select(positions)"
                )
        op._check(shape)
        return op

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raise InputError if the bound parameters do not fit images of shape (C, H, W)."""


class NonlinearOperator(Operator):
    """A forward model that is not linear, with autograd through `A`.

    A subclass defines `_A`. Where the prox is known in closed form, it defines `_prox` and a
    `proximal` that is True.

    >>> from unmurk.operators import parse
    >>> A = parse("hdr:clip,factor=2")
    >>> A.A_vjp(torch.tensor([[[[0.5, 0.9]]]]), torch.ones(1, 1, 1, 2))  # saturated: no gradient
    tensor([[[[2., 0.]]]])
    >>> A.linear, A.proximal
    (False, True)
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


def as_index(positions: Iterable[int] | Tensor) -> Tensor:
    """Convert positions in a batch to a tensor of integers.

    >>> as_index(range(3))
    tensor([0, 1, 2])
    """
    return torch.as_tensor(positions if isinstance(positions, Tensor) else list(positions)).long()


def not_linear(spec: str, what: str) -> InputError:
    """Return the error of a map that needs a linear A, for an operator of this text form.

    >>> raise not_linear("hdr:clip,factor=2", "A_adjoint")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: hdr:clip,factor=2 is not linear, so it has no A_adjoint: ...
    """
    return InputError(
        f"{spec} is not linear, so it has no {what}: use a solver that needs only gradients"
        f" through A"
    )


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if value[0] == value[-1] else size_text(value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)
