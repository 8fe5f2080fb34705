"""The prior p(x): a diffusion model read through its denoiser.

Notation. An image x lies in [0, 1] and is corrupted as x_sigma = x + sigma n, n ~ N(0, I). The
denoiser D(x_sigma, sigma) = E[x | x_sigma] gives the score by Tweedie's formula (Efron, 2011)

    score(x_sigma, sigma) = (D(x_sigma, sigma) - x_sigma) / sigma^2.

Inside, the network sees u = 2 x - 1 and s = 2 sigma. It is preconditioned as in EDM (Karras et
al., 2022, arXiv 2206.00364, Table 1) with sigma_data = 1,

    D(u_s, s) = c_skip u_s - c_out v(c_in u_s, t(s)),
    c_in = 1 / sqrt(1 + s^2),   c_skip = 1 / (1 + s^2),   c_out = s / sqrt(1 + s^2).

With a = c_in and b = s c_in the variance-preserving image is x_t = a u + b n, and the formula
above is u = a x_t - b v: exactly v-prediction (Salimans and Ho, 2022, arXiv 2202.00512). So a
saved prior is an ordinary `DDPMPipeline` folder, and t(s) is the index of the level s in that
pipeline's scheduler, interpolated linearly in log s; below the first index t is 0. Networks of
others that predict n or u are read the same way (`foreign.py`):

    D = a x_t - b v (v_prediction),    D = u_s - s n (epsilon),    D = u (sample).

Above the last index, s_max, no network was trained. There noise and image are scaled down to it,
D(u_s, s) := D(r u_s, s_max) with r = s_max / s. For images of variance var in [-1, 1] that is off
by about var / s_max, however high s, while a predicted n would bring in s times its error.

Negative evidence bound. With log sigma uniform on [sigma_min, sigma_max] and
L = ln(sigma_max / sigma_min), Kingma et al. (2021, arXiv 2107.00630, eqs. 11-15) gives in nats

    -log p_D(x) <= L E ||D(x + sigma n, sigma) - x||^2 / sigma^2
                 (diffusion) + E ||D(x + sigma_min n, sigma_min) - x||^2 / (2 sigma_min^2)
                   + d/2 ln(2 pi sigma_min^2)                                             (decoder)
                 + KL(N(x, sigma_max^2) || N(1/2, sigma_max^2)).                          (end)

p_D is the density of the model's own reverse diffusion, which D defines, not that of the data: the
bound says how likely x is under the model. For the exact denoiser they are one. Drawing log sigma
uniformly is the importance sampling of Song et al. (2021, arXiv 2101.09258).
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import File, check_memory
from ..devices import filled, networks, on_device
from ..errors import InputError
from ..operators.base import per_image
from ..rng import PerImageGenerator, global_batch, normal, permutation, uniform
from .networks import backbone
from .pretrained import Adm, adm, download, hub_name, image_size, pipeline
from .samplers import heun, karras, posterior_draw, prior_draw

__all__ = ["Denoiser", "Prior", "heun", "karras", "nelbo"]

Denoiser = Callable[[Tensor, Tensor], Tensor]

AT_ONCE = 2**29  # bytes of a network's activations while images are drawn

ASSETS = Path(__file__).parents[1] / "assets"


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

    It bounds the negative log density of the model's own sampler, not of the data; see the module.

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
    kind: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    offset = uniform((b, draws), generator, **kind)
    order = permutation((b, draws), generator, x.device)
    n = global_batch(b, generator) * draws
    sigma = sigma_min * torch.exp(span * (order + offset).flatten() / n)
    repeated = x.repeat_interleave(draws, 0)
    noise = normal((b, draws, *x.shape[1:]), generator, **kind).reshape(repeated.shape)
    error = denoise(repeated + per_image(sigma, repeated) * noise, sigma) - repeated
    bound = span * (error.flatten(1).square().sum(1) / sigma**2).view(b, draws).mean(1)
    if not constants:
        return bound
    noise = normal(x.shape, generator, **kind)
    sigma = torch.full((b,), sigma_min, dtype=x.dtype, device=x.device)
    error = denoise(x + sigma_min * noise, sigma) - x
    decoder = error.flatten(1).square().sum(1) / (2 * sigma_min**2)
    decoder = decoder + d / 2 * math.log(2 * math.pi * sigma_min**2)
    end = (x - 0.5).flatten(1).square().sum(1) / (2 * sigma_max**2)
    return bound + decoder + end


class Prior(nn.Module):
    """A diffusion prior over images of one shape.

    Args:
        unet: A `diffusers.UNet2DModel`. Channels beyond C of its output (a learned variance) are
            left aside.
        shape: Shape (C, H, W) of the images.
        scheduler: The `diffusers.DDPMScheduler` that it was trained with, which says what it
            predicts; None: that of our own priors, with v.
    """

    log_levels: Tensor

    def __init__(self, unet: Any, shape: tuple[int, int, int], scheduler: Any = None) -> None:
        super().__init__()
        self.unet = unet
        self.shape = tuple(shape)
        self.scheduler = scheduler or _scheduler()
        alpha = self.scheduler.alphas_cumprod.double()
        levels = ((1 - alpha) / alpha).sqrt() / 2  # in units of [0, 1]
        levels = levels[levels.isfinite()]
        if len(levels) < 2 or float(levels[0]) <= 0 or not bool((levels.diff() > 0).all()):
            raise InputError("the noise levels of the scheduler do not rise: it is of no use here")
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
        """D(x, sigma) = E[image | x], shape (B, C, H, W) like x; sigma is a number, or one for
        each image, (B,) or (B, 1, 1, 1).

        The network runs in its own precision; everything around it in that of x.

        Raises:
            InputError: x holds images of another shape than the prior's, or sigma is neither one
                number nor one for each image.
        """
        if x.shape[1:] != self.shape:
            raise InputError(
                f"the prior is one of images {_size(self.shape)} (channels, height, width) but is "
                f"given {_size(x.shape[1:])}: crop, resize or convert them, or take another prior"
            )
        sigma = filled(sigma, x)
        if sigma.numel() not in (1, len(x)):
            raise InputError(
                f"sigma has shape {tuple(sigma.shape)}: give one number, or one for each of the"
                f" {len(x)} images"
            )
        sigma = sigma.reshape(-1).expand(len(x))
        s = per_image(2 * sigma, x)
        shrink = (2 * self.sigma_max / s).clamp(max=1)
        u, s = shrink * (2 * x - 1), shrink * s
        c_in = (1 + s**2).rsqrt()
        weight = next(self.unet.parameters()).dtype
        with networks(x.device):
            out = self.unet((c_in * u).to(weight), self.time(sigma)).sample.to(x.dtype)
        return (self._clean(out[:, : self.shape[0]], u, s, c_in) + 1) / 2

    def _clean(self, out: Tensor, u: Tensor, s: Tensor, c_in: Tensor) -> Tensor:
        """The clean image in [-1, 1], out of what the network predicts."""
        if self.scheduler.config.prediction_type == "epsilon":
            return u - s * out
        if self.scheduler.config.prediction_type == "sample":
            return out
        return c_in**2 * u - s * c_in * out

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

    def together(self, pixels: int) -> int:
        """How many images of so many pixels are denoised at once while images are drawn.

        So many that what the network takes without gradients stays below some 512 MiB: 13 to 16
        times its first layer, as measured.
        """
        width = next(self.unet.parameters()).shape[0]
        return max(1, AT_ONCE // (16 * 4 * width * pixels))

    @on_device(
        lambda self, n, steps=24, seed=0, batch=256, sigma_max=20.0: (
            f"{min(n, batch)} images {_size(self.shape)} drawn together"
        ),
        "give a smaller batch",
    )
    @torch.no_grad()
    def sample(
        self,
        n: int,
        steps: int = 24,
        seed: int = 0,
        batch: int = 256,
        sigma_max: float = 20.0,
        first: int = 0,
    ) -> Tensor:
        """New images, (n, C, H, W), by Heun's method (arXiv 2206.00364, Algorithm 1).

        Args:
            steps: Noise levels; the network runs 2 steps - 1 times.
            seed: Image i depends on (seed, first + i) only.
            batch: Most images drawn together; fewer if they are large.
            sigma_max: First level, if the network knows one so high; else its highest.
            first: Number of the first image, to draw a large set in parts.

        Raises:
            InputError: n below 1, or more images than fit this machine's memory.
        """
        if n < 1:
            raise InputError(f"n is {n}: at least 1 image can be drawn")
        widths = getattr(getattr(self.unet, "config", None), "block_out_channels", None) or (1,)
        # the images, and four maps of the finest resolution of those drawn together
        size = 4.0 * n * math.prod(self.shape)
        size += 16.0 * min(n, batch) * widths[0] * math.prod(self.shape[1:])
        check_memory(f"{n} images of {_size(self.shape)}", size, "draw fewer at a time")
        sigmas = karras(steps, min(sigma_max, self.sigma_max), self.sigma_min)
        done, batch = [], min(batch, self.together(self.shape[1] * self.shape[2]))
        for start in range(0, n, batch):
            index = range(first + start, first + min(start + batch, n))
            streams = PerImageGenerator(seed, index, device=self.log_levels.device)
            x = 0.5 + float(sigmas[0]) * streams.randn(*self.shape)
            done.append(heun(self.denoise, x, sigmas))
        return torch.cat(done)

    @torch.no_grad()
    def restore(
        self, y: Tensor, sigma: float, streams: PerImageGenerator, steps: int = 16
    ) -> Tensor:
        """One draw from p(x | y) for y = x + sigma n; see `samplers.posterior_draw`."""
        return posterior_draw(self.denoise, y, sigma, streams, steps)

    @torch.no_grad()
    def draw(self, streams: PerImageGenerator, steps: int = 31) -> Tensor:
        """One new image for each stream, stochastic; see `samplers.prior_draw`."""
        shape, low, high = self.shape, self.sigma_min, self.sigma_max
        return prior_draw(self.denoise, shape, streams, steps, low, high)

    def save(self, folder: str | Path) -> None:
        """Writes a `DDPMPipeline` folder (safetensors)."""
        from diffusers import DDPMPipeline

        DDPMPipeline(unet=self.unet, scheduler=self.scheduler).save_pretrained(folder)

    @classmethod
    def load(cls, source: str | Path, layout: str | Adm | None = None) -> "Prior":
        """A prior from a file, a folder or the Hub.

        Args:
            source: A run folder, a folder written by `save` or by another unconditional pipeline
                of diffusers, the name of one on the Hub ("owner/name"), a checkpoint of
                guided-diffusion ("adm:ffhq256:PATH", or PATH with a layout), or "digits".
            layout: Settings of a guided-diffusion checkpoint: a name in `foreign.LAYOUTS`, such
                as "adm-ffhq256", or `foreign.Adm`.

        Raises:
            InputError: when there is none, or it is another kind of model.
        """
        text = File().check("the name of a prior", source)
        if text.startswith("adm:") and text.count(":") > 1:
            kind, name, text = text.split(":", 2)
            layout = f"{kind}-{name}"
        if layout is not None:
            unet, scheduler = adm(Path(text), layout)
        elif os.path.isfile(text):
            raise InputError(f"{text} is a file: say how it is laid out, as in adm:ffhq256:{text}")
        elif hub_name(text):
            unet, scheduler = pipeline(download(text))
        else:
            unet, scheduler = pipeline(locate(text, "prior", "model_index.json"))
        h, w = image_size(unet.config)
        return cls(unet, (unet.config.in_channels, h, w), scheduler).eval()


def locate(source: str | Path, part: str, marker: str) -> Path:
    """The folder that holds `marker`: the source itself, its sub-folder `part`, or an asset's."""
    for folder in (Path(source), Path(source) / part, ASSETS / f"{source}-model" / part):
        try:
            if (folder / marker).is_file():
                return folder
        except OSError:  # a name that no file can have
            break
    known = ", ".join(sorted(p.name.removesuffix("-model") for p in ASSETS.glob("*-model")))
    raise InputError(
        f"no {part} in '{source}': give a run folder, a {part} folder or one of: {known or '-'}"
    )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


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
