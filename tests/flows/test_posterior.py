"""The flow: invertible, with the right determinant, image by image."""

import math

import pytest
import torch

from unmurk.errors import InputError
from unmurk.flows.posterior import Config, Posterior
from unmurk.operators.crops import turn
from unmurk.problem import Problem
from unmurk.tiling import TiledPosterior


def perturbed(shape=(1, 8, 8), scale=0.05, seed=0):
    """A small flow away from its start, so that every part does something."""
    torch.manual_seed(seed)
    posterior = Posterior(Config(*shape, mean=8, context=8, couplings=2, hidden=8), spread=0.1)
    with torch.no_grad():
        for p in posterior.parameters():
            p.add_(scale * torch.randn_like(p))
    return posterior.eval()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 8), (2, 4, 16)])
def test_inverse_of_forward(shape):
    posterior = perturbed(shape)
    y, problem = torch.rand(5, *shape), Problem("identity", 0.3)
    with torch.no_grad():
        context = posterior.context(y, problem)
        z = torch.randn(5, *shape)
        x, forward = posterior.transform(z, context)
        back, inverse = posterior.invert(x, context)
    assert (back - z).abs().max() < 1e-4
    torch.testing.assert_close(forward, -inverse, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 4)])
def test_log_determinant_is_that_of_autograds_jacobian(shape):
    posterior = perturbed(shape).double()
    y, problem = torch.rand(1, *shape, dtype=torch.float64), Problem("identity", 0.3)
    context = posterior.context(y, problem)
    z = torch.randn(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: posterior.transform(z, context)[0], z)
    d = z.numel()
    exact = torch.linalg.slogdet(jacobian.view(d, d)).logabsdet
    torch.testing.assert_close(posterior.transform(z, context)[1][0], exact)


def test_log_prob_is_the_change_of_variables():
    """log q(x|y) = log N(z) - log|det dx/dz| at the x that z gives."""
    posterior = perturbed()
    y, problem = torch.rand(3, 1, 8, 8), Problem("identity", 0.3)
    with torch.no_grad():
        context = posterior.context(y, problem)
        z = torch.randn(3, 1, 8, 8)
        x, log_det = posterior.transform(z, context)
        normal = -z.flatten(1).square().sum(1) / 2 - 64 / 2 * math.log(2 * math.pi)
        torch.testing.assert_close(
            posterior.log_prob(x, y, problem), normal - log_det, atol=1e-2, rtol=1e-4
        )


def test_an_image_does_not_depend_on_its_batch():
    posterior = perturbed()
    y, problem = torch.rand(4, 1, 8, 8), Problem("identity", 0.3)
    together = posterior.sample(y, problem, n=2, seed=5)
    alone = posterior.sample(y[2:3], problem, n=2, seed=5, index=[2])
    torch.testing.assert_close(together[:, 2:3], alone, atol=1e-5, rtol=1e-5)
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            posterior.log_prob(x, y, problem)[2:3],
            posterior.log_prob(x[2:3], y[2:3], problem),
            atol=1e-3,
            rtol=1e-5,
        )


def test_every_parameter_gets_a_gradient_in_both_directions():
    for direction in ("density", "sample"):
        posterior = perturbed()
        y, problem = torch.rand(2, 1, 8, 8), Problem("inpaint:random,keep=0.5", 0.3)
        problem = problem.bind(range(2), (1, 8, 8))
        if direction == "density":
            posterior.log_prob(torch.rand(2, 1, 8, 8), y, problem).sum().backward()
        else:
            context = posterior.context(y, problem)
            x, log_det = posterior.transform(torch.randn(2, 1, 8, 8), context)
            (x.square().sum() + log_det.sum()).backward()
        for name, p in posterior.named_parameters():
            assert p.grad is not None and p.grad.abs().sum() > 0, (direction, name)


def test_starts_as_a_gaussian_around_the_pseudo_inverse():
    """Untrained, q(x|y) = N(A_dagger y, spread^2): mean, spread and density."""
    torch.manual_seed(0)
    posterior = Posterior(Config(1, 8, 8, mean=8, context=8, couplings=2, hidden=8), spread=0.1)
    y, problem = torch.rand(2, 1, 8, 8), Problem("identity", 0.3)
    mean, std = posterior.mean_std(y, problem, n=2000)
    torch.testing.assert_close(mean, y, atol=1e-5, rtol=0)
    assert (std / 0.1 - 1).abs().max() < 0.1
    with torch.no_grad():
        exact = torch.distributions.Normal(y, 0.1).log_prob(y + 0.05).flatten(1).sum(1)
        torch.testing.assert_close(
            posterior.log_prob(y + 0.05, y, problem), exact, atol=1e-2, rtol=1e-4
        )


