"""Restoring files one after another: whose turn, what is finished, what is written.

Results stand beside each other in a folder, with a line in its `unmurk.jsonl` for each file that
is finished: its name, number and size, and the settings it was made with. The same command
leaves out what has such a line, so it can be stopped at any time; other settings are refused.

Processes share the work without talking to each other: process RANK of WORLD_SIZE, the variables
that torchrun and accelerate launch set, takes every WORLD_SIZE-th file. Small images are worked on
together; a result does not depend on which, as every draw goes by the image's number.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .atomic import finished, part_of, write
from .formats import tiff
from .formats.pictures import Nan, check_finite, encode_picture, open_pages
from .images import pictures_in, stems, written_scale
from .json_files import json_lines
from .scale import Scale, Spans

__all__ = ["Engine", "Job", "Summary", "jobs_of", "process", "ranks"]

TOGETHER = 64  # images worked on at once
PIXELS = 2**20  # and so many pixels

Engine = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""Measurements (B, C, H, W) and the images' numbers -> "images" (B, C, H, W), and what else is to
be written, arrays (.., B, C, H, W) by name."""


Key = tuple[str, int, int]
"""A file's name, the number of its first image, its bytes."""


@dataclass(frozen=True)
class Job:
    """One file to restore.

    Attributes:
        file: Where it is.
        number: Number of its first image among those of all files.
        pages: Images in it.
        out: Where the restored one goes.
    """

    file: Path
    number: int
    pages: int
    out: Path

    def key(self) -> Key:
        """What it goes by in the log."""
        size = self.file.stat().st_size if self.file.exists() else 0  # a link may lead nowhere
        return self.file.name, self.number, size

    def beside(self, name: str) -> Path:
        """Where an array that comes with it goes."""
        return self.out.with_name(f"{self.out.stem}-{name}.npy")


@dataclass
class Summary:
    """What a process did.

    Attributes:
        images: How many it restored.
        before: How many of its share were finished before.
        skipped: Files that were left out, and why.
    """

    images: int = 0
    before: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def ranks() -> tuple[int, int]:
    """Number of this process, and how many there are.

    Raises:
        InputError: RANK and WORLD_SIZE that do not fit each other.
    """
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    rank, size = (int(text) if text.isdigit() else -1 for text in texts)
    if not 0 <= rank < size:
        raise InputError(f"RANK={texts[0]} and WORLD_SIZE={texts[1]}: give 0 <= RANK < WORLD_SIZE")
    return rank, size


def jobs_of(path: Path, out: Path, skip_bad: bool = False) -> list[Job]:
    """The files of a folder, or one file; `out` is a folder, or a file's name for one.

    Raises:
        InputError: nothing there, or a file that cannot be read and is not to be skipped.
    """
    if not path.exists() and not path.is_symlink():
        raise InputError(f"there is nothing at {path}")
    files = pictures_in(path) if path.is_dir() else [path]
    names = [
        stem + (file.suffix if _is_tiff(file) else ".png")
        for stem, file in zip(stems([file.name for file in files]), files, strict=True)
    ]
    single = out.suffix.lower() in (".png", *tiff.ENDINGS) and not out.is_dir()
    if single and len(files) > 1:
        raise InputError(f"{out} can hold one image, not {len(files)}; give a folder")
    jobs, number = [], 0
    for file, name in zip(files, names, strict=True):
        pages = _pages(file, skip_bad)
        if single and pages > 1 and not _is_tiff(out):
            raise InputError(f"{out} can hold one image, not {pages}; give a .tif file")
        jobs.append(Job(file, number, pages, out if single else out / name))
        number += pages
    return jobs


def process(
    jobs: Sequence[Job],
    engine: Engine,
    settings: dict[str, Any],
    *,
    log: Path | None,
    span: Spans = None,
    skip_bad: bool = False,
    nan: Nan = "refuse",
) -> Summary:
    """Restore this process's share of some files.

    Args:
        jobs: All files, of all processes.
        engine: What restores a batch.
        settings: What the results depend on, fit for JSON.
        log: The folder's log; None for a single file, which is always made.
        span: Numbers of black and white in the files; None: see `Scale`.
        skip_bad: Whether files that cannot be read are left out.
        nan: "mask" hands numbers that are not finite on to the engine.

    Raises:
        InputError: unreadable files, results of other settings in the folder, or a full disk.
    """
    rank, size = ranks()
    mine = list(jobs)[rank::size]
    done = set() if log is None else _finished(log, settings)
    left = [job for job in mine if job.key() not in done or not job.out.exists()]
    summary = Summary(before=sum(job.pages for job in mine) - sum(job.pages for job in left))
    sink: Sink | None = None
    try:
        for group in _groups(_pages_of(left, span, skip_bad, nan, summary.skipped)):
            y = torch.stack([page.image for page in group])
            found = engine(y, [page.job.number + page.place for page in group])
            parts = {name: value.cpu() for name, value in found.items()}
            for row, page in enumerate(group):
                if sink is not None and sink.job is not page.job:
                    sink.abandon()  # its file turned out bad half-way
                    sink = None
                if page.job.file.name in summary.skipped:
                    continue
                sink = sink or Sink(page.job, page.scale)
                sink.write({name: value[..., row, :, :, :] for name, value in parts.items()})
                summary.images += 1
                if sink.full:
                    sink.close()
                    sink = None
                    if log is not None:
                        _append(log, page.job, settings)
    except OSError as error:
        name = error.filename or (sink.job.out if sink else "the results")
        raise InputError(f"cannot write {name}: {error.strerror or error}") from error
    finally:
        if sink is not None:
            sink.abandon()
    return summary


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """One image of a file: (C, H, W) in units of [0, 1]."""

    job: Job
    place: int
    image: Tensor
    scale: Scale


