"""The page and the picture of `real_noise`, from its figures."""

import json
import statistics
from pathlib import Path
from typing import Any

from provenance import ROOT, markdown
from torch import Tensor

from unmurk.errors import InputError

__all__ = [
    "LABELS",
    "NEEDS",
    "PAGE",
    "RESULTS",
    "busiest",
    "draw_picture",
    "finding",
    "middle",
    "page",
    "table",
]

TARGET = 1.0  # dB above non-local means
RESULTS = ROOT / "benchmarks" / "results" / "real_noise.json"
PAGE = ROOT / "docs" / "benchmark_real.md"
NEEDS = {"nlm": "skimage", "nlm_anscombe": "skimage", "bm3d_anscombe": "bm3d"}
LABELS: dict[str, str] = {
    "capture": "the capture itself",
    "gaussian": "Gaussian filter",
    "nlm": "non-local means",
    "nlm_anscombe": "non-local means, transform",
    "bm3d_anscombe": "BM3D, transform",
    "noise2void": "Noise2Void",
    "noisy": "`noisy`: posterior mean",
    "flowdiff": "`flowdiff`, Poisson likelihood: posterior mean",
    "ambient_anscombe": "`ambient`, transform: posterior mean",
    "ambient_anscombe_denoiser": "`ambient`, transform: prior's denoiser",
    "flowdiff_anscombe": "`flowdiff`, transform: posterior mean",
    "flowdiff_anscombe_denoiser": "`flowdiff`, transform: prior's denoiser",
}
OURS = ("flowdiff", "flowdiff_anscombe", "flowdiff_anscombe_denoiser")
MEANS = ("nlm", "nlm_anscombe")


def middle(result: dict[str, Any], key: str, score: str = "psnr") -> float:
    """The median of a score over the held-out fields."""
    return statistics.median(result["results"][key][score])


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown; a method that was not run has no row."""
    found = result["results"]
    lines = [
        [*("", "PSNR, dB", "lowest", "highest", "bright part, dB", "SSIM"), "strength"]
        + ["learning, s", "kimg", "restoring, s"]
    ]
    for key, label in LABELS.items():
        if key not in found:
            continue
        row, psnrs = found[key], found[key]["psnr"]
        values = [f"{v:.2f}" for v in (middle(result, key), min(psnrs), max(psnrs))]
        values += [f"{middle(result, key, 'bright'):.2f}", f"{middle(result, key, 'ssim'):.4f}"]
        cost = (("strength", "g"), ("seconds", ".0f"), ("kimg", "g"), ("restoring", ".1f"))
        values += [format(row[k], form) if k in row else "" for k, form in cost]
        lines.append([label, *values])
    return markdown(lines)


def finding(result: dict[str, Any]) -> str:
    """Whether flowdiff is as far above non-local means as was asked; what was not run."""
    found, missing = result["results"], [k for k in NEEDS if k not in result["results"]]
    parts = []
    ours = [key for key in OURS if key in found]
    if ours and any(key in found for key in MEANS):
        best = max(ours, key=lambda key: middle(result, key))
        other = max((k for k in MEANS if k in found), key=lambda key: middle(result, key))
        gap = middle(result, best) - middle(result, other)
        met = "met" if gap >= TARGET else f"missed by {TARGET - gap:.2f} dB"
        parts.append(
            f"The best of flowdiff ({LABELS[best]}) is {gap:+.2f} dB from the best of non-local "
            f"means ({LABELS[other]}); the aim of {TARGET:g} dB is {met}."
        )
        top = max(found, key=lambda key: middle(result, key))
        parts.append(f"Best of all: {LABELS[top]}, {middle(result, top):.2f} dB.")
    if missing:
        names = ", ".join(f"{LABELS[key]} (needs {NEEDS[key]})" for key in missing)
        parts.append(f"Not run: {names}.")
    return " ".join(parts)


READING = """\
What is restored: the first capture of each held-out field, whole, against the average of fifty
captures. **PSNR** and **SSIM** for a range of 1 (255 grey levels): median over the fields (PSNR
also lowest and highest). **bright part**: PSNR over the pixels whose average is above the field's
median; most of a field is dark.

