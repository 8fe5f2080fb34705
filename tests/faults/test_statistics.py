"""Draws, estimates and scores against the numbers that they should have."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import unmurk
from unmurk.diffusion.samplers import posterior_draw, prior_draw
from unmurk.errors import InputError
from unmurk.evaluation import metrics
from unmurk.evaluation.distances import kid
from unmurk.gaussian import Wiener
from unmurk.io.images import load_images
from unmurk.noise_estimation import envelope, estimate_noise, powers, uncertainty
from unmurk.operators import as_operator
from unmurk.problem import Problem
from unmurk.rng import generator
from unmurk.training.losses import recorrupted

DIGITS = Path(unmurk.__file__).parent / "assets" / "digits"


@pytest.fixture(scope="module")
def digits():
    return load_images(DIGITS / "test.idx3-ubyte.gz", limit=300).images


# -- draws: the spread of a Gaussian posterior, exactly ------------------------------------------


class Basis:
    """Streams whose draw number k is 1 for row k and 0 for all others.

    A sampler with a linear denoiser is linear in its draws: row k of what it makes is the response
    to draw k, and the variance is the sum of their squares. No chance is left in the test.
    """

    def __init__(self, draws):
        self.draws, self.next = draws, 0

    def randn(self, *shape):
        z = torch.zeros(self.draws, *shape, dtype=torch.float64)
        z[self.next] = 1
        self.next += 1
        return z


class Gaussian:
    """The denoiser of N(0, variance I); it counts its evaluations."""

    def __init__(self, variance):
        self.variance, self.calls = variance, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.variance / (self.variance + sigma**2) * x


def spread_over_exact(sigma, share, steps):
    """Deviation of a draw over that of p(x | y), for a prior of variance share sigma^2."""
    denoise = Gaussian(share * sigma**2)
    x = posterior_draw(
        denoise, torch.zeros(steps, 1, 1, 1, dtype=torch.float64), sigma, Basis(steps), steps
    )
    assert denoise.calls == steps
    exact = math.sqrt(share / (1 + share)) * sigma
    return float(x.square().sum().sqrt()) / exact


@pytest.mark.parametrize("sigma", [0.005, 0.02, 0.1, 0.3, 1.0, 3.0])
def test_sixteen_evaluations_keep_the_spread(sigma):
    for share in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0):
        assert spread_over_exact(sigma, share, 16) == pytest.approx(1, abs=0.016)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (4, (0.667, 0.910, 0.884, 0.779, 0.761)),
        (6, (0.820, 1.008, 1.010, 0.942, 0.929)),
        (8, (0.904, 1.027, 1.022, 0.977, 0.967)),
        (12, (0.971, 1.022, 1.015, 0.991, 0.985)),
        (16, (0.991, 1.015, 1.010, 0.995, 0.991)),
        (32, (1.001, 1.005, 1.003, 0.998, 0.997)),
    ],
)
def test_the_accuracy_is_the_documented_one(steps, expected):
    found = [spread_over_exact(0.3, share, steps) for share in (0.01, 0.1, 1.0, 10.0, 100.0)]
    assert found == pytest.approx(list(expected), abs=6e-4)
    cells = "".join(f"{value:.3f} " for value in expected).strip()
    assert f"{cells}\n" in posterior_draw.__doc__


def test_more_evaluations_end_at_the_posterior():
    for share in (0.01, 0.1, 1.0, 10.0):
        assert spread_over_exact(0.3, share, 256) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("steps, error", [(15, 0.06), (31, 0.02)])
def test_new_images_have_the_spread_of_the_prior(steps, error):
    """From noise of level 20: the start is N(1/2, 20^2), as for images of a mean of 1/2."""
    for std in (0.03, 0.05, 0.1, 0.3, 1.0, 4.0):
        denoise = Gaussian(std**2)

        def around_grey(x, sigma, denoise=denoise):
            return 0.5 + denoise(x - 0.5, sigma)

        x = prior_draw(around_grey, (1, 1, 1), Basis(steps), steps) - 0.5
        assert denoise.calls == steps
        assert float(x.square().sum().sqrt()) / std == pytest.approx(1, abs=error)


@pytest.mark.parametrize(
    "truth, least, most", [(0.25, 0.9, 1.5), (1.0, 0.97, 1.05), (4.0, 0.98, 1.02)]
)
def test_draw_and_refit_ends_at_the_variance_of_the_truth(truth, least, most):
    """Expectation maximisation on y ~ N(0, truth + 1) with sigma_y = 1, exact but for the draws.

    Of first-order draws the only fixed point is 0 where truth <= 1. (Of these, too, below a
    variance of 0.02: there 1 % of spread is missing.)
    """
    for start in (0.4 * truth, 3 * truth):
        variance = start
        for _ in range(400):
            gain = variance / (variance + 1)
            within = (spread_over_exact(1.0, variance, 16) ** 2) * gain
            before, variance = variance, gain**2 * (truth + 1) + within
            assert (variance - before) * (truth - start) > -1e-9
        assert least < variance / truth < most


# -- scores --------------------------------------------------------------------------------------


def bordered(digits):
    """A digit in a black frame, and the same with noise inside the frame and nowhere else."""
    truth = torch.zeros(1, 1, 28, 28)
    truth[..., 6:22, 6:22] = digits[:1, :, 6:22, 6:22]
    draw = torch.Generator().manual_seed(0)
    x = truth.clone()
    x[..., 6:22, 6:22] += 0.1 * torch.randn(1, 1, 16, 16, generator=draw)
    return x, truth


def windows(x, truth):
    """SSIM as published, by the windows of 11 x 11 pixels that fit, in float64."""
    place = torch.arange(11, dtype=torch.float64) - 5
    weight = (-(place.square()[:, None] + place.square()) / 4.5).exp()
    weight = weight / weight.sum()
    a, b = (v.double()[0, 0].unfold(0, 11, 1).unfold(1, 11, 1) for v in (x.clamp(0, 1), truth))
    ma, mb = ((weight * v).sum((2, 3), keepdim=True) for v in (a, b))
    va, vb = ((weight * (v - m).square()).sum((2, 3)) for v, m in ((a, ma), (b, mb)))
    both = (weight * (a - ma) * (b - mb)).sum((2, 3))
    ma, mb = ma[..., 0, 0], mb[..., 0, 0]
    light = (2 * ma * mb + 1e-4) / (ma.square() + mb.square() + 1e-4)
    return float((light * (2 * both + 9e-4) / (va + vb + 9e-4)).mean())


def test_ssim_is_the_published_one(digits):
    for x, truth in (bordered(digits), (digits[:1] * 0.8 + 0.1, digits[:1])):
        assert float(metrics.ssim(x, truth)) == pytest.approx(windows(x, truth), abs=1e-5)


def test_ssim_is_that_of_scikit_image(digits):
    published = pytest.importorskip("skimage.metrics").structural_similarity
    draw = torch.Generator().manual_seed(0)
    colour = torch.rand(1, 3, 21, 34, generator=draw)
    pairs = [bordered(digits), (digits[:1] * 0.8 + 0.1, digits[:1])]
    pairs.append((colour + 0.1 * torch.randn(colour.shape, generator=draw), colour))
    for x, truth in pairs:
        expected = published(
            truth[0].double().numpy(),
            x[0].double().clamp(0, 1).numpy(),
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=0,
        )
        assert float(metrics.ssim(x, truth)) == pytest.approx(expected, abs=1e-5)


def test_exact_images_are_counted_and_the_mean_is_of_the_others():
    truth = torch.full((4, 1, 16, 16), 0.5)
    x = truth + torch.tensor([0.1, 0.0, 0.01, 0.0]).view(4, 1, 1, 1)
    found = metrics.fidelity(x, truth)
    assert found["psnr"] == pytest.approx(30, abs=1e-4) and found["exact"] == 2
    assert found["ssim"] == pytest.approx(float(metrics.ssim(x, truth).mean()))
    assert found["beyond"] == 0
    whole = {"psnr": math.inf, "exact": 4, "beyond": 0, "ssim": 1.0}
    assert metrics.fidelity(truth, truth) == whole
    small = metrics.fidelity(x[..., :8], truth[..., :8])
    assert small["ssim"] is None and small["psnr"] == pytest.approx(30, abs=1e-4)


def test_images_that_differ_outside_the_range_are_not_exact():
    """PSNR clips, as published figures do, and so does not see 1.5 in place of 1."""
    truth = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16), torch.ones(1, 16, 16)])
    x = truth.clone()
    x[0, 0, 3, 4], x[1, 0, 5, 6] = -0.5, 1.5
    assert metrics.psnr(x, truth).tolist() == [math.inf] * 3
    found = metrics.fidelity(x, truth)
    assert (found["psnr"], found["exact"], found["beyond"]) == (math.inf, 1, 2)


def test_a_set_is_no_distance_from_itself(digits):
    """In any order, of any rank; and the distance of two sets is never below 0."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    assert metrics.frechet(digits, digits) == 0
    assert metrics.frechet(digits, digits[order]) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(digits[:2], digits[:2]) == 0
    black = torch.zeros(3, 1, 28, 28)
    assert metrics.frechet(black, black) == 0
    near = metrics.frechet(digits, digits + 1e-6)
    assert 0 <= near < 1e-6
    assert metrics.sliced_wasserstein(digits, digits) == 0


