"""Learning from repeated captures and from a few clean images."""

import json

import pytest
import torch

from tests.learners import RUN, cut
from tests.training.test_learn import GaussianPrior, LinearFlow, blobs, equal, weights
from unmurk.errors import InputError
from unmurk.io.captures import as_captures
from unmurk.io.crops import Crops
from unmurk.io.noise_maps import flat_maps
from unmurk.operators import parse
from unmurk.operators.crops import turn
from unmurk.problem import Problem
from unmurk.repeats import grouped
from unmurk.rng import generator
from unmurk.training import Em, FlowDiff, Recipe, learn
from unmurk.training.em import Rounds
from unmurk.training.inputs import weighed, with_maps
from unmurk.training.losses import noise2noise, supervised

SIGMA = 0.3
PROBLEM = Problem("identity", SIGMA)
EARLY = Recipe(r2r=0.3, e_step=0.6, flow=0.8)


def captures(problem, repeats, seed=0):
    x = blobs()
    return problem.simulate(x.repeat_interleave(repeats, 0), seed)


# -- losses ---------------------------------------------------------------------------------------


def test_noise2noise_is_its_closed_form():
    """x ~ N(0, 1), m(y) = g y: E (g y - y')^2 = (1 - g)^2 + g^2 s^2 + s'^2, with a minimum at
    g = 1 / (1 + s^2), that of the mean squared error itself."""
    n, s, t = 400_000, 0.5, 0.25
    noise = torch.Generator().manual_seed(0)
    x, one, two = (torch.randn(n, 1, 1, 1, generator=noise) for _ in range(3))
    flow = LinearFlow()
    y, other = x + s * one, x + t * two
    first, second = (Problem("identity", level).bind(range(n), (1, 1, 1)) for level in (s, t))
    for gain in (0.4, 0.8):
        flow.gain.data.fill_(gain)
        loss = noise2noise(flow, y, first, other, second)
        wanted = (1 - gain) ** 2 + gain**2 * s**2 + t**2
        assert loss.item() == pytest.approx(wanted, rel=0.01)
    (slope,) = torch.autograd.grad(loss, flow.gain)  # at 0.8 = 1 / (1 + 1/4)
    assert abs(slope.item()) < 0.01


def test_noise2noise_fills_pixels_that_only_the_target_shows():
    """A pixel hidden in y has the target y'; one that both hide has none."""
    flow = LinearFlow()
    a, b = (Problem(f"inpaint:box,size=1,top=0,left={k}", 0.1) for k in (0, 1))
    first, second = (p.bind(range(1), (1, 1, 3)) for p in (a, b))
    y, target = torch.tensor([[[[9.0, 1.0, 2.0]]]]), torch.tensor([[[[3.0, 9.0, 5.0]]]])
    flow.gain.data.fill_(0.5)
    loss = noise2noise(flow, y, first, target, second)
    assert loss.item() == pytest.approx((3.0**2 + (0.5 * 2 - 5) ** 2) / 3)


def test_supervised_loss_is_its_closed_form():
    """E (g (x + s n) - x)^2 = (1 - g)^2 E x^2 + g^2 s^2."""
    n, s = 400_000, 0.5
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 1, 1, generator=noise)
    flow = LinearFlow()
    problem = Problem("identity", s).bind(range(n), (1, 1, 1))
    assert supervised(flow, x, problem, noise).item() == pytest.approx(0.36 + 0.04, rel=0.01)


# -- what a step sees -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [FlowDiff, Em])
def test_e_step_sees_all_captures_at_their_level(cls):
    """The posterior given N captures is that given their mean, at sigma / sqrt(N)."""
    y = captures(PROBLEM, 3)
    built = cls().build(y, PROBLEM, tuple(y.shape[1:]), repeats=3)
    scenes = len(y) // 3
    mean, problem = built.measurements(torch.tensor([2, scenes]), torch.device("cpu"))
    wanted = grouped(y, 3)[[2, 0]].mean(1)
    assert torch.equal(mean, wanted)
    assert problem.sigma == pytest.approx(SIGMA / 3**0.5)
    assert problem.operator.spec == "identity"


