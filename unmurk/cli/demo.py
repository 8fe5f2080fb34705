r"""The demonstration: learn from noisy images only, then restore with what was learned.

No clean image enters the training. The measurements

.. math:: y_i = x_i + \sigma\, n_i

are drawn once for each image, and only the y_i are used: digits with :math:`\sigma` = 0.3, and
nuclei of a microscope with 0.2, whose run starts from that of the digits. With the prior p(x) and
the posterior q(x | y) learned from them,

- held-out noisy images are restored in one pass: E[x | y] and its standard deviation under q;
- new digits are sampled from p;
- a hole is filled and a blur is removed by `solve`, two tasks that the training never met.

Each result is shown beside a trivial one: the noisy image, non-local means, or the pseudo-inverse.
"""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion.prior import Prior
from ..evaluation import metrics
from ..evaluation.reference import non_local_means
from ..evaluation.verdict import Verdict
from ..flows.posterior import Posterior
from ..io.images import load_images
from ..problem import Problem
from ..solvers import solve
from ..tiling import posterior_for
from ..training import Recipe, learn
from .report import (
    Column,
    Commands,
    Comparison,
    Comparisons,
    Images,
    Judgement,
    Section,
    Table,
    Text,
    write,
)

if TYPE_CHECKING:
    from rich.table import Table as Lines

__all__ = ["run", "table"]

ASSETS = Path(__file__).parents[1] / "assets"
NOISE = 0.3  # of the noisy digits
TASKS = {"inpaint": "inpaint:box,size=10", "deblur": "blur:gaussian,sigma=1.5"}
TITLES = {"inpaint": "Fill a hole", "deblur": "Undo a blur"}
TASK_NOISE = 0.05
KIMG = 56.0
NUCLEI = {"noise": 0.2, "crop": 32, "kimg": 4.0}  # of the second run
SOLVED = 64  # held-out digits for each task: the solver runs the network 100 times
SHOWN, NEW = 8, 32  # pictures in the report: of each task, and from the prior
WIDE = {"digits": 12, "nuclei": 5}  # images in a line of the first picture
ON_IMAGE_SCALE = ("noisy", "non-local means", "restored", "truth")  # pictures in [0, 1]
COLUMNS = ("images", "PSNR (dB)", "SSIM", "spread", "error")


def run(
    out: str | Path,
    seed: int = 0,
    *,
    train: int | None = None,
    held_out: int = 128,
    kimg: float = KIMG,
    recipe: Recipe | None = None,
    steps: int | None = None,
    nuclei: float = NUCLEI["kimg"],
) -> dict[str, Any]:
    """Learn, restore, solve, and write `out`/report.html. An existing run is continued.

    Args:
        out: Folder; the runs are in `out`/run and `out`/nuclei.
        seed: Seed of all random draws.
        train: Number of noisy training digits; None: all in the package.
        held_out: Number of digits to restore; they are not in the training set.
        kimg: Length of the training in thousands of images.
        recipe: Schedule of the training; None: the default.
        steps: Steps of the solver; None: its default.
        nuclei: Length of the training on nuclei in thousands of crops; 0: none.

    Returns:
        "noisy", "restored" and "solved", each with psnr (dB) and ssim. "restored" also has
        spread (the root mean square standard deviation) and rmse, in units of the image; they are
        equal for an exact posterior. "solved" has the means over both tasks, and each task with
        its pseudo-inverse; "nuclei" has "noisy", "filtered" and "restored". Further "filtered",
        the digits after non-local means, "seconds" and "report".

    Raises:
        InputError: A folder holds a run of other settings, or cannot be written.
    """
    start, out = time.monotonic(), Path(out)
    noisy, recipe = Problem("identity", NOISE), recipe or Recipe()
    digits = ASSETS / "digits"
    y = noisy.simulate(load_images(digits / "train.idx3-ubyte.gz", limit=train).images, seed)
    prior, posterior = learn(
        y,
        noisy,
        method="flowdiff",
        out=out / "run",
        recipe=recipe,
        start="none",
        kimg=kimg,
        seed=seed,
    )
    truth = load_images(digits / "test.idx3-ubyte.gz", limit=held_out).images
    fresh = range(len(y), len(y) + len(truth))  # new image numbers: new noise

    result, pictures = _restore(truth, noisy, posterior, seed, fresh)
    sections: list[Section] = [
        Comparisons("", [_wide("Digits", "digits", pictures)], ("noisy", "restored"), FIRST),
        Text("What happened", _happened(len(y), kimg)),
    ]
    if nuclei > 0:
        result["nuclei"], found = _nuclei(out, seed, nuclei, recipe)
        wide = _wide("Nuclei of cells", "nuclei", found)
        sections[0] = Comparisons(
            "", [_wide("Digits", "digits", pictures), wide], ("noisy", "restored"), FIRST
        )
    tasks = {
        name: _solve(truth[:SOLVED], name, prior, seed, fresh[:SOLVED], steps) for name in TASKS
    }
    scores = {name: task for name, (task, _) in tasks.items()}
    means = {k: sum(s[k] for s in scores.values()) / len(scores) for k in ("psnr", "ssim")}
    result |= {"solved": means | scores, "seconds": time.monotonic() - start}
    verdict = Verdict.load(out / "run")
    if verdict is not None:
        sections.append(Judgement("Can the digits be trusted?", verdict))
    sections += [
        Table("How close the restored images are", COLUMNS, [*_cells(result)], caption=CAPTION),
        *_restored("digits", pictures),
    ]
    if nuclei > 0:
        sections += _restored("nuclei", found, tile=96, count=5)
    sections += [
        *(picture for _, picture in tasks.values()),
        _drawn(prior, seed),
        Commands("What to do next", _next(out)),
    ]
    page = write(out / "report.html", "Restored without a single clean image", sections)
    return result | {"report": str(page)}


