"""Noise maps: their kinds, the exact likelihood, hidden pixels, crops, and the commands."""

import json
from functools import partial

import numpy as np
import pytest
import tifffile
import torch

from unmurk.cli.main import main
from unmurk.cli.run_page import restored
from unmurk.errors import InputError
from unmurk.gaussian import Wiener, fit
from unmurk.io.captures import as_captures
from unmurk.io.crops import Crops
from unmurk.io.noise_maps import as_noise_maps, kind_of, read_noise_maps
from unmurk.missing import without_missing
from unmurk.operators import Weighted, as_operator
from unmurk.problem import Problem
from unmurk.tiling import posterior_for
from unmurk.training import Recipe, learn, learner
from unmurk.training.examples import Examples

SHORT = {"kimg": 0.008, "batch": 4, "precision": "fp32", "quiet": True}
RECIPE = Recipe(r2r=0.3, e_step=0.5, flow=0.7, buffer=8)


def deviations(*shape):
    return 0.05 + 0.3 * torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["std", "variance", "ivar", "weights"])
def test_every_kind_gives_the_same_deviations(kind):
    """In numbers of a file with 200 numbers for each unit of intensity, and exposure times."""
    sigma = deviations(3, 1, 5, 6)
    file = sigma.double() * 200
    exposure = 7.0 / sigma.double() ** 2
    made = {"std": file, "variance": file**2, "ivar": file**-2, "weights": exposure}[kind]
    at_mean = float((7.0 / exposure.mean()) ** 0.5)
    maps = as_noise_maps(made.float(), kind, gain=200.0, sigma=at_mean)
    for number in range(3):
        torch.testing.assert_close(maps.deviation(number), sigma[number], rtol=1e-5, atol=0)
    assert maps.level == pytest.approx(float(sigma.flatten(1).median(1).values.median()), rel=1e-5)
    weights, hidden = maps.weights([2, 0])
    torch.testing.assert_close(weights, maps.level / sigma[[2, 0]], rtol=1e-5, atol=0)
    assert not hidden.any() and not maps.hides


def test_unusable_numbers_hide_pixels_and_wrong_maps_are_refused():
    sigma = deviations(2, 1, 4, 4)
    sigma[0, 0, 1, 2], sigma[1, 0, 3, 0], sigma[1, 0, 0, 0] = float("nan"), 0.0, -1.0
    maps = as_noise_maps(sigma)
    weights, hidden = maps.weights([0, 1])
    assert hidden.nonzero()[:, [0, 2, 3]].tolist() == [[0, 1, 2], [1, 0, 0], [1, 3, 0]]
    assert bool((weights[hidden] == 1).all()) and maps.hides
    with pytest.raises(InputError, match="2 noise maps for 3 images"):
        maps.check([(4, 4)] * 3, 1)
    with pytest.raises(InputError, match="has 4x4 pixels, the image 4x5"):
        maps.batch([0], 1, (4, 5))
    with pytest.raises(InputError, match="image number 2 has no noise map"):
        maps.batch([2], 1, (4, 4))
    with pytest.raises(InputError, match="no number above 0"):
        as_noise_maps(torch.zeros(1, 1, 4, 4))
    with pytest.raises(InputError, match="median 30 in units"):
        as_noise_maps(torch.full((1, 1, 4, 4), 30.0))
    with pytest.raises(InputError, match="weights need the noise"):
        as_noise_maps(sigma, "weights")
    with pytest.raises(InputError, match="hold the noise already, and a noise of 0.1"):
        learn(torch.rand(2, 1, 4, 4), Problem("identity", 0.1), out="never", noise_maps=sigma)
    assert kind_of("std:night[WHT]") == ("std", "night[WHT]")


def test_crops_of_maps_stay_with_their_captures(tmp_path):
    """Weights, hidden pixels and images of turned crops come from the same places."""
    images = [torch.rand(1, 40, 33), torch.rand(1, 20, 50)]
    sigma = [0.1 + image for image in images]
    sigma[0][0, 7, 9] = float("nan")
    maps = as_noise_maps(sigma)
    crops = Crops(as_captures(images), as_operator("identity"), 16, seed=3)
    crops.lost = lambda position, place: maps.absent(position, place)
    numbers = list(range(40))
    y, weights, hidden = crops.read(numbers), maps.crops(crops, numbers), crops.hidden(numbers)
    seen = hidden == 0
    torch.testing.assert_close(weights[seen], maps.level / (0.1 + y[seen]), rtol=1e-5, atol=0)
    assert int(hidden.sum()) == sum(
        crops.place(n).number == 0
        and crops.place(n).top <= 7 < crops.place(n).top + 16
        and crops.place(n).left <= 9 < crops.place(n).left + 16
        for n in numbers
    )


