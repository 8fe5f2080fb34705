r"""Noise that no model of this package fits: correlated, striped, clipped, compressed, Rician.

Every noise model of `unmurk.noise` is independent from pixel to pixel, with the mean c. Cameras,
file formats and resampling break this. Each break leaves a trace in one of these statistics. They
are taken from adjacent patches of SIDE x SIDE pixels and their discrete cosine coefficients
:math:`z_{uv}`, in units of the noise. A patch is flat if its power at high frequencies belongs to
the lower edge of the cloud of patches, as in `noise_estimation`. A selection by total power
treats all of these frequencies alike, so white noise stays white in flat patches.

============  =====================================================================================
finding       statistic and limit
============  =====================================================================================
correlated    fine over coarse power in flat patches,
              :math:`R = \overline{z^2_{u+v \ge 11}} / \overline{z^2_{6 \le u+v \le 7}}` with
              u, v > 0. White noise: 1; texture left in flat patches: down to 0.65. Limit: below
              `WHITE`.
rows,         correlation of the coefficients of horizontal stripes, :math:`z_{u0}` with u >= 4,
columns       between flat patches of the same rows, two or more patches apart (texture does not
              reach so far). White noise: 0; row noise of a third of sigma: 0.47. Limit: above
              `STRIPES`, and above 4 standard errors.
compressed    share of high-frequency coefficients within 0.9 steps of the file's numbers of 0, in
              patches on the grid of JPEG, which sets many to 0. Limit: `ZEROS` times the share of
              a normal distribution of that power, plus 0.05; or above `ALL_ZERO`. Gray images.
clipped       share of values that equal the smallest or the largest. Counts of photons pile up at
              0 without being clipped. So at black the values just above, within half a standard
              deviation, must continue the distribution: at least `CONTINUES` of those at the end.
              Limit: `TIED_BLACK`, `TIED_WHITE`.
rician        distance of Kolmogorov and Smirnov between the values of the darkest flat patches
              and the Rice distribution of the same second and fourth moments. Limit: below
              `RICE`, at a signal-to-noise ratio below `FAINT`, without negative values.
============  =====================================================================================

All limits come from simulation: false alarms for white noise of every model, on nuclei, confocal
images and digits, and detection of each kind. The tests repeat a small version of it. Of a set of
more than some `MOST` patches, evenly chosen images are examined; of an image of more, tiles of
`TILE` pixels a side, evenly spread over it.

Sources. Magnitudes: H. Gudbjartsson, S. Patz, "The Rician distribution of noisy MRI data", Magn.
Reson. Med. 34, 1995. Clipped noise: A. Foi, "Clipped noisy images", Signal Process. 89, 2009.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .noise_estimation import LEAST, envelope, raised, reach_of
from .patches import SIDE, cosines, cut_patches

__all__ = ["Finding", "Kind", "check_noise", "check_residual"]

Kind = Literal["correlated", "rows", "columns", "compressed", "clipped", "rician"]

SLOW, COARSE, FINE, STRIPE = 6, 7, 11, 4  # frequencies u + v
WHITE = 0.5
STRIPES, ERRORS = 0.2, 4.0
PAIRS = 30  # least number of pairs of patches
BELOW = 0.9  # steps of the file, within which rounding puts a coefficient that was 0
ZEROS, ALL_ZERO, BLANK = 2.0, 0.75, 0.1
TIED_BLACK, TIED_WHITE, NEAR, CONTINUES = 0.02, 0.01, 0.5, 0.15
LEVELS = 32  # least number of gray levels for which ends and steps mean anything
COUNTS, ATOM = 2.5, 3e-3
RICE, FAINT, DARK = 0.04, 2.0, 0.2
PIXELS = 1500  # least number of dark values
MOST = 40_000  # most patches
TILE = 256  # pixels to a side of the parts of an image that has more


class Finding(NamedTuple):
    """One way in which noise differs from every model of `unmurk.noise`.

    Attributes:
        kind: What it is.
        value: The statistic; see the table of this module.
        limit: The limit that the statistic has passed.
        text: One sentence for the user: what was found, and what to do.

    >>> draw = torch.Generator().manual_seed(0)
    >>> y = 0.5 + 0.1 * torch.randn(4, 1, 64, 64, generator=draw)
    >>> (finding,) = check_noise(torch.nn.functional.avg_pool2d(y, 2, stride=1))
    >>> finding.kind, finding.value < finding.limit == WHITE
    ('correlated', True)
    """

    kind: Kind
    value: float
    limit: float
    text: str


class _Patches(NamedTuple):
    """Patches of images, on a grid.

    Attributes:
        values: (P, C, SIDE^2).
        z: Coefficients in units of the noise, (P, C, SIDE^2).
        flat: Which patches are flat, (P,).
        usable: Which have noise, are measured, and hold no value of a clipped end, (P,).
        deviation: Standard deviation of the noise of each, (P,).
        grid: Images, patches in a column, patches in a row.
        constant: Number of patches without any noise.
        overlap: Number of patches that share a pixel, along a line.
    """

    values: Tensor
    z: Tensor
    flat: Tensor
    usable: Tensor
    deviation: Tensor
    grid: tuple[int, int, int]
    constant: int
    overlap: int = 1

    @property
    def few(self) -> bool:
        """Whether the flat patches are too few to tell anything from."""
        return int(self.flat.sum()) < LEAST // 2


def check_noise(y: Tensor, observed: Tensor | None = None) -> list[Finding]:
    """Find out whether the noise of images is of a kind that no model here fits.

    Args:
        y: Noisy images, shape (N, C, H, W); values that are not finite are left out.
        observed: Which values are measured, in the shape of y; None: all.

    Returns:
        What was found; nothing for white noise, and where the images are too few or nowhere flat.

    >>> import torch.nn.functional as F
    >>> draw = torch.Generator().manual_seed(0)
    >>> y = 0.5 + 0.1 * torch.randn(4, 1, 64, 64, generator=draw)
    >>> check_noise(y)
    []
    >>> [finding.kind for finding in check_noise(y.clamp(max=0.6))]
    ['clipped']
    >>> [finding.kind for finding in check_noise(F.avg_pool2d(y, 2, stride=1))]
    ['correlated']
    """
    measured = y.isfinite() if observed is None else observed.to(y.device).bool() & y.isfinite()
    y, measured = _sampled(y, measured)
    y, measured = torch.where(measured, y, 0).double().cpu(), measured.cpu()
    if not bool(measured.any()):
        return []
    values = y[measured]
    step, levels = _step(values)
    cut, inside, grid = _cut(y, measured)
    complete = cut[inside.all((1, 2))]
    found = _clipped(values, complete, step, levels)
    patches = _flat_patches(y, measured)
    if not found:
        found += _compressed(complete, step, levels)
    if patches.few:
        return found
    quiet = 2 * patches.constant > int(patches.flat.sum())  # no noise where it is flat
    if not found and not quiet:
        found += _correlated(patches)
    if not quiet:
        finer = _flat_patches(y, measured, 2)
        found += _striped(*_grids(patches if finer.few else finer))
    if not any(finding.kind == "clipped" for finding in found):
        found += _rician(values, patches, step, levels)
    return found


def check_residual(
    residual: Tensor,
    deviation: float | Tensor = 1.0,
    observed: Tensor | None = None,
) -> list[Finding]:
    """Find structure in the residual y - A(x) of a restoration, which should be white noise.

    Residuals have no texture, so all patches count. Structure that was removed with the noise
    shows as "correlated"; stripes as "rows" or "columns".

    Args:
        residual: y - A(x), shape (N, C, H, W).
        deviation: Standard deviation of the noise, a number or a tensor that broadcasts to it.
        observed: Which values are measured, in the shape of the residual; None: all.

    Returns:
        What was found.

    >>> import torch.nn.functional as F
    >>> r = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> check_residual(0.1 * r, 0.1)
    []
    >>> [finding.kind for finding in check_residual(F.avg_pool2d(r, 2, stride=1))]
    ['correlated']
    """
    whitened = (residual / deviation).double().cpu()
    measured = torch.ones_like(whitened) > 0 if observed is None else observed.cpu() > 0
    measured = measured & whitened.isfinite()
    values, inside, grid = _cut(torch.where(measured, whitened, 0), measured)
    usable = inside.all((1, 2))
    if int(usable.sum()) < LEAST:
        return []
    z = values @ cosines(SIDE).T
    ones = torch.ones(len(z), dtype=z.dtype)
    patches = _Patches(values, z, usable, usable, ones, grid, 0)
    return _correlated(patches) + _striped(*_grids(patches))


# -- patches --------------------------------------------------------------------------------------


def _sampled(y: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Return about `MOST` patches of images: evenly chosen images, or tiles of the first one."""
    most = MOST * SIDE**2 // max(1, math.prod(y.shape[1:]))
    if most or min(y.shape[2:]) < SIDE:
        if len(y) > most > 0:
            chosen = torch.linspace(0, len(y) - 1, most).long()
            y, measured = y[chosen], measured[chosen]
        return y, measured
    places = _tiles(*y.shape[1:])
    parts = [[part[0, :, r, c] for r, c in places] for part in (y, measured)]
    return torch.stack(parts[0]), torch.stack(parts[1])


