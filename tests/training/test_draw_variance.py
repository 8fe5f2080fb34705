"""Draws with the variance that the denoiser at the noise of y implies (5.6a)."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.training.test_learn import TINY, blobs
from unmurk.devices import network_precision
from unmurk.diffusion.prior import Prior
from unmurk.diffusion.samplers import posterior_draw
from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianPrior
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator, StreamId, generator
from unmurk.training import FlowDiff, Recipe, Settings, draw_variance, learn
from unmurk.training.checkpoint import Checkpoint, _add_draw_variance
from unmurk.training.draw_variance import IMAGES, decayed, match_variance, new_sums, scales, split

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


def test_variances_are_changed_by_a_factor_of_four_at_most():
    y = noise(1)
    for factor, expected in ((0.25, 0.25), (4.0, 4.0)):
        x = 0.5 * y + factor * 0.3 * math.sqrt(0.5) * noise(2)
        found, sums = matched(x, y, 0.3, lambda z, s: 0.5 * z)
        assert (found - 0.5 * y).var() / (0.3**2 * 0.5) == pytest.approx(expected, rel=0.03)
        assert scales(sums).unique().tolist() in ([0.5], [1.0, 2.0])


def test_each_class_of_pixels_has_its_own_scale():
    """Left and right halves have other gains, and draws that are too wide and too narrow.

    The classes of two columns beside the border are those of the other half.
    """
    gain = torch.full(SHAPE, 0.002)
    gain[..., 8:] = 0.5
    off = torch.where(gain < 0.1, 1.6, 0.6)
    sigma, y = 0.3, noise(1)
    x = gain * y + off * sigma * gain.sqrt() * noise(2)
    found, _ = matched(x, y, sigma, lambda z, s: gain * z)
    part = (found - gain * y) / (sigma * gain.sqrt())
    for inside in (slice(0, 5), slice(11, 16)):
        assert part[..., inside].std().item() == pytest.approx(1, abs=0.03)
    assert (part[..., 5:8].square().mean((0, 1, 2)) < 7.2).all()  # 1.6^2 / 0.6^2 = 7.1


def test_scales_are_interpolated_between_the_classes(monkeypatch):
    """A pixel at 3.25 on the scale of the classes; each class has its number as c."""
    monkeypatch.setattr(draw_variance, "scales", lambda sums: torch.arange(10.0).expand(2, 10))
    gain = (0.02 * 40 ** ((3.25 - 0.5) / 8)) ** 2
    y = noise(1, 4)
    change = 0.1 * noise(2, 4)
    found, _ = matched(gain * y + change, y, 0.3, lambda z, s: gain * z)
    torch.testing.assert_close(found - gain * y, 3.25 * change, rtol=1e-3, atol=1e-4)


def test_the_class_is_that_of_the_pixel_in_its_channel():
    gain = torch.tensor([0.05, 0.6]).view(2, 1, 1).expand(2, 16, 16)
    off = torch.tensor([1.6, 0.6]).view(2, 1, 1)
    sigma, y = 0.3, noise(1, shape=(2, 16, 16))
    x = gain * y + off * sigma * gain.sqrt() * noise(2, shape=(2, 16, 16))
    found, _ = matched(x, y, sigma, lambda z, s: gain * z)
    part = (found - gain * y) / (sigma * gain.sqrt())
    assert part.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.03)


def test_two_scales_come_closer_than_one():
    """Draws made of the coarse part of exact ones and half of the fine part.

    Their parts have 0.31 and 0.73 of the variance. One scale for both made it 0.72 and 1.69.
    """
    sigma, y = 0.3, noise(1)
    fine, coarse = split(sigma * math.sqrt(0.5) * noise(2))
    found, _ = matched(0.5 * y + coarse + 0.5 * fine, y, sigma, lambda z, s: 0.5 * z)
    inside = (..., slice(2, 14), slice(2, 14))
    after, wanted = split(found - 0.5 * y), torch.stack([fine, coarse])
    ratios = after[inside].square().mean((1, 2, 3, 4)) / wanted[inside].square().mean((1, 2, 3, 4))
    assert ratios.tolist() == pytest.approx([0.88, 1.28], abs=0.03)
    total = (found - 0.5 * y).square().mean() / (sigma**2 / 2)
    assert total.item() == pytest.approx(1, abs=0.06)


def test_the_parts_add_up_and_the_coarse_one_is_a_binomial_filter():
    x = noise(1, 3, (2, 7, 5))
    fine, coarse = split(x)
    torch.testing.assert_close(fine + coarse, x)
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    expected = (weights[:, None] * weights * x[1, 1, 2:5, 1:4]).sum()
    torch.testing.assert_close(coarse[1, 1, 3, 2], expected)
    torch.testing.assert_close(split(torch.ones(1, 1, 1, 1))[1], torch.ones(1, 1, 1, 1))


def matrices(side):
    """The matrices of both parts, (2, pixels, pixels)."""
    impulses = torch.eye(side * side).view(-1, 1, side, side)
    return split(impulses).flatten(2).mT


def test_a_nonlinear_denoiser_gives_its_jacobian():
    """D(y) = tanh(2 y) / 2 has J = 1 - tanh(2 y)^2; (B J B^T)_ii is the sum of B_ij^2 J_j."""
    sigma, y, told = 0.2, 0.5 * noise(1, 400), []

    def denoise(z, level):
        told.append(level)
        return torch.tanh(2 * z) / 2

    derivative = 1 - torch.tanh(2 * y) ** 2
    change = 0.7 * sigma * derivative.sqrt() * noise(2, 400)
    found, sums = matched(denoise(y, sigma) + change, y, sigma, denoise)
    for b, part, (images, t, s, *_) in zip(matrices(16), split(change), sums, strict=True):
        expected = sigma**2 * (derivative.flatten(1) @ b.square().T).sum()
        assert t.sum().item() == pytest.approx(expected.item(), rel=0.03)
        assert s.sum().item() == pytest.approx(part.square().sum().item(), rel=1e-5)
        assert images.max() == 400
    scaled = (found - denoise(y, sigma)).square().sum() / (sigma**2 * derivative.sum())
    assert scaled.item() == pytest.approx(1, abs=0.03)
    assert set(told) == {sigma}


def test_differences_have_the_expectation_of_the_derivative_to_second_order():
    """n (D(y + h n) - D(y)) / h for D = y^3 at 0.5, n = 1 or -1: 3 y^2 + h^2 on average."""
    y, sigma = torch.full((4000, 1, 8, 8), 0.5), 0.7
    streams = PerImageGenerator(0, range(4000))
    _, variances, around = draw_variance._moments(y, sigma, lambda z, s: z**3, streams)
    assert around.mean().item() == pytest.approx(sigma**2 * (0.75 + 0.07**2), rel=1e-3)
    shares, expected = variances.mean((1, 2, 3, 4)) / around.mean(), matrices(8).square()
    torch.testing.assert_close(shares, expected.sum((1, 2)) / 64, rtol=0.02, atol=0)
    own, others = variances[0] - variances[0].mean(), around - around.mean()
    assert abs((own * others).mean() / (own.std() * others.std())) < 0.01  # other probes


def test_the_class_of_a_deviation():
    """Classes begin at 0.02 sigma and end at 0.8 sigma; NaN is in the first."""
    sigma = 0.3
    deviation = sigma * torch.tensor([0.0, 0.02, 0.02 * 40 ** (1 / 8), 0.8, 5.0, math.nan])
    found = draw_variance._place(deviation.square(), sigma)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.5, 8.5, 9.0, 0.0]))


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
    used = scales(sums)[sums[:, 0] >= 250]
    assert len(used) >= 6 and (used - 1).abs().max() < 0.1


def test_classes_of_few_images_have_no_scale_of_their_own():
    """15 images are too few and 16 enough; other classes have the scale of the nearest one."""
    sigma, gain, ones = 0.3, 0.5, torch.ones(2, 10, dtype=torch.float64)
    for images in (15, 16):
        y = noise(1, images)
        x = gain * y + 0.6 * sigma * math.sqrt(gain) * noise(2, images)
        found, sums = matched(x, y, sigma, lambda z, s: gain * z)
        if images == 15:
            assert torch.equal(scales(sums), ones)
            torch.testing.assert_close(found, x)
    c = scales(sums)
    assert (c[:, 5:] > 1.4).all() and torch.equal(c[:, :5], ones[:, :5])
    assert torch.equal(c[:, 5:], c[:, -1:].expand(2, 5))
    assert torch.equal(scales(new_sums()), ones)


def test_classes_without_images_take_no_scale_that_is_not_trusted():
    """Where only faint classes are known and say 3, c is 1 in the others too."""
    y, gain = noise(1), 0.1**2
    x = gain * y + 0.3 * math.sqrt(gain / 3) * noise(2)
    _, sums = matched(x, y, 0.3, lambda z, s: gain * z)
    assert (sums[0, 1].sum() / sums[0, 2].sum()).item() == pytest.approx(3, rel=0.05)
    assert torch.equal(scales(sums), torch.ones(2, 10, dtype=torch.float64))


@pytest.mark.parametrize("place, number", [(3.25, 3), (3.75, 4)])
def test_a_pixel_counts_in_the_nearest_class(place, number):
    y, gain = noise(1, 20), (0.02 * 40 ** ((place - 0.5) / 8)) ** 2
    _, sums = matched(gain * y + 0.1 * noise(2, 20), y, 0.3, lambda z, s: gain * z)
    images = torch.zeros(2, 10, dtype=torch.float64)
    images[:, number] = 20
    assert torch.equal(sums[:, 0], images)


def test_draws_without_any_deviation_stay():
    y = noise(1, 20)
    found, sums = matched(0.5 * y, y, 0.3, lambda z, s: 0.5 * z)
    torch.testing.assert_close(found, 0.5 * y)
    assert torch.equal(scales(sums), torch.ones(2, 10, dtype=torch.float64))


def test_draws_of_faint_pixels_are_never_made_wider():
    """Below 0.1 sigma: a denoiser that still lets noise through has the derivative of it."""
    y = noise(1)
    for gain, expected in ((0.1**2, 0.25), (0.25**2, 1.0)):
        x = gain * y + 0.5 * 0.3 * math.sqrt(gain) * noise(2)
        found, _ = matched(x, y, 0.3, lambda z, s, gain=gain: gain * z)
        ratio = (found - gain * y).var() / (0.3**2 * gain)
        assert ratio.item() == pytest.approx(expected, rel=0.05)


def simulated(images):
    """t and s of single images, (images, 400 repetitions); the ratio is 1.3."""
    g = generator(4)
    s = torch.rand(images, 400, generator=g).double() + 0.5
    return 1.3 * s + 0.8 * torch.randn(images, 400, generator=g).double(), s


def parts(t, s):
    """Sums in the shape of those of the module, with ten equal classes."""
    sums = torch.stack([torch.ones_like(s), t, s, t * t, t * s, s * s]).sum(1)
    return sums.T[:, :, None].expand(-1, -1, 10)


def test_the_standard_error_of_the_ratio_shrinks_it():
    """Against the textbook's formula over images, and against the spread of repeated estimates."""
    t, s = simulated(40)
    ratio = t.sum(0) / s.sum(0)
    error = (t - ratio * s).square().sum(0) / s.sum(0) ** 2 * 40 / 39
    assert error.mean().item() == pytest.approx(ratio.var().item(), rel=0.15)
    far = (ratio - 1) ** 2
    expected = (1 + far / (far + error) * (ratio - 1)).clamp(0.25, 4).sqrt()
    torch.testing.assert_close(scales(parts(t, s))[:, -1], expected)


