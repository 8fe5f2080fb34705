"""The one training loop: steps, averages, records, and a run that nobody loses.

Every random draw of step k comes from generators at (seed, k), so a run continued from step k
equals one that was never stopped (bit for bit on a CPU with as many threads). The state is one
file, written beside the old one and renamed over it: at any moment a complete state is on disk.
Several processes take the same steps as one (`processes`).

The averaged weights follow Karras et al. (2022, arXiv 2206.00364): a half-life in images that
grows with the images seen, so that the average never remembers the start.
"""

import copy
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..bounds import SEED, Real, Whole
from ..devices import (
    ieee_float32,
    network_precision,
    no_memory,
    out_of_memory,
    physics_outside_autocast,
)
from ..diffusion.prior import Prior
from ..errors import InputError
from ..flows.posterior import Posterior
from ..io.atomic import unwritable
from ..io.atomic import write as write_atomically
from ..io.datasets import Batches, Source
from ..rng import ShardedGenerator, StreamId, generator
from . import states
from .distributed import average_over, broadcast, check_batch_divisible, interruptible, processes
from .muon import Optimizer
from .schedule import LRPhase, ParamGroup
from .validation import Checks, preferred

__all__ = [
    "ParamGroup",
    "Method",
    "Settings",
    "LRPhase",
    "Trainer",
    "unwritable",
    "write_atomically",
]

DIVERGED = "losses are not finite; check the range of the images and their noise, or lower rate"


@dataclass(frozen=True)
class Settings:
    """How a run is trained, whatever the method.

    Attributes:
        network: Preset of the networks: tiny, small or base.
        kimg: Budget in thousands of images seen, a number from 0.001 to 1e+07.
        batch: Images in a step, a whole number from 2 to 65536.
        rate: Peak learning rate, a number from 1e-12 to 10; every group rises to it and falls.
        average: Half-life of EMA weights in kimg, a number from 0 to 1e+07 (or 5 % of a part).
        seed: Seed of weights, batches and noise, a whole number from 0 to 9223372036854775807.
        precision: fp32, bf16, or auto: whichever a one-second probe finds faster.
        compile: Whether torch.compile is applied to the prior's network.
    """

    network: str = "tiny"
    kimg: Annotated[float, Real(0.001, 1e7)] = 100.0
    batch: Annotated[int, Whole(2, 65536)] = 32
    rate: Annotated[float, Real(1e-12, 10)] = 5e-3
    average: Annotated[float, Real(0, 1e7)] = 20.0
    seed: Annotated[int, SEED] = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False


