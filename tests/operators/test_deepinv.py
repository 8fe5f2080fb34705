"""Operators of deepinv in unmurk, and operators of unmurk in deepinv, if deepinv is installed."""

import pytest
import torch

from unmurk.evaluation.exact import GaussianPrior
from unmurk.evaluation.metrics import psnr
from unmurk.operators import as_operator, parse
from unmurk.problem import Problem
from unmurk.solvers import solve

deepinv = pytest.importorskip("deepinv")

SHAPE = (1, 12, 12)
MASK = (torch.rand(*SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5).float()


def prior():
    return GaussianPrior.exponential(SHAPE)


def physics(kind):
    """Return a physics of deepinv, and the same operator of unmurk where there is one."""
    d = deepinv.physics
    if kind == "mask":
        return d.Inpainting(SHAPE, mask=MASK), None
    if kind == "blur":
        ours = parse("blur:gaussian,sigma=1.5,pad=circular")
        return d.BlurFFT(SHAPE, filter=ours.kernel), ours
    return d.Denoising(), parse("identity")


@pytest.mark.parametrize("kind", ["mask", "blur", "identity"])
def test_a_physics_of_deepinv_is_an_operator_of_ours(kind):
    theirs, ours = physics(kind)
    op = as_operator(theirs).bind([0, 1], SHAPE)
    assert op.linear
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = torch.randn(op.A(x).shape, generator=torch.Generator().manual_seed(1))
    assert float((op.A(x) * y).sum()) == pytest.approx(
        float((x * op.A_adjoint(y)).sum()), rel=1e-4
    )
    z = op.prox_l2(x, y, 5.0)  # stationary: z - x + gamma A^T (A z - y) = 0
    slope = z - x + 5.0 * op.A_adjoint(op.A(z) - y)
    assert slope.abs().max() < 1e-4
    if ours is not None:
        torch.testing.assert_close(op.A(x), ours.A(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["red-diff", "ddnm", "diffpir", "mmps"])
@pytest.mark.parametrize("kind", ["mask", "blur"])
def test_our_solvers_take_a_physics_of_deepinv(kind, method):
    theirs, _ = physics(kind)
    problem, truth = Problem(theirs, noise=0.02), prior().sample(4, seed=1)
    y = problem.simulate(truth, seed=2)
    restored = solve(y, problem, prior(), method=method, steps=30, seed=0).mean
    best = prior().posterior(y, problem).mean
    assert psnr(restored, truth).mean() > psnr(best, truth).mean() - 4  # a draw: 3
    if kind == "mask" and method == "red-diff":
        ours = Problem(lambda x: MASK * x, noise=0.02)
        again = solve(y, ours, prior(), method=method, steps=30, seed=0).mean
        torch.testing.assert_close(restored, again, atol=1e-3, rtol=0)


@pytest.mark.parametrize("form", ["inpaint:random,keep=0.5", "blur:gaussian,sigma=1"])
def test_deepinv_minimises_with_an_operator_and_a_prior_of_ours(form):
    """The proximal gradient method of deepinv finds the mode of our Gaussian posterior."""
    problem, truth = Problem(form, noise=0.1), prior().sample(1, seed=1)
    y = problem.simulate(truth, seed=2)
    operator = problem.bind([0], SHAPE).operator
    fidelity = deepinv.optim.L2(sigma=problem.sigma)
    torch.testing.assert_close(
        fidelity.grad(truth, y, operator),
        operator.A_adjoint(operator.A(truth) - y) / problem.sigma**2,
    )
    step, exact = problem.sigma**2 / 2, prior()

    class Log(deepinv.optim.Prior):
        """-log p, whose prox is our denoiser: D(x, s) = argmin -s^2 log p + |. - x|^2 / 2."""

        def prox(self, x, *args, gamma=1.0, **kwargs):
            return exact.denoise(x, float(gamma) ** 0.5)

    algorithm = deepinv.optim.PGD(
        data_fidelity=fidelity, prior=Log(), stepsize=step, max_iter=3000, thres_conv=1e-7
    )
    found = algorithm(y, operator)
    torch.testing.assert_close(found, prior().posterior(y, problem).mean, atol=2e-3, rtol=0)
