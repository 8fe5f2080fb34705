"""Files that are damaged, odd or of unusual kinds: read right, or refused in one line."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from unmurk.cli import main as cli
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.io.images import load_images
from unmurk.io.jobs import jobs_of, process
from unmurk.io.saving import save_images
from unmurk.missing import without_missing
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.tiling import posterior_for, prior_for
from unmurk.training import learn

SHORT = ["--kimg", "0.01", "--precision", "fp32"]
DAMAGED = sorted((Path(__file__).parent / "files").iterdir())
LEARN = pytest.param("learn", marks=pytest.mark.slow)  # builds and trains networks
rng = np.random.default_rng(0)


def commands(data: Path, run: Path, out: Path) -> dict[str, list[object]]:
    """One call of every command that reads images."""
    problem = ["--operator", "identity", "--noise", "0.1"]
    return {
        "learn": ["learn", data, "--noise", "0.1", *SHORT, "--method", "noisy", "--out", out],
        "restore": ["restore", data, "--prior", run, *problem, "--samples", "2", "--out", out],
        "solve": ["solve", data, "--prior", run, *problem, "--steps", "1", "--out", out],
        "corrupt": ["corrupt", data, "--out", out],
        "evaluate": ["evaluate", data, data],
    }


def refused(argv: list[object], capfd: pytest.CaptureFixture[str]) -> str:
    """What a refused command says: one line, on a standard error stream that holds no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main([str(a) for a in argv]) == 2
    text = capfd.readouterr().err
    assert text.startswith("unmurk: ") and text.count("\n") == 1, text
    return text


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -- damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", DAMAGED, ids=lambda f: f.name)
def test_damaged_files_are_refused_in_one_line(file, run, tmp_path, capfd):
    for name, argv in commands(file, run, tmp_path / "out").items():
        for more in [[], ["--skip-bad"]] if name != "evaluate" else [[]]:
            assert file.name in refused([*argv, *more], capfd)
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [LEARN, "restore", "solve", "corrupt"])
def test_damaged_pictures_are_left_out_and_listed(command, run, tmp_path, capfd):
    folder = tmp_path / "in"
    folder.mkdir()
    bad = [file for file in DAMAGED if file.suffix == ".tif"]
    for file in bad:
        shutil.copy(file, folder)
    (folder / "link.png").symlink_to(tmp_path / "nowhere")
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (28, 28), np.uint8)).save(folder / f"z{i}.png")
    argv = [*commands(folder, run, tmp_path / "out")[command], "--skip-bad", "--json"]
    assert cli.main([str(a) for a in argv]) == 0
    shown = capfd.readouterr()
    found = json.loads(shown.out)
    assert found["images"] == 2
    assert sorted(found["skipped"]) == [*(file.name for file in bad), "link.png"]
    assert "link to nothing" in found["skipped"]["link.png"]
    said = [s for s in shown.err.splitlines() if s.startswith("left out ")]
    assert len(said) == len(bad) + 1
    expected = ("learning", "error bars", "Not trusted")
    others = [
        s
        for s in shown.err.split("\n")
        if s.strip() and s not in said and not s.startswith(expected)
    ]
    assert others == []


def test_what_is_no_file_is_refused(run, tmp_path, capfd):
    for name in ("a.png", "a.tif", "a.npy", "a-idx3-ubyte", "a.npz", "a.gz", "a.h5", "a.nd2"):
        os.mkfifo(tmp_path / name)
        for argv in commands(tmp_path / name, run, tmp_path / "out").values():
            assert "FIFO" in refused(argv, capfd)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "nowhere")
    for argv in commands(tmp_path / "c.png", run, tmp_path / "out").values():
        assert "link to nothing" in refused(argv, capfd)


def compressed(path: Path, how: str) -> None:
    kind = {} if how != "jpeg" else {"photometric": "rgb"}
    pixels = rng.integers(0, 255, (64, 64, 3) if how == "jpeg" else (64, 64), np.uint8)
    tifffile.imwrite(path, pixels, compression=how, **kind)


@pytest.mark.parametrize("how", ["lzw", "zlib", "zstd", "packbits", "jpeg", "lzma", "webp", "png"])
def test_compressed_tiffs_are_read_or_refused_without_a_word_of_the_decoder(how, tmp_path, capfd):
    path = tmp_path / "a.tif"
    if how in ("webp",):
        tifffile.imwrite(
            path,
            rng.integers(0, 255, (64, 64, 3), np.uint8),
            compression=how,
            photometric="rgb",
            compressionargs={"lossless": True},
        )
    else:
        compressed(path, how)
    expected = tifffile.imread(path).reshape(64, 64, -1)
    found = load_images(path).images[0].permute(1, 2, 0)
    assert np.array_equal((found * 255).round(), expected)
    whole = bytearray(path.read_bytes())
    for trial in range(30):
        broken = bytearray(whole)
        for place in np.random.default_rng(trial).integers(8, len(whole), 12):
            broken[place] = (broken[place] + 1 + trial) % 256
        path.write_bytes(broken)
        try:
            load_images(path)
        except InputError as error:
            assert "\n" not in str(error)
    shown = capfd.readouterr()
    assert shown.err == shown.out == ""


