"""The ceiling: prior and posterior learnt from clean images, as if there were any.

The prior follows denoising score matching on the images; the posterior's flow is fitted by maximum
likelihood to pairs of an image and a fresh corruption of it (forward KL). Every comparison shows
it as the best that the same networks and budget can reach.
"""

import copy

import torch
from torch import Tensor, nn

from ..posterior import Posterior
from ..prior import Prior
from ..problem import Problem
from ..seeds import generator
from .loop import Group, Trainer
from .objectives import denoising, forward_kl, levels

__all__ = ["Clean"]

INIT = 0xFFFF0003  # path below the seed


class Clean:
    """The method on clean images.

    Args:
        images: Clean images (N, C, H, W).
        problem: The corruption that the posterior is to undo.
        shape: Shape (C, H, W) of the images.
        network: Preset of the networks.
        seed: Seed of the initial weights.
    """

    def __init__(
        self,
        images: Tensor,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        seed: int = 0,
    ) -> None:
        self.problem, self.shape = problem, shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, INIT).initial_seed() % 2**31)
            self.posterior = Posterior.create(network, shape)
            self.prior = Prior.create(network, shape)
        self.modules: dict[str, nn.Module] = {"posterior": self.posterior, "prior": self.prior}
        self.averages = copy.deepcopy(self.modules)
        self.buffers: dict[str, Tensor] = {}
        self.groups = [
            Group(list(self.posterior.mean_net.parameters())),
            Group(self.posterior.flow_parameters()),
            Group(list(self.prior.parameters())),
        ]

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Nothing happens between steps."""

    def losses(
        self, y: Tensor, rows: Tensor, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The losses of a step; the measurements given are the images themselves."""
        problem = self.problem.at(rows.tolist(), self.shape)
        flow, mean = forward_kl(self.posterior, y, problem, generator)
        prior = denoising(self.prior, y, levels(len(y), generator), generator)
        return {"prior": prior, "flow": flow, "mean": mean}
