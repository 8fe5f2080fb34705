"""Draws with the variance that the denoiser at the noise of y implies (5.6a)."""

import math
from itertools import pairwise

import pytest
import torch

from tests.training.test_learn import TINY, blobs
from unmurk.devices import network_precision
from unmurk.diffusion.prior import Prior
from unmurk.diffusion.samplers import posterior_draw
from unmurk.evaluation.exact import GaussianPrior
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, generator
from unmurk.training import FlowDiff, Recipe, draw_variance, learn
from unmurk.training.draw_variance import IMAGES, match_variance, new_sums, scales

SHAPE = (1, 16, 16)


def noise(seed, images=256, shape=SHAPE):
    return torch.randn(images, *shape, generator=generator(seed))


def matched(x, y, sigma, denoise, sums=None, seed=9):
    streams = PerImageGenerator(seed, range(len(x)))
    return match_variance(x, y, sigma, denoise, streams, new_sums() if sums is None else sums)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.5])
def test_a_gaussian_is_right_at_once(factor):
    """g = v / (v + s^2): draws around g y of the wrong variance; g^2 (v + s^2) + s^2 g = v."""
    v, sigma = 0.25, 0.4
    y = math.sqrt(v) * noise(1) + sigma * noise(2)
    prior = GaussianPrior(torch.zeros(SHAPE), torch.full(SHAPE, v))
    streams = PerImageGenerator(3, range(len(y)))
    mean = prior.denoise(y, sigma)
    x = mean + factor * (posterior_draw(prior.denoise, y, sigma, streams) - mean)
    found, _ = matched(x, y, sigma, prior.denoise)
    exact = v * sigma**2 / (v + sigma**2)
    assert (x - mean).var().item() == pytest.approx(factor**2 * exact, rel=0.03)
    assert (found - mean).var().item() == pytest.approx(exact, rel=0.02)
    assert found.var().item() == pytest.approx(v, rel=0.02)


def test_each_class_of_pixels_has_its_own_scale():
    """Left and right halves have other gains, and draws that are too narrow and too wide."""
    gain = torch.full(SHAPE, 0.002)
    gain[..., 8:] = 0.5
    off = torch.where(gain < 0.1, 1.6, 0.6)
    sigma, y = 0.3, noise(1)
    x = gain * y + off * sigma * gain.sqrt() * noise(2)
    found, _ = matched(x, y, sigma, lambda z, s: gain * z)
    part = (found - gain * y) / (sigma * gain.sqrt())
    for inside in (slice(0, 6), slice(10, 16)):  # squares of the class that lie in one half
        assert part[..., inside].std().item() == pytest.approx(1, abs=0.03)


def test_a_nonlinear_denoiser_gives_its_jacobian():
    """D(y) = tanh(2 y) / 2 has the derivative 1 - tanh(2 y)^2; its levels are those of y."""
    sigma, y, told = 0.2, 0.5 * noise(1, 400), []

    def denoise(z, level):
        told.append(level)
        return torch.tanh(2 * z) / 2

    derivative = 1 - torch.tanh(2 * y) ** 2
    x = denoise(y, sigma) + 0.7 * sigma * derivative.sqrt() * noise(2, 400)
    found, sums = matched(x, y, sigma, denoise)
    images, t, s, *_ = sums
    ratio = sigma**2 * derivative.sum() / (x - denoise(y, sigma)).square().sum()
    assert (t.sum() / s.sum()).item() == pytest.approx(ratio.item(), rel=0.02)
    assert s.sum().item() == pytest.approx((x - denoise(y, sigma)).square().sum().item(), rel=1e-5)
    assert images.max() == 400
    scaled = (found - denoise(y, sigma)).square().sum() / (sigma**2 * derivative.sum())
    assert scaled.item() == pytest.approx(1, abs=0.03)
    assert set(told) == {sigma}


def test_differences_have_the_expectation_of_the_derivative_to_second_order():
    """E[n D(y + h n)] / h for D = y^3 at 0.5: 3 y^2 + 3 h^2, so 2 % more at h = 0.1 s."""
    y, sigma = torch.full((4000, 1, 8, 8), 0.5), 0.7
    streams = PerImageGenerator(0, range(4000))
    _, variance, around = draw_variance._moments(y, sigma, lambda z, s: z**3, streams)
    expected = sigma**2 * (3 * 0.25 + 3 * (draw_variance.STEP * sigma) ** 2)
    assert variance.mean().item() == pytest.approx(expected, rel=0.01)
    assert around.mean().item() == pytest.approx(expected, rel=0.01)
    own, others = variance - variance.mean(), around - around.mean()
    assert abs((own * others).mean() / (own.std() * others.std())) < 0.01  # other probes


