"""Tiles: their windows add up to 1, and what is blended is what the whole image would give."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.gaussian import Wiener
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.tiling import (
    NoiseField,
    TiledPosterior,
    TiledPrior,
    Tiling,
    posterior_for,
    prior_for,
)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(x: torch.Tensor, sigma: float | torch.Tensor = 0.0) -> torch.Tensor:
    """A denoiser that sees 2 pixels far: a 5 x 5 mean, with zeros beyond the border."""
    kernel = torch.full((1, 1, 5, 5), 1 / 25, dtype=x.dtype)
    return F.conv2d(x, kernel, padding=2)


def flow(shape: tuple[int, int, int], seed: int = 0) -> Posterior:
    """A flow whose couplings and spread are not those of the start."""
    torch.manual_seed(seed)
    posterior = Posterior.create("tiny", shape).eval()
    with torch.no_grad():
        for p in posterior.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return posterior


# -- where tiles lie ------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(8, 300), st.integers(8, 300)),
    tile=st.integers(2, 16),
    part=st.floats(0, 0.9),
    step=st.sampled_from([1, 4, 8]),
)
def test_windows_add_up_to_one(size, tile, part, step):
    """Everywhere, for any size; tiles start at multiples of the step and overlap enough."""
    tile, overlap = tile * step, int(part * tile) * step
    overlap = min(overlap, tile - step)
    tiling = Tiling(size, tile, overlap, step)
    total = torch.zeros(size, dtype=torch.float64)
    for corner in tiling.corners:
        window = tiling.window(corner, total)
        assert window.shape == tiling.tile and window.min() >= 0
        tiling.crop(total, corner).add_(window)
    assert (total - 1).abs().max() < 1e-12
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in tiling.corners})
        side = tiling.tile[axis]
        assert side % step == 0 and starts[0] == 0 and starts[-1] + side == size[axis]
        assert all(start % step == 0 for start in starts[:-1])
        if side == tile:
            assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:], strict=False))


def test_a_window_is_zero_where_a_tile_lacks_its_surroundings():
    """Over a quarter of the overlap; 1/2 is reached in its middle; image borders do not fall."""
    tiling = Tiling((48, 32), 32, 16, 4)
    assert tiling.corners == [(0, 0), (16, 0)]
    down = tiling.window((16, 0), torch.zeros(()))[:, 5]
    assert down[:4].eq(0).all() and down[12:].eq(1).all()
    assert down[7] + down[8] == pytest.approx(1) and (down.diff() >= 0).all()
    assert torch.allclose(tiling.window((0, 0), down)[:, 0].flip(0), down)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((64, 64), 16, 16), ((64, 64), 2, 0), ((3, 64), 16, 4)]
)
def test_tiles_that_cannot_be(size, tile, overlap):
    with pytest.raises(InputError):
        Tiling(size, tile, overlap, 4)


# -- the denoiser ---------------------------------------------------------------------------------


def test_a_denoiser_that_sees_less_than_the_margin_has_no_seams():
    """Radius 2, margin 3: the blend is the whole image's result, and so is its gradient."""
    x = rand(2, 1, 53, 40).double().requires_grad_()
    v = rand(2, 1, 53, 40, seed=1).double()
    tiled = TiledPrior(smooth, 24, 12)
    whole = smooth(x)
    assert (tiled(x, 0.1) - whole).abs().max() < 1e-12
    (expected,) = torch.autograd.grad(whole, x, v)
    (found,) = torch.autograd.grad(tiled.denoise(x, 0.1), x, v)
    assert (found - expected).abs().max() < 1e-12


def test_every_row_keeps_its_level_and_channels_of_colour_are_grey_images():
    prior = Prior.create("tiny", (1, 16, 16)).eval()
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        x, sigma = rand(2, 3, 24, 32), torch.tensor([0.1, 0.7])
        found = prior_for(prior, (3, 24, 32), tile=16).denoise(x, sigma)
        for row in range(2):
            for c in range(3):
                one = TiledPrior(prior, 16, 8).denoise(x[row, c][None, None], float(sigma[row]))
                assert torch.allclose(found[row, c], one[0, 0], atol=1e-5)
        same = prior_for(prior, (3, 16, 16)).denoise(x[:, :, :16, :16], 0.1)
        alone = prior.denoise(x[:1, :1, :16, :16], 0.1)
    assert torch.allclose(same[:1, :1], alone, atol=1e-5)


