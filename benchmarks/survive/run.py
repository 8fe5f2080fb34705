"""Test that a training run survives: killed again and again, and on a full disk.

Every method runs once without interruption. A second run is killed (kill -9) at random moments and
started again, until it ends. A third is killed once, meets a full disk (no file may be as large as
its state), and continues. All must end with the same weights, bit for bit, and with the same lines
in metrics.jsonl. On the full disk the run must end with one line, and its last state must stay
intact.

    python benchmarks/survive/run.py --out OUT                           # 20 kills of every method
    python benchmarks/survive/run.py --out OUT --kills 3 --methods noisy
"""

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
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Row, Suite, tabulate
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.training import METHODS, Settings, learn
from unmurk.training.trainer import Trainer

__all__ = ["survive"]

EVERY = 0.2  # seconds between two states
SETTINGS = Settings(network="tiny", kimg=1.6, batch=8, seed=3, precision="fp32")  # 200 steps


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Kill runs and check that they end as if nothing had happened."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to test."""
    kills: int = 20
    """Kills of every method's run."""
    steps: int = 200
    """Steps of a run."""


def train(method: str, folder: str, steps: str, limit: str) -> None:
    """Run in a process of its own; the state is written every EVERY seconds."""
    if limit != "none":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    torch.set_num_threads(1)
    begin = Trainer.__init__

    def frequent(self: Trainer, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "every": EVERY})

    Trainer.__init__ = frequent  # type: ignore[method-assign]
    images = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images, 2)
    problem = Problem("identity", 0.2)
    y = images if method == "clean" else problem.simulate(images)
    print("ready", flush=True)
    kimg = int(steps) * SETTINGS.batch / 1000
    given: Any = {"start": "none", "settings": SETTINGS, "kimg": kimg}
    learn(y, problem, method, out=folder, quiet=True, **given)


def start(method: str, folder: Path, steps: int, limit: int | None = None) -> subprocess.Popen:
    """Begin or continue a run; no file that it writes may have more than `limit` bytes."""
    most = "none" if limit is None else str(limit)
    run = common.begin_process([__file__, "--child", method, str(folder), str(steps), most])
    assert run.stdout is not None
    run.stdout.readline()
    return run


def run_to_end(method: str, folder: Path, steps: int) -> float:
    """Run to the end; return the seconds that the learning took."""
    run = start(method, folder, steps)
    began = time.monotonic()
    said = run.communicate()[1]
    if run.returncode:
        raise InputError(f"the run of {method} ended with {run.returncode}: {said}")
    return time.monotonic() - began


def kill(run: subprocess.Popen) -> bool:
    """Kill a run; return whether it was still running."""
    alive = run.poll() is None
    run.kill()
    run.communicate()
    return alive


def outcome(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights, and the lines of metrics.jsonl without the seconds."""
    weights = {
        f"{path.parent.name}/{key}": value
        for path in sorted(folder.glob("p*/**/*.safetensors"))
        for key, value in load_file(path).items()
    }
    lines = common.metrics(folder)
    return weights, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same outcome, bit for bit."""
    (a, said), (b, also) = outcome(one), outcome(other)
    return said == also and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run_killed(
    method: str, folder: Path, steps: int, kills: int, seconds: float, seed: int
) -> int:
    """Kill a run at random moments until it has ended or was killed this often; then finish it."""
    rng, count = random.Random(seed), 0
    for _ in range(kills):
        run = start(method, folder, steps)
        time.sleep(rng.uniform(0.05, max(0.1, seconds / kills)))
        count += kill(run)
    run_to_end(method, folder, steps)
    return count


def run_on_full_disk(method: str, folder: Path, steps: int, seconds: float) -> dict[str, Any]:
    """Kill a run, continue it on a full disk, then finish it; return what it printed and left."""
    state = folder / "state" / "latest.pt"
    run = start(method, folder, steps)
    time.sleep(seconds / 3)
    while run.poll() is None and not state.exists():  # a machine may be slower now
        time.sleep(0.01)
    kill(run)
    before = state.read_bytes()
    run = start(method, folder, steps, limit=len(before) // 2)
    said = run.communicate()[1].strip().splitlines()
    unchanged = state.read_bytes() == before
    run_to_end(method, folder, steps)
    return {"code": run.returncode, "said": said, "unchanged": unchanged}


def survive(method: str, folder: Path, kills: int, steps: int, seed: int = 0) -> Row:
    """Every test of one method."""
    seconds = run_to_end(method, folder / "whole", steps)
    count = run_killed(method, folder / "killed", steps, kills, seconds, seed)
    disk = run_on_full_disk(method, folder / "disk", steps, seconds)
    return {
        "method": method,
        "kills": count,
        "after kills": same(folder / "whole", folder / "killed"),
        "line on a full disk": len(disk["said"]) == 1 and disk["code"] == 2,
        "state kept": disk["unchanged"],
        "after the full disk": same(folder / "whole", folder / "disk"),
    }


def measure(options: Options) -> Row:
    """Test all methods; writes OUT/survive.json."""
    rows = []
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(survive(method, Path(folder), options.kills, options.steps, options.seed))
        print(rows[-1], file=sys.stderr, flush=True)
    return SUITE.store(options, {"steps": options.steps}, rows=rows)


SUITE = Suite("survive", lambda result: {"table": tabulate(result["rows"])}, "survival")


def main() -> int:
    """Run the command line, or one training run as a child of it."""
    if sys.argv[1:2] != ["--child"]:
        return SUITE.main(Options, measure)
    try:
        train(*sys.argv[2:])
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
