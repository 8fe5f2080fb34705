"""A forward model whose measurements are weighted, number by number: A' x = w A(x), w > 0.

With W = diag(w), A' = W A and A'^T = A^T W. Where A A^T = g I on what is seen (`Operator.gram`),
so A' A'^T = g W^2, and the prox stays in closed form:

    prox_l2(z, y, gamma) = z + A^T [ gamma w (y - w A z) / (1 + gamma g w^2) ]

Elsewhere it comes from conjugate gradients on I + gamma A^T W^2 A, preconditioned by what A knows
to be near (I + gamma m A^T A)^-1, m the mean of w^2. If that is the inverse itself, all
eigenvalues lie between the least and the largest of 1 and w^2 / m, for any gamma.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .base import Operator, conjugate_gradient, per_image

__all__ = ["Weighted"]


class Weighted(Operator):
    """Another operator with weights on its measurements.

    Args:
        operator: A, bound to the images that the weights are for.
        weights: w > 0, of the shape of the measurements, (B, ...), or (1, ...) for all images.
            Weights on a `Weighted` are multiplied with its own.

    Raises:
        InputError: weights that are not finite, or not positive.

    It has a label but no text form, and is as linear as A.
    """

    tensors = ("weights",)

    def __init__(self, operator: Operator, weights: Tensor) -> None:
        if not bool(((weights > 0) & weights.isfinite()).all()):
            raise InputError(
                "the weights of measurements must be finite and > 0: leave out with a mask what"
                " is not measured"
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
        """A label. Weights cannot be written as text, so `parse` does not read it back."""
        return f"python:weighted {self.operator.spec}"

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.operator == getattr(other, "operator", None)

    __hash__ = Operator.__hash__

    # -- binding to images -----------------------------------------------------------------------

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """A bound to these images; the weights stay. See `Operator.bind`."""
        return self._with(operator=self.operator.bind(index, shape))

    def index_select(self, rows: Iterable[int] | Tensor) -> Operator:
        """See `Operator.index_select`."""
        picked = torch.as_tensor(rows if isinstance(rows, Tensor) else list(rows)).long()
        taken: Any = super().index_select(picked)
        operator = self.operator.index_select(picked)
        return taken if operator is self.operator else taken._with(operator=operator)

    def to(self, device: str | torch.device) -> Operator:
        """See `Operator.to`."""
        moved: Any = super().to(device)
        operator = self.operator.to(device)
        return moved if operator is self.operator else moved._with(operator=operator)

    # -- shapes, and what is seen ----------------------------------------------------------------

    def y_shape(self, x_shape: Sequence[int]) -> tuple[int, ...]:
        """See `Operator.y_shape`."""
        return self.operator.y_shape(x_shape)

    def x_shape(self, y_shape: Sequence[int]) -> tuple[int, ...]:
        """See `Operator.x_shape`."""
        return self.operator.x_shape(y_shape)

    @property
    def mask(self) -> Tensor | None:
        """See `Operator.mask`."""
        return self.operator.mask

    def apply_mask(self, y: Tensor) -> Tensor:
        """See `Operator.apply_mask`."""
        return self.operator.apply_mask(y)

    # -- the maps --------------------------------------------------------------------------------

    def _A(self, x: Tensor) -> Tensor:
        return self.weights.to(x.dtype) * self.operator.A(x)

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self.operator.A_adjoint(self.weights.to(y.dtype) * self.apply_mask(y))

    def _A_dagger(self, y: Tensor) -> Tensor:
        """A^+ (y / w): the pseudo-inverse where the rows of A are independent, or zero (masks);
        elsewhere a least-squares solution in the norm without weights. A blur's A^+ holds down
        noise, and so does this."""
        return self.operator.A_dagger(self.apply_mask(y) / self.weights.to(y.dtype))

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        weights, gram = self.weights.to(z.dtype), self.operator.gram
        missing = self.apply_mask(y - self._A(z))
        in_y = gamma.reshape(-1, *[1] * (y.ndim - 1))
        if gram is not None:
            gain = in_y * weights / (1 + in_y * gram * weights.square())
            return z + self.operator.A_adjoint(gain * missing)
        mean = per_image(weights.square().flatten(1).mean(1), z)
        step = conjugate_gradient(
            lambda x: x + gamma * self._A_adjoint(self._A(x)),
            gamma * self._A_adjoint(missing),
            precondition=self.operator.near_inverse(z, gamma * mean),
        )
        return z + step
