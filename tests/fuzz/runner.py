"""Run fuzz cases in forked workers, under limits of time and memory, and judge how each ends.

A case is a function of a random generator and an empty folder. It is handled well if it returns,
or raises `InputError` with one printable line. Everything else is mishandled: another exception,
`Mishandled` raised by the case itself, output of another library, more than `SECONDS` of CPU time,
more than `MEMORY` bytes, or the end of the process.

A case depends on (seed, class, index) only, so one line is enough to run it again.
"""

import contextlib
import ctypes
import gc
import importlib
import math
import os
import random
import resource
import selectors
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from unmurk.errors import InputError

from .commands import captured
from .judge import Mishandled, check_message, check_output

SECONDS = 5.0  # of CPU time for one case, where its class names no other limit
WAITING = 8.0  # seconds that a case may wait without computing, in a read from a pipe, say
MEMORY = 2**30  # bytes that a worker may take beyond what it starts with
BATCH = 50  # cases for each worker
WORKERS = 2

Run = Callable[[random.Random, Path], None]


class TooLong(BaseException):
    """A case used up its time. Not an Exception, so that no handler takes it for bad input."""


@dataclass
class Found:
    """A mishandled case: what happened, and where."""

    kind: str
    index: int
    problem: str

    def line(self, seed: int) -> str:
        """The line that names the case and says what happened."""
        return f"{self.kind} {seed} {self.index}: {self.problem}"


def generator(seed: int, kind: str, index: int) -> random.Random:
    """The random generator of a case; torch and numpy start from it too."""
    draws = random.Random(f"{seed} {kind} {index}")
    torch.manual_seed(draws.getrandbits(32))
    np.random.seed(draws.getrandbits(32))
    return draws


def warm() -> None:
    """Import what commands import late, so that no case pays for it, or is stopped half-way."""
    for name in (
        "accelerate diffusers jinja2 matplotlib.figure rich.progress safetensors.torch tifffile"
        " imagecodecs torchmetrics unmurk.cli.certificate unmurk.cli.main unmurk.cli.demo"
        " unmurk.io.jobs unmurk.training unmurk.evaluation.metrics unmurk.cli.report"
        " unmurk.solvers unmurk.tiling"
    ).split():
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: F401  (lazy as well)


# -- one case ----------------------------------------------------------------------------------


def attempt(run: Run, draws: random.Random, folder: Path, limits: bool = True) -> str:
    """Run a case, with file descriptors 1 and 2 captured. Returns what went wrong, or ""."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    problem = ""
    seconds = run.__globals__.get("SECONDS", SECONDS) if limits else math.inf  # type: ignore
    try:
        with captured() as read, clock(seconds):
            try:
                run(draws, folder)
            except InputError as error:
                check_message(str(error))
            check_output(read())
    except TooLong as error:
        problem = f"TooLong: {error} {_place(error)}"
    except BaseException as error:
        problem = f"{type(error).__name__}: {_short(error)} {_place(error)}"
        if not limits:
            traceback.print_exc()
    return problem.replace(str(folder), "FOLDER")


@contextlib.contextmanager
def clock(seconds: float) -> Iterator[None]:
    """Raise `TooLong` after some seconds of CPU time, or after `WAITING` seconds without any."""
    begin, cpu, queued = time.monotonic(), time.process_time(), _queued()

    def look(number: int, frame: FrameType | None) -> None:
        spent, passed = time.process_time() - cpu, time.monotonic() - begin
        if spent > seconds:
            raise TooLong(f"more than {seconds:g} s of CPU time")
        if passed - spent - (_queued() - queued) > WAITING:
            raise TooLong(f"waits for more than {WAITING:g} s")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _queued() -> float:
    """Seconds that this process has been ready to run while others ran."""
    return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _place(error: BaseException) -> str:
    """The innermost frame of unmurk, and the innermost of all where that is another one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/unmurk/" in f.filename]
    if isinstance(error, Mishandled) or not frames:
        return ""
    text = "".join(f"[{_name(f)}]" for f in ours[-1:])
    return text + (f"[{_name(frames[-1])}]" if not ours or frames[-1] is not ours[-1] else "")


def _name(frame: traceback.FrameSummary) -> str:
    file = frame.filename
    for root in ("/unmurk/", "/site-packages/", "/lib/"):
        if root in file:
            file = (root.strip("/") + "/" if root == "/unmurk/" else "") + file.rpartition(root)[2]
            break
    return f"{file}:{frame.lineno} {frame.name}"


# -- workers -----------------------------------------------------------------------------------


