"""The posterior q(x | y): a conditional normalizing flow, cheap in both directions.

An image is drawn from a measurement y as

    x = m(y) + s(y) * u,   u = g(z; y),   z ~ N(0, I),

with a mean image m, a spread image s > 0 and a multi-scale coupling flow g. Its density is exact,

    log q(x | y) = log N(z; 0, I) - log |det dg/dz| - sum log s(y).

g works on two scales (Dinh et al., 2017, arXiv 1605.08803): 2x2 blocks of pixels become channels,
K steps mix them, half of the channels leave, and the rest goes through the same at the next
scale. A step is a 1x1 convolution in LU form (Kingma and Dhariwal, 2018, arXiv 1807.03039) and an
affine coupling whose log-scale is bounded by a tanh. Couplings see features of y at their own
scale; all that is known of y enters through (A_dagger(y), mask, sigma_y). The last layer of every
coupling starts at zero, so g starts as a rotation and q as N(m, s^2). Nothing normalises over the
batch.

m(y) is a network's correction to a start image: A_dagger(y), or, where a Gaussian prior has been
fitted to the measurements (`learn.moments`), the Wiener solution under it, which then takes the
place of A_dagger(y) everywhere.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import Whole, check_memory
from ..devices import filled, networks, on_device
from ..diffusion.networks import preset
from ..diffusion.prior import locate
from ..errors import InputError
from ..gaussian import Wiener
from ..io.weights import load_model, read_settings, weight_names
from ..problem import Problem
from ..rng import PerImageGenerator

__all__ = ["Context", "Flow", "Posterior", "Rescale", "bounded", "known", "unbounded"]

DRAWS = Whole(2, 100_000, even=True)
LOG_SPREAD = (math.log(1e-3), 0.0)  # the spread s stays between 0.001 and 1 of the range


def bounded(raw: Tensor) -> Tensor:
    """log s, between its bounds, of a free number."""
    low, high = LOG_SPREAD
    return (low + high) / 2 + (high - low) / 2 * torch.tanh(raw)


def unbounded(spread: float) -> float:
    """The free number of which log s is that of a spread."""
    low, high = LOG_SPREAD
    return math.atanh((math.log(spread) - (low + high) / 2) / ((high - low) / 2))


def known(start: Tensor, mask: Tensor | None, noise: float | Tensor) -> Tensor:
    """The networks' input (B, C + 2, H, W).

    Args:
        start: A_dagger(y), (B, C, H, W).
        mask: 1 where a pixel is seen, (B or 1, 1, H, W); None where all are.
        noise: Standard deviation of the noise, a number or (B, 1 or C, H, W).
    """
    b, _, h, w = start.shape
    mask = start.new_ones(b, 1, h, w) if mask is None else mask.to(start).expand(b, 1, h, w)
    level = filled(noise, start)
    level = level.mean(1, keepdim=True) if level.ndim else level
    return torch.cat([start, mask, level.expand(b, 1, h, w)], 1)


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with its weights set to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))), the identity at the start; the norm is of one image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.last = zero(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(F.silu(self.first(F.silu(self.norm(x)))))


class ConditioningUNet(nn.Module):
    """A small U-Net on 2x2 blocks of pixels.

    Returns an image-sized map (B, out, H, W), zero at the start, features at half size with
    `width` channels, and features at quarter size with twice as many.
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
        with networks(x.device):
            return self._forward(x)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(self.stem(F.pixel_unshuffle(x, 2)))
        coarse = self.coarse(self.down(fine))
        fine = self.merge(fine + self.up(coarse))
        return F.pixel_shuffle(self.head(fine), 2).float(), fine, coarse


