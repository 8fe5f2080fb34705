"""What the app says: its own fields in place of the options of the command line."""

import ast
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import tifffile

import unmurk
from unmurk.cli.app.judgment import section_of
from unmurk.cli.app.records import Images
from unmurk.cli.app.wording import LABELS, busy, failed, follow, in_app, noted
from unmurk.cli.main import main
from unmurk.errors import InputError
from unmurk.evaluation import verdict

DASHES = re.compile(r"--[a-z]")
ROOT = Path(unmurk.__file__).parent


def messages():
    """Every text of the package that names an option in words, not the name of an option alone."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "9" for p in node.values]
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_no_message_of_the_package_keeps_an_option():
    """Whatever code a message comes from; CSS and the arguments of commands are no messages."""
    found = {text for text in messages() if re.search(r"[\s(`']--[a-z]", text)}
    found = {text for text in found if "var(--" not in text and "\n" not in text.strip()}
    assert len(found) > 60
    kept = {text: in_app(text) for text in found if DASHES.search(in_app(text))}
    assert not kept


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "give the numbers of black and white in the files, such as --range 0 4095",
            "give the numbers of black and white in the files, such as 0 and 4095 in “Black and "
            "white of the files”",
        ),
        ("--range -0.5 1e+06 sets it", "-0.5 and 1e+06 in “Black and white of the files” sets it"),
        ("check it (--range BLACK WHITE)", "check it (“Black and white of the files”)"),
        (
            verdict.LONGER,
            f"learn longer (a run of greater {LABELS['kimg']})",
        ),
        ("give more images, or --noise a number", "give more images, or “Noise” a number"),
        ("broken: leave it out with --skip-bad", "broken: leave it out"),
        (
            "name the axes, such as --axes TZCYX",
            "name the axes, such as the command-line option axes TZCYX",
        ),
        ("cannot read a --b.tif and c--noise.tif", "cannot read a --b.tif and c--noise.tif"),
    ],
)
def test_fields_stand_for_options(said, shown):
    assert in_app(said) == shown
    for line in (busy, failed, noted):
        assert shown in line(said)


def test_what_a_verdict_advises_can_be_done_in_the_app():
    for name, value in (("chi2", 0.2), ("noise", 2.0), ("range", 0.01), ("black", -1.0)):
        found = verdict.judge({"values": 10_000, name: (value, 0.0), "level": 0.1})
        assert not found.trusted
        section = section_of(found)
        assert section.verdict.advice and not DASHES.search(section.verdict.text), name


# -- refusals -------------------------------------------------------------------------------------


class Finished:
    """A command that ran in this process; only its messages matter here."""

    pid = 0

    def __init__(self, words, *, stdout, stderr, **options):
        with (
            open(stdout.name, "w") as out,
            open(stderr.name, "w") as said,
            redirect_stdout(out),
            redirect_stderr(said),
        ):
            self.code = main(words[4:])

    def poll(self):
        return self.code

    def wait(self, seconds=None):
        return self.code


@pytest.fixture
def process():
    return Finished


def refusal(steps):
    """What the page says at the end of an action, which has no result."""
    said = list(follow(steps))
    line, result = said[-1]
    assert result is None and 'role="alert"' in line, line
    assert not any(DASHES.search(str(text)) for text, _ in said), said
    return str(line)


def files(folder, **arrays):
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    return {name: Images(folder / f"{name}.npy", f"{name}.npy", False) for name in arrays}


def test_images_that_are_refused(desk, tmp_path):
    session, rng = desk.session("A" * 32), np.random.default_rng(0)
    noisy = rng.normal(0.5, 0.1, (2, 32, 32)).astype(np.float32)
    arrays = {
        LABELS["range"]: 4000 * noisy,
        "finite": np.where(noisy > 0.7, np.nan, noisy),
        "or “Noise” a number": noisy[:, :7],
        "the command-line option axes": np.zeros((3, 4, 18, 20, 22), np.uint8),
    }
    for part, values in arrays.items():
        np.save(tmp_path / "y.npy", values)
        images = Images(tmp_path / "y.npy", "y.npy", False)
        assert part in refusal(desk.measure(session, images)), part
    folder = tmp_path / "mixed"
    folder.mkdir()
    tifffile.imwrite(folder / "a.tif", np.zeros((9, 9), np.uint8))
    (folder / "b.tif").write_bytes(b"II*\0 no TIFF")
    assert "b.tif" in refusal(desk.measure(session, Images(folder, "mixed", False)))


def test_texts_and_priors_that_are_refused(desk, tmp_path):
    session = desk.session("A" * 32)
    np.save(tmp_path / "y.npy", np.random.default_rng(0).random((2, 28, 28), np.float32))
    np.save(tmp_path / "odd.npy", np.zeros((1, 5, 5), np.float32))
    y, odd = (Images(tmp_path / f"{name}.npy", name, False) for name in ("y", "odd"))
    for noise in ("much", "poisson-gaussian,auto", "-1", "x" * 400):
        refusal(desk.restore(session, y, "digits", noise))
    for operator in ("", "blurr", "blur:gaussian,sigma=1000"):
        refusal(desk.solve(session, y, "digits", operator, "0.1"))
    assert LABELS["operator"] in refusal(desk.solve(session, y, "digits", "", "0.1"))
    refusal(desk.restore(session, odd, "digits", "auto"))
    refusal(desk.solve(session, y, "digits", "identity", "0.1", "magic"))
    refusal(desk.restore(session, y, "none"))


def test_a_run_that_is_refused(desk, tmp_path):
    """The last line of its process is shown beside its name."""
    session = desk.session("A" * 32)
    np.save(tmp_path / "y.npy", np.zeros((3, 8, 8), np.float32))
    desk.learn(session, Images(tmp_path / "y.npy", "y", False), "cells", "auto", kimg=0.1)
    line = noted(desk.runs(session).progress("cells").text())
    assert "noise cannot be estimated" in line and not DASHES.search(line)
    with pytest.raises(InputError, match="cannot be called"):
        desk.learn(session, Images(tmp_path / "y.npy", "y", False), "a b", "0.1")
