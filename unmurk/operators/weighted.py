r"""Weighted measurements, number by number: :math:`A' x = w \odot A(x)` with w > 0.

With W = diag(w), :math:`A' = W A` and :math:`A'^T = A^T W`. Where :math:`A A^T = g I` on the
measured entries (`Operator.gram`), :math:`A' A'^T = g W^2`, and the prox has a closed form:

.. math::

    \mathrm{prox}(z, y, \gamma)
        = z + A^T \left[ \frac{\gamma w}{1 + \gamma g w^2} \odot (y - w \odot A z) \right]

Elsewhere it comes from conjugate gradients on :math:`I + \gamma A^T W^2 A`, preconditioned by the
map that A knows near :math:`(I + \gamma m A^T A)^{-1}`, with m the mean of :math:`w^2`. If that
map is the inverse itself, all eigenvalues lie between the smallest and the largest of 1 and
:math:`w^2 / m`, for any gamma.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, size_text
from .base import Operator, as_index
from .compose import masked
from .cropped import CroppedOperator
from .crops import Window, cut
from .linalg import conjugate_gradient, per_image

__all__ = ["NumberedWeights", "Weighted"]


class Weighted(Operator):
    """Put weights on the measurements of another operator.

    The result has a label but no text form. It is linear if A is.

    Args:
        operator: A, bound to the images that the weights are for.
        weights: w > 0, of the shape of the measurements, (B, ...), or (1, ...) for all images.
            Weights on a `Weighted` are multiplied with its own.

    Raises:
        InputError: A weight is not finite, or not positive.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> from unmurk.operators.weighted import Weighted
    >>> A = Weighted(parse("identity"), torch.tensor([[[[1.0, 2.0]]]]))
    >>> A.A(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 2.]]]])
    """

    tensors = ("weights",)

    def __init__(self, operator: Operator, weights: Tensor) -> None:
        if not bool(((weights > 0) & weights.isfinite()).all()):
            raise InputError(
                "the weights of measurements must be finite and > 0: use a mask for entries that"
                " are not measured"
            )
        self.operator: Operator = operator
        self.weights: Tensor = weights
        if isinstance(operator, Weighted):
            self.operator, self.weights = operator.operator, operator.weights * weights

    @property
    def linear(self) -> bool:
        """Whether A is linear."""
        return self.operator.linear

    @property
    def spec(self) -> str:
        """A label. Weights have no text form, so `parse` does not read it back."""
        return f"python:weighted {self.operator.spec}"

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.operator == getattr(other, "operator", None)

    __hash__ = Operator.__hash__

    # -- binding to images -----------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Bind A to these images; the weights stay. See `Operator.bind`."""
        return self._with(operator=self.operator.bind(index, shape))

    def index_select(self, positions: Iterable[int] | Tensor) -> Operator:
        """Return the operator of some images of the batch; see `Operator.index_select`."""
        picked = as_index(positions)
        taken: Any = super().index_select(picked)
        operator = self.operator.index_select(picked)
        return taken if operator is self.operator else taken._with(operator=operator)

    def to(self, device: str | torch.device) -> Operator:
        """Return the operator with its parameters on a device; see `Operator.to`."""
        moved: Any = super().to(device)
        operator = self.operator.to(device)
        return moved if operator is self.operator else moved._with(operator=operator)

    # -- crops -----------------------------------------------------------------------------------

    @property
    def crop_grid(self) -> int:  # type: ignore[override]
        """The grid of A; see `Operator.on_crops`."""
        return self.operator.crop_grid

    @property
    def turnable(self) -> bool:  # type: ignore[override]
        """Whether A commutes with flips and quarter turns; the weights are turned too."""
        return self.operator.turnable

    @property
    def blurs(self) -> bool:  # type: ignore[override]
        """Whether A takes fine detail away."""
        return self.operator.blurs

    @property
    def _reduction(self) -> int:
        return self.operator._reduction

    def _hidden_crop(self, window: Window, hidden: Tensor | None) -> Operator:
        operator, after = self.operator._crop(window)
        hiding = masked(operator, after.measured(hidden), window.channels, window.size)
        return self._with(operator=hiding, weights=self._cut(after))

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        operator, after = self.operator._crop(window)
        return self._with(operator=operator, weights=self._cut(after)), after

    def _cut(self, window: Window) -> Tensor:
        """The crops of the weights, turned; 1 beyond the image."""
        weights = self.weights
        if weights.ndim != 4 or (len(weights) > 1 and max(window.numbers) >= len(weights)):
            raise InputError(
                f"weights of shape {tuple(weights.shape)} do not fit crops of image"
                f" {max(window.numbers)}: give weights (N, C, H, W) for all images"
            )
        places = [window.place(position) for position in range(len(window))]
        if any(place.shape != weights.shape[-2:] for place in places):
            raise InputError(
                f"weights of {size_text(weights.shape[-2:])} do not fit measurements of"
                f" {size_text(places[0].shape)}: give weights of the size of the images"
            )
        each = [weights[p.number if len(weights) > 1 else 0] for p in places]
        crops = [cut(w, p.first, window.size, 1.0) for w, p in zip(each, places, strict=True)]
        return window.turn(torch.stack(crops))

    # -- shapes, and which entries of y are measured ---------------------------------------------

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of one measurement; see `Operator.y_shape`."""
        return self.operator.y_shape(x_shape)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the image behind a measurement; see `Operator.x_shape`."""
        return self.operator.x_shape(y_shape)

    @property
    def mask(self) -> Tensor | None:
        """The mask of A; see `Operator.mask`."""
        return self.operator.mask

    def apply_mask(self, y: Tensor) -> Tensor:
        """Set the entries of y that A does not measure to zero; see `Operator.apply_mask`."""
        return self.operator.apply_mask(y)

    # -- the maps --------------------------------------------------------------------------------

    def _A(self, x: Tensor) -> Tensor:
        return self.weights.to(x.dtype) * self.operator.A(x)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A_adjoint(self.weights.to(y.dtype) * self.apply_mask(y))

    def _A_dagger(self, y: Tensor) -> Tensor:
        """A^+ (y / w): the pseudo-inverse where the rows of A are independent or zero (masks);
        elsewhere a least-squares solution in the norm without weights. It limits the noise as far
        as A^+ does."""
        return self.operator.A_dagger(self.apply_mask(y) / self.weights.to(y.dtype))

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        weights = self.weights.to(z.dtype)
        missing = self.apply_mask(y - self._A(z))
        in_y = gamma.reshape(-1, *[1] * (y.ndim - 1))
        if self.operator.orthogonal_rows:
            gain = in_y * weights / (1 + in_y * self.operator.gram * weights.square())
            return z + self.operator.A_adjoint(gain * missing)
        mean = per_image(weights.square().flatten(1).mean(1), z)
        step = conjugate_gradient(
            lambda x: x + gamma * self._A_adjoint(self._A(x)),
            gamma * self._A_adjoint(missing),
            precondition=self.operator.preconditioner(z, gamma * mean),
        )
        return z + step


