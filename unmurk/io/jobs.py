"""Restoring picture files one after another, so that a stopped command can be continued.

The results go into one folder, with a line in its `unmurk.jsonl` for each finished file (see
`ledger`). The same command skips files with such a line, so it can be stopped at any time; a
command with other settings is refused.

Processes share the work without communication: process RANK of WORLD_SIZE (the variables that
torchrun and accelerate launch set) takes every WORLD_SIZE-th file. Small images are processed in
batches. A result does not depend on its batch, because every random draw depends on the number of
the image.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..progress import Parts
from .formats import tiff
from .formats.pictures import Nan, bad_pixels, check_finite, open_pages
from .formats.registry import Writer
from .formats.writing import is_png, is_tiff, writer_for
from .images import hidden
from .job_list import STD, Job, changed_formats, jobs_of, scene_jobs
from .ledger import Ledger
from .locks import ranks
from .saving import written_scale
from .scale import Scale, Spans, narrowed, span_for
from .streams import NpyWriter

__all__ = [
    "Engine",
    "Job",
    "Summary",
    "changed_formats",
    "jobs_of",
    "process",
    "ranks",
    "scene_jobs",
    "together",
]

TOGETHER = 256  # files, and images, of a batch
PIXELS = 2**20  # pixels of a batch
STRIP = 2**22  # numbers that are converted for a file at once

Engine = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""Maps measurements (B, C, H, W), or all captures of scenes (B, N, C, H, W), and their numbers to
"images" (B, C, H, W) and further arrays (.., B, C, H, W) by name; "std" is the standard deviation
of each pixel."""


@dataclass
class Summary:
    """What a process did.

    Attributes:
        images: Number of images that it restored.
        before: Number of images of its share that were finished before.
        skipped: Files that were left out, and why.
        clipped: Fraction of the numbers that lay outside the range of their files.

    >>> from pathlib import Path
    >>> from unmurk.io.saving import save_images
    >>> good, bad = save_images(torch.full((2, 1, 4, 6), 0.6), "one-bad", format="png")
    >>> _ = bad.write_bytes(b"cut short")
    >>> jobs = jobs_of(Path("one-bad"), Path("doubled"))
    >>> summary = process(jobs, lambda y, numbers: {"images": 2 * y}, skip_bad=True)
    >>> summary.images, summary.clipped, list(summary.skipped)
    (1, 1.0, ['00001.png'])
    """

    images: int = 0
    before: int = 0
    clipped: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)


