"""Random streams: the ids that draws depend on, and how streams are identified."""

import pytest
import torch
from scipy.stats import binom

from unmurk.errors import InputError
from unmurk.rng import PerImageGenerator, StreamId, binomial_pairs, generator

IDS = {
    "PATCHES": 1,
    "DIRECTIONS": 2,
    "PRIOR": 21,
    "POSTERIOR": 22,
    "COMPONENT": 23,
    "POSTERIOR_COMPONENT": 24,
    "EXAMPLE": 25,
    "WAVELET_PRIOR": 26,
    "GAUSSIAN_PRIOR": 26,
    "WAVELET_SCALE": 27,
    "GIBBS": 28,
    "GIBBS_SUBSET": 29,
    "MASK": 7001,
    "NOISE": 7002,
    "SOLVER": 7003,
    "FLOWDIFF_E_STEP": 7004,
    "NONLINEAR_BLUR": 7004,
    "GAUSSIAN_POSTERIOR": 7005,
    "E_STEP": 7006,
    "CROP": 7007,
    "REPEATS": 7008,
    "CLEAN": 7009,
    "HALF_SCALE": 7010,
    "STEP": 0xFFFF0001,
    "BATCH": 0xFFFF0002,
    "INIT": 0xFFFF0003,
    "GAUSSIAN_PROBE": 0xFFFF0005,
    "GAUSSIAN_SUBSET": 0xFFFF0006,
    "GAUSSIAN_START": 0xFFFF0007,
    "VALIDATION": 0xFFFF0008,
    "CALIBRATION": 0xFFFF0009,
}


def test_the_numbers_stay_so_that_draws_stay():
    assert {name: int(member) for name, member in StreamId.__members__.items()} == IDS


@pytest.mark.parametrize("member", StreamId)
def test_an_id_is_its_number_in_a_path(member):
    one, other = generator(3, 5, member, 1), generator(3, 5, int(member), 1)
    assert torch.equal(one.get_state(), other.get_state())


def test_streams_differ_by_every_part_of_their_path():
    paths = [(0,), (0, 0), (1,), (0, 1), (1, 0), (0, 0, 1), (0, StreamId.MASK)]
    draws = torch.stack([torch.randn(64, generator=generator(0, *path)) for path in paths])
    assert len(torch.unique(draws, dim=0)) == len(paths)
    # without correlation
    assert (torch.corrcoef(draws) - torch.eye(len(paths))).abs().max() < 0.5


def test_a_batch_is_its_images():
    whole = PerImageGenerator(1, [4, 0, 9], StreamId.NOISE)
    parts = [PerImageGenerator(1, [i], StreamId.NOISE) for i in (4, 0, 9)]
    assert torch.equal(whole.randn(2, 3), torch.cat([part.randn(2, 3) for part in parts]))
    joined = PerImageGenerator.join(parts)
    assert len(joined) == 3 and torch.equal(whole.rand(5), joined.rand(5))


def test_bad_seeds():
    for seed in (-1, 2**63, 0.5, "0", None):
        with pytest.raises(InputError, match="seed must be a whole number"):
            generator(seed)


@pytest.mark.parametrize("p", [0.2, 0.86])
@pytest.mark.parametrize("n", [0, 1, 7, 60])
def test_each_of_a_pair_of_binomial_numbers_is_binomial(n, p):
    pairs = binomial_pairs(torch.full((2, 50_000), float(n)).double(), p, generator(3))
    for drawn in (pairs[:2].flatten(), pairs[2:].flatten()):
        for k in range(n + 1):
            expected = binom.cdf(k, n, p)
            error = 5 * (expected * (1 - expected) / len(drawn)) ** 0.5 + 1e-9
            assert abs(float((drawn <= k).double().mean()) - expected) <= error


def test_pairs_of_a_symmetric_law_are_opposite():
    """For p = 1/2, the quantile of 1 - u is n minus that of u."""
    counts = torch.arange(40.0).double().repeat(5, 20)
    one, other = binomial_pairs(counts, 0.5, generator(0)).split(5)
    assert torch.equal(one + other, counts)


def test_large_counts_are_taken_as_normal():
    counts = torch.full((4, 50_000), 5000.0).double()
    one, other = binomial_pairs(counts, 0.86, generator(0)).split(4)
    torch.testing.assert_close(one + other, 2 * 0.86 * counts)
    assert one.var() == pytest.approx(5000 * 0.86 * 0.14, rel=0.02)