def gaussian_images(count, side, seed):
    """Draw from a Gaussian prior of known powers."""
    prior = Wiener((1, side, side))
    prior.power.mul_(0.02)
    return prior, prior.sample(count, seed)


@pytest.mark.slow
@pytest.mark.parametrize("crop", [0, 16])
def test_learning_under_uneven_noise(tmp_path, monkeypatch, crop):
    """The start image of a run is E[x | y] of its fitted Gaussian prior: precision-weighted, pixel
    by pixel, and filled in where a map hides a pixel; from crops, whole images have it too."""
    side = 16 if crop == 0 else 24
    _, x = gaussian_images(24, side, 5)
    sigma = deviations(24, 1, side, side)
    sigma[:, :, :, ::5] = 1.0
    sigma[:, 0, 2, 3] = float("nan")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    y = x + sigma.nan_to_num(9.0) * noise
    monkeypatch.setattr(learner, "fit", partial(fit, rounds=2, values=2**13))
    options = {**SHORT, "recipe": RECIPE, "crop": crop, "noise_maps": sigma}
    _, posterior = learn(y, Problem("identity", 0.0), out=tmp_path / "run", **options)
    config = json.loads((tmp_path / "run/config.json").read_text())
    maps = as_noise_maps(sigma)
    assert config["noise maps"]["level"] == config["problem"]["noise"] == maps.level
    weights, hidden = maps.weights([0, 1])
    bare = Problem("identity", maps.level).bind([0, 1], (1, side, side))
    masked = y[:2].masked_fill(hidden, float("nan"))
    filled, bound = without_missing(masked, bare, "mask", (1, side, side))
    bound = bound._with(Weighted(bound.operator, weights), bound.index)
    fitted = posterior.start.resized((1, side, side))
    found = fitted.restore((weights * filled).double(), bound, iterations=1000)
    torch.testing.assert_close(found, exact_mean(fitted, y[:2], sigma[:2]), rtol=0, atol=1e-6)
    adapted = posterior_for(posterior, (1, side, side))
    whole = adapted if crop == 0 else adapted.posterior
    start = whole.first(weights * filled, bound)
    assert torch.equal(start, fitted.restore(weights * filled, bound))
    mean, std = adapted.mean_std(weights * filled, bound, 2)
    assert bool(mean.isfinite().all() and (std > 0).all())
    shown, kept = restored(tmp_path / "run", 2), Examples.load(tmp_path / "run")
    for item, number in zip(shown.items, kept.numbers, strict=True):
        weights, hidden = maps.weights([number])
        masked = y[number : number + 1].masked_fill(hidden, float("nan"))
        filled, bound = without_missing(
            masked, bare.bind([number], (1, side, side)), "mask", (1, side, side)
        )
        bound = bound._with(Weighted(bound.operator, weights), bound.index)
        mean, std = adapted.mean_std(weights * filled, bound, 2, 0, [number])
        torch.testing.assert_close(item.after, mean[0], rtol=0, atol=1e-5)
        noise = next(v for c, v in item.maps.items() if "residual" in c.label)
        wanted = ((mean - filled) / sigma[number]).masked_fill(hidden, 0.0)
        torch.testing.assert_close(noise.abs(), wanted[0].abs(), rtol=1e-4, atol=1e-4)


def exact_mean(prior, y, sigma):
    """E[x | y] by dense algebra: (S^-1 + diag(sigma^-2))^-1 (S^-1 m + y / sigma^2)."""
    basis = cosine_basis(prior)
    inverse = basis.T @ torch.diag(1 / prior.power.double().flatten()) @ basis
    mean, means = prior.mean.double().flatten(), []
    for image, deviation in zip(y.double(), sigma.double(), strict=True):
        precision = torch.where(deviation.isfinite(), deviation**-2, 0.0).flatten()
        right = inverse @ mean + precision * image.flatten()
        means.append(torch.linalg.solve(inverse + torch.diag(precision), right))
    return torch.stack(means).view(len(y), *prior.shape)


