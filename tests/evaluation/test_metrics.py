"""Scores against closed forms, independent computations and exchangeable draws."""

import builtins
import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import unmurk
from unmurk.errors import InputError
from unmurk.evaluation import distances, metrics
from unmurk.evaluation.distances import kid
from unmurk.evaluation.metrics import DigitClassifier, load_digit_classifier
from unmurk.operators.linalg import dct_matrix

DIGITS = Path(unmurk.__file__).parent / "assets" / "digits"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    raw = gzip.decompress((DIGITS / "test.idx3-ubyte.gz").read_bytes())
    count, height, width = np.frombuffer(raw, ">u4", 3, 4)
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(count, 1, height, width)
    return torch.from_numpy(pixels.copy()).float() / 255


# --- Fidelity ------------------------------------------------------------------------------------


def test_psnr_by_hand():
    ref = torch.full((3, 2, 4, 4), 0.5)
    x = ref + torch.tensor([0.1, 0.01, 0.0]).view(3, 1, 1, 1)
    assert metrics.psnr(x, ref)[:2].tolist() == pytest.approx([20.0, 40.0], abs=1e-4)
    assert metrics.psnr(x, ref)[2] == math.inf


def test_both_images_are_clipped():
    black, white = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    assert metrics.psnr(black - 0.7, black) == math.inf
    assert metrics.psnr(white - 0.1, white + 5) == pytest.approx(20.0, abs=1e-4)
    x = uniform(1, 1, 16, 16) * 3 - 1
    assert metrics.ssim(x, x.clamp(0, 1)) == pytest.approx(1.0, abs=1e-6)


