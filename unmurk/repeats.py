r"""Repeated captures: several measurements of one scene, as one measurement.

The captures :math:`y_j = M_j A x + n_j`, j = 1, ..., k, of one scene x have independent noises.
They may hide different pixels (masks :math:`M_j`). With Gaussian noise of standard deviation
:math:`\sigma` and :math:`c = \sum_j M_j` captures of a pixel, all that they say about x is in

.. math::

    \bar y = \frac{\sum_j M_j y_j}{\sqrt{c\, k}} = W A x + \frac{\sigma}{\sqrt k}\, n,
    \qquad W = \sqrt{c / k},

because :math:`\sum_j \|y_j - M_j A x\|^2 / \sigma^2 = k \|\bar y - W A x\|^2 / \sigma^2` up to a
constant. Where all captures measure all pixels, this is their mean, at :math:`\sigma / \sqrt k`.
The same holds for weights :math:`W_j` of any size in place of the masks (noise maps, flat fields):
:math:`\bar y = \sum_j W_j y_j / (k W)` with :math:`W^2 = \sum_j W_j^2 / k`.

The mean of k counts of photons is a count of photons with a gain that is smaller by k, so
Poisson-Gaussian noise keeps its form too:

.. math:: \text{gain} / k, \qquad \sigma / \sqrt k .

Scene i has the captures with the numbers i N, ..., i N + N - 1, if N captures show each scene.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import InputError
from .noise import Gaussian, Noise, PoissonGaussian
from .operators import Compose, Operator, Weighted
from .operators.inpainting import FixedMask, Inpaint
from .problem import Problem

__all__ = ["averaged", "combined", "combined_captures", "grouped", "scenes"]


def scenes(captures: int, repeats: int, what: str = "captures") -> int:
    """Return the number of scenes of a set of captures.

    Args:
        captures: Number of captures.
        repeats: Number N of captures of each scene, one after another.
        what: What the captures are called in messages.

    Raises:
        InputError: N does not divide the number of captures, or is below 1.

    >>> scenes(20, 5)
    4
    """
    if repeats < 1 or captures % repeats or not captures:
        raise InputError(
            f"{captures} {what} are no whole number of scenes of {repeats}: add the missing ones,"
            " or give another number of repeats"
        )
    return captures // repeats


def grouped(y: Tensor, repeats: int) -> Tensor:
    """Group captures (S N, C, H, W) by scene: (S, N, C, H, W).

    >>> grouped(torch.zeros(6, 1, 4, 4), 3).shape
    torch.Size([2, 3, 1, 4, 4])
    """
    return y.unflatten(0, (scenes(len(y), repeats), repeats))


def averaged(noise: Noise, k: int) -> Noise:
    """Return the noise of the mean of k captures.

    Args:
        noise: Noise of one capture.
        k: Number of captures.

    Raises:
        InputError: The noise is of another kind than Gaussian or Poisson-Gaussian.

    >>> averaged(PoissonGaussian(gain=0.01, sigma=0.02), 4)
    PoissonGaussian(gain=0.0025, sigma=0.01, offset=0.0)
    """
    if k == 1:
        return noise
    if isinstance(noise, Gaussian):
        return Gaussian(noise.sigma / k**0.5)
    if isinstance(noise, PoissonGaussian):
        return PoissonGaussian(noise.gain / k, noise.sigma / k**0.5, noise.offset)
    raise InputError(
        f"the noise '{noise.spec}' of repeated captures is neither Gaussian nor Poisson-Gaussian:"
        " average them first, and give the noise of the average"
    )


def combined(
    y: Tensor,
    problem: Problem,
    numbers: Sequence[int],
    shape: Sequence[int],
    picked: Sequence[int] | None = None,
) -> tuple[Tensor, Problem]:
    """Combine captures of scenes to one measurement each, with its problem.

    Args:
        y: Captures (B, N, C, H, W).
        problem: How one capture was made, not bound to images.
        numbers: Numbers of the scenes; capture j of scene i has the number i N + j.
        shape: Shape (C, H, W) of the images.
        picked: Which of the N captures are used; None: all of them.

    Returns:
        Measurements (B, C, H, W), and their problem, bound to the scenes.

    Raises:
        InputError: The captures of a scene differ in more than weights and hidden pixels, or
            differ in these and have another noise than Gaussian.

    >>> problem = Problem("identity", noise=0.2)
    >>> y, found = combined(torch.tensor([0.1, 0.3]).view(1, 2, 1, 1, 1), problem, [0], (1, 1, 1))
    >>> round(y.item(), 4), round(found.sigma, 4)
    (0.2, 0.1414)
    """
    repeats = y.shape[1]
    chosen = list(range(repeats) if picked is None else picked)
    bound = [problem.bind([i * repeats + j for i in numbers], shape).operator for j in chosen]
    return _combine(y[:, chosen], bound, problem.noise, numbers, shape)


def combined_captures(
    y: Tensor, problem: Problem, numbers: Sequence[int], shape: Sequence[int]
) -> tuple[Tensor, Problem]:
    """Combine all captures of scenes, whose problem is bound to the captures already.

    Args:
        y: Captures (B, N, C, H, W).
        problem: How they were made, bound to the B N captures, scene by scene.
        numbers: Numbers of the scenes.
        shape: Shape (C, H, W) of the images.

    Returns:
        See `combined`.

    >>> problem = Problem("identity", noise=0.2).bind([0, 1], (1, 1, 1))
    >>> y = torch.tensor([0.1, 0.3]).view(1, 2, 1, 1, 1)
    >>> y, found = combined_captures(y, problem, [0], (1, 1, 1))
    >>> round(y.item(), 4), round(found.sigma, 4)  # the mean, and 0.2 / sqrt(2)
    (0.2, 0.1414)
    """
    places = range(y.shape[0] * y.shape[1])
    bound = [problem.operator.index_select(places[j :: y.shape[1]]) for j in range(y.shape[1])]
    return _combine(y, bound, problem.noise, numbers, shape)


def _combine(
    y: Tensor,
    bound: Sequence[Operator],
    single: Noise,
    numbers: Sequence[int],
    shape: Sequence[int],
) -> tuple[Tensor, Problem]:
    """The measurement of captures (B, k, C, H, W) with these operators and this noise."""
    noise = averaged(single, len(bound))
    if all(operator == bound[0] for operator in bound[1:]):
        mean = y.mean(1) if len(bound) > 1 else y[:, 0]
        return mean, _of_scenes(bound[0], noise, numbers)
    if not isinstance(noise, Gaussian):
        raise InputError(
            "repeated captures that differ in their hidden pixels or noise maps need Gaussian"
            f" noise, not '{single.spec}'"
        )
    bare = [a.operator if isinstance(a, Weighted) else a for a in bound]
    front, masks = _union(bare, y[:, 0, :1])
    each = [
        m * a.weights if isinstance(a, Weighted) else m for m, a in zip(masks, bound, strict=True)
    ]
    shown = masks.sum(0) > 0
    weights = torch.where(shown, (sum(w.square() for w in each) / len(bound)).sqrt(), 1.0)
    mask = FixedMask(shown.to(masks))
    operator = mask if front is None else _chain(front, mask, shape)
    shown_y = [a.apply_mask(y[:, j]) for j, a in enumerate(bound)]
    mean = sum(map(torch.mul, each, shown_y)) / (len(bound) * weights)
    return mean, _of_scenes(Weighted(operator, weights), noise, numbers)


def _of_scenes(operator: Operator, noise: Noise, numbers: Sequence[int]) -> Problem:
    found = Problem(operator, noise)
    found.index = list(numbers)
    return found


def _union(bound: Sequence[Operator], like: Tensor) -> tuple[Operator | None, Tensor]:
    """The operators before the masks, which all captures share, and the masks (k, B, 1, H, W)."""
    parts = [list(o.members) if isinstance(o, Compose) else [o] for o in bound]
    fronts = [part[:-1] for part in parts]
    masks = []
    for part in parts:
        last = part[-1]
        if last.spec == "identity":
            masks.append(torch.ones_like(like))
        elif isinstance(last, Inpaint) and last.masks is not None:
            masks.append(last.masks.expand(len(like), -1, -1, -1))
    if any(front != fronts[0] for front in fronts) or len(masks) < len(parts):
        raise InputError(
            f"the captures of a scene differ in their operator '{bound[0].spec}', not only in the"
            " pixels that they hide last: give them as captures of scenes of their own"
        )
    if not fronts[0]:
        return None, torch.stack(masks)
    return (fronts[0][0] if len(fronts[0]) == 1 else Compose(*fronts[0])), torch.stack(masks)


def _chain(front: Operator, mask: Inpaint, shape: Sequence[int]) -> Operator:
    """The mask after the other operators, bound to images of this shape."""
    return Compose(front, mask)._with(shape=tuple(shape), device=mask.device)
