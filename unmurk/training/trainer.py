r"""Training loop: optimization, EMA weights, metric logging and crash-safe checkpoints.

Every random draw of step :math:`k` comes from generators seeded by (seed, :math:`k`). So a run
that continues from step :math:`k` equals one that was never stopped, bit for bit on a CPU with as
many threads. The state is written atomically (`checkpoint`). Several processes take the same steps
as one (`distributed`).

The EMA weights :math:`\bar\theta` follow Karras et al. (2022, arXiv 2206.00364): with a batch of
:math:`B` images and a half-life of :math:`h` images,

.. math::

    \bar\theta \leftarrow \beta \bar\theta + (1 - \beta)\, \theta, \qquad \beta = 2^{-B / h},

where :math:`h` grows with the images seen, so that the average does not remember the start.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..devices import (
    ieee_float32,
    network_precision,
    no_memory,
    out_of_memory,
    physics_outside_autocast,
)
from ..diffusion.prior import Prior
from ..errors import InputError, size_text
from ..flows.posterior import Posterior
from ..interrupts import interruptible
from ..io.datasets import Batches, Source
from ..rng import ShardedGenerator, StreamId, generator
from .checkpoint import Checkpoint
from .distributed import average_over, broadcast, check_batch_divisible, processes
from .metric_log import MetricLogger
from .muon import Muon
from .preview import Preview
from .schedule import LRPhase, ParamGroup
from .settings import Settings
from .validation import Checks, preferred

__all__ = ["LRPhase", "NonFiniteGradient", "ParamGroup", "Settings", "Trainable", "Trainer"]

DIVERGED = "losses are not finite; check the range of the images and their noise, or lower rate"
PATIENCE = 10  # steps in a row that may be skipped
WORTH = 50  # steps of a run whose time is told
TIMED = 4  # steps that are timed to tell how long a run takes


class Trainable(Protocol):
    """What the trainer trains; `learner.Learner` is the base class of those with a prior.

    Attributes:
        modules: Modules by name.
        ema: Their EMA copies.
        buffers: Further tensors that a continued run needs.
        groups: Parameters and their learning rate schedules.

    >>> from unmurk.problem import Problem
    >>> from unmurk.training import Clean
    >>> learner: Trainable = Clean().build(
    ...     torch.zeros(4, 1, 8, 8), Problem("identity", 0.1), (1, 8, 8)
    ... )
    >>> sorted(learner.modules), len(learner.groups)
    (['posterior', 'prior'], 3)
    """

    modules: dict[str, nn.Module]
    ema: dict[str, nn.Module]
    buffers: dict[str, Tensor]
    groups: list[ParamGroup]

    def initialize(self, device: torch.device) -> None:
        """Prepare a run that starts at step 0; a continued run takes the result from its state."""

    def before(self, trainer: "Trainer", step: int, progress: float) -> None:
        """Act between steps; progress runs from 0 to 1."""

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return scalar losses for measurements y (B, ...) with numbers `index` (B,)."""


class NonFiniteGradient(ArithmeticError):
    """The gradient of a step is not finite, and the step was skipped.

    >>> from unmurk.problem import Problem
    >>> from unmurk.training import Clean
    >>> y = torch.full((4, 1, 8, 8), torch.nan)
    >>> learner = Clean().build(y, Problem("identity", 0.1), (1, 8, 8))
    >>> Trainer(learner, y, Settings(batch=2), Path("lost")).update()
    Traceback (most recent call last):
        ...
    unmurk.training.trainer.NonFiniteGradient
    """


