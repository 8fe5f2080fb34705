"""Shares of nested loops, lines off a terminal and a bar on one, and nothing in Python."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unmurk
from unmurk import progress
from unmurk.cli.main import main
from unmurk.progress import Parts, each, is_line, working

ROOT = Path(unmurk.__file__).parents[1]


def shares(text):
    """The percentages of lines that are all of progress, and never fall."""
    lines = text.splitlines()
    assert all(is_line(line) for line in lines), lines
    found = [int(re.search(r"(\d+)%", line)[1]) for line in lines]
    assert found == sorted(found)
    return found


@pytest.fixture
def at_once(monkeypatch):
    """Every share is a line."""
    monkeypatch.setattr(progress, "FIRST", -1.0)
    monkeypatch.setattr(progress, "PAUSE", -1.0)


def test_parts_divide_the_part_in_which_they_run(capfd, at_once):
    """Two files, of 1 and 3 images in parts of two tiles; no more than is known is claimed."""
    with working("restore"), Parts() as files:
        for done, size in ((0, 1), (1, 3)):
            files.advance(done, 4, size)
            assert list(each("ab")) == ["a", "b"]
        files.advance(4, 4)
    assert shares(capfd.readouterr().err) == [12, 25, 62, 100]


def test_a_loop_that_is_left_gives_its_part_back(capfd, at_once):
    with working("solve"):
        for k in each(range(2)):
            for _ in each(range(4)):
                break
            assert k < 2
    assert shares(capfd.readouterr().err) == [50, 100]


def test_work_that_is_repeated_in_a_part_never_goes_back(capfd, at_once):
    """As when a denoiser goes through the tiles twice in one step."""
    with working("solve"):
        for _ in each(range(2)):
            for _ in range(2):
                list(each(range(2)))
    assert shares(capfd.readouterr().err) == [25, 50, 75, 100]


def test_nothing_is_said_in_python_by_other_processes_and_by_short_work(capfd, monkeypatch):
    list(each(range(3)))
    with working("restore"):
        list(each(range(3)))
    monkeypatch.setattr(progress, "FIRST", -1.0)
    with working("restore", shown=False):
        list(each(range(3)))
    assert capfd.readouterr().err == ""


def test_commands_say_how_far_they_are(tmp_path, monkeypatch, capfd, at_once):
    """By images, levels and tiles, up to the end; the results are those of a silent command."""
    monkeypatch.chdir(tmp_path)
    clean = unmurk.load_images("digits:test", limit=4).images
    unmurk.save_images(clean[:2], "clean", format="png")
    large = clean.view(2, 2, 28, 28).permute(0, 2, 1, 3).reshape(1, 1, 56, 56)
    unmurk.save_images(large, "large", format="png")
    solve = "--prior digits --operator blur:gaussian,sigma=1 --noise 0.1 --method ddrm --steps 3"
    for line in (
        "corrupt clean --noise 0.1 --out noisy",
        "restore noisy --prior digits --noise 0.1 --samples 2 --batch 1 --out restored",
        "restore large --prior digits --noise 0.1 --samples 2 --tile 28 --out tiled",
        f"solve noisy {solve} --out solved",
        f"solve large {solve} --tile 28 --out solved-large",
        "sample --prior digits -n 2 --steps 2 --out new",
        "evaluate restored clean",
    ):
        capfd.readouterr()
        assert main(line.split()) == 0
        err = capfd.readouterr().err
        said = [one for one in err.splitlines() if is_line(one)]
        assert shares("\n".join(said))[-1:] == ([] if "evaluate" in line else [100]), err
        assert all(one.startswith(line.split()[0]) for one in said)
        if "solve" in line:
            assert len(said) >= 3
    monkeypatch.setattr(progress, "FIRST", 1000.0)
    again = "restore noisy --prior digits --noise 0.1 --samples 2 --batch 1 --out again"
    assert main(again.split()) == 0
    found = [unmurk.load_images(name).images for name in ("restored", "again")]
    assert torch.equal(*found)


def test_a_terminal_shows_a_bar_that_goes_away(tmp_path):
    """And no line of progress is left on it."""
    ours, theirs = pty.openpty()
    code = (
        "from unmurk.progress import each, working\n"
        "with working('restore'):\n"
        "    for _ in each(range(3)): pass\n"
        "print('done')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment, check=True
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "restore" in shown and "\x1b[2K" in shown  # a bar, and its line is erased
    assert shown.rstrip().endswith("done") and "s left" not in shown
