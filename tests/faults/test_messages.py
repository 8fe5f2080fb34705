"""Messages: one line without control characters, and never long, whoever's text is in them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unmurk import errors
from unmurk.cli.console import escape
from unmurk.cli.main import main
from unmurk.errors import InputError

LONG = "x" * 5000
TEXTS = {
    "plain": ("there is no file a.npy", "there is no file a.npy"),
    "lines": ("cannot read a:\nbad\r\n  more\n", r"cannot read a:\nbad\r\n  more"),
    "colour": ("no \x1b[31mred\x07", r"no \x1b[31mred\x07"),
    "direction": ("a\u202eb\u2066", r"a\u202eb\u2066"),
    "bytes": ("a\udcff", r"a\xff"),
    "spaces that do not look so": ("a\u00a0b\u202fc", r"a\xa0b\u202fc"),
    "half a character": ("\ud800", r"\ud800"),
    "letters": ("Grüße 日本 😀", "Grüße 日本 😀"),
    "spaces at the ends": ("  a  ", "a"),
    "escaped before": (r"a\nb\x1b", r"a\nb\x1b"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize(("text", "shown"), TEXTS.values(), ids=TEXTS)
def test_messages_are_one_safe_line(text, shown):
    error = InputError(text)
    assert str(error) == shown and escape(shown) == shown
    assert str(InputError(error)) == shown  # an error in an error is not escaped twice
    assert str(pickle.loads(pickle.dumps(error))) == shown


def test_values_lose_their_middle():
    head, tail = "x" * 197, "x" * 196
    assert str(InputError(f"--a {LONG}: mend it")) == f"--a {head} ... {tail}: mend it"
    assert str(InputError("x" * 400)) == "x" * 400
    assert len(str(InputError("\x1b" * 10**6))) <= 1000


def test_messages_lose_their_middle():
    words = " ".join(map(str, range(1000)))
    shown = str(InputError(words))
    assert len(shown) <= 1000 and shown.startswith("0 1 2") and shown.endswith("998 999")
    assert len(str(InputError("a b " * 10**7))) <= 1000
    assert str(InputError("a " * 499 + "b")) == "a " * 499 + "b"


def test_what_is_said_beside_results_is_printed_in_one_place():
    """`errors.remark` escapes the names of files; the command's own end is in `cli.main`."""
    root = Path(errors.__file__).parent
    allowed = {"errors.py", "__main__.py", "cli/main.py", "training/metric_log.py"}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name not in allowed and not name.startswith("cli/app/"):
            assert "sys.stderr" not in path.read_text(), name


def test_names_of_outputs_are_escaped_in_remarks(tmp_path, monkeypatch, capsys):
    """A byte order mark in the name of a folder, in the line about clipped numbers."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save("x.png")
    assert main(["corrupt", "x.png", "--noise", "0.3", "--out", "\ufeffx.png"]) == 0
    said = capsys.readouterr().err
    assert "were clipped" in said and "\\ufeffx" in said and "\ufeff" not in said
