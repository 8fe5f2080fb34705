"""Learning: every loss against its closed form, and runs that cannot be lost."""

import json
import math
import random
import signal
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import programs
from tests.conftest import probe
from unmurk.diffusion.prior import nelbo
from unmurk.errors import InputError
from unmurk.flows.layers import Context
from unmurk.gaussian import Wiener
from unmurk.io.atomic import write
from unmurk.problem import Problem
from unmurk.training import FlowDiff, Recipe, Settings, learn
from unmurk.training.losses import (
    ambient_matching,
    denoising,
    distilled,
    elbo_loss,
    forward_kl,
    levels,
    masked_ambient_matching,
    recorrupted,
)
from unmurk.training.trainer import LRPhase, ParamGroup, Trainer

# ------------------------------------------------------------------ x ~ N(0, 1), y = x + N(0, 1/4)

SIGMA = 0.5
PROBLEM = Problem("identity", SIGMA)


class LinearFlow(nn.Module):
    """q(x | y) = N(gain y, spread^2), written as the flow is."""

    start = None

    def parts(self, y, problem):
        return torch.zeros_like(y), self.mean(y, problem)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.4))
        self.log_spread = nn.Parameter(torch.tensor(-2.0))

    def mean(self, y, problem):
        return self.gain * y

    def context(self, y, problem):
        return Context(self.gain * y, self.log_spread.expand_as(y), y, y)

    def transform(self, z, context):
        x = context.mean + context.log_spread.exp() * z
        return x, context.log_spread.flatten(1).sum(1)

    def log_density(self, x, context):
        scale = context.log_spread.exp()
        return torch.distributions.Normal(context.mean, scale).log_prob(x).flatten(1).sum(1)


class GaussianPrior(nn.Module):
    """The exact denoiser of N(0, variance), which is what is learnt."""

    def __init__(self, variance=0.3):
        super().__init__()
        self.log_variance = nn.Parameter(torch.tensor(math.log(variance)))

    @property
    def variance(self):
        return self.log_variance.exp()

    def denoise(self, x, sigma):
        return x * self.variance / (self.variance + sigma.view(-1, 1, 1, 1) ** 2)

    def nelbo(self, x, generator, constants):
        frozen = self.variance.detach()

        def denoise(x, sigma):
            return x * frozen / (frozen + sigma.view(-1, 1, 1, 1) ** 2)

        return nelbo(denoise, x, 1e-3, 50.0, generator, constants=constants)


def descend(loss, modules, steps=1500, rate=0.02, batch=4096):
    """Adam with a falling rate on losses of fresh data; returns nothing."""
    g = torch.Generator().manual_seed(0)
    parameters = [p for m in modules for p in m.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(batch, 1, 1, 1, generator=g)
        y = x + SIGMA * torch.randn(batch, 1, 1, 1, generator=g)
        optimizer.zero_grad()
        loss(x, y, g).backward()
        optimizer.step()
        schedule.step()


def test_the_papers_objective_solves_the_linear_gaussian_case():
    """Jointly learnt from y alone: gain 0.8, posterior std 0.447, prior variance 1, each to 3
    %."""
    flow, prior = LinearFlow(), GaussianPrior()

    def loss(_, y, g):
        value, x = elbo_loss(flow, prior, y, PROBLEM, g)
        return value + denoising(prior, x, levels(len(x), g), g)

    descend(loss, [flow, prior], steps=2500)
    assert abs(flow.gain.item() / 0.8 - 1) < 0.03
    assert abs(flow.log_spread.exp().item() / math.sqrt(0.2) - 1) < 0.03
    assert abs(prior.variance.item() - 1) < 0.03


def test_forward_kl_is_exact_bayes():
    """Pairs of the true prior's images and fresh corruptions: gain 0.8, spread sqrt(0.2)."""
    flow = LinearFlow()
    descend(lambda x, y, g: sum(forward_kl(flow, x, PROBLEM, g)), [flow])
    assert abs(flow.gain.item() / 0.8 - 1) < 0.01
    assert abs(flow.log_spread.exp().item() / math.sqrt(0.2) - 1) < 0.01


def test_recorrupted_finds_the_conditional_mean_without_clean_images():
    """Its minimiser is E[x | y + a sigma n]: gain 1 / (1 + sigma^2 (1 + a^2))."""
    flow, a = LinearFlow(), 0.6
    descend(lambda x, y, g: recorrupted(flow, y, PROBLEM, a, g), [flow])
    assert abs(flow.gain.item() * (1 + SIGMA**2 * (1 + a**2)) - 1) < 0.02


def test_the_signs_of_the_noise_cancel_for_a_linear_mean():
    """m = g y: (g - 1)^2 y^2 + (a g + 1 / a)^2 sigma^2 n^2, without the product of y and n."""
    flow, a, gain = LinearFlow(), 0.3, 0.4
    y = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    n = SIGMA * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    loss = recorrupted(flow, y, PROBLEM, a, torch.Generator().manual_seed(2))
    expected = ((gain - 1) * y).square() + ((a * gain + 1 / a) * n).square()
    torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize(
    "noise", ["0.1", "poisson,gain=0.01", "poisson-gaussian,gain=0.01,sigma=0.02"]
)
def test_pretraining_evaluates_a_network_as_often_as_there_are_images(noise, monkeypatch):
    """Of seven images, three as pairs: the prior for Gaussian noise, m for other noise."""
    problem, y = Problem("identity", noise), torch.rand(7, 1, 8, 8)
    learner = FlowDiff().build(y, problem, (1, 8, 8))
    given = []
    of, name = (learner.prior, "denoise") if noise == "0.1" else (learner.posterior, "parts")
    real = getattr(of, name)
    monkeypatch.setattr(of, name, lambda y, *rest: given.append(y) or real(y, *rest))
    learner.losses(y, torch.arange(7), 0.0, torch.Generator().manual_seed(0))
    assert [len(one) for one in given] == [6]
    # around the first three images, exactly or up to some counts
    apart = (given[0][:3] + given[0][3:]) / 2 - y[:3]
    assert apart.abs().max() < (1e-6 if noise == "0.1" else 0.04)


class Neighbours(nn.Module):
    """Of two pixels, m_i = own y_i where it is seen, else other y_j."""

    start = None

    def parts(self, y, problem):
        return torch.zeros_like(y), self.mean(y, problem)

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.tensor(0.4))
        self.other = nn.Parameter(torch.tensor(0.0))

    def mean(self, y, problem):
        return torch.where(problem.mask > 0, self.own * y, self.other * y.flip(-1))


