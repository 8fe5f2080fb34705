"""HDF5 files: which data set, how much is read, which links are followed; results; k-space."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unmurk.cli import main as cli
from unmurk.errors import InputError
from unmurk.io.axes import Selection
from unmurk.io.formats.hdf5 import Kspace
from unmurk.io.formats.pictures import open_pages
from unmurk.io.images import load_images, load_measurements
from unmurk.io.job_list import jobs_of, scene_jobs
from unmurk.io.jobs import process
from unmurk.io.sets import measurements_of
from unmurk.io.source import Measured
from unmurk.operators import parse
from unmurk.problem import Problem
from unmurk.solvers import solve

h5py = pytest.importorskip("h5py")
rng = np.random.default_rng(0)
DATA = rng.integers(0, 4000, (3, 9, 7)).astype("uint16")


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".nxs"])
def test_the_only_data_set_that_can_hold_images(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    with h5py.File(path, "w") as file:
        file["entry/stack"] = DATA
        file["entry/stack"].attrs["element_size_um"] = (0.5, 0.2, 0.1)
        file["entry/stack"].attrs["units"] = "electrons"
        file["time"], file["name"], file["pair"] = np.arange(3.0), "it", np.zeros((3, 2))
    found = load_images(path)
    assert found.scale.bits == 12 and found.names == [f"a-0000{i}{suffix}" for i in range(3)]
    expected = torch.from_numpy(DATA.astype("f4")).div(4095)[:, None]
    assert torch.equal(found.images, expected)
    for name in ("entry/stack", "/entry/stack"):
        assert torch.equal(load_images(f"{path}:{name}").images, expected)
    assert torch.equal(load_images(tmp_path).images, expected)  # the folder
    with open_pages(path) as pages:
        about = dict(pages.metadata)
    assert about.pop("source")["element_size_um"] == [0.5, 0.2, 0.1]
    assert about == {"pixel_size": (0.2, 0.1), "z_step": 0.5, "units": "electrons"}
    with pytest.raises(
        InputError, match="stack 3x9x7 uint16, name scalar object, pair 3x2"
    ) as error:
        load_images(f"{path}:nix")
    assert "\n" not in str(error.value)


def test_a_file_that_this_process_has_open_is_read(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["stack"] = DATA
    for locking in (None, True, False):
        with h5py.File(tmp_path / "a.h5", "r", locking=locking) as file:
            assert load_images(tmp_path / "a.h5").images.shape == (3, 1, *DATA.shape[1:])
            assert (file["stack"][:] == DATA).all()


def test_several_data_sets_are_listed_and_nexus_marks_one(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["entry/raw"], file["entry/flat"] = DATA, DATA[0] + 1
        file["loop"] = h5py.SoftLink("/loop")
        file["entry/again"] = file["entry"]  # a circle of hard links
    with pytest.raises(InputError, match=r"entry/raw 3x9x7 uint16.*choose one as a.h5:NAME"):
        load_images(path)
    for name in ("loop", "entry/again/raw/x", "entry/.."):
        with pytest.raises(InputError, match="has no data set"):
            load_images(f"{path}:{name}")
    assert load_images(f"{path}:entry/again/raw").images.shape == (3, 1, 9, 7)
    with h5py.File(path, "r+") as file:
        file.attrs["default"], file["entry"].attrs["default"] = "entry", "plot"
        file["entry/plot"] = h5py.SoftLink("/entry/shown")
        file.create_group("entry/shown").attrs["signal"] = "data"
        file["entry/shown/data"] = h5py.SoftLink("/entry/flat")
    assert load_images(path, span=(0, 1)).images.sum() == (DATA[0] + 1).sum()


def test_other_files_are_not_followed(tmp_path):
    """External links, data in other files and virtual data sets; nor are they opened."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["stack"] = DATA
    path = tmp_path / "a.h5"
    layout = h5py.VirtualLayout(DATA.shape, "uint16")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "stack", DATA.shape)
    (tmp_path / "raw.bin").write_bytes(DATA.tobytes())
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/stack")
        file["soft"] = h5py.SoftLink("/link")
        file.create_virtual_dataset("virtual", layout)
        outside = [(str(tmp_path / "raw.bin"), 0, DATA.nbytes)]
        file.create_dataset("outside", DATA.shape, "uint16", external=outside)
    for name, part in [
        ("link", "link to another file"),
        ("soft", "link to another file"),
        ("virtual", "lie in other files"),
        ("outside", "lie in other files"),
    ]:
        with pytest.raises(InputError, match=part) as error:
            load_images(f"{path}:{name}")
        assert "\n" not in str(error.value)