def test_the_standard_error_after_many_images_is_that_of_the_weighted_ratio():
    t, s = simulated(64 * 40)
    sums = torch.zeros(400, 6, 10, dtype=torch.float64)
    for t_part, s_part in zip(t.split(64), s.split(64), strict=True):
        sums = decayed(sums, 640) + parts(t_part, s_part)
    images, total_t, total, tt, ts, ss = sums[:, :, 0].T
    ratio = total_t / total
    error = (tt - 2 * ratio * ts + ratio**2 * ss) / total**2
    assert images[0].item() == pytest.approx(256, rel=0.01)  # 64 / (1 - 0.75)
    assert error.mean().item() == pytest.approx(ratio.var().item(), rel=0.15)


def test_scales_are_bounded():
    def c(t, s):
        row = torch.tensor([100.0, t, s, t * t / 100, t * s / 100, s * s / 100]).double()
        return scales(row[None, :, None].expand(2, 6, 10))[:, -1].tolist()

    assert c(1.0, 100.0) == [0.5, 0.5] and c(100.0, 1.0) == [2.0, 2.0]
    assert c(-5.0, 1.0) == [0.5, 0.5]


def test_old_images_are_forgotten():
    """The sums are those of some 2,560 images at most, and the given ones do not change."""
    y = noise(1)
    x, sums, seen = 0.5 * y + 0.2 * noise(2), new_sums(), []
    for _ in range(60):
        before = sums.clone()
        _, after = matched(x, y, 0.3, lambda z, s: 0.5 * z, sums)
        assert torch.equal(before, sums)
        sums = after
        seen.append(sums[0, 0].max().item())
    assert all(a < b for a, b in pairwise(seen))
    assert seen[0] == 256 and seen[-1] == pytest.approx(IMAGES, rel=0.01)


