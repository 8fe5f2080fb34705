"""The certification as a command: it runs in processes and makes a table, a picture and a file."""

import io
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, reason
from ..evaluation.certify import RANK, Row, certify, claiming_solvers, default_solvers
from ..evaluation.exam import BIAS, LEVEL, PROBLEMS, SHORT, SPREAD
from ..io.atomic import write as write_atomically
from ..progress import Parts
from ..solvers.base import Claim
from .console import plain

if TYPE_CHECKING:
    from rich.table import Table as Lines

__all__ = [
    "CAPTION",
    "WIDTH",
    "Summary",
    "holds",
    "lines",
    "picture",
    "read",
    "reference",
    "run",
    "summary",
    "table",
]

PROCESSES = 8  # at most, one per core

WIDTH = 110  # characters of the table in a terminal, at least
WIDTHS = (14, 9, 13, 9)  # characters of its first columns

CAPTION = """\
Every figure is the worst over all problems. The exact values are 1.00 for spreads and SWD, 0.90
for the coverage, and 0 for the mean error (in posterior standard deviations). NFE: network
evaluations per sample; s: seconds of all draws. (!): less than the solver claims. --json prints
every row; --thorough runs all solvers on all problems."""


def run(
    methods: Sequence[str] = (), out: Path | None = None, *, seed: int = 0, thorough: bool = False
) -> dict[str, Any]:
    """Certify solvers, with one process of one thread per core; see `progress`.

    Args:
        methods: Names as in `certify.default_solvers`; empty: all if thorough, else those that
            claim more than "heuristic".
        out: Folder for certify.json and certify.png; None: no files.
        seed: See `certify.certify`.
        thorough: Whether all problems (`exam.PROBLEMS`) are used, instead of a dozen that cover
            them (`exam.SHORT`).

    Returns:
        "seed"; "thorough"; "processes"; "seconds" of wall time; "holds", whether each solver
        fulfills its claim; "rows", the fields of each `certify.Row` (see `read`).

    Raises:
        InputError: A name is unknown, or the seed is negative.
    """
    known, start = default_solvers(), time.monotonic()
    for name in methods:
        if name not in known:
            raise InputError(f"solver '{name}' is unknown: choose from {', '.join(known)}")
    solvers = {name: known[name] for name in methods} or (
        known if thorough else claiming_solvers()
    )
    problems = PROBLEMS if thorough else SHORT
    processes = min(os.cpu_count() or 1, PROCESSES)
    total, done = len(solvers) * len(problems), itertools.count(1)
    with Parts() as parts:
        parts.advance(0, total)
        rows = certify(
            solvers,
            seed=seed,
            problems=problems,
            progress=lambda _: parts.advance(next(done), total),
            processes=processes,
        )
    result: dict[str, Any] = {"seed": seed, "thorough": thorough, "processes": processes}
    result |= {"seconds": time.monotonic() - start, "holds": holds(rows)}
    result |= {"rows": [asdict(row) for row in rows]}
    if out is not None:
        text = json.dumps(plain(result), indent=1) + "\n"
        write_atomically(out / "certify.json", text.encode())
        picture(rows, out / "certify.png")
    return result


def read(result: dict[str, Any]) -> list[Row]:
    """Return the rows in a result of `run`, or in its file."""
    return [Row(**row) for row in result["rows"]]


