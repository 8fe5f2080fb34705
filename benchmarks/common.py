"""Shared parts of the benchmark suites: options, resumable rows, provenance, tables and pages.

A suite is a folder below `benchmarks/`. Its `run.py` measures and writes one JSON file,
OUT/SUITE-PROFILE.json (OUT/SUITE.json if the suite has no profiles). Its `page.md.jinja` renders
that file as a page. Published results are copies:

    cp OUT/SUITE*.json benchmarks/results/
    cp OUT/SUITE*.png docs/images/              # if the license of the images permits it
    python benchmarks/SUITE/run.py --table      # renders docs/results/PAGE.md

Every JSON file starts with a header (see `Suite.store`): the suite, the command, the settings, the
seed, the commit, the date, the hardware and the versions of the software. A maintainer may add the
field "note", a sentence that the page shows: what is missing, or what has changed since.
"""

import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import safetensors.torch
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from unmurk.errors import InputError
from unmurk.io.atomic import write as write_atomically

__all__ = [
    "IMAGES",
    "PAGES",
    "RESULTS",
    "ROOT",
    "Column",
    "CommonOptions",
    "DataOptions",
    "Row",
    "Suite",
    "begin_process",
    "cells",
    "draw_sheet",
    "hardware",
    "in_new_process",
    "markdown",
    "memory_in_use",
    "metrics",
    "peak_memory",
    "process_status",
    "provenance",
    "read_row",
    "read_tensors",
    "reset_peak_memory",
    "run_rows",
    "save_sheet",
    "stored_row",
    "synchronized_time",
    "tabulate",
    "write_json",
    "write_tensors",
]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"
WIDTH = 98  # of the lines of prose in a page

Row = dict[str, Any]
OptionsType = TypeVar("OptionsType", bound="CommonOptions")


# -- options and the command line -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options that every suite has."""

    out: Path | None = None
    """Folder for rows, results and pictures."""
    seed: int = 0
    """Seed of all random draws."""
    table: bool = False
    """Render the page from benchmarks/results/ and run nothing."""

    @property
    def folder(self) -> Path:
        """The folder for the results; raises InputError if there is none."""
        if self.out is None:
            raise InputError("no folder for the results: give --out OUT, or --table")
        return self.out


@dataclass(frozen=True, kw_only=True)
class DataOptions(CommonOptions):
    """Options of a suite whose images are not in the package."""

    data: Path | None = None
    """Folder of the image sets; the script's first lines, or sets.py beside it, describe it."""

    @property
    def data_folder(self) -> Path:
        """The folder of the image sets; raises InputError if there is none."""
        if self.data is None:
            raise InputError("no images: give --data DIR")
        return self.data


