"""Black and white for each channel: reading, writing, noise, frames, maps and runs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import unmurk
from tests.cli.calls import unmurk as command
from unmurk.cli.data import run_scale, run_span
from unmurk.errors import InputError
from unmurk.io.axes import Selection
from unmurk.io.frames import read_frames
from unmurk.io.images import load_images, measured_white
from unmurk.io.noise_maps import read_noise_maps
from unmurk.io.scale import Scale, Span, channel_note, check_units, span_for
from unmurk.noise import Gaussian, PerChannel, PoissonGaussian, as_noise, in_scale
from unmurk.noise_units import in_units

RANGES = [(0, 4000), (100, 900)]  # a bright and a dim channel
OPTIONS = [word for black, white in RANGES for word in ("--range", black, white)]
SCALE = Scale.of("uint16", RANGES)


@pytest.fixture
def scene(tmp_path):
    """Four images of two channels in a TIFF file each, with noise of 40 and of 8 gray levels."""
    draw = np.random.default_rng(0)
    levels = np.linspace(0.2, 0.7, 32)[None, None].repeat(32, 1)
    x = np.concatenate([levels, levels[:, :, ::-1]])
    clean = x * np.float64([4000, 800])[:, None, None] + np.float64([0, 100])[:, None, None]
    (tmp_path / "y").mkdir()
    for i in range(4):
        noisy = clean + draw.standard_normal(x.shape) * np.float64([40, 8])[:, None, None]
        tifffile.imwrite(
            tmp_path / "y" / f"{i}.tif", noisy.round().astype(np.uint16), metadata={"axes": "CYX"}
        )
    return tmp_path / "y", x, clean


def test_each_channel_has_its_own_black_and_white(scene):
    folder, x, _ = scene
    data = load_images(folder, span=RANGES)
    assert data.images.shape == (4, 2, 32, 32)
    residual = data.images.double().numpy() - x
    assert np.abs(residual.mean((0, 2, 3))).max() < 0.001
    assert residual.std((0, 2, 3)) == pytest.approx([0.01, 0.01], rel=0.05)
    raw = tifffile.imread(folder / "2.tif")
    assert np.array_equal(data.scale.to_file(data.images[2]), raw)


def test_the_scale_is_affine_in_every_channel():
    numbers = np.uint16([[[0, 2000, 4000]], [[100, 500, 900]]])
    images = SCALE.from_file(numbers)
    assert images.tolist() == [[[0.0, 0.5, 1.0]], [[0.0, 0.5, 1.0]]]
    assert np.array_equal(SCALE.to_file(images), numbers)
    assert SCALE.step.shape == (2, 1, 1) and SCALE.step.flatten().tolist() == [4000, 800]
    assert SCALE.clipped(torch.tensor([[[20.0]], [[20.0]]])) == 0.5  # 80,000 and 16,100 of 65,535
    assert [SCALE.channel(i).ends.pairs for i in range(2)] == [[pair] for pair in RANGES]
    assert Scale.of("uint16", [(0, 9), (0, 9)]) == Scale.of("uint16", (0, 9))
    with pytest.raises(InputError, match="for 2 channels, and these images have 3: give --range"):
        SCALE.from_file(np.zeros((3, 4, 4), np.uint16))
    with pytest.raises(InputError, match="white must be above black"):
        Scale.of("uint16", [(0, 9), (9, 9)])
    with pytest.raises(InputError, match="channel 1 of set has the median 2020, far from black"):
        check_units("set", torch.tensor([[[[0.5]], [[2.4]]]]), 0.01, SCALE)


def test_pairs_are_channels_and_spans_are_types():
    spans = [Span(0, 255, "uint8"), Span(0, 4095, "uint16")]
    assert span_for(spans, "uint16") == spans[1]
    assert span_for(RANGES, "uint8") == Span((0, 100), (4000, 900))
    kept = json.loads(json.dumps([list(SCALE.ends)]))  # as a log holds it
    assert span_for(kept, "uint16") == SCALE.ends and span_for(kept, "uint8") is None
    assert str(SCALE.ends) == "--range 0 4000 --range 100 900"
    assert str(Span(0, 4294967295)) == "--range 0 4294967295"
    for none in ([(0, 1, 2, 3)], [("a", 1)], [((0, 1), (2, 3, 4))], [(0, 1, 2)], [(0,)]):
        with pytest.raises(InputError, match="a range is a pair of numbers"):
            span_for(none, "uint16")
    with pytest.raises(InputError, match="these measurements are no images"):
        measured_white(RANGES, "float32")


def test_noise_in_gray_levels_is_that_of_each_channel():
    assert as_noise(in_units("8dn", SCALE)) == PerChannel((Gaussian(0.002), Gaussian(0.01)))
    found = as_noise(in_units("per-channel:40dn:8dn", SCALE))
    assert found == PerChannel((Gaussian(0.01), Gaussian(0.01)))
    counts = as_noise(in_units("poisson,gain=0.5e/dn,offset=100dn", SCALE))
    assert counts.models[1] == PoissonGaussian(0.0025, 0.0, 0.0)
    assert counts.models[0].offset == 0.025
    with pytest.raises(InputError, match="is of 3 channels, and black and white are given for 2"):
        in_units("per-channel:1dn:1dn:1dn", SCALE)


def test_noise_of_one_scale_in_another():
    """y = (v - b) / w; variance of 0.02 electrons a gray level and 3 gray levels, both ways."""
    shared = Scale.of("uint16", (0, 1000))
    noise = PoissonGaussian(0.02, 0.003, 0.1)  # 20 gray levels an electron, offset at 100
    found = in_scale(noise, shared, SCALE)
    for channel, (black, white) in zip(found.models, RANGES, strict=True):
        for number in (150.0, 800.0):  # gray levels
            there, here = number / 1000, (number - black) / (white - black)
            variance = float(noise.variance(torch.tensor(there))) * 1000**2
            assert float(channel.variance(torch.tensor(here))) * (white - black) ** 2 == (
                pytest.approx(variance, rel=1e-5)
            )
    back = in_scale(found, SCALE, shared)
    assert [m.gain for m in back.models] == pytest.approx([0.02, 0.02])
    assert [m.offset for m in back.models] == pytest.approx([0.1, 0.1])
    assert in_scale(Gaussian(0.1), shared, Scale.of("uint16", (0, 500))) == Gaussian(0.2)
    with pytest.raises(InputError, match="of 2 and 3 channels"):
        in_scale(PerChannel((Gaussian(0.1),) * 3), shared, SCALE)


def test_frames_of_one_channel_serve_all(tmp_path):
    np.save(tmp_path / "dark.npy", np.full((2, 24, 24), 120, np.uint16))
    frames = read_frames(tmp_path / "dark.npy", None, SCALE, (2, 24, 24))
    assert frames.dark[:, 0, 0].tolist() == pytest.approx([0.03, 0.025])


def test_noise_maps_are_in_the_numbers_of_the_files(tmp_path):
    np.save(tmp_path / "std.npy", np.full((1, 1, 2, 2), 8.0, np.float32))
    maps = read_noise_maps(str(tmp_path / "std.npy"), gain=SCALE.gain)
    assert maps.deviation(0)[:, 0, 0].tolist() == pytest.approx([0.002, 0.01])


def test_channels_in_another_order_are_those_of_frames_and_maps_too(scene, tmp_path, capsys):
    """Read as 1, 0: so are frames and maps of both channels; those of chosen ones are not."""
    folder, x, _ = scene
    dark, select = np.zeros((2, 32, 32), np.uint16), Selection(channels=("1", "0"))
    dark[0], dark[1] = 50, 120
    np.save(tmp_path / "dark.npy", dark[None])
    swapped = Scale.of("uint16", RANGES[::-1])
    frames = read_frames(tmp_path / "dark.npy", None, swapped, (2, 32, 32), select=select)
    assert frames.dark[:, 0, 0].tolist() == pytest.approx([20 / 800, 50 / 4000])
    alone = Scale.of("uint16", RANGES[1])
    one = Selection(channels=("1",))
    frames = read_frames(tmp_path / "dark.npy", None, alone, (1, 32, 32), select=one)
    assert frames.dark[:, 0, 0].tolist() == pytest.approx([20 / 800])
    np.save(tmp_path / "std.npy", np.float32([[[[40.0]], [[8.0]]]]).repeat(32, 2).repeat(32, 3))
    options = [word for black, white in RANGES[::-1] for word in ("--range", black, white)]
    argv = [*options, "--channel", "1", "0", "--noise-maps", tmp_path / "std.npy", "--json"]
    assert command("noise", folder, *argv) == 0
    ratio = json.loads(capsys.readouterr().out)["noise over noise maps"]
    assert ratio == pytest.approx(1.0, abs=0.1)


def test_a_selection_of_a_run_takes_the_same_channels_in_its_order():
    """Files with both channels are put in its order; those with a chosen part are as they are."""
    run, file = Selection(channels=("1", "0"), more=True), Path("a.tif")
    assert run.chosen(file, 2) == [1, 0] and run.chosen(file, 3) == [1, 0]
    assert run.chosen(file, 1) == [0]
    assert Selection(channels=("2", "0"), more=True).chosen(file, 2) == [0, 1]
    named = Selection(channels=("GFP", "DAPI"), more=True)
    assert named.chosen(file, 2, ["DAPI", "GFP"]) == [1, 0] and named.chosen(file, 2) == [0, 1]
    assert replace(run, results=True).chosen(file, 2) == [0, 1]


def test_maps_of_several_channels_with_a_model_of_one(scene, tmp_path, capsys):
    """The deviations of every channel are those of its map, in the numbers of the file."""
    folder, x, clean = scene
    np.save(tmp_path / "std.npy", np.float32([[[[40.0]], [[8.0]]]]).repeat(32, 2).repeat(32, 3))
    argv = ["--prior", "generic", *OPTIONS, "--noise-maps", tmp_path / "std.npy"]
    assert command("restore", folder, *argv, "--out", tmp_path / "out") == 0
    restored = tifffile.imread(tmp_path / "out" / "0.tif")
    noisy = tifffile.imread(folder / "0.tif")
    before, after = (np.abs(z - clean).mean((1, 2)) for z in (noisy, restored))
    assert (after < 0.5 * before).all()


@pytest.mark.slow
def test_commands_keep_the_range_of_each_channel(scene, tmp_path, capsys):
    """Learned, restored and written back in the numbers of each channel, without --range again."""
    folder = scene[0]
    assert command("noise", folder, *OPTIONS, "--json") == 0
    noise = json.loads(capsys.readouterr().out)
    levels = [noise[f"channel {i}"]["in gray levels"].split()[1] for i in range(2)]
    assert [float(level) for level in levels] == pytest.approx([40, 8], rel=0.1)
    assert "--range 0 4000 --range 100 900" in noise["paste"]
    run, out = tmp_path / "run", tmp_path / "out"
    argv = ["--noise", "per-channel:40dn:8dn", "--kimg", "0.05", "--network", "tiny"]
    assert command("learn", folder, "--out", run, *OPTIONS, *argv, "--start", "none") == 0
    capsys.readouterr()
    kept = json.loads((run / "config.json").read_text())
    assert kept["range"] == [[0.0, 4000.0], [100.0, 900.0]]
    assert run_span(run) == SCALE.ends and run_scale(run).gain == (4000.0, 800.0)
    assert command("restore", folder, "--prior", run, "--out", out, "--std", "--samples", "2") == 0
    restored = tifffile.imread(out / "1.tif")
    assert restored.dtype == np.uint16 and restored.shape == (2, 32, 32)
    posterior, data = unmurk.Posterior.load(run), load_images(folder, span=RANGES)
    problem = unmurk.Problem.from_dict(kept["problem"])
    mean, std = (m[0] for m in posterior.mean_std(data.images[1:2], problem, 2, 0, range(1, 2)))
    assert np.abs(restored.astype(float) - SCALE.to_file(mean)).max() <= 1
    found = tifffile.imread(out / "1-std.tif")
    assert found == pytest.approx((std * SCALE.step).numpy(), rel=1e-3)
    # a second time there is nothing to do
    capsys.readouterr()
    assert command("restore", folder, "--prior", run, "--out", out, "--std", "--samples", "2") == 0
    assert capsys.readouterr().out.split()[:4] == ["images", "0", "finished", "4"]
    # in one range for both, the noise of the run is converted
    capsys.readouterr()
    argv = ["--range", "0", "4000", "--out", tmp_path / "again"]
    assert command("restore", folder, "--prior", run, *argv) == 0
    said = capsys.readouterr().err
    assert "learned with --range 0 4000 --range 100 900" in said
    assert "is per-channel:gaussian,sigma=0.01:gaussian,sigma=0.002 in this range" in said


def test_a_dim_channel_is_noticed(tmp_path, capsys):
    """Channel 0 reaches 40,000 of 16 bits, channel 1 800; floats get whites of one digit."""
    bright = torch.linspace(0, 1, 4096).reshape(1, 1, 64, 64)
    y = torch.cat([40_000 * bright, 800 * bright], 1)
    note = channel_note(y / 65535, Scale.of("uint16"))
    assert note.startswith(
        "channel 1 fills 2 % of what channel 0 fills: --range 0 65535 --range 0 1023"
    )
    assert "--range 0 0.7 --range 0 0.02 fits both" in channel_note(y / 65535, Scale())
    assert channel_note(y / 65535, SCALE) == "" and channel_note(bright, Scale()) == ""
    assert channel_note(torch.cat([bright, 0.2 * bright], 1), Scale()) == ""
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "y.npy", (y + 200 + 20 * noise).numpy().astype(np.uint16))
    assert command("noise", tmp_path / "y.npy") == 0
    said = capsys.readouterr().err
    assert "of what channel 0 fills: --range 0 65535 --range 0 2047 fits both" in said


def test_a_range_for_too_many_channels_is_one_line(scene, tmp_path, capsys):
    folder, *_ = scene
    argv = ["--operator", "identity", *OPTIONS, "--range", "0", "1", "--out", tmp_path / "z"]
    assert command("corrupt", folder, *argv) == 2
    error = capsys.readouterr().err
    assert "known for 3 channels, and these images have 2" in error and error.count("\n") == 1
    assert not (tmp_path / "z").exists()
    assert command("noise", folder, "--range", "0") == 2
    assert "--range needs 2 values: write --range BLACK WHITE" in capsys.readouterr().err
