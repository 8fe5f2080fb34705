r"""Missing values in measurements: pixels that are not finite are treated as hidden.

.. math:: y = M A(x) + \sigma M n,\qquad M = 0 \text{ where } y \text{ is missing, else } 1

M is a mask on the pixels of y, one for each image and the same for all channels: a pixel that
lacks one channel is hidden entirely. For A = I, or a mask itself, M A is a mask again. After any
other A it is a composition, whose pseudo-inverse and proximal map come from conjugate gradients.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import InputError
from .operators import Operator
from .operators.compose import Compose
from .operators.crops import Window, cut
from .operators.inpainting import Inpaint
from .problem import Problem

__all__ = ["Missing", "absent", "with_missing", "without_missing"]


class Missing(Inpaint):
    """A mask that hides missing pixels, and the pixels that another mask hides.

    Args:
        pixels: For each image number the positions (row * W + column) of its missing pixels.
        base: The other mask, or None.

    >>> operator = Missing({3: torch.tensor([1])})  # image 3 lacks its second pixel
    >>> operator.bind([3, 4], (1, 1, 2)).mask.flatten(1)
    tensor([[1., 0.],
            [1., 1.]])
    """

    form = "inpaint:missing"

    def __init__(self, pixels: Mapping[int, Tensor], base: Inpaint | None = None) -> None:
        self.pixels, self.base = pixels, base

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        masks = torch.ones(len(index), height * width)
        for entry, number in enumerate(index):
            if number in self.pixels:
                masks[entry, self.pixels[number]] = 0
        masks = masks.reshape(len(index), 1, height, width)
        return masks if self.base is None else masks * self.base._draw(index, height, width)

    def _cut_one(self, window: Window, position: int) -> Tensor:
        place = window.place(position)
        height, width = place.shape
        if self.base is None:
            mask = cut(torch.ones(1, height, width), place.first, window.size)
        else:
            mask = self.base._cut_one(window, position).clone()
        if place.number in self.pixels:
            lost = self.pixels[place.number]
            row, column = lost // width - place.first[0], lost % width - place.first[1]
            inside = (
                (row >= 0) & (row < mask.shape[-2]) & (column >= 0) & (column < mask.shape[-1])
            )
            mask[0, row[inside], column[inside]] = 0
        return mask


def absent(y: Tensor) -> Tensor:
    """Locate the pixels of measurements (B, C, H, W) with values that are not finite.

    Returns:
        (B, 1, H, W) bool.

    >>> absent(torch.tensor([[[[1.0, torch.nan]]]]))
    tensor([[[[False,  True]]]])
    """
    return ~y.isfinite().all(1, keepdim=True)


def with_missing(operator: Operator, pixels: Mapping[int, Tensor]) -> Operator:
    """Make an operator, not bound to images, that hides missing pixels of its measurements.

    Args:
        operator: A.
        pixels: For each image number the positions of its missing pixels; see `Missing`.

    Raises:
        InputError: The measurements of A are such that no single values can be hidden.

    >>> from unmurk.operators import parse
    >>> operator = with_missing(parse("sr:average,factor=2"), {0: torch.tensor([0])})
    >>> operator.A(torch.ones(1, 1, 2, 4))
    tensor([[[[0., 1.]]]])
    """
    *first, last = operator.members if isinstance(operator, Compose) else (operator,)
    if isinstance(last, Inpaint):
        members = [*first, Missing(pixels, last)]
    elif type(last).apply_mask is not Operator.apply_mask:
        raise InputError(
            f"operator '{last.spec}' hides parts of its measurements itself, so missing values "
            "cannot be hidden: leave these images out (--skip-bad)"
        )
    else:
        members = [*first, last, Missing(pixels)]
    members = [m for m in members if m.spec != "identity"]
    return members[0] if len(members) == 1 else Compose(*members)


def without_missing(
    y: Tensor, problem: Problem, nan: str, shape: tuple[int, ...]
) -> tuple[Tensor, Problem]:
    """Replace missing values by zeros, and hide them in the problem.

    Args:
        y: Measurements (B, ...).
        problem: Operator and noise, bound to the images of y or not.
        nan: "refuse" or "mask".
        shape: Shape (C, H, W) of the images.

    Returns:
        Measurements (B, ...) and their problem.

    Raises:
        InputError: Values are not finite, and `nan` is "refuse" or they cannot be hidden.

    >>> y, problem = torch.tensor([[[[0.5, torch.nan]]]]), Problem("identity", 0.1)
    >>> y, problem = without_missing(y, problem, "mask", (1, 1, 2))
    >>> y, problem.operator.mask
    (tensor([[[[0.5000, 0.0000]]]]), tensor([[[[1., 0.]]]]))
    """
    if bool(y.isfinite().all()):
        return y, problem
    index = list(range(len(y))) if problem.index is None else problem.index
    bound = problem if problem.index is not None else problem.to(y.device).bind(index, shape)
    observed = bound.operator.apply_mask(y)
    if bool(observed.isfinite().all()):  # hidden values may be anything
        return observed, problem
    if nan != "mask":
        first = int((~observed.isfinite().flatten(1).all(1)).nonzero()[0, 0])
        raise InputError(
            f"measurement {index[first]} has values that are not finite: correct it, leave it out,"
            " or treat such pixels as hidden with nan='mask' (--nan mask)"
        )
    if y.ndim != 4:
        raise InputError(
            f"measurements of shape {tuple(y.shape[1:])} have no pixels to hide: correct their"
            " values or leave them out"
        )
    lost = absent(observed).flatten(1)
    if bool(lost.all(1).any()):
        empty = int(lost.all(1).nonzero()[0, 0])
        raise InputError(
            f"measurement {index[empty]} has no pixel with a finite value: leave it out"
        )
    pixels = {i: mask.nonzero()[:, 0].cpu() for i, mask in zip(index, lost, strict=True)}
    operator = with_missing(problem.operator, pixels).to(y.device).bind(index, shape)
    hidden = problem._with(operator, index)
    return torch.where(y.isfinite(), y, 0.0), hidden