@pytest.mark.parametrize("hide", [0.0, 0.5])
def test_withheld_pixels_teach_what_masks_hide(hide):
    """Pixels of correlation 0.9, half of them hidden: E[x_i | y_j + a sigma n] = 0.9 gain y_j.

    Without withheld pixels nothing is learnt of the hidden ones.
    """
    m, a = Neighbours(), 0.6
    problem = Problem("inpaint:random,keep=0.5", SIGMA).bind(range(2048), (1, 1, 2))

    def loss(x, y, g):
        both = torch.stack([x[:2048], x[2048:]], -1).view(-1, 1, 1, 2)
        both[..., 1] = 0.9 * both[..., 0] + math.sqrt(1 - 0.9**2) * both[..., 1]
        y = problem.A(both) + SIGMA * torch.randn(both.shape, generator=g)
        return recorrupted(m, problem.operator.apply_mask(y), problem, a, g, hide)

    descend(loss, [m], steps=600)
    gain = 1 / (1 + SIGMA**2 * (1 + a**2))
    assert abs(m.own.item() / gain - 1) < 0.03
    assert abs(m.other.item() - (0.9 * gain if hide else 0.0)) < 0.03


def test_what_nothing_shows_draws_the_correction_to_zero():
    """The gradient of sigma_y^2 d^T S^-1 d / d alone, for a correction along what A cannot see."""

    class Start(nn.Module):
        start = Wiener((1, 4, 4))

        def parts(self, y, problem):
            return torch.zeros(len(y), 1, 4, 4), torch.cat([self.correction] * 2)  # both signs

    m, problem = Start(), Problem("sr:average,factor=4", SIGMA)
    checks = torch.ones(4, 4)
    checks[::2, ::2], checks[1::2, 1::2] = -1, -1  # 8 of each sign: no mean
    m.correction = (0.1 * checks).expand(5, 1, 4, 4).clone().requires_grad_()
    g = torch.Generator().manual_seed(0)
    recorrupted(m, torch.zeros(5, 1, 1, 1), problem, 0.6, g).backward()
    c = m.start.dct(m.correction.detach()) / m.start.power
    expected = 2 * SIGMA**2 * m.start.to_images(c) / 16 / 5
    each = m.correction.grad.mean((1, 2, 3), keepdim=True)  # what the misfit adds
    torch.testing.assert_close(m.correction.grad - each, expected)