@pytest.mark.parametrize("crop", [0, 16])
def test_scenes_under_a_flat_field(crop):
    """y / g of k captures, with the noise sigma / g, are the mean of raw captures: g x with the
    noise sigma / sqrt(k), exactly, also in crops."""
    draw = torch.Generator().manual_seed(3)
    g = 0.5 + torch.rand(1, 32, 32, generator=draw)
    raw = torch.rand(6, 1, 32, 32, generator=draw)  # two captures of three scenes
    shape, identity = (1, crop or 32, crop or 32), parse("identity")

    def cut(images):
        if not crop:
            return images
        return Crops(as_captures(list(images)), identity, crop, seed=5, repeats=2)

    y = cut(raw / g)
    y, problem, maps = with_maps(flat_maps(g), y, y, PROBLEM, FlowDiff())
    white, problem = weighed(y, problem, maps, shape, 2)
    built = FlowDiff(objective="elbo").build(white, problem, shape, repeats=2)
    mean, joint = built.measurements(torch.tensor([0, 2]), torch.device("cpu"))
    index = torch.tensor([0, 1, 4, 5])
    torch.testing.assert_close(mean, grouped(cut(raw)[index], 2).mean(1))
    gains = cut(g.expand(6, 1, 32, 32))[index[::2]]
    torch.testing.assert_close(joint.A(torch.ones_like(mean)), gains)
    assert joint.sigma == pytest.approx(SIGMA / 2**0.5)


def test_steps_use_one_capture_or_all_of_them_most_often():
    """Of 3: one with 1/2 + 1/4 / 3, two with 1/4 / 3, all with 1/4 + 1/4 / 3."""
    y = captures(PROBLEM, 3)
    built = FlowDiff().build(y, PROBLEM, tuple(y.shape[1:]), repeats=3)
    picked = [built.pick_captures(generator(0, step)) for step in range(900)]
    for k, share in ((1, 7 / 12), (2, 1 / 12), (3, 4 / 12)):
        assert sum(len(p) == k for p in picked) == pytest.approx(900 * share, abs=60)
        assert sum(k - 1 in p for p in picked) == pytest.approx(900 * 21 / 36, abs=60)
    assert picked == [built.pick_captures(generator(0, step)) for step in range(900)]
    assert all(len(set(p)) == len(p) for p in picked)


def test_the_networks_are_told_the_level_of_the_captures():
    """By its logarithm, and the correction to y is in units of it; single captures have one."""
    y = captures(PROBLEM, 3)
    for repeats, many in ((3, 1), (1, 0)):
        built = FlowDiff().build(y, PROBLEM, tuple(y.shape[1:]), repeats=repeats)
        assert built.posterior.config.many_levels == many
    masks = Problem("inpaint:random,keep=0.6", SIGMA)  # a hidden pixel's correction is no noise
    built = FlowDiff().build(y, masks, tuple(y.shape[1:]), repeats=3)
    assert built.posterior.config.many_levels == 0


def test_losses_of_the_mean_at_the_start(monkeypatch):
    """Some captures are the target of the others; clean images get their share.

    Of all captures together, R2R takes half the scenes, in pairs.
    """
    from unmurk.training import flowdiff

    masks = Problem("inpaint:random,keep=0.6", SIGMA)
    y, clean = captures(masks, 3), blobs()[:5]
    built = FlowDiff(recipe=EARLY).build(y, masks, tuple(y.shape[1:]), repeats=3, clean=clean)
    seen = []

    def n2n(posterior, y, problem, target, other):
        seen.append(("n2n", len(y), problem.sigma, other.sigma))
        return y.sum() * 0

    def r2r(posterior, y, problem, *rest):
        seen.append(("r2r", len(y), problem.sigma, None))
        return y.sum() * 0

    def known(posterior, x, problem, noise):
        assert all(any(torch.equal(one, c) for c in clean) for one in x)
        seen.append(("clean", len(x), problem.sigma, None))
        return x.sum() * 0 + 1

    monkeypatch.setattr(flowdiff, "noise2noise", n2n)
    monkeypatch.setattr(flowdiff, "recorrupted", r2r)
    monkeypatch.setattr(flowdiff, "supervised", known)
    index = torch.arange(8)
    for step in range(20):
        loss = built.losses(grouped(y, 3)[index], index, 0.1, generator(1, step))["mean"]
        assert loss.item() == pytest.approx(0.25)
    level = {k: SIGMA / k**0.5 for k in (1, 2, 3)}
    wanted = {("n2n", 6, level[k], level[3 - k]) for k in (1, 2)} | {("r2r", 3, level[3], None)}
    assert {s for s in seen if s[0] != "clean"} == wanted
    assert {s[:2] for s in seen if s[0] == "clean"} == {("clean", 2)}


