"""Expectation maximisation: the prior refitted, round after round, to its own posterior samples.

y = A x + sigma_y n. One round (Rozet et al., 2024, arXiv 2405.13712, Algorithm 1; Bai et al.,
2024, arXiv 2407.01014, Algorithm 1) is

    E   x_i ~ p(x | y_i) under the current prior p, for some of the measurements
    M   p <- the diffusion model fitted to the x_i, from the weights it has

and with exact draws and fits never lowers the likelihood of the y_i. The E-step is a setting:

    moment matching    a solver that draws x given y: "mmps" makes it EM-MMPS (Rozet et al.)
    DPS                the solver "dps": EMDiffusion (Bai et al.), who start from clean images
    A = I              the reverse diffusion started at (y, sigma_y), which needs no solver
    conditional        a diffusion model of x given y, D(x_t, sigma, c(y)): DiffEM (2025, arXiv
                       2510.12691)

The first round draws, exactly, from the posterior under a Gaussian prior that EM has fitted to the
measurements (`moments`); no clean image is used. The last share of the run also fits the flow q(x
| y), by forward KL on the draws, so that restoring takes one pass.

With the conditional E-step that model is what the rounds refit,

    M'  D(., ., c) <- score matching on the x_i, with c(y_i') of fresh y_i' ~ p(y | x_i)

and the unconditional prior is fitted in the last round alone, to the draws of that round. c(y) is
what the flow reads of y: the Wiener solution under the moment prior, the mask, sigma_y. (Theirs
sees A^+ y; one network a round instead of two, and no solver.)
"""

import copy
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..diffusion.networks import preset
from ..diffusion.prior import Prior
from ..errors import InputError
from ..flows.posterior import Posterior
from ..gaussian import Wiener
from ..noise import Gaussian
from ..operators.base import per_image
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId, generator
from .binding import Binding
from .conditional import Conditional, stem
from .losses import corrupted, denoising, forward_kl, gaussian, levels, weighted
from .moments import fit
from .replay import PosteriorSampler, Replay, draw, identity, together
from .trainer import LRPhase, ParamGroup, Trainer

__all__ = ["Em", "Rounds"]

CHUNK = 128  # images drawn together


@dataclass(frozen=True)
class Rounds:
    """The schedule of expectation maximisation.

    Attributes:
        rounds: How many; the prior's learning rate rises and falls in each.
        images: Images drawn in each, of the next measurements in turn; at most as many as fit
            into 256 MiB (`replay.LIMIT`).
        flow: Share of the run at which the flow begins.
        steps: Evaluations of a draw where A = I; a conditional E-step, which begins at pure
            noise, takes 2 steps - 1. Below 16 the draws lose spread (`samplers`).

    Raises:
        InputError: flow beyond 0 and 1, or steps below 1.
    """

    rounds: int = 6
    images: int = 2048
    flow: float = 0.85
    steps: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.flow <= 1:
            raise InputError(f"rounds: flow is {self.flow}, a share from 0 to 1")
        if self.steps < 1:
            raise InputError(f"rounds: steps is {self.steps}, at least 1")