def test_masks_that_show_all_pixels_give_the_loss_without_masks():
    """Nothing hidden and nothing withheld: the loss on noisy images, above the level."""
    prior, problem = GaussianPrior(), Problem("inpaint:random,keep=1", SIGMA)
    problem = problem.bind(range(64), (1, 2, 2))
    y, sigma = torch.randn(64, 1, 2, 2), torch.full((64,), 0.9)

    class Mean:
        def mean(self, y, problem):
            return torch.zeros_like(y)

    def g():
        return torch.Generator().manual_seed(1)

    start = g()
    torch.rand(64, 1, 2, 2, generator=start)  # the mask of what is withheld
    a = masked_ambient_matching(prior, Mean(), y, problem, sigma, g(), 0.0, 0.6)
    b = ambient_matching(prior, y, y, SIGMA, sigma, start)
    torch.testing.assert_close(a, b)
    # below the level m stands in for x
    low = masked_ambient_matching(prior, Mean(), y, problem, sigma, g(), 0.0, 1.0)
    start = g()
    torch.rand(64, 1, 2, 2, generator=start)
    torch.testing.assert_close(low, denoising(prior, torch.zeros_like(y), sigma, start))


def test_the_distilled_mean_is_that_of_the_prior():
    """Fitted to the exact denoiser of N(0, 1) at sigma_y the mean network has gain 0.8."""
    flow, prior = LinearFlow(), GaussianPrior(variance=1.0)
    level = torch.tensor(SIGMA)
    descend(lambda x, y, g: distilled(flow, y, PROBLEM, prior.denoise(y, level).detach()), [flow])
    assert abs(flow.gain.item() / 0.8 - 1) < 1e-3


def test_ambient_matching_learns_the_denoiser_from_noisy_images_alone():
    """Above sigma_y the noisy images determine D: the variance of the clean prior, not of y."""
    prior = GaussianPrior()

    def loss(_, y, g):
        sigma = SIGMA * (1.05 + 2 * torch.rand(len(y), generator=g))
        return ambient_matching(prior, torch.full_like(y, math.nan), y, SIGMA, sigma, g)

    # the stand-in images are not a number: one that entered above sigma_y would show
    descend(loss, [prior])
    assert abs(prior.variance.item() - 1) < 0.03


def test_the_ambient_target_may_be_the_posterior_mean():
    """E[E[x | y] | x_t] = E[x | x_t]: the same denoiser from m(y) = 0.8 y as from y itself."""
    prior = GaussianPrior()

    def loss(_, y, g):
        sigma = SIGMA * (1.05 + 2 * torch.rand(len(y), generator=g))
        return ambient_matching(prior, torch.full_like(y, math.nan), y, SIGMA, sigma, g, 0.8 * y)

    descend(loss, [prior])
    assert abs(prior.variance.item() - 1) < 0.03


def test_below_the_noise_level_ambient_matching_is_plain_score_matching():
    prior, g = GaussianPrior(), torch.Generator
    x, sigma = torch.randn(64, 1, 2, 2), torch.full((64,), 0.2)
    a = ambient_matching(prior, x, torch.randn_like(x), SIGMA, sigma, g().manual_seed(1))
    b = denoising(prior, x, sigma, g().manual_seed(1))
    torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ runs

TINY = Settings(network="tiny", kimg=0.32, batch=8, seed=3, precision="fp32")
RECIPE = Recipe(r2r=0.2, e_step=0.4, flow=0.5, buffer=64, refresh=0.5, reverse=0.1)


def blobs(n=24, size=8):
    """Small images with something in them."""
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.avg_pool2d(torch.rand(n, 1, 2 * size, 2 * size, generator=g), 2)


def weights(folder):
    posterior = load_file(folder / "posterior" / "model.safetensors")
    prior = load_file(folder / "prior" / "unet" / "diffusion_pytorch_model.safetensors")
    return {**{f"p.{k}": v for k, v in prior.items()}, **posterior}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Clinic:
    """A data set whose clean images raise when touched."""

    def __init__(self, y):
        self.y = y

    def __getattr__(self, name):
        raise AssertionError(f"a learner looked at .{name}")


@pytest.mark.parametrize("objective", ["default", "elbo"])
def test_the_clean_images_are_out_of_reach(tmp_path, objective):
    """Handed an object whose every attribute but y raises, it learns what it learns from y."""
    problem = Problem("identity", 0.2)
    y = problem.simulate(blobs())
    settings = replace(TINY, kimg=0.08)  # 10 steps, some in each part of the recipe
    kw = {"objective": objective, "recipe": RECIPE, "settings": settings, "quiet": True}
    learn(Clinic(y), problem, out=tmp_path / "a", **kw)
    learn(y, problem, out=tmp_path / "b", **kw)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.presets