def test_frechet_of_features_that_move_alone_is_the_square_of_the_move():
    """Equal covariances of rank 1 of 16: |mu_1 - mu_2|^2, to more digits than eps^(1/2)."""
    steps = torch.linspace(0.2, 0.7, 11, dtype=torch.float64).view(11, 1, 1, 1)
    a = steps.expand(11, 1, 4, 4)
    found = metrics.frechet(a, a + 0.125, lambda x: x.flatten(1).double())
    assert found == pytest.approx(16 * 0.125**2, rel=1e-6)


def test_kid_of_a_set_and_itself_is_that_of_its_definition(digits):
    """Without pairs of an image and itself it is below 0: an estimate without bias may be."""
    x = digits[:20]
    f = metrics.load_digit_classifier().features(x).double().detach()
    k = (f @ f.T / f.shape[1] + 1) ** 3
    apart = (k.sum() - k.diagonal().sum()) / (20 * 19)
    assert kid(x, x) == pytest.approx(float(2 * apart - 2 * k.mean()), rel=1e-6)
    assert np.isfinite(kid(x, x))


# -- noise told from images ----------------------------------------------------------------------

IDENTITY = as_operator("identity")


def errors(count, size, seeds=100, sigma=0.1):
    """Relative errors of the estimate from flat images, one for each seed."""
    found = []
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        y = 0.5 + sigma * torch.randn(count, 1, size, size, generator=draw)
        found.append(estimate_noise(y, IDENTITY).sigma / sigma - 1)
    return np.array(found)