class Trainer:
    """Train a learner on measurements, in a run folder.

    Args:
        learner: What is trained.
        y: Measurements (N, ...), on any device or in files.
        settings: Training settings.
        out: The run folder. Its `state/` and `metrics.jsonl` belong to the trainer.
        every: Seconds between two checkpoints.
        quiet: Whether to show no progress.
        checks: Checks of the EMA weights at a few steps; None makes none. At the end the learner
            has the EMA weights that did best in them.
        announce: Called once before the first step with the expected seconds (`expected`), or with
            None if fewer than `WORTH` steps are left.
        about: Texts by name, which the metrics of a new run begin with.
        preview: Writes the models while the run trains; None: they come at the end.

    Attributes:
        step: Steps taken.
        steps: Steps of the whole run.
        skipped: Steps that were skipped because their gradient was not finite.
        factor: Factor of the learning rate, halved whenever training diverges.
        checked: Whether the checks that are due after the last step have been made.

    >>> from unmurk.problem import Problem
    >>> from unmurk.training import Clean
    >>> y, settings = torch.zeros(4, 1, 8, 8), Settings(kimg=0.002, batch=2, precision="fp32")
    >>> learner = Clean().build(y, Problem("identity", 0.1), (1, 8, 8))
    >>> trainer = Trainer(learner, y, settings, Path("trained"), quiet=True)
    >>> trainer.run()
    >>> trainer.step, trainer.skipped, trainer.checkpoint.exists()
    (1, 0, True)
    """

    def __init__(
        self,
        learner: Trainable,
        y: Tensor | Source,
        settings: Settings,
        out: Path,
        every: float = 30.0,
        quiet: bool = False,
        checks: Checks | None = None,
        announce: Callable[[float | None], None] | None = None,
        about: Mapping[str, str] | None = None,
        preview: Preview | None = None,
    ) -> None:
        self.announce, self.preview = announce, preview
        self.accelerator = processes()
        self.learner, self.y, self.settings = learner, y, settings
        self.out, self.every, self.quiet, self.checks = out, every, quiet, checks
        self.checkpoint, self.about = Checkpoint(out), about or {}
        self.device = self.accelerator.device
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        check_batch_divisible(settings.batch, self.ranks)
        prepare = getattr(learner, "prepare", None)  # what else a step needs of its images
        self.batches = Batches(y, self.index, self.device, prepare)
        self.steps = max(1, math.ceil(1000 * settings.kimg / settings.batch))
        self.step, self.seconds, self.skipped, self.factor = 0, 0.0, 0, 1.0
        self.precision: str = settings.precision
        self.best: dict[str, Any] | None = None
        self.checked = True
        for module in [*learner.modules.values(), *learner.ema.values()]:
            module.to(self.device)
        for average in learner.ema.values():
            average.requires_grad_(False).eval()
        named: dict[nn.Parameter, Tensor] = {
            p: learner.ema[key].get_parameter(name)
            for key, module in learner.modules.items()
            for name, p in module.named_parameters()
        }
        self.ema = [[named[p] for p in group.parameters] for group in learner.groups]
        self.optimizer = Muon([{"params": group.parameters} for group in learner.groups])

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Collect everything that the run needs to continue."""
        return {
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "factor": self.factor,
            "precision": self.precision,
            "modules": {k: m.state_dict() for k, m in self.learner.modules.items()},
            "ema": {k: m.state_dict() for k, m in self.learner.ema.items()},
            "buffers": self.learner.buffers,
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "checked": self.checked,
        }

    def save(self) -> None:
        """Write the state atomically, on the first process.

        Raises:
            InputError: The file cannot be written.
        """
        if self.accelerator.is_main_process:
            self.checkpoint.save(self.state())

    def load(self) -> bool:
        """Continue from the last state written.

        If the budget has been raised since then, the run continues at the progress that its steps
        are of the new budget. The best weights so far are forgotten, because the checks of a
        longer run use other images; `Learner.lengthen` adapts the rest.

        Returns:
            False if no state has been written.

        Raises:
            InputError: The state cannot be read, or is not one of this run.
        """
        data = None
        if self.accelerator.is_main_process and self.checkpoint.exists():
            data = self.checkpoint.read(self.state())
        data = broadcast(data, self.ranks, self.device)
        if data is None:
            return False
        state = self.checkpoint.parse(data, self.state(), self.steps)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            for key, module in self.learner.modules.items():
                module.load_state_dict(state["modules"][key])
            for key, module in self.learner.ema.items():
                module.load_state_dict(state["ema"][key])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            if out_of_memory(error):
                raise
            raise self.checkpoint.damaged("its weights are others") from error
        for key, value in state["buffers"].items():
            self.learner.buffers[key].copy_(value)
        for key in ("step", "seconds", "skipped", "factor", "precision", "best", "checked"):
            setattr(self, key, state[key])
        if state["steps"] != self.steps:
            self.best = None
            lengthen = getattr(self.learner, "lengthen", None)
            if lengthen is not None:
                lengthen(self.step / self.steps)
            self.save()
        return True

    # -- one step --------------------------------------------------------------------------------

    def networks(self) -> AbstractContextManager[None]:
        """Return a context in which networks, and only these, run in the run's precision."""
        return network_precision(torch.bfloat16 if self.precision == "bf16" else None)

    def probe(self) -> str:
        """Find which of fp32 and bf16 trains faster, in about one second; nothing is trained."""
        index, y = self.batches.read(0)
        times = {}
        for precision in ("fp32", "bf16"):
            self.precision = precision
            durations: list[float] = []
            begin = time.perf_counter()
            while len(durations) < 3 or time.perf_counter() - begin < 0.5:
                start = time.perf_counter()
                noise = self.noise(0)
                with self.networks():
                    losses = self._losses(y, index, 1.0, noise)
                self.accelerator.backward(sum(losses.values()))
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                durations.append(time.perf_counter() - start)
            times[precision] = min(durations)
            self.optimizer.zero_grad()
        best = min(times, key=lambda k: times[k])
        return (broadcast(best.encode(), self.ranks, self.device) or b"").decode()

    def expected(self) -> float:
        """Estimate the seconds that the rest of the run takes.

        The losses of a few steps are timed, spread over the rest of the run, and a denoising of
        one batch, each twice: what comes first pays for what is prepared once, and other programs
        may take the processor for a moment. Nothing is trained.
        """
        index, y = self.batches.read(self.step)
        start, left = self.step / self.steps, self.steps - self.step
        places = [start + (1 - start) * (i + 0.5) / TIMED for i in range(TIMED)]
        durations = [self._timed(y, index, place) for place in places]
        total = left * sum(durations) / TIMED
        evaluations = getattr(self.learner, "evaluations", None)
        prior = self.learner.ema.get("prior")
        if evaluations is not None and isinstance(prior, Prior):
            x = torch.zeros(len(y), *prior.shape, device=self.device)

            def denoise() -> None:
                with torch.no_grad(), self.networks():
                    float(prior.denoise(x, torch.ones(len(x), device=self.device)).sum())

            images = self.settings.batch * self.steps
            total += fastest(denoise) / len(x) * evaluations(start, images)
        return total * (1.05 if self.checks is not None and self.checks.count else 1.0)

    def _timed(self, y: Tensor, index: Tensor, progress: float) -> float:
        """Return the seconds of the gradient of a step at a progress of the run."""
        return fastest(lambda: self._gradient(y, index, progress))

    def _gradient(self, y: Tensor, index: Tensor, progress: float) -> None:
        """Compute the gradient of a step at a progress of the run, and forget it."""
        with self.networks():
            losses = self._losses(y, index, progress, self.noise(0))
        self.accelerator.backward(sum(losses.values()))
        float(sum(value.detach() for value in losses.values()))  # waits for the device
        self.optimizer.zero_grad()

    def update_ema(self) -> None:
        """Move the EMA weights of the groups in training.

        The half-life of a group is at most 5 % of the images it has been trained on, so a group
        that begins late forgets its start as fast as others.
        """
        batch = self.settings.batch
        for group, average in zip(self.learner.groups, self.ema, strict=True):
            progress = self.step / self.steps
            observed = batch * (self.step - group.training_start(progress) * self.steps)
            if observed < 0 or progress > group.phase(progress).end:
                continue
            half_life = min(1000 * self.settings.average, 0.05 * observed)
            decay = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
            torch._foreach_lerp_(average, [p.detach() for p in group.parameters], 1 - decay)

    def update(self) -> dict[str, float]:
        """Take one step.

        Returns:
            The losses by name, averaged over all processes.

        Raises:
            NonFiniteGradient: The gradient is not finite; no parameter has changed.
        """
        index, y = self.batches.batch_at(self.step)
        progress = self.step / self.steps
        with self.networks():
            losses = self._losses(y, index, progress, self.noise(self.step))
        self.accelerator.backward(sum(losses.values()))
        values = torch.stack([value.detach().float() for value in losses.values()])
        groups = [[p for p in g.parameters if p.grad is not None] for g in self.learner.groups]
        gradients = [p.grad for group in groups for p in group if p.grad is not None]
        average_over([*gradients, values], self.ranks)
        norms = [nn.utils.clip_grad_norm_(held, 1.0) for held in groups if held]
        # All numbers of a step are read from the device at once, since each reading waits for it.
        numbers = torch.cat([torch.stack(norms), values]).tolist()
        finite = all(map(math.isfinite, numbers[: len(norms)]))
        if finite:
            self._set_rates(progress)
            self.optimizer.step()
        self.optimizer.zero_grad()
        if not finite:
            raise NonFiniteGradient
        self.update_ema()
        return dict(zip(losses, numbers[len(norms) :], strict=True))

    def _losses(
        self, y: Tensor, index: Tensor, progress: float, noise: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the losses of a step. Raises InputError if they are no scalars by name."""
        found = self.learner.losses(y, index, progress, noise)
        named = found if isinstance(found, dict) else {}
        if not named or not all(isinstance(v, Tensor) and v.ndim == 0 for v in named.values()):
            raise InputError(
                f"{type(self.learner).__name__}.losses must return scalar tensors by name, such as"
                " {'prior': self.prior.loss(x, generator)}"
            )
        return found

    def _set_rates(self, progress: float) -> None:
        """Set the learning rate of every group."""
        peak = self.settings.rate * self.factor
        for held, group in zip(self.optimizer.param_groups, self.learner.groups, strict=True):
            held["lr"] = peak * group.rate(progress)

    def index(self, step: int) -> Tensor:
        """Return the numbers of this process's images in the batch of a step, shape (B,)."""
        choose = generator(self.settings.seed, StreamId.BATCH, step)
        index = torch.randint(len(self.y), (self.settings.batch,), generator=choose)
        return index[self.rank :: self.ranks]

    def noise(self, step: int) -> torch.Generator:
        """Return the generator of all random draws of a step."""
        noise = generator(self.settings.seed, StreamId.STEP, step, 0, device=self.device)
        return noise if self.ranks == 1 else ShardedGenerator.of(noise, self.rank, self.ranks)

    # -- the run ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end of the budget, from the last checkpoint if there is one.

        Raises:
            InputError: Files cannot be read or written, training diverges, or another process of
                the run has ended.
            KeyboardInterrupt: After Ctrl-C or SIGTERM, within seconds. The state is saved as it
                was before the evaluation of a network, or the chunk of an E-step, that was left.
        """
        with interruptible() as check, ieee_float32(), physics_outside_autocast(self.device):
            try:
                self._train(check)
            except KeyboardInterrupt:
                if self.preview is not None:
                    self.preview.leave(self.step, self.steps, self.learner.ema)
                raise
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise self._too_large(error) from error
        if self.skipped >= self.steps:
            raise InputError(f"none of the {self.steps} steps could be taken: {DIVERGED}")
        self._restore_best()

    def _too_large(self, error: BaseException) -> InputError:
        """Return the error for a run that takes more memory than there is."""
        size = size_text(self.y.shape[1:])
        what = f"a batch of {self.settings.batch} measurements {size}"
        return no_memory(
            error,
            f"{what} and the {self.settings.network} networks",
            "a smaller network, or in Python a smaller batch, needs less",
        )

    def _start(self) -> None:
        """Continue from the last checkpoint, or initialize the learner and write the first one."""
        if not self.load():
            self.learner.initialize(self.device)
            self.save()
        if self.precision == "auto":
            try:
                self.learner.before(self, 0, 0.0)  # some learners have no losses before
            except KeyboardInterrupt:
                self.save()
                raise
            self.precision = self.probe()
            self.save()

    def _train(self, check: Callable[[], None]) -> None:
        """Take all steps; `check` is called between them, and inside by `heed_interrupt`."""
        self._start()
        if self.announce is not None and self.step < self.steps:
            self.announce(self.expected() if self.steps - self.step >= WORTH else None)
        log = MetricLogger(
            self.out / "metrics.jsonl",
            self.steps,
            self.settings.batch,
            self.step,
            self.accelerator.is_main_process,
            self.quiet,
            self.about,
        )
        start, saved, skipped = time.perf_counter() - self.seconds, time.perf_counter(), 0
        try:
            if not self.checked:
                self._log(log, {})
            while self.step < self.steps:
                with self.networks():
                    self.learner.before(self, self.step, self.step / self.steps)
                losses, skipped = self._try_update(skipped)
                self.step += 1
                self.seconds = time.perf_counter() - start
                if skipped == PATIENCE:
                    self._rewind(log)
                    start, skipped = time.perf_counter() - self.seconds, 0
                    continue
                self._log(log, losses)
                if time.perf_counter() - saved > self.every and skipped == 0:
                    self.save()
                    saved = time.perf_counter()
                if self.preview is not None:
                    self.preview.after(self.step, self.steps, self.learner.ema)
                check()
        finally:
            log.close()
            self.batches.close()
            if skipped == 0:
                self.save()

    def _log(self, log: MetricLogger, losses: dict[str, float]) -> None:
        """Log a step with the checks that are due after it, which an interrupt leaves undone."""
        self.checked = False
        log.add(self.step, self.seconds, self.skipped, losses, self._validate())
        self.checked = True

    def _try_update(self, skipped: int) -> tuple[dict[str, float], int]:
        """Take one step, and count the steps in a row that were skipped."""
        try:
            return self.update(), 0
        except NonFiniteGradient:
            self.skipped += 1
            return {}, skipped + 1

    def _validate(self) -> dict[str, float]:
        """Make the checks that are due after this step, and keep the best EMA weights so far.

        Weights count only once every part of the learner has begun to train.
        """
        if self.checks is None or not self.checks.due(self.step, self.steps):
            return {}
        figures, better = {}, None
        if self.accelerator.is_main_process:
            prior, posterior = self.learner.ema["prior"], self.learner.ema["posterior"]
            assert isinstance(prior, Prior) and isinstance(posterior, Posterior)
            figures = self.checks.measure(prior, posterior)
            training = all_begun(self.learner.groups, self.step / self.steps)
            if training and (self.best is None or preferred(figures, self.best["figures"])):
                better = b"yes"
        if broadcast(better, self.ranks, self.device):
            ema = copy.deepcopy({k: m.state_dict() for k, m in self.learner.ema.items()})
            self.best = {"step": self.step, "figures": figures, "ema": ema}
        return figures | {"kept": float(better is not None)} if figures else {}

    def _restore_best(self) -> None:
        """Give the EMA modules the weights that did best in the checks."""
        if self.best is not None and self.best["step"] != self.step:
            for key, module in self.learner.ema.items():
                module.load_state_dict(self.best["ema"][key])

    def _rewind(self, log: MetricLogger) -> None:
        """Return to the last checkpoint with half the learning rate.

        Raises:
            InputError: The learning rate has been halved six times before.
        """
        factor = self.factor / 2
        if factor < 1 / 64:
            raise InputError(f"training diverged again and again: {DIVERGED}")
        self.load()
        self.factor = factor
        log.say(
            f"ten steps in a row were not finite: back to step {self.step} "
            f"with the learning rate times {factor:g}"
        )


def fastest(work: Callable[[], None]) -> float:
    """Return the seconds of the faster of two calls.

    >>> 0 <= fastest(lambda: None) < 1
    True
    """
    durations = []
    for _ in range(2):
        begin = time.perf_counter()
        work()
        durations.append(time.perf_counter() - begin)
    return min(durations)


def all_begun(groups: Sequence[ParamGroup], progress: float) -> bool:
    """Whether every group of parameters has begun to train."""
    return all(group.phases[0].start <= progress for group in groups)
