"""A slice of `make fuzz`: 300 cases of bad input, each refused in one line or taken as it should.

In a process of its own: its workers are forked, which a process with threads must not be.
"""

import subprocess
import sys
from pathlib import Path


def test_a_slice_of_the_fuzzer():
    """One that fails is run again, with its traceback, by the command in `tests.fuzz`."""
    argv = [sys.executable, "-m", "tests.fuzz", "--slice", "300"]
    root = Path(__file__).parents[1]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