def test_solvers_work_unchanged():
    """Any operator acts on the whole image: a blur and a hole across the tiles' borders."""
    for operator in ("blur:gaussian,sigma=2", "inpaint:box,size=20"):
        problem = Problem(operator, 0.05)
        y = problem.simulate(rand(1, 1, 44, 44))
        for method in ("diffpir", "dps"):
            options = {"method": method, "steps": 4, "seed": 3}
            whole = solve(y, problem, smooth, **options).mean
            tiled = solve(y, problem, TiledPrior(smooth, 24, 12), **options).mean
            assert (tiled - whole).abs().max() < 1e-4


def test_which_images_are_tiled():
    prior, posterior = Prior.create("tiny", (1, 16, 16)), flow((1, 16, 16))
    assert prior_for(prior, (1, 16, 16)) is prior
    assert posterior_for(posterior, (1, 16, 16)) is posterior
    tiled = prior_for(prior, (1, 100, 16))
    assert isinstance(tiled, TiledPrior) and (tiled.tile, tiled.overlap) == (32, 8)
    assert isinstance(posterior_for(posterior, (3, 16, 16)), TiledPosterior)
    assert isinstance(prior_for(prior, (2, 16, 16)), TiledPrior)  # channel by channel
    for shape in ((1, 12, 64), (3, 64, 12)):
        for choose, network in ((prior_for, prior), (posterior_for, posterior)):
            with pytest.raises(InputError, match="1x16x16"):
                choose(network, shape)


# -- the flow -------------------------------------------------------------------------------------


def test_a_noise_field_is_one_field():
    """A pixel's noise does not depend on the rectangle it is looked at in; it is N(0, 1)."""
    field = NoiseField(2, 5, 0, 1)
    whole = field.crop(0, 0, 192, 192)
    assert torch.equal(field.crop(60, 3, 70, 125), whole[:, 60:130, 3:128])
    assert not torch.equal(NoiseField(2, 5, 0, 2).crop(0, 0, 8, 8), whole[:, :8, :8])
    n = whole.numel()
    assert abs(whole.mean()) < 4 / n**0.5 and abs(whole.var() - 1) < 6 / n**0.5
    assert abs((whole[:, 63] * whole[:, 64]).mean()) < 4 / 384**0.5


def test_one_tile_is_the_flow_itself():
    """On a tile as large as the image the moments are those of the flow, of the same noise."""
    posterior, problem = flow((1, 16, 16)), Problem("inpaint:random,keep=0.5", 0.1)
    y = rand(2, 1, 16, 16)
    bound = problem.bind([4, 9], (1, 16, 16))
    mean, std = TiledPosterior(posterior, 32, 8).mean_std(y, bound, n=2, seed=3)
    context = posterior.context(y, bound)
    z = torch.stack([NoiseField(1, 3, i, 0, 0).crop(0, 0, 16, 16) for i in (4, 9)])
    with torch.no_grad():
        pair = torch.stack([posterior.transform(s * z, context)[0] for s in (1, -1)])
    assert torch.allclose(mean, pair.mean(0), atol=1e-5)
    assert torch.allclose(std, pair.std(0, correction=0), atol=1e-5)
    draws = TiledPosterior(posterior, 32, 8).sample(y, bound, 2, seed=3)
    assert draws.shape == (2, 2, 1, 16, 16) and torch.allclose(draws[0], pair[0], atol=1e-6)


def test_channels_of_colour_are_restored_one_by_one():
    posterior, problem = flow((1, 16, 16)), Problem("blur:gaussian,sigma=1", 0.1)
    y = rand(1, 3, 32, 24)
    tiled = TiledPosterior(posterior, 16, 8)
    mean, std = tiled.mean_std(y, problem, n=2)
    assert mean.shape == std.shape == (1, 3, 32, 24)
    first = tiled.mean_std(y[:, :1], problem, n=2)
    assert torch.allclose(mean[:, :1], first[0], atol=1e-5)
    assert torch.allclose(std[:, :1], first[1], atol=1e-5)
    with pytest.raises(InputError, match="mixes the 3 channels"):
        tiled.mean_std(rand(1, 1, 32, 24), Problem("colour:grey", 0.1), n=2)


# -- seams ----------------------------------------------------------------------------------------


