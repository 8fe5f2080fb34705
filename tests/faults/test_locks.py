"""One lock a job: a second job is told who holds it; processes of one job share it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unmurk.cli import main as cli
from unmurk.errors import InputError
from unmurk.io import atomic, locks
from unmurk.io.locks import locked, ranks

HOLD = """
import os, sys, time
from pathlib import Path
from unmurk.errors import InputError
from unmurk.io.locks import locked
try:
    with locked(Path(sys.argv[1]), sys.argv[2]):
        print("held", flush=True)
        sys.stdin.read()  # until the test closes it
except InputError as error:
    print("refused", error, flush=True)
    sys.exit(2)
"""


@pytest.fixture
def start():
    """Starts processes that hold a lock until their stdin is closed."""
    started = []

    def one(path: Path, job: str = "job", **environment: object) -> subprocess.Popen:
        clear = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}}
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path), job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clear | {k: str(v) for k, v in environment.items()},
        )
        started.append(process)
        return process

    yield one
    for process in started:
        process.kill()
        if process.stdin and not process.stdin.closed:
            process.communicate()


@pytest.fixture
def hold(start):
    """The same; gives also the first line of each, which says whether it holds the lock."""

    def one(*args: object, **environment: object) -> tuple[subprocess.Popen, str]:
        process = start(*args, **environment)
        return process, process.stdout.readline()

    return one


SECOND = [
    ["corrupt", "HERE/y.npy"],
    ["learn", "HERE/y.npy", "--noise", "0.1"],
    ["sample", "--prior", "digits"],
    ["solve", "HERE/y.npy", "--prior", "digits", "--operator", "identity", "--noise", "0.1"],
    ["restore", "HERE/y.npy", "--prior", "digits", "--operator", "identity", "--noise", "0.1"],
    ["certify"],
    ["demo"],
]


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_second_job_is_told_who_holds_it(tmp_path, capsys, hold):
    np.save(tmp_path / "y.npy", np.zeros((2, 8, 8), np.float32))
    out = tmp_path / "out"
    first, said = hold(out)
    assert said == "held\n"
    for argv in SECOND:
        words = [word.replace("HERE", str(tmp_path)) for word in argv]
        assert cli.main([*words, "--out", str(out)]) == 2
        line = capsys.readouterr().err
        assert len(line.splitlines()) == 1 and f"process {first.pid} on " in line
        assert "out is in use" in line and time.strftime("since %Y-") in line
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert len([name for name in left(tmp_path) if name.endswith(".lock")]) == 1
    assert cli.main(["corrupt", str(tmp_path / "y.npy"), "--out", str(out)]) == 0
    assert left(tmp_path) == ["out", "y.npy"]  # a lock of the dead is no lock, and goes


def test_other_outputs_are_free(tmp_path):
    with locked(tmp_path / "a"), locked(tmp_path / "a"), locked(tmp_path / "b"):
        assert len(left(tmp_path)) == 2
    assert left(tmp_path) == []


def test_links_name_the_same_lock(tmp_path, hold):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    first, said = hold(tmp_path / "real")
    second, refused = hold(tmp_path / "link")
    assert first.pid != second.pid
    assert said == "held\n" and refused.startswith("refused")


# jobs, then whether the last one gets in beside the first ones, and what each brings
SHARED = [
    ("all", True, [("a", 0, 2, {}), ("a", 1, 2, {})]),
    ("the same rank", False, [("a", 0, 2, {}), ("a", 0, 2, {})]),
    ("another job", False, [("a", 0, 2, {}), ("b", 1, 2, {})]),
    ("another size", False, [("a", 0, 2, {}), ("a", 1, 3, {})]),
    ("alone", False, [("a", 0, 2, {}), ("a", 0, 1, {})]),
    ("beside one alone", False, [("a", 0, 1, {}), ("a", 1, 2, {})]),
    ("a launch", True, [("a", 0, 2, {"MASTER_PORT": 1}), ("a", 1, 2, {"MASTER_PORT": 1})]),
    ("another launch", False, [("a", 0, 2, {"MASTER_PORT": 1}), ("a", 1, 2, {"MASTER_PORT": 2})]),
]


@pytest.mark.parametrize(("name", "shares", "jobs"), SHARED, ids=[case[0] for case in SHARED])
def test_processes_of_one_job_share(name, shares, jobs, tmp_path, hold):
    out = tmp_path / "out"
    found = [hold(out, job, RANK=r, WORLD_SIZE=n, **more) for job, r, n, more in jobs]
    said = [line for _, line in found]
    for process, _ in found:
        process.kill()
        process.communicate()
    assert said[0] == "held\n"
    assert (said[1] == "held\n") == shares
    with locked(out):
        pass
    kept = [f for f in left(tmp_path) if not f.endswith(("-0.lock", "-1.lock"))]
    assert kept == []


def test_the_last_of_a_job_removes_the_lock(tmp_path, hold):
    found = [hold(tmp_path / "out", RANK=rank, WORLD_SIZE=3) for rank in range(3)]
    assert [line for _, line in found] == ["held\n"] * 3
    for count, (process, _) in zip((4, 3, 2), found, strict=True):  # one for all, one for each
        assert len(left(tmp_path)) == count
        process.communicate()
    assert left(tmp_path) == []


@pytest.mark.parametrize("size", [1, 6])
def test_many_processes_start_together(size, tmp_path, start):
    """Of six that start at once exactly one gets the lock, and all of one job share it."""
    ranks = [{"RANK": r, "WORLD_SIZE": size} if size > 1 else {} for r in range(6)]
    found = [start(tmp_path / "out", **rank) for rank in ranks]
    assert [process.stdout.readline() for process in found].count("held\n") == size


def test_where_there_are_no_locks_a_line_says_so(tmp_path, capsys, monkeypatch):
    class NoLocks:
        LOCK_EX, LOCK_SH, LOCK_NB = 1, 2, 4

        @staticmethod
        def flock(_fd, _kind):
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(atomic, "fcntl", NoLocks)
    with locked(tmp_path / "out"):
        atomic.write(tmp_path / "out", b"whole")
    assert left(tmp_path) == ["out"]
    assert capsys.readouterr().err.startswith("unmurk: no locks on this disk")


def test_a_lock_that_says_nothing_is_a_lock(tmp_path, monkeypatch, hold):
    """An empty lock file that another process holds: refused, not waited for without end."""
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    first, _ = hold(tmp_path / "out")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"")
    with pytest.raises(InputError, match=r"process \? on \?"), locked(tmp_path / "out"):
        pass
    assert first.poll() is None


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["x", "", "-1", "1.5", "\u0663", "9" * 400], ids=ascii)
def test_ranks_that_are_none(name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    np.save(tmp_path / "y.npy", np.zeros((2, 8, 8), np.float32))
    argv = ["corrupt", str(tmp_path / "y.npy"), "--out", str(tmp_path / "z.npy")]
    assert cli.main(argv) == 2
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and name in line
    assert left(tmp_path) == ["y.npy"]


def test_no_ranks_are_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks() == (0, 1)


def test_what_holds_a_lock_is_escaped(tmp_path, capsys, hold):
    """A command line with an escape sequence in it does not reach the terminal raw."""
    first, _ = hold(tmp_path / "out")
    (file,) = tmp_path.iterdir()
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"command": "unmurk \x1b[31m\nevil"}))
    np.save(tmp_path / "y.npy", np.zeros((2, 8, 8), np.float32))
    argv = ["corrupt", str(tmp_path / "y.npy"), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    line = capsys.readouterr().err
    assert first.poll() is None
    assert "\x1b" not in line and line.count("\n") == 1 and r"\x1b[31m\nevil" in line
