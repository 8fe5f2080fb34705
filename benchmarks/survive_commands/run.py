"""Test that `corrupt`, `sample`, `restore` and `solve` survive being killed.

Each command runs once without interruption. Then it is killed (kill -9) again and again, each time
after it has written a random number of further files or at a random moment before that, and
started again until it ends. The same happens with Ctrl-C. The results must be the same files, bit
for bit, and no other file may be left: immediately after Ctrl-C, and after a kill once the next
call has ended.

    python benchmarks/survive_commands/run.py --out OUT            # 20 kills and 20 interrupts
    python benchmarks/survive_commands/run.py --out OUT --kills 3 --commands sample
"""

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
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Row, Suite, tabulate
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.ledger import LOG
from unmurk.progress import is_line

__all__ = ["survive"]

FILES = 40  # of a command
COMMANDS: dict[str, list[str]] = {
    "corrupt": ["corrupt", "in", "--noise", "0.1"],
    "sample": ["sample", "--prior", "run", "-n", str(FILES), "--steps", "4"],
    "restore": ["restore", "in", "--prior", "run", "--samples", "2", "--std", "--batch", "4"],
    "solve": ["solve", "in", "--prior", "run", "--samples", "2", "--steps", "2", "--batch", "4"],
}


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Kill commands and check that they end as if nothing had happened."""

    commands: tuple[str, ...] = tuple(COMMANDS)
    """Commands to test."""
    kills: int = 20
    """Kills, and interrupts, of every command."""


def prepare(folder: Path) -> None:
    """Write the inputs, and a run with untrained networks."""
    rng = np.random.default_rng(0)
    (folder / "in").mkdir(parents=True)
    for i in range(FILES):
        pixels = rng.integers(60, 200, (16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{i:02d}.png")
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(folder / "run" / "prior")
    Posterior.create("tiny", (1, 16, 16)).save(folder / "run" / "posterior")


def start(name: str, folder: Path, out: str) -> subprocess.Popen:
    """Begin or continue a command."""
    argv = [*COMMANDS[name], "--out", out]
    if name in ("restore", "solve"):
        argv += ["--operator", "identity", "--noise", "0.1"]
    return common.begin_process(["-m", "unmurk", *argv], folder)


def run_to_end(name: str, folder: Path, out: str) -> None:
    """Run a command to its end."""
    run = start(name, folder, out)
    said = run.communicate()[1]
    if run.returncode:
        raise InputError(f"{name} ended with {run.returncode}: {said}")


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder of results except the log, hidden files too."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != LOG}


def count_files(folder: Path) -> int:
    """The number of files in a folder of results so far."""
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def stop(run: subprocess.Popen, out: Path, number: int, wait: float, files: int) -> str:
    """Send a signal after so many new files, or after `wait` seconds; return what was printed."""
    before, began = count_files(out), time.monotonic()
    while run.poll() is None and count_files(out) < before + files:
        if time.monotonic() - began > wait:
            break
        time.sleep(0.005)
    run.send_signal(number)
    return run.communicate()[1]


def interrupt(name: str, folder: Path, kills: int, number: int, seed: int) -> dict[str, Any]:
    """Stop a command again and again; return how often, and whether the results are right."""
    rng, out = random.Random(seed), f"out-{number}"
    found = {"times": 0, "one line": True, "nothing partial": True, "same files": True}
    for _ in range(kills):
        run = start(name, folder, out)
        files = rng.randint(1, min(max(2, 3 * FILES // kills), FILES - 1))
        wait = rng.uniform(0.3, 5.0) if rng.random() < 0.3 else 120.0
        said = stop(run, folder / out, number, wait, files)
        if run.returncode == 0:  # it had ended before the signal
            run_to_end(name, folder, out)
            found["same files"] &= contents(folder / out) == contents(folder / "whole")
            out = f"{out}x"
        found["times"] += 1
        if number == signal.SIGINT and run.returncode:
            lines = [line for line in said.strip().splitlines() if not is_line(line)]
            found["one line"] &= len(lines) == 1 and run.returncode == 130
            found["nothing partial"] &= not list(folder.rglob(".unmurk-*"))
    run_to_end(name, folder, out)
    found["same files"] &= contents(folder / out) == contents(folder / "whole")
    found["nothing partial"] &= not list(folder.rglob(".unmurk-*"))
    return found


def survive(name: str, folder: Path, kills: int, seed: int = 0) -> Row:
    """Every test of one command."""
    prepare(folder)
    run_to_end(name, folder, "whole")
    killed = interrupt(name, folder, kills, signal.SIGKILL, seed)
    asked = interrupt(name, folder, kills, signal.SIGINT, seed + 1)
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


def measure(options: Options) -> Row:
    """Test all commands; OUT/survive_commands.json is written after each."""
    rows: list[Row] = []
    for name in options.commands:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(survive(name, Path(folder), options.kills, options.seed))
        print(rows[-1], file=sys.stderr, flush=True)
        result = SUITE.store(options, {"files": FILES, "kills": options.kills}, rows=rows)
    return result


SUITE = Suite(
    "survive_commands", lambda result: {"table": tabulate(result["rows"])}, "survival_commands"
)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
