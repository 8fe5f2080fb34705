"""`--repeats` and `--clean` on the command line: one result a scene, from all its captures."""

import json

import numpy as np
import pytest
import tifffile
import torch

from tests.cli.calls import images, unmurk
from unmurk.flows.posterior import Posterior
from unmurk.io.saving import save_images
from unmurk.problem import Problem
from unmurk.repeats import combined, grouped

MASKED = Problem("inpaint:random,keep=0.5", 0.1)
SCENES = 3


@pytest.fixture
def captures() -> torch.Tensor:
    """Two captures each of three scenes, with masks of their own."""
    clean = torch.from_numpy(images(SCENES))[:, None]
    return MASKED.simulate(clean.repeat_interleave(2, 0))


def wanted(run, y):
    """The mean of the posterior given both captures of each scene."""
    mean, problem = combined(grouped(y, 2), MASKED, range(SCENES), (1, 16, 16))
    return Posterior.load(run).eval().mean_std(mean, problem, 16, 0, range(SCENES))


def test_an_array_gives_one_result_a_scene(captures, trained, tmp_path, capsys):
    np.save(tmp_path / "y.npy", captures.numpy())
    out = tmp_path / "restored"
    given = ["restore", tmp_path / "y.npy", "--prior", trained, "--out", out, "--repeats", 2]
    assert unmurk(*given, "--std", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["images"] == SCENES
    mean, std = wanted(trained, captures)
    assert np.allclose(np.load(said["out"]).reshape(3, 16, 16), mean[:, 0].numpy(), atol=2e-6)
    assert np.allclose(np.load(out / "std.npy"), std.numpy(), atol=2e-6)
    given = ["restore", tmp_path / "y.npy", "--prior", trained, "--out", tmp_path / "other"]
    assert unmurk(*given, "--repeats", 4) == 2  # six captures are no scenes of four
    assert "no whole number of scenes of 4" in capsys.readouterr().err


def test_files_and_pages_give_one_result_a_scene(captures, trained, tmp_path, capsys):
    """Two files, or two times of a T axis; results have the names of the first files."""
    files, pages = tmp_path / "files", tmp_path / "pages"
    files.mkdir()
    pages.mkdir()
    for number, y in enumerate(captures):
        tifffile.imwrite(files / f"a{number}.tif", y[0].numpy())
    tifffile.imwrite(
        pages / "all.tif", captures[:, 0].numpy(), imagej=True, metadata={"axes": "TYX"}
    )
    mean = wanted(trained, captures)[0]
    for data, names in ((files, ["a0.tif", "a2.tif", "a4.tif"]), (pages, ["all.tif"])):
        out = tmp_path / f"{data.name}-restored"
        given = ["restore", data, "--prior", trained, "--out", out, "--repeats", 2, "--json"]
        assert unmurk(*given) == 0
        assert json.loads(capsys.readouterr().out)["images"] == SCENES
        assert sorted(p.name for p in out.glob("*.tif")) == names
        found = [tifffile.imread(out / name).reshape(-1, 16, 16) for name in names]
        assert np.allclose(np.concatenate(found), mean[:, 0].numpy(), atol=2e-6)
        assert unmurk(*given) == 0  # finished before
        assert json.loads(capsys.readouterr().out)["finished"] == SCENES
    (files / "a5.tif").unlink()
    out = tmp_path / "odd"
    assert unmurk("restore", files, "--prior", trained, "--out", out, "--repeats", 2) == 2
    assert "no whole number of scenes of 2" in capsys.readouterr().err and not out.exists()


def test_solve_takes_all_captures(captures, trained, tmp_path, capsys):
    """Without masks this is the mean at sigma / sqrt(2)."""
    from unmurk.diffusion.prior import Prior
    from unmurk.solvers import solve

    np.save(tmp_path / "y.npy", captures.numpy())
    out = tmp_path / "solved.npy"
    given = ["solve", tmp_path / "y.npy", "--prior", trained, "--operator", "identity"]
    given += ["--noise", 0.1, "--steps", 3, "--repeats", 2, "--out", out]
    assert unmurk(*given) == 0
    y = grouped(captures, 2).mean(1)
    mean = Problem("identity", 0.1 / 2**0.5).bind(range(SCENES), (1, 16, 16))
    found = solve(y, mean, Prior.load(trained), method="red-diff", steps=3)
    assert np.allclose(np.load(out).reshape(3, 16, 16), found.mean[:, 0].numpy(), atol=1e-5)


def test_learning_takes_repeats_and_clean_images(tmp_path, capsys):
    clean = torch.from_numpy(images(16))[:, None]
    y = Problem("identity", 0.1).simulate(clean.repeat_interleave(2, 0))
    save_images(y, tmp_path / "y.npy")
    save_images(clean[:3], tmp_path / "clean.npy")
    given = ["learn", tmp_path / "y.npy", "--noise", 0.1, "--kimg", 0.05, "--batch", 8]
    given += ["--precision", "fp32", "--repeats", 2, "--clean", tmp_path / "clean.npy"]
    assert unmurk(*given, "--out", tmp_path / "run", "--json") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["repeats"] == 2 and config["clean"]["shape"][0] == 3
    capsys.readouterr()
    for more, part in (
        (["--method", "ambient"], "take one of flowdiff, em"),
        (["--simulate"], "leave out --repeats"),
    ):
        assert unmurk(*given, "--out", tmp_path / "other", *more) == 2
        error = capsys.readouterr().err.strip()
        assert part in error and len(error.splitlines()) == 1
        assert not (tmp_path / "other").exists()
