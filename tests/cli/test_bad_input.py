"""Bad input: one line on stderr that says what and where, exit code 2, nothing left behind."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unmurk.cli import main as cli
from unmurk.cli.arguments import explain
from unmurk.cli.commands import COMMANDS
from unmurk.flows.posterior import Posterior


def png(path: Path, shape: tuple[int, ...] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, 128, np.uint8)).save(path)


def good(here: Path) -> Path:
    for i in range(3):
        png(here / "good" / f"{i}.png")
    return here / "good"


def missing_folder(here: Path) -> tuple:
    return ["corrupt", here / "nowhere", "--out", here / "out"], "nowhere"


def empty_folder(here: Path) -> tuple:
    (here / "empty").mkdir()
    return ["corrupt", here / "empty", "--out", here / "out"], "empty"


def text_named_png(here: Path) -> tuple:
    (good(here) / "text.png").write_text("this is no picture")
    return ["corrupt", here / "good", "--out", here / "out"], "text.png"


def mixed_sizes(here: Path) -> tuple:
    png(good(here) / "wide.png", (16, 20))
    return ["corrupt", here / "good", "--out", here / "out.npy"], "wide.png"


def mixed_channels(here: Path) -> tuple:
    png(good(here) / "colour.png", (16, 16, 3))
    return ["corrupt", here / "good", "--out", here / "out.npy"], "colour.png"


def no_channel_axis(here: Path) -> tuple:
    np.save(here / "many.npy", np.zeros((4, 18, 20, 22), np.uint8))
    return ["corrupt", here / "many.npy", "--out", here / "out"], "many.npy"


def two_channels_as_pictures(here: Path) -> tuple:
    np.save(here / "two.npy", np.zeros((4, 16, 16, 2), np.uint8))
    return ["corrupt", here / "two.npy", "--out", here / "out"], "2"


def restoring(here: Path, shape: tuple[int, ...], *more: object) -> list:
    Posterior.create("tiny", shape).save(here / "run" / "posterior")
    argv = ["restore", good(here), "--prior", here / "run", "--out", here / "out"]
    return [*argv, "--operator", "identity", "--noise", "0.1", *more]


def grey_for_a_colour_posterior(here: Path) -> tuple:
    return restoring(here, (3, 16, 16)), "3x16x16"


def smaller_than_the_posterior(here: Path) -> tuple:
    return restoring(here, (1, 32, 16)), "1x32x16"


def tiles_without_room(here: Path) -> tuple:
    return restoring(here, (1, 16, 16), "--tile", "2"), "tile is 2"


def white_below_black(here: Path) -> tuple:
    return restoring(here, (1, 16, 16), "--range", "255", "0"), "white must be above black"


def several_pictures_into_one(here: Path) -> tuple:
    argv = restoring(here, (1, 16, 16))
    return [*argv[:4], "--out", here / "one.png", *argv[6:]], "one.png"


def pictures_of_measurements(here: Path) -> tuple:
    argv = ["solve", good(here), "--prior", "digits", "--operator", "cs:structured,ratio=0.5"]
    return [*argv, "--noise", "0.1", "--out", here / "out"], "pictures cannot hold"


def colours_for_a_grey_prior(here: Path) -> tuple:
    np.save(here / "grey.npy", np.zeros((2, 28, 28), np.uint8))
    argv = ["solve", here / "grey.npy", "--prior", "digits", "--operator", "colour:grey"]
    return [*argv, "--noise", "0.1", "--out", here / "out"], "mixes the 3 channels"


def tiff_of_other_pixels(here: Path) -> tuple:
    (here / "good").mkdir()
    Image.fromarray(np.zeros((16, 16, 4), np.uint8)).save(here / "good" / "a.tif")
    return restoring(here, (1, 16, 16)), "alpha"


def run_that_does_not_say_its_problem(here: Path) -> tuple:
    Posterior.create("tiny", (1, 16, 16)).save(here / "run" / "posterior")
    return ["restore", good(here), "--prior", here / "run", "--out", here / "out"], "--operator"


def unknown_operator(here: Path) -> tuple:
    return ["corrupt", good(here), "--operator", "smudge", "--out", here / "out"], "smudge"


def malformed_operator(here: Path) -> tuple:
    argv = ["corrupt", good(here), "--operator", "blur:gaussian,sigma=wide", "--out", here / "out"]
    return argv, "sigma"


def unknown_operator_key(here: Path) -> tuple:
    argv = ["corrupt", good(here), "--operator", "sr:average,scale=2", "--out", here / "out"]
    return argv, "scale"


def negative_noise(here: Path) -> tuple:
    return ["corrupt", good(here), "--noise", "-0.1", "--out", here / "out"], "-0.1"


def noise_not_a_number(here: Path) -> tuple:
    return ["corrupt", good(here), "--noise", "nan", "--out", here / "out"], "nan"


def malformed_noise(here: Path) -> tuple:
    argv = ["corrupt", good(here), "--noise", "poisson,sigma=0.1", "--out", here / "out"]
    return argv, "poisson,gain=0.01"


def learning_from_photons(here: Path) -> tuple:
    argv = ["learn", good(here), "--noise", "poisson,gain=0.1", "--out", here / "out"]
    argv += ["--operator", "blur:gaussian,sigma=1", "--method", "ambient"]
    return argv, "ambient cannot learn from blur:gaussian,sigma=1,pad=reflect with noise poisson"


def restoring_photons_in_one_pass(here: Path) -> tuple:
    Posterior.create("tiny", (1, 16, 16)).save(here / "run" / "posterior")
    argv = ["restore", good(here), "--prior", here / "run", "--out", here / "out"]
    argv += ["--operator", "inpaint:box,size=4"]
    return [*argv, "--noise", "poisson,gain=0.1"], "not Gaussian"


def noise_of_no_image(here: Path) -> tuple:
    argv = ["solve", good(here), "--prior", "digits", "--operator", "cs:structured,ratio=0.5"]
    return [*argv, "--noise", "auto", "--out", here / "out"], "which are no images"


def noise_of_too_little(here: Path) -> tuple:
    argv = ["learn", good(here), "--noise", "auto", "--out", here / "out"]
    return argv, "give more images"


def adding_noise_that_nobody_knows(here: Path) -> tuple:
    return ["corrupt", good(here), "--noise", "auto", "--out", here / "out"], "measurements first"


def mask_of_another_size(here: Path) -> tuple:
    png(here / "mask.png", (8, 8))
    operator = f"inpaint:file,path={here / 'mask.png'}"
    return ["corrupt", good(here), "--operator", operator, "--out", here / "out"], "mask"


def output_below_a_file(here: Path) -> tuple:
    (here / "file.txt").write_text("mine")
    return ["corrupt", good(here), "--out", here / "file.txt" / "sub"], "file.txt"


def output_that_nobody_can_write(here: Path) -> tuple:
    return ["corrupt", good(here), "--out", "/proc/unmurk"], "/proc"


def output_in_a_format_that_is_only_read(here: Path) -> tuple:
    return ["corrupt", good(here), "--out", here / "out.jpg"], "reads .jpg files but writes none"


def output_of_another_such_format(here: Path) -> tuple:
    return ["sample", "--prior", "digits", "--out", here / "out.czi"], "that ends in .tif"


def run_folder_is_a_file(here: Path) -> tuple:
    (here / "file.txt").write_text("mine")
    argv = ["learn", good(here), "--noise", "0.1", "--out", here / "file.txt"]
    return argv, "file.txt"


def learning_without_noise(here: Path) -> tuple:
    return ["learn", good(here), "--out", here / "out"], "noise"


def sides_that_do_not_fit(here: Path) -> tuple:
    np.save(here / "odd.npy", np.zeros((4, 18, 18), np.uint8))
    return ["learn", here / "odd.npy", "--noise", "0.1", "--out", here / "out"], "18x18"


def unknown_prior(here: Path) -> tuple:
    return ["sample", "--prior", here / "nowhere", "--out", here / "out"], "nowhere"


def no_images_asked_for(here: Path) -> tuple:
    return ["sample", "--prior", "digits", "-n", "0", "--out", here / "out"], "--n"


def images_that_do_not_pair(here: Path) -> tuple:
    np.save(here / "four.npy", np.zeros((4, 16, 16), np.uint8))
    return ["evaluate", here / "four.npy", good(here)], "four.npy"


def samples_of_another_shape(here: Path) -> tuple:
    np.save(here / "samples.npy", np.zeros((2, 7, 16, 16), np.float32))
    images = good(here)
    return ["evaluate", images, images, "--samples", here / "samples.npy"], "samples.npy"


def pickled_samples(here: Path) -> tuple:
    np.save(here / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    images = good(here)
    return ["evaluate", images, images, "--samples", here / "evil.npy"], "evil.npy"


def solving(here: Path, *more: str) -> list:
    argv = ["solve", good(here), "--prior", "digits", "--operator", "identity", "--noise", "0.1"]
    return [*argv, "--out", here / "out", *more]


def option_without_a_value(here: Path) -> tuple:
    return solving(here, "--option", "relax"), "key=value"


def option_of_another_type(here: Path) -> tuple:
    return solving(here, "--option", "relax=strong"), "relax=strong"


def option_out_of_range(here: Path) -> tuple:
    return solving(here, "--option", "pairs=false", "relax=3"), "3.0"


def unknown_option(here: Path) -> tuple:
    return solving(here, "--option", "zeta=1"), "zeta"


def unknown_method(here: Path) -> tuple:
    return solving(here, "--method", "magic"), "magic"


def no_steps(here: Path) -> tuple:
    return solving(here, "--steps", "0"), "--steps must be a whole number from 1"


def report_of_no_run(here: Path) -> tuple:
    return ["report", good(here)], "good"


CASES: list[Callable[[Path], tuple]] = [
    missing_folder,
    empty_folder,
    text_named_png,
    mixed_sizes,
    mixed_channels,
    no_channel_axis,
    two_channels_as_pictures,
    grey_for_a_colour_posterior,
    smaller_than_the_posterior,
    tiles_without_room,
    white_below_black,
    several_pictures_into_one,
    pictures_of_measurements,
    colours_for_a_grey_prior,
    tiff_of_other_pixels,
    run_that_does_not_say_its_problem,
    unknown_operator,
    malformed_operator,
    unknown_operator_key,
    negative_noise,
    noise_not_a_number,
    malformed_noise,
    learning_from_photons,
    restoring_photons_in_one_pass,
    noise_of_no_image,
    noise_of_too_little,
    adding_noise_that_nobody_knows,
    mask_of_another_size,
    output_below_a_file,
    output_that_nobody_can_write,
    output_in_a_format_that_is_only_read,
    output_of_another_such_format,
    run_folder_is_a_file,
    learning_without_noise,
    sides_that_do_not_fit,
    unknown_prior,
    no_images_asked_for,
    images_that_do_not_pair,
    samples_of_another_shape,
    pickled_samples,
    option_without_a_value,
    option_of_another_type,
    option_out_of_range,
    unknown_option,
    unknown_method,
    no_steps,
    report_of_no_run,
]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_line_and_nothing_left(case, tmp_path, capsys):
    argv, named = case(tmp_path)
    before = contents(tmp_path)
    assert cli.main([str(a) for a in argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("unmurk: ") and named in line
    assert contents(tmp_path) == before


WRONG = [
    ("corrupt x.npy --out y.npy --nose 0.1", "no option --nose (did you mean --noise?)"),
    ("corrupt x.npy", "corrupt needs --out"),
    ("solve x.npy --out y.npy", "solve needs --prior and --operator and --noise"),
    ("learn x.npy --out run --network huge", "--network is 'huge': choose one of tiny, small"),
    ("corrupt x.npy --out y.npy --seed abc", "--seed must be a whole number from 0 to"),
    ("learn x.npy --out y --kimg=fast", "--kimg must be a number from 0.001"),
    ("solve x.npy --out y --range 1", "--range needs 2 values: write --range BLACK WHITE"),
    ("evaluate x.npy y.npy --range a b", "--range must be a number, got 'a'"),
    ("corrupt a b --out y", "takes DATA, and 'b' is one too many"),
    ("demo extra", "'extra' is one too many"),
    ("corrupt x.npy --out", "--out needs a value: write --out PATH"),
    ("corrupt x.npy --json=true --out y", "--json takes no value, got 'true'"),
    ("sample --prior digits --out y -n x", "--n must be a whole number from 1"),
    ("smudge", "unknown command 'smudge': choose one of demo, noise, learn"),
    ("corupt x", "did you mean corrupt?"),
    ("--out y", "a command is missing"),
    ("", "a command is missing"),
]


@pytest.mark.parametrize("text, part", WRONG)
def test_options_that_do_not_parse(text, part, tmp_path, capsys, monkeypatch):
    """One line that says what is wrong and where."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(text.split()) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert shown.out == "" and line.startswith("unmurk: ") and part in line
    assert not list(tmp_path.iterdir())


