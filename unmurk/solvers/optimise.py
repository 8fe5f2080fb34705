"""Steps of four optimisers, every image of a batch for itself.

With the gradient g at u, the step length lr and moments m, v that start at zero,

    sgd      m <- 0.9 m + g                                   u <- u - lr m
    adam     m <- 0.9 m + 0.1 g,  v <- 0.99 v + 0.01 g^2      u <- u - lr m' / (sqrt(v') + 1e-8)
    adamw    the same, after u <- (1 - lr decay) u

where m' = m / (1 - 0.9^k) and v' = v / (1 - 0.99^k) at step k. `lbfgs` takes several steps on one
loss, whose curvature it learns on the way: with s = u_{j+1} - u_j, w = g_{j+1} - g_j and the
newest pair's s.w / w.w for the first Hessian, the two-loop recursion of Liu and Nocedal (1989, "On
the limited memory BFGS method for large scale optimization", Algorithm 2.1). These are the
updates of torch.optim, whose L-BFGS would mix the images of a batch: its inner products run over
all there is.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.base import per_image

__all__ = ["Adam", "Gradient", "Sgd", "lbfgs"]

Gradient = Callable[[Tensor], Tensor]


class Sgd:
    """Gradient descent with momentum 0.9."""

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.momentum: Tensor | float = 0.0

    def __call__(self, u: Tensor, gradient: Gradient) -> Tensor:
        """The next u, (B, ...)."""
        self.momentum = 0.9 * self.momentum + gradient(u)
        return u - self.lr * self.momentum


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with betas (0.9, 0.99) and eps 1e-8.

    Args:
        lr: Length of a step.
        decay: Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).
    """

    def __init__(self, lr: float, decay: float = 0.0) -> None:
        self.lr, self.decay, self.step = lr, decay, 0
        self.momentum: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def __call__(self, u: Tensor, gradient: Gradient) -> Tensor:
        """The next u, (B, ...)."""
        g, self.step = gradient(u), self.step + 1
        self.momentum = 0.9 * self.momentum + 0.1 * g
        self.square = 0.99 * self.square + 0.01 * g**2
        scale = (self.square / (1 - 0.99**self.step)) ** 0.5 + 1e-8
        u = u - self.lr * self.decay * u
        return u - self.lr / (1 - 0.9**self.step) * self.momentum / scale


def lbfgs(u: Tensor, gradient: Gradient, lr: float, iterations: int) -> Tensor:
    """u (B, ...) after so many steps of L-BFGS, image by image; the memory begins empty.

    Args:
        u: Where to start.
        gradient: Of one loss for each image, at images like u.
        lr: Length of a step in units of the quasi-Newton step. The first, which knows no
            curvature, is lr min(1, 1 / |g|_1) g, as in torch.optim.LBFGS without line search.
        iterations: Steps, and gradients.
    """
    memory: list[tuple[Tensor, Tensor, Tensor]] = []  # s, w and 1 / s.w, 0 for no pair
    scale = torch.ones(len(u), dtype=u.dtype, device=u.device)
    g = gradient(u)
    for iteration in range(iterations):
        step = -lr * _direction(g, memory, scale)
        if iteration == 0:
            step = step * per_image((1 / g.abs().flatten(1).sum(1)).clamp(max=1), u)
        u = u + step
        if iteration + 1 < iterations:
            before, g = g, gradient(u)
            change = g - before
            curvature = _dot(step, change)
            known = curvature > 1e-10
            inverse = torch.where(known, 1 / curvature, 0)
            memory.append((step, change, inverse))
            scale = torch.where(known, curvature / _dot(change, change), scale)
    return u


def _direction(g: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]], scale: Tensor) -> Tensor:
    """The inverse Hessian of the memory, times g."""
    q, weights = g, []
    for s, w, inverse in reversed(memory):
        weights.append(inverse * _dot(s, q))
        q = q - per_image(weights[-1], q) * w
    r = per_image(scale, q) * q
    for (s, w, inverse), weight in zip(memory, reversed(weights), strict=True):
        r = r + per_image(weight - inverse * _dot(w, r), r) * s
    return r


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