@dataclass(frozen=True)
class Suite:
    """A benchmark suite.

    Attributes:
        name: Its folder below `benchmarks/`, and the stem of its results.
        view: Compute what the template shows of one result, as keyword arguments. The template
            sees the result itself as `result`.
        page: Name of its page below docs/results/; None if the suite has no published page.
        arguments: Arguments of the command, as the page shows them.
        profiles: Profiles whose results are published, in the order of the page.
    """

    name: str
    view: Callable[[Row], Row]
    page: str | None = None
    arguments: str = "--out OUT"
    profiles: tuple[str, ...] = ()

    @property
    def page_file(self) -> Path:
        """The published page."""
        return PAGES / f"{self.page}.md"

    def stem(self, profile: str | None = None) -> str:
        """The name of the results of a profile, without suffix."""
        return self.name if profile is None else f"{self.name}-{profile}"

    def file(self, options: CommonOptions, end: str = ".json") -> Path:
        """OUT/SUITE-PROFILE followed by an end: the file of the results, or of a picture."""
        return options.folder / f"{self.stem(getattr(options, 'profile', None))}{end}"

    def store(self, options: CommonOptions, settings: Row, **figures: Any) -> Row:
        """Put the header before some figures and write them to OUT/SUITE-PROFILE.json.

        Args:
            options: The options of the run.
            settings: All settings, other than the profile's name and the seed, that decide the
                figures.
            figures: The figures, by their fields.

        Returns:
            The content of the file.
        """
        result = self.header(options, settings) | figures
        write_json(self.file(options), result)
        return result

    def header(self, options: CommonOptions, settings: Row) -> Row:
        """The fields that every JSON file of results starts with; see `store`."""
        profile = getattr(options, "profile", None)
        start = {"suite": self.name, "command": self.command(profile)}
        named = {} if profile is None else {"profile": profile}
        return start | {"settings": named | settings, "seed": options.seed} | provenance()

    def command(self, profile: str | None = None) -> str:
        """The command that makes the results of a profile."""
        end = "" if profile is None else f" --profile {profile}"
        return f"python benchmarks/{self.name}/run.py {self.arguments}{end}"

    def published(self, folder: Path = RESULTS) -> list[Row]:
        """The published results; raises InputError if there are none."""
        files = [folder / f"{self.stem(profile)}.json" for profile in self.profiles or (None,)]
        found = [json.loads(file.read_text()) for file in files if file.exists()]
        if not found:
            source = f"{self.name}*.json"
            raise InputError(f"no results of {self.name} in {folder}: copy OUT/{source} there")
        return found

    def render(self, results: Sequence[Row]) -> str:
        """The page of some results."""
        shown = [(result, {"result": result} | self.view(result)) for result in results]
        template = _environment().get_template(f"{self.name}/page.md.jinja")
        text = template.render(suite=self, shown=shown, provenance=_provenance_table(results))
        parts = re.split(r"(```.*?```)", text, flags=re.DOTALL)  # code keeps its blank lines
        parts[::2] = (re.sub(r"\n{3,}", "\n\n", part) for part in parts[::2])
        return "".join(parts).strip() + "\n"

    def main(self, options_type: type[OptionsType], measure: Callable[[OptionsType], Row]) -> int:
        """Run the command line: measure and print the page, or render the published page.

        Returns:
            The exit status: 0, or 2 after one line on an error of the user.
        """
        options = tyro.cli(options_type, config=(tyro.conf.FlagCreatePairsOff,))
        try:
            if options.table:
                write_atomically(self.page_file, self.render(self.published()).encode())
            elif options.folder:  # there is no measurement without a folder for it
                print(self.render([measure(options)]), end="")
        except InputError as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 2
        return 0


# -- provenance -----------------------------------------------------------------------------------


def provenance() -> dict[str, Any]:
    """The commit, the date, the hardware and the software of this process."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": {"cpu": _cpu(), "threads": torch.get_num_threads(), "gpu": gpu},
        "software": {"torch": torch.__version__, "python": platform.python_version()},
    }


def _commit() -> str | None:
    """The commit of this code, with "-dirty" after changes; None outside a repository."""
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu() -> str:
    """The model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


# -- rows -----------------------------------------------------------------------------------------


def write_json(path: Path, values: Row) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())


def read_row(file: Path, settings: Row | None = None) -> Row | None:
    """Read a finished row; None if the file does not exist.

    Args:
        file: The row's JSON file.
        settings: The settings that the row must have been made with; None: any.

    Raises:
        InputError: The row was made with other settings.
    """
    if not file.exists():
        return None
    row = json.loads(file.read_text())
    if settings is not None and row["settings"] != json.loads(json.dumps(settings)):
        raise InputError(f"{file} was made with other settings: give another --out")
    return row


def stored_row(file: Path, make: Callable[[], Row], settings: Row | None = None) -> Row:
    """Read a row without its settings; a row that is missing is made, written and printed first.

    Args:
        file: The row's JSON file.
        make: Returns the figures of the row.
        settings: As for `read_row`.

    Raises:
        InputError: The row was made with other settings.
    """
    row = read_row(file, settings)
    if row is None:
        row = make()
        print(row, file=sys.stderr, flush=True)
        row |= {} if settings is None else {"settings": settings}
        write_json(file, row)
    return {key: value for key, value in row.items() if key != "settings"}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors by name atomically, as safetensors."""
    whole = {key: value.contiguous() for key, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(whole))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors that `write_tensors` wrote."""
    return safetensors.torch.load_file(path)


