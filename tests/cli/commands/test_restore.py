"""`unmurk restore`: its numbers are those of the posterior."""

import json

import numpy as np
import torch

from tests.cli.calls import unmurk
from unmurk.diffusion.prior import Prior
from unmurk.flows.posterior import Posterior
from unmurk.problem import Problem
from unmurk.solvers import solve


def test_photons_are_drawn_and_restored(data, tmp_path, capsys):
    """`corrupt` and `solve` read the text of a noise as `Problem` does."""
    y, out = tmp_path / "y.npy", tmp_path / "x.npy"
    noise = "poisson-gaussian,gain=0.02,sigma=0.01"
    assert unmurk("corrupt", data, "--noise", noise, "--out", y) == 0
    expected = Problem("identity", noise).simulate(torch.from_numpy(np.load(data))[:, None])
    np.testing.assert_array_equal(np.load(y).squeeze(), expected.numpy().squeeze())
    Prior.create("tiny", (1, 16, 16)).save(tmp_path / "prior")
    argv = ["--prior", tmp_path / "prior", "--operator", "identity", "--steps", 2, "--out", out]
    capsys.readouterr()
    assert unmurk("solve", y, "--noise", noise, *argv, "--json") == 0
    assert json.loads(capsys.readouterr().out)["chi2"] > 0
    found = solve(expected, Problem("identity", noise), Prior.load(tmp_path / "prior"), steps=2)
    np.testing.assert_allclose(np.load(out).squeeze(), found.mean.numpy().squeeze(), atol=1e-5)


def test_restore_is_the_posterior_of_the_runs_problem(data, trained, tmp_path, capsys):
    """Mean and standard deviation are the flow's for the problem in config.json, any batch."""
    out = tmp_path / "restored"
    assert unmurk("restore", data, "--prior", trained, "--out", out, "--std", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    y = torch.from_numpy(np.load(data))[:, None]
    problem = Problem("inpaint:random,keep=0.5", 0.1).bind(range(5), (1, 16, 16))
    mean, std = Posterior.load(trained).mean_std(y, problem, n=16)
    np.testing.assert_allclose(np.load(said["out"]).squeeze(), mean[:, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(np.load(said["std"]).squeeze(), std[:, 0].numpy(), atol=1e-5)


def test_outputs_stand_beside_each_other(data, trained, tmp_path, capsys):
    """The deviations stand beside the file, under its name. Another seed does not replace it."""
    out = tmp_path / "x.npy"
    argv = ["restore", data, "--prior", trained, "--operator", "identity", "--std", "--out", out]
    assert unmurk(*argv, "--seed", 1) == 0
    assert unmurk(*argv, "--seed", 0) == 2
    assert "x-std.npy was made with another seed" in capsys.readouterr().err
    y = torch.from_numpy(np.load(data))[:, None]
    _, std = Posterior.load(trained).mean_std(y, Problem("identity", 0.1), n=16, seed=1)
    np.testing.assert_allclose(np.load(tmp_path / "x-std.npy"), std.numpy(), atol=1e-5)
    assert np.load(out).shape == np.load(data).shape