def test_every_operator_learns(tmp_path):
    """Masks of each image's own, and measurements smaller than images: losses fall, all finite."""
    for i, text in enumerate(["inpaint:random,keep=0.6", "sr:average,factor=2"]):
        problem = Problem(text, 0.1)
        y = problem.simulate(blobs())
        prior, posterior = learn(
            y, problem, out=tmp_path / str(i), recipe=RECIPE, settings=TINY, quiet=True
        )
        assert prior.shape == (1, 8, 8)
        assert torch.isfinite(posterior.mean(y, problem)).all()
        text = (tmp_path / str(i) / "metrics.jsonl").read_text()
        lines = [json.loads(s) for s in text.splitlines()]
        assert lines[-1]["kimg"] == 0.32 and lines[-1]["skipped"] == 0
        # averages, as single losses scatter; the flow's has a target that moves with the prior
        prior, flow = ([s[k] for s in lines if k in s] for k in ("loss/prior", "loss/flow"))
        third = len(prior) // 3
        assert third >= 5 and sum(prior[-third:]) < 0.95 * sum(prior[:third])
        assert len(flow) >= 5 and all(map(math.isfinite, flow))


@pytest.mark.parametrize("method", ["noisy", "clean"])
def test_floor_and_ceiling_learn(tmp_path, method):
    problem = Problem("identity", 0.2)
    x = blobs()
    y = x if method == "clean" else problem.simulate(x)
    prior, _ = learn(y, problem, method, out=tmp_path, settings=TINY, quiet=True)
    assert torch.isfinite(prior.sample(2, steps=4)).all()


def test_a_finished_run_is_returned_and_another_is_refused(tmp_path):
    problem = Problem("identity", 0.2)
    y = problem.simulate(blobs())
    kw = {"out": tmp_path, "recipe": RECIPE, "quiet": True}
    first, _ = learn(y, problem, settings=TINY, **kw)
    again, _ = learn(y, problem, settings=TINY, **kw)
    assert equal(first.state_dict(), again.state_dict())
    with pytest.raises(InputError, match="another data set"):
        learn(y + 0.1, problem, settings=TINY, **kw)
    with pytest.raises(InputError, match=r"another noise \(0.2 there, 0.3 here\)"):
        learn(y, Problem("identity", 0.3), settings=TINY, **kw)
    with pytest.raises(InputError, match="no run"):
        learn(y, problem, settings=TINY, **{**kw, "out": tmp_path / "prior"})


