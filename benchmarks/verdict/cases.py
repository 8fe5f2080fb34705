r"""Restorations that are right, or wrong in a known way, made without learning a run for each.

A run that is told a wrong noise or operator learns whatever law of images explains its
measurements best. Three stand-ins give what such a run ends with:

- **A denoiser** D(y, sigma), the network of a prior that was learned from clean images (nuclei),
  or the packaged one (digits). With the true noise it gives the posterior mean and draws. If the
  stated noise s is below the true one, the best explanation is exact: the images are
  :math:`x' = x + \sqrt{\sigma^2 - s^2}\, n'`, whose posterior mean is
  :math:`y + (s^2 / \sigma^2)(D(y, \sigma) - y)`, and a draw of x gives one of x'.
- **Gaussian priors fitted by EM** to the measurements under the stated problem
  (`unmurk.gaussian`), for blurs.
- **A mixture of stationary Gaussian textures**, whose posterior is known in closed form. EM under
  the stated problem acts on each spectrum P separately, with the spectrum S of the measurements:
  :math:`P \leftarrow P - G H P + |G|^2 S,\ G = \bar H P / (|H|^2 P + s^2)`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unmurk import gaussian
from unmurk.diffusion.prior import Prior
from unmurk.evaluation.predictive import has_unbiased_psnr, unbiased_psnr_of
from unmurk.evaluation.verdict import Verdict, assess
from unmurk.flows.posterior import Posterior
from unmurk.io.images import load_images
from unmurk.operators.blur import GaussianBlur
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, StreamId, generator, normal

__all__ = [
    "KINDS",
    "NOISE",
    "RIGHT",
    "SMOOTH",
    "STEPS",
    "UNDECIDABLE",
    "WRONG",
    "Denoised",
    "Fitted",
    "Made",
    "Textures",
    "assets",
    "correlated",
]

RIGHT = ("right", "right, less noise", "right, more noise", "right, blur")
WRONG = (
    "half the noise stated",
    "twice the noise stated",
    "blur too wide",
    "blur in another direction",
    "correlated noise",
    "clipped noise",
    "too smooth",
    "too short",
    "range too wide",
    "range too wide, noise right",
    "range too narrow",
)
UNDECIDABLE = ("blur too narrow",)
KINDS = (*RIGHT, *WRONG, *UNDECIDABLE)
NOISE = {"digits": 0.3, "nuclei": 0.2, "textures": 0.2}
FACTORS = {"right, less noise": 0.5, "right, more noise": 1.5}
BLURS = {
    "right, blur": ("blur:gaussian,sigma=1", "blur:gaussian,sigma=1"),
    "blur too wide": ("blur:gaussian,sigma=1", "blur:gaussian,sigma=3"),
    "blur in another direction": ("blur:motion,length=7,angle=0", "blur:motion,length=7,angle=90"),
    "blur too narrow": ("blur:gaussian,sigma=1.5", "blur:gaussian,sigma=1"),
}
BLUR_NOISE = 0.05
STEPS = 8  # of a draw
SMOOTH = {"digits": 1.0, "nuclei": 4.0, "textures": 1.5}
"""Standard deviation in pixels of the blur of a restoration that is too smooth."""
WIDE, NARROW = 1 / 16, 4.0  # factors of the intensities if the range is wrong


@dataclass(frozen=True)
class Made:
    """A restoration: measurements, a draw, the problem that was stated, and the mean."""

    y: Tensor
    draw: Tensor
    stated: Problem
    mean: Callable[[Tensor], Tensor] | None = None

    def verdict(self) -> Verdict:
        """The verdict on it."""
        psnr = None
        if self.mean is not None and has_unbiased_psnr(self.stated):
            psnr = unbiased_psnr_of(self.mean, self.y, self.stated)
        return assess(self.y, self.draw, self.stated, unbiased_psnr=psnr)


def assets(name: str, first: int, count: int) -> Tensor:
    """Clean images of a packaged set; they repeat after its end."""
    images = load_images({"digits": "digits:test", "nuclei": "nuclei:val"}[name]).images
    return images[torch.arange(first, first + count) % len(images)]


def correlated(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Noise of standard deviation 1 that was averaged over 2 x 2 pixels."""
    height, width = shape[-2:]
    white = normal((*shape[:-2], height + 1, width + 1), draw)
    return 2 * torch.nn.functional.avg_pool2d(white, 2, stride=1)