class NumberedWeights(CroppedOperator):
    """Weights on numbered measurements; `bind` looks them up and returns a `Weighted`.

    Args:
        base: A, not bound to images.
        weights: Returns the weights of measurements with these numbers, (B, 1 or C, ...).

    >>> from unmurk.operators import parse
    >>> weights = lambda numbers: torch.tensor(numbers).float().view(-1, 1, 1, 1)
    >>> A = NumberedWeights(parse("identity"), weights).bind([1, 2], (1, 1, 1))
    >>> A.A(torch.ones(2, 1, 1, 1)).flatten()
    tensor([1., 2.])
    """

    def __init__(self, base: Operator, weights: Callable[[Sequence[int]], Tensor]) -> None:
        self.base, self.weights_of = base, weights
        self.options = base.options  # type: ignore[misc]
        self.device, self.pictorial = base.device, base.pictorial

    @property
    def spec(self) -> str:
        """A label. Weights have no text form, so `parse` does not read it back."""
        return f"python:weighted {self.base.spec}"

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return A with the weights of these measurements; see `Operator.bind`."""
        numbers = [int(i) for i in index]
        weights = self.weights_of(numbers)
        full = (len(numbers), *self.base.y_shape(shape))
        bound = self.base.bind(numbers, shape)
        return Weighted(bound, weights.expand(full).to(self.device))
