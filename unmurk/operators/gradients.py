"""Conjugate gradients for a batch of images, with separate step sizes for every image."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..devices import filled

__all__ = ["CG_ITERATIONS", "conjugate_gradient", "per_image"]

CG_ITERATIONS = 100
LOOKS = 8  # steps between two looks at a GPU: each waits for all that was asked of it
CG_TOLERANCE = 1e-6  # of the residual norm, relative to the right-hand side: float32's reach


def per_image(value: float | Tensor, like: Tensor) -> Tensor:
    """A number, or one number for each image, shaped to multiply a batch.

    Args:
        value: A float or a tensor of shape () or (B,).
        like: The batch (B, ...) whose type and device are taken.
    """
    return filled(value, like).reshape(-1, *[1] * (like.ndim - 1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    iterations: int = CG_ITERATIONS,
    tolerance: float = CG_TOLERANCE,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Solve M x = b for a symmetric positive semi-definite M, each image for itself, from zero.

    M. R. Hestenes and E. Stiefel (1952), "Methods of conjugate gradients for solving linear
    systems". On A^T A x = A^T y it tends to the pseudo-inverse solution.

    Args:
        apply: The map M on a batch (B, ...).
        b: Right-hand side (B, ...).
        iterations: At most so many products with M.
        tolerance: An image is done when ||b - M x|| <= tolerance ||b||.
        precondition: A symmetric positive map near M^-1; None is the identity.
    """
    x, r = torch.zeros_like(b), b
    p = s = r if precondition is None else precondition(r)
    rs = _dot(r, s)
    goal = tolerance**2 * _dot(b, b)
    active = _dot(r, r) > goal
    every = 1 if b.device.type == "cpu" else LOOKS  # what is done by then stays as it is
    for number in range(iterations):
        if number % every == every - 1 and not bool(active.any()):
            break
        q = apply(p)
        curvature = _dot(p, q)
        # a finished image takes no more steps: its result must not depend on its neighbours
        active = active & (curvature > 0) & (rs > 0)
        step = torch.where(active, rs / torch.where(active, curvature, 1.0), 0.0)
        x = x + per_image(step, x) * p
        r = r - per_image(step, x) * q
        s = r if precondition is None else precondition(r)
        # its direction must not grow either: infinity times a step of zero is not a number
        before, rs = torch.where(active, rs, torch.inf), _dot(r, s)
        p = s + per_image(rs / before, x) * p
        active = active & (_dot(r, r) > goal)
    return x