def test_what_only_the_parser_knows_is_one_line_too():
    """A mistake that the walk over the arguments does not find: tyro's words, without its box."""
    box = "╭─ Odd ───────────╮\n│ Something is odd │\n│ ──────────────── │\n╰────────────────╯"
    said = explain(COMMANDS, ["demo"], box)
    assert said.startswith("demo: ") and "Something is odd" in said and "\n" not in said
    assert "unmurk demo --help" in said


def test_skip_bad_leaves_out_and_lists(tmp_path, capsys):
    folder = good(tmp_path)
    (folder / "text.png").write_text("this is no picture")
    png(folder / "wide.png", (16, 20))
    argv = ["corrupt", str(folder), "--skip-bad", "--out", str(tmp_path / "y.npy"), "--json"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    assert said["images"] == 3 and set(said["skipped"]) == {"text.png", "wide.png"}
    assert "text.png" in shown.err and "wide.png" in shown.err
    assert np.load(tmp_path / "y.npy").shape[0] == 3


def test_learning_must_not_shift_numbers(tmp_path, capsys):
    """Masks go by an image's number: learning refuses a set that --skip-bad made a hole in."""
    (good(tmp_path) / "1a.png").write_text("this is no picture")
    argv = ["learn", tmp_path / "good", "--operator", "inpaint:random,keep=0.5", "--skip-bad"]
    argv += ["--noise", "0.1", "--out", tmp_path / "out"]
    assert cli.main([str(a) for a in argv]) == 2
    left_out, line = capsys.readouterr().err.splitlines()
    assert "1a.png" in left_out and "1a.png" in line and "numbers" in line
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_quiet(tmp_path):
    """`unmurk --help | head -1`: nobody reads on, nothing is said about it."""
    program = subprocess.Popen(
        [sys.executable, "-m", "unmurk", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()  # before a word is written
    said = program.stderr.read()
    program.stderr.close()
    assert program.wait() == 141 and said == b""


def test_the_program_itself(tmp_path):
    """As a process: the exit code, one line on stderr, no traceback."""
    argv = [sys.executable, "-m", "unmurk", "corrupt", str(tmp_path / "nowhere"), "--out", "out"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("unmurk: ")
    assert not list(tmp_path.iterdir())
