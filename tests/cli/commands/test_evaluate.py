"""`unmurk evaluate`: scores of images, folders and samples."""

import json
import math

import numpy as np
import pytest
import tifffile
import torch

from tests.cli.calls import images, unmurk
from unmurk.evaluation import metrics


def test_json_is_one_object_with_known_scores(data, tmp_path, capsys):
    """An offset of 0.1 everywhere is 20 dB; of equal images PSNR is infinite, in JSON null."""
    shifted = tmp_path / "shifted.npy"
    np.save(shifted, np.load(data) + np.float32(0.1))
    assert unmurk("evaluate", shifted, data, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 5
    assert scores["psnr"] == pytest.approx(20, abs=1e-4)
    assert unmurk("evaluate", data, data, "--json") == 0
    same = json.loads(capsys.readouterr().out)
    assert same["psnr"] is None and same["exact"] == 5
    assert same["ssim"] == pytest.approx(1, abs=1e-6)


def test_evaluate_scores_images_where_they_are_placed(data, tmp_path, capsys, monkeypatch):
    """PSNR, SSIM and the Frechet distance are those of what `place` returns."""
    shifted, given = tmp_path / "shifted.npy", []
    np.save(shifted, np.load(data) + np.float32(0.1))

    def place(*things):
        given.extend(things)
        return [things[1] - 0.3, things[1] - 0.2]

    monkeypatch.setattr("unmurk.cli.commands.evaluate.place", place)
    assert unmurk("evaluate", shifted, data, "--json") == 0
    assert [tuple(thing.shape) for thing in given] == [(5, 1, *np.load(data).shape[1:])] * 2
    torch.testing.assert_close(given[0] - given[1], torch.full_like(given[0], 0.1))
    a, b = given[1] - 0.3, given[1] - 0.2
    scores = json.loads(capsys.readouterr().out)
    assert scores["psnr"] == pytest.approx(float(metrics.psnr(a, b).mean()))
    assert scores["ssim"] == pytest.approx(float(metrics.ssim(a, b).mean()))
    if "frechet" in scores:
        assert scores["frechet"] == pytest.approx(metrics.frechet(b, a))


def test_evaluate_scores_samples(data, tmp_path, capsys):
    """Truth and samples exchangeable: coverage at its level; spread the samples' deviation."""
    rng = np.random.default_rng(1)
    centre = images(40, seed=2)
    truth = centre + rng.normal(0, 0.05, centre.shape).astype(np.float32)
    samples = centre + rng.normal(0, 0.05, (19, *centre.shape)).astype(np.float32)
    for name, values in {"truth": truth, "mean": samples.mean(0), "samples": samples}.items():
        np.save(tmp_path / f"{name}.npy", values)
    argv = [tmp_path / "mean.npy", tmp_path / "truth.npy", "--samples", tmp_path / "samples.npy"]
    assert unmurk("evaluate", *argv, "--level", "0.8", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    n = centre.size
    assert scores["coverage"] == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / n))
    assert scores["spread"] == pytest.approx(0.05, rel=0.01)


def test_evaluate_takes_folders_of_mixed_sizes_and_leaves_out_deviations(tmp_path, capsys):
    """The set has one scale of 12 bits; the mean is over the images, as if each stood alone."""

    rng, errors = np.random.default_rng(3), []
    for folder in ("clean", "restored"):
        (tmp_path / folder).mkdir()
    (tmp_path / "restored" / "unmurk.jsonl").write_text("")
    for i, (shape, white) in enumerate([((2, 16, 20), 4000), ((16, 16), 900), ((24, 12), 700)]):
        truth = rng.integers(0, white, shape).astype("uint16")
        noisy = truth + (i + 1) * 40
        tifffile.imwrite(tmp_path / "clean" / f"{i}.tif", truth, photometric="minisblack")
        tifffile.imwrite(tmp_path / "restored" / f"{i}.tif", noisy, photometric="minisblack")
        tifffile.imwrite(tmp_path / "restored" / f"{i}-std.tif", noisy.astype("float32"))
        errors += [(i + 1) * 40 / 4095] * (2 if i == 0 else 1)
    folders = [str(tmp_path / name) for name in ("restored", "clean")]
    assert unmurk("evaluate", *folders, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 4 and scores["exact"] == scores["beyond"] == 0
    assert scores["psnr"] == pytest.approx(
        np.mean([-20 * math.log10(e) for e in errors]), abs=0.05
    )
    assert 0.5 < scores["ssim"] < 1
    assert unmurk("evaluate", folders[1], folders[1], "--json") == 0
    same = json.loads(capsys.readouterr().out)
    assert same["psnr"] is None and same["exact"] == 4 and same["ssim"] == pytest.approx(1)
    (tmp_path / "restored" / "2.tif").unlink()
    (tmp_path / "restored" / "2-std.tif").unlink()
    assert unmurk("evaluate", *folders) == 2
    assert "restored holds 2 pictures" in capsys.readouterr().err


def test_human_output_names_the_numbers(data, capsys):
    assert unmurk("evaluate", data, data) == 0
    lines = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert lines["images"] == "5" and float(lines["ssim"]) == pytest.approx(1)
