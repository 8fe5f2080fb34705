"""Reports: a single self-contained HTML page.

Images are PNG data URIs, shown without interpolation. Curves are inline SVG whose colors follow
the light or dark theme of the page. There is no script, and the page's policy forbids requests.

A page is a list of sections, each a frozen dataclass: `Text`, `Numbers`, `Table`, `Images`,
`Pictures`, `Curves` and `Panels`. `write` writes a page of them; `run_report` writes the page of a
learning run from the files of its folder.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..io import atomic
from ..io.json_files import json_lines, read_object

__all__ = [
    "Column",
    "Curves",
    "Images",
    "Numbers",
    "Panels",
    "Pictures",
    "Section",
    "Table",
    "Text",
    "run_report",
    "write",
]

# Colors that matplotlib draws with, and the variables of the page that replace them.
INKS = {"#010101": "var(--soft)", "#020202": "var(--grid)", "#030303": "var(--line)"}
KEPT = "check/kept"  # 1 if the figures were the best so far; see training.validation
INKS |= {f"#04040{i}": f"var(--c{i})" for i in range(6)}
SOFT, GRID, LINE, *LINES = INKS

LARGE = 1e30  # largest figure on a chart
MOST_KIMG, MOST_SECONDS = 1e9, 1e11
MOST_KEYS = 200  # figures of a line, each of which is a chart


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text; `markupsafe.Markup` may hold HTML."""

    title: str
    paragraphs: str | Sequence[str]