@dataclass(frozen=True)
class Summary:
    """The results of one solver on all problems.

    Attributes:
        solver: Its name.
        claims: Its claim.
        earned: The weakest grade over the problems that it did not refuse; None: it refused all.
        counts: The number of problems with each grade.
        refused: The number of problems that it refused.
        figures: Median and worst of the mean error, both spreads, coverage and excess (see `Row`);
            None without a value.
        evaluations: Network evaluations of the most expensive sample.
        seconds: Time of all draws.
    """

    solver: str
    claims: Claim
    earned: Claim | None
    counts: dict[Claim, int]
    refused: int
    figures: dict[str, tuple[float, float] | None]
    evaluations: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether it fulfills its claim on every problem that it does not refuse."""
        return self.earned is not None and RANK[self.earned] >= RANK[self.claims]


def summary(rows: Sequence[Row]) -> dict[str, Summary]:
    """Summarize the rows of every solver, by name."""
    names = dict.fromkeys(row.solver for row in rows)
    return {name: _summarize([row for row in rows if row.solver == name]) for name in names}


def holds(rows: Sequence[Row]) -> dict[str, bool]:
    """Return for each solver whether it fulfills its claim on every problem."""
    return {name: found.holds for name, found in summary(rows).items()}


def _summarize(rows: list[Row]) -> Summary:
    earned = [row.earned for row in rows if row.earned is not None]
    return Summary(
        solver=rows[0].solver,
        claims=rows[0].claims,
        earned=min(earned, key=RANK.__getitem__, default=None),
        counts={claim: earned.count(claim) for claim in ("posterior", "point", "heuristic")},
        refused=len(rows) - len(earned),
        figures={name: _pair(rows, name) for name in WORSE},
        evaluations=max(row.evaluations for row in rows),
        seconds=sum(row.seconds for row in rows),
    )


def _off(spread: float) -> float:
    """Return the distance of a ratio from 1, on a logarithmic scale."""
    return abs(math.log(spread)) if spread > 0 else math.inf


WORSE: dict[str, Callable[[float], float]] = {
    "mean_error": float,
    "spread_observed": _off,
    "spread_unobserved": _off,
    "coverage": lambda coverage: abs(coverage - LEVEL),
    "excess": float,
}
"""Figures of a row, with the measure that defines the worst value."""


def _pair(rows: list[Row], name: str) -> tuple[float, float] | None:
    """Return the median and the worst of the known values."""
    found = (getattr(row, name) for row in rows)
    known = [value for value in found if value is not None]
    return (statistics.median(known), max(known, key=WORSE[name])) if known else None


HEAD = (
    *("solver", "claims", "earned", "posterior, point, neither on", "mean error"),
    *("spread observed", "spread unobserved", "coverage of 90 %", "SWD / exact", "NFE", "s"),
)


def _cells(found: Summary) -> list[str]:
    earned = (found.earned or "refused all") + ("" if found.holds else " (!)")
    counts = ", ".join(str(count) for count in found.counts.values())
    figures = [f"{p[0]:.2f} ({p[1]:.2f})" if p else "" for p in found.figures.values()]
    cost = [str(found.evaluations), f"{found.seconds:.0f}"]
    return [found.solver, found.claims, earned, counts, *figures, *cost]


def table(rows: Sequence[Row]) -> str:
    """Return the summary in Markdown, one line per solver, with figures as "median (worst)".

    The grade of a solver that does not fulfill its claim is marked with (!).
    """
    written: list[Sequence[str]] = [
        HEAD,
        ["---"] * len(HEAD),
        *map(_cells, summary(rows).values()),
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in written)


def lines(rows: Sequence[Row]) -> "Lines":
    """Return the summary for the terminal, with the worst figures only."""
    from rich.box import SIMPLE
    from rich.table import Table as Lines

    found = Lines(box=SIMPLE, padding=(0, 0, 0, 1))
    for number, head in enumerate(HEAD):
        side: Any = "right" if number > 3 else "left"
        found.add_column(head, justify=side, min_width=WIDTHS[number] if number < 4 else 5)
    for one in summary(rows).values():
        solver, claims, earned, counts, *_, evaluations, seconds = _cells(one)
        worst = [f"{p[1]:.2f}" if p else "" for p in one.figures.values()]
        found.add_row(solver, claims, earned, counts, *worst, evaluations, seconds)
    return found


def reference(rows: Sequence[Row]) -> str:
    """Describe the accuracy of the sampled references in a sentence; "" without any."""
    known = [row for row in rows if row.rhat is not None]
    if not known:
        return ""
    rhat, ess = max(row.rhat or 0 for row in known), min(row.ess or 0 for row in known)
    error = max(row.reference_error or 0 for row in known)
    return (
        f"The Gibbs sampler of the heavy-tailed prior: split R-hat at most {rhat:.3f}, at least\n"
        f"{ess:.0f} effective samples of every coefficient, standard error of the mean at most\n"
        f"{error:.4f} posterior standard deviations.\n"
    )


INKS = dict(posterior="#0072b2", point="#e69f00", heuristic="#555555")
MARKS = dict(posterior="o", point="s", heuristic="^")
"""Colors and markers of the grades, which every reader can tell apart (Okabe and Ito, 2008)."""
LEAST, MOST_ERROR, MOST_SPREAD = 0.01, 10.0, 2.0  # values beyond are drawn on the edge
TITLE = "Samples of every solver on every problem, against the exact posterior"
OFFSETS = [(x, y) for up in range(4, 150, 12) for y in (up, -up - 6) for x in (6, -6)]
"""Places of a name around its point, in points of the page; negative x: on the left."""


@dataclass(frozen=True)
class _Point:
    """A row in the picture, and whether it lies beyond the axes."""

    row: Row
    x: float
    y: float
    beyond: bool

    @classmethod
    def of(cls, row: Row) -> "_Point | None":
        """Return the point of a row; None if it has no figures."""
        spreads = [s for s in (row.spread_observed, row.spread_unobserved) if s is not None]
        if row.mean_error is None or row.earned is None or not spreads:
            return None
        worst = max(spreads, key=_off)
        x, y = min(worst, MOST_SPREAD), min(max(row.mean_error, LEAST), MOST_ERROR)
        return cls(row, x, y, (x, y) != (worst, row.mean_error))

    @property
    def away(self) -> float:
        """The distance from an exact sampler, on the scales of the picture."""
        return abs(self.x - 1) / SPREAD + math.log(self.y / LEAST)


def picture(rows: Sequence[Row], path: str | Path) -> None:
    """Plot every row: its spread ratio (the worse of the two) against its mean error.

    Colors and markers show the grade; a posterior sampler belongs in the labeled box. The name of
    a solver stands at its worst point. Points beyond the axes are drawn hollow on the edge, and a
    line below the picture counts them.

    Args:
        rows: The rows.
        path: The file; its suffix gives the format: .png, .svg or .pdf.

    Raises:
        InputError: The file cannot be written, or has another format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 5.4), dpi=150)
    axes: Any = figure.add_axes((0.09, 0.19, 0.88, 0.74))
    points = [point for point in map(_Point.of, rows) if point is not None]
    for point in points:
        grade = point.row.earned
        assert grade is not None
        ink = INKS[grade]
        fill = "none" if point.beyond else ink
        style: Any = {"color": ink, "markerfacecolor": fill, "alpha": 0.75, "clip_on": False}
        axes.plot(point.x, point.y, MARKS[grade], markersize=6, **style)
    axes.set(xlim=(-0.02, MOST_SPREAD), ylim=(LEAST, MOST_ERROR), yscale="log")
    axes.set_title(TITLE, loc="left", fontsize=9.5)
    axes.set_xlabel("spread of the samples / exact spread, the worse of observed and unobserved")
    axes.set_ylabel("error of the mean / posterior standard deviation")
    _region(axes)
    for name, mark in MARKS.items():
        axes.plot([], [], mark, color=INKS[name], label=f'earns "{name}"', markersize=6)
    figure.legend(loc="lower right", ncols=3, frameon=False, fontsize=8)
    beyond = sum(point.beyond for point in points)
    if beyond:
        text = f"hollow, on the edge: {beyond} of {len(points)} points lie beyond the axes"
        figure.text(0.09, 0.06, text, fontsize=8)
    _name(figure, axes, points)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=Path(path).suffix[1:] or None)
        write_atomically(Path(path), drawn.getvalue())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw to {path}: {reason(error)}") from error


