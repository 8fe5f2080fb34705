"""`unmurk restore` and `solve` on captures: mixed sizes, crops, scenes, bad pixels and units."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from tests.cli.calls import capture, numbers, unmurk
from unmurk.cli.commands import restoring
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.captures import open_captures
from unmurk.io.folders import pictures_in
from unmurk.io.images import load_images
from unmurk.io.packaged import is_generic, of_any_size
from unmurk.problem import Problem
from unmurk.tiling import posterior_for, prior_for


def test_given_parts_replace_the_runs_problem(trained):
    """--operator and --noise stand in for what the run was trained with, each alone."""
    trained_with = restoring.trained_problem(str(trained), None, None)
    assert trained_with == Problem("inpaint:random,keep=0.5", 0.1)
    assert restoring.trained_problem(str(trained), None, 0.0) == Problem(
        "inpaint:random,keep=0.5", 0.0
    )
    assert restoring.trained_problem(str(trained), "identity", None) == Problem("identity", 0.1)


@pytest.mark.parametrize(("config", "any_size"), [({"crop": 16}, True), ({"crop": None}, False)])
def test_a_run_on_crops_takes_smaller_images(config, any_size, trained):
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


def test_smaller_images_are_restored_after_crops(trained, tmp_path, capsys):
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


def test_numbers_far_from_the_unit_are_about_the_range(trained, tmp_path, capsys):
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


def test_parts_of_fits_files_in_a_folder(trained, tmp_path, capsys):
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


def test_scenes_of_one_fits_file_are_not_hidden_under_another_name(trained, tmp_path, capsys):
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


def test_a_command_writes_scenes_into_one_file(trained, tmp_path, capsys):
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


def test_paths_are_printed_as_they_were_typed(trained, tmp_path, capsys, monkeypatch):
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


def test_images_without_a_finite_value(trained, tmp_path, capsys):
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
def test_an_image_of_an_array_is_left_out(large, trained, tmp_path, capsys, monkeypatch):
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