@dataclass(frozen=True)
class Numbers:
    """A few important values, shown large, each with its name."""

    title: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of cells: strings, numbers, booleans; None leaves a cell empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    best: Mapping[str, Literal["max", "min"]] = field(default_factory=dict)
    """Columns whose highest or lowest number is set in bold."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(
                f"table '{self.title}': every row needs {len(self.columns)} cells, one per column"
            )

    def numeric(self) -> list[bool]:
        """Return which columns hold numbers only."""
        columns = ([row[i] for row in self.rows] for i in range(len(self.columns)))
        return [all(v is None or _is_number(v) for v in column) for column in columns]

    def winners(self) -> list[float | None]:
        """Return the best number of every column in `best`; None for the others."""
        found: list[float | None] = [None] * len(self.columns)
        for label, rule in self.best.items():
            i = self.columns.index(label)
            finite = [r[i] for r in self.rows if _is_number(r[i]) and math.isfinite(r[i])]
            found[i] = {"max": max, "min": min}[rule](finite, default=None)
        return found


@dataclass(frozen=True)
class Column:
    """How a column of `Images` is shown."""

    label: str
    range: Literal["unit", "each", "shared"] | tuple[float, float] = "unit"
    """Values shown as black and white. "unit": 0 and 1; "each": the extremes of every image;
    "shared": those of all images of the column; or two given values. Others are clipped."""
    color: str | None = None
    """Matplotlib color map ("magma" for standard deviations, say); channels are averaged."""


@dataclass(frozen=True)
class Images:
    """A grid of images (C, H, W) in rows and columns; None leaves a cell empty.

    Channels are shown side by side unless there are 1 or 3. A column with a color map, or with a
    range "shared" or given, has its scale below it.
    """

    title: str
    grid: Sequence[Sequence[Tensor | None]]
    columns: Sequence[str | Column] = ()
    rows: Sequence[str] = ()
    caption: str = ""
    tile: int = 120
    """Width of an image on a page wide enough, in pixels of the page."""

    def shown(self) -> dict[str, list[Any]]:
        """Return labels, scales and images for the template."""
        columns = [c if isinstance(c, Column) else Column(c) for c in self.columns]
        columns = columns or [Column("")] * max((len(row) for row in self.grid), default=0)
        labels = list(self.rows) or [""] * len(self.grid)
        if len(labels) != len(self.grid) or any(len(row) != len(columns) for row in self.grid):
            raise InputError(
                f"images '{self.title}': the grid must have {len(labels)} rows of {len(columns)} "
                "images, one for each label"
            )
        shown = [_show(c, [row[i] for row in self.grid]) for i, c in enumerate(columns)]
        return {
            "columns": [column.label for column in columns],
            "rows": [(label, [cells[i] for cells, _ in shown]) for i, label in enumerate(labels)],
            "scales": [scale for _, scale in shown],
        }


@dataclass(frozen=True)
class Pictures:
    """PNG files by caption."""

    title: str
    files: Mapping[str, str | Path]

    def shown(self) -> list[dict[str, Any]]:
        """Return the pictures for the template."""
        return [_picture(label, path) for label, path in self.files.items()]


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


Section = Text | Numbers | Table | Images | Pictures | Curves | Panels


def write(path: str | Path, title: str, sections: Iterable[Section], subtitle: str = "") -> Path:
    """Write a page atomically and return its path.

    Args:
        path: The HTML file; its folder is made if needed.
        title: Heading of the page.
        sections: The sections, in order.
        subtitle: A line under the heading.

    Raises:
        InputError: The parts of a section do not fit together, or the file cannot be written.
    """
    import jinja2

    from .. import __version__

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
    )
    environment.filters |= {"show": _text, "kind": lambda section: type(section).__name__}
    page = environment.get_template("report.jinja").render(
        title=title, subtitle=subtitle, version=__version__, sections=list(sections)
    )
    try:
        atomic.write(Path(path), page.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {_one_line(error)}") from error
    return Path(path)


def run_report(
    run_dir: str | Path,
    pictures: Mapping[str, str | Path] | Sequence[str | Path] = (),
    *,
    sections: Sequence[Section] = (),
    path: str | Path | None = None,
) -> Path:
    """Write the page of a learning run (curves, pictures, settings) and return its path.

    Args:
        run_dir: Folder with `config.json` and `metrics.jsonl`. Every numeric key of the metrics is
            drawn over "kimg" (thousands of images seen). Lines that a continued run has written
            again replace the earlier ones, and an incomplete last line is left out.
        pictures: PNG files by caption, or without captions (then the file's name is used).
        sections: Further sections, placed before the curves.
        path: The HTML file; None: `report.html` in the folder.

    Raises:
        InputError: The folder holds no run, or one of its files cannot be read.
    """
    run_dir = Path(run_dir)
    config = read_object(_there(run_dir / "config.json"))
    lines = _read_metrics(run_dir / "metrics.jsonl")
    if not isinstance(pictures, Mapping):
        pictures = {Path(p).stem.replace("_", " "): p for p in pictures}
    page: list[Section] = [Numbers("", _summary(lines)), *sections]
    if pictures:
        page.append(Pictures("Pictures", pictures))
    page += _calibration(run_dir)
    page += _course(lines)
    page.append(Table("Settings", ["setting", "value"], [*_flatten(config)]))
    named = config | (options if isinstance(options := config.get("options"), dict) else {})
    subtitle = " · ".join(str(named[k]) for k in ("method", "objective") if named.get(k))
    return write(path or run_dir / "report.html", run_dir.resolve().name, page, subtitle)


def _calibration(run_dir: Path) -> list[Section]:
    """Return the calibration of the error bars, and what else is known without truth."""
    from ..training.error_bars import read_record

    record = read_record(run_dir)
    if record is None:
        return []
    bins = record.get("bins")
    rows = [
        [kind, *(one.get(key) for key in ("values", "predicted", "error", "standard_error"))]
        for kind, held in (bins.items() if isinstance(bins, dict) else ())
        for one in (held if isinstance(held, list) else ())[:MOST_KEYS]
        if isinstance(one, dict)
    ]
    figures: dict[str, Any] = {"images": record.get("images")}
    for key, label in (("unbiased_psnr", "unbiased PSNR in dB"),):
        if isinstance(pair := record.get(key), dict):
            figures |= {f"{label}, {when}": pair.get(when) for when in ("before", "after")}
    if isinstance(white := record.get("whiteness"), dict):
        figures["largest autocorrelation of the residual"] = white.get("largest")
    figures = {name: value for name, value in figures.items() if value is not None}
    caption = f"Not applied: {record.get('why')}." if not record.get("trusted") else ""
    page: list[Section] = [Numbers("Error bars", figures)]
    if rows or caption:
        columns = ["pixels", "values", "predicted", "error", "standard error"]
        page.append(Table("", columns, rows, caption=caption))
    return page


def _there(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path.parent} holds no run: {path.name} is missing")
    return path


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines in order of kimg; lines of a continued run replace earlier ones."""
    lines: list[dict[str, Any]] = []
    for number, last, line in json_lines(_there(path)):
        if line is None and last:
            break  # an interrupted run left it incomplete
        if line is None or not _is_number(line.get("kimg")) or not 0 <= line["kimg"] <= MOST_KIMG:
            raise InputError(f"{path}, line {number}: no JSON object with 'kimg'")
        if len(line) > MOST_KEYS:
            raise InputError(f"{path}, line {number}: {len(line)} figures, at most {MOST_KEYS}")
        line = {key: _plotted(value) for key, value in line.items()}
        line["kimg"] = kimg = float(line["kimg"])
        while lines and lines[-1]["kimg"] > kimg:
            lines.pop()
        same = lines and lines[-1]["kimg"] == kimg
        lines.append(lines.pop() | line if same else line)
    return lines


def _plotted(value: Any) -> Any:
    """Return a figure that can be drawn: NaN for numbers beyond `LARGE`."""
    return math.nan if _is_number(value) and not abs(value) <= LARGE else value


def _summary(lines: list[dict[str, Any]]) -> dict[str, str]:
    if not lines:
        return {"images seen": "0"}
    last = lines[-1]
    shown = {"images seen": _text(round(1000 * last["kimg"]))}
    if _is_number(last.get("seconds")) and 0 <= last["seconds"] < MOST_SECONDS:
        shown["time"] = str(timedelta(seconds=round(last["seconds"])))
    kept = [line["kimg"] for line in lines if line.get(KEPT) == 1]
    if kept:
        shown["weights kept"] = f"those after {_text(round(1000 * kept[-1]))} images"
    keys = [k for k, v in last.items() if k.startswith(("loss/", "check/")) and _is_number(v)]
    keys = [k for k in keys if k != KEPT]
    return shown | {f"last {k.replace('/', ' ')}": _text(last[k]) for k in keys[:7]}


def _course(lines: list[dict[str, Any]]) -> list[Section]:
    """Return small charts of every numeric key; constant keys are listed instead."""
    keys = dict.fromkeys(k for line in lines for k, v in line.items() if _is_number(v))
    for key in ("kimg", KEPT):
        keys.pop(key, None)
    charts, constant = [], []
    for key in sorted(keys, key=lambda k: (not k.startswith("loss/"), k == "seconds")):
        points = [(line["kimg"], line[key]) for line in lines if _is_number(line.get(key))]
        xs, ys = zip(*points, strict=True)
        finite = [y for y in ys if math.isfinite(y)] or [math.nan]
        if len(ys) > 1 and min(finite) == max(finite):
            constant.append(f"{key} = {_text(ys[-1])}")
            continue
        loss = key.startswith("loss/")
        decades = loss and 0 < 30 * min(finite) < max(
            finite
        )  # otherwise the small values look equal
        curve, smooth = {key: (xs, ys)}, loss and len(ys) > 60
        charts.append(Curves(key, curve, x="kimg", log_y=decades, smooth=smooth))
    words = f"Constant throughout: {', '.join(constant)}." if constant else ""
    return [Panels("Training", charts, words)] if charts or constant else []


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)


