"""Jobs of the app without the seconds of their imports: forks of a server that has made them.

`Popen` stands for `subprocess.Popen` in `unmurk.cli.app.jobs`: a process of its own with its own
process id, signals, exit code and files for its output (see `tests.programs`).
"""

import os
import signal
import subprocess
import sys

from tests.programs import CONTEXT

__all__ = ["Popen"]


def _begin(argv, out, said, env):
    """Be the command line, with its output in two files."""
    os.setsid()
    for name, number in ((out, 1), (said, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    from unmurk.cli.main import main

    sys.exit(main(argv))


class Popen:
    """A process; the arguments are those that `Job` gives."""

    def __init__(self, words, *, stdin, stdout, stderr, env, start_new_session):
        assert words[:4] == [sys.executable, "-P", "-m", "unmurk"] and start_new_session
        assert stdin == subprocess.DEVNULL
        given = (words[4:], stdout.name, stderr.name, env)
        self._process = CONTEXT.Process(target=_begin, args=given)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("unmurk", timeout)
        return self.poll()

    def send_signal(self, number):
        os.kill(self.pid, number)