def cosine_basis(prior):
    """The matrix of `to_coefficients`, in double precision."""
    unit = torch.eye(prior.power.numel(), dtype=torch.float64)
    return prior.to_coefficients(unit.view(-1, *prior.shape)).flatten(1).T


def test_a_resized_prior_has_the_same_spectrum():
    """A prior of twice the size: the same powers at the same cycles for each pixel."""
    prior = Wiener((1, 8, 6))
    wide = prior.resized((1, 16, 12))
    torch.testing.assert_close(wide.power[:, ::2, ::2], prior.power)
    assert prior.resized((1, 8, 6)) is prior


@pytest.mark.slow
def test_the_commands_take_maps(tmp_path, capsys):
    """`solve` under maps equals `solve` on y / sigma where they are even, and `restore` needs
    them; a FITS extension names their kind."""
    fits = pytest.importorskip("astropy.io.fits")
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    sigma = deviations(3, 8, 8).numpy()
    noise = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    folder = tmp_path / "night"
    folder.mkdir()
    for i in range(3):
        units = [fits.PrimaryHDU(), fits.ImageHDU(x[i] + sigma[i] * noise[i], name="SCI")]
        units += [fits.ImageHDU(sigma[i], name="ERR"), fits.ImageHDU(sigma[i] ** -2, name="IVAR")]
        fits.HDUList(units).writeto(folder / f"{i}.fits")
    one = read_noise_maps(f"{folder}[ERR]")
    other = read_noise_maps(f"{folder}[IVAR]")
    assert (one.kind, other.kind) == ("std", "ivar")
    torch.testing.assert_close(one.weights([0, 1, 2]), other.weights([0, 1, 2]))
    run = str(tmp_path / "run")
    data = f"{folder}[SCI]"
    given = ["--noise-maps", f"{folder}[ERR]", "--kimg", "0.008", "--batch", "4"]
    assert main(["learn", data, "--out", run, *given]) == 0
    restore = ["restore", data, "--prior", run, "--out"]
    assert main([*restore, str(tmp_path / "a"), "--samples", "2"]) == 0
    assert "was learned with noise maps" in capsys.readouterr().err
    with_maps = ["--noise-maps", f"{folder}[IVAR]", "--samples", "2"]
    assert main([*restore, str(tmp_path / "b"), *with_maps]) == 0
    assert "was learned with noise maps" not in capsys.readouterr().err
    a, b = (fits.getdata(tmp_path / name / "1.fits") for name in "ab")
    assert np.abs(a - b).max() > 0.01 and np.isfinite(b).all()
    flags = ["--noise", "poisson-gaussian,auto"]
    assert main(["learn", data, "--out", str(tmp_path / "no"), *given, *flags]) == 2
    assert f"{' '.join(flags)} cannot go with --noise-maps" in capsys.readouterr().err
    # three exposures of one scene, each with the map of its own
    more = [*given, "--repeats", "3"]
    assert main(["learn", data, "--out", str(tmp_path / "three"), *more]) == 0
    restore = ["restore", data, "--prior", str(tmp_path / "three"), "--repeats", "3", "--out"]
    assert main([*restore, str(tmp_path / "c"), *with_maps]) == 0
    assert [path.name for path in (tmp_path / "c").glob("*.fits")] == ["0.fits"]


@pytest.mark.parametrize("form", ["maps", "even"])
def test_solve_weighs_every_pixel(tmp_path, form):
    """Under the packaged prior, one map of one number is a noise of that number, and a pixel
    with a small deviation stays near its measurement."""
    y = np.random.default_rng(3).random((2, 28, 28)).astype(np.float32)
    sigma = np.full((1, 28, 28), 0.2, np.float32)
    if form == "maps":
        sigma[:, ::2] = 0.01
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "sigma.npy", sigma)
    command = ["solve", str(tmp_path / "y.npy"), "--prior", "digits", "--operator", "identity"]
    command += ["--method", "diffpir", "--steps", "8"]
    maps = ["--noise", "0", "--noise-maps", str(tmp_path / "sigma.npy")]
    assert main([*command, *maps, "--out", str(tmp_path / "a.npy")]) == 0
    a = np.load(tmp_path / "a.npy").reshape(y.shape)
    if form == "even":
        assert main([*command, "--noise", "0.2", "--out", str(tmp_path / "b.npy")]) == 0
        np.testing.assert_allclose(a, np.load(tmp_path / "b.npy").reshape(y.shape), atol=1e-5)
    else:
        near, far = (np.abs(a - y)[:, start::2].mean() for start in (0, 1))
        assert near < 0.02 < 0.1 < far


