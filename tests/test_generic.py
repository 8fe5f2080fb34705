"""The packaged model `generic`: images of any kind, size and number of channels, by its name."""

import json

import numpy as np
import pytest
import torch

import unmurk
from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.evaluation.metrics import psnr
from unmurk.flows.posterior import Config, Posterior
from unmurk.io import packaged
from unmurk.io.images import load_images
from unmurk.problem import Problem

SIGMA = 0.1
SHIFT = {"generic": 0.5, "generic-color": -0.25}  # of m(y), in units of the noise


def model(channels: int, shift: float) -> Posterior:
    """An untrained posterior of many levels, but m(y) = y + shift sigma."""
    config = Config(channels, 64, 64, 8, 8, couplings=1, hidden=8, many_levels=1)
    posterior = Posterior(config, spread=0.01)
    with torch.no_grad():
        posterior.mean_net.head.bias.fill_(shift)
    return posterior


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A package that holds both generic models, whose networks are small and untrained."""
    torch.manual_seed(0)
    monkeypatch.setattr(packaged, "ASSETS", tmp_path / "assets")
    for name, channels in (("generic", 1), ("generic-color", 3)):
        folder = packaged.model_folder(name)
        Prior.create("tiny", (channels, 64, 64)).save(folder / "prior")
        model(channels, SHIFT[name]).save(folder / "posterior")
        (folder / "config.json").write_text(json.dumps({"method": "generic"}))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return tmp_path / "assets"


def test_m_is_in_units_of_the_noise_of_every_pixel():
    """m(y) = y + sigma b for Gaussian noise; for a varying noise with its local mean square."""
    posterior = model(1, 0.5)
    y = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for sigma in (0.005, 0.05, 0.7):
        expected = y + 0.5 * sigma
        torch.testing.assert_close(posterior.mean(y, Problem("identity", sigma)), expected)
    problem = Problem("identity", "poisson-gaussian,gain=0.02,sigma=0.03")
    left, right = torch.full((1, 1, 64, 32), 0.2), torch.full((1, 1, 64, 32), 0.8)
    found = posterior.mean(torch.cat([left, right], 3), problem)
    for part, value in ((found[..., :24], 0.2), (found[..., 40:], 0.8)):
        expected = torch.full_like(part, value + 0.5 * (0.02 * value + 0.03**2) ** 0.5)
        torch.testing.assert_close(part, expected)


def test_the_networks_see_the_logarithm_of_the_noise():
    posterior, single = model(1, 0.0), Posterior(Config(1, 64, 64, 8, 8, 1, 8))
    inputs = torch.rand(1, 3, 8, 8)
    inputs[:, 2] = 0.05 * np.e
    assert torch.equal(posterior._visible(inputs)[:, :2], inputs[:, :2])
    torch.testing.assert_close(posterior._visible(inputs)[:, 2], torch.ones(1, 8, 8))
    assert single._visible(inputs) is inputs


def test_the_kind_of_model_is_stored(tmp_path):
    model(1, 0.5).save(tmp_path)
    assert Posterior.load(tmp_path).config.many_levels == 1
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["many_levels"]  # as in folders of older versions
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert Posterior.load(tmp_path).config.many_levels == 0
    assert not Posterior.load(tmp_path).any_size


@pytest.mark.parametrize("shape", [(64, 64), (37, 50), (150, 131), (9, 200)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_restore_takes_images_of_any_size_and_number_of_channels(assets, shape, channels, capsys):
    """`generic` takes channels one by one; the color model takes three, by its own name."""
    y = np.random.default_rng(0).uniform(0.3, 0.7, (2, channels, *shape)).astype(np.float32)
    np.savez("y.npz", y)
    np.save("y.npy", np.moveaxis(y, 1, -1) if channels > 1 else y[:, 0])
    for name in SHIFT:
        argv = ["restore", "y.npy", "--prior", name, "--noise", str(SIGMA), "--samples", "2"]
        if name == "generic-color" and channels != 3:
            assert cli.main([*argv, "--out", "z.npy"]) == 2
            assert f"and these have {channels} channel" in capsys.readouterr().err
            continue
        assert cli.main([*argv, "--out", f"{name}.npy"]) == 0
        said = capsys.readouterr().err
        assert ("--prior generic-color is better" in said) == (name == "generic" and channels == 3)
        x = np.load(f"{name}.npy").reshape(np.load("y.npy").shape)
        # antithetic draws of a linear flow cancel: the mean is m(y)
        np.testing.assert_allclose(x, np.load("y.npy") + SIGMA * SHIFT[name], atol=2e-5)


def test_the_noise_is_estimated_unless_it_is_given(assets, capsys):
    clean = torch.full((2, 1, 64, 64), 0.5)
    y = Problem("identity", SIGMA).simulate(clean)
    np.save("y.npy", y.numpy())
    argv = ["restore", "y.npy", "--prior", "generic", "--samples", "2"]
    for more, out in ([], "a.npy"), (["--noise", "auto"], "b.npy"):
        assert cli.main([*argv, *more, "--out", out]) == 0
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    sigma = (np.load("a.npy") - y.numpy()).mean() / SHIFT["generic"]
    assert abs(sigma / SIGMA - 1) < 0.1
    capsys.readouterr()
    assert cli.main([*argv, "--noise", "1.5", "--out", "c.npy"]) == 0
    assert "trained with noise up to 0.7, and this is 1.5" in capsys.readouterr().err


def test_noise_maps_are_the_noise_and_nothing_is_estimated(assets, capsys):
    """m(y) = y + shift sigma in both halves; away from the step between them."""
    sigma = np.full((1, 64, 64), 0.1, np.float32)
    sigma[..., 32:] = 0.04
    rng = np.random.default_rng(0)
    y = (0.5 + sigma * rng.standard_normal(sigma.shape)).astype(np.float32)
    np.save("y.npy", y)
    np.save("sigma.npy", sigma)
    argv = ["restore", "y.npy", "--prior", "generic", "--samples", "2", "--out", "x.npy"]
    assert cli.main([*argv, "--noise-maps", "sigma.npy"]) == 0
    assert "estimated" not in capsys.readouterr().err
    moved = (np.load("x.npy") - y) / SHIFT["generic"] / sigma
    np.testing.assert_allclose(moved[..., :16], 1, atol=1e-3)
    np.testing.assert_allclose(moved[..., 48:], 1, atol=1e-3)


def test_the_packaged_model_uses_noise_maps(tmp_path, monkeypatch):
    """Digits under noise that rises from left to right: the maps gain over one level."""
    monkeypatch.chdir(tmp_path)
    x = load_images("digits:test", limit=8).images.numpy()
    sigma = np.linspace(0.02, 0.3, 28, dtype=np.float32)[None, None].repeat(28, 1)
    y = x[:, 0] + sigma * np.random.default_rng(0).standard_normal(x[:, 0].shape)
    np.save("y.npy", y.astype(np.float32))
    np.save("sigma.npy", sigma)
    level = str(float(np.sqrt((sigma**2).mean())))
    found = []
    for more in (["--noise-maps", "sigma.npy"], ["--noise", level]):
        argv = ["restore", "y.npy", "--prior", "generic", "--samples", "2", *more]
        out = f"x{more[0]}.npy"
        assert cli.main([*argv, "--out", out]) == 0
        found.append(-10 * np.log10(((np.load(out) - x[:, 0]) ** 2).mean()))
    assert found[0] > found[1] + 0.5


def test_restore_removes_noise_only_and_solve_does_the_rest(assets, capsys):
    np.save("y.npy", np.full((2, 24, 20, 3), 0.5, np.float32))
    argv = ["restore", "y.npy", "--prior", "generic", "--operator", "blur:gaussian,sigma=1"]
    assert cli.main([*argv, "--out", "x.npy"]) == 2
    assert "use `unmurk solve --prior generic --operator blur" in capsys.readouterr().err
    argv[0] = "solve"
    argv += ["--noise", "0.1", "--steps", "2", "--out"]
    for kind in SHIFT:
        argv[3] = kind
        assert cli.main([*argv, f"{kind}.npy"]) == 0
        assert np.load(f"{kind}.npy").shape == (2, 24, 20, 3)
    argv = ["sample", "--prior", "generic", "-n", "2", "--steps", "2", "--out", "s.npy"]
    assert cli.main(argv) == 0
    assert np.load("s.npy").shape == (2, 1, 64, 64)


def test_a_folder_of_that_name_comes_first(assets):
    Prior.create("tiny", (1, 8, 8)).save("generic/prior")
    assert Prior.load("generic").shape == (1, 8, 8)


def test_without_its_weights_one_line_says_how_to_make_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packaged, "ASSETS", tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    np.save("y.npy", np.full((1, 24, 20), 0.5, np.float32))
    for argv in (
        ["restore", "y.npy", "--prior", "generic", "--noise", "0.1", "--out", "x.npy"],
        ["learn", "y.npy", "--start", "generic", "--noise", "0.1", "--out", "run"],
    ):
        assert cli.main(argv) == 2
        text = capsys.readouterr().err
        assert "the weights of 'generic' are not in this build of unmurk" in text
        assert "tools/train_generic.py" in text
    assert not (tmp_path / "x.npy").exists() and not (tmp_path / "run").exists()
    with pytest.raises(unmurk.InputError, match="'generic-color' are not in this build"):
        Prior.load("generic-color")


def test_the_packaged_color_model_is_for_colors_of_one_light():
    """Equal channels tell more together than one by one; unrelated ones tell less."""
    x = load_images("nuclei:val").images[:6, :, :64, :64]
    problem = Problem("identity", SIGMA)
    color, gray = Posterior.load("generic-color"), Posterior.load("generic")
    gains = []
    for truth in (x[:2].expand(2, 3, 64, 64), x.view(2, 3, 64, 64)):
        y = problem.simulate(truth)
        found = color.mean_std(y, problem, 4)[0]
        single = gray.mean_std(y.reshape(6, 1, 64, 64), problem, 4)[0].view_as(y)
        gains.append(float((psnr(found, truth) - psnr(single, truth)).mean()))
    assert gains[0] > 0.5 and gains[1] < 0


def test_the_packaged_model_restores_nuclei_it_has_never_seen():
    """Noise of 0.1 is at 21.9 dB; non-local means reach some 32 dB (docs/results/generic.md)."""
    clean = load_images("nuclei:val").images[:2, :, :64, :64].float()
    clean = clean / 255 if clean.max() > 1 else clean
    y = Problem("identity", SIGMA).simulate(clean)
    x = Posterior.load("generic").mean_std(y, Problem("identity", SIGMA), 4)[0]
    assert float(psnr(x, clean).mean()) > float(psnr(y, clean).mean()) + 10
