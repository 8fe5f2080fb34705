"""`unmurk solve`: its numbers are those of the library."""

import json

import numpy as np
import torch

from tests.cli.calls import unmurk
from unmurk.diffusion.prior import Prior
from unmurk.problem import Problem
from unmurk.solvers import solve


def test_solve_is_the_library_call(data, trained, tmp_path, capsys):
    out = tmp_path / "solved"
    argv = ["--prior", trained, "--operator", "inpaint:box,size=4", "--noise", 0.05, "--out", out]
    argv += ["--steps", 3, "--samples", 2, "--seed", 4, "--json"]
    assert unmurk("solve", data, *argv) == 0
    said = json.loads(capsys.readouterr().out)
    y = torch.from_numpy(np.load(data))[:, None]
    problem = Problem("inpaint:box,size=4", 0.05)
    result = solve(y, problem, Prior.load(trained), samples=2, seed=4, steps=3)
    assert said["nfe"] == result.nfe
    np.testing.assert_allclose(np.load(said["samples"]), result.samples.numpy(), atol=1e-5)