# -- denoisers ------------------------------------------------------------------------------------


class Denoised:
    """Restorations of noisy images by a denoiser of such images.

    Args:
        name: The set.
        prior: Its prior.
        short: A posterior that was trained too little; None: "too short" is not made.
    """

    def __init__(self, name: str, prior: Prior, short: Posterior | None = None) -> None:
        self.name, self.prior, self.short = name, prior, short

    def make(self, kind: str, x: Tensor, seed: int) -> Made | None:
        """Make a restoration of a kind; None if this class does not make it."""
        sigma = NOISE[self.name] * FACTORS.get(kind, 1.0)
        y = Problem("identity", sigma).simulate(x, seed)
        if kind in RIGHT[:3]:
            return self._absorbed(y, sigma, sigma, seed)
        if kind == "half the noise stated":
            return self._absorbed(y, sigma, sigma / 2, seed)
        if kind == "twice the noise stated":
            return self._told(y, 2 * sigma, seed)
        if kind == "correlated noise":
            y = x + sigma * correlated(tuple(x.shape), generator(seed))
            return self._told(y, sigma, seed)
        if kind == "clipped noise":
            return self._told(y.clamp(0, 1), sigma, seed)
        if kind == "too smooth":
            made, blur = self._absorbed(y, sigma, sigma, seed), GaussianBlur(SMOOTH[self.name])
            mean = made.mean
            assert mean is not None
            return Made(y, blur.A(made.draw), made.stated, lambda y: blur.A(mean(y)))
        if kind == "too short" and self.short is not None:
            return self._too_short(self.short, y, sigma, seed)
        if kind == "range too wide":
            return self._told(y * WIDE, sigma, seed)
        if kind == "range too wide, noise right":
            return self._absorbed(y, sigma, sigma, seed, WIDE)
        if kind == "range too narrow":
            return self._absorbed(y, sigma, sigma / NARROW, seed, NARROW)
        return None

    def _streams(self, y: Tensor, seed: int) -> PerImageGenerator:
        return PerImageGenerator(seed, range(len(y)), StreamId.SOLVER)

    def _absorbed(
        self, y: Tensor, sigma: float, stated: float, seed: int, factor: float = 1.0
    ) -> Made:
        """A run that learned images with the part of the noise that was not stated.

        Args:
            y: Measurements.
            sigma: Their noise.
            stated: The noise that was stated, at most sigma.
            seed: Seed of the draw.
            factor: Factor of all intensities, and of both noises.
        """
        part = (stated / sigma) ** 2
        x = self.prior.restore(y, sigma, self._streams(y, seed), STEPS)
        rest = math.sqrt(part * (1 - part)) * sigma
        x = x + (1 - part) * (y - x) + rest * normal(y.shape, generator(seed, 1))
        problem = Problem("identity", factor * stated)

        def mean(z: Tensor) -> Tensor:
            z = z / factor
            return factor * (z + part * (self.prior.denoise(z, sigma) - z))

        return Made(factor * y, factor * x, problem, torch.no_grad()(mean))

    def _told(self, y: Tensor, stated: float, seed: int) -> Made:
        """A run that knows such images, and is told this noise."""
        x = self.prior.restore(y, stated, self._streams(y, seed), STEPS)
        mean = torch.no_grad()(lambda z: self.prior.denoise(z, stated))
        return Made(y, x, Problem("identity", stated), mean)

    def _too_short(self, posterior: Posterior, y: Tensor, sigma: float, seed: int) -> Made:
        problem = Problem("identity", sigma).bind(range(len(y)), y.shape[-3:])
        draw = posterior.sample(y, problem, 1, seed)[0]
        return Made(y, draw, problem, lambda z: posterior.mean_std(z, problem, 16, seed)[0])


