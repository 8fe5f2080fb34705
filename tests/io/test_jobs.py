"""A folder of files: worked off one by one, shared out, gone on with, and never mixed up."""

import json
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
from unmurk.io import jobs as files
from unmurk.io.formats.tiff import Stack
from unmurk.io.images import load_images, load_measurements
from unmurk.io.jobs import jobs_of, process, ranks
from unmurk.io.ledger import LOG, Ledger
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.training import learn

rng = np.random.default_rng(0)


def unmurk(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


def fill(folder: Path, sizes: list[tuple[int, ...]]) -> Path:
    folder.mkdir()
    for i, size in enumerate(sizes):
        pixels = rng.integers(60, 200, size, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose networks were never trained."""
    torch.manual_seed(0)
    Prior.create("tiny", (1, 16, 16)).save(tmp_path / "run" / "prior")
    Posterior.create("tiny", (1, 16, 16)).save(tmp_path / "run" / "posterior")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != LOG}


class Engine:
    """Adds a tenth of the image's number; stops, as if killed, at a number."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.seen = stop, []

    def __call__(self, y, index):
        self.seen += index
        if self.stop in index:
            raise KeyboardInterrupt
        number = torch.tensor(index, dtype=torch.float32)[:, None, None, None]
        return {"images": y + number / 100, "std": number.expand_as(y)}


SIZES = [(16, 16), (16, 16), (20, 24), (16, 16, 3), (16, 16), (16, 16)]


def work(folder: Path, out: Path, engine: Engine, settings: dict | None = None, **options):
    ledger = Ledger(out / LOG, settings or {"seed": 0})
    ledger.alone()
    jobs = jobs_of(folder, out)
    return process(jobs, engine, ledger=ledger, arrays=["std"], **options)


# -- going on -------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    folder = fill(tmp_path / "in", SIZES)
    whole, engine = tmp_path / "whole", Engine()
    assert work(folder, whole, engine).images == 6
    assert engine.seen == [0, 1, 2, 3, 4, 5]
    with pytest.raises(KeyboardInterrupt):
        work(folder, tmp_path / "out", Engine(stop=3))
    assert sorted(contents(tmp_path / "out")) == [
        f"{i}{end}" for i in range(3) for end in ("-std.tif", ".png")
    ]
    engine = Engine()
    done = work(folder, tmp_path / "out", engine)
    assert engine.seen == [3, 4, 5] and (done.images, done.before) == (3, 3)
    assert contents(tmp_path / "out") == contents(whole)
    engine = Engine()
    assert work(folder, tmp_path / "out", engine).before == 6 and engine.seen == []


def test_what_is_not_the_same_any_more_is_made_again(tmp_path):
    """Input of another length, a missing output, a line that was cut short, a new file."""
    folder, out = fill(tmp_path / "in", SIZES), tmp_path / "out"
    work(folder, out, Engine())
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "1.png")
    (out / "4.png").unlink()
    log = out / LOG
    log.write_bytes(log.read_bytes()[:-9])
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "6.png")
    engine = Engine()
    assert work(folder, out, engine).before == 3
    assert engine.seen == [0, 1, 4, 5, 6]  # 0 is company of 1, and is not written again
    ends = [line for line in log.read_text().splitlines() if '"settings"' in line]
    assert len([line for line in ends if line.endswith("}")]) == 9
    assert work(folder, out, Engine()).before == 7


def test_other_settings_are_refused(tmp_path):
    folder, out = fill(tmp_path / "in", SIZES[:2]), tmp_path / "out"
    work(folder, out, Engine(), {"seed": 0, "samples": 2})
    for settings in ({"seed": 1, "samples": 2}, {"seed": 0, "samples": 2, "tile": 8}):
        with pytest.raises(InputError) as error:
            work(folder, out, Engine(), settings)
        assert ("seed" if settings["seed"] else "tile") in str(error.value)


# -- shares ---------------------------------------------------------------------------------------