def test_noise_over_maps_is_one(tmp_path, capsys):
    """Flat images with the noise of their maps: 1, and under twice these maps a half; with
    exposure times the noise at their mean."""
    sigma = np.full((4, 64, 64), 0.02)
    sigma[:, :, 32:] = 0.08
    y = 0.5 + sigma * np.random.default_rng(1).standard_normal(sigma.shape)
    for name, values in (("y", y), ("one", sigma), ("two", 2 * sigma), ("time", sigma**-2)):
        np.save(tmp_path / f"{name}.npy", values.astype(np.float32))
    found = []
    for text in ("one", "two", "time"):
        maps = f"{'weights:' * (text == 'time')}{tmp_path / text}.npy"
        command = ["noise", str(tmp_path / "y.npy"), "--noise-maps", maps, "--json"]
        assert main(command) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["noise over noise maps"] == pytest.approx(1, abs=0.05)
    assert found[1]["noise over noise maps"] == pytest.approx(0.5, abs=0.025)
    at_mean = (sigma**-2).mean() ** -0.5
    assert found[2]["noise at the mean weight"] == pytest.approx(at_mean, rel=0.05)


@pytest.mark.slow
def test_images_without_a_usable_map_are_left_out(tmp_path, capsys, monkeypatch):
    """With --skip-bad, by the numbers of the others; without, one line says what to do."""
    monkeypatch.setattr("unmurk.gaussian.MAX_IMAGES", 64)  # of a round of the first fit
    rng = np.random.default_rng(0)
    x = 0.5 + 0.2 * rng.standard_normal((5, 1, 1)).repeat(40, 1).repeat(40, 2)
    sigma = (0.05 + 0.02 * np.arange(5))[:, None, None] * np.ones_like(x)
    for name, values in (("in", x + sigma * rng.standard_normal(x.shape)), ("maps", sigma)):
        (tmp_path / name).mkdir()
        for i, value in enumerate(values):
            tifffile.imwrite(tmp_path / name / f"{i}.tif", value.astype(np.float32))
    tifffile.imwrite(tmp_path / "maps" / "1.tif", np.full((40, 40), np.nan, np.float32))
    tifffile.imwrite(tmp_path / "maps" / "4.tif", np.zeros((40, 40), np.float32))
    run, maps = tmp_path / "run", ["--noise-maps", str(tmp_path / "maps")]
    learn = ["learn", str(tmp_path / "in"), *maps, "--crop", "16", "--kimg", "0.008"]
    learn += ["--batch", "4", "--start", "none", "--out", str(run)]
    assert main(learn) == 2
    said = capsys.readouterr().err.strip()
    assert "1.tif has no finite value: leave it out with --skip-bad" in said
    assert len(said.splitlines()) == 1
    assert main([*learn, "--skip-bad", "--json"]) == 0
    found = capsys.readouterr()
    assert "left out image 1: its noise map has no number above 0" in found.err
    assert set(json.loads(found.out)["skipped"]) == {"image 1", "image 4"}
    kept = json.loads((run / "config.json").read_text())["noise maps"]
    assert kept["level"] == pytest.approx(0.09)  # of 0.05, 0.09 and 0.11
    restore = ["restore", str(tmp_path / "in"), *maps, "--prior", str(run), "--samples", "2"]
    out = ["--out", str(tmp_path / "out"), "--skip-bad", "--json"]
    assert main([*restore, *out]) == 0
    found = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tif")) == ["0.tif", "2.tif", "3.tif"]
    reason = "its noise map has no number above 0"
    assert json.loads(found.out)["skipped"] == {"1.tif": reason, "4.tif": reason}
    assert main([*restore, *out]) == 0  # finished before
    assert json.loads(capsys.readouterr().out)["finished"] == 3
    assert main(["noise", str(tmp_path / "in"), *maps, "--skip-bad", "--json"]) == 0
    over = json.loads(capsys.readouterr().out)["noise over noise maps"]
    assert over == pytest.approx(1, abs=0.1)
    learn[-1], learn[5] = str(tmp_path / "whole"), "0"
    assert main([*learn, "--skip-bad"]) == 2
    assert "images are learned from whole" in capsys.readouterr().err
