"""Inpainting of brush strokes: freehand scribbles hide pixels, other ones in every image.

A stroke is a random walk of SEGMENTS straight pieces through the image of height H and width W.
With u, u' uniform on [0, 1), independent for each piece,

    p_0      uniform in the image          heading_1 uniform on [0, 360) degrees
    heading_k = heading_(k-1) + TURN (2 u - 1)
    p_k       = p_(k-1) + 2 LENGTH u' min(H, W) (-sin heading_k, cos heading_k)

where a walk that leaves the image is reflected back into it. A pixel is hidden when its centre is
within width / 2 of a piece. As SEGMENTS LENGTH = 1, a stroke is on average as long as the shorter
side of the image, and hides about width times that many pixels: fewer where strokes cross.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ..bounds import SEED, Option, Real, Whole
from ..rng import PerImageGenerator, StreamId
from .lines import distance
from .masks import Inpaint

__all__ = ["FreeformInpaint"]

SEGMENTS = 8  # straight pieces of a stroke
TURN = 60.0  # degrees by which a stroke turns at most between two pieces
LENGTH = 0.125  # mean length of a piece in shorter sides of the image


class FreeformInpaint(Inpaint):
    """Thick brush strokes are hidden; each image has its own, the same in all its channels.

    Text form: "inpaint:freeform,strokes=4,width=6,seed=0".

    Args:
        strokes: How many strokes, a whole number from 1 to 1000.
        width: Thickness of the brush in pixels, a number from 1 to 1024.
        seed: Seed of the masks, a whole number from 0 to 9223372036854775807; the mask of an
            image depends on it and on the image's number.

    Raises:
        InputError: an option out of its bounds.
    """

    form = "inpaint:freeform"
    options: ClassVar[dict[str, Option]] = {
        "strokes": Whole(1, 1000),
        "width": Real(1, 1024),
        "seed": SEED,
    }
    strokes: int
    width: float
    seed: int

    def __init__(self, strokes: int, width: float, seed: int = 0) -> None:
        self._take_options(strokes=strokes, width=width, seed=seed)

    def _draw(self, index: list[int], height: int, width: int) -> Tensor:
        # the path is longer than that of other masks: the draws must not be the same numbers
        streams = PerImageGenerator(self.seed, index, StreamId.MASK, 1)
        walks = _walks(streams.rand(self.strokes, 3 + 2 * SEGMENTS), height, width)
        rows, columns = torch.arange(height), torch.arange(width)
        masks = torch.ones(len(index), 1, height, width)
        for mask, strokes in zip(masks, walks, strict=True):
            for corners in strokes:
                for piece in range(SEGMENTS):  # one at a time: each is as large as the image
                    start, end = corners[piece : piece + 1], corners[piece + 1 : piece + 2]
                    gap = distance(rows, columns, start, end)
                    mask[gap <= self.width / 2] = 0
        return masks


def _walks(draws: Tensor, height: int, width: int) -> Tensor:
    """Corners (B, strokes, SEGMENTS + 1, 2) of the strokes as row and column."""
    sides = torch.tensor([height - 1, width - 1])
    start = draws[..., None, :2] * sides
    angles, lengths = draws[..., 3:].chunk(2, -1)
    heading = 360 * draws[..., 2:3] + TURN * (2 * angles - 1).cumsum(-1)
    step = 2 * LENGTH * min(height, width) * lengths
    radians = heading.deg2rad()
    moves = step[..., None] * torch.stack([-radians.sin(), radians.cos()], -1)
    walk = torch.cat([start, start + moves.cumsum(-2)], -2)
    # there and back again: the distance to the nearest multiple of twice the side
    period = 2 * sides.clamp_min(1)
    return (walk - period * (walk / period).round()).abs().minimum(sides)
