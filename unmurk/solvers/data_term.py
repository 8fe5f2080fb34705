r"""The data term of an inverse problem: its gradient, its proximal map, and optimizers.

For a measurement :math:`y = A(x) + \sigma_y n` the data term is the negative log-likelihood

.. math:: f(x) = \frac{\lVert y - A(x)\rVert^2}{2\sigma_y^2}.

Solvers use it through two maps, with :math:`J` the Jacobian of :math:`A` (:math:`A` itself where
it is linear):

.. math::
    -\sigma_y^2 \nabla f(x) &= J(x)^\top (y - A(x)) \\
    \operatorname{prox}(z)  &= \arg\min_x\; f(x) + \frac{\lVert x - z\rVert^2}{2\rho^2}

Four optimizers minimize it together with a prior's term. With the gradient :math:`g` at
:math:`u`, the step length :math:`\eta` and moments :math:`m, v` that start at zero, one step is

.. math::
    \text{SGD:}\quad & m \leftarrow 0.9\,m + g,\quad u \leftarrow u - \eta\,m \\
    \text{Adam:}\quad & m \leftarrow 0.9\,m + 0.1\,g,\quad v \leftarrow 0.99\,v + 0.01\,g^2,\quad
        u \leftarrow u - \eta\,\hat m / (\sqrt{\hat v} + 10^{-8}) \\
    \text{AdamW:}\quad & \text{Adam after } u \leftarrow (1 - \eta\,\text{decay})\,u

where :math:`\hat m = m / (1 - 0.9^k)` and :math:`\hat v = v / (1 - 0.99^k)` at step :math:`k`.
`lbfgs` takes several steps on one loss and learns its curvature on the way (Liu and Nocedal 1989,
Math. Program. 45, "On the limited memory BFGS method for large scale optimization"). With
:math:`s = u_{j+1} - u_j` and :math:`w = g_{j+1} - g_j` of all steps so far, it multiplies the
gradient by the inverse Hessian in the two-loop recursion of Nocedal (1980, Math. Comp. 35), from
the newest pair's :math:`s^\top w / w^\top w` times the identity.

These are the updates of `torch.optim`. They are written here because every image of a batch has
to be optimized for itself: the inner products of torch's L-BFGS run over the whole batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..operators.linalg import batch_dot, per_image, squared_norm
from ..problem import Problem

__all__ = ["TINY", "Adam", "Gradient", "Sgd", "lbfgs", "likelihood_grad", "prox"]

HALVINGS = 6  # of a step that would go uphill; a step that still does is not taken
TINY = 1e-30

Gradient = Callable[[Tensor], Tensor]


# -- gradient and proximal map --------------------------------------------------------------------


def likelihood_grad(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    r"""Compute :math:`J(x)^\top (y - A(x))`, minus the gradient of :math:`\lVert
    y-A(x)\rVert^2/2`.

    Args:
        problem: Operator and noise, bound to the images.
        x: Images (B, C, H, W).
        y: Measurements (B, ...).

    Returns:
        Images (B, C, H, W).

    >>> x, y = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, 1.0]]]])
    >>> likelihood_grad(Problem("identity", 0.1), x, y)
    tensor([[[[0.5000, 1.0000]]]])
    """
    if problem.operator.linear:
        return problem.operator.A_adjoint(problem.residual(x, y))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        half = problem.residual(x, y).square().sum() / 2
        return -torch.autograd.grad(half, x)[0]


def prox(
    problem: Problem, z: Tensor, y: Tensor, rho: float, sigma: float, steps: int = 10
) -> Tensor:
    r"""Compute the proximal map of the data term at z.

    .. math::
        \arg\min_x \frac{\lVert y - A(x)\rVert^2}{2\sigma^2}
                   + \frac{\lVert x - z\rVert^2}{2\rho^2}

    It is exact for a linear A (with sigma = 0 its limit, the projection) and for operators that
    have a proximal map in closed form. For any other operator it takes `steps` steps of nonlinear
    conjugate gradients from z. Each step has the Gauss-Newton length, which is halved for an image
    as long as its energy would increase.

    Args:
        problem: Operator and noise, bound to the images.
        z: Images (B, C, H, W).
        y: Measurements (B, ...).
        rho: Standard deviation around z, in units of [0, 1] images.
        sigma: Standard deviation of the noise of y.
        steps: Steps of conjugate gradients for an A without a closed form.

    Returns:
        Images (B, C, H, W).

    Raises:
        InputError: sigma is 0 and A is not linear.

    >>> z, y = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> prox(Problem("identity", 0.1), z, y, rho=0.3, sigma=0.1)  # rho^2 / (rho^2 + sigma^2)
    tensor([[[[0.9000, 0.9000]]]])
    """
    if sigma == 0:
        if problem.operator.linear:
            return problem.prox(z, y, rho)
        raise InputError(
            f"operator '{problem.operator.spec}' is not linear, and without noise it has no"
            " proximal map: give noise_floor > 0"
        )
    if problem.operator.proximal:
        return problem.operator.prox_l2(z, y, (rho / sigma) ** 2)
    return _descend(problem, z, y, rho, sigma, steps)


def _descend(
    problem: Problem, z: Tensor, y: Tensor, rho: float, sigma: float, steps: int
) -> Tensor:
    r"""Minimize the objective of `prox` by conjugate gradients, each image for itself.

    The directions :math:`d` are those of E. Polak and G. Ribiere (1969), with a restart where
    their factor is negative. The length along :math:`d` is that of Gauss and Newton,

    .. math::
        \frac{\langle -\nabla, d\rangle}
             {\lVert J d\rVert^2/\sigma^2 + \lVert d\rVert^2/\rho^2},

    with which a linear A gives the conjugate gradients of Hestenes and Stiefel.
    """

    def energy(x: Tensor) -> Tensor:
        misfit = squared_norm(problem.residual(x, y)) / sigma**2
        return misfit + squared_norm(x - z) / rho**2

    x, value = z, energy(z)
    active = torch.ones_like(value, dtype=torch.bool)
    direction, before = torch.zeros_like(z), torch.zeros_like(z)
    for _ in range(steps):
        gradient, jvp = _linearized(problem, x, y)
        down = gradient / sigma**2 - (x - z) / rho**2
        square = batch_dot(before, before)  # 0 at the first step
        factor = batch_dot(down, down - before) / torch.where(square > 0, square, torch.inf)
        direction = down + per_image(factor.clamp_min(0), x) * direction
        # restart from the steepest descent where the direction no longer leads downhill
        direction = torch.where(per_image(batch_dot(down, direction), x) > 0, direction, down)
        curvature = squared_norm(jvp(direction)) / sigma**2
        curvature = curvature + batch_dot(direction, direction) / rho**2
        length = batch_dot(down, direction) / curvature.clamp_min(TINY)
        for _ in range(HALVINGS):
            trial = x + per_image(length, x) * direction
            reached = energy(trial)
            uphill = active & ~(reached <= value)
            if not bool(uphill.any()):
                break
            length = torch.where(uphill, length / 2, length)
        # an image that finds no step downhill has converged and must not wait for the others
        active = active & (reached <= value)
        if not bool(active.any()):
            break
        x = torch.where(per_image(active, x) > 0, trial, x)
        value, before = torch.where(active, reached, value), down
    return x


def _linearized(
    problem: Problem, x: Tensor, y: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    r"""Compute `likelihood_grad` at x, and the map :math:`d \mapsto J(x)\,d` up to its sign.

    :math:`J^\top w` is linear in :math:`w`, so its gradient in :math:`w` along :math:`d` is
    :math:`J d`. This is the derivative that autograd defines: for operators that round, finite
    differences would give another one.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        residual = problem.residual(x, y)
        w = residual.detach().requires_grad_()
        down = -torch.autograd.grad(residual, x, w, create_graph=True)[0]

    def jvp(d: Tensor) -> Tensor:
        return torch.autograd.grad(down, w, d)[0]

    return down.detach(), jvp


