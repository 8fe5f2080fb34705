"""Atomic writing: every file appears under its name whole, or not at all.

A file is written beside its final place as ``.unmurk-HASH.part``, where HASH is computed from its
name, then flushed to the disk and renamed. The writer holds a lock (flock) on the partial file, so
a partial file without a lock was left by a killed process, and `clean` removes it. The hash keeps
the partial name short even if the final name has 255 bytes.

A command registers a watcher (`watched`), which is called before a file gets its name. This is the
one place where a command can refuse to overwrite a file (see `outputs`).
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from ..errors import InputError, reason
from ..interrupts import uninterrupted

try:
    import fcntl
except ImportError:  # a system without POSIX locks
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "NoLocksError",
    "Partial",
    "PartialWriter",
    "Watcher",
    "clean",
    "forsake",
    "partial_of",
    "place_folder",
    "try_lock",
    "unwritable",
    "watched",
    "write",
]

UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


class Watcher(Protocol):
    """Callbacks of a command for the files that it writes.

    >>> class Listing:
    ...     def before(self, target: Path, placing: bool) -> None:
    ...         print("places" if placing else "begins", target.name)
    ...     def after(self, target: Path, new: bool) -> None:
    ...         print("new" if new else "replaced", target.name)
    >>> with watched(Listing()):
    ...     write(Path("note.txt"), b"whole")
    begins note.txt
    places note.txt
    new note.txt
    """

    def before(self, target: Path, placing: bool) -> None:
        """Raise InputError if a file may not be overwritten.

        Args:
            target: The file.
            placing: Whether it is about to get its name; False: its writing begins.
        """

    def after(self, target: Path, new: bool) -> None:
        """Note that a file got its name; `new`: there was no file before."""


_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Call a watcher for every file that is written inside the context.

    >>> class Guard:
    ...     def before(self, target: Path, placing: bool) -> None:
    ...         raise InputError(f"{target} is not to be written")
    >>> with watched(Guard()):
    ...     write(Path("guarded.txt"), b"")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: guarded.txt is not to be written
    """
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def unwritable(path: Path, error: Exception) -> InputError:
    """Return the error for a file that the system does not allow us to write.

    >>> print(unwritable(Path("a.npy"), OSError(28, "No space left on device")))
    cannot write a.npy: No space left on device; correct that and run the same command ...
    """
    return InputError(
        f"cannot write {path}: {reason(error)}; correct that and run the same command to continue"
    )


