"""The heavy-tailed prior and its Gibbs sampler against integrals over the coefficients themselves.

The code integrates over (or draws) the variances v of the scale mixture; everything here starts
from Student's t density instead.
"""

import math

import pytest
import torch
from torch.distributions import StudentT

from unmurk.errors import InputError
from unmurk.evaluation import gibbs
from unmurk.evaluation.exact import operator_matrix
from unmurk.evaluation.gibbs import GibbsSampler, effective_size, split_rhat
from unmurk.evaluation.scale_mixture import ScaleMixture, haar
from unmurk.problem import Problem
from unmurk.rng import generator


def doubles(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixel(scale, nu=5, mean=0.0):
    """One pixel: Student's t itself."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return ScaleMixture(torch.full((1, 1, 1), mean), one, torch.tensor([scale]).double(), nu)


def along(values):
    return values.reshape(-1, 1, 1, 1)


# -- the basis ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "counts"),
    [((1, 8, 8), [48, 12, 3, 1]), ((1, 6, 10), [45, 15]), ((2, 1, 4), [4, 2, 2])],
)
def test_haar_is_orthonormal_with_a_level_for_each_wavelet(shape, counts):
    basis, levels = haar(shape)
    size = math.prod(shape)
    torch.testing.assert_close(basis.T @ basis, torch.eye(size).double(), atol=1e-12, rtol=0)
    assert [int((levels == k + 1).sum()) for k in range(len(counts))] == counts
    approximation = basis[:, levels == len(counts)]
    assert (approximation >= 0).all()  # averages of blocks
    assert basis[:, levels < len(counts)].sum(0).abs().max() < 1e-12  # details have mean 0


def test_haar_of_two_pixels_is_their_sum_and_difference():
    basis, levels = haar((1, 1, 2))
    half = 0.5**0.5
    expected = torch.tensor([[half, half], [-half, half]], dtype=torch.float64)
    torch.testing.assert_close(basis, expected)
    assert levels.tolist() == [1, 2]


# -- the denoiser ---------------------------------------------------------------------------------


def moment(z, sigma, scale, nu, power=1):
    """E[c^power | z] by the trapezoidal rule over c, fine around 0 and around z."""
    reach = 14 * sigma
    steps = torch.linspace(-1, 1, 100001, dtype=torch.float64)
    fine = scale * torch.sinh(steps * math.asinh((abs(z) + reach) / scale))
    c = torch.cat([z + reach * steps, fine]).sort().values
    c = c[(c >= z - reach) & (c <= z + reach)]
    law = StudentT(float(nu), 0.0, torch.tensor(scale, dtype=torch.float64))
    weight = law.log_prob(c) - (z - c) ** 2 / (2 * sigma**2)
    weight = (weight - weight.max()).exp()
    return float(torch.trapezoid(weight * c**power, c) / torch.trapezoid(weight, c))


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 20.0])
@pytest.mark.parametrize("scale", [0.04, 1.0])
def test_denoiser_is_the_integral_over_the_coefficient(scale, sigma):
    z = [k * sigma for k in (0.0, 0.3, -1.7, 4.0, 6.5, 8.0, 11.0, 35.0, 99.0, 101.0, 400.0)]
    z += [k * scale for k in (0.5, 2.0, 9.0)]
    expected = torch.tensor([moment(value, sigma, scale, 5) for value in z], dtype=torch.float64)
    found = pixel(scale).denoise(along(torch.tensor(z, dtype=torch.float64)), sigma).flatten()
    torch.testing.assert_close(found, expected, atol=1e-6 * sigma, rtol=0)


@pytest.mark.parametrize("nu", [3, 10])
def test_denoiser_of_other_degrees_of_freedom(nu):
    z = [0.1, 0.4, 1.0, 1.8, 3.0]
    expected = torch.tensor([moment(value, 0.3, 0.1, nu) for value in z], dtype=torch.float64)
    found = pixel(0.1, nu).denoise(along(torch.tensor(z, dtype=torch.float64)), 0.3).flatten()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_derivative_is_the_posterior_variance(sigma):
    """D'(z) = Var[c | z] / sigma^2."""
    z = torch.tensor([0.0, 0.2, 0.7, 1.5, 3.0], dtype=torch.float64).requires_grad_()
    at = z * max(sigma, 0.3)
    slope = torch.autograd.grad(pixel(0.3).denoise(along(at), sigma).sum(), at)[0]
    for value, found in zip(at.tolist(), slope.tolist(), strict=True):
        mean, square = (moment(value, sigma, 0.3, 5, power) for power in (1, 2))
        assert found == pytest.approx((square - mean**2) / sigma**2, abs=3e-5)


def test_denoiser_works_in_the_basis():
    prior = ScaleMixture.example((1, 6, 10))
    x, sigma = prior.sample(3, seed=1).double() + 0.2 * doubles(3, 1, 6, 10), 0.2
    c = (x - 0.5).flatten(1) @ prior.basis
    each = [
        [moment(float(c[row, i]), sigma, float(prior.scales[i]), 5) for i in (0, 20, 44, 45, 59)]
        for row in range(3)
    ]
    found = (prior.denoise(x, sigma) - 0.5).flatten(1) @ prior.basis
    expected = torch.tensor(each, dtype=torch.float64)
    torch.testing.assert_close(found[:, [0, 20, 44, 45, 59]], expected, atol=2e-7, rtol=0)
    levels = torch.tensor([0.1, 0.2, 0.7])
    several = prior.denoise(x, levels)
    for row in range(3):
        one = prior.denoise(x[row : row + 1], float(levels[row]))
        torch.testing.assert_close(several[row : row + 1], one)
    torch.testing.assert_close(prior.denoise(x, 0.0), x, atol=1e-12, rtol=0)
    assert prior.denoise(x.float(), 0.2).dtype == torch.float32


def test_score_is_that_of_the_density():
    prior = ScaleMixture.example((1, 4, 4))
    x = (prior.sample(4, seed=2).double() + 0.3 * doubles(4, 1, 4, 4)).requires_grad_()
    for sigma in (0.05, 0.3, 2.0):
        gradient = torch.autograd.grad(prior.log_prob(x, sigma).sum(), x)[0]
        tweedie = (prior.denoise(x, sigma) - x) / sigma**2
        torch.testing.assert_close(gradient, tweedie, atol=1e-5 / sigma, rtol=1e-6)


def test_density_without_noise_is_that_of_torch():
    prior = ScaleMixture.example((1, 2, 2))
    x = prior.sample(3, seed=1).double()
    c = (x - 0.5).flatten(1) @ prior.basis
    expected = StudentT(5.0, 0.0, prior.scales).log_prob(c).sum(1)
    torch.testing.assert_close(prior.log_prob(x), expected)
    torch.testing.assert_close(prior.log_prob(x, 1e-4), expected, atol=1e-4, rtol=0)


def test_samples_are_heavy_tailed_and_do_not_depend_on_their_number():
    prior = ScaleMixture.example((1, 4, 4), std=0.2)
    x = prior.sample(20000, seed=1)
    assert torch.equal(prior.sample(3, seed=1), x[:3])
    flat = x.double().flatten(1)
    assert float(flat.var(0).mean()) == pytest.approx(0.04, rel=0.03)
    torch.testing.assert_close(torch.cov(flat.T), prior.covariance, atol=4e-3, rtol=0)
    c = (flat - 0.5) @ prior.basis / prior.scales
    # Student's t with 5 degrees of freedom: P(|t| < 2.5706) = 0.95, P(|t| < 4.0321) = 0.99
    for edge, inside in ((2.5706, 0.95), (4.0321, 0.99)):
        assert float((c.abs() < edge).double().mean()) == pytest.approx(inside, abs=2e-3)


def test_bad_priors_are_named():
    mean, eye, ones = torch.zeros(1, 2, 2), torch.eye(4), torch.ones(4)
    for bad, message in (
        ((mean, torch.eye(3), ones), "do not fit"),
        ((mean, eye, torch.ones(3)), "do not fit"),
        ((mean, 2 * eye, ones), "not orthonormal"),
        ((mean, eye, 0 * ones), "not a positive number"),
        ((mean, eye, ones * math.nan), "not a positive number"),
        ((mean, eye, ones, 2), "from 3 to 10"),
        ((mean, eye, ones, 11), "from 3 to 10"),
        ((mean, eye, ones, 4.5), "from 3 to 10"),
    ):
        with pytest.raises(InputError, match=message):
            ScaleMixture(*bad)
    prior, y = ScaleMixture(mean, eye, ones), torch.zeros(1, 1, 2, 2)
    with pytest.raises(InputError, match="noise > 0"):
        prior.posterior(y, Problem("identity", 0.0))
    with pytest.raises(InputError, match="not linear"):
        prior.posterior(y, Problem(lambda x: x**2, 0.1))


# -- the Gibbs sampler ----------------------------------------------------------------------------


def test_posterior_of_two_pixels_is_the_integral():
    """One measurement of two pixels: a plane of coefficients, integrated on a grid."""
    prior = ScaleMixture.example((1, 1, 2), std=0.3)
    problem = Problem(lambda x: x[..., :1] * 0.9 + x[..., 1:] * 0.3, 0.2)
    y = torch.tensor([0.4, 1.7, -0.9], dtype=torch.float64).reshape(3, 1, 1, 1)
    posterior = prior.posterior(y, problem)
    axis = torch.linspace(-math.asinh(400), math.asinh(400), 1601, dtype=torch.float64)
    parts = [0.05 * axis.sinh() + 0.5] * 2
    x = torch.cartesian_prod(*parts).reshape(-1, 1, 1, 2)
    measure = (torch.cartesian_prod(axis, axis).cosh()).log().sum(1)
    weights = prior.log_prob(x) + measure
    for row in range(3):
        misfit = (y[row].flatten() - problem.A(x).flatten()).square() / (2 * 0.2**2)
        weight = (weights - misfit).softmax(0)
        flat = x.flatten(1)
        mean = weight @ flat
        covariance = (flat - mean).T @ (weight[:, None] * (flat - mean))
        bar = posterior.mean_variance[row].sqrt()
        assert ((posterior.mean[row].flatten() - mean).abs() < 5 * bar).all() and bar.max() < 0.01
        torch.testing.assert_close(posterior.covariance[row], covariance, rtol=0.15, atol=2e-3)


def test_posterior_of_denoising_is_the_denoiser():
    """A = I leaves the coefficients independent: E[c | y] and its variance are 1-D integrals."""
    prior, sigma = ScaleMixture.example((1, 4, 4)), 0.1
    problem = Problem("identity", sigma)
    y = problem.simulate(prior.sample(2, seed=4), seed=5).double()
    posterior = prior.posterior(y, problem)
    away = (posterior.mean - prior.denoise(y, sigma)).flatten(1)
    pulls = away / posterior.mean_variance.sqrt()
    assert 0.6 < float(pulls.square().mean().sqrt()) < 1.5 and pulls.abs().max() < 5
    c = (y - 0.5).flatten(1) @ prior.basis
    found = (prior.basis.T @ posterior.covariance @ prior.basis).diagonal(dim1=1, dim2=2)
    for row in range(2):
        for i in range(16):
            scale = float(prior.scales[i])
            mean, square = (moment(float(c[row, i]), sigma, scale, 5, p) for p in (1, 2))
            assert float(found[row, i]) == pytest.approx(square - mean**2, rel=0.12)


def test_conditional_draws_have_the_moments_of_dense_algebra():
    """c | v, y by the covariance form of a Gaussian posterior; v | c by the mean of an inverse
    gamma, (nu s^2 + c^2) / (nu - 1)."""
    prior, sigma, chains = ScaleMixture.example((1, 2, 2), std=0.5), 0.05, 20000
    matrix = doubles(1, 3, 4)  # rows far from orthogonal
    sampler = GibbsSampler(prior, matrix, sigma, chains, generator(1))
    v = (0.3 * doubles(4, seed=2)).exp() * prior.scales.square()
    y = doubles(1, 1, 3, seed=3)
    c, mu = sampler.coefficients(v.expand(1, chains, 4), sampler.data(y))
    H, S = matrix[0] @ prior.basis, v.diag()
    gain = S @ H.T @ torch.linalg.inv(H @ S @ H.T + sigma**2 * torch.eye(3).double())
    mean = gain @ (y[0, 0] - matrix[0] @ prior.mean.flatten())
    exact = S - gain @ H @ S
    torch.testing.assert_close(mu, mean.expand_as(mu))
    size = exact.diagonal().sqrt()
    pulls = (c[0].mean(0) - mean) / size * chains**0.5
    found = torch.cov(c[0].T) / (size[:, None] * size)
    assert pulls.abs().max() < 4
    torch.testing.assert_close(found, exact / (size[:, None] * size), atol=0.04, rtol=0)
    drawn = sampler.variances(torch.tensor([0.0, 1.0, -2.0, 0.5]).double().expand(1, chains, 4))
    expected = (5 * prior.scales.square() + torch.tensor([0.0, 1.0, 4.0, 0.25])) / 4
    torch.testing.assert_close(drawn[0].mean(0), expected, rtol=0.03, atol=0)


def test_sampler_passes_the_joint_test():
    """J. Geweke (2004), "Getting it right": y | c and c, v | y in turn leave the joint law alone.

    Whatever the chain started from, c is then Student's t again and 1 / v is gamma.
    """
    prior = ScaleMixture.example((1, 2, 2), std=0.3)
    problem, chains = Problem("blur:gaussian,sigma=0.7,size=3,pad=reflect", 0.3), 4000
    matrix = operator_matrix(problem, prior.shape, torch.zeros(1, *prior.shape))
    random = generator(3)
    sampler = GibbsSampler(prior, matrix, 0.3, chains, random)
    v = sampler.start(1)  # not the prior's law: the chain has to find it
    c = v.sqrt() * torch.randn(v.shape, generator=random, dtype=torch.float64)
    for _ in range(60):
        x = c @ prior.basis.T + prior.mean.flatten()
        y = x @ matrix[0].T + 0.3 * torch.randn(x.shape, generator=random, dtype=torch.float64)
        c, _ = sampler.coefficients(v, sampler.data(y))
        v = sampler.variances(c)
    t, precision = (c / prior.scales)[0], (prior.scales.square() / v)[0]
    # t_5: P(|t| < 0.7267) = 0.5, P(|t| < 2.5706) = 0.95; 5 / v' = chi^2_5: median 4.3515
    for edge, inside in ((0.7267, 0.5), (2.5706, 0.95), (4.0321, 0.99)):
        share = (t.abs() < edge).double().mean(0)
        assert ((share - inside).abs() < 4 * (inside * (1 - inside) / chains) ** 0.5).all()
    assert ((t > 0).double().mean(0) - 0.5).abs().max() < 4 * 0.5 / chains**0.5
    share = (5 * precision < 4.3515).double().mean(0)
    assert (share - 0.5).abs().max() < 4 * 0.5 / chains**0.5
    assert (precision.mean(0) - 1).abs().max() < 4 * (2 / 5 / chains) ** 0.5


def test_draws_are_the_chains_without_repetition():
    prior = ScaleMixture.example((1, 2, 2))
    problem = Problem("identity", 0.1)
    y = problem.simulate(prior.sample(2, seed=4), seed=5)
    posterior = prior.posterior(y, problem)
    assert posterior.rhat <= 1.01 and posterior.ess > 1000
    assert torch.equal(posterior.mean, prior.posterior(y, problem).mean)
    x = posterior.sample(500, seed=1)
    assert x.shape == (500, 2, 1, 2, 2) and x.dtype == torch.float32
    assert len(x[:, 0].flatten(1).unique(dim=0)) == 500
    assert torch.equal(posterior.sample(20, seed=1), x[:20])
    everything = posterior.sample(len(posterior.chains) * gibbs.CHAINS)
    torch.testing.assert_close(everything.std(0, correction=0), posterior.std, rtol=1e-3, atol=0)


def test_error_of_the_mean_is_the_scatter_of_repeated_references():
    prior, problem = ScaleMixture.example((1, 2, 2)), Problem("inpaint:box,size=1", 0.1)
    y = problem.simulate(prior.sample(2, seed=4), seed=5).double()
    found = [prior.posterior(y, problem, seed=s) for s in range(8)]
    scatter = float(torch.stack([q.mean.flatten(1) for q in found]).var(0).sum())
    claimed = float(torch.stack([q.mean_variance for q in found]).mean(0).sum())
    assert 0.5 < scatter / claimed < 1.7  # 56 numbers of unlike size: about 0.25 of it


def test_chains_that_do_not_settle_are_an_error(monkeypatch):
    monkeypatch.setattr(gibbs, "PRECISE", 1e-9)
    monkeypatch.setattr(gibbs, "MOST", 500)
    prior = ScaleMixture.example((1, 2, 2))
    with pytest.raises(InputError, match="not converged in 500 sweeps"):
        prior.posterior(torch.full((1, 1, 2, 2), 0.4), Problem("identity", 0.1))


def test_diagnostics_are_those_of_an_autoregression():
    """x_t = a x_(t-1) + sqrt(1 - a^2) n has the effective size N (1 - a) / (1 + a)."""
    for a in (0.0, 0.5, 0.9):
        noise = doubles(2000, 1, 16, 3, seed=7)
        x = [noise[0]]
        for n in noise[1:]:
            x.append(a * x[-1] + (1 - a * a) ** 0.5 * n)
        chains = torch.stack(x)
        expected = 2000 * 16 * (1 - a) / (1 + a)
        assert effective_size(chains).mean().item() == pytest.approx(expected, rel=0.08)
        assert (split_rhat(chains) - 1).abs().max() < 0.015
    apart = doubles(500, 1, 4, 1) + torch.arange(4).double()[:, None]
    # 8 half chains with means 0, 0, 1, 1, ...: their variance is 10 / 7
    assert float(split_rhat(apart)) == pytest.approx((1 + 10 / 7) ** 0.5, rel=0.08)
    drifting = doubles(500, 1, 4, 1) + torch.linspace(0, 3, 500).double()[:, None, None, None]
    # half chains with means 0.75 and 2.25 and a variance of 1 + 1.5^2 / 12 within
    assert float(split_rhat(drifting)) == pytest.approx(1.2414, rel=0.03)
    assert float(effective_size(apart)) < 20
