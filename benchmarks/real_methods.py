"""What others do to photon noise: a transform that makes it Gaussian, filters, and blind spots.

With gain g, Gaussian noise sigma and black at o, z = (y - o) / g and s = sigma / g, the
generalised Anscombe transform and its exact unbiased inverse (closed form) are

    f(y) = 2 sqrt(max(z + 3/8 + s^2, 0)),          f(y) ~ N(E f, 1),
    c    = D^2 / 4 + sqrt(3/2) / (4 D) - 11 / (8 D^2) + 5 sqrt(3/2) / (8 D^3) - 1/8 - s^2,

c the expected count for D = E f(y), and 0 for D below f's value at 0 (M. Makitalo, A. Foi,
"Optimal inversion of the generalized Anscombe transformation for Poisson-Gaussian noise", IEEE
Trans. Image Process. 22, 2013). The algebraic inverse would be too dark by 1/4 of a count.

Noise2Void (A. Krull, T.-O. Buchholz, F. Jug, 2019, arXiv 1811.10980): in each square of SPOT x
SPOT pixels one, chosen at random, gets the value of another pixel near it, and the network is
scored on those pixels alone,

    loss = mean over the chosen pixels of (h(y with neighbours) - y)^2,

so that it cannot return what it was given and learns E[y_i | the others] = E[x_i | the others].
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn

from unmurk.diffusion.networks import backbone
from unmurk.noise import PoissonGaussian
from unmurk.operators.blur import GaussianBlur
from unmurk.rng import generator
from unmurk.tiling import TiledPrior
from unmurk.training import Settings
from unmurk.training.muon import Muon
from unmurk.training.trainer import ParamGroup

__all__ = [
    "Anscombe",
    "BlindSpot",
    "available",
    "bm3d",
    "gaussian_filter",
    "hide",
    "non_local_means",
    "score_hidden",
]

SPOT = 8  # one pixel of 64 is hidden, as in the paper
RADIUS = 5  # of the square that a hidden pixel's substitute comes from
HALF = math.sqrt(1.5)
INIT, STEP = 71, 72  # paths below the seed


@dataclass(frozen=True)
class Anscombe:
    """The transform for a noise, divided by its value at 1 so that images stay in [0, 1]."""

    noise: PoissonGaussian

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise after the transform."""
        return 1 / self.top

    @property
    def top(self) -> float:
        """f(1)."""
        return float(self._transform(torch.ones((), dtype=torch.float64)))

    def forward(self, y: Tensor) -> Tensor:
        """f(y) / f(1)."""
        return self._transform(y) / self.top

    def inverse(self, x: Tensor) -> Tensor:
        """The intensity whose transformed noisy values have the mean x f(1)."""
        s2 = (self.noise.sigma / self.noise.gain) ** 2
        d = (x * self.top).clamp_min(2 * math.sqrt(3 / 8 + s2))
        count = d**2 / 4 + HALF / (4 * d) - 11 / (8 * d**2) + 5 * HALF / (8 * d**3) - 1 / 8 - s2
        return self.noise.offset + self.noise.gain * count.clamp_min(0)

    def _transform(self, y: Tensor) -> Tensor:
        noise = self.noise
        z = (y - noise.offset) / noise.gain
        return 2 * (z + 3 / 8 + (noise.sigma / noise.gain) ** 2).clamp_min(0).sqrt()


# -- filters --------------------------------------------------------------------------------------


def available(package: str) -> bool:
    """Whether an optional package is installed."""
    return find_spec(package) is not None


