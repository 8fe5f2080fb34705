r"""Denoising and inpainting: :math:`A x = m \odot x` with a mask m of zeros and ones.

The mask is the same for all channels; the identity has m = 1. A is a projection, so
:math:`A = A^T = A^+`, and the prox is a weighted mean on the measured pixels:

.. math:: \mathrm{prox}(z, y, \gamma) = \frac{z + \gamma\, m \odot y}{1 + \gamma m}.

Measurements keep the shape of the image. Hidden pixels hold zero, carry no noise, and do not count
as measurements.
"""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from ..errors import InputError, size_text
from .base import Operator
from .crops import PackedMasks, Window, cut
from .linalg import Factors, Spectrum, diagonal

__all__ = ["FixedMask", "Identity", "Inpaint"]

_store = PackedMasks()  # of images that crops are cut out of


class Identity(Operator):
    """The identity A x = x: measurements are images with noise. Text form: "identity".

    >>> import torch
    >>> from unmurk.operators import parse
    >>> parse("identity").A(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """

    form = "identity"
    orthogonal_rows = True
    gram = 1.0
    turnable = True

    def _hidden_crop(self, window: Window, hidden: Tensor | None) -> Operator:
        masks = window.measured(hidden)
        return self if bool(masks.all()) else FixedMask(masks.to(self.device))

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        return self, window

    def _A(self, x: Tensor) -> Tensor:
        return x

    def _A_adjoint(self, y: Tensor) -> Tensor:
        return y

    def _A_dagger(self, y: Tensor) -> Tensor:
        return y

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        return (z + gamma * y) / (1 + gamma)

    def _has_structure(self, x: Tensor) -> bool:
        return True

    def _structured(self, x: Tensor) -> Spectrum:
        return diagonal(x.new_ones(1, 1, 1, 1), lambda y: y)

    def _has_factors(self, shape: tuple[int, ...]) -> bool:
        return True

    def _factors(self, shape: tuple[int, ...]) -> Factors:
        channels, height, width = (torch.eye(n, dtype=torch.float64) for n in shape)
        return channels, height, width


class Inpaint(Operator):
    """Base class of all masks. A subclass draws or reads the masks in `_draw`.

    Attributes:
        masks: The masks (B or 1, 1, H, W), 1 where a pixel is measured; None before `bind`.

    >>> class Stripes(Inpaint):  # hides every second column
    ...     form = "stripes"
    ...     def _draw(self, index, height, width):
    ...         return (torch.arange(width) % 2 == 0).float().expand(1, 1, height, width)
    >>> Stripes().A(torch.ones(1, 1, 1, 4))
    tensor([[[[1., 0., 1., 0.]]]])
    """

    tensors = ("masks",)
    masks: Tensor | None = None
    orthogonal_rows = True
    gram = 1.0
    turnable = True

    @property
    def mask(self) -> Tensor | None:
        """The masks (B or 1, 1, H, W), 1 where a pixel is measured; None before `bind`."""
        return self.masks

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        """Masks (B or 1, 1, H, W) on the CPU."""
        raise NotImplementedError

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return the operator with the masks of these images; see `Operator.bind`."""
        numbers = [int(i) for i in index]
        if any(i < 0 for i in numbers):
            raise InputError(f"{self.form}: image numbers must be >= 0, got {min(numbers)}")
        height, width = shape[-2:]
        return self._with(masks=self._draw(numbers, height, width).to(self.device))

    def apply_mask(self, y: Tensor) -> Tensor:
        """Set the hidden pixels of y (B, C, H, W) to zero."""
        op = self._bound(y, y.shape)
        assert isinstance(op, Inpaint) and op.masks is not None
        return torch.where(op.masks > 0, y, torch.zeros((), dtype=y.dtype, device=y.device))

    def hiding(self, more: Tensor) -> "Inpaint":
        """Return the operator that hides further pixels.

        Args:
            more: Not 0 where a pixel is to be hidden too, (B, 1, H, W).
        """
        assert self.masks is not None
        other = self._with(masks=torch.where(more != 0, 0.0, self.masks))
        assert isinstance(other, Inpaint)
        return other

    def _hidden_crop(self, window: Window, hidden: Tensor | None) -> Operator:
        masks = self._cut(window) * window.measured(hidden)
        return FixedMask(masks.to(self.device))

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        return FixedMask(self._cut(window).to(self.device)), window

    def _key(self) -> Hashable:
        """What decides the masks, so that they are kept for further crops; None keeps none."""
        return None

    def _cut(self, window: Window) -> Tensor:
        """The crops of the masks, turned, (B, 1, h, w) on the CPU."""
        if self.masks is not None:
            raise InputError(f"{self.form}: it is bound to images: take crops before bind")
        return window.turn(torch.stack([self._cut_one(window, i) for i in range(len(window))]))

    def _cut_one(self, window: Window, position: int) -> Tensor:
        """One crop of a mask, not turned, (1, h, w)."""
        place = window.place(position)

        def make() -> Tensor:
            return self._draw([place.number], *place.shape)[0]

        key = self._key()
        if key is None:
            return cut(make(), place.first, window.size)
        key = key, place.number, place.shape
        return _store.cut(key, make, place.shape, place.first, window.size)

    def _check(self, shape: tuple[int, ...]) -> None:
        assert self.masks is not None
        if self.masks.shape[-2:] != tuple(shape[-2:]):
            raise InputError(
                f"{self.form}: the mask is {size_text(self.masks.shape[-2:])} but the image is"
                f" {size_text(shape[-2:])}: bind it again with bind(index, shape)"
            )

    def _A(self, x: Tensor) -> Tensor:
        assert self.masks is not None
        return self.masks * x

    # hidden pixels of y may hold anything, even NaN: they are replaced, not multiplied by zero
    def _A_adjoint(self, y: Tensor) -> Tensor:
        return self.apply_mask(y)

    def _A_dagger(self, y: Tensor) -> Tensor:
        return self.apply_mask(y)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        assert self.masks is not None
        return (z + gamma * self.apply_mask(y)) / (1 + gamma * self.masks)

    def _has_structure(self, x: Tensor) -> bool:
        return True

    def _structured(self, x: Tensor) -> Spectrum:
        assert self.masks is not None
        return diagonal(self.masks.to(x), self.apply_mask)


class FixedMask(Inpaint):
    """Masks that are given, one for each image of the batch. They have no text form.

    Args:
        masks: The masks (B, 1, H, W), 1 where a pixel is measured, else 0.

    >>> import torch
    >>> FixedMask(torch.tensor([[[[1.0, 0.0]]]])).A(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 0.]]]])
    """

    form = "python:mask"

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks
        self.device = masks.device

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Return self: the masks are those of the batch already."""
        self._check(tuple(shape))
        return self
