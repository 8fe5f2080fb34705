"""Closed forms of Gaussians and mixtures against dense algebra, autograd and Monte Carlo."""

import pytest
import torch
from torch.distributions import MultivariateNormal

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior, operator_matrix
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
    problem = Problem(MASKED, 0.1).bind(range(3), SHAPE)
    x = doubles(3, *SHAPE)
    y = (operator_matrix(problem, SHAPE, x) @ x.flatten(1)[..., None])[..., 0]
    torch.testing.assert_close(y, problem.A(x).flatten(1))


def test_a_bound_problem_keeps_its_images():
    prior, _ = full_prior()
    problem = Problem(MASKED, 0.05)
    y = problem.simulate(prior.sample(4), index=range(4))
    later = prior.posterior(y[2:], problem.bind([2, 3], SHAPE)).mean
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
    seen = problem.bind(range(3), SHAPE).mask > 0
    torch.testing.assert_close(posterior.mean[seen], x[seen], atol=1e-5, rtol=0)
    assert posterior.std[seen].max() < 1e-5
    assert posterior.std[~seen].min() > 0.01
    close = prior.posterior(problem.simulate(x), Problem(MASKED, 1e-4))
    torch.testing.assert_close(posterior.mean, close.mean, atol=1e-3, rtol=0)


def test_evidence_counts_what_is_seen():
    prior, S = full_prior()
    problem = Problem(MASKED, 0.1)
    y = problem.simulate(prior.sample(3)).double()
    seen = problem.bind(range(3), SHAPE).mask.flatten(1) > 0
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


# -- mixtures ------------------------------------------------------------------------------------


def small_mixture(shape=SHAPE):
    """Three full Gaussians of one shape, some two standard deviations apart."""
    parts = [full_prior(shape, seed=k)[0] for k in range(3)]
    away = [0.3 * doubles(*shape, seed=10 + k) for k in range(3)]
    moved = [GaussianPrior(p.mean + a, p.covariance) for p, a in zip(parts, away, strict=True)]
    return GaussianMixture([1.0, 2.0, 3.0], moved)


def line(*components):
    """A mixture of numbers: (weight, mean, standard deviation) for each component."""
    weights, means, stds = zip(*components, strict=True)
    parts = [
        GaussianPrior(torch.full((1, 1, 1), m), torch.full((1, 1, 1), s**2))
        for m, s in zip(means, stds, strict=True)
    ]
    return GaussianMixture(weights, parts)


LINE = line((0.5, 0.2, 0.05), (1.5, 0.7, 0.1), (1.0, 0.9, 0.02))
GRID = torch.linspace(-3, 4, 70001, dtype=torch.float64)


def along(values):
    return values.reshape(-1, 1, 1, 1)


def test_mixture_score_is_the_gradient_of_the_density():
    prior = small_mixture()
    x = (prior.sample(6, seed=1).double() + 0.1 * doubles(6, *SHAPE)).requires_grad_()
    sigma = torch.tensor([0.05, 0.1, 0.2, 0.5, 1.0, 3.0], dtype=torch.float64)
    gradient = torch.autograd.grad(prior.log_prob(x, sigma).sum(), x)[0]
    torch.testing.assert_close(prior.score(x, sigma), gradient)
    level = sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, (prior(x, sigma) - x) / level**2)  # Tweedie
    still = torch.autograd.grad(prior.log_prob(x).sum(), x)[0]
    torch.testing.assert_close(prior.score(x, 0.0), still)


def test_mixture_density_is_that_of_torch():
    prior, x = small_mixture(), doubles(5, *SHAPE)
    each = [
        MultivariateNormal(part.mean.flatten(), part.covariance + 0.09 * eye(16)).log_prob(
            x.flatten(1)
        )
        for part in prior.components
    ]
    expected = torch.log(
        sum(w * e.exp() for w, e in zip((1 / 6, 1 / 3, 1 / 2), each, strict=True))
    )
    torch.testing.assert_close(prior.log_prob(x, 0.3), expected)


@pytest.mark.parametrize("sigma", [0.02, 0.2, 1.0])
def test_mixture_denoiser_is_the_integral_in_one_dimension(sigma):
    x = torch.tensor([-0.3, 0.2, 0.5, 0.83, 1.4], dtype=torch.float64)
    weight = LINE.log_prob(along(GRID)) - (x[:, None] - GRID) ** 2 / (2 * sigma**2)
    weight = (weight - weight.amax(1, keepdim=True)).exp()
    expected = (weight * GRID).sum(1) / weight.sum(1)
    torch.testing.assert_close(LINE(along(x), sigma).flatten(), expected, rtol=1e-7, atol=1e-9)


