"""The page of a learning run, from the files of its folder."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..diffusion.prior import Prior
from ..errors import InputError
from ..evaluation.verdict import Verdict
from ..flows.posterior import Posterior
from ..io.json_files import json_lines, read_object
from ..problem import Problem
from ..tiling import posterior_for
from ..training.examples import Examples
from ..training.run_folder import read_config
from .charts import Curves, Panels, figure_text, is_number
from .data import place
from .report import (
    DIVERGING,
    Column,
    Comparison,
    Comparisons,
    Images,
    Judgement,
    Numbers,
    Pictures,
    Section,
    Table,
    Text,
    write,
)
from .unfinished import RELOAD, course, keep

__all__ = ["drawn", "restored", "run_report", "unfinished"]

DRAWS = 16  # of a posterior mean
NEW = 8  # images in a line of new ones
CAPTION = (
    "Images of the set that differ from each other. Drag the line between what was measured and "
    "what was restored. Black and white are the 0.1 and the 99.9 percentile of the restored "
    "image. The residual, measured minus restored, should look like noise alone: structure in it "
    "was removed with the noise. It is red where the measured image is brighter, blue where it is "
    "darker."
)
KEPT = "check/kept"  # 1 if the figures were the best so far; see training.validation
WAITING_DRAWS = 4  # of a posterior mean while the run trains
WAITING = (
    "The page reloads itself until the run has ended. Then it also shows a verdict, error bars, "
    "new images and curves. To stop early, press Ctrl-C in the terminal, or Stop in the app: what "
    "was learned stays and restores images as it is, and the run can go on later."
)
LONGEST_STEP = 5.0  # between points of a curve, in usual distances; beyond it there is a gap
LARGE = 1e30  # largest figure on a chart
MOST_KIMG, MOST_SECONDS = 1e9, 1e11
MOST_KEYS = 200  # figures of a line, each of which is a chart


def run_report(
    run_dir: str | Path,
    pictures: Mapping[str, str | Path] | Sequence[str | Path] = (),
    *,
    sections: Sequence[Section] = (),
    path: str | Path | None = None,
) -> Path:
    """Write the page of a learning run and return its path.

    The first of `sections` comes first, then the verdict, the summary, the rest, pictures, error
    bars, curves and settings.

    Args:
        run_dir: Folder with `config.json` and `metrics.jsonl`. Every numeric key of the metrics is
            drawn over "kimg" (thousands of images seen). Lines that a continued run has written
            again replace the earlier ones, and an incomplete last line is left out.
        pictures: PNG files by caption, or without captions (then the file's name is used).
        sections: Further sections; see above.
        path: The HTML file; None: `report.html` in the folder.

    Raises:
        InputError: The folder holds no run, or one of its files cannot be read.
    """
    run_dir = Path(run_dir)
    config = read_object(_there(run_dir / "config.json"))
    lines = _read_metrics(run_dir / "metrics.jsonl")
    if not isinstance(pictures, Mapping):
        pictures = {Path(p).stem.replace("_", " "): p for p in pictures}
    found = Verdict.load(run_dir)
    verdict = [] if found is None else [Judgement("Can the result be trusted?", found)]
    first = 1 if sections and isinstance(sections[0], Comparisons) else 0
    page: list[Section] = [*sections[:first], *verdict, Numbers("", _summary(lines))]
    page += sections[first:]
    if pictures:
        page.append(Pictures("Pictures", pictures))
    page += _calibration(run_dir)
    page += _course(lines)
    page.append(Table("Settings", ["setting", "value"], [*_flatten(config)], folded=True))
    named = config | (options if isinstance(options := config.get("options"), dict) else {})
    texts = [str(named[k]) for k in ("method", "objective") if named.get(k)]
    if found is not None:
        texts.append("trusted" if found.trusted else "not trusted: see the verdict")
    subtitle = " · ".join(texts)
    return write(path or run_dir / "report.html", run_dir.resolve().name, page, subtitle)


def restored(run: Path, draws: int = DRAWS) -> Comparisons | None:
    """Return the examples of a run, restored by its posterior, beside what was measured.

    Args:
        run: The run folder.
        draws: Draws of a mean and standard deviation, even.

    Returns:
        The section; None if the run keeps no examples.

    Raises:
        InputError: The posterior or the examples are damaged.
    """
    examples = Examples.load(run)
    if examples is None:
        return None
    white, problem = examples.white(Problem.from_dict(read_config(run)["problem"]))
    posterior, y, white = place(Posterior.load(run), examples.y, white)
    problem = problem.to(y.device)
    shape = problem.operator.x_shape(y.shape)
    tiled = posterior_for(posterior, shape)
    mean, std = (
        torch.cat(parts).cpu()
        for parts in zip(
            *(
                tiled.mean_std(white[i : i + 1], problem.index_select([i]), draws, 0, [number])
                for i, number in enumerate(examples.numbers)
            ),
            strict=True,
        )
    )
    same = tuple(y.shape[1:]) == tuple(mean.shape[1:])
    before = (y if same else problem.A_dagger(white)).cpu()
    maps = {Column("standard deviation", "shared", "magma"): std}
    if same:
        one = examples.weights is not None  # then the noise has one level
        level = problem.sigma if one else problem.deviation(white)
        scaled = problem.residual(mean.to(y), white) / level
        maps[Column("residual in units of the noise", (-3.0, 3.0), DIVERGING)] = scaled.cpu()
    items = []
    for i, number in enumerate(examples.numbers):
        low, high = (float(mean[i].quantile(q)) for q in (0.001, 0.999))
        values = {column: images[i] for column, images in maps.items()}
        ends = (min(low, 0.0) if low < 0.05 else low, max(high, low + 1e-3))
        items.append(Comparison(f"image {number}", before[i], mean[i], values, ends))
    names = ("measured" if same else "pseudo-inverse", "restored")
    return Comparisons("Images of the set", items, names, CAPTION)


def unfinished(run: Path, share: float) -> Path:
    """Write the page of a run that is still training; it reloads itself. Return its path.

    Args:
        run: The run folder, with the models of that share.
        share: Share of the training, 0 to 1.

    Raises:
        InputError: A file of the run is damaged, or the page cannot be written.
    """
    images = restored(run, WAITING_DRAWS) if (run / "posterior" / "config.json").exists() else None
    items = () if images is None else images.items
    keep(run, share, items)
    page: list[Section] = [] if images is None else [images]
    page += [Text("Still learning", WAITING), *course(run, items)]
    subtitle = f"unfinished: {100 * share:.0f} % of its training"
    name = run.resolve().name
    return write(run / "report.html", name, page, subtitle, reload=RELOAD)


def drawn(run: Path) -> list[Section]:
    """Return new images from the prior of a run."""
    new = place(Prior.load(run))[0].sample(2 * NEW).cpu()
    return [Images("Drawn from the prior", [list(new[:NEW]), list(new[NEW:])], tile=84)]


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
        if line is None or not is_number(line.get("kimg")) or not 0 <= line["kimg"] <= MOST_KIMG:
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
    return math.nan if is_number(value) and not abs(value) <= LARGE else value


def _summary(lines: list[dict[str, Any]]) -> dict[str, str]:
    if not lines:
        return {"images seen": "0"}
    last = lines[-1]
    shown = {"images seen": figure_text(round(1000 * last["kimg"]))}
    if is_number(last.get("seconds")) and 0 <= last["seconds"] < MOST_SECONDS:
        shown["time"] = str(timedelta(seconds=round(last["seconds"])))
    kept = [line["kimg"] for line in lines if line.get(KEPT) == 1]
    if kept:
        shown["weights kept"] = f"those after {figure_text(round(1000 * kept[-1]))} images"
    keys = [k for k, v in last.items() if k.startswith(("loss/", "check/")) and is_number(v)]
    keys = [k for k in keys if k != KEPT]
    return shown | {f"last {k.replace('/', ' ')}": figure_text(last[k]) for k in keys[:7]}


def _course(lines: list[dict[str, Any]]) -> list[Section]:
    """Return small charts of every numeric key; constant keys are listed instead."""
    keys = dict.fromkeys(k for line in lines for k, v in line.items() if is_number(v))
    for key in ("kimg", "seconds", KEPT):
        keys.pop(key, None)
    charts, constant = [], []
    ends = (0.0, max(line["kimg"] for line in lines)) if lines else None
    for key in sorted(keys, key=lambda k: not k.startswith("loss/")):
        points = [(line["kimg"], line[key]) for line in lines if is_number(line.get(key))]
        xs, ys = _parted(points)
        finite = [y for y in ys if math.isfinite(y)] or [math.nan]
        if len(ys) > 1 and min(finite) == max(finite):
            constant.append(f"{key} = {figure_text(ys[-1])}")
            continue
        loss = key.startswith("loss/")
        decades = loss and 0 < 30 * min(finite) < max(
            finite
        )  # otherwise the small values look equal
        curve, smooth = {key: (xs, ys)}, loss and len(ys) > 60
        charts.append(Curves(key, curve, x="kimg", log_y=decades, smooth=smooth, x_range=ends))
    words = f"Constant throughout: {', '.join(constant)}." if constant else ""
    return [Panels("Training", charts, words)] if charts or constant else []


def _parted(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return a curve with a gap wherever the figure was absent for a while.

    A part that was not trained for a time has no figure there, and a line across would claim one.
    """
    steps = sorted(b[0] - a[0] for a, b in zip(points, points[1:], strict=False))
    usual = steps[len(steps) // 2] if steps else 0.0
    xs, ys = [], []
    for i, (x, y) in enumerate(points):
        if i and x - points[i - 1][0] > LONGEST_STEP * usual:
            xs.append((x + points[i - 1][0]) / 2)
            ys.append(math.nan)
        xs.append(x)
        ys.append(y)
    return xs, ys


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)
