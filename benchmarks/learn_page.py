"""The comparison of ways to learn as tables, a verdict, pictures and a page."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learn_profiles import CLEAN, ROWS
from learn_scores import DRAWS, RESTORATIONS
from learn_sets import SETS
from provenance import ROOT, markdown
from torch import Tensor
from torch.nn import functional as F

from unmurk.errors import InputError

__all__ = ["COLUMNS", "PAGE", "RESULTS", "draw_picture", "page", "tables", "verdict"]

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmark_learn.md"
CHAMPION = "flowdiff"
NEAR = 0.02
"""A figure is near the best one if it differs by less than this share of it."""

Row = dict[str, Any]


def _largest(value: float) -> float:
    return value


def _smallest(value: float) -> float:
    return -value


def _at_level(value: float) -> float:
    """Of a coverage: near 0.9."""
    return -abs(value - 0.9)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: What it is called.
        form: How its figures are written.
        merit: The larger the better; None where a column is no quality.
    """

    title: str
    form: str
    merit: Callable[[float], float] | None = None


QUALITY = {
    "posterior_psnr": Column("posterior mean, dB", "{:.2f}", _largest),
    "ssim": Column("SSIM", "{:.3f}", _largest),
    "lpips": Column("LPIPS", "{:.3f}", _smallest),
    "denoiser_psnr": Column("prior's denoiser, dB", "{:.2f}", _largest),
    "prior_frechet": Column("FD, prior", "{:.2f}", _smallest),
    "posterior_frechet": Column("FD, posterior", "{:.2f}", _smallest),
    "prior_kid": Column("KID, prior", "{:.3f}", _smallest),
    "posterior_kid": Column("KID, posterior", "{:.3f}", _smallest),
    "prior_swd": Column("SWD, prior", "{:.4f}", _smallest),
    "posterior_swd": Column("SWD, posterior", "{:.4f}", _smallest),
}
HONESTY = {
    "error": Column("error", "{:.3f}"),
    "spread": Column("spread", "{:.3f}"),
    "coverage": Column("90 % coverage", "{:.3f}", _at_level),
    "residual": Column("residual", "{:.2f}"),
    "gap": Column("gap", "{:.4f}"),
    "kimg": Column("kimg seen", "{:.1f}"),
    "seconds": Column("seconds", "{:.0f}"),
    "images_per_second": Column("images/s", "{:.0f}"),
    "peak_memory_mib": Column("memory, MiB", "{:.0f}"),
    "peak_gpu_memory_mib": Column("GPU memory, MiB", "{:.0f}"),
}
COLUMNS = QUALITY | HONESTY

READING = f"""\
Each row learns from the y of the training images alone, `{CLEAN}` from the images themselves; none
sees a test image. The rows of a set have the same networks and the same budget: about as many
seconds (small), or as many images seen (full), but for those that an image costs most.

- **posterior mean**: PSNR of the mean of {RESTORATIONS} posterior samples of held-out images,
  clipped to [0, 1]; **SSIM** and **LPIPS** are of the same mean. **prior's denoiser**: PSNR of
  D(y, sigma_y), for A = I.
- **FD**, **KID**: Frechet distance, and kernel distance without bias (0 on average for the right
  samples, so it may be below), on a feature net. For digits it is the 128 features of the shipped
  classifier. For dogs and nuclei Inception, KID only, and only where it is installed. **SWD**:
  sliced Wasserstein distance of 7 x 7 patches. All from clean test images that serve nothing else;
  of samples of the prior, and of one posterior sample for each y of other test images. FD and SWD
  fall with the number of samples: the line of the *clean images themselves* is the best to hope
  for.
- **error**: root mean square error of the posterior mean. **spread**: root mean variance of the
  posterior's samples; equal for an exact posterior. **90 % coverage**: share of true values in the
  posterior's central 90 % interval, from {DRAWS} samples. On pixels that vary over the images.
- **residual**, **gap**: what can be told without clean images (docs/learning.md), after the
  learning, on y that were not learnt from. Residual: chi-square per number of posterior samples, 1
  for an exact posterior. Gap: sliced Wasserstein distance of the prior's samples, corrupted again,
  from y.
- **seconds** and **memory** (peak of a process of its own) are those of the learning.
- **Other problems**: PSNR of held-out images, restored with each prior by `red-diff` with its
  defaults. No row has learnt from such measurements; the tasks are those of FlowDiff's table.
- `clean` is a ceiling for what the prior does. Its flow starts from A^+ y, those of `flowdiff` and
  `em` from a Wiener solution, which tells more where pixels are hidden.
- In `mean start alone` the prior is trained on m(y) at all levels and the flow never: its
  posterior samples are m(y) + 0.05 n."""


