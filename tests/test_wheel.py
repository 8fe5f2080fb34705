"""The wheel: it builds, holds data, models and licenses, and works where it is unpacked."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build", reason="the wheel is built with unmurk[dev]")
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, place)
    copytree(ROOT / "unmurk", place / "unmurk", ignore=ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        place,
        place,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(place.glob("*.whl"))


@pytest.mark.slow
def test_it_holds_every_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "unmurk").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= held
    assert not [
        name for name in held if name.split("/")[0] not in {"unmurk"} and "dist-info" not in name
    ]


@pytest.mark.slow
def test_its_metadata_say_what_it_is_and_who_may_use_it(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["License-Expression"] == "MIT AND CC-BY-SA-3.0 AND CC0-1.0"
    assert "unmurk/assets/digits/README.md" in metadata.get_all("License-File")
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier")
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"docs", "dev", "inception"} <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.slow
def test_it_works_where_it_is_unpacked(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, 'site'); import unmurk; assert 'site' in unmurk.__file__\n"
        "print(unmurk.Prior.load('digits').sample(2, steps=2).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["torch.Size([2,", "1,", "28,", "28])"], done.stderr[-2000:]
