"""The open prior: networks of one's own, its loss, and double precision."""

import json

import pytest
import torch
from torch import nn

from unmurk.diffusion.losses import levels
from unmurk.diffusion.prior import Prior
from unmurk.diffusion.samplers import prior_draw
from unmurk.diffusion.schedules import karras, log_linear
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator
from unmurk.solvers import solve
from unmurk.training.losses import denoising

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """A network of one's own: (x, t) to a tensor like x, with weights and a buffer."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        self.register_buffer("scale", torch.tensor([0.5]))

    def forward(self, x, t):
        time = (t / 1000).to(x).view(-1, 1, 1, 1).expand_as(x)
        return self.scale * self.last(torch.tanh(self.first(torch.cat([x, time], 1))))


class Wrapped(Net):
    """The same, with its output as diffusers returns it."""

    def forward(self, x, t):
        return type("Output", (), {"sample": super().forward(x, t)})()


def made(kind=Net, seed=0, **options):
    torch.manual_seed(seed)
    return Prior.create(kind(**options), SHAPE).eval()


def images(n=3, dtype=torch.float32):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_any_module_is_a_network():
    """Its output is v, whether it returns a tensor or an object with `.sample`."""
    prior, x, sigma = made(), images(), torch.tensor([0.02, 0.3, 5.0])
    s = (2 * sigma).view(-1, 1, 1, 1)
    a, b = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    with torch.no_grad():
        v = prior.network(a * (2 * x - 1), prior.time(sigma))
        expected = (a**2 * (2 * x - 1) - b * v + 1) / 2
        torch.testing.assert_close(prior.denoise(x, sigma), expected)
        assert torch.equal(made(Wrapped).denoise(x, sigma), prior.denoise(x, sigma))


def test_a_prior_of_ones_own_samples_and_solves():
    prior = made()
    assert prior.sample(2, steps=3).shape == (2, *SHAPE)
    result = solve(images(2), Problem("identity", 0.1), prior, "diffpir", steps=3)
    assert result.samples.isfinite().all()


def test_a_network_that_returns_something_else_is_named():
    for wrong, match in (
        (lambda x, t: x[:, :, 1:], r"returned shape \(3, 1, 7, 8\) for images of shape"),
        (lambda x, t: x[:1], r"returned shape \(1, 1, 8, 8\)"),
        (lambda x, t: (x,), "returned no tensor"),
    ):
        prior = made()
        prior.network.forward = wrong
        with pytest.raises(InputError, match=match):
            prior.denoise(images(), 0.1)
    with pytest.raises(InputError, match=r"network is a str: give a torch.nn.Module"):
        Prior("tiny", SHAPE)


def test_save_and_load_a_network_of_ones_own(tmp_path):
    prior = made()
    prior.save(tmp_path / "run" / "prior")
    about = json.loads((tmp_path / "run" / "prior" / "prior.json").read_text())
    assert about["network"] == "own" and about["shape"] == list(SHAPE)
    again = Prior.load(tmp_path / "run", network=made(seed=1).network)
    x = images()
    with torch.no_grad():
        assert torch.equal(again.denoise(x, 0.2), prior.denoise(x, 0.2))
    assert not again.training and again.shape == SHAPE
    assert again.scheduler.config.prediction_type == "v_prediction"


def test_what_a_saved_network_of_ones_own_needs(tmp_path):
    prior = made()
    prior.save(tmp_path)
    with pytest.raises(InputError, match=r"network of its own class \(.*Net\), whose code") as one:
        Prior.load(tmp_path)
    with pytest.raises(InputError, match="do not fit the Net given as network=") as other:
        Prior.load(tmp_path, network=Net(width=5))
    assert "\n" not in str(one.value) + str(other.value)
    (tmp_path / "prior.json").write_text('{"network": "own", "shape": [1, 8]}')
    with pytest.raises(InputError, match="prior.json must hold"):
        Prior.load(tmp_path, network=Net())
    Prior.create("tiny", SHAPE).save(tmp_path / "unet")
    with pytest.raises(InputError, match="has a UNet2DModel.*: leave network= out"):
        Prior.load(tmp_path / "unet", network=Net())


def test_loss_is_that_of_training():
    prior, x = made(), images(8)
    own = prior.loss(x, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(own, denoising(prior, x, levels(8, generator), generator))


def test_loss_learns():
    """A few steps of a loop of one's own lower the loss."""
    prior, x = made().train(), images(32)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-2)

    def loss():
        with torch.no_grad():
            return float(prior.loss(x, torch.Generator().manual_seed(0)))

    before = loss()
    for _ in range(100):
        optimizer.zero_grad()
        prior.loss(x).backward()
        optimizer.step()
    assert loss() < 0.9 * before