def _tiles(channels: int, height: int, width: int) -> list[tuple[slice, slice]]:
    """Return rows and columns of tiles that lie on the grid of the patches and do not overlap.

    >>> [(rows.start, columns.start) for rows, columns in _tiles(9, 2000, 3000)]
    [(368, 616), (368, 2120), (1368, 616), (1368, 2120)]
    """
    sides = [min(TILE, side // SIDE * SIDE) for side in (height, width)]
    number = max(1, MOST * SIDE**2 // (channels * sides[0] * sides[1]))
    down = min(max(1, round(math.sqrt(number * height / width))), height // sides[0])
    across = min(max(1, number // down), width // sides[1])
    starts = [
        [int(size * (k + 0.5) / count - side / 2) // SIDE * SIDE for k in range(count)]
        for size, side, count in zip((height, width), sides, (down, across), strict=True)
    ]
    return [(slice(r, r + sides[0]), slice(c, c + sides[1])) for r in starts[0] for c in starts[1]]


def _frequencies() -> tuple[Tensor, Tensor]:
    """Return the vertical and the horizontal frequency u, v of every coefficient, (SIDE^2,)."""
    number = torch.arange(SIDE).repeat_interleave(SIDE)
    return number, torch.arange(SIDE).repeat(SIDE)


def _cut(
    y: Tensor, measured: Tensor, overlap: int = 1
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Cut images into patches: values and measured flags (P, C, SIDE^2), and their grid."""
    if y.shape[1] < 3:  # two channels are unrelated: separate images
        y, measured = y.flatten(0, 1)[:, None], measured.flatten(0, 1)[:, None]
    stride = SIDE // overlap
    high, wide = (max(0, (side - SIDE) // stride + 1) for side in y.shape[2:])
    inside = cut_patches(measured.to(y), stride) > 0
    return cut_patches(y, stride), inside, (len(y), high, wide)


def _flat_patches(y: Tensor, measured: Tensor, overlap: int = 1) -> _Patches:
    """Find the flat patches of images and scale all coefficients by the noise."""
    values, inside, grid = _cut(y, measured, overlap)
    inside = inside.all((1, 2))
    channels = values.shape[1]
    raw = values @ cosines(SIDE).T
    z = raw - raw.mean(1, keepdim=True) if channels > 1 else raw
    u, v = _frequencies()
    fast = u + v >= SLOW
    freedom = float(fast.sum()) * max(1, channels - 1)
    power = z[..., fast].square().sum((1, 2)) / freedom
    constant = inside & (power <= 1e-12 * float(values.square().mean() + 1e-30))
    usable = inside & ~constant
    for end in (y[measured].min(), y[measured].max()):
        if (y[measured] == end).double().mean() > 1e-3:
            free = usable & ~(values == end).flatten(1).any(1)
            usable = free if int(free.sum()) >= LEAST else usable
    if int(usable.sum()) < LEAST:
        nowhere = torch.zeros_like(usable)
        return _Patches(values, raw, nowhere, nowhere, torch.ones_like(power), grid, 0, overlap)
    mean = values.mean((1, 2))
    terms = torch.stack([mean, torch.ones_like(mean)], 1)
    n = torch.full_like(power, freedom)
    line = envelope(power[usable], n[usable], terms[usable])
    variance = raised(terms @ line)
    flat = usable & (power < reach_of(n) * variance)
    scaled = raw / variance.sqrt()[:, None, None]
    counted = int(constant.sum())
    return _Patches(values, scaled, flat, usable, variance.sqrt(), grid, counted, overlap)


def _step(values: Tensor) -> tuple[float, int]:
    """Return the step between the values of a file and the number of its levels; 0 if none."""
    part = values[:: max(1, len(values) // 200_000)]
    levels = part.unique()
    if len(levels) < 2 or len(levels) > 70_000 or len(levels) > len(part) / 2:
        return 0.0, 0
    step = float(levels.diff().median().clamp_min(levels.diff().min()))
    near = (levels - levels[0]) / step
    steps = float((near - near.round()).abs().max()) < 0.05 * (1 + 1e-3 * len(levels))
    return (step, len(levels)) if steps else (0.0, len(levels))


# -- the statistics -------------------------------------------------------------------------------


def _correlated(patches: _Patches) -> list[Finding]:
    z = patches.z[patches.flat]
    z = z - z.mean(1, keepdim=True) if z.shape[1] > 1 else z
    u, v = _frequencies()
    inner, total = (u > 0) & (v > 0), u + v
    power = z.square().mean((0, 1))
    coarse = power[inner & (total >= SLOW) & (total <= COARSE)].mean()
    ratio = float(power[inner & (total >= FINE)].mean() / coarse)
    if not ratio < WHITE:
        return []
    text = (
        f"the noise is correlated from pixel to pixel (its fine detail has {ratio:.2f} times the "
        "power of its coarse detail; white noise has 1): the images were probably resampled, "
        "smoothed, debayered or compressed. Estimates are too low and restorations stay noisy: "
        "start from raw data"
    )
    return [Finding("correlated", ratio, WHITE, text)]


def _grids(patches: _Patches) -> tuple[Tensor, Tensor, int]:
    """Return coefficients (N, rows, columns, C, SIDE^2), flatness (N, rows, columns), overlap."""
    z = patches.z.reshape(*patches.grid, *patches.z.shape[1:])
    return z, patches.flat.reshape(patches.grid), patches.overlap


def _striped(z: Tensor, flat: Tensor, overlap: int) -> list[Finding]:
    u, v = _frequencies()
    found: list[Finding] = []
    kinds: tuple[tuple[Kind, Tensor, int], ...] = (
        ("rows", (v == 0) & (u >= STRIPE), 2),
        ("columns", (u == 0) & (v >= STRIPE), 1),
    )
    for kind, chosen, axis in kinds:
        known = flat.to(z).movedim(axis, 1)
        part = z[..., chosen].movedim(axis, 1) * known[..., None, None]
        away = 2 * overlap if part.shape[1] > 2 * overlap else overlap
        pairs = float(_pairs(known, away).sum())
        numbers = part.shape[-1] * part.shape[-2]
        power = float(part.square().sum()) / max(1.0, float(known.sum()))
        value = float(_pairs(part, away).sum()) / max(1e-300, pairs * power)
        error = overlap / math.sqrt(max(1.0, pairs * numbers))
        if pairs < PAIRS or value < max(STRIPES, ERRORS * error):
            continue
        text = (
            f"the noise is striped along {kind} (correlation {value:.2f} between distant parts of "
            "a line; white noise has 0), as some cameras and scanners make it: a dark frame "
            "(--dark) removes stripes that stay, others leave traces in restorations"
        )
        found.append(Finding(kind, value, STRIPES, text))
    return found


def _pairs(part: Tensor, away: int) -> Tensor:
    """Multiply each patch of a line, axis 1, by the sum of those `away` or more behind it."""
    behind = part[:, away:].flip(1).cumsum(1).flip(1)
    return part[:, : behind.shape[1]] * behind


def _compressed(complete: Tensor, step: float, levels: int) -> list[Finding]:
    if not step or levels < LEVELS or len(complete) < LEAST or complete.shape[1] > 1:
        return []
    u, v = _frequencies()
    fast = (complete @ cosines(SIDE).T)[:, 0, u + v >= SLOW].abs() / step
    power = fast.square().mean(1)
    active = power > 1e-6
    if int(active.sum()) < LEAST:
        return []
    fast, power = fast[active], power[active]
    bright = (complete[active].mean((1, 2)) - complete.min()) / step
    zero = (fast < BELOW).double().mean(1)
    # counts of photons have the variance of their mean, in steps: few of them are no compression
    blank = (zero > ALL_ZERO) & (bright > 2 * power)
    share, limit = float(zero.mean()), ALL_ZERO
    if not (share > limit and float(blank.double().mean()) > BLANK):
        quiet = power <= power.quantile(0.75)
        share = float(zero[quiet].mean())
        limit = ZEROS * float((BELOW / (2 * power[quiet]).sqrt()).erf().mean()) + 0.05
        if not share > limit:
            return []
    text = (
        f"{share:.0%} of the high frequencies are 0, after rounding: the images were compressed "
        "(JPEG) or smoothed, which removed noise, or hold hardly any: start from files without "
        "loss"
    )
    return [Finding("compressed", share, limit, text)]


def _clipped(values: Tensor, complete: Tensor, step: float, levels: int) -> list[Finding]:
    if 0 < levels < LEVELS:  # few counts, or few gray levels: ends mean nothing
        return []
    low, high = values.min(), values.max()
    black, white = (float((values == end).double().mean()) for end in (low, high))
    near = _beyond(complete, float(low), step) if black >= TIED_BLACK else 0.0
    ends = [
        f"{share:.1%} of the values are {name} ({float(end):.4g})"
        for share, name, end, limit, fits in (
            (black, "black", low, TIED_BLACK, near >= CONTINUES),
            (white, "white", high, TIED_WHITE, True),
        )
        if share >= limit and fits
    ]
    if not ends:
        return []
    text = (
        f"the noise is clipped: {' and '.join(ends)}. No noise model here fits, and estimates are "
        "too low: record with an offset and less exposure, or start from raw data"
    )
    return [Finding("clipped", black + white, TIED_BLACK, text)]


def _beyond(complete: Tensor, low: float, step: float) -> float:
    """Return the number of values just above the smallest one, over that of the smallest."""
    tied = (complete == low).double().mean((1, 2))
    mixed = (tied > 0.02) & (tied < 0.98)
    if not bool(mixed.any()):
        return 0.0
    values = complete[mixed].flatten(1)
    u, v = _frequencies()
    fine = (values.unflatten(1, (-1, SIDE**2)) @ cosines(SIDE).T)[..., u + v >= FINE]
    deviation = fine.square().mean((1, 2)).sqrt()
    quiet = deviation <= deviation.quantile(0.5)
    values, deviation = values[quiet], deviation[quiet]
    if _counts(deviation.square().median(), values.mean(1).median() - low, step):
        return 0.0
    above = (values > low) & (values <= low + NEAR * deviation[:, None])
    return float(above.sum()) / max(1.0, float((values == low).sum()))


def _counts(variance: Tensor, mean: Tensor, step: float) -> bool:
    """Whether a variance is no more than that of counts of one step each."""
    return step > 0 and float(variance) < COUNTS * step * float(mean)


def _rician(y: Tensor, patches: _Patches, step: float, levels: int) -> list[Finding]:
    mean = patches.values.mean((1, 2))
    flat = patches.flat
    if 0 < levels < LEVELS or float((y == y.min()).double().mean()) > ATOM:
        return []
    dark = flat & (mean <= mean[flat].quantile(DARK))
    values = patches.values[dark].flatten()
    if len(values) < PIXELS or float((values < 0).double().mean()) > 1e-3:
        return []
    if _counts(values.var(), values.mean(), step):
        return []
    second, fourth = values.square().mean(), values.pow(4).mean()
    signal = float((2 * second**2 - fourth).clamp_min(0) ** 0.5)  # nu^2
    variance = (float(second) - signal) / 2
    if variance <= 0 or signal / variance > FAINT**2:
        return []
    distance = _distance(values, math.sqrt(signal / variance), math.sqrt(variance))
    if not distance < RICE:
        return []
    text = (
        f"the noise is Rician: the dark parts are distributed as magnitudes of complex noise "
        f"(sigma {math.sqrt(variance):.3g} in each part), whose mean is not the image. Restored "
        "images stay too bright where the signal is weak: start from complex data"
    )
    return [Finding("rician", distance, RICE, text)]


def _distance(values: Tensor, ratio: float, sigma: float) -> float:
    """Return the Kolmogorov-Smirnov distance of values from a Rice distribution."""
    t = torch.linspace(0, ratio + 9, 4001, dtype=torch.float64)
    density = t * torch.special.i0e(t * ratio) * (-((t - ratio) ** 2) / 2).exp()
    theory = torch.cat([t.new_zeros(1), torch.cumulative_trapezoid(density, t)])
    scaled = (values / sigma).clamp(0, float(t[-1])).sort().values
    place = torch.searchsorted(scaled, t, right=True).double() / len(scaled)
    return float((place - theory).abs().max())
