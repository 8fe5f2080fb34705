"""Where the results of a command go: the checks that every command makes of its output.

`output` opens the place of a command's results. It refuses a place that is an input or would mix
results with inputs, holds the lock of the job (`locks`), removes what killed commands left, and
watches every file that is written (`atomic`): no file that unmurk did not make is overwritten. If
the command fails, the files that it made are removed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..interrupts import uninterrupted
from .atomic import clean, forsake, watched
from .formats.registry import has_reader, is_written, member_of, real_path, suffix_of
from .ledger import LOG, Key, Ledger, log_of
from .limits import check_file
from .locks import locked

__all__ = ["LOG", "Output", "files_of", "key_of", "output"]

FILES = (".png", ".tif", ".tiff", ".npy", ".npz")
IDX = re.compile(r"(^|[-._])idx(\d-ubyte)?(\.gz)?$", re.IGNORECASE)
STATES = ("state", "run/state")  # state folders of `learn` and of `demo`
MODELS = ("prior", "posterior", "glow", "state", "unet", "scheduler", "prior/unet")
PAGE = b'name="generator" content="unmurk"'  # every report has it in its head


class Output:
    """The place that one command writes to.

    Args:
        path: A file or a folder.
        folder: Whether it is a folder; None: unless its name has the suffix of a file.
        owner: Whether all files below it belong to this command (a run folder, which `learn` has
            checked).

    Attributes:
        ledger: The log of this command's results; None: no file is one, unless `owner`.

    >>> Output(Path("restored")).folder, Output(Path("restored.tif")).folder
    (True, False)
    """

    def __init__(self, path: Path, folder: bool | None = None, owner: bool = False) -> None:
        self.path, self.owner = Path(os.path.abspath(path)), owner
        self.shown = path
        named = path.suffix.lower() in FILES or IDX.search(path.name) is not None
        named = named or is_written(path)
        with _readable_names(path):
            there = self.path.is_dir()
        if folder is None and not named and not there and suffix_of(path):
            raise InputError(
                f"--out {path}: unmurk reads {suffix_of(path)} files but writes none: give a "
                "folder, or a name that ends in .tif, .npy or the suffix of the input"
            )
        self.folder = folder or there or (folder is None and not named)
        self.ledger: Ledger | None = None
        self.inputs: list[Path] = []
        self._kept = False
        self._made: list[Path] = []
        self._placed: list[str] = []

    def reads(self, inputs: Iterable[str | Path]) -> None:
        """Add files and folders that the command reads.

        Raises:
            InputError: The output is one of them, or would mix results with them.
        """
        for path in map(Path, inputs):
            from .formats.arrays import split_key

            path = real_path(split_key(str(path))[0])
            with contextlib.suppress(OSError):  # no such name: the reader reports it
                if path.exists():
                    self.inputs.append(path)
                    self._apart(path)

    def _apart(self, path: Path) -> None:
        """Refuse an input that is the output, is below it, or whose folder gets a result."""
        out, real = Path(os.path.realpath(self.path)), Path(os.path.realpath(path))
        other = "give another --out"
        if _same(out, path):
            raise InputError(f"--out {self.shown} is the input {path}: {other}")
        if not path.is_dir():
            return
        if out.is_dir() and any(_same(out, parent) for parent in real.parents):
            raise InputError(
                f"--out {self.shown} contains the input folder {path}, where results would mix "
                f"with inputs: {other}, such as {self.shown / 'results'}"
            )
        if not self.folder and has_reader(out) and _same(out.parent, path):
            raise InputError(
                f"--out {self.shown} is in the input folder {path}, where the next call would "
                f"read it: {other}"
            )

    def record(self, settings: dict[str, Any] | None = None) -> Ledger:
        """Start the log of results, which may then replace their earlier versions.

        Args:
            settings: See `Ledger`.
        """
        self.ledger = Ledger(log_of(self.path, self.folder), settings)
        return self.ledger

    def typed(self, path: Path) -> Path:
        """Return a path of a result in the form in which the user gave the output.

        >>> Output(Path("out")).typed(Path("out/a.png").absolute())
        PosixPath('out/a.png')
        """
        if self.path in (path, *path.parents):
            return self.shown / path.relative_to(self.path)
        if path.parent == self.path.parent:  # a file whose suffix was completed
            return self.shown.with_name(path.name)
        return path

    def expect(self, names: Iterable[str]) -> None:
        """Check files that will be written, before the work.

        Args:
            names: Their names, beside the log.

        Raises:
            InputError: One is an input, or exists and was not made by this command.
        """
        for name in names:
            self._allow((self.path if self.folder else self.path.parent) / name)

    def end(self, key: Key) -> None:
        """Log all files written so far as the result of an input."""
        if self.ledger is not None:
            self.ledger.end(key, self._placed)
        self._placed = []

    def keep(self) -> None:
        """Keep finished files from now on, even if the command fails."""
        self._kept = True

    # -- callbacks of the writers ----------------------------------------------------------------

    def before(self, target: Path, placing: bool) -> None:
        """See `atomic.Watcher`."""
        self._allow(target)
        if placing and self.ledger is not None and self._is_logged(target):
            self.ledger.begin([target.name])

    def after(self, target: Path, new: bool) -> None:
        """See `atomic.Watcher`."""
        if new:
            self._made.append(target)
        if self._is_logged(target):
            self._placed.append(target.name)

    def _is_logged(self, target: Path) -> bool:
        beside = os.path.abspath(target.parent)
        return self.ledger is not None and beside == str(self.ledger.path.parent)

    def _allow(self, target: Path) -> None:
        if not os.path.lexists(target):
            return
        for path in self.inputs:
            if _same(target, path):
                raise InputError(f"{target} is an input: give another --out")
        if self.ledger is not None and self._is_logged(target):
            self.ledger.check([target.name])
        elif target.suffix == ".html":
            if target.is_symlink() or not _is_page(target):
                raise InputError(f"{target} exists, and is no report: rename it")
        elif not self.owner:
            raise InputError(f"{target} exists: give another --out, or remove it")

    @uninterrupted
    def undo(self) -> None:
        """Remove the files that were made, but none that existed before."""
        if self._kept:
            return
        for path in self._made:
            path.unlink(missing_ok=True)
        if self.ledger is None or self.ledger.found:
            return
        if self._made or not self.ledger.results():
            self.ledger.path.unlink(missing_ok=True)


@contextmanager
def output(
    path: Path,
    inputs: Iterable[str | Path] = (),
    *,
    folder: bool | None = True,
    owner: bool = False,
    job: Any = None,
) -> Iterator[Output]:
    """Open the place of a command's results: checked, locked, and restored on failure.

    Results stay after a failure if a run has a state, or after `Output.keep`.

    Args:
        path: A file or a folder.
        inputs: Files and folders that the command reads; other names are passed over.
        folder: See `Output`.
        owner: See `Output`.
        job: What the processes of one job have in common (see `locks.locked`).

    Raises:
        InputError: Nothing can be written there, it is an input, or another job writes there.

    >>> import torch
    >>> from unmurk.io.saving import save_images
    >>> with output(Path("kept")) as place:
    ...     files = save_images(torch.ones(1, 1, 4, 4), place.path / "a.npy")
    >>> with output(Path("kept")) as place:  # the file is not from this command
    ...     files = save_images(torch.ones(1, 1, 4, 4), place.path / "a.npy")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: .../kept/a.npy exists: give another --out, or remove it
    """
    place = Output(path, folder, owner)
    path = place.path
    with _readable_names(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        found = missing[-1].parent if missing else path
        if os.path.lexists(path) and not path.exists():
            raise InputError(f"cannot write {path}: it is a link to nothing: give another place")
        if not found.is_dir() and (missing or folder):
            raise InputError(f"cannot write {path}: {found} is a file: give another place")
    place.reads(inputs)
    with ExitStack() as stack:
        stack.callback(_prune, missing)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        stack.enter_context(locked(path, job))
        for part in (path, *(path / s for s in STATES)) if place.folder else (path.parent,):
            clean(part)
        stack.enter_context(watched(place))
        try:
            yield place
        except BaseException:
            forsake(path)
            if not any((path / state / "latest.pt").exists() for state in STATES):
                place.undo()
            raise


@contextmanager
def _readable_names(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    where = f" in {error.filename}" if error.filename else ""
    return InputError(f"cannot write {path}: {error.strerror}{where}: give another place")


@uninterrupted
def _prune(missing: list[Path]) -> None:
    """Remove the folders that were made and are empty."""
    if not missing or not missing[0].is_dir():
        folders = missing[1:]
    else:
        below = sorted(missing[0].rglob("*"), key=lambda p: len(p.parts), reverse=True)
        folders = [p for p in below if p.is_dir() and not p.is_symlink()] + missing
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


def _same(one: Path, other: Path) -> bool:
    """Whether two paths name the same file or folder, through links and letter cases."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def _is_page(path: Path) -> bool:
    try:
        check_file(path)
        with open(path, "rb") as file:
            return PAGE in file.read(4096)
    except (OSError, InputError):
        return False


