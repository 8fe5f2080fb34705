r"""Layers of the normalizing flows, and the two-scale flow that they make up.

One step of a flow at one scale is an invertible 1x1 convolution in LU form,

.. math:: x \mapsto W x, \qquad W = P L (U + \mathrm{diag}(\pm e^{\lambda})), \qquad
    \log|\det| = H W \sum_i \lambda_i

(Kingma and Dhariwal, 2018, arXiv 1807.03039), followed by an affine coupling

.. math:: (a, b) \mapsto (a,\; b\, e^{r} + t), \qquad (r, t) = \mathrm{CNN}(a, \text{features}),
    \qquad \log|\det| = \sum r,

whose log-scale r is bounded by a tanh (Dinh et al., 2017, arXiv 1605.08803). The last layer of
every coupling starts at zero, so the whole flow starts as a rotation. No layer normalizes over the
batch.

`Flow` joins two scales: 2x2 blocks of pixels become channels, K steps transform them, half of the
channels leave, and the rest passes through the same at the next scale. An image is

.. math:: x = m + s \odot g(z), \qquad z \sim N(0, I),

and its density is exact,

.. math:: \log q(x) = \log N(z; 0, I) - \log\left|\det \frac{\partial g}{\partial z}\right|
    - \sum \log s.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..devices import networks, single_or_double
from ..operators.linalg import squared_norm
from ..rng import PerImageGenerator

__all__ = [
    "AffineCoupling",
    "Context",
    "Flow",
    "InvertibleConv1x1",
    "Rescale",
    "bounded",
    "unbounded",
    "zero",
]

LOG_SPREAD = (math.log(1e-3), 0.0)  # bounds of log s: s lies between 0.001 and 1 of the range


def bounded(raw: Tensor) -> Tensor:
    """Map a free parameter to log s, which lies between its bounds.

    >>> bounded(torch.tensor([-9.0, 9.0])).exp()
    tensor([0.0010, 1.0000])
    """
    low, high = LOG_SPREAD
    return (low + high) / 2 + (high - low) / 2 * torch.tanh(raw)


def unbounded(spread: float) -> float:
    """Return the free parameter that `bounded` maps to log `spread`.

    >>> round(float(bounded(torch.tensor(unbounded(0.3))).exp()), 6)
    0.3
    """
    low, high = LOG_SPREAD
    return math.atanh((math.log(spread) - (low + high) / 2) / ((high - low) / 2))


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Set the weights of a layer to zero, and return it.

    >>> zero(nn.Conv2d(1, 2, 3)).weight.abs().max().item()
    0.0
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class InvertibleConv1x1(nn.Module):
    """Invertible 1x1 convolution W = P L U, which starts as a random rotation.

    Args:
        channels: Number of channels, of the input and of the output.

    >>> layer = InvertibleConv1x1(4)
    >>> x = torch.rand(2, 4, 3, 3)
    >>> bool(torch.allclose(layer.inverse(layer(x)), x, atol=1e-5))
    True
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", p.float())
        self.register_buffer("sign", diagonal.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())

    def matrix(self) -> Tensor:
        """Return W, shape (channels, channels)."""
        eye = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ (self.lower.tril(-1) + eye) @ upper

    def log_det(self, x: Tensor) -> Tensor:
        """Return the log-determinant of the map on images like x, a scalar."""
        return self.log_diagonal.sum() * x.shape[-2] * x.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Apply W to every pixel of x, shape (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.matrix()[:, :, None, None])

    def inverse(self, x: Tensor) -> Tensor:
        """Apply the inverse of W to every pixel of x, shape (B, C, H, W)."""
        with torch.autocast(x.device.type, enabled=False):
            # `inv` waits for the device to report success; a matrix in this LU form is invertible
            inverse = torch.linalg.inv_ex(self.matrix().double()).inverse.to(x.dtype)
            return F.conv2d(x, inverse[:, :, None, None])


