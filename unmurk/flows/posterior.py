r"""The posterior q(x | y): a conditional normalizing flow, cheap in both directions.

An image is drawn from a measurement y as

.. math:: x = m(y) + s(y) \odot g(z; y), \qquad z \sim N(0, I),

with a mean image m, a scale image s > 0 and a multi-scale coupling flow g (`layers.py`). Its
density is exact,

.. math:: \log q(x \mid y) = \log N(z; 0, I)
    - \log\left|\det \frac{\partial g}{\partial z}\right| - \sum \log s(y).

The couplings see features of y at their own scale. Everything that is known of y enters through
(A_dagger(y), mask, sigma_y). At the start g is a rotation, and so q is N(m, s^2).

m(y) is a network's correction to a start image. The start image is A_dagger(y), or, where a
Gaussian prior has been fitted to the measurements, the Wiener solution under it, which then
replaces A_dagger(y) everywhere.

A posterior of one noise level sees that level as it is. One of many levels (`Config.many_levels`)
sees :math:`\log(\sigma_y / 0.05)`, and its correction is in units of the noise,

.. math:: m(y) = A^+ y + \bar\sigma_y\, f(A^+ y, \text{mask}, \log(\sigma_y / 0.05)),

so that the network's output f has the same size at all levels (Karras et al., 2022, arXiv
2206.00364, section 5). Where the noise varies over the image, the network sees it pixel by pixel,
and the factor :math:`\bar\sigma_y` is its root mean square over 7 x 7 pixels.

**Orientations.** Statistics of images that may come in any orientation do not change if an image
is flipped or turned, but a network's results do, a little. A posterior that has learned images in
all eight orientations and starts from A_dagger(y) (`Posterior.turnable`) therefore spreads the
draws of a mean and a standard deviation over them: with :math:`T_k` the flips and turns,

.. math:: \bar x = \frac1K \sum_k T_k^{-1} E_q[x \mid T_k y],

whose mean squared error is at most the average of those of its K terms ("enhanced prediction":
Timofte et al., 2016, arXiv 1511.02228). The draws are as many as in one orientation; what is added
are K - 1 evaluations of the networks that see y.

A posterior is called with measurements: `posterior(y, problem)` is a
`torch.distributions.Distribution`, `distribution.FlowDistribution`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bounds import Whole, check_total_memory
from ..devices import on_device
from ..diffusion.networks import preset
from ..diffusion.prior import locate
from ..errors import InputError, size_text
from ..gaussian import Wiener
from ..interrupts import heed_interrupt
from ..io.packaged import of_any_size
from ..io.weights import load_model, read_settings, weight_names
from ..operators.crops import turn, unturn
from ..problem import Problem
from ..whitening import whiten
from .conditioner import ConditioningUNet, known
from .distribution import FlowDistribution
from .error_bars import LEVEL, NORMAL, ErrorBars, normal_ratio
from .layers import Context, Flow, Rescale, bounded, unbounded

__all__ = ["Config", "Posterior"]

DRAWS = Whole(2, 100_000, even=True)
AROUND = 7  # pixels over which a varying noise is averaged for the size of the correction
ORIENTATIONS = 0, 2, 1, 3, 4, 6, 5, 7  # in this order: few draws are turned, more also flipped
REFERENCE = 0.05  # noise level whose logarithm is 0 for a posterior of many levels


@dataclass(frozen=True)
class Config:
    """The settings of a posterior, which are stored beside its weights.

    >>> config = Posterior.create("tiny", (1, 8, 12)).config
    >>> config.channels, config.height, config.width, config.couplings
    (1, 8, 12, 4)
    >>> Posterior(config).shape
    (1, 8, 12)
    """

    channels: Annotated[int, Whole(1, 256)]
    height: Annotated[int, Whole(4, 8192)]
    width: Annotated[int, Whole(4, 8192)]
    mean: Annotated[int, Whole(8, 4096)]
    context: Annotated[int, Whole(8, 4096)]
    couplings: Annotated[int, Whole(1, 64)]
    hidden: Annotated[int, Whole(1, 4096)]
    many_levels: Annotated[int, Whole(0, 1)] = 0
    """1 for a posterior of many noise levels, see the head of this module; 0 for one of one."""
    turnable: Annotated[int, Whole(0, 1)] = 0
    """1 for a posterior that has learned images in all eight orientations; see `Posterior`."""


def _work(self: "Posterior", y: Tensor, *_: object, **__: object) -> str:
    """Describe the work, for the message that memory has run out."""
    return f"{len(y)} measurements of images {size_text(self.shape)} at a time"


class Posterior(Flow):
    """The conditional flow q(x | y) for images of one shape (C, H, W), H and W multiples of 4.

    `posterior(y, problem)` is the distribution q(x | y); see `FlowDistribution`. The methods below
    do the same for single steps, with random streams that depend on the image's number alone.

    Args:
        config: Shape and sizes; `Posterior.create` takes them from a preset.
        spread: Value of s(y) before training, in units of intensity.
        start: Gaussian prior whose Wiener solution is the start image of m(y); None takes
            A_dagger(y).

    Attributes:
        error_bars: Calibration of the standard deviations, or None; see `error_bars`. `mean_std`
            and `interval` apply it. Draws and densities are those of the flow itself.
        any_size: Whether it serves images smaller than `shape`, too; see `tiling.posterior_for`.

    Raises:
        InputError: H or W is not a multiple of 4.

    >>> posterior = Posterior.create("tiny", (1, 8, 8))
    >>> y, problem = torch.rand(2, 1, 8, 8), Problem("identity", 0.1)
    >>> posterior.sample(y, problem, n=3).shape
    torch.Size([3, 2, 1, 8, 8])
    >>> bool(torch.equal(posterior.mean(y, problem), y))  # untrained: m(y) = A_dagger(y)
    True
    """

    def __init__(self, config: Config, spread: float = 0.05, start: Wiener | None = None) -> None:
        super().__init__()
        if config.height % 4 or config.width % 4:
            raise InputError(
                f"images of {size_text((config.height, config.width))} pixels do not fit the"
                " posterior flow: "
                "crop or pad them so that both sides are multiples of 4, or learn from crops of "
                "them (--crop)"
            )
        self.config = config
        c = config.channels
        self.shape = (c, config.height, config.width)
        self.any_size = False
        self.start = start
        self.error_bars: ErrorBars | None = None
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
        many_levels: bool = False,
    ) -> "Posterior":
        """Build an untrained posterior with the sizes of a preset.

        Args:
            network: Name of the preset: "tiny", "small" or "base".
            shape: Shape (C, H, W) of the images.
            spread: As for `Posterior`.
            start: As for `Posterior`.
            many_levels: Whether it meets many noise levels; see the head of this module.

        Returns:
            The posterior, whose weights come from torch's global random stream.

        Raises:
            InputError: The preset is unknown, or H or W is not a multiple of 4.
        """
        size = preset(network)
        sizes = size.mean, size.context, size.couplings, size.hidden
        config = Config(*shape, *sizes, int(many_levels))
        return cls(config, spread, start)

    @property
    def turnable(self) -> bool:
        """Whether `mean_std` averages over orientations; see the head of this module."""
        return bool(self.config.turnable)

    @turnable.setter
    def turnable(self, value: bool) -> None:
        """Note it in the settings, which are stored beside the weights."""
        self.config = replace(self.config, turnable=int(value))

    def forward(self, y: Tensor, problem: Problem) -> FlowDistribution:
        """Return q(x | y) as a distribution.

        Args:
            y: Measurements, shape (B, ...).
            problem: Operator and noise.

        Raises:
            InputError: The measurements belong to images of another shape.
        """
        return FlowDistribution(self, self.context(y, problem), _numbers(y, problem, None))

    def flow_parameters(self) -> list[nn.Parameter]:
        """Return all parameters except those of the mean network."""
        mean = set(self.mean_net.parameters())
        return [p for p in self.parameters() if p not in mean]

    def known(self, y: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        """Compute the start image (B, C, H, W) and the networks' input (B, C + 2, H, W).

        Raises:
            InputError: The measurements belong to images of another shape.
        """
        y, problem = self.white(y, problem)
        start = self.first(y, problem)
        if tuple(start.shape[1:]) != self.shape:
            raise InputError(
                f"expected measurements of images of shape {self.shape}, got those of"
                f" {tuple(start.shape[1:])}: use tiles (unmurk.tiling.posterior_for) or another"
                " posterior"
            )
        return start, known(start, problem.operator.mask, problem.deviation(y))

    def white(self, y: Tensor, problem: Problem) -> tuple[Tensor, Problem]:
        """Return measurements and problem as the networks were trained with them.

        A posterior that starts from a Gaussian prior was trained with white noise of one level;
        for others, noise that depends on the brightness stays as it is.
        """
        return (y, problem) if self.start is None else whiten(y, problem)

    def first(self, y: Tensor, problem: Problem) -> Tensor:
        """Compute the start image, (B, C, H, W), also of images of another size."""
        if self.start is None:
            return problem.A_dagger(y)
        shape = problem.operator.x_shape(y.shape)[-3:]
        with torch.no_grad():
            return self.start.resized(shape).restore(y, problem)

    def mean(self, y: Tensor, problem: Problem) -> Tensor:
        """Compute m(y), the center of the flow, shape (B, C, H, W)."""
        start, correction = self.parts(y, problem)
        return start + correction

    def parts(self, y: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        """Compute m(y) as start image and network correction, shape (B, C, H, W) each."""
        start, inputs = self.known(y, problem)
        return start, self.correction(inputs)

    def context(self, y: Tensor, problem: Problem) -> Context:
        """Compute everything that the flow depends on, from measurements.

        Args:
            y: Measurements, shape (B, ...).
            problem: Operator and noise.
        """
        return self.read(*self.known(y, problem))

    def read(self, start: Tensor, inputs: Tensor) -> Context:
        """Compute everything that the flow depends on, from the results of `known`."""
        mean = start + self.correction(inputs)
        visible = torch.cat([self._visible(inputs), mean.detach()], 1)
        raw, half, quarter = self.context_net(visible)
        return Context(mean, bounded(self.log_spread + raw), half, quarter)

    def correction(self, inputs: Tensor) -> Tensor:
        """Compute the correction of m(y) to the start image from the inputs of `known`."""
        heed_interrupt()
        correction = self.mean_net(self._visible(inputs))[0]
        if not self.config.many_levels:
            return correction
        power = inputs[:, -1:].square()
        power = F.avg_pool2d(power, AROUND, 1, AROUND // 2, count_include_pad=False)
        return power.sqrt() * correction

    def _visible(self, inputs: Tensor) -> Tensor:
        """Replace the noise level, the last channel, by its logarithm if there are many levels."""
        if not self.config.many_levels:
            return inputs
        level = (inputs[:, -1:] / REFERENCE).clamp_min(1e-3).log()
        return torch.cat([inputs[:, :-1], level], 1)

    def log_prob(self, x: Tensor, y: Tensor, problem: Problem) -> Tensor:
        """Compute log q(x | y) in nats.

        Args:
            x: Images, shape (B, C, H, W).
            y: Measurements, shape (B, ...).
            problem: Operator and noise.

        Returns:
            Nats of density per unit of intensity, shape (B,).
        """
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
        """Draw from q(x | y), with one random stream for each image and draw.

        Args:
            y: Measurements, shape (B, ...).
            problem: Operator and noise.
            n: Draws for each measurement.
            seed: Draw k of image i depends on (seed, i, k) only.
            index: Numbers of the images. None takes those that the problem is bound to, or else
                0, 1, ...

        Returns:
            Images, shape (n, B, C, H, W).

        Raises:
            InputError: n is below 1, or the draws do not fit this machine's memory.
        """
        if n < 1:
            raise InputError(f"n is {n}: give at least 1 draw for each image")
        size = 4.0 * n * len(y) * math.prod(self.shape)
        check_total_memory(f"{n} draws of {len(y)} images", size, "draw fewer at a time")
        index = _numbers(y, problem, index)
        context = self.context(y, problem)
        noise = self.noise(index, seed, context.mean.device)
        draws = [self.transform(noise(k).to(context.mean), context)[0] for k in range(n)]
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
        calibrated: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Estimate mean and standard deviation of q(x | y) from n draws.

        The draws come in antithetic pairs (z, -z): terms that are linear in z cancel in the mean.
        Those of a posterior that is `turnable` come in up to eight orientations.

        Args:
            y: Measurements, shape (B, ...).
            problem: Operator and noise.
            n: Number of draws, even.
            seed: As for `sample`.
            index: As for `sample`.
            calibrated: Whether the standard deviation is calibrated, if the posterior has a
                calibration that can be trusted. Otherwise it is that of the draws.

        Returns:
            Mean and standard deviation, shape (B, C, H, W) each.

        Raises:
            InputError: n is not an even number from 2 to 100,000.
        """
        DRAWS.check("the number of draws", n)
        index = _numbers(y, problem, index)
        start, inputs = self.known(y, problem)
        mean, std = self.estimate(start, inputs, n, self.noise(index, seed, start.device))
        if calibrated and self.error_bars is not None:
            std = self.error_bars.std(std, problem.operator.mask)
        return mean, std

    def estimate(
        self, start: Tensor, inputs: Tensor, n: int, noise: Callable[[int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Estimate mean and standard deviation of q(x | y) from the results of `known`.

        Args:
            start: Start images, shape (B, C, H, W).
            inputs: The networks' input, shape (B, C + 2, H, W).
            n: Number of draws, even.
            noise: Returns the latents z (B, C, H, W) of pair k, which is (z, -z); they are turned
                as the images are.

        Returns:
            Mean and standard deviation, shape (B, C, H, W) each. The variance is that of all
            draws, within and between orientations.
        """
        pairs = n // 2
        used = ORIENTATIONS[:pairs] if self.turnable else ORIENTATIONS[:1]
        found = []
        for j, way in enumerate(used):
            own = range(j, pairs, len(used))

            def turned(k: int, own: range = own, way: int = way) -> Tensor:
                return turn(noise(own[k]), way)

            context = self.read(turn(start, way), turn(inputs, way))
            mean, std = self.moments(context, 2 * len(own), turned)
            found.append((len(own) / pairs, unturn(mean, way), unturn(std, way)))
        mean = torch.stack([share * one for share, one, _ in found]).sum(0)
        parts = [share * (std**2 + (one - mean) ** 2) for share, one, std in found]
        return mean, torch.stack(parts).sum(0).sqrt()

    def interval(
        self,
        y: Tensor,
        problem: Problem,
        level: float = LEVEL,
        n: int = 16,
        seed: int = 0,
        index: Sequence[int] | None = None,
        calibrated: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Estimate a central interval for every pixel.

        With a calibration the half-width is calibrated at level 0.9. Otherwise it is that of a
        normal distribution with the standard deviation of the draws.

        Args:
            y: Measurements, shape (B, ...).
            problem: Operator and noise.
            level: Probability of the interval, between 0 and 1.
            n: As for `mean_std`.
            seed: As for `sample`.
            index: As for `sample`.
            calibrated: As for `mean_std`.

        Returns:
            Lower and upper ends, shape (B, C, H, W) each.

        Raises:
            InputError: The level is not between 0 and 1, or as for `mean_std`.

        >>> posterior = Posterior.create("tiny", (1, 8, 8))
        >>> low, high = posterior.interval(torch.zeros(1, 1, 8, 8), Problem("identity", 0.1))
        >>> bool((low < high).all())
        True
        """
        ratio = normal_ratio(level)
        mean, std = self.mean_std(y, problem, n, seed, index, calibrated=False)
        half = std * NORMAL * ratio
        if calibrated and self.error_bars is not None:
            half = self.error_bars.half_width(std, problem.operator.mask, level)
        return mean - half, mean + half

    def save(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, if there is one, the calibration.

        Args:
            folder: The folder, which is made if needed.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        if self.error_bars is not None:
            self.error_bars.save(folder)

    @classmethod
    def load(cls, source: str | Path) -> "Posterior":
        """Load the posterior of a run folder, of a folder written by `save`, or of the package.

        The package has "digits", "nuclei", "generic" and "generic-color".

        Raises:
            InputError: There is none, or its files do not fit each other.

        >>> Posterior.load("digits").shape
        (1, 28, 28)
        """
        folder = locate(source, "posterior", "model.safetensors")
        config = read_settings(Config, folder / "config.json")
        shape = (config.channels, config.height, config.width)
        started = "start.mean" in weight_names(folder / "model.safetensors")

        def build() -> Posterior:
            return cls(config, start=Wiener(shape) if started else None)

        posterior = load_model(folder / "model.safetensors", build, "the posterior")
        posterior.error_bars = ErrorBars.load(folder)
        posterior.any_size = of_any_size(folder)
        return posterior


def _numbers(y: Tensor, problem: Problem, index: Sequence[int] | None) -> Sequence[int]:
    """Return the given numbers, else those of the problem, else 0, 1, ... of y."""
    if index is not None:
        return index
    return range(len(y)) if problem.index is None else problem.index
