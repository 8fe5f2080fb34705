"""Charts of a page as inline SVG in the colors of the page, and its numbers as text."""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Curves", "Panels", "figure_text", "is_number"]

# Colors that matplotlib draws with, and the variables of the page that replace them.
INKS = {"#010101": "var(--soft)", "#020202": "var(--grid)", "#030303": "var(--line)"}
INKS |= {f"#04040{i}": f"var(--c{i})" for i in range(6)}
SOFT, GRID, LINE, *LINES = INKS


@dataclass(frozen=True)
class Curves:
    """Curves in one chart: {label: (xs, ys)}; values that are not finite leave a gap."""

    title: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x: str = ""
    y: str = ""
    log_x: bool = False
    log_y: bool = False
    caption: str = ""
    smooth: bool = False
    """Draw the curves faint, and over each its running mean (over 1/30 of its length)."""
    x_range: tuple[float, float] | None = None
    """Ends of the horizontal axis; None: those of the curves."""

    def drawn(self) -> list[dict[str, Any]]:
        """Draw the chart for a wide and for a narrow page; the page shows the one that fits."""
        chart = _chart(self, {"wide-only": (8.6, 3.7), "narrow": (3.9, 3.0)})
        return [chart | {"title": ""}]  # the heading of the section has the same title


@dataclass(frozen=True)
class Panels:
    """Several small charts side by side."""

    title: str
    charts: Sequence[Curves]
    caption: str = ""

    def drawn(self) -> list[dict[str, Any]]:
        """Draw the charts, small."""
        return [_chart(chart, {"small": (3.1, 2.0)}) for chart in self.charts]


def _chart(chart: Curves, sizes: dict[str, tuple[float, float]]) -> dict[str, Any]:
    for label, (xs, ys) in chart.curves.items():
        if len(xs) != len(ys):
            raise InputError(f"curve '{label}': {len(xs)} values of x for {len(ys)} of y")
    return {
        "title": chart.title,
        "legend": [(k, INKS[LINES[i % len(LINES)]]) for i, k in enumerate(chart.curves)],
        "drawings": [_svg(chart, name, size) for name, size in sizes.items()],
    }


def _svg(chart: Curves, name: str, size: tuple[float, float]) -> Any:
    """Draw the chart as an SVG element of class `name`; the size is in inches."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",  # text stays text, in the font of the page
        "svg.hashsalt": f"{name} {chart.title}",  # different identifiers for every chart
        "font.family": "DejaVu Sans",
        "font.size": 8.0,
        "axes.labelsize": 8.0,
        "axes.formatter.limits": (-3, 5),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        _draw(chart, figure.add_subplot())
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing, transparent=True)
    head = f'<svg class="{name}" role="img" aria-label="{html.escape(chart.title)}"'
    text = file.getvalue()
    own = re.compile(r'.*?<svg [^>]*?(viewBox="[^"]*")[^>]*>', re.DOTALL)
    text = own.sub(lambda match: f"{head} {match[1]}>", text, count=1)
    text = re.sub(r' id="[A-Za-z.]+\w*_\d+"', "", text)  # numbered, so not unique on a page
    for ink, variable in INKS.items():
        text = text.replace(ink, variable)
    return Markup(text.replace("'DejaVu Sans'", "var(--sans)"))


def _draw(chart: Curves, axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(which="both", colors=SOFT, length=0)
    axes.margins(x=0.02)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(chart.x, color=SOFT)
    axes.set_ylabel(chart.y, color=SOFT)
    if chart.x_range is not None:
        axes.set_xlim(*chart.x_range)
    for i, (side, log) in enumerate({"x": chart.log_x, "y": chart.log_y}.items()):
        if log and any(v > 0 for points in chart.curves.values() for v in points[i]):
            getattr(axes, f"set_{side}scale")("log", nonpositive="mask")
    for i, (xs, ys) in enumerate(chart.curves.values()):
        color = LINES[i % len(LINES)]
        x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (xs, ys))
        y = torch.where(y.isfinite(), y, torch.nan)
        few = {"marker": "o", "markersize": 3.0} if len(x) <= 12 else {}
        faint = {"alpha": 0.3, "linewidth": 0.8} if chart.smooth else {"linewidth": 1.5, **few}
        axes.plot(x.numpy(), y.numpy(), color=color, solid_capstyle="round", **faint)
        if chart.smooth:
            axes.plot(x.numpy(), _running_mean(y).numpy(), color=color, linewidth=1.5)


def _running_mean(y: Tensor) -> Tensor:
    """Return the mean over a centered window, truncated at the ends; NaN values are left out."""
    half, place = max(1, len(y) // 60), torch.arange(len(y))
    start, stop = (place - half).clamp(min=0), (place + half + 1).clamp(max=len(y))
    sums = torch.stack([y.nan_to_num(0.0), y.isfinite().double()]).cumsum(1)
    sums = torch.nn.functional.pad(sums, (1, 0))
    total, count = sums[:, stop] - sums[:, start]
    return total / count


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not a boolean."""
    return isinstance(value, Real) and not isinstance(value, bool)


def figure_text(value: Any) -> str:
    """Format a value: 2 decimals from 1 on, 3 below, thousands separated by thin spaces."""
    if not is_number(value):
        return {None: "", True: "yes", False: "no"}.get(value, str(value))
    size = abs(value)
    if isinstance(value, Integral) or 1000 <= size < 1e6:
        text = f"{value:,.0f}"
    elif 0.01 <= size < 1000:
        text = f"{value:.{2 if size >= 1 else 3}f}"
    else:
        text = f"{value:.3g}"
    return text.replace(",", "\u202f").replace("-", "\u2212")
