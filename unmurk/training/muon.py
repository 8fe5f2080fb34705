"""The optimiser of every run: Muon for matrices and kernels, AdamW for all else.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon). For a matrix W with gradient G,

    M <- mu M + (1 - mu) G
    W <- W - rate 0.2 sqrt(max(rows, columns)) orth((1 - mu) G + mu M)

where orth(U S V^T) is near U V^T: a step of the same length in all directions, also in those that
few images speak of. With the factor 0.2 sqrt(..) (Liu et al., 2025, arXiv 2502.16982, section 2.2)
its entries are as large as those of an AdamW step, and one rate serves both. A convolution's
kernel (out, in, k, k) counts as a matrix (out, in k k). In runs of minutes this is worth more than
twice the images (docs/experiments.md).

`torch.optim.Muon` is the same for one matrix at a time; on small networks that doubles the time
of a step, so here all matrices of a shape are worked on together.
"""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from .states import Misfit, compare

__all__ = ["Optimizer", "orthogonal"]

SMALLEST = 8  # rows and columns below which a matrix has no directions to balance: AdamW
MOMENTUM = 0.9
BETAS = 0.9, 0.99
QUINTIC = 3.4445, -4.7750, 2.0315  # the polynomial of Jordan et al.
ITERATIONS = 5


class Optimizer:
    """Muon and AdamW over groups of parameters, each group with its own rate.

    Args:
        groups: The parameters of every group.
    """

    def __init__(self, groups: Sequence[list[nn.Parameter]]) -> None:
        self.groups = groups
        self.momenta = {
            p: torch.zeros_like(p, requires_grad=False)
            for group in groups
            for p in group
            if p.ndim >= 2 and min(len(p), p[0].numel()) >= SMALLEST
        }
        thin = [[p for p in group if p not in self.momenta] for group in groups]
        self.adamw = torch.optim.AdamW(
            [{"params": group} for group in thin], betas=BETAS, weight_decay=0.0, fused=True
        )

    def step(self, rates: Sequence[float]) -> None:
        """One step along the gradients at hand, with a learning rate for each group."""
        for group, own, rate in zip(self.adamw.param_groups, self.groups, rates, strict=True):
            group["lr"] = rate
            self.muon([p for p in own if p in self.momenta and p.grad is not None], rate)
        self.adamw.step()

    @torch.no_grad()
    def muon(self, matrices: list[nn.Parameter], rate: float) -> None:
        """One step of Muon for matrices and kernels with a gradient."""
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in matrices:
            shapes.setdefault((len(p), p[0].numel()), []).append(p)
        for shape, alike in shapes.items():
            gradients = [cast(Tensor, p.grad) for p in alike]
            momenta = [self.momenta[p] for p in alike]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            move = orthogonal(torch.stack([a.reshape(shape) for a in ahead]))
            parts = [part.reshape(p.shape) for p, part in zip(alike, move, strict=True)]
            torch._foreach_add_(list[Tensor](alike), parts, alpha=-rate * 0.2 * max(shape) ** 0.5)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for group in self.groups:
            for parameter in group:
                parameter.grad = None

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drops what is remembered of the past gradients of these parameters."""
        for parameter in parameters:
            self.adamw.state.pop(parameter, None)
            if parameter in self.momenta:
                self.momenta[parameter].zero_()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up again."""
        return {"muon": list(self.momenta.values()), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state. Raises Misfit, and changes nothing, if it does not fit."""
        if not isinstance(state, dict) or set(state) != {"muon", "adamw"}:
            raise Misfit("the optimiser has other entries")
        muon, adamw = state["muon"], state["adamw"]
        if not isinstance(muon, list) or len(muon) != len(self.momenta):
            raise Misfit("the optimiser has other momenta")
        for momentum, value in zip(self.momenta.values(), muon, strict=True):
            compare(value, momentum, "a momentum")
        own = self.adamw.state_dict()
        self._check_adamw(adamw, own["param_groups"])
        for momentum, value in zip(self.momenta.values(), muon, strict=True):
            momentum.copy_(value)
        # rates are set at each step, all else is fixed: the groups are this optimiser's own
        self.adamw.load_state_dict({"state": adamw["state"], "param_groups": own["param_groups"]})

    def _check_adamw(self, found: Any, groups: list[dict[str, Any]]) -> None:
        if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
            raise Misfit("the moments have other entries")
        given = found.get("param_groups")
        if not isinstance(given, list) or not all(isinstance(group, dict) for group in given):
            raise Misfit("the moments have other groups")
        if [group.get("params") for group in given] != [group["params"] for group in groups]:
            raise Misfit("the moments have other groups")
        thin = [p for group in self.adamw.param_groups for p in group["params"]]
        count = torch.zeros(())
        for number, moments in found["state"].items():
            if type(number) is not int or not 0 <= number < len(thin):
                raise Misfit("the moments have other numbers")
            p = thin[number].detach()
            compare(moments, {"step": count, "exp_avg": p, "exp_avg_sq": p}, "moments")
            if not 1 <= float(moments["step"]) < math.inf:
                raise Misfit("the moments have no count of steps")


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (K, rows, columns) with their singular values brought near 1 (0.7 to 1.2).

    The quintic Newton-Schulz iteration X <- Q X with Q = a + b S + c S^2 and S = X X^T (Jordan et
    al., 2024). All Q are polynomials of the first S and commute with it, so that S <- Q S Q, and
    the product of the Q is all that X itself is needed for: with many columns, as kernels have,
    a third of the work.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    square, steps = x @ x.mT, list[Tensor]()
    while len(steps) < ITERATIONS:
        square = steps[-1] @ square @ steps[-1] if steps else square
        step = torch.baddbmm(square, square, square, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        steps.append(step)
    x = reduce(torch.matmul, steps) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT
