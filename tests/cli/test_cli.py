"""The command line: its numbers are those of the rooms behind it; stdout is one JSON object."""

import errno
import inspect
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from unmurk.cli import commands, demo
from unmurk.cli import help as help_pages
from unmurk.cli import main as cli
from unmurk.cli.commands import restoring
from unmurk.diffusion.prior import Prior
from unmurk.evaluation import metrics
from unmurk.flows.posterior import Posterior
from unmurk.io.outputs import output
from unmurk.problem import Problem
from unmurk.solvers import solve
from unmurk.training import Recipe, Settings
from unmurk.training.examples import Examples

COMMANDS = ("demo", "noise", "learn", "restore", "solve", "sample", "corrupt", "evaluate")
COMMANDS += ("certify", "report", "app")


def images(n: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """n random grey images (n, size, size) in [0.2, 0.8], float32."""
    draw = np.random.default_rng(seed).uniform(0.2, 0.8, (n, size, size))
    return draw.astype(np.float32)


def unmurk(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "clean.npy"
    np.save(path, images(5))
    return path


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run folder whose networks were never trained: enough to be read and applied."""
    torch.manual_seed(0)
    folder = tmp_path / "trained"
    Prior.create("tiny", (1, 16, 16)).save(folder / "prior")
    Posterior.create("tiny", (1, 16, 16)).save(folder / "posterior")
    problem = Problem("inpaint:random,keep=0.5", 0.1)
    (folder / "config.json").write_text(json.dumps({"problem": problem.to_dict()}))
    return folder


# -- help -----------------------------------------------------------------------------------------


def test_help_imports_no_torch():
    """Every help page is written before torch, numpy or diffusers are imported."""
    code = (
        "import sys; from unmurk.cli.commands import COMMANDS; from unmurk.cli.main import main; "
        "assert list(COMMANDS) == sys.argv[1:]; "
        "codes = [main(['--help'])] + [main([c, '--help']) for c in COMMANDS]; "
        "heavy = {'torch', 'numpy', 'diffusers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: unmurk") == len(COMMANDS) + 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command, capsys):
    """Each option has words of its own; one with a sigma names its unit."""
    assert unmurk(command, "--help") == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    source = inspect.getsource(commands.COMMANDS[command])
    for field in fields(commands.COMMANDS[command]):
        name = f"    {field.name}:"
        assert name in source
        if field.name not in {"data", "restored", "reference", "run_folder"}:
            assert f"--{field.name.replace('_', '-')} " in shown
        if field.name == "noise":
            assert "image range is 1" in shown


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fills_its_lines(command, width, capsys, monkeypatch):
    """No line is too long, and none ends where the next word would have had a place."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert unmurk(*[command] if command else [], "--help") == 0
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= width and "None)" not in "".join(shown)
    breaks = 0
    for line, below in zip(shown, shown[1:], strict=False):
        if not (line.startswith("│ ") and below.startswith("│    ")):
            continue
        line, below = line[2:-2].rstrip(), below[2:-2].rstrip()
        if not line or not below or re.match(r"-\S+ \S+( \S+)?$", line):
            continue  # the space between paragraphs; a flag that has a line of its own
        word = below.split()[0]
        word = word[: word.index(",") + 1] if "," in word else word
        assert len(line) + 1 + len(word) > width - 4, (line, below)
        breaks += 1
    assert breaks or command not in ("noise", "learn", "restore", "solve")


def test_help_wraps_between_words_and_colors_take_no_place():
    """The line holds 23 characters beside its codes: it fits into 23 and not into 22."""
    colored = "\x1b[1musage:\x1b[0m unmurk a-b c [d]"
    assert help_pages._wrapped(colored, 23) == colored
    assert help_pages._wrapped(colored, 22) == colored[:-4] + "\n" + " " * 14 + "[d]"
    assert help_pages._wrapped("│ " + "a " * 40, 20) == "│ " + "a " * 40


def test_defaults_are_those_of_the_library():
    defaults = Settings()
    for name in ("network", "kimg", "seed", "precision", "compile"):
        field = next(f for f in fields(commands.Learn) if f.name == name)
        assert field.default == getattr(defaults, name)


def test_version(capsys):
    assert unmurk("--version") == 0
    assert capsys.readouterr().out == "unmurk 0.1.0\n"


# -- corrupt and evaluate -------------------------------------------------------------------------


def test_corrupt_is_simulate(data, tmp_path, capsys):
    """The file holds A x + sigma n as `Problem.simulate` draws it, unclipped, float32."""
    out = tmp_path / "deep" / "y.npy"
    text = "blur:gaussian,sigma=1"
    assert unmurk("corrupt", data, "--operator", text, "--noise", 2, "--out", out) == 0
    expected = Problem(text, 2.0).simulate(torch.from_numpy(np.load(data))[:, None])
    written = np.load(out)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written.squeeze(), expected.numpy().squeeze())
    assert written.min() < -1 and written.max() > 2


def test_photons_are_drawn_and_restored(data, tmp_path, capsys):
    """`corrupt` and `solve` read the text of a noise as `Problem` does."""
    y, out = tmp_path / "y.npy", tmp_path / "x.npy"
    noise = "poisson-gaussian,gain=0.02,sigma=0.01"
    assert unmurk("corrupt", data, "--noise", noise, "--out", y) == 0
    expected = Problem("identity", noise).simulate(torch.from_numpy(np.load(data))[:, None])
    np.testing.assert_array_equal(np.load(y).squeeze(), expected.numpy().squeeze())
    Prior.create("tiny", (1, 16, 16)).save(tmp_path / "prior")
    argv = ["--prior", tmp_path / "prior", "--operator", "identity", "--steps", 2, "--out", out]
    capsys.readouterr()
    assert unmurk("solve", y, "--noise", noise, *argv, "--json") == 0
    assert json.loads(capsys.readouterr().out)["chi2"] > 0
    found = solve(expected, Problem("identity", noise), Prior.load(tmp_path / "prior"), steps=2)
    np.testing.assert_allclose(np.load(out).squeeze(), found.mean.numpy().squeeze(), atol=1e-5)


def test_corrupt_to_a_folder_clips_to_eight_bits(data, tmp_path):
    from PIL import Image

    out = tmp_path / "folder"
    assert unmurk("corrupt", data, "--noise", "0.5", "--out", out) == 0
    files = sorted(out.glob("*.png"))
    assert len(files) == 5
    y = Problem("identity", 0.5).simulate(torch.from_numpy(np.load(data))[:, None])
    read = np.stack([np.asarray(Image.open(f)) for f in files])
    np.testing.assert_allclose(read / 255, y[:, 0].clamp(0, 1).numpy(), atol=0.5 / 255 + 1e-6)


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
    import tifffile

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


# -- with networks --------------------------------------------------------------------------------


def test_restore_is_the_posterior_of_the_runs_problem(data, trained, tmp_path, capsys):
    """Mean and standard deviation are the flow's for the problem in config.json, any batch."""
    out = tmp_path / "restored"
    assert unmurk("restore", data, "--prior", trained, "--out", out, "--std", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    y = torch.from_numpy(np.load(data))[:, None]
    problem = Problem("inpaint:random,keep=0.5", 0.1).bind(range(5), (1, 16, 16))
    mean, std = Posterior.load(trained).mean_std(y, problem, n=16)
    np.testing.assert_allclose(np.load(said["out"]).squeeze(), mean[:, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(np.load(said["std"]).squeeze(), std[:, 0].numpy(), atol=1e-5)


def test_given_parts_replace_the_runs_problem(trained):
    """--operator and --noise stand in for what the run was trained with, each alone."""
    trained_with = restoring.trained_problem(str(trained), None, None)
    assert trained_with == Problem("inpaint:random,keep=0.5", 0.1)
    assert restoring.trained_problem(str(trained), None, 0.0) == Problem(
        "inpaint:random,keep=0.5", 0.0
    )
    assert restoring.trained_problem(str(trained), "identity", None) == Problem("identity", 0.1)


def test_solve_is_the_library_call(data, trained, tmp_path, capsys):
    out = tmp_path / "solved"
    argv = ["--prior", trained, "--operator", "inpaint:box,size=4", "--noise", 0.05, "--out", out]
    argv += ["--steps", 3, "--samples", 2, "--seed", 4, "--json"]
    assert unmurk("solve", data, *argv) == 0
    said = json.loads(capsys.readouterr().out)
    y = torch.from_numpy(np.load(data))[:, None]
    problem = Problem("inpaint:box,size=4", 0.05)
    result = solve(y, problem, Prior.load(trained), samples=2, seed=4, steps=3)
    assert said["nfe"] == result.nfe
    np.testing.assert_allclose(np.load(said["samples"]), result.samples.numpy(), atol=1e-5)


def test_sample_writes_the_priors_images(trained, tmp_path):
    out = tmp_path / "new.npy"
    assert unmurk("sample", "--prior", trained, "--out", out, "-n", 3, "--steps", 3) == 0
    expected = Prior.load(trained).sample(3, steps=3, seed=0)
    np.testing.assert_allclose(np.load(out).squeeze(), expected[:, 0].numpy(), atol=1e-5)


def test_outputs_stand_beside_each_other(data, trained, tmp_path, capsys):
    """The deviations stand beside the file, under its name. Another seed does not replace it."""
    out = tmp_path / "x.npy"
    argv = ["restore", data, "--prior", trained, "--operator", "identity", "--std", "--out", out]
    assert unmurk(*argv, "--seed", 1) == 0
    assert unmurk(*argv, "--seed", 0) == 2
    assert "x-std.npy was made with another seed" in capsys.readouterr().err
    y = torch.from_numpy(np.load(data))[:, None]
    _, std = Posterior.load(trained).mean_std(y, Problem("identity", 0.1), n=16, seed=1)
    np.testing.assert_allclose(np.load(tmp_path / "x-std.npy"), std.numpy(), atol=1e-5)
    assert np.load(out).shape == np.load(data).shape


@pytest.mark.pages
@pytest.mark.slow
def test_learn_continues_and_reports(data, tmp_path, capsys):
    """The same command a second time finds the run done; another noise is refused."""
    run = tmp_path / "run"
    argv = ["learn", data, "--noise", "0.1", "--simulate", "--kimg", "0.2", "--out", run]
    argv += ["--precision", "fp32", "--method", "noisy"]
    assert unmurk(*argv) == 0
    weights = (run / "posterior" / "model.safetensors").read_bytes()
    assert unmurk(*argv) == 0
    assert (run / "posterior" / "model.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert unmurk(*argv, "--seed", 1) == 2
    assert "another" in capsys.readouterr().err
    assert (run / "prior" / "model_index.json").exists()
    page = (run / "report.html").read_text()
    kept = Examples.load(run)
    y = Problem("identity", 0.1).simulate(torch.from_numpy(np.load(data))[:, None], 0)
    assert torch.equal(kept.y, y[list(kept.numbers)])
    for number in kept.numbers:
        assert f"<h3>image {number}</h3>" in page
    assert page.count('type="range"') == len(kept.numbers) == 4
    assert f"unmurk restore {data} --prior {run} --out restored --std" in page
    assert unmurk("report", run) == 0
    assert "unmurk restore IMAGES" in (run / "report.html").read_text()


@pytest.mark.pages
@pytest.mark.slow
def test_demo_small(tmp_path):
    """The whole demonstration at a toy size: its keys, and what is known whatever the networks."""
    recipe = Recipe(buffer=32, steps=2)
    options = {"train": 64, "held_out": 8, "kimg": 0.3, "recipe": recipe, "steps": 4}
    options["nuclei"] = 0.1
    result = demo.run(tmp_path / "demo", **options)
    assert 12.5 < result["noisy"]["psnr"] < 14.5  # noise 0.3, clipped on the dark background
    for task in ("inpaint", "deblur"):
        assert math.isfinite(result["solved"][task]["psnr"])
        assert math.isfinite(result["solved"][task]["pseudo_inverse"]["psnr"])
    mean = sum(result["solved"][t]["ssim"] for t in ("inpaint", "deblur")) / 2
    assert result["solved"]["ssim"] == pytest.approx(mean)
    page = Path(result["report"]).read_text()
    assert {"Fill a hole", "Undo a blur", "Restore noisy nuclei"} <= set(
        re.findall(r"<h2>(.*?)</h2>", page)
    )
    assert page.count('type="range"') == 2 and "the noise that was there" in page
    assert 15 < result["nuclei"]["noisy"]["psnr"] < 17  # noise 0.2, clipped too
    for held in (result, result["nuclei"]):
        assert held["filtered"]["psnr"] > held["noisy"]["psnr"] + 3
    words = io.StringIO()
    Console(file=words, width=120).print(demo.table(result))
    assert f"{result['solved']['deblur']['psnr']:.2f}" in words.getvalue()


# -- ends -----------------------------------------------------------------------------------------


def test_interrupt_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        (tmp_path / "out").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Problem, "simulate", interrupted)
    assert unmurk("corrupt", data, "--out", tmp_path / "out") == 130
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and "same command" in shown.err
    assert not (tmp_path / "out").exists()


def test_full_disk_is_one_line(data, tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "y.npy")

    monkeypatch.setattr("unmurk.io.generated.GeneratedWriter.write", full)
    assert unmurk("corrupt", data, "--out", tmp_path / "y.npy") == 2
    assert capsys.readouterr().err == "unmurk: cannot write y.npy: No space left on device\n"


def test_other_errors_are_not_hidden(data, tmp_path, monkeypatch):
    """What is no bad input keeps its traceback; still nothing is left behind."""

    def broken(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(Problem, "simulate", broken)
    with pytest.raises(ZeroDivisionError):
        unmurk("corrupt", data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_state_stays(tmp_path):
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "state").mkdir(parents=True)
        (tmp_path / "runs" / "a" / "state" / "latest.pt").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "runs" / "a" / "state" / "latest.pt").exists()
    with pytest.raises(KeyboardInterrupt), output(tmp_path / "runs" / "b"):
        (tmp_path / "runs" / "b").mkdir()
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["a"]