# -- double precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["own", "tiny"])
def test_float64_in_float64_out(network):
    """Same images as in float32 up to rounding, and nothing is rounded to float32 on the way."""
    torch.manual_seed(0)
    single = Prior.create(Net() if network == "own" else "tiny", SHAPE).eval()
    double = Prior(single.network, SHAPE)
    x32 = images()
    with torch.no_grad():
        reference = (
            single.denoise(x32, 0.3),
            single.sample(2, 4),
            single.nelbo(x32, torch.Generator().manual_seed(0)),
        )
        drawn = single.draw(PerImageGenerator(0, range(2)), 4)
        restored = single.restore(x32, 0.3, PerImageGenerator(0, range(3)), 4)
        double = double.double()
        x = x32.double()
        found = double.denoise(x, 0.3), double.sample(2, 4)
        drawn64 = double.draw(PerImageGenerator(0, range(2)), 4)
        restored64 = double.restore(x, 0.3, PerImageGenerator(0, range(3)), 4)
        bound = double.nelbo(x, torch.Generator().manual_seed(0))
    pairs = [*zip(found, reference, strict=False), (drawn64, drawn), (restored64, restored)]
    for a, b in pairs:
        assert a.dtype == torch.float64 and b.dtype == torch.float32
        torch.testing.assert_close(a, b.double(), atol=2e-4, rtol=2e-4)
    assert bound.dtype == torch.float64 and double.loss(x).dtype == torch.float64


def test_denoising_in_float64_is_precise():
    """Closed form of the preconditioning, to twelve digits; float32 would give seven."""
    prior, x = made().double(), images(dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.3, 5.0], dtype=torch.float64)
    s = (2 * sigma).view(-1, 1, 1, 1)
    log = karras(3, 2.0, 1.0).log()  # any float64 numbers
    assert prior.time(log.exp()).dtype == torch.float64
    abar = prior.scheduler.alphas_cumprod.double()
    known = (((1 - abar) / abar).sqrt() / 2).log()
    high = torch.searchsorted(known, sigma.log()).clamp(1)
    part = (sigma.log() - known[high - 1]) / (known[high] - known[high - 1])
    u = 2 * x - 1
    with torch.no_grad():
        v = prior.network(u / (1 + s**2).sqrt(), high - 1 + part)
        expected = (u / (1 + s**2) - s / (1 + s**2).sqrt() * v + 1) / 2
        torch.testing.assert_close(prior.denoise(x, sigma), expected, atol=1e-12, rtol=1e-12)


def test_samplers_keep_float64():
    exact = lambda x, sigma: (0.09 * x + sigma**2 * 0.4) / (0.09 + sigma**2)  # noqa: E731
    streams = PerImageGenerator(0, range(4))
    x = prior_draw(exact, SHAPE, streams, 12, dtype=torch.float64)
    again = prior_draw(exact, SHAPE, PerImageGenerator(0, range(4)), 12)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, again.double(), atol=1e-4, rtol=0)


def test_log_linear_levels_have_one_ratio():
    sigma = log_linear(6, 20.0, 0.01)
    torch.testing.assert_close(
        sigma[1:] / sigma[:-1], torch.full((5,), (0.01 / 20) ** 0.2).double()
    )
    torch.testing.assert_close(
        log_linear(9, 5.0, 0.1), karras(9, 5.0, 0.1, 1e7), rtol=1e-5, atol=0
    )
    for wrong in ((0, 1, 0.1), (3, 0.1, 1.0), (3, 1.0, 0.0)):
        with pytest.raises(InputError):
            log_linear(*wrong)


def test_half_precision_weights_keep_the_times_exact():
    """Levels are not rounded with the weights: a network in bfloat16 gets the same times."""
    sigma = torch.tensor([0.02, 0.3, 5.0])
    single, half = made(), made().bfloat16()
    assert torch.equal(single.time(sigma), half.time(sigma))
    with torch.no_grad():
        x = half.denoise(images(), sigma)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, single.denoise(images(), sigma), atol=0.1, rtol=0)
