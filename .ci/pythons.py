"""Run the tests with every supported Python that is installed here.

    python .ci/pythons.py [ARGUMENTS OF PYTEST]

Each Python has a virtual environment of its own, such as `.venv-3.12`, with the packages of
constraints.txt. A Python is found as `python3.12` or among the versions of pyenv. One that is not
installed, or for which the pinned packages are not offered, is named in one line and left out.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

__all__: list[str] = []

ROOT = Path(__file__).parents[1]
TOOLS = ["-n", "auto", "--maxprocesses", "8", "--dist", "loadfile", "--no-loadscope-reorder"]


def supported() -> list[str]:
    """Return the versions that pyproject.toml names, such as 3.12."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [re.fullmatch(r".*:: Python :: (3\.\d+)", text) for text in project["classifiers"]]
    return [match[1] for match in found if match]


def runs(python: Path | str, version: str) -> bool:
    """Whether an interpreter starts and is of a version; a launcher of pyenv may do neither."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.strip() == version


def interpreter(version: str) -> Path | str | None:
    """Return the interpreter of a version; None where there is none."""
    known: list[Path | str] = [sys.executable]
    known += filter(None, [shutil.which(f"python{version}")])
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
        versions = Path(root.stdout.strip(), "versions")
        known += sorted(versions.glob(f"{version}.*/bin/python"), reverse=True)
    return next((python for python in known if runs(python, version)), None)


def environment(version: str, python: Path | str) -> Path | None:
    """Return the interpreter of the virtual environment, installed; None if pip cannot."""
    folder = ROOT / f".venv-{version}"
    own = folder / "bin" / "python"
    if not own.exists():
        print(f"pythons: making {folder.name} (some minutes, once)", flush=True)
        subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [own, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    pip += ["-c", "constraints.txt", "torch", "-e", ".[dev]"]
    done = subprocess.run(pip, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return own
    errors = re.findall(r"(?:ERROR|error): (.+)", done.stderr)
    why = errors[-1] if errors else f"pip ended with {done.returncode}"
    print(f"pythons: {version} is left out: {why}", flush=True)
    return None


def main() -> int:
    """Test with each version. Return 1 if the tests of one fail, or if there is none."""
    ends: dict[str, int] = {}
    for version in supported():
        python = interpreter(version)
        if python is None:
            print(f"pythons: {version} is left out: it is not installed", flush=True)
            continue
        own = environment(version, python)
        if own is not None:
            print(f"pythons: testing with {version}", flush=True)
            ends[version] = subprocess.call([own, "-m", "pytest", *TOOLS, *sys.argv[1:]], cwd=ROOT)
    for version, end in ends.items():
        print(f"pythons: {version}: {'passed' if end == 0 else 'failed'}")
    return int(not ends or any(ends.values()))


if __name__ == "__main__":
    sys.exit(main())
