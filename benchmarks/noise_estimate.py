"""How well the noise of images is told from the images alone, beside what others do.

Clean images get noise that is known; each method sees the noisy ones only. The figure is what it
finds over the truth: 1 is right. For real noise the truth is what repeated captures of the same
fields show: their variance as a function of their mean, fitted by a line.

    python benchmarks/noise_estimate.py                  digits and nuclei of the package
    python benchmarks/noise_estimate.py --dogs FILE --fmd FILE     the other two sets too
    python benchmarks/noise_estimate.py --table          write docs/benchmark_noise.md again
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from provenance import ROOT, machine, write_json
from torch import Tensor

from unmurk.errors import InputError
from unmurk.io.atomic import write as write_atomically
from unmurk.io.images import load_images
from unmurk.noise import PoissonGaussian
from unmurk.noise_estimation import estimate_noise, textures
from unmurk.operators import as_operator
from unmurk.problem import Problem
from unmurk.rng import generator

__all__: list[str] = []

LEVELS = (0.02, 0.1, 0.3)
GAINLESS = ("0.1", "0.3")  # Gaussian noise: there is no gain to be found
LINES = ("poisson-gaussian,gain=0.01,sigma=0.02", "poisson-gaussian,gain=0.03,sigma=0.05")
COUNT = 500
SEEDS = 100
FEW = (1, 2, 4, 16)  # 64 patches each: so many flat images, or as many textured ones as have them
FIGURES = ROOT / "benchmarks" / "results" / "noise_estimate.json"
PAGE = ROOT / "docs" / "benchmark_noise.md"
IDENTITY = as_operator("identity")


@dataclass(frozen=True)
class Options:
    """Measure how well noise is told from noisy images."""

    dogs: Path | None = None
    """CIFAR-10 dogs: an .npz with `train_x`, (N, 32, 32, 3) of 8 bits."""
    fmd: Path | None = None
    """Confocal captures of FMD: an .npz with `raw`, (N, 5, H, W), and their mean `gt`."""
    out: Path = FIGURES
    """File for the figures."""
    table: bool = False
    """Write the page from the figures kept and run nothing."""


# -- what others do -------------------------------------------------------------------------------


def laplacian(y: Tensor) -> float:
    """J. Immerkaer, 1996: the mean magnitude of a Laplacian that is blind to slopes."""
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=y.dtype)
    return float(F.conv2d(y.flatten(0, 1)[:, None], kernel[None, None]).abs().mean()) * (
        math.sqrt(math.pi / 2) / 6
    )


def wavelet(y: Tensor) -> float:
    """D. Donoho, 1995: the median magnitude of the finest diagonal wavelet coefficients (Haar)."""
    a, b, c, d = (y[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
    return float(((a - b - c + d) / 2).abs().median()) / 0.6745


def eigenvalues(y: Tensor) -> float:
    """G. Chen, F. Zhu, P. A. Heng, 2015: the eigenvalues of the patches' covariance that are
    spread evenly about their mean, on the patches of all images."""
    patches = F.unfold(y.flatten(0, 1)[:, None], 8, stride=4).transpose(1, 2).flatten(0, 1)
    values = torch.linalg.eigvalsh(patches.T.cov()).flip(0)
    for first in range(len(values)):
        rest = values[first:]
        if rest.mean() <= rest.median():
            break
    return float(rest.mean()) ** 0.5


def envelope(y: Tensor) -> float:
    """`unmurk.noise_estimation`."""
    return estimate_noise(y, IDENTITY).sigma


def line_median(y: Tensor) -> tuple[float, float]:
    """Gain and rest by the median power of patches in twelve bins of brightness."""
    mean, power, _ = textures(y, torch.ones_like(y) > 0, counts=True)
    bins = mean.argsort().tensor_split(12)
    at = torch.stack([mean[rows].mean() for rows in bins])
    value = torch.stack([power[rows].median() for rows in bins])
    terms = torch.stack([at, torch.ones_like(at)], 1) / value[:, None]
    gain, rest = torch.linalg.lstsq(terms, torch.ones_like(value)[:, None])[0][:, 0].tolist()
    return gain, rest


def line_envelope(y: Tensor) -> tuple[float, float]:
    """`unmurk.noise_estimation`."""
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


def sets(options: Options) -> dict[str, Tensor]:
    """The clean images, {name: (N, C, H, W)}."""
    assets = ROOT / "unmurk" / "assets"
    found = {
        "digits": load_images(assets / "digits" / "train.idx3-ubyte.gz").images[:COUNT],
        "nuclei": load_images(Path(f"{assets}/nuclei/nuclei.npz:train")).images[:COUNT],
    }
    if options.dogs is not None:
        dogs = np.load(options.dogs)["train_x"][:COUNT]
        found["dogs"] = torch.from_numpy(dogs).permute(0, 3, 1, 2).float() / 255
    return found


def captures(path: Path) -> tuple[Tensor, tuple[float, float]]:
    """First captures (N, 1, H, W), and the line (a, b) that all captures show.

    The variance between the captures of a field, averaged over the pixels of each mean from 5 to
    150 grey levels (below, 8 bits are too coarse; above, there are few), and a weighted line.
    """
    with np.load(path) as file:
        raw, mean = file["raw"], file["gt"].astype(int)
    variance = raw.var(1, ddof=1, dtype=np.float64)
    count = np.bincount(mean.ravel(), minlength=256)[5:151]
    at = np.arange(5, 151)
    total = np.bincount(mean.ravel(), variance.ravel(), minlength=256)[5:151]
    weight = np.sqrt(count) / (total / count)
    terms = np.stack([at, np.ones_like(at)], 1) * weight[:, None]
    a, b = np.linalg.lstsq(terms, total / count * weight, rcond=None)[0]
    return torch.from_numpy(raw[:, :1]).double() / 255, (a / 255, b / 255**2)


# -- figures --------------------------------------------------------------------------------------


def measure(options: Options) -> dict[str, Any]:
    """What every method finds, over the truth."""
    gaussian, line = [], []
    clean = sets(options)
    for name, x in clean.items():
        for sigma in LEVELS:
            y = Problem("identity", sigma).simulate(x).double()
            ratios = {method: run(y) / sigma for method, run in GAUSSIAN.items()}
            gaussian.append({"set": name, "sigma": sigma, "ratios": ratios})
            print(gaussian[-1], file=sys.stderr, flush=True)
        for text in GAINLESS:
            y = Problem("identity", text).simulate(x).double()
            sigma = float(text)
            line.append({"set": name, "noise": f"Gaussian, sigma={text}"})
            line[-1]["found"] = lines(y, (0.0, sigma**2))
            print(line[-1], file=sys.stderr, flush=True)
        for text in LINES:
            problem = Problem("identity", text)
            y, noise = problem.simulate(x).double(), problem.noise
            assert isinstance(noise, PoissonGaussian)
            truth = (noise.gain, noise.sigma**2)
            line.append({"set": name, "noise": text, "found": lines(y, truth)})
            print(line[-1], file=sys.stderr, flush=True)
    if options.fmd is not None:
        y, truth = captures(options.fmd)
        text = f"real: gain={truth[0]:.4g},offset={-truth[1] / truth[0]:.4g}"
        line.append({"set": "FMD confocal", "noise": text, "found": lines(y, truth)})
    figures = {"gaussian": gaussian, "few": few(clean), "line": line}
    return {"images": COUNT, "machine": machine(), **figures}


def few(clean: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Bias and root mean square error of the estimate from few patches, over `SEEDS` draws.

    The sets are flat images of 64 x 64 pixels, and images taken at random from each of the others,
    as many as have 64 patches.
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
            found.append(row | {"bias": float(error.mean()), "rms": rms})
            print(found[-1], file=sys.stderr, flush=True)
    return found


def lines(y: Tensor, truth: tuple[float, float]) -> dict[str, list[float] | None]:
    """Per method: gain over the true one (the gain where that is 0), and standard deviation over
    the true one where the images are darkest (their 5 % quantile), in the middle (50 %) and
    brightest (95 %)."""
    at = torch.quantile(F.avg_pool2d(y, 8).flatten(), torch.tensor([0.05, 0.5, 0.95]).to(y))
    true = truth[0] * at + truth[1]
    found: dict[str, list[float] | None] = {}
    for method, run in LINE.items():
        try:
            gain, rest = run(y)
        except InputError:
            found[method] = None
            continue
        ratio = ((gain * at + rest).clamp_min(0) / true).sqrt()
        gain = gain / truth[0] if truth[0] > 0 else gain
        found[method] = [gain, *ratio.tolist()]
    return found


def table(found: dict[str, Any]) -> list[str]:
    """The three tables as Markdown."""
    rows = ["| images | sigma | " + " | ".join(GAUSSIAN) + " |", "|---|---|" + "---:|" * 4]
    for row in found["gaussian"]:
        cells = " | ".join(f"{row['ratios'][method]:.3f}" for method in GAUSSIAN)
        rows.append(f"| {row['set']} | {row['sigma']:g} | {cells} |")
    other = [
        "| images | noise | method | gain | deviation: dark | middle | bright |",
        "|---|---|---|" + "---:|" * 4,
    ]
    for row in found["line"]:
        for method in LINE:
            values = row["found"][method]
            cells = "refused | | | " if values is None else " | ".join(f"{v:.3f}" for v in values)
            other.append(f"| {row['set']} | {row['noise']} | {method} | {cells} |")
    small = ["| images | patches | bias | root mean square error |", "|---|---:|---:|---:|"]
    for row in found["few"]:
        label = f"{row['images']} {row['set']}"
        small.append(f"| {label} | {row['patches']} | {row['bias']:+.1%} | {row['rms']:.1%} |")
    return ["\n".join(rows), "\n".join(small), "\n".join(other)]


def page() -> str:
    """The page of the figures kept."""
    found = json.loads(FIGURES.read_text())
    made = found["machine"]
    gaussian, small, line = table(found)
    parts = [
        "# Benchmark: noise told from the noisy images alone",
        "Written by `python benchmarks/noise_estimate.py --table`. Every figure is what was found "
        f"over the truth: 1 is right. {found['images']} images of each set (all channels), noise "
        "added and not clipped. Gaussian noise:",
        gaussian,
        "- The nuclei have noise of their own, 1 to 2 % of the range: at 0.02 the sum of both is "
        "found, and more than 1 is right.\n"
        "- eigenvalues: Chen, Zhu and Heng 2015; wavelet: Donoho 1995 (median, finest diagonal); "
        "Laplacian: Immerkaer 1996. All on the whole set at once.",
        "**From few images**, sigma 0.1: bias and root mean square error of our estimate over "
        f"{SEEDS} draws of the noise and of the images. Flat images show the error of the "
        "estimate itself; that of the others includes their texture.",
        small,
        "Poisson-Gaussian noise: the gain, and the standard deviation of the noise at the images' "
        "5 %, 50 % and 95 % quantile of brightness.",
        line,
        "- Digits have no flat bright part, so nothing tells their gain: the estimate refuses.\n"
        "- Gaussian noise has no gain. What is found where there is texture in the bright parts "
        "is refused, as is a gain that its own uncertainty does not tell from 0 (column gain: the "
        "gain itself, which should be 0).\n"
        "- FMD confocal: 16 real captures of 512 x 512 pixels; the truth is the variance between "
        "the 5 captures of each field as a function of their mean. Their noise is not quite "
        "white: neighbours in a row correlate by 0.04, so that its power at high frequencies, "
        "which the estimate sees, is 5 % lower. Its darkest 5 % lie where 8 bits round the noise "
        "away.\n"
        "- medians: a line through the median power in twelve bins of brightness.",
        f"{made['cpu']}, torch {made['torch']}, commit {made['commit']}.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        write_atomically(PAGE, page().encode())
        return 0
    found = measure(options)
    write_json(options.out, found)
    print("\n\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
