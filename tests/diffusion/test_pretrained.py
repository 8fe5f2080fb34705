"""Pipelines of diffusers as priors: against their own schedulers, and closed forms."""

import json
import shutil
from types import SimpleNamespace

import diffusers
import huggingface_hub.constants
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import nn

import unmurk
from unmurk.cli.main import main
from unmurk.diffusion.pretrained import hub_name
from unmurk.diffusion.prior import Prior
from unmurk.diffusion.samplers import heun
from unmurk.diffusion.schedules import karras
from unmurk.errors import InputError

SHAPE = (1, 8, 8)


def network(channels=1, out=1, **config):
    torch.manual_seed(0)
    return UNet2DModel(
        **dict(sample_size=8, add_attention=False, norm_num_groups=4, layers_per_block=1) | config,
        in_channels=channels,
        out_channels=out,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()


def write(folder, unet, scheduler, **index):
    """A folder as `save_pretrained` of a pipeline writes it."""
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    kinds = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", type(unet).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(kinds | index))
    return folder


@pytest.fixture(scope="module")
def unet():
    return network()


@pytest.fixture
def folder(tmp_path, unet):
    return write(tmp_path / "model", unet, DDPMScheduler())


def images(n=3, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


TRAINED = torch.linspace(1e-3, 0.05, 100).square().add(2e-4).tolist()
SCHEDULES = [
    ("DDPMScheduler", dict(beta_schedule="linear")),
    ("DDIMScheduler", dict(beta_schedule="scaled_linear", beta_start=8.5e-4, beta_end=0.012)),
    ("PNDMScheduler", dict(beta_schedule="squaredcos_cap_v2")),
    ("DDIMScheduler", dict(trained_betas=TRAINED, num_train_timesteps=100)),
    ("DDIMScheduler", dict(beta_schedule="linear", rescale_betas_zero_snr=True)),
    ("DPMSolverMultistepScheduler", dict(beta_schedule="linear", num_train_timesteps=500)),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s[0]}-{len(s[1])}")
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_denoiser_equals_the_schedulers_own(folder, unet, schedule, prediction):
    """At the indices that it was trained at, by the formulas with the scheduler's own alphas."""
    kind, options = schedule
    if (kind, prediction) == ("PNDMScheduler", "sample"):
        options = options | {"skip_prk_steps": True}
    scheduler = getattr(diffusers, kind)(**options, prediction_type=prediction)
    scheduler.save_pretrained(folder / "scheduler")
    prior = Prior.load(folder)

    index = torch.tensor([0, 30, 70])
    abar = scheduler.alphas_cumprod[index].view(3, 1, 1, 1)
    a, b = abar.sqrt(), (1 - abar).sqrt()
    x = images()
    with torch.no_grad():
        out = unet(a * (2 * x - 1), index).sample
        clean = {
            "epsilon": (a * (2 * x - 1) - b * out) / a,
            "sample": out,
            "v_prediction": a * a * (2 * x - 1) - b * out,
        }[prediction]
        found = prior.denoise(x, (b / a).flatten() / 2)
    torch.testing.assert_close(found, (clean + 1) / 2, atol=1e-5, rtol=0)
    finite = scheduler.alphas_cumprod[scheduler.alphas_cumprod > 0][-1].double()
    assert abs(prior.sigma_max / (((1 - finite) / finite).sqrt() / 2) - 1) < 1e-6


class Exact(nn.Module):
    """A network that knows N(mean, variance I), the images in [-1, 1], at any fractional t."""

    mean, variance = -0.2, 0.36

    def __init__(self, scheduler):
        super().__init__()
        self.kind = scheduler.config.prediction_type
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        abar = scheduler.alphas_cumprod.double()
        self.levels = ((1 - abar) / abar).sqrt().log()

    def forward(self, x_t, t):
        low = t.long().clamp(max=len(self.levels) - 2)
        part = (t - low).double()
        s = (self.levels[low] * (1 - part) + self.levels[low + 1] * part).exp().view(-1, 1, 1, 1)
        a = 1 / (1 + s**2).sqrt()
        clean = (self.variance * x_t / a + s**2 * self.mean) / (self.variance + s**2)
        noise = (x_t - a * clean) / (s * a)
        out = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * a * clean}
        return SimpleNamespace(sample=out[self.kind])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_exact_predictions_of_a_gaussian_give_its_exact_denoiser(prediction):
    """E[x | x + sigma n] in [0, 1], between the indices too, up to sigma_max; and beyond it."""
    scheduler = DDPMScheduler(prediction_type=prediction)
    prior = Prior(Exact(scheduler), SHAPE, scheduler)
    mean, variance = (Exact.mean + 1) / 2, Exact.variance / 4
    sigma = torch.tensor([0.006, 0.0333, 0.4, 1.7, 12.0, prior.sigma_max], dtype=torch.float64)
    n = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    x = 0.4 + s * n
    expected = (variance * x + s**2 * mean) / (variance + s**2)
    torch.testing.assert_close(prior.denoise(x, sigma), expected, atol=2e-5, rtol=0)
    far = prior.denoise(0.4 + 1e4 * n, 1e4)
    assert (far - mean).abs().max() < 0.02 * variance**0.5


def test_a_function_goes_wherever_a_denoiser_does():
    """The probability flow of a Gaussian is linear: x - mean shrinks by std / sqrt(var + s^2)."""
    mean, variance = 0.4, 0.09

    def denoise(x, sigma):
        s2 = sigma.view(-1, 1, 1, 1) ** 2
        return (variance * x + s2 * mean) / (variance + s2)

    x = mean + 10 * torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    found = heun(denoise, x, karras(200, 10.0, 1e-3))
    expected = mean + (x - mean) * (variance / (variance + 100)) ** 0.5
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    problem = unmurk.Problem("identity", 0.3)
    y = problem.simulate(images(2), seed=0)
    result = unmurk.solve(y, problem, lambda x, s: denoise(x, torch.as_tensor(s)), "mmps")
    assert result.samples.isfinite().all()


def test_flow_agrees_with_ddim():
    """Both follow one ordinary differential equation, DDIM by a method of first order: with
    twice the steps it comes twice as near."""
    unet = network()
    with torch.no_grad():  # smooth in time as a trained network is: no fast waves in
        unet.time_embedding.linear_1.weight[:, [0, 1, 4, 5]] = 0
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    prior = Prior(unet, SHAPE, scheduler)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    first, gaps = 960, []
    abar = scheduler.alphas_cumprod[first]
    sigma = float(((1 - abar) / abar).sqrt()) / 2
    with torch.no_grad():
        start = (noise / abar.sqrt() + 1) / 2
        ours = heun(prior.denoise, start, karras(40, sigma, prior.sigma_min))
        for steps in (25, 50):
            scheduler.set_timesteps(steps)
            x_t = noise
            for t in scheduler.timesteps[scheduler.timesteps <= first]:
                x_t = scheduler.step(unet(x_t, t).sample, t, x_t).prev_sample
            gaps.append(float(((x_t + 1) / 2 - ours).square().mean().sqrt() / ours.std()))
    assert gaps[0] < 0.1 and gaps[1] < 0.6 * gaps[0]


def test_learned_variance_is_dropped(tmp_path):
    unet = network(out=2)
    prior = Prior.load(write(tmp_path, unet, DDPMScheduler(variance_type="learned_range")))
    x, t = images(1), torch.tensor([200])
    abar = prior.scheduler.alphas_cumprod[200]
    s = float(((1 - abar) / abar).sqrt())
    with torch.no_grad():
        noise = unet(abar.sqrt() * (2 * x - 1), t).sample[:, :1]
        expected = (2 * x - 1 - s * noise + 1) / 2
        torch.testing.assert_close(prior.denoise(x, s / 2), expected, atol=1e-5, rtol=0)


def test_round_trip(folder, tmp_path):
    """Load, save and load again: the same network, and a pipeline for diffusers all along."""
    DDIMScheduler(trained_betas=TRAINED, prediction_type="sample").save_pretrained(
        folder / "scheduler"
    )
    prior = Prior.load(folder)
    prior.save(tmp_path / "again")
    x = images()
    with torch.no_grad():
        assert torch.equal(Prior.load(tmp_path / "again").denoise(x, 0.2), prior.denoise(x, 0.2))
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "again")
    assert pipe.scheduler.config.prediction_type == "sample"
    assert torch.allclose(pipe.scheduler.betas, torch.tensor(TRAINED))


