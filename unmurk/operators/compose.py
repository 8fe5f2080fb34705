r"""Compositions of forward models: "a|b" measures :math:`y = B(A(x))`.

.. math:: (B A)^T = A^T B^T

The pseudo-inverse of a product is not the product of the pseudo-inverses in reverse order. So
:math:`A^+` and the prox come from conjugate gradients on the product itself. The iterations for
:math:`A^+` stop as early as those of the member that stops earliest, and for the same reason:
inverting small singular values, of a blur for example, would amplify the noise.

**Masks at the end.** For :math:`M A` with a mask M, the conjugate gradients of the prox are
preconditioned by the map that A knows near :math:`(I + \gamma A^T A)^{-1}`. Where
:math:`A A^T = g I`, both maps have closed forms:

.. math::

    (M A)^+ y = A^T M y / g, \qquad
    \mathrm{prox}(z, y, \gamma) = z + \frac{\gamma}{1 + \gamma g} A^T M (y - A z)
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .base import Operator, as_index, not_linear
from .crops import Window
from .inpainting import FixedMask, Inpaint
from .linalg import Factors, chained, conjugate_gradient

__all__ = ["Compose", "Local", "masked"]

MAX_MEMBERS = 16  # operators of a composition


class Local(Operator):
    """Base class of operators that work on crops. A subclass defines `_crop`; see
    `Operator.on_crops`.

    In a local operator, a measured pixel depends on pixels near it only. A composition is local if
    its members are.

    >>> from unmurk.operators import parse
    >>> from unmurk.operators.crops import Crop
    >>> A = parse("blur:uniform,size=3|sr:average,factor=2").on_crops([Crop(0, 8, 8, 32, 32)], 8)
    >>> A.apply_mask(torch.ones(1, 1, 4, 4))[0, 0].int()  # what the crop determines
    tensor([[0, 0, 0, 0],
            [0, 1, 1, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 0]], dtype=torch.int32)
    """

    def _hidden_crop(self, window: Window, hidden: Tensor | None) -> Operator:
        operator, after = self._crop(window)
        return masked(operator, after.measured(hidden), window.channels, window.size)


class Compose(Local):
    """Apply operators one after another. Text form: "blur:gaussian,sigma=1|sr:average,factor=2".

    A composition is linear if all its members are; otherwise only `A` works. Noise enters after
    the last operator, so the last operator decides which entries of y are measured.

    Args:
        members: From 2 to 16 operators; the first is applied first. A composition among them
            counts as its members.

    Attributes:
        members: The operators (A, B, ...).
        shape: Shape (C, H, W) of the images it is bound to, or None.

    Raises:
        InputError: There are fewer than 2 or more than 16 operators.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("colour:grey|sr:average,factor=2")
    >>> A.A(torch.ones(1, 3, 4, 4)).shape
    torch.Size([1, 1, 2, 2])
    >>> A.x_shape((1, 2, 2))
    (3, 4, 4)
    """

    def __init__(self, *members: Operator) -> None:
        flat = [
            part
            for member in members
            for part in (member.members if isinstance(member, Compose) else (member,))
        ]
        if len(flat) < 2:
            raise InputError(f"a composition needs two or more operators, got {len(flat)}")
        if len(flat) > MAX_MEMBERS:
            raise InputError(f"a composition has at most {MAX_MEMBERS} operators, got {len(flat)}")
        self.members: tuple[Operator, ...] = tuple(flat)
        self.shape: tuple[int, ...] | None = None
        self.dagger_iterations = min(member.dagger_iterations for member in self.members)

    @property
    def linear(self) -> bool:
        """Whether all operators are linear."""
        return all(member.linear for member in self.members)

    @property
    def pictorial(self) -> bool:  # type: ignore[override]
        """Whether all operators map images to images."""
        return all(member.pictorial for member in self.members)

    def digests(self) -> dict[str, str]:
        """Return the digests of all members' files; see `Operator.digests`."""
        return {path: value for m in self.members for path, value in m.digests().items()}

    # -- text form -------------------------------------------------------------------------------

    @property
    def spec(self) -> str:
        """The text forms of the operators with "|" between them."""
        return "|".join(member.spec for member in self.members)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compose) and self.members == other.members

    def __hash__(self) -> int:
        return hash(self.members)

    # -- binding to images -----------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Bind every member to the results of the members before it; see `Operator.bind`."""
        numbers, bound = list(index), []
        passed = first = tuple(shape[-3:])
        for member in self.members:
            bound.append(member.bind(numbers, passed))
            passed = bound[-1].y_shape(passed)
        if self.shape == first and all(a is b for a, b in zip(bound, self.members, strict=True)):
            return self  # with its cache
        return self._with(members=tuple(bound), shape=first)

    def index_select(self, positions: Iterable[int] | Tensor) -> Operator:
        """Return the operator of some images of the batch; see `Operator.index_select`."""
        picked = as_index(positions)
        members = tuple(member.index_select(picked) for member in self.members)
        same = all(a is b for a, b in zip(members, self.members, strict=True))
        return self if same else self._with(members=members)

    def to(self, device: str | torch.device) -> Operator:
        """Return the operator with its parameters on a device; see `Operator.to`."""
        members = tuple(member.to(device) for member in self.members)
        same = all(a is b for a, b in zip(members, self.members, strict=True))
        if same and torch.device(device) == self.device:
            return self
        return self._with(members=members, device=torch.device(device))

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        # bound as a whole, so that an iteration does not bind the members again at every step;
        # each member checks its own input
        if self.shape is not None:
            return self
        return self.to(batch.device).bind(range(len(batch)), shape)

    # -- shapes ----------------------------------------------------------------------------------

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one measurement, passed from member to member."""
        shape = tuple(x_shape)
        for member in self.members:
            shape = member.y_shape(shape)
        return shape

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the image, passed from the last member to the first."""
        shape = tuple(y_shape)
        for member in reversed(self.members):
            shape = member.x_shape(shape)
        return shape

    # -- crops -----------------------------------------------------------------------------------

    @property
    def crop_grid(self) -> int:  # type: ignore[override]
        """The positions of crops are multiples of it, for the sake of every member."""
        grid = scale = 1
        for member in self.members:
            grid = math.lcm(grid, scale * member.crop_grid)
            scale *= member._reduction
        return grid

    @property
    def turnable(self) -> bool:  # type: ignore[override]
        """Whether all operators commute with flips and quarter turns."""
        return all(member.turnable for member in self.members)

    @property
    def blurs(self) -> bool:  # type: ignore[override]
        """Whether an operator takes fine detail away."""
        return any(member.blurs for member in self.members)

    @property
    def _reduction(self) -> int:
        return math.prod(member._reduction for member in self.members)

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        members = []
        for member in self.members:
            cropped, window = member._crop(window)
            members.append(cropped)
        return Compose(*members), window

    # -- which entries of y are measured ---------------------------------------------------------

    @property
    def mask(self) -> Tensor | None:
        """The product of the masks on the pixels of x, (B or 1, 1, H, W); None without one.

        A mask after a member that changes the size of the image does not act on these pixels.
        """
        product: Tensor | None = None
        shape = self.shape
        for member in self.members:
            if shape is None or self.shape is None or shape[-2:] != self.shape[-2:]:
                break
            if member.mask is not None:
                product = member.mask if product is None else product * member.mask
            shape = member.y_shape(shape)
        return product

    def apply_mask(self, y: Tensor) -> Tensor:
        """Set the entries of y that the last operator does not measure to zero."""
        return self.members[-1].apply_mask(y)

    # -- the maps --------------------------------------------------------------------------------

    def _A(self, x: Tensor) -> Tensor:
        for member in self.members:
            x = member.A(x)
        return x

    def _A_adjoint(self, y: Tensor) -> Tensor:
        if not self.linear:
            raise not_linear(self.spec, "adjoint, pseudo-inverse or prox")
        for member in reversed(self.members):
            y = member.A_adjoint(y)
        return y

    # -- masks at the end ------------------------------------------------------------------------

    @property
    def orthogonal_rows(self) -> bool:
        """Whether those of the first member are and only masks follow; see
        `Operator.orthogonal_rows`."""
        first = self.members[0]
        complete = type(first).apply_mask is Operator.apply_mask
        return complete and self._masks_follow and first.orthogonal_rows

    @property
    def gram(self) -> float:
        """That of the first member; see `Operator.gram`."""
        return self.members[0].gram if self.orthogonal_rows else super().gram

    @property
    def _masks_follow(self) -> bool:
        """Whether all members after the first one are masks."""
        return all(isinstance(member, Inpaint) for member in self.members[1:])

    def preconditioner(self, like: Tensor, gamma: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the map of the first member if only masks follow; see
        `Operator.preconditioner`."""
        if self._masks_follow and not self._is_factored(like):
            return self.members[0].preconditioner(like, gamma)
        return super().preconditioner(like, gamma)

    def _A_dagger(self, y: Tensor) -> Tensor:
        return self._A_adjoint(y) / self.gram if self.orthogonal_rows else super()._A_dagger(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        if self.orthogonal_rows:
            weight = gamma / (1 + gamma * self.gram)
            return z + weight * self._A_adjoint(y - self._A(z))
        if not self._masks_follow or self._is_factored(z):
            return super()._prox(z, y, gamma)
        step = conjugate_gradient(
            lambda x: x + gamma * self._A_adjoint(self._A(x)),
            gamma * self._A_adjoint(y - self._A(z)),
            precondition=self.preconditioner(z, gamma),
        )
        return z + step

    @property
    def _shared(self) -> bool:
        return all(member._shared for member in self.members)

    def _has_factors(self, shape: tuple[int, ...]) -> bool:
        for member in self.members:
            if not member._has_factors(shape):
                return False
            shape = member.y_shape(shape)
        return True

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        first, *others = self.members
        product, shape = first._factors(shape), first.y_shape(shape)
        for member in others:
            product, shape = chained(product, member._factors(shape)), member.y_shape(shape)
        return product


def masked(
    operator: Operator, masks: Tensor, channels: int | None, size: tuple[int, int]
) -> Operator:
    """Hide pixels of the measurements of an operator that is bound to its images.

    Nonlinear operators stay as they are if nothing is to be hidden, because a composition would
    lose their prox. Linear ones always get their masks: so the result for an image does not depend
    on what is hidden in other images of its batch.

    Args:
        operator: A.
        masks: 0 where a pixel of y is to be hidden, else 1, (B, 1, h, w).
        channels: Number of channels of x, or None.
        size: Height and width of x.

    Returns:
        M A, bound to images of this shape.

    >>> from unmurk.operators import parse
    >>> mask = torch.tensor([[[[1.0, 0.0]]]])
    >>> masked(parse("identity"), mask, 1, (1, 2)).A(torch.full((1, 1, 1, 2), 0.5))
    tensor([[[[0.5000, 0.0000]]]])
    """
    members = list(operator.members if isinstance(operator, Compose) else (operator,))
    masks = masks.to(operator.device)
    last = members[-1]
    if isinstance(last, Inpaint):
        members[-1] = last.hiding(1 - masks)
    elif operator.linear or not bool(masks.all()):
        members.append(FixedMask(masks))
    members = [m for m in members if m.spec != "identity"]
    if len(members) == 1:
        return members[0]
    if channels is None:
        channels = next((m.channels for m in members if hasattr(m, "channels")), 1)
    return Compose(*members)._with(shape=(channels, *size), device=operator.device)
