"""Runs that start from other networks: what is copied, what is converted, and what is recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.device_cases import SMALLEST
from tests.training.test_learn import TINY, blobs
from tests.training.test_open import Own
from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Config, Posterior
from unmurk.io.weights import digest
from unmurk.problem import Problem
from unmurk.training import learn, read_config
from unmurk.training.run_folder import start_of
from unmurk.training.start import Start
from unmurk.training.trainer import Trainer

PROBLEM = Problem("identity", 0.2)


def shaken(module: nn.Module) -> nn.Module:
    """A module whose weights are all random, the layers that start at zero too."""
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "mixes" not in name:  # so that 1x1 convolutions stay well conditioned
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=stream))
    return module.eval()


def models(channels: int, many_levels: int = 0) -> tuple[Prior, Posterior]:
    torch.manual_seed(channels)
    prior = Prior.create("tiny", (channels, 16, 16))
    sizes = (SMALLEST.mean, SMALLEST.context, SMALLEST.couplings, SMALLEST.hidden)
    posterior = Posterior(Config(channels, 16, 16, *sizes, many_levels))
    return shaken(prior), shaken(posterior)


@pytest.mark.parametrize("many_levels", [0, 1])
def test_networks_of_as_many_channels_are_copied_for_images_of_another_size(many_levels):
    """The networks are convolutional: an image of 16 x 16 gets what the old ones compute."""
    prior, posterior = models(1, many_levels)
    start = Start("mine", prior, posterior)
    assert start.changes((1, 24, 32)) == "prior and posterior: all weights"
    new_prior = start.prior_for((1, 24, 32))
    new_posterior = start.posterior_for((1, 24, 32), None)
    assert new_prior.training and new_posterior.training
    assert digest(new_prior) == digest(prior) and digest(new_posterior) == digest(posterior)
    assert new_posterior.config.many_levels == many_levels
    x = torch.rand(2, 1, 24, 32, generator=torch.Generator().manual_seed(1))
    sized = Prior(prior.network, (1, 24, 32), prior.scheduler)
    torch.testing.assert_close(new_prior.denoise(x, 0.3), sized.denoise(x, 0.3))
    # nothing is shared
    new_prior.network.conv_in.weight.data.zero_()
    assert digest(new_prior) != digest(prior) == digest(models(1)[0])


@pytest.mark.parametrize(("before", "after"), [(1, 3), (1, 2), (3, 1), (4, 3)])
def test_gray_images_are_denoised_as_before_after_a_change_of_channels(before, after):
    """With equal channels, the new networks return the mean over channels of the old ones."""
    prior, posterior = models(before)
    start = Start("mine", prior, posterior)
    shape = (after, 16, 16)
    new_prior, new_posterior = start.prior_for(shape).eval(), start.posterior_for(shape, None)
    gray = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    old, new = gray.expand(-1, before, -1, -1), gray.expand(-1, after, -1, -1)
    for sigma in (0.05, 0.5):
        expected = prior.denoise(old, sigma).mean(1, keepdim=True).expand_as(new)
        torch.testing.assert_close(new_prior.denoise(new, sigma), expected)
    expected = posterior.mean(old, PROBLEM).mean(1, keepdim=True).expand_as(new)
    torch.testing.assert_close(new_posterior.mean(new, PROBLEM), expected)
    # the density is exact, with new couplings too
    context = new_posterior.context(new, PROBLEM)
    z, _ = new_posterior.invert(new, context)
    torch.testing.assert_close(new_posterior.transform(z, context)[0], new, atol=1e-4, rtol=0)
    assert f"converted from {before} to {after} channels" in start.changes(shape)


def test_a_run_starts_from_a_run(tmp_path, capfd):
    """At a rate of almost 0 the start is what is learned; all records say where it came from."""
    y = PROBLEM.simulate(blobs())
    given = {"settings": TINY, "kimg": 0.04, "precision": "fp32"}
    learn(y, PROBLEM, "noisy", out=tmp_path / "old", quiet=True, **given)
    prior, posterior = learn(
        *(y, PROBLEM, "noisy"),
        out=tmp_path / "new",
        start=str(tmp_path / "old"),
        **given | {"rate": 1e-12},
    )
    assert "start: old (prior and posterior: all weights)" in capfd.readouterr().err
    for new, old in ((prior, Prior), (posterior, Posterior)):
        for name, value in old.load(tmp_path / "old").state_dict().items():
            torch.testing.assert_close(new.state_dict()[name], value, atol=1e-8, rtol=0)
    config = read_config(tmp_path / "new")
    assert read_config(tmp_path / "old")["start"] == "none"
    assert config["start"] == {
        "name": "old",
        "copied": "prior and posterior: all weights",
        "prior": digest(Prior.load(tmp_path / "old")),
        "posterior": digest(Posterior.load(tmp_path / "old")),
    }
    first = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"kimg": 0.0, "start": "old"}
    # another start is another run
    with pytest.raises(InputError, match="a run with another start"):
        learn(y, PROBLEM, "noisy", out=tmp_path / "new", quiet=True, **given | {"rate": 1e-12})


def test_the_posterior_of_another_operator_stays_behind(tmp_path):
    y = PROBLEM.simulate(blobs())
    out = tmp_path / "old"
    learn(y, PROBLEM, "noisy", out=out, settings=TINY, kimg=0.04, quiet=True)
    assert Start.of(out, PROBLEM, 1).posterior is not None
    masked = Problem("inpaint:random,keep=0.5", 0.2)
    start = Start.of(str(out), masked, 1)
    assert start.posterior is None and start.changes((1, 16, 16)) == "prior: all weights"
    assert Start.of(str(out / "prior"), PROBLEM, 1).name == "prior"
    prior, posterior = models(1)
    assert Start.of((prior, posterior), masked, 1).posterior is posterior


def test_starts_that_do_not_fit_get_one_line(tmp_path):
    prior, posterior = models(1)
    for start, text in (
        (3, "start is a int: give a name, a run folder, a Prior, or a pair"),
        ((posterior, prior), "start is a tuple"),
        ("nowhere", "no prior in 'nowhere'"),
    ):
        with pytest.raises(InputError, match=text):
            Start.of(start, PROBLEM, 1)
    with pytest.raises(InputError, match="21x16 pixels .* multiples of 2"):
        Start("mine", prior, None).prior_for((1, 21, 16))
    own = Prior(nn.Conv2d(1, 1, 3, padding=1), (1, 16, 16))
    with pytest.raises(InputError, match="is one of 1 channels, and the images have 3"):
        Start("mine", own, None).prior_for((3, 16, 16))
    y, options = PROBLEM.simulate(blobs()), {"start": prior, "out": tmp_path / "run"}
    with pytest.raises(InputError, match="brings its own networks, and a network 'tiny' is given"):
        learn(y, PROBLEM, "noisy", network="tiny", quiet=True, **options)
    assert not (tmp_path / "run").exists()


def test_the_command_starts_from_a_run_and_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    prior, posterior = models(1)
    prior.save("old/prior")
    posterior.save("old/posterior")
    np.save("y.npy", PROBLEM.simulate(blobs()).numpy())
    argv = ["learn", "y.npy", "--noise", "0.2", "--method", "noisy"]
    argv += ["--kimg", "0.016", "--batch", "8", "--precision", "fp32", "--json"]
    assert cli.main([*argv, "--start", "old", "--out", "run"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["start"] == "old"
    assert "start: old (prior and posterior: all weights)" in shown.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "start.name" in page and "old" in page
    assert cli.main([*argv, "--start", "generic", "--network", "small", "--out", "no"]) == 2


@pytest.mark.starts
@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, "generic"),
        ({"start": "none"}, "none"),
        ({"network": "tiny"}, "none"),
        ({"network": Own()}, "none"),
        ({"method": "noisy"}, "none"),
        ({"objective": "elbo"}, "none"),
        ({"operator": "inpaint:random,keep=0.5"}, "none"),
        ({"shape": (3, 16, 16)}, "generic-color"),
        ({"shape": (2, 16, 16)}, "none"),
    ],
)
def test_the_start_of_a_run_that_names_none(case, expected, tmp_path, monkeypatch, capfd):
    """Every run says in its folder what it started from, and those that fall back say why."""
    monkeypatch.setattr(Trainer, "run", lambda trainer: None)
    case = dict(case)
    problem = Problem(case.pop("operator", "identity"), 0.2)
    y = problem.simulate(torch.rand(8, *case.pop("shape", (1, 16, 16))))
    reason = "another operator" if problem.operator.spec != "identity" else ""
    reason = "these have 2 channels" if y.shape[1] == 2 else reason
    learn(y, problem, out=tmp_path / "run", kimg=0.04, batch=2, precision="fp32", **case)
    assert start_of(tmp_path / "run") == expected
    said = [s for s in capfd.readouterr().err.splitlines() if s.startswith("start: ")]
    if expected != "none":
        assert said == [f"start: {expected} (prior and posterior: all weights)"]
    else:
        assert len(said) == bool(reason)
        assert all(s.startswith("start: none, as") and reason in s for s in said)


@pytest.mark.starts
def test_a_run_of_the_command_line_starts_from_the_package(tmp_path, monkeypatch, capsys):
    """Its result, its page and its folder name the start; and it restores."""
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", PROBLEM.simulate(blobs()[:16]).numpy())
    argv = ["learn", "y.npy", "--noise", "0.2", "--kimg", "0.064", "--batch", "8", "--json"]
    assert cli.main([*argv, "--precision", "fp32", "--out", "run"]) == 0
    assert json.loads(capsys.readouterr().out)["start"] == "generic" == start_of(Path("run"))
    assert "generic" in Path("run/report.html").read_text()
    assert cli.main(["restore", "y.npy", "--prior", "run", "--out", "x.npy"]) == 0
    assert np.isfinite(np.load("x.npy")).all()