def each(y: Tensor, restore: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """A function of one plane, on images (N, 1, H, W)."""
    planes = [restore(plane.numpy()) for plane in y[:, 0].double()]
    return torch.from_numpy(np.stack(planes)).to(y)[:, None]


def gaussian_filter(y: Tensor, width: float) -> Tensor:
    """The images (N, 1, H, W) under a Gaussian of a standard deviation in pixels."""
    return GaussianBlur(width).A(y)


def non_local_means(y: Tensor, strength: float, sigma: float | None = None) -> Tensor:
    """A. Buades, B. Coll, J.-M. Morel, 2005, as scikit-image has it, fast: patches of 5 x 5
    pixels, searched up to 6 pixels away.

    Args:
        y: Images (N, 1, H, W).
        strength: h in units of sigma.
        sigma: Standard deviation of the noise; None: estimated, image by image.
    """
    from skimage.restoration import denoise_nl_means, estimate_sigma

    def restore(plane: np.ndarray) -> np.ndarray:
        level = float(estimate_sigma(plane)) if sigma is None else sigma
        how = {"patch_size": 5, "patch_distance": 6, "fast_mode": True}
        return denoise_nl_means(plane, h=strength * level, sigma=level, **how)

    return each(y, restore)


def bm3d(y: Tensor, sigma: float) -> Tensor:
    """K. Dabov, A. Foi, V. Katkovnik, K. Egiazarian, 2007, by the authors' package."""
    import bm3d as package

    return each(y, lambda plane: package.bm3d(plane, sigma))


# -- blind spots ----------------------------------------------------------------------------------


def hide(y: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 1, H, W) with one pixel of each square replaced by a neighbour, and where.

    The square's pixel and the neighbour are drawn evenly; outside the image lies its mirror. A
    pixel is never its own neighbour, but for a mirrored one.
    """
    b, _, h, w = y.shape
    rows, columns = math.ceil(h / SPOT), math.ceil(w / SPOT)

    def whole(high: int) -> Tensor:
        return torch.randint(high, (b, rows, columns), generator=noise, device=noise.device)

    top = SPOT * torch.arange(rows, device=noise.device)[:, None] + whole(SPOT)
    left = SPOT * torch.arange(columns, device=noise.device) + whole(SPOT)
    side = 2 * RADIUS + 1
    other = (side**2 // 2 + 1 + whole(side**2 - 1)) % side**2  # any but the centre
    i, j = (_mirror(top + other // side - RADIUS, h), _mirror(left + other % side - RADIUS, w))
    inside = (top < h) & (left < w)
    image = torch.arange(b, device=noise.device)[:, None, None].expand_as(top)[inside]
    places = (image.to(y.device), 0, top[inside].to(y.device), left[inside].to(y.device))
    hidden = y.clone()
    hidden[places] = y[places[0], 0, i[inside].to(y.device), j[inside].to(y.device)]
    where = torch.zeros_like(y, dtype=torch.bool)
    where[places] = True
    return hidden, where


def _mirror(place: Tensor, size: int) -> Tensor:
    place = place.abs()
    return torch.where(place >= size, 2 * (size - 1) - place, place)


def score_hidden(found: Tensor, y: Tensor, where: Tensor) -> Tensor:
    """The mean squared error on the hidden pixels."""
    return (found - y)[where].square().mean()


class BlindSpot:
    """Noise2Void with the network of our priors, on images of mean 0 and deviation 1.

    Args:
        y: Crops to learn from (N, 1, H, W).
        network: Preset.
        seed: Seed of weights, batches and hidden pixels.
    """

    def __init__(self, y: Tensor, network: str, seed: int) -> None:
        self.y, self.seed = y, seed
        self.mean, self.deviation = float(y.mean()), float(y.std())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, INIT).initial_seed() % 2**31)
            self.net = backbone(network, tuple(y.shape[1:])).to(y.device)
        self.average = copy.deepcopy(self.net).requires_grad_(False).eval()

    def learn(self, how: Settings) -> float:
        """Trains with the optimiser, rates and averages of our own; returns the seconds taken."""
        begin, steps = time.perf_counter(), max(1, math.ceil(1000 * how.kimg / how.batch))
        group = ParamGroup(list(self.net.parameters()))
        optimizer, ema = Muon(group.parameters), list(self.average.parameters())
        for step in range(steps):
            noise = generator(self.seed, STEP, step)
            rows = torch.randint(len(self.y), (how.batch,), generator=noise)
            y = self.normal(self.y[rows.to(self.y.device)])
            hidden, where = hide(y, noise)
            with torch.autocast(y.device.type, torch.bfloat16, enabled=how.precision == "bf16"):
                found = self.net(hidden, 0).sample
            score_hidden(found.float(), y, where).backward()
            nn.utils.clip_grad_norm_(group.parameters, 1.0)
            optimizer.param_groups[0]["lr"] = how.rate * group.rate(step / steps)
            optimizer.step()
            optimizer.zero_grad()
            keep = 0.5 ** (1 / max(0.05 * (step + 1), 1e-9))  # as `Trainer.update_ema`
            torch._foreach_lerp_(ema, [p.detach() for p in group.parameters], 1 - keep)
        return time.perf_counter() - begin

    def normal(self, y: Tensor) -> Tensor:
        """The images in the network's units."""
        return (y - self.mean) / self.deviation

    @torch.no_grad()
    def restore(self, y: Tensor) -> Tensor:
        """Images (N, 1, H, W) of any size, in tiles as our priors treat them; nothing hidden."""
        side = self.y.shape[-1]

        def network(tiles: Tensor, _: Tensor) -> Tensor:
            return self.average(tiles, 0).sample

        found = TiledPrior(network, 2 * side, side // 2).denoise(self.normal(y), 0.0)
        return self.deviation * found + self.mean