def test_mixture_denoiser_is_the_integral_in_two_dimensions():
    prior, sigma = small_mixture((1, 1, 2)), 0.15
    axis = torch.linspace(-1.5, 2.5, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    x = prior.sample(4, seed=3).double() + sigma * doubles(4, 1, 1, 2)
    distance = (x.reshape(4, 1, 2) - grid).square().sum(-1)
    weight = prior.log_prob(grid.reshape(-1, 1, 1, 2)) - distance / (2 * sigma**2)
    expected = weight.softmax(1) @ grid
    torch.testing.assert_close(prior(x, sigma).flatten(1), expected, rtol=1e-6, atol=1e-7)


def test_mixture_posterior_is_the_integral_in_one_dimension():
    problem = Problem("identity", 0.15)
    y = along(torch.tensor([0.1, 0.45, 0.8], dtype=torch.float64))
    posterior = LINE.posterior(y, problem)
    joint = LINE.log_prob(along(GRID)) - (y.flatten()[:, None] - GRID) ** 2 / (2 * 0.15**2)
    weight = joint.softmax(1)
    mean = weight @ GRID
    torch.testing.assert_close(posterior.mean.flatten(), mean)
    torch.testing.assert_close(
        posterior.std.flatten(), (weight @ GRID**2 - mean**2).sqrt(), rtol=1e-6, atol=0
    )
    for k, part in enumerate(LINE.components):
        alone = part.log_prob(along(GRID)) - (y.flatten()[:, None] - GRID) ** 2 / (2 * 0.15**2)
        share = LINE.weights[k] * (alone - joint.logsumexp(1, keepdim=True)).exp().sum(1)
        torch.testing.assert_close(posterior.weights[:, k], share)
    at = along(torch.full((3,), 0.6, dtype=torch.float64))
    step = GRID[1] - GRID[0]
    here = LINE.log_prob(at) - (y.flatten() - 0.6) ** 2 / (2 * 0.15**2)
    expected = here - (joint.logsumexp(1) + step.log())
    torch.testing.assert_close(posterior.log_prob(at), expected, rtol=1e-7, atol=1e-8)


def test_mixture_evidence_is_a_density():
    problem = Problem("identity", 0.15)
    density = LINE.log_evidence(along(GRID), problem).exp()
    assert float(density.sum() * (GRID[1] - GRID[0])) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("operator", [MASKED, "sr:average,factor=2"])
def test_mixture_posterior_agrees_with_importance_sampling(operator):
    prior, problem = small_mixture(), Problem(operator, 0.7)
    y = problem.simulate(prior.sample(2, seed=2), seed=3)
    posterior = prior.posterior(y, problem)
    assert posterior.weights.max() < 0.98
    g = torch.Generator().manual_seed(4)
    number = torch.multinomial(prior.weights, 50000, replacement=True, generator=g)
    z = torch.randn(50000, 16, generator=g, dtype=torch.float64)
    means = torch.stack([part.mean.flatten() for part in prior.components])
    roots = torch.stack([torch.linalg.cholesky(part.covariance) for part in prior.components])
    x = means[number] + (roots[number] @ z[..., None])[..., 0]
    matrix = operator_matrix(problem, SHAPE, y).expand(2, -1, -1)
    for row in range(2):
        misfit = (y[row].flatten().double() - x @ matrix[row].T).square().sum(1)
        weight = (-misfit / (2 * 0.7**2)).softmax(0)
        mean = weight @ x
        std = (weight @ (x - mean).square()).sqrt()
        near = {"atol": 8e-3, "rtol": 0.0}
        torch.testing.assert_close(posterior.mean[row].flatten().double(), mean, **near)
        torch.testing.assert_close(posterior.std[row].flatten().double(), std, **near)


def test_mixture_evidence_obeys_bayes():
    prior, problem = small_mixture(), Problem("sr:average,factor=2", 0.1)
    x = prior.sample(3).double()
    y = problem.simulate(x)
    joint = prior.log_prob(x) + problem.log_likelihood(x, y)
    expected = joint - prior.posterior(y, problem).log_prob(x)
    torch.testing.assert_close(prior.log_evidence(y, problem), expected)


def test_a_mixture_of_one_is_the_gaussian():
    one, _ = full_prior()
    mixture = GaussianMixture([3.0], [one])
    x, problem = doubles(3, *SHAPE), Problem(MASKED, 0.1)
    torch.testing.assert_close(mixture(x, 0.3), one(x, 0.3))
    torch.testing.assert_close(mixture.score(x, 0.3), one.score(x, 0.3))
    torch.testing.assert_close(mixture.log_prob(x), one.log_prob(x))
    torch.testing.assert_close(mixture.log_evidence(x, problem), one.log_evidence(x, problem))
    assert torch.equal(mixture.sample(4, seed=2), one.sample(4, seed=2))
    ours, theirs = mixture.posterior(x, problem), one.posterior(x, problem)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.covariance, theirs.covariance.expand(3, -1, -1))
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    assert torch.equal(ours.sample(5, seed=2), theirs.sample(5, seed=2))


