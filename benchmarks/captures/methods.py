r"""Other methods for photon noise: the Anscombe transform, filters, and blind-spot networks.

For gain g, Gaussian noise :math:`\sigma`, black level o, :math:`z = (y - o) / g` and
:math:`s = \sigma / g`, the generalized Anscombe transform and its exact unbiased inverse (closed
form) are

.. math::

    f(y) &= 2 \sqrt{\max(z + 3/8 + s^2, 0)}, \qquad f(y) \sim N(E f, 1), \\
    c &= \frac{D^2}{4} + \frac{\sqrt{3/2}}{4 D} - \frac{11}{8 D^2} + \frac{5 \sqrt{3/2}}{8 D^3}
         - \frac18 - s^2,

where c is the expected count for :math:`D = E f(y)`, and 0 for D below the value of f at 0
(M. Makitalo, A. Foi, "Optimal inversion of the generalized Anscombe transformation for
Poisson-Gaussian noise", IEEE Trans. Image Process. 22, 2013). The algebraic inverse is too dark by
1/4 of a count.

Noise2Void (A. Krull, T.-O. Buchholz, F. Jug, 2019, arXiv 1811.10980): in each square of SPOT x
SPOT pixels one random pixel gets the value of another pixel near it. The loss of the network h is
the mean over those pixels,

.. math::

    L = \mathrm{mean}_i \, (h(y \text{ with neighbors})_i - y_i)^2,

so that the network cannot return its input and learns
:math:`E[y_i | y_{j \ne i}] = E[x_i | y_{j \ne i}]`.
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

from benchmarks.common import synchronized_time
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
    "is_faster_in_bf16",
    "non_local_means",
    "score_hidden",
]

SPOT = 8  # one pixel of 64 is replaced, as in the paper
RADIUS = 5  # of the square from which the substitute comes
HALF = math.sqrt(1.5)
INIT, STEP = 71, 72  # paths below the seed


@dataclass(frozen=True)
class Anscombe:
    """The transform for a noise model, divided by its value at 1: images stay in [0, 1]."""

    noise: PoissonGaussian

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise after the transform."""
        return 1 / self.maximum

    @property
    def maximum(self) -> float:
        """f(1)."""
        return float(self._transform(torch.ones((), dtype=torch.float64)))

    def forward(self, y: Tensor) -> Tensor:
        """f(y) / f(1)."""
        return self._transform(y) / self.maximum

    def inverse(self, x: Tensor) -> Tensor:
        """The intensity whose noisy values have the mean x f(1) after the transform."""
        s2 = (self.noise.sigma / self.noise.gain) ** 2
        d = (x * self.maximum).clamp_min(2 * math.sqrt(3 / 8 + s2))
        count = d**2 / 4 + HALF / (4 * d) - 11 / (8 * d**2) + 5 * HALF / (8 * d**3) - 1 / 8 - s2
        return self.noise.offset + self.noise.gain * count.clamp_min(0)

    def around(self, restore: Callable[[Tensor, float], Tensor], y: Tensor) -> Tensor:
        """Apply a method for Gaussian noise, of (images, sigma), between transform and inverse."""
        return self.inverse(restore(self.forward(y), self.sigma))

    def _transform(self, y: Tensor) -> Tensor:
        noise = self.noise
        z = (y - noise.offset) / noise.gain
        return 2 * (z + 3 / 8 + (noise.sigma / noise.gain) ** 2).clamp_min(0).sqrt()


# -- filters --------------------------------------------------------------------------------------


def available(package: str) -> bool:
    """Whether an optional package is installed."""
    return find_spec(package) is not None