def jumps(change: torch.Tensor, edges: list[int]) -> tuple[float, float]:
    """Of steps from one column to the next: the largest mean at the edges, and by how much their
    mean size there is above that elsewhere."""
    steps = change.diff(dim=-1)
    at = torch.zeros(steps.shape[-1], dtype=torch.bool)
    at[[edge - 1 for edge in edges]] = True
    size = steps.abs().mean((0, 1, 2))
    signed = steps.mean((0, 1, 2)).abs()[at].max()
    return float(signed), float(size[at].mean() - size[~at].mean())


def test_no_seam_on_a_flat_noisy_image():
    """The packaged networks on black with noise. What the tiles change against one run over the
    whole image, of the same noise, steps by less than 1 % of the noise where tiles begin or end;
    that of tiles side by side steps by more."""
    sigma, size, side = 0.2, (128, 256), 64
    y = sigma * torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(0))
    problem = Problem("identity", sigma)
    prior, posterior = Prior.load("nuclei"), Posterior.load("nuclei")
    tiled, flow = prior_for(prior, (1, *size)), posterior_for(posterior, (1, *size))
    assert isinstance(tiled, TiledPrior)
    tiling = Tiling(size, tiled.tile, tiled.overlap, tiled.step)
    edges = [left for _, left in tiling.corners if left > 0]
    edges += [left + 2 * side for _, left in tiling.corners if left + 2 * side < size[1]]
    assert len(edges) == 4
    with torch.no_grad():
        whole = TiledPrior(prior, size[1], 12).denoise(y, sigma)
        cut = [y[..., j : j + side] for j in range(0, size[1], side)]
        rows = [torch.cat([part[..., i : i + side, :] for i in (0, side)]) for part in cut]
        parts = [prior.denoise(row, sigma).unflatten(0, (2, 3)) for row in rows]
        beside = torch.cat([torch.cat([part[0], part[1]], -2) for part in parts], -1)
        drawn = TiledPosterior(posterior, size[1], 12).mean_std(y, problem, n=2)[0]
        changes = (
            tiled.denoise(y, sigma) - whole,
            flow.mean_std(y, problem, n=2)[0] - drawn,
        )
    for change in changes:
        signed, excess = jumps(change, edges)
        assert signed < 0.01 * sigma and excess < 0.01 * sigma
    assert jumps(beside - whole, [side, 2 * side, 3 * side])[1] > 0.01 * sigma


@pytest.mark.parametrize("operator", ["blur:gaussian,sigma=1.5", "inpaint:random,keep=0.5"])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_flow_in_tiles_starts_where_it_was_trained_to(operator, channels):
    """At the start of training the mean is the Wiener solution, in tiles of a larger image too.

    The flow of one size must not read A^+ y in its place, whose noise it has never met.
    """
    start = Wiener((1, 16, 16))
    posterior = Posterior.create("tiny", (1, 16, 16), start=start).eval()
    problem = Problem(operator, 0.1).bind(range(2), (channels, 40, 36))
    y = problem.simulate(rand(2, channels, 40, 36))
    expected = start.resized((channels, 40, 36)).restore(y, problem)
    mean, _ = TiledPosterior(posterior, 16, 8).mean_std(y, problem, n=2)
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-4)
    assert (problem.A_dagger(y) - expected).square().mean().sqrt() > 0.1
    draws = TiledPosterior(posterior, 16, 8).sample(y, problem, 2)
    assert (draws.mean(0) - expected).square().mean().sqrt() < 0.06  # the spread at the start


def test_tiles_of_a_network_of_ones_own_in_float64():
    """Any module is tiled; float64 stays float64, and float32 gives the same up to rounding."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x, t):
            return self.layer(x)

    prior = Prior(Net(), (1, 16, 16)).eval()
    x = torch.rand(2, 1, 40, 24, dtype=torch.float64)
    with torch.no_grad():
        single = prior_for(prior, (1, 40, 24), 16).denoise(x.float(), 0.3)
        double = prior_for(prior.double(), (1, 40, 24), 16).denoise(x, 0.3)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=0)


def test_the_flow_in_tiles_keeps_float64():
    torch.manual_seed(0)
    posterior = Posterior.create("tiny", (1, 16, 16)).double().eval()
    tiled = posterior_for(posterior, (1, 40, 24), 16)
    y, problem = torch.rand(1, 1, 40, 24, dtype=torch.float64), Problem("identity", 0.1)
    found = tiled.sample(y, problem, 1), *tiled.mean_std(y, problem, 2)
    assert {v.dtype for v in found} == {torch.float64}
    assert (found[1] - y).abs().max() < 1e-12  # untrained: m(y) = y, blended
