"""The base class of learners that train a prior first, then a posterior on its draws."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..interrupts import heed_interrupt
from ..rng import PerImageGenerator, StreamId
from .learner import Learner
from .losses import distilled, forward_kl
from .replay import Replay, chunk_size
from .schedule import LRPhase
from .trainer import Trainer

__all__ = ["PRIOR_END", "PriorFirst"]

PRIOR_END = 0.7  # fraction of the run at which the prior is finished
BUFFER, FIRST, REFRESH = 4096, 512, 0.05  # images kept, drawn first, drawn for each image seen
POSTERIOR_STEPS, PRIOR_STEPS = 16, 31  # evaluations of a draw from p(x | y), and from p(x)


@dataclass(eq=False, kw_only=True)
class PriorFirst(Learner):
    r"""A prior by `prior_losses` of the subclass, then a posterior fitted to its draws.

    Ambient Diffusion and SURE-Score learn a denoiser D and no posterior. From 70 % of the run on,
    the EMA weights of D are fixed and images x are drawn with them. The flow is fitted by maximum
    likelihood to pairs of such an x and a fresh corruption of it, whose fixed point is Bayes' rule
    under the learned prior:

    =================  ================================  =====================================
    operator           draws                             target of m(y)
    =================  ================================  =====================================
    :math:`A = I`      :math:`x \sim p(x \mid y)`, from  :math:`D(y, \sigma_y)`
                       :math:`(y, \sigma_y)`
    other              :math:`x \sim p(x)`, from noise   x of the pairs
    =================  ================================  =====================================

    So the posterior is as good as the prior, and adds nothing to it.

    >>> phases = PriorFirst().phases()
    >>> phases["flow"][0].start, phases["prior"][0].end
    (0.7, 0.7)
    """

    def make_buffers(self) -> dict[str, Tensor]:
        """Create the replay buffer."""
        self.replay = Replay(BUFFER, self.shape)
        return self.replay.tensors

    def phases(self) -> dict[str, tuple[LRPhase, ...]]:
        """Train the prior first, then the posterior."""
        late = (LRPhase(PRIOR_END),)
        return {"mean": late, "flow": late, "prior": (LRPhase(0.0, PRIOR_END),)}

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; see `memory`."""
        return [{"prior": 1}, {"posterior": 1, "mean": 1}]

    def prior_losses(
        self, y: Tensor, index: Tensor, part: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses while the prior is trained; part runs from 0 to 1 in that time."""
        raise NotImplementedError

    def losses(
        self, y: Tensor, index: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Compute the losses of a step; see `Learner.losses`."""
        if progress < PRIOR_END or not self.replay.filled:
            return self.prior_losses(y, index, progress / PRIOR_END, generator)
        problem = self.bind(index, y.device)
        x = self.replay.pick(len(y), generator)
        flow, mean = forward_kl(self.posterior, x, problem, generator)
        if self.denoising:
            with torch.no_grad():
                target = self.teacher.denoise(y, problem.sigma)
            mean = distilled(self.posterior, y, problem, target)
        return {"flow": flow, "mean": mean}

    @torch.no_grad()
    def draw_images(self, count: int, device: torch.device) -> None:
        """Draw further images and put them into the buffer.

        Raises:
            InputError: An image is not finite.
        """
        number = self.replay.numbers(count)
        streams = PerImageGenerator(self.seed, number.tolist(), StreamId.E_STEP, device=device)
        if self.denoising:
            y = self.y[number % len(self.y)].to(device)
            x = self.teacher.restore(y, self.problem.sigma, streams, POSTERIOR_STEPS)
        else:
            x = self.teacher.draw(streams, PRIOR_STEPS)
        self.replay.put(x, self.teacher, None, self.problem)

    def lengthen(self, progress: float) -> None:
        """Forget the draws of a prior that goes on; see `Learner.lengthen`."""
        if progress < PRIOR_END:
            self.replay.restart()

    def evaluations(self, progress: float, images: float) -> float:
        """Return how many evaluations draws take; see `Learner.evaluations`."""
        rest = (1 - max(progress, PRIOR_END)) * images
        first = self.first_draws(FIRST, rest) if progress < PRIOR_END else 0
        drawn = min(len(self.replay), first + REFRESH * rest)
        return drawn * (POSTERIOR_STEPS if self.denoising else PRIOR_STEPS)

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Draw the first images when the prior is finished, then further ones."""
        if progress < PRIOR_END:
            return
        observed = trainer.settings.batch * (step - int(PRIOR_END * trainer.steps))
        images = (1 - PRIOR_END) * trainer.settings.batch * trainer.steps
        first = self.first_draws(FIRST, images)
        chunk = min(256, first, len(self.replay), chunk_size(self.teacher))
        wanted = first + math.floor(REFRESH * observed)
        wanted = min(len(self.replay), wanted)
        while self.replay.drawn + chunk <= wanted:
            heed_interrupt()
            self.draw_images(chunk, trainer.device)
