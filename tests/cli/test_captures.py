"""Captures on the command line: mixed sizes, chosen channels, repeats, bad pixels and units."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from tests.cli.test_cli import trained, unmurk  # noqa: F401 (a fixture)
from unmurk.cli.data import selection_of
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.axes import Selection
from unmurk.io.captures import open_captures
from unmurk.io.folders import pictures_in
from unmurk.io.images import load_images
from unmurk.io.packaged import is_generic, of_any_size
from unmurk.problem import Problem
from unmurk.tiling import posterior_for, prior_for

SIZES = [(131, 96), (64, 150), (70, 71), (20, 120)]  # the last is smaller than a tile


def capture(size: tuple[int, int], sigma: float, seed: int) -> np.ndarray:
    """A smooth scene of a size, the same for all seeds, with Gaussian noise; float32."""
    ramp = np.linspace(0.3, 0.6, size[1])[None].repeat(size[0], 0)
    return (ramp + sigma * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def numbers(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("repeats", [1, 3])
def test_noise_of_images_of_several_sizes(repeats, tmp_path, capsys):
    """Sigma to 5 % from all images, also over time; a few of the pixels hold no measurement."""
    for i, size in enumerate(SIZES):
        for j in range(repeats):
            y = capture(size, 0.05, 10 * i + j)
            y[10:12, 40:60] = np.nan
            tifffile.imwrite(tmp_path / f"{i}-{j}.tif", y)
    more = ["--repeats", repeats] if repeats > 1 else []
    assert unmurk("noise", tmp_path, "--nan", "mask", "--json", *more) == 0
    found = numbers(capsys)
    assert found["images"] == len(SIZES) * repeats
    assert found["sigma"] == pytest.approx(0.05, rel=0.05)
    if repeats > 1:
        assert found["repeats"]["middle"]["sigma over time"] == pytest.approx(0.05, rel=0.05)
        (tmp_path / "3-2.tif").unlink()
        assert unmurk("noise", tmp_path, "--nan", "mask", *more) == 2
        assert "scenes of 3" in capsys.readouterr().err


@pytest.mark.parametrize("scenes", [1, 2])
def test_captures_of_different_scenes_are_noticed(scenes, tmp_path, capsys):
    """Two captures that differ by a step of 0.2, four times the noise, are not of one scene."""
    y = np.stack([capture((96, 96), 0.05, seed) for seed in range(4)])
    y[1::2] += 0.2 * (scenes - 1)
    np.save(tmp_path / "y.npy", y[:, None])
    assert unmurk("noise", tmp_path / "y.npy", "--repeats", 2) == 0
    assert ("are they of one scene" in capsys.readouterr().err) == (scenes == 2)


def test_noise_in_gray_levels_is_written_without_a_power_of_ten(tmp_path, capsys):
    """A noise of 0.05 of the 40000 levels between black and white is 2000 of them, to 5 %."""
    np.save(tmp_path / "y.npy", 40000 * capture((96, 96), 0.05, 0)[None, None])
    assert unmurk("noise", tmp_path / "y.npy", "--range", 0, 40000, "--json") == 0
    sigma, unit = numbers(capsys)["in gray levels"].removeprefix("sigma ").split()
    assert unit == "dn" and sigma.isdigit() and int(sigma) == pytest.approx(2000, rel=0.05)


def test_hidden_pixels_do_not_lower_the_noise_over_time(tmp_path, capsys):
    """A quarter of each image is not finite: counted as 0 it would give 0.043 in place of 0.05."""
    y = np.stack([capture((96, 96), 0.05, seed) for seed in range(6)])
    y[:, :48, :48] = np.nan
    tifffile.imwrite(tmp_path / "y.tif", y, photometric="minisblack")
    argv = ["noise", tmp_path / "y.tif", "--repeats", 3, "--nan", "mask", "--json"]
    assert unmurk(*argv) == 0
    over_time = numbers(capsys)["repeats"]
    assert over_time["middle"]["sigma over time"] == pytest.approx(0.05, rel=0.05)


def test_noise_of_a_chosen_channel(tmp_path, capsys):
    """Two channels with noise of 0.02 and 0.08: each is measured alone, in any order of axes."""
    y = [np.stack([capture((96, 80), s, 7 * t + c) for c, s in enumerate((0.02, 0.08))])
         for t in range(2)]  # fmt: skip
    np.save(tmp_path / "y.npy", np.stack(y).transpose(1, 2, 0, 3))  # C Y T X
    for channel, sigma in ((0, 0.02), (1, 0.08)):
        argv = ["noise", tmp_path / "y.npy", "--axes", "CYTX", "--channel", channel, "--json"]
        assert unmurk(*argv) == 0
        found = numbers(capsys)
        assert found["images"] == 2 and found["sigma"] == pytest.approx(sigma, rel=0.05)


def test_channels_of_a_run_concern_files_with_more_channels(tmp_path):
    """A file of the channel alone is read as it is, unless the user names a channel."""
    (tmp_path / "config.json").write_text(json.dumps({"problem": {}, "channels": ["GFP"]}))

    class Given:
        axes, channel = None, ()

    select, file = selection_of(Given(), tmp_path), Path("a.tif")
    assert select.chosen(file, 1) == [0]
    assert select.chosen(file, 2, ["DAPI", "GFP"]) == [1]
    with pytest.raises(InputError, match="none is 'GFP'"):
        select.chosen(file, 2)
    Given.channel = ("1",)
    with pytest.raises(InputError, match="1 channels"):
        selection_of(Given(), tmp_path).chosen(file, 1)
    assert Selection(channels=("1",)).chosen(file, 2) == [1]


@pytest.mark.parametrize(("config", "any_size"), [({"crop": 16}, True), ({"crop": None}, False)])
def test_a_run_on_crops_takes_smaller_images(config, any_size, trained):  # noqa: F811
    file = trained / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    assert of_any_size(trained / "prior") == any_size and not is_generic(trained / "prior")
    models = ((prior_for, Prior.load(trained)), (posterior_for, Posterior.load(trained)))
    for choose, model in models:
        assert model.any_size == any_size
        if not any_size:
            with pytest.raises(InputError, match="at least 1x16x16"):
                choose(model, (1, 12, 40))
    if any_size:
        x = torch.rand(2, 1, 8, 24, generator=torch.Generator().manual_seed(0))
        prior = models[0][1]  # one tile covers such an image: the network itself
        found = prior_for(prior, (1, 8, 24)).denoise(x, 0.1)
        own = Prior(prior.network, (1, 8, 24)).eval().denoise(x, 0.1)
        assert torch.allclose(found, own, atol=1e-6)


def test_smaller_images_are_restored_after_crops(trained, tmp_path, capsys):  # noqa: F811
    """Restored files keep their sizes, and sides need not be multiples of 4."""
    file = trained / "config.json"
    known = {"problem": {"operator": "identity", "noise": 0.1}, "crop": 16}
    file.write_text(json.dumps(known))
    (tmp_path / "y").mkdir()
    for i, size in enumerate([(13, 40), (17, 16), (9, 10)]):
        tifffile.imwrite(tmp_path / "y" / f"{i}.tif", capture(size, 0.1, i))
    argv = [tmp_path / "y", "--prior", trained]
    assert unmurk("restore", *argv, "--out", tmp_path / "x", "--std") == 0
    given = ["--operator", "identity", "--noise", 0.1, "--steps", 2]
    assert unmurk("solve", *argv, "--out", tmp_path / "s", *given) == 0
    assert capsys.readouterr().err == ""
    for i, size in enumerate([(13, 40), (17, 16), (9, 10)]):
        for name in (f"x/{i}.tif", f"x/{i}-std.tif", f"s/{i}.tif"):
            found = tifffile.imread(tmp_path / name)
            assert found.shape == size and np.isfinite(found).all()


def test_numbers_far_from_the_unit_are_about_the_range(trained, tmp_path, capsys):  # noqa: F811
    """Counts of thousands as floats: every command asks for --range, whatever the noise is."""
    (tmp_path / "y").mkdir()
    for i in range(2):
        tifffile.imwrite(tmp_path / "y" / f"{i}.tif", 4000 * capture((100, 100), 0.05, i))
    y, out = tmp_path / "y", tmp_path / "out"
    solve = ["solve", y, "--prior", trained, "--operator", "identity", "--out", out, "--noise"]
    for argv in (
        ["noise", y],
        ["learn", y, "--out", out, "--noise", "auto"],
        ["learn", y, "--out", out, "--noise", "200dn"],
        ["corrupt", y, "--out", out, "--noise", "200dn"],
        [*solve, "auto"],
        [*solve, "200dn"],
    ):
        assert unmurk(*argv) == 2
        said = capsys.readouterr().err.strip()
        assert said.count("\n") == 0 and said.endswith("such as --range 0 4095"), said
        assert not out.exists()
    assert unmurk("noise", y, "--range", 0, 4000, "--json") == 0
    assert numbers(capsys)["sigma"] == pytest.approx(0.05, rel=0.05)


def test_noise_is_estimated_from_images_of_every_size(tmp_path, capsys):
    """The estimate of `restore` and `solve` is that of `noise`."""
    (tmp_path / "y").mkdir()
    for i, side in enumerate((30, 30, 30, 100, 130)):
        tifffile.imwrite(tmp_path / "y" / f"{i}.tif", capture((side, side), 0.05, i))
    assert unmurk("noise", tmp_path / "y", "--json") == 0
    paste = numbers(capsys)["paste"]
    assert Problem("identity", paste.removeprefix("--noise ")).level == pytest.approx(0.05, 0.05)
    for argv in (
        ["restore", "--prior", "generic", "--samples", 2],
        ["solve", "--prior", "generic", "--operator", "identity", "--noise", "auto", "--steps", 2],
    ):
        command, *rest = argv
        assert unmurk(command, tmp_path / "y", *rest, "--out", tmp_path / command) == 0
        said = capsys.readouterr().err
        assert paste.removeprefix("--noise ") in said and "5 images of 30x30 to 130x130" in said


def test_gray_levels_count_in_the_scale_of_the_whole_set(tmp_path, capsys):
    """The first image alone fits 10 bits, the set needs 12: 12 levels are 12 / 4095."""
    for i, high in enumerate((900, 3500)):
        y = np.linspace(100, high, 400).round().astype(np.uint16).reshape(20, 20)
        tifffile.imwrite(tmp_path / f"{i}.tif", y)
    out = tmp_path / "out"
    assert unmurk("corrupt", tmp_path, "--out", out, "--noise", "12dn") == 0
    assert "noise 12dn is 0.0029304 in units" in capsys.readouterr().err
    before, after = (tifffile.imread(p / "1.tif").astype(float) for p in (tmp_path, out))
    assert (after - before).std() == pytest.approx(12, rel=0.15)  # 400 numbers: 3.5 % chance


def test_parts_of_fits_files_in_a_folder(trained, tmp_path, capsys):  # noqa: F811
    """A selection behind a folder reaches its FITS files, in commands that read a sample first."""
    fits = pytest.importorskip("astropy.io.fits")
    folder = tmp_path / "night"
    folder.mkdir()
    for i, size in enumerate([(100, 120), (101, 120)]):
        flags = np.zeros(size, np.int16)
        flags[20:22, 30:60] = 4
        units = [
            fits.ImageHDU(capture(size, 0.05, i), name="SCI"),
            fits.ImageHDU(flags, name="DQ"),
        ]
        fits.HDUList([fits.PrimaryHDU(), *units]).writeto(folder / f"{i}.fits")
    named = Path(f"{folder}[SCI,dq=DQ]")
    assert [p.name for p in pictures_in(named)] == [f"{i}.fits[SCI,dq=DQ]" for i in range(2)]
    assert unmurk("noise", named, "--nan", "mask", "--json") == 0
    assert numbers(capsys)["sigma"] == pytest.approx(0.05, rel=0.05)
    argv = ["solve", named, "--prior", trained, "--operator", "identity", "--noise", "0.05dn"]
    argv += ["--steps", 2, "--out", tmp_path / "out"]
    assert unmurk(*argv) == 2
    assert "--nan mask" in capsys.readouterr().err
    assert unmurk(*argv, "--nan", "mask") == 0
    assert fits.getdata(tmp_path / "out" / "1.fits", "SCI").shape == (101, 120)


def test_scenes_of_one_fits_file_are_not_hidden_under_another_name(trained, tmp_path, capsys):  # noqa: F811
    """A result that cannot have the name that was asked for is refused before the work: scenes of
    2 captures along an axis of 3."""
    fits = pytest.importorskip("astropy.io.fits")
    cube = np.stack([capture((16, 16), 0.1, i) for i in range(6)])
    fits.PrimaryHDU(cube.reshape(2, 3, 16, 16)).writeto(tmp_path / "cube.fits")
    argv = ["restore", tmp_path / "cube.fits", "--prior", trained, "--repeats", 2]
    argv += ["--operator", "identity", "--noise", 0.1, "--out"]
    assert unmurk(*argv, tmp_path / "x.fits") == 2
    assert "give a .tif name" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*"))
    assert unmurk(*argv, tmp_path / "x.tif") == 0
    assert tifffile.imread(tmp_path / "x.tif").shape == (3, 16, 16)
    capsys.readouterr()
    assert unmurk(*argv, tmp_path / "x") == 0
    assert "scenes of FITS files" in capsys.readouterr().err
    assert tifffile.imread(tmp_path / "x" / "cube.tif").shape == (3, 16, 16)


def test_a_command_writes_scenes_into_one_file(trained, tmp_path, capsys):  # noqa: F811
    """`--out` may have the suffix of the input, and std lies beside it in the same format."""
    fits = pytest.importorskip("astropy.io.fits")
    cube = np.random.default_rng(0).normal(0.5, 0.1, (4, 16, 16)).astype("float32")
    fits.PrimaryHDU(cube).writeto(tmp_path / "cube.fits")
    argv = ["restore", tmp_path / "cube.fits", "--prior", trained, "--repeats", 2, "--std"]
    argv += ["--operator", "identity", "--noise", 0.1, "--out"]
    assert unmurk(*argv, tmp_path / "x.fits") == 0
    assert unmurk(*argv, tmp_path / "x") == 0
    assert "TIFF" not in capsys.readouterr().err
    for name in ("x.fits", "x-std.fits", "x/cube.fits", "x/cube-std.fits"):
        assert fits.getdata(tmp_path / name).shape == (2, 16, 16)
    assert sorted(p.suffix for p in (tmp_path / "x").glob("c*")) == [".fits", ".fits"]


@pytest.mark.parametrize(("suffix", "form"), [("tif", "tif"), ("png", "png")])
def test_captures_know_the_format_that_samples_are_written_in(suffix, form, tmp_path):
    from unmurk.io.formats.pictures import single

    y = (255 * capture((40, 50), 0.05, 0)).astype(np.uint8)
    if suffix == "tif":
        tifffile.imwrite(tmp_path / "a.tif", y)
    else:
        from PIL import Image

        Image.fromarray(y).save(tmp_path / "a.png")
    assert single(tmp_path / f"a.{suffix}") == (form == "png")
    assert open_captures(tmp_path).scale.format == form


def test_noise_of_images_without_a_measured_pixel_is_one_line(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "y.tif", np.full((40, 50), np.nan, np.float32))
    assert unmurk("noise", tmp_path / "y.tif", "--nan", "mask") == 2
    said = capsys.readouterr().err.strip()
    assert "has no finite value" in said and "\n" not in said


def test_paths_are_printed_as_they_were_typed(trained, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Relative ones stay relative: files, folders, arrays, and the page of a run."""
    monkeypatch.chdir(tmp_path)
    y = np.stack([capture((16, 16), 0.1, i) for i in range(2)])
    np.save("y.npy", y)
    Path("in").mkdir()
    tifffile.imwrite("in/a.tif", y[0])
    given = ["--prior", trained, "--operator", "identity", "--noise", 0.1, "--json", "--out"]
    for data, out in (("y.npy", "x.npy"), ("in", "out"), ("in/a.tif", "b.tif")):
        assert unmurk("restore", data, *given, out) == 0
        expected = {"in": "out/a.tif"}.get(data, out)  # one file of a folder is named
        assert json.loads(capsys.readouterr().out)["out"] == expected
    assert unmurk("restore", tmp_path / "y.npy", *given, tmp_path / "z.npy") == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "z.npy")


