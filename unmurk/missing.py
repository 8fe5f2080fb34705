"""Measurements in which single numbers are missing: what is not finite counts as hidden.

    y = M A(x) + sigma M n,    M = 0 where y is missing, else 1

M is a mask on the pixels of y, one for each image, the same for all channels: a pixel that lacks
one channel is hidden as a whole. On images (A = I, or itself a mask) M A is a mask again; behind
another A it is a composition, whose pseudo-inverse and prox come from conjugate gradients.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import InputError
from .operators import Operator
from .operators.compose import Compose
from .operators.masks import Inpaint
from .problem import Problem

__all__ = ["Missing", "absent", "without_missing", "with_missing"]


class Missing(Inpaint):
    """A mask that hides missing pixels, and what a mask before it hides.

    Args:
        pixels: By number of an image the places (row * W + column) of its missing pixels.
        base: A mask that hides pixels too.
    """

    form = "inpaint:missing"

    def __init__(self, pixels: Mapping[int, Tensor], base: Inpaint | None = None) -> None:
        self.pixels, self.base = pixels, base

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        masks = torch.ones(len(index), height * width)
        for row, number in enumerate(index):
            if number in self.pixels:
                masks[row, self.pixels[number]] = 0
        masks = masks.reshape(len(index), 1, height, width)
        return masks if self.base is None else masks * self.base._draw(index, height, width)


def absent(y: Tensor) -> Tensor:
    """Where measurements (B, C, H, W) have a number that is not finite, (B, 1, H, W) bool."""
    return ~y.isfinite().all(1, keepdim=True)


def with_missing(operator: Operator, pixels: Mapping[int, Tensor]) -> Operator:
    """An operator, not bound to images, that hides missing pixels of its measurements.

    Args:
        operator: A.
        pixels: See `Missing`.

    Raises:
        InputError: measurements of A of which no single numbers can be hidden.
    """
    *first, last = operator.members if isinstance(operator, Compose) else (operator,)
    if isinstance(last, Inpaint):
        members = [*first, Missing(pixels, last)]
    elif type(last).apply_mask is not Operator.apply_mask:
        raise InputError(
            f"'{last.spec}' leaves parts of its measurements out by itself, so missing numbers "
            "cannot be hidden: leave these images out (--skip-bad)"
        )
    else:
        members = [*first, last, Missing(pixels)]
    members = [m for m in members if m.spec != "identity"]
    return members[0] if len(members) == 1 else Compose(*members)


def without_missing(
    y: Tensor, problem: Problem, nan: str, shape: tuple[int, ...]
) -> tuple[Tensor, Problem]:
    """Measurements with zeros for missing numbers, and the problem that hides these.

    Args:
        y: Measurements (B, ...).
        problem: How they were made, bound to them or not.
        nan: "refuse" or "mask".
        shape: Shape (C, H, W) of the images.

    Raises:
        InputError: numbers that are not finite and are to be refused, or cannot be hidden.
    """
    if bool(y.isfinite().all()):
        return y, problem
    index = list(range(len(y))) if problem.index is None else problem.index
    bound = problem if problem.index is not None else problem.to(y.device).bind(index, shape)
    observed = bound.operator.apply_mask(y)
    if bool(observed.isfinite().all()):  # what is hidden already may be anything
        return observed, problem
    if nan != "mask":
        row = int((~observed.isfinite().flatten(1).all(1)).nonzero()[0, 0])
        raise InputError(
            f"measurement {index[row]} has values that are not finite: mend it, leave it out, or "
            "count such pixels as hidden with nan='mask' (--nan mask)"
        )
    if y.ndim != 4:
        raise InputError(f"measurements of shape {tuple(y.shape[1:])} have no pixels to hide")
    gone = absent(observed).flatten(1)
    pixels = {i: row.nonzero()[:, 0].cpu() for i, row in zip(index, gone, strict=True)}
    operator = with_missing(problem.operator, pixels).to(y.device).bind(index, shape)
    hidden = problem._with(operator, index)
    return torch.where(y.isfinite(), y, 0.0), hidden
