"""Run the tests with the lowest versions that pyproject.toml allows.

    python .ci/lowest.py [ARGUMENTS OF PYTEST]

The virtual environment `.venv-lowest` receives the lowest version of every dependency. Where an
index does not offer the lowest torch, or not for this Python, the script takes the pinned one of
constraints.txt and says so. The documentation tools are left out. Old packages that warn of what
newer ones have deprecated are not at fault, so these warnings are no errors here.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

__all__: list[str] = []

ROOT = Path(__file__).parents[1]
ENV = ROOT / ".venv-lowest"
PYTHON = ENV / "bin" / "python"
BOUND = re.compile(r"^([A-Za-z0-9_.-]+)\s*>=\s*([0-9][^,;\s]*)")


def lower_bounds() -> dict[str, str]:
    """Return name and lowest version of the dependencies and of the test tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return {found[1]: found[2] for found in map(BOUND.match, listed) if found}


def pinned(name: str) -> str:
    """Return the version of a package in constraints.txt."""
    found = re.search(rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"lowest: constraints.txt does not pin {name}: add it")
    return found[1]


def pip(*arguments: str) -> int:
    """Run pip in the environment. Return its exit code."""
    quiet = ["-qq", "--disable-pip-version-check"]
    return subprocess.call([PYTHON, "-m", "pip", "install", *quiet, *arguments], cwd=ROOT)


def main() -> int:
    """Install, and run pytest. Return its exit code."""
    lowest = lower_bounds()
    if not PYTHON.exists():
        print(f"lowest: making {ENV.name} (some minutes, once)")
        venv.create(ENV, with_pip=True)
    if pip(f"torch=={lowest['torch']}"):
        print(f"lowest: torch {lowest['torch']} is not offered: taking {pinned('torch')}")
        lowest["torch"] = pinned("torch")
        if pip(f"torch=={lowest['torch']}"):
            return 1
    versions = [f"{name}=={version}" for name, version in lowest.items() if name != "torch"]
    if pip(*versions, f"torch=={lowest['torch']}"):
        print("lowest: these versions do not fit together: raise the bound that pip names")
        return 1
    if pip("--no-deps", "-e", "."):
        return 1
    command = [PYTHON, "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
    command += ["--no-loadscope-reorder", "-W", "ignore::DeprecationWarning"]
    return subprocess.call([*command, *sys.argv[1:]], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
