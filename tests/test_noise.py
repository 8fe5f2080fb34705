"""Noise models: moments of their draws, exact likelihoods, text forms, and problems with them."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unmurk.errors import InputError
from unmurk.noise import Gaussian, PoissonGaussian, as_noise, rescaled
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, generator
from unmurk.whitening import rates, whiten

TEXTS = ["0.3", "gaussian,sigma=0.3", "poisson,gain=0.01", "poisson-gaussian,gain=0.01,sigma=0.02"]


def brute_force(noise, clean, y, most):
    """log sum_k P(k) N(y; gain k, sigma^2), every term of it up to `most`, (N,) from (N,)."""
    k = torch.arange(most + 1, dtype=torch.float64)
    poisson = torch.distributions.Poisson(clean[:, None] / noise.gain).log_prob(k)
    normal = torch.distributions.Normal(noise.gain * k, noise.sigma).log_prob(y[:, None])
    return (poisson + normal).logsumexp(1)


# -- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.3, 4.0, 90.0])
@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_moments_of_draws(rate, sigma):
    """Mean c, variance gain c + sigma^2, within five standard errors of each."""
    gain, count = 0.02, 40_000
    noise = PoissonGaussian(gain, sigma)
    clean = torch.full((4, 1, 100, 100), gain * rate)
    y = noise.draw(clean, PerImageGenerator(0, range(4))).double()
    variance = gain**2 * rate + sigma**2
    assert torch.allclose(noise.variance(clean).double(), torch.tensor(variance).double())
    assert abs(y.mean() - gain * rate) < 5 * (variance / count) ** 0.5
    # fourth central moments: gain^4 (r + 3 r^2) of the counts, 3 sigma^4 of the Gaussian
    counts = gain**2 * rate
    fourth = gain**4 * (rate + 3 * rate**2) + 6 * counts * sigma**2 + 3 * sigma**4
    assert abs(y.var() - variance) < 5 * ((fourth - variance**2) / count) ** 0.5
    assert abs((y[..., 1:] - y.mean()).mul(y[..., :-1] - y.mean()).mean()) < 5 * variance / 199
    if sigma == 0:
        assert ((y / gain) - (y / gain).round()).abs().max() < 1e-4


def test_light_is_not_negative():
    noise = PoissonGaussian(0.1)
    clean = torch.tensor([[-1.0, 0.0]])
    assert torch.equal(noise.draw(clean, PerImageGenerator(0, [0])), torch.zeros(1, 2))
    assert torch.equal(noise.variance(clean), torch.zeros(1, 2))


@pytest.mark.parametrize("text", TEXTS)
def test_same_image_same_noise_in_any_batch(text):
    problem = Problem("inpaint:random,keep=0.6", text)
    x = torch.rand(5, 3, 8, 6, generator=torch.manual_seed(0), dtype=torch.float64)
    whole = problem.simulate(x, seed=3)
    parts = [problem.simulate(x[a:b], 3, range(a, b)) for a, b in ((0, 1), (1, 5))]
    assert torch.equal(torch.cat(parts), whole) and whole.dtype == torch.float64
    taken = problem.bind(range(5), (3, 8, 6)).index_select([4, 2, 2])
    assert torch.equal(taken.simulate(x[[4, 2, 2]], seed=3), whole[[4, 2, 2]])
    assert not torch.equal(problem.simulate(x, seed=4), whole)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
def test_an_offset_moves_measurement_and_black_alike(sigma):
    dark, light = PoissonGaussian(0.02, sigma), PoissonGaussian(0.02, sigma, 0.25)
    clean = torch.rand(3, 1, 9, 9, generator=torch.manual_seed(0), dtype=torch.float64)
    y = dark.draw(clean, PerImageGenerator(0, range(3)))
    moved = light.draw(clean + 0.25, PerImageGenerator(0, range(3)))
    assert torch.allclose(moved, y + 0.25, atol=1e-12)
    assert torch.allclose(light.variance(clean + 0.25), dark.variance(clean))
    found = light.log_likelihood(clean + 0.25, moved)
    assert torch.allclose(found, dark.log_likelihood(clean, y), atol=1e-8)
    black = light.variance(torch.full((1,), 0.1, dtype=torch.float64))
    assert black.item() == pytest.approx(sigma**2)


def test_whitening_knows_the_offset():
    problem = Problem("identity", "poisson,gain=0.02,offset=0.25")
    moved = Problem("identity", "poisson,gain=0.02")
    x = torch.rand(2, 1, 12, 12, generator=torch.manual_seed(0), dtype=torch.float64)
    y = moved.simulate(x)
    found, expected = (rates(*pair) for pair in ((y + 0.25, problem), (y, moved)))
    assert torch.allclose(found, expected)
    weights = (a.operator.weights for _, a in (whiten(y + 0.25, problem), whiten(y, moved)))
    first, second = weights
    assert torch.allclose(first / first.mean(), second / second.mean())


# -- likelihoods ----------------------------------------------------------------------------------


def test_poisson_likelihood_is_that_of_the_counts_and_sums_to_one():
    noise, rates = PoissonGaussian(0.05), torch.tensor([0.01, 1.0, 30.0]).double()
    k = torch.arange(120).double()[:, None]
    found = noise.log_likelihood((0.05 * rates).expand(120, 3), (0.05 * k).expand(120, 3))
    expected = torch.distributions.Poisson(rates).log_prob(k)
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(found.exp().sum(0), torch.ones(3).double(), atol=1e-12)
    dark = noise.log_likelihood(torch.zeros(3), torch.tensor([0.0, 0.05, -0.05]))
    assert dark.tolist() == [0.0, -math.inf, -math.inf]


@pytest.mark.parametrize("rate", [0.0, 0.02, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("width", [0.05, 0.4, 1.0, 7.0, 90.0, 900.0])
def test_poisson_gaussian_likelihood_is_the_whole_sum(rate, width):
    """sigma / gain from far below one count to far above; y from probable to 12 sigma off."""
    gain = 0.01
    noise = PoissonGaussian(gain, width * gain)
    spread = gain * (rate + width**2) ** 0.5
    y = gain * rate + spread * torch.tensor([-12.0, -3.0, -0.4, 0.0, 1.0, 5.0, 12.0]).double()
    clean = torch.full_like(y, gain * rate)
    most = int(2 * rate + 20 * (rate + width**2) ** 0.5 + 60)
    expected = brute_force(noise, clean, y, most)
    assert torch.allclose(noise.log_likelihood(clean, y), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rate, width", [(0.4, 0.2), (5.0, 1.5), (60.0, 20.0)])
def test_poisson_gaussian_likelihood_integrates_to_one(rate, width):
    gain, edge = 0.02, 12 * (rate + width**2) ** 0.5
    y = gain * torch.linspace(-12 * width, rate + edge + 12, 4001, dtype=torch.float64)
    noise = PoissonGaussian(gain, width * gain)
    density = noise.log_likelihood(torch.full_like(y, gain * rate), y)
    assert abs(torch.trapezoid(density.exp(), y) - 1) < 1e-6


@pytest.mark.parametrize("noise", ["poisson,gain=0.1", "poisson-gaussian,gain=0.1,sigma=0.05"])
def test_likelihoods_gradient_is_that_of_finite_differences(noise):
    problem = Problem("blur:gaussian,sigma=0.6", noise)
    x = 0.2 + 0.6 * torch.rand(1, 1, 4, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    y = problem.simulate(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.log_likelihood(x, y).sum(), x)
    with torch.no_grad():
        step = 1e-5 * torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)
        many = y.expand(16, -1, -1, -1)
        ahead = problem.log_likelihood(x + step, many)
        behind = problem.log_likelihood(x - step, many)
    assert torch.allclose(gradient.flatten(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-4)


def test_a_gain_of_nothing_leaves_the_gaussian():
    """Many counts of little worth: no Poisson noise is left, in draws, likelihood and variance."""
    clean = torch.rand(2, 1, 40, 40, generator=torch.manual_seed(0), dtype=torch.float64)
    none = PoissonGaussian(1e-12).draw(clean, PerImageGenerator(0, range(2)))
    assert (none - clean).abs().max() < 6e-6  # 6 sqrt(gain)
    noise, gaussian = PoissonGaussian(1e-9, 0.1), Gaussian(0.1)
    y = gaussian.draw(clean, PerImageGenerator(1, range(2)))
    found, expected = noise.log_likelihood(clean, y), gaussian.log_likelihood(clean, y)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(noise.variance(clean), gaussian.variance(clean), rtol=1e-6)


def test_what_is_painted_into_a_hole_does_not_count():
    problem = Problem("inpaint:box,size=4", "poisson-gaussian,gain=0.1,sigma=0.05")
    x = torch.rand(2, 1, 8, 8, generator=torch.manual_seed(0))
    y = problem.simulate(x)
    assert y[..., 2:6, 2:6].abs().max() == 0
    painted = y.clone()
    painted[..., 2:6, 2:6] = float("nan")
    assert torch.equal(problem.log_likelihood(x, painted), problem.log_likelihood(x, y))


# -- text forms -----------------------------------------------------------------------------------

sizes = st.just(0.0) | st.floats(1e-6, 10)
offsets = st.floats(0, 10)
gains = st.floats(1e-12, 10)


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.builds(Gaussian, sizes), st.builds(PoissonGaussian, gains, sizes, offsets)))
def test_text_round_trip(noise):
    again = as_noise(noise.spec)
    assert again == noise and again.spec == noise.spec and hash(again) == hash(noise)
    assert as_noise(noise) is noise
    problem = Problem("identity", noise)
    assert Problem("identity", noise.spec) == problem
    assert eval(repr(problem), {"Problem": Problem}) == problem
    read = Problem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert read == problem and hash(read) == hash(problem)


@given(st.text(alphabet="gausinpo-,=0.1e ", max_size=20))
@settings(max_examples=50, deadline=None)
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        noise = as_noise(text)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert as_noise(noise.spec) == noise


def test_forms():
    assert as_noise("0.3") == as_noise(0.3) == as_noise("gaussian,sigma=0.3") == Gaussian(0.3)
    assert as_noise(" poisson , gain = 1e-2 ") == PoissonGaussian(0.01)
    assert as_noise("poisson-gaussian,sigma=1,gain=2") == PoissonGaussian(2, 1)
    assert PoissonGaussian(0.01).spec == "poisson,gain=0.01"
    assert PoissonGaussian(1, 2).spec == "poisson-gaussian,gain=1,sigma=2"
    assert as_noise("poisson,offset=0.5,gain=1") == PoissonGaussian(1, 0, 0.5)
    assert PoissonGaussian(1, 0, 0.5).spec == "poisson,gain=1,offset=0.5"
    assert PoissonGaussian(1, 2, 0.5).spec == "poisson-gaussian,gain=1,sigma=2,offset=0.5"
    assert Problem("identity", "0.3").to_dict() == {"operator": "identity", "noise": 0.3}
    assert Problem("identity", "poisson,gain=1").to_dict()["noise"] == "poisson,gain=1"
    assert Problem("identity", "poisson,gain=1") != Problem("identity", 1.0)


@pytest.mark.parametrize(
    "noise",
    [
        "much",
        "poisson",
        "poisson,gain",
        "poisson,gain=0",
        "poisson,gain=-1",
        "poisson,gain=nan",
        "poisson,gain=1,gain=2",
        "poisson,gain=1,sigma=2",
        "poisson-gaussian,gain=1",
        "gaussian,gain=1",
        "gaussian,sigma=wide",
        "-1",
        "",
        {"gain": 1},
    ],
)
def test_bad_noise_is_one_line(noise):
    with pytest.raises(InputError, match="noise must be|noise: (gain|sigma) must be") as caught:
        Problem("identity", noise)
    assert "\n" not in str(caught.value)


def test_what_takes_gaussian_noise_only_says_so():
    problem = Problem("identity", "poisson,gain=0.1")
    x = torch.zeros(1, 1, 2, 2)
    for call in (lambda: problem.sigma, lambda: problem.prox(x, x, 1.0)):
        with pytest.raises(InputError, match="'poisson,gain=0.1' is not Gaussian"):
            call()


# -- objects of deepinv ---------------------------------------------------------------------------


class Model:
    def __init__(self, **values):
        self.__dict__.update(values)


class Physics:
    def __init__(self, **values):
        self.noise_model = Model(**values)

    def A(self, x):
        return x


def test_poisson_noise_of_a_deepinv_object():
    both = Physics(gain=torch.tensor([0.1]), sigma=torch.tensor(0.25))
    assert Problem(both).noise == PoissonGaussian(torch.tensor(0.1).item(), 0.25)
    assert Problem(Physics(gain=0.1, normalize=True)).noise == PoissonGaussian(0.1)
    assert Problem(Physics(sigma=0.25)).noise == Gaussian(0.25)
    assert Problem(both, 0.1).noise == Gaussian(0.1)
    with pytest.raises(InputError, match="normalize=True"):
        Problem(Physics(gain=0.1, normalize=False))
    with pytest.raises(InputError, match="noise_model.gain varies"):
        Problem(Physics(gain=torch.tensor([0.1, 0.2])))


@pytest.mark.parametrize(
    "text", ["0.1", "poisson,gain=0.05", "poisson-gaussian,gain=0.05,sigma=0.02"]
)
def test_float64_in_float64_out(text):
    """The same draws in both types; densities of float64 images agree to twelve digits."""
    noise, c = as_noise(text), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    y = noise.draw(c, PerImageGenerator(0, range(2)))
    single = noise.draw(c.float(), PerImageGenerator(0, range(2)))
    assert y.dtype == torch.float64 and single.dtype == torch.float32
    found = noise.log_likelihood(c, y), noise.variance(c)
    assert {v.dtype for v in found} == {torch.float64}
    if text == "0.1":
        torch.testing.assert_close(y.float(), single)
        exact = torch.distributions.Normal(c, 0.1).log_prob(y)
        torch.testing.assert_close(found[0], exact, rtol=1e-12, atol=1e-12)


# -- noise of its own for every channel -----------------------------------------------------------

THREE = "per-channel:0.1:poisson-gaussian,gain=0.02,sigma=0.05:poisson,gain=0.01,offset=0.1"


def test_each_channel_has_the_noise_of_its_model():
    """Variance, likelihood and draws of a channel are those of its model; text round trip."""
    noise = as_noise(THREE)
    assert as_noise(noise.spec) == noise and Problem("identity", noise.spec).noise == noise
    clean = torch.full((4, 3, 60, 60), 0.4, dtype=torch.float64)
    y = Problem("identity", noise).simulate(clean, seed=1)
    found = noise.log_likelihood(clean, y)
    for i, model in enumerate(noise.models):
        variance = model.variance(clean[:, i])
        torch.testing.assert_close(noise.variance(clean)[:, i], variance)
        torch.testing.assert_close(found[:, i], model.log_likelihood(clean[:, i], y[:, i]))
        assert y[:, i].mean().item() == pytest.approx(
            0.4, abs=5 * (variance[0, 0, 0].item() / 14400) ** 0.5
        )
        assert y[:, i].var().item() == pytest.approx(variance[0, 0, 0].item(), rel=0.08)
    deviation = Problem("identity", noise).deviation(clean)
    torch.testing.assert_close(deviation.square(), noise.variance(clean))
    level = Problem("identity", noise).level
    assert level**2 == pytest.approx((0.01 + 0.0125 + 0.004) / 3)


def test_parts_of_channels_are_independent():
    """Means c, variances over p and 1 - p, no covariance: also of Gaussian channels."""
    noise, p = as_noise(THREE), 0.7
    clean = torch.full((8, 3, 60, 60), 0.4)
    y = Problem("identity", noise).simulate(clean)
    one, other = (part.double() - 0.4 for part in noise.split(y, p, torch.manual_seed(0)))
    variance = noise.variance(clean.double())[0, :, 0, 0]
    count = 8 * 60 * 60
    for part, share in ((one, p), (other, 1 - p)):
        found = part.movedim(1, 0).flatten(1)
        assert (found.mean(1).abs() < 5 * (variance / share / count) ** 0.5).all()
        torch.testing.assert_close(found.var(1), variance / share, rtol=0.08, atol=0)
    product = (one * other).movedim(1, 0).flatten(1)
    assert (product.mean(1).abs() < 5 * product.std(1) / count**0.5).all()


def test_whitening_of_channels_is_that_of_each():
    """Each channel alone, up to the one level of all."""
    noise = as_noise(THREE)
    x = 0.2 + 0.6 * torch.rand(2, 3, 12, 12, generator=torch.manual_seed(0), dtype=torch.float64)
    problem = Problem("identity", noise).bind(range(2), (3, 12, 12))
    y = problem.simulate(x)
    scaled, white = whiten(y, problem)
    for i, model in enumerate(noise.models):
        alone, its = whiten(y[:, i : i + 1], Problem("identity", model).bind([0, 1], (1, 12, 12)))
        torch.testing.assert_close(scaled[:, i : i + 1] / white.sigma, alone / its.sigma)
    with pytest.raises(InputError, match="3 channels, but the measurements have 1"):
        whiten(y[:, :1], problem.bind(range(2), (1, 12, 12)))


@pytest.mark.parametrize("p", [0.3, 0.86])
def test_both_splits_of_a_pair_of_photon_counts_have_independent_parts(p):
    """Mixed moments up to the third order vanish, as for independent numbers."""
    noise, c = PoissonGaussian(0.1), 0.4  # four counts
    y = 0.1 * torch.poisson(torch.full((200, 1000), 4.0), generator=generator(1))
    ones, others = noise.split(y, p, generator(0), pairs=True)
    assert len(ones) == len(others) == 400
    torch.testing.assert_close(p * ones + (1 - p) * others, torch.cat([y, y]))
    for one, other in zip(ones.split(200), others.split(200), strict=True):
        a, b = (one.double() - c).flatten(), (other.double() - c).flatten()
        assert a.var() == pytest.approx(float(noise.variance(torch.tensor(c))) / p, rel=0.02)
        assert b.var() == pytest.approx(float(noise.variance(torch.tensor(c))) / (1 - p), rel=0.02)
        for mixed in (a * b, a * a * b, a * b * b):
            assert abs(mixed.mean()) < 5 * mixed.std() / len(mixed) ** 0.5
    a, b = ones.split(200)
    apart = torch.corrcoef(torch.stack([a - y, b - y]).flatten(1))[0, 1]  # given y, opposite
    assert apart < -0.6


def test_pairs_of_gaussian_splits_are_opposite():
    y = torch.rand(3, 1, 8, 8)
    ones, others = Gaussian(0.2).split(y, 0.8, generator(0), pairs=True)
    for parts in (ones, others):
        torch.testing.assert_close(parts[:3] + parts[3:], 2 * y)
    once = Gaussian(0.2).split(y, 0.8, generator(0))
    assert torch.equal(once[0], ones[:3]) and torch.equal(once[1], others[:3])


@pytest.mark.parametrize(
    "form",
    [
        "0.1",
        "poisson,gain=0.02,offset=0.1",
        "per-channel:0.1:poisson-gaussian,gain=0.02,sigma=0.05",
    ],
)
def test_rescaled_noise_is_that_of_rescaled_measurements(form):
    """var(f y + s | f c + s) = f^2 var(y | c), for every brightness."""
    noise, factor, shift = as_noise(form), 0.3, 0.2
    clean = torch.linspace(0.2, 0.9, 32, dtype=torch.float64).view(1, 2, 4, 4)
    found = rescaled(noise, factor, shift).variance(factor * clean + shift)
    torch.testing.assert_close(found, factor**2 * noise.variance(clean))