def test_images_without_a_finite_value(trained, tmp_path, capsys):  # noqa: F811
    """One line, or left out with --skip-bad; restored, they would be pictures of nothing."""
    (tmp_path / "in").mkdir()
    y = np.stack([capture((16, 16), 0.1, i) for i in range(3)])
    y[1] = np.nan
    np.save(tmp_path / "y.npy", y)
    for i in range(3):
        tifffile.imwrite(tmp_path / "in" / f"{i}.tif", y[i])
    given = ["--prior", trained, "--operator", "identity", "--noise", 0.1, "--nan", "mask"]
    given += ["--out", tmp_path / "out"]
    assert unmurk("restore", tmp_path / "in", *given) == 2
    assert "1.tif has no finite value: leave it out" in capsys.readouterr().err
    assert unmurk("restore", tmp_path / "in", *given, "--skip-bad") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tif")) == ["0.tif", "2.tif"]
    capsys.readouterr()
    assert unmurk("restore", tmp_path / "y.npy", *given[:-1], tmp_path / "z.npy") == 2
    said = "y.npy has no finite value: leave it out with --skip-bad"
    assert said in capsys.readouterr().err
    learned = ["learn", tmp_path / "y.npy", "--noise", 0.1, "--nan", "mask", "--kimg", 0.01]
    assert unmurk(*learned, "--out", tmp_path / "run") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("large", [False, True])