def files_of(prior: str) -> list[str]:
    """Return the file or folder of a prior's text form, and the folders of its models.

    >>> files_of("runs/digits")[:2], files_of("adm:256:model.pt")
    (['runs/digits', 'runs/digits/prior'], ['model.pt'])
    """
    if prior.startswith("adm:") and prior.count(":") > 1:
        return [prior.split(":", 2)[2]]
    return [prior, *(os.path.join(prior, folder) for folder in MODELS)]


def key_of(data: Path) -> Key:
    """Return what identifies the input of a job in the log; for a folder, all of its files.

    >>> Path("one.npy").write_bytes(b"12345")
    5
    >>> key_of(Path("one.npy"))[:3]  # the name, no number, the size; then the time of change
    ('one.npy', 0, 5)
    """
    from .formats.arrays import split_key

    selection, data = member_of(data), real_path(data)
    file, key = split_key(str(data))
    name = f"{file.name}:{key}" if key else file.name
    name = f"{name}[{selection}]" if selection else name
    if not file.is_dir():
        found = file.stat()
        return name, 0, found.st_size, found.st_mtime_ns
    if has_reader(file):  # a folder that is one image
        files = [Path(where, name) for where, _, names in os.walk(file) for name in names]
    else:
        files = [f for f in file.iterdir() if has_reader(f) and f.is_file()]
    stats = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return f"{name} {digest[:16]}", 0, sum(size for _, size, _ in stats), 0
