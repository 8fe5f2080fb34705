r"""Expectation maximization: a diffusion prior refitted to its own posterior samples.

:math:`y = A x + \sigma_y n`. One round (Rozet et al., 2024, arXiv 2405.13712, Algorithm 1; Bai et
al., 2024, arXiv 2407.01014, Algorithm 1) is

.. math::

    \text{E:}\quad & x_i \sim p_\theta(x \mid y_i) \text{ for some of the measurements} \\
    \text{M:}\quad & \theta \leftarrow \arg\min_\theta E_{i, \sigma, n}\; \lambda(\sigma)\,
        \lVert D_\theta(x_i + \sigma n, \sigma) - x_i \rVert^2, \text{ from the present weights}

and with exact draws and fits never lowers the likelihood of the :math:`y_i`. The E-step is a
setting:

=================  ===============================================================================
E-step             method
=================  ===============================================================================
moment matching    a solver that draws x given y: "mmps" makes it EM-MMPS (Rozet et al.)
DPS                the solver "dps": EMDiffusion (Bai et al., who start from clean images)
A = I              the reverse diffusion that starts at (y, sigma_y); it needs no solver
conditional        a diffusion model of x given y, D(x_t, sigma, c(y)): DiffEM (Hosseintabar et
                   al., 2025, arXiv 2510.12691)
=================  ===============================================================================

The first round draws exactly from the posterior under a Gaussian prior that EM has fitted to the
measurements (`unmurk.gaussian.fit`). No clean image is used. The last part of the run also fits
the flow :math:`q(x \mid y)` by forward KL on the draws, so that restoring takes one pass.

With the conditional E-step, the rounds refit the conditional model instead,

.. math::

    \text{M':}\quad D(\cdot, \cdot, c) \leftarrow \text{score matching on the } x_i
        \text{ with } c(y_i'),\ y_i' \sim p(y \mid x_i) \text{ fresh},

and the unconditional prior is fitted in the last round alone, to the draws of that round.
:math:`c(y)` is what the flow reads of y: the Wiener solution under the Gaussian prior, the mask,
and :math:`\sigma_y`. (Theirs reads :math:`A^+ y`; it trains one network a round instead of two,
and needs no solver.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..bounds import Real, Whole, check_fields
from ..diffusion.prior import Prior
from ..errors import InputError
from ..interrupts import heed_interrupt
from ..noise import Gaussian
from ..operators.base import per_image
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId
from .conditional import ConditionalDenoiser, conditioning_stem
from .learner import Learner, solver_name
from .losses import corrupted, denoising, forward_kl, gaussian, levels, weighted
from .papers import EM, EM_DPS
from .replay import PosteriorSampler, Replay, chunk_size, draw_posterior, is_denoising
from .schedule import LRPhase
from .trainer import Trainer

__all__ = ["Em", "Rounds"]

CHUNK = 128  # images drawn together


@dataclass(frozen=True)
class Rounds:
    """The schedule of expectation maximization.

    Attributes:
        rounds: Number of rounds, a whole number from 1 to 10000. The prior's learning rate rises
            and falls in each.
        images: Images drawn in each round, of the next measurements in turn, a whole number from 1
            to 1e+07; at most as many as fit into 256 MiB (`replay.LIMIT`).
        flow: Fraction of the run at which the flow begins, a number from 0 to 1.
        steps: Network evaluations of a draw for A = I, a whole number from 1 to 10000. A
            conditional E-step starts at pure noise and takes 2 steps - 1. Below 16 the draws lose
            variance.
        clean: Fraction of every batch that is clean images, if there are any, from 0 to 0.9.

    Raises:
        InputError: A value is out of its bounds.

    >>> Rounds(rounds=3).images
    2048
    """

    rounds: Annotated[int, Whole(1, 10_000)] = 6
    images: Annotated[int, Whole(1, 10_000_000)] = 2048
    flow: Annotated[float, Real(0, 1)] = 0.85
    steps: Annotated[int, Whole(1, 10_000)] = 16
    clean: Annotated[float, Real(0, 0.9)] = 0.25

    def __post_init__(self) -> None:
        check_fields(self, {name: f"rounds.{name}" for name in vars(self)})


@dataclass(eq=False, kw_only=True)
class Em(Learner):
    """Expectation maximization, for linear operators and Gaussian noise.

    Attributes:
        rounds: The schedule.
        solver: A function of (y, problem, prior, generator) that draws x given y, such as
            `solvers.Draws("mmps")`. It is needed for e_step="prior" unless A = I.
        e_step: Draw under the "prior", by the solver, or by a "conditional" diffusion model.

    Raises:
        InputError: The schedule has too few rounds. `build` also refuses a problem that needs a
            solver if there is none.

    >>> Em(rounds=Rounds(rounds=3)).rounds.rounds, Em.takes(Problem("identity", 0.1))
    (3, True)
    >>> Em(e_step="conditional", rounds=Rounds(rounds=1))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: rounds.rounds is 1: with a conditional e_step it must be at least ...
    """

    citation: ClassVar[str] = EM

    option_citations: ClassVar[dict[tuple[str, Any], str]] = {
        ("e_step", "conditional"): """@misc{hosseintabar2025diffem,
  title = {{DiffEM}: Learning from Corrupted Data with Diffusion Models via Expectation
           Maximization},
  author = {Hosseintabar, Danial and Chen, Fan and Daras, Giannis and Torralba, Antonio and
            Daskalakis, Constantinos},
  year = {2025},
  eprint = {2510.12691},
  archivePrefix = {arXiv}
}"""
    }

    takes_repeats: ClassVar[bool] = True
    takes_clean: ClassVar[bool] = True

    rounds: Rounds = field(default_factory=Rounds)
    solver: PosteriorSampler | None = None
    e_step: Literal["prior", "conditional"] = "prior"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditional and self.rounds.rounds < 2:
            raise InputError(
                "rounds.rounds is 1: with a conditional e_step it must be at least 2, since the "
                "last round fits the prior"
            )

    @classmethod
    def papers(cls, options: Mapping[str, Any]) -> list[str]:
        """See `Learner.papers`: DPS as the E-step has a paper of its own."""
        return super().papers(options) + ([EM_DPS] if solver_name(options) == "dps" else [])

    @property
    def conditional(self) -> bool:
        """Whether a conditional diffusion model draws the images."""
        return self.e_step == "conditional"

    @staticmethod
    def takes(problem: Problem) -> bool:
        """Whether the learner can learn from measurements of this kind."""
        return problem.linear and isinstance(problem.noise, Gaussian)

    def check_problem(self) -> None:
        """Raise InputError if the E-step needs a solver and there is none."""
        if not self.conditional and self.solver is None and not self.denoising:
            raise InputError(
                f"em with '{self.problem.operator.spec}' draws by a solver: give solver="
            )

    def starts_gaussian(self) -> bool:
        """The mean network starts from the Wiener solution of the fitted Gaussian prior."""
        return True

    def extra_modules(self) -> dict[str, nn.Module]:
        """Create the conditional diffusion model, if there is one."""
        if not self.conditional:
            return {}
        own = self.make_prior()
        stem = conditioning_stem(own, self.shape[0] + 2)
        return {"conditional": nn.ModuleDict({"prior": own, "stem": stem})}

    def make_buffers(self) -> dict[str, Tensor]:
        """Create the replay buffer, which holds the draws of one round."""
        self.replay = Replay(min(self.rounds.images, len(self.y)), self.shape)
        return self.replay.tensors

    def finish(self) -> None:
        """Create the conditional denoisers."""
        if self.conditional:
            self.conditional_network = _conditional_of(self.modules)
            self.conditional_teacher = _conditional_of(self.ema)

    def phases(self) -> dict[str, tuple[LRPhase, ...]]:
        """Train the prior, or the conditional model, in every round, and the flow at the end."""
        k, last = self.rounds.rounds, (LRPhase(self.rounds.flow),)
        rounds = tuple(LRPhase(i / k, (i + 1) / k) for i in range(k))
        prior = rounds[-1:] if self.conditional else rounds
        return {"mean": last, "flow": last, "prior": prior, "conditional": rounds[:-1]}

    def rounds_done(self, progress: float) -> int:
        """Return the number of rounds that are over."""
        return int(progress * self.rounds.rounds + 1e-9)

    def lengthen(self, progress: float) -> None:
        """Draw the images of the round anew; see `Learner.lengthen`."""
        self.replay.restart(self.rounds_done(progress) * len(self.replay))

    def evaluations(self, progress: float, images: float) -> float:
        """Return how many evaluations the E-steps take; see `Learner.evaluations`."""
        rounds = self.rounds.rounds - 1 - self.rounds_done(progress)
        steps = 2 * self.rounds.steps - 1 if self.conditional else self.rounds.steps
        return rounds * len(self.replay) * steps

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Take the E-step when a round begins."""
        done = self.rounds_done(progress)
        chunk = min(CHUNK, chunk_size(self.prior, self.solver))
        while self.replay.drawn < (done + 1) * len(self.replay):
            heed_interrupt()
            left = (done + 1) * len(self.replay) - self.replay.drawn
            self.draw_posterior(min(chunk, left), done, trainer.device)

    @torch.no_grad()
    def draw_posterior(self, count: int, done: int, device: torch.device) -> None:
        """Draw x ~ p(x | y) for the next measurements and put the images into the buffer.

        Args:
            count: Number of images.
            done: Rounds that are over.
            device: Device of the networks.

        Raises:
            InputError: An image is not finite.
        """
        number = self.replay.numbers(count)
        y, problem = self.measurements(number, device)
        streams = PerImageGenerator(self.seed, number.tolist(), StreamId.E_STEP, device=device)
        start = self.posterior.start
        assert start is not None
        network: nn.Module = self.teacher
        solver = None
        if done == 0:
            network = start
            x = start.draw(y, problem, streams)
        elif self.conditional:
            network = self.ema["conditional"]
            channels = self.posterior.known(y, problem)[1]
            x = self.conditional_teacher.sample(channels, streams, 2 * self.rounds.steps - 1)
        else:
            solver = None if is_denoising(problem) else self.solver
            x = draw_posterior(y, problem, self.teacher, streams, solver, self.rounds.steps)
        self.replay.put(x, network, solver, self.problem)

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the M-step: score matching on the draws, and late the likelihood of the flow."""
        count = 0
        if self.clean is not None:
            count = min(round(self.rounds.clean * len(y)), len(y) - 1)
        clean = self.pick_clean(count, generator)
        # a step that is only timed may come before the first draws
        x = torch.zeros(len(y) - count, *self.shape, device=y.device)
        x = self.replay.pick(len(x), generator) if self.replay.filled else x
        x = torch.cat([x, clean]) if count else x
        picked = self.pick_captures(generator) if self.repeats > 1 else None
        problem, sigma = self.view(y, index, picked)[1], levels(len(x), generator)
        last = self.rounds_done(progress) == self.rounds.rounds - 1
        if self.conditional and not last:
            losses = {"conditional": self.matching(x, problem, sigma, generator)}
        else:
            losses = {"prior": denoising(self.prior, x, sigma, generator)}
        if progress >= self.rounds.flow:
            losses["flow"], losses["mean"] = forward_kl(self.posterior, x, problem, generator)
        return losses

    def matching(
        self, x: Tensor, problem: Problem, sigma: Tensor, noise: torch.Generator
    ) -> Tensor:
        r"""Compute score matching of the conditional model on fresh corruptions of images.

        .. math:: E\; \lambda(\sigma)\, \lVert D(x + \sigma n, \sigma, c(y')) - x \rVert^2,
            \qquad y' \sim p(y \mid x)

        Args:
            x: Images (B, C, H, W).
            problem: The problem, bound to as many images.
            sigma: Noise levels (B,).
            noise: Source of all draws.

        Returns:
            The loss, a scalar.
        """
        with torch.no_grad():
            y = corrupted(problem.A(x), problem, noise)
            channels = self.posterior.known(y, problem)[1]
        noisy = x + per_image(sigma, x) * gaussian(x, noise)
        return weighted(self.conditional_network.denoise(noisy, sigma, channels) - x, sigma)


def _conditional_of(modules: dict[str, nn.Module]) -> ConditionalDenoiser:
    """Return the conditional denoiser of the module "conditional"."""
    held = cast(nn.ModuleDict, modules["conditional"])
    return ConditionalDenoiser(cast(Prior, held["prior"]), held["stem"])
