r"""The demonstration: learn what digits look like from noisy digits only, then restore with it.

No clean image enters the training. The measurements

.. math:: y_i = x_i + 0.3\, n_i

are drawn once for each digit, and only the y_i are used. With the prior p(x) and the posterior
q(x | y) learned from them,

- held-out noisy digits are restored in one pass: E[x | y] and its standard deviation under q;
- new digits are sampled from p;
- a hole is filled and a blur is removed by `solve`, two tasks that the training never met.

Each result is shown beside a trivial one: the noisy image, or the pseudo-inverse.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..diffusion.prior import Prior
from ..evaluation import metrics
from ..flows.posterior import Posterior
from ..io.images import load_images
from ..problem import Problem
from ..solvers import solve
from ..training import Recipe, learn
from .report import Column, Images, Section, Table, Text, write

if TYPE_CHECKING:
    from rich.table import Table as Lines

__all__ = ["run", "table"]

DIGITS = Path(__file__).parents[1] / "assets" / "digits"
NOISE = 0.3  # of the training images
TASKS = {"inpaint": "inpaint:box,size=10", "deblur": "blur:gaussian,sigma=1.5"}
TASK_NOISE = 0.05
KIMG = 88.0
SOLVED = 64  # held-out digits for each task: the solver runs the network 100 times
SHOWN, NEW = 8, 32  # pictures in the report: of each task, and from the prior
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
) -> dict[str, Any]:
    """Learn, restore, solve, and write `out`/report.html. An existing run is continued.

    Args:
        out: Folder; the run is in `out`/run.
        seed: Seed of all random draws.
        train: Number of noisy training digits; None: all in the package.
        held_out: Number of digits to restore; they are not in the training set.
        kimg: Length of the training in thousands of images.
        recipe: Schedule of the training; None: the default.
        steps: Steps of the solver; None: its default.

    Returns:
        "noisy", "restored" and "solved", each with psnr (dB) and ssim. "restored" also has
        spread (the root mean square standard deviation) and rmse, in units of the image; they are
        equal for an exact posterior. "solved" has the means over both tasks, and each task with
        its pseudo-inverse. Further "seconds" and "report".

    Raises:
        InputError: `out`/run holds a run of other settings, or cannot be written.
    """
    start, out = time.monotonic(), Path(out)
    noisy = Problem("identity", NOISE)
    y = noisy.simulate(load_images(DIGITS / "train.idx3-ubyte.gz", limit=train).images, seed)
    prior, posterior = learn(
        y,
        noisy,
        method="flowdiff",
        out=out / "run",
        recipe=recipe or Recipe(),
        network="tiny",
        kimg=kimg,
        seed=seed,
    )
    truth = load_images(DIGITS / "test.idx3-ubyte.gz", limit=held_out).images
    fresh = range(len(y), len(y) + len(truth))  # new image numbers: new noise

    result, denoised = _restore(truth, noisy, posterior, seed, fresh)
    tasks = {
        name: _solve(truth[:SOLVED], text, prior, seed, fresh[:SOLVED], steps)
        for name, text in TASKS.items()
    }
    scores = {name: task for name, (task, _) in tasks.items()}
    means = {k: sum(s[k] for s in scores.values()) / len(scores) for k in ("psnr", "ssim")}
    result |= {"solved": means | scores, "seconds": time.monotonic() - start}

    sections: list[Section] = [
        Text(
            "",
            f"A prior and a posterior were learned from {len(y)} digits with noise of standard "
            f"deviation {NOISE} (image range 1), without any clean image. The digits restored "
            "below are not in the training set.",
        ),
        Table("Scores", COLUMNS, [*_rows(result)], caption=CAPTION),
        denoised,
        _drawn(prior, seed),
        *(picture for _, picture in tasks.values()),
    ]
    return result | {"report": str(write(out / "report.html", "unmurk: digits", sections))}


CAPTION = (
    "Means over the held-out digits; PSNR and SSIM of images clipped to the range. For an exact "
    "posterior the spread (the root mean square of its standard deviations) equals the error (the "
    "root mean square of the restored minus the true image)."
)


def table(result: dict[str, Any]) -> "Lines":
    """Return the scores of `run` as a table for the terminal."""
    from rich.table import Table as Lines

    lines = Lines(*COLUMNS)
    for column in lines.columns[1:]:
        column.justify = "right"
    for name, psnr, ssim, *rest in _rows(result):
        others = ("" if value is None else f"{value:.4f}" for value in rest)
        lines.add_row(name, f"{psnr:.2f}", f"{ssim:.3f}", *others)
    return lines


def _rows(result: dict[str, Any]) -> Iterator[list[Any]]:
    def row(name: str, scores: dict[str, Any]) -> list[Any]:
        return [name, *(scores.get(key) for key in ("psnr", "ssim", "spread", "rmse"))]

    yield row("noisy", result["noisy"])
    yield row("restored in one pass", result["restored"])
    for name in TASKS:
        yield row(f"{name}: pseudo-inverse", result["solved"][name]["pseudo_inverse"])
        yield row(f"{name}: solved", result["solved"][name])


def _scores(x: Tensor, truth: Tensor) -> dict[str, Any]:
    return {
        "psnr": float(metrics.psnr(x, truth).mean()),
        "ssim": float(metrics.ssim(x, truth).mean()),
    }


def _restore(
    truth: Tensor, problem: Problem, posterior: Posterior, seed: int, index: range
) -> tuple[dict[str, Any], Section]:
    """Restore held-out digits in one pass; return scores and pictures."""
    y = problem.simulate(truth, seed, index)
    device = next(posterior.parameters()).device
    mean, std = (v.cpu() for v in posterior.mean_std(y.to(device), problem, n=64, seed=seed))
    calibration = {
        "spread": float(std.square().mean().sqrt()),
        "rmse": float((mean - truth).square().mean().sqrt()),
    }
    scores = {"noisy": _scores(y, truth), "restored": _scores(mean, truth) | calibration}
    columns = {"noisy": y, "restored": mean, "standard deviation": std, "truth": truth}
    return scores, _grid("Restored in one pass", columns)


def _solve(
    truth: Tensor, text: str, prior: Prior, seed: int, index: range, steps: int | None
) -> tuple[dict[str, Any], Section]:
    """Solve one task by RED-diff; return scores and pictures."""
    problem = Problem(text, TASK_NOISE)
    y = problem.simulate(truth, seed, index)
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    device = next(prior.parameters()).device
    x = solve(y.to(device), problem, prior, "red-diff", seed=seed, **options).mean.cpu()
    inverse = problem.A_dagger(y)
    scores = _scores(x, truth) | {"operator": text, "noise": TASK_NOISE}
    columns = {"measured": y, "pseudo-inverse": inverse, "solved": x, "truth": truth}
    picture = _grid(f"{text}, noise {TASK_NOISE}", columns)
    return scores | {"pseudo_inverse": _scores(inverse, truth)}, picture


def _drawn(prior: Prior, seed: int) -> Section:
    new = prior.sample(NEW, seed=seed).cpu()
    rows = [list(new[i : i + SHOWN]) for i in range(0, NEW, SHOWN)]
    return Images("Drawn from the prior", rows, tile=84)


def _grid(title: str, columns: dict[str, Tensor]) -> Section:
    """Return a grid of the first digits, with a row for each."""
    deviation = Column("standard deviation", range="shared", color="magma")
    labels = [deviation if name == deviation.label else Column(name) for name in columns]
    rows = list(zip(*(list(x[:SHOWN]) for x in columns.values()), strict=True))
    return Images(title, rows, labels, tile=84)
