"""How a command ends: one line and exit code 2, or 130 for Ctrl-C, whatever the system does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import programs
from unmurk.cli import main as cli
from unmurk.cli.console import escape, lines
from unmurk.diffusion.prior import Prior
from unmurk.io.ledger import LOG

rng = np.random.default_rng(0)
EVIL = "a\x1b[31m\nb\u202e\x7f\udcff.png"  # colour, newline, direction, delete, no UTF-8
SAFE = r"a\x1b[31m\nb\u202e\x7f\xff.png"


def unmurk(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", rng.uniform(0.2, 0.8, (2, 16, 16)).astype("f4"))
    return tmp_path


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- options ------------------------------------------------------------------------------------

LONG = "n" * 300
SEED = "a whole number from 0 to 9223372036854775807"
SAMPLE = ["sample", "--prior", "digits", "--out", "z"]
OPTIONS: list[tuple[list[str], str]] = [
    (["corrupt", "y.npy", "--out", "z.npy", "--seed", "-1"], f"--seed must be {SEED}, got -1"),
    (["corrupt", "y.npy", "--out", "z.npy", "--seed", str(2**63)], f"--seed must be {SEED}, got"),
    ([*SAMPLE, "--seed", "-1"], f"--seed must be {SEED}, got -1"),
    ([*SAMPLE, "-n", "100000000000"], "--n must be a whole number from 1 to 10000000, got 100"),
    ([*SAMPLE, "--steps", "1"], "--steps must be a whole number from 2 to 10000, got 1"),
    (["sample", "--prior", LONG, "--out", "z"], "n"),
    (["corrupt", LONG, "--out", "z.npy"], "name too long"),
    (["corrupt", "y.npy", "--out", LONG], "name too long"),
    (["corrupt", "y.npy", "--out", f"{LONG}/z.npy"], "name too long"),
    (["learn", "y.npy", "--noise", "0.1", "--out", LONG], "name too long"),
    (["learn", LONG, "--noise", "0.1", "--out", "z"], "name too long"),
    (["report", LONG], "name too long"),
    (["corrupt", "y.npy", "--out="], "--out is empty"),
    (["corrupt", "", "--out", "z.npy"], "is empty"),
]
SOLVE = ["solve", "y.npy", "--prior", "digits", "--operator", "identity", "--noise", "0.1"]
RESTORE = ["restore", "y.npy", "--prior", "digits", "--operator", "identity", "--noise", "0.1"]
EVEN = "an even number from 2 to 100000"
OPTIONS += [
    (
        [*SOLVE, "--out", "z", "--samples", "1000000000"],
        "--samples must be a whole number from 1 to 100000, got 1000000000",
    ),
    (
        [*SOLVE, "--out", "z", "--restarts", "0"],
        "--restarts must be a whole number from 1 to 10000, got",
    ),
    (
        [*SOLVE, "--out", "z", "--batch", "0"],
        "--batch must be a whole number from 1 to 4096, got 0",
    ),
    (
        [*SOLVE, "--out", "z", "--batch", "4097"],
        "--batch must be a whole number from 1 to 4096, got 4097",
    ),
    ([*RESTORE, "--out", "z", "--samples", "1000000000"], f"--samples must be {EVEN}, got 10"),
    ([*RESTORE, "--out", "z", "--samples", "-2"], f"--samples must be {EVEN}, got -2"),
]


@pytest.mark.parametrize(("argv", "said"), OPTIONS)
def test_options_out_of_bounds(argv, said, here, capsys):
    assert unmurk(*argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and said in shown.err
    assert left(here) == ["y.npy"]


# -- streams ------------------------------------------------------------------------------------


def program(*argv: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The program itself, with a stream redirected by a shell."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -m unmurk "$@" {redirect}', sys.executable, *argv],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_stdout_that_is_closed_or_full(here):
    argv = ["corrupt", "y.npy", "--out", "z.npy", "--noise", "0.1"]
    done = program(*argv, redirect=">&-")
    assert done.returncode == 2 and done.stderr.startswith(b"unmurk: stdout is closed")
    assert len(done.stderr.splitlines()) == 1 and left(here) == ["y.npy"]
    if os.path.exists("/dev/full"):
        for words in (["--version"], ["--help"], argv):
            done = program(*words, redirect=">/dev/full")
            assert done.returncode == 2 and b"stdout: No space left" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        assert np.load("z.npy").shape == (2, 1, 16, 16)  # what was written stays


def test_stderr_and_stdin_that_are_closed(here):
    """A file that is opened later does not take the place of a standard stream."""
    done = program("corrupt", "y.npy", "--out", "z.npy", redirect="2>&- <&-")
    assert done.returncode == 0 and b"z.npy" in done.stdout
    plain = np.load("z.npy")
    assert np.allclose(plain[:, 0], np.load("y.npy"), atol=1e-6)
    assert program("corrupt", "none.npy", "--out", "x.npy", redirect="2>&-").returncode == 2


def test_an_encoding_that_lacks_characters(here):
    (here / "bild-ä.npy").write_bytes((here / "y.npy").read_bytes())
    for encoding in ("ascii",):
        done = program("corrupt", "--help", PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and b"--operator" in done.stdout
        out = f"z-π-{encoding}.npy"
        done = program("corrupt", "bild-ä.npy", "--out", out, PYTHONIOENCODING=encoding)
        assert done.returncode == 0 and rb"z-\u03c0" in done.stdout
        done = program("corrupt", "π.npy", "--out", "none.npy", PYTHONIOENCODING=encoding)
        assert done.returncode == 2 and rb"\u03c0.npy" in done.stderr
        assert b"Traceback" not in done.stderr


# -- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["tyro", "unmurk.cli.commands", "torch", "unmurk.io.saving"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_modules_are_imported(module, name, here):
    """The moment is fixed: when Python looks for a module. One line, 130, nothing is left."""
    code = f"""
