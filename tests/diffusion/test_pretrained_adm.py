"""Checkpoints of guided-diffusion against its own recorded outputs and names."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.adm_unet import SETTINGS, AdmUnet, recipe
from unmurk.diffusion.guided_diffusion import LAYOUTS, Adm, _renamed, adm
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError

RECORDED = Path(__file__).parents[1] / "data" / "guided_diffusion.safetensors"


def original(order="legacy", out=6, **settings):
    """The network of `adm_unet.py` with weights by the recipe."""
    net = AdmUnet(**{**SETTINGS, **settings}, order=order, out=out).eval()
    net.load_state_dict(recipe({k: v.shape for k, v in net.state_dict().items()}))
    return net


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("adm") / "model.pt"
    torch.save(original().state_dict(), path)
    return path


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_outputs_equal_those_of_the_original_implementation(order, tmp_path):
    """Recorded with github.com/openai/guided-diffusion; see tests/data/README.md."""
    net = original(order)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    unet, _ = adm(tmp_path / "model.pt", Adm(**SETTINGS, order=order))
    with safe_open(RECORDED, "pt") as file, torch.no_grad():
        x, t, expected = (file.get_tensor(key) for key in ("x", "t", order))
        assert (unet(x, t).sample - expected).abs().max() < 1e-5
        assert (net(x, t) - expected).abs().max() < 1e-5
    assert expected.std() > 0.5


def test_a_deeper_network_equals_an_independent_one(tmp_path):
    """Attention at three of four resolutions and two blocks in each, as the ImageNet model."""
    settings = dict(size=32, multipliers=(1, 2, 2, 3), layers=2, attention=(16, 8, 4), head=32)
    net = original(out=3, **settings)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    unet, scheduler = adm(tmp_path / "model.safetensors", Adm(**SETTINGS | settings))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 32, 32, generator=g), torch.tensor([0.0, 999.0])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t).sample, net(x, t), atol=1e-4, rtol=0)
    assert scheduler.config.variance_type == "fixed_large"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_settings_have_the_originals_names_and_shapes(layout):
    """Names and shapes as recorded from the original, and each of them finds its place here."""
    settings = LAYOUTS[layout]
    with torch.device("meta"):
        fields = {name: getattr(settings, name) for name in SETTINGS}
        state = AdmUnet(**fields).state_dict()
    lines = [f"{key} {'x'.join(map(str, state[key].shape))}" for key in sorted(state)]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    count = sum(value.numel() for value in state.values())
    with safe_open(RECORDED, "pt") as file:
        assert f"{len(state)} {count} {digest}" == file.metadata()[layout]
    unet = settings.network(3, 6)
    unet.load_state_dict(_renamed(state, settings), assign=True)
    assert sum(p.numel() for p in unet.parameters()) == count


def test_denoiser_of_a_checkpoint(checkpoint, monkeypatch):
    """Predicts the noise at the levels of linear betas, and the learned variance is dropped."""
    monkeypatch.setitem(LAYOUTS, "adm-small", Adm(**SETTINGS))
    prior = Prior.load(f"adm:small:{checkpoint}")
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha = (1 - beta).cumprod(0)[[250, 600]]
    s = ((1 - alpha) / alpha).sqrt()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scale = alpha.sqrt().float().view(2, 1, 1, 1)
        noise = original()(scale * (2 * x - 1), torch.tensor([250.0, 600.0]))[:, :3]
        expected = (2 * x - 1 - s.float().view(2, 1, 1, 1) * noise + 1) / 2
        found = prior.denoise(x, s.float() / 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert prior.shape == (3, 16, 16)
    assert math.isclose(
        prior.sigma_max, float(((1 - (a := (1 - beta).prod())) / a).sqrt() / 2), rel_tol=1e-4
    )


def test_saved_checkpoint_is_a_pipeline_of_diffusers(checkpoint, tmp_path):
    """Converted once, it loads faster; diffusers samples from it with its learned variance."""
    from diffusers import DDPMPipeline

    prior = Prior.load(checkpoint, layout=Adm(**SETTINGS))
    prior.save(tmp_path / "prior")
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        again = Prior.load(tmp_path / "prior").denoise(x, 0.3)
        assert torch.equal(again, prior.denoise(x, 0.3))
    pipe = DDPMPipeline.from_pretrained(tmp_path / "prior")
    assert pipe.scheduler.config.variance_type == "learned_range"
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        step = pipe.scheduler.step(pipe.unet(noise, 500).sample, 500, noise)
    assert step.prev_sample.shape == noise.shape


def test_loaded_weights_are_not_those_of_the_file(checkpoint, tmp_path):
    """A file that is written to later changes no prior, and where it lies no rounding."""
    from safetensors.torch import load_file, save_file

    save_file(torch.load(checkpoint, weights_only=True), tmp_path / "model.safetensors")
    Prior.load(checkpoint, layout=Adm(**SETTINGS)).save(tmp_path / "prior")
    for source, layout in ((tmp_path / "prior", None), (tmp_path / "model.safetensors", SETTINGS)):
        prior = Prior.load(source, layout=layout and Adm(**layout))
        before = {name: value.clone() for name, value in prior.state_dict().items()}
        file = next(Path(tmp_path / source.name).rglob("*.safetensors"), source)
        with open(file, "r+b") as stream:
            stream.seek(-4096, 2)
            stream.write(bytes(4096))
        assert not any(value.flatten()[-1:].any() for value in list(load_file(file).values())[-1:])
        for name, value in prior.state_dict().items():
            assert torch.equal(value, before[name]) and value.data_ptr() % 64 == 0


def test_loading_leaves_the_global_stream_alone(checkpoint):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Prior.load(checkpoint, layout=Adm(**SETTINGS))
    assert torch.equal(torch.rand(3), expected)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_never_run(tmp_path):
    torch.save({"out.2.weight": Harmful(tmp_path / "run")}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="holds more than tensors"):
        Prior.load(tmp_path / "model.pt", layout="adm-ffhq256")
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_do_not_fit_get_one_line(checkpoint, tmp_path):
    def refused(source, layout, match):
        with pytest.raises(InputError, match=match) as caught:
            Prior.load(source, layout=layout)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400

    state = torch.load(checkpoint, weights_only=True)
    refused(checkpoint, None, "is a file: name the layout of its weights, as in adm:ffhq256:")
    refused(checkpoint, "adm-faces", "'adm-faces' is unknown: choose from adm-ffhq256")
    refused(checkpoint, "adm-ffhq256", "do not fit its layout")
    refused(checkpoint, Adm(**SETTINGS | {"attention": (4,)}), "do not fit its layout")
    refused(f"adm:ffhq256:{tmp_path}/none.pt", None, "no checkpoint .*none.pt")
    torch.save(state | {"label_emb.weight": torch.zeros(2, 2)}, tmp_path / "labels.pt")
    refused(tmp_path / "labels.pt", "adm-ffhq256", "conditional on classes")
    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    refused(tmp_path / "nested.pt", "adm-ffhq256", "holds more than tensors")
    (tmp_path / "text.pt").write_text("not weights")
    refused(tmp_path / "text.pt", "adm-ffhq256", "text.pt")
    (tmp_path / "text.safetensors").write_text("not weights")
    refused(tmp_path / "text.safetensors", "adm-ffhq256", "cannot read the weights")