def test_losses_of_the_prior_at_the_start(monkeypatch):
    """For A = I the prior has what the mean has for other A, at the level of its captures."""
    y, clean = captures(PROBLEM, 3), blobs()[:5]
    built = FlowDiff(recipe=EARLY).build(y, PROBLEM, tuple(y.shape[1:]), repeats=3, clean=clean)
    given, denoise = [], built.prior.denoise

    def kept(x, sigma):
        given.append((x, sigma))
        return denoise(x, sigma)

    monkeypatch.setattr(built.prior, "denoise", kept)
    index, counts = torch.arange(8), set()
    for step in range(20):
        given.clear()
        step_noise = generator(1, step)
        picked = built.pick_captures(step_noise)
        built.losses(grouped(y, 3)[index], index, 0.1, step_noise)
        (x, sigma), (sharp, _) = given
        assert len(x) == 6 and len(sharp) == 2
        mean = grouped(y, 3)[:6][:, picked].mean(1)
        if len(picked) < 3:
            assert torch.allclose(x, mean, atol=1e-6)
            assert torch.allclose(sigma, torch.tensor(SIGMA / len(picked) ** 0.5))
        else:
            assert torch.allclose((x[:3] + x[3:]) / 2, mean[:3], atol=1e-5)
            level = SIGMA / 3**0.5 * (1 + built.recipe.alpha**2) ** 0.5
            assert torch.equal(sigma[:3], sigma[3:]) and sigma.min() >= level * 0.9999
        counts.add(len(picked))
    assert counts == {1, 2, 3}


def test_captures_are_the_targets_of_a_denoiser():
    """x ~ N(0, 1), D(y, s) = v y / (v + s^2): least at the variance v = 1 of the images."""
    scenes = 200_000
    x = torch.randn(scenes, 1, 1, 1, generator=generator(4))
    y = (x[:, None] + 0.5 * torch.randn(scenes, 3, 1, 1, 1, generator=generator(5))).flatten(0, 1)
    built = FlowDiff().build(y.expand(-1, 1, 4, 4), Problem("identity", 0.5), (1, 4, 4), repeats=3)
    built.prior = GaussianPrior(1.0)
    index = torch.arange(scenes)
    for picked in ([0], [2, 1]):
        loss = built.recorrupted_loss(y.view(scenes, 3, 1, 1, 1), index, picked, generator(6))
        (slope,) = torch.autograd.grad(loss, built.prior.log_variance)
        assert abs(slope.item()) < 0.02 * loss.item()


def test_clean_images_reach_the_prior_at_every_level(monkeypatch):
    """Before and after the E-step, with the noise levels of the images that are not R2R's."""
    from unmurk.training import flowdiff

    y, clean = captures(PROBLEM, 2), blobs()[:3] + 5
    built = FlowDiff(recipe=EARLY).build(y, PROBLEM, tuple(y.shape[1:]), clean=clean)
    seen = []
    monkeypatch.setattr(flowdiff, "denoising", lambda p, x, s, n: seen.append((x, s)) or x.sum())
    index = torch.arange(32)
    built.losses(y[index], index, 0.4, generator(1, 0))
    built.losses(y[index], index, 0.7, generator(1, 1))
    (before, low), (after, levels) = seen
    assert len(before) == len(low) == 8 and before.mean() > 4
    assert len(after) == len(levels) == 16 and int((after.mean((1, 2, 3)) > 4).sum()) == 8


# -- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["flowdiff", "em"])
def test_one_capture_of_each_scene_is_the_run_without_repeats(tmp_path, method):
    y = captures(PROBLEM, 1)
    for name, more in (("a", {}), ("b", {"repeats": 1, "clean": None})):
        learn(y, PROBLEM, method, out=tmp_path / name, settings=RUN, quiet=True, **more)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    one, other = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("a", "b"))
    assert one == other and "repeats" not in one and "clean" not in one


