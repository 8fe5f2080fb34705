"""Commands that are killed, or interrupted, and given again: the same files, and no other one."""

import os
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.survive_commands import run as benchmark
from tests import programs
from unmurk import InputError
from unmurk.cli.main import main

COMMANDS = ("corrupt", "sample", "restore", "solve")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_and_interrupted_it_ends_as_if_nothing_had_happened(command, tmp_path, monkeypatch):
    """The benchmark of survival with 2 kills and 2 interrupts."""
    monkeypatch.setattr("benchmarks.common.subprocess", programs)
    found = benchmark.survive(command, tmp_path, kills=2)
    assert found.pop("command") == command
    assert found.pop("kills") == 2 and found.pop("interrupts") == 2
    assert all(found.values()), found


WATCHED = ("unmurk/io/atomic.py", "unmurk/io/locks.py", "unmurk/io/outputs.py", "contextlib.py")


def interrupted_at(moment, argv):
    """Run a command with Ctrl-C at that instruction of the code that makes, names and removes
    files; return the exit code and the number of such instructions."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGINT)
        return trace

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(trace)
    try:
        return main(argv), seen
    except KeyboardInterrupt:  # before the command took the signal over, or after it gave it back
        return 130, seen
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_between_any_two_instructions_leaves_no_stray_file(tmp_path, capsys):
    """The file is whole or absent, and neither a lock nor a partial file stays."""
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "in.png")

    def corrupt(out, moment=0):
        argv = ["corrupt", str(tmp_path / "in.png"), "--noise", "0.1", "--out", str(out)]
        return interrupted_at(moment, argv)

    code, count = corrupt(tmp_path / "whole.png")
    assert code == 0 and count > 500
    whole, codes = (tmp_path / "whole.png").read_bytes(), set()
    for moment in range(1, count, count // 80):
        out = tmp_path / str(moment) / "out.png"
        code, _ = corrupt(out, moment)
        codes.add(code)
        assert code in (0, 130) and not list(tmp_path.rglob(".unmurk-*")), (moment, code)
        assert out.read_bytes() == whole if out.exists() else code == 130, moment
    assert codes == {0, 130}
    assert "Traceback" not in capsys.readouterr().err


def turned(*_, **__):
    """Receive Ctrl-C and turn it into an error of its own, as compiled libraries do."""
    try:
        signal.raise_signal(signal.SIGINT)
        signal.sigpending()  # where Python runs the handler at the latest
    except KeyboardInterrupt:
        pass
    raise ValueError("could not determine the shape of the object")


@pytest.mark.parametrize(
    "target",
    [
        "safetensors.torch.load_file",
        "safetensors.safe_open",
        "PIL.Image.open",
        "PIL.ImageFile.ImageFile.load",
    ],
)
def test_an_interrupt_that_a_library_turns_into_an_error_is_an_interrupt(
    target, tmp_path, capsys, monkeypatch
):
    """Neither the prior nor an image is called damaged, and no image is left out."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "in" / f"{name}.png")
    argv = ["restore", str(tmp_path / "in"), "--prior", "digits", "--noise", "0.1", "--skip-bad"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(target, turned)
    try:
        assert main([*argv, "--out", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert "interrupted; the same command continues" in said and "shape of the object" not in said
    assert sorted(os.listdir(tmp_path)) == ["in"]
    with pytest.raises(InputError, match="damaged"):  # the interrupt is over
        raise InputError("damaged")