@dataclass
class Worker:
    """A forked process and what it has reported."""

    pid: int
    pipe: int
    todo: list[tuple[str, int]]
    text: bytes = b""
    current: tuple[str, int] | None = None
    since: float = field(default_factory=time.monotonic)


def _work(
    todo: Sequence[tuple[str, int]], runs: dict[str, Run], seed: int, out: int, stop: float
) -> None:
    """What a worker does: each case in turn, a line before it and a line after it."""
    folder = Path(os.environ["FUZZ_FOLDER"]) / f"worker-{os.getpid()}"
    ctypes.CDLL(None).mallopt(-8, 2)  # two arenas: one for each thread would count as memory
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, index in todo:
        if time.monotonic() > stop:
            break
        os.write(out, f"begin {kind} {index}\n".encode())
        problem = attempt(runs[kind], generator(seed, kind, index), folder)
        os.write(out, f"end {problem}\n".encode("utf-8", "replace"))
    os.chdir("/")
    shutil.rmtree(folder, ignore_errors=True)


def _fork(todo: list[tuple[str, int]], runs: dict[str, Run], seed: int, stop: float) -> Worker:
    here, there = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # what the parent holds is never collected again
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(here)
            _work(todo, runs, seed, there, stop)
            code = 0
        finally:
            os._exit(code)
    os.close(there)
    return Worker(pid, here, todo)


def run_cases(
    cases: Sequence[tuple[str, int]],
    runs: dict[str, Run],
    seed: int,
    minutes: float = 10.0,
    done: Callable[[Found | None], Any] = lambda found: None,
) -> dict[tuple[str, int], str]:
    """Run cases in `WORKERS` processes at a time.

    Args:
        cases: Class and index of each.
        runs: The function of each class.
        minutes: No case starts after so many minutes.
        done: Called after each case, with what was found.

    Returns:
        What went wrong, or "", for every case that was tried.
    """
    stop = time.monotonic() + 60 * minutes
    waiting = [list(cases[at : at + BATCH]) for at in range(0, len(cases), BATCH)]
    results: dict[tuple[str, int], str] = {}
    selector = selectors.DefaultSelector()

    def finish(case: tuple[str, int], problem: str) -> None:
        results[case] = problem
        done(Found(*case, problem) if problem else None)

    while waiting or selector.get_map():
        while waiting and len(selector.get_map()) < WORKERS and time.monotonic() < stop:
            worker = _fork(waiting.pop(0), runs, seed, stop)
            selector.register(worker.pipe, selectors.EVENT_READ, worker)
        if not selector.get_map():
            break
        for key, _ in selector.select(1.0):
            _listen(key.data, finish)
        for key in list(selector.get_map().values()):
            worker = key.data
            if worker.current and time.monotonic() - worker.since > 20 * WAITING:
                os.kill(worker.pid, signal.SIGKILL)
            if not worker.text.endswith(b"\0"):
                continue
            selector.unregister(worker.pipe)
            rest = _bury(worker, finish)
            if rest:
                waiting.insert(0, rest)
    return results


def _listen(worker: Worker, finish: Callable[[tuple[str, int], str], None]) -> None:
    """Take what a worker has written; its text ends in a zero byte once there is no more."""
    data = os.read(worker.pipe, 65536)
    *lines, worker.text = (worker.text + data).split(b"\n")
    for line in lines:
        word, _, rest = line.decode("utf-8", "replace").partition(" ")
        if word == "begin":
            worker.current, worker.since = worker.todo.pop(0), time.monotonic()
        elif worker.current is not None:
            finish(worker.current, rest)
            worker.current = None
    if not data:
        worker.text = b"\0"


def _bury(worker: Worker, finish: Callable[[tuple[str, int], str], None]) -> list[tuple[str, int]]:
    """Say how a worker ended if it was in the middle of a case. Returns the cases it has left."""
    os.close(worker.pipe)
    _, status = os.waitpid(worker.pid, 0)
    if worker.current is not None:
        cause = "the process ended"
        if os.WIFSIGNALED(status):
            cause = f"the process ended by {signal.Signals(os.WTERMSIG(status)).name}"
        if time.monotonic() - worker.since > 20 * WAITING:
            cause = f"TooLong: no answer within {20 * WAITING:g} s"
        finish(worker.current, cause)
    elif worker.todo and status != 0:
        finish(worker.todo.pop(0), "the worker ended before this case")
    shutil.rmtree(Path(os.environ["FUZZ_FOLDER"]) / f"worker-{worker.pid}", ignore_errors=True)
    return worker.todo
