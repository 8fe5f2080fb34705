"""Restoring picture files one after another, so that a stopped command can be continued.

The results go into one folder, with a line in its `unmurk.jsonl` for each finished file (see
`ledger`). The same command skips files with such a line, so it can be stopped at any time; a
command with other settings is refused.

Processes share the work without communication: process RANK of WORLD_SIZE (the variables that
torchrun and accelerate launch set) takes every WORLD_SIZE-th file. Small images are processed in
batches. A result does not depend on its batch, because every random draw depends on the number of
the image.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..repeats import scenes
from .axes import ALL, Selection
from .formats import tiff
from .formats.pictures import Nan, bad_pixels, check_finite, open_pages, single, split_member
from .formats.registry import (
    Writer,
    is_folder,
    is_written,
    reader_of,
    real_path,
    without_suffix,
)
from .formats.writing import is_png, is_tiff, result_name, std_suffix, writer_for
from .images import hidden, pictures_in, written_scale
from .ledger import Key, Ledger
from .locks import ranks
from .scale import Scale, Spans, span_for
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
STD = "std"  # the name of standard deviations among the arrays

Engine = Callable[[Tensor, list[int]], dict[str, Tensor]]
"""Maps measurements (B, C, H, W), or all captures of scenes (B, N, C, H, W), and their numbers to
"images" (B, C, H, W) and further arrays (.., B, C, H, W) by name; "std" is the standard deviation
of each pixel."""


@dataclass(frozen=True)
class Job:
    """One file to restore.

    Attributes:
        file: The file.
        number: Number of its first image among those of all files.
        pages: Number of images in the file.
        out: The file of the restored images.
        select: Its axes, the channels to read, and the name of an array or image in it.
        captures: The jobs of single captures whose images are combined to scenes, or none.
        repeats: Number of captures of each scene.

    >>> job = Job(Path("a.tif"), number=0, pages=1, out=Path("out/a.tif"))
    >>> str(job.beside("std")), str(job.beside("samples"))
    ('out/a-std.tif', 'out/a-samples.npy')
    """

    file: Path
    number: int
    pages: int
    out: Path
    select: Selection = ALL
    captures: tuple["Job", ...] = ()
    repeats: int = 1

    @property
    def regrouped(self) -> bool:
        """Whether the file has more images than the result."""
        return any(capture.pages > self.pages for capture in self.captures)

    def key(self) -> Key:
        """Return what identifies the file, or the files of a scene, in the log."""
        if self.captures:
            keys = [capture.key() for capture in self.captures]
            return keys[0][0], self.number, sum(k[2] for k in keys), max(k[3] for k in keys)
        file = real_path(self.file)
        found = file.stat() if file.exists() else None  # a link may lead nowhere
        size, changed = (found.st_size, found.st_mtime_ns) if found else (0, 0)
        member = f":{self.select.member}" if self.select.member else ""
        return self.file.name + member, self.number, size, changed

    @property
    def source(self) -> Path:
        """The file with the name of the part that is read, if it names one."""
        member = self.select.member
        return Path(f"{self.file}[{member}]") if member else self.file

    def beside(self, name: str) -> Path:
        """Return the file of an array that comes with the restored images.

        Standard deviations are images: a file in the format of the result if it holds floats,
        else a TIFF file. Other arrays are .npy files.
        """
        suffix = std_suffix(self.file, self.out) if name == STD else ".npy"
        return self.out.with_name(f"{without_suffix(self.out.name)}-{name}{suffix}")


@dataclass
class Summary:
    """What a process did.

    Attributes:
        images: Number of images that it restored.
        before: Number of images of its share that were finished before.
        skipped: Files that were left out, and why.
        clipped: Fraction of the numbers that lay outside the range of their files.

    >>> from unmurk.io.images import save_images
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


def jobs_of(path: Path, out: Path, skip_bad: bool = False, select: Selection = ALL) -> list[Job]:
    """List the jobs for the files of a folder, or for one file.

    Args:
        path: The folder or the file.
        out: The output folder, or the output file of a single input.
        skip_bad: Whether files that cannot be read are left out.
        select: The axes of the files, and the channels to read.

    Raises:
        InputError: There is nothing at the path, or a file cannot be read (without `skip_bad`).

    >>> from unmurk.io.images import save_images
    >>> files = save_images(torch.ones(2, 1, 4, 6), "evening", format="png")
    >>> [(job.number, str(job.out)) for job in jobs_of(Path("evening"), Path("out"))]
    [(0, 'out/00000.png'), (1, 'out/00001.png')]
    """
    path, member = split_member(path)
    if not path.exists() and not path.is_symlink():
        raise InputError(f"there is nothing at {path}")
    files = pictures_in(path) if is_folder(path) else [path]
    select = select.of(member)
    names = _result_names(files)
    one = is_written(out) and not out.is_dir()
    if one and len(files) > 1:
        raise InputError(f"{out} can hold one image, not {len(files)}: give a folder")
    jobs, number = [], 0
    for file, name in zip(files, names, strict=True):
        pages = _pages(file, skip_bad, select)
        if one and pages > 1 and is_png(out):
            raise InputError(f"{out} can hold one image, not {pages}: give a .tif file")
        jobs.append(Job(file, number, pages, out if one else out / name, select))
        number += pages
    return jobs