def test_more_images_at_once_than_are_remembered():
    y = noise(1, 3000, (1, 4, 4))
    sums = new_sums()
    for _ in range(2):
        _, sums = matched(0.5 * y + 0.2 * noise(2, 3000, (1, 4, 4)), y, 0.3, sine, sums)
    assert 1000 < sums[0, 0].max() <= 3000 and (sums[:, [2, 5]] >= 0).all()
    assert not decayed(sums, 3000).any()


def sine(z, level):
    return torch.sin(z) / 2


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_what_is_not_finite_is_lost_at_once(call):
    """One value of one evaluation: the draws are NaN, and the sums the given ones."""
    y, calls = noise(1, 32), []

    def denoise(z, level):
        found = sine(z, level).clone()
        if len(calls) // 2 == call:  # two halves
            found[0, 0, 3, 4] = math.inf
        calls.append(0)
        return found

    sums = new_sums() + 3
    found, after = matched(0.5 * y + 0.2 * noise(2, 32), y, 0.3, denoise, sums)
    assert found.isnan().all() and torch.equal(after, sums)


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
        fresh = PerImageGenerator(learner.seed, range(8), StreamId.FLOWDIFF_E_STEP)
        used = [fresh.randn(*y.shape[1:]) for _ in range(20)]
        n = streams.randn(*y.shape[1:])  # not the noise of the draw again
        assert not any(torch.equal(n, other) for other in used[:15])
        return x + 1, sums + 2

    monkeypatch.setattr("unmurk.training.flowdiff.match_variance", match)
    learner.draw_posterior(8, cpu)
    x, y, sigma, denoise = told[0]
    assert sigma == pytest.approx(0.2) and denoise == learner.teacher.denoise
    assert torch.equal(y, learner.y[:8])
    held = learner.replay.tensors["images"][:8]
    assert torch.equal(held, (x + 1).half())
    assert (learner.buffers["draw variance"] == 2).all()
    learner.lengthen(0.9)
    assert (learner.buffers["draw variance"] == 2).all()
    learner.lengthen(0.1)
    assert not learner.buffers["draw variance"].any()