# -- optimizers -----------------------------------------------------------------------------------


class Sgd:
    """Gradient descent with momentum 0.9.

    Args:
        lr: Step length.

    >>> descend = Sgd(lr=0.5)
    >>> descend(torch.tensor([1.0]), lambda u: u)  # 1 - 0.5
    tensor([0.5000])
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr
        self.momentum: Tensor | float = 0.0

    def __call__(self, u: Tensor, gradient: Gradient) -> Tensor:
        """Return the next u, (B, ...)."""
        self.momentum = 0.9 * self.momentum + gradient(u)
        return u - self.lr * self.momentum


class Adam:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with betas (0.9, 0.99) and eps 1e-8.

    Args:
        lr: Step length.
        decay: Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).

    >>> Adam(lr=0.5)(torch.tensor([4.0]), lambda u: u)  # the first step has length lr
    tensor([3.5000])
    """

    def __init__(self, lr: float, decay: float = 0.0) -> None:
        self.lr, self.decay, self.step = lr, decay, 0
        self.momentum: Tensor | float = 0.0
        self.square: Tensor | float = 0.0

    def __call__(self, u: Tensor, gradient: Gradient) -> Tensor:
        """Return the next u, (B, ...)."""
        g, self.step = gradient(u), self.step + 1
        self.momentum = 0.9 * self.momentum + 0.1 * g
        self.square = 0.99 * self.square + 0.01 * g**2
        scale = (self.square / (1 - 0.99**self.step)) ** 0.5 + 1e-8
        u = u - self.lr * self.decay * u
        return u - self.lr / (1 - 0.9**self.step) * self.momentum / scale


def lbfgs(u: Tensor, gradient: Gradient, lr: float, iterations: int) -> Tensor:
    r"""Take steps of L-BFGS from u, image by image, with an empty memory at the start.

    Args:
        u: Starting point (B, ...).
        gradient: Gradient of one loss for each image, at points shaped like u.
        lr: Step length in units of the quasi-Newton step. The first step, which knows no
            curvature, is :math:`\min(1, 1 / \lVert g \rVert_1)\, g` times lr, as in
            torch.optim.LBFGS without line search.
        iterations: Number of steps, each of one gradient.

    Returns:
        The last point (B, ...).

    >>> scale = torch.tensor([[1.0, 9.0]])
    >>> lbfgs(torch.ones(1, 2), lambda u: scale * u, lr=1.0, iterations=20).abs().max() < 1e-4
    tensor(True)
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
            curvature = batch_dot(step, change)
            known = curvature > 1e-10
            inverse = torch.where(known, 1 / curvature, 0)
            memory.append((step, change, inverse))
            scale = torch.where(known, curvature / batch_dot(change, change), scale)
    return u


def _direction(g: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]], scale: Tensor) -> Tensor:
    """Multiply g by the inverse Hessian of the memory."""
    q, weights = g, []
    for s, w, inverse in reversed(memory):
        weights.append(inverse * batch_dot(s, q))
        q = q - per_image(weights[-1], q) * w
    r = per_image(scale, q) * q
    for (s, w, inverse), weight in zip(memory, reversed(weights), strict=True):
        r = r + per_image(weight - inverse * batch_dot(w, r), r) * s
    return r
