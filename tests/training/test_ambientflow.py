"""AmbientFlow: its bound, tight where it should be; the prior flow; the registry; and runs."""

import inspect
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.learners import check_run
from tests.training.test_learn import PROBLEM, LinearFlow, descend
from unmurk.cli.commands import Learn
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.glow import Config, Glow
from unmurk.flows.layers import Context
from unmurk.problem import Problem
from unmurk.training import METHODS, learn
from unmurk.training.ambientflow import log_weights

# ------------------------------------------------------------------ x ~ N(mu, S), images of 4 x 4


class Exact:
    """The exact posterior of x ~ N(mu, S) given y = A x + sigma n, written as the flow is."""

    def __init__(self, mu, cov, a, sigma):
        noise = sigma**2 * torch.eye(len(a), dtype=a.dtype)
        self.gain = cov @ a.T @ torch.linalg.inv(a @ cov @ a.T + noise)
        self.offset, self.a = mu - self.gain @ a @ mu, a
        self.root = torch.linalg.cholesky(cov - self.gain @ a @ cov)

    def context(self, y, problem):
        mean = (y.flatten(1) @ self.gain.T + self.offset).view(len(y), 1, 4, 4)
        return Context(mean, mean, mean, mean)

    def transform(self, z, context):
        x = context.mean + (z.flatten(1) @ self.root.T).view_as(z)
        return x, self.root.diagonal().log().sum().expand(len(z))


class Normal:
    def __init__(self, mu, cov):
        self.normal = torch.distributions.MultivariateNormal(mu, cov)

    def log_prob(self, x):
        return self.normal.log_prob(x.flatten(1))


@pytest.mark.parametrize("text", ["identity", "sr:average,factor=2", "blur:gaussian,sigma=1"])
def test_at_the_true_posterior_every_weight_is_the_evidence(text):
    """log w = log N(y; A mu, A S A^T + sigma^2) for each draw, without any Monte-Carlo error."""
    g = torch.Generator().manual_seed(0)
    root = torch.randn(16, 16, generator=g, dtype=torch.float64) / 4
    mu = torch.rand(16, generator=g, dtype=torch.float64)
    cov = root @ root.T + 0.05 * torch.eye(16, dtype=torch.float64)
    problem = Problem(text, 0.3)
    a = problem.A(torch.eye(16, dtype=torch.float64).view(16, 1, 4, 4)).flatten(1).T
    x = torch.distributions.MultivariateNormal(mu, cov).sample((5,)).view(5, 1, 4, 4)
    y = problem.simulate(x)
    elbo_loss = torch.distributions.MultivariateNormal(
        a @ mu, a @ cov @ a.T + 0.09 * torch.eye(len(a), dtype=torch.float64)
    ).log_prob(y.flatten(1))
    weights = log_weights(Exact(mu, cov, a, 0.3), Normal(mu, cov), y, problem, 3, g)
    torch.testing.assert_close(weights, elbo_loss.expand(3, 5), atol=1e-6, rtol=1e-6)


class Gaussian(nn.Module):
    """The prior N(0, variance), which is what is learnt."""

    def __init__(self):
        super().__init__()
        self.log_std = nn.Parameter(torch.tensor(-0.5))

    def log_prob(self, x):
        return torch.distributions.Normal(0.0, self.log_std.exp()).log_prob(x).flatten(1).sum(1)


@pytest.mark.parametrize("draws", [1, 4])
def test_both_bounds_solve_the_linear_gaussian_case(draws):
    """Jointly learnt from y alone: gain 0.8, posterior std 0.447, prior std 1, each to 3 %.

    One draw has the evidence bound; of four the importance-weighted one, with the same optimum.
    """
    flow, prior = LinearFlow(), Gaussian()

    def loss(_, y, g):
        each = log_weights(flow, prior, y, PROBLEM, draws, g)
        return -each.logsumexp(0).mean()

    descend(loss, [flow, prior], steps=500, batch=1024)
    assert abs(flow.gain.item() / 0.8 - 1) < 0.03
    assert abs(flow.log_spread.exp().item() / math.sqrt(0.2) - 1) < 0.03
    assert abs(prior.log_std.exp().item() - 1) < 0.03


# ------------------------------------------------------------------ the prior flow


def test_the_prior_flow_has_an_exact_density(tmp_path):
    """log p(x) by autograd's Jacobian of z -> x; images by number; files that give it back."""
    torch.manual_seed(0)
    glow = Glow(Config(1, 4, 4, couplings=2, hidden=8), spread=0.2)
    with torch.no_grad():
        for p in glow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    glow.save(tmp_path)
    loaded = Glow.load(tmp_path)
    torch.testing.assert_close(loaded.sample(5, seed=2), glow.sample(5, seed=2, batch=2))
    with pytest.raises(InputError, match="no glow in"):
        Glow.load(tmp_path / "none")
    glow = glow.double()
    z = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(glow.draw, z).view(16, 16)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
    exact = normal - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(glow.log_prob(glow.draw(z))[0], exact)


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("text", ["identity", "sr:average,factor=2"])
def test_it_learns_from_y_alone_and_goes_on_where_it_was(tmp_path, monkeypatch, text):
    """Cut in the joint phase (step 4) and in that of the diffusion prior (step 8 of 10)."""
    problem = Problem(text, 0.2)
    options = {"bound": "elbo" if text == "identity" else "importance"}
    prior, posterior, y = check_run(
        tmp_path, monkeypatch, "ambientflow", problem, (4, 8), **options
    )
    assert torch.equal(
        Glow.load(tmp_path / "cut").sample(2), Glow.load(tmp_path / "whole").sample(2)
    )
    torch.testing.assert_close(Prior.load(tmp_path / "cut").sample(2, 4), prior.sample(2, 4))
    assert torch.isfinite(posterior.mean(y, problem)).all()
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["options"] == options | {"draws": 2}
    assert load_file(tmp_path / "cut" / "glow" / "model.safetensors")["mean"].shape == (1, 8, 8)


def test_options_are_checked(tmp_path):
    y, problem = torch.rand(4, 1, 8, 8), Problem("identity", 0.2)
    with pytest.raises(InputError, match="unknown bound 'x': choose one of elbo, importance"):
        learn(y, problem, "ambientflow", out=tmp_path / "run", bound="x")
    with pytest.raises(InputError, match="draws must be a whole number from 1"):
        learn(y, problem, "ambientflow", out=tmp_path / "run", draws=0)
    assert not (tmp_path / "run").exists()


def test_the_command_explains_the_methods_there_are():
    source = inspect.getsource(Learn)
    own = [name for name, kind in METHODS.items() if kind.__module__.startswith("unmurk.")]
    assert len(own) == 7 and all(f"{name}:" in source for name in own)
