"""Whether a run survives: killed again and again, and on a full disk.

For every method a run is made whole. A second one is killed (kill -9) at random moments and
started again, until it ends. A third is killed once, meets a disk that is full (no file of it may
be as large as its state), and goes on. All must end with the same weights, bit for bit, and with
the same lines in metrics.jsonl; on the full disk the run must end with one line and its last state
must stay as it was.

    python benchmarks/survive.py                             20 kills of every method
    python benchmarks/survive.py --kills 3 --methods noisy
"""

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from provenance import ROOT, machine, markdown, write_json
from safetensors.torch import load_file
from torch import Tensor

from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.training import METHODS, Settings, learn
from unmurk.training.trainer import Trainer

__all__: list[str] = []

FIGURES = ROOT / "benchmarks" / "results" / "survive.json"
EVERY = 0.2  # seconds between two states
RUN = Settings(network="tiny", kimg=1.6, batch=8, seed=3, precision="fp32")  # 200 steps


@dataclass(frozen=True)
class Options:
    """Kill runs and see them end as if nothing had happened."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to try."""
    kills: int = 20
    """Kills of every method's run."""
    steps: int = 200
    """Steps of a run."""
    seed: int = 0
    """Seed of the moments."""
    out: Path = FIGURES
    """File for the figures."""
    child: tuple[str, ...] = ()
    """Used by the script itself: method, run folder, steps."""


def train(method: str, folder: str, steps: str) -> None:
    """A run, in a process of its own."""
    torch.set_num_threads(1)
    begin = Trainer.__init__

    def often(self: Trainer, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "every": EVERY})

    Trainer.__init__ = often  # type: ignore[method-assign]
    images = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images, 2)
    problem = Problem("identity", 0.2)
    y = images if method == "clean" else problem.simulate(images)
    print("ready", flush=True)
    kimg = int(steps) * RUN.batch / 1000
    learn(y, problem, method, out=folder, settings=RUN, kimg=kimg, quiet=True)


def start(method: str, folder: Path, steps: int, most: int | None = None) -> "subprocess.Popen":
    """Begins or continues a run; no file that it writes may have `most` bytes."""

    def small() -> None:
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--child", method, str(folder), str(steps)]
    run = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        preexec_fn=small,
    )
    assert run.stdout is not None
    run.stdout.readline()
    return run


def whole(method: str, folder: Path, steps: int) -> float:
    """Runs to the end; returns the seconds that learning took."""
    run = start(method, folder, steps)
    began = time.monotonic()
    said = run.communicate()[1]
    if run.returncode:
        raise InputError(f"the run ended with {run.returncode}: {said}")
    return time.monotonic() - began


def kill(run: "subprocess.Popen") -> bool:
    """Kills a run; whether it was still going."""
    alive = run.poll() is None
    run.kill()
    run.communicate()
    return alive


def result(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights, and the lines of metrics.jsonl but for the seconds."""
    weights = {
        f"{path.parent.name}/{key}": value
        for path in sorted(folder.glob("p*/**/*.safetensors"))
        for key, value in load_file(path).items()
    }
    lines = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended alike, bit for bit."""
    (a, said), (b, also) = result(one), result(other)
    return said == also and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def killed(method: str, folder: Path, steps: int, kills: int, seconds: float, seed: int) -> int:
    """Kills a run at random moments until it has been killed so often or has ended."""
    rng, count = random.Random(seed), 0
    for _ in range(kills):
        run = start(method, folder, steps)
        time.sleep(rng.uniform(0.05, max(0.1, seconds / kills)))
        count += kill(run)
    whole(method, folder, steps)
    return count


def full_disk(method: str, folder: Path, steps: int, seconds: float) -> dict[str, Any]:
    """A run is killed, meets a full disk, and goes on; what it says and what it leaves."""
    state = folder / "state" / "latest.pt"
    run = start(method, folder, steps)
    time.sleep(seconds / 3)
    while run.poll() is None and not state.exists():  # a machine may be slower now
        time.sleep(0.01)
    kill(run)
    before = state.read_bytes()
    run = start(method, folder, steps, most=len(before) // 2)
    said = run.communicate()[1].strip().splitlines()
    kept = state.read_bytes() == before
    whole(method, folder, steps)
    return {"code": run.returncode, "said": said, "kept": kept}


def survive(method: str, folder: Path, kills: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Everything for one method."""
    seconds = whole(method, folder / "whole", steps)
    count = killed(method, folder / "killed", steps, kills, seconds, seed)
    disk = full_disk(method, folder / "disk", steps, seconds)
    return {
        "method": method,
        "kills": count,
        "after kills": same(folder / "whole", folder / "killed"),
        "line on a full disk": len(disk["said"]) == 1 and disk["code"] == 2,
        "state kept": disk["kept"],
        "after the full disk": same(folder / "whole", folder / "disk"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    return markdown(lines)


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.child:
        try:
            train(*options.child)
        except InputError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    rows = []
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(survive(method, Path(folder), options.kills, options.steps, options.seed))
        print(rows[-1], file=sys.stderr, flush=True)
    write_json(options.out, {"steps": options.steps, "machine": machine(), "rows": rows})
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
