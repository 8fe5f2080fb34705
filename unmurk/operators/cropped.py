"""Operators on numbered crops: the crop of a number decides its operator.

Learning numbers crops as it numbers images. `bind` turns these numbers into the crops themselves,
and `Operator.on_crops` makes the operator of these. So everything that works with numbered images
works with numbered crops.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Operator
from .crops import Crop
from .inpainting import Inpaint

__all__ = ["CroppedMask", "CroppedOperator", "on_numbered_crops"]

Place = Callable[[int], Crop]
Hidden = Callable[[Sequence[int]], Tensor | None]


class CroppedOperator(Operator):
    """An operator on numbered crops; `bind` makes those of given crops.

    Args:
        base: The operator on images.
        side: Side of the crops in pixels.
        place: The crop of a number.
        hidden: Returns not 0 where the pixels of numbered crops of y are hidden too, (B, 1, h, w),
            or None.

    >>> from unmurk.operators import parse
    >>> place = lambda number: Crop(0, 0, 8 * number, 8, 64)
    >>> A = CroppedOperator(parse("blur:uniform,size=3"), 8, place, lambda numbers: None)
    >>> A.bind([0], (1, 8, 8)).mask[0, 0, 4].int().tolist()  # the last one depends on its neighbor
    [1, 1, 1, 1, 1, 1, 1, 0]
    """

    def __init__(self, base: Operator, side: int, place: Place, hidden: Hidden) -> None:
        self.base, self.side, self.place, self.hidden = base, side, place, hidden
        self.form, self.options = base.form, base.options  # type: ignore[misc]
        self.device, self.pictorial = base.device, base.pictorial

    @property
    def linear(self) -> bool:
        """Whether A is linear."""
        return self.base.linear

    @property
    def proximal(self) -> bool:
        """Whether `prox_l2` exists."""
        return self.base.proximal

    @property
    def blurs(self) -> bool:  # type: ignore[override]
        """Whether the operator on images takes fine detail away."""
        return self.base.blurs

    @property
    def spec(self) -> str:
        """The text form of the operator on images."""
        return self.base.spec

    def digests(self) -> dict[str, str]:
        """See `Operator.digests`."""
        return self.base.digests()

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """See `Operator.x_shape`."""
        return self.base.x_shape(y_shape)

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """See `Operator.y_shape`."""
        return self.base.y_shape(x_shape)

    def to(self, device: str | torch.device) -> Operator:
        """See `Operator.to`."""
        device = torch.device(device)
        if device == self.device:
            return self
        return self._with(base=self.base.to(device), device=device)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator of the crops with these numbers; see `Operator.bind`."""
        numbers = [int(i) for i in index]
        crops = [self.place(number) for number in numbers]
        bound = self.base.on_crops(crops, self.side, self.hidden(numbers), shape[-3])
        return bound.to(self.device)

    def _bound(self, batch: Tensor, shape: Sequence[int]) -> Operator:
        """Self, bound to the crops 0, 1, ... of the batch."""
        return self.bind(range(len(batch)), shape)._bound(batch, shape)


class CroppedMask(Inpaint):
    """Masks on numbered crops; see `CroppedOperator`.

    Args:
        base: The mask on images, or the identity.
        side, place, hidden: See `CroppedOperator`.

    >>> from unmurk.operators import parse
    >>> place = lambda number: Crop(0, 0, 4 * number, 8, 8)
    >>> A = CroppedMask(parse("inpaint:random,keep=0.5"), 4, place, lambda numbers: None)
    >>> parts, full = A.bind([0, 1], (1, 4, 4)).mask, A.base.bind([0], (1, 8, 8)).mask
    >>> torch.equal(torch.cat([*parts], -1), full[0, :, :4])
    True
    """

    def __init__(self, base: Operator, side: int, place: Place, hidden: Hidden) -> None:
        self.base, self.side, self.place, self.hidden = base, side, place, hidden
        self.form = base.form if isinstance(base, Inpaint) else "inpaint:missing"  # type: ignore[misc]
        self.options = base.options  # type: ignore[misc]
        for name in base.options:
            setattr(self, name, getattr(base, name))

    def digests(self) -> dict[str, str]:
        """See `Operator.digests`."""
        return self.base.digests()

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        crops = [self.place(number) for number in index]
        bound: Any = self.base.on_crops(crops, self.side, self.hidden(index))
        mask = bound.mask
        return torch.ones(len(index), 1, self.side, self.side) if mask is None else mask


def on_numbered_crops(operator: Operator, side: int, place: Place, hidden: Hidden) -> Operator:
    """Return an operator on numbered crops: a mask for masks and for the identity.

    Args:
        operator: The operator on images.
        side, place, hidden: See `CroppedOperator`.

    >>> from unmurk.operators import parse
    >>> from unmurk.operators.crops import Crop
    >>> place = lambda number: Crop(0, 0, 8 * number, 8, 64)
    >>> A = on_numbered_crops(parse("blur:uniform,size=3"), 8, place, lambda numbers: None)
    >>> A.bind([0, 7], (1, 8, 8)).mask[:, 0, 4].int().tolist()
    [[1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1]]
    """
    masked = isinstance(operator, Inpaint) or operator.spec == "identity"
    return (CroppedMask if masked else CroppedOperator)(operator, side, place, hidden)