def metrics(run: Path) -> list[Row]:
    """The lines of metrics.jsonl of a run folder."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_rows(
    do: Callable[[Any, Any], Any], tasks: Sequence[Any], options: Any, jobs: int, label: str = ""
) -> list[Any]:
    """Call do(task, options) for every task in new processes; return the rows and count them.

    On a GPU there is one process; on a CPU each process has one thread.

    Args:
        do: Returns the row of a task; it runs the task if no row is stored.
        tasks: The tasks, in the order in which they are begun.
        options: The options of the suite.
        jobs: Number of processes on a CPU.
        label: Text before each count.
    """
    jobs = 1 if torch.cuda.is_available() else jobs
    rows, began = list[Any](), time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_use_one_thread) as pool:
        for row in pool.map(do, tasks, [options] * len(tasks)):
            rows.append(row)
            text = f"{label}{len(rows)}/{len(tasks)} ({time.perf_counter() - began:.0f} s)"
            print(text, file=sys.stderr, flush=True)
    return rows


def in_new_process(do: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a process of its own, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(do, *arguments).result()


def begin_process(arguments: Sequence[str], folder: Path | None = None) -> subprocess.Popen:
    """Begin a Python process of one thread that imports this checkout; what it prints is piped."""
    paths = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def _use_one_thread() -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)


# -- time and memory ------------------------------------------------------------------------------


def synchronized_time() -> float:
    """The time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak_memory() -> None:
    """Set the peak memory to the memory in use, where the system can (Linux, CUDA)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def memory_in_use() -> float:
    """Memory in use, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return process_status("VmRSS")


def peak_memory() -> float:
    """Peak memory since `reset_peak_memory`, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return process_status("VmHWM")


def process_status(key: str) -> float:
    """A line of /proc/self/status in MiB; on other systems the peak memory of the process."""
    file = Path("/proc/self/status")
    if not file.exists():
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    lines = (line.split() for line in file.read_text().splitlines())
    return next(int(words[1]) / 1024 for words in lines if words[0] == key + ":")


# -- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        title: Its heading.
        key: The field of a row that it shows.
        form: The format of its figures.
        merit: The larger the better; None if the column is no measure of quality.
        combine: How the figures of several rows become one.
    """

    title: str
    key: str
    form: str = "{}"
    merit: Callable[[float], float] | None = None
    combine: Callable[[Sequence[float]], float] = max

    def text(self, value: Any) -> str:
        """A figure as text; empty for None."""
        return "" if value is None else self.form.format(value)


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, str]:
    """One figure for each column, combined over the rows; none where a row lacks it."""
    return {
        column.title: column.text(column.combine([row[column.key] for row in rows]))
        for column in columns
        if rows and all(row.get(column.key) is not None for row in rows)
    }


def tabulate(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table from lines of {heading: cell}; the fullest line gives the headings."""
    heads = list(max(lines, key=len, default={}))
    return markdown([heads, *([line.get(head, "") for head in heads] for line in lines)])


def markdown(lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first line holds the headings, the first column the labels."""
    rule = ["---", *("---:" for _ in lines[0][1:])]
    return "\n".join(
        "| " + " | ".join(map(str, line)) + " |" for line in [lines[0], rule, *lines[1:]]
    )


# -- pages ----------------------------------------------------------------------------------------


@cache
def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "benchmarks"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    found.filters |= {"fill": _fill, "picture": _picture}
    return found


def _fill(text: str) -> str:
    """Wrap the paragraphs and bullets of a text; leave tables and headings alone."""
    return "\n\n".join(_fill_block(block) for block in re.split(r"\n\s*\n", text.strip()))


def _fill_block(block: str) -> str:
    if block.startswith(("|", "#", "```", "![")):
        return block
    return "\n".join(map(_fill_item, re.split(r"\n(?=- )", block)))


def _fill_item(item: str) -> str:
    # a line that begins with a number and a point, or a sign, would begin a list, and one that
    # begins with % would be a comment: keep it together
    text = re.sub(r" (?=(\d+[.)]|[-+*#>|%]+)([ ,.;:)]|$))", "\0", " ".join(item.split()))
    indent = "  " if item.startswith("- ") else ""
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent=indent, break_long_words=False)
    wrapper.break_on_hyphens = False
    return wrapper.fill(text).replace("\0", " ")


