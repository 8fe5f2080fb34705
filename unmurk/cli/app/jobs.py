"""Commands of `unmurk` in processes of their own, and how the page shows them.

The app does nothing itself that the command line does: a `Job` runs the command, and `shown`
writes it as a user would type it. So the files that a user downloads are those of the command
line, bit for bit, one job cannot disturb another, and its memory is free afterwards.
"""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError, escape
from ...io.limits import VARIABLE
from .spare import Spare

__all__ = ["Job", "environment", "shown"]

PATIENCE = 10.0  # seconds between asking a process to end and ending it
MOST = 2**20  # bytes of a message that are read
PREFIX = "unmurk: "


def shown(argv: Sequence[str], names: Mapping[str, str] | None = None) -> str:
    """Return a command as a user types it.

    Args:
        argv: Arguments after the name of the program.
        names: What stands for paths of the app, such as the name of an uploaded file.

    >>> shown(["noise", "/data/a b.tif"], {"/data/a b.tif": "a b.tif"})
    "unmurk noise 'a b.tif'"
    """
    words = []
    for word in argv:
        for path, name in (names or {}).items():
            if word == path:
                word = name
            elif word.endswith(f"={path}"):
                word = word.removesuffix(path) + name
        words.append(shlex.quote(escape(word)))
    return " ".join(["unmurk", *words])


def environment(pixels: int | None = None) -> dict[str, str]:
    """Return the environment of a job.

    Args:
        pixels: Largest number of pixels of an image; None: that of this process.
    """
    found = dict(os.environ)
    root = Path(__file__).parents[3]
    if not {"site-packages", "dist-packages"} & set(root.parts):  # a checkout
        found["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(root), os.environ.get("PYTHONPATH", "")])
        )
    if pixels is not None:
        found[VARIABLE] = str(pixels)
    return found


class Job:
    """One command in a process of its own.

    Args:
        argv: Arguments after the name of the program.
        folder: Folder for what it prints; its results stay wherever the command writes them.
        pixels: Largest number of pixels of an image.
        spare: Where a process may wait that has made the imports already.

    Attributes:
        argv: The arguments.
        process: The process, the leader of a session of its own: signals that end the app do not
            reach it.
    """

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        pixels: int | None = None,
        spare: Spare | None = None,
    ) -> None:
        self.argv, self._asked = list(argv), False
        self._out, self._said = folder / "stdout.json", folder / "stderr.txt"
        words = [*self.argv, "--json"]
        with open(self._out, "wb") as out, open(self._said, "wb") as said:
            waiting = None
            if spare is not None:
                more = {} if pixels is None else {VARIABLE: str(pixels)}
                waiting = spare.start(words, self._out, self._said, more)
            self.process = waiting or subprocess.Popen(
                [sys.executable, "-P", "-m", "unmurk", *words],  # -P: not the working folder
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=said,
                env=environment(pixels),
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def remarks(self) -> list[str]:
        """Return the lines that the command has printed for the user so far."""
        return _read(self._said).splitlines()

    def wait(self, pause: float = 0.3) -> Iterator[list[str]]:
        """Iterate over the remarks until the process ends."""
        while self.running:
            yield self.remarks()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(pause)

    def result(self) -> dict[str, Any]:
        """Return the result of the command.

        Raises:
            InputError: The command has refused its input, was stopped, or failed.
        """
        code = self.process.wait()
        if code == 0:
            return dict(json.loads(_read(self._out) or "{}"))
        if self._asked or code == 130 or code < 0:  # Python ends with 1 where it starts
            raise InputError("stopped")
        lines = [line for line in self.remarks() if line.strip()]
        last = lines[-1].removeprefix(PREFIX) if lines else f"the command ended with code {code}"
        raise InputError(last)

    def ask(self) -> None:
        """Ask the process to end, as with Ctrl-C."""
        if self.running:
            self._asked = True
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)

    def stop(self) -> None:
        """Ask the process to end, and end it if it does not."""
        self.ask()
        with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
            self.process.wait(PATIENCE)
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def _read(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(MOST).decode("utf-8", "replace")
