"""A posterior for a prior that is learnt alone: forward KL on draws of that prior.

`ambient` and `sure` learn a denoiser D and no posterior. From the share PRIOR of the run on the
averaged D stands still, images x are drawn with it, and the flow is fitted by maximum likelihood
to pairs of such an x and a fresh corruption of it, whose fixed point is Bayes' rule under the
prior learnt:

    A = I      x ~ p(x | y), the reverse diffusion from (y, sigma_y); m(y) to D(y, sigma_y)
    other A    x ~ p(x), the reverse diffusion from pure noise;       m(y) to the pairs

The posterior is therefore as good as the prior, and says nothing that the prior does not.
"""

import torch
from torch import Tensor

from ..checks import require_finite_draws
from ..devices import host_to
from ..rng import PerImageGenerator, StreamId, host_integers
from .learner import Pair
from .losses import distilled, forward_kl
from .replay import room, together
from .trainer import LRPhase, Trainer

__all__ = ["PRIOR", "Amortised"]

PRIOR = 0.7  # share of the run at which the prior is finished
BUFFER, FIRST, REFRESH = (
    4096,
    512,
    0.05,
)  # images kept (`replay.room`), drawn first, per image seen
STEPS, NEW = 16, 31  # evaluations of a draw from p(x | y), and of one from p(x)


class Amortised(Pair):
    """A prior by `prior_losses` of the members, then its posterior."""

    def stores(self) -> dict[str, Tensor]:
        """The images drawn, and how many they are."""
        rows = room(BUFFER, self.shape)
        images = torch.zeros(rows, *self.shape, dtype=torch.float16)
        return {"images": images, "drawn": torch.zeros((), dtype=torch.int64)}

    def spans(self) -> dict[str, tuple[LRPhase, ...]]:
        """The prior first, then the posterior."""
        return {
            "mean": (LRPhase(PRIOR),),
            "flow": (LRPhase(PRIOR),),
            "prior": (LRPhase(0.0, PRIOR),),
        }

    @property
    def graphs(self) -> list[dict[str, float]]:
        """Graphs of the networks alive in one step, phase by phase; see `memory`."""
        return [{"prior": 1}, {"posterior": 1, "mean": 1}]

    def prior_losses(
        self, y: Tensor, rows: Tensor, part: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses while the prior is learnt; part runs from 0 to 1 in that time."""
        raise NotImplementedError

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of a step at a progress from 0 to 1."""
        drawn = int(self.buffers["drawn"])
        if progress < PRIOR or not drawn:
            return self.prior_losses(y, rows, progress / PRIOR, generator)
        problem = self.bind(rows, y)
        picked = host_integers(drawn, (len(y),), generator)
        x = host_to(self.buffers["images"][picked], y.device).to(y)
        flow, mean = forward_kl(self.posterior, x, problem, generator)
        if self.denoising:
            mean = distilled(self.posterior, self.teacher, y, problem)
        return {"flow": flow, "mean": mean}

    @torch.no_grad()
    def draw(self, count: int, device: torch.device) -> None:
        """Puts further images into the buffer. Raises InputError: one is not finite."""
        drawn = int(self.buffers["drawn"])
        number = torch.arange(drawn, drawn + count)
        streams = PerImageGenerator(self.seed, number.tolist(), StreamId.E_STEP, device=device)
        if self.denoising:
            y = self.y[number % len(self.y)].to(device)
            x = self.teacher.restore(y, self.problem.sigma, streams, STEPS)
        else:
            x = self.teacher.draw(streams, NEW)
        held = x.to(self.buffers["images"])
        require_finite_draws(held, self.teacher, None, self.problem)
        self.buffers["images"][number] = held
        self.buffers["drawn"] += count

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Draws the first images when the prior is finished, then further ones."""
        if progress < PRIOR:
            return
        observed = trainer.settings.batch * (step - int(PRIOR * trainer.steps))
        rows = len(self.buffers["images"])
        chunk = min(256, len(self.y), rows, together(self.teacher))
        wanted = min(rows, min(FIRST, len(self.y)) + int(REFRESH * observed))
        while int(self.buffers["drawn"]) + chunk <= wanted:
            self.draw(chunk, trainer.device)