def test_matlab_stores_axes_in_reverse(tmp_path):
    """MATLAB's x(row, column, image) is the HDF5 array [image][column][row]."""
    images = np.concatenate([DATA, DATA[:1]])
    stack = images.transpose(1, 2, 0)  # as MATLAB shows it
    with h5py.File(tmp_path / "a.mat", "w", userblock_size=512) as file:
        file["x"] = stack.T
        file["#refs#/cell"] = stack.T
    found = load_images(tmp_path / "a.mat", span=(0, 1)).images.numpy()
    np.testing.assert_array_equal(found[:, 0], images)
    found = load_images(f"{tmp_path / 'a.mat'}:x", axes="XYT", span=(0, 1)).images.numpy()
    np.testing.assert_array_equal(found[:, 0], images.transpose(0, 2, 1))
    (tmp_path / "old.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(InputError, match="-v7.3"):
        load_images(tmp_path / "old.mat")


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("late", (2**20, 2**10, 2**10), "f4", chunks=(1, 64, 64))
        wide = file.create_dataset("wide", (2, 2**14, 2**14), "u1", chunks=(1, 64, 2**14))
        wide[:, :64] = 1
    with h5py.File(tmp_path / "b.h5", "w") as file:
        chunk = (2**6 - 1, 2**13, 2**13)  # the format allows less than 4 GiB
        file.create_dataset("x", (2**6, 2**13, 2**13), "u1", chunks=chunk)
    for name, part in [
        ("a.h5:late", "declares"),
        ("a.h5:wide", "MAX_PIXELS"),
        ("b.h5:x", "declares"),
    ]:
        with pytest.raises(InputError, match=part):
            load_images(tmp_path / name)


MEMORY = """
import resource, sys
from unmurk.io.source import PictureFolder
from pathlib import Path
source = PictureFolder(Path(sys.argv[1]), span=(0, 255))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(float(source[i : i + 1].sum()) for i in range(0, len(source), 100))
print(len(source), total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_data_sets_are_read_page_by_page(tmp_path):
    """400 MiB on the disk, of which a picture of 1 MiB is in memory at a time."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        pages = file.create_dataset("x", (400, 1024, 1024), "u1")
        pages[0:400:100] = 255
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a.h5")],
        capture_output=True,
        text=True,
        check=True,
    )
    count, total, grown = done.stdout.split()
    assert (int(count), float(total)) == (400, 4 * 2**20)
    assert int(grown) < 64  # MiB


# -- k-space --------------------------------------------------------------------------------------

rng = np.random.default_rng(1)
S, C, H, W = 3, 2, 12, 8


def fourier(x: np.ndarray) -> np.ndarray:
    """The centered orthonormal transform as its double sum."""
    for axis, length in ((-2, x.shape[-2]), (-1, x.shape[-1])):
        n = np.arange(length) - length // 2
        matrix = np.exp(-2j * np.pi * np.outer(n, n) / length) / np.sqrt(length)
        x = np.moveaxis(np.tensordot(matrix, np.moveaxis(x, axis, 0), 1), 0, axis)
    return x


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def maps_of(*shape: int) -> np.ndarray:
    found = normal(*shape)
    return found / np.sqrt((np.abs(found) ** 2).sum(-3, keepdims=True))


IMAGES, MAPS, EACH = normal(S, H, W), maps_of(C, H, W), maps_of(S, C, H, W)
COLUMNS, PLANE = rng.random(W) < 0.7, rng.random((H, W)) < 0.7
SLICES, LINES = rng.random((S, H, W)) < 0.7, rng.random((S, W)) < 0.7
PAIR = np.dtype([("real", "f8"), ("imag", "f8")])
CASES = {  # maps, mask as stored, mask as it acts
    "fastmri": (MAPS, COLUMNS, COLUMNS),
    "plane": (MAPS, PLANE.astype("f4"), PLANE),
    "slices": (EACH, SLICES.astype("u1"), SLICES[:, None]),
    "lines": (EACH, LINES, LINES[:, None, None]),
    "zeros": (EACH, None, SLICES[:, None]),
    "one coil": (None, COLUMNS, COLUMNS),
}


