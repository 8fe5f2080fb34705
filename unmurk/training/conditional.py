"""A denoiser that sees more than the noisy image: D(x_t, sigma, c).

The channels c enter where x_t does. The first convolution of the network becomes

    W * x_t + b  ->  W * x_t + V * c + b,

which is the same as stacking c on x_t, and leaves the network as it is: where V * c = 0 it is
D(x_t, sigma).
"""

import torch
from torch import Tensor, nn

from ..diffusion.prior import Prior
from ..diffusion.samplers import prior_draw
from ..rng import PerImageGenerator

__all__ = ["Conditional", "stem"]


def stem(prior: Prior, channels: int) -> nn.Conv2d:
    """V for the network of a prior (weights from torch's global stream)."""
    width = prior.unet.conv_in.out_channels
    return nn.Conv2d(channels, width, 3, padding=1, bias=False)


class Conditional:
    """A prior's network with further channels.

    Args:
        prior: The prior; used by itself, it works as before.
        stem: V, a convolution without a bias from the channels to those of the first layer.
    """

    def __init__(self, prior: Prior, stem: nn.Module) -> None:
        self.prior, self.stem = prior, stem
        self.channels: Tensor | None = None
        prior.unet.conv_in.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out if self.channels is None else out + self.stem(self.channels)

    def denoise(self, x: Tensor, sigma: float | Tensor, channels: Tensor) -> Tensor:
        """D(x, sigma, c), (B, C, H, W), with channels c (B, K, H, W)."""
        self.channels = channels
        try:
            return self.prior.denoise(x, sigma)
        finally:
            self.channels = None

    @torch.no_grad()
    def sample(self, channels: Tensor, streams: PerImageGenerator, steps: int) -> Tensor:
        """An image for each row of the channels, by so many evaluations; see `prior_draw`."""
        prior = self.prior

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return self.denoise(x, sigma, channels)

        return prior_draw(denoise, prior.shape, streams, steps, prior.sigma_min, prior.sigma_max)
