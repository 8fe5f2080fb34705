"""Expectation maximisation: the prior refitted, round after round, to its own posterior samples.

y = A x + sigma_y n. One round (Rozet et al., 2024, arXiv 2405.13712, Algorithm 1; Bai et al.,
2024, arXiv 2407.01014, Algorithm 1) is

    E   x_i ~ p(x | y_i) under the current prior p, for some of the measurements
    M   p <- the diffusion model fitted to the x_i, from the weights it has

and with exact draws and fits never lowers the likelihood of the y_i. The E-step is a setting:

    moment matching    a solver that draws x given y: "mmps" makes it EM-MMPS (Rozet et al.)
    DPS                the solver "dps": EMDiffusion (Bai et al.), who start from clean images
    A = I              the reverse diffusion started at (y, sigma_y), which needs no solver

The first round draws, exactly, from the posterior under a Gaussian prior that EM has fitted to the
measurements (`moments`); no clean image is used. The last share of the run also fits the flow q(x
| y), by forward KL on the draws, so that restoring takes one pass.

Left out: an E-step by a conditional diffusion network (DiffEM, 2025, arXiv 2510.12691), which is
another network to train in every round.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..nets import preset
from ..noise import Gaussian
from ..posterior import Posterior
from ..prior import Prior
from ..problem import Problem
from ..seeds import Streams, generator
from ..wiener import Wiener
from .loop import Group, Span, Trainer
from .moments import fit
from .objectives import denoising, forward_kl, levels
from .replay import Replay, Solver, draw, identity

__all__ = ["Em", "Rounds"]

INIT, E_STEP = 0xFFFF0003, 7006  # paths below the seed
CHUNK = 128  # images drawn together


@dataclass(frozen=True)
class Rounds:
    """The schedule of expectation maximisation.

    Attributes:
        rounds: How many; the prior's learning rate rises and falls in each.
        images: Images drawn in each, of the next measurements in turn.
        flow: Share of the run at which the flow begins.
        steps: Steps of the reverse diffusion, where A = I.
    """

    rounds: int = 6
    images: int = 2048
    flow: float = 0.85
    steps: int = 16


class Em:
    """The method: networks, the images drawn, and the losses of a step.

    Args:
        y: Measurements (N, ...); never anything else.
        problem: How they were made; A linear.
        shape: Shape (C, H, W) of the images behind them.
        network: Preset of the networks.
        rounds: Schedule.
        seed: Seed of the initial weights and of the draws.
        solver: Draws x given (y, problem, prior, streams); needed unless A = I.

    Raises:
        InputError: No solver, a nonlinear A, or a schedule without rounds or images.
    """

    def __init__(
        self,
        y: Tensor,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        rounds: Rounds | None = None,
        seed: int = 0,
        solver: Solver | None = None,
    ) -> None:
        preset(network)
        self.y, self.problem, self.shape, self.seed, self.solver = y, problem, shape, seed, solver
        self.rounds = rounds or Rounds()
        if self.rounds.rounds < 1 or self.rounds.images < 1:
            raise InputError("em: rounds and images must be at least 1")
        if solver is None and not identity(problem):
            raise InputError(f"em with '{problem.operator.spec}' draws by a solver: give solver=")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, INIT).initial_seed() % 2**31)
            self.posterior = Posterior.create(network, shape, start=Wiener(shape))
            self.prior = Prior.create(network, shape)
        self.modules: dict[str, nn.Module] = {"posterior": self.posterior, "prior": self.prior}
        self.averages = copy.deepcopy(self.modules)
        k, last = self.rounds.rounds, (Span(self.rounds.flow),)
        self.groups = [
            Group(list(self.posterior.mean_net.parameters()), last),
            Group(self.posterior.flow_parameters(), last),
            Group(
                list(self.prior.parameters()),
                tuple(Span(i / k, (i + 1) / k) for i in range(k)),
            ),
        ]
        self.replay = Replay(min(self.rounds.images, len(y)), shape)
        self.buffers = self.replay.tensors

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the method can learn from such measurements."""
        return problem.linear and isinstance(problem.noise, Gaussian)

    def at(self, rows: Tensor, device: torch.device) -> Problem:
        """The problem of the measurements with these numbers."""
        problem = self.problem.at(rows.tolist(), self.shape)
        return problem if device.type == "cpu" else problem.to(device)

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """The E-step, when a round begins; the moment prior before the first."""
        done = int(progress * self.rounds.rounds + 1e-9)  # rounds that are over
        if self.replay.drawn == 0:
            self.begin(trainer.device)
        while self.replay.drawn < (done + 1) * len(self.replay):
            left = (done + 1) * len(self.replay) - self.replay.drawn
            self.expect(min(CHUNK, left), done, trainer.device)

    def begin(self, device: torch.device) -> None:
        """Fits the moment prior; the flow's mean starts from its Wiener solution."""
        model = fit(self.y.to(device), self.problem.to(device), self.shape, self.seed)
        for posterior in (self.posterior, self.averages["posterior"]):
            assert isinstance(posterior, Posterior) and posterior.start is not None
            posterior.start.load_state_dict(model.state_dict())

    @torch.no_grad()
    def expect(self, count: int, done: int, device: torch.device) -> None:
        """Draws x ~ p(x | y) for the next measurements and puts them in the buffer."""
        number = self.replay.numbers(count)
        rows = number % len(self.y)
        y, problem = self.y[rows.to(self.y.device)].to(device), self.at(rows, device)
        streams = Streams(self.seed, number.tolist(), E_STEP, device=device)
        teacher, start = self.averages["prior"], self.posterior.start
        assert isinstance(teacher, Prior) and start is not None
        if done == 0:
            x = start.draw(y, problem, streams)
        else:
            found = draw(y, problem, teacher, streams, self.solver, self.rounds.steps)
            assert found is not None
            x = found
        self.replay.put(x)

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The M-step: score matching on the draws, and late the flow's maximum likelihood."""
        x = self.replay.pick(len(y), generator)
        losses = {"prior": denoising(self.prior, x, levels(len(x), generator), generator)}
        if progress >= self.rounds.flow:
            problem = self.at(rows, y.device)
            losses["flow"], losses["mean"] = forward_kl(self.posterior, x, problem, generator)
        return losses