# -- axes, colours --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "shape", "images", "channels"),
    [
        ("CYX", (2, 28, 28), 1, 2),
        ("ZYX", (5, 28, 28), 5, 1),
        ("TCYX", (3, 2, 28, 28), 3, 2),
        ("CZYX", (2, 3, 28, 28), 3, 2),
        ("TZCYX", (2, 3, 4, 28, 28), 6, 4),
        ("TCZYX", (2, 2, 3, 28, 28), 6, 2),
    ],
)
@pytest.mark.parametrize("kind", ["ome", "imagej", "shaped"])
def test_axes_of_tiffs(axes, shape, images, channels, kind, tmp_path):
    """C is channels, T and Z are images; a copy has the same axes."""
    if kind == "imagej" and "CZ" in axes:
        pytest.skip("ImageJ keeps C behind Z")
    data = rng.integers(0, 65535, shape, np.uint16)
    path = tmp_path / "a.tif"
    options = {} if kind == "shaped" else {kind: True}
    tifffile.imwrite(path, data, metadata={"axes": axes}, photometric="minisblack", **options)
    expected = np.moveaxis(data, axes.index("C"), -3) if "C" in axes else data[..., None, :, :]
    expected = expected.reshape(images, channels, 28, 28)
    found = load_images(path)
    assert np.array_equal(found.scale.to_file(found.images), expected)
    process(jobs_of(path, tmp_path / "b.tif"), lambda y, _: {"images": y})
    with tifffile.TiffFile(tmp_path / "b.tif") as copy:
        assert (copy.series[0].axes, copy.series[0].shape) == (axes, shape)
        assert np.array_equal(copy.asarray(), data)


def test_one_page_for_a_whole_imagej_stack(tmp_path):
    data = rng.integers(0, 65535, (3, 28, 28), np.uint16)
    path = tmp_path / "a.tif"
    text = "ImageJ=1.54\nimages=3\nframes=3\nhyperstack=true\n"
    with tifffile.TiffWriter(path, byteorder=">") as writer:
        writer.write(data[0], metadata=None, description=text, software=False)
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[0]
    raw = path.read_bytes()
    if offset + data[0].nbytes != len(raw):
        pytest.skip("tifffile puts the pixels elsewhere")
    path.write_bytes(raw + data[1:].astype(">u2").tobytes())
    found = load_images(path)
    assert np.array_equal(found.scale.to_file(found.images)[:, 0], data)