- All that learns sees crops of single captures of the other fields, and no average. The noise is
  estimated from those captures too (`poisson-gaussian,auto`).
- *Favoured*: the filters' **strength** (the Gaussian's width in pixels; h of non-local means in
  units of the noise level) is the best of several by the averages of fields to learn from. No
  method of unmurk, nor Noise2Void, has such help.
- **transform**: generalised Anscombe transform, a method for Gaussian noise of known level, and
  the transform's exact unbiased inverse (Makitalo and Foi 2013). Without it non-local means is
  given one noise level for each image, estimated by scikit-image.
- **Noise2Void** (arXiv 1811.10980): the same U-Net as the priors', crops, batches and precision;
  for at least as many seconds of learning.
- **learning**: seconds of one run, which gives prior and posterior; **restoring**: seconds for one
  field."""


def page(file: Path = RESULTS) -> str:
    """The page, from the figures kept; raises InputError if there are none."""
    if not file.exists():
        raise InputError(f"no figures in {file}: put OUT/real_noise.json there")
    result = json.loads(file.read_text())
    how, made = result["settings"], result["machine"]
    gpu = "no GPU" if made["gpu"] is None else made["gpu"]
    conditions = (
        f"Profile {how['profile']}: {how['crops']:,} crops of {how['side']} x {how['side']} "
        f"pixels; network `{how['settings']['network']}`, batches of {how['settings']['batch']}, "
        f"{how['settings']['precision']}; posterior means of {how['draws']} draws; seed "
        f"{how['seed']}. Noise found: `{result['noise']}`. {result['held']} fields held out, "
        f"{result['learnt']} to learn from. {made['cpu']}, {made['threads']} threads, {gpu}, "
        f"torch {made['torch']}, commit {made['commit']}."
    )
    parts = [
        "# Benchmark: real microscope captures",
        "Written by `python benchmarks/real_noise.py --table` from "
        "`benchmarks/results/real_noise.json`; made by `python benchmarks/real_noise.py --data "
        f"FILE --out OUT --profile {how['profile']}` (`pip install unmurk[bench]` brings what "
        "non-local means needs; BM3D is the authors' package `bm3d`, which may be used for "
        "non-commercial ends only and is run where it is installed). FMD, confocal, BPAE cells, "
        "blue channel (Zhang et al. 2019, arXiv 1812.10366). The captures may not be "
        "redistributed, so this page shows no picture of them; the run writes one to OUT.",
        READING,
        table(result),
        finding(result),
        conditions,
    ]
    return "\n\n".join(parts) + "\n"


def draw_picture(path: Path, images: dict[str, Tensor], scored: dict[str, float]) -> None:
    """The middle of every field (N, 1, H, W), one column for each method, brightened alike."""
    from matplotlib.figure import Figure

    side = min(128, *next(iter(images.values())).shape[-2:])
    rows, columns = len(next(iter(images.values()))), len(images)
    figure = Figure((1.7 * columns, 1.75 * rows + 0.9), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    limits = [busiest(x[0], side) for x in images["average of 50"]]
    for column, (title, stack) in enumerate(images.items()):
        for row, (x, (top, left)) in enumerate(zip(stack, limits, strict=True)):
            white = float(images["average of 50"][row].quantile(0.998))
            axes = grid[row][column]
            shown = (x[0, top : top + side, left : left + side] / white).clamp(0, 1).sqrt()
            axes.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
        name = title.replace("`", "").replace(": ", ":\n").replace(", ", ",\n", 1)
        score = f"\n{scored[title]:.2f} dB" if title in scored else ""
        grid[0][column].set_title(name + score, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def busiest(x: Tensor, side: int) -> tuple[int, int]:
    """Top and left of the square of the plane (H, W) that varies most, on a grid."""
    tiles = x.unfold(0, side, side // 2).unfold(1, side, side // 2).flatten(2).var(2)
    top, left = divmod(int(tiles.argmax()), tiles.shape[1])
    return top * side // 2, left * side // 2
