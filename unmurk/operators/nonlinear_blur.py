r"""A blur that depends on the position and on the brightness there: a small random network.

K motion blurs :math:`B_k`, of lengths from length / K to `length` and of directions all around,
are mixed pixel by pixel:

.. math::

    y_i &= \sum_k w_{k,i}\, (B_k x)_i, \qquad
    w_i = \operatorname{softmax}(\mathtt{SHARP}\; W \tanh(V f_i + b)) \\
    f_i &= (\mathrm{row}, \mathrm{column}, \mathrm{brightness}),
    \text{ each from -1 to 1 over the image and the range}

The brightness is the mean of the channels around the pixel, weighted by a Gaussian of standard
deviation length / 4. V, b, W and the directions are drawn once from the seed, so all images share
one network. Bright and dark objects at one position are blurred along different lines, and so are
equal objects at different positions. So no single deconvolution inverts A.

The weights are positive and sum to 1, and so do the kernels. Hence y stays within the range of x,
a constant stays as it is, and A is smooth. The operator takes the place of the nonlinear
deblurring of the literature (Tran et al. 2021, arXiv 2104.00317, as used by Chung et al. 2023,
arXiv 2209.14687), whose trained network cannot be part of this package. Results on the two do not
compare.
"""

import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bounds import SEED, Option
from ..rng import StreamId, generator
from .base import NonlinearOperator, Operator
from .blur import LENGTH, GaussianBlur, MotionBlur, check_kernel_size
from .compose import Local
from .convolution import Blur, fold
from .crops import Window

__all__ = ["NonlinearBlur"]

KERNELS = 6  # K, the motions that are mixed
HIDDEN = 16  # units of the network
SHARP = 3.0  # about the standard deviation of the logits: how far one motion dominates the others


class NonlinearBlur(Local, NonlinearOperator):
    """Blur by random motions that depend on position and brightness.

    Text form: "blur:nonlinear,length=7,seed=0".

    Args:
        length: Longest motion in pixels, a number from 1 to 1024.
        seed: Seed of the network and of the motions, a whole number from 0 to
            9223372036854775807.

    Raises:
        InputError: An option is out of its bounds.

    >>> import torch
    >>> from unmurk.operators import parse
    >>> A = parse("blur:nonlinear,length=3,seed=0")
    >>> bool(torch.allclose(A.A(torch.full((1, 1, 8, 8), 0.5)), torch.tensor(0.5)))
    True
    """

    form = "blur:nonlinear"
    options: ClassVar[dict[str, Option]] = {"length": LENGTH, "seed": SEED}
    length: float
    seed: int

    def __init__(self, length: float = 7.0, seed: int = 0) -> None:
        self._take_options(length=length, seed=seed)
        draws = generator(self.seed, StreamId.NONLINEAR_BLUR)
        order = torch.randperm(KERNELS, generator=draws)
        angles = 180 * (order + torch.rand(KERNELS, generator=draws)) / KERNELS
        lengths = [max(1.0, self.length * (k + 1) / KERNELS) for k in range(KERNELS)]
        motions = [MotionBlur(*motion) for motion in zip(lengths, angles.tolist(), strict=True)]
        self._bank = _bank([*motions, GaussianBlur(self.length / 4)])
        self._v = 2 * torch.randn(HIDDEN, 3, generator=draws)
        self._b = torch.randn(HIDDEN, generator=draws)
        self._w = torch.randn(KERNELS, HIDDEN, generator=draws) * SHARP / math.sqrt(HIDDEN / 2)

    def bind(self, index: Iterable[int], shape: Sequence[int]) -> Operator:
        """Check that the motions are in proportion to the image, and return self."""
        self._check(tuple(shape))
        return self

    def _check(self, shape: tuple[int, ...]) -> None:
        check_kernel_size(self.spec, self._bank, shape)

    def _crop(self, window: Window) -> tuple[Operator, Window]:
        for number in range(len(window)):
            self._check((1, *window.place(number).shape))
        window.check_margin(self.spec, self._bank.shape[-2:])
        places = []
        for axis in (-2, -1):
            position, length = window.positions(axis)
            places.append((2 * position + 1) / length[:, None] - 1)
        grid = [
            part.expand(-1, *window.size) for part in (places[0][..., None], places[1][:, None])
        ]
        reach = self._bank.shape[-1] // 2
        after = window.eroded([(reach, reach)] * 2, fold)
        return _PlacedBlur(self, torch.stack(grid, -1)), after

    def _places(self, like: Tensor) -> Tensor:
        """Row and column of each pixel, from -1 to 1 over the image, (B or 1, H, W, 2)."""
        rows, columns = ((2 * torch.arange(n).to(like) + 1) / n - 1 for n in like.shape[-2:])
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)[None]

    def _A(self, x: Tensor) -> Tensor:
        bank = self._bank.to(x)
        reach = bank.shape[-1] // 2
        rows, columns = (
            fold(torch.arange(-reach, n + reach, device=x.device), n) for n in x.shape[-2:]
        )
        wide = x.index_select(-2, rows).index_select(-1, columns)
        flat = F.conv2d(wide.flatten(0, 1)[:, None], bank)
        blurred, around = flat.unflatten(0, x.shape[:2]).split((KERNELS, 1), 2)
        weights = self._weights(around.mean(1)[:, 0])
        return (weights[:, None] * blurred).sum(2)

    def _weights(self, brightness: Tensor) -> Tensor:
        """w, the weight of each motion at every pixel, (B, K, H, W)."""
        v, b, w = (t.to(brightness) for t in (self._v, self._b, self._w))
        place = self._places(brightness).expand(len(brightness), -1, -1, -1)
        features = torch.cat([place, 2 * brightness[..., None] - 1], -1)
        return (torch.tanh(features @ v.T + b) @ w.T).softmax(-1).movedim(-1, 1)


class _PlacedBlur(NonlinearBlur):
    """The operator on crops: `places` holds the positions of their pixels in the images."""

    tensors = ("places",)
    places: Tensor

    def __init__(self, blur: NonlinearBlur, places: Tensor) -> None:
        self.__dict__.update(blur.__dict__ | {"_cache": {}, "places": places.to(blur.device)})

    def _places(self, like: Tensor) -> Tensor:
        return self.places.to(like)


def _bank(blurs: Sequence[Blur]) -> Tensor:
    """The kernels of the blurs, which are odd and point symmetric, in one size, (K, 1, k, k)."""
    kernels = [blur.kernel for blur in blurs if blur.kernel is not None]
    side = max(max(kernel.shape[-2:]) for kernel in kernels)
    bank = torch.zeros(len(kernels), 1, side, side)
    for into, kernel in zip(bank, kernels, strict=True):
        down, across = ((side - n) // 2 for n in kernel.shape[-2:])
        into[:, down : side - down, across : side - across] = kernel[0]
    return bank
