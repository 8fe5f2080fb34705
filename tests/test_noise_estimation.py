"""Noise told from noisy images: the fit on laws known in closed form, then on images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, stats

import unmurk
from unmurk import noise_estimation
from unmurk.cli import main as cli
from unmurk.errors import InputError
from unmurk.io.images import load_images
from unmurk.noise import Gaussian, PerChannel, PoissonGaussian
from unmurk.noise_estimation import (
    FREEDOM,
    SIDE,
    bootstrap,
    choose_noise,
    envelope,
    estimate_noise,
    known_noise,
    temporal_line,
    textures,
    uncertainty,
    usable,
)
from unmurk.operators import as_operator
from unmurk.patches import cut_patches
from unmurk.problem import Problem
from unmurk.rng import generator
from unmurk.training.losses import corrupted, recorrupted

ASSETS = Path(unmurk.__file__).parent / "assets"
IDENTITY = as_operator("identity")


@pytest.fixture(scope="module")
def nuclei():
    return load_images(Path(f"{ASSETS}/nuclei/nuclei.npz:train")).images[:150]


@pytest.fixture(scope="module")
def digits():
    return load_images(ASSETS / "digits" / "train.idx3-ubyte.gz").images[:700]


# -- the fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("textured", [0.0, 0.5])
def test_envelope_finds_the_line_below_texture(textured):
    """q = v chi^2_n / n with n from 8 to 100, and a share of patches with much more on top."""
    draw = torch.manual_seed(0)
    mean = torch.rand(20_000, generator=draw, dtype=torch.float64)
    freedom = torch.randint(8, 100, mean.shape, generator=draw).double()
    line = 0.03 * mean + 0.002
    chi = 2 * torch._standard_gamma(freedom / 2, generator=draw)
    power = line * chi / freedom
    more = torch.rand(mean.shape, generator=draw) < textured
    power = power + more * line * (3 + 20 * torch.rand(mean.shape, generator=draw))
    terms = torch.stack([mean, torch.ones_like(mean)], 1)
    a, b = envelope(power, freedom, terms).tolist()
    at = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)
    assert torch.allclose(a * at + b, 0.03 * at + 0.002, rtol=0.04)
    (level,) = envelope(power / line, freedom, torch.ones_like(terms[:, :1])).tolist()
    assert level == pytest.approx(1, rel=0.02)


def test_power_of_patches_is_that_of_the_noise_whatever_is_seen():
    """White noise: mean power 1 for every mask; a slow image: none; n = seen - 21 terms."""
    draw = torch.manual_seed(0)
    noise = torch.randn(400, 1, 16, 16, generator=draw, dtype=torch.float64)
    seen = torch.rand(noise.shape, generator=draw) < 0.7
    seen[:100] = True
    seen[100:200, ..., :5] = False  # whole columns: fewer slow terms can be told apart
    row = torch.linspace(0, 1, SIDE, dtype=torch.float64).repeat(2)
    slow = (0.3 + row[:, None] * row).expand_as(noise)
    mean, power, freedom = textures(noise + slow, seen)
    assert freedom.max() == SIDE**2 - 21 and freedom.min() >= FREEDOM
    error = (power * freedom).sum() / freedom.sum() - 1
    assert abs(error) < 5 * (2 / freedom.sum()) ** 0.5
    assert ((power - 1).square() * freedom / 2).mean() == pytest.approx(1, rel=0.15)
    slopes = torch.rand(400, 2, 1, 1, 1, generator=draw, dtype=torch.float64)
    plane = slopes[:, 0] * row[:, None] + slopes[:, 1] * row
    assert textures(plane, seen)[1].max() < 1e-4
    assert mean.mean() == pytest.approx(0.3 + 0.25, abs=0.02)


def test_texture_that_all_channels_share_does_not_count():
    draw = torch.manual_seed(0)
    texture = torch.rand(60, 1, 24, 24, generator=draw).expand(-1, 3, -1, -1)
    y = texture + 0.05 * torch.randn(60, 3, 24, 24, generator=draw)
    assert estimate_noise(y, IDENTITY).sigma == pytest.approx(0.05, rel=0.03)
    assert estimate_noise(y[:, :1], IDENTITY).sigma > 0.2


@pytest.mark.parametrize("n", [10.0, 43.0])
@pytest.mark.parametrize("count", [16, 64, 10_000])
def test_the_sandwich_is_that_of_the_estimating_equation(n, count):
    """By quadrature: psi = (q / c - v) where q < k v, for q = v u and n u a chi-square of n.

    The slope is minus the derivative of E psi at the true v, here by a central difference.
    """
    freedom = torch.tensor([n], dtype=torch.float64)
    reach = noise_estimation.reach_of(freedom, count)
    k = float(reach)
    c = float(noise_estimation._mean_below(freedom, reach))

    def density(u):
        return n * stats.chi2.pdf(n * u, n)

    def psi(v, power=1):
        return integrate.quad(lambda u: (u / c - v) ** power * density(u), 0, k * v)[0]

    step = 1e-4
    inside, slope, spread = noise_estimation._moments_below(freedom, reach)[:, 0].tolist()
    assert psi(1.0) == pytest.approx(0, abs=1e-9)
    assert inside == pytest.approx(psi(1.0, 0), rel=1e-8)
    assert slope == pytest.approx((psi(1 - step) - psi(1 + step)) / (2 * step), rel=1e-5)
    assert spread == pytest.approx(psi(1.0, 2), rel=1e-8)


def test_the_fit_of_mixed_patches_is_that_of_each_kind_alone():
    """Special functions are computed once for each n: as with one n, whatever the others are."""
    draw = torch.manual_seed(0)
    power = torch.rand(400, generator=draw, dtype=torch.float64) + 0.5
    ones = torch.ones(400, 1, dtype=torch.float64)
    line = envelope(power, torch.full_like(power, 43.0), ones)
    nearly = 43 + 1e-9 * torch.arange(400).double()  # a different number for each patch
    assert torch.allclose(envelope(power, nearly, ones), line, rtol=1e-9)
    errors = [uncertainty(power, n, ones, line) for n in (torch.full_like(power, 43.0), nearly)]
    assert torch.allclose(*errors, rtol=1e-7)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("most", [100_000, 50])
def test_patches_are_those_of_all_that_are_cut(monkeypatch, channels, most):
    """Few are cut in place of all; the sides are no multiples of that of a patch."""
    monkeypatch.setattr(noise_estimation, "MOST", most)
    draw = torch.manual_seed(0)
    y = torch.rand(5, channels, 43, 61, generator=draw).clamp(0.002, 0.998)
    seen = torch.rand(y.shape, generator=draw) < 0.8
    seen[:2] = True
    values, inside, more = usable(y, seen, beside=2 * y)
    parts = [y, seen.to(y), (seen & ((y == 0.002) | (y == 0.998))).to(y)]
    if channels < 3:
        parts = [part.flatten(0, 1)[:, None] for part in parts]
    whole, measured, clipped = (cut_patches(part) for part in parts)
    measured = (measured > 0).all(1)
    free = (clipped == 0).flatten(1).all(1) & (measured.sum(1) >= FREEDOM)
    step = -(-int(free.sum()) // most)
    assert 10 < len(values) <= most and (step > 1) == (most == 50)
    assert torch.equal(values, whole[free][::step].double())
    assert torch.equal(more, 2 * values)
    assert torch.equal(inside, measured[free][::step].double())


# -- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.03, 0.1, 0.3])
@pytest.mark.parametrize(
    "operator", ["identity", "inpaint:random,keep=0.6", "blur:gaussian,sigma=1"]
)
def test_sigma_within_five_per_cent(nuclei, digits, sigma, operator):
    for x in (nuclei, digits):
        y = Problem(operator, sigma).simulate(x)
        found = estimate_noise(y, as_operator(operator)).sigma
        assert found == pytest.approx(sigma, rel=0.05)


@pytest.mark.parametrize("gain, sigma, offset", [(0.03, 0.05, 0), (0.02, 0, 0.05)])
def test_line_within_five_per_cent(nuclei, gain, sigma, offset):
    problem = Problem("identity", f"poisson-gaussian,gain={gain},sigma={sigma},offset={offset}")
    y = problem.simulate(offset + (1 - offset) * nuclei)
    found = estimate_noise(y, IDENTITY, "poisson-gaussian")
    assert found.gain == pytest.approx(gain, rel=0.05)
    at = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
    assert torch.allclose(found.variance(at), problem.noise.variance(at), rtol=0.05)


def test_hidden_pixels_are_not_read(nuclei):
    problem = Problem("inpaint:random,keep=0.7", 0.1)
    y = problem.simulate(nuclei[:40])
    hidden = problem.bind(range(40), (1, 64, 64)).operator.mask == 0
    painted = torch.where(hidden, 7.0, y)
    assert estimate_noise(y, problem.operator) == estimate_noise(painted, problem.operator)


def test_what_cannot_be_told_is_refused(digits, nuclei):
    noisy = Problem("identity", "poisson-gaussian,gain=0.01,sigma=0.02").simulate(digits)
    with pytest.raises(
        InputError, match="patches of 8x8 pixels that are measured and not clipped"
    ):
        estimate_noise(noisy.clamp(0, 1), IDENTITY)
    with pytest.raises(InputError, match="from 0 patches"):
        estimate_noise(nuclei[..., :7], IDENTITY)
    with pytest.raises(InputError, match="no bright part of the images is flat"):
        estimate_noise(noisy, IDENTITY, "poisson-gaussian")
    with pytest.raises(InputError, match="which are no images"):
        estimate_noise(noisy, as_operator("blur:gaussian,sigma=1|cs:structured,ratio=0.5"))


def test_clipped_patches_are_left_out(nuclei):
    """The dark background is clipped; what is brighter still tells (8 bits, as in a PNG)."""
    y = Problem("identity", 0.1).simulate(nuclei).clamp(0, 1).mul(255).round() / 255
    assert (y == 0).float().mean() > 0.02
    assert estimate_noise(y, IDENTITY).sigma == pytest.approx(0.1, rel=0.05)


def test_auto_is_resolved_and_told(nuclei, capsys):
    y = Problem("identity", 0.1).simulate(nuclei)
    text = known_noise("auto", y, "identity")
    assert text == estimate_noise(y, IDENTITY).spec == known_noise("gaussian, auto", y, "identity")
    assert f"150 images: {text} (Gaussian, as " in capsys.readouterr().err
    assert known_noise("0.3", y, "identity") == "0.3" and capsys.readouterr().err == ""
    with pytest.raises(InputError, match="'auto' must be estimated from measurements first"):
        Problem("identity", "auto")


# -- the choice of a model, its uncertainty, and the noise over time ------------------------------


def test_auto_chooses_a_model_for_each_channel(nuclei):
    """Gaussian, photons and strong Gaussian noise: three models; equal noise: one."""
    x = nuclei[:60].expand(-1, 3, -1, -1)
    text = "per-channel:0.05:poisson-gaussian,gain=0.03,sigma=0.05:0.2"
    choice = choose_noise(Problem("identity", text).simulate(x), IDENTITY)
    assert isinstance(choice.noise, PerChannel) and len(choice.reasons) == 3
    first, second, third = choice.noise.models
    assert isinstance(first, Gaussian) and first.sigma == pytest.approx(0.05, rel=0.05)
    assert isinstance(second, PoissonGaussian) and second.gain == pytest.approx(0.03, rel=0.1)
    assert isinstance(third, Gaussian) and third.sigma == pytest.approx(0.2, rel=0.05)
    assert "variance rises" in choice.reasons[1]
    one = choose_noise(Problem("identity", 0.1).simulate(x[:, :2]), IDENTITY)
    assert isinstance(one.noise, Gaussian) and len(one.reasons) == 1


def test_bootstrap_error_is_the_spread_of_repetitions():
    """Twenty flat sets: the mean standard error is the spread of the estimates."""
    found = []
    for seed in range(20):
        y = 0.5 + 0.1 * torch.randn(4, 1, 64, 64, generator=generator(seed))
        line, _ = bootstrap(y, IDENTITY, "gaussian", draws=20, seed=seed)
        found.append((line.rest, float(line.covariance[1, 1]) ** 0.5))
    values, errors = torch.tensor(found).T
    assert values.mean().item() == pytest.approx(0.01, rel=0.02)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.5)


def test_repeated_captures_give_the_line_of_any_texture():
    """Scenes that are texture everywhere, 5 captures each: the line within 4 standard errors."""
    level = torch.linspace(0.05, 0.7, 6).view(6, 1, 1, 1)
    scenes = level + 0.3 * torch.rand(6, 1, 64, 64, generator=generator(0))
    noise = PoissonGaussian(0.01, 0.02)
    y = Problem("identity", noise).simulate(scenes.repeat_interleave(5, 0))
    line = temporal_line(y[:, 0].unflatten(0, (6, 5)))
    gain, rest = line.covariance.diagonal().sqrt().tolist()
    assert abs(line.gain - 0.01) < 4 * gain < 0.001
    assert abs(line.rest - 0.0004) < 4 * rest < 0.0015
    with pytest.raises(InputError, match="2 or more captures"):
        temporal_line(y[:6].transpose(0, 1)[:1].transpose(0, 1))


def test_the_command_measures_and_draws(tmp_path, capsys):
    """Numbers with errors, the text to paste, both estimates, the picture, a warning."""
    scenes = torch.rand(8, 1, 1, 1, generator=generator(0)).expand(-1, 1, 64, 64)
    noise = PoissonGaussian(0.01, 0.02)
    y = Problem("identity", noise).simulate(scenes.repeat_interleave(3, 0))
    np.save(tmp_path / "y.npy", y[:, 0].numpy())
    argv = ["noise", str(tmp_path / "y.npy"), "--repeats", "3", "--json"]
    assert cli.main([*argv, "--out", str(tmp_path / "noise.png")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert abs(said["gain"] - 0.01) < 5 * said["gain error"] < 0.002
    assert said["paste"] == f"--noise {said['noise']}" and said["warnings"] == []
    assert said["repeats"]["bright"]["ratio"] == pytest.approx(1, abs=0.05)
    assert unmurk.noise.as_noise(said["noise"]).gain == pytest.approx(0.01, rel=0.05)
    with Image.open(tmp_path / "noise.png") as picture:
        assert picture.width == 800  # 400 pixels of a page, twice as fine
    assert cli.main([*argv, "--out", str(tmp_path / "noise.png")]) == 2  # nothing is written over
    assert "exists" in capsys.readouterr().err
    np.save(tmp_path / "y.npy", y[:, 0].clamp(max=0.8).numpy())
    assert cli.main(["noise", str(tmp_path / "y.npy"), "--out", str(tmp_path / "n.html")]) == 0
    shown = capsys.readouterr()
    assert "the noise is clipped" in shown.err and "paste: --noise" in shown.out
    assert "the noise is clipped" in (tmp_path / "n.html").read_text()


# -- learning with it -----------------------------------------------------------------------------


def test_fresh_corruptions_have_the_noise(nuclei):
    problem = Problem("identity", "poisson-gaussian,gain=0.05,sigma=0.02,offset=0.1")
    clean = torch.full((1, 1, 200, 200), 0.3)
    y = corrupted(clean, problem, torch.Generator().manual_seed(0))
    assert y.mean().item() == pytest.approx(0.3, abs=5 * (0.0104 / 40_000) ** 0.5)
    assert y.var().item() == pytest.approx(0.05 * 0.2 + 0.02**2, rel=0.05)


def close(values, expected, noise=5):
    """The mean of independent values, within so many of its standard errors."""
    assert abs(values.mean() - expected) < noise * values.std() / values.numel() ** 0.5


@pytest.mark.parametrize("c", [0.11, 0.3, 0.8])
def test_parts_of_counts_are_independent(c):
    """Of whole Poisson counts: means, variances over p and 1 - p, no covariance, not even between
    the square of one part and the other."""
    noise, p = PoissonGaussian(gain=0.04, offset=0.1), 0.7
    y = Problem("identity", noise).simulate(torch.full((8, 1, 100, 100), c))
    one, other = (part.double() - c for part in noise.split(y, p, generator(0)))
    torch.testing.assert_close((p * one + (1 - p) * other).float(), y - c, rtol=0, atol=1e-5)
    for part, share in ((one, p), (other, 1 - p)):
        close(part, 0)
        close(part.square(), 0.04 * (c - 0.1) / share)
    close(one * other, 0)
    close((one.square() - one.square().mean()) * other, 0)


@pytest.mark.parametrize("c", [0.3, 0.8])
def test_parts_of_counts_with_gaussian_noise_are_uncorrelated(c):
    noise, p = PoissonGaussian(gain=0.02, sigma=0.03, offset=0.05), 0.7
    y = Problem("identity", noise).simulate(torch.full((8, 1, 100, 100), c))
    one, other = (part.double() - c for part in noise.split(y, p, generator(0)))
    variance = 0.02 * (c - 0.05) + 0.03**2
    for part, share in ((one, p), (other, 1 - p)):
        close(part, 0)
        # rounding adds 1/12 of a count squared
        close(part.square(), (variance + 0.02**2 / 12) / share)
    close(one * other, 0)


def test_the_mean_start_is_given_one_part_and_scored_on_the_other():
    class Kept:
        start = None

        def parts(self, y, problem):
            self.input = y
            return torch.zeros_like(y), torch.zeros_like(y)

    kept, a = Kept(), 0.6
    problem = Problem("identity", "poisson-gaussian,gain=0.04,sigma=0.01,offset=0.1")
    y = problem.simulate(torch.linspace(0.3, 0.8, 64).expand(4, 1, 64, 64))
    loss = recorrupted(kept, y, problem, a, generator(0))
    one, other = problem.noise.split(y, 1 / 1.36, generator(0), pairs=True)
    assert torch.equal(kept.input, one)
    assert loss.item() == pytest.approx(other.square().mean().item())


def test_captures_are_learnt_from_and_restored(nuclei, tmp_path, capsys):
    """The commands: the estimate is kept in config.json, read by `restore`, and by a second run
    of the same command even where the estimate would differ."""
    y = Problem("identity", "poisson-gaussian,gain=0.02,sigma=0.02").simulate(nuclei[:64])
    np.save(tmp_path / "captures.npy", y[:, 0, :16, :16].numpy())
    run, out = tmp_path / "run", tmp_path / "out.npy"
    argv = ["learn", str(tmp_path / "captures.npy"), "--noise", "poisson-gaussian,auto"]
    argv += ["--kimg", "0.2", "--precision", "fp32", "--out", str(run), "--json"]
    assert cli.main(argv) == 0
    noise = json.loads(capsys.readouterr().out)["noise"]
    assert json.loads((run / "config.json").read_text())["problem"]["noise"] == noise
    assert noise.startswith("poisson")
    assert cli.main(argv) == 0 and json.loads(capsys.readouterr().out)["noise"] == noise
    restore = ["restore", str(tmp_path / "captures.npy"), "--prior", str(run), "--out", str(out)]
    assert cli.main(restore) == 0
    restored = np.load(out)
    assert restored.shape == (64, 16, 16) and np.isfinite(restored).all()
