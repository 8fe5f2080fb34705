"""q(x | y) as a distribution of torch, and the flow in double precision."""

import pytest
import torch
from torch.distributions import Distribution, Normal

from tests.flows.test_posterior import perturbed
from unmurk.errors import InputError
from unmurk.flows.posterior import Config, Posterior
from unmurk.problem import Problem

SHAPE = (1, 8, 8)


def measured(n=3, dtype=torch.float32):
    y = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    return y, Problem("inpaint:random,keep=0.5", 0.2).bind(range(n), SHAPE)


def test_shapes_are_those_of_a_distribution():
    y, problem = measured()
    q = perturbed()(y, problem)
    assert isinstance(q, Distribution) and q.has_rsample
    assert q.batch_shape == (3,) and q.event_shape == SHAPE
    for shape in ((), (2,), (2, 4), (0,)):
        x = q.sample(shape)
        assert x.shape == (*shape, 3, *SHAPE) and not x.requires_grad
        assert q.log_prob(x).shape == (*shape, 3)
    assert q.mean.shape == q.stddev.shape == q.variance.shape == (3, *SHAPE)
    assert q.support.check(q.sample()).shape == (3,)


def test_density_mean_and_deviation_are_the_posteriors():
    posterior, (y, problem) = perturbed(), measured()
    x = torch.rand(2, 3, *SHAPE)
    with torch.no_grad():
        q = posterior(y, problem)
        each = torch.stack([posterior.log_prob(one, y, problem) for one in x])
        assert torch.equal(q.log_prob(x), each)
        assert torch.equal(
            q.log_prob(x[0, :1]), posterior.log_prob(x[0, :1].expand(3, -1, -1, -1), y, problem)
        )
        assert torch.equal(q.mean, posterior.mean(y, problem))
        assert torch.equal(q.stddev, posterior.mean_std(y, problem, 16, seed=0)[1])
        assert torch.equal(q.variance, q.stddev.square())


def test_samples_have_the_moments_of_a_known_flow():
    """Untrained, q = N(A_dagger y, spread^2)."""
    torch.manual_seed(0)
    posterior = Posterior(Config(*SHAPE, mean=8, context=8, couplings=2, hidden=8), spread=0.1)
    y, problem = torch.rand(2, *SHAPE), Problem("identity", 0.3)
    q = posterior(y, problem)
    x = q.sample((500,))
    assert (x.mean(0) - y).abs().max() < 0.03
    assert abs(x.std() / (q.mean.var() + 0.01).sqrt() - 1) < 0.1
    exact = Normal(y, 0.1).log_prob(x).flatten(2).sum(2)
    torch.testing.assert_close(q.log_prob(x), exact, atol=2e-2, rtol=1e-4)


def test_draws_come_from_the_global_stream():
    y, problem = measured()
    q = perturbed()(y, problem)
    torch.manual_seed(3)
    first, second = q.sample((2,)), q.sample((2,))
    torch.manual_seed(3)
    assert torch.equal(q.sample((2,)), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(q.rsample((2,)).detach(), first)


def test_rsample_and_log_prob_have_gradients():
    posterior, (y, problem) = perturbed(), measured()
    q = posterior(y.requires_grad_(), problem)
    q.rsample((2,)).square().sum().backward()
    assert y.grad is not None and y.grad.abs().sum() > 0
    posterior.zero_grad()
    q = posterior(y, problem)
    (-q.log_prob(torch.rand(3, *SHAPE)).mean()).backward()
    for name, p in posterior.named_parameters():
        assert p.grad is not None, name


def test_images_of_another_shape_are_named():
    y, problem = measured()
    q = perturbed()(y, problem)
    for shape in ((3, 1, 8, 4), (2, *SHAPE), (4,)):
        with pytest.raises(InputError, match=r"expected images of shape \(..., 3, 1, 8, 8\), got"):
            q.log_prob(torch.rand(shape))


# -- double precision ----------------------------------------------------------------------------


def test_float64_in_float64_out():
    """Same draws as in float32 up to rounding, and an inverse to twelve digits."""
    single, double = perturbed(), perturbed().double()
    y, problem = measured(dtype=torch.float64)
    with torch.no_grad():
        x = double.sample(y, problem, 2, seed=5)
        torch.testing.assert_close(
            x, single.sample(y.float(), problem, 2, seed=5).double(), atol=1e-5, rtol=1e-5
        )
        mean, std = double.mean_std(y, problem, 4)
        context = double.context(y, problem)
        z = torch.randn(3, *SHAPE, dtype=torch.float64)
        image, forward = double.transform(z, context)
        back, inverse = double.invert(image, context)
        q = double(y, problem)
    kinds = [x, mean, std, image, q.sample((2,)), q.mean, q.stddev, q.log_prob(x)]
    assert {value.dtype for value in kinds} == {torch.float64}
    torch.testing.assert_close(back, z, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(forward, -inverse, atol=1e-10, rtol=1e-10)