def write(path: Path, maps: np.ndarray | None, stored: np.ndarray | None, mask: np.ndarray):
    """A file in the layout of fastMRI; the measured k-space (S, coils, H, W)."""
    images = IMAGES[:, None] if maps is None else maps * IMAGES[:, None]
    kspace = fourier(images) * mask
    with h5py.File(path, "w") as file:
        file["kspace"] = (kspace if maps is not None else kspace[:, 0]).astype("c8")
        if stored is not None:
            file["mask"] = stored
        if maps is not None:
            file["sens_maps"] = maps.astype("c8")
        file["reconstruction_rss"] = np.abs(IMAGES).astype("f4")
        file.attrs["max"] = 4.0
    return kspace


def pairs(x: np.ndarray) -> torch.Tensor:
    """(N, C, H, W) complex to (N, 2 C, H, W)."""
    return torch.from_numpy(np.stack([x.real, x.imag], 2).reshape(len(x), -1, *x.shape[-2:]))


@pytest.mark.parametrize("case", CASES)
def test_measured_kspace_is_that_of_the_operator(case, tmp_path):
    """A x, for the images and sensitivities that the file was made of; and A is linear, with the
    adjoint of dense algebra; slices keep their masks in any order."""
    kspace = write(tmp_path / "scan.h5", *CASES[case])
    data = load_measurements(tmp_path / "scan.h5")
    assert data.scale.gain == 4 and "attribute max" in data.note
    torch.testing.assert_close(data.images.double(), pairs(kspace) / 4, rtol=0, atol=1e-6)
    exact = load_measurements(f"{tmp_path / 'scan.h5'}:kspace", span=(0, 1)).images
    A = parse(f"mri:file,path={tmp_path / 'scan.h5'}")
    assert parse(A.spec) == A and A.y_shape((2, H, W)) == tuple(exact.shape[1:])
    x = pairs(IMAGES[:, None])
    torch.testing.assert_close(A.A(x), exact.double(), rtol=0, atol=2e-6)
    some = A.bind([2, 0], (2, H, W))
    torch.testing.assert_close(some.A(x[[2, 0]]), exact[[2, 0]].double(), rtol=0, atol=2e-6)
    back, v = A.A_adjoint(exact.double()), torch.randn(x.shape, dtype=torch.float64)
    inner = (A.A(v) * exact).flatten(1).sum(1)
    torch.testing.assert_close((v * back).flatten(1).sum(1), inner, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["one coil", "plane"])
@pytest.mark.parametrize("channels", [1, 2])
def test_prox_and_pseudo_inverse_of_measured_masks(case, channels, tmp_path):
    """Against dense algebra on the matrix of A, for real and complex images."""
    maps = CASES[case][0]
    write(tmp_path / "scan.h5", maps, PLANE, PLANE)
    A = parse(f"mri:file,path={tmp_path / 'scan.h5'},channels={channels}")
    A = A.bind([1], (channels, H, W))
    count = channels * H * W
    basis = torch.eye(count, dtype=torch.float64).reshape(count, channels, H, W)
    matrix = A.A(basis).flatten(1).T
    z = torch.randn(1, channels, H, W, dtype=torch.float64)
    y = A.A(torch.randn(z.shape, dtype=torch.float64))
    found = A.prox_l2(z, y, 3.0).flatten()
    left = torch.eye(count, dtype=torch.float64) + 3 * matrix.T @ matrix
    expected = torch.linalg.solve(left, z.flatten() + 3 * matrix.T @ y.flatten())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if maps is None:
        inverse = torch.linalg.pinv(matrix, rtol=1e-6) @ y.flatten()
        torch.testing.assert_close(A.A_dagger(y).flatten(), inverse, rtol=0, atol=1e-5)


