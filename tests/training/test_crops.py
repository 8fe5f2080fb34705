"""Learning from captures: resumed bit for bit, of mixed sizes, within memory, made longer."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file

import unmurk
from unmurk import gaussian
from unmurk.cli.main import main
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.flows.posterior import Posterior
from unmurk.problem import Problem
from unmurk.training import Recipe, Rounds, Trainer, learn, memory, trainer

PROBLEM = Problem("identity", 0.2)
SHORT = {"kimg": 0.06, "batch": 4, "crop": 16, "precision": "fp32", "quiet": True}
RECIPE = Recipe(r2r=0.3, e_step=0.5, flow=0.7)
EM = {"method": "em", "rounds": Rounds(rounds=2, images=8, steps=1)}


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch):
    """The Gaussian prior that a run starts from is fitted to 64 crops a round, not to 2048."""
    monkeypatch.setattr(gaussian, "MAX_IMAGES", 64)


def captures(channels=1, sizes=((100, 41), (33, 120), (51, 51))):
    g = torch.Generator().manual_seed(0)
    return [torch.rand(channels, *size, generator=g) for size in sizes]


def weights(folder):
    found = load_file(folder / "posterior/model.safetensors")
    prior = load_file(folder / "prior/unet/diffusion_pytorch_model.safetensors")
    return found | {f"prior.{key}": value for key, value in prior.items()}


def equal(a, b):
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def stop_at(monkeypatch, step):
    """Interrupt the next run after so many steps, as Ctrl-C does."""
    update = Trainer.update

    def interrupted(self):
        if self.step == step:
            raise KeyboardInterrupt
        return update(self)

    monkeypatch.setattr(Trainer, "update", interrupted)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_mixed_sizes_and_an_interrupted_run(tmp_path, monkeypatch, channels):
    """Odd and mixed sizes with masks; killed in the middle, it ends bit for bit the same."""
    problem = Problem("inpaint:random,keep=0.7", 0.2)
    y = captures(channels)
    kind = dict(SHORT, kimg=0.02, method="noisy")
    learn(y, problem, out=tmp_path / "a", **kind)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            learn(y, problem, out=tmp_path / "b", **kind)
    learn(y, problem, out=tmp_path / "b", **kind)
    assert equal(tmp_path / "a", tmp_path / "b")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["crop"] == 16 and config["augment"] is True
    assert config["data"]["images"] == "3 images of 51x51 to 100x41"
    assert config["data"]["shape"] == [channels, 16, 16]


@pytest.mark.parametrize(
    ("problem", "least", "most"),
    [(PROBLEM, 0, 0), (Problem("inpaint:random,keep=0.6", 0.2), 32, 64)],
)
def test_flowdiff_with_an_e_step_is_resumed(tmp_path, monkeypatch, problem, least, most):
    """With draws that are new in every batch, and with those that are kept."""
    y = captures()
    kind = dict(SHORT, recipe=RECIPE)
    learn(y, problem, out=tmp_path / "a", **kind)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            learn(y, problem, out=tmp_path / "b", **kind)
    learn(y, problem, out=tmp_path / "b", **kind)
    assert equal(tmp_path / "a", tmp_path / "b")
    state = torch.load(tmp_path / "a/state/latest.pt", weights_only=True)
    assert least <= int(state["buffers"]["drawn"]) <= most


@pytest.mark.slow
def test_one_large_image_in_memory_is_learned_from_in_crops(tmp_path, capsys):
    kind = dict(SHORT, kimg=0.012, quiet=False, method="noisy")
    del kind["crop"]
    prior, posterior = learn(torch.rand(1, 1, 100, 132), PROBLEM, out=tmp_path / "a", **kind)
    assert prior.shape == posterior.shape == (1, 64, 64)
    assert "learning from 1 image of 100x132, crops of 64: about" in capsys.readouterr().err
    prior, _ = learn(
        torch.rand(1, 1, 100, 132), PROBLEM, out=tmp_path / "b", **(kind | {"crop": 0})
    )
    assert prior.shape == (1, 100, 132)
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert "crop" not in config and config["settings"]["crop"] == 0
    prior, _ = learn(torch.rand(4, 1, 16, 16), PROBLEM, out=tmp_path / "c", **kind)
    assert prior.shape == (1, 16, 16)


def test_the_expected_time_is_printed(tmp_path, capsys, monkeypatch):
    """It is the sum over the steps of what the probe measures, here twelve seconds each."""
    monkeypatch.setattr(Trainer, "_timed", lambda *_: 12.0)
    monkeypatch.setattr(trainer, "WORTH", 10)
    kind = dict(SHORT, kimg=0.04, quiet=False, method="noisy")
    learn(captures(), PROBLEM, out=tmp_path / "a", **kind)
    assert "crops of 16: about 2 min and" in capsys.readouterr().err
    assert memory._duration(120) == "2 min"


def test_smaller_than_the_crop(tmp_path):
    """The padding makes a mask of the identity; photon noise cannot be learned with one."""
    y = captures(sizes=((9, 40), (12, 13)))
    kind = dict(SHORT, kimg=0.02)
    learn(y, PROBLEM, out=tmp_path / "a", method="noisy", **kind)
    with pytest.raises(InputError, match="smaller than the crops of 16"):
        learn(y, PROBLEM, out=tmp_path / "b", method="clean", **kind)
    assert not (tmp_path / "b").exists()


def test_global_operators_and_impossible_requests(tmp_path):
    y = torch.rand(2, 2, 100, 100)
    with pytest.raises(InputError, match="crop") as caught:
        learn(y, Problem("mri:cartesian,acceleration=2", 0.1), out=tmp_path / "a", **SHORT)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="augmentation needs crops"):
        learn(y, PROBLEM, out=tmp_path / "a", **(SHORT | {"crop": 0, "augment": True}))
    with pytest.raises(InputError, match="have one size"):
        learn(captures(), PROBLEM, out=tmp_path / "a", **(SHORT | {"crop": 0}))
    assert not (tmp_path / "a").exists()


# -- longer runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"recipe": RECIPE}, pytest.param(EM, marks=pytest.mark.slow)])
def test_a_finished_run_is_made_longer(tmp_path, monkeypatch, method):
    """From 0.03 to 0.06 kimg, in one go and with an interruption: the same bit for bit."""
    y = captures()
    for name in ("a", "b"):
        learn(y, PROBLEM, out=tmp_path / name, **(SHORT | method | {"kimg": 0.03}))
    assert equal(tmp_path / "a", tmp_path / "b")
    short = weights(tmp_path / "a")
    learn(y, PROBLEM, out=tmp_path / "a", **(SHORT | method))
    with monkeypatch.context() as patch:
        stop_at(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            learn(y, PROBLEM, out=tmp_path / "b", **(SHORT | method))
    learn(y, PROBLEM, out=tmp_path / "b", **(SHORT | method))
    assert equal(tmp_path / "a", tmp_path / "b")
    after = weights(tmp_path / "a")
    assert any(not torch.equal(short[key], after[key]) for key in short)
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["settings"]["kimg"] == 0.06 and config["kimg before"] == [0.03]
    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    seen = [json.loads(line)["kimg"] for line in lines]
    assert seen == sorted(seen) and seen[-1] == 0.06
    with pytest.raises(InputError, match=r"0\.06 kimg, which can be raised and not lowered"):
        learn(y, PROBLEM, out=tmp_path / "a", **(SHORT | method | {"kimg": 0.03}))
    with pytest.raises(InputError, match=r"another seed \(0 there, 5 here\)"):
        learn(y, PROBLEM, out=tmp_path / "a", **(SHORT | method | {"kimg": 1.0, "seed": 5}))


# -- the command and its memory -------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_learns_and_restores_captures(tmp_path, capsys):
    """Noise is estimated from two sizes; a file of another type is left out."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "set"
    folder.mkdir()
    for number, size in enumerate([(120, 99), (101, 140)]):
        values = 0.5 + 0.05 * rng.standard_normal(size)
        tifffile.imwrite(folder / f"{number}.tif", (65535 * values).astype(np.uint16))
    tifffile.imwrite(folder / "2.tif", np.zeros((120, 99), np.uint8))
    run = tmp_path / "run"
    options = ["--noise", "auto", "--kimg", "0.01", "--batch", "2", "--method", "noisy"]
    options += ["--crop", "16", "--skip-bad"]
    assert main(["learn", str(folder), "--out", str(run), *options]) == 0
    told = capsys.readouterr().err
    assert "left out 2.tif: gray 8-bit, others are gray 16-bit" in told
    assert "learning from 2 images of 120x99 to 101x140, crops of 16: about" in told
    config = json.loads((run / "config.json").read_text())
    assert abs(config["problem"]["noise"] / 0.05 - 1) < 0.03
    assert config["range"] == [0.0, 65535.0]
    places = [str(folder / "0.tif"), "--prior", str(run), "--out", str(tmp_path / "x.tif")]
    assert main(["restore", *places]) == 0
    assert tifffile.imread(tmp_path / "x.tif").shape == (120, 99)