import os, signal, sys
class Interrupt:
    seen = False
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == {module!r} and not cls.seen:
            cls.seen = True
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Interrupt)
from unmurk.__main__ import main
sys.argv = ["unmurk", "sample", "--prior", "digits", "--out", "new/z", "-n", "100000"]
sys.exit(main())
"""  # it would take hours
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 130
    assert done.stderr.startswith(b"unmurk: interrupted")
    assert len(done.stderr.splitlines()) == 1 and left(here) == ["y.npy"]


def test_handlers_are_given_back(here):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert unmurk("corrupt", "y.npy", "--out", "z.npy") == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# -- names that are no text ---------------------------------------------------------------------


def test_escape():
    assert escape(EVIL) == SAFE
    assert escape("Grüße 日本 😀 a\u00a0b") == r"Grüße 日本 😀 a\xa0b"
    assert escape("\x9b31m \u2028 \u2066 \ud800") == r"\x9b31m \u2028 \u2066 \ud800"
    assert list(lines({EVIL: {"x": EVIL}})) == [SAFE, f"  {'x':<10} {SAFE}"]


def test_names_do_not_reach_the_terminal_raw(here, capsys):
    (here / "D").mkdir()
    Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8)).save(here / "D" / "good.png")
    (here / "D" / EVIL).write_bytes(b"no picture")
    for argv in (
        ["corrupt", "D", "--out", "z.npy"],
        ["corrupt", EVIL, "--out", "z.npy"],
        ["corrupt", "D", "--out", f"D/{EVIL}"],
        ["corrupt", "D", "--noise", EVIL, "--out", "z.npy"],
        [f"smudge-{EVIL}"],
        ["corrupt", "D", "--out", "z.npy", f"--{EVIL}"],
    ):
        assert unmurk(*argv) == 2
        shown = capsys.readouterr()
        assert "\x1b[31m" not in shown.out + shown.err and "\u202e" not in shown.out + shown.err
        assert "b" in shown.err and r"\x1b[31m" in shown.err
    assert unmurk("corrupt", "D", "--skip-bad", "--out", "z.npy", "--json") == 0
    shown = capsys.readouterr()
    assert list(json.loads(shown.out)["skipped"]) == [EVIL]  # JSON tells the name as it is
    assert SAFE in shown.err and "\x1b" not in shown.err and shown.out.isascii()
    assert unmurk("corrupt", "D", "--skip-bad", "--out", f"{EVIL}.npy") == 0
    shown = capsys.readouterr()
    assert f"{SAFE}.npy" in shown.out and "\x1b" not in shown.out + shown.err


# -- a full disk --------------------------------------------------------------------------------

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from unmurk.__main__ import main
sys.argv = ["unmurk", *sys.argv[2:]]
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("out", "limit"), [("new/x.npy", 20_000), ("x.npz", 3000), ("new", 20_000)]
)
def test_a_full_disk_ends_solve_with_one_line(out, limit, here, capsys):
    """No file may be so large: the samples' room is taken before, and nothing is left."""
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(here / "prior")
    np.save("y.npy", rng.uniform(0.2, 0.8, (4, 16, 16)).astype("f4"))
    argv = ["solve", "y.npy", "--prior", "prior", "--operator", "identity", "--noise", "0.1"]
    argv += ["--steps", "1", "--samples", "8", "--batch", "2", "--out", out]
    done = programs.run([sys.executable, "-c", LIMITED, limit, *argv])
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "cannot write" in done.stderr and "MB are needed" in done.stderr
    assert left(here) == ["prior", "y.npy"]


def test_results_do_not_depend_on_the_batch(here):
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(here / "prior")
    np.save("y.npy", rng.uniform(0.2, 0.8, (5, 16, 16)).astype("f4"))
    argv = ["solve", "y.npy", "--prior", "prior", "--operator", "identity", "--noise", "0.1"]
    argv += ["--steps", "2", "--samples", "3"]
    for batch in (1, 2, 5):
        assert unmurk(*argv, "--batch", batch, "--out", f"{batch}.npy") == 0
    for name in ("{}.npy", "{}-std.npy", "{}-samples.npy"):
        one, two, five = (np.load(name.format(batch)) for batch in (1, 2, 5))
        assert np.allclose(one, five, atol=1e-5) and np.allclose(two, five, atol=1e-5)
    assert np.load("5-samples.npy").shape == (3, 5, 1, 16, 16)
    assert len((here / f"5-{LOG}").read_text().splitlines()) == 2