@pytest.mark.parametrize("count, size", [(1, 64), (2, 64), (4, 64), (1, 128)])
def test_the_noise_of_few_flat_images_is_found(count, size):
    found = errors(count, size)
    assert abs(found.mean()) < 0.03
    assert np.sqrt((found**2).mean()) < 0.04
    best = 1 / math.sqrt(2 * 43 * count * (size // 8) ** 2)  # by all patches, were they known flat
    assert np.sqrt((found**2).mean()) < 2.5 * best


def slopes(count, gain, seed):
    """Images of a slope from dark to bright, with noise of the variance gain x + 0.002."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.linspace(0.1, 0.9, 64, dtype=torch.float64).expand(count, 1, 64, 64)
    z = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    return x + (gain * x + 0.002).sqrt() * z


def test_the_uncertainty_of_the_gain_is_its_deviation():
    found, told = [], []
    for seed in range(150):
        patches = powers(slopes(4, 0.02, seed), torch.ones(4, 1, 64, 64) > 0, counts=True)
        terms = torch.stack([patches.mean, torch.ones_like(patches.mean)], 1)
        line = envelope(patches.power, patches.freedom, terms)
        found.append(float(line[0]))
        told.append(float(uncertainty(patches.power, patches.freedom, terms, line)[0, 0]) ** 0.5)
    assert np.mean(found) == pytest.approx(0.02, rel=0.02)
    assert np.median(told) == pytest.approx(np.std(found), rel=0.2)


def test_a_gain_is_found_where_there_is_one_and_refused_where_there_is_none():
    for seed in range(20):
        found = estimate_noise(slopes(4, 0.02, seed), IDENTITY, "poisson-gaussian")
        assert found.gain == pytest.approx(0.02, rel=0.25)
        with pytest.raises(InputError, match="the gain cannot be estimated"):
            estimate_noise(slopes(4, 0.0, seed), IDENTITY, "poisson-gaussian")


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("count", [20, 300])
def test_texture_of_digits_is_no_gain(digits, sigma, count):
    """Strokes are bright and never flat: with Gaussian noise they looked like a gain of 0.033."""
    y = Problem("identity", sigma).simulate(digits[:count])
    with pytest.raises(InputError, match="the gain cannot be estimated"):
        estimate_noise(y, IDENTITY, "poisson-gaussian")


def test_one_brightness_tells_no_gain():
    flat = 0.5 + 0.1 * torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="the gain cannot be estimated"):
        estimate_noise(flat, IDENTITY, "poisson-gaussian")
    same = torch.stack([flat[0] - flat[0].mean()] * 2)
    stripes = same.clone()
    stripes[...] = torch.tensor([0.1, -0.1]).repeat(32)  # every patch the same, mean 0 exactly
    with pytest.raises(InputError, match=r"cannot be estimated"):
        estimate_noise(stripes, IDENTITY, "poisson-gaussian")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named_not_measured(value):
    y = 0.5 + 0.1 * torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    y[1, 0, 5, 5] = value
    for kind in ("gaussian", "poisson-gaussian"):
        with pytest.raises(InputError, match="image number 1 has values that are not finite"):
            estimate_noise(y, IDENTITY, kind)


def test_what_is_hidden_may_be_anything():
    mask = as_operator("inpaint:random,keep=0.7")
    y = Problem(mask, 0.1).simulate(torch.full((3, 1, 64, 64), 0.5))
    hidden = mask.bind(range(3), (1, 64, 64)).mask == 0
    assert estimate_noise(torch.where(hidden, math.nan, y), mask) == estimate_noise(y, mask)


# -- the mean start ------------------------------------------------------------------------------


class Corrected:
    """A posterior mean whose start and correction are given."""

    def __init__(self, start, correction):
        self.start, self.wiener, self.correction = Wiener((1, 8, 8)), start, correction

    def parts(self, y, problem):
        """Of both signs of the noise."""
        return torch.cat([self.wiener] * 2), torch.cat([self.correction] * 2)


@pytest.mark.parametrize("operator, numbers", [("sr:average,factor=2", 16), ("identity", 64)])
def test_the_mean_start_weighs_both_terms_by_the_numbers_of_the_image(operator, numbers):
    problem, draw = Problem(operator, 0.2), generator(0)
    x, d = (torch.randn(5, 1, 8, 8, generator=draw) for _ in range(2))
    y = problem.simulate(x).float()
    assert y[0].numel() == numbers
    bound = problem.bind(range(5), (1, 8, 8))
    posterior = Corrected(x, d)
    loss = recorrupted(posterior, y, bound, 0.6, generator(1))
    n = 0.2 * torch.randn(y.shape, generator=generator(1)) / 0.6
    error = bound.A(x + d) - y
    misfit = ((error + n).square() + (error - n).square()).flatten(1).sum(1) / 2
    penalty = 0.2**2 * posterior.start.energy(d)
    assert float(loss) == pytest.approx(float((misfit + penalty).mean() / 64), rel=1e-5)


def test_its_minimiser_is_the_one_on_the_page():
    """d = (A^T A + sigma^2 S^-1)^-1 A^T A e for targets around A (w + e)."""
    problem, sigma = Problem("sr:average,factor=2", 0.2).bind([0], (1, 8, 8)), 0.2
    eye = torch.eye(64).view(64, 1, 8, 8)
    a = Problem("sr:average,factor=2").operator.A(eye).flatten(1).T.double()
    model = Wiener((1, 8, 8))
    inverse = model.to_images(model.to_coefficients(eye) / model.power).flatten(1).double()
    e = torch.randn(64, generator=generator(0), dtype=torch.float64)
    d = torch.linalg.solve(a.T @ a + sigma**2 * inverse, a.T @ a @ e)
    correction = d.float().view(1, 1, 8, 8).requires_grad_()
    start = torch.zeros(1, 1, 8, 8)
    y = problem.A(e.float().view(1, 1, 8, 8))
    recorrupted(Corrected(start, correction), y, problem, 0.6, generator(1)).backward()
    scale = (a.T @ a @ e).abs().max() * 2 / 64
    assert correction.grad.abs().max() < 1e-4 * scale
