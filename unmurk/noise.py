"""Noise models: what a sensor adds to the noiseless measurement c = A(x), number by number.

    Gaussian          y = c + sigma n,                           n ~ N(0, 1)
    Poisson           y = gain k,            k ~ Poisson(c / gain)
    Poisson-Gaussian  y = gain k + sigma n

gain is what one count (a photon, an electron) is worth in units of the image range [0, 1]: at
white 1 / gain counts are expected. Mean and variance are E y = c and var y = gain c + sigma^2.
There is no negative light: where c < 0 the rate of the counts is 0. A camera may put black at an
offset o > 0: then the two models hold for y - o and c - o in the place of y and c, and

    E y = c,    var y = gain (c - o) + sigma^2.

    log p(y | c), Gaussian           - (y - c)^2 / (2 sigma^2) - log(2 pi sigma^2) / 2
                  Poisson            k log r - r - log k!,    r = c / gain,  k = y / gain
                  Poisson-Gaussian   log sum_k exp(f(k)),
                                     f(k) = k log r - r - log k! + log N(y; gain k, sigma^2)

f is concave, so its sum is over a window around its maximum, of standard deviation

    s = (1 / (k + 1) + gain^2 / sigma^2)^(-1/2)    at the maximum k.

NODES counts on each side are taken while s < 2 STRIDE; above, every h-th with h = floor(s /
STRIDE). That loses nothing: by Poisson's summation formula the sum of a Gaussian of standard
deviation s over every h-th number, times h, is off by 2 exp(-2 pi^2 (s / h)^2), and s / h >= 4.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from .bounds import Option, Real, shown
from .errors import InputError
from .rng import PerImageGenerator, binomial

__all__ = ["AUTO", "Gaussian", "Noise", "PoissonGaussian", "as_noise", "noise_of"]

NODES, STRIDE = 80, 4  # s / h < 8, so that the window reaches 10 s to each side
HALVINGS = 60  # of the interval that the maximum lies in
WHOLE = 1e-2  # counts that numbers in single precision may be off

SIGMA = Real(1e-6, 10, zero=True)
"""Bounds of a standard deviation in units of the image range: of 10, no image is left."""
GAIN = Real(1e-12, 10)
"""Bounds of a gain: from 1e12 counts at white, hardly any noise, to one count in ten pixels."""
OFFSET = Real(0, 10)


@runtime_checkable
class Noise(Protocol):
    """What a noise model is: a value, and how y is spread around c, shape (B, ...) both."""

    @property
    def spec(self) -> str:
        """The text form; `as_noise` reads it back to an equal model."""
        ...

    def draw(self, clean: Tensor, streams: PerImageGenerator) -> Tensor:
        """y of every c, from one stream for each row."""
        ...

    def log_likelihood(self, clean: Tensor, y: Tensor) -> Tensor:
        """log p(y | c) in nats, number by number."""
        ...

    def variance(self, clean: Tensor) -> Tensor:
        """var(y | c), number by number."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """y = c + sigma n. Text form: "gaussian,sigma=0.3", or the number alone.

    Raises:
        InputError: a number out of its bounds.
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
        """See `Noise.log_likelihood`. Raises InputError where sigma is 0: there is no density."""
        if self.sigma == 0:
            raise InputError("without noise there is no likelihood; give the problem noise > 0")
        return _log_normal(y - clean, self.sigma)

    def variance(self, clean: Tensor) -> Tensor:
        """See `Noise.variance`."""
        return torch.full_like(clean, self.sigma**2)


