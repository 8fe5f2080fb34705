"""Closed forms of Gaussian priors against dense linear algebra, autograd and Monte Carlo."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from unmurk.errors import InputError
from unmurk.exact import GaussianPrior, operator_matrix
from unmurk.problem import Problem

SHAPE = (1, 4, 4)
MASKED = "inpaint:random,keep=0.5,seed=3"


def eye(size):
    return torch.eye(size, dtype=torch.float64)


def full_prior(shape=SHAPE, seed=0):
    """A prior with an arbitrary full covariance, and that covariance."""
    size = torch.Size(shape).numel()
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5
    covariance = 0.04 * (root @ root.T + 0.1 * eye(size))
    mean = 0.5 + 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
    return GaussianPrior(mean, covariance), covariance


def doubles(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_denoiser_is_the_conditional_mean():
    prior, S = full_prior()
    x, sigma = doubles(3, *SHAPE), torch.tensor([0.01, 0.3, 4.0], dtype=torch.float64)
    for row in range(3):
        noisy = S + sigma[row] ** 2 * eye(16)
        away = (x[row] - prior.mean).flatten()
        expected = prior.mean.flatten() + S @ torch.linalg.solve(noisy, away)
        torch.testing.assert_close(prior(x, sigma)[row].flatten(), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.denoise(x, 0.3)[1], prior.denoise(x, sigma)[1])


def test_score_is_the_gradient_of_the_density():
    prior, _ = full_prior()
    x = doubles(2, *SHAPE).requires_grad_()
    gradient = torch.autograd.grad(prior.log_prob(x, 0.2).sum(), x)[0]
    torch.testing.assert_close(prior.score(x, 0.2), gradient)
    torch.testing.assert_close(gradient, (prior(x, 0.2) - x) / 0.2**2)  # Tweedie


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_log_prob_is_that_of_torch(sigma):
    prior, S = full_prior()
    x = doubles(5, *SHAPE)
    reference = MultivariateNormal(prior.mean.flatten(), S + sigma**2 * eye(16))
    torch.testing.assert_close(prior.log_prob(x, sigma), reference.log_prob(x.flatten(1)))


def test_diagonal_equals_full_with_the_same_variances():
    variances = doubles(*SHAPE).square() + 0.01
    mean = doubles(*SHAPE, seed=2)
    thin, thick = GaussianPrior(mean, variances), GaussianPrior(mean, variances.flatten().diag())
    x, problem = doubles(3, *SHAPE, seed=3), Problem(MASKED, 0.1)
    torch.testing.assert_close(thin(x, 0.5), thick(x, 0.5))
    torch.testing.assert_close(thin.log_prob(x, 0.5), thick.log_prob(x, 0.5))
    torch.testing.assert_close(thin.covariance, thick.covariance)
    torch.testing.assert_close(thin.posterior(x, problem).mean, thick.posterior(x, problem).mean)


def test_samples_have_the_moments_and_do_not_depend_on_their_number():
    prior, S = full_prior()
    x = prior.sample(20000, seed=1).double().flatten(1)
    torch.testing.assert_close(x.mean(0), prior.mean.flatten(), atol=6e-3, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), S, atol=2e-3, rtol=0)
    assert torch.equal(prior.sample(3, seed=1), prior.sample(20, seed=1)[:3])


@pytest.mark.parametrize(
    "operator", [MASKED, "blur:gaussian,sigma=0.7,size=3", "sr:average,factor=2"]
)
def test_posterior_is_that_of_the_information_form(operator):
    prior, S = full_prior()
    problem = Problem(operator, 0.07)
    y = problem.simulate(prior.sample(3, seed=4)).double()
    posterior = prior.posterior(y, problem)
    matrix = operator_matrix(problem, SHAPE, y)
    for row in range(3):
        A = matrix[row if len(matrix) > 1 else 0]
        precision = torch.linalg.inv(S) + A.T @ A / 0.07**2
        inverse = torch.linalg.inv(S) @ prior.mean.flatten() + A.T @ y[row].flatten() / 0.07**2
        covariance = posterior.covariance.expand(3, -1, -1)[row]
        torch.testing.assert_close(covariance, torch.linalg.inv(precision), rtol=1e-6, atol=1e-9)
        expected = torch.linalg.solve(precision, inverse)
        torch.testing.assert_close(posterior.mean[row].flatten(), expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(posterior.std[row].flatten(), covariance.diagonal().sqrt())


def test_matrix_is_the_operator():
    problem = Problem(MASKED, 0.1).at(range(3), SHAPE)
    x = doubles(3, *SHAPE)
    y = (operator_matrix(problem, SHAPE, x) @ x.flatten(1)[..., None])[..., 0]
    torch.testing.assert_close(y, problem.A(x).flatten(1))


def test_a_bound_problem_keeps_its_images():
    prior, _ = full_prior()
    problem = Problem(MASKED, 0.05)
    y = problem.simulate(prior.sample(4), index=range(4))
    later = prior.posterior(y[2:], problem.at([2, 3], SHAPE)).mean
    torch.testing.assert_close(later, prior.posterior(y, problem).mean[2:])


def test_the_map_is_where_the_gradient_of_the_posterior_vanishes():
    prior, _ = full_prior()
    problem = Problem("blur:gaussian,sigma=0.7,size=3", 0.1)
    y = problem.simulate(prior.sample(2)).double()
    x = prior.map(y, problem).requires_grad_()
    joint = prior.log_prob(x) + problem.log_likelihood(x, y)
    gradient = torch.autograd.grad(joint.sum(), x)[0]
    assert gradient.abs().max() < 1e-8


def test_errors_of_the_posterior_mean_are_spread_as_the_posterior():
    """Over (x, y) drawn from the model, x - E[x | y] has the posterior covariance and mean 0."""
    prior, _ = full_prior()
    problem = Problem("sr:average,factor=2", 0.05)
    x = prior.sample(20000, seed=5)
    posterior = prior.posterior(problem.simulate(x, seed=6), problem)
    error = (x - posterior.mean).double().flatten(1)
    torch.testing.assert_close(error.mean(0), torch.zeros(16).double(), atol=6e-3, rtol=0)
    torch.testing.assert_close(torch.cov(error.T), posterior.covariance[0], atol=2e-3, rtol=0)


def test_posterior_samples_and_density():
    prior, _ = full_prior()
    problem = Problem(MASKED, 0.1)
    posterior = prior.posterior(problem.simulate(prior.sample(2)), problem)
    x = posterior.sample(20000, seed=1)
    assert x.shape == (20000, 2, *SHAPE)
    torch.testing.assert_close(x.mean(0), posterior.mean, atol=6e-3, rtol=0)
    for row in range(2):
        spread = torch.cov(x[:, row].double().flatten(1).T)
        torch.testing.assert_close(spread, posterior.covariance[row], atol=2e-3, rtol=0)
        reference = MultivariateNormal(
            posterior.mean[row].double().flatten(), posterior.covariance[row]
        )
        expected = reference.log_prob(x[0, row].double().flatten())
        torch.testing.assert_close(posterior.log_prob(x[0])[row], expected, rtol=1e-5, atol=1e-4)


def test_without_noise_seen_pixels_are_known():
    prior, _ = full_prior()
    problem = Problem(MASKED, 0.0)
    x = prior.sample(3)
    posterior = prior.posterior(problem.simulate(x), problem)
    seen = problem.at(range(3), SHAPE).mask > 0
    torch.testing.assert_close(posterior.mean[seen], x[seen], atol=1e-5, rtol=0)
    assert posterior.std[seen].max() < 1e-5
    assert posterior.std[~seen].min() > 0.01
    close = prior.posterior(problem.simulate(x), Problem(MASKED, 1e-4))
    torch.testing.assert_close(posterior.mean, close.mean, atol=1e-3, rtol=0)


def test_evidence_counts_what_is_seen():
    prior, S = full_prior()
    problem = Problem(MASKED, 0.1)
    y = problem.simulate(prior.sample(3)).double()
    seen = problem.at(range(3), SHAPE).mask.flatten(1) > 0
    for row in range(3):
        part = S[seen[row]][:, seen[row]]
        reference = MultivariateNormal(
            prior.mean.flatten()[seen[row]], part + 0.01 * eye(len(part))
        )
        expected = reference.log_prob(y[row].flatten()[seen[row]])
        torch.testing.assert_close(prior.log_evidence(y, problem)[row], expected)


def test_evidence_obeys_bayes():
    prior, _ = full_prior()
    problem = Problem("sr:average,factor=2", 0.1)
    x = prior.sample(3).double()
    y = problem.simulate(x)
    joint = prior.log_prob(x) + problem.log_likelihood(x, y)
    expected = joint - prior.posterior(y, problem).log_prob(x)
    torch.testing.assert_close(prior.log_evidence(y, problem), expected)


def test_exponential_prior_is_stationary():
    prior = GaussianPrior.exponential((2, 5, 6), length=3.0, std=0.3, mean=0.4)
    S = prior.covariance.reshape(2, 5, 6, 2, 5, 6)
    assert S[0, 1, 2, 0, 1, 2].item() == pytest.approx(0.09)
    assert S[0, 0, 0, 0, 3, 4].item() == pytest.approx(0.09 * torch.tensor(-5 / 3).exp().item())
    assert S[0, :, :, 1].abs().max() < 1e-12
    assert prior.mean.unique().tolist() == [0.4]


def test_bad_input_is_named():
    mean = torch.zeros(SHAPE)
    with pytest.raises(InputError, match="covariance has shape"):
        GaussianPrior(mean, eye(15))
    with pytest.raises(InputError, match="negative eigenvalue"):
        GaussianPrior(mean, -eye(16))
    prior = GaussianPrior(mean, torch.ones(SHAPE))
    with pytest.raises(InputError, match="not linear"):
        prior.posterior(torch.zeros(1, *SHAPE), Problem(lambda x: x**2, 0.1))
    with pytest.raises(InputError, match="noise > 0"):
        prior.log_evidence(torch.zeros(1, *SHAPE), Problem("identity", 0.0))