def test_mask_and_noise_level_are_seen():
    posterior = perturbed()
    y = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        low = posterior.mean(y, Problem("identity", 0.1))
        high = posterior.mean(y, Problem("identity", 0.5))
        hole = posterior.mean(y, Problem("inpaint:box,size=1,top=7,left=7", 0.1))
    assert (low - high).abs().max() > 1e-4
    assert (low - hole)[..., :4, :4].abs().max() > 1e-6


def test_save_and_load(tmp_path):
    posterior = perturbed()
    posterior.save(tmp_path)
    again = Posterior.load(tmp_path)
    y, problem = torch.rand(2, 1, 8, 8), Problem("identity", 0.3)
    assert torch.equal(posterior.sample(y, problem, 2), again.sample(y, problem, 2))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="config.json: .* is missing"):
        Posterior.load(tmp_path)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="10x8"):
        Posterior.create("tiny", (1, 10, 8))
    with pytest.raises(InputError, match=r"\(1, 8, 8\), got those of \(1, 12, 12\)"):
        perturbed().mean(torch.rand(1, 1, 12, 12), Problem("identity", 0.3))
    with pytest.raises(InputError, match="even"):
        perturbed().mean_std(torch.rand(1, 1, 8, 8), Problem("identity", 0.3), n=3)


def test_a_turnable_posterior_averages_over_orientations():
    """The moments are those of all draws, each made of a turned y and turned back."""
    posterior = perturbed(scale=0.1).double()
    posterior.turnable = True
    y, problem = torch.rand(2, 1, 8, 8, dtype=torch.float64), Problem("identity", 0.3)
    for n, count in ((2, 1), (4, 2), (6, 3), (16, 8), (20, 8)):
        noise = posterior.noise([0, 1], 5, torch.device("cpu"))
        draws, ways = [], (0, 2, 1, 3, 4, 6, 5, 7)[:count]
        with torch.no_grad():
            for pair in range(n // 2):
                flip, quarters = divmod(ways[pair % count], 4)

                def turned(v, flip=flip, quarters=quarters):
                    return (v.flip(3) if flip else v).rot90(quarters, (2, 3))

                context = posterior.context(turned(y), problem)
                for sign in (1, -1):
                    z = turned(sign * noise(pair).to(y))
                    x = posterior.transform(z, context)[0].rot90(-quarters, (2, 3))
                    draws.append(x.flip(3) if flip else x)
        mean, std = posterior.mean_std(y, problem, n, seed=5)
        torch.testing.assert_close(mean, torch.stack(draws).mean(0))
        torch.testing.assert_close(std, torch.stack(draws).std(0, correction=0))


def test_the_mean_over_all_orientations_turns_with_the_image():
    """Without noise in z, T^-1 mean(T y) is the same for all eight T, also for oblong images."""
    posterior = perturbed((1, 8, 12), scale=0.1).double()
    start = torch.rand(1, 1, 8, 12, dtype=torch.float64)
    inputs = torch.cat([start, torch.rand(1, 2, 8, 12, dtype=torch.float64)], 1)

    def mean(way):
        zeros = torch.zeros_like(turn(start, way))
        with torch.no_grad():
            return posterior.estimate(turn(start, way), turn(inputs, way), 16, lambda k: zeros)[0]

    for turnable in (False, True):
        posterior.turnable = turnable
        gaps = [float((mean(way) - turn(mean(0), way)).abs().max()) for way in range(1, 8)]
        assert max(gaps) < 1e-12 if turnable else min(gaps) > 1e-3


def test_tiles_average_over_orientations_as_whole_images_do():
    posterior = perturbed(scale=0.1)
    y, problem = torch.rand(1, 1, 16, 20), Problem("identity", 0.3)
    tiled = TiledPosterior(posterior, tile=16, overlap=8)
    plain = tiled.mean_std(y, problem, 16, seed=3)
    posterior.turnable = True
    mean, std = tiled.mean_std(y, problem, 16, seed=3)
    assert (mean - plain[0]).abs().max() > 1e-3
    # one tile covers the whole image, so the tile is the image
    one = perturbed((1, 16, 20), scale=0.1)
    one.turnable = True
    whole = TiledPosterior(one, tile=20, overlap=8)
    start, inputs = one.known(y, problem)
    noise = [whole._noise(*_single_tile(whole, y), 3, k, start) for k in range(8)]
    with torch.no_grad():
        known = one.estimate(start, inputs, 16, noise.__getitem__)
    for a, b in zip(whole.mean_std(y, problem, 16, seed=3), known, strict=True):
        torch.testing.assert_close(a, b)


def _single_tile(tiled, y):
    """Tiling, places and numbers of an image that is one tile."""
    *_, tiling, numbers = tiled._look(y, Problem("identity", 0.3), None)
    assert tiling.corners == [(0, 0)]
    return tiling, [(0, (0, 0))], numbers
