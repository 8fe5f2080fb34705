"""Draws by the derivative of the denoiser (5.6a), and what a run does with them."""

import math

import pytest
import torch
from torch import nn

from tests.training.test_learn import GaussianPrior, descend
from unmurk.devices import network_precision
from unmurk.diffusion.prior import Prior
from unmurk.problem import Problem
from unmurk.repeats import grouped
from unmurk.rng import generator
from unmurk.solvers import Draws
from unmurk.training import FlowDiff, Recipe, flowdiff
from unmurk.training.linearized import linearized_draw
from unmurk.training.losses import denoising

SHAPE = (1, 4, 4)
SIGMA = 0.2


class Filter(nn.Module):
    """A network that is one convolution, blind to the time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# -- the draw ------------------------------------------------------------------------------------


def test_a_linear_denoiser_gives_its_matrix_times_the_noise():
    """x = b + W (y + sigma n), where D = b + W y, also for a W that is not symmetric."""
    w, b = normal(16, 16) / 4, normal(16, seed=1)
    y, n = normal(50, *SHAPE, seed=2), normal(50, *SHAPE, seed=3)
    told = []

    def denoise(y, sigma):
        told.append(sigma)
        return (b + y.flatten(1) @ w.T).view_as(y)

    x, mean = linearized_draw(y, SIGMA, denoise, generator(3))
    assert torch.equal(mean, denoise(y, SIGMA)) and told == [SIGMA] * 3
    torch.testing.assert_close(x, denoise(y + SIGMA * n, SIGMA), atol=2e-5, rtol=0)


def test_its_moments_are_those_of_the_linearized_denoiser():
    """Given y the mean is D and the covariance sigma^2 J J^T."""
    w = normal(16, 16) / 4
    y = normal(1, *SHAPE, seed=1).expand(100_000, *SHAPE)
    x, mean = linearized_draw(
        y, SIGMA, lambda y, sigma: (y.flatten(1) @ w.T).view_as(y), generator(2)
    )
    change = (x - mean).flatten(1)
    assert change.mean(0).abs().max() < 5 * SIGMA * 2 / 100_000**0.5
    found, wanted = change.T @ change / len(y), SIGMA**2 * w @ w.T
    assert (found - wanted).abs().max() < 0.02 * wanted.diagonal().max()


@pytest.mark.parametrize("variance", [0.005, 0.04, 1.0])
def test_what_posterior_means_lack_of_the_variance_is_squared(variance):
    """x ~ N(0, v) and the exact D: Var x = v (1 - (1 - g)^2), Var D = v (1 - (1 - g))."""
    gain = variance / (variance + SIGMA**2)
    clean = variance**0.5 * normal(400_000, 1, 1, 1)
    y = clean + SIGMA * normal(400_000, 1, 1, 1, seed=1)
    x, mean = linearized_draw(y, SIGMA, lambda y, sigma: gain * y, generator(2))
    assert mean.var().item() == pytest.approx(variance * gain, rel=0.01)
    assert x.var().item() == pytest.approx(variance * (1 - (1 - gain) ** 2), rel=0.01)


def test_the_derivative_is_that_of_a_curved_denoiser():
    """D = tanh(y + y^3 / 4) with sums over neighbors, against autograd."""
    y, n = normal(20, *SHAPE, seed=1).double(), normal(20, *SHAPE, seed=2).double()

    def denoise(y, sigma=None):
        return torch.tanh((y + y.roll(1, -1)) + y**3 / 4)

    sigma = 1e-4  # the quotient is exact up to the first order in h
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmurk.training.linearized.gaussian", lambda *_: n)
        x, mean = linearized_draw(y, sigma, denoise, generator(2))
    _, wanted = torch.autograd.functional.jvp(denoise, y, n)
    torch.testing.assert_close((x - mean) / sigma, wanted, atol=1e-3, rtol=1e-3)
    assert (wanted - 0.5 * wanted).abs().mean() > 0.2  # the tolerance tells half of it apart


def test_noise_is_fresh_and_comes_from_the_generator_alone():
    y, noise = normal(2, *SHAPE), generator(1)
    first, second = (linearized_draw(y, SIGMA, lambda y, _: y, noise)[0] for _ in range(2))
    again = linearized_draw(y, SIGMA, lambda y, _: y, generator(1))[0]
    assert torch.equal(first, again) and not torch.equal(first, second)
    torch.testing.assert_close(first, y + SIGMA * normal(2, *SHAPE, seed=1))


def test_it_is_float32_in_a_run_in_bfloat16_and_has_no_gradient():
    """The difference of two values in bfloat16 would be rounding."""
    torch.manual_seed(0)
    prior = Prior.create(Filter(), SHAPE)
    y = normal(8, *SHAPE)
    plain = linearized_draw(y, SIGMA, prior.denoise, generator(1))
    with network_precision(torch.bfloat16):
        lower = linearized_draw(y, SIGMA, prior.denoise, generator(1))
        assert not torch.equal(
            prior.denoise(y, SIGMA), plain[1]
        )  # the network is in bfloat16 here
    assert all(torch.equal(a, b) for a, b in zip(plain, lower, strict=True))
    assert not any(value.requires_grad for value in plain)


def test_turned_and_mirrored_images_have_turned_and_mirrored_draws():
    """If the denoiser commutes with a change of the image, so does the draw."""
    y, n = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)

    def denoise(y, sigma):
        return torch.tanh(nn.functional.avg_pool2d(y, 3, 1, 1))

    plain, _ = linearized_draw(y, SIGMA, denoise, generator(1))
    for change in (lambda z: z.rot90(1, (2, 3)), lambda z: z.flip(3)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "unmurk.training.linearized.gaussian", lambda y, _, change=change: change(n)
            )
            moved, _ = linearized_draw(change(y), SIGMA, denoise, generator(9))
        torch.testing.assert_close(moved, change(plain))


def test_a_prior_fitted_to_the_draws_has_their_variance():
    """Score matching on draws of N(0, 1) in noise 1/2 ends at 1 - (1 - g)^2 = 0.96, g = 0.8."""
    prior = GaussianPrior()

    def loss(_, y, noise):
        x, _ = linearized_draw(y, 0.5, lambda y, sigma: 0.8 * y, noise)
        return denoising(prior, x, torch.full((len(y),), 0.3), noise)

    descend(loss, [prior])
    assert prior.variance.item() == pytest.approx(0.96, abs=0.02)


# -- the run -------------------------------------------------------------------------------------

RECIPE = Recipe(r2r=0.2, e_step=0.5, flow=0.8, r2r_later=0.25, clean=0.25)
PROBLEM = Problem("identity", SIGMA)


def built(recipe=RECIPE, clean=None, repeats=1):
    y = torch.rand(16 * repeats, 1, 8, 8, generator=generator(5))
    learner = FlowDiff(recipe=recipe).build(y, PROBLEM, (1, 8, 8), repeats=repeats, clean=clean)
    return learner, y if repeats == 1 else grouped(y, repeats)


@pytest.fixture
def spied(monkeypatch):
    """What the losses of a step are given, by the name of the loss; they return zero."""
    told = {}

    def spy(name):
        def loss(*given):
            told[name] = given
            return torch.zeros(())

        return loss

    for name in ("ambient_matching", "denoising", "distilled"):
        monkeypatch.setattr(flowdiff, name, spy(name))
    monkeypatch.setattr(flowdiff, "supervised", spy("supervised"))
    monkeypatch.setattr(flowdiff, "forward_kl", lambda *given: (spy("flow")(*given), None))

    def draw(y, sigma, denoise, noise):
        told["draw"] = y, sigma, denoise
        return y + 100, y + 10

    monkeypatch.setattr(flowdiff, "linearized_draw", draw)
    return told


def marked(y, add):
    return y + torch.tensor(float(add))


@pytest.mark.parametrize("progress", [0.3, 0.5, 0.6, 0.9])
def test_of_a_batch_the_prior_learns_from_new_draws(spied, progress):
    """Below the noise at first, with the means as the ambient target above; then everywhere. The
    flow learns from the draws of the whole batch, m from the means, R2R from its part alone."""
    learner, y = built()
    losses = learner.losses(y, torch.arange(16), progress, generator(1))
    given, sigma, denoise = spied["draw"]
    flow = progress >= RECIPE.flow
    assert sigma == pytest.approx(SIGMA) and denoise == learner.teacher.denoise
    assert torch.equal(given, y if flow else y[4:])
    if progress < RECIPE.e_step:
        network, x, noisy, level, levels, _, target = spied["ambient_matching"]
        assert torch.equal(noisy, y[4:]) and torch.equal(target, marked(y[4:], 10))
        assert level == pytest.approx(SIGMA) and len(levels) == 12
    else:
        network, x, levels, _ = spied["denoising"]
        assert len(levels) == 12 and "ambient_matching" not in spied
    assert network is learner.prior  # and not its average
    assert torch.equal(x, marked(y[4:], 100))
    assert spied["distilled"][0] is learner.posterior
    assert torch.equal(spied["distilled"][1], y[4:])
    assert torch.equal(spied["distilled"][3], marked(y[4:], 10))
    assert ("flow" in losses) == flow
    if flow:
        assert spied["flow"][0] is learner.posterior
        assert torch.equal(spied["flow"][1], marked(y, 100))


@pytest.mark.parametrize("progress", [0.6, 0.9])
def test_clean_images_are_the_last_part_of_the_draws(spied, progress):
    clean = torch.rand(5, 1, 8, 8) - 5
    learner, y = built(clean=clean)
    learner.losses(y, torch.arange(16), progress, generator(1))
    assert torch.equal(spied["draw"][0], y[:12] if progress == 0.9 else y[4:12])
    network, x, levels, _ = spied["denoising"]
    assert network is learner.prior
    posterior, known, *_ = spied["supervised"]  # m learns from them too
    assert posterior is learner.posterior and torch.equal(known, x[-4:])
    assert torch.equal(x[:-4], marked(y[4:12], 100)) and len(levels) == len(x) == 12
    assert all(any(torch.equal(one, image) for image in clean) for one in x[-4:])
    assert torch.equal(spied["distilled"][3], marked(y[4:12], 10))
    if progress == 0.9:
        assert torch.equal(spied["flow"][1][:12], marked(y[:12], 100))
        assert torch.equal(spied["flow"][1][12:], x[-4:])


def test_clean_images_before_the_e_step(spied):
    clean = torch.rand(5, 1, 8, 8) - 5
    learner, y = built(clean=clean)
    learner.losses(y, torch.arange(16), 0.3, generator(1))
    _, x, noisy, _, low, _, target = spied["ambient_matching"]
    assert torch.equal(x, marked(y[4:12], 100)) and torch.equal(target, marked(y[4:12], 10))
    assert torch.equal(noisy, y[4:12]) and len(low) == 8
    assert spied["denoising"][0] is learner.prior
    assert len(spied["denoising"][1]) == 4 and (spied["denoising"][1] < -3).all()


@pytest.mark.parametrize("target", ["mean", "image", "none"])
def test_the_target_above_the_noise(spied, target):
    recipe = Recipe(**vars(RECIPE) | {"ambient_target": target})
    learner, y = built(recipe)
    learner.losses(y, torch.arange(16), 0.3, generator(1))
    if target == "none":  # posterior means at all levels, and no draw
        with torch.no_grad():
            mean = learner.teacher.denoise(y[4:], SIGMA)
        torch.testing.assert_close(spied["denoising"][1], mean)
        assert not spied["denoising"][1].requires_grad
        assert "ambient_matching" not in spied and "draw" not in spied
        return
    _, x, _, _, _, _, wanted = spied["ambient_matching"]
    assert torch.equal(x, marked(y[4:], 100))
    assert wanted is None if target == "image" else torch.equal(wanted, marked(y[4:], 10))


@pytest.mark.parametrize("progress", [0.3, 0.6, 0.9])
def test_draws_are_those_given_all_captures(spied, monkeypatch, progress):
    """The draw is around the posterior mean of all captures; m has that of the picked ones."""
    learner, y = built(repeats=3)
    monkeypatch.setattr(learner, "pick_captures", lambda noise: [1])
    monkeypatch.setattr(learner.teacher, "denoise", lambda y, sigma: y - sigma)
    learner.losses(y, torch.arange(16), progress, generator(1))
    joint, flow = y.mean(1), progress >= RECIPE.flow
    given, sigma, _ = spied["draw"]
    torch.testing.assert_close(given, joint if flow else joint[4:])
    assert sigma == pytest.approx(SIGMA / math.sqrt(3))
    torch.testing.assert_close(spied["distilled"][1], y[4:, 1])
    torch.testing.assert_close(spied["distilled"][3], y[4:, 1] - SIGMA)
    if progress < RECIPE.e_step:
        _, x, noisy, level, _, _, target = spied["ambient_matching"]
        assert level == pytest.approx(SIGMA / math.sqrt(3))
        torch.testing.assert_close(noisy, joint[4:])
        torch.testing.assert_close(target, joint[4:] + 10)
    else:
        x = spied["denoising"][1]
    torch.testing.assert_close(x, joint[4:] + 100)
    if flow:
        torch.testing.assert_close(spied["flow"][1], joint + 100)
        assert spied["flow"][2].sigma == pytest.approx(SIGMA)  # fresh noise as of one capture


@pytest.mark.parametrize(("repeats", "picked"), [(1, None), (3, [1])])
def test_r2r_goes_on_with_the_first_part_of_the_batch(spied, monkeypatch, repeats, picked):
    """Clean images replace the last part. With repeats the other captures are the target."""
    learner, y = built(clean=torch.rand(5, 1, 8, 8), repeats=repeats)
    if picked:
        monkeypatch.setattr(learner, "pick_captures", lambda noise: picked)
    told = {}

    def r2r(y, index, picked, noise):
        told["own"] = y, index, picked
        return torch.zeros(())

    monkeypatch.setattr(learner, "recorrupted_loss", r2r)
    for progress, part in ((0.1, slice(0, 12)), (0.3, slice(0, 4)), (0.9, slice(0, 4))):
        learner.losses(y, torch.arange(16), progress, generator(1))
        given, index, chosen = told["own"]
        assert torch.equal(given, y[part]) and torch.equal(index, torch.arange(16)[part])
        assert chosen == picked


def test_m_follows_a_quarter_of_what_was_measured_in_the_pretraining(spied):
    learner, y = built(clean=torch.rand(5, 1, 8, 8))
    learner.losses(y, torch.arange(16), 0.1, generator(1))
    assert torch.equal(spied["distilled"][1], y[:3])  # of 12


def test_the_flow_may_begin_before_the_e_step(spied):
    learner, y = built(Recipe(r2r=0.2, flow=0.3, e_step=0.9, r2r_later=0.25))
    losses = learner.losses(y, torch.arange(16), 0.4, generator(1))
    assert "flow" in losses and torch.equal(spied["flow"][1], marked(y, 100))
    assert torch.equal(spied["ambient_matching"][1], marked(y[4:], 100))


def test_the_papers_objective_may_be_added(spied, monkeypatch):
    reverse = torch.tensor(3.0)
    monkeypatch.setattr(flowdiff, "elbo_loss", lambda *given: (reverse, None))
    learner, y = built(Recipe(**vars(RECIPE) | {"reverse": 0.5}))
    assert learner.losses(y, torch.arange(16), 0.9, generator(1))["reverse"].item() == 1.5
    assert "reverse" not in learner.losses(y, torch.arange(16), 0.6, generator(1))


def test_a_batch_has_a_measured_image_beside_r2r(spied):
    """Even if R2R and clean images ask for all of it."""
    learner, y = built(Recipe(r2r=0.2, r2r_later=0.9, clean=0.9), torch.rand(5, 1, 8, 8))
    losses = learner.losses(y[:4], torch.arange(4), 0.9, generator(1))
    assert len(spied["draw"][0]) >= 1 and losses["prior"].isfinite()


def test_the_quotient_is_of_a_tenth_of_the_noise():
    """The step of the published runs: D(y) = y^2 moves x by h n^2 sigma."""
    y, n = normal(4, *SHAPE), normal(4, *SHAPE, seed=1)
    x, mean = linearized_draw(y, SIGMA, lambda y, _: y**2, generator(1))
    torch.testing.assert_close(x - mean, SIGMA * (2 * y * n + 0.1 * SIGMA * n**2))


def test_a_run_with_one_noise_keeps_no_draws():
    """New ones are made for every batch; other operators keep theirs."""
    learner, _ = built()
    assert sum(held.numel() for held in learner.buffers.values()) == 2  # two counters
    assert learner.evaluations(0.0, 10_000) == 0
    masks = FlowDiff().build(
        torch.rand(8, 1, 8, 8), Problem("inpaint:random,keep=0.5", 0.1), (1, 8, 8)
    )
    assert len(masks.replay) == Recipe().buffer
    published = FlowDiff(objective="elbo").build(torch.rand(8, 1, 8, 8), masks.problem, (1, 8, 8))
    assert len(published.replay) == 0


@pytest.mark.parametrize("progress", [0.3, 0.9])
def test_lost_draws_are_a_lost_loss(progress):
    """Then the step is skipped (`Trainer`), and no draw is left behind."""
    learner, y = built()
    with torch.no_grad():
        for weight in learner.teacher.parameters():
            weight.fill_(math.nan)
    losses = learner.losses(y, torch.arange(16), progress, generator(1))
    assert not losses["prior"].isfinite()


def test_the_flow_begins_earlier_where_draws_are_new():
    """Kept draws would run out; a recipe may say otherwise."""
    shape, masks = (1, 8, 8), Problem("inpaint:random,keep=0.5", 0.1)
    photons = Problem("identity", "poisson-gaussian,gain=0.01,sigma=0.02")
    solver = Draws("diffpir", steps=2)
    for problem, more, wanted in (
        (PROBLEM, {}, 0.8),
        (PROBLEM, {"recipe": Recipe(flow=0.9)}, 0.9),
        (PROBLEM, {"recipe": Recipe(flow=0.0, r2r=0.0)}, 0.0),
        (masks, {"solver": solver}, 0.94),
        (masks, {"solver": solver, "recipe": Recipe(flow=0.9)}, 0.9),
        (masks, {}, 0.76),
        (photons, {"recipe": Recipe(flow=0.9)}, 0.76),
    ):
        learner = FlowDiff(**more).build(torch.rand(8, *shape), problem, shape)
        assert learner.flow_start == wanted
        assert learner.phases()["flow"][0].start == wanted
