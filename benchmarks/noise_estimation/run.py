"""Compare estimates of the noise from the noisy images alone.

Known noise is added to clean images; each method sees the noisy images only. The figure is the
estimate over the truth: 1 is right. For real noise the truth comes from repeated captures of the
same fields: a line is fitted to their variance as a function of their mean.

    python benchmarks/noise_estimation/run.py --out OUT      # digits and nuclei of the package
    python benchmarks/noise_estimation/run.py --out OUT --dogs FILE --fmd FILE   # two more sets
    python benchmarks/noise_estimation/run.py --table
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.common import CommonOptions, Row, Suite, tabulate
from unmurk.errors import InputError
from unmurk.io.images import load_images
from unmurk.noise import PoissonGaussian
from unmurk.noise_estimation import estimate_noise, textures
from unmurk.operators import as_operator
from unmurk.problem import Problem
from unmurk.rng import generator

__all__: list[str] = []

LEVELS = (0.02, 0.1, 0.3)
NO_GAIN = ("0.1", "0.3")  # Gaussian noise, whose gain is 0
LINES = ("poisson-gaussian,gain=0.01,sigma=0.02", "poisson-gaussian,gain=0.03,sigma=0.05")
COUNT = 500
SEEDS = 100
FEW = (1, 2, 4, 16)  # times 64 patches
IDENTITY = as_operator("identity")


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Compare estimates of the noise from noisy images."""

    dogs: Path | None = None
    """CIFAR-10 dogs: an .npz with `train_x`, (N, 32, 32, 3) of 8 bits."""
    fmd: Path | None = None
    """Confocal captures of FMD: an .npz with `raw`, (N, 5, H, W), and their mean `gt`."""


# -- methods --------------------------------------------------------------------------------------


def laplacian(y: Tensor) -> float:
    """The mean magnitude of a Laplacian that is blind to slopes (J. Immerkaer, 1996)."""
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=y.dtype)
    return float(F.conv2d(y.flatten(0, 1)[:, None], kernel[None, None]).abs().mean()) * (
        math.sqrt(math.pi / 2) / 6
    )


