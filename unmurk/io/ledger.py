"""The log of results: which files unmurk made, from what, and with which settings.

A folder of results has its log in ``unmurk.jsonl``. Results under the name of one file, such as
``x.npy`` and ``x-std.npy``, have theirs in ``x-unmurk.jsonl``. Each result has two lines: one
before its files get their names, and one after that:

    {"begun": ["3.png", "3-std.npy"], "by": "HASH OF THE SETTINGS"}
    {"file": "3.png", "number": 3, "bytes": 812, "changed": 17, "out": {...}, "settings": {...}}

A file without a line was not made by unmurk and is never overwritten. A command that was killed
and starts again recognizes its own files.
"""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import InputError
from .atomic import short, unwritable
from .json_files import json_lines
from .limits import check_file, file_digest

__all__ = ["LOG", "Key", "Ledger", "log_of"]

LOG = "unmurk.jsonl"
STARTS = (b'{"begun": ', b'{"file": ')  # every line begins with one of these

Key = tuple[str, int, int, int]
"""A file's name, the number of its first image, its bytes, and when it was changed (ns)."""


def log_of(out: Path, folder: bool) -> Path:
    """Return the log file of an output folder or of an output file.

    >>> log_of(Path("x.npy"), folder=False).name
    'x-unmurk.jsonl'
    """
    if folder:
        return out / LOG
    stem = out.stem
    while len(os.fsencode(stem)) > 255 - len(f"-{LOG}"):  # a name may have 255 bytes
        stem = f"{stem[:100]}-{short(stem)}" if len(stem) > 117 else short(stem)
    return out.with_name(f"{stem}-{LOG}")


class Ledger:
    """The log of one job's results.

    Args:
        path: The log file.
        settings: What the results depend on besides their input files, fit for JSON. None:
            results of any settings belong to this job.

    Raises:
        InputError: The log is a link, or is not a log of unmurk.

    Attributes:
        found: Whether there was a log before.

    >>> ledger = Ledger(Path("x-unmurk.jsonl"), {"sigma": 0.1})
    >>> ledger.begin(["x.bin"])
    >>> Path("x.bin").write_bytes(b"result")
    6
    >>> ledger.end(("a.npy", 0, 812, 17), ["x.bin"])
    >>> Ledger(ledger.path, {"sigma": 0.1}).finished(("a.npy", 0, 812, 17), ["x.bin"])
    True
    >>> Ledger(ledger.path, {"sigma": 0.2}).finished(("a.npy", 0, 812, 17), ["x.bin"])
    False
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as the log keeps them
        self.by = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self._started: dict[str, str] = {}  # a file's name -> the settings of the last who made it
        self._made: dict[str, dict[str, Any]] = {}  # a file's name -> the entry of its result
        self._done: dict[Key, dict[str, Any]] = {}
        self.found = path.exists()
        for entry in self._read():
            if "begun" in entry:
                self._started |= dict.fromkeys(entry["begun"], entry["by"])
                for name in entry["begun"]:
                    self._made.pop(name, None)
            else:
                self._made |= dict.fromkeys(entry["out"], entry)
                self._done[_key(entry)] = entry

    def _read(self) -> list[dict[str, Any]]:
        if self.path.is_symlink():
            raise InputError(
                f"{self.path} is a link, and nothing is written through a link: remove it"
            )
        if not self.path.exists():
            return []
        check_file(self.path)
        found = [line for _, _, line in json_lines(self.path) if line and _is_entry(line)]
        try:
            with self.path.open("rb") as file:
                start = file.read(10)
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        if start and not found and not any(s.startswith(start) for s in STARTS):
            raise InputError(
                f"{self.path} is no log of unmurk: give another --out, or rename the file"
            )
        return found

    def finished(self, key: Key, names: list[str]) -> bool:
        """Whether a result of an input exists, made with these settings."""
        entry = self._done.get(key)
        if entry is None or self._other(entry) is not None:
            return False
        return set(names) <= set(entry["out"]) and all(
            self._made.get(name) is entry and (self.path.parent / name).is_file() for name in names
        )

    def results(self) -> list[str]:
        """Return the names of all files with a finished result in the log, of any process."""
        return [name for entry in self._read() if "out" in entry for name in entry["out"]]

    def alone(self) -> None:
        """Check that no existing result was made with other settings.

        Raises:
            InputError: One was.
        """
        for name, entry in self._made.items():
            other = self._other(entry)
            if other is not None and os.path.lexists(self.path.parent / name):
                raise InputError(
                    f"{self.path.parent} holds images made with another {other}: give another "
                    "--out, or the same options to go on"
                )

    def check(self, names: list[str]) -> None:
        """Check that files may be overwritten, if they exist.

        Raises:
            InputError: A file was not made by unmurk, was made with other settings, or has been
                changed since.
        """
        for name in names:
            path = self.path.parent / name
            if not os.path.lexists(path):
                continue
            if path.is_symlink() or name not in self._started:
                raise InputError(
                    f"{path} exists, and is no result of this command: give another "
                    "--out, or remove it"
                )
            entry = self._made.get(name)
            other = None if entry is None else self._other(entry)
            if self.settings is not None and (other or self._started[name] != self.by):
                raise InputError(
                    f"{path} was made with another {other or 'setting'}: give another --out, or "
                    "the same options to go on"
                )
            if entry is not None and entry["out"][name] != file_digest(path):
                raise InputError(
                    f"{path} was changed after unmurk made it: give another --out, or remove it"
                )

    def begin(self, names: list[str]) -> None:
        """Log that files are about to get their names. Raises InputError as `check` does."""
        self.check(names)
        if any(self._started.get(name) != self.by or name in self._made for name in names):
            self._append({"begun": names, "by": self.by})
            for name in names:
                self._started[name] = self.by
                self._made.pop(name, None)

    def end(self, key: Key, names: list[str]) -> None:
        """Log that all files of a result have their names."""
        name, number, size, changed = key
        out = {file: file_digest(self.path.parent / file) for file in names}
        entry: dict[str, Any] = {"file": name, "number": number, "bytes": size}
        entry |= {"changed": changed, "out": out}
        entry |= {"settings": self.settings}
        self._append(entry)
        self._made |= dict.fromkeys(names, entry)
        self._done[key] = entry

    def _other(self, entry: dict[str, Any]) -> str | None:
        """Return the first setting in which an entry differs from this job; None: none does."""
        if self.settings is None or entry["settings"] is None:
            return None
        made, now = entry["settings"], self.settings
        return next((k for k in {**made, **now} if made.get(k) != now.get(k)), None)

    def _append(self, entry: dict[str, Any]) -> None:
        """Append a line in one write, because several processes may append at once."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(self.path, flags, 0o666), "r+b", buffering=0) as file:
                end = os.fstat(file.fileno()).st_size
                torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
                line = (b"\n" if torn else b"") + json.dumps(entry).encode() + b"\n"
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise unwritable(self.path, error) from error


def _is_entry(line: dict[str, Any]) -> bool:
    """Whether a line is complete and has the types that this module writes."""
    if "begun" in line:
        names = line["begun"]
        return isinstance(names, list) and _are_texts(names) and isinstance(line.get("by"), str)
    numbers = [line.get(name) for name in ("number", "bytes", "changed")]
    out = line.get("out")
    return (
        isinstance(line.get("file"), str)
        and all(type(number) is int for number in numbers)
        and isinstance(out, dict)
        and _are_texts(out.values())
        and isinstance(line.get("settings", ""), dict | None)
    )


def _are_texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _key(entry: dict[str, Any]) -> Key:
    return entry["file"], entry["number"], entry["bytes"], entry["changed"]