def test_measurements_are_read_slice_by_slice(tmp_path):
    """As a source, from a complex type of two fields (MATLAB), and real numbers as they are."""
    kspace = write(tmp_path / "scan.h5", MAPS, COLUMNS, COLUMNS)
    source = Measured(tmp_path / "scan.h5", (0, 2))
    torch.testing.assert_close(source[1:].double(), pairs(kspace)[1:] / 2, rtol=0, atol=1e-6)
    fields = np.empty(kspace.shape, PAIR)
    fields["real"], fields["imag"] = kspace.real, kspace.imag
    with h5py.File(tmp_path / "fields.h5", "w") as file:
        file["measured"] = fields
        file["sinogram"] = np.abs(kspace[:, 0])
    found = load_measurements(tmp_path / "fields.h5")
    torch.testing.assert_close(found.images.double(), pairs(kspace), rtol=0, atol=1e-6)
    real = measurements_of(Path(f"{tmp_path / 'fields.h5'}:sinogram"), False)
    assert real.y.shape == (S, 1, H, W) and real.scale.gain == 1
    np.testing.assert_allclose(real.y[:, 0], np.abs(kspace[:, 0]), rtol=1e-6)
    assert Kspace(f"{tmp_path / 'fields.h5'}:sinogram").is_complex is False


def test_solve_restores_complex_images(tmp_path):
    """The prior N(0, 1) of every number: the posterior mean is the ridge solution."""
    write(tmp_path / "scan.h5", MAPS, PLANE, PLANE)
    problem = Problem(f"mri:file,path={tmp_path / 'scan.h5'}", 0.1)
    y = load_measurements(tmp_path / "scan.h5", span=(0, 1)).images
    found = solve(y, problem, lambda x, s: x / (1 + s**2), method="diffpir", steps=20).mean
    assert found.shape == (S, 2, H, W)
    A = problem.bind(range(S), (2, H, W)).operator
    ridge = A.prox_l2(torch.zeros(S, 2, H, W), y, 100.0)
    assert (found - ridge).square().mean() < 0.1 * ridge.square().mean()


