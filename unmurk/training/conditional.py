r"""A denoiser with further inputs: :math:`D(x_t, \sigma, c)`.

The conditioning channels :math:`c` enter the first convolution of the network beside :math:`x_t`:

.. math:: W * x_t + b \quad\longrightarrow\quad W * x_t + V * c + b .

This is a convolution of :math:`x_t` stacked on :math:`c`. Where :math:`V * c = 0` the network is
:math:`D(x_t, \sigma)`, and its own weights keep their names.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.prior import Prior
from ..diffusion.samplers import prior_draw
from ..errors import InputError
from ..rng import PerImageGenerator

__all__ = ["ConditionalDenoiser", "conditioning_stem"]


def conditioning_stem(prior: Prior, channels: int) -> nn.Conv2d:
    """Create V for the network of a prior; its weights come from torch's global stream.

    Args:
        prior: The prior.
        channels: Number of conditioning channels.

    Raises:
        InputError: The prior has a network of the caller's own, whose first layer is unknown.

    >>> prior = Prior.create("tiny", (1, 8, 8))
    >>> conditioning_stem(prior, 2).weight.shape[1:]
    torch.Size([2, 3, 3])
    """
    first = getattr(prior.network, "conv_in", None)
    if not isinstance(first, nn.Conv2d):
        raise InputError(
            f"the prior's network is a {type(prior.network).__name__}, and conditioning needs the"
            " first convolution of a UNet2DModel: take a preset, or another method"
        )
    return nn.Conv2d(channels, first.out_channels, 3, padding=1, bias=False)


class _FirstConvolution(nn.Conv2d):
    """The first convolution of a network; it adds V * c where c is stacked on its input.

    It shares the weights of the convolution whose place it takes. V belongs to another module, so
    it is kept out of this one's parameters.

    Args:
        own: The convolution W * x + b.
        stem: The convolution V.
    """

    def __init__(self, own: nn.Conv2d, stem: nn.Module) -> None:
        super().__init__(
            own.in_channels, own.out_channels, 3, padding=1, device="meta", dtype=own.weight.dtype
        )
        self.weight, self.bias = own.weight, own.bias
        self.stem = (stem,)  # in a tuple: not a sub-module

    def forward(self, x: Tensor) -> Tensor:
        own, c = x[:, : self.in_channels].contiguous(), x[:, self.in_channels :].contiguous()
        out = super().forward(own)
        return out + self.stem[0](c) if c.shape[1] else out


class _Stacked(nn.Module):
    """A network that is fed x_t with fixed channels c stacked on it."""

    def __init__(self, network: nn.Module, channels: Tensor) -> None:
        super().__init__()
        self.network, self.channels = network, channels

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(torch.cat([x, self.channels.to(x)], 1), t)


class ConditionalDenoiser:
    """The network of a prior with conditioning channels.

    Args:
        prior: The prior. Used by itself, it works as before.
        stem: V, a convolution without bias from the channels to the network's first features.

    >>> prior = Prior.create("tiny", (1, 8, 8)).eval()
    >>> stem = conditioning_stem(prior, 2)
    >>> _ = nn.init.zeros_(stem.weight)  # c then has no effect
    >>> x, c = torch.rand(3, 1, 8, 8), torch.rand(3, 2, 8, 8)
    >>> with torch.no_grad():
    ...     found = ConditionalDenoiser(prior, stem).denoise(x, 0.5, c)
    ...     torch.allclose(found, prior.denoise(x, 0.5))
    True
    """

    def __init__(self, prior: Prior, stem: nn.Module) -> None:
        self.prior, self.stem = prior, stem
        network: Any = prior.network
        network.conv_in = _FirstConvolution(network.conv_in, stem)

    def denoise(self, x: Tensor, sigma: float | Tensor, channels: Tensor) -> Tensor:
        """Compute D(x, sigma, c).

        Args:
            x: Images (B, C, H, W).
            sigma: Noise level: one number, or one for each image (B,).
            channels: Conditioning channels c, shape (B, K, H, W).

        Returns:
            Images of shape (B, C, H, W).
        """
        view = copy.copy(self.prior)  # it shares all weights
        view._modules = {**self.prior._modules, "network": _Stacked(self.prior.network, channels)}
        return view.denoise(x, sigma)

    @torch.no_grad()
    def sample(self, channels: Tensor, streams: PerImageGenerator, steps: int) -> Tensor:
        """Draw one image for each conditioning input; see `samplers.prior_draw`.

        Args:
            channels: Conditioning channels c, shape (B, K, H, W).
            streams: One random stream for each of them.
            steps: Network evaluations.

        Returns:
            Images of shape (B, C, H, W).
        """
        prior = self.prior

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return self.denoise(x, sigma, channels)

        return prior_draw(denoise, prior.shape, streams, steps, prior.sigma_min, prior.sigma_max)
