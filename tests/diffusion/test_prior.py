"""The prior against closed forms, and against diffusers itself."""

import math

import pytest
import torch
from torch import nn

from unmurk.diffusion.prior import Prior, nelbo
from unmurk.errors import InputError
from unmurk.rng import PerImageGenerator

SHAPE = (1, 8, 8)


def small(shape=SHAPE):
    """A prior small enough for a test, with weights that are not at their start."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=shape[1:],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
        norm_num_groups=4,
    )
    return Prior(unet, shape).eval()


class Gaussian:
    """The exact denoiser of N(mean, variance I)."""

    def __init__(self, mean, variance):
        self.mean, self.variance = mean, variance

    def __call__(self, x, sigma):
        s2 = (sigma**2).view(-1, 1, 1, 1)
        return (self.variance * x + s2 * self.mean) / (self.variance + s2)


def test_preconditioning_is_v_prediction():
    """D = a x_t - b v for x_t = a u + b n, in the network's range and time."""
    prior = small()
    x, sigma = torch.rand(3, *SHAPE), torch.tensor([0.02, 0.3, 5.0])
    s = (2 * sigma).view(-1, 1, 1, 1)
    a, b = 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()
    x_t = a * (2 * x - 1)
    with torch.no_grad():
        v = prior.unet(x_t, prior.time(sigma)).sample
        expected = (a * x_t - b * v + 1) / 2
        torch.testing.assert_close(prior.denoise(x, sigma), expected)


def test_time_is_exact_on_the_schedulers_levels():
    prior = small()
    alpha = prior.scheduler.alphas_cumprod
    levels = ((1 - alpha) / alpha).sqrt() / 2
    index = torch.tensor([0, 1, 17, 400, 998, 999])
    torch.testing.assert_close(prior.time(levels[index]), index.float(), atol=2e-2, rtol=0)
    middle = (levels[10].log() + levels[11].log()).mul(0.5).exp()
    assert abs(prior.time(middle[None]).item() - 10.5) < 1e-2


def test_saved_prior_is_a_diffusers_pipeline(tmp_path):
    """Loads in DDPMPipeline, denoises identically through its scheduler, and samples."""
    from diffusers import DDPMPipeline

    prior = small()
    prior.save(tmp_path / "prior")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "prior")
    t = 137
    alpha = pipe.scheduler.alphas_cumprod[t]
    sigma = float(((1 - alpha) / alpha).sqrt()) / 2
    x = torch.rand(2, *SHAPE)
    x_t = alpha.sqrt() * (2 * x - 1)
    with torch.no_grad():
        v = pipe.unet(x_t, t).sample
        theirs = (pipe.scheduler.step(v, t, x_t).pred_original_sample + 1) / 2
        ours = Prior.load(tmp_path / "prior").denoise(x, sigma)
    assert (theirs - ours).abs().max() < 1e-5
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        batch_size=2,
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert drawn.shape == (2, 8, 8, 1) and drawn.std() > 0


def test_a_saved_prior_does_not_name_the_folder_it_was_loaded_from(tmp_path):
    prior = Prior.load("digits")
    prior.save(tmp_path / "home of somebody" / "prior")
    Prior.load(tmp_path / "home of somebody" / "prior").save(tmp_path / "given away")
    for folder in (tmp_path / "given away", tmp_path / "home of somebody"):
        for file in folder.rglob("*.json"):
            assert "somebody" not in file.read_text() and "digits-model" not in file.read_text()
    again, x = Prior.load(tmp_path / "given away"), torch.rand(1, 1, 28, 28)
    assert torch.equal(again.denoise(x, 0.2), prior.denoise(x, 0.2))


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="no prior in"):
        Prior.load(tmp_path)
    prior = small()
    prior.save(tmp_path)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "flow_prediction"))
    with pytest.raises(InputError, match="prediction 'flow_prediction'"):
        Prior.load(tmp_path)


def test_score_is_tweedies_formula():
    prior = small()
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        expected = (prior.denoise(x, 0.4) - x) / 0.16
        torch.testing.assert_close(prior.score(x, 0.4), expected)


