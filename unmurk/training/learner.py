"""What ways to learn have in common: a posterior and a prior, their averages, when each trains."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from ..diffusion.prior import Prior
from ..flows.posterior import Posterior
from ..problem import Problem
from ..rng import StreamId, generator
from .binding import Binding
from .trainer import LRPhase, ParamGroup, Trainer

__all__ = ["Pair"]


class Pair:
    """A prior and a posterior to be learnt; members define `losses`.

    Args:
        y: Measurements (N, ...).
        problem: How they were made.
        shape: Shape (C, H, W) of the images behind them.
        network: Preset of the networks.
        seed: Seed of the initial weights.

    Attributes:
        spread: Standard deviation of the posterior at the start, in units of intensity.
        denoising: Whether A is the identity.
    """

    spread = 0.05

    def __init__(
        self,
        y: Tensor,
        problem: Problem,
        shape: tuple[int, int, int],
        network: str = "tiny",
        seed: int = 0,
    ) -> None:
        self.y, self.problem, self.shape, self.seed = y, problem, shape, seed
        self.binding = Binding(problem, shape)
        self.denoising = problem.operator.spec == "identity"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, StreamId.INIT).initial_seed() % 2**31)
            self.posterior = Posterior.create(network, shape, self.spread)
            self.prior = Prior.create(network, shape)
            self.modules: dict[str, nn.Module] = {"posterior": self.posterior, "prior": self.prior}
            self.modules |= self.others(network)
        self.ema = copy.deepcopy(self.modules)
        self.teacher = cast(Prior, self.ema["prior"])
        self.buffers = self.stores()
        mean, flow = list(self.posterior.mean_net.parameters()), self.posterior.flow_parameters()
        spans = self.spans()
        self.groups = [ParamGroup(mean, spans["mean"]), ParamGroup(flow, spans["flow"])]
        self.groups += [
            ParamGroup(list(module.parameters()), spans[key])
            for key, module in self.modules.items()
            if key != "posterior"
        ]

    def others(self, network: str) -> dict[str, nn.Module]:
        """Modules beside posterior and prior."""
        return {}

    def stores(self) -> dict[str, Tensor]:
        """Further state that a continued run needs."""
        return {}

    def spans(self) -> dict[str, tuple[LRPhase, ...]]:
        """When each part is trained: the posterior's mean and its flow, the prior, the others."""
        return {"mean": (LRPhase(),), "flow": (LRPhase(),), "prior": (LRPhase(),)}

    def bind(self, rows: Tensor, like: Tensor) -> Problem:
        """The problem of the measurements with these numbers, where the tensor is."""
        return self.binding.bind(rows, like.device)

    def prepare(self, rows: Tensor, device: torch.device) -> None:
        """Bind the problem of a coming step; called by the thread that reads its measurements."""
        self.binding.prepare(rows, device)

    def before(self, trainer: Trainer, step: int, progress: float) -> None:
        """Nothing happens between steps."""
