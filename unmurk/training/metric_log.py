"""Training metrics: lines of `metrics.jsonl`, and progress on the standard error stream."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import InputError
from ..io.atomic import unwritable, write
from ..io.limits import check_file
from ..progress import PAUSE, line

__all__ = ["MetricLogger"]

LINES = 400  # lines of a run
MAX_BYTES = 2**26  # a log has some 100 KiB


class MetricLogger:
    """Log losses and checks, one JSON line for about every four-hundredth of a run.

    A continued run keeps the lines up to its last state and drops those after it.

    Args:
        path: The file `metrics.jsonl`.
        steps: Number of steps of the run.
        batch: Images in a step.
        step: Steps taken before.
        main: Whether this process writes; the others log nothing.
        quiet: Whether to show no progress.
        about: Texts by name, which a new log begins with.

    Raises:
        InputError: The file cannot be written.

    >>> log = MetricLogger(Path("metrics.jsonl"), steps=2, batch=500, quiet=True)
    >>> for step in (1, 2):
    ...     log.add(step, float(step), 0, {"prior": 1 / step})
    >>> log.close()
    >>> for line in Path("metrics.jsonl").read_text().splitlines():
    ...     print(line)
    {"kimg": 0.5, "seconds": 1.0, "skipped": 0, "loss/prior": 1.0}
    {"kimg": 1.0, "seconds": 2.0, "skipped": 0, "loss/prior": 0.5}
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        batch: int,
        step: int = 0,
        main: bool = True,
        quiet: bool = False,
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.steps, self.batch = steps, batch
        self.interval = max(1, steps // LINES)
        self.sums: dict[str, list[float]] = {}
        self.shown = time.perf_counter()
        self.console = Console(file=sys.stderr, quiet=quiet or not main)
        self.file = None
        if main:
            kept = _kept_lines(path, step * batch / 1000)
            first = [json.dumps({"kimg": 0.0, **about})] if about and not kept else []
            write(path, "".join(s + "\n" for s in first + kept).encode())
            self.file = open(path, "ab", buffering=0)  # unbuffered: a kill loses no line
        self.bar = Progress(
            TextColumn("learning"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[losses]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or self.console.quiet,
        )
        self.task = self.bar.add_task("", total=steps, completed=step, losses="")
        self.bar.start()

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, highlight=False)

    def add(
        self,
        step: int,
        seconds: float,
        skipped: int,
        losses: Mapping[str, float],
        figures: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Add the losses of one step, and the checks that were made after it.

        Args:
            step: Steps taken so far.
            seconds: Seconds that they took.
            skipped: Steps that were skipped because a gradient was not finite.
            losses: Losses by name; empty if this step was skipped.
            figures: Results of the checks by name.

        Raises:
            InputError: The file cannot be written.
        """
        for key, value in losses.items():
            self.sums.setdefault(key, []).append(value)
        if step % self.interval and step != self.steps and not figures:
            return
        means = {k: sum(v) / len(v) for k, v in self.sums.items()}
        self.sums = {}
        line: dict[str, Any] = {
            "kimg": step * self.batch / 1000,
            "seconds": round(seconds, 2),
            "skipped": skipped,
        }
        line |= {f"loss/{k}": round(v, 6) for k, v in means.items()}
        line |= {f"check/{k}": round(v, 6) for k, v in figures.items()}
        if self.file is not None:
            try:
                self.file.write(json.dumps(line).encode() + b"\n")
            except OSError as error:
                raise unwritable(Path(self.file.name), error) from error
        self._show(step, seconds, "  ".join(f"{k} {v:.4f}" for k, v in means.items()))

    def _show(self, step: int, seconds: float, text: str) -> None:
        """Move the progress bar, or print a line from time to time where there is no terminal."""
        self.bar.update(self.task, completed=step, losses=text)
        if not self.console.is_terminal and time.perf_counter() - self.shown > PAUSE:
            self.shown = time.perf_counter()
            self.say(line("learning", step / self.steps, seconds, text))

    def close(self) -> None:
        """End the progress bar and close the file."""
        self.bar.stop()
        if self.file is not None:
            self.file.close()


def _kept_lines(path: Path, kimg: float) -> list[str]:
    """Read the lines of a log up to a budget.

    Raises:
        InputError: The file cannot be read, or is far larger than any log.
    """
    try:
        if not path.exists():
            return []
        check_file(path)
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is far too large for a log of training: remove it")
        text = path.read_text(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return [line for line in text.splitlines() if _kimg(line) <= kimg + 1e-9]


def _kimg(line: str) -> float:
    """Return the kimg of a line; infinity for a line that a kill has cut short."""
    try:
        return float(json.loads(line)["kimg"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