def _is_tiff(file: Path) -> bool:
    return file.suffix.lower() in tiff.ENDINGS


def _pages(file: Path, skip_bad: bool) -> int:
    if not _is_tiff(file):
        return 1
    try:
        with open_pages(file) as pages:
            return len(pages)
    except InputError:
        if skip_bad:
            return 1
        raise


def _pages_of(
    jobs: Sequence[Job], span: Spans, skip_bad: bool, nan: Nan, skipped: dict[str, str]
) -> Iterator[Page]:
    """The images of files in order. A file that turns out bad half-way is put into `skipped`."""
    for job in jobs:
        try:
            yield from _read(job, span, nan)
        except InputError as error:
            if not skip_bad:
                raise
            skipped[job.file.name] = str(error)


def _read(job: Job, span: Spans, nan: Nan) -> Iterator[Page]:
    with open_pages(job.file) as pages:
        scale = Scale.of(pages.dtype, span, pages.bits)
        for place in range(len(pages)):
            where = str(job.file) if len(pages) == 1 else f"page {place} of {job.file}"
            pixels = check_finite(pages.read(place), where, nan)
            yield Page(job, place, scale.from_file(np.moveaxis(pixels, -1, 0)), scale)


def _groups(pages: Iterator[Page]) -> Iterator[list[Page]]:
    """Neighbours of one shape, as many as are worked on together."""
    group: list[Page] = []
    for page in pages:
        pixels = page.image.shape[-2] * page.image.shape[-1]
        room = max(1, min(TOGETHER, PIXELS // pixels))
        if group and (page.image.shape != group[0].image.shape or len(group) >= room):
            yield group
            group = []
        group.append(page)
    if group:
        yield group


# -- writing --------------------------------------------------------------------------------------


class Sink:
    """Writes one file's results, page by page; `close` gives all of them their names.

    Args:
        job: The file.
        scale: How its numbers were read.
    """

    def __init__(self, job: Job, scale: Scale) -> None:
        self.job, self.place = job, 0
        self.scale = scale if _is_tiff(job.out) else written_scale("png", scale)
        self._open = ExitStack()
        self._stack: tiff.StackWriter | None = None
        self._arrays: dict[str, np.memmap] = {}
        job.out.parent.mkdir(parents=True, exist_ok=True)
        if _is_tiff(job.out):
            source = tiff.Stack(job.file) if _is_tiff(job.file) else None
            like = None if source is None else self._open.enter_context(source)
            self._stack = tiff.StackWriter(job.out, like)

    @property
    def full(self) -> bool:
        """Whether all pages are written."""
        return self.place == self.job.pages

    def write(self, found: dict[str, Tensor]) -> None:
        """The next page: "images" (C, H, W), and arrays (.., C, H, W) by name."""
        image = found["images"]
        if not bool(image.isfinite().all()):
            raise InputError(f"the restored {self.job.file.name} has values that are not finite")
        pixels = np.moveaxis(self.scale.to_file(image), 0, -1)
        if self._stack is None and len(image) not in (1, 3):
            raise InputError(f"{self.job.out}: a PNG has 1 or 3 channels, not {len(image)}")
        if self._stack is None:
            write(self.job.out, encode_picture(pixels))
        else:
            self._stack.write(pixels)
        for name, value in found.items():
            if name != "images":
                self._array(name, value)[..., self.place, :, :, :] = value.numpy()
        self.place += 1

    def _array(self, name: str, value: Tensor) -> np.memmap:
        if name not in self._arrays:
            self._arrays[name] = np.lib.format.open_memmap(
                part_of(self.job.beside(name)),
                "w+",
                np.float32,
                (*value.shape[:-3], self.job.pages, *value.shape[-3:]),
            )
        return self._arrays[name]

    def close(self) -> None:
        """Everything gets its name."""
        for name in list(self._arrays):
            self._arrays.pop(name).flush()
            finished(part_of(self.job.beside(name)), self.job.beside(name))
        if self._stack is not None:
            self._stack.close()
        self._open.close()

    def abandon(self) -> None:
        """Nothing is left behind."""
        for name in list(self._arrays):
            self._arrays.pop(name)
            part_of(self.job.beside(name)).unlink(missing_ok=True)
        if self._stack is not None:
            self._stack.abandon()
        self._open.close()


# -- the log --------------------------------------------------------------------------------------


def _finished(log: Path, settings: dict[str, Any]) -> set[Key]:
    """The files that the log says are finished.

    Raises:
        InputError: if one was made with other settings.
    """
    if not log.exists():
        return set()
    found = set()
    for _, _, entry in json_lines(log):
        try:
            assert entry is not None
            key, made = (entry["file"], entry["number"], entry["bytes"]), dict(entry["settings"])
            hash(key)
        except (AssertionError, ValueError, TypeError, KeyError):  # a line that was cut short
            continue
        other = [name for name in {**made, **settings} if made.get(name) != settings.get(name)]
        if other:
            raise InputError(
                f"{log.parent} holds images made with another {other[0]}: give another --out, or "
                "the same options to go on"
            )
        found.add(key)
    return found


def _append(log: Path, job: Job, settings: dict[str, Any]) -> None:
    """One more line. (Several processes may append: one short write each.)"""
    name, number, size = job.key()
    entry = {"file": name, "number": number, "bytes": size, "settings": settings}
    with log.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = end > 0 and file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n")
