"""The demonstration: learn what digits look like from noisy digits only, then restore with it.

No clean image enters the learning: y_i = x_i + 0.3 n_i is drawn once for each digit, and only the
y_i are handed on. With the prior p(x) and the posterior q(x | y) learnt from them,

- held-out noisy digits are restored in one pass, E[x | y] and its standard deviation from q;
- new digits are drawn from p;
- a hole is filled and a blur undone by `solve`, tasks that the learning never met.

Each result stands beside what it costs nothing to do: the noisy image, the pseudo-inverse.
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
from ..solvers.solve import solve
from ..training import Recipe, learn
from .report import Column, Images, Section, Table, Text, write

if TYPE_CHECKING:
    from rich.table import Table as Lines

__all__ = ["run", "table"]

DIGITS = Path(__file__).parents[1] / "assets" / "digits"
NOISE = 0.3  # in the images to learn from
TASKS = {"inpaint": "inpaint:box,size=10", "deblur": "blur:gaussian,sigma=1.5"}
TASK_NOISE = 0.05
KIMG = 88.0
SOLVED = 64  # of the held-out digits, for each task: the solver runs the network 100 times
SHOWN, NEW = 8, 32  # pictures in the report: of each task, drawn from the prior
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
    """Learn, restore, solve, and write `out`/report.html. The run in `out`/run is continued.

    Args:
        out: Folder.
        seed: Seed of every random draw.
        train: Noisy digits to learn from; None: all in the package.
        held_out: Digits to restore; the learning never met them, noisy or clean.
        kimg: Length of the learning in thousands of images seen.
        recipe: Schedule of the learning; None: the default.
        steps: Steps of the solver; None: its own.

    Returns:
        noisy, restored and solved with psnr (dB) and ssim each; restored with spread, the root
        mean square standard deviation, and rmse (units of the image; equal for an exact
        posterior); solved with the means over both tasks, and each task with its pseudo-inverse;
        seconds; report.

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
    fresh = range(len(y), len(y) + len(truth))  # image numbers: no noise is met twice

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
            f"A prior and a posterior were learnt from {len(y)} digits with noise of standard "
            f"deviation {NOISE} (image range 1), without any clean one. The digits restored "
            "below are others, which the learning never met.",
        ),
        Table("Scores", COLUMNS, [*_rows(result)], caption=CAPTION),
        denoised,
        _drawn(prior, seed),
        *(picture for _, picture in tasks.values()),
    ]
    return result | {"report": str(write(out / "report.html", "unmurk: digits", sections))}


CAPTION = (
    "Means over the held-out digits; PSNR and SSIM of images clipped to the range. For an exact "
    "posterior the spread, the root mean square of its standard deviations, equals the error, the "
    "root mean square of restored less true."
)


def table(result: dict[str, Any]) -> "Lines":
    """The scores of `run` as a table for the terminal."""
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
    """Held-out digits restored in one pass: scores and pictures."""
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
    """One task by RED-diff: scores and pictures."""
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
    """The first digits, a row for each."""
    deviation = Column("standard deviation", range="shared", colour="magma")
    labels = [deviation if name == deviation.label else Column(name) for name in columns]
    rows = list(zip(*(list(x[:SHOWN]) for x in columns.values()), strict=True))
    return Images(title, rows, labels, tile=84)