def short(name: str) -> str:
    """Return 16 characters of the hash of a file's name."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def partial_of(out: Path) -> Path:
    """Return the partial file of `out`: beside it, so that one rename finishes it.

    >>> partial_of(Path("out/a.npy")).parent == Path("out"), len(partial_of(Path("a.npy")).name)
    (True, 29)
    """
    return out.with_name(f".unmurk-{short(out.name)}.part")


class NoLocksError(OSError):
    """The file system has no locks.

    >>> isinstance(NoLocksError("no locks"), OSError)
    True
    """


def try_lock(fd: int, shared: bool = False) -> bool:
    """Lock an open file or folder without waiting; return whether it is locked now.

    Raises:
        NoLocksError: The file system has no locks.

    >>> with open("mine.lock", "w") as first, open("mine.lock") as second:
    ...     try_lock(first.fileno()), try_lock(second.fileno())
    (True, False)
    """
    if fcntl is None:
        raise NoLocksError("this system has no locks of files")
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            raise NoLocksError(*error.args) from error
        raise
    return True


def _lock(fd: int) -> bool:
    """Lock an open file where there are locks; return whether no other process holds it."""
    try:
        return try_lock(fd)
    except NoLocksError:
        return True


def same_file(fd: int, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    try:
        there, held = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


_partial_files: set[Path] = set()  # partial files of this process that have no name yet


@uninterrupted
def forsake(out: Path) -> None:
    """Remove the partial files of this process below a place, or beside it.

    An interrupt may come after a partial file is made and before the code that would remove it
    holds it.

    Args:
        out: The output of the command that ends.

    >>> part = Partial(Path("unfinished/a.npy"))
    >>> forsake(Path("unfinished"))
    >>> part.path.exists()
    False
    >>> part.file.close()
    """
    out = Path(os.path.abspath(out))
    for path in list(_partial_files):
        place = Path(os.path.abspath(path))
        if place.parent == out.parent or place.is_relative_to(out):
            path.unlink(missing_ok=True)
            _partial_files.discard(path)


class Partial:
    """A file that is being written; `finish` gives it its name.

    Args:
        out: The file. Its folder is made if needed.

    Attributes:
        file: The partial file, open for reading and writing.

    Raises:
        InputError: The place cannot be written, the command refuses it, or another process is
            writing the same file.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with Partial(out) as part:
    ...     part.put(b"whole")
    ...     part.finish()
    >>> out.read_text()
    'whole'
    """

    @uninterrupted
    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        self.path = partial_of(self.out)
        for watcher in _watchers:
            watcher.before(self.out, False)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            _partial_files.add(self.path)
            self.file: io.BufferedRandom = _open(self.path, self.out)
        except OSError as error:
            _partial_files.discard(self.path)
            raise unwritable(self.out, error) from error
        except BaseException:  # it is the file of another process
            _partial_files.discard(self.path)
            raise

    def reserve(self, size: int) -> None:
        """Reserve `size` bytes of the disk, so that a full disk is noticed before the work.

        Raises:
            InputError: There is not enough room.
        """
        try:
            if size and not _allocate(self.file.fileno(), size):
                free = shutil.disk_usage(self.path.parent).free
                if free < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            need = f"{error.strerror} ({size / 1e6:.0f} MB are needed)"
            raise unwritable(self.out, OSError(error.errno, need)) from error

    def put(self, data: bytes) -> None:
        """Append bytes. Raises InputError if the disk is full."""
        try:
            self.file.write(data)
        except OSError as error:
            raise unwritable(self.out, error) from error

    @uninterrupted
    def finish(self) -> None:
        """Flush the file to the disk and give it its name.

        Raises:
            InputError: The disk is full, or the command refuses the place.
        """
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            for watcher in _watchers:
                watcher.before(self.out, True)
            new = not os.path.lexists(self.out)
            os.replace(self.path, self.out)
            _partial_files.discard(self.path)
        except OSError as error:
            raise unwritable(self.out, error) from error
        for watcher in _watchers:
            watcher.after(self.out, new)
        self.file.close()

    @uninterrupted
    def abandon(self) -> None:
        """Remove the partial file; nothing happens if it was finished."""
        if self.file.closed:
            return
        if same_file(self.file.fileno(), self.path):
            self.path.unlink(missing_ok=True)
        _partial_files.discard(self.path)
        with contextlib.suppress(OSError):  # what is still in the buffer may not fit on the disk
            self.file.close()

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


class PartialWriter:
    """Base of the writers of one file, whose streams are closed before the file gets its name.

    Attributes:
        out: The file.

    >>> class Upper(PartialWriter):
    ...     def __init__(self, out: Path) -> None:
    ...         self.out, self._part, self._open = out, Partial(out), ExitStack()
    ...     def _finish(self) -> None:
    ...         self._part.put(b"LAST")
    >>> Upper(Path("last.txt")).close()
    >>> Path("last.txt").read_bytes()
    b'LAST'
    """

    out: Path
    _part: Partial
    _open: ExitStack

    def _finish(self) -> None:
        """Write what is left."""

    def close(self) -> None:
        """Write what is left and give the file its name."""
        try:
            self._finish()
            self._open.close()
        except OSError as error:
            raise unwritable(self.out, error) from error
        self._part.finish()

    @uninterrupted
    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""
        try:
            self._open.close()
        except (OSError, ValueError):  # of a full disk: the file goes anyway
            pass
        finally:
            self._part.abandon()


def _open(path: Path, out: Path) -> io.BufferedRandom:
    """Open and lock a partial file; one that a killed process left is overwritten."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(fd):
                raise InputError(f"another process is writing {out}: wait for it, or stop it")
            if same_file(fd, path):  # else it was removed or finished in between
                os.ftruncate(fd, 0)
                # by its path, because tifffile needs the name; a duplicate shares the lock
                return open(path, "w+b", opener=lambda *_, fd=fd: os.dup(fd))
        finally:
            os.close(fd)


def _allocate(fd: int, size: int) -> bool:
    """Reserve bytes of the disk; return False if the system cannot."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def write(out: Path, data: bytes) -> None:
    """Write a file so that its place always holds the old or the new content, whole.

    Raises:
        InputError: See `Partial`.

    >>> write(Path("new/a.txt"), b"done")
    >>> Path("new/a.txt").read_bytes()
    b'done'
    """
    with Partial(out) as part:
        part.put(data)
        part.finish()


@contextmanager
def place_folder(folder: Path) -> Iterator[Path]:
    """Return a new folder to fill; at the end its files get their places in `folder`.

    If `folder` is missing, it appears as a whole. If it exists, each file is replaced by its new
    version, and other files in it stay.

    Raises:
        InputError: See `Partial`.

    >>> with place_folder(Path("run")) as folder:
    ...     _ = (folder / "a.txt").write_text("done")
    ...     print(Path("run").exists())
    False
    >>> Path("run/a.txt").read_text()
    'done'
    """
    part = partial_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        fd = os.open(part, os.O_RDONLY)
        try:
            _lock(fd)
            yield part
            _settle(part, folder)
        finally:
            os.close(fd)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _settle(part: Path, folder: Path) -> None:
    files = sorted(path.relative_to(part) for path in part.rglob("*") if path.is_file())
    for name in files:
        with open(part / name, "rb") as file:
            os.fsync(file.fileno())
        for watcher in _watchers:
            watcher.before(folder / name, True)
    new = [not os.path.lexists(folder / name) for name in files]
    if os.path.lexists(folder):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(part / name, folder / name)
    else:
        os.replace(part, folder)
    for watcher in _watchers:
        for name, first in zip(files, new, strict=True):
            watcher.after(folder / name, first)


def clean(folder: Path) -> None:
    """Remove the partial files that killed processes left directly in a folder.

    >>> left = partial_of(Path("cleaned/a.npy"))
    >>> left.parent.mkdir()
    >>> left.touch()  # as a killed process leaves it
    >>> clean(Path("cleaned"))
    >>> left.exists()
    False
    """
    if fcntl is None or not folder.is_dir():
        return
    for path in folder.glob(".unmurk-*.part"):
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        except OSError:
            continue
        try:
            if try_lock(fd) and same_file(fd, path):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        except OSError:
            pass  # of another user, say
        finally:
            os.close(fd)
