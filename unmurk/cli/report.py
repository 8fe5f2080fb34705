"""Reports: a single self-contained HTML page.

Images are PNG data URIs, shown without interpolation. Curves are inline SVG whose colors follow
the light or dark theme of the page. The page's policy forbids requests, and every script but the
page's own, whose hash it names; a page without `Comparisons` that does not reload has none.

A page is a list of sections, each a frozen dataclass: `Text`, `Commands`, `Numbers`, `Judgement`,
`Table`, `Images`, `Comparisons`, `Pictures`, and the `Curves` and `Panels` of `charts`. `write`
writes a page of them.
"""

import base64
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError, reason
from ..evaluation.verdict import Figure, Verdict
from ..io import atomic
from .charts import Curves, Panels, figure_text, is_number

__all__ = [
    "DIVERGING",
    "Column",
    "Commands",
    "Comparison",
    "Comparisons",
    "Images",
    "Judgement",
    "Numbers",
    "Pictures",
    "Section",
    "Table",
    "Text",
    "write",
]


SCRIPT = """\
for (const slider of document.querySelectorAll(".compare input"))
  slider.addEventListener("input", () =>
    slider.parentElement.style.setProperty("--share", slider.value + "%"));
for (const zoom of document.querySelectorAll(".zoom button"))
  zoom.addEventListener("click", () => {
    document.documentElement.style.setProperty("--zoom", zoom.value);
    for (const other of document.querySelectorAll(".zoom button"))
      other.setAttribute("aria-pressed", String(other.value === zoom.value));
    for (const window of document.querySelectorAll(".map .window"))
      window.tabIndex = zoom.value > 1 ? 0 : -1;
  });
"""
"""What the sliders and the magnification of `Comparisons` need."""

RELOADING = """\
const again = document.querySelector(".again input");
setInterval(() => again.checked && location.reload(), 1000 * again.value);
"""
"""What a page needs that reloads itself as long as its reader lets it."""

DIVERGING = "RdBu_r"  # color map of residuals: everyone can tell its red from its blue
UNSIGNED = {"whiteness", "detail"}  # figures whose lower limit says nothing


@dataclass(frozen=True)
class Text:
    """Paragraphs of plain text; `markupsafe.Markup` may hold HTML."""

    title: str
    paragraphs: str | Sequence[str]


@dataclass(frozen=True)
class Commands:
    """Lines for a terminal, to copy, each with what it does."""

    title: str
    lines: Mapping[str, str]
    """What a command does, and the command."""


@dataclass(frozen=True)
class Numbers:
    """A few important values, shown large, each with its name."""

    title: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Judgement:
    """A verdict: its sentence, what to do, and its figures, each with its explanation."""

    title: str
    verdict: Verdict

    def shown(self) -> list[dict[str, Any]]:
        """Return the figures for the template."""
        return [self._one(figure) for figure in self.verdict.figures]

    def _one(self, figure: Figure) -> dict[str, Any]:
        value = figure.value if figure.limits else bool(figure.value)
        low, high = figure.limits or (-math.inf, math.inf)
        ends = [
            f"{word} {figure_text(end)}"
            for word, end in (("at least", low), ("at most", high))
            if math.isfinite(end) and not (figure.name in UNSIGNED and word == "at least")
        ]
        if figure.passed and figure.value is not None and not low <= figure.value <= high:
            ends[-1:] = [f"{end}, give or take two standard errors" for end in ends[-1:]]
        mark = ("✓", "passed") if figure.passed else ("✗", "failed")
        if value is False and figure.passed:  # only said
            mark = ("–", "not known")
        text = {"value": figure_text(value), "limits": " and ".join(ends)}
        return {"figure": figure, "mark": mark, **text}