def _show(
    column: Column, images: Sequence[Tensor | None]
) -> tuple[list[dict[str, Any] | None], dict[str, str] | None]:
    """Return a column's images for the template, and its scale."""
    values = [None if x is None else _plain(x, column) for x in images]
    together = _extremes([v for v in values if v is not None])
    given = {"unit": (0.0, 1.0), "shared": together, "each": None}
    limits = column.range if isinstance(column.range, tuple) else given[column.range]

    def shown(v: Tensor) -> dict[str, Any]:
        low, high = limits or _extremes([v])
        source = _png((v - low) / ((high - low) or 1.0), column.color)
        return {"source": source, "width": v.shape[2], "height": v.shape[1], "alt": column.label}

    cells = [None if v is None else shown(v) for v in values]
    if limits is None or (column.range == "unit" and not column.color):
        return cells, None
    ramp = _png(torch.linspace(0, 1, 128).view(1, 1, 128), column.color)
    return cells, {"source": ramp, "low": _text(limits[0]), "high": _text(limits[1])}


def _extremes(images: Sequence[Tensor]) -> tuple[float, float]:
    values = torch.cat([image.flatten() for image in images] or [torch.zeros(1)])
    return float(values.min()), float(values.max())


def _plain(image: Tensor, column: Column) -> Tensor:
    if image.ndim != 3:
        shape = tuple(image.shape)
        raise InputError(f"column '{column.label}': images are (C, H, W), got {shape}")
    image = image.detach().float().cpu().nan_to_num(0.0)
    if image.shape[0] not in (1, 3):  # the channels side by side
        image = torch.cat(list(image), -1)[None]
    return image.mean(dim=0, keepdim=True) if column.color else image


def _png(image: Tensor, color: str | None) -> str:
    """Return an image (C, H, W) with values from 0 to 1 as a data URI."""
    import matplotlib
    from PIL import Image

    pixels = image.clamp(0, 1).movedim(0, -1).squeeze(-1).numpy()
    if color and color not in matplotlib.colormaps:
        raise InputError(f"unknown color map '{color}': try magma or viridis")
    if color:
        pixels = matplotlib.colormaps[color](pixels)[..., :3]
    return _data_uri(Image.fromarray((pixels * 255).round().astype("uint8")))


def _picture(label: str, path: str | Path) -> dict[str, Any]:
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            size = {"width": image.width, "height": image.height}
            return {"label": label, "source": _data_uri(image)} | size
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG file
        raise InputError(f"{path} is no PNG picture: {_one_line(error)}") from error


def _data_uri(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """Format a value: 2 decimals from 1 on, 3 below, thousands separated by thin spaces."""
    if not _is_number(value):
        return {None: "", True: "yes", False: "no"}.get(value, str(value))
    size = abs(value)
    if isinstance(value, Integral) or 1000 <= size < 1e6:
        text = f"{value:,.0f}"
    elif 0.01 <= size < 1000:
        text = f"{value:.{2 if size >= 1 else 3}f}"
    else:
        text = f"{value:.3g}"
    return text.replace(",", "\u202f").replace("-", "\u2212")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
