r"""Error bars calibrated without truth: unbiased squared errors, held against predicted variances.

Let :math:`y = x + n` with independent noise of variance :math:`v_i` in pixel i, and :math:`f(y)` a
restoration. With a random probe b of independent signs and a small step :math:`\epsilon`,

.. math::

    e_i = (f_i - y_i)^2 - v_i + 2 v_i \frac{\partial f_i}{\partial y_i}, \qquad
    v_i \frac{\partial f_i}{\partial y_i} = E_b \Bigl[ \sqrt{v_i}\, b_i\,
    \frac{f_i(y + \epsilon \sqrt v\, b) - f_i(y)}{\epsilon} \Bigr]

has the expectation :math:`E\,(f_i(y) - x_i)^2` (Stein, 1981, Annals of Statistics 9; the probe is
that of Ramani, Blu and Unser, 2008, IEEE TIP 17). Counts of the gain g, with
:math:`v_i = g (y_i - o) + \sigma^2`, obey the same formula to first order in g (Le Montagner,
Angelini and Olivo-Marin, 2014, IEEE TIP 23); for f linear in y it is exact.

**Bins.** Pixels are binned by the standard deviation that the flow predicts. But this prediction
depends on the noise of its own pixel, and the mean of :math:`e_i` over pixels that were selected
by their own noise is biased. So a pixel is binned by a *blind* prediction: the standard deviation
from a measurement in which this pixel is replaced by the mean of its neighbors plus fresh noise.
One pixel in 2 x 2 is replaced at a time. The bin is then independent of :math:`n_i`, and Stein's
identity holds within every bin.

**Masks.** The formula holds on measured pixels. For hidden ones, further measured pixels are
withheld and predicted: there :math:`e_i = (f_i - y_i)^2 - v_i` is unbiased, as :math:`f_i` has not
met :math:`n_i` (Batson and Royer, 2019, arXiv 1901.11365).

**Other linear A.** The error is measured in the directions that y determines. With the regularized
inverse :math:`R = (A^T A + \sigma^2/\tau^2)^{-1} A^T` and P = R A,

.. math:: e = (P f - R y)^2 - (R \tilde n)^2 + 2\, (R \tilde n) \odot
    \frac{P f(y + \epsilon \tilde n) - P f(y)}{\epsilon}, \qquad \tilde n = \sigma b,

has the expectation :math:`E\,(P f - P x)^2`, value by value: the projected risk of Eldar (2009,
IEEE TSP 57), with a smooth P. It is held against the variance of P x over draws of the flow, and
the map is carried over to pixels of equal rank.

**Map.** Neighboring bins are joined until their mean error exceeds twice its standard error. The
knots are the root mean squares of prediction and error in a bin, made monotone by isotonic
regression. Standard errors come from whole images, since the pixels of one image depend on each
other.

The same numbers give a PSNR whose mean squared error is estimated without bias, as Marcos Morales
et al. (2023, arXiv 2210.05553) do from several noisy captures. All of it assumes that the noise
model is right and that the noise is white; `whiteness` tests the residual.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..flows.error_bars import Curve, ErrorBars
from ..flows.posterior import Posterior
from ..operators.masks import Inpaint
from ..problem import Problem
from ..rng import StreamId, generator, normal
from .unbiased import (
    Map,
    has_varied_masks,
    noise_variance,
    stein_error,
    tells_whiteness,
    whiteness,
    withhold,
)

__all__ = [
    "Bin",
    "Calibration",
    "calibrate",
    "determines_curve",
    "fit_curve",
]

BINS = 12
BOUND = 1e-6  # least calibrated standard deviation
# Least half-width of an interval in standard deviations. The quantile of a bin whose predictions
# differ by decades is one of the mixture, far too narrow for its quiet pixels.
NARROWEST = 0.9
SIGNIFICANT = 2.0  # standard errors by which the error of a bin exceeds zero
TAU = 0.25  # typical standard deviation of images in [0, 1]
TOGETHER = 2**16  # values of a batch
QUIET = 0.5  # predicted standard deviation in units of the noise
CORRELATED = 0.1  # autocorrelation of the residual from which noise is not white
REMOVED = 0.3  # power of the residual, in units of the noise, from which it is a picture of it


# -- predictions and errors -----------------------------------------------------------------------


@dataclass
class Values:
    """Predictions and errors of many values of one kind, flat.

    Attributes:
        predicted: Standard deviations that the flow predicts, and that the map is applied to.
        rank: Predictions in the directions of the error, for the bins; the same for A = I.
        blind: Predictions that are independent of the value's own noise.
        square: Unbiased squared errors.
        tail: Absolute deviations of draws from their mean, in standard deviations.
        image: Number of the image within the set.
    """

    predicted: list[Tensor] = field(default_factory=list)
    rank: list[Tensor] = field(default_factory=list)
    blind: list[Tensor] = field(default_factory=list)
    square: list[Tensor] = field(default_factory=list)
    tail: list[Tensor] = field(default_factory=list)
    image: list[Tensor] = field(default_factory=list)

    def add(self, where: Tensor, numbers: Sequence[int], **values: Tensor) -> None:
        """Append the selected values of a batch."""
        each = torch.as_tensor(numbers).view(-1, *[1] * (where.ndim - 1)).expand(where.shape)
        for name, value in {**values, "image": each}.items():
            getattr(self, name).append(value.cpu()[where.cpu()])

    def joined(self, part: int | None = None) -> dict[str, Tensor]:
        """Return all values, or those of even (0) or odd (1) images."""
        found = {name: torch.cat(held) for name, held in vars(self).items()}
        if part is None:
            return found
        chosen = found["image"] % 2 == part
        return {name: held[chosen] for name, held in found.items()}


@dataclass(frozen=True)
class Bin:
    """Predicted and measured errors in one bin.

    Attributes:
        values: Number of values.
        predicted: Root mean square of the predicted standard deviations.
        square: Unbiased mean squared error.
        standard_error: Standard error of `square`, from whole images.
        applied: Root mean square of the predictions that the map is applied to.
        width: Half-width of the interval of probability 0.9 of the draws, in units of the root
            mean square of their deviations.

    >>> one = Bin(100, 0.1, square=0.04, standard_error=0.001, applied=0.1, width=1.6)
    >>> curve = fit_curve([one])
    >>> curve.predicted, curve.calibrated  # predicted 0.1, found 0.04^0.5
    ((0.1,), (0.2,))
    """

    values: int
    predicted: float
    square: float
    standard_error: float
    applied: float
    width: float


def _squared_mean(values: Tensor) -> float:
    return float(values.double().square().mean())


def bins_of(values: dict[str, Tensor]) -> list[tuple[Bin, Tensor]]:
    """Collect values in bins of equal total blind prediction, joined until they are significant.

    Returns:
        The bins, each with the places of its values.
    """
    order = values["blind"].argsort()
    total = values["blind"][order].double().cumsum(0)
    ends = [int((total <= total[-1] * (k + 1) / BINS).sum()) for k in range(BINS - 1)]
    edges = sorted({0, *ends, len(order)})
    ranks = values["predicted"].sort().values
    found: list[tuple[Bin, Tensor]] = []
    start = 0
    for end in edges[1:]:
        bin_ = _bin(values, order[start:end], ranks[start:end])
        if bin_.square > SIGNIFICANT * bin_.standard_error:
            found.append((bin_, order[start:end]))
            start = end
    if found and start < len(order):  # the last values join the last bin
        start -= found[-1][0].values
        found[-1] = _bin(values, order[start:], ranks[start:]), order[start:]
    return found


def fit(values: dict[str, Tensor], held: Sequence[tuple[Bin, Tensor]]) -> Curve:
    """Fit the map of one kind of values, so that the mean variance over the bins is right too.

    A map through the knots has another mean over a bin than at its knot. One factor, by weighted
    least squares over the bins, corrects this.

    Args:
        values: The values.
        held: Their bins (`bins_of`), which determine a curve.
    """
    curve = fit_curve([bin_ for bin_, _ in held])
    if values["rank"] is not values["predicted"]:
        return curve
    above, below = 0.0, 0.0
    for bin_, chosen in held:
        weight = max(bin_.standard_error, 1e-12) ** -2
        mean = _squared_mean(curve.std(values["predicted"][chosen]))
        above, below = above + weight * bin_.square * mean, below + weight * mean**2
    factor = math.sqrt(above / below) if above > 0 else 1.0
    return replace(curve, calibrated=tuple(factor * c for c in curve.calibrated))


def _bin(values: dict[str, Tensor], chosen: Tensor, ranks: Tensor) -> Bin:
    square = values["square"][chosen].double()
    mean = float(square.mean())
    images = values["image"][chosen]
    each = torch.zeros(int(images.max()) + 1, dtype=torch.float64)
    each.index_add_(0, images, square - mean)
    count = len(images.unique())
    # one image alone says nothing of the differences between images
    error = math.inf if count < 2 else float(each.square().sum() * count / (count - 1)) ** 0.5
    rank = values["rank"][chosen]
    same = values["rank"] is values["predicted"]
    tail = values["tail"][chosen] * rank
    scale = max(math.sqrt(_squared_mean(rank)), BOUND)
    return Bin(
        values=len(chosen),
        predicted=scale,
        square=mean,
        standard_error=error / len(chosen),
        applied=scale if same else max(math.sqrt(_squared_mean(ranks)), BOUND),
        width=max(_quantile(tail, 0.9) / max(math.sqrt(_squared_mean(tail)), BOUND), NARROWEST),
    )


def _quantile(values: Tensor, level: float) -> float:
    """Return a quantile of any number of values."""
    return float(values.kthvalue(max(1, math.ceil(level * len(values)))).values)


def determines_curve(bins: Sequence[Bin]) -> bool:
    """Tell whether bins determine a map: pooled, the largest squared error is above zero.

    >>> determines_curve([Bin(100, 0.1, -0.04, 0.001, 0.1, 1.6)])
    False
    """
    blocks = _pooled(_ascending(bins))
    return bool(blocks) and blocks[-1][0] > 0


def _ascending(bins: Sequence[Bin]) -> list[Bin]:
    """Return bins in the order of what the map is applied to, those of equal values once."""
    held = sorted(bins, key=lambda b: b.applied)
    return [b for k, b in enumerate(held) if not k or b.applied > 1.001 * held[k - 1].applied]


def _pooled(held: Sequence[Bin]) -> list[tuple[float, float, int]]:
    """Pool neighbors whose squared errors violate the order: square, weight and number of bins."""
    # the error in the directions of y, carried over as a ratio to the pixels
    squares = [b.square * (b.applied / b.predicted) ** 2 for b in held]
    weights = [(b.predicted / (b.applied * max(b.standard_error, 1e-12))) ** 2 for b in held]
    blocks: list[tuple[float, float, int]] = []
    for square, weight in zip(squares, weights, strict=True):
        blocks.append((square, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, wa, na), (b, wb, nb) = blocks[-2:]
            blocks[-2:] = [((wa * a + wb * b) / (wa + wb), wa + wb, na + nb)]
    return blocks


def fit_curve(bins: Sequence[Bin]) -> Curve:
    """Fit a monotone map to bins by isotonic regression of the squared error.

    Neighbors that violate the order are pooled (the pool-adjacent-violators algorithm; Barlow et
    al., 1972), weighted by the inverse square of their standard errors. An unbiased estimate of a
    small squared error may be negative. It is then replaced by its standard error, or by the next
    larger estimate if that is smaller.

    Args:
        bins: The bins.

    Raises:
        InputError: There are no bins, or the largest estimate is not positive when pooled.

    >>> one = Bin(100, 0.1, 0.04, 0.001, 0.1, 1.6)
    >>> two = Bin(100, 0.2, 0.01, 0.001, 0.2, 1.6)
    >>> [round(value, 3) for value in fit_curve([one, two]).calibrated]
    [0.158, 0.158]
    """
    held = _ascending(bins)
    blocks = _pooled(held)
    if not blocks or blocks[-1][0] <= 0:
        raise InputError("no bin has a squared error above zero, so none is to be predicted")
    least, calibrated = math.inf, list[float]()
    for square, weight, count in reversed(blocks):
        resolved = square if square > 0 else 1 / math.sqrt(weight) if weight > 0 else math.inf
        least = min(least, resolved)
        calibrated[:0] = [math.sqrt(least)] * count
    return Curve(
        tuple(b.applied for b in held),
        tuple(max(value, BOUND) for value in calibrated),
        tuple(b.width for b in held),
    )


# -- the calibration of a posterior ---------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """The calibration of a posterior, and the figures that come with it.

    Attributes:
        error_bars: The map; None if the measurements do not determine one.
        record: The figures, which JSON can hold; see docs/guide/checking.md.

    >>> posterior, problem = Posterior.create("tiny", (1, 8, 8)), Problem("identity", 0.1)
    >>> y = problem.simulate(torch.full((8, 1, 8, 8), 0.5))
    >>> found = calibrate(posterior, y, problem, range(8), draws=4)
    >>> round(found.record["unbiased_psnr"]["after"], 2)  # untrained: y itself, off by 0.1
    20.0
    """

    error_bars: ErrorBars | None
    record: dict[str, Any]


@torch.no_grad()
def calibrate(
    posterior: Posterior,
    y: Tensor,
    problem: Problem,
    index: Sequence[int],
    *,
    draws: int = 16,
    seed: int = 0,
    trusted: bool = True,
    why: str = "",
) -> Calibration:
    """Calibrate the error bars of a posterior from measurements alone.

    The measurements should not be those that the posterior was learned from; with many images, or
    few steps, the difference is small.

    Args:
        posterior: The posterior, which is not changed.
        y: Measurements (N, ...).
        problem: How they were made, not bound to images; A is linear.
        index: The numbers of the images, N of them.
        draws: Draws of a mean and standard deviation, even.
        seed: Seed of all draws.
        trusted: Whether the noise is known to be what the problem says, and white.
        why: Reason if it is not.

    Returns:
        The calibration. Noise that is not white in the residual takes the trust away too.

    Raises:
        InputError: A is not linear, or the noise is 0 or neither Gaussian nor Poisson-Gaussian,
            for all channels or, where A is the identity or a mask, for each.

    >>> posterior, problem = Posterior.create("tiny", (1, 8, 8)), Problem("identity", 0.1)
    >>> y = problem.simulate(torch.full((64, 1, 8, 8), 0.5))
    >>> bars = calibrate(posterior, y, problem, range(64)).error_bars  # untrained: f(y) = y
    >>> bool((bars.std(torch.tensor([0.05])) - 0.1).abs() < 0.005)
    True
    """
    if not problem.linear or problem.level <= 0:
        raise InputError("calibration needs a linear operator and noise above 0")
    shape = posterior.shape
    together = max(2, TOGETHER // math.prod(shape))
    found = {"measured": Values(), "hidden": Values()}
    residuals: list[tuple[Tensor, Tensor]] = []
    shares, sums = [], {"before": 0.0, "count": 0.0}
    for number, part in enumerate(torch.arange(len(y)).split(together)):
        numbers = [int(index[i]) for i in part]
        device = next(posterior.parameters()).device
        held = y[part.to(y.device)].to(device)
        bound = problem.bind(numbers, shape).to(device)
        held = bound.operator.apply_mask(held)
        noise = generator(seed, StreamId.CALIBRATION, number)
        batch = _Batch(posterior, held, bound, numbers, part.tolist(), draws, seed, noise)
        residuals.append(batch.measure(found["measured"]))
        if has_varied_masks(bound):
            batch.predict_withheld(found["hidden"])
        observed = bound.operator.apply_mask(torch.ones_like(held))
        shares.append((float(observed.sum()), float(observed.numel())))
        sums["before"] += float((observed * noise_variance(held, bound)).sum())
        sums["count"] += float(observed.sum())
    white = None
    pixels = problem.operator.spec == "identity" or isinstance(problem.operator, Inpaint)
    if all(r.ndim == 4 for r, _ in residuals):
        residual, quiet = (torch.cat(values) for values in zip(*residuals, strict=True))
        white = whiteness(residual, quiet) if tells_whiteness(quiet) else None
    noisy = white is not None and white["power"] > REMOVED and white["largest"] > CORRELATED
    if white is not None and noisy and pixels and trusted:
        trusted = False
        why = (
            f"the residual is not white (autocorrelation {white['largest']:.2f}): the noise is"
            " correlated, or structure was removed with it"
        )
    return _collected(found, pixels, len(y), shares, sums, white, trusted, why)


@dataclass
class _Batch:
    """The measurements of a batch, and what is computed from them."""

    posterior: Posterior
    y: Tensor
    problem: Problem
    index: list[int]
    places: list[int]
    draws: int
    seed: int
    noise: torch.Generator

    def moments(
        self, y: Tensor, problem: Problem, draws: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and predicted standard deviation, (B, C, H, W) each."""
        n = draws or self.draws
        return self.posterior.mean_std(y, problem, n, self.seed, self.index, calibrated=False)

    def measure(self, values: Values) -> tuple[Tensor, Tensor]:
        """Add the errors that y tells of; return residuals in units of the noise, and which count.

        Residuals count where the predicted standard deviation is small beside the noise.
        """
        y, problem = self.y, self.problem
        pixels = problem.operator.spec == "identity" or isinstance(problem.operator, Inpaint)
        kept: list[tuple[Tensor, Tensor]] = []

        def restore(y: Tensor) -> Tensor:
            kept.append(self.moments(problem.operator.apply_mask(y), problem))
            return kept[-1][0]

        image, data = (None, None) if pixels else self.readout()
        _, square = stein_error(restore, y, problem, self.noise, image=image, data=data)
        mean, std = kept[0]
        drawn = self.posterior.sample(y, problem, 2, self.seed + 1, self.index)
        if pixels:
            where = problem.operator.apply_mask(torch.ones_like(y)) > 0
            rank, tail = std, (drawn - mean).abs() / std.clamp_min(BOUND)
            blind = self.blind()
        else:
            assert image is not None
            rank = self.spread(image)
            where = torch.ones_like(rank, dtype=torch.bool)
            tail = torch.stack([image(x - mean).abs() / rank.clamp_min(BOUND) for x in drawn])
            blind = rank
        values.add(
            where,
            self.places,
            predicted=std,
            rank=rank,
            blind=blind,
            square=square,
            tail=tail[0],
        )
        deviation = noise_variance(mean if pixels else y, problem).clamp_min(1e-12).sqrt()
        residual = problem.residual(mean, y) / deviation
        quiet = where & (std < QUIET * deviation) if pixels else torch.ones_like(residual) > 0
        return residual.cpu(), quiet.cpu()

    def readout(self) -> tuple[Map, Map]:
        """Return the maps P and R for a linear operator that is no mask."""
        problem = self.problem
        gamma = self.y.new_full((len(self.y),), (TAU / problem.sigma) ** 2)
        zero = self.y.new_zeros(len(self.y), *self.posterior.shape)

        def data(y: Tensor) -> Tensor:
            return problem.operator.prox_l2(zero, y, gamma)

        return lambda x: data(problem.A(x)), data

    def spread(self, image: Map) -> Tensor:
        """Return the standard deviation of P x over draws in antithetic pairs."""
        posterior = self.posterior
        context = posterior.context(self.y, self.problem)
        streams = posterior.noise(self.index, self.seed, context.mean.device)
        total, square = torch.zeros_like(context.mean), torch.zeros_like(context.mean)
        for k in range(self.draws // 2):
            z = streams(k).to(context.mean)
            for sign in (1.0, -1.0):
                value = image(posterior.transform(sign * z, context)[0] - context.mean)
                total, square = total + value, square + value.square()
        return (square / self.draws - (total / self.draws).square()).clamp_min(0).sqrt()

    def blind(self) -> Tensor:
        """Return predictions for every pixel that are independent of its own noise."""
        y, problem, found = self.y, self.problem, torch.zeros_like(self.y)
        few = max(2, self.draws // 4 * 2)
        for down in range(2):
            for right in range(2):
                chosen = torch.zeros_like(y, dtype=torch.bool)
                chosen[..., down::2, right::2] = True
                fresh = self.from_neighbors()
                given = problem.operator.apply_mask(torch.where(chosen, fresh, y))
                std = self.moments(given, problem, few)[1]
                found = torch.where(chosen, std, found)
        return found

    def from_neighbors(self) -> Tensor:
        """Return for every pixel the mean of its measured neighbors, with fresh noise."""
        y = self.y
        observed = self.problem.operator.apply_mask(torch.ones_like(y))
        kernel = y.new_tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).expand(y.shape[1], 1, 3, 3)
        count = F.conv2d(observed, kernel, padding=1, groups=y.shape[1])
        total = F.conv2d(y * observed, kernel, padding=1, groups=y.shape[1])
        overall = (y * observed).sum((-2, -1), True) / observed.sum((-2, -1), True).clamp_min(1)
        mean = torch.where(count > 0, total / count.clamp_min(1), overall)
        share = 1 - torch.where(count > 0, 1 / count.clamp_min(1), 0.0)
        variance = noise_variance(mean, self.problem).clamp_min(0)
        return mean + (share * variance).sqrt() * normal(y.shape, self.noise).to(y)

    def predict_withheld(self, values: Values) -> None:
        """Add the errors of pixels that were withheld, which stand for hidden ones."""
        problem, more = withhold(self.problem, self.noise)
        y = problem.operator.apply_mask(self.y)
        mean, std = self.moments(y, problem)
        square = (mean - self.y).square() - noise_variance(self.y, problem)
        drawn = self.posterior.sample(y, problem, 1, self.seed + 1, self.index)[0]
        tail = (drawn - mean).abs() / std.clamp_min(BOUND)
        where = more.expand_as(self.y) > 0
        values.add(
            where, self.places, predicted=std, rank=std, blind=std, square=square, tail=tail
        )


def _collected(
    found: dict[str, Values],
    pixels: bool,
    images: int,
    shares: Sequence[tuple[float, float]],
    sums: dict[str, float],
    white: dict[str, Any] | None,
    trusted: bool,
    why: str,
) -> Calibration:
    """Fit the maps and collect the figures."""
    curves: dict[str, Curve | None] = {"measured": None, "hidden": None}
    record: dict[str, Any] = {"images": images, "bins": {}, "spread_over_error": {}}
    squares = {}
    for kind, values in found.items():
        if not values.predicted:
            continue
        joined = values.joined()
        if pixels:
            joined["rank"] = joined["predicted"]
        held = bins_of(joined)
        bins = [bin_ for bin_, _ in held]
        if determines_curve(bins):
            curves[kind] = fit(joined, held)
        squares[kind] = float(joined["square"].double().mean())
        record["bins"][kind] = [
            {"values": b.values, "predicted": b.predicted, "error": math.sqrt(b.square)}
            | {"standard_error": b.standard_error / (2 * math.sqrt(b.square))}
            for b in bins
        ]
        record["spread_over_error"][kind] = _ratios(values, joined, pixels)
    if curves["measured"] is None:
        trusted, why = False, why or "the measurements are too few to tell the error from zero"
    record |= {"trusted": trusted, "why": why, "whiteness": white}
    record["unbiased_psnr"] = _unbiased_psnr(squares, shares, sums) if pixels else None
    measured = curves["measured"]
    bars = None if measured is None else ErrorBars(measured, curves["hidden"], trusted, why)
    return Calibration(bars, record)


def _ratios(values: Values, joined: dict[str, Tensor], pixels: bool) -> dict[str, float | None]:
    """Return spread over error before calibration, and after that of the other half of images."""
    spread, error = _squared_mean(joined["rank"]), float(joined["square"].double().mean())
    before = math.sqrt(spread / error) if error > 0 else None
    after, errors = 0.0, 0.0
    for part in range(2):
        own, other = values.joined(part), values.joined(1 - part)
        if not len(own["image"]) or not len(other["image"]):
            return {"before": before, "after": None}
        if pixels:
            other["rank"] = other["predicted"]
        held = bins_of(other)
        if not pixels or not determines_curve([bin_ for bin_, _ in held]):
            return {"before": before, "after": None}
        curve = fit(other, held)
        after += float(curve.std(own["predicted"]).double().square().sum())
        errors += float(own["square"].double().sum())
    return {"before": before, "after": math.sqrt(after / errors) if errors > 0 else None}


def _unbiased_psnr(
    squares: dict[str, float], shares: Sequence[tuple[float, float]], sums: dict[str, float]
) -> dict[str, float | None]:
    """Return the PSNR in dB of the measurements and of the restorations, for a peak of 1."""
    measured, everything = (sum(values) for values in zip(*shares, strict=True))
    part = measured / everything
    complete = part > 1 - 1e-9
    before = sums["before"] / sums["count"]
    after = squares.get("measured", 0.0)
    if not complete:
        after = part * after + (1 - part) * squares.get("hidden", math.nan)
    return {
        "before": -10 * math.log10(before) if complete and before > 0 else None,
        "after": -10 * math.log10(after) if after > 0 else None,
    }
