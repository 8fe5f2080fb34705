"""The jobs of a command: which files are restored, and what their results are called."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..repeats import scenes
from .axes import ALL, Selection
from .folders import pictures_in
from .formats.pictures import open_pages, single, split_member
from .formats.readers import is_folder, reader_of
from .formats.registry import is_written, real_path, without_suffix
from .formats.scaled import scenes_along
from .formats.writing import is_png, is_tiff, result_name, std_suffix
from .ledger import Key

__all__ = ["STD", "Job", "changed_formats", "jobs_of", "scene_jobs", "without"]

STD = "std"
"""The name of standard deviations among the arrays of a result."""


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

    @property
    def merged(self) -> int:
        """Number of images of the file that each image of the result stands for."""
        return self.repeats if self.regrouped else 1

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


def jobs_of(path: Path, out: Path, skip_bad: bool = False, select: Selection = ALL) -> list[Job]:
    """List the jobs for the files of a folder, or for one file.

    Args:
        path: The folder or the file.
        out: The output folder, or the output file of a single input.
        skip_bad: Whether files that cannot be read are left out.
        select: The axes of the files, and the channels to read.

    Raises:
        InputError: There is nothing at the path, or a file cannot be read (without `skip_bad`).

    >>> import torch
    >>> from unmurk.io.saving import save_images
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
                f"scenes of {reader.name} files whose captures are no whole part of an axis are "
                "written as TIFF files",
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
        if first.pages > count and not (is_tiff(out) or is_png(out) or _along(first, repeats)):
            out = out.with_name(f"{without_suffix(out.name)}.tif")
        found.append(
            replace(first, number=number, pages=count, out=out, captures=group, repeats=repeats)
        )
        number += count
    return found


def without(
    jobs: Sequence[Job], numbers: Collection[int], reason: str
) -> tuple[list[Job], dict[str, str]]:
    """Leave out the jobs of files that hold images with some numbers.

    Args:
        jobs: The jobs.
        numbers: Numbers of images, or of single captures of scenes.
        reason: Why they are left out.

    Returns:
        The other jobs, and the name of each file that is left out, with the reason.

    Raises:
        InputError: No job is left.

    >>> jobs = [Job(Path(f"{n}.tif"), 2 * n, 2, Path(f"out/{n}.tif")) for n in range(2)]
    >>> left, skipped = without(jobs, {3}, "no map")
    >>> [job.file.name for job in left], skipped
    (['0.tif'], {'1.tif': 'no map'})
    """
    found, skipped = [], {}
    for job in jobs:
        first = job.number * job.repeats
        if any(first <= number < first + job.pages * job.repeats for number in numbers):
            skipped[job.file.name] = reason
        else:
            found.append(job)
    if jobs and not found:
        raise InputError(f"nothing is left of {jobs[0].file.parent}: {reason}")
    return found, skipped


def _along(job: Job, repeats: int) -> bool:
    """Whether the format of a file holds its scenes: captures that are a part of its axes."""
    if not reader_of(job.file).scenes:
        return False
    try:
        with open_pages(job.source, job.select) as pages:
            return scenes_along(pages.lead or (len(pages),), repeats, pages.axes) is not None
    except InputError:  # reported, or left out, when the file is processed
        return True


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
