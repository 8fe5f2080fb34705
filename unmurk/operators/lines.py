"""Distances from pixels to straight lines, from which brush strokes and motion kernels are drawn.

The point of a segment from s to s + v that is nearest to p is s + t v with

    t = clamp((p - s) . v / |v|^2, 0, 1)

Angles are in degrees, counter-clockwise from the direction of increasing columns as a picture is
looked at (rows count downwards): the unit vector is (row, column) = (-sin, cos).
"""

import math

import torch
from torch import Tensor

__all__ = ["direction", "distance"]


def direction(angle: float) -> tuple[float, float]:
    """The unit vector (row, column) of an angle in degrees; exact at multiples of 90."""
    # rounded so that the cosine of 90 degrees is zero, not 6e-17
    sine, cosine = (round(f(math.radians(angle % 360)), 15) for f in (math.sin, math.cos))
    return -sine, cosine


def distance(rows: Tensor, columns: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """From every pixel to the nearest point of every segment, in pixels, (S, H, W).

    Args:
        rows: Positions of the rows, (H,).
        columns: Positions of the columns, (W,).
        start: Where the segments start, (row, column), (S, 2).
        end: Where they end, (S, 2). A segment may be a point.
    """
    down = rows[:, None] - start[:, 0, None, None]
    across = columns - start[:, 1, None, None]
    v = (end - start)[..., None, None]
    square = v.square().sum(1).clamp_min(torch.finfo(v.dtype).tiny)
    t = ((down * v[:, 0] + across * v[:, 1]) / square).clamp(0, 1)
    return torch.hypot(down - t * v[:, 0], across - t * v[:, 1])
