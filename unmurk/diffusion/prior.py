r"""The diffusion prior p(x): a network, its preconditioning, and what is read off its denoiser.

An image x lies in [0, 1] and is corrupted as :math:`x_\sigma = x + \sigma n`, n ~ N(0, I). The
denoiser :math:`D(x_\sigma, \sigma) = \mathbb E[x \mid x_\sigma]` gives the score by Tweedie's
formula (Efron, 2011, J. Am. Stat. Assoc. 106),

.. math::
    \nabla \log p_\sigma(x_\sigma) = \frac{D(x_\sigma, \sigma) - x_\sigma}{\sigma^2}.

**Preconditioning.** Inside the prior, the network sees images and levels of the range [-1, 1]:
:math:`u_s = 2 x_\sigma - 1 = u + s n` with :math:`u = 2x - 1` and :math:`s = 2\sigma`. It is
preconditioned as in EDM (Karras et al., 2022, arXiv 2206.00364, Table 1) with sigma_data = 1. The
denoised image :math:`\hat u = 2 D(x_\sigma, \sigma) - 1` is

.. math::
    \hat u = c_{\mathrm{skip}}\,u_s - c_{\mathrm{out}}\, v(c_{\mathrm{in}} u_s, t(s)), \qquad
    c_{\mathrm{in}} = \frac1{\sqrt{1 + s^2}}, \quad
    c_{\mathrm{skip}} = \frac1{1 + s^2}, \quad
    c_{\mathrm{out}} = \frac{s}{\sqrt{1 + s^2}}.

With :math:`a = c_{\mathrm{in}}` and :math:`b = s\,c_{\mathrm{in}}` the variance-preserving image
is :math:`x_t = a u_s = a u + b n`, and the formula above is :math:`\hat u = a x_t - b v`. This is
exactly v-prediction (Salimans and Ho, 2022, arXiv 2202.00512). So a saved prior is an ordinary
`DDPMPipeline` folder. t(s) is the index of the level s in the scheduler of that pipeline,
interpolated linearly in log s; below the first level t is 0. Networks that predict n or u are read
in the same way (`pretrained.py`):

.. math::
    \hat u = a x_t - b v \;\text{(v_prediction)}, \qquad
    \hat u = u_s - s n \;\text{(epsilon)}, \qquad
    \hat u = u \;\text{(sample)}.

Above the last level, :math:`s_{\max}`, no network was trained. There the noisy image is scaled
down to that level: :math:`\hat u` is computed from :math:`(s_{\max}/s)\, u_s` at
:math:`s_{\max}`. For images of variance var in [-1, 1] the error is about
:math:`\mathrm{var} / s_{\max}` at any s, while a predicted n would contribute s times its own
error.

**A network of your own** is any `nn.Module` that is called as `network(x_t, t)`, with x_t of shape
(B, C, H, W) and times t (B,) that need not be whole numbers. It returns a tensor like x_t, or an
object that holds one as `.sample`. Unless a scheduler says otherwise, that tensor is v.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bounds import File, check_total_memory
from ..devices import filled, networks, on_device
from ..errors import InputError, size_text
from ..interrupts import heed_interrupt
from ..io.packaged import GENERIC, model_folder, models, of_any_size
from ..operators.base import per_image
from ..rng import PerImageGenerator
from .guided_diffusion import Adm, adm
from .losses import Denoiser, levels, nelbo, score_matching
from .networks import backbone
from .pretrained import OWN, download, forget_place, hub_name, image_size, own, pipeline
from .samplers import heun, posterior_draw, prior_draw
from .schedules import karras, scheduler_levels

__all__ = ["Denoiser", "Prior", "heun", "karras", "nelbo"]

AT_ONCE = 2**29  # bytes of a network's activations while images are drawn


class Prior(nn.Module):
    """A diffusion prior over images of one shape.

    Args:
        network: A `diffusers.UNet2DModel`, or any `nn.Module` that maps (x_t, t) to a tensor like
            x_t; see the head of this module. Channels of its output beyond C (a learned variance)
            are ignored.
        shape: Shape (C, H, W) of the images.
        scheduler: The `diffusers.DDPMScheduler` that the network was trained with. It says which
            levels the times stand for, and what the network predicts. None takes linear betas in
            1,000 steps and v-prediction.

    Attributes:
        sigma_min: Lowest noise level of the scheduler, in units of images in [0, 1].
        sigma_max: Highest noise level of the scheduler.
        any_size: Whether it serves images smaller than `shape`, too; see `tiling.prior_for`.

    Raises:
        InputError: `network` is no module, or the levels of the scheduler do not rise.

    >>> class Zero(nn.Module):  # v = 0
    ...     def forward(self, x_t, t):
    ...         return torch.zeros_like(x_t)
    >>> prior = Prior(Zero(), shape=(1, 2, 2))
    >>> prior.denoise(torch.ones(1, 1, 2, 2), sigma=0.5)
    tensor([[[[0.7500, 0.7500],
              [0.7500, 0.7500]]]])
    """

    log_levels: Tensor

    def __init__(
        self, network: nn.Module, shape: tuple[int, int, int], scheduler: Any = None
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InputError(
                f"network is a {type(network).__name__}: give a torch.nn.Module that maps (x, t)"
                " to a tensor like x, or use Prior.create for the name of a preset"
            )
        self.network = network
        self.shape = tuple(shape)
        self.scheduler = scheduler or _scheduler()
        self._levels = scheduler_levels(self.scheduler)
        self.register_buffer("log_levels", self._levels.log().float(), persistent=False)
        self.sigma_min, self.sigma_max = float(self._levels[0]), float(self._levels[-1])
        self.any_size = False

    @classmethod
    def create(
        cls, network: str | nn.Module, shape: tuple[int, int, int], scheduler: Any = None
    ) -> "Prior":
        """Build an untrained prior from the name of a preset, or from a network of your own.

        Args:
            network: A preset ("tiny", "small", "base"), whose weights come from torch's global
                random stream; or a module, as for `Prior`.
            shape: Shape (C, H, W) of the images.
            scheduler: As for `Prior`.

        Raises:
            InputError: The preset is unknown, or the images do not fit it.

        >>> Prior.create("tiny", (1, 32, 32)).shape
        (1, 32, 32)
        """
        module = backbone(network, shape) if isinstance(network, str) else network
        return cls(module, shape, scheduler)

    @property
    def unet(self) -> Any:
        """The network, under the name that it has in a pipeline of diffusers."""
        return self.network

    @property
    def width(self) -> int:
        """Channels of the network's first layer, by which its memory is estimated."""
        return next((p.shape[0] for p in self.network.parameters() if p.ndim > 1), 1)

    def _weight(self) -> torch.dtype | None:
        """The type of the network's weights; None if it has none."""
        return next((p.dtype for p in self.network.parameters()), None)

    # -- the denoiser ----------------------------------------------------------------------------

    def time(self, sigma: Tensor) -> Tensor:
        """Return the scheduler's index of the levels sigma (B,), interpolated in log sigma."""
        sigma = sigma if sigma.dtype == torch.float64 else sigma.float()
        known = self.log_levels
        if known.dtype != torch.float32 or sigma.dtype != torch.float32:
            known = self._levels.log().to(sigma)
        log_sigma = sigma.clamp_min(1e-12).log()
        high = torch.searchsorted(known, log_sigma).clamp(1, len(known) - 1)
        left, right = known[high - 1], known[high]
        part = ((log_sigma - left) / (right - left)).clamp(0, 1)
        return high - 1 + part

    def output(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Call the network on variance-preserving images.

        Args:
            x_t: Images, shape (B, C, H, W); they are converted to the type of the weights.
            t: Times, shape (B,).

        Returns:
            What the network predicts (v, n or u), shape (B, C, H, W), in the type of x_t.

        Raises:
            InputError: The network does not return a tensor like x_t.
        """
        heed_interrupt()
        with networks(x_t.device):
            out = self.network(x_t.to(self._weight() or x_t.dtype), t)
        out = out if isinstance(out, Tensor) else getattr(out, "sample", None)
        if not isinstance(out, Tensor):
            raise InputError(
                "the network of the prior returned no tensor: it must return a tensor like its"
                " input, or an object that holds one as .sample"
            )
        channels = x_t.shape[1]
        alike = out.ndim == 4 and len(out) == len(x_t) and out.shape[2:] == x_t.shape[2:]
        if not alike or out.shape[1] < channels:
            raise InputError(
                f"the network of the prior returned shape {tuple(out.shape)} for images of shape"
                f" {tuple(x_t.shape)}: it must return a tensor like its input"
            )
        return out.to(x_t.dtype)[:, :channels]

    def denoise(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Estimate the clean image, :math:`D(x, \sigma) = \mathbb E[\text{image} \mid x]`.

        The network runs in its own precision, everything around it in that of x. For results in
        double precision, convert both: `prior.double().denoise(x.double(), sigma)`.

        Args:
            x: Noisy images, shape (B, C, H, W).
            sigma: Noise level: a number, or one for each image, (B,) or (B, 1, 1, 1).

        Returns:
            Images, shape (B, C, H, W), in the type of x.

        Raises:
            InputError: The images have another shape than those of the prior, or sigma is neither
                one number nor one for each image.
        """
        if x.shape[1:] != self.shape:
            raise InputError(
                f"expected images of shape {size_text(self.shape)} (channels, height, width), got"
                f" {size_text(x.shape[1:])}: crop, resize or convert them, or use another prior"
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
        out = self.output(c_in * u, self.time(sigma))
        return (self._clean(out, u, s, c_in) + 1) / 2

    def _clean(self, out: Tensor, u: Tensor, s: Tensor, c_in: Tensor) -> Tensor:
        """Compute the clean image in [-1, 1] from what the network predicts."""
        if self.scheduler.config.prediction_type == "epsilon":
            return u - s * out
        if self.scheduler.config.prediction_type == "sample":
            return out
        return c_in**2 * u - s * c_in * out

    forward = denoise

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Compute the score :math:`\nabla \log p_\sigma(x)` by Tweedie's formula.

        Args:
            x: Noisy images, shape (B, C, H, W).
            sigma: Their noise level, a number or (B,), above 0.

        Returns:
            Gradients, shape (B, C, H, W), in units of 1 / intensity.
        """
        return (self.denoise(x, sigma) - x) / per_image(sigma, x) ** 2

    # -- losses ----------------------------------------------------------------------------------

    def loss(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the denoising score matching loss of clean images, for a loop of your own.

        It draws a noise level for each image and weights the errors as `learn` does; see
        `unmurk.diffusion.losses`.

        Args:
            x: Clean images, shape (B, C, H, W).
            generator: Source of levels and noise; None takes torch's global one.

        Returns:
            The loss, a scalar averaged over the batch.

        >>> prior = Prior.create("tiny", (1, 8, 8))
        >>> optimizer = torch.optim.Adam(prior.parameters(), lr=1e-3)
        >>> prior.loss(torch.rand(4, 1, 8, 8)).backward()
        >>> optimizer.step()
        """
        return score_matching(self.denoise, x, levels(len(x), generator, x.device), generator)

    def nelbo(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        draws: int = 1,
        constants: bool = True,
    ) -> Tensor:
        """Estimate the negative evidence bound of each image in nats, shape (B,).

        See `unmurk.diffusion.losses.nelbo`.
        """
        return nelbo(self.denoise, x, self.sigma_min, self.sigma_max, generator, draws, constants)

    # -- samples ---------------------------------------------------------------------------------

    def together(self, pixels: int) -> int:
        """Return how many images of a number of pixels are denoised at once during sampling.

        The number keeps the activations of the network, without gradients, below about 512 MiB:
        they were measured as 13 to 16 times those of its first layer.
        """
        return max(1, AT_ONCE // (16 * 4 * self.width * pixels))

    @on_device(
        lambda self, n, steps=24, seed=0, batch=256, sigma_max=20.0: (
            f"{min(n, batch)} images {size_text(self.shape)} drawn together"
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
        """Draw new images by Heun's method on the probability flow.

        Args:
            n: Number of images.
            steps: Noise levels. The network runs 2 steps - 1 times.
            seed: Image i depends on (seed, first + i) only.
            batch: Most images drawn together; fewer if they are large.
            sigma_max: The first level, if the network knows one as high; else its highest.
            first: Number of the first image, to draw a large set in parts.

        Returns:
            Images, shape (n, C, H, W), float64 if the network's weights are, else float32.

        Raises:
            InputError: n is below 1, or the images do not fit this machine's memory.

        Source: Karras et al. (2022), arXiv 2206.00364, Algorithm 1.
        """
        if n < 1:
            raise InputError(f"n is {n}: give at least 1")
        # the images, and four maps of the finest resolution of those drawn together
        size = 4.0 * n * math.prod(self.shape)
        size += 16.0 * min(n, batch) * self.width * math.prod(self.shape[1:])
        check_total_memory(f"{n} images of {size_text(self.shape)}", size, "draw fewer at a time")
        sigmas = karras(steps, min(sigma_max, self.sigma_max), self.sigma_min)
        done, batch = [], min(batch, self.together(self.shape[1] * self.shape[2]))
        for start in range(0, n, batch):
            index = range(first + start, first + min(start + batch, n))
            streams = PerImageGenerator(seed, index, device=self.log_levels.device)
            x = 0.5 + float(sigmas[0]) * streams.randn(*self.shape).to(self._images())
            done.append(heun(self.denoise, x, sigmas))
        return torch.cat(done)

    def _images(self) -> torch.dtype:
        """The type of new images: float64 if the weights are, else float32."""
        return torch.float64 if self._weight() == torch.float64 else torch.float32

    @torch.no_grad()
    def restore(
        self, y: Tensor, sigma: float, streams: PerImageGenerator, steps: int = 16
    ) -> Tensor:
        """Draw from p(x | y) for y = x + sigma n; see `samplers.posterior_draw`."""
        return posterior_draw(self.denoise, y, sigma, streams, steps)

    @torch.no_grad()
    def draw(self, streams: PerImageGenerator, steps: int = 31) -> Tensor:
        """Draw one new image for each stream, stochastically; see `samplers.prior_draw`."""
        low, high = self.sigma_min, self.sigma_max
        return prior_draw(self.denoise, self.shape, streams, steps, low, high, self._images())

    # -- files -----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the prior to a folder, with weights as safetensors.

        A `UNet2DModel` becomes a `DDPMPipeline` folder, which diffusers reads. For any other
        network the folder holds `prior.json`, `model.safetensors` and `scheduler/`. Its code is
        not stored: `Prior.load` needs the module as `network=`.
        """
        from diffusers import DDPMPipeline, UNet2DModel

        if isinstance(self.network, UNet2DModel):
            DDPMPipeline(unet=self.network, scheduler=self.scheduler).save_pretrained(folder)
            forget_place(Path(folder) / "unet" / "config.json")
            return
        from safetensors.torch import save_file

        folder = Path(folder)
        self.scheduler.save_pretrained(folder / "scheduler")
        state = self.network.state_dict().items()
        weights = {key: value.detach().cpu().clone().contiguous() for key, value in state}
        save_file(weights, folder / "model.safetensors")
        kind = type(self.network)
        about = {"network": "own", "class": f"{kind.__module__}.{kind.__qualname__}"}
        text = json.dumps({**about, "shape": list(self.shape)}, indent=2)
        (folder / OWN).write_text(text + "\n")

    @classmethod
    def load(
        cls,
        source: str | Path,
        layout: str | Adm | None = None,
        network: nn.Module | None = None,
    ) -> "Prior":
        """Load a prior from a file, a folder or the Hub.

        Args:
            source: A run folder; a folder written by `save` or by another unconditional pipeline
                of diffusers; the name of one on the Hub ("owner/name"); a checkpoint of
                guided-diffusion ("adm:ffhq256:PATH", or PATH with a layout); or in the package
                "digits", "nuclei", "generic" or "generic-color".
            layout: Settings of a guided-diffusion checkpoint: `guided_diffusion.Adm`, or a name
                in `guided_diffusion.LAYOUTS`, such as "adm-ffhq256".
            network: The module of a prior that was saved with a network of your own. Its weights
                are replaced by those of the folder.

        Returns:
            The prior, in evaluation mode.

        Raises:
            InputError: There is no prior, it is another kind of model, or a network of your own is
                missing or does not fit the weights.

        >>> Prior.load("digits").shape
        (1, 28, 28)
        """
        text = File().check("the name of a prior", source)
        if text.startswith("adm:") and text.count(":") > 1:
            kind, name, text = text.split(":", 2)
            layout = f"{kind}-{name}"
        any_size = False
        if layout is not None:
            unet, scheduler = adm(Path(text), layout)
        elif os.path.isfile(text):
            raise InputError(
                f"{text} is a file: name the layout of its weights, as in adm:ffhq256:{text}"
            )
        elif hub_name(text):
            unet, scheduler = pipeline(download(text))
        else:
            folder = locate(text, "prior", "model_index.json", OWN)
            if (folder / OWN).is_file():
                return cls(*own(folder, network)).eval()
            unet, scheduler = pipeline(folder)
            any_size = of_any_size(folder)
        if network is not None:
            raise InputError(
                f"the prior '{text}' has a {type(unet).__name__}, which is built from its own"
                " settings: leave network= out"
            )
        h, w = image_size(unet.config)
        prior = cls(unet, (unet.config.in_channels, h, w), scheduler).eval()
        prior.any_size = any_size
        return prior


def locate(source: str | Path, part: str, *markers: str) -> Path:
    """Find the folder that holds one of the files `markers`.

    The source itself, its sub-folder `part` and the packaged models are searched in this order.

    Raises:
        InputError: None of them holds one.
    """
    for folder in (Path(source), Path(source) / part, model_folder(source) / part):
        try:
            if any((folder / marker).is_file() for marker in markers):
                return folder
        except OSError:  # a name that no file can have
            break
    if str(source) in GENERIC:
        raise InputError(
            f"the weights of '{source}' are not in this build of unmurk: make them with"
            " tools/train_generic.py of the repository, and give the folder"
        )
    if (Path(source) / "config.json").is_file() and (Path(source) / "state").is_dir():
        raise InputError(
            f"the run in '{source}' has no weights yet: continue it with its learn command"
        )
    known = ", ".join(models())
    raise InputError(
        f"no {part} in '{source}': give a run folder, a {part} folder or one of: {known or '-'}"
    )


def _scheduler() -> Any:
    """Build the scheduler of Ho et al. (2020): linear betas from 1e-4 to 0.02 in 1,000 steps."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )
