"""Error bars calibrated without truth: unbiased errors, bins, maps; what a run keeps of them."""

import json
import math

import pytest
import torch

from tests.training.test_learn import blobs
from unmurk.errors import InputError
from unmurk.evaluation import calibration
from unmurk.evaluation.calibration import Bin, calibrate, determines_curve, fit_curve
from unmurk.evaluation.unbiased import (
    has_varied_masks,
    noise_variance,
    split_error,
    stein_error,
    tells_whiteness,
    whiteness,
    withhold,
)
from unmurk.flows.error_bars import Curve, ErrorBars, normal_ratio
from unmurk.flows.posterior import Posterior
from unmurk.problem import Problem
from unmurk.rng import PerImageGenerator
from unmurk.training import learn
from unmurk.training.error_bars import held_out, leading, read_record

N, SIZE = 4000, 6
GAUSSIAN = Problem("identity", 0.2)
COUNTS = Problem("identity", "poisson-gaussian,gain=0.02,sigma=0.05,offset=0.1")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scene():
    """One image (1, 1, SIZE, SIZE), brighter to the right."""
    return torch.linspace(0.2, 0.8, SIZE, dtype=torch.float64).expand(1, 1, SIZE, SIZE)


def matrix(seed=1):
    """A linear restoration of SIZE x SIZE pixels, and the function that applies it."""
    size = SIZE * SIZE
    k = 0.4 * torch.eye(size, dtype=torch.float64)
    k += 0.3 * torch.rand(size, size, generator=seeded(seed), dtype=torch.float64) / size
    return k, lambda y: (y.flatten(1) @ k.T).view_as(y)


def exact_error(k, x, variance):
    """E (k y - x)^2, pixel by pixel, for noise of this variance."""
    bias = k @ x.flatten() - x.flatten()
    return (bias.square() + k.square() @ variance.flatten()).view_as(x)


def agrees(estimates, exact):
    """The mean over images equals the exact value, within 4.5 of its standard errors."""
    mean, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
    assert ((mean - exact[0]).abs() < 4.5 * error).all()
    # and it tells the error from that of the noise alone: the test can fail
    assert (error < 0.1 * exact.mean()).all()


@pytest.mark.parametrize("problem", [GAUSSIAN, COUNTS], ids=["gaussian", "poisson-gaussian"])
def test_steins_estimate_is_the_error_of_a_linear_restoration(problem):
    x = scene()
    k, restore = matrix()
    y = problem.simulate(x.expand(N, -1, -1, -1), seed=3)
    values, square = stein_error(restore, y, problem, seeded())
    assert torch.equal(values, restore(y))
    agrees(square, exact_error(k, x, problem.noise.variance(x)))


@pytest.mark.parametrize("problem", [GAUSSIAN, COUNTS], ids=["gaussian", "poisson-gaussian"])
def test_the_split_gives_the_error_at_the_noise_of_the_first_half(problem):
    x, alpha = scene(), 0.8
    k, restore = matrix()
    y = problem.simulate(x.expand(N, -1, -1, -1), seed=3)
    square = split_error(restore, y, problem, alpha, seeded())
    variance = problem.noise.variance(x) * (1 + alpha**2)
    if problem is COUNTS:  # the split adds the variance of rounding, gain^2 / 12
        variance += 0.02**2 / 12 * (1 + alpha**2)
    exact = exact_error(k, x, variance)
    mean, error = square.mean(0), square.std(0) / len(square) ** 0.5
    assert ((mean - exact[0]).abs() < 4.5 * error + 2e-4).all()


def test_the_projected_estimate_is_the_error_in_the_directions_of_y():
    problem, x = Problem("blur:gaussian,sigma=1.0", 0.05), scene()
    bound = problem.bind([0], x.shape[1:])
    gamma, zero = (0.25 / 0.05) ** 2, torch.zeros_like(x)

    def data(y):
        return bound.operator.prox_l2(torch.zeros_like(y), y, gamma)

    k, restore = matrix()
    y = problem.simulate(x.expand(N, -1, -1, -1), seed=3)
    _, square = stein_error(
        restore, y, problem, seeded(), image=lambda x: data(bound.A(x)), data=data
    )
    size = SIZE * SIZE
    basis = torch.eye(size, dtype=torch.float64).view(size, 1, SIZE, SIZE)
    p = data(bound.A(basis)).flatten(1).T
    a = bound.A(basis).flatten(1).T
    bias = p @ (k @ a - torch.eye(size, dtype=torch.float64)) @ x.flatten()
    exact = bias.square() + 0.05**2 * (p @ k).square().sum(1)
    assert data(zero).abs().max() == 0
    agrees(square, exact.view_as(x))


def test_withheld_pixels_stand_for_hidden_ones():
    problem = Problem("inpaint:random,keep=0.5", 0.1).bind(range(8), (1, 16, 16))
    hidden, more = withhold(problem, seeded())
    before, after = problem.operator.mask, hidden.operator.mask
    assert torch.equal(before - after, more) and hidden.index == list(range(8))
    assert 0.06 < float(more.sum() / before.sum()) < 0.14  # a tenth
    holes = Problem("inpaint:box,size=4,seed=0", 0.1).bind(range(8), (1, 16, 16))
    _, more = withhold(holes, seeded())
    assert 8 < float(more.sum((1, 2, 3)).mean()) <= 16  # a hole of 16 pixels, elsewhere
    for same in (Problem("inpaint:box,size=4", 0.1), GAUSSIAN):
        bound = same.bind(range(8), (1, 16, 16))
        assert not has_varied_masks(bound)
        with pytest.raises(InputError, match="does not hide other pixels"):
            withhold(bound, seeded())
    assert has_varied_masks(problem) and has_varied_masks(holes)
    assert not has_varied_masks(problem.index_select([0]))


def test_channels_of_their_own_noise_have_unbiased_errors():
    """Equal noises are one noise; of y itself, the error is the variance of each channel."""
    y = GAUSSIAN.simulate(torch.full((64, 2, SIZE, SIZE), 0.5))
    equal = Problem("identity", "per-channel:0.2:0.2")
    for problem in (GAUSSIAN, equal):
        assert torch.equal(noise_variance(y, problem), torch.full_like(y, 0.2**2))
    counts = Problem(
        "identity", "per-channel:0.1:poisson-gaussian,gain=0.02,sigma=0.05,offset=0.1"
    )
    expected = torch.stack([torch.full_like(y[:, 0], 0.01), 0.02 * (y[:, 1] - 0.1) + 0.05**2], 1)
    torch.testing.assert_close(noise_variance(y, counts), expected)
    y = counts.simulate(torch.full((64, 2, 16, 16), 0.5))
    posterior = Posterior.create("tiny", (2, 16, 16), 0.01).eval()  # untrained: y itself
    found = calibrate(posterior, y, counts, range(64), draws=4)
    error = (0.01 + 0.02 * 0.4 + 0.05**2) / 2
    assert found.record["unbiased_psnr"]["after"] == pytest.approx(
        -10 * math.log10(error), abs=0.1
    )
    assert found.error_bars is not None


def test_other_noise_is_refused():
    class Cauchy:
        spec = "cauchy"

        def draw(self, clean, streams):
            return clean

        def log_likelihood(self, clean, y):
            return clean

        def variance(self, clean):
            return clean

    with pytest.raises(InputError, match="cauchy"):
        noise_variance(torch.zeros(1), Problem("identity", Cauchy()))


# --- whiteness -----------------------------------------------------------------------------------


def test_white_noise_is_white_and_blurred_noise_has_its_autocorrelation():
    n = torch.randn(4, 1, 64, 65, generator=seeded())
    everywhere = torch.ones_like(n, dtype=torch.bool)
    found = whiteness(n, everywhere)
    for rho, error in zip(found["autocorrelation"], found["standard_error"], strict=True):
        assert abs(rho) < 4 * error
    assert found["statistic"] < 27.9  # chi-square of 6 degrees exceeds it once in 10,000
    rows = (n[..., 1:] + n[..., :-1]) / 2**0.5  # a moving average: 1/2 at the lag 1, else 0
    found = whiteness(rows, everywhere[..., 1:])
    expected = [0.5, 0, 0, 0, 0, 0]
    for rho, exact in zip(found["autocorrelation"], expected, strict=True):
        assert abs(rho - exact) < 0.04
    assert abs(found["power"] - 1) < 0.05
    few = everywhere[:1, :, :32, :32]
    assert not tells_whiteness(few) and tells_whiteness(everywhere)
    with pytest.raises(InputError, match="1000 pairs"):
        whiteness(n[:1, :, :32, :32], few)
    assert whiteness(torch.zeros_like(n), everywhere)["largest"] == 0


# --- maps ----------------------------------------------------------------------------------------


def test_a_map_is_linear_in_the_logarithm_and_keeps_its_ratio_beyond_the_knots():
    curve = Curve((0.1, 0.4), (0.2, 0.4), (1.0, 2.0))
    s = torch.tensor([0.01, 0.1, 0.2, 0.4, 0.8], dtype=torch.float64)
    expected = torch.tensor([0.02, 0.2, 0.2 * 2**0.5, 0.4, 0.8], dtype=torch.float64)
    assert torch.allclose(curve.std(s), expected)
    width = torch.tensor([1.0, 1.0, 2**0.5, 2.0, 2.0], dtype=torch.float64)
    assert torch.allclose(curve.half_width(s), expected * width)
    assert torch.allclose(
        curve.half_width(s, 0.5) / curve.half_width(s), 0 * s + 0.67449 / 1.64485, atol=1e-5
    )
    assert bool((curve.std(torch.linspace(0.001, 1, 500)).diff() >= 0).all())


def test_hidden_pixels_have_a_map_of_their_own_and_no_trust_means_no_map():
    one, other = Curve((0.1,), (0.2,), (1.5,)), Curve((0.1,), (0.4,), (1.5,))
    s, mask = torch.full((1, 2, 1, 2), 0.1), torch.tensor([[[[1.0, 0.0]]]])
    found = ErrorBars(one, other).std(s, mask)
    assert torch.allclose(found, torch.tensor([0.2, 0.4]).expand(1, 2, 1, 2))
    assert torch.allclose(ErrorBars(one).std(s, mask)[..., 1], s[..., 1])
    doubted = ErrorBars(one, other, trusted=False, why="clipped")
    assert torch.equal(doubted.std(s, mask), s)
    assert torch.allclose(doubted.half_width(s, mask), 1.644854 * s)


def test_neighbors_that_violate_the_order_are_pooled():
    def bin_(predicted, square, error):
        return Bin(100, predicted, square, error, predicted, 1.6)

    curve = fit_curve([bin_(0.1, 0.01, 1e-3), bin_(0.2, 0.09, 1e-3), bin_(0.3, 0.03, 2e-3)])
    pooled = (0.09 / 1e-6 + 0.03 / 4e-6) / (1 / 1e-6 + 1 / 4e-6)
    assert curve.calibrated == pytest.approx((0.1, pooled**0.5, pooled**0.5))
    assert not determines_curve([])
    with pytest.raises(InputError, match="above zero"):
        fit_curve([])


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"measured": 3},
        {"measured": {"predicted": [0.1], "calibrated": [0.1]}},
        {"measured": {"predicted": [0.1, 0.1], "calibrated": [0.1, 0.2], "width": [1, 1]}},
        {"measured": {"predicted": [0.1, 0.2], "calibrated": [0.2, 0.1], "width": [1, 1]}},
        {"measured": {"predicted": [0.1], "calibrated": [-0.1], "width": [1]}},
        {"measured": {"predicted": [0.1], "calibrated": ["x"], "width": [1]}},
        {"measured": {"predicted": [], "calibrated": [], "width": []}},
        {"trusted": "yes"},
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, change):
    bars = ErrorBars(Curve((0.1, 0.2), (0.2, 0.3), (1.5, 1.6)), Curve((0.1,), (0.2,), (1.5,)))
    bars.save(tmp_path)
    assert ErrorBars.load(tmp_path) == bars
    file = tmp_path / "error_bars.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match="error_bars.json") as caught:
        ErrorBars.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_levels_scale_like_a_normal_distribution():
    assert normal_ratio(0.9) == pytest.approx(1)
    assert normal_ratio(math.erf(1 / 2**0.5)) == pytest.approx(1 / 1.6448536)
    with pytest.raises(InputError, match="level"):
        normal_ratio(1.0)


# --- calibration of a posterior whose errors are known -------------------------------------------


class Known(torch.nn.Module):
    """A posterior of images whose pixels are independent and Gaussian, N(0.5, tau^2).

    Args:
        tau: Standard deviations of the pixels, shape (C, H, W).
        sigma: Standard deviation of the noise.
        factor: Predicted standard deviation over the exact one.
        own: Weight of the pixel's own residual in the predicted standard deviation.
    """

    def __init__(self, tau, sigma, factor, own=0.0):
        super().__init__()
        self.tau, self.factor, self.own, self.shape = tau, factor, own, tuple(tau.shape)
        self.weight = torch.nn.Parameter(tau**2 / (tau**2 + sigma**2))
        self.exact = (tau**2 * sigma**2 / (tau**2 + sigma**2)) ** 0.5

    def mean_std(self, y, problem, n, seed, index, calibrated):
        mask = 1.0 if problem.operator.mask is None else problem.operator.mask
        mean = 0.5 + mask * self.weight.detach() * (y - 0.5)
        std = torch.where(torch.as_tensor(mask) > 0, self.exact, self.tau)
        return mean, self.factor * std * (1 + self.own * (y - 0.5).square()).expand_as(y)

    def sample(self, y, problem, n, seed, index):
        mean, std = self.mean_std(y, problem, n, seed, index, False)
        return torch.stack(
            [mean + std * PerImageGenerator(seed, index, k).randn(*self.shape) for k in range(n)]
        )


def known(problem, factor, own=0.0, images=400):
    """A posterior, images and measurements: the left half varies little, the right half much."""
    tau = torch.full((1, 16, 16), 0.1)
    tau[..., 8:] = 0.4
    x = 0.5 + tau * torch.randn(images, 1, 16, 16, generator=seeded())
    return Known(tau, problem.level, factor, own), x, problem.simulate(x, 5)


@pytest.mark.parametrize("factor", [0.7, 1.5])
def test_the_exact_standard_deviation_is_recovered(factor):
    posterior, x, y = known(GAUSSIAN, factor)
    made = calibrate(posterior, y, GAUSSIAN, range(len(y)))
    mean, std = posterior.mean_std(y, GAUSSIAN, 16, 0, None, False)
    found = made.error_bars.std(std)
    assert (found / posterior.exact - 1).abs().max() < 0.05
    half = made.error_bars.half_width(std)
    for part in (slice(0, 8), slice(8, 16)):
        inside = ((x - mean).abs() < half)[..., part].float().mean()
        assert abs(float(inside) - 0.9) < 0.02
    ratios = made.record["spread_over_error"]["measured"]
    assert ratios["before"] == pytest.approx(factor, rel=0.03)
    assert ratios["after"] == pytest.approx(1, abs=0.03)
    psnr = -10 * math.log10(float((mean - x).square().mean()))
    assert made.record["unbiased_psnr"]["after"] == pytest.approx(psnr, abs=0.15)
    assert made.record["unbiased_psnr"]["before"] == pytest.approx(-20 * math.log10(0.2), abs=1e-4)
    assert made.record["trusted"]


def test_hidden_and_measured_pixels_are_calibrated_apart():
    problem = Problem("inpaint:random,keep=0.6", 0.2)
    posterior, x, y = known(problem, 0.7, images=600)
    bars = calibrate(posterior, y, problem, range(len(y))).error_bars
    assert (bars.measured.std(0.7 * posterior.exact) / posterior.exact - 1).abs().max() < 0.06
    found = bars.hidden.std(0.7 * posterior.tau)  # a tenth of the pixels: fewer
    assert (found / posterior.tau - 1).abs().max() < 0.15


def test_bins_do_not_depend_on_the_noise_of_their_own_pixel():
    """A prediction that grows with its own noise alone: Stein's estimate alone is misled by it."""
    posterior = Known(torch.full((1, 16, 16), 0.05), 0.2, 1.0, own=20.0)
    x = 0.5 + 0.05 * torch.randn(600, 1, 16, 16, generator=seeded())
    y = GAUSSIAN.simulate(x, 5)
    mean, std = posterior.mean_std(y, GAUSSIAN, 16, 0, None, False)
    _, square = stein_error(
        lambda y: posterior.mean_std(y, GAUSSIAN, 16, 0, None, False)[0], y, GAUSSIAN, seeded()
    )
    error = float((mean - x).square().mean())
    largest = std > std.flatten().kthvalue(int(0.9 * std.numel())).values
    biased = float(square[largest].mean())
    true = float((mean - x)[largest].square().mean())
    assert biased > 10 * true  # Stein's estimate fails on pixels selected by their own noise
    bars = calibrate(posterior, y, GAUSSIAN, range(600)).error_bars
    spread = float(bars.std(std).square().mean())
    assert spread / error == pytest.approx(1, abs=0.35)


def test_correlated_noise_takes_the_trust_away():
    tau = torch.full((1, 16, 16), 0.02)
    n = torch.randn(400, 1, 16, 17, generator=seeded())
    y = 0.5 + 0.2 * (n[..., 1:] + n[..., :-1]) / 2**0.5
    made = calibrate(Known(tau, 0.2, 1.0), y, GAUSSIAN, range(400))
    assert not made.record["trusted"] and "not white" in made.record["why"]
    assert made.error_bars is None or not made.error_bars.trusted
    told = calibrate(Known(tau, 0.2, 1.0), y, GAUSSIAN, range(400), trusted=False, why="clipped")
    assert told.record["why"] == "clipped"


# --- in a run ------------------------------------------------------------------------------------