def flat(folder, to):
    """All files beside `model_index.json`, and the weights in a .bin file, as once was usual."""
    to.mkdir(parents=True)
    for file in (*folder.rglob("*.json"),):
        shutil.copy(file, to)
    weights = UNet2DModel.from_pretrained(folder / "unet").state_dict()
    torch.save(weights, to / "diffusion_pytorch_model.bin")
    return to


def test_folders_of_the_old_layout(folder, tmp_path):
    x = images()
    with torch.no_grad():
        expected = Prior.load(folder).denoise(x, 0.3)
        found = Prior.load(flat(folder, tmp_path / "flat")).denoise(x, 0.3)
    assert torch.equal(found, expected)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_never_run(folder, tmp_path):
    place = flat(folder, tmp_path / "flat")
    torch.save({"conv_in.bias": Harmful(tmp_path / "run")}, place / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="holds more than tensors"):
        Prior.load(place)
    assert not (tmp_path / "run").exists()


def test_names_on_the_hub(folder, tmp_path, monkeypatch):
    """From the local cache, laid out as the Hub's own client does; else one line."""
    assert hub_name("google/ddpm-cifar10-32") and hub_name("a_b/c.d")
    assert not any(map(hub_name, ("digits", "/a/b", "./a", "../a", "a/b/c", "a/", str(folder))))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not hub_name("runs/cells")  # a slip in a path is not looked for elsewhere

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "cache" / "models--someone--faces"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    x = images()
    with torch.no_grad():
        assert torch.equal(
            Prior.load("someone/faces").denoise(x, 0.3), Prior.load(folder).denoise(x, 0.3)
        )
    with pytest.raises(InputError, match="no folder 'someone/else' here, and the Hub") as caught:
        Prior.load("someone/else")
    assert "\n" not in str(caught.value) and "connect" in str(caught.value)