FIRST = (
    "Drag the line. On the left is what was measured, on the right what was restored from it. "
    "None of these images was used in the training, and no clean image was."
)
CAPTION = (
    "Means over the held-out images; PSNR and SSIM of images clipped to the range. Non-local "
    "means is a filter that learns nothing. For an exact posterior the spread (the root mean "
    "square of its standard deviations) equals the error (the root mean square of the restored "
    "minus the true image)."
)
REMOVED = (
    "What was removed should look like the noise that was there, without outlines of the images. "
    "Red is brighter, blue is darker. The standard deviation is large where several images would "
    "explain the measured one."
)


def _happened(count: int, kimg: float) -> list[str]:
    """Return what was learned from, and for how long."""
    return [
        f"{count:,} digits received noise of standard deviation {NOISE}, where black is 0 and "
        "white is 1. From these noisy digits alone two networks were learned together: a prior, "
        "which knows what digits look like, and a posterior, which restores a noisy one.",
        f"They saw {1000 * kimg:,.0f} noisy digits, most of them several times. The nuclei come "
        f"from a microscope and received noise of {NUCLEI['noise']}. Their run started from that "
        "of the digits, so that it could be short.",
    ]


def _next(out: Path) -> dict[str, str]:
    """Return commands to go on with, each with what it does."""
    prior = shlex.quote(str(out / "run"))
    return {
        "See how noisy your own images are": "unmurk noise IMAGES",
        "Learn from a folder of them": "unmurk learn IMAGES --noise auto --out runs/mine",
        "Restore them, with error bars": (
            "unmurk restore IMAGES --prior runs/mine --out restored --std"
        ),
        "Look at this run": f"unmurk report {prior}",
    }


def table(result: dict[str, Any]) -> "Lines":
    """Return the scores of `run` as a table for the terminal."""
    from rich.table import Table as Lines

    lines = Lines(*COLUMNS)
    for column in lines.columns[1:]:
        column.justify = "right"
    for name, psnr, ssim, *rest in _cells(result):
        others = ("" if value is None else f"{value:.4f}" for value in rest)
        lines.add_row(name, f"{psnr:.2f}", f"{ssim:.3f}", *others)
    return lines


def _cells(result: dict[str, Any]) -> Iterator[list[Any]]:
    def row(name: str, scores: dict[str, Any]) -> list[Any]:
        return [name, *(scores.get(key) for key in ("psnr", "ssim", "spread", "rmse"))]

    for what, held in (("digits", result), ("nuclei", result.get("nuclei"))):
        if held is not None:
            yield row(f"{what}: noisy", held["noisy"])
            yield row(f"{what}: non-local means", held["filtered"])
            yield row(f"{what}: restored in one pass", held["restored"])
    for name, title in TITLES.items():
        yield row(f"{title.lower()}: pseudo-inverse", result["solved"][name]["pseudo_inverse"])
        yield row(f"{title.lower()}: solved", result["solved"][name])


def _scores(x: Tensor, truth: Tensor) -> dict[str, Any]:
    return {
        "psnr": float(metrics.psnr(x, truth).mean()),
        "ssim": float(metrics.ssim(x, truth).mean()),
    }


