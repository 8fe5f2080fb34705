"""The scale of intensities: by type, by bits or by a range that was given; never by extremes."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from unmurk.cli import main as cli
from unmurk.errors import InputError
from unmurk.evaluation.metrics import psnr
from unmurk.flows.posterior import Posterior
from unmurk.io.datasets import Array, PictureFolder, as_source, open_source
from unmurk.io.images import load_images, load_measurements
from unmurk.io.job_list import STD
from unmurk.io.jobs import jobs_of, process
from unmurk.io.saving import save_images
from unmurk.io.scale import Extent, Scale, Span, check_units
from unmurk.problem import Problem
from unmurk.training import learn

INTEGERS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
LEARN = pytest.param("learn", marks=pytest.mark.slow)  # builds and trains networks
rng = np.random.default_rng(0)


def unmurk(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


def tiffs(folder: Path, pages: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for i, page in enumerate(pages):
        tifffile.imwrite(folder / f"{i}.tif", page, metadata=None)
    return folder


# -- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_integers_go_by_their_type(dtype, order, tmp_path):
    """0 and the largest number are 0 and 1; both ends, and all below 2^23, come back exactly."""
    info = np.iinfo(dtype)
    near = [0, 1, 100, min(2**23 - 1, info.max), info.max // 8 + 1, info.max]
    array = np.array([[*near, info.min]], dtype).astype(np.dtype(dtype).newbyteorder(order))
    np.save(tmp_path / "a.npy", array)
    found = load_images(tmp_path / "a.npy")
    assert found.scale.gain == float(info.max) and not found.scale.offset
    image = found.images.flatten().tolist()
    assert image[0] == 0 and image[5] == 1
    assert image[6] == (pytest.approx(-1, abs=0.01) if info.min else 0)
    save_images(found.images, tmp_path / "b.npy", scale=found.scale)
    again = np.load(tmp_path / "b.npy").flatten()
    assert again[[0, 1, 2, 3, 5, 6]].tolist() == array.flatten()[[0, 1, 2, 3, 5, 6]].tolist()
    save_images(torch.tensor([[[[-9.0, 9.0]]]]), tmp_path / "b.npy", scale=found.scale)
    assert np.load(tmp_path / "b.npy").flatten().tolist() == [info.min, info.max]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_are_what_they_are(dtype, tmp_path):
    for values in ([-1.5, 0.5, 3.01], [0, 100, 250], [-1e4, 0, 6e4], [7, 7, 7]):
        array = np.array([[values]], dtype)
        np.save(tmp_path / "a.npy", array)
        found = load_images(tmp_path / "a.npy")
        assert torch.equal(found.images.flatten(), torch.tensor(array.flatten()).float())
        save_images(found.images, tmp_path / "b.npy", scale=found.scale)
        again = np.load(tmp_path / "b.npy").flatten()
        assert again.dtype == dtype and np.allclose(again, array.flatten(), rtol=1e-7)


@pytest.mark.parametrize("kind", ["npy", "npz", "tif"])
@pytest.mark.parametrize(("dtype", "large"), [("float16", 1e5), ("float32", 1e39)])
def test_results_too_large_for_their_floats_are_named_and_not_written(
    dtype, large, kind, tmp_path, recwarn
):
    """Else the file would hold an infinity where the result is a number."""
    scale, images = Scale.of(dtype, (0, large)), torch.tensor([[[[0.1, 1.0]]]])
    with pytest.raises(InputError, match=f"does not fit the number type {dtype} of its file"):
        save_images(images, tmp_path / f"a.{kind}", scale=scale)
    assert not list(tmp_path.iterdir()) and not recwarn.list


def test_deviations_too_large_for_float32_are_named_and_not_written(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 4), 1e38, np.float32))

    def engine(y, numbers):
        return {"images": 0 * y, STD: torch.ones_like(y)}

    jobs = jobs_of(tmp_path / "a.tif", tmp_path / "out.tif")
    with pytest.raises(InputError, match="a result of 1e.39 does not fit .* float32"):
        process(jobs, engine, arrays=[STD], span=(0, 1e39))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize("kind", ["png", "tif", "npy", "npz", "idx"])
def test_one_blank_or_hot_pixel_changes_nothing(kind, tmp_path):
    """A blank frame is black, not white; a hot pixel does not darken the others."""
    dtype = "uint8" if kind in ("png", "idx") else "float32"
    for pixels in (np.zeros((2, 8, 8)), np.full((2, 8, 8), 0.25)):
        hot = pixels.copy()
        hot[0, 3, 3] = 1 if dtype == "uint8" else 3.01
        for array in (pixels, hot):
            x = torch.from_numpy(array[:, None]).float()
            name = "a-idx3-ubyte" if kind == "idx" else f"a.{kind}"
            target = tmp_path / (name if kind != "png" else "folder")
            scale = Scale.of(dtype)
            save_images(x, target, scale=scale, format=kind)
            assert (load_images(target).images - x).abs().max() <= 0.5 / 255


@pytest.mark.parametrize(
    ("most", "dtype", "bits"),
    [
        (1, "uint16", 10),
        (1023, "uint16", 10),
        (1024, "uint16", 12),
        (4095, "uint16", 12),
        (4096, "uint16", 14),
        (8191, "uint16", 14),
        (8192, "uint16", 0),  # 1/8 of the type and more: it is filled
        (65535, "uint16", 0),
        (0, "uint16", 0),
        (4095, "int16", 12),
        (4096, "int16", 0),
        (-4000, "int16", 12),
        (16383, "int32", 14),
        (16384, "int32", 0),  # none of the three holds it
        (255, "uint8", 0),
        (20, "uint8", 0),
    ],
)
def test_bits_of_a_set(most, dtype, bits, tmp_path, capsys):
    """The smallest of 10, 12, 14 bits that holds a set which leaves 7/8 of its type empty: the
    same from memory, a file, a folder, and a file that is read when it is wanted."""
    pages = np.zeros((3, 8, 8), dtype)
    pages[1, 2, 3] = most
    extent = Extent(dtype)
    for page in pages:
        extent.add(page)
    assert extent.bits == bits
    white = 2.0**bits - 1 if bits else float(np.iinfo(dtype).max)
    np.save(tmp_path / "a.npy", pages)
    folder = tiffs(tmp_path / "in", pages)
    spans = [load_images(tmp_path / "a.npy").scale, load_images(folder).scale]
    spans += [open_source(tmp_path / "a.npy").scale, PictureFolder(folder).scale]
    spans += [as_source(pages).scale]
    for scale in spans:
        assert (scale.offset, scale.gain, scale.bits) == (0, white, bits)
    found = load_images(folder)
    assert np.array_equal(found.scale.to_file(found.images)[:, 0], pages)
    assert bool(found.note) == (bits > 0 or most == 16384)


def test_metadata_say_how_many_bits(tmp_path):
    pages = rng.integers(0, 4095, (2, 8, 8), np.uint16)
    pages[0, 0, 0] = 900
    path = tmp_path / "a.ome.tif"
    about = {"axes": "ZYX", "SignificantBits": 12}
    tifffile.imwrite(path, pages, ome=True, metadata=about, photometric="minisblack")
    found = load_images(path)
    assert (found.scale.gain, found.scale.bits, found.note) == (4095, 12, "")
    assert load_images(path, span=(0, 900)).scale.gain == 900


def test_a_range_that_is_given_comes_first(tmp_path):
    pages = np.full((2, 8, 8), 2048, np.uint16)
    np.save(tmp_path / "a.npy", pages)
    for span in (
        (0, 4096),
        Span(0, 4096),
        Span(0, 4096, "uint16"),
        [Span(0, 9, "uint8"), (0, 4096)],
    ):
        assert load_images(tmp_path / "a.npy", span=span).images.unique().tolist() == [0.5]
    assert load_images(tmp_path / "a.npy", span=Span(0, 4096, "uint8")).scale.bits == 12
    for span in ((5, 5), (9, 1), (0, float("inf")), (-1e308, 1e308), (float("nan"), 1)):
        with pytest.raises(InputError, match="white must be above black"):
            load_images(tmp_path / "a.npy", span=span)


# -- floats that are no images --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "sigma", "fits"),
    [
        (0, 1, 0, True),
        (-2, 3, 1, True),
        (1.7, 1.7, 0.1, True),
        (1.9, 1.9, 0.1, False),
        (-0.9, -0.9, 0.1, False),
        (0, 255, 0.1, False),
        (0, 4000, 0.1, False),
        (300, 700, 3, False),
    ],
)
def test_floats_with_a_median_outside_the_units_are_refused(low, high, sigma, fits):
    images = torch.linspace(low, high, 101).reshape(1, 1, 1, 101)
    if fits:
        check_units("it", images, sigma)
        return
    with pytest.raises(InputError, match="--range") as error:
        check_units("it", images, sigma)
    black, white = map(float, str(error.value).split("--range ")[1].split())
    assert black <= low and white >= high
    scaled = Scale.of("float32", (black, white)).from_file(images.numpy())
    check_units("it", scaled, sigma)  # what is offered can be pasted


@pytest.mark.parametrize("command", [LEARN, "restore", "solve", "corrupt"])
@pytest.mark.parametrize("form", ["npy", "folder"])
def test_every_command_asks_for_the_range(command, form, run, tmp_path, capsys):
    pages = rng.uniform(0, 4095, (4, 28, 28)).astype(np.float32)
    data = tiffs(tmp_path / "in", pages)
    if form == "npy":
        data = tmp_path / "in.npy"
        np.save(data, pages)
    given = ["--operator", "identity", "--noise", 0.1]
    argv = {
        "learn": ["--noise", 0.1, "--kimg", 0.01, "--precision", "fp32", "--method", "noisy"],
        "restore": ["--prior", run, *given, "--samples", 2],
        "solve": ["--prior", run, *given, "--steps", 1],
        "corrupt": [],
    }[command]
    argv = [command, data, *argv, "--out", tmp_path / "out"]
    assert unmurk(*argv) == 2
    assert "--range 0 4095" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert unmurk(*argv, "--range", 0, 4095) == 0


def test_learning_on_tensors_asks_too(tmp_path):
    with pytest.raises(InputError, match="--range 0 255"):
        learn(torch.rand(4, 1, 8, 8) * 255, Problem("identity", 0.1), out=tmp_path / "run")


# -- a run's range --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_keeps_its_range(tmp_path, capsys):
    """12-bit data in 16-bit files: noticed once, printed, kept, and used for a dimmer capture."""
    folder = tiffs(tmp_path / "in", rng.integers(0, 4096, (8, 8, 8), np.uint16))
    run = tmp_path / "run"
    argv = ["learn", folder, "--noise", 0.1, "--kimg", 0.04, "--precision", "fp32", "--out", run]
    assert unmurk(*argv) == 0
    said = [s for s in capsys.readouterr().err.splitlines() if "12 bits" in s]
    assert len(said) == 1 and "--range" in said[0]
    config = json.loads((run / "config.json").read_text())
    assert (config["range"], config["file_type"]) == ([0, 4095], "uint16")
    dim = rng.integers(0, 900, (2, 8, 8), np.uint16)
    np.save(tmp_path / "dim.npy", dim)
    data = tiffs(tmp_path / "dim", dim)
    posterior = Posterior.load(run)
    y = torch.from_numpy(dim[:, None].astype(np.float32)) / 4095
    mean, _ = posterior.mean_std(y, Problem("identity", 0.1).bind([0, 1], (1, 8, 8)), 2, 0, [0, 1])
    expected = (mean * 4095).round().clamp(0, 65535).numpy()[:, 0]
    for source, out in ((data, tmp_path / "out"), (tmp_path / "dim.npy", tmp_path / "out.npy")):
        assert unmurk("restore", source, "--prior", run, "--samples", 2, "--out", out) == 0
    found = [tifffile.imread(tmp_path / "out" / f"{i}.tif") for i in range(2)]
    assert np.abs(np.stack(found) - expected).max() <= 1
    assert np.abs(np.load(tmp_path / "out.npy") - expected).max() <= 1
    assert unmurk("restore", data, "--prior", run, "--samples", 2, "--range", 0, 1023,
                  "--out", tmp_path / "other") == 0  # fmt: skip
    other = np.stack([tifffile.imread(tmp_path / "other" / f"{i}.tif") for i in range(2)])
    assert np.abs(other - expected).max() > 1


def test_a_set_without_a_run_is_looked_through(run, tmp_path, capsys):
    """The bits of the whole folder, also those of its last file, serve every file of it."""
    pages = rng.integers(0, 900, (3, 28, 28), np.uint16)
    pages[2, 0, 0] = 4000
    folder = tiffs(tmp_path / "in", pages)
    argv = ["restore", folder, "--prior", run, "--operator", "identity", "--noise", 0.1]
    assert unmurk(*argv, "--samples", 2, "--out", tmp_path / "a") == 0
    assert "4000 of 65535: read as 12 bits" in capsys.readouterr().err
    assert unmurk(*argv, "--samples", 2, "--out", tmp_path / "b", "--range", 0, 4095) == 0
    assert "bits" not in capsys.readouterr().err
    assert unmurk(*argv, "--samples", 2, "--out", tmp_path / "c.npy") == 0
    whole = np.load(tmp_path / "c.npy")
    for i in range(3):
        found = [tifffile.imread(tmp_path / name / f"{i}.tif") for name in "ab"]
        assert np.array_equal(*found)
        assert np.abs(found[0].astype(int) - np.minimum(whole[i].squeeze(), 4095)).max() <= 1


def test_int32_files_have_one_scale(run, tmp_path, capsys):
    """To a folder or to one file: the same numbers."""
    pages = (rng.uniform(0, 1, (3, 28, 28)) * 2**31).astype(np.int64).clip(0, 2**31 - 1)
    folder = tiffs(tmp_path / "in", pages.astype(np.int32))
    argv = ["restore", folder, "--prior", run, "--operator", "identity", "--noise", 0.1]
    for out in ("a", "b.npy"):
        assert unmurk(*argv, "--samples", 2, "--out", tmp_path / out) == 0
    found = np.stack([tifffile.imread(tmp_path / "a" / f"{i}.tif") for i in range(3)])
    whole = np.load(tmp_path / "b.npy").reshape(found.shape)
    assert found.dtype == whole.dtype == np.int32
    assert np.abs(found.astype(float) - whole).max() <= 2**31 * 1e-6


def test_a_damaged_range_of_a_run_is_named(run, tmp_path, capsys):
    for broken in ({"range": 3}, {"range": ["a", 1], "file_type": "uint16"}, {"range": [0, 1]}):
        (run / "config.json").write_text(json.dumps({"problem": {}, **broken}))
        np.save(tmp_path / "a.npy", np.zeros((1, 28, 28), np.uint8))
        argv = ["restore", tmp_path / "a.npy", "--prior", run, "--operator", "identity"]
        assert unmurk(*argv, "--noise", 0.1, "--out", tmp_path / "b.npy") == 2
        assert "config.json" in capsys.readouterr().err
    (run / "config.json").unlink()


# -- corrupt, restore, evaluate -------------------------------------------------------------------

KINDS = [
    ("png", "uint8"), ("png", "uint16"), ("tif", "uint8"), ("tif", "uint16"), ("tif", "int16"),
    ("tif", "int32"), ("tif", "uint32"), ("tif", "float32"), ("npy", "uint8"), ("npy", "float32"),
    ("npy", "float64"), ("npz", "float32"), ("idx", "uint8"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("noise", [0.01, pytest.param(0.3, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize("keep", ["npy", "same"])
def test_the_steps_on_the_command_line_are_those_in_python(
    kind, dtype, noise, keep, tmp_path, capsys
):
    """Through an array that keeps every value, or files of the kind of the clean ones, which clip
    where that kind does, and then a line says so."""
    run = "digits"
    x = torch.rand(3, 1, 28, 28, generator=torch.manual_seed(0))
    x[:, :, :4] = 1.0
    scale = Scale.of(dtype)
    names = {"idx": "clean-idx3-ubyte", "npy": "clean.npy", "npz": "clean.npz"}
    clean = tmp_path / names.get(kind, "clean")
    save_images(x, clean, scale=scale, format=kind)
    x = scale.from_file(scale.to_file(x))
    suffix = {"idx": "-idx3-ubyte", "npy": ".npy", "npz": ".npz"}.get(kind, "")
    suffix = ".npy" if keep == "npy" else suffix
    noisy, restored = tmp_path / f"noisy{suffix}", tmp_path / f"restored{suffix}"
    assert unmurk("corrupt", clean, "--noise", noise, "--out", noisy) == 0
    clips = keep == "same" and np.dtype(dtype).kind != "f" and suffix != ".npy"
    said = "were clipped" in capsys.readouterr().err
    assert said == clips
    argv = ["--prior", run, "--operator", "identity", "--noise", noise, "--samples", 2]
    assert unmurk("restore", noisy, *argv, "--out", restored) == 0
    capsys.readouterr()
    assert unmurk("evaluate", restored, clean, "--json") == 0
    found = json.loads(capsys.readouterr().out)["psnr"]

    problem = Problem("identity", noise)
    y = problem.simulate(x, seed=0)
    kept = keep == "npy" or suffix in (".npy", ".npz")
    y = y if kept else scale.from_file(scale.to_file(y))
    bound = problem.bind([0, 1, 2], (1, 28, 28))
    mean, _ = Posterior.load(run).mean_std(y, bound, 2, 0, [0, 1, 2])
    mean = mean if kept else scale.from_file(scale.to_file(mean))
    assert found == pytest.approx(float(psnr(mean, x).mean()), abs=2e-3)


# -- evaluate -------------------------------------------------------------------------------------


def scores(capsys: pytest.CaptureFixture[str], *argv: object) -> dict:
    assert unmurk("evaluate", *argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_compares_in_one_scale(tmp_path, capsys):
    """An offset, a gain and a type are differences; nothing is stretched to agree."""
    x = rng.uniform(0, 1, (4, 28, 28)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    for name, other, mse in [
        ("offset", x + 500, float(((1 - x.astype(np.float64)) ** 2).mean())),  # clipped at white
        ("half", x / 2, float(((x / 2).astype(np.float64) ** 2).mean())),
    ]:
        np.save(tmp_path / f"{name}.npy", other)
        found = scores(capsys, tmp_path / f"{name}.npy", tmp_path / "x.npy")
        assert found["psnr"] == pytest.approx(-10 * np.log10(mse), abs=0.05)
    whole = np.rint(x * 65535).astype(np.uint16)
    np.save(tmp_path / "whole.npy", whole)
    np.save(tmp_path / "dim.npy", (whole // 20))  # one of 12 bits by itself
    found = scores(capsys, tmp_path / "dim.npy", tmp_path / "whole.npy")
    wrong = (whole // 20) / 65535 - whole / 65535
    each = -10 * np.log10((wrong**2).mean((1, 2)))
    assert found["psnr"] == pytest.approx(each.mean(), abs=1e-3)
    found = scores(capsys, tmp_path / "x.npy", tmp_path / "whole.npy")
    assert found["psnr"] > 90  # other types, each by its own rule
    given = scores(capsys, tmp_path / "dim.npy", tmp_path / "whole.npy", "--range", 0, 655350)
    assert given["psnr"] == pytest.approx(each.mean() + 20, abs=1e-3)


def test_evaluate_of_images_that_are_exact(tmp_path, capsys):
    x = rng.uniform(0, 0.8, (4, 28, 28)).astype(np.float32)
    y = x.copy()
    y[1:] += 0.1
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    found = scores(capsys, tmp_path / "y.npy", tmp_path / "x.npy")
    assert found["psnr"] == pytest.approx(20, abs=1e-3) and found["exact"] == 1
    same = scores(capsys, tmp_path / "x.npy", tmp_path / "x.npy")
    assert same["psnr"] is None and same["exact"] == 4
    assert same["frechet"] == pytest.approx(0, abs=1e-9) and same["ssim"] == pytest.approx(1)
    x[:, :, 0] = 1
    y = x.copy()
    y[0, 0, 0] = 1.5
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    found = scores(capsys, tmp_path / "y.npy", tmp_path / "x.npy")
    assert (found["psnr"], found["exact"], found["beyond"]) == (None, 3, 1)


# -- what float32 holds ---------------------------------------------------------------------------


def holding(folder: Path, value: float) -> Path:
    """Three float64 pictures, the second with one number of this value."""
    folder.mkdir()
    for i in range(3):
        x = rng.uniform(0, 1, (28, 28))
        x[3, 4] = value if i == 1 else x[3, 4]
        tifffile.imwrite(folder / f"{i}.tif", x)
    return folder


@pytest.mark.parametrize("value", [1e39, -1e300, 3.5e38])
def test_numbers_beyond_float32_are_named_or_left_out(value, tmp_path):
    folder = holding(tmp_path / "in", value)
    array = np.stack([tifffile.imread(folder / f"{i}.tif") for i in range(3)])
    np.save(tmp_path / "x.npy", array)
    tifffile.imwrite(tmp_path / "s.tif", array, photometric="minisblack")
    cases = [
        (load_images, folder, "1.tif"),
        (open_source, folder, "1.tif"),
        (load_images, tmp_path / "s.tif", "page 1 of "),
        (load_images, tmp_path / "x.npy", "image 00001 in"),
        (open_source, tmp_path / "x.npy", "image 00001 in"),
    ]
    for read, path, name in cases:
        with pytest.raises(InputError, match="beyond float32") as error:
            read(path)[torch.arange(3)]
        assert name in str(error.value)
        found = read(path, skip_bad=True)
        images = found.images if read is load_images else found[torch.arange(2)]
        assert len(images) == 2 and bool(images.isfinite().all())
        assert len(found.skipped) == 1
    with pytest.raises(InputError, match="beyond float32"):
        process(jobs_of(folder, tmp_path / "out"), lambda y, _: {"images": y})
    with pytest.raises(InputError, match="beyond float32"):
        load_measurements(tmp_path / "x.npy")
    hidden = load_images(folder, nan="mask").images
    assert (~hidden.isfinite()).nonzero().tolist() == [[1, 0, 3, 4]]


def test_float32_holds_its_largest_number(tmp_path):
    most = float(np.finfo(np.float32).max)
    found = load_images(holding(tmp_path / "in", most)).images
    assert float(found[1, 0, 3, 4]) == most


def test_a_range_too_small_for_float32_is_named(tmp_path):
    folder = holding(tmp_path / "in", 1e30)
    with pytest.raises(InputError, match="--range"):
        load_images(folder, span=(0.0, 1e-30))


# -- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("span", [None, (0, 300)])
def test_streams_have_the_scale_of_sets(dtype, span, tmp_path):
    """Single pictures and pages of a stack, from memory or read when they are wanted."""
    pages = rng.integers(0, 200, (5, 8, 8)).astype(dtype)
    folder = tiffs(tmp_path / "in", pages[:3])
    tifffile.imwrite(folder / "stack.tif", pages[3:], photometric="minisblack")
    np.save(tmp_path / "a.npy", pages)
    expected = load_images(folder, span=span).images
    for source in (open_source(folder, span=span), open_source(tmp_path / "a.npy", span=span)):
        assert torch.equal(source[torch.arange(5)], expected)
    assert torch.equal(as_source(pages, span)[torch.arange(5)], expected)


def test_tensors_are_images_before_channels():
    """No guess of axes where they are known: (N, C, H, W)."""
    y = torch.arange(2 * 6 * 4 * 3, dtype=torch.uint8).reshape(2, 6, 4, 3)
    source = as_source(y)
    assert isinstance(source, Array) and source.shape == (2, 6, 4, 3)
    assert torch.equal(source[torch.arange(2)], y.float() / 255)


def test_numbers_that_png_cannot_hold_stay_what_they_are(run, tmp_path):
    """A float TIFF restored into a .png has 8 bits, not a traceback."""
    x = rng.uniform(0, 1, (28, 28)).astype(np.float32)
    tifffile.imwrite(tmp_path / "a.tif", x)
    process(jobs_of(tmp_path / "a.tif", tmp_path / "a.png"), lambda y, _: {"images": y})
    assert (
        np.abs(load_images(tmp_path / "a.png").images[0, 0].numpy() - x).max() <= 0.5 / 255 + 1e-6
    )


def test_counts_on_a_dark_ground_are_no_images():
    """The median is near black, and one number in two hundred is a star of 100 to 1000."""
    draw = torch.Generator().manual_seed(0)
    sky = 5 * torch.randn(1, 1, 100, 100, generator=draw)
    sky.view(-1)[::200] += torch.linspace(100, 1000, 50)
    with pytest.raises(InputError, match=r"median .* and numbers from -\d.* --range -\d+ \d+$"):
        check_units("sky.fits", sky, 5.0)
    check_units("sky.fits", sky / 1000, 0.005)


def test_a_run_keeps_its_noise_in_gray_levels_where_another_range_is_given(tmp_path, capsys):
    """200 of 4095 gray levels are 200 of 65535, whatever the form of the noise."""
    from unmurk.cli.commands.restoring import trained_problem

    Posterior.create("tiny", (1, 8, 8), 0.1).save(tmp_path / "posterior")
    config = {"range": [0, 4095], "file_type": "uint16"}
    for noise, expected in (
        (200 / 4095, 200 / 65535),
        (
            "poisson-gaussian,gain=0.01,sigma=0.02",
            "poisson-gaussian,gain=0.000624857,sigma=0.00125",
        ),
    ):
        problem = Problem("identity", noise)
        (tmp_path / "config.json").write_text(json.dumps(config | {"problem": problem.to_dict()}))
        for dtype, span, wanted in (
            ("uint16", (0, 65535), expected),
            ("uint16", (0, 4095), noise),
            ("float32", (0, 1), noise),  # no gray levels of that camera
        ):
            found = trained_problem(
                str(tmp_path), None, None, None, partial(Scale.of, dtype, span), ranged=True
            )
            assert found.level == pytest.approx(Problem("identity", wanted).level, rel=1e-3)
            said = capsys.readouterr().err
            assert ("learned with --range 0 4095" in said) == (wanted is expected)


@pytest.mark.parametrize(
    ("kind", "factor"), [("float32", 1.0), ("uint8", 255 / 4095), ("uint16", 1.0)]
)
def test_clean_images_have_the_unit_of_the_measurements(kind, factor, tmp_path):
    """The same number means the same light, in floats too; other units are refused."""
    draw = np.random.default_rng(0)
    clean = draw.uniform(400, 2000, (4, 16, 16))
    for i, x in enumerate(clean):
        name = f"{i}.tif"
        (tmp_path / "y").mkdir(exist_ok=True)
        (tmp_path / "x").mkdir(exist_ok=True)
        noisy = (x + 200 * draw.standard_normal(x.shape)).clip(0, 4095).astype("uint16")
        tifffile.imwrite(tmp_path / "y" / name, noisy)
        tifffile.imwrite(tmp_path / "x" / name, (x * factor).astype(kind))

    def run(out):
        options = {"kimg": 0.01, "batch": 4, "quiet": True, "clean": tmp_path / "x"}
        learn(tmp_path / "y", Problem("identity", 0.05), out=tmp_path / out, **options)

    if factor == 1:
        run("run")
        return
    with pytest.raises(
        InputError, match=r"the mean 0\.0\d+ where that of the measurements is 0\.2"
    ):
        run("run")
