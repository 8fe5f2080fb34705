"""`python -m tests.fuzz`: try bad input of every kind, and count what is mishandled.

python -m tests.fuzz                            every class, as `make fuzz` does
python -m tests.fuzz --slice 300                the first 300 cases, in proportion
python -m tests.fuzz --class files --case 1234  one case again, with its traceback and its files
"""

import argparse
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "100"

import importlib
import tempfile
import time
from collections import Counter
from pathlib import Path

COUNTS = {"specs": 5000, "files": 5000, "runs": 1000, "options": 1000}


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--class", dest="kind", choices=COUNTS, help="only this class")
    parser.add_argument("--case", type=int, help="only this case of it, with its traceback")
    parser.add_argument("--count", type=int, help="the first cases of each class")
    parser.add_argument("--slice", type=int, help="so many cases, in proportion")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop")
    parser.add_argument("--out", type=Path, help="a file for the lines of mishandled cases")
    return parser.parse_args()


def chosen(asked: argparse.Namespace) -> list[tuple[str, int]]:
    """Class and index of the cases that are asked for; the slow classes go first."""
    counts = {asked.kind: COUNTS[asked.kind]} if asked.kind else COUNTS
    total = sum(counts.values())
    if asked.slice:
        counts = {kind: round(asked.slice * n / total) for kind, n in counts.items()}
    if asked.count:
        counts = {kind: min(asked.count, n) for kind, n in counts.items()}
    return [(kind, i) for kind in reversed(counts) for i in range(counts[kind])]


def main() -> int:
    """Run what is asked for; 1 if anything was mishandled or not tried."""
    from .runner import warm

    asked = arguments()
    warm()
    with tempfile.TemporaryDirectory(prefix="unmurk-fuzz-") as room:
        os.environ["FUZZ_FOLDER"] = room
        kinds = [asked.kind] if asked.kind else list(COUNTS)
        runs = {}
        for kind in kinds:
            module = importlib.import_module(f"{__package__}.cases_{kind}")
            if hasattr(module, "prepare"):
                module.prepare()
            runs[kind] = module.run
        if asked.case is not None:
            return again(asked, runs)
        return everything(asked, runs)


def again(asked: argparse.Namespace, runs: dict) -> int:
    """One case once more: first in this process with its traceback, unless it ends that."""
    from .runner import attempt, generator, run_cases

    case = (asked.kind, asked.case)
    found = run_cases([case], runs, asked.seed)[case]
    print(f"{asked.kind} {asked.seed} {asked.case}: {found or 'handled well'}")
    if found and "process" not in found and "TooLong" not in found:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{asked.kind}-{asked.case}-"))
        attempt(runs[asked.kind], generator(asked.seed, *case), folder, limits=False)
        print(f"its files: {folder}")
    return bool(found)


def everything(asked: argparse.Namespace, runs: dict) -> int:
    """All cases; prints mishandled ones as they are found, and at the end the counts."""
    from .runner import Found, run_cases

    cases, begin = chosen(asked), time.monotonic()
    lines = asked.out.open("w") if asked.out else None

    def done(found: Found | None) -> None:
        if found is not None:
            print(found.line(asked.seed), file=sys.stderr, flush=True)
            if lines:
                print(found.line(asked.seed), file=lines, flush=True)

    results = run_cases(cases, runs, asked.seed, asked.minutes, done)
    tried = Counter(kind for kind, _ in results)
    wrong = Counter(kind for (kind, _), problem in results.items() if problem)
    print(f"{'class':10}{'tried':>8}{'of':>8}{'mishandled':>12}")
    for kind, planned in Counter(kind for kind, _ in cases).items():
        print(f"{kind:10}{tried[kind]:8}{planned:8}{wrong[kind]:12}")
    print(f"{time.monotonic() - begin:.0f} s")
    return int(len(results) < len(cases) or sum(wrong.values()) > 0)


if __name__ == "__main__":
    sys.exit(main())