@dataclass(frozen=True)
class PoissonGaussian:
    """y = o + gain k + sigma n, k ~ Poisson((c - o) / gain). Text form: "poisson,gain=0.01", or
    "poisson-gaussian,gain=0.01,sigma=0.02"; either may end with ",offset=0.05".

    Raises:
        InputError: a number out of its bounds.
    """

    options: ClassVar[dict[str, Option]] = {"gain": GAIN, "sigma": SIGMA, "offset": OFFSET}

    gain: float
    """What one count is worth in units of the image range [0, 1], a number from 1e-12 to 10."""
    sigma: float = 0.0
    """Standard deviation of the Gaussian noise on top, in the same units: 0 or a number from
    1e-06 to 10; 0 has none."""
    offset: float = 0.0
    """o, the value of black, where no light falls, in the same units, a number from 0 to 10."""

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

        Without Gaussian noise this is the log of a probability, and y has to hold whole counts;
        between them the formula is continued by the gamma function, below 0 it is -infinity.
        """
        rate, count = self.rate(clean), (y.double() - self.offset) / self.gain
        if self.sigma == 0:
            known = torch.where(count >= 0, _log_poisson(count.clamp_min(0), rate), -math.inf)
            return known.to(clean)
        return self._convolved(rate, count).to(clean)

    def _convolved(self, rate: Tensor, count: Tensor) -> Tensor:
        """log sum_k exp(f(k)), all in units of counts but for the constant of the density."""
        width = self.sigma / self.gain
        top = _maximum(rate.detach(), count, width)
        stride = (1 / (top + 1) + 1 / width**2).rsqrt().div(STRIDE).floor().clamp_min(1)

        def term(k: Tensor) -> Tensor:
            return _log_poisson(k.clamp_min(0), rate) + _log_normal(count - k, width)

        peak, total = term(top), torch.zeros_like(rate)
        for node in range(-NODES, NODES + 1):
            k = top + node * stride
            total = total + torch.where(k >= 0, (term(k) - peak).exp(), 0)
        return peak + (stride * total).log() - math.log(self.gain)

    def variance(self, clean: Tensor) -> Tensor:
        """See `Noise.variance`."""
        return self.gain * (clean - self.offset).clamp_min(0) + self.sigma**2

    def split(self, y: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Two measurements of one image made of one (B, ...), with independent noises.

        A count goes to the first with probability p = `share`, else to the second. Of k counts
        from a Poisson law that makes k_1 and k - k_1, independent and from the laws of rates p r
        and (1 - p) r. Gaussian noise is taken for more counts: s^2 = sigma^2 / gain^2 of them
        have its variance (D. L. Snyder, A. M. Hammoud, R. L. White, 1993, J. Opt. Soc. Am. A 10,
        p. 1014), and 1/12 that of rounding, where y is not whole counts. So in general the two
        noises are uncorrelated; for whole Poisson counts they are independent. Variances are
        those of y over p and over 1 - p.
        """
        counts = (y.double() - self.offset) / self.gain
        near = counts.round()
        more = (self.sigma / self.gain) ** 2
        if self.sigma > 0 or (counts - near).abs().max() > WHOLE:
            more += 1 / 12
            near = (counts + more).round()
        near = near.clamp_min(0)
        first = binomial(near, share, generator)
        parts = (first / share, (near - first) / (1 - share))
        one, other = ((self.offset + self.gain * (part - more)).to(y) for part in parts)
        return one, other

    def rate(self, clean: Tensor) -> Tensor:
        """Counts expected, number by number, in double precision."""
        return (clean.double() - self.offset).clamp_min(0) / self.gain


AUTO: dict[str, Literal["gaussian", "poisson-gaussian"]] = {
    "auto": "gaussian",
    "gaussian,auto": "gaussian",
    "poisson-gaussian,auto": "poisson-gaussian",
}
"""Text forms that leave the numbers to `noise_estimation`, and the kind of noise of each."""

FORMS: dict[tuple[str, ...], type[Gaussian] | type[PoissonGaussian]] = {
    ("gaussian", "sigma"): Gaussian,
    ("poisson", "gain"): PoissonGaussian,
    ("poisson", "gain", "offset"): PoissonGaussian,
    ("poisson-gaussian", "gain", "sigma"): PoissonGaussian,
    ("poisson-gaussian", "gain", "offset", "sigma"): PoissonGaussian,
}
"""Text forms: the first word and the options, all of which are needed."""


def as_noise(value: Any) -> Noise:
    """A noise model from what users have.

    Args:
        value: A number, the standard deviation of Gaussian noise; a text form, or a number as
            text; or a noise model.

    Raises:
        InputError: for anything else, or a number out of range.
    """
    if isinstance(value, str):
        try:
            return Gaussian(SIGMA.read(value.strip()))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            return _parse(value)
    return value if isinstance(value, Noise) else Gaussian(value)


KINDS: dict[str, tuple[str, ...]] = {
    "ZeroNoise": (),
    "GaussianNoise": ("sigma",),
    "PoissonNoise": ("gain",),
    "PoissonGaussianNoise": ("gain", "sigma"),
}
"""Noise models of deepinv that are ours too, by the name of their class, and their numbers."""