class InvertibleConv1x1(nn.Module):
    """An invertible 1x1 convolution W = P L U, a rotation at the start."""

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
        """W, shape (channels, channels)."""
        eye = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ (self.lower.tril(-1) + eye) @ upper

    def log_det(self, x: Tensor) -> Tensor:
        """log |det| of the map on images like x, a scalar."""
        return self.log_diagonal.sum() * x.shape[-2] * x.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.matrix()[:, :, None, None])

    def inverse(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # inv waits for the device to say whether it worked; a rotation of LU form always has
            inverse = torch.linalg.inv_ex(self.matrix().double()).inverse.to(x.dtype)
            return F.conv2d(x, inverse[:, :, None, None])


class Coupling(nn.Module):
    """b <- b exp(r) + t, with (r, t) a function of the other half a and of the features of y."""

    bound = 1.5

    def __init__(self, channels: int, features: int, hidden: int) -> None:
        super().__init__()
        self.split = channels // 2
        self.first = nn.Conv2d(self.split + features, hidden, 3, padding=1)
        self.middle = nn.Conv2d(hidden, hidden, 1)
        self.last = zero(nn.Conv2d(hidden, 2 * (channels - self.split), 3, padding=1))

    def affine(self, a: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale r and shift t."""
        with networks(a.device):
            h = F.silu(self.first(torch.cat([a, features.to(a.dtype)], 1)))
            r, t = self.last(F.silu(self.middle(h))).float().chunk(2, 1)
        return self.bound * torch.tanh(r / self.bound), t

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.split], x[:, self.split :]
        r, t = self.affine(a, features)
        return torch.cat([a, b * r.exp() + t], 1), r.flatten(1).sum(1)

    def inverse(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, : self.split], x[:, self.split :]
        r, t = self.affine(a, features)
        return torch.cat([a, (b - t) * (-r).exp()], 1), -r.flatten(1).sum(1)


class Rescale(nn.Module):
    """K steps of mixing and coupling at one scale."""

    def __init__(self, channels: int, features: int, hidden: int, steps: int) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(InvertibleConv1x1(channels) for _ in range(steps))
        self.couplings = nn.ModuleList(Coupling(channels, features, hidden) for _ in range(steps))

    def steps(self) -> list[tuple[InvertibleConv1x1, Coupling]]:
        """The steps in generative order."""
        pairs = zip(self.mixes, self.couplings, strict=True)
        return [
            (cast(InvertibleConv1x1, mix), cast(Coupling, coupling)) for mix, coupling in pairs
        ]

    def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for mix, coupling in self.steps():
            total = total + mix.log_det(x)
            x, log_det = coupling(mix(x), features)
            total = total + log_det
        return x, total

    def inverse(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for mix, coupling in reversed(self.steps()):
            x, log_det = coupling.inverse(x, features)
            x = mix.inverse(x)
            total = total + log_det - mix.log_det(x)
        return x, total


@dataclass(frozen=True)
class Context:
    """All that the flow reads of one batch of measurements.

    Attributes:
        mean: m(y), (B, C, H, W).
        log_spread: log s(y), (B, C, H, W).
        half: Features (B, F, H/2, W/2).
        quarter: Features (B, 2 F, H/4, W/4).
    """

    mean: Tensor
    log_spread: Tensor
    half: Tensor
    quarter: Tensor

    def repeat(self, n: int) -> "Context":
        """n copies, one after the other: rows 0..B-1, then again."""
        parts = (self.mean, self.log_spread, self.half, self.quarter)
        return Context(*(p.repeat(n, 1, 1, 1) for p in parts))


class Flow(nn.Module):
    """A two-scale coupling flow; all that it depends on comes as a `Context`."""

    shape: tuple[int, int, int]
    fine: Rescale
    coarse: Rescale

    def transform(self, z: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """From latent to image: x (B, C, H, W) and log |det dx/dz|, (B,)."""
        c = self.shape[0]
        blocks = F.pixel_unshuffle(z, 2)
        out, deep = blocks[:, : 2 * c], F.pixel_unshuffle(blocks[:, 2 * c :], 2)
        deep, first = self.coarse(deep, context.quarter)
        blocks, second = self.fine(torch.cat([out, F.pixel_shuffle(deep, 2)], 1), context.half)
        u = F.pixel_shuffle(blocks, 2)
        log_det = first + second + context.log_spread.flatten(1).sum(1)
        return context.mean + context.log_spread.exp() * u, log_det

    def invert(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """From image to latent: z (B, C, H, W) and log |det dz/dx|, (B,)."""
        c = self.shape[0]
        u = (x - context.mean) * (-context.log_spread).exp()
        blocks, second = self.fine.inverse(F.pixel_unshuffle(u, 2), context.half)
        deep, first = self.coarse.inverse(
            F.pixel_unshuffle(blocks[:, 2 * c :], 2), context.quarter
        )
        blocks = torch.cat([blocks[:, : 2 * c], F.pixel_shuffle(deep, 2)], 1)
        return F.pixel_shuffle(blocks, 2), first + second - context.log_spread.flatten(1).sum(1)

    def log_density(self, x: Tensor, context: Context) -> Tensor:
        """log q(x | y), (B,), in nats of density per unit of intensity."""
        z, log_det = self.invert(x, context)
        d = z[0].numel()
        return log_det - z.flatten(1).square().sum(1) / 2 - d / 2 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Config:
    """What a posterior is built from; written beside its weights."""

    channels: Annotated[int, Whole(1, 256)]
    height: Annotated[int, Whole(4, 8192)]
    width: Annotated[int, Whole(4, 8192)]
    mean: Annotated[int, Whole(8, 4096)]
    context: Annotated[int, Whole(8, 4096)]
    couplings: Annotated[int, Whole(1, 64)]
    hidden: Annotated[int, Whole(1, 4096)]


def _work(self: "Posterior", y: Tensor, *_: object, **__: object) -> str:
    """What is worked on, for the message that memory has run out."""
    return f"{len(y)} measurements of images {'x'.join(map(str, self.shape))} at a time"


class Posterior(Flow):
    """The conditional flow q(x | y) for images of one shape (C, H, W), H and W multiples of 4.

    Args:
        config: Shape and sizes; `Posterior.create` takes them from a preset.
        spread: Value of s(y) at the start, in units of intensity.
        start: Gaussian prior whose Wiener solution m(y) starts from; None: from A_dagger(y).

    Raises:
        InputError: when H or W is no multiple of 4.
    """

    def __init__(self, config: Config, spread: float = 0.05, start: Wiener | None = None) -> None:
        super().__init__()
        if config.height % 4 or config.width % 4:
            raise InputError(
                f"images of {config.height}x{config.width} pixels do not fit the posterior flow: "
                "crop or pad them so that both sides are multiples of 4"
            )
        self.config = config
        c = config.channels
        self.shape = (c, config.height, config.width)
        self.start = start
        self.mean_net = ConditioningUNet(c + 2, c, config.mean)
        self.context_net = ConditioningUNet(2 * c + 2, c, config.context)
        self.fine = Rescale(4 * c, config.context, config.hidden, config.couplings)
        self.coarse = Rescale(8 * c, 2 * config.context, config.hidden, config.couplings)
        self.log_spread = nn.Parameter(torch.full((c, 1, 1), unbounded(spread)))

    @classmethod
    def create(
        cls,
        network: str,
        shape: tuple[int, int, int],
        spread: float = 0.05,
        start: Wiener | None = None,
    ) -> "Posterior":
        """An untrained posterior of a preset's sizes (weights from torch's global stream)."""
        size = preset(network)
        config = Config(*shape, size.mean, size.context, size.couplings, size.hidden)
        return cls(config, spread, start)

    def flow_parameters(self) -> list[nn.Parameter]:
        """All parameters but those of the mean network."""
        mean = set(self.mean_net.parameters())
        return [p for p in self.parameters() if p not in mean]

    def known(self, y: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        """The start image, (B, C, H, W), and the networks' input (B, C + 2, H, W)."""
        if self.start is None:
            start = problem.A_dagger(y)
        else:
            with torch.no_grad():
                start = self.start.restore(y, problem)
        if tuple(start.shape[1:]) != self.shape:
            raise InputError(
                f"measurements of images of shape {tuple(start.shape[1:])} do not fit "
                f"a posterior of images of shape {self.shape}"
            )
        return start, known(start, problem.operator.mask, problem.deviation(y))

    def mean(self, y: Tensor, problem: Problem) -> Tensor:
        """m(y), the centre of the flow, (B, C, H, W)."""
        start, correction = self.parts(y, problem)
        return start + correction

    def parts(self, y: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        """m(y) as the start image and the network's correction to it, (B, C, H, W) each."""
        start, inputs = self.known(y, problem)
        return start, self.mean_net(inputs)[0]

    def context(self, y: Tensor, problem: Problem) -> Context:
        """Everything the flow reads of y."""
        return self.read(*self.known(y, problem))

    def read(self, start: Tensor, inputs: Tensor) -> Context:
        """Everything the flow reads of a start image and the networks' input; see `known`."""
        mean = start + self.mean_net(inputs)[0]
        raw, half, quarter = self.context_net(torch.cat([inputs, mean.detach()], 1))
        return Context(mean, bounded(self.log_spread + raw), half, quarter)

    def log_prob(self, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
        """log q(x | y) of images x (B, C, H, W) given measurements y, (B,), in nats."""
        return self.log_density(x, self.context(y, problem))

    @on_device(_work, "give fewer measurements together")
    @torch.no_grad()
    def sample(
        self,
        y: Tensor,
        problem: Problem,
        n: int = 1,
        seed: int = 0,
        index: Sequence[int] | None = None,
    ) -> Tensor:
        """Draws from q(x | y), (n, B, C, H, W).

        Args:
            y: Measurements (B, ...).
            problem: How they were made.
            n: Draws for each measurement.
            seed: Draw k of image i depends on (seed, i, k) only.
            index: The images' numbers; those the problem is bound to, else 0, 1, ... unless given.

        Raises:
            InputError: n below 1, or more draws than fit this machine's memory.
        """
        if n < 1:
            raise InputError(f"n is {n}: at least 1 draw of each image is needed")
        size = 4.0 * n * len(y) * math.prod(self.shape)
        check_memory(f"{n} draws of {len(y)} images", size, "draw fewer at a time")
        index = _numbers(y, problem, index)
        context = self.context(y, problem)
        draws = []
        for k in range(n):
            z = PerImageGenerator(seed, index, k, device=context.mean.device).randn(*self.shape)
            draws.append(self.transform(z.to(context.mean), context)[0])
        return torch.stack(draws)

    @on_device(_work, "give fewer measurements together")
    @torch.no_grad()
    def mean_std(
        self,
        y: Tensor,
        problem: Problem,
        n: int = 16,
        seed: int = 0,
        index: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(x | y), (B, C, H, W) each, from n draws.

        The draws come in antithetic pairs (z, -z): what is linear in z cancels in the mean.

        Raises:
            InputError: when n is no even number from 2 to 100000.
        """
        DRAWS.check("the number of draws", n)
        index = _numbers(y, problem, index)
        context = self.context(y, problem)

        def noise(k: int) -> Tensor:
            return PerImageGenerator(seed, index, k, device=context.mean.device).randn(*self.shape)

        return self.moments(context, n, noise)

    def moments(
        self, context: Context, n: int, noise: Callable[[int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of n draws, of which noise(k) gives z of two, (z, -z)."""
        total, square = torch.zeros_like(context.mean), torch.zeros_like(context.mean)
        for k in range(n // 2):
            z = noise(k).to(context.mean)
            for sign in (1.0, -1.0):
                offset = self.transform(sign * z, context)[0] - context.mean
                total, square = total + offset, square + offset**2
        mean = total / n
        return context.mean + mean, (square / n - mean**2).clamp_min(0).sqrt()

    def save(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    @classmethod
    def load(cls, source: str | Path) -> "Posterior":
        """The posterior of a run folder, of a folder written by `save`, or of a packaged name.

        Raises:
            InputError: when there is none, or its files do not fit each other.
        """
        folder = locate(source, "posterior", "model.safetensors")
        config = read_settings(Config, folder / "config.json")
        shape = (config.channels, config.height, config.width)
        started = "start.mean" in weight_names(folder / "model.safetensors")

        def build() -> Posterior:
            return cls(config, start=Wiener(shape) if started else None)

        return load_model(folder / "model.safetensors", build, "the posterior")


def _numbers(y: Tensor, problem: Problem, index: Sequence[int] | None) -> Sequence[int]:
    """The numbers given, else those of the problem, else 0, 1, .. of the rows of y."""
    if index is not None:
        return index
    return range(len(y)) if problem.index is None else problem.index
