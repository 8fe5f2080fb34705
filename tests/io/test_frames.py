"""Calibration frames: the correction in closed form, hot pixels, and the commands."""

import json

import numpy as np
import pytest
import torch

from unmurk.cli import main as cli
from unmurk.errors import InputError
from unmurk.io.frames import Corrected, Frames, hot_pixels, read_frames
from unmurk.io.scale import Scale
from unmurk.io.source import of_array

SIZE = 16


@pytest.fixture
def camera(tmp_path):
    """Raw 16-bit captures r = d + g c + n of a camera, its frames, and the light c."""
    draw = np.random.default_rng(0)
    sensitivity = 0.6 + 0.8 * np.linspace(0, 1, SIZE)[None, :] * np.ones((SIZE, 1))
    sensitivity /= sensitivity.mean()
    shade = 500 + 200 * draw.random((SIZE, SIZE))
    light = 20_000 + 10_000 * draw.random((12, 1, 1)) * np.ones((1, SIZE, SIZE))
    raw = shade + sensitivity * light + 600 * draw.standard_normal(light.shape)
    raw[:, 3, 5], raw[:, 9, 2] = 60_000, 0
    frames = {"raw": raw, "dark": shade + 0 * light[:4], "flat": shade + 30_000 * sensitivity}
    for name, values in frames.items():
        np.save(tmp_path / f"{name}.npy", np.rint(values).astype(np.uint16))
    return tmp_path, light / 65535, sensitivity


def test_frames_undo_the_camera(camera):
    folder, light, sensitivity = camera
    scale = Scale.of("uint16")
    raw = torch.from_numpy(np.load(folder / "raw.npy").astype(np.float32))[:, None] / 65535
    hot = hot_pixels(raw)
    assert hot.nonzero().tolist() == [[3, 5], [9, 2]]
    frames = read_frames(folder / "dark.npy", folder / "flat.npy", scale, (1, SIZE, SIZE), hot=hot)
    y = frames.correct(raw)
    assert torch.equal(y.isnan()[0, 0], hot) and frames.sensitivity.mean() == pytest.approx(1)
    torch.testing.assert_close(
        frames.sensitivity[0], torch.from_numpy(sensitivity).float(), rtol=1e-3, atol=0
    )
    error = ((y[:, 0] - torch.from_numpy(light)) * torch.from_numpy(sensitivity))[:, ~hot]
    assert error.std().item() == pytest.approx(600 / 65535, rel=0.06)  # sigma / g times g
    assert abs(error.mean().item()) < 5 * 600 / 65535 / error.numel() ** 0.5
    once = frames.correct(raw, divide=False)[:, 0, :, 0] / frames.sensitivity[:, :, 0]
    torch.testing.assert_close(once, y[:, 0, :, 0])


def test_a_source_is_corrected_when_it_is_read(camera):
    folder, *_ = camera
    source = of_array("raw", np.load(folder / "raw.npy"), None)
    frames = read_frames(folder / "dark.npy", None, source.scale, (1, SIZE, SIZE))
    assert torch.equal(Corrected(source, frames)[2:5], frames.correct(source[2:5]))
    digest = frames.record()["dark"]
    assert len(digest) == 64 and Corrected(source, frames).fingerprint() == source.fingerprint()


def test_frames_that_do_not_fit_are_refused(camera):
    folder, *_ = camera
    scale, shape = Scale.of("uint16"), (1, SIZE, SIZE)
    np.save(folder / "small.npy", np.zeros((8, 8), np.uint16))
    with pytest.raises(InputError, match="same camera and region"):
        read_frames(folder / "small.npy", None, scale, shape)
    with pytest.raises(InputError, match="not brighter than the dark frame"):
        read_frames(folder / "dark.npy", folder / "dark.npy", scale, shape)
    with pytest.raises(InputError, match="3 or more images"):
        hot_pixels(torch.zeros(2, 1, 8, 8))
    with pytest.raises(InputError, match="too many for hot pixels"):
        hot_pixels(torch.eye(16).expand(4, 1, 16, 16))
    with pytest.raises(InputError, match="16x16 pixels, but an image has 8x8"):
        Frames(dark=torch.zeros(1, 16, 16)).correct(torch.zeros(1, 1, 8, 8))


@pytest.mark.slow
def test_a_run_keeps_its_frames(camera, capsys):
    """learn, restore and solve: the digests and hot pixels are kept, another frame is refused."""
    folder, *_ = camera
    dark, flat = ["--dark", folder / "dark.npy"], ["--flat", folder / "flat.npy"]
    run = folder / "run"

    def unmurk(*argv):
        code = cli.main([str(a) for a in argv])
        return code, capsys.readouterr()

    learn = ["learn", folder / "raw.npy", "--noise", "600dn", "--kimg", "0.064", "--out", run]
    learn += ["--precision", "fp32", "--hot-pixels", "auto", "--json"]
    assert unmurk(*learn, *dark, *flat)[0] == 0
    config = json.loads((run / "config.json").read_text())
    assert set(config["calibration"]) == {"dark", "flat", "hidden"}
    assert config["calibration"]["hidden"] == [[3, 5], [9, 2]]
    assert config["problem"]["noise"] == pytest.approx(600 / 65535, rel=1e-5)
    restore = ["restore", folder / "raw.npy", "--prior", run, "--out", folder / "out.npy"]
    code, said = unmurk(*restore)
    assert code == 2 and "--dark" in said.err
    np.save(folder / "other.npy", np.load(folder / "dark.npy") + 1)
    code, said = unmurk(*restore, "--dark", folder / "other.npy", *flat)
    assert code == 2 and "another dark frame" in said.err
    assert unmurk(*restore, *dark, *flat)[0] == 0
    assert np.load(folder / "out.npy").shape == (12, SIZE, SIZE)
    solve = ["solve", folder / "raw.npy", "--prior", run, "--operator", "identity", "--steps", "3"]
    solve += ["--noise", "600dn", *dark, *flat, "--out", folder / "solved.npy"]
    assert unmurk(*solve)[0] == 0 and np.isfinite(np.load(folder / "solved.npy")).all()
