r"""The optimizer of every run: Muon for matrices and kernels, AdamW for all other parameters.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon). For a matrix :math:`W` of shape
:math:`m \times n` with gradient :math:`G` and learning rate :math:`\eta`,

.. math::

    M &\leftarrow \mu M + (1 - \mu) G \\
    W &\leftarrow W - 0.2\, \eta \sqrt{\max(m, n)}\;
        \operatorname{orth}\bigl((1 - \mu) G + \mu M\bigr)

where :math:`\operatorname{orth}(U S V^\top) \approx U V^\top`. The step has the same length in all
directions, including those that few images inform. The factor :math:`0.2 \sqrt{\max(m, n)}` (Liu
et al., 2025, arXiv 2502.16982, section 2.2) makes its entries as large as those of an AdamW step,
so one learning rate serves both. A convolution kernel of shape (out, in, k, k) counts as a matrix
of shape (out, in k k). In runs of a few minutes Muon gains more than twice as many images would.

This is our own code because `torch.optim.Muon` refuses kernels, which have four dimensions, and
works on one matrix at a time. On small networks that doubles the time of a step; here all matrices
of one shape are orthogonalized together.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from .checkpoint import StateMismatch, check_like

__all__ = ["Muon", "orthogonal"]

MIN_SIDE = 8  # below it a matrix has no directions to balance, and AdamW takes it
MOMENTUM = 0.9
BETAS = 0.9, 0.99
EPS = 1e-8
QUINTIC = 3.4445, -4.7750, 2.0315  # the polynomial of Jordan et al.
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon for matrices and kernels, and AdamW without weight decay for all other parameters.

    A parameter is a matrix if it has at least two dimensions, and as a matrix at least 8 rows and
    columns. Everything else (biases, scales, thin matrices) follows AdamW.

    Args:
        params: Parameters, or dicts of parameter groups, as for every optimizer of torch.
        lr: Learning rate of groups that give none.

    >>> weight = nn.Parameter(torch.ones(8, 8))
    >>> optimizer = Muon([weight], lr=0.1)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> bool(weight.detach().mean() < 1)
    True
    """

    def __init__(self, params: Any, lr: float = 5e-3) -> None:
        # With "fused" torch loads the count of steps onto the device of the parameter.
        super().__init__(params, {"lr": lr, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step along the present gradients; parameters without one stay.

        Args:
            closure: A function that evaluates the loss again, as for every optimizer of torch.

        Returns:
            The value of the closure, if there is one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            self._muon([p for p in trained if _is_matrix(p)], group["lr"])
            self._adamw([p for p in trained if not _is_matrix(p)], group["lr"])
        return loss

    def _muon(self, matrices: list[nn.Parameter], rate: float) -> None:
        """Take one step of Muon for matrices and kernels."""
        shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in matrices:
            shapes.setdefault((len(p), p[0].numel()), []).append(p)
        for shape, alike in shapes.items():
            gradients = [cast(Tensor, p.grad) for p in alike]
            momenta = [self._state_of(p)["momentum_buffer"] for p in alike]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            move = orthogonal(torch.stack([a.reshape(shape) for a in ahead]))
            parts = [part.reshape(p.shape) for p, part in zip(alike, move, strict=True)]
            torch._foreach_add_(list[Tensor](alike), parts, alpha=-rate * 0.2 * max(shape) ** 0.5)

    def _adamw(self, parameters: list[nn.Parameter], rate: float) -> None:
        """Take one step of AdamW without weight decay."""
        if not parameters:
            return
        states = [self._state_of(p) for p in parameters]
        adamw(
            list[Tensor](parameters),
            [cast(Tensor, p.grad) for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def _state_of(self, p: nn.Parameter) -> dict[str, Tensor]:
        """Return the moments of a parameter, which are zero before its first step."""
        state = cast(dict[str, Tensor], self.state[p])
        if not state:
            state |= _zero_state(p)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        The moments are taken over. The options of the groups stay this optimizer's own, because
        the trainer sets the learning rates at each step.

        Args:
            state_dict: What `state_dict` of an optimizer of the same parameters returned.

        Raises:
            StateMismatch: The state is that of other parameters; then nothing changes.
        """
        own = self.state_dict()["param_groups"]
        self._check(state_dict, own)
        super().load_state_dict({"state": state_dict["state"], "param_groups": own})

    def _check(self, found: Any, own: list[dict[str, Any]]) -> None:
        """Raise StateMismatch unless a state fits the parameters."""
        if not isinstance(found, dict) or set(found) != {"state", "param_groups"}:
            raise StateMismatch("the optimizer has other entries")
        state, groups = found["state"], found["param_groups"]
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            raise StateMismatch("the optimizer has other groups")
        if [group.get("params") for group in groups] != [group["params"] for group in own]:
            raise StateMismatch("the optimizer has other groups")
        if not isinstance(state, dict):
            raise StateMismatch("the moments are no table")
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, moments in state.items():
            if type(number) is not int or not 0 <= number < len(parameters):
                raise StateMismatch("the moments have other numbers")
            check_like(moments, _zero_state(parameters[number]), f"moments {number}")
            if "step" in moments and not 1 <= float(moments["step"]) < math.inf:
                raise StateMismatch("the moments have no count of steps")


def _is_matrix(p: Tensor) -> bool:
    """Whether Muon, and not AdamW, trains a parameter."""
    return p.ndim >= 2 and min(len(p), p[0].numel()) >= MIN_SIDE


def _zero_state(p: nn.Parameter) -> dict[str, Tensor]:
    """Return the moments of a parameter before its first step."""
    if _is_matrix(p):
        return {"momentum_buffer": torch.zeros_like(p, requires_grad=False)}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(p, requires_grad=False),
    }


def orthogonal(matrices: Tensor) -> Tensor:
    r"""Replace the singular values of matrices by values near 1 (0.7 to 1.2).

    The quintic Newton-Schulz iteration (Jordan et al., 2024) is

    .. math:: X \leftarrow Q X, \qquad Q = a I + b S + c S^2, \qquad S = X X^\top .

    All :math:`Q` are polynomials of the first :math:`S` and commute with it. So
    :math:`S \leftarrow Q S Q`, and :math:`X` itself is multiplied only once, by the product of all
    :math:`Q`. For matrices with many columns, as kernels are, this takes a third of the work.

    Args:
        matrices: Matrices of shape (K, m, n).

    Returns:
        Matrices of the same shape.

    >>> matrices = torch.diag(torch.tensor([4.0, 1.0, 0.25]))[None]
    >>> values = torch.linalg.svdvals(orthogonal(matrices))
    >>> bool((values > 0.65).all() and (values < 1.25).all())
    True
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