@dataclass(frozen=True)
class Table:
    """Rows of cells: strings, numbers, booleans; None leaves a cell empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    best: Mapping[str, Literal["max", "min"]] = field(default_factory=dict)
    """Columns whose highest or lowest number is set in bold."""
    folded: bool = False
    """Whether only the title is shown until the reader opens the table."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise InputError(
                f"table '{self.title}': every row needs {len(self.columns)} cells, one per column"
            )

    def numeric(self) -> list[bool]:
        """Return which columns hold numbers only."""
        columns = ([row[i] for row in self.rows] for i in range(len(self.columns)))
        return [all(v is None or is_number(v) for v in column) for column in columns]

    def winners(self) -> list[float | None]:
        """Return the best number of every column in `best`; None for the others."""
        found: list[float | None] = [None] * len(self.columns)
        for label, rule in self.best.items():
            i = self.columns.index(label)
            finite = [r[i] for r in self.rows if is_number(r[i]) and math.isfinite(r[i])]
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
class Comparison:
    """One image before and after, with a slider between them, and maps beside them."""

    label: str
    before: Tensor
    """Image (C, H, W); channels are shown side by side unless there are 1 or 3."""
    after: Tensor
    maps: Mapping[Column, Tensor] = field(default_factory=dict)
    """Further images, each with how it is shown."""
    range: tuple[float, float] = (0.0, 1.0)
    """Values of `before` and `after` shown as black and white."""


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of several images, large enough to look at; buttons magnify them."""

    title: str
    items: Sequence[Comparison]
    names: tuple[str, str] = ("measured", "restored")
    """What is on the left and on the right of the slider."""
    caption: str = ""

    def shown(self) -> list[dict[str, Any]]:
        """Return the images for the template."""
        return [self._one(item) for item in self.items]

    def _one(self, item: Comparison) -> dict[str, Any]:
        if item.before.shape != item.after.shape:
            raise InputError(
                f"comparison '{item.label}': {tuple(item.before.shape)} before and "
                f"{tuple(item.after.shape)} after differ in size"
            )
        cells = []
        for name, image in zip(self.names, (item.before, item.after), strict=True):
            column = Column(f"{item.label}: {name}", item.range)
            (cell,), _ = _show(column, [image])
            cells.append(cell)
        maps = []
        for column, image in item.maps.items():
            (cell,), scale = _show(column, [image])
            maps.append({"label": column.label, "image": cell, "scale": scale})
        return {"label": item.label, "images": cells, "maps": maps}


@dataclass(frozen=True)
class Pictures:
    """PNG files by caption."""

    title: str
    files: Mapping[str, str | Path]

    def shown(self) -> list[dict[str, Any]]:
        """Return the pictures for the template."""
        return [_picture(label, path) for label, path in self.files.items()]


Section = (
    Text
    | Commands
    | Numbers
    | Judgement
    | Table
    | Images
    | Comparisons
    | Pictures
    | Curves
    | Panels
)


def write(
    path: str | Path,
    title: str,
    sections: Iterable[Section],
    subtitle: str = "",
    reload: int | None = None,
) -> Path:
    """Write a page atomically and return its path.

    Args:
        path: The HTML file; its folder is made if needed.
        title: Heading of the page.
        sections: The sections, in order.
        subtitle: A line under the heading.
        reload: Seconds after which the page reloads itself, unless its reader stops that; None: it
            does not.

    Raises:
        InputError: The parts of a section do not fit together, or the file cannot be written.
    """
    import jinja2
    from markupsafe import Markup

    from .. import __version__

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
    )
    environment.filters |= {"show": figure_text, "kind": lambda section: type(section).__name__}
    sections = list(sections)
    script = SCRIPT if any(isinstance(s, Comparisons) for s in sections) else ""
    script += RELOADING if reload else ""
    page = environment.get_template("report.jinja").render(
        title=title,
        subtitle=subtitle,
        reload=reload,
        version=__version__,
        sections=sections,
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    try:
        atomic.write(Path(path), page.encode())
    except OSError as error:
        raise InputError(f"cannot write {path}: {reason(error)}") from error
    return Path(path)


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
        size = {"width": v.shape[2], "height": v.shape[1]}
        return {"source": source, **size, "alt": f"{column.label}: {_described(v)}".lstrip(": ")}

    cells = [None if v is None else shown(v) for v in values]
    if limits is None or (column.range == "unit" and not column.color):
        return cells, None
    ramp = _png(torch.linspace(0, 1, 128).view(1, 1, 128), column.color)
    return cells, {"source": ramp, "low": figure_text(limits[0]), "high": figure_text(limits[1])}


def _described(image: Tensor) -> str:
    """Describe an image (C, H, W) for a reader who does not see it."""
    low, high = (figure_text(end) for end in _extremes([image]))
    mean, spread = (figure_text(float(v)) for v in (image.mean(), image.std(correction=0)))
    size = f"{image.shape[2]} by {image.shape[1]} pixels"
    return f"{size}, values from {low} to {high}, mean {mean}, standard deviation {spread}"


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
        raise InputError(f"{path} is no PNG picture: {reason(error)}") from error


def _data_uri(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