@pytest.mark.parametrize("k", [0.01, 100.0])
def test_units_of_intensity_do_not_matter(k):
    sigma, y = 0.3, noise(1)
    x = 0.5 * y + 0.1 * noise(2)
    one, _ = matched(x, y, sigma, lambda z, s: torch.sin(z) / 2)
    other, _ = matched(k * x, k * y, k * sigma, lambda z, s: k * torch.sin(z / k) / 2)
    torch.testing.assert_close(other / k, one, rtol=1e-4, atol=1e-5)


def test_exact_correlated_draws_stay_as_they_are():
    """A smooth Gaussian: c is near 1, kurtosis and energy of the gradient are kept."""
    sigma, size = 0.3, 32
    k = torch.fft.fftfreq(size)
    power = 20 * torch.exp(-120 * (k[:, None] ** 2 + k[None] ** 2)) + 1e-4

    def filtered(x, factor):
        return torch.fft.ifft2(torch.fft.fft2(x) * factor).real

    def denoise(z, level):
        return filtered(z, power / (power + level**2))

    def energy(x):
        return (x[..., 1:] - x[..., :-1]).square().mean()

    y = filtered(noise(1, 256, (1, size, size)), power.sqrt())
    y = y + sigma * noise(2, 256, (1, size, size))
    rest = (power * sigma**2 / (power + sigma**2)).sqrt()
    draws = denoise(y, sigma) + filtered(noise(3, 256, (1, size, size)), rest)
    found, sums = matched(draws, y, sigma, denoise)
    before, after = draws - denoise(y, sigma), found - denoise(y, sigma)
    assert (after.var() / before.var()).item() == pytest.approx(1, abs=0.02)
    assert (energy(after) / energy(before)).item() == pytest.approx(1, abs=0.02)
    kurtosis = [(e**4).mean() / (e**2).mean() ** 2 for e in (before, after)]
    assert kurtosis[0].item() == pytest.approx(3, abs=0.05)
    assert kurtosis[1].item() == pytest.approx(3, abs=0.07)
    used = scales(sums)[sums[0] >= 250]
    assert len(used) and (used - 1).abs().max() < 0.03