def test_a_prior_that_starts_afresh_begins_with_no_sums():
    learner = build(recipe=Recipe(reset=0.9))
    trainer = SimpleNamespace(
        settings=Settings(batch=8), steps=100, device=torch.device("cpu"), reset=lambda *_: None
    )
    for step, left in ((89, True), (90, False)):
        learner.before(trainer, step, step / 100)
        assert bool(learner.buffers["draw variance"].any()) == left


def test_a_lost_draw_leaves_the_sums_as_they_were(monkeypatch):
    learner, cpu = build(), torch.device("cpu")
    learner.draw_posterior(16, cpu)
    before = learner.buffers["draw variance"].clone()
    assert before[0, 0].max() == 16
    monkeypatch.setattr(learner.teacher, "restore", lambda y, *_: torch.full_like(y, torch.nan))
    with pytest.raises(InputError, match="not finite"):
        learner.draw_posterior(16, cpu)
    assert torch.equal(learner.buffers["draw variance"], before)


def test_evaluations_count_those_of_the_variance():
    plain = build(recipe=Recipe(r2r_later=0.0)).evaluations(0.0, 10_000)
    assert build().evaluations(0.0, 10_000) == pytest.approx(plain * (16 + 4) / 16)


def test_the_sums_added_to_a_state_are_zeros_of_their_own():
    own, found = {"draw variance": new_sums() + 1}, {}
    _add_draw_variance(found, own)
    found["draw variance"] += 5
    assert torch.equal(found["draw variance"], new_sums() + 5)
    assert torch.equal(own["draw variance"], new_sums() + 1)


def test_a_state_without_the_sums_is_read(tmp_path):
    """States of versions before this one lack them; they begin with those of no images."""
    problem = Problem("identity", 0.2)
    kind = {"quiet": True, "settings": TINY, "recipe": Recipe(r2r=0.2, e_step=0.4, flow=0.8)}
    y = problem.simulate(blobs())
    learn(y, problem, out=tmp_path, **kind)
    file = tmp_path / "state" / "latest.pt"
    state = torch.load(file, weights_only=True)
    assert state["buffers"].pop("draw variance")[0].max() > 0
    torch.save(state, file)
    learner = FlowDiff(recipe=kind["recipe"]).build(y, problem, tuple(y.shape[1:]))
    learner.buffers["draw variance"] += 1
    found = Checkpoint(tmp_path).parse(file.read_bytes(), kept(learner, state), state["steps"])
    assert torch.equal(found["buffers"]["draw variance"], new_sums())
    learn(y, problem, out=tmp_path, **kind)


def kept(learner, state):
    """The state that a run of this learner would write."""
    return state | {"buffers": learner.buffers}
