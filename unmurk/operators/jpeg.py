"""JPEG compression: what a decoder makes of the compressed image (ITU-T T.81, 1992).

Values v = 255 x - 128 of every plane are cut into blocks of 8 x 8 pixels, and with C the matrix of
the orthonormal discrete cosine transform and Q a table of steps

    c = C block C^T,    q = round(c / Q),    decoded block = C^T (q Q) C

A colour image becomes brightness and two differences of colour (JFIF: Y = 0.299 R + 0.587 G +
0.114 B), and with chroma 4:2:0 the differences are kept as the means of 2 x 2 pixels and come back
by linear interpolation. Sides that blocks do not fill are filled by repeating the edge. The result
is clipped to [0, 1]. Tables are those of annex K of the standard, scaled by the quality as the
Independent JPEG Group's library does.

The planes are rounded to 8 bits before they are coded, as a file's are, the decoded image is not.

The prox moves every coefficient by itself, as that of `quantise` does with values: since C is
orthonormal it is exact for a grey image of whole blocks that nothing clips, but for the rounding
to 8 bits. For other images it is close: what it returns has nearly the coefficients of y.

Autograd passes rounding and clipping straight through (see `quantise`): for a grey image it takes
A for the identity.
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import Choice, Option, Whole
from ..errors import InputError
from .base import NonlinearOperator, Operator
from .quantise import nearest, straight_through

__all__ = ["Jpeg", "table"]

INSIDE = 0.05  # of a step; the planes' rounding moves coefficients by about 0.3
CHROMA = {"4:2:0": 2, "4:4:4": 1}  # name -> side of the squares that share their colour

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
COLOUR = (  # R, G, B -> Y, Cb, Cr, each less 128
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)
BACK = (  # its inverse
    (1.0, 0.0, 1.402),
    (1.0, -0.114 * 1.772 / 0.587, -0.299 * 1.402 / 0.587),
    (1.0, 1.772, 0.0),
)
TIE = 3e-4  # of a step or level: 8-bit images often lie halfway, which no last bit must decide


class Jpeg(NonlinearOperator):
    """A JPEG file of the image, decoded. Text form: "jpeg,quality=10,chroma=4:2:0".

    Args:
        quality: A whole number from 1 to 100.
        chroma: One of 4:2:0, 4:4:4: colours at half the size, or at full size. No matter for a
            grey image.

    Raises:
        InputError: an option out of its bounds.
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
        """Self, after a look at whether the image has 1 or 3 channels."""
        self._check(tuple(shape))
        return self

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape[-3] not in (1, 3):
            raise InputError(f"jpeg: the image has {shape[-3]} channels; give 1 or 3 of them")

    @property
    def proximal(self) -> bool:
        """True."""
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
            moved = nearest(values, wanted, weight, INSIDE)
            moves.append(_pixels((moved - values) * steps, plane))
        return z + self._image(moves, z, "nearest") / 255

    def _planes(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is coded, planes (B, 1 or 2, H', W'), each with its steps."""
        bright = table(LUMINANCE, self.quality).to(x)
        if x.shape[1] == 1:
            return [(x, bright)]
        side = CHROMA[self.chroma]
        brightness, colours = _mixed(x, COLOUR).split((1, 2), 1)
        # as the library: columns are filled before the colours are thinned, rows after
        wide = _filled(_filled(colours, side, -2), 8 * side, -1)
        thin = F.avg_pool2d(wide, side)[..., : -(-x.shape[-1] // side)]
        return [(brightness, bright), (thin, table(CHROMINANCE, self.quality).to(x))]

    def _image(self, planes: list[Tensor], like: Tensor, mode: str) -> Tensor:
        """The image of decoded planes, (B, C, H, W); colours come back to full size by `mode`."""
        if like.shape[1] == 1:
            return planes[0]
        (height, width), side = like.shape[-2:], CHROMA[self.chroma]
        colours = F.interpolate(planes[1], scale_factor=side, mode=mode)[..., :height, :width]
        return _mixed(torch.cat([planes[0], colours], 1), BACK)


def table(base: Sequence[Sequence[int]], quality: int) -> Tensor:
    """The steps Q of the 64 coefficients at a quality, whole numbers from 1 to 255, (8, 8)."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(base) * percent + 50) // 100).clamp(1, 255)


def _coefficients(planes: Tensor) -> Tensor:
    """c of every block, (B, C, rows of blocks, columns of blocks, 8, 8)."""
    full = _filled(_filled(planes, 8, -2), 8, -1)
    blocks = full.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)
    cosines = _cosines().to(planes)
    return cosines @ blocks @ cosines.T


def _pixels(coefficients: Tensor, like: Tensor) -> Tensor:
    """Planes of the size of `like` from the coefficients of their blocks."""
    cosines = _cosines().to(like)
    blocks = cosines.T @ coefficients @ cosines
    full = blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)
    return full[..., : like.shape[-2], : like.shape[-1]]


def _cosines() -> Tensor:
    """C, the orthonormal cosine transform of 8 values, (8, 8)."""
    k = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos(math.pi / 8 * k[:, None] * (k + 0.5)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def _filled(planes: Tensor, multiple: int, axis: int) -> Tensor:
    """Planes with their last row (axis -2) or column (-1) repeated to a multiple in length."""
    missing = -planes.shape[axis] % multiple
    last = planes.narrow(axis, planes.shape[axis] - 1, 1)
    shape = list(planes.shape)
    shape[axis] = missing
    return torch.cat([planes, last.expand(shape)], axis) if missing else planes


def _mixed(planes: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    """Each new channel a mixture of the old ones."""
    return torch.einsum("kc,bchw->bkhw", planes.new_tensor(matrix), planes)