def test_an_image_of_an_array_is_left_out(large, trained, tmp_path, capsys, monkeypatch):  # noqa: F811
    """One without a finite value, with --skip-bad; in memory and from the file."""
    if large:
        monkeypatch.setattr("unmurk.io.source.HELD", 1)
    y = np.stack([capture((16, 16), 0.1, i) for i in range(5)])
    y[1], y[3, 2, 5] = np.nan, np.nan
    np.save(tmp_path / "y.npy", y)
    argv = ["restore", tmp_path / "y.npy", "--prior", trained, "--nan", "mask", "--skip-bad"]
    argv += ["--operator", "identity", "--noise", 0.1, "--out", tmp_path / "z.npy", "--json"]
    assert unmurk(*argv) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["skipped"] == {"00001": "not finite"}
    assert "left out 00001" in said.err or large
    assert np.isfinite(np.load(tmp_path / "z.npy")).all() and len(np.load(tmp_path / "z.npy")) == 4
    found = open_captures(tmp_path / "y.npy", True, None, "mask")
    assert found.numbers == [0, 2, 3, 4] and list(found.missing) == [2]
    fits = pytest.importorskip("astropy.io.fits")
    (tmp_path / "in").mkdir()
    for i in range(2):
        units = [fits.PrimaryHDU(), fits.ImageHDU(y[i * 2], name="SCI")]
        units.append(fits.ImageHDU(np.full((16, 16), i, np.uint8), name="DQ"))
        fits.HDUList(units).writeto(tmp_path / "in" / f"{i}.fits")
    with pytest.raises(InputError, match="marks all pixels as bad"):
        load_images(f"{tmp_path / 'in'}[SCI,dq=DQ]", nan="mask")
    found = load_images(f"{tmp_path / 'in'}[SCI,dq=DQ]", nan="mask", skip_bad=True)
    assert len(found) == 1 and [name for name, _ in found.skipped] == ["1.fits"]


def test_what_noise_prints_to_paste_says_that_no_model_fits(tmp_path, capsys):
    """Noise that is cut at black: the text to paste refers to the warning."""
    draw = np.random.default_rng(0)
    y = (0.02 + 0.1 * draw.standard_normal((6, 64, 64))).clip(0, 1).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    assert unmurk("noise", tmp_path / "y.npy") == 0
    shown = capsys.readouterr()
    assert "warning: the noise is clipped" in shown.err
    (paste,) = [line for line in shown.out.splitlines() if line.startswith("paste:")]
    assert paste.endswith("(the warning above says why it does not fit)")
    assert Problem("identity", paste.split()[2]).level > 0


@pytest.mark.parametrize("noise", ["auto", "12dn", "0.1"])
def test_a_range_of_other_files_is_refused(tmp_path, capsys, noise):
    """Not with a line about the noise, which would be thousands of ranges."""
    pixels = np.random.default_rng(0).normal(9000, 50, (2, 100, 100)).round().astype(np.uint16)
    np.save(tmp_path / "y.npy", pixels)
    argv = [
        "learn",
        tmp_path / "y.npy",
        "--range",
        0,
        1,
        "--noise",
        noise,
        "--out",
        tmp_path / "r",
    ]
    assert unmurk(*argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the set has the median 9000, far from black at 0 and white at 1" in said
    assert "--range 0 16383" in said and not (tmp_path / "r").exists()


def test_what_noise_prints_to_paste_has_the_options_that_were_given(tmp_path, capsys):
    """They decide what the number is of; a range given twice is the same noise twice as strong."""
    draw = np.random.default_rng(0)
    y = (1000 + 50 * draw.standard_normal((4, 64, 64))).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    assert unmurk("noise", tmp_path / "y.npy", "--range", 0, 4000, "--nan", "mask") == 0
    (paste,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("paste:")]
    words = paste.split()
    assert words[3:] == ["--range", "0", "4000", "--nan", "mask"]
    assert Problem("identity", words[2]).level == pytest.approx(50 / 4000, rel=0.05)


def test_a_run_without_weights_says_so(tmp_path, capsys):
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    np.save(tmp_path / "y.npy", np.zeros((1, 16, 16), np.float32))
    argv = [
        "restore",
        tmp_path / "y.npy",
        "--prior",
        tmp_path / "run",
        "--out",
        tmp_path / "x.npy",
    ]
    assert unmurk(*argv) == 2
    assert "has no weights yet: continue it with its learn command" in capsys.readouterr().err