# ------------------------------------------------------------------------------------- tables


def table(result: Row, columns: dict[str, Column], scale: bool = False) -> str:
    """Figures of a set as Markdown; columns without figures are left out.

    Args:
        result: What learn.py keeps of the set.
        columns: Which figures.
        scale: Whether the lines of no network stand below.
    """
    rows = {ROWS[name]: row for name, row in result["rows"].items()}
    shown = [c for c in columns if any(row.get(c) is not None for row in rows.values())]
    if scale:
        rows |= {f"*{name} images themselves*": row for name, row in result["scale"].items()}
    lines = [["", *(columns[c].title for c in shown)]]
    for label, row in rows.items():
        values = (row.get(c) for c in shown)
        forms = (columns[c].form for c in shown)
        cells = ("" if v is None else f.format(v) for v, f in zip(values, forms, strict=True))
        lines.append([label, *cells])
    return markdown(lines)


def tasks_of(result: Row) -> dict[str, Column]:
    """The columns of the downstream table, which stand in "downstream" of a row."""
    return {task: Column(f"{task}, dB", "{:.2f}", _largest) for task in described(result)}


def described(result: Row) -> dict[str, str]:
    """The downstream tasks in words."""
    tasks = result["settings"]["downstream"]
    return {t: f"{t}: {p['operator']}, noise {p['noise']:g}" for t, p in tasks.items()}


def flat(result: Row) -> Row:
    """The result of a set, with the downstream figures of a row beside its others."""
    rows = {name: row | row["downstream"] for name, row in result["rows"].items()}
    return result | {"rows": rows}


def tables(result: Row) -> Iterator[str]:
    """The verdict and the tables of every set, with headings."""
    for name, part in result["sets"].items():
        yield f"### {name}: {SETS[name].title}"
        yield conditions(part)
        yield table(part, QUALITY, scale=True)
        yield table(part, HONESTY)
        yield f"Other problems ({'; '.join(described(part).values())}):"
        yield table(flat(part), tasks_of(part))
        yield from verdict(part)
        gone = [f"`{row}` {why}" for row, why in part["absent"].items()]
        if gone:
            yield f"Not here: {'; '.join(gone)}."


def conditions(part: Row) -> str:
    """Under what conditions the figures of a set were made, in words."""
    how, rows = part["settings"], part["rows"].values()

    def of(key: str) -> str:
        values = (row[key] if key in row else row["machine"][key] for row in rows)
        return ", ".join(dict.fromkeys(str(value) for value in values))

    lost = [c for c in ("lpips", "posterior_kid") if all(row.get(c) is None for row in rows)]
    names = {"lpips": "LPIPS", "posterior_kid": "KID"}
    missing = " and ".join(names[c] for c in lost)
    return (
        f"A: {how['operator']}; noise {how['noise']:g}. {how['train']:,} images to learn from; "
        f"network `{how['network']}`, batches of {how['batch']}, in {of('precision')}; seed "
        f"{how['seed']}. {how['held']} images restored, {how['tasks']} on each other problem. "
        f"Distances: {how['samples']:,} samples, those of the prior drawn in {of('sampling')} "
        f"with {how['levels']} levels, against {how['reference']:,} images. "
        + (f"Left out, packages or weights being absent: {missing}. " if missing else "")
        + f"{of('cpu')}, {of('threads')} threads, {of('gpu').replace('None', 'no GPU')}, torch "
        f"{of('torch')}, commit {of('commit')}."
    )


# ------------------------------------------------------------------------------------- verdict