def _restore(
    truth: Tensor, problem: Problem, posterior: Posterior, seed: int, index: range
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore held-out images in one pass; return scores, and pictures by name."""
    y = problem.simulate(truth, seed, index)
    device = next(posterior.parameters()).device
    bound = problem.bind(index, truth.shape[-3:]).to(device)
    tiled = posterior_for(posterior, truth.shape[-3:])
    mean, std = (v.cpu() for v in tiled.mean_std(y.to(device), bound, 64, seed, index))
    calibration = {
        "spread": float(std.square().mean().sqrt()),
        "rmse": float((mean - truth).square().mean().sqrt()),
    }
    filtered = non_local_means(y, problem.sigma)
    scores = {
        "noisy": _scores(y, truth),
        "filtered": _scores(filtered, truth),
        "restored": _scores(mean, truth) | calibration,
    }
    return scores, {
        "noisy": y,
        "non-local means": filtered,
        "restored": mean,
        "truth": truth,
        "standard deviation": std,
        "what was removed": y - mean,
        "the noise that was there": y - truth,
    }


def _nuclei(
    out: Path, seed: int, kimg: float, recipe: Recipe
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Learn from noisy nuclei and restore others; return scores, and pictures by name."""
    problem = Problem("identity", NUCLEI["noise"])
    file = ASSETS / "nuclei" / "nuclei.npz"
    clean, truth = (load_images(Path(f"{file}:{part}")).images for part in ("train", "val"))
    y, truth = problem.simulate(clean, seed), truth[: 2 * WIDE["nuclei"]]
    _, posterior = learn(
        y,
        problem,
        method="flowdiff",
        out=out / "nuclei",
        start=out / "run",
        recipe=recipe,
        crop=int(NUCLEI["crop"]),
        kimg=kimg,
        seed=seed,
    )
    fresh = range(len(y), len(y) + len(truth))
    return _restore(truth, problem, posterior, seed, fresh)


def _solve(
    truth: Tensor, name: str, prior: Prior, seed: int, index: range, steps: int | None
) -> tuple[dict[str, Any], Section]:
    """Solve one task by RED-diff; return scores and pictures."""
    text = TASKS[name]
    problem = Problem(text, TASK_NOISE)
    y = problem.simulate(truth, seed, index)
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    device = next(prior.parameters()).device
    x = solve(y.to(device), problem, prior, "red-diff", seed=seed, **options).mean.cpu()
    inverse = problem.A_dagger(y)
    scores = _scores(x, truth) | {"operator": text, "noise": TASK_NOISE}
    columns = {"measured": y, "pseudo-inverse": inverse, "solved": x, "truth": truth}
    caption = (
        f"The prior of the noisy digits solves a task that it was not learned for: {text}, noise "
        f"{TASK_NOISE}. The pseudo-inverse uses the measurement alone."
    )
    picture = _grid(TITLES[name], columns, caption)
    return scores | {"pseudo_inverse": _scores(inverse, truth)}, picture


def _drawn(prior: Prior, seed: int) -> Section:
    new = prior.sample(NEW, seed=seed).cpu()
    rows = [list(new[i : i + SHOWN]) for i in range(0, NEW, SHOWN)]
    caption = "Digits that nobody wrote, drawn from the prior."
    return Images("Draw new digits", rows, caption=caption, tile=84)


def _wide(label: str, kind: str, pictures: dict[str, Tensor]) -> Comparison:
    """Return a wide picture of many images side by side, noisy and restored."""
    across = WIDE[kind]

    def sheet(x: Tensor) -> Tensor:
        rows = max(1, min(len(x) // across, 3 if kind == "digits" else 2))
        lines = (x[i * across : (i + 1) * across] for i in range(rows))
        return torch.cat([torch.cat(list(line), -1) for line in lines if len(line)], -2)

    return Comparison(label, sheet(pictures["noisy"]), sheet(pictures["restored"]))


def _restored(
    what: str, pictures: dict[str, Tensor], tile: int = 84, count: int = SHOWN
) -> list[Section]:
    """Return a grid of restored images, and one of their deviations and what was removed."""
    images = {k: x for k, x in pictures.items() if k in ON_IMAGE_SCALE}
    maps = {k: x for k, x in pictures.items() if k not in ON_IMAGE_SCALE}
    most = 3 * float(pictures["the noise that was there"].std())
    around = {
        name: Column(name, (-most, most), "RdBu_r")
        for name in ("what was removed", "the noise that was there")
    }
    known = {"standard deviation": Column("standard deviation", "shared", "magma")} | around
    return [
        _grid(f"Restore noisy {what}", images, tile=tile, count=count),
        _grid(f"What was removed from the {what}", maps, REMOVED, known, tile, count),
    ]


def _grid(
    title: str,
    pictures: dict[str, Tensor],
    caption: str = "",
    columns: dict[str, Column] | None = None,
    tile: int = 84,
    count: int = SHOWN,
) -> Section:
    """Return a grid of the first images, with a row for each."""
    labels = [(columns or {}).get(name, Column(name)) for name in pictures]
    rows = list(zip(*(list(x[:count]) for x in pictures.values()), strict=True))
    return Images(title, rows, labels, caption=caption, tile=tile)