def _region(axes: Any) -> None:
    """Draw the box of posterior samplers, with its name."""
    from matplotlib.patches import Rectangle

    corner, sides = (1 - SPREAD, LEAST), (2 * SPREAD, BIAS - LEAST)
    box = Rectangle(corner, *sides, facecolor="#0072b21a", edgecolor=INKS["posterior"])
    axes.add_patch(box)
    place = {"xytext": (4, -3), "textcoords": "offset points", "va": "top"}
    axes.annotate(
        "box: posterior samplers",
        (1 + SPREAD, LEAST * 1.5),
        **place,
        color=INKS["posterior"],
        fontsize=8,
        zorder=5,
        path_effects=_halo(),
        gid="region",
    )


def _halo() -> list[Any]:
    """Return what makes text readable on points."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def extent_of(text: Any, renderer: Any) -> Any:
    """Return the box of the letters of a text, without the line to its point."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _name(figure: Any, axes: Any, points: Sequence[_Point]) -> list[Any]:
    """Write the name of each solver at its worst point, so that no two names overlap.

    Returns:
        The names; one that finds no free place is at the side of its point all the same.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    frame, taken = axes.get_window_extent(renderer), []
    taken += [extent_of(text, renderer) for text in axes.texts]
    worst: dict[str, _Point] = {}
    for point in points:
        if point.away > worst.get(point.row.solver, point).away or point.row.solver not in worst:
            worst[point.row.solver] = point
    names, line = [], {"arrowstyle": "-", "color": "#777777", "linewidth": 0.6}
    for name, point in worst.items():
        for x, y in OFFSETS:
            side = "left" if x > 0 else "right"
            text = axes.annotate(
                name,
                (point.x, point.y),
                xytext=(x, y),
                textcoords="offset points",
                ha=side,
                fontsize=8,
                zorder=5,
                path_effects=_halo(),
                gid=f"name {name}",
                arrowprops=line if abs(y) > 12 else None,
            )
            box = extent_of(text, renderer)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 + 2
            inside &= frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axes.annotate(name, (point.x, point.y), fontsize=8)
            box = extent_of(text, renderer)
        taken.append(box)
        names.append(text)
    return names
