"""Learning that outlives the page: a process for each run, whose folder is what the app reads.

`unmurk learn` runs in a session of its own, so closing the page or ending the app does not stop
it. The app learns how far it is from `metrics.jsonl`, whether it runs from the lock of the run
folder, and shows the page that the run writes. Stopping is Ctrl-C: the command saves its state,
and the same command goes on from there. That command is kept beside the run folder, in
``NAME.learn.json``, and uploaded images in ``NAME.images`` until the run is finished.
"""

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...io import atomic
from ...io.json_files import json_lines, read_object
from ...io.locks import holder
from ...training.preview import FILE as PREVIEW
from ...training.run_folder import read_config
from .jobs import PREFIX, Job
from .spare import Spare

__all__ = ["Progress", "Runs"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        name: Its name.
        kimg: Thousands of images seen.
        total: Those of the whole run; 0: not known yet.
        seconds: Seconds of learning so far.
        running: Whether a process is learning.
        usable: Whether it restores images: whether a posterior and a prior have been written.
        page: The page that it has written, or None.
        said: The last line that the process printed.
        again: Whether the app can go on with it.
        complete: Whether its models are those of the end of the run.
    """

    name: str
    kimg: float = 0.0
    total: float = 0.0
    seconds: float = 0.0
    running: bool = False
    usable: bool = False
    page: Path | None = None
    said: str = ""
    again: bool = False
    complete: bool = True

    @property
    def learned(self) -> str:
        """How far it is, in two or three words."""
        return "learned here" if self.complete else f"learned to {self.share:.0%}"

    @property
    def share(self) -> float:
        """Fraction of the run that is done, from 0 to 1."""
        return min(1.0, self.kimg / self.total) if self.total else 0.0

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return self.usable and self.complete and self.share > 0.9999 and not self.running

    def text(self) -> str:
        """Return the progress in words."""
        if self.finished:
            return f"{self.name} is finished after {self.kimg:g} thousand images."
        if not self.running:
            if not self.kimg:
                return f"{self.name} has stopped before its first image. {self.said}"
            return f"{self.name} has stopped at {self.share:.0%}. {self.said}"
        if not self.kimg:
            return f"{self.name} is starting. {self.said}"
        left = self.seconds * (self.total / self.kimg - 1)
        minutes = "less than a minute" if left < 60 else f"about {left / 60:.0f} minutes"
        return (
            f"{self.name} is learning: {self.share:.0%} "
            f"({self.kimg:g} of {self.total:g} thousand images), {minutes} left."
        )


class Runs:
    """The runs of one user.

    Args:
        folder: Where the run folders are; it is made when the first run starts.
        spare: Where a process may wait for the next command.
    """

    def __init__(self, folder: Path, spare: Spare | None = None) -> None:
        self.folder, self.spare = Path(os.path.abspath(folder)), spare
        self._jobs: dict[str, Job] = {}

    def names(self) -> list[str]:
        """List the runs, the newest first."""
        if not self.folder.is_dir():
            return []
        found = {
            path.name: path.stat().st_mtime
            for path in self.folder.iterdir()
            if NAME.fullmatch(path.name) and (path / "config.json").is_file()
        }
        waiting = {n: 0.0 for n, job in self._jobs.items() if n not in found and job.running}
        return [*waiting, *sorted(found, key=lambda name: -found[name])]

    def path(self, name: str) -> Path:
        """Return the folder of a run.

        Raises:
            InputError: The name has characters other than letters, digits, - and _.
        """
        if not NAME.fullmatch(name):
            raise InputError(
                f"a run cannot be called {name!r}: give 1 to 40 letters, digits, - and _"
            )
        return self.folder / name

    def progress(self, name: str) -> Progress:
        """Return how far a run is."""
        path, job = self.path(name), self._jobs.get(name)
        running = job.running if job is not None else holder(path) is not None
        last = _last(path / "metrics.jsonl")
        page = path / "report.html"
        found = Progress(
            name=name,
            kimg=_number(last, "kimg"),
            total=_total(path),
            seconds=_number(last, "seconds"),
            running=running,
            usable=all((path / kind).is_dir() for kind in ("prior", "posterior")),
            page=page if page.is_file() else None,
            said=self._said(job),
            again=self._record(name).is_file(),
            complete=not (path / PREVIEW).exists(),
        )
        if found.finished:
            shutil.rmtree(self._images(name), ignore_errors=True)
        return found

    def start(
        self,
        name: str,
        data: Path,
        command: Callable[[Path, Path], Sequence[str]],
        uploaded: bool,
    ) -> Job:
        """Start a run.

        Args:
            name: Its name.
            data: The images.
            command: Returns the arguments of `learn` for the images and the run folder.
            uploaded: Whether the images belong to a session; then they are copied to the run.

        Raises:
            InputError: The name is taken or not usable, or nothing can be written there.
        """
        path = self.path(name)
        if path.exists() or name in self._jobs and self._jobs[name].running:
            raise InputError(f"there is a run '{name}' already: give another name")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if uploaded:
                data = self._keep(name, data)
            argv = list(command(data, path))
            atomic.write(self._record(name), json.dumps({"learn": argv}).encode())
            return self._begin(name, argv)
        except OSError as error:
            raise InputError(f"cannot write {self.folder}: {error.strerror}") from error

    def resume(self, name: str) -> Job:
        """Go on with a run that was stopped.

        Raises:
            InputError: It is running, or was not started by the app.
        """
        if self.progress(name).running:
            raise InputError(f"'{name}' is learning")
        record = self._record(name)
        if not record.is_file():
            raise InputError(f"'{name}' was not started here: go on with it on the command line")
        argv = read_object(record).get("learn")
        if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
            raise InputError(f"{record} holds no command: go on with it on the command line")
        return self._begin(name, argv)

    def stop(self, name: str) -> None:
        """Ask a run to save its state and end; nothing happens if it does not run."""
        job = self._jobs.get(name)
        pid = job.process.pid if job is not None and job.running else holder(self.path(name))
        if pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGINT)

    # -- files beside the run folder --------------------------------------------------------------

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.learn.json"

    def _images(self, name: str) -> Path:
        return self.folder / f"{name}.images"

    def _keep(self, name: str, data: Path) -> Path:
        """Copy uploaded images beside the run; return their place."""
        place = self._images(name)
        shutil.rmtree(place, ignore_errors=True)
        if data.is_dir():
            shutil.copytree(data, place)
            return place
        place.mkdir(mode=0o700)
        shutil.copy(data, place / data.name)
        return place / data.name

    def _begin(self, name: str, argv: Sequence[str]) -> Job:
        logs = self.folder / f"{name}.log"
        logs.mkdir(mode=0o700, exist_ok=True)
        job = self._jobs[name] = Job(argv, logs, spare=self.spare)
        if self.spare is not None:
            self.spare.ready()
        return job

    def _said(self, job: Job | None) -> str:
        """Return the last line of a process that has ended with an error, or that prints."""
        lines = [line for line in job.remarks() if line.strip()] if job is not None else []
        if not lines:
            return ""
        line = lines[-1].removeprefix(PREFIX)
        return "" if line.startswith("interrupted") else line


def _total(path: Path) -> float:
    try:
        settings = read_config(path).get("settings")
    except InputError:
        return 0.0
    return _number(settings if isinstance(settings, dict) else {}, "kimg")


def _last(path: Path) -> dict[str, Any]:
    """Return the last whole line of the metrics; empty if there is none."""
    found: dict[str, Any] = {}
    try:
        for _, _, line in json_lines(path):
            found = line or found
    except (InputError, OSError):
        return {}
    return found


def _number(values: dict[str, Any], key: str) -> float:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e12 else 0.0