class Method(Protocol):
    """A way to learn: modules, their averages, further state, and the losses of a step."""

    modules: dict[str, nn.Module]
    ema: dict[str, nn.Module]
    buffers: dict[str, Tensor]
    groups: list[ParamGroup]

    def before(self, trainer: "Trainer", step: int, progress: float) -> None:
        """What happens between steps; progress runs from 0 to 1."""

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scalars to minimise, from measurements y (B, ...) with numbers `rows`."""


class Trainer:
    """Runs a method over measurements, in a run folder.

    Args:
        method: What is learnt.
        y: Measurements (N, ...), on any device or in files.
        settings: How.
        out: Run folder; its `state/` and `metrics.jsonl` belong to the trainer.
        every: Seconds between two writings of the state.
        quiet: Whether to show no progress.
        checks: Figures taken of the averaged weights at a few steps; None: none. The weights with
            the best of them are those that the method has in the end.
    """

    def __init__(
        self,
        method: Method,
        y: Tensor | Source,
        settings: Settings,
        out: Path,
        every: float = 30.0,
        quiet: bool = False,
        checks: Checks | None = None,
    ) -> None:
        self.accelerator = processes()
        self.method, self.y, self.settings = method, y, settings
        self.out, self.every, self.quiet, self.checks = out, every, quiet, checks
        self.device = self.accelerator.device
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        check_batch_divisible(settings.batch, self.ranks)
        prepare = getattr(method, "prepare", None)  # what else a step needs of its rows
        self.batches = Batches(y, self.rows, self.device, prepare)
        self.steps = max(1, math.ceil(1000 * settings.kimg / settings.batch))
        self.step, self.seconds, self.skipped, self.factor = 0, 0.0, 0, 1.0
        self.precision: str = settings.precision
        self.best: dict[str, Any] | None = None
        for module in [*method.modules.values(), *method.ema.values()]:
            module.to(self.device)
        for average in method.ema.values():
            average.requires_grad_(False).eval()
        named: dict[nn.Parameter, Tensor] = {
            p: method.ema[key].get_parameter(name)
            for key, module in method.modules.items()
            for name, p in module.named_parameters()
        }
        self.ema = [[named[p] for p in group.parameters] for group in method.groups]
        self.optimizer = Optimizer([group.parameters for group in method.groups])

    @property
    def state_file(self) -> Path:
        return self.out / "state" / "latest.pt"

    def state(self) -> dict[str, Any]:
        """Everything the run needs to go on."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "factor": self.factor,
            "precision": self.precision,
            "modules": {k: m.state_dict() for k, m in self.method.modules.items()},
            "ema": {k: m.state_dict() for k, m in self.method.ema.items()},
            "buffers": self.method.buffers,
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }

    def save(self) -> None:
        """Writes the state atomically."""
        if not self.accelerator.is_main_process:
            return
        stream = io.BytesIO()
        torch.save(self.state(), stream)
        write_atomically(self.state_file, stream.getvalue())

    def load(self) -> bool:
        """Takes up the last state written; False where there is none."""
        there = self.accelerator.is_main_process
        data = broadcast(self.written() if there else None, self.ranks, self.device)
        if data is None:
            return False
        state = states.read(self.state_file, data, self.state(), self.steps)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            for key, module in self.method.modules.items():
                module.load_state_dict(state["modules"][key])
            for key, module in self.method.ema.items():
                module.load_state_dict(state["ema"][key])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            if out_of_memory(error):
                raise
            raise states.damaged(self.state_file, "its weights are others") from error
        for key, value in state["buffers"].items():
            self.method.buffers[key].copy_(value)
        for key in ("step", "seconds", "skipped", "factor", "precision", "best"):
            setattr(self, key, state[key])
        return True

    def written(self) -> bytes | None:
        """The bytes of the state file; None where there is none."""
        try:
            if not self.state_file.exists():
                return None
            if self.state_file.stat().st_size > states.most(self.state()):
                raise states.damaged(self.state_file, "it is far too large")
            return self.state_file.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {self.state_file}: {error.strerror}") from error

    def reset(self, name: str, fresh: nn.Module) -> None:
        """Gives a module the weights of a fresh one and forgets its average and its moments."""
        module = self.method.modules[name]
        module.load_state_dict(fresh.state_dict())
        self.method.ema[name].load_state_dict(fresh.state_dict())
        self.optimizer.forget(module.parameters())

    def networks(self) -> AbstractContextManager[None]:
        """Networks run in the precision of the run, and nothing else does."""
        return network_precision(torch.bfloat16 if self.precision == "bf16" else None)

    def probe(self) -> str:
        """Whichever of fp32 and bf16 trains faster in a second's trial; leaves no trace."""
        rows, y = self.batches.read(0)
        times = {}
        for precision in ("fp32", "bf16"):
            self.precision = precision
            durations: list[float] = []
            begin = time.perf_counter()
            while len(durations) < 3 or time.perf_counter() - begin < 0.5:
                start = time.perf_counter()
                noise = self.noise(0)
                with self.networks():
                    losses = self.method.losses(y, rows, 1.0, noise)
                self.accelerator.backward(sum(losses.values()))
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                durations.append(time.perf_counter() - start)
            times[precision] = min(durations)
            self.optimizer.zero_grad()
        best = min(times, key=lambda k: times[k])
        return (broadcast(best.encode(), self.ranks, self.device) or b"").decode()

    def average(self) -> None:
        """Moves the averages of the parts in training; a late one forgets its start as fast."""
        batch = self.settings.batch
        for group, average in zip(self.method.groups, self.ema, strict=True):
            span = group.span(self.step / self.steps)
            observed = batch * (self.step - span.start * self.steps)
            if observed < 0 or self.step > span.end * self.steps:
                continue
            half_life = min(1000 * self.settings.average, 0.05 * observed)
            keep = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
            torch._foreach_lerp_(average, [p.detach() for p in group.parameters], 1 - keep)

    def update(self) -> dict[str, float] | None:
        """One step; None when its gradient was not finite and it was skipped."""
        rows, y = self.batches.batch_at(self.step)
        progress = self.step / self.steps
        peak = self.settings.rate * self.factor
        rates = [peak * group.rate(progress) for group in self.method.groups]
        with self.networks():
            losses = self.method.losses(y, rows, progress, self.noise(self.step))
        self.accelerator.backward(sum(losses.values()))
        values = torch.stack([value.detach().float() for value in losses.values()])
        groups = [[p for p in g.parameters if p.grad is not None] for g in self.method.groups]
        gradients = [p.grad for group in groups for p in group if p.grad is not None]
        average_over([*gradients, values], self.ranks)
        norms = [nn.utils.clip_grad_norm_(held, 1.0) for held in groups if held]
        # one look at the device for all numbers of a step
        numbers = torch.cat([torch.stack(norms), values]).tolist()
        finite = all(map(math.isfinite, numbers[: len(norms)]))
        if finite:
            self.optimizer.step(rates)
        self.optimizer.zero_grad()
        if not finite:
            return None
        self.average()
        return dict(zip(losses, numbers[len(norms) :], strict=True))

    def rows(self, step: int) -> Tensor:
        """This process's rows of the batch of a step."""
        choose = generator(self.settings.seed, StreamId.BATCH, step)
        rows = torch.randint(len(self.y), (self.settings.batch,), generator=choose)
        return rows[self.rank :: self.ranks]

    def noise(self, step: int) -> torch.Generator:
        """Where the draws of a step come from."""
        noise = generator(self.settings.seed, StreamId.STEP, step, 0, device=self.device)
        return noise if self.ranks == 1 else ShardedGenerator.of(noise, self.rank, self.ranks)

    def run(self) -> None:
        """Trains to the end of the budget, from the last state written if there is one.

        Raises:
            InputError: files cannot be read or written, training diverges, another process of the
                run has ended.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, when the step is done and the state saved.
        """
        with interruptible() as check, ieee_float32(), physics_outside_autocast(self.device):
            try:
                self.train(check)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise self.too_large(error) from error
        if self.skipped >= self.steps:
            raise InputError(f"none of the {self.steps} steps could be taken: {DIVERGED}")
        self.take_best()

    def too_large(self, error: BaseException) -> InputError:
        """What to say when memory has run out."""
        size = "x".join(map(str, self.y.shape[1:]))
        what = f"a batch of {self.settings.batch} measurements {size}"
        return no_memory(
            error,
            f"{what} and the {self.settings.network} networks",
            "a smaller network, or in Python a smaller batch, needs less",
        )

    def train(self, check: Callable[[], None]) -> None:
        """The same; `check` is called between steps."""
        if not self.load():
            if self.precision == "auto":
                self.method.before(self, 0, 0.0)  # some have no losses before
                self.precision = self.probe()
            self.save()
        record = MetricLogger(self.out / "metrics.jsonl", self)
        start, saved, bad = time.perf_counter() - self.seconds, time.perf_counter(), 0
        try:
            while self.step < self.steps:
                with self.networks():
                    self.method.before(self, self.step, self.step / self.steps)
                losses = self.update()
                self.step += 1
                self.seconds = time.perf_counter() - start
                bad = 0 if losses is not None else bad + 1
                self.skipped += losses is None
                if bad == 10:
                    self.back(record)
                    start, bad = time.perf_counter() - self.seconds, 0
                    continue
                record.add(losses, self.judge())
                if time.perf_counter() - saved > self.every and bad == 0:
                    self.save()
                    saved = time.perf_counter()
                check()
        finally:
            record.close()
            self.batches.close()
            if bad == 0:
                self.save()

    def judge(self) -> dict[str, float]:
        """The checks that are due after this step, of the averaged weights; keeps the best of
        those all parts of which have begun to train."""
        if self.checks is None or not self.checks.due(self.step, self.steps):
            return {}
        figures, better = {}, None
        if self.accelerator.is_main_process:
            prior, posterior = self.method.ema["prior"], self.method.ema["posterior"]
            assert isinstance(prior, Prior) and isinstance(posterior, Posterior)
            figures = self.checks.measure(prior, posterior)
            initialised = all(
                g.spans[0].start <= self.step / self.steps for g in self.method.groups
            )
            if initialised and (self.best is None or preferred(figures, self.best["figures"])):
                better = b"yes"
        if broadcast(better, self.ranks, self.device):
            ema = copy.deepcopy({k: m.state_dict() for k, m in self.method.ema.items()})
            self.best = {"step": self.step, "figures": figures, "ema": ema}
        return figures | {"kept": float(better is not None)} if figures else {}

    def take_best(self) -> None:
        """Gives the averages the weights that were judged best."""
        if self.best is not None and self.best["step"] != self.step:
            for key, module in self.method.ema.items():
                module.load_state_dict(self.best["ema"][key])

    def back(self, record: "MetricLogger") -> None:
        """Returns to the last good state with half the learning rate."""
        factor = self.factor / 2
        if factor < 1 / 64:
            raise InputError(f"training diverged again and again: {DIVERGED}")
        self.load()
        self.factor = factor
        record.say(
            f"ten steps in a row were not finite: back to step {self.step} "
            f"with the learning rate times {factor:g}"
        )


