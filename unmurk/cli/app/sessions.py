"""Files of the users of the app: one folder for each, apart from all others, removed afterwards.

A session is one browser (`guard`). Its folder is readable by the owner of the app alone (0700).
The name of the folder is a hash, so that no list of folders gives a session away. Names of
uploaded files are reduced to harmless ones, and no path that a client sends is followed: clients
name results by a random key and a name that `Session.results` holds.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bounds import size_of_memory
from ...errors import InputError, escape
from ...io.atomic import NoLocksError, try_lock

if TYPE_CHECKING:
    from .jobs import Job

__all__ = ["Limits", "Session", "Sessions", "harmless"]

UNSAFE = re.compile(r"[^\w .()+=,-]")  # no slash, colon, bracket, quote or control character
LONGEST = 100  # characters of a file name
HOUR = 3600.0
PREFIX = "unmurk-app-"


@dataclass(frozen=True)
class Limits:
    """Bounds of what users may leave with the app.

    Attributes:
        files: Largest number of files of one upload.
        size: Largest number of bytes of one upload; all sessions together hold up to ten times as
            many.
        pixels: Largest number of pixels of one image.
        hours: Hours after which the files of an idle session are removed.
    """

    files: int = 500
    size: int = 2**30
    pixels: int = 2**27
    hours: float = 12.0


def harmless(name: str) -> str:
    """Return a file name without folders and without characters that mean something elsewhere.

    >>> harmless("../../etc/passwd"), harmless("night[SCI].fits"), harmless(".hidden")
    ('passwd', 'night_SCI_.fits', 'hidden')
    """
    last = re.split(r"[/\\\\]", name)[-1]
    last = UNSAFE.sub("_", last).strip().lstrip(".-")
    stem, dot, suffix = last.partition(".")
    if len(last) > LONGEST:
        last = stem[: max(1, LONGEST - len(dot + suffix[-40:]))] + dot + suffix[-40:]
    return last or "file"


@dataclass
class Session:
    """The files of one user.

    Attributes:
        folder: Its folder.
        limits: What it may hold.
        used: When it was used last, in seconds of `time.monotonic`.
        results: For each key the files that the user may fetch, by name.
        jobs: Its commands that may still be running.
        kept: What the page shows again when it is reloaded, by its part.
        shared: Images that a reloaded page has taken over.
        taken: Where uploaded files have been moved. The page names files again when others are
            added to them.
    """

    folder: Path
    limits: Limits
    used: float = field(default_factory=time.monotonic)
    results: dict[str, dict[str, Path]] = field(default_factory=dict)
    jobs: "list[Job]" = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    shared: set[Path] = field(default_factory=set)
    taken: dict[Path, Path] = field(default_factory=dict)

    def new_folder(self, kind: str) -> Path:
        """Make an empty folder of the session; its name begins with `kind`."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=self.folder))

    def keep(self, files: Iterable[str | Path]) -> Path:
        """Move uploaded files into the session.

        Args:
            files: Where the upload has left them. They are gone from there, whatever happens.

        Returns:
            The file if it is one, else the folder that holds all of them.

        Raises:
            InputError: There is none, or they are too many or too large.
        """
        paths = [Path(file) for file in files]
        try:
            sources = [path if path.exists() else self.taken.get(path, path) for path in paths]
            sizes = [source.stat().st_size for source in sources]
            if not paths:
                raise InputError("there is no file: drop some images")
            if len(paths) > self.limits.files:
                raise InputError(f"{len(paths)} files, at most {self.limits.files}: give fewer")
            if sum(sizes) > self.limits.size:
                most = size_of_memory(self.limits.size)
                raise InputError(
                    f"the files have {size_of_memory(sum(sizes))}, at most {most}: give fewer"
                )
            folder = self.new_folder("images")
            names: dict[str, Path] = {}
            for path, source in zip(paths, sources, strict=True):
                name = _unused(harmless(path.name), names)
                names[name] = folder / name
                (shutil.move if source == path else shutil.copy)(source, folder / name)
                self.taken[path] = folder / name
            return folder if len(names) > 1 else folder / next(iter(names))
        except OSError as error:
            raise InputError(f"cannot keep the upload: {error.strerror}; try again") from error
        finally:
            for path in paths:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def offer(self, files: Mapping[str, Path]) -> str:
        """Let the user fetch files; return the key under which they are found."""
        key = secrets.token_urlsafe(18)
        self.results[key] = dict(files)
        return key

    def find(self, key: str, name: str) -> Path | None:
        """Return a file that was offered; None if there is none of this key and name."""
        self.used = time.monotonic()
        path = self.results.get(key, {}).get(name)
        return path if path is not None and path.is_file() else None

    def said(self, text: str) -> str:
        """Return a message without the names of the session's folders."""
        inside = re.compile(re.escape(str(self.folder)) + r"(?:/(?:images|result)-[^/\s'\"]+)?/?")
        return inside.sub("", text)

    def close(self) -> None:
        """Stop what is running, and remove all files."""
        for job in self.jobs:
            job.ask()
        for job in self.jobs:
            job.stop()
        self.jobs.clear()
        self.results.clear()
        self.kept.clear()
        self.shared.clear()
        self.taken.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All sessions of an app, in one private folder that `close` removes.

    Args:
        limits: What each may hold.

    Attributes:
        folder: The folder.
        uploads: Where uploads arrive before a session takes them.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        _remove_abandoned()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # made with mode 0700
        self._fd: int | None = os.open(self.folder, os.O_RDONLY)
        with contextlib.suppress(NoLocksError):
            try_lock(self._fd)  # says that the app is alive
        self.uploads = self.folder / "uploads"
        self.uploads.mkdir(mode=0o700)
        self._held: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> Session:
        """Return the session of a name that `guard` has given."""
        if not name:
            raise InputError("the request names no session: reload the page")
        digest = hashlib.sha256(name.encode()).hexdigest()[:24]
        with self._lock:
            session = self._held.setdefault(digest, Session(self.folder / digest, self.limits))
            session.used = time.monotonic()
        return session

    def room(self) -> bool:
        """Whether another upload may come."""
        held = sum(path.stat().st_size for path in _files(self.folder))
        return held < 9 * self.limits.size

    def tidy(self, now: float | None = None) -> None:
        """Remove idle sessions, and uploads that no session took within an hour.

        Args:
            now: The time in seconds of `time.monotonic`; None: the time now.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            idle = [
                name
                for name, session in self._held.items()
                if now - session.used > HOUR * self.limits.hours
                and not any(job.running for job in session.jobs)
            ]
            for name in idle:
                self._held.pop(name).close()
        old = time.time() - HOUR
        for path in _files(self.uploads):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old:
                    path.unlink()

    def close(self) -> None:
        """Stop what is running, and remove all files of all sessions."""
        with self._lock:
            for session in self._held.values():
                session.close()
            self._held.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _remove_abandoned() -> None:
    """Remove what apps have left that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # of another user, or no folder
            continue
        try:
            if os.fstat(fd).st_uid == os.getuid() and try_lock(fd):
                shutil.rmtree(folder, ignore_errors=True)
        except NoLocksError:
            continue  # nobody can say whether its app is alive
        finally:
            os.close(fd)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def _unused(name: str, names: Mapping[str, Path]) -> str:
    """Return a name that is not among others, letter case apart."""
    taken = {other.lower() for other in names}
    stem, dot, suffix = name.partition(".")
    found, number = name, 1
    while found.lower() in taken:
        number += 1
        found = f"{stem}-{number}{dot}{suffix}"
    return escape(found)