def test_bad_settings_are_named(tmp_path):
    y, problem = blobs(), Problem("identity", 0.2)
    for kw, words in [
        ({"method": "x"}, "unknown method"),
        ({"objective": "x"}, "unknown objective"),
        ({"network": "x"}, "unknown network"),
        ({"speed": 1}, "unknown setting"),
        ({"kimg": -1}, "kimg must be"),
    ]:
        with pytest.raises(InputError, match=words):
            learn(y, problem, out=tmp_path / "run", quiet=True, **kw)
    with pytest.raises(InputError, match="noise above 0"):
        learn(y, Problem("identity", 0.0), out=tmp_path / "run")
    with pytest.raises(InputError, match="multiples of 4"):
        learn(y[..., :6], problem, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Fragile:
    """One weight that learns the mean of y, and fails when told to."""

    def __init__(self, fails):
        self.weight = nn.Linear(1, 1, bias=False)
        self.fails = fails
        self.modules = {"w": self.weight}
        self.ema = {"w": nn.Linear(1, 1, bias=False)}
        self.buffers = {}
        self.groups = [ParamGroup(list(self.weight.parameters()))]
        self.calls = 0

    def initialize(self, device):
        pass

    def before(self, trainer, step, progress):
        pass

    def losses(self, y, rows, progress, generator):
        self.calls += 1
        loss = (self.weight.weight - y).square().mean()
        return {"w": loss * (math.nan if self.calls in self.fails else 1.0)}


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_the_probe_finds_the_faster_precision_and_trains_nothing(tmp_path, monkeypatch, faster):
    """On a clock of our own: a step takes 0.1 s in one precision and 0.2 s in the other."""
    method, now = Fragile(set()), [0.0]
    settings = Settings(kimg=0.4, batch=4, precision="auto")
    trainer = Trainer(method, torch.ones(8, 1), settings, tmp_path, quiet=True)
    losses, weight = method.losses, method.weight.weight.item()

    def timed(*given):
        now[0] += 0.1 if trainer.precision == faster else 0.2
        return losses(*given)

    method.losses = timed
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert probe(trainer) == faster
    assert method.calls == 5 + 3  # half a second and three steps each, at least
    assert method.weight.weight.item() == weight and trainer.step == 0


def test_the_average_of_a_part_that_starts_late_forgets_its_start(tmp_path):
    """Half-life 5 % of the images since the part began: hand-computed for three steps."""
    method = Fragile(set())
    method.groups = [ParamGroup(list(method.weight.parameters()), (LRPhase(0.5),))]
    settings = Settings(kimg=0.4, batch=4, precision="fp32")
    trainer = Trainer(method, torch.ones(8, 1), settings, tmp_path, quiet=True)
    assert trainer.steps == 100
    expected = None
    for step, value in [(50, 3.0), (60, 5.0), (90, 1.0)]:
        trainer.step = step
        with torch.no_grad():
            method.weight.weight.fill_(value)
        trainer.update_ema()
        keep = 0.5 ** (4 / (0.05 * 4 * (step - 50))) if step > 50 else 0.0
        expected = value if expected is None else keep * expected + (1 - keep) * value
        assert abs(method.ema["w"].weight.item() - expected) < 1e-5


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    method = Fragile({3, 7})
    settings = Settings(kimg=0.4, batch=4, rate=0.1, precision="fp32")
    trainer = Trainer(method, torch.full((8, 1), 2.0), settings, tmp_path, quiet=True)
    trainer.run()
    assert trainer.skipped == 2 and trainer.step == 100
    assert abs(method.weight.weight.item() - 2) < 0.05


def test_ten_in_a_row_go_back_with_half_the_rate(tmp_path, capfd):
    method = Fragile(set(range(20, 30)))
    settings = Settings(kimg=0.8, batch=4, rate=0.2, precision="fp32")
    trainer = Trainer(method, torch.full((8, 1), 2.0), settings, tmp_path)
    trainer.run()
    assert trainer.factor == 0.5 and trainer.step == 200
    assert abs(method.ema["w"].weight.item() - 2) < 0.1
    assert "ten steps in a row" in capfd.readouterr().err


def test_a_run_that_always_diverges_ends_with_one_line(tmp_path):
    method = Fragile(set(range(1, 10_000)))
    settings = Settings(kimg=0.4, batch=4, precision="fp32")
    with pytest.raises(InputError, match="diverged"):
        Trainer(method, torch.ones(8, 1), settings, tmp_path, quiet=True).run()


def test_a_damaged_state_is_named(tmp_path):
    write(tmp_path / "state" / "latest.pt", b"not a state")
    with pytest.raises(InputError, match="damaged"):
        Trainer(Fragile(set()), torch.ones(8, 1), Settings(), tmp_path, quiet=True).run()


RUN = textwrap.dedent(
    """
    import sys, torch
    torch.set_num_threads(1)
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from tests.training.test_learn import RECIPE, TINY, blobs
    from unmurk.training import FlowDiff, Trainer, learn
    from unmurk.problem import Problem
    problem = Problem("identity", 0.2)
    started = Trainer.__init__
    often = {{"every": float(sys.argv[2])}} if sys.argv[2:] else {{}}
    Trainer.__init__ = lambda self, *a, **k: started(self, *a, **{{**k, **often}})
    print("ready", flush=True)
    learn(problem.simulate(blobs()), problem, out=Path(sys.argv[1]), recipe=RECIPE, settings=TINY,
          quiet=True)
    """
)


@pytest.mark.slow
def test_killed_at_five_random_moments_it_ends_as_if_never_stopped(tmp_path):
    """kill -9, then the same command: the same final weights, bit for bit."""
    script = tmp_path / "run.py"
    script.write_text(RUN.format(root=str(Path(__file__).parents[2])))
    run = programs.Popen([sys.executable, script, tmp_path / "whole"])
    run.stdout.readline()
    begin = time.monotonic()
    run.communicate()
    assert run.returncode == 0
    whole = time.monotonic() - begin
    rng, killed = random.Random(0), 0
    for _ in range(5):
        run = programs.Popen([sys.executable, script, tmp_path / "cut", 0.1])
        run.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.35) * whole)
        killed += run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.communicate()
    assert killed >= 3
    programs.run([sys.executable, script, tmp_path / "cut"], check=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    kimg = [json.loads(s)["kimg"] for s in lines]
    assert kimg == sorted(set(kimg)) and kimg[-1] == 0.32