def wavelet(y: Tensor) -> float:
    """The median magnitude of the finest diagonal Haar coefficients (D. Donoho, 1995)."""
    a, b, c, d = (y[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return float(((a - b - c + d) / 2).abs().median()) / 0.6745


def eigenvalues(y: Tensor) -> float:
    """The smallest eigenvalues of the covariance of the patches of all images.

    They are the eigenvalues that are spread evenly about their mean (G. Chen, F. Zhu,
    P. A. Heng, 2015).
    """
    patches = F.unfold(y.flatten(0, 1)[:, None], 8, stride=4).transpose(1, 2).flatten(0, 1)
    values = torch.linalg.eigvalsh(patches.T.cov()).flip(0)
    for first in range(len(values)):
        rest = values[first:]
        if rest.mean() <= rest.median():
            break
    return float(rest.mean()) ** 0.5


def envelope(y: Tensor) -> float:
    """The estimate of `unmurk.noise_estimation`."""
    return estimate_noise(y, IDENTITY).sigma


def line_median(y: Tensor) -> tuple[float, float]:
    """Gain and constant part by the median power of patches in twelve bins of brightness."""
    mean, power, _ = textures(y, torch.ones_like(y) > 0, counts=True)
    bins = mean.argsort().tensor_split(12)
    brightness = torch.stack([mean[members].mean() for members in bins])
    value = torch.stack([power[members].median() for members in bins])
    terms = torch.stack([brightness, torch.ones_like(brightness)], 1) / value[:, None]
    gain, rest = torch.linalg.lstsq(terms, torch.ones_like(value)[:, None])[0][:, 0].tolist()
    return gain, rest


def line_envelope(y: Tensor) -> tuple[float, float]:
    """Gain and constant part by `unmurk.noise_estimation`."""
    noise = estimate_noise(y, IDENTITY, "poisson-gaussian")
    assert isinstance(noise, PoissonGaussian)
    return noise.gain, noise.sigma**2 - noise.gain * noise.offset


GAUSSIAN: dict[str, Callable[[Tensor], float]] = {
    "envelope (ours)": envelope,
    "eigenvalues": eigenvalues,
    "wavelet": wavelet,
    "Laplacian": laplacian,
}
LINE: dict[str, Callable[[Tensor], tuple[float, float]]] = {
    "envelope (ours)": line_envelope,
    "medians": line_median,
}


# -- data -----------------------------------------------------------------------------------------


def image_sets(options: Options) -> dict[str, Tensor]:
    """The clean images, {name: (N, C, H, W)}."""
    found = {name: load_images(name, limit=COUNT).images for name in ("digits", "nuclei")}
    if options.dogs is not None:
        dogs = np.load(options.dogs)["train_x"][:COUNT]
        found["dogs"] = torch.from_numpy(dogs).permute(0, 3, 1, 2).float() / 255
    return found


def captures(path: Path) -> tuple[Tensor, tuple[float, float]]:
    """The first captures (N, 1, H, W), and the line (a, b) fitted to all captures.

    The variance between the captures of a field is averaged over the pixels of each mean from 5 to
    150 gray levels, and a weighted line is fitted. Below, 8 bits are too coarse; above, there are
    too few pixels.
    """
    with np.load(path) as file:
        raw, mean = file["raw"], file["gt"].astype(int)
    variance = raw.var(1, ddof=1, dtype=np.float64)
    count = np.bincount(mean.ravel(), minlength=256)[5:151]
    level = np.arange(5, 151)
    total = np.bincount(mean.ravel(), variance.ravel(), minlength=256)[5:151]
    weight = np.sqrt(count) / (total / count)
    terms = np.stack([level, np.ones_like(level)], 1) * weight[:, None]
    a, b = np.linalg.lstsq(terms, total / count * weight, rcond=None)[0]
    return torch.from_numpy(raw[:, :1]).double() / 255, (a / 255, b / 255**2)


# -- figures --------------------------------------------------------------------------------------


def measure(options: Options) -> Row:
    """Every estimate over the truth; writes OUT/noise_estimation.json."""
    gaussian, line = [], []
    clean = image_sets(options)
    for name, x in clean.items():
        for sigma in LEVELS:
            y = Problem("identity", sigma).simulate(x, options.seed).double()
            ratios = {method: run(y) / sigma for method, run in GAUSSIAN.items()}
            gaussian.append(_said({"set": name, "sigma": sigma, "ratios": ratios}))
        for text in NO_GAIN + LINES:
            problem = Problem("identity", text)
            y, noise = problem.simulate(x, options.seed).double(), problem.noise
            poisson = isinstance(noise, PoissonGaussian)
            truth = (noise.gain, noise.sigma**2) if poisson else (0.0, float(text) ** 2)
            what = text if poisson else f"Gaussian, sigma={text}"
            line.append(_said({"set": name, "noise": what, "found": line_ratios(y, truth)}))
    if options.fmd is not None:
        y, truth = captures(options.fmd)
        text = f"real: gain={truth[0]:.4g},offset={-truth[1] / truth[0]:.4g}"
        line.append({"set": "FMD confocal", "noise": text, "found": line_ratios(y, truth)})
    settings, few = {"images": COUNT, "seeds": SEEDS}, few_images(clean)
    return SUITE.store(options, settings, gaussian=gaussian, few=few, line=line)


def _said(row: Row) -> Row:
    print(row, file=sys.stderr, flush=True)
    return row


def few_images(clean: dict[str, Tensor]) -> list[Row]:
    """Bias and root mean square error of our estimate from few patches, over `SEEDS` draws.

    The sets are flat images of 64 x 64 pixels, and random images of each of the other sets, as
    many as give the same number of patches.
    """
    found = []
    for name, x in {"flat": torch.full((1, 1, 64, 64), 0.5), **clean}.items():
        side = x.shape[-1] // 8
        each = side * side * (1 if x.shape[1] == 3 else x.shape[1])
        for count in FEW:
            images = math.ceil(64 * count / each)
            ratios = []
            for seed in range(SEEDS):
                pick = torch.randint(len(x), (images,), generator=generator(seed))
                y = Problem("identity", 0.1).simulate(x[pick], seed).double()
                ratios.append(envelope(y) / 0.1)
            error = np.array(ratios) - 1
            rms = float((error**2).mean() ** 0.5)
            row = {"set": name, "images": images, "patches": images * each}
            found.append(_said(row | {"bias": float(error.mean()), "rms": rms}))
    return found


def line_ratios(y: Tensor, truth: tuple[float, float]) -> dict[str, list[float] | None]:
    """Gain and standard deviation over the true ones, for each method; None if it refuses.

    Returns:
        For each method the ratio of the gains (the gain itself if the true one is 0), and the
        ratio of the standard deviations at the 5 %, 50 % and 95 % quantile of brightness.
    """
    quantiles = torch.tensor([0.05, 0.5, 0.95]).to(y)
    brightness = torch.quantile(F.avg_pool2d(y, 8).flatten(), quantiles)
    true = truth[0] * brightness + truth[1]
    found: dict[str, list[float] | None] = {}
    for method, run in LINE.items():
        try:
            gain, rest = run(y)
        except InputError:
            found[method] = None
            continue
        ratio = ((gain * brightness + rest).clamp_min(0) / true).sqrt()
        gain = gain / truth[0] if truth[0] > 0 else gain
        found[method] = [gain, *ratio.tolist()]
    return found


def view(result: Row) -> Row:
    """What the page shows: the three tables."""
    gaussian = [
        {"images": row["set"], "sigma": f"{row['sigma']:g}"}
        | {method: f"{row['ratios'][method]:.3f}" for method in GAUSSIAN}
        for row in result["gaussian"]
    ]
    few = [
        {
            "images": f"{row['images']} {row['set']}",
            "patches": row["patches"],
            "bias": f"{row['bias']:+.1%}",
            "root mean square error": f"{row['rms']:.1%}",
        }
        for row in result["few"]
    ]
    tables = {"gaussian": tabulate(gaussian), "few": tabulate(few)}
    return tables | {"line": tabulate(list(_line_cells(result["line"])))}


def _line_cells(rows: list[Row]) -> Any:
    heads = ("gain", "deviation: dark", "deviation: middle", "deviation: bright")
    for row in rows:
        for method in LINE:
            values = row["found"][method]
            texts = ["refused", "", "", ""] if values is None else [f"{v:.3f}" for v in values]
            label = {"images": row["set"], "noise": row["noise"], "method": method}
            yield label | dict(zip(heads, texts, strict=True))


SUITE = Suite(
    *("noise_estimation", view, "noise_estimation"),
    arguments="--out OUT --dogs FILE --fmd FILE",
)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