MEASURE = """
import sys
import unmurk
from pathlib import Path
from unmurk.io import captures

for number, held in enumerate((2**20, 2**20, 2**30)):  # the first run alone loads libraries
    captures.HELD_CAPTURES = held
    unmurk.learn(Path(sys.argv[1]), unmurk.Problem("identity", 0.1), out=sys.argv[2] + str(number),
                 method="noisy", crop=16, kimg=0.008, batch=2, precision="fp32", quiet=True)
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_set(tmp_path):
    """Eight files of 2048x2048, 16 bits, are read in parts; held in memory, they add 64 MiB.

    While they are decoded, copies of one file (8 MiB each) are held, too.
    """
    folder = tmp_path / "set"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        values = rng.integers(0, 65535, (2048, 2048), np.uint16)
        tifffile.imwrite(folder / f"{number}.tif", values)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path / "run"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )
    assert done.returncode == 0, done.stderr
    _, parts, memory_held = map(int, done.stdout.split())
    assert 40 < memory_held - parts < 64 + 5 * 8


def test_crops_beyond_every_image_are_made_smaller(tmp_path, capsys):
    """512 asked for, images of up to 40: crops of 40; a posterior of crops serves any size."""
    images = [torch.rand(1, 24, 40), torch.rand(1, 36, 36)]
    given = {"kimg": 0.008, "batch": 4, "method": "noisy", "precision": "fp32", "quiet": True}
    prior, posterior = learn(
        images, Problem("identity", 0.2), out=tmp_path / "run", crop=512, **given
    )
    said = "no image is as large as crops of 512: learning from crops of 40"
    assert said in capsys.readouterr().err
    assert prior.shape == posterior.shape == (1, 40, 40)
    for model in (prior, posterior, Prior.load(tmp_path / "run" / "prior")):
        assert model.any_size
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["crop"] == 40 and config["settings"]["crop"] == 512


@pytest.mark.parametrize(("augment", "turnable"), [(None, True), (False, False)])
def test_a_posterior_of_augmented_crops_is_averaged_over_orientations(augment, turnable, tmp_path):
    given = {"kimg": 0.008, "batch": 4, "precision": "fp32", "quiet": True, "crop": 16}
    posterior = learn(
        torch.rand(3, 1, 32, 32),
        Problem("identity", 0.2),
        out=tmp_path / "run",
        augment=augment,
        **given,
    )[1]
    assert posterior.turnable == turnable
    assert Posterior.load(tmp_path / "run").turnable == turnable
    posterior.save(tmp_path / "elsewhere")  # the flag goes with the weights and their error bars
    assert Posterior.load(tmp_path / "elsewhere").turnable == turnable
    Posterior.load("digits").save(tmp_path / "run" / "digits")
    assert not Posterior.load(tmp_path / "run" / "digits").turnable
    assert Posterior.load("generic").turnable and Posterior.load("nuclei").turnable


def test_a_posterior_that_starts_from_a_wiener_solution_keeps_one_orientation(tmp_path):
    """Its start image does not turn with y, and its calibration ranks draws of one."""
    given = {"kimg": 0.008, "batch": 4, "precision": "fp32", "quiet": True, "crop": 16}
    blur, out = Problem("blur:gaussian,sigma=0.5", 0.1), tmp_path / "run"
    posterior = learn(torch.rand(3, 1, 32, 32), blur, out=out, augment=True, **given)[1]
    assert posterior.start is not None and not posterior.turnable
    assert not Posterior.load(out).turnable
    assert json.loads((out / "config.json").read_text())["half scale"] is True
    assert "2312.11232" in unmurk.citation(out)  # crops of a blur have half scale too