def test_colours_of_tiffs(tmp_path):
    grey = rng.integers(0, 255, (28, 28), np.uint8)
    colours = rng.integers(0, 255, (3, 256), np.uint16) * np.uint16(257)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, grey, photometric="palette", colormap=colours)
    expected = (colours // 257).astype(np.uint8).T[grey]
    assert np.array_equal(load_images(path).images[0].mul(255).round().permute(1, 2, 0), expected)
    for dtype in (np.uint8, np.uint16, np.uint32):
        top = np.iinfo(dtype).max
        white = (grey.astype(np.uint64) * (top // 255)).astype(dtype)
        tifffile.imwrite(path, white, photometric="miniswhite")
        assert np.allclose(load_images(path).images[0, 0], 1 - grey / 255, atol=1e-7)
        out = tmp_path / "b.tif"
        process(jobs_of(path, out), lambda y, _: {"images": y})
        with tifffile.TiffFile(out) as copy:
            assert int(copy.pages[0].photometric) == 0
            wrong = np.abs(copy.asarray().astype(float) - white)
            assert wrong.max() <= (256 if dtype == np.uint32 else 0)  # float32 in between
    rgba = np.dstack([rng.integers(0, 255, (28, 28, 3), np.uint8), np.full((28, 28), 255, "u1")])
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(load_images(path).images.mul(255).round()[0, 2], rgba[..., 2])
    rgba[3, 4, 3] = 254
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(InputError, match="partly transparent"):
        load_images(path)


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_of_tiffs(turn, tmp_path):
    pixels = rng.integers(0, 255, (4, 6), np.uint8)
    tags = [(274, "H", 1, turn, True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=tags, metadata=None)
    upside = pixels[::-1] if turn in (3, 4) else pixels
    turned = {
        **{1: pixels, 2: pixels[:, ::-1], 3: upside[:, ::-1], 4: upside},
        **{5: pixels.T, 6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].T, 8: np.rot90(pixels)},
    }
    expected = turned[turn]
    assert np.array_equal(load_images(tmp_path / "a.tif").images[0, 0].mul(255).round(), expected)


@pytest.mark.slow
def test_two_channels_are_learnt_and_restored_alike(tmp_path, capfd):
    """A TIFF of two channels: the same images, and the report page, whatever reads them."""
    folder = tmp_path / "in"
    folder.mkdir()
    data = rng.integers(0, 255, (8, 2, 8, 8), np.uint8)
    for i, page in enumerate(data):
        tifffile.imwrite(folder / f"{i}.tif", page, metadata={"axes": "CYX"})
    run, out = tmp_path / "run", tmp_path / "out"
    learning = ["learn", folder, "--noise", 0.1, "--kimg", 0.04, "--precision", "fp32"]
    for _ in range(2):
        assert cli.main([str(a) for a in [*learning, "--out", run]]) == 0
    assert (run / "report.html").exists() and Prior.load(run).shape == (2, 8, 8)
    for target in (out, tmp_path / "out.npy"):
        argv = ["restore", folder, "--prior", run, "--samples", 2, "--out", target]
        assert cli.main([str(a) for a in argv]) == 0
    pages = np.stack([tifffile.imread(out / f"{i}.tif") for i in range(8)])
    assert pages.shape == data.shape
    assert np.array_equal(pages, np.load(tmp_path / "out.npy"))


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "magic"),
    [
        ("noisy_idx.npy", b"\x93NUMPY"),
        ("idx3-ubyte.npz", b"PK"),
        ("idx.tif", b"II*\0"),
        ("new-idx3-ubyte", b"\0\0\x08\x03"),
        ("new.idx3-ubyte.gz", b"\x1f\x8b"),
    ],
)
def test_the_ending_decides_the_format(name, magic, tmp_path):
    x = torch.rand(3, 1, 8, 8)
    assert save_images(x, tmp_path / name) == [tmp_path / name]
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert torch.allclose(load_images(tmp_path / name).images, x, atol=0.5 / 255)


def test_formats_that_lose_numbers_are_not_written(tmp_path):
    for name in ("a.jpg", "a.bmp", "a.webp"):
        with pytest.raises(InputError, match="give .png, .tif, .npy or .npz"):
            save_images(torch.rand(1, 1, 8, 8), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


# -- missing numbers ------------------------------------------------------------------------------


def holed(folder: Path, count: int = 4) -> Path:
    """Float TIFFs, of which number 2 has one pixel that is not a number."""
    folder.mkdir()
    clean = np.full((count, 28, 28), 0.5, np.float32)
    clean += 0.1 * rng.standard_normal(clean.shape).astype(np.float32)
    clean[2, 5, 6] = np.nan
    for i, page in enumerate(clean):
        tifffile.imwrite(folder / f"{i}.tif", page)
    np.save(folder.with_suffix(".npy"), clean)
    return folder


@pytest.mark.parametrize("command", [LEARN, "restore", "solve", "corrupt", "evaluate"])
def test_numbers_that_are_not_finite_are_named_or_left_out(command, run, tmp_path, capfd):
    folder = holed(tmp_path / "in")
    for data, name in ((folder, "2.tif"), (folder.with_suffix(".npy"), "00002")):
        argv = commands(data, run, tmp_path / "out")[command]
        text = refused(argv, capfd)
        assert name in text and "not finite" in text and "--nan mask" in text
        assert not any((tmp_path / "out").glob("*.npy"))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if command == "evaluate":  # which has no --skip-bad
            continue
        assert cli.main([str(a) for a in [*argv, "--skip-bad", "--json"]]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["images"] == 3 and list(found["skipped"]) == [name]
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("command", [LEARN, "restore", "solve"])
def test_missing_pixels_are_hidden(command, run, tmp_path, capfd):
    folder = holed(tmp_path / "in")
    out = tmp_path / "out"
    argv = [a for a in commands(folder, run, out)[command] if a not in ("--method", "noisy")]
    argv += ["--nan", "mask", "--json"]
    argv += ["--kimg", "0.04"] if command == "learn" else []
    assert cli.main([str(a) for a in argv]) == 0
    assert json.loads(capfd.readouterr().out)["images"] == 4
    if command == "learn":
        config = json.loads((out / "config.json").read_text())
        assert config["nan"] == "mask" and config["problem"]["operator"] == "identity"
        lines = (out / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["skipped"] == 0
    else:
        assert np.isfinite(tifffile.imread(out / "2.tif")).all()


OPERATORS = ["identity", "inpaint:random,keep=0.5", "blur:gaussian,sigma=1", "sr:average,factor=2"]
OPERATORS += ["blur:gaussian,sigma=1|inpaint:random,keep=0.5"]


@pytest.mark.parametrize("spec", OPERATORS)
def test_the_problem_that_hides_missing_pixels(spec):
    """A is M A: missing pixels do not count, carry nothing, and all else is as before."""
    shape = (2, 8, 8)
    problem = Problem(spec, 0.1).bind([3, 5], shape)
    x = torch.rand(2, *shape, generator=torch.manual_seed(0))
    y = problem.simulate(x)
    y[1, 0, 1, 2] = torch.nan
    y[1, 1, 3, 3] = torch.inf
    filled, hidden = without_missing(y, problem, "mask", shape)
    assert filled.isfinite().all()
    gone = torch.zeros(2, 1, *y.shape[-2:], dtype=torch.bool)
    gone[1, 0, 1, 2] = gone[1, 0, 3, 3] = True
    ones = problem.operator.apply_mask(torch.ones_like(y))
    expected = torch.where(gone, 0.0, ones)
    assert torch.equal(hidden.operator.apply_mask(torch.ones_like(y)), expected)
    assert torch.equal(hidden.measurements(y), expected.flatten(1).sum(1))
    assert torch.allclose(hidden.A(x), torch.where(gone, 0.0, problem.A(x)), atol=1e-6)
    v = torch.rand(filled.shape, generator=torch.manual_seed(1))
    left, right = (hidden.A(x) * v).sum(), (x * hidden.A_adjoint(v)).sum()
    assert left == pytest.approx(float(right), rel=1e-5)
    again = hidden.index_select([1, 0])
    assert torch.allclose(again.A(x.flip(0)), hidden.A(x).flip(0))


def test_measurements_without_pixels_are_refused():
    problem = Problem("mri:cartesian,acceleration=2,channels=1", 0.1)
    y = problem.simulate(torch.rand(1, 1, 16, 16))
    y[0, 0, 0, 8] = torch.nan  # the centre is always acquired
    with pytest.raises(InputError, match="--nan mask"):
        solve(y, problem, lambda x, sigma: x)
    with pytest.raises(InputError, match="cannot be hidden"):
        solve(y, problem, lambda x, sigma: x, nan="mask")


def test_missing_numbers_in_python(tmp_path):
    """Tensors too: refused with the number of the image; masked, the solver's result at a seen
    pixel does not depend on what a missing one held, and a shrinking prior fills it."""
    y = torch.full((3, 1, 8, 8), 0.5)
    y[1, 0, 2, 2] = torch.nan
    problem = Problem("identity", 0.1)
    with pytest.raises(InputError, match="measurement 1 "):
        solve(y, problem, lambda x, sigma: x)
    with pytest.raises(InputError, match="measurement 1 "):
        learn(y, problem, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

    # the prior N(0.25, 0.1^2) of every pixel: the posterior mean is (y + 0.25) / 2, 0.25 unseen
    def denoise(x, sigma):
        return (0.01 * x + sigma**2 * 0.25) / (0.01 + sigma**2)

    found = solve(y, problem, denoise, method="pnp-dm", nan="mask", samples=64, seed=1).mean
    expected = torch.full_like(found, 0.375)
    expected[1, 0, 2, 2] = 0.25
    error = (found - expected).abs()
    assert error.mean() < 0.02 and error[1, 0, 2, 2] < 0.05  # deviations 0.07 / 8 and 0.1 / 8


# -- equal channels -------------------------------------------------------------------------------


@pytest.mark.slow
def test_equal_channels_stay_equal_under_a_grey_prior(run):
    """Exactly; and an image beside it whose channels differ has what it has alone."""
    grey = torch.rand(1, 1, 32, 32, generator=torch.manual_seed(0)).expand(1, 3, 32, 32)
    colour = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(1))
    y = torch.cat([grey, colour])
    problem = Problem("identity", 0.2).bind([4, 7], (3, 32, 32))
    flow = posterior_for(Posterior.load(run), (3, 32, 32))
    mean, std = flow.mean_std(y, problem, 4, 0, [4, 7])
    draws = flow.sample(y, problem, 2, 0, [4, 7])
    prior = prior_for(Prior.load(run), (3, 32, 32))
    solved = solve(y, problem, prior, method="dps", samples=2, steps=4).samples
    for found in (mean[None], std[None], draws, solved):
        assert torch.equal(found[:, 0], found[:, 0, :1].expand_as(found[:, 0]))
        assert not torch.equal(found[:, 1, 0], found[:, 1, 1])
    alone = solve(
        colour, problem.index_select([1]), prior, method="dps", samples=2, steps=4
    ).samples
    assert torch.allclose(solved[:, 1], alone[:, 0], atol=1e-5)