def test_only_what_a_prior_needs_is_fetched(folder, tmp_path, monkeypatch):
    """First the descriptions, then one file of weights; a latent model's are never asked for."""
    asked = []

    def snapshot(name, allow_patterns):
        asked.extend(allow_patterns)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    here = shutil.copytree(folder, tmp_path / "a")
    (here / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the network"):
        Prior.load("someone/faces")
    names = [f"unet/diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
    assert asked == ["*.json", *names]
    asked.clear()
    index = here / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "VQModel"]}))
    with pytest.raises(InputError, match="someone/latent is a DDPMPipeline with vae"):
        Prior.load("someone/latent")
    assert asked == ["*.json"]


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


REFUSED = [
    ("model_index.json", dict(vqvae=["diffusers", "VQModel"]), "with vqvae: a prior is"),
    ("model_index.json", dict(unet=["diffusers", "UNet2DConditionModel"]), "UNet2DConditionModel"),
    ("scheduler/scheduler_config.json", dict(prediction_type="flow_prediction"), "'flow_pred"),
    ("scheduler/scheduler_config.json", dict(beta_schedule="spline"), "the betas 'spline'"),
    ("unet/config.json", dict(num_class_embeds=10), "has classes"),
    ("unet/config.json", dict(time_embedding_type="fourier"), "takes time as fourier"),
    ("unet/config.json", dict(in_channels=2), "maps 2 channels to 1"),
    ("unet/config.json", dict(sample_size=None), "does not state the size"),
    ("unet/config.json", dict(layers_per_block=2), "to another network"),
]


@pytest.mark.parametrize("file, values, match", REFUSED, ids=lambda v: str(v)[:40])
def test_other_models_are_refused_in_one_line(folder, file, values, match, capfd):
    edit(folder / file, **values)
    with pytest.raises(InputError, match=match) as caught:
        Prior.load(folder)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_levels_without_betas_are_refused(folder):
    diffusers.ScoreSdeVeScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(InputError, match="ScoreSdeVeScheduler"):
        Prior.load(folder)


def test_images_of_another_shape(folder, tmp_path, capsys):
    """Larger ones are worked on in tiles; smaller ones, and other channels, get one line."""
    prior = Prior.load(folder)
    with pytest.raises(InputError, match="expected images of shape 1x8x8 .*, got 3x8x8"):
        prior.denoise(torch.rand(2, 3, 8, 8), 0.1)
    import numpy as np

    def solve(side):
        y = np.random.default_rng(0).random((2, side, side)).astype("float32")
        np.save(tmp_path / f"{side}.npy", y)
        argv = ["solve", str(tmp_path / f"{side}.npy"), "--prior", str(folder), "--noise", "0.1"]
        argv += ["--operator", "identity", "--out", str(tmp_path / f"out-{side}")]
        return main(argv), tmp_path / f"out-{side}"

    code, out = solve(12)
    assert code == 0 and np.load(out / "images.npy").shape == (2, 12, 12)
    capsys.readouterr()
    code, out = solve(6)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "at least 1x8x8" in line and "1x6x6" in line
    assert not out.exists()


def test_commands_take_a_pipeline_of_diffusers(folder, tmp_path):
    import numpy as np

    out = tmp_path / "new.npy"
    argv = ["sample", "--prior", str(folder), "--out", str(out), "-n", "2", "--steps", "2"]
    assert main(argv) == 0
    expected = Prior.load(folder).sample(2, steps=2)
    np.testing.assert_allclose(np.load(out), expected.numpy(), atol=1e-6)
