"""The scale of noise maps: the known factor comes back, under uneven maps and hidden pixels."""

import pytest
import torch

from unmurk.errors import InputError
from unmurk.io.images import load_images
from unmurk.noise_estimation import SLOW
from unmurk.noise_scale import _power, noise_scale
from unmurk.operators import as_operator
from unmurk.patches import SIDE, slow_functions
from unmurk.problem import Problem

IDENTITY = as_operator("identity")


def maps(kind: str, like: torch.Tensor) -> torch.Tensor:
    """Standard deviations with the median 0.05: exposures of a mosaic, single pixels, a ramp."""
    draw = torch.Generator().manual_seed(7)
    shape = (len(like), 1, *like.shape[-2:])
    if kind == "mosaic":
        found = torch.full(shape, 0.05)
        found[..., :10, :] = 0.1
        found[..., 20:] *= 0.6
        return found
    if kind == "pixels":
        return 0.05 * torch.exp(0.5 * torch.randn(shape, generator=draw))
    return torch.linspace(0.025, 0.1, shape[-1]).expand(shape)


@pytest.mark.parametrize("factor", [0.6, 1.7])
@pytest.mark.parametrize("kind", ["mosaic", "pixels", "ramp"])
def test_the_factor_comes_back_within_three_per_cent(kind, factor):
    """On digits, of which most patches are flat, and bright strokes are not."""
    x = load_images("digits:test", limit=300).images
    sigma = maps(kind, x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = noise_scale(x + factor * sigma * noise, sigma, IDENTITY)
    assert found.factor == pytest.approx(factor, rel=0.03)
    assert 0.001 < found.error < 0.02 * factor


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_hidden_pixels_and_channels(channels):
    """Flat images of which maps, a mask and NaN hide pixels: unbiased by 3 standard errors."""
    draw = torch.Generator().manual_seed(3)
    x = torch.full((12, channels, 48, 48), 0.5)
    sigma = maps("pixels", x).repeat(1, channels, 1, 1)
    sigma[:, -1] *= 2
    y = x + 1.3 * sigma * torch.randn(x.shape, generator=draw)
    y[:, 0][torch.rand(12, 48, 48, generator=draw) < 0.1] = float("nan")
    sigma[:, 0][torch.rand(12, 48, 48, generator=draw) < 0.1] = float("inf")
    masked = as_operator("inpaint:random,keep=0.8")
    y = masked.bind(range(12), x.shape[1:]).apply_mask(y.nan_to_num(0.0)) + 0 * y
    found = noise_scale(y, sigma, masked)
    assert abs(found.factor - 1.3) < 3 * found.error < 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_the_power_is_that_of_dense_algebra(channels):
    """The power of what weighted least squares leave, with a slow part under an uneven map: the
    slow part leaves nothing, and n is the trace of the projection."""
    draw = torch.Generator().manual_seed(2)
    values, sigma = torch.rand(2, 2, channels, SIDE**2, generator=draw).double() + 0.1
    sigma = sigma[:, :1].expand_as(sigma)
    inside = torch.ones(2, SIDE**2).double()
    inside[1, torch.randperm(SIDE**2, generator=draw)[:20]] = 0
    power, freedom = _power(values, inside, sigma)
    slow = slow_functions(SLOW)
    for i in range(2):
        on = inside[i] > 0
        design, z = (slow[:, on] / sigma[i, 0, on]).T, values[i][:, on] / sigma[i, 0, on]
        P = torch.eye(int(on.sum())).double() - design @ torch.linalg.pinv(design)
        left = z @ P
        left = left - left.mean(0) if channels > 1 else left
        n = P.trace() * max(1, channels - 1)
        assert float(freedom[i]) == pytest.approx(float(n))
        torch.testing.assert_close(power[i], left.square().sum() / n, rtol=1e-6, atol=0)
    smooth = (torch.rand(2, channels, len(slow), generator=draw).double() @ slow) * inside[:, None]
    assert float(_power(smooth, inside, sigma)[0].max()) < 1e-12


def test_what_cannot_be_estimated_is_one_line():
    y = Problem("identity", 0.1).simulate(torch.full((1, 1, 16, 16), 0.5))
    with pytest.raises(InputError, match="patches of 8x8"):
        noise_scale(y + torch.linspace(0, 1, 16), torch.full((1, 1, 16, 16), 0.1), IDENTITY)
    with pytest.raises(InputError, match="are no images"):
        noise_scale(y, torch.ones(1), as_operator("mri:cartesian"))
