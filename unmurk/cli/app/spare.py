"""A process that has imported a command's libraries before the command is known.

Every action of the app is a command in a process of its own, and its imports take seconds. `Spare`
keeps one process that has made them and waits. It receives a command on its standard input and
becomes ``python -m unmurk COMMAND``, with the same files, signals and exit codes as a process that
was started for it. Without a command it ends with the app, whose end closes its standard input.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

__all__ = ["Spare", "main"]

IMPORTED = (
    "torch._dynamo",  # checkpoints of a network import it
    "unmurk.cli.main",
    "unmurk.cli.commands.learn",
    "unmurk.cli.commands.noise",
    "unmurk.cli.commands.restore",
    "unmurk.cli.commands.solve",
    "unmurk.flows.posterior",
    "unmurk.io.images",
    "unmurk.noise_checks",
    "unmurk.solvers",
    "unmurk.training",
)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Spare:
    """Start commands in a process that waits for them; without one, start them as usual.

    Args:
        environment: Environment of the processes.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._waiting: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def ready(self) -> None:
        """Start the process that waits, unless there is one."""
        with self._lock:
            if self._closed or (self._waiting is not None and self._waiting.poll() is None):
                return
            self._waiting = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )

    def start(
        self, argv: Sequence[str], out: Path, said: Path, variables: Mapping[str, str]
    ) -> "subprocess.Popen[bytes] | None":
        """Give a command to the process that waits.

        Args:
            argv: Arguments after the name of the program.
            out: File for its standard output.
            said: File for its standard error.
            variables: Environment variables that differ from those of the process.

        Returns:
            The process; None if none waits.
        """
        with self._lock:
            process, self._waiting = self._waiting, None
        if process is None or process.stdin is None:
            return None
        job = {"argv": list(argv), "out": str(out), "said": str(said), "variables": {**variables}}
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.close()
        except OSError:  # it has ended
            process.wait()
            return None
        return process

    def close(self) -> None:
        """End the process that waits."""
        with self._lock:
            self._closed = True
            process, self._waiting = self._waiting, None
        if process is not None:
            process.kill()  # it writes nothing
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()


def main() -> None:
    """Make the imports, wait for a command, and become it."""
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)  # nothing is written yet
    for name in IMPORTED:
        import_module(name)
    line = sys.stdin.buffer.readline()
    if not line:  # the app has ended
        return
    job = json.loads(line)
    for path, number in ((os.devnull, 0), (job["out"], 1), (job["said"], 2)):
        opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.update(job["variables"])
    sys.argv = ["unmurk", *job["argv"]]
    runpy.run_module("unmurk", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