@pytest.mark.slow
def test_the_command_line_solves_a_scan(tmp_path, capsys):
    from unmurk.diffusion.prior import Prior

    write(tmp_path / "scan.h5", MAPS, COLUMNS, COLUMNS)
    torch.manual_seed(0)
    Prior.create("tiny", (2, H, W)).save(tmp_path / "prior")
    argv = ["solve", f"{tmp_path / 'scan.h5'}:kspace", "--prior", tmp_path / "prior"]
    argv += ["--operator", f"mri:file,path={tmp_path / 'scan.h5'}", "--noise", "0.01"]
    argv += ["--steps", "2", "--method", "diffpir", "--out", tmp_path / "x.npy", "--json"]
    assert cli.main([str(a) for a in argv]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["images"] == S and "stands for 4" in said.err
    assert np.load(tmp_path / "x.npy").shape == (S, 2, H, W)


@pytest.mark.slow
def test_the_range_of_a_named_data_set_is_noticed(tmp_path, capsys):
    """12 bits of one data set; the other one, of 16 bits, does not count."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.full((2, 28, 28), 4095, "uint16")
        file["other"] = np.full((2, 28, 28), 65535, "uint16")
    argv = ["restore", f"{tmp_path / 'a.h5'}:x", "--prior", "digits", "--operator", "identity"]
    argv += ["--noise", "0.3", "--samples", "2", "--out", tmp_path / "x"]
    assert cli.main([str(a) for a in argv]) == 0
    assert "read as 12 bits" in capsys.readouterr().err


WRONG = {
    "there is no file": ("{}/nix.h5", {}),
    "no data set 'raw'": ("{}/scan.h5,kspace=raw", {}),
    "is not complex": ("{}/scan.h5,kspace=mask", {}),
    "other numbers than zeros and ones": ("{}/scan.h5", {"mask": np.full(W, 0.5)}),
    "is not \\(W\\)": ("{}/scan.h5", {"mask": np.ones(W + 1)}),
    "is neither": ("{}/scan.h5", {"sens_maps": MAPS[:, 1:].astype("c8")}),
    "not finite": ("{}/scan.h5", {"sens_maps": (MAPS * np.nan).astype("c8")}),
    "no sensitivities of its 2 coils": ("{}/scan.h5", {"sens_maps": None}),
    "holds 2 slices": ("{}/scan.h5", {"kspace": normal(2, C, H, W).astype("c8")}),
    "is 9x8 but": ("{}/scan.h5", {"kspace": normal(S, C, 9, W).astype("c8")}),
}


@pytest.mark.parametrize("part", WRONG)
def test_scans_that_do_not_fit_are_one_line(part, tmp_path):
    write(tmp_path / "scan.h5", MAPS, COLUMNS, COLUMNS)
    text, changes = WRONG[part]
    with h5py.File(tmp_path / "scan.h5", "r+") as file:
        for name, value in changes.items():
            del file[name]
            if value is not None:
                file[name] = value
    with pytest.raises(InputError, match=part) as error:
        parse(f"mri:file,path={text.format(tmp_path)}").bind([0, 1, 2], (2, H, W))
    assert "\n" not in str(error.value)


def test_measurements_have_no_black(tmp_path):
    write(tmp_path / "scan.h5", MAPS, COLUMNS, COLUMNS)
    with pytest.raises(InputError, match="--range 0 WHITE"):
        load_measurements(tmp_path / "scan.h5", span=(1, 4))
    with pytest.raises(InputError, match="use the operator mri:file"):
        load_images(f"{tmp_path / 'scan.h5'}:kspace")
    assert load_images(tmp_path / "scan.h5").images.shape == (S, 1, H, W)  # the reference


# -- results --------------------------------------------------------------------------------------


def through(jobs, grow=1):
    """An engine that changes nothing, or that repeats every pixel."""

    def engine(y, numbers):
        y = y.repeat_interleave(grow, 2).repeat_interleave(grow, 3)
        return {"images": y, "std": y / 4}

    process(jobs, engine, history="a line")


def nexus(path, data, **storage):
    """A NeXus file with coordinates, an attribute of every kind, and a mask beside the images."""
    with h5py.File(path, "w") as file:
        file.attrs["default"] = "entry"
        group = file.create_group("entry")
        group.attrs.update({"signal": "cells", "axes": np.array(["t", "y", "x"], "S1")})
        cells = group.create_dataset("cells", data=data, **storage)
        about = cells.attrs
        about.update({"units": "counts", "flag": True, "element_size_um": (1.0, 0.4, 0.2)})
        about["names"] = np.array(["ä", "b"], h5py.string_dtype())
        about["none"], about["group"], about["checksum"] = h5py.Empty("f4"), group.ref, "abc"
        about["history"] = "recorded"
        for axis, name in enumerate("tyx"):
            group[name] = 0.5 * np.arange(data.shape[axis])
            group[name].attrs["units"] = "unit of " + name
        cells.dims[0].label = "t"
        group["t"].make_scale("time")
        cells.dims[0].attach_scale(group["t"])
        group["mask"] = np.ones(data.shape, "u1")


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<i4", "f4", ">f8", "f2"])
def test_a_result_is_a_data_set_like_the_one_that_was_read(dtype, tmp_path):
    data = (DATA % 100).astype(dtype)
    nexus(tmp_path / "a.h5", data, chunks=(3, 4, 7), compression="gzip", compression_opts=7)
    through(jobs_of(f"{tmp_path / 'a.h5'}:entry/cells", tmp_path / "out"))
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        assert set(file["entry"]) == {"cells", "t", "x", "y"}  # the mask does not hold for it
        cells, about = file["entry/cells"], dict(file["entry/cells"].attrs)
        np.testing.assert_array_equal(cells[:], data)
        assert cells.dtype == np.dtype(dtype) and cells.chunks == (1, 9, 7)
        assert (cells.compression, cells.compression_opts) == ("gzip", 7)
        assert [d.label for d in cells.dims] == ["t", "", ""]
        assert np.array_equal(cells.dims[0]["time"][:], [0, 0.5, 1])
        assert file["entry/x"].attrs["units"] == "unit of x"
        assert about["element_size_um"].tolist() == [1, 0.4, 0.2] and about["flag"] == True  # noqa: E712
        assert about["names"].tolist() == ["ä", "b"] and about["none"] == h5py.Empty("f4")
        assert about["history"] == "recorded\na line"
        assert not {"group", "checksum"} & set(about)
        assert file.attrs["default"] == "entry" and file["entry"].attrs["signal"] == "cells"
    with h5py.File(tmp_path / "out" / "a-std.h5") as file:
        assert file["entry/cells"].dtype == np.float32
        np.testing.assert_allclose(file["entry/cells"][:], data / 4, rtol=1e-3)
    with open_pages(tmp_path / "out" / "a.h5") as pages:  # the default of the file
        assert len(pages) == 3


def test_finer_pixels_and_scenes_of_a_data_set(tmp_path):
    data = np.concatenate([DATA, DATA])
    nexus(tmp_path / "a.h5", data)
    through(jobs_of(tmp_path / "a.h5", tmp_path / "fine"), grow=2)
    with h5py.File(tmp_path / "fine" / "a.h5") as file:
        np.testing.assert_array_equal(file["entry/cells"][:], data.repeat(2, 1).repeat(2, 2))
        assert file["entry/cells"].attrs["element_size_um"].tolist() == [1, 0.2, 0.1]
        assert file["entry/cells"].chunks is None
        assert set(file["entry"]) == {"cells", "t"}  # other coordinates have another length
    jobs = jobs_of(tmp_path / "a.h5", tmp_path / "scenes", select=Selection(repeats=3))
    process(scene_jobs(jobs, 3), lambda y, numbers: {"images": y.mean(1)})
    with h5py.File(tmp_path / "scenes" / "a.h5") as file:
        assert file["entry/cells"].shape == (2, 9, 7) and set(file["entry"]) == {"cells", "x", "y"}


@pytest.mark.parametrize("axes", ["TCYX", "XTYC", "CXYT", "YXTC", "TXYS"])
@pytest.mark.parametrize("channels", [(), ("1",), ("2", "0")])
def test_axes_and_chosen_channels_of_a_data_set(axes, channels, tmp_path):
    lengths = {"T": 2, "C": 3, "S": 3, "Y": 9, "X": 7}
    data = rng.integers(0, 255, [lengths[a] for a in axes], np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["stack"] = data
    select = Selection(axes=axes, channels=channels)
    through(jobs_of(tmp_path / "a.h5", tmp_path / "out", select=select))
    deep = next(i for i, a in enumerate(axes) if a in "CS")
    chosen = [int(c) for c in channels] or [0, 1, 2]
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        np.testing.assert_array_equal(file["stack"][:], np.take(data, chosen, deep))


def test_coordinates_are_those_of_their_own_axis_and_channels(tmp_path):
    """All lengths are equal: y has twice as many pixels afterwards, and channels change places."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["stack"] = rng.integers(0, 255, (4, 4, 4, 4), np.uint8)
        file.attrs["axes"] = np.array(["t", "wavelength", "y", "."], "S10")
        for name in ("t", "wavelength", "y"):
            file[name] = np.arange(4.0)
    select = Selection(axes="TCYX", channels=("2", "0", "1", "3"))
    through(jobs_of(f"{tmp_path / 'a.h5'}:stack", tmp_path / "out", select=select), grow=2)
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        assert set(file) == {"stack", "t", "wavelength"}
        assert file["wavelength"][:].tolist() == [2, 0, 1, 3]


def test_coordinates_in_other_files_are_not_followed(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.arange(7.0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["stack"] = DATA
        file["x"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/x")
        file.attrs["axes"] = "y:x"
        layout = h5py.VirtualLayout((9,), "f8")
        layout[:7] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (7,))
        file.create_virtual_dataset("y", layout)
        file["y"].make_scale("y")
        file["stack"].dims[1].attach_scale(file["y"])
    through(jobs_of(f"{tmp_path / 'a.h5'}:stack", tmp_path / "out"))
    with h5py.File(tmp_path / "out" / "a.h5") as file:
        assert list(file) == ["stack"]


def test_matlab_files_become_tiff(tmp_path):
    with h5py.File(tmp_path / "a.mat", "w") as file:
        file["stack"] = DATA
    through(jobs_of(tmp_path / "a.mat", tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a-std.tif", "a.tif"]