def test_nelbo_of_gaussian_data_is_the_negative_log_density():
    """With the exact denoiser the bound is tight: -log N(x; mean, variance I), and its
    gradient."""
    mean, variance = 0.4, 0.09
    denoise = Gaussian(mean, variance)
    g = torch.Generator().manual_seed(0)
    x = (mean + 0.3 * torch.randn(4, 1, 2, 2, generator=g, dtype=torch.float64)).requires_grad_()
    many = x.repeat_interleave(200_000, 0)
    bound = nelbo(denoise, many, 2e-3, 60.0, g).view(4, -1).mean(1)
    square = (x.detach() - mean).flatten(1).square().sum(1)
    exact = square / (2 * variance) + 4 / 2 * math.log(2 * math.pi * variance)
    torch.testing.assert_close(bound.detach(), exact, atol=0.15, rtol=0)
    (gradient,) = torch.autograd.grad(bound.sum(), x)
    torch.testing.assert_close(gradient, (x.detach() - mean) / variance, atol=0.25, rtol=0)


def test_surrogate_gradient_through_the_denoiser_matches_finite_differences():
    prior = small().double().requires_grad_(False)
    x = torch.rand(1, *SHAPE, dtype=torch.float64)

    def value(x):
        return prior.nelbo(x, torch.Generator().manual_seed(3), draws=4, constants=False).sum()

    (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).double()
    h = 1e-5
    with torch.no_grad():
        slope = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert abs((gradient * direction).sum() - slope) < 1e-4 * abs(slope)


def test_restore_from_the_measurement_draws_from_the_posterior():
    """For A = I and a Gaussian prior: mean and variance of p(x | y) in closed form."""
    variance, sigma, y = 0.09, 0.3, 0.9
    prior, exact = small(), Gaussian(0.4, variance)
    prior.denoise = lambda x, s: exact(x, torch.as_tensor(s).expand(len(x)))
    x = prior.restore(torch.full((2000, *SHAPE), y), sigma, PerImageGenerator(0, range(2000)))
    gain = variance / (variance + sigma**2)
    assert abs(x.mean() - (0.4 + gain * (y - 0.4))) < 0.003
    assert abs(x.std() / math.sqrt(variance * (1 - gain)) - 1) < 0.015


def test_draw_gives_new_images():
    prior, exact = small(), Gaussian(0.4, 0.09)
    prior.denoise = lambda x, s: exact(x, torch.as_tensor(s).expand(len(x)))
    x = prior.draw(PerImageGenerator(0, range(2000)))
    assert abs(x.mean() - 0.4) < 0.005 and abs(x.std() / 0.3 - 1) < 0.02
    torch.testing.assert_close(prior.draw(PerImageGenerator(0, [7])), x[7:8], rtol=0, atol=1e-5)


def test_sample_draws_from_the_prior_whatever_the_batch():
    """Heun on a Gaussian's exact denoiser gives its mean and spread; batches do not matter."""
    prior = small()
    exact = Gaussian(0.4, 0.09)
    prior.denoise = lambda x, s: exact(x, torch.as_tensor(s).expand(len(x)))
    x = prior.sample(1000, steps=32, seed=1, batch=1000)
    assert abs(x.mean() - 0.4) < 0.005 and abs(x.std() - 0.3) < 0.006
    torch.testing.assert_close(prior.sample(5, steps=6, seed=1, batch=2), prior.sample(5, 6, 1))


def test_affine_change_of_range_changes_nothing_but_the_range():
    """Only the prior knows [-1, 1]: denoising in [0, 1] is denoising 2x - 1 at 2 sigma."""
    prior = small()
    x, sigma = torch.rand(2, *SHAPE), 0.3

    class Identity(nn.Module):
        def forward(self, x, t):
            return type("Out", (), {"sample": torch.zeros_like(x)})()

    prior.unet.forward = Identity().forward
    s = 2 * sigma
    with torch.no_grad():
        u = 2 * prior.denoise(x, sigma) - 1
    torch.testing.assert_close(u, (2 * x - 1) / (1 + s**2))
