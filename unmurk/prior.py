"""The prior p(x): a diffusion model read through its denoiser.

Notation. An image x lies in [0, 1] and is corrupted as x_sigma = x + sigma n, n ~ N(0, I). The
denoiser D(x_sigma, sigma) = E[x | x_sigma] gives the score by Tweedie's formula (Efron, 2011)

    score(x_sigma, sigma) = (D(x_sigma, sigma) - x_sigma) / sigma^2.

Inside, the network sees u = 2 x - 1 and s = 2 sigma. It is preconditioned as in EDM (Karras et
al., 2022, arXiv 2206.00364, Table 1) with sigma_data = 1,

    D(u_s, s) = c_skip u_s - c_out v(c_in u_s, t(s)),
    c_in = 1 / sqrt(1 + s^2),   c_skip = 1 / (1 + s^2),   c_out = s / sqrt(1 + s^2).

With a = c_in and b = s c_in the variance-preserving image is a u + b n, and the formula above is
x0 = a x_t - b v: exactly v-prediction (Salimans and Ho, 2022, arXiv 2202.00512). So a saved prior
is an ordinary `DDPMPipeline` folder, and t(s) is the index of the level s in that pipeline's
scheduler, interpolated linearly in log s.

Negative evidence bound. With log sigma uniform on [sigma_min, sigma_max] and
L = ln(sigma_max / sigma_min), Kingma et al. (2021, arXiv 2107.00630, eqs. 11-15) gives in nats

    -log p(x) <= L E ||D(x + sigma n, sigma) - x||^2 / sigma^2
                 (diffusion) + E ||D(x + sigma_min n, sigma_min) - x||^2 / (2 sigma_min^2)
                   + d/2 ln(2 pi sigma_min^2)                                             (decoder)
                 + KL(N(x, sigma_max^2) || N(1/2, sigma_max^2)).                          (end)

Drawing log sigma uniformly is the importance sampling of Song et al. (2021, arXiv 2101.09258).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .nets import backbone
from .operators.base import per_image
from .seeds import Streams

__all__ = ["Denoiser", "Prior", "ancestral", "karras", "nelbo"]

Denoiser = Callable[[Tensor, Tensor], Tensor]

ASSETS = Path(__file__).parent / "assets"


def karras(steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> Tensor:
    """Noise levels (steps,), float64, from sigma_max down to sigma_min (arXiv 2206.00364, eq. 5).

    Raises:
        InputError: steps < 1, or not sigma_max >= sigma_min > 0.
    """
    if steps < 1:
        raise InputError(f"steps is {steps}: at least 1 is needed")
    if not sigma_max >= sigma_min > 0:
        raise InputError(
            f"noise levels from {sigma_max} down to {sigma_min}: need sigma_max >= sigma_min > 0"
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, randn: Callable[..., Tensor]
) -> Tensor:
    """The reverse diffusion from x at level sigmas[0] down to a clean image, stochastic.

    Each step draws from the Gaussian bridge q(x_s | x_t, x0 = D(x_t, t)) (arXiv 2006.11239, eq.
    7, in variance-exploding form). Started from y = x + sigma_y n at sigma_y it draws from p(x |
    y).

    Args:
        x: Images at the first level, (B, C, H, W).
        sigmas: Falling levels, (K,); the last step goes to zero noise.
        randn: Draws noise of the shape (B, C, H, W), called with (C, H, W).
    """
    levels = sigmas.tolist()
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        x0 = denoise(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
        if s == 0:
            return x0
        keep = s**2 / t**2
        x = x0 + keep * (x - x0) + s * math.sqrt(1 - keep) * randn(*x.shape[1:])
    return x


def nelbo(
    denoise: Denoiser,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    generator: torch.Generator | None = None,
    draws: int = 1,
    constants: bool = True,
) -> Tensor:
    """The negative evidence bound of each image, (B,), in nats of density per unit of intensity.

    The levels are stratified over draws and batch, which lowers the variance and keeps every
    image's estimate unbiased. The gradient with respect to x flows through the denoiser's input.

    Args:
        x: Images (B, C, H, W).
        draws: Noise levels for each image.
        constants: Whether to add what has no gradient in x but through the network at sigma_min
            (decoder and end terms); without them one evaluation per draw is all it costs.
    """
    b, d = len(x), x[0].numel()
    span = math.log(sigma_max / sigma_min)
    n = b * draws
    offset = torch.rand(n, generator=generator, device=x.device, dtype=x.dtype)
    order = torch.randperm(n, generator=generator, device=x.device)
    sigma = sigma_min * torch.exp(span * (order + offset) / n)
    many = x.repeat_interleave(draws, 0)
    noise = torch.randn(many.shape, generator=generator, device=x.device, dtype=x.dtype)
    error = denoise(many + per_image(sigma, many) * noise, sigma) - many
    bound = span * (error.flatten(1).square().sum(1) / sigma**2).view(b, draws).mean(1)
    if not constants:
        return bound
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    sigma = torch.full((b,), sigma_min, dtype=x.dtype, device=x.device)
    error = denoise(x + sigma_min * noise, sigma) - x
    decoder = error.flatten(1).square().sum(1) / (2 * sigma_min**2)
    decoder = decoder + d / 2 * math.log(2 * math.pi * sigma_min**2)
    end = (x - 0.5).flatten(1).square().sum(1) / (2 * sigma_max**2)
    return bound + decoder + end


class Prior(nn.Module):
    """A diffusion prior over images of one shape.

    Args:
        unet: A `diffusers.UNet2DModel` that predicts v.
        shape: Shape (C, H, W) of the images.
    """

    log_levels: Tensor

    def __init__(self, unet: Any, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.unet = unet
        self.shape = tuple(shape)
        self.scheduler = _scheduler()
        alpha = self.scheduler.alphas_cumprod.double()
        levels = ((1 - alpha) / alpha).sqrt() / 2  # in units of [0, 1]
        self.register_buffer("log_levels", levels.log().float(), persistent=False)
        self.sigma_min, self.sigma_max = float(levels[0]), float(levels[-1])

    @classmethod
    def create(cls, network: str, shape: tuple[int, int, int]) -> "Prior":
        """An untrained prior with the network of a preset (weights from torch's global stream)."""
        return cls(backbone(network, shape), shape)

    def time(self, sigma: Tensor) -> Tensor:
        """The scheduler's index of the levels sigma (B,), interpolated in log sigma."""
        log_sigma = sigma.float().clamp_min(1e-12).log()
        high = torch.searchsorted(self.log_levels, log_sigma).clamp(1, len(self.log_levels) - 1)
        left, right = self.log_levels[high - 1], self.log_levels[high]
        part = ((log_sigma - left) / (right - left)).clamp(0, 1)
        return high - 1 + part

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """D(x, sigma) = E[image | x], shape (B, C, H, W) like x; sigma is a number or (B,).

        The network runs in its own precision; everything around it in that of x.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        s = per_image(2 * sigma, x)
        u = 2 * x - 1
        c_in = (1 + s**2).rsqrt()
        weight = next(self.unet.parameters()).dtype
        v = self.unet((c_in * u).to(weight), self.time(sigma)).sample.to(x.dtype)
        return (c_in**2 * u - s * c_in * v + 1) / 2

    forward = denoise

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """The gradient of log p_sigma at x, (B, C, H, W), in units of 1 / intensity."""
        return (self.denoise(x, sigma) - x) / per_image(sigma, x) ** 2

    def nelbo(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        draws: int = 1,
        constants: bool = True,
    ) -> Tensor:
        """The negative evidence bound of each image in nats, (B,); see `nelbo`."""
        return nelbo(self.denoise, x, self.sigma_min, self.sigma_max, generator, draws, constants)

    @torch.no_grad()
    def sample(
        self, n: int, steps: int = 24, seed: int = 0, batch: int = 256, sigma_max: float = 20.0
    ) -> Tensor:
        """New images, (n, C, H, W), by Heun's method (arXiv 2206.00364, Algorithm 1).

        Args:
            steps: Noise levels; the network runs 2 steps - 1 times.
            seed: Image i depends on (seed, i) only.
            batch: Images drawn together.
            sigma_max: First level.
        """
        sigmas = karras(steps, sigma_max, self.sigma_min).tolist()
        done = []
        for start in range(0, n, batch):
            index = range(start, min(start + batch, n))
            streams = Streams(seed, index, device=self.log_levels.device)
            x = 0.5 + sigmas[0] * streams.randn(*self.shape)
            for t, s in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
                slope = (x - self.denoise(x, t)) / t
                ahead = x + (s - t) * slope
                if s > 0:
                    slope = (slope + (ahead - self.denoise(ahead, s)) / s) / 2
                    ahead = x + (s - t) * slope
                x = ahead
            done.append(x)
        return torch.cat(done)

    @torch.no_grad()
    def restore(self, y: Tensor, sigma: float, streams: Streams, steps: int = 16) -> Tensor:
        """One draw from p(x | y) for y = x + sigma n, by the reverse diffusion from (y, sigma)."""
        sigmas = karras(steps, sigma, min(self.sigma_min, sigma / 2))
        return ancestral(self.denoise, y, sigmas, streams.randn)

    def save(self, folder: str | Path) -> None:
        """Writes a `DDPMPipeline` folder (safetensors)."""
        from diffusers import DDPMPipeline

        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_pretrained(folder)

    @classmethod
    def load(cls, source: str | Path) -> "Prior":
        """The prior of a run folder, of a folder written by `save`, or of a name in the package.

        Args:
            source: A path, or "digits".

        Raises:
            InputError: when there is none, or the folder holds another kind of model.
        """
        folder = locate(source, "prior", "model_index.json")
        from diffusers import UNet2DModel

        try:
            scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
            unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot load the prior in {folder}: {reason}") from error
        expected = _scheduler().config
        for key in ("prediction_type", "beta_schedule", "beta_start", "beta_end"):
            if scheduler.get(key) != expected[key]:
                raise InputError(
                    f"the prior in {folder} has {key}={scheduler.get(key)}: "
                    f"only priors saved by unmurk ({key}={expected[key]}) can be loaded"
                )
        size = unet.config.sample_size
        h, w = (size, size) if isinstance(size, int) else size
        return cls(unet, (unet.config.in_channels, h, w)).eval()


def locate(source: str | Path, part: str, marker: str) -> Path:
    """The folder that holds `marker`: the source itself, its sub-folder `part`, or an asset's."""
    for folder in (Path(source), Path(source) / part, ASSETS / f"{source}-model" / part):
        if (folder / marker).is_file():
            return folder
    known = ", ".join(sorted(p.name.removesuffix("-model") for p in ASSETS.glob("*-model")))
    raise InputError(
        f"no {part} in '{source}': give a run folder, a {part} folder or one of: {known or '-'}"
    )


def _scheduler() -> Any:
    """The levels of Ho et al. (2020): linear betas from 1e-4 to 0.02 in 1,000 steps."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )
