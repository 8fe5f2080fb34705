r"""Compositions of forward models: "a|b" measures :math:`y = B(A(x))`.

.. math:: (B A)^T = A^T B^T

The pseudo-inverse of a product is not the product of the pseudo-inverses in reverse order. So
:math:`A^+` and the prox come from conjugate gradients on the product itself. The iterations for
:math:`A^+` stop as early as those of the member that stops earliest, and for the same reason:
inverting small singular values, of a blur for example, would amplify the noise.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .base import Operator, as_index, not_linear
from .linalg import Factors, chained

__all__ = ["Compose"]

MAX_MEMBERS = 16  # operators of a composition


class Compose(Operator):
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

    @property
    def _shared(self) -> bool:
        return all(member._shared for member in self.members)

    def _factors(self, shape: tuple[int, ...]) -> Factors | None:
        product: Factors | None = None
        for member in self.members:
            factors = member._factors(shape)
            if factors is None:
                return None
            product = factors if product is None else chained(product, factors)
            shape = member.y_shape(shape)
        return product