def test_large_sets_give_up_their_last_images():
    y = torch.arange(1000.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    count = held_out(y, (1, 8, 8), 0.1)
    assert count == 64 and len(leading(y, len(y) - count)) == 936
    assert held_out(y[:511], (1, 8, 8), 0.1) == 0
    assert leading(y, 1000) is y


def test_a_run_calibrates_its_posterior_and_says_so(tmp_path):
    from unmurk.cli.run_page import run_report

    y, run = GAUSSIAN.simulate(blobs()), tmp_path / "run"
    _, posterior = learn(y, GAUSSIAN, out=run, kimg=0.08, batch=8, precision="fp32", quiet=True)
    record = read_record(run)
    assert record["kimg"] == 0.08 and record["held_out"] is False and record["images"] > 0
    loaded = Posterior.load(run)
    assert loaded.error_bars == posterior.error_bars and loaded.error_bars is not None
    loaded.error_bars = ErrorBars(Curve((0.1,), (0.2,), (1.5,)))
    mean, std = loaded.mean_std(y[:2], GAUSSIAN)
    same, plain = loaded.mean_std(y[:2], GAUSSIAN, calibrated=False)
    assert torch.equal(mean, same) and torch.allclose(std, 2 * plain)
    low, high = loaded.interval(y[:2], GAUSSIAN)
    assert torch.allclose(high - low, 2 * 1.5 * std, rtol=1e-4)
    stamp = (run / "calibration.json").stat().st_mtime_ns
    _, again = learn(y, GAUSSIAN, out=run, kimg=0.08, batch=8, precision="fp32", quiet=True)
    assert again.error_bars == posterior.error_bars
    assert (run / "calibration.json").stat().st_mtime_ns == stamp
    assert "Error bars" in run_report(run).read_text()


def test_restore_writes_calibrated_deviations(tmp_path, capsys):
    """Twice those of the draws where the map says so; an untrusted map is named, not applied."""
    import shutil

    import numpy as np

    import unmurk
    from unmurk.cli import main as cli
    from unmurk.diffusion.prior import locate

    run = tmp_path / "run"
    shutil.copytree(locate("digits", "posterior", "model.safetensors"), run / "posterior")
    y = unmurk.load_images("digits:test", limit=2).images.numpy()
    np.save(tmp_path / "y.npy", y)
    bars = ErrorBars(Curve((0.1,), (0.2,), (1.5,)), why="clipped noise")

    def std(trusted, name, *more):
        ErrorBars(bars.measured, None, trusted, bars.why).save(run / "posterior")
        arguments = ["restore", tmp_path / "y.npy", "--prior", run, "--out", tmp_path / name]
        known = ["--operator", "identity", "--noise", "0.3", "--samples", "2", "--std"]
        assert cli.main([str(a) for a in [*arguments, *known, *more]]) == 0
        return np.load(tmp_path / name.replace(".npy", "-std.npy")), capsys.readouterr().err

    double, _ = std(True, "a.npy")
    single, _ = std(True, "b.npy", "--uncalibrated")
    doubted, said = std(False, "c.npy")
    np.testing.assert_allclose(double, 2 * single, rtol=1e-5)
    np.testing.assert_array_equal(doubted, single)
    assert "not calibrated: clipped noise" in said


def test_noise_that_no_model_fits_takes_the_trust_of_a_run_away(tmp_path):
    """Clipped noise looks white in the residual, and is noticed in the measurements."""
    from unmurk.training.error_bars import calibrate_run

    posterior, problem = Posterior.create("tiny", (1, 16, 16)), Problem("identity", 0.1)
    y = problem.simulate(torch.full((64, 1, 16, 16), 0.1))
    how = {"held": 0, "kimg": 1.0, "seed": 0}
    for data, trusted in ((y, True), (y.clamp_min(0.0), False)):
        record = calibrate_run(tmp_path, posterior, data, problem, **how)
        assert record["trusted"] is trusted
    assert "clipped" in record["why"] or "black" in record["why"]


def test_quiet_pixels_of_a_bin_that_spans_decades_keep_their_interval():
    """Of normal errors, 5 % of deviation 0.1 and the others of 1e-7 to 1e-3, the 90 % quantile is
    0.02 root mean squares; 0.9 deviations hold erf(0.9 / 2^(1/2)) = 0.632 of the quiet ones."""
    draw = torch.Generator().manual_seed(0)
    s = 10 ** (4 * torch.rand(40_000, generator=draw, dtype=torch.float64) - 7)
    s[::20] = 0.1
    tail, error = (torch.randn(len(s), generator=draw, dtype=torch.float64) for _ in range(2))
    values = {"predicted": s, "rank": s, "blind": s, "square": s.square()}
    values |= {"tail": tail.abs(), "image": torch.arange(len(s)) % 50}
    assert float((s * tail).abs().quantile(0.9) / (s * tail).square().mean().sqrt()) < 0.05
    joined = calibration._bin(values, torch.arange(len(s)), s.sort().values)
    inside = (s * error).abs() <= fit_curve([joined]).half_width(s)
    assert float(inside[s < 1e-3].double().mean()) == pytest.approx(0.632, abs=0.01)


def test_estimates_below_zero_are_replaced_by_what_can_be_resolved():
    def bin_of(applied, square, error):
        return Bin(100, applied, square, error, applied, 1.6)

    curve = fit_curve([bin_of(0.1, -0.001, 0.0004), bin_of(0.2, 0.04, 0.001)])
    assert curve.calibrated == pytest.approx((0.02, 0.2))  # sqrt of the standard error 0.0004
    curve = fit_curve([bin_of(0.1, -0.001, 0.5), bin_of(0.2, 0.04, 0.001)])
    assert curve.calibrated == pytest.approx((0.2, 0.2))  # no more than the next estimate
    none = [bin_of(0.1, -0.001, 0.0004), bin_of(0.2, -0.0001, math.inf)]
    assert not determines_curve(none)
    with pytest.raises(InputError, match="above zero"):
        fit_curve(none)
