"""The weighted loss of a denoiser and its noise levels, against closed forms."""

import pytest
import torch

from unmurk.diffusion.losses import levels, score_matching, weighted


def test_levels_are_log_normal_and_stratified():
    """Of n levels one lies in each n-th of the law log s ~ N(0, 1.2^2), s = 2 sigma (eq. 5.1)."""
    n = 4000
    sigma = levels(n, torch.Generator().manual_seed(0)).double()
    place = torch.special.ndtr((2 * sigma).log() / 1.2)
    middles = torch.arange(n).double() + 0.5
    away = (place.sort().values * n - middles).abs()[1:-1]  # the ends are clamped at 1e-4
    assert 0.45 < float(away.max()) < 0.5 + 5e-3  # rounding in single precision
    assert not torch.equal(place, place.sort().values)  # in random order


def test_the_weight_is_that_of_edm_in_the_range_of_the_network():
    """(1 + s^2) / s^2 mean (2 e)^2: with an error of 0.1, 2.08 for s = 0.14 and 0.05 for s = 2."""
    error, sigma = torch.full((2, 3, 4, 4), 0.1), torch.tensor([0.07, 1.0])
    by_hand = [(1 + s**2) / s**2 * 4 * 0.01 for s in (0.14, 2.0)]
    assert by_hand == pytest.approx([2.0808, 0.05], abs=1e-4)
    assert float(weighted(error, sigma)) == pytest.approx(sum(by_hand) / 2, rel=1e-5)


def test_the_loss_of_an_exact_denoiser_is_the_weighted_posterior_variance():
    """x ~ N(0, v) and D = v x / (v + sigma^2): the loss is w 4 v sigma^2 / (v + sigma^2)."""
    v, sigma, g = 0.09, 0.2, torch.Generator().manual_seed(0)
    x = v**0.5 * torch.randn(20_000, 1, 2, 2, generator=g, dtype=torch.float64)
    level = torch.full((len(x),), sigma, dtype=torch.float64)
    loss = score_matching(lambda noisy, _: v / (v + sigma**2) * noisy, x, level, g)
    s = 2 * sigma
    expected = (1 + s**2) / s**2 * 4 * v * sigma**2 / (v + sigma**2)
    assert float(loss) == pytest.approx(expected, rel=5 * (2 / x.numel()) ** 0.5)
