"""The wheel: it builds, holds data, models and licenses, and works where it is unpacked."""

import importlib.util
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
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
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
    text = metadata.get_payload()  # what a package index shows
    assert "Restore scientific images" in text and "unmurk learn my-captures/" in text
    assert "](" not in text and "<!--" not in text  # no link that leads nowhere


def test_links_of_the_description_lead_to_the_tagged_source():
    spec = importlib.util.spec_from_file_location("unmurk_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    text = "<!-- test -->\n![a\nb](docs/a.png) [c](docs/c.md), [d](https://d.org), [e](#e)"
    home = "https://example.org/unmurk"
    assert setup.description(text, home, "1.2.0") == (
        f"![a\nb]({home}/raw/v1.2.0/docs/a.png) [c]({home}/blob/v1.2.0/docs/c.md), "
        "[d](https://d.org), [e](#e)"
    )
    text = "<!-- test -->\n![a\nb](docs/a.png)\n\n*A\ncaption*\n\n"
    text += "It\n([see](docs/s.md)) [c](docs/c.md), [e](#e)"
    assert setup.description(text, "", "1.2.0") == "It c, [e](#e)"


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
