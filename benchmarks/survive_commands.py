"""Whether `corrupt`, `sample`, `restore` and `solve` survive being killed.

Each command is run whole. Then it is killed (kill -9) again and again, each time after it has
written a random number of further files, or at a random moment before that, and given once more to
its end; the same with Ctrl-C. The results must be the same files, bit for bit, and no other file
may be left: after Ctrl-C at once, after a kill once the next call has ended.

    python benchmarks/survive_commands.py                             20 kills and 20 interrupts
    python benchmarks/survive_commands.py --kills 3 --commands sample
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from provenance import ROOT, command, machine, markdown, write_json

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.ledger import LOG

__all__: list[str] = []

FIGURES = ROOT / "benchmarks" / "results" / "survive_commands.json"
FILES = 40  # of a command
COMMANDS: dict[str, list[str]] = {
    "corrupt": ["corrupt", "in", "--noise", "0.1"],
    "sample": ["sample", "--prior", "run", "-n", str(FILES), "--steps", "4"],
    "restore": ["restore", "in", "--prior", "run", "--samples", "2", "--std", "--batch", "4"],
    "solve": ["solve", "in", "--prior", "run", "--samples", "2", "--steps", "2", "--batch", "4"],
}


@dataclass(frozen=True)
class Options:
    """Kill commands and see them end as if nothing had happened."""

    commands: tuple[str, ...] = tuple(COMMANDS)
    """Commands to try."""
    kills: int = 20
    """Kills, and interrupts, of every command."""
    seed: int = 0
    """Seed of the moments."""
    out: Path = FIGURES
    """File for the figures."""


def prepare(folder: Path) -> None:
    """Inputs and a run whose networks were never trained."""
    rng = np.random.default_rng(0)
    (folder / "in").mkdir(parents=True)
    for i in range(FILES):
        pixels = rng.integers(60, 200, (16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{i:02d}.png")
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(folder / "run" / "prior")
    Posterior.create("tiny", (1, 16, 16)).save(folder / "run" / "posterior")


def start(name: str, folder: Path, out: str) -> "subprocess.Popen":
    """Begins or continues a command."""
    argv = [*COMMANDS[name], "--out", out]
    if name in ("restore", "solve"):
        argv += ["--operator", "identity", "--noise", "0.1"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "unmurk", *argv],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


def whole(name: str, folder: Path, out: str) -> None:
    """Runs a command to its end."""
    run = start(name, folder, out)
    said = run.communicate()[1]
    if run.returncode:
        raise InputError(f"{name} ended with {run.returncode}: {said}")


def results(folder: Path) -> dict[str, bytes]:
    """Everything in a folder of results but the log, hidden files too."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != LOG}


def count(folder: Path) -> int:
    """Files in a folder of results so far."""
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def stopped(run: "subprocess.Popen", out: Path, number: int, wait: float, more: int) -> str:
    """Sends a signal after so many more files, or `wait` seconds if that is earlier; returns what
    the command said."""
    before, began = count(out), time.monotonic()
    while run.poll() is None and count(out) < before + more:
        if time.monotonic() - began > wait:
            break
        time.sleep(0.005)
    run.send_signal(number)
    return run.communicate()[1]


def disturbed(name: str, folder: Path, kills: int, number: int, seed: int) -> dict[str, Any]:
    """Stops a command again and again; how often it was stopped, and what was left of it."""
    rng, out = random.Random(seed), f"out-{number}"
    found = {"times": 0, "one line": True, "nothing partial": True, "same files": True}
    for _ in range(kills):
        run = start(name, folder, out)
        more = rng.randint(1, max(2, 3 * FILES // kills))
        wait = rng.uniform(0.3, 5.0) if rng.random() < 0.3 else 120.0
        said = stopped(run, folder / out, number, wait, more)
        if run.returncode == 0:  # it was done before
            whole(name, folder, out)
            found["same files"] &= results(folder / out) == results(folder / "whole")
            out = f"{out}x"
        found["times"] += 1
        if number == signal.SIGINT and run.returncode:
            found["one line"] &= len(said.strip().splitlines()) == 1 and run.returncode == 130
            found["nothing partial"] &= not list(folder.rglob(".unmurk-*"))
    whole(name, folder, out)
    found["same files"] &= results(folder / out) == results(folder / "whole")
    found["nothing partial"] &= not list(folder.rglob(".unmurk-*"))
    return found


def survive(name: str, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Everything for one command."""
    prepare(folder)
    whole(name, folder, "whole")
    killed = disturbed(name, folder, kills, signal.SIGKILL, seed)
    asked = disturbed(name, folder, kills, signal.SIGINT, seed + 1)
    return {
        "command": name,
        "kills": killed["times"],
        "same files after kills": killed["same files"],
        "nothing partial after kills": killed["nothing partial"],
        "interrupts": asked["times"],
        "same files after interrupts": asked["same files"],
        "one line after interrupts": asked["one line"],
        "nothing partial after interrupts": asked["nothing partial"],
    }


@command
def main() -> None:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    rows = []
    for name in options.commands:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(survive(name, Path(folder), options.kills, options.seed))
        print(rows[-1], file=sys.stderr, flush=True)
        write_json(options.out, {"files": FILES, "machine": machine(), "rows": rows})
    print(markdown([list(rows[0]), *([str(v) for v in row.values()] for row in rows)]))


if __name__ == "__main__":
    sys.exit(main())
