"""The network that reads measurements for the posterior flow: a small U-Net on 2x2 blocks.

It sees an estimate of the image, the mask and the noise level (`known`). It returns an image-sized
map, and features at the two scales of the flow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..devices import filled, networks, single_or_double
from .layers import zero

__all__ = ["ConditioningUNet", "known"]


def known(start: Tensor, mask: Tensor | None, noise: float | Tensor) -> Tensor:
    """Stack what is known of y: start image, mask and noise level.

    Args:
        start: The start image, such as A_dagger(y), shape (B, C, H, W).
        mask: 1 where a pixel is measured, shape (B or 1, 1, H, W); None where all of them are.
        noise: Standard deviation of the noise, a number or a tensor (B, 1 or C, H, W).

    Returns:
        The networks' input, shape (B, C + 2, H, W).

    >>> known(torch.rand(2, 3, 8, 8), None, 0.1).shape
    torch.Size([2, 5, 8, 8])
    """
    b, _, h, w = start.shape
    mask = start.new_ones(b, 1, h, w) if mask is None else mask.to(start).expand(b, 1, h, w)
    level = filled(noise, start)
    level = level.mean(1, keepdim=True) if level.ndim else level
    return torch.cat([start, mask, level.expand(b, 1, h, w)], 1)


class Residual(nn.Module):
    """Residual block x + conv(silu(conv(silu(norm(x))))), which starts as the identity.

    Args:
        width: Channels, a multiple of 8. The normalization is over groups of one image.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.last = zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Transform features (B, width, H, W)."""
        return x + self.last(F.silu(self.first(F.silu(self.norm(x)))))


class ConditioningUNet(nn.Module):
    """A small U-Net on 2x2 blocks of pixels.

    Args:
        inputs: Channels of the input.
        out: Channels of the image-sized output.
        width: Channels at half size, a multiple of 8; there are twice as many at quarter size.

    >>> out, half, quarter = ConditioningUNet(3, 1, 8)(torch.rand(2, 3, 8, 8))
    >>> out.shape, half.shape, quarter.shape
    (torch.Size([2, 1, 8, 8]), torch.Size([2, 8, 4, 4]), torch.Size([2, 16, 2, 2]))
    """

    def __init__(self, inputs: int, out: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4 * inputs, width, 3, padding=1)
        self.fine = nn.Sequential(Residual(width), Residual(width))
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.coarse = nn.Sequential(Residual(2 * width), Residual(2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge = nn.Sequential(Residual(width), Residual(width))
        self.head = zero(nn.Conv2d(width, 4 * out, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read inputs (B, inputs, H, W).

        Returns:
            An image-sized map (B, out, H, W), zero before training; features (B, width, H/2,
            W/2); and features (B, 2 width, H/4, W/4).
        """
        with networks(x.device):
            return self._forward(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(self.stem(F.pixel_unshuffle(x, 2)))
        coarse = self.coarse(self.down(fine))
        fine = self.merge(fine + self.up(coarse))
        return single_or_double(F.pixel_shuffle(self.head(fine), 2)), fine, coarse
