r"""JPEG compression: the image that a decoder makes of the compressed file (ITU-T T.81, 1992).

The values :math:`v = 255 x - 128` of every plane are cut into blocks of 8 x 8 pixels. With C the
matrix of the orthonormal discrete cosine transform and Q a table of steps,

.. math::

    c = C\, v_{block}\, C^T, \qquad q = \operatorname{round}(c / Q), \qquad
    \hat v_{block} = C^T (q \odot Q)\, C

A color image becomes one plane of luminance and two of chrominance (JFIF:
Y = 0.299 R + 0.587 G + 0.114 B). With chroma 4:2:0 the chrominance is stored as means of 2 x 2
pixels, and linear interpolation brings it back to full size. Sides that are no multiple of a block
are padded by repeating the edge. The result is clipped to [0, 1]. The tables are those of annex K
of the standard, scaled by the quality as the library of the Independent JPEG Group does.

The planes are rounded to 8 bits before they are coded, as those of a file are; the decoded image
is not rounded.

The code is our own because A must be differentiable, batched, and independent of the batch; image
libraries offer none of these. The tests compare it with Pillow.

The prox moves every coefficient by itself, as that of quantization does with values (see
`pixelwise`). As C is orthonormal, this is exact for a gray image of whole blocks without clipping,
apart from the rounding to 8 bits. For other images it is close: its result has nearly the
coefficients of y.

Autograd passes rounding and clipping straight through (see `pixelwise`): for a gray image it
treats A as the identity.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Choice, Option, Whole
from ..errors import InputError
from .base import NonlinearOperator, Operator
from .compose import Local
from .crops import Window
from .linalg import dct_matrix
from .pixelwise import nearest_level, straight_through

__all__ = ["Jpeg", "table"]

INSIDE = 0.05  # of a step; the planes' rounding moves coefficients by about 0.3
CHROMA = {"4:2:0": 2, "4:4:4": 1}  # name -> side of the squares that share their chrominance

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
TO_YCBCR = (  # R, G, B -> Y, Cb, Cr, each minus 128
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)
TO_RGB = (  # the inverse
    (1.0, 0.0, 1.402),
    (1.0, -0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587),
    (1.0, 1.772, 0.0),
)
TIE = 3e-4  # of a step or level: 8-bit images often lie halfway, and no last bit may decide


class Jpeg(Local, NonlinearOperator):
    """Compress the image as JPEG and decode it. Text form: "jpeg,quality=10,chroma=4:2:0".

    Args:
        quality: The quality of the file, a whole number from 1 to 100.
        chroma: One of 4:2:0, 4:4:4: chrominance at half the size, or at full size. It has no
            effect on a gray image.

    Raises:
        InputError: An option is out of its bounds.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> parse("jpeg,quality=10").A(torch.full((1, 1, 8, 8), 128 / 255)).mean()
    tensor(0.5020)
    """

    form = "jpeg"
    options: ClassVar[dict[str, Option]] = {
        "quality": Whole(1, 100),
        "chroma": Choice(tuple(CHROMA)),
    }
    quality: int
    chroma: str

    def __init__(self, quality: int, chroma: str = "4:2:0") -> None:
        self._take_options(quality=quality, chroma=chroma)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Check that the image has 1 or 3 channels, and return self."""
        self._check(tuple(shape))
        return self

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[-3] not in (1, 3):
            raise InputError(f"jpeg: the image has {shape[-3]} channels: give 1 or 3")

    @property
    def crop_grid(self) -> int:  # type: ignore[override]
        """Side of the squares whose pixels are coded together: 8, or 16 with chroma 4:2:0."""
        return 8 * CHROMA[self.chroma]

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        # a whole block is known or unknown; with 4:2:0, interpolation adds a pixel around it
        side = CHROMA[self.chroma] if window.channels != 1 else 1
        missing = [(0, -n % (8 * side)) for n in window.size]
        unknown = 1 - window.extended(missing, _repeat)
        blocks = F.max_pool2d(unknown, 8 * side)
        wide = blocks.repeat_interleave(8 * side, -2).repeat_interleave(8 * side, -1)
        known = replace(window, known=1 - wide[..., : window.size[0], : window.size[1]])
        margin = side - 1
        return self, known.eroded([(margin, margin)] * 2, _repeat) if margin else known

    @property
    def proximal(self) -> bool:
        """True: the prox has a closed form, exact or close."""
        return True

    def _A(self, x: Tensor) -> Tensor:
        decoded = []
        for plane, steps in self._planes(255 * x - 128):
            values = _coefficients(straight_through((plane + TIE).round(), plane)) / steps
            # halves away from zero
            rounded = values.sign() * (values.abs() + 0.5 + TIE).floor()
            decoded.append(_pixels(straight_through(rounded, values) * steps, plane))
        image = (self._image(decoded, x, "bilinear") + 128) / 255
        return straight_through(image.clamp(0, 1), image)

    def _prox(self, z: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        weight, moves = gamma[..., None, None], []
        both = self._planes(255 * z - 128), self._planes(255 * y - 128)
        for (plane, steps), (measured, _) in zip(*both, strict=True):
            values, wanted = (_coefficients(p) / steps for p in (plane, measured))
            moved = nearest_level(values, wanted, weight, INSIDE)
            moves.append(_pixels((moved - values) * steps, plane))
        return z + self._image(moves, z, "nearest") / 255

    def _planes(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The planes (B, 1 or 2, H', W') that are coded, each with its steps."""
        steps = table(LUMINANCE, self.quality).to(x)
        if x.shape[1] == 1:
            return [(x, steps)]
        side = CHROMA[self.chroma]
        luma, chroma = _mix_channels(x, TO_YCBCR).split((1, 2), 1)
        # as in the library: columns are padded before the chrominance is averaged, rows after
        wide = _pad_edge(_pad_edge(chroma, side, -2), 8 * side, -1)
        thin = F.avg_pool2d(wide, side)[..., : -(-x.shape[-1] // side)]
        return [(luma, steps), (thin, table(CHROMINANCE, self.quality).to(x))]

    def _image(self, planes: list[Tensor], like: Tensor, mode: str) -> Tensor:
        """The image of decoded planes, (B, C, H, W); `mode` interpolates the chrominance."""
        if like.shape[1] == 1:
            return planes[0]
        (height, width), side = like.shape[-2:], CHROMA[self.chroma]
        chroma = F.interpolate(planes[1], scale_factor=side, mode=mode)[..., :height, :width]
        return _mix_channels(torch.cat([planes[0], chroma], 1), TO_RGB)


def _repeat(position: Tensor, n: int) -> Tensor:
    """The source pixel of positions on a line of n pixels whose ends are repeated."""
    return position.clamp(0, n - 1)


def table(base: Sequence[Sequence[int]], quality: int) -> Tensor:
    """Return the steps Q of the 64 coefficients, whole numbers from 1 to 255, (8, 8).

    Args:
        base: The table of the standard at quality 50.
        quality: From 1 to 100.

    >>> from unmurk.operators.jpeg import LUMINANCE, table
    >>> table(LUMINANCE, 10)[0, :4].tolist()
    [80, 55, 50, 80]
    """
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * percent + 50) // 100).clamp(1, 255)


def _coefficients(planes: Tensor) -> Tensor:
    """c of every block, (B, C, rows of blocks, columns of blocks, 8, 8)."""
    full = _pad_edge(_pad_edge(planes, 8, -2), 8, -1)
    blocks = full.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)
    cosines = dct_matrix(8).to(planes)
    return cosines @ blocks @ cosines.T


def _pixels(coefficients: Tensor, like: Tensor) -> Tensor:
    """Planes of the size of `like` from the coefficients of their blocks."""
    cosines = dct_matrix(8).to(like)
    blocks = cosines.T @ coefficients @ cosines
    full = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return full[..., : like.shape[-2], : like.shape[-1]]


def _pad_edge(planes: Tensor, multiple: int, axis: int) -> Tensor:
    """Repeat the last row (axis -2) or column (-1) of planes up to a multiple in length."""
    missing = -planes.shape[axis] % multiple
    last = planes.narrow(axis, planes.shape[axis] - 1, 1)
    shape = list(planes.shape)
    shape[axis] = missing
    return torch.cat([planes, last.expand(shape)], axis) if missing else planes


def _mix_channels(planes: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    """Make each new channel a linear combination of the old ones."""
    return torch.einsum("kc,bchw->bkhw", planes.new_tensor(matrix), planes)
