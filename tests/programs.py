"""Python programs in processes of their own, without the seconds of their imports.

`Popen` and `run` are those of `subprocess` for the command lines ``[sys.executable, ...]`` with
``-m MODULE``, ``-c CODE`` or a script. Each program is a fork of a server that has imported torch,
diffusers and unmurk already (`multiprocessing`, start method "forkserver"). It has a process id,
signals and an exit code of its own. For what happens while modules are imported, and for memory,
tests take `subprocess` itself.
"""

import io
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

__all__ = ["PIPE", "Popen", "run"]

PIPE = subprocess.PIPE
IMPORTED = ["torch", "diffusers.models.unets.unet_2d", "diffusers", "accelerate"]
IMPORTED += ["unmurk.cli.main", "unmurk.cli.commands.learn", "unmurk.cli.commands.restore"]
IMPORTED += ["unmurk.training", "unmurk.solvers", "unmurk.diffusion.pretrained"]
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.programs", *IMPORTED])


def _begin(argv: list[str], cwd: str, env: dict[str, str], out: Connection, err: Connection):
    """Be the program: its arguments, folder, environment and streams, then its code."""
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(stream.fileno(), number)
        stream.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = (io.TextIOWrapper(open(n, "wb", closefd=False)) for n in (1, 2))
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    above = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part]
    kind, *rest = argv
    first = cwd if kind in ("-m", "-c") else str(Path(kind).parent)
    sys.path[:0] = [first, *above]
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(kind, run_name="__main__")


class Popen:
    """A program that runs. Its streams are pipes of text, as with stdout=PIPE, stderr=PIPE."""

    def __init__(self, argv, *, cwd=None, env=None, stdout=PIPE, stderr=PIPE, text=True):
        python, *rest = map(str, argv)
        assert python == sys.executable and text and {stdout, stderr} == {PIPE}
        (out, to_out), (err, to_err) = Pipe(duplex=False), Pipe(duplex=False)
        given = dict(os.environ if env is None else env)
        self._process = CONTEXT.Process(
            target=_begin, args=(rest, str(cwd or os.getcwd()), given, to_out, to_err)
        )
        self._process.start()
        to_out.close()
        to_err.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(end.fileno())) for end in (out, err))
        out.close()
        err.close()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self):
        self._process.join()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self):
        """Read both streams to their ends and wait for the program."""
        parts = {self.stdout: [], self.stderr: []}
        open_ = list(parts)
        while open_:
            for stream in wait(open_):
                read = os.read(stream.fileno(), 1 << 16)
                parts[stream].append(read)
                if not read:
                    open_.remove(stream)
        self.wait()
        for stream in parts:
            stream.close()
        return tuple(b"".join(read).decode() for read in parts.values())


def run(argv, *, check=False, **options):
    """Run a program to its end."""
    for default in ("capture_output", "text"):
        options.pop(default, None)
    program = Popen(argv, **options)
    out, err = program.communicate()
    done = subprocess.CompletedProcess(argv, program.returncode, out, err)
    if check:
        done.check_returncode()
    return done