def _each(y: Tensor, restore: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Apply a function of one image (H, W, C) to images (N, C, H, W)."""
    each = [restore(image).reshape(image.shape) for image in y.movedim(1, -1).double().numpy()]
    return torch.from_numpy(np.stack(each)).movedim(-1, 1).to(y)


def gaussian_filter(y: Tensor, width: float) -> Tensor:
    """Blur images (N, 1, H, W) with a Gaussian of this standard deviation in pixels."""
    return GaussianBlur(width).A(y)


def non_local_means(y: Tensor, sigma: float, strength: float = 0.8) -> Tensor:
    """Non-local means (A. Buades, B. Coll, J.-M. Morel, 2005) of scikit-image, in fast mode.

    The patches have 5 x 5 pixels in all channels and are searched up to 6 pixels away.

    Args:
        y: Images (N, C, H, W).
        sigma: Standard deviation of the noise.
        strength: h in units of sigma.
    """
    from skimage.restoration import denoise_nl_means

    how = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "channel_axis": -1}
    return _each(y, lambda x: denoise_nl_means(x, h=strength * sigma, sigma=sigma, **how))


def bm3d(y: Tensor, sigma: float) -> Tensor:
    """BM3D (K. Dabov, A. Foi, V. Katkovnik, K. Egiazarian, 2007), by the authors' package.

    Images of one channel are gray, those of three are in color.
    """
    import bm3d as package

    if y.shape[1] == 1:
        return _each(y, lambda image: package.bm3d(image[..., 0], sigma))
    return _each(y, lambda image: package.bm3d_rgb(image, sigma))


# -- blind-spot networks --------------------------------------------------------------------------


def hide(y: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace one pixel of each square of images (B, 1, H, W) by a neighbor.

    The pixel of the square and the neighbor are uniformly distributed; the image is mirrored at
    its borders. A pixel is never its own neighbor, except for a mirrored one.

    Returns:
        The images, and a mask of the replaced pixels.
    """
    b, _, h, w = y.shape
    rows, columns = math.ceil(h / SPOT), math.ceil(w / SPOT)

    def integers(high: int) -> Tensor:
        return torch.randint(high, (b, rows, columns), generator=noise, device=noise.device)

    upper = SPOT * torch.arange(rows, device=noise.device)[:, None] + integers(SPOT)
    left = SPOT * torch.arange(columns, device=noise.device) + integers(SPOT)
    side = 2 * RADIUS + 1
    other = (side**2 // 2 + 1 + integers(side**2 - 1)) % side**2  # any but the center
    i, j = (_mirror(upper + other // side - RADIUS, h), _mirror(left + other % side - RADIUS, w))
    inside = (upper < h) & (left < w)
    image = torch.arange(b, device=noise.device)[:, None, None].expand_as(upper)[inside]
    places = (image.to(y.device), 0, upper[inside].to(y.device), left[inside].to(y.device))
    hidden = y.clone()
    hidden[places] = y[places[0], 0, i[inside].to(y.device), j[inside].to(y.device)]
    where = torch.zeros_like(y, dtype=torch.bool)
    where[places] = True
    return hidden, where


def _mirror(place: Tensor, size: int) -> Tensor:
    place = place.abs()
    return torch.where(place >= size, 2 * (size - 1) - place, place)


def score_hidden(found: Tensor, y: Tensor, where: Tensor) -> Tensor:
    """The mean squared error on the replaced pixels."""
    return (found - y)[where].square().mean()


@torch.no_grad()
def is_faster_in_bf16(compute: Callable[[], object], device: torch.device) -> bool:
    """Whether a computation is faster under autocast to bfloat16; it is run four times."""
    times = {}
    for bf16 in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            compute()  # pays for what is prepared once
            begin = synchronized_time()
            compute()
            times[bf16] = synchronized_time() - begin
    return times[True] < times[False]


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
        self.ema_net = copy.deepcopy(self.net).requires_grad_(False).eval()

    def learn(self, how: Settings) -> float:
        """Train with the optimizer, rates and EMA of our own methods; return the seconds."""
        begin, steps = time.perf_counter(), max(1, math.ceil(1000 * how.kimg / how.batch))
        group = ParamGroup(list(self.net.parameters()))
        optimizer, ema = Muon(group.parameters), list(self.ema_net.parameters())
        bf16 = how.precision == "bf16"
        if how.precision == "auto":
            bf16 = is_faster_in_bf16(lambda: self.net(self.y[: how.batch], 0), self.y.device)
        for step in range(steps):
            noise = generator(self.seed, STEP, step)
            batch = torch.randint(len(self.y), (how.batch,), generator=noise)
            y = self.standardized(self.y[batch.to(self.y.device)])
            hidden, where = hide(y, noise)
            with torch.autocast(y.device.type, torch.bfloat16, enabled=bf16):
                found = self.net(hidden, 0).sample
            score_hidden(found.float(), y, where).backward()
            nn.utils.clip_grad_norm_(group.parameters, 1.0)
            optimizer.param_groups[0]["lr"] = how.rate * group.rate(step / steps)
            optimizer.step()
            optimizer.zero_grad()
            decay = 0.5 ** (1 / max(0.05 * (step + 1), 1e-9))  # as `Trainer.update_ema`
            torch._foreach_lerp_(ema, [p.detach() for p in group.parameters], 1 - decay)
        return time.perf_counter() - begin

    def standardized(self, y: Tensor) -> Tensor:
        """The images with mean 0 and deviation 1."""
        return (y - self.mean) / self.deviation

    @torch.no_grad()
    def restore(self, y: Tensor) -> Tensor:
        """Restore images (N, 1, H, W) of any size, in the tiles of our priors."""
        side = self.y.shape[-1]

        def network(tiles: Tensor, _: Tensor) -> Tensor:
            return self.ema_net(tiles, 0).sample

        found = TiledPrior(network, 2 * side, side // 2).denoise(self.standardized(y), 0.0)
        return self.deviation * found + self.mean