@pytest.mark.parametrize(
    "form, noise",
    [("identity", 0.3), ("identity", "poisson,gain=0.05"), ("inpaint:random,keep=0.6", 0.3)],
)
def test_runs_with_repeats_and_clean_images_resume(tmp_path, monkeypatch, form, noise):
    """A run that was cut short ends bit for bit as one that was not."""
    problem = Problem(form, noise)
    x = blobs()[:32]
    y = problem.simulate(x.repeat_interleave(2, 0))
    kw = {"settings": RUN, "quiet": True, "repeats": 2, "clean": x[:4], "recipe": EARLY}
    learn(y, problem, out=tmp_path / "full", **kw)
    with monkeypatch.context() as patch:
        cut(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            learn(y, problem, out=tmp_path / "cut", **kw)
    prior, posterior = learn(y, problem, out=tmp_path / "cut", **kw)
    assert equal(weights(tmp_path / "full"), weights(tmp_path / "cut"))
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["repeats"] == 2 and config["clean"]["shape"] == [4, *x.shape[1:]]
    single = problem.bind(range(2), tuple(x.shape[1:]))  # single captures, as before
    assert posterior.sample(y[:2], single).isfinite().all()


@pytest.mark.parametrize("objective", ["elbo"])
def test_the_objective_of_the_paper_takes_both(tmp_path, objective):
    y, kw = captures(PROBLEM, 2), {"settings": RUN, "quiet": True, "objective": objective}
    prior, _ = learn(y, PROBLEM, out=tmp_path / "run", repeats=2, clean=blobs()[:3], **kw)
    assert all(p.isfinite().all() for p in prior.parameters())


def test_em_takes_both(tmp_path):
    y, kw = captures(PROBLEM, 2), {"settings": RUN, "quiet": True}
    prior, _ = learn(y, PROBLEM, "em", out=tmp_path / "run", repeats=2, clean=blobs()[:3], **kw)
    assert all(p.isfinite().all() for p in prior.parameters())


def test_captures_may_have_an_axis_of_their_own(tmp_path):
    y, kw = captures(PROBLEM, 2), {"settings": RUN, "quiet": True, "repeats": 2}
    learn(y, PROBLEM, out=tmp_path / "a", **kw)
    learn(grouped(y, 2), PROBLEM, out=tmp_path / "b", **kw)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


# -- crops ----------------------------------------------------------------------------------------


def test_crops_of_all_captures_of_a_scene_are_of_one_place():
    """And scenes of different sizes have their share of the crops."""
    sizes = [(70, 90), (64, 64), (100, 80)]
    images = [
        torch.rand(1, *size, generator=torch.Generator().manual_seed(i)) + k
        for i, size in enumerate(sizes)
        for k in range(3)
    ]
    crops = Crops(as_captures(images), parse("identity"), 32, repeats=3)
    assert len(crops) % 3 == 0
    found = set()
    for scene in range(200):
        places = [crops.place(3 * scene + j) for j in range(3)]
        numbers = [p.number for p in places]
        assert numbers == [numbers[0] + j for j in range(3)] and numbers[0] % 3 == 0
        assert len({(p.top, p.left, p.turn, p.height, p.width) for p in places}) == 1
        first = places[0]
        y = crops[torch.arange(3 * scene, 3 * scene + 3)]
        image = images[first.number][:, first.top :, first.left :][:, :32, :32]
        assert torch.equal(
            y[1], turn(images[numbers[1]][:, first.top :, first.left :][:, :32, :32], first.turn)
        )
        assert torch.allclose(y[2], turn(image, first.turn) + 2, atol=1e-6)
        found.add(first.number)
    assert found == {0, 3, 6}
    with pytest.raises(InputError, match="one scene, but have sizes"):
        Crops(as_captures([*images[1:], images[0]]), parse("identity"), 32, repeats=3)


def test_learning_from_crops_of_scenes_and_of_clean_images(tmp_path, capsys):
    x = torch.rand(3, 1, 13, 13).repeat_interleave(8, -1).repeat_interleave(8, -2)
    y = PROBLEM.simulate(x.repeat_interleave(2, 0))
    kw = {"settings": RUN, "repeats": 2, "clean": x[:1], "crop": 16}
    prior, _ = learn(y, PROBLEM, out=tmp_path / "run", **kw)
    assert prior.shape == (1, 16, 16)
    assert "crops of 16 (3 scenes of 2 captures)" in capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["repeats"] == 2 and config["clean"]["crop"] == 16


# -- what is refused ------------------------------------------------------------------------------


def test_methods_that_take_neither(tmp_path):
    y = captures(PROBLEM, 2)
    for method in ("ambient", "sure", "noisy", "clean", "ambientflow"):
        for more, what in (({"repeats": 2}, "repeated"), ({"clean": blobs()[:2]}, "clean images")):
            with pytest.raises(
                InputError, match=f"{method} does not learn from {what}.*flowdiff, em"
            ):
                learn(y, PROBLEM, method, out=tmp_path / "run", settings=RUN, quiet=True, **more)
    assert not (tmp_path / "run").exists()


def test_wrong_numbers_and_shapes(tmp_path):
    y = captures(PROBLEM, 1)
    for more, part in (
        ({"repeats": 7}, "no whole number of scenes of 7"),
        ({"repeats": 0}, "repeats"),
        ({"clean": torch.rand(3, 1, 4, 4)}, "give clean images of that shape"),
        ({"clean": blobs()[:3] + 100}, "the clean set"),
    ):
        with pytest.raises(InputError, match=part):
            learn(y, PROBLEM, out=tmp_path / "run", settings=RUN, quiet=True, **more)
    with pytest.raises(InputError, match="give repeats=2"):
        learn(grouped(y, 2), PROBLEM, out=tmp_path / "run", repeats=4, settings=RUN)
    masked = Problem("inpaint:random,keep=0.6", 0.3)
    with pytest.raises(InputError, match="ambient_target=image for the identity only"):
        learn(y, masked, out=tmp_path / "run", repeats=2, recipe=Recipe(ambient_target="image"))
    for name, bound in (("recipe", Recipe), ("rounds", Rounds)):
        with pytest.raises(InputError, match=f"{name}.clean"):
            bound(clean=0.95)
