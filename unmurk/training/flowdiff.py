"""FlowDiff: a posterior flow and a diffusion prior learnt together from corrupted images.

y = A(x) + sigma_y n with A and sigma_y known; one corruption for each image, and the clean image
never read.

`objective="elbo"` is the paper's (Wang et al., 2024, arXiv 2407.11162), pure: with x drawn by the
flow,

    L = E_y E_{x ~ q(.|y)} [ ||y - A x||^2 / (2 sigma_y^2) - b(x) + log q(x | y) ],

where -b is the prior's negative evidence bound. The flow follows L through the averaged, frozen
denoiser; the prior follows denoising score matching on the flow's draws. It stalls: on a flat
background the evidence hardly changes while noise is left, less than the gap that a finite flow
leaves, so the prior keeps noise that the flow can match (docs/experiments.md has the figures).

`objective="default"` approaches from the smooth side instead, where noise cannot hide:

    1. mean start   m(y) alone, by Recorrupted-to-Recorrupted. For A = I from y; for other linear A
                    from the Wiener solution of a Gaussian prior fitted by expectation maximisation
                    (`moments`), and with further pixels withheld where A is a mask.
    2. prior        below sigma_y on m(y), above it (A = I) from the noisy images themselves, with
                    m(y) as the target: the "anchor". For other A on m(y) at all levels.
    3. polish       x ~ p(x | y) under the current prior, kept in a slowly refreshed replay
                    buffer. On it the prior is fitted at all levels, and the flow (forward KL) to
                    pairs of a buffer's image and a fresh corruption of it: expectation
                    maximisation with an amortised posterior. Beside it m is fitted again: for A =
                    I to D(y, sigma_y), which is E[x | y] too, else to the pairs.

For A = I the reverse diffusion started at (y, sigma_y) is itself a draw from p(x | y). For other
A the polish is a solver's draw; without a solver the flow's own. So it is for noise that depends
on the brightness (A = I): no level of the diffusion is its level, and there is no anchor either.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..diffusion.networks import preset
from ..diffusion.prior import Prior
from ..errors import InputError
from ..flows.posterior import Posterior
from ..gaussian import Wiener
from ..io.datasets import head
from ..noise import Gaussian
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId, generator
from .binding import Binding
from .losses import (
    anchored,
    anchored_masked,
    denoising,
    distilled,
    elbo_loss,
    forward_kl,
    levels,
    recorrupted,
)
from .moments import fit
from .replay import PosteriorSampler, Replay, draw, identity, together
from .trainer import LRPhase, ParamGroup, Trainer

__all__ = ["FlowDiff", "Recipe"]

JOINT_RATE = 0.4  # at the full rate the paper's objective diverged (docs/experiments.md)
AGAIN_RATE = 0.3  # of the mean network, when it is fitted a second time


@dataclass(frozen=True)
class Recipe:
    """The schedule of the default objective; shares are of the whole budget.

    Attributes:
        mean: Share at which the mean start ends and the prior begins.
        a: Noise added for the mean start, in units of sigma_y.
        polish: Share at which the buffer is first filled, and the prior turns to it. Early: what
            it learns below sigma_y from m(y), which has no spread, has to be unlearnt.
        flow: Share at which the flow begins.
        hide: Share of the seen pixels withheld from m in the mean start, where A is a mask.
        anchor: What the prior is matched to above sigma_y before the polish, for A = I: m(y); the
            noisy image itself, unbiased but with its noise; or none, for m(y) at all levels. For
            masks "image" means the seen pixels, above the level `above`; else m(y).
        above: That level.
        refresh: Images polished for each image seen from the first polish on.
        buffer: Images kept in the replay buffer, at most as many as fit into 256 MiB
            (`replay.LIMIT`): all of them up to 128 x 128 pixels, 512 of 512 x 512.
        steps: Evaluations of a draw from the posterior, where A = I. Below 16 the draws lose
            spread (`samplers.posterior_draw`).
        reverse: Weight of the paper's objective for the flow beside the forward KL.
        reset: Share at which the prior starts afresh on the buffer; None: never.

    Raises:
        InputError: shares beyond 0 and 1, polish before mean, a at 0 or below, refresh or reverse
            below 0, buffer or steps below 1.
    """

    mean: float = 0.48
    a: float = 0.6
    polish: float = 0.76
    flow: float = 0.94
    hide: float = 0.2
    anchor: Literal["mean", "image", "none"] = "mean"
    above: float = 0.5
    refresh: float = 0.05
    buffer: int = 8192
    steps: int = 16
    reverse: float = 0.0
    reset: float | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "polish", "flow", "hide", "reset"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"recipe: {name} is {share}, a share from 0 to 1")
        if self.mean > self.polish:
            raise InputError(f"recipe: polish is {self.polish}, before mean, {self.mean}")
        for name, least in (("buffer", 1), ("steps", 1), ("refresh", 0), ("reverse", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise InputError(f"recipe: {name} is {getattr(self, name)}, at least {least}")
        if not 0 < self.a < math.inf:
            raise InputError(f"recipe: a is {self.a}, above 0")


class FlowDiff:
    """The method: networks, replay buffer, and the losses of a step.

    Args:
        y: Measurements (N, ...); never anything else.
        problem: How they were made.
        shape: Shape (C, H, W) of the images behind them.
        network: Preset of the networks.
        objective: "default" or the paper's "elbo".
        recipe: Schedule of the default objective.
        seed: Seed of the initial weights and of the polish.
        solver: Draws x given (y, problem, prior, streams), for A other than the identity.
    """

    def __init__(
        self,
        y: Tensor,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        objective: Literal["default", "elbo"] = "default",
        recipe: Recipe | None = None,
        seed: int = 0,
        solver: PosteriorSampler | None = None,
    ) -> None:
        preset(network)
        self.y, self.problem, self.shape, self.seed = y, problem, shape, seed
        self.binding = Binding(problem, shape)
        self.network, self.objective, self.solver = network, objective, solver
        self.recipe = recipe or Recipe()
        gaussian = isinstance(problem.noise, Gaussian)
        self.denoising = identity(problem)
        # where the flow itself polishes it cannot come later
        alone = not self.denoising and solver is None
        self.flow_start = self.recipe.polish if alone else self.recipe.flow
        moments = objective == "default" and not self.denoising and problem.linear and gaussian
        start = Wiener(shape) if moments else None
        spread = 0.05 if objective == "default" else problem.sigma / 2
        if not gaussian:  # what the flow starts from should be less than the noise
            spread = float(problem.noise.variance(head(y).mean())) ** 0.5 / 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, StreamId.INIT).initial_seed() % 2**31)
            self.posterior = Posterior.create(network, shape, spread, start)
            self.prior = Prior.create(network, shape)
        self.modules: dict[str, nn.Module] = {"posterior": self.posterior, "prior": self.prior}
        self.ema = copy.deepcopy(self.modules)
        self.teacher = cast(Prior, self.ema["prior"])
        self.student = cast(Posterior, self.ema["posterior"])
        self.groups = self.spans()
        self.replay = Replay(self.recipe.buffer if objective == "default" else 0, shape)
        self.buffers = self.replay.tensors | {"begun": torch.zeros((), dtype=torch.bool)}

    def spans(self) -> list[ParamGroup]:
        """Which part is trained when."""
        mean = list(self.posterior.mean_net.parameters())
        flow, prior = self.posterior.flow_parameters(), list(self.prior.parameters())
        if self.objective == "elbo":
            return [ParamGroup(part, (LRPhase(peak=JOINT_RATE),)) for part in (mean, flow, prior)]
        recipe = self.recipe
        start = LRPhase(0.0, recipe.mean)
        again = LRPhase(self.flow_start, 1.0, AGAIN_RATE)
        return [
            ParamGroup(mean, (LRPhase(),) if self.flow_start == recipe.polish else (start, again)),
            ParamGroup(flow, (LRPhase(self.flow_start),)),
            ParamGroup(prior, (LRPhase(recipe.mean),)),
        ]

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; see `memory`."""
        if self.objective == "elbo":
            return [{"prior": 2.0, "posterior": 1.0}]
        more = 1.0 if self.recipe.reverse else 0.0
        return [{"prior": 1 + more, "posterior": 1 + more, "mean": float(self.denoising)}]

    def bind(self, rows: Tensor, device: torch.device) -> Problem:
        """The problem of the measurements with these numbers."""
        return self.binding.bind(rows, device)

    def prepare(self, rows: Tensor, device: torch.device) -> None:
        """Bind the problem of a coming step; called by the thread that reads its measurements."""
        self.binding.prepare(rows, device)

    # ------------------------------------------------------------------ the paper's objective

    def joint(self, y: Tensor, rows: Tensor, noise: torch.Generator) -> dict[str, Tensor]:
        """One step of the paper's objective: the flow's loss, then the prior's on its draws."""
        flow, x = elbo_loss(self.posterior, self.teacher, y, self.bind(rows, y.device), noise)
        prior = denoising(self.prior, x, levels(len(x), noise), noise)
        return {"flow": flow, "prior": prior}

    # ------------------------------------------------------------------ the default objective

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of a step at a progress from 0 to 1."""
        if self.objective == "elbo":
            return self.joint(y, rows, generator)
        problem = self.bind(rows, y.device)
        if progress < self.recipe.mean:
            recipe = self.recipe
            loss = recorrupted(self.posterior, y, problem, recipe.a, generator, recipe.hide)
            return {"mean": loss}
        sigma = levels(len(y), generator)
        if not self.replay.filled:
            return {"prior": self.first_prior(y, problem, sigma, generator)}
        x = self.replay.pick(len(y), generator)
        losses = {"prior": denoising(self.prior, x, sigma, generator)}
        if progress < self.flow_start:
            return losses
        losses["flow"], error = forward_kl(self.posterior, x, problem, generator)
        if self.denoising:
            error = distilled(self.posterior, self.teacher, y, problem)
        losses["mean"] = error
        if self.recipe.reverse:
            reverse, _ = elbo_loss(self.posterior, self.teacher, y, problem, generator)
            losses["reverse"] = self.recipe.reverse * reverse
        return losses

    def first_prior(
        self, y: Tensor, problem: Problem, sigma: Tensor, noise: torch.Generator
    ) -> Tensor:
        """Score matching before there are draws: on m(y), anchored at high levels."""
        anchor, recipe = self.recipe.anchor, self.recipe
        if anchor == "image" and problem.operator.mask is not None:
            return anchored_masked(
                self.prior, self.student, y, problem, sigma, noise, recipe.hide, recipe.above
            )
        with torch.no_grad():
            mean = self.student.mean(y, problem)
        if not self.denoising or anchor == "none":
            return denoising(self.prior, mean, sigma, noise)
        target = mean if anchor == "mean" else None
        return anchored(self.prior, mean, y, problem.sigma, sigma, noise, target)

    # ------------------------------------------------------------------ between steps

    def begin(self, device: torch.device) -> None:
        """Fits the Gaussian prior that the mean starts from."""
        model = fit(self.y, self.problem, self.shape, self.seed, device=device)
        for posterior in (self.posterior, self.student):
            assert posterior.start is not None
            posterior.start.load_state_dict(model.state_dict())

    @torch.no_grad()
    def polish(self, count: int, device: torch.device) -> None:
        """Replaces the buffer's oldest images by draws from p(x | y) for the next measurements."""
        number = self.replay.numbers(count)
        rows = number % len(self.y)
        y, problem = self.y[rows.to(self.y.device)].to(device), self.bind(rows, device)
        streams = PerImageGenerator(
            self.seed, number.tolist(), StreamId.FLOWDIFF_E_STEP, device=device
        )
        x = draw(y, problem, self.teacher, streams, self.solver, self.recipe.steps)
        network: nn.Module = self.teacher
        if x is None:
            network = self.student
            z = streams.randn(*self.shape)
            x = self.student.transform(z, self.student.context(y, problem))[0]
        solver = None if self.denoising else self.solver
        self.replay.put(x, network, solver, self.problem)

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Fills and refreshes the buffer; starts the prior afresh when its time has come."""
        recipe = self.recipe
        if self.posterior.start is not None and not self.buffers["begun"]:
            self.begin(trainer.device)
            self.buffers["begun"].fill_(True)
        if self.objective == "elbo" or progress < recipe.polish:
            return
        first = min(len(self.replay), len(self.y), 1024)
        observed = trainer.settings.batch * (step - int(recipe.polish * trainer.steps))
        chunk = min(256, first, together(self.teacher, self.solver))
        while first + int(recipe.refresh * observed) - self.replay.drawn >= chunk:
            self.polish(chunk, trainer.device)
        if recipe.reset is not None and step == round(recipe.reset * trainer.steps):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator(self.seed, StreamId.RESET).initial_seed() % 2**31)
                trainer.reset("prior", Prior.create(self.network, self.shape))
