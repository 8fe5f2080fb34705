"""Maps known up to a factor, and the maps that a flat field makes: closed forms, and commands."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unmurk.cli.data import Sample
from unmurk.cli.main import main
from unmurk.cli.maps import given_maps, run_maps
from unmurk.errors import InputError
from unmurk.io.captures import as_captures
from unmurk.io.crops import Crops
from unmurk.io.frames import Frames
from unmurk.io.map_scale import measured_scale
from unmurk.io.noise_maps import NoiseMaps, as_noise_maps, flat_maps
from unmurk.io.scale import Scale
from unmurk.noise import PoissonGaussian
from unmurk.operators import as_operator
from unmurk.problem import Problem
from unmurk.training.examples import Examples
from unmurk.training.inputs import weighed, with_maps
from unmurk.training.registry import METHODS
from unmurk.whitening import whiten

SIDE, FACTOR = 64, 1.6
PLAIN = {"axes": None, "channel": (), "skip_bad": False}


def uneven(*shape: int) -> torch.Tensor:
    return 0.02 + 0.06 * torch.rand(shape, generator=torch.Generator().manual_seed(3))


def run(capsys, *argv: object) -> tuple[dict, str]:
    """The result of a command as JSON, and what it said."""
    assert main([str(a) for a in (*argv, "--json")]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


@pytest.fixture
def night(tmp_path):
    """Images with FACTOR times the noise of their maps, and weights of exposure times."""
    sigma, rng = uneven(6, SIDE, SIDE).numpy().astype(np.float64), np.random.default_rng(4)
    y = 0.4 + np.linspace(0, 0.2, SIDE) + FACTOR * sigma * rng.standard_normal(sigma.shape)
    for name, values in (("y", y), ("sigma", sigma), ("time", sigma**-2)):
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    return tmp_path, sigma


def test_captures_of_several_sizes_have_one_factor():
    """Over tiles of captures, with a flat field between the maps and the images."""
    draw = torch.Generator().manual_seed(1)
    sigma = [uneven(1, 96, 130), uneven(1, 70, 80)]
    y = [0.5 + FACTOR * s * torch.randn(s.shape, generator=draw) for s in sigma]
    y[1][0, 5, 7] = float("nan")
    found = measured_scale(
        as_noise_maps(sigma), as_captures(y, nan="mask"), as_operator("identity")
    )
    assert abs(found.factor - FACTOR) < 3 * found.error < 0.1
    flat = 0.5 + torch.rand(1, 96, 130, generator=draw)
    maps = as_noise_maps(sigma[0][None]).under(flat)
    divided = 0.5 + (y[0] - 0.5) / flat  # of the raw image 0.5 g + n
    found = measured_scale(maps, divided[None], as_operator("identity"))
    assert abs(found.factor - FACTOR) < 3 * found.error < 0.15


@pytest.mark.slow
def test_a_run_keeps_the_factor_of_its_maps(night, capsys):
    """`learn --noise auto` scales the maps; `restore` with the run scales them alike."""
    folder, sigma = night
    argv = ["learn", folder / "y.npy", "--noise-maps", folder / "sigma.npy", "--noise", "auto"]
    argv += ["--kimg", 0.004, "--batch", 2, "--precision", "fp32", "--crop", 32]
    found, said = run(capsys, *argv, "--out", folder / "run")
    assert found["factor"] == pytest.approx(FACTOR, rel=0.03)
    assert f"{found['factor']:.3g} +- " in said and "scales the maps" not in said
    config = json.loads((folder / "run" / "config.json").read_text())
    maps = as_noise_maps(torch.from_numpy(sigma).float()[:, None]).scaled(found["factor"])
    assert config["problem"]["noise"] == pytest.approx(maps.level, rel=1e-5)
    again = by_run(folder / "sigma.npy", folder / "run")
    assert again.factor == found["factor"] and again.level == pytest.approx(maps.level)
    restore = ["restore", folder / "y.npy", "--noise-maps", folder / "sigma.npy", "--samples", 2]
    run(capsys, *restore, "--prior", folder / "run", "--out", folder / "o.npy")
    assert np.isfinite(np.load(folder / "o.npy")).all()


def test_weights_of_a_run_keep_their_unit(night):
    """A run that measured the noise at the mean weight gives new weights theirs: twice the
    exposure is the noise over root 2."""
    folder, sigma = night
    text = f"weights:{folder / 'time.npy'}"
    maps, problem = by_command(folder, text, "auto")
    at_mean = FACTOR * (sigma**-2).mean() ** -0.5
    assert maps.factor * maps.sigma == pytest.approx(at_mean, rel=0.03)
    assert problem.level == maps.level
    (folder / "timed").mkdir()
    config = {"problem": problem.to_dict(), "noise maps": maps.record()}
    (folder / "timed" / "config.json").write_text(json.dumps(config))
    np.save(folder / "other.npy", 2 * np.load(folder / "time.npy")[:3])
    again = by_run(f"weights:{folder / 'other.npy'}", folder / "timed")
    torch.testing.assert_close(again.deviation(1), maps.deviation(1) / 2**0.5)
    with pytest.raises(InputError, match="other noise maps than weights"):
        config["noise maps"]["kind"] = "std"
        (folder / "timed" / "config.json").write_text(json.dumps(config))
        by_run(text, folder / "timed")


def test_maps_that_are_off_are_noticed(night, capsys):
    """Absolute maps stay as they are, and a line says by how much the images differ."""
    folder, sigma = night
    maps, _ = by_command(folder, str(folder / "sigma.npy"), "0")
    assert maps.factor == 1
    said = capsys.readouterr().err
    assert re.search(r"is 1\.(5|6)\d? \+- 0\.0\d times that of their noise maps", said)
    assert "--noise auto scales the maps" in said
    np.save(folder / "right.npy", np.float32(FACTOR * sigma))
    by_command(folder, str(folder / "right.npy"), "0")
    assert capsys.readouterr().err == ""


def by_command(folder: Path, maps: str, noise: str) -> tuple[NoiseMaps, Problem]:
    """The maps of `learn`, and the problem."""
    command = SimpleNamespace(noise_maps=maps, noise=noise, **PLAIN)
    y = torch.from_numpy(np.load(folder / "y.npy"))[:, None]
    return given_maps(
        command, Problem("identity", 0.0), Scale, lambda: Sample(y), None, None, compare=True
    )


def by_run(maps: object, prior: object) -> NoiseMaps:
    """The maps of `restore` by a run, without --noise."""
    command = SimpleNamespace(noise_maps=str(maps), noise=None, prior=str(prior), **PLAIN)
    return run_maps(command, Problem("identity", 0.1), Scale, lambda: None)[0]


def test_noise_over_maps_of_uneven_exposure(night, capsys):
    folder, _ = night
    found, _ = run(capsys, "noise", folder / "y.npy", "--noise-maps", folder / "sigma.npy")
    ratio, error = found["noise over noise maps"], found["noise over noise maps error"]
    assert abs(ratio - FACTOR) < 3 * error < 0.09
    assert found["paste"] == f"--noise-maps {folder / 'sigma.npy'} --noise auto"
    for name in ("y", "sigma"):
        np.save(folder / f"{name}-adu.npy", 500 * np.load(folder / f"{name}.npy"))
    adu = [folder / "y-adu.npy", "--noise-maps", folder / "sigma-adu.npy"]
    for command in (["noise"], ["learn", "--out", folder / "no"]):
        assert main([str(a) for a in (command[0], *adu, *command[1:])]) == 2
        assert "such as --range" in capsys.readouterr().err
    again, _ = run(capsys, "noise", *adu, "--range", 0, 500)
    assert again["noise over noise maps"] == pytest.approx(ratio, rel=1e-3)


# -- flat fields ----------------------------------------------------------------------------------


def sensitivity(side: int) -> torch.Tensor:
    """A flat field with the mean 1, darker in the corners and dusty."""
    ramp = torch.linspace(-1, 1, side)
    found = 1.3 - 0.5 * (ramp[:, None].square() + ramp.square())
    found[side // 3, side // 4] = 0.4
    return (found / found.mean())[None]


@pytest.mark.parametrize("crop", [0, 16])
def test_a_flat_field_leaves_the_noise_of_the_raw_image(crop):
    """y / g with the noise sigma / g is, weighted by g, the raw image with the noise sigma."""
    g, sigma = sensitivity(32), 0.1
    raw = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(2))
    divided = Frames(sensitivity=g).correct(raw)
    problem = Problem("identity", sigma)
    y = divided
    if crop:
        y = Crops(as_captures(list(divided)), as_operator("identity"), crop, seed=5)
    white, found = weighed(y, problem, flat_maps(g), (1, crop or 32, crop or 32))
    assert found.sigma == sigma
    numbers = [0, 2]
    wanted, gains = raw[numbers], g.expand(2, 1, 32, 32)
    if crop:
        raws = Crops(as_captures(list(raw)), as_operator("identity"), crop, seed=5)
        flats = Crops(as_captures([g] * 3), as_operator("identity"), crop, seed=5)
        wanted, gains = raws.read(numbers), flats.read(numbers)
    torch.testing.assert_close(white.read(numbers), wanted)
    bound = found.bind(numbers, tuple(wanted.shape[1:]))
    torch.testing.assert_close(bound.A(torch.ones_like(wanted)), gains)


def test_photons_behind_a_flat_field():
    """The variance of y / g is gain c / g + sigma^2 / g^2: after the weighting it is one."""
    g, noise = sensitivity(32), PoissonGaussian(0.004, 0.03)
    raw_problem = Problem("identity", noise)
    raw = raw_problem.simulate((0.5 * g).expand(400, 1, 32, 32))
    learner = METHODS["flowdiff"]()
    y, problem, maps = with_maps(flat_maps(g), raw / g, raw / g, raw_problem, learner)
    assert problem.noise == noise
    white, found = weighed(y, problem, maps, (1, 32, 32))
    numbers = list(range(400))
    inner = (..., slice(3, -3), slice(3, -3))
    spread = white.read(numbers).std(0)[inner]
    assert spread.mean().item() == pytest.approx(found.sigma, rel=0.03)
    variance = 0.004 * 0.5 / g + 0.03**2 / g.square()
    weights = (white.read(numbers) / (raw / g)).mean(0)[inner]
    wanted = found.sigma / variance.sqrt()[inner]
    smooth = (g[inner] - g[inner].median()).abs() < 0.5
    assert ((weights / wanted - 1).abs()[smooth] < 0.06).float().mean() > 0.98
    bound = problem.bind([0], (1, 32, 32))
    assert torch.equal(whiten(raw[:1], bound)[0].isfinite(), torch.ones(1, 1, 32, 32) > 0)


def test_restore_under_a_flat_field_is_restore_under_its_map(tmp_path, capsys):
    """The packaged posterior on raw images with --flat, and on divided ones with the map
    sigma / g; `solve` of both agrees too."""
    g, rng = sensitivity(28).numpy()[0], np.random.default_rng(5)
    x = 0.5 * rng.random((2, 28, 28))
    sigma = 0.3
    raw = g * x + sigma * rng.standard_normal(x.shape)
    files = {"raw": raw, "divided": raw / g, "map": sigma / g, "flat": 0.7 * g}
    for name, values in files.items():
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    for command in (
        ["restore", "--samples", 2, "--operator", "identity"],
        ["solve", "--operator", "identity", "--method", "diffpir", "--steps", 3],
    ):
        one, two = tmp_path / f"{command[0]}-1.npy", tmp_path / f"{command[0]}-2.npy"
        argv = [command[0], tmp_path / "raw.npy", *command[1:], "--prior", "digits"]
        argv += ["--noise", sigma, "--flat", tmp_path / "flat.npy", "--out", one]
        assert main([str(a) for a in argv]) == 0
        argv = [command[0], tmp_path / "divided.npy", *command[1:], "--prior", "digits"]
        argv += ["--noise-maps", tmp_path / "map.npy", "--out", two]
        argv += ["--noise", 0] if command[0] == "solve" else []
        assert main([str(a) for a in argv]) == 0
        np.testing.assert_allclose(np.load(one), np.load(two), rtol=0, atol=2e-4)
    capsys.readouterr()


@pytest.mark.slow
def test_learning_under_a_flat_field(tmp_path, capsys):
    """The run keeps the noise of the raw images; its examples are weighted by g; ambient needs
    --flat-noise even; `noise` measures the raw images."""
    g, rng = sensitivity(32).numpy()[0], np.random.default_rng(6)
    raw = 0.5 * g + 0.05 * rng.standard_normal((24, 32, 32))
    np.save(tmp_path / "raw.npy", raw.astype(np.float32))
    np.save(tmp_path / "flat.npy", (0.8 * g).astype(np.float32))
    flat = ["--flat", tmp_path / "flat.npy"]
    short = ["--kimg", 0.004, "--batch", 2, "--precision", "fp32"]
    learn = ["learn", tmp_path / "raw.npy", *flat, *short]
    found, _ = run(capsys, *learn, "--noise", "gaussian,auto", "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["problem"]["noise"] == pytest.approx(0.05, rel=0.05)
    assert config["noise maps"]["kind"] == "flat"
    kept = Examples.load(tmp_path / "run")
    np.testing.assert_allclose(kept.weights[0, 0].numpy(), g, rtol=1e-5)
    white, bound = kept.white(Problem("identity", 0.05))
    np.testing.assert_allclose(white[:, 0], raw[kept.numbers], atol=1e-6)
    found, _ = run(capsys, "noise", tmp_path / "raw.npy", *flat)
    assert found["sigma"] == pytest.approx(0.05, rel=0.05)
    ambient = [*learn, "--method", "ambient", "--noise", 0.05, "--out"]
    assert main([str(a) for a in (*ambient, tmp_path / "no")]) == 2
    assert "--flat-noise even" in capsys.readouterr().err
    run(capsys, *ambient, tmp_path / "even", "--flat-noise", "even")
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert config["calibration"]["flat noise"] == "even" and "noise maps" not in config
    for name in ("run", "even"):
        out = tmp_path / f"{name}.npy"
        argv = ["restore", tmp_path / "raw.npy", *flat, "--prior", tmp_path / name, "--out", out]
        run(capsys, *argv, "--samples", 2)
        assert np.isfinite(np.load(out)).all()
