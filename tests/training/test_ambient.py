"""Ambient Diffusion: its minimisers in closed form, whole images and masked, and runs."""

import pytest
import torch
from torch import nn

from tests.learners import check_run
from tests.training.test_learn import SIGMA, GaussianPrior
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.problem import Problem
from unmurk.training import learn
from unmurk.training.ambient import Ambient, MaskedDenoiser, masked_matching
from unmurk.training.losses import ambient_matching

# ------------------------------------------------------------------ x ~ N(0, S), images of 1 x 3

ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.5, 0.4, 0.7]])
S = ROOT @ ROOT.T


class Table:
    """D(A' x, A') = W_A' (A' x), one matrix for each of the eight masks: all linear denoisers."""

    def __init__(self):
        self.matrices = nn.Parameter(torch.zeros(8, 3, 3))

    def denoise(self, x, sigma, shown):
        shown = shown.expand_as(x).flatten(1)
        kind = (shown @ torch.tensor([1.0, 2.0, 4.0])).long()
        return torch.einsum("bij,bj->bi", self.matrices[kind], shown * x.flatten(1)).view_as(x)


@pytest.mark.parametrize("sigma_y", [0.0, 0.4])
def test_the_minimiser_is_the_conditional_mean_given_what_is_shown(sigma_y):
    """E[x | A' x_t] = S A' (A' S A' + sigma^2)^-1 A' x_t for every mask, from y alone, to 0.04.

    The stand-ins for whole images are not a number: one that entered would show.
    """
    table, g, sigma, n = Table(), torch.Generator().manual_seed(0), 0.8, 4096
    optimizer = torch.optim.Adam([table.matrices], lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        x = torch.randn(n, 3, generator=g) @ ROOT.T
        seen = (torch.rand(n, 1, 1, 3, generator=g) < 0.8).float()
        shown = seen * (torch.rand(n, 1, 1, 3, generator=g) < 0.7)
        y = seen * (x.view(n, 1, 1, 3) + sigma_y * torch.randn(n, 1, 1, 3, generator=g))
        level, none = torch.full((n,), sigma), torch.zeros(n, dtype=torch.bool)
        nan = torch.full_like(y, torch.nan)
        optimizer.zero_grad()
        masked_matching(table, y, nan, sigma_y, level, seen, shown, none, g).backward()
        optimizer.step()
        schedule.step()
    for kind in range(1, 8):
        a = torch.diag(torch.tensor([kind & 1, kind >> 1 & 1, kind >> 2 & 1]).float())
        exact = S @ a @ torch.linalg.inv(a @ S @ a + sigma**2 * torch.eye(3)) @ a
        torch.testing.assert_close(table.matrices[kind] @ a, exact, atol=0.04, rtol=0)


class Unmasked(GaussianPrior):
    def denoise(self, x, sigma, shown=None):
        return super().denoise(x, sigma)


def test_with_nothing_hidden_it_is_ambient_tweedie():
    """All pixels seen and shown: the loss of `ambient_matching`, number for number."""
    prior, x, y = Unmasked(), torch.rand(64, 1, 4, 4), torch.rand(64, 1, 4, 4)
    sigma, ones = torch.rand(64) + 0.1, torch.ones(64, 1, 4, 4)
    none = torch.zeros(64, dtype=torch.bool)
    a = masked_matching(
        prior, y, x, SIGMA, sigma, ones, ones, none, torch.Generator().manual_seed(1)
    )
    b = ambient_matching(prior, x, y, SIGMA, sigma, torch.Generator().manual_seed(1))
    torch.testing.assert_close(a, b)


@pytest.mark.presets
def test_the_channel_of_hidden_pixels_is_one_more_of_the_first_convolution():
    """Equal to a convolution of C + 1 channels, blind to what is hidden, and gone afterwards."""
    torch.manual_seed(0)
    prior = Prior.create("tiny", (1, 8, 8)).eval()
    stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    x, sigma = torch.rand(2, 1, 8, 8), torch.tensor([0.3, 0.9])
    shown = (torch.rand(2, 1, 8, 8) < 0.6).float()
    with torch.no_grad():
        before = prior.denoise(x, sigma)
        network = MaskedDenoiser(prior, stem)
        torch.testing.assert_close(prior.denoise(x, sigma), before, atol=0, rtol=0)
        torch.testing.assert_close(network.denoise(x, sigma, torch.ones_like(x)), before)
        seen = network.denoise(x, sigma, shown)
        other = network.denoise(torch.where(shown > 0, x, torch.nan), sigma, shown)
        torch.testing.assert_close(seen, other, atol=0, rtol=0)
        assert (seen - before).abs().max() > 0.01
        taken = []
        hook = prior.unet.conv_in.register_forward_hook(
            lambda layer, ins, out: taken.append((ins, out))
        )
        network.denoise(x, sigma, shown)
        hook.remove()
        (inputs,), out = taken[0]
        wide = nn.Conv2d(2, 16, 3, padding=1)
        wide.weight.copy_(torch.cat([prior.unet.conv_in.weight, stem.weight], 1))
        wide.bias.copy_(prior.unet.conv_in.bias)
        torch.testing.assert_close(wide(inputs), out)
        torch.testing.assert_close(prior.denoise(x, sigma), before, atol=0, rtol=0)


def test_further_masks_have_the_law_they_should():
    """Random pixels go with probability 0.1; a box is joined by another box of the same size."""
    y, g = torch.rand(512, 1, 16, 16), torch.Generator().manual_seed(0)
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    method = Ambient().build(y, problem, (1, 16, 16))
    seen = problem.bind(range(512), (1, 16, 16)).mask
    assert abs(method.further_mask(seen, g).mean() - 0.9) < 0.005
    problem = Problem("inpaint:box,size=4,seed=1", 0.1)
    method = Ambient().build(y, problem, (1, 16, 16))
    other = method.further_mask(problem.bind(range(512), (1, 16, 16)).mask, g)
    assert (other.flatten(1).sum(1) == 240).all() and len(other.flatten(1).unique(dim=0)) > 100


@pytest.mark.parametrize("text", ["identity", "inpaint:random,keep=0.6"])
def test_it_learns_from_y_alone_and_goes_on_where_it_was(tmp_path, monkeypatch, text):
    """Cut while the prior is learnt (step 4) and while the posterior is (step 8 of 10)."""
    problem = Problem(text, 0.2)
    prior, posterior, y = check_run(tmp_path, monkeypatch, "ambient", problem, (4, 8))
    loaded = Prior.load(tmp_path / "cut")
    torch.testing.assert_close(loaded.sample(2, steps=4), prior.sample(2, steps=4))
    assert torch.isfinite(posterior.mean(y, problem)).all()


def test_what_it_cannot_learn_from_is_refused_at_once(tmp_path):
    y, out = torch.rand(4, 1, 8, 8), tmp_path / "run"
    with pytest.raises(InputError, match="ambient cannot learn from blur.*: take one of flowdiff"):
        learn(y, Problem("blur:gaussian,sigma=1.5", 0.1), "ambient", out=out)
    with pytest.raises(InputError, match="the same pixels in all images"):
        learn(y, Problem("inpaint:box,size=4", 0.1), "ambient", out=out)
    with pytest.raises(InputError, match="delta must be a number from 0.001 to 0.999, got 1.5"):
        learn(y, Problem("identity", 0.1), "ambient", out=out, delta=1.5)
    with pytest.raises(InputError, match="option 'speed' of ambient: its options are delta"):
        learn(y, Problem("identity", 0.1), "ambient", out=out, speed=1)
    with pytest.raises(InputError, match="option 'objective' of noisy: it has none"):
        learn(y, Problem("identity", 0.1), "noisy", out=out, objective="elbo")
    assert not out.exists()