class AffineCoupling(nn.Module):
    """Affine coupling b <- b exp(r) + t, with (r, t) a function of a and of features.

    Args:
        channels: Channels of the input; the first half is a, the rest is b.
        features: Channels of the features.
        hidden: Width of the network.

    >>> layer, features = AffineCoupling(4, features=3, hidden=8), torch.rand(2, 3, 4, 4)
    >>> layer.last = nn.Conv2d(8, 4, 3, padding=1)  # instead of zeros, with which it does nothing
    >>> x = torch.rand(2, 4, 4, 4)
    >>> y, log_det = layer(x, features)
    >>> back, opposite = layer.inverse(y, features)
    >>> torch.allclose(back, x, atol=1e-5), torch.allclose(log_det, -opposite, atol=1e-5)
    (True, True)
    """

    bound = 1.5

    def __init__(self, channels: int, features: int, hidden: int) -> None:
        super().__init__()
        self.split = channels // 2
        self.first = nn.Conv2d(self.split + features, hidden, 3, padding=1)
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.last = zero(nn.Conv2d(hidden, 2 * (channels - self.split), 3, padding=1))

    def affine(self, a: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log-scale r and shift t, shape (B, channels of b, H, W) each."""
        with networks(a.device):
            h = F.silu(self.first(torch.cat([a, features.to(a.dtype)], 1)))
            r, t = single_or_double(self.last(F.silu(self.middle(h)))).chunk(2, 1)
        return self.bound * torch.tanh(r / self.bound), t

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Transform x (B, C, H, W); returns the result and the log-determinant, (B,)."""
        a, b = x[:, : self.split], x[:, self.split :]
        r, t = self.affine(a, features)
        return torch.cat([a, b * r.exp() + t], 1), r.flatten(1).sum(1)

    def inverse(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Invert `forward`; returns the result and its log-determinant, (B,)."""
        a, b = x[:, : self.split], x[:, self.split :]
        r, t = self.affine(a, features)
        return torch.cat([a, (b - t) * (-r).exp()], 1), -r.flatten(1).sum(1)


class Rescale(nn.Module):
    """K steps at one scale, each an invertible 1x1 convolution and a coupling.

    Args:
        channels: Channels of the input.
        features: Channels of the features that the couplings see.
        hidden: Width of the couplings.
        steps: Number K of steps.

    >>> layer, features = Rescale(4, features=3, hidden=8, steps=2), torch.rand(2, 3, 4, 4)
    >>> x = torch.rand(2, 4, 4, 4)
    >>> y, log_det = layer(x, features)
    >>> torch.allclose(layer.inverse(y, features)[0], x, atol=1e-5)
    True
    >>> torch.allclose(y.square().sum(1), x.square().sum(1), atol=1e-4)  # at first a rotation
    True
    """

    def __init__(self, channels: int, features: int, hidden: int, steps: int) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(InvertibleConv1x1(channels) for _ in range(steps))
        self.couplings = nn.ModuleList(
            AffineCoupling(channels, features, hidden) for _ in range(steps)
        )

    def steps(self) -> list[tuple[InvertibleConv1x1, AffineCoupling]]:
        """Return the steps in generative order, from latent to image."""
        pairs = zip(self.mixes, self.couplings, strict=True)
        return [
            (cast(InvertibleConv1x1, mix), cast(AffineCoupling, coupling))
            for mix, coupling in pairs
        ]

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Transform x (B, C, H, W) from latent to image; also returns the log-det, (B,)."""
        total = x.new_zeros(len(x))
        for mix, coupling in self.steps():
            total = total + mix.log_det(x)
            x, log_det = coupling(mix(x), features)
            total = total + log_det
        return x, total

    def inverse(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Invert `forward`; also returns its log-determinant, (B,)."""
        total = x.new_zeros(len(x))
        for mix, coupling in reversed(self.steps()):
            x, log_det = coupling.inverse(x, features)
            x = mix.inverse(x)
            total = total + log_det - mix.log_det(x)
        return x, total


@dataclass(frozen=True)
class Context:
    """Everything a flow depends on for one batch of measurements.

    Attributes:
        mean: Mean image m(y), shape (B, C, H, W).
        log_spread: Log of the scale image, log s(y), shape (B, C, H, W).
        half: Features at half size, shape (B, F, H/2, W/2).
        quarter: Features at quarter size, shape (B, 2 F, H/4, W/4).

    >>> image, half = torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 4, 4)
    >>> context = Context(image, image, half, quarter=torch.zeros(2, 6, 2, 2)).repeat(3)
    >>> context.mean.shape, context.quarter.shape
    (torch.Size([6, 1, 8, 8]), torch.Size([6, 6, 2, 2]))
    """

    mean: Tensor
    log_spread: Tensor
    half: Tensor
    quarter: Tensor

    def repeat(self, n: int) -> "Context":
        """Repeat the whole batch n times: images 0 to B - 1, then again."""
        parts = (self.mean, self.log_spread, self.half, self.quarter)
        return Context(*(p.repeat(n, 1, 1, 1) for p in parts))


class Flow(nn.Module):
    """A two-scale coupling flow. Everything it depends on comes as a `Context`.

    Attributes:
        shape: Shape (C, H, W) of the images.
        fine: The steps at half size.
        coarse: The steps at quarter size.

    >>> from unmurk import Problem
    >>> from unmurk.flows.posterior import Posterior
    >>> flow, z = Posterior.create("tiny", (1, 8, 8)), torch.randn(2, 1, 8, 8)
    >>> context = flow(torch.rand(2, 1, 8, 8), Problem("identity", 0.1)).context
    >>> x, log_det = flow.transform(z, context)
    >>> back, opposite = flow.invert(x, context)
    >>> torch.allclose(back, z, atol=1e-4), torch.allclose(log_det, -opposite, atol=1e-2)
    (True, True)
    """

    shape: tuple[int, int, int]
    fine: Rescale
    coarse: Rescale

    def transform(self, z: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Map latents to images.

        Args:
            z: Latents, shape (B, C, H, W).
            context: What the flow depends on.

        Returns:
            Images x, shape (B, C, H, W), and the log-determinant of dx/dz, shape (B,).
        """
        c = self.shape[0]
        blocks = F.pixel_unshuffle(z, 2)
        out, deep = blocks[:, : 2 * c], F.pixel_unshuffle(blocks[:, 2 * c :], 2)
        deep, first = self.coarse(deep, context.quarter)
        blocks, second = self.fine(torch.cat([out, F.pixel_shuffle(deep, 2)], 1), context.half)
        u = F.pixel_shuffle(blocks, 2)
        log_det = first + second + context.log_spread.flatten(1).sum(1)
        return context.mean + context.log_spread.exp() * u, log_det

    def invert(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Map images to latents.

        Args:
            x: Images, shape (B, C, H, W).
            context: What the flow depends on.

        Returns:
            Latents z, shape (B, C, H, W), and the log-determinant of dz/dx, shape (B,).
        """
        c = self.shape[0]
        u = (x - context.mean) * (-context.log_spread).exp()
        blocks, second = self.fine.inverse(F.pixel_unshuffle(u, 2), context.half)
        deep, first = self.coarse.inverse(
            F.pixel_unshuffle(blocks[:, 2 * c :], 2), context.quarter
        )
        blocks = torch.cat([blocks[:, : 2 * c], F.pixel_shuffle(deep, 2)], 1)
        return F.pixel_shuffle(blocks, 2), first + second - context.log_spread.flatten(1).sum(1)

    def log_density(self, x: Tensor, context: Context) -> Tensor:
        """Return log q(x | y), shape (B,), in nats of density per unit of intensity."""
        z, log_det = self.invert(x, context)
        d = z[0].numel()
        return log_det - squared_norm(z) / 2 - d / 2 * math.log(2 * math.pi)

    def noise(
        self, index: Sequence[int], seed: int, device: torch.device
    ) -> Callable[[int], Tensor]:
        """Return the function k -> latents z (B, C, H, W) of the streams (seed, image, k)."""

        def draw(k: int) -> Tensor:
            return PerImageGenerator(seed, index, k, device=device).randn(*self.shape)

        return draw

    def moments(
        self, context: Context, n: int, noise: Callable[[int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Estimate mean and standard deviation from n draws in antithetic pairs.

        Args:
            context: What the flow depends on.
            n: Number of draws, even.
            noise: Returns the latents z (B, C, H, W) of pair k, which is (z, -z).

        Returns:
            Mean and standard deviation, shape (B, C, H, W) each.
        """
        total, square = torch.zeros_like(context.mean), torch.zeros_like(context.mean)
        for k in range(n // 2):
            z = noise(k).to(context.mean)
            for sign in (1.0, -1.0):
                offset = self.transform(sign * z, context)[0] - context.mean
                total, square = total + offset, square + offset**2
        mean = total / n
        return context.mean + mean, (square / n - mean**2).clamp_min(0).sqrt()