def _picture(stem: str, text: str) -> str:
    """A link to a published picture; empty if it does not exist."""
    file = IMAGES / f"{stem}.png"
    return f"![{text}]({os.path.relpath(file, PAGES)})" if file.exists() else ""


def hardware(row: Row) -> str:
    """The hardware of a result or a row, as text."""
    made = row["hardware"]
    plural = "s" if made["threads"] != 1 else ""
    return f"{made['cpu']}, {made['threads']} thread{plural}, {made['gpu'] or 'no GPU'}"


def _provenance_table(results: Sequence[Row]) -> str:
    """Where the figures come from, a column for each result."""
    lines = [["figures", *(result["settings"].get("profile", "") for result in results)]]
    lines.append(["command", *(f"`{result['command']}`" for result in results)])
    lines.append(["commit", *(str(result["commit"]) for result in results)])
    lines.append(["hardware", *map(hardware, results)])
    versions = ("torch {torch}, Python {python}".format(**r["software"]) for r in results)
    lines.append(["software", *versions])
    lines.append(["date", *(result.get("date") or "unknown" for result in results)])
    lines.append(["seed", *(str(result["seed"]) for result in results)])
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


# -- pictures -------------------------------------------------------------------------------------


def draw_sheet(
    axes: Any,
    tiles: Sequence[Sequence[Tensor | None]],
    columns: Sequence[str],
    labels: Sequence[str] = (),
    **text: Any,
) -> None:
    """Draw images as a grid with titles.

    Args:
        axes: The axes of matplotlib.
        tiles: Lines of images (C, H, W) in [0, 1] of one size, C = 1 or 3; None: no image.
        columns: Titles of the columns.
        labels: Labels of the lines.
        text: Options of the titles of the columns, such as fontsize.
    """
    size = next(x for line in tiles for x in line if x is not None).shape[-2:]
    blank = torch.ones(1, *size)
    lines = []
    for line in tiles:
        images = ((blank if x is None else x).float().clamp(0, 1) for x in line)
        lines.append(torch.cat([_framed(image) for image in images], 2))
    axes.imshow(torch.cat(lines, 1).movedim(0, -1).numpy(), interpolation="nearest")
    height, width = (n + 2 for n in size)
    axes.set_xticks([width * (i + 0.5) for i in range(len(columns))], columns, **text)
    axes.set_yticks([height * (i + 0.5) for i in range(len(labels))], labels, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def save_sheet(
    path: Path,
    tiles: Sequence[Sequence[Tensor | None]],
    columns: Sequence[str],
    labels: Sequence[str] = (),
    *,
    size: tuple[float, float],
    dpi: int,
    **text: Any,
) -> None:
    """Draw a grid of images with the titles above it to a file; see `draw_sheet`.

    Args:
        path: The file.
        tiles: As for `draw_sheet`.
        columns: As for `draw_sheet`.
        labels: As for `draw_sheet`.
        size: Width and height of the picture in inches.
        dpi: Pixels of the picture in an inch.
        text: As for `draw_sheet`.
    """
    from matplotlib.figure import Figure

    figure = Figure(size, dpi, layout="constrained")
    axes = figure.subplots()
    draw_sheet(axes, tiles, columns, labels, **text)
    axes.xaxis.tick_top()
    figure.savefig(path, bbox_inches="tight")


def _framed(image: Tensor) -> Tensor:
    """An image in color, with a white frame of one pixel."""
    return F.pad(image, (1,) * 4, value=1.0).expand(3, -1, -1)
