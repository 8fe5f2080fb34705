"""The documentation site builds without a warning, executing and fetching nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the documentation needs unmurk[docs]")
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """As `make docs`, but with Sphinx's plainest theme and without an index.

    The menus that furo computes for every page take time and hold no text that could be wrong.
    """
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-D", "html_theme=basic", "-D", "html_use_index=0", "-D", "html_domain_indices=0"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<math" in (tmp_path / "site" / "theory" / "measurement.html").read_text()