def verdict(part: Row) -> Iterator[str]:
    """How `flowdiff` stands on a set in every column of quality, as a sentence and a table.

    Against all rows that see no clean image; nothing where it has not run.
    """
    part, lines = flat(part), []
    rows = {row: figures for row, figures in part["rows"].items() if row != CLEAN}
    if CHAMPION not in rows or len(rows) < 2:
        return
    counts = {"first": 0, "near": 0, "behind": 0}
    for key, column in (COLUMNS | tasks_of(part)).items():
        values = {row: figures.get(key) for row, figures in rows.items()}
        known = {row: value for row, value in values.items() if value is not None}
        if column.merit is None or CHAMPION not in known:
            continue
        best, behind, near = standing(known, column.merit)
        kind = "first" if behind <= 0 else "near" if near else "behind"
        counts[kind] += 1
        said = {"first": "first", "near": "near the best", "behind": "behind"}[kind]
        mine = column.form.format(known[CHAMPION])
        by = "" if kind == "first" else column.form.format(behind)
        lines.append(
            [column.title, mine, column.form.format(known[best]), ROWS[best], said, by]  # type: ignore[index]
        )
    total = sum(counts.values())
    yield (
        f"`{CHAMPION}`, among the {len(rows)} rows that see no clean image: first in "
        f"{counts['first']} of {total} columns of quality, within {NEAR:.0%} of the best in "
        f"{counts['near']}, further behind in {counts['behind']}."
    )
    yield markdown([["column", CHAMPION, "best", "of", "it is", "by"], *lines])


def standing(values: dict[str, float], merit: Callable[[float], float]) -> tuple[str, float, bool]:
    """The best row, how far the champion is behind it, and whether that is near.

    Near: by no more than NEAR of the best figure's size (of a coverage: of the best coverage).
    """
    best = max(values, key=lambda row: merit(values[row]))
    behind = merit(values[best]) - merit(values[CHAMPION])
    return best, behind, behind <= NEAR * abs(values[best])


# ------------------------------------------------------------------------------------- the page


def page(folder: Path = RESULTS) -> str:
    """The page, from the figures kept in a folder; raises InputError if there are none."""
    parts = [
        "# Benchmark: learning from corrupted images",
        "Written by `python benchmarks/learn.py --table` from `benchmarks/results/`; made by "
        "`python benchmarks/learn.py --data DIR --out OUT --profile PROFILE`.",
        READING,
    ]
    kept = (folder / "learn-small.json", folder / "learn-full.json")
    if not any(file.exists() for file in kept):
        raise InputError(f"no figures in {folder}: put OUT/learn.json there as learn-small.json")
    for file in filter(Path.exists, kept):
        result = json.loads(file.read_text())
        if "sets" not in result:
            raise InputError(f"{file} has figures of digits alone: run benchmarks/learn.py again")
        parts += [f"## {result['settings']['profile']}", *tables(result)]
        parts += pictures(file, result)
    return "\n\n".join(parts) + "\n"


def pictures(file: Path, result: Row) -> Iterator[str]:
    """Links to the pictures beside a file of figures, of sets whose licence permits it."""
    for name in result["sets"]:
        picture = file.with_name(f"{file.stem}-{name}.png")
        if not SETS[name].shown:
            yield f"No picture of {name} here: {SETS[name].licence}. OUT/learn-{name}.png has it."
        elif picture.exists():
            link = os.path.relpath(picture, PAGE.parent)
            yield f"{name} ({SETS[name].licence}):"
            yield f"![{name}: truth, y, restorations and prior samples of every row]({link})"


# ------------------------------------------------------------------------------------- pictures


def draw_picture(path: Path, truth: Tensor, y: Tensor, rows: dict[str, dict[str, Tensor]]) -> None:
    """One line for each image (N, C, H, W): truth and y, then four columns for each row.

    In grey or in colour; a spread is that of the mean channel, in grey.
    """
    from matplotlib.figure import Figure

    limit = max(float(images["spread"].mean(1).max()) for images in rows.values())
    panels = {"": {"truth": truth, "y": y}}
    for name, images in rows.items():
        own = {key: images[key] for key in ("mean", "sample", "spread", "prior")}
        grey = images["spread"].mean(1, keepdim=True).expand_as(truth)
        panels[name] = own | {"spread": grey / limit}
    widths = [len(columns) for columns in panels.values()]
    size = (0.62 * sum(widths), 0.62 * len(truth) + 0.6)
    figure = Figure(size, dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for axes, (title, columns) in zip(grid, panels.items(), strict=True):
        shown = (x[: len(truth)].clamp(0, 1) for x in columns.values())
        tiles = [F.pad(x, (1,) * 4, value=1.0) for x in shown]
        sheet = torch.cat([tile.movedim(1, -1).flatten(0, 1) for tile in tiles], 1)
        sheet = sheet.expand(-1, -1, 3)
        axes.imshow(sheet.numpy(), interpolation="nearest")
        centres = [tiles[0].shape[3] * (i + 0.5) for i in range(len(tiles))]
        axes.set_xticks(centres, [*columns], fontsize=8)
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=9)
    figure.supxlabel(f"spread: black is 0, white {limit:.2f}", fontsize=8)
    figure.savefig(path)
