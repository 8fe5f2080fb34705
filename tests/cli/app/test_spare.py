"""The process that has made the imports already: its exit codes, messages and ends."""

import subprocess

import pytest
from PIL import Image

from unmurk.cli.app.jobs import Job, environment
from unmurk.cli.app.spare import Spare
from unmurk.errors import InputError


@pytest.fixture
def spare():
    spare = Spare(environment())
    yield spare
    spare.close()
    spare.ready()
    assert spare._waiting is None  # a closed one stays so


def waiting(spare):
    spare.ready()
    process = spare._waiting
    spare.ready()  # one is enough
    assert spare._waiting is process and process.poll() is None
    return process


@pytest.mark.slow
def test_a_waiting_process_becomes_the_command(spare, tmp_path):
    """With the exit code and the message of bad input, and the limit of pixels of the app."""
    Image.new("L", (40, 40)).save(tmp_path / "y.png")
    process = waiting(spare)
    job = Job(["noise", str(tmp_path / "y.png")], tmp_path, 1000, spare)
    assert job.process is process and spare._waiting is None
    with pytest.raises(InputError, match="y.png declares 40x40 pixels, the limit is 1000"):
        job.result()
    assert process.returncode == 2 and job.remarks()[-1].startswith("unmurk: ")
    assert spare.start(["noise", "x"], tmp_path / "x", tmp_path / "y", {}) is None


def test_a_process_that_waits_is_stopped_and_ends_with_the_app(spare, tmp_path):
    process = waiting(spare)
    job = Job(["noise", "digits"], tmp_path, 10**6, spare)  # while it imports
    assert job.process is process
    job.stop()
    with pytest.raises(InputError, match="stopped"):
        job.result()
    process = waiting(spare)
    process.kill()  # something else has ended it
    process.wait()
    assert spare.start(["noise", "digits"], tmp_path / "x", tmp_path / "y", {}) is None
    process = waiting(spare)
    spare.close()
    assert process.returncode is not None


ENDS = """
import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_what_is_stopped_is_stopped_whatever_its_exit_code(tmp_path, monkeypatch):
    """Python ends with 1 if it is interrupted while it starts."""
    started = subprocess.Popen

    def start(words, **options):
        return started([words[0], "-c", ENDS], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    job = Job(["noise", "digits"], tmp_path)
    while job.remarks() != ["ready"]:
        assert job.running
    job.stop()
    assert job.process.returncode == 1
    with pytest.raises(InputError, match="stopped"):
        job.result()


def test_without_a_process_that_waits_a_new_one_is_started(spare, tmp_path, monkeypatch):
    """The command line of the process is that of the user."""
    begun = []
    monkeypatch.setattr(subprocess, "Popen", lambda words, **options: begun.append(words))
    Job(["noise", "digits"], tmp_path, None, spare)
    assert begun[0][1:] == ["-P", "-m", "unmurk", "noise", "digits", "--json"]