# -- Gaussian priors ------------------------------------------------------------------------------


class Fitted:
    """Restorations by a Gaussian prior that EM fits to the measurements, as they are stated.

    Args:
        name: The set.
        rounds: Rounds of EM.
    """

    def __init__(self, name: str, rounds: int = 16) -> None:
        self.name, self.rounds = name, rounds

    def make(self, kind: str, x: Tensor, seed: int) -> Made | None:
        """Make a restoration of blurred images; None for other kinds."""
        if kind not in BLURS:
            return None
        true, told = BLURS[kind]
        y = Problem(true, BLUR_NOISE).simulate(x, seed)
        stated, shape = Problem(told, BLUR_NOISE), tuple(x.shape[1:])
        prior = gaussian.fit(y, stated, shape, seed, self.rounds)  # type: ignore[arg-type]
        bound = stated.bind(range(len(y)), shape)
        streams = PerImageGenerator(seed, range(len(y)), StreamId.SOLVER)
        return Made(y, prior.draw(y, bound, streams), bound)


# -- textures -------------------------------------------------------------------------------------


class Textures:
    """A mixture of stationary Gaussian textures on a torus, and its exact posteriors.

    Args:
        side: Side of the images in pixels.
        rounds: Rounds of EM of a run.
    """

    def __init__(self, side: int = 32, rounds: int = 200) -> None:
        self.side, self.rounds = side, rounds
        u = torch.fft.fftfreq(side, dtype=torch.float64)
        down, across = u[:, None], u[None, :]
        radius = (down**2 + across**2).sqrt()
        angle = (down + across) / math.sqrt(2)
        shapes = [
            1 / (0.05 + radius) ** 4,  # clouds
            torch.exp(-((radius - 0.12) ** 2) / 0.001),  # spots
            torch.exp(-(angle**2) / 0.0008 - (radius / 0.15) ** 2),  # fibers
            torch.exp(-(down**2) / 0.0005 - ((across.abs() - 0.1) ** 2) / 0.002),  # weave
        ]
        power = torch.stack(shapes)
        power[:, 0, 0] = 0
        self.power = 0.15**2 * power / power.mean((1, 2), keepdim=True)

    def images(self, count: int, seed: int) -> Tensor:
        """Draw images (N, 1, H, W) with mean 0.5 and standard deviation 0.15."""
        draw = generator(seed, 7)
        z = torch.fft.fft2(normal((count, self.side, self.side), draw, dtype=torch.float64))
        kind = torch.arange(count) % len(self.power)
        x = torch.fft.ifft2(self.power[kind].sqrt() * z).real
        return (0.5 + x)[:, None].float()

    def make(self, kind: str, x: Tensor, seed: int) -> Made | None:
        """Make a restoration of a kind."""
        sigma = NOISE["textures"] * FACTORS.get(kind, 1.0)
        true, told = (
            f"{spec},pad=circular" if kind in BLURS else "identity"
            for spec in BLURS.get(kind, ("", ""))
        )
        sigma = BLUR_NOISE if kind in BLURS else sigma
        stated = {"half the noise stated": sigma / 2, "twice the noise stated": 2 * sigma}
        s = stated.get(kind, sigma)
        y, spectrum = self._measured(x, true, sigma, kind, seed)
        factor = {"range too wide, noise right": WIDE}.get(kind, 1.0)
        scale = {"range too wide": WIDE, "range too narrow": NARROW}.get(kind, 1.0)
        y, spectrum = 0.5 + scale * (y - 0.5), scale**2 * spectrum  # the mean stays
        learned = self._learn(spectrum, told, s, 1 if kind == "too short" else self.rounds)
        if kind == "too smooth":
            learned = (
                learned
                * self._response(f"blur:gaussian,sigma={SMOOTH['textures']},pad=circular").abs()
                ** 2
            )
        problem = Problem(told, factor * s).bind(range(len(y)), x.shape[-3:])
        restore = _Mixture(learned, self._response(told), s)
        mean = None if told != "identity" else lambda z: factor * restore.mean(z / factor)
        return Made(factor * y, factor * restore.draw(y, seed), problem, mean)

    def _response(self, spec: str) -> Tensor:
        """The transfer function of an operator on the torus, (H, W)."""
        if spec == "identity":
            return torch.ones(self.side, self.side, dtype=torch.complex128)
        point = torch.zeros(1, 1, self.side, self.side, dtype=torch.float64)
        point[..., self.side // 2, self.side // 2] = 1
        answer = (
            Problem(spec, 0.1).A(point)[0, 0].roll((-(self.side // 2), -(self.side // 2)), (0, 1))
        )
        return torch.fft.fft2(answer)

    def _measured(
        self, x: Tensor, spec: str, sigma: float, kind: str, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Measurements, and the mean spectra of those of each texture."""
        response = self._response(spec)
        clean = torch.fft.ifft2(response * torch.fft.fft2(x.double() - 0.5)).real + 0.5
        draw, noise = generator(seed, 8), torch.full_like(self.power[0], sigma**2)
        white = normal(clean.shape, draw, dtype=torch.float64)
        if kind == "correlated noise":
            box = torch.zeros_like(noise)
            box[:2, :2] = 0.5
            response_of_noise = torch.fft.fft2(box)
            noise = noise * response_of_noise.abs() ** 2
            white = torch.fft.ifft2(response_of_noise * torch.fft.fft2(white)).real
        y = clean + sigma * white
        if kind == "clipped noise":
            y = y.clamp(0.15, 0.85)
        return y.float(), response.abs() ** 2 * self.power + noise

    def _learn(self, spectrum: Tensor, spec: str, s: float, rounds: int) -> Tensor:
        """Spectra (K, H, W) after rounds of EM from one power law."""
        response = self._response(spec)
        gain = response.abs() ** 2
        u = torch.fft.fftfreq(self.side, dtype=torch.float64)
        radius = (u[:, None] ** 2 + u[None, :] ** 2).sqrt()
        start = 1 / (1 / self.side + radius) ** 3
        power = (0.25**2 * start / start.mean()).expand_as(self.power)
        for _ in range(rounds):
            weight = power / (gain * power + s**2)
            power = power - gain * weight * power + gain * weight**2 * spectrum
        return power


class _Mixture:
    """The posterior of a mixture of stationary Gaussians under a convolution with noise s."""

    def __init__(self, power: Tensor, response: Tensor, s: float) -> None:
        self.power, self.response, self.s = power, response, s
        self.total = response.abs() ** 2 * power + s**2  # spectra of the measurements
        self.filter = response.conj() * power / self.total

    def _shares(self, transform: Tensor) -> Tensor:
        """The probability of each texture, (B, K), from transforms (B, H, W)."""
        energy = transform.abs() ** 2 / transform[0].numel()
        fit = -0.5 * (energy[:, None] / self.total + self.total.log()).sum((-2, -1))
        return fit.softmax(1)

    def mean(self, y: Tensor) -> Tensor:
        """The posterior mean of measurements (B, 1, H, W)."""
        transform = torch.fft.fft2(y[:, 0].double() - 0.5)
        mixed = torch.einsum("bk,khw->bhw", self._shares(transform).to(self.filter), self.filter)
        return (0.5 + torch.fft.ifft2(mixed * transform).real)[:, None].to(y)

    def draw(self, y: Tensor, seed: int) -> Tensor:
        """One draw for each of the measurements (B, 1, H, W)."""
        transform, noise = torch.fft.fft2(y[:, 0].double() - 0.5), generator(seed, 9)
        shares = self._shares(transform)
        kind = (torch.rand(len(y), 1, generator=noise) > shares.cumsum(1)).sum(1)
        kind = kind.clamp(max=len(self.power) - 1)
        variance = self.power[kind] * self.s**2 / self.total[kind]
        z = torch.fft.fft2(normal(y[:, 0].shape, noise, dtype=torch.float64))
        x = torch.fft.ifft2(self.filter[kind] * transform + variance.sqrt() * z).real
        return (0.5 + x)[:, None].to(y)