def _result_names(files: Sequence[Path]) -> list[str]:
    """Names of the results of files; where two would be the same, they keep the old suffix too.

    >>> _result_names([Path("a.png"), Path("b.jpg"), Path("c.jpg"), Path("c.png")])
    ['a.png', 'b.png', 'c.jpg.png', 'c.png.png']
    """
    names = [result_name(file) for file in files]
    short = [without_suffix(real_path(file).name) for file in files]
    often = Counter(short)
    found = [
        name if often[stem] == 1 else real_path(file).name + name[len(stem) :]
        for name, stem, file in zip(names, short, files, strict=True)
    ]
    twice = [name for name, times in Counter(found).items() if times > 1]
    if twice:
        raise InputError(f"two results would be called {twice[0]}: give each file its own name")
    return found


def changed_formats(jobs: Sequence[Job]) -> list[str]:
    """Say, once for each format, which results are written in another format than they came in.

    >>> changed_formats([Job(Path("a.jpg"), 0, 1, Path("out/a.png"))])
    ['results of .jpg files are written as PNG files, which hold every number']
    """
    found: dict[str, str] = {}
    for job in jobs:
        reader, out = reader_of(job.file), job.out
        if job.regrouped and is_tiff(out) and not is_tiff(job.file) and reader.writer is not None:
            found.setdefault(
                f"{reader.name} scenes",
                f"scenes of {reader.name} files with several captures are written as TIFF files",
            )
            continue
        if without_suffix(out.name) == out.name or reader.writer is not None or is_tiff(job.file):
            continue
        if not is_png(job.file):
            kind = "PNG" if is_png(out) else "TIFF"
            suffix = real_path(job.file).suffix
            found.setdefault(
                f"{suffix} {kind}",
                f"results of {suffix} files are written as {kind} files, which hold every number",
            )
    return list(found.values())


def scene_jobs(jobs: Sequence[Job], repeats: int) -> list[Job]:
    """Combine the jobs of captures to jobs whose images are scenes of repeated captures.

    Args:
        jobs: The jobs of single captures, from `jobs_of`.
        repeats: Number N of captures of each scene: pages of one file, or files one after another
            with a page each. The result has the name of the first file.

    Raises:
        InputError: The captures are no whole number of scenes.

    >>> captures = [Job(Path(f"{n}.png"), n, 1, Path(f"out/{n}.png")) for n in range(6)]
    >>> [(job.number, job.out.name) for job in scene_jobs(captures, repeats=3)]
    [(0, '0.png'), (1, '3.png')]
    """
    if repeats == 1:
        return list(jobs)
    pages = [job.pages for job in jobs]
    if all(count % repeats == 0 for count in pages):
        groups: list[tuple[Job, ...]] = [(job,) for job in jobs]
    elif all(count == 1 for count in pages):
        count = scenes(len(jobs), repeats, "files")
        groups = [tuple(jobs[i * repeats : (i + 1) * repeats]) for i in range(count)]
    else:
        odd = next(job for job in jobs if job.pages % repeats)
        raise InputError(
            f"{odd.file} has {odd.pages} images, no whole number of scenes of {repeats}: give"
            " another number of repeats, or files with one image each"
        )
    found, number = [], 0
    for group in groups:
        count = sum(job.pages for job in group) // repeats
        first, out = group[0], group[0].out
        if first.pages > count and not (is_tiff(out) or is_png(out)):
            out = out.with_name(f"{without_suffix(out.name)}.tif")  # other writers keep the pages
        found.append(
            replace(first, number=number, pages=count, out=out, captures=group, repeats=repeats)
        )
        number += count
    return found


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

    >>> from unmurk.io.images import load_images, save_images
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
    try:
        for group in groups():
            if not any(page.job.out in wanted for page in group):
                continue
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


def _pages(file: Path, skip_bad: bool, select: Selection) -> int:
    if single(file):
        return 1
    try:
        with open_pages(file, select) as pages:
            return len(pages)
    except InputError:
        if skip_bad:
            return 1
        raise


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
            job.source, job.out, history, select=job.select, copied=not job.regrouped
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
            copied = not job.regrouped
            self._std = writer_for(job.source, beside, text, True, job.select, copied)
        pixels = value.double().numpy() * self.scale.gain
        self._std.write(np.moveaxis(pixels.astype(np.float32), 0, -1))

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