def plain_ssim(x, ref):
    """SSIM of one channel in float64, every window that fits."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()
    x, ref = x.double().numpy(), ref.double().numpy()
    total = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], ref[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = 0.01**2, 0.03**2
            structure = (2 * cov + c2) / (va + vb + c2)
            total.append((2 * ma * mb + c1) / (ma**2 + mb**2 + c1) * structure)
    return np.mean(total)


def test_ssim_against_an_independent_computation():
    ref = uniform(2, 2, 17, 14)
    x = (ref + 0.2 * normal(2, 2, 17, 14)).clamp(0, 1)
    by_hand = [np.mean([plain_ssim(x[b, c], ref[b, c]) for c in range(2)]) for b in range(2)]
    assert metrics.ssim(x, ref).tolist() == pytest.approx(by_hand, abs=1e-5)
    assert metrics.ssim(ref, ref).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_one_image_is_scored_like_a_batch():
    x, ref = uniform(4, 3, 16, 16), uniform(4, 3, 16, 16, seed=1)
    for score in (metrics.psnr, metrics.ssim):
        alone = torch.cat([score(x[i : i + 1], ref[i : i + 1]) for i in range(4)])
        assert alone.shape == (4,)
        assert torch.allclose(score(x, ref), alone, atol=1e-6)


# --- Frechet distance ----------------------------------------------------------------------------


def flat(x):
    return x.flatten(1)


def with_moments(mean, covariance, n=200, seed=0):
    """Images (n, 1, 2, 2) whose sample mean and covariance are exactly those given."""
    z = normal(n, 4, seed=seed).double()
    z = z - z.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(z.T @ z / (n - 1)), z.T, upper=False
    )
    x = mean + (torch.linalg.cholesky(covariance) @ white).T
    return x.reshape(n, 1, 2, 2)


def test_frechet_of_two_gaussians():
    root = torch.linalg.qr(normal(4, 4, seed=5).double())[0]
    first = root @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]).double()) @ root.T * 1e-3
    second = torch.diag(torch.tensor([1.0, 1.0, 2.0, 5.0]).double()) * 1e-3
    means = torch.tensor([0.5] * 4).double(), torch.tensor([0.55, 0.5, 0.5, 0.47]).double()
    values, vectors = torch.linalg.eigh(first)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(half @ second @ half).sqrt().sum()
    expected = 0.05**2 + 0.03**2 + first.trace() + second.trace() - 2 * mixed
    a, b = with_moments(means[0], first), with_moments(means[1], second, n=300, seed=1)
    assert metrics.frechet(a, b, flat) == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.frechet(b, a, flat) == pytest.approx(expected.item(), rel=1e-5)
    assert metrics.frechet(a, a, flat) == 0


def test_frechet_of_two_samples_of_one_distribution():
    """The first-order bias that the documentation states."""
    scales = torch.tensor([0.08, 0.05, 0.03, 0.02])
    images = (0.5 + scales * normal(40, 1000, 4)).view(40, 1000, 1, 2, 2)
    measured = np.mean([metrics.frechet(a, b, flat) for a, b in images.view(20, 2, 1000, 1, 2, 2)])
    v = scales.double() ** 2
    pairs = v[:, None] * v / (v[:, None] + v) * (1 + torch.eye(4))
    expected = (2 * v.sum() + pairs.sum()) / 1000
    assert measured == pytest.approx(expected.item(), rel=0.25)


def test_frechet_sees_clipped_images_that_are_not_rounded():
    seen = []

    def features(x):
        seen.append(x)
        return flat(x)

    images = uniform(50, 1, 2, 2) * 2 - 0.5
    metrics.frechet(images, images.double(), features)
    assert all(x.dtype == torch.float32 for x in seen)
    assert torch.equal(seen[1], images.clamp(0, 1))


def test_frechet_does_not_depend_on_the_batch_and_takes_a_module():
    a, b = uniform(70, 1, 4, 4), uniform(90, 1, 4, 4, seed=1).square()
    module = torch.nn.Flatten()
    whole = metrics.frechet(a, b, module, batch=1000)
    assert metrics.frechet(a, b, module, batch=7) == pytest.approx(whole, rel=1e-9)


def test_frechet_of_digits(digits):
    half, other = digits[::2], digits[1::2]
    noise = normal(*other.shape)
    same = metrics.frechet(half, other)
    little, much = (metrics.frechet(half, other + s * noise) for s in (0.1, 0.3))
    blurred = metrics.frechet(half, F.avg_pool2d(other, 3, 1, 1))
    assert same < little < blurred < much
    assert 25 < much - same < 60
    assert metrics.frechet(half, half) == 0


# --- The classifier ------------------------------------------------------------------------------


def test_classifier_reads_held_out_digits(digits):
    raw = gzip.decompress((DIGITS / "test.idx1-ubyte.gz").read_bytes())
    labels = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=8).copy())
    model = load_digit_classifier()
    guess = model.logits(digits).argmax(dim=1)
    assert (guess == labels).double().mean() > 0.98
    assert model(digits[:3]).shape == (3, 10)
    assert sum(p.numel() for p in model.parameters()) < 120_000


def test_classifier_features(digits):
    model = load_digit_classifier()
    features = model.features(digits)
    assert features.shape == (len(digits), 128)
    assert features.var(dim=0).mean() == pytest.approx(1.0, abs=0.1)
    trim = digits[:, :, 2:30, 2:30] if digits.shape[-1] == 32 else digits
    padded = F.pad(trim, (2, 2, 2, 2))
    assert torch.equal(model.features(trim), model.features(padded))
    alone = torch.cat([model.features(x[None]) for x in digits[:5]])
    assert torch.allclose(alone, features[:5], atol=1e-5)
    assert torch.equal(model.train().features(digits[:5]), model.eval().features(digits[:5]))


def test_classifier_is_frozen_but_lets_gradients_through():
    model = load_digit_classifier()
    x = uniform(2, 1, 28, 28).requires_grad_()
    model.logits(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


# --- Sliced Wasserstein --------------------------------------------------------------------------


def test_directions_are_unit_vectors_in_bands():
    w = distances._band_directions(2, (7, 7), 80, seed=0)
    assert torch.allclose(w.norm(dim=1), torch.ones(80).double(), atol=1e-12)
    constant = w.view(80, 2, 49).sum(dim=2).norm(dim=1)
    band = torch.arange(80) % 8
    assert torch.allclose(constant[band == 0], torch.tensor(7.0).double(), atol=1e-9)
    assert constant[(band > 0) & (band < 7)].max() < 1e-12
    assert constant[band == 7].min() > 0
    cosines = dct_matrix(9)
    assert torch.allclose(cosines @ cosines.T, torch.eye(9).double(), atol=1e-12)


def test_sliced_wasserstein_of_constant_images():
    """All patches equal: each direction measures |<w, difference>|, zero outside band 0."""
    a, b = torch.zeros(3, 1, 12, 12), torch.full((5, 1, 12, 12), 0.2)
    bands = distances._band_directions(1, (7, 7), 128, seed=3)
    expected = (0.2 * bands.sum(dim=1)).abs().mean().item()
    assert metrics.sliced_wasserstein(a, b, seed=3) == pytest.approx(expected, rel=1e-5)


def test_noise_on_black_costs_its_mean_absolute_value():
    black, noise = torch.zeros(200, 1, 16, 16), 0.05 * normal(200, 1, 16, 16)
    expected = 0.05 * math.sqrt(2 / math.pi)
    assert metrics.sliced_wasserstein(black, noise) == pytest.approx(expected, rel=0.03)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_quantile_gap_of_unequal_samples(n, m, seed):
    """Repeating each sample to the common multiple leaves the distribution as it is."""
    a, b = (uniform(3, k, seed=seed + k).double().sort(dim=1).values for k in (n, m))
    repeated = [v.repeat_interleave(math.lcm(n, m) // v.shape[1], dim=1) for v in (a, b)]
    expected = (repeated[0] - repeated[1]).abs().mean()
    assert distances._wasserstein(a, b) == pytest.approx(expected.item(), abs=1e-12)


def test_sliced_wasserstein_sees_noise_and_blur(digits):
    half, other = digits[::2], digits[1::2]

    def distance(a, b):
        return metrics.sliced_wasserstein(a, b, patches=8000)

    noise = normal(*other.shape)
    weak = torch.tensor([0.05, 0.9, 0.05])
    blurred = F.conv2d(F.pad(other, (1,) * 4), (weak[:, None] * weak)[None, None])
    floor = distance(half, other)
    assert floor < 0.015
    assert distance(half, half) == 0
    assert distance(half, blurred) > 1.3 * floor
    noisy = [distance(half, other + s * noise) for s in (0.05, 0.1, 0.2)]
    assert noisy[0] > 2 * floor
    assert noisy == sorted(noisy)


def test_sliced_wasserstein_of_other_sizes_and_whole_images():
    a, b = uniform(40, 2, 9, 12), uniform(30, 2, 15, 8, seed=1)
    assert 0 < metrics.sliced_wasserstein(a, b, patch=5) < 0.03
    assert metrics.sliced_wasserstein(a, 0.8 * b, patch=5) > 0.1
    shifted = metrics.sliced_wasserstein(a, a + 1, patch=None, projections=13, seed=2)
    expected = distances._band_directions(2, (9, 12), 13, seed=2).sum(dim=1).abs().mean().item()
    assert shifted == pytest.approx(expected, rel=1e-5)
    assert metrics.sliced_wasserstein(a, a.repeat(3, 1, 1, 1), patch=None) < 1e-6


# --- Calibration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_of_exact_samples(count, level):
    """200,000 exchangeable values: the standard error is below 0.0012."""
    draws = normal(count + 1, 200, 1, 25, 40, seed=count)
    assert metrics.coverage(draws[1:], draws[0], level) == pytest.approx(level, abs=0.004)


def test_coverage_with_ties_is_still_exact():
    draws = (3 * uniform(9, 100, 1, 40, 40)).floor()
    assert metrics.coverage(draws[1:], draws[0]) == pytest.approx(0.9, abs=0.004)


def test_coverage_uses_the_order_statistics_interval():
    """S = 19 and 0.9: the interval lies between ranks 1 and 19, the extreme samples."""
    samples = torch.arange(19.0).view(19, 1, 1, 1, 1)
    for truth, inside in ((-0.5, 0.0), (0.5, 1.0), (9.0, 1.0), (17.5, 1.0), (18.5, 0.0)):
        counted = metrics.coverage(samples, torch.full((1, 1, 1, 1), truth))
        assert counted == pytest.approx(inside, abs=1e-12)


def test_coverage_of_truths_beyond_all_samples():
    samples, truth = normal(8, 2, 1, 4, 4), torch.full((2, 1, 4, 4), 100.0)
    assert metrics.coverage(samples, truth) == pytest.approx(0.55)


def test_coverage_finds_wrong_spread():
    """64 samples of half or twice the right spread: P(|z| < 1.645 k), k = 0.5 and 2."""
    z = normal(65, 50, 1, 20, 20)
    for scale, expected in ((0.5, 0.589), (2.0, 0.999)):
        assert metrics.coverage(scale * z[1:], z[0]) == pytest.approx(expected, abs=0.02)


def test_where_picks_pixels():
    samples, truth = normal(19, 6, 1, 4, 4), normal(6, 1, 4, 4, seed=1)
    truth[:, :, :2] = 100.0
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    assert metrics.coverage(samples, truth, where=mask) == pytest.approx(0.0, abs=1e-12)
    rest = metrics.coverage(samples[..., 2:, :], truth[..., 2:, :])
    assert metrics.coverage(samples, truth, where=~mask) == pytest.approx(rest)


def test_spread_is_the_root_of_the_unbiased_variance():
    samples = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 3, 1, 4, 4)
    assert metrics.spread(samples) == pytest.approx(math.sqrt(0.5))
    assert metrics.spread(0.3 * normal(4, 50, 1, 40, 40)) == pytest.approx(0.3, rel=0.01)


def test_varying_pixels():
    images = torch.zeros(100, 2, 3, 3)
    images[:, 1, 2, 0] = 0.1 * normal(100)
    images[:, 0, 1, 1] = 1e-3 * normal(100)
    mask = metrics.varying_pixels(images)
    assert mask.shape == (2, 3, 3)
    assert mask.nonzero().tolist() == [[1, 2, 0]]


# --- Bad input -----------------------------------------------------------------------------------

GREY = torch.zeros(4, 1, 16, 16)
BROKEN = GREY.clone()
BROKEN[2, 0, 3, 3] = math.nan
BAD = {
    "shapes": (lambda: metrics.psnr(GREY, GREY[:2]), "psnr needs"),
    "empty": (lambda: metrics.psnr(GREY[:0], GREY[:0]), "at least one image"),
    "not finite": (lambda: metrics.psnr(GREY, BROKEN), "references: number 2"),
    "not finite ssim": (lambda: metrics.ssim(BROKEN, GREY), "images: number 2"),
    "not finite set": (lambda: metrics.frechet(BROKEN, GREY), "real images: number 2"),
    "not finite patches": (lambda: metrics.sliced_wasserstein(GREY, BROKEN), "number 2"),
    "not finite kid": (lambda: kid(GREY, BROKEN), "fake images: number 2"),
    "not finite samples": (lambda: metrics.coverage(BROKEN[None], GREY), "samples: number 0"),
    "not finite truth": (lambda: metrics.coverage(GREY[None], BROKEN), "truth: number 2"),
    "not finite held-out": (lambda: metrics.varying_pixels(BROKEN), "number 2"),
    "no batch": (lambda: metrics.ssim(GREY[0], GREY[0]), "ssim needs"),
    "small": (lambda: metrics.ssim(GREY[..., :8], GREY[..., :8]), "11x11"),
    "one image": (lambda: metrics.frechet(GREY, GREY[:1]), "2 fake images"),
    "not digits": (lambda: metrics.frechet(GREY, GREY), "(B, 1, 28, 28)"),
    "patch": (lambda: metrics.sliced_wasserstein(GREY, GREY, patch=17), "patch 17"),
    "channels": (lambda: metrics.sliced_wasserstein(GREY, GREY.repeat(1, 3, 1, 1)), "equal C"),
    "sizes": (lambda: metrics.sliced_wasserstein(GREY, GREY[..., 1:], patch=None), "one size"),
    "samples": (lambda: metrics.coverage(GREY, GREY), "(S, B, C, H, W)"),
    "level": (lambda: metrics.coverage(GREY[None], GREY, level=90), "between 0 and 1"),
    "one sample": (lambda: metrics.spread(GREY[None]), "2 samples"),
    "mask": (lambda: metrics.coverage(GREY[None], GREY, where=torch.zeros(1)), "no pixel"),
    "mask shape": (
        lambda: metrics.spread(GREY[None].repeat(2, 1, 1, 1, 1), GREY[:3]),
        "broadcast",
    ),
    "few": (lambda: metrics.varying_pixels(GREY[:1]), "at least 2"),
    "weights": (lambda: load_digit_classifier("nowhere"), "nowhere"),
    "small lpips": (lambda: metrics.lpips(GREY, GREY), "32x32"),
    "lpips net": (lambda: metrics.lpips(*[torch.zeros(1, 1, 32, 32)] * 2, net="x"), "'x'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line(name):
    call, says = BAD[name]
    with pytest.raises(InputError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_extra_is_named(monkeypatch):
    genuine = builtins.__import__

    def without_extra(name, *args, **kwargs):
        if name.split(".")[0] in ("lpips", "torch_fidelity"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_extra)
    metrics._lpips_model.cache_clear()
    with pytest.raises(InputError, match=r"lpips.*unmurk\[inception\]"):
        metrics.lpips(*[torch.zeros(1, 1, 32, 32)] * 2)
    with pytest.raises(InputError, match=r"torch_fidelity.*unmurk\[inception\]"):
        metrics.inception_features()


def test_weights_of_another_network_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="another network"):
        load_digit_classifier(tmp_path)
    save_file(DigitClassifier().state_dict(), tmp_path / "model.safetensors")
    assert not load_digit_classifier(tmp_path).training