class MetricLogger:
    """The lines of metrics.jsonl and the progress shown on the standard error stream."""

    def __init__(self, path: Path, trainer: Trainer) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.trainer = trainer
        self.main = trainer.accelerator.is_main_process
        self.every = max(1, trainer.steps // 400)
        self.sums: dict[str, list[float]] = {}
        self.shown = time.perf_counter()
        self.console = Console(file=sys.stderr, quiet=trainer.quiet or not self.main)
        self.file = None
        if self.main:
            keep = []
            if path.exists():
                limit = trainer.step * trainer.settings.batch / 1000 + 1e-9
                text = path.read_text(errors="replace")
                keep = [s for s in text.splitlines() if _kimg(s) <= limit]
            write_atomically(path, "".join(s + "\n" for s in keep).encode())
            self.file = open(path, "ab", buffering=0)  # nothing is left to write at the end
        self.bar = Progress(
            TextColumn("learning"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[losses]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or self.console.quiet,
        )
        self.task = self.bar.add_task("", total=trainer.steps, completed=trainer.step, losses="")
        self.bar.start()

    def say(self, text: str) -> None:
        """Prints a line above the progress."""
        self.console.print(text, highlight=False)

    def add(
        self, losses: dict[str, float] | None, figures: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Takes the losses of one step, and the figures taken after it."""
        for key, value in (losses or {}).items():
            self.sums.setdefault(key, []).append(value)
        step = self.trainer.step
        if step % self.every and step != self.trainer.steps and not figures:
            return
        means = {k: sum(v) / len(v) for k, v in self.sums.items()}
        self.sums = {}
        line: dict[str, Any] = {
            "kimg": step * self.trainer.settings.batch / 1000,
            "seconds": round(self.trainer.seconds, 2),
            "skipped": self.trainer.skipped,
        }
        line |= {f"loss/{k}": round(v, 6) for k, v in means.items()}
        line |= {f"check/{k}": round(v, 6) for k, v in figures.items()}
        if self.file is not None:
            try:
                self.file.write(json.dumps(line).encode() + b"\n")
            except OSError as error:
                raise unwritable(Path(self.file.name), error) from error
        text = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
        self.bar.update(self.task, completed=step, losses=text)
        if not self.console.is_terminal and time.perf_counter() - self.shown > 10:
            self.shown = time.perf_counter()
            left = self.trainer.seconds * (self.trainer.steps / step - 1)
            self.say(
                f"learning {100 * step / self.trainer.steps:3.0f}%  {text}  {left:.0f} s left"
            )

    def close(self) -> None:
        """Ends the progress and the file."""
        self.bar.stop()
        if self.file is not None:
            self.file.close()


def _kimg(line: str) -> float:
    try:
        return float(json.loads(line)["kimg"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # a line that a sudden end cut short