def together(pixels: int, batch: int | None = None, copies: int = 1) -> int:
    """Return the batch size for images of one size.

    Args:
        pixels: Height times width.
        batch: The user's choice; None: up to `TOGETHER` images and `PIXELS` pixels.
        copies: Samples of each image that are processed together.

    >>> together(28 * 28), together(1024 * 1024), together(28 * 28, batch=4)
    (256, 1, 4)
    """
    return batch or max(1, min(TOGETHER, PIXELS // (pixels * copies)))


def process(
    jobs: Sequence[Job],
    engine: Engine,
    *,
    ledger: Ledger | None = None,
    arrays: Sequence[str] = (),
    span: Spans = None,
    skip_bad: bool = False,
    nan: Nan = "refuse",
    batch: int | None = None,
    copies: int = 1,
    history: str = "",
) -> Summary:
    """Restore this process's share of a set of files.

    Args:
        jobs: All files, of all processes.
        engine: Restores a batch.
        ledger: The log of the results and the settings that they depend on; None: every result is
            computed again.
        arrays: Names of the arrays that come with each file.
        span: Numbers of black and white in the files; None: see `Scale`.
        skip_bad: Whether files that cannot be read are left out.
        nan: "mask" passes numbers that are not finite on to the engine.
        batch, copies: See `together`.
        history: A line about the origin of the results, for formats that hold one.

    Raises:
        InputError: A file is unreadable, a file of someone else or a result of other settings is
            in the place of a result, or the disk is full.

    >>> from pathlib import Path
    >>> from unmurk.io.images import load_images
    >>> from unmurk.io.saving import save_images
    >>> files = save_images(torch.full((2, 1, 4, 6), 0.2), "dim", format="png")
    >>> jobs = jobs_of(Path("dim"), Path("inverted"))
    >>> done = process(jobs, lambda y, numbers: {"images": 1 - y})
    >>> done.images, round(load_images("inverted").images.mean().item(), 4)
    (2, 0.8)
    """
    rank, size = ranks()
    mine = list(jobs)[rank::size]
    names = {job.out: [*(job.beside(name).name for name in arrays), job.out.name] for job in mine}
    left = mine
    if ledger is not None:
        left = [job for job in mine if not ledger.finished(job.key(), names[job.out])]
        for job in left:
            ledger.check(names[job.out])
    summary = Summary(before=sum(job.pages for job in mine) - sum(job.pages for job in left))
    wanted = {job.out for job in left}

    def groups() -> Iterator[list[Page]]:
        """Batches of images. Rounding depends on the batch, so a continued command forms the
        batches that the uninterrupted one would have formed."""
        for block in (mine[i : i + TOGETHER] for i in range(0, len(mine), TOGETHER)):
            if any(job.out in wanted for job in block):
                pages = _pages_of(block, span, skip_bad, nan, summary.skipped)
                yield from _groups(pages, batch, copies)

    sink: Sink | None = None
    reached, total = 0, sum(job.pages for job in left)
    try:
        with Parts() as work:
            for group in groups():
                if not any(page.job.out in wanted for page in group):
                    continue
                work.advance(reached, total, len(group))
                reached += len(group)
                y = group[0].image[None]  # one page may be most of the memory: it is not copied
                if len(group) > 1:
                    y = torch.stack([page.image for page in group])
                found = engine(y, [page.job.number + page.place for page in group])
                parts = {name: value.cpu() for name, value in found.items()}
                del y, found
                for place, page in enumerate(group):
                    if sink is not None and sink.job is not page.job:
                        sink.abandon()  # its file turned out bad half-way
                        sink = None
                    if page.job.file.name in summary.skipped or page.job.out not in wanted:
                        continue
                    sink = sink or Sink(page.job, page.scale, history)
                    sink.write({name: value[..., place, :, :, :] for name, value in parts.items()})
                    summary.clipped *= summary.images / (summary.images + 1)
                    summary.images += 1
                    summary.clipped += sink.clipped / summary.images
                    if sink.full:
                        _close(sink, ledger, names[page.job.out])
                        sink = None
            work.advance(total, total)
    finally:
        if sink is not None:
            sink.abandon()
    return summary


def _close(sink: "Sink", ledger: Ledger | None, names: list[str]) -> None:
    """Give the results of a file their names, between two lines of the log."""
    if ledger is not None:
        ledger.begin(names)
    sink.close()
    if ledger is not None:
        ledger.end(sink.job.key(), names)


# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """One image of a file, (C, H, W), or all captures of a scene, in units of [0, 1]."""

    job: Job
    place: int
    image: Tensor
    scale: Scale


def _pages_of(
    jobs: Sequence[Job], span: Spans, skip_bad: bool, nan: Nan, skipped: dict[str, str]
) -> Iterator[Page]:
    """Read the images of files in order. A file with a bad image is added to `skipped`."""
    for job in jobs:
        try:
            yield from _scenes_of(job, span, nan) if job.captures else _read(job, span, nan)
        except InputError as error:
            if not skip_bad:
                raise
            skipped[job.file.name] = str(error)


def _scenes_of(job: Job, span: Spans, nan: Nan) -> Iterator[Page]:
    """The scenes of a job: all captures of each, (N, C, H, W)."""
    held: list[Page] = []
    place = 0
    for capture in job.captures:
        for page in _read(capture, span, nan):
            if held and (page.image.shape != held[0].image.shape or page.scale != held[0].scale):
                raise InputError(
                    f"{capture.file} and {held[0].job.file} are captures of one scene, but differ"
                    " in size or number type: sort the files by scene"
                )
            held.append(page)
            if len(held) == job.repeats:
                yield Page(job, place, torch.stack([one.image for one in held]), held[0].scale)
                held, place = [], place + 1


def _read(job: Job, span: Spans, nan: Nan) -> Iterator[Page]:
    with open_pages(job.file, job.select) as pages:
        known = span_for(span, pages.dtype) or pages.span
        scale = Scale.of(pages.dtype, known, pages.bits)
        for place in range(len(pages)):
            where = str(job.file) if len(pages) == 1 else f"page {place} of {job.file}"
            if isinstance(pages, tiff.Stack) and pages.native and is_tiff(job.out):
                pages.check_copy(place)  # before the restoration, not after it
            pixels = check_finite(pages.read(place), where, nan)
            image = scale.from_file(np.moveaxis(pixels, -1, 0))
            hidden(image[None], [bad_pixels(pages, place, where, nan)])
            yield Page(job, place, image, scale)


def _groups(
    pages: Iterator[Page], batch: int | None = None, copies: int = 1
) -> Iterator[list[Page]]:
    """Group neighboring images of one shape into batches."""
    group: list[Page] = []
    for page in pages:
        pixels = page.image.shape[-2] * page.image.shape[-1]
        room = together(pixels, batch, copies)
        if group and (page.image.shape != group[0].image.shape or len(group) >= room):
            yield group
            group = []
        group.append(page)
    if group:
        yield group


# -- writing --------------------------------------------------------------------------------------


class Sink:
    """Write the results of one file, page by page; `close` gives all files their names.

    Args:
        job: The file.
        scale: The scale that its numbers were read with.
        history: See `process`.

    Attributes:
        clipped: Fraction of the numbers of the last page that lay outside the range of the file.
    """

    def __init__(self, job: Job, scale: Scale, history: str = "") -> None:
        self.job, self.place, self.history, self.clipped = job, 0, history, 0.0
        self.scale = written_scale("png", scale) if is_png(job.out) else scale
        self._arrays: dict[str, NpyWriter] = {}
        self._std: Writer | None = None
        self._out: Writer = writer_for(
            job.source, job.out, history, select=job.select, repeats=job.merged
        )

    @property
    def full(self) -> bool:
        """Whether all pages are written."""
        return self.place == self.job.pages

    def write(self, found: dict[str, Tensor]) -> None:
        """Write the next page: "images" (C, H, W), "std" (C, H, W), arrays (.., C, H, W)."""
        image = found["images"]
        if not bool(image.isfinite().all()):
            raise InputError(f"the restored {self.job.file.name} has values that are not finite")
        self.clipped = self.scale.clipped(image)
        self._out.write(np.moveaxis(_to_file(self.scale, image), 0, -1))
        for name, value in found.items():
            if name == STD:
                self._write_std(value)
            elif name != "images":
                self._array(name, value).write(self.place, value.numpy()[..., None, :, :, :], -4)
        self.place += 1

    def _write_std(self, value: Tensor) -> None:
        """Write standard deviations in the numbers of the file, without its offset."""
        if self._std is None:
            beside = self.job.beside(STD)
            text = f"standard deviation; {self.history}" if self.history else ""
            job = self.job
            self._std = writer_for(job.source, beside, text, True, job.select, job.merged)
        pixels = (value.double() * self.scale.step).numpy()
        self._std.write(np.moveaxis(narrowed(pixels, "float32"), 0, -1))

    def _array(self, name: str, value: Tensor) -> NpyWriter:
        if name not in self._arrays:
            shape = (*value.shape[:-3], self.job.pages, *value.shape[-3:])
            self._arrays[name] = NpyWriter(self.job.beside(name), shape)
        return self._arrays[name]

    def close(self) -> None:
        """Give every file its name, the image last."""
        for writer in self._arrays.values():
            writer.close()
        if self._std is not None:
            self._std.close()
        self._out.close()

    def abandon(self) -> None:
        """Remove the partial files."""
        for writer in (*self._arrays.values(), self._std, self._out):
            if writer is not None:
                writer.abandon()


def _to_file(scale: Scale, image: Tensor) -> np.ndarray:
    """Convert an image (C, H, W) to the numbers of its file, strip by strip to save memory."""
    height = max(1, STRIP // (image.shape[0] * image.shape[2]))
    strips = image.split(height, dim=1)
    return np.concatenate([scale.to_file(strip) for strip in strips], axis=1)
