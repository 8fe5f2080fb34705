"""One forward model after another: "a|b" measures y = B(A(x)).

    (B A)^T = A^T B^T

The pseudo-inverse of a product is not the product of the pseudo-inverses in reverse order, so A^+
and the prox come from conjugate gradients on the product itself. Those of A^+ stop as early as
those of the operator among them that stops earliest, and to the same end: to bring back what
hardly passes, through a blur for example, would multiply the noise.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .base import Operator, not_linear
from .linalg import Factors, chained

__all__ = ["Compose"]

MOST = 16  # operators of a composition


class Compose(Operator):
    """Operators applied one after another. Text form: "blur:gaussian,sigma=1|sr:average,factor=2".

    Args:
        members: From 2 to 16 operators, the first to be applied first. A composition among them
            counts as its members.

    Attributes:
        members: The operators, (A, B, ..).
        shape: Shape (C, H, W) of the images it was bound to, or None.

    It is linear if all of them are; else only `A` works, and the rest raises InputError. Noise
    enters after the last operator: what that one does not measure is what is not seen of y.
    """

    def __init__(self, *members: Operator) -> None:
        flat = [
            part
            for member in members
            for part in (member.members if isinstance(member, Compose) else (member,))
        ]
        if len(flat) < 2:
            raise InputError(f"a composition needs two or more operators, got {len(flat)}")
        if len(flat) > MOST:
            raise InputError(f"a composition has at most {MOST} operators, got {len(flat)}")
        self.members: tuple[Operator, ...] = tuple(flat)
        self.shape: tuple[int, ...] | None = None
        self.dagger_iterations = min(member.dagger_iterations for member in self.members)

    @property
    def linear(self) -> bool:
        """Whether all operators are linear."""
        return all(member.linear for member in self.members)

    @property
    def pictorial(self) -> bool:  # type: ignore[override]
        """Whether all operators make images of images."""
        return all(member.pictorial for member in self.members)

    def digests(self) -> dict[str, str]:
        """See `Operator.digests`."""
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
        """Every operator bound to what those before it make of these images."""
        numbers, bound = list(index), []
        passed = first = tuple(shape[-3:])
        for member in self.members:
            bound.append(member.bind(numbers, passed))
            passed = bound[-1].y_shape(passed)
        if self.shape == first and all(a is b for a, b in zip(bound, self.members, strict=True)):
            return self  # with the decompositions that it keeps
        return self._with(members=tuple(bound), shape=first)

    def index_select(self, rows: Iterable[int] | Tensor) -> Operator:
        """See `Operator.index_select`."""
        picked = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows)).long()
        members = tuple(member.index_select(picked) for member in self.members)
        same = all(a is b for a, b in zip(members, self.members, strict=True))
        return self if same else self._with(members=members)

    def to(self, device: str | torch.device) -> Operator:
        """See `Operator.to`."""
        members = tuple(member.to(device) for member in self.members)
        same = all(a is b for a, b in zip(members, self.members, strict=True))
        if same and torch.device(device) == self.device:
            return self
        return self._with(members=members, device=torch.device(device))

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        # bound as a whole, so that an iteration does not bind its members again at every step;
        # each of them checks what it is given
        if self.shape is not None:
            return self
        return self.to(batch.device).bind(range(len(batch)), shape)

    # -- shapes ----------------------------------------------------------------------------------

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one measurement, handed from operator to operator."""
        shape = tuple(x_shape)
        for member in self.members:
            shape = member.y_shape(shape)
        return shape

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, H, W) of the image, handed back from the last operator to the first."""
        shape = tuple(y_shape)
        for member in reversed(self.members):
            shape = member.x_shape(shape)
        return shape

    # -- what is seen ----------------------------------------------------------------------------

    @property
    def mask(self) -> Tensor | None:
        """The product of the masks on the pixels of x, (B or 1, 1, H, W); None without one.

        Masks that come after the size of the image has changed are not on these pixels.
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
        """y with what the last operator does not measure set to zero."""
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
