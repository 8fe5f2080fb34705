r"""Noise models: the distribution of y given the noiseless measurement c = A(x), per value.

.. math::
    \begin{aligned}
    \text{Gaussian:} \quad & y = c + \sigma n, & n &\sim N(0, 1) \\
    \text{Poisson:} \quad & y = \text{gain}\, k, & k &\sim \mathrm{Poisson}(c / \text{gain}) \\
    \text{Poisson-Gaussian:} \quad & y = \text{gain}\, k + \sigma n
    \end{aligned}

The gain is the value of one count (a photon, an electron) in units of the image range [0, 1]: at
white, 1 / gain counts are expected. There is no negative light: where c < 0 the rate of the counts
is 0. A camera may put black at an offset o > 0. The two count models then hold for y - o and c - o
in place of y and c. Where c is not below black,

.. math:: \mathbb E\,y = c, \qquad \operatorname{var} y = \text{gain}\,(c - o) + \sigma^2.

The log-likelihoods are, with the rate r = c / gain and the count k = y / gain,

.. math::
    \text{Gaussian:} \quad & -(y - c)^2 / (2\sigma^2) - \log(2\pi\sigma^2) / 2 \\
    \text{Poisson:} \quad & k \log r - r - \log k! \\
    \text{Poisson-Gaussian:} \quad & \log \sum_k e^{f(k)}, \qquad
        f(k) = k \log r - r - \log k! + \log N(y; \text{gain}\, k, \sigma^2).

f is concave, so the sum runs over a window around its maximum. The terms have the standard
deviation

.. math:: s = \bigl(1 / (k + 1) + \text{gain}^2 / \sigma^2\bigr)^{-1/2}
    \quad\text{at the maximum } k.

Channels may have noise of their own: `PerChannel` holds one model for each. Text forms may have
numbers in gray levels of a file, see `noise_units`.

NODES counts on each side are taken while s < 2 STRIDE; above, every h-th with
h = floor(s / STRIDE). This loses nothing: by Poisson's summation formula the sum of a Gaussian of
standard deviation s over every h-th integer, times h, has a relative error of
:math:`2 e^{-2\pi^2 (s / h)^2}`, and s / h >= 4.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from .bounds import Option, Real, shown
from .errors import InputError
from .io.scale import Scale
from .noise_units import GAIN, PER_CHANNEL, has_units, in_units
from .rng import PerImageGenerator, binomial, binomial_pairs, normal

__all__ = [
    "AUTO",
    "Gaussian",
    "Noise",
    "PerChannel",
    "PoissonGaussian",
    "as_noise",
    "in_scale",
    "rescaled",
]

NODES, STRIDE = 80, 4  # s / h < 8, so that the window reaches 10 s to each side
HALVINGS = 60  # of the interval that contains the maximum
ROUNDING = 1e-2  # rounding error of counts in single precision

SIGMA = Real(1e-6, 10, zero=True)
"""Bounds of a standard deviation in units of the image range; at 10 no image is visible."""
OFFSET = Real(0, 10)
CHANNELS = 16
"""Most channels of an image."""


@runtime_checkable
class Noise(Protocol):
    """Interface of noise models: the distribution of y (B, ...) given c, same shape.

    >>> model = as_noise("poisson,gain=0.01")
    >>> isinstance(model, Noise), as_noise(model.spec) == model
    (True, True)
    >>> model.variance(torch.tensor([0.5]))  # gain c
    tensor([0.0050])
    """

    @property
    def spec(self) -> str:
        """The text form, which `as_noise` turns back into an equal model."""
        ...

    def draw(self, clean: Tensor, streams: PerImageGenerator) -> Tensor:
        """Draw measurements.

        Args:
            clean: Noiseless measurements c, shape (B, ...).
            streams: One random stream for each image of the batch.

        Returns:
            Measurements y, in shape and type of c.
        """
        ...

    def log_likelihood(self, clean: Tensor, y: Tensor) -> Tensor:
        """Compute log p(y | c) in nats for every value, in shape and type of c."""
        ...

    def variance(self, clean: Tensor) -> Tensor:
        """Compute var(y | c) of every value, in shape and type of c."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise, y = c + sigma n. Text form: "gaussian,sigma=0.3", or the number alone.

    Raises:
        InputError: A number is out of its bounds.

    >>> Gaussian(0.3).variance(torch.zeros(2))
    tensor([0.0900, 0.0900])
    """

    options: ClassVar[dict[str, Option]] = {"sigma": SIGMA}

    sigma: float
    """Standard deviation in units of the image range [0, 1]: 0 or a number from 1e-06 to 10."""

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def spec(self) -> str:
        """See `Noise.spec`."""
        return f"gaussian,{_options(self)}"

    def draw(self, clean: Tensor, streams: PerImageGenerator) -> Tensor:
        """See `Noise.draw`."""
        return clean + self.sigma * _randn(clean, streams) if self.sigma > 0 else clean

    def log_likelihood(self, clean: Tensor, y: Tensor) -> Tensor:
        """See `Noise.log_likelihood`. Raises InputError if sigma is 0, as there is no density."""
        if self.sigma == 0:
            raise InputError("without noise there is no likelihood: give the problem noise > 0")
        return _log_normal(y - clean, self.sigma)

    def variance(self, clean: Tensor) -> Tensor:
        """See `Noise.variance`."""
        return torch.full_like(clean, self.sigma**2)

    def split(
        self, y: Tensor, fraction: float, generator: torch.Generator, pairs: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Split a measurement into two of the same image, with independent noises.

        They are those of `recorrupted` with :math:`\alpha^2 = 1/p - 1`, of variances
        :math:`\sigma^2/p` and :math:`\sigma^2/(1-p)`.

        Args:
            y: Measurements, shape (B, ...).
            fraction: p, between 0 and 1.
            generator: Source of the draws.
            pairs: Whether n and -n are used.

        Returns:
            Two tensors in shape and type of y, each with mean c; of (2 B, ...) with pairs, those
            of n first.
        """
        return self.recorrupted(y, (1 / fraction - 1) ** 0.5, generator, pairs)

    def recorrupted(
        self, y: Tensor, alpha: float | Tensor, generator: torch.Generator, pairs: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Add fresh noise n to a measurement and subtract it from another copy.

        .. math:: \hat y = y + \alpha\sigma n, \qquad \tilde y = y - \sigma n/\alpha

        Their noises, of variances :math:`\sigma^2 (1 + \alpha^2)` and
        :math:`\sigma^2 (1 + 1/\alpha^2)`, are independent (Pang et al., 2021,
        "Recorrupted-to-Recorrupted", CVPR).

        Args:
            y: Measurements, shape (B, ...).
            alpha: Noise added, in units of sigma: a number, or one for each measurement in a shape
                that broadcasts to y's.
            generator: Source of the draws.
            pairs: Whether n and -n are used.

        Returns:
            Two tensors in shape and type of y; of (2 B, ...) with pairs, those of n first.

        >>> y = torch.zeros(1, 1, 2, 2)
        >>> more, rest = Gaussian(0.1).recorrupted(y, 0.5, torch.Generator().manual_seed(0))
        >>> torch.allclose(more, -0.25 * rest)
        True
        """
        noise = self.sigma * normal(y.shape, generator, dtype=y.dtype, device=y.device)
        more, less = alpha * noise, noise / alpha
        if not pairs:
            return y + more, y - less
        return torch.cat([y + more, y - more]), torch.cat([y - less, y + less])


@dataclass(frozen=True)
class PoissonGaussian:
    """Counting noise, y = o + gain k + sigma n with k ~ Poisson((c - o) / gain).

    Text form: "poisson,gain=0.01" or "poisson-gaussian,gain=0.01,sigma=0.02"; either may end with
    ",offset=0.05".

    Raises:
        InputError: A number is out of its bounds.

    >>> PoissonGaussian(gain=0.01, sigma=0.02).variance(torch.tensor([0.0, 1.0]))
    tensor([0.0004, 0.0104])
    """

    options: ClassVar[dict[str, Option]] = {"gain": GAIN, "sigma": SIGMA, "offset": OFFSET}

    gain: float
    """Value of one count in units of the image range [0, 1], a number from 1e-12 to 10."""
    sigma: float = 0.0
    """Standard deviation of the additional Gaussian noise in the same units, 0 or a number from
    1e-06 to 10; 0 means none."""
    offset: float = 0.0
    """Value o of black, where no light falls, in the same units, a number from 0 to 10."""

    def __post_init__(self) -> None:
        _check_options(self)

    @property
    def spec(self) -> str:
        """See `Noise.spec`."""
        form = "poisson-gaussian" if self.sigma > 0 else "poisson"
        return f"{form},{_options(self)}"

    def draw(self, clean: Tensor, streams: PerImageGenerator) -> Tensor:
        """See `Noise.draw`."""
        counts = streams.poisson(self.rate(clean.detach().cpu()))
        y = (self.offset + self.gain * counts).to(clean)
        return y + self.sigma * _randn(clean, streams) if self.sigma > 0 else y

    def log_likelihood(self, clean: Tensor, y: Tensor) -> Tensor:
        """See `Noise.log_likelihood`.

        Without Gaussian noise this is the log of a probability, and y must hold whole counts.
        Between them the gamma function continues the formula; below 0 it is -infinity.
        """
        rate, count = self.rate(clean), (y.double() - self.offset) / self.gain
        if self.sigma == 0:
            known = torch.where(count >= 0, _log_poisson(count.clamp_min(0), rate), -math.inf)
            return known.to(clean)
        return self._convolved(rate, count).to(clean)

    def _convolved(self, rate: Tensor, count: Tensor) -> Tensor:
        """Compute log sum_k exp(f(k)) from rates and counts; the density is per unit of y."""
        width = self.sigma / self.gain
        mode = _maximum(rate.detach(), count, width)
        stride = (1 / (mode + 1) + 1 / width**2).rsqrt().div(STRIDE).floor().clamp_min(1)

        def term(k: Tensor) -> Tensor:
            return _log_poisson(k.clamp_min(0), rate) + _log_normal(count - k, width)

        peak, total = term(mode), torch.zeros_like(rate)
        for node in range(-NODES, NODES + 1):
            k = mode + node * stride
            total = total + torch.where(k >= 0, (term(k) - peak).exp(), 0)
        return peak + (stride * total).log() - math.log(self.gain)

    def variance(self, clean: Tensor) -> Tensor:
        """See `Noise.variance`."""
        return self.gain * (clean - self.offset).clamp_min(0) + self.sigma**2

    def split(
        self, y: Tensor, fraction: float, generator: torch.Generator, pairs: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Split a measurement into two of the same image, with independent noises.

        A count goes to the first with probability p = `fraction`, else to the second. A Poisson
        number k of rate r splits into :math:`k_1` and :math:`k - k_1`, which are independent and
        Poisson with rates p r and (1 - p) r. Gaussian noise is treated as further counts:
        :math:`s^2 = \sigma^2 / \text{gain}^2` of them have its variance (D. L. Snyder, A. M.
        Hammoud and R. L. White, 1993, J. Opt. Soc. Am. A 10, p. 1014), and 1/12 that of rounding,
        where y is not whole counts. So in general the two noises are uncorrelated; for whole
        Poisson counts they are independent. The variances are those of y over p and over 1 - p.

        Args:
            y: Measurements, shape (B, ...).
            fraction: Probability p, between 0 and 1.
            generator: Source of the draws.
            pairs: Whether every measurement is split twice, with opposite surpluses as far as the
                law permits (`rng.binomial_pairs`).

        Returns:
            Two tensors in shape and type of y, each with mean c; of (2 B, ...) with pairs, the
            first splits first.

        >>> y = torch.full((1, 4), 0.2)  # 20 counts each
        >>> one, other = PoissonGaussian(0.01).split(y, 0.5, torch.Generator().manual_seed(0))
        >>> (one + other) / 2
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
        """
        counts = (y.double() - self.offset) / self.gain
        near = counts.round()
        more = (self.sigma / self.gain) ** 2
        if self.sigma > 0 or (counts - near).abs().max() > ROUNDING:
            more += 1 / 12
            near = (counts + more).round()
        near = near.clamp_min(0)
        if pairs:
            first = binomial_pairs(near, fraction, generator)
            near, y = torch.cat([near, near]), torch.cat([y, y])
        else:
            first = binomial(near, fraction, generator)
        parts = (first / fraction, (near - first) / (1 - fraction))
        one, other = ((self.offset + self.gain * (part - more)).to(y) for part in parts)
        return one, other

    def rate(self, clean: Tensor) -> Tensor:
        """Compute the expected counts of every value, in double precision."""
        return (clean.double() - self.offset).clamp_min(0) / self.gain


@dataclass(frozen=True)
class PerChannel:
    """Noise of its own for every channel, independent between channels.

    Text form: "per-channel:A:B:C" with the text forms of the channels' models, such as
    "per-channel:0.1:0.2:poisson,gain=0.01".

    Raises:
        InputError: There are no models or more than 16, or one is neither `Gaussian` nor
            `PoissonGaussian`.

    >>> PerChannel((Gaussian(0.1), Gaussian(0.2))).variance(torch.zeros(1, 2, 1, 1)).flatten()
    tensor([0.0100, 0.0400])
    """

    models: "tuple[Gaussian | PoissonGaussian, ...]"
    """The models of the channels, 1 to 16."""

    def __post_init__(self) -> None:
        models = tuple(as_noise(model) for model in self.models)
        if not 1 <= len(models) <= CHANNELS or any(
            not isinstance(model, Gaussian | PoissonGaussian) for model in models
        ):
            raise InputError(
                f"noise per channel needs 1 to {CHANNELS} models, each Gaussian or"
                " Poisson-Gaussian, such as per-channel:0.1:0.2:0.1"
            )
        object.__setattr__(self, "models", models)

    @property
    def spec(self) -> str:
        """See `Noise.spec`."""
        return PER_CHANNEL + ":".join(model.spec for model in self.models)

    def draw(self, clean: Tensor, streams: PerImageGenerator) -> Tensor:
        """See `Noise.draw`."""
        return self._each(lambda model, c: model.draw(c, streams), clean)

    def log_likelihood(self, clean: Tensor, y: Tensor) -> Tensor:
        """See `Noise.log_likelihood`."""
        return self._each(lambda model, c, y: model.log_likelihood(c, y), clean, y)

    def variance(self, clean: Tensor) -> Tensor:
        """Compute var(y | c); the mean over the channels if c has no axis of channels."""
        if clean.ndim < 2:
            return torch.stack([model.variance(clean) for model in self.models]).mean(0)
        return self._each(lambda model, c: model.variance(c), clean)

    def split(
        self, y: Tensor, fraction: float, generator: torch.Generator, pairs: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Split a measurement into two; see `PoissonGaussian.split` and `Gaussian.split`."""
        self.check(y)
        parts = [
            model.split(y[:, i : i + 1], fraction, generator, pairs)
            for i, model in enumerate(self.models)
        ]
        one, other = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        return one, other

    def _each(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """Apply a function (model, values of a channel) to every channel."""
        self.check(values[0])
        return torch.cat(
            [
                function(model, *(value[:, i : i + 1] for value in values))
                for i, model in enumerate(self.models)
            ],
            1,
        )

    def check(self, y: Tensor) -> None:
        """Raise InputError if y (B, C, ...) has another number of channels than models."""
        if y.shape[1] != len(self.models):
            raise InputError(
                f"the noise is given for {len(self.models)} channels, but the measurements have"
                f" {y.shape[1]}: give one model for each, or one for all"
            )


def rescaled(noise: Noise, factor: float, shift: float) -> Noise:
    r"""Return the noise of the same measurements in other units, :math:`y' = f y + s`.

    Standard deviations and gains become f times as large. The offset o of counts is a value of y,
    so it becomes :math:`f o + s`.

    Args:
        noise: A model of this module.
        factor: f, above 0.
        shift: s.

    Raises:
        InputError: It is another model, or a number is out of its bounds in these units.

    >>> rescaled(PoissonGaussian(0.01, 0.02, 0.1), 0.5, 0.25)
    PoissonGaussian(gain=0.005, sigma=0.01, offset=0.3)
    """
    if isinstance(noise, PerChannel):
        models = tuple(rescaled(model, factor, shift) for model in noise.models)
        return PerChannel(models)  # type: ignore[arg-type]
    if isinstance(noise, Gaussian):
        return Gaussian(factor * noise.sigma)
    if isinstance(noise, PoissonGaussian):
        numbers = (factor * noise.gain, factor * noise.sigma, factor * noise.offset + shift)
        return PoissonGaussian(*numbers)
    raise InputError(f"noise '{noise.spec}' is neither Gaussian nor Poisson-Gaussian")


def in_scale(noise: Noise, known: Scale, scale: Scale) -> Noise:
    """Return the noise of measurements as it is in another scale of the same files.

    Args:
        noise: Noise in units of [0, 1] of the scale `known`; Gaussian or Poisson-Gaussian.
        known: The scale that it belongs to.
        scale: The other scale.

    Returns:
        The noise in units of [0, 1] of `scale`; `PerChannel` where the channels differ.

    Raises:
        InputError: The numbers of channels differ, or see `rescaled`.

    >>> in_scale(Gaussian(0.1), Scale.of("uint16", (0, 4000)), Scale.of("uint16", (100, 900)))
    Gaussian(sigma=0.5)
    """
    counts = {known.channels, scale.channels, len(getattr(noise, "models", ()))} - {0}
    if len(counts) > 1:
        several = " and ".join(map(str, sorted(counts)))
        raise InputError(f"noise and ranges are of {several} channels")
    models = getattr(noise, "models", (noise,) * max([1, *counts]))
    found = []
    for i, model in enumerate(models):
        (black, white), (low, high) = (s.channel(i).ends.pairs[0] for s in (known, scale))
        found.append(rescaled(model, (white - black) / (high - low), (black - low) / (high - low)))
    return found[0] if len(set(found)) == 1 else PerChannel(tuple(found))  # type: ignore[arg-type]


AUTO: dict[str, Literal["auto", "gaussian", "poisson-gaussian"]] = {
    "auto": "auto",
    "gaussian,auto": "gaussian",
    "poisson-gaussian,auto": "poisson-gaussian",
}
"""Text forms whose numbers `noise_estimation` estimates, with the kind of noise of each."""

FORMS: dict[tuple[str, ...], type[Gaussian] | type[PoissonGaussian]] = {
    ("gaussian", "sigma"): Gaussian,
    ("poisson", "gain"): PoissonGaussian,
    ("poisson", "gain", "offset"): PoissonGaussian,
    ("poisson-gaussian", "gain", "sigma"): PoissonGaussian,
    ("poisson-gaussian", "gain", "offset", "sigma"): PoissonGaussian,
}
"""Text forms: the first word, and the options, all of which are required."""


def as_noise(value: Any) -> Noise:
    """Turn a number, a text form or a noise model into a noise model.

    Args:
        value: A number, which is the standard deviation of Gaussian noise; a text form, or a
            number as text; or a noise model.

    Raises:
        InputError: It is anything else, or a number is out of range.

    >>> as_noise(0.3)
    Gaussian(sigma=0.3)
    >>> as_noise("poisson-gaussian,gain=0.01,sigma=0.02")
    PoissonGaussian(gain=0.01, sigma=0.02, offset=0.0)
    """
    if isinstance(value, str):
        try:
            return Gaussian(SIGMA.read(value.strip()))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            return _parse(value)
    return value if isinstance(value, Noise) else Gaussian(value)


def _parse(text: str) -> Noise:
    """Parse the text form of a noise model."""
    if has_units(text):
        in_units(text, None)
    if text.startswith(PER_CHANNEL):
        return PerChannel(
            tuple(as_noise(model) for model in text.removeprefix(PER_CHANNEL).split(":"))  # type: ignore[misc]
        )
    if text in AUTO:
        raise InputError(
            f"noise '{text}' must be estimated from measurements first: learn, solve and restore"
            " do, and so does unmurk.noise_estimation.estimate_noise"
        )
    form, *pieces = text.split(",")
    pairs = [piece.partition("=") for piece in pieces]
    model = FORMS.get((form.strip(), *sorted(key.strip() for key, _, _ in pairs)))
    if model is None:
        raise InputError(
            f"noise must be a number, or one of gaussian,sigma=0.3; poisson,gain=0.01;"
            f" poisson-gaussian,gain=0.01,sigma=0.02; per-channel:0.1:0.2:0.1, got {shown(text)}"
        )
    values = {
        key.strip(): model.options[key.strip()].parse(f"noise: {key.strip()}", value.strip())
        for key, _, value in pairs
    }
    return model(**values)


def _check_options(noise: "Gaussian | PoissonGaussian") -> None:
    """Check the numbers of a noise model against their bounds, or raise InputError."""
    for name, option in noise.options.items():
        where = "noise" if isinstance(noise, Gaussian) else f"noise: {name}"
        object.__setattr__(noise, name, option.check(where, getattr(noise, name)))


def _options(noise: Gaussian | PoissonGaussian) -> str:
    """Write the numbers of a noise model as options of its text form."""
    values = {field.name: getattr(noise, field.name) for field in fields(noise)}
    if isinstance(noise, PoissonGaussian):
        values = {name: value for name, value in values.items() if value}  # 0 is the default
    return ",".join(f"{name}={value!r}".removesuffix(".0") for name, value in values.items())


def _randn(like: Tensor, streams: PerImageGenerator) -> Tensor:
    """Draw standard normal noise like a batch."""
    return streams.randn(*like.shape[1:]).to(like)


def _log_normal(away: Tensor, sigma: float) -> Tensor:
    """Compute log N(away; 0, sigma^2)."""
    return -away.square() / (2 * sigma**2) - 0.5 * math.log(2 * math.pi * sigma**2)


def _maximum(rate: Tensor, count: Tensor, width: float) -> Tensor:
    """Return the integer next to the maximum of f, by bisection."""
    low, high = torch.zeros_like(rate), torch.maximum(rate, count).clamp_min(0) + 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = rate.log() - torch.digamma(middle + 1) + (count - middle) / width**2
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    return low.round()


def _log_poisson(k: Tensor, rate: Tensor) -> Tensor:
    """Compute the log probability of k counts at a rate."""
    return torch.xlogy(k, rate) - rate - torch.lgamma(k + 1)