def test_a_class_of_few_images_has_no_scale():
    sigma, gain = 0.3, 0.5
    y = noise(1, 15)
    x = gain * y + 0.5 * sigma * math.sqrt(gain) * noise(2, 15)
    found, sums = matched(x, y, sigma, lambda z, s: gain * z)
    assert torch.equal(scales(sums), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(found, x)
    assert torch.equal(scales(new_sums()), torch.ones(10, dtype=torch.float64))


def test_the_standard_error_of_the_ratio_shrinks_it():
    """Against the textbook's formula over images, and against the spread of repeated estimates."""
    g = generator(4)
    s = torch.rand(500, 40, generator=g).double() + 0.5
    t = 1.3 * s + 0.8 * torch.randn(500, 40, generator=g).double()
    parts = torch.stack([torch.ones_like(s), t, s, t * t, t * s, s * s]).sum(2)
    ratio = t.sum(1) / s.sum(1)
    error = (t - ratio[:, None] * s).square().sum(1) / s.sum(1) ** 2 * 40 / 39
    assert error.mean().item() == pytest.approx(ratio.var().item(), rel=0.1)
    far = (ratio - 1) ** 2
    expected = (1 + far / (far + error) * (ratio - 1)).sqrt()
    torch.testing.assert_close(scales(parts), expected)


def test_scales_are_bounded():
    sums = torch.tensor([[100.0], [1.0], [100.0], [0.01], [1.0], [100.0]]).double()
    assert scales(sums).item() == 0.5
    sums[1], sums[2] = 100.0, 1.0
    sums[3], sums[5] = 100.0, 0.01
    assert scales(sums).item() == 2.0


def test_old_images_are_forgotten():
    """The sums are those of some 2,560 images at most, and the given ones do not change."""
    y = noise(1)
    x, sums, seen = 0.5 * y + 0.2 * noise(2), new_sums(), []
    for _ in range(60):
        before = sums.clone()
        _, after = matched(x, y, 0.3, lambda z, s: 0.5 * z, sums)
        assert torch.equal(before, sums)
        sums = after
        seen.append(sums[0].max().item())
    assert all(a < b for a, b in pairwise(seen))
    assert seen[0] == 256 and seen[-1] == pytest.approx(IMAGES, rel=0.01)


def test_differences_are_taken_in_float32_also_in_a_run_in_bfloat16():
    torch.manual_seed(0)
    prior, y = Prior.create("tiny", SHAPE), 0.5 + 0.3 * noise(1, 32)
    x = prior.denoise(y, 0.3) + 0.1 * noise(2, 32)
    one = matched(x, y, 0.3, prior.denoise)
    with network_precision(torch.bfloat16):
        other = matched(x, y, 0.3, prior.denoise)
        assert not torch.equal(prior.denoise(y, 0.3), prior.denoise(y.double(), 0.3).float())
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def build(problem=None, y=None, **options):
    problem = problem or Problem("identity", 0.2)
    y = problem.simulate(blobs()[:64]) if y is None else y
    shape = tuple(blobs().shape[1:])
    repeats = options.pop("repeats", 1)
    return FlowDiff(**options).build(y, problem, shape, repeats=repeats)


def test_it_is_for_single_captures_with_gaussian_noise_and_r2r_to_the_end():
    name = "draw variance"
    assert name in build().buffers
    assert name not in build(recipe=Recipe(r2r_later=0.0)).buffers
    assert name not in build(objective="elbo").buffers
    assert name not in build(Problem("inpaint:random,keep=0.5", 0.2)).buffers
    assert name not in build(Problem("identity", "poisson-gaussian,gain=0.01,sigma=0.02")).buffers
    y = torch.rand(8, 2, *blobs().shape[1:])
    assert name not in build(y=y, repeats=2).buffers


def test_draws_of_a_run_are_matched_and_the_sums_kept(monkeypatch):
    learner, cpu = build(), torch.device("cpu")
    told = []

    def match(x, y, sigma, denoise, streams, sums):
        told.append((x.clone(), y, sigma, denoise))
        return x + 1, sums + 2

    monkeypatch.setattr("unmurk.training.flowdiff.match_variance", match)
    learner.draw_posterior(8, cpu)
    x, y, sigma, denoise = told[0]
    assert sigma == pytest.approx(0.2) and denoise == learner.teacher.denoise
    assert torch.equal(y, learner.y[:8])
    held = learner.replay.tensors["images"][:8]
    assert torch.equal(held, (x + 1).half())
    assert (learner.buffers["draw variance"] == 2).all()
    learner.lengthen(0.1)
    assert not learner.buffers["draw variance"].any()


def test_a_lost_draw_leaves_the_sums_as_they_were(monkeypatch):
    learner, cpu = build(), torch.device("cpu")
    learner.draw_posterior(16, cpu)
    before = learner.buffers["draw variance"].clone()
    assert before[0].max() == 16
    monkeypatch.setattr(learner.teacher, "restore", lambda y, *_: torch.full_like(y, torch.nan))
    with pytest.raises(Exception, match="not finite|diverged"):
        learner.draw_posterior(16, cpu)
    assert torch.equal(learner.buffers["draw variance"], before)


def test_evaluations_count_those_of_the_variance():
    plain = build(recipe=Recipe(r2r_later=0.0)).evaluations(0.0, 10_000)
    assert build().evaluations(0.0, 10_000) == pytest.approx(plain * (16 + 4) / 16)


def test_a_state_without_the_sums_is_continued(tmp_path, monkeypatch):
    """States of versions before this one lack them; they begin with those of no images."""
    problem = Problem("identity", 0.2)
    kind = {"quiet": True, "settings": TINY, "recipe": Recipe(r2r=0.2, e_step=0.4, flow=0.8)}
    y = problem.simulate(blobs())
    learn(y, problem, out=tmp_path, **kind)
    file = tmp_path / "state" / "latest.pt"
    state = torch.load(file, weights_only=True)
    assert state["buffers"].pop("draw variance")[0].max() > 0
    torch.save(state, file)
    learn(y, problem, out=tmp_path, **kind)
