"""Help, version and defaults of the command line."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from tests.cli.calls import unmurk
from unmurk.cli import commands
from unmurk.cli import help as help_pages
from unmurk.training import Settings

COMMANDS = ("demo", "noise", "learn", "restore", "solve", "sample", "corrupt", "evaluate")
COMMANDS += ("certify", "report", "app")


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