class Em:
    """The method: networks, the images drawn, and the losses of a step.

    Args:
        y: Measurements (N, ...); never anything else.
        problem: How they were made; A linear.
        shape: Shape (C, H, W) of the images behind them.
        network: Preset of the networks.
        rounds: Schedule.
        seed: Seed of the initial weights and of the draws.
        solver: Draws x given (y, problem, prior, streams); needed for e_step="prior" unless A = I.
        e_step: Draw under the "prior", by the solver, or by a "conditional" diffusion model.

    Raises:
        InputError: No solver, a nonlinear A, or a schedule with too few rounds or images.
    """

    def __init__(
        self,
        y: Tensor,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        rounds: Rounds | None = None,
        seed: int = 0,
        solver: PosteriorSampler | None = None,
        e_step: Literal["prior", "conditional"] = "prior",
    ) -> None:
        preset(network)
        self.y, self.problem, self.shape, self.seed, self.solver = y, problem, shape, seed, solver
        self.binding = Binding(problem, shape)
        self.rounds, self.e_step = rounds or Rounds(), e_step
        conditional = e_step == "conditional"
        if self.rounds.rounds < 1 + conditional or self.rounds.images < 1:
            least = "rounds must be at least 2 (the last is the prior's)" if conditional else ""
            raise InputError(f"em: {least or 'rounds and images must be at least 1'}")
        if not conditional and solver is None and not identity(problem):
            raise InputError(f"em with '{problem.operator.spec}' draws by a solver: give solver=")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, StreamId.INIT).initial_seed() % 2**31)
            self.posterior = Posterior.create(network, shape, start=Wiener(shape))
            self.prior = Prior.create(network, shape)
            self.modules: dict[str, nn.Module] = {"posterior": self.posterior, "prior": self.prior}
            if conditional:
                own = Prior.create(network, shape)
                parts = {"prior": own, "stem": stem(own, shape[0] + 2)}
                self.modules["conditional"] = nn.ModuleDict(parts)
        self.ema = copy.deepcopy(self.modules)
        k, last = self.rounds.rounds, (LRPhase(self.rounds.flow),)
        spans = tuple(LRPhase(i / k, (i + 1) / k) for i in range(k))
        self.groups = [
            ParamGroup(list(self.posterior.mean_net.parameters()), last),
            ParamGroup(self.posterior.flow_parameters(), last),
            ParamGroup(list(self.prior.parameters()), spans[-1:] if conditional else spans),
        ]
        if conditional:
            of, averaged = (
                cast(nn.ModuleDict, m["conditional"]) for m in (self.modules, self.ema)
            )
            self.network = Conditional(cast(Prior, of["prior"]), of["stem"])
            self.teacher = Conditional(cast(Prior, averaged["prior"]), averaged["stem"])
            parameters = list(self.modules["conditional"].parameters())
            self.groups.append(ParamGroup(parameters, spans[:-1]))
        self.replay = Replay(min(self.rounds.images, len(y)), shape)
        self.buffers = self.replay.tensors

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the method can learn from such measurements."""
        return problem.linear and isinstance(problem.noise, Gaussian)

    def bind(self, rows: Tensor, device: torch.device) -> Problem:
        """The problem of the measurements with these numbers."""
        return self.binding.bind(rows, device)

    def prepare(self, rows: Tensor, device: torch.device) -> None:
        """Bind the problem of a coming step; called by the thread that reads its measurements."""
        self.binding.prepare(rows, device)

    def done(self, progress: float) -> int:
        """Rounds that are over."""
        return int(progress * self.rounds.rounds + 1e-9)

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """The E-step, when a round begins; the moment prior before the first."""
        done = self.done(progress)
        if self.replay.drawn == 0:
            self.begin(trainer.device)
        chunk = min(CHUNK, together(self.prior, self.solver))
        while self.replay.drawn < (done + 1) * len(self.replay):
            left = (done + 1) * len(self.replay) - self.replay.drawn
            self.expect(min(chunk, left), done, trainer.device)

    def begin(self, device: torch.device) -> None:
        """Fits the moment prior; the flow's mean starts from its Wiener solution."""
        model = fit(self.y, self.problem, self.shape, self.seed, device=device)
        for posterior in (self.posterior, self.ema["posterior"]):
            assert isinstance(posterior, Posterior) and posterior.start is not None
            posterior.start.load_state_dict(model.state_dict())

    @torch.no_grad()
    def expect(self, count: int, done: int, device: torch.device) -> None:
        """Draws x ~ p(x | y) for the next measurements and puts them in the buffer."""
        number = self.replay.numbers(count)
        rows = number % len(self.y)
        y, problem = self.y[rows.to(self.y.device)].to(device), self.bind(rows, device)
        streams = PerImageGenerator(self.seed, number.tolist(), StreamId.E_STEP, device=device)
        teacher, start = self.ema["prior"], self.posterior.start
        assert isinstance(teacher, Prior) and start is not None
        network, solver = cast(nn.Module, teacher), None
        if done == 0:
            network = start
            x = start.draw(y, problem, streams)
        elif self.e_step == "conditional":
            network = self.ema["conditional"]
            channels = self.posterior.known(y, problem)[1]
            x = self.teacher.sample(channels, streams, 2 * self.rounds.steps - 1)
        else:
            found = draw(y, problem, teacher, streams, self.solver, self.rounds.steps)
            assert found is not None
            x, solver = found, None if identity(problem) else self.solver
        self.replay.put(x, network, solver, self.problem)

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The M-step: score matching on the draws, and late the flow's maximum likelihood."""
        x = self.replay.pick(len(y), generator)
        problem, sigma = self.bind(rows, y.device), levels(len(x), generator)
        last = self.done(progress) == self.rounds.rounds - 1
        if self.e_step == "conditional" and not last:
            losses = {"conditional": self.matching(x, problem, sigma, generator)}
        else:
            losses = {"prior": denoising(self.prior, x, sigma, generator)}
        if progress >= self.rounds.flow:
            losses["flow"], losses["mean"] = forward_kl(self.posterior, x, problem, generator)
        return losses

    def matching(
        self, x: Tensor, problem: Problem, sigma: Tensor, noise: torch.Generator
    ) -> Tensor:
        """Score matching of the conditional network on images x and fresh corruptions of them."""
        with torch.no_grad():
            y = corrupted(problem.A(x), problem, noise)
            channels = self.posterior.known(y, problem)[1]
        noisy = x + per_image(sigma, x) * gaussian(x, noise)
        return weighted(self.network.denoise(noisy, sigma, channels) - x, sigma)