def test_processes_share_the_files(tmp_path, monkeypatch):
    """Every file once, whoever does it; together they write what one alone writes."""
    folder = fill(tmp_path / "in", SIZES)
    work(folder, tmp_path / "whole", Engine())
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        engine = Engine()
        work(folder, tmp_path / "out", engine)
        seen.append(engine.seen)
    assert seen == [[0, 4], [1, 5], [2], [3]]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    for rank, size in (("4", "4"), ("-1", "4"), ("x", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(InputError, match="RANK"):
            ranks()


# -- numbers --------------------------------------------------------------------------------------


def test_bad_files_keep_their_numbers(tmp_path):
    folder = fill(tmp_path / "in", SIZES)
    (folder / "1.png").write_text("no picture")
    engine = Engine()
    done = work(folder, tmp_path / "out", engine, skip_bad=True)
    assert engine.seen == [0, 2, 3, 4, 5] and list(done.skipped) == ["1.png"]
    (folder / "2.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "3.png").write_bytes((folder / "0.png").read_bytes())
    found = load_images(folder, skip_bad=True)
    assert found.numbers == [0, 2, 3, 4, 5] and "1.png" not in found.names


def test_a_stack_that_ends_early_is_left_out(tmp_path, monkeypatch):
    """Of a file that turns out bad half-way nothing is left; its neighbours are whole."""
    (tmp_path / "in").mkdir()
    data = rng.integers(0, 65536, (3, 33, 40), np.uint16)
    for name in "abc":
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", data, photometric="minisblack")
    read = Stack.read

    def broken(stack, page):
        if (stack.file.name, page) == ("b.tif", 2):
            raise InputError("b.tif: page 2 is damaged")
        return read(stack, page)

    monkeypatch.setattr(Stack, "read", broken)
    for together in (1, 2, 64):
        monkeypatch.setattr(files, "TOGETHER", together)
        out = tmp_path / f"out{together}"
        done = work(tmp_path / "in", out, lambda y, index: {"images": y, "std": y}, skip_bad=True)
        assert done.skipped == {"b.tif": "b.tif: page 2 is damaged"}
        assert sorted(contents(out)) == ["a-std.tif", "a.tif", "c-std.tif", "c.tif"]
        assert all(np.array_equal(tifffile.imread(out / f"{n}.tif"), data) for n in "ac")


def test_masks_do_not_move_up(tmp_path):
    """`corrupt --skip-bad` hides in each image what its own number says."""
    array = rng.uniform(0.2, 0.8, (4, 16, 16))
    array[1, 3, 3] = np.nan
    np.save(tmp_path / "x.npy", array)
    argv = ["--operator", "inpaint:random,keep=0.5", "--noise", 0.1, "--out", tmp_path / "y.npy"]
    assert unmurk("corrupt", tmp_path / "x.npy", "--skip-bad", *argv) == 0
    x = torch.from_numpy(array[[0, 2, 3]]).float()[:, None]
    expected = Problem("inpaint:random,keep=0.5", 0.1).simulate(x, index=[0, 2, 3])
    assert np.allclose(np.load(tmp_path / "y.npy").squeeze(), expected[:, 0], atol=1e-6)


# -- the commands ---------------------------------------------------------------------------------


def test_restore_of_a_mixed_folder(tmp_path, run, capsys):
    """Sizes and channels differ; each file is what it would be alone under its number."""
    folder, out = fill(tmp_path / "in", [(16, 16), (28, 40), (16, 16, 3), (16, 16)]), "out"
    argv = ["--prior", run, "--operator", "identity", "--noise", 0.1, "--samples", 2, "--std"]
    assert unmurk("restore", folder, *argv, "--out", tmp_path / out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4
    names = ("0.png", "1.png", "2.png", "3.png")
    found = [np.asarray(Image.open(tmp_path / out / name)) for name in names]
    assert [f.shape for f in found] == [(16, 16), (28, 40), (16, 16, 3), (16, 16)]
    posterior, problem = Posterior.load(run), Problem("identity", 0.1)
    y = torch.from_numpy(np.asarray(Image.open(folder / "3.png")) / np.float32(255))[None, None]
    mean, std = posterior.mean_std(y, problem, 2, index=[3])
    assert np.abs(found[3] / 255 - mean[0, 0].numpy().clip(0, 1)).max() < 0.5 / 255 + 1e-5
    written = tifffile.imread(tmp_path / out / "3-std.tif")  # in the numbers of the file
    assert np.allclose(written, 255 * std[0, 0], atol=255e-5) and written.dtype == "float32"
    assert unmurk("restore", folder, *argv, "--out", tmp_path / out, "--json") == 0
    assert json.loads(capsys.readouterr().out) | {"out": ""} == {
        "images": 0,
        "finished": 4,
        "skipped": {},
        "out": "",
    }
    assert unmurk("restore", folder, *argv, "--seed", 1, "--out", tmp_path / out) == 2
    assert "another seed" in capsys.readouterr().err


def test_solve_does_not_depend_on_the_company(tmp_path, run):
    """Files worked on together and files gone on with give the same numbers."""
    folder = fill(tmp_path / "in", [(16, 16), (16, 16), (24, 20)])
    argv = ["--prior", run, "--operator", "inpaint:random,keep=0.6", "--noise", 0.1]
    argv += ["--steps", 2, "--samples", 2, "--init", "posterior"]
    assert unmurk("solve", folder, *argv, "--out", tmp_path / "all") == 0
    (tmp_path / "one").mkdir()
    lines = (tmp_path / "all" / LOG).read_text().splitlines()
    (tmp_path / "one" / LOG).write_text("\n".join(lines[:2]) + "\n")
    for name in ("0.png", "0-samples.npy", "0-std.tif"):
        (tmp_path / "one" / name).write_bytes((tmp_path / "all" / name).read_bytes())
    assert unmurk("solve", folder, *argv, "--out", tmp_path / "one") == 0
    for name in ("1", "2"):
        a, b = (np.load(tmp_path / out / f"{name}-samples.npy") for out in ("all", "one"))
        assert a.shape[:2] == (2, 1) and np.array_equal(a, b)


def test_a_range_says_what_black_and_white_are(tmp_path, run):
    """A 12-bit camera from 100 to 4095: read as [0, 1], written back as it came."""
    pixels = rng.integers(0, 4096, (16, 16)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = load_images(tmp_path / "a.png", span=(100, 4095))
    assert np.allclose(found.images[0, 0], (pixels - 100.0) / 3995, atol=1e-6)
    assert np.array_equal(found.scale.to_file(found.images)[0, 0], pixels)
    argv = ["--prior", run, "--operator", "identity", "--noise", 0.1, "--samples", 2]
    out = tmp_path / "b.png"
    assert unmurk("restore", tmp_path / "a.png", *argv, "--range", 100, 4095, "--out", out) == 0
    mean, _ = Posterior.load(run).mean_std(found.images, Problem("identity", 0.1), 2)
    written = np.asarray(Image.open(out)).astype(float)
    assert np.abs(written - (100 + 3995 * mean[0, 0].numpy()).clip(0, 65535)).max() < 0.6


def test_an_unknown_range_is_asked_for(tmp_path, capsys):
    """The range in the message can be pasted as it is."""
    np.save(tmp_path / "a.npy", rng.uniform(-39.5, 699.5, (2, 16, 16)))
    argv = ["corrupt", tmp_path / "a.npy", "--out", tmp_path / "b.npy"]
    assert unmurk(*argv) == 2
    assert "--range -40 700" in capsys.readouterr().err
    assert unmurk(*argv, "--range", -40, 700) == 0
    expected = (np.load(tmp_path / "a.npy") + 40) / 740
    assert np.allclose(np.load(tmp_path / "b.npy")[:, 0], expected, atol=1e-6)


def test_measurements_keep_their_numbers(tmp_path, run, capsys):
    """k-space far beyond [-2, 3], of more than 4 channels, is solved as the library does."""
    problem = Problem("mri:cartesian,acceleration=2,coils=3,channels=1", 0.1)
    y = problem.simulate(torch.from_numpy(rng.uniform(0, 1, (2, 1, 16, 16))).float())
    assert y.abs().max() > 3 and y.shape[1] == 6
    np.save(tmp_path / "y.npy", y.numpy())
    assert torch.equal(load_measurements(tmp_path / "y.npy").images, y)
    argv = ["--prior", run, "--operator", problem.operator.spec, "--noise", 0.1, "--steps", 2]
    argv += ["--method", "diffpir", "--out", tmp_path / "x.npy"]
    assert unmurk("solve", tmp_path / "y.npy", *argv) == 0
    expected = solve(y, problem, Prior.load(run), method="diffpir", steps=2)
    assert np.allclose(np.load(tmp_path / "x.npy"), expected.mean, atol=1e-4)
    assert Problem("identity", 0).operator.pictorial and not problem.operator.pictorial
    assert not Problem("blur:gaussian,sigma=1|ct:parallel,angles=9", 0).operator.pictorial


def test_a_changed_mask_is_another_run(tmp_path, run, capsys):
    """The content of mask files counts, for a folder of results and for a run folder."""
    mask, folder = tmp_path / "mask.npy", fill(tmp_path / "in", [(16, 16)])
    np.save(mask, rng.uniform(size=(16, 16)) < 0.5)
    operator = f"inpaint:file,path={mask}"
    argv = ["restore", folder, "--prior", run, "--operator", operator, "--noise", 0.1]
    argv += ["--samples", 2, "--out", tmp_path / "out"]
    options = {"method": "noisy", "out": tmp_path / "learnt", "kimg": 0.032, "quiet": True}
    y = torch.from_numpy(rng.uniform(0, 1, (4, 1, 16, 16))).float()
    assert unmurk(*argv) == 0
    learn(y, Problem(operator, 0.1), **options)
    np.save(mask, rng.uniform(size=(16, 16)) < 0.5)
    assert unmurk(*argv) == 2
    assert "another mask or kernel" in capsys.readouterr().err
    with pytest.raises(InputError, match="another mask or kernel"):
        learn(y, Problem(operator, 0.1), **options)