def test_mixture_samples_have_the_moments():
    prior = small_mixture()
    x = prior.sample(8000, seed=1)
    assert torch.equal(prior.sample(3, seed=1), x[:3])
    means = torch.stack([part.mean.flatten() for part in prior.components])
    mean = prior.weights @ means
    within = sum(
        w * part.covariance for w, part in zip(prior.weights, prior.components, strict=True)
    )
    between = (means - mean).T @ (prior.weights[:, None] * (means - mean))
    torch.testing.assert_close(x.double().flatten(1).mean(0), mean, atol=2e-2, rtol=0)
    torch.testing.assert_close(
        torch.cov(x.double().flatten(1).T), within + between, atol=1e-2, rtol=0
    )


def test_mixture_posterior_samples_have_the_moments():
    prior, problem = small_mixture(), Problem(MASKED, 0.4)
    y = problem.simulate(prior.sample(2, seed=2), seed=3)
    posterior = prior.posterior(y, problem)
    x = posterior.sample(20000, seed=1)
    torch.testing.assert_close(x.mean(0), posterior.mean, atol=1e-2, rtol=0)
    torch.testing.assert_close(x.std(0), posterior.std, atol=1e-2, rtol=0)
    for row in range(2):
        found = torch.cov(x[:, row].double().flatten(1).T)
        torch.testing.assert_close(found, posterior.covariance[row], atol=6e-3, rtol=0)


def test_mixture_takes_float32_and_can_be_differentiated():
    prior = GaussianMixture.example()
    x = prior.sample(2, seed=1) + 0.2 * doubles(2, 1, 8, 8).float()
    assert prior(x, 0.2).dtype == torch.float32
    torch.testing.assert_close(prior(x, 0.2).double(), prior(x.double(), 0.2))
    assert prior.posterior(x, Problem("identity", 0.2)).sample(3).dtype == torch.float32
    exact = x.double().requires_grad_()
    direction, probe = doubles(2, 1, 8, 8, seed=5), doubles(2, 1, 8, 8, seed=6)
    slope = torch.autograd.grad((prior(exact, 0.2) * probe).sum(), exact)[0]
    with torch.no_grad():
        there, back = (prior(exact + h * direction, 0.2) for h in (1e-5, -1e-5))
    difference = ((there - back) * probe).sum() / 2e-5
    torch.testing.assert_close((slope * direction).sum(), difference, rtol=1e-6, atol=1e-8)


def test_example_has_components_that_differ():
    prior = GaussianMixture.example((2, 8, 8), components=4, seed=3)
    assert prior.weights.tolist() == pytest.approx([k / 26 for k in (5, 6, 7, 8)])
    means = [part.mean for part in prior.components]
    for k, mean in enumerate(means):
        assert mean.min() >= 0.25 and mean.max() <= 0.75
        assert all((mean - other).square().mean().sqrt() > 0.15 for other in means[:k])
    assert prior.components[1].covariance[0, 1].item() == pytest.approx(
        0.01 * torch.tensor(-1 / 3).exp().item()
    )


def test_bad_mixtures_are_named():
    one = GaussianPrior(torch.zeros(SHAPE), torch.ones(SHAPE))
    other = GaussianPrior(torch.zeros(1, 2, 2), torch.ones(1, 2, 2))
    for weights, parts in (([1.0, 2.0], [one]), ([0.0], [one]), ([], []), ([float("nan")], [one])):
        with pytest.raises(InputError, match="one positive number"):
            GaussianMixture(weights, parts)
    with pytest.raises(InputError, match="one shape"):
        GaussianMixture([1.0, 1.0], [one, other])
    with pytest.raises(InputError, match="noise > 0"):
        GaussianMixture([1.0], [one]).posterior(torch.zeros(1, *SHAPE), Problem("identity", 0.0))