ASIDE = {"normalize", "clip_positive", "rng", "initial_random_state", "noise_model", "training"}
"""Attributes of a noise model that say nothing about the law of y: where random numbers come from,
and what `noise_of` checks by itself."""


def noise_of(operator: Any) -> Noise:
    """The noise that an object of another library carries along as `noise_model`.

    Args:
        operator: A physics of deepinv, or any object. Without a `noise_model` the noise is 0.

    Its noise is read where it is one of `KINDS`, or a record of numbers, `sigma` and `gain`, that
    cannot be called. Any other noise would be lost without a word, so it is refused.

    Raises:
        InputError: a noise of another kind, one that varies from image to image, or one that
            counts photons.
    """
    model = getattr(operator, "noise_model", None)
    if model is None or isinstance(operator, str):
        return Gaussian(0.0)
    if isinstance(model, Noise):
        return model
    name = type(model).__name__
    kind = next((k.__name__ for k in type(model).__mro__ if k.__name__ in KINDS), None)
    held = {key for key in _attributes(model) if key not in ASIDE}
    if kind is None and not callable(model) and held and held <= {"gain", "sigma"}:
        wanted: tuple[str, ...] = tuple(held)
    elif kind is not None and held <= set(KINDS[kind]):
        wanted = KINDS[kind]
    else:
        what = f" ({', '.join(sorted(held))})" if held else ""
        raise InputError(
            f"the operator carries {name}{what}, a noise that unmurk does not have: give"
            f" noise= as a number, or as one of {', '.join(sorted({f for f, *_ in FORMS}))}"
        )
    gain, sigma = (
        _one(key, getattr(model, key, 0.0)) if key in wanted else 0.0 for key in ("gain", "sigma")
    )
    if not gain:
        return Gaussian(sigma)
    if not getattr(model, "normalize", True):
        raise InputError("the operator's noise_model counts photons: give it normalize=True")
    return PoissonGaussian(gain, sigma)


def _attributes(model: Any) -> set[str]:
    """The names of the public values that an object holds, those of every torch module aside."""
    names = {key for key in dir(model) if not key.startswith("_")} - set(dir(torch.nn.Module))
    return {key for key in names if not callable(getattr(model, key, None))}


def _one(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.unique().numel() != 1:
        raise InputError(
            f"the operator's noise_model.{name} varies; give one noise for all images"
        )
    return float(value.flatten()[0]) if isinstance(value, Tensor) else value


def _parse(text: str) -> Noise:
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
            f" poisson-gaussian,gain=0.01,sigma=0.02, got {shown(text)}"
        )
    values = {
        key.strip(): model.options[key.strip()].parse(f"noise: {key.strip()}", value.strip())
        for key, _, value in pairs
    }
    return model(**values)


def _check_options(noise: "Gaussian | PoissonGaussian") -> None:
    """Put the numbers of a noise model within their bounds, or raise InputError."""
    for name, option in noise.options.items():
        where = "noise" if isinstance(noise, Gaussian) else f"noise: {name}"
        object.__setattr__(noise, name, option.check(where, getattr(noise, name)))


def _options(noise: Gaussian | PoissonGaussian) -> str:
    values = {field.name: getattr(noise, field.name) for field in fields(noise)}
    if isinstance(noise, PoissonGaussian):
        values = {name: value for name, value in values.items() if value}  # 0 goes without saying
    return ",".join(f"{name}={value!r}".removesuffix(".0") for name, value in values.items())


def _randn(like: Tensor, streams: PerImageGenerator) -> Tensor:
    return streams.randn(*like.shape[1:]).to(like)


def _log_normal(away: Tensor, sigma: float) -> Tensor:
    return -away.square() / (2 * sigma**2) - 0.5 * math.log(2 * math.pi * sigma**2)


def _maximum(rate: Tensor, count: Tensor, width: float) -> Tensor:
    """The whole number next to the maximum of f, which lies between 0 and both its parts'."""
    low, high = torch.zeros_like(rate), torch.maximum(rate, count).clamp_min(0) + 1
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        slope = rate.log() - torch.digamma(middle + 1) + (count - middle) / width**2
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    return low.round()


def _log_poisson(k: Tensor, rate: Tensor) -> Tensor:
    return torch.xlogy(k, rate) - rate - torch.lgamma(k + 1)
