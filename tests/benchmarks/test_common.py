"""The shared parts of the benchmarks: headers, rows, tables; and the published pages."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import common
from unmurk.errors import InputError

SUITES = sorted(path.parent.name for path in (common.ROOT / "benchmarks").glob("*/run.py"))
PUBLISHED = [
    *("ablation", "certify", "choice", "exact", "learn", "noise_estimation", "overhead"),
    *("captures", "generic", "solve", "speed", "streaming", "verdict"),
    *("survive", "survive_commands"),
]


def header(settings):
    """The header of a result, for tests of pages."""
    return {
        **{"suite": "toy", "command": "python benchmarks/toy/run.py", "settings": settings},
        **{"seed": 4, "commit": "c0ffee", "date": "2026-01-02"},
        "hardware": {"cpu": "Abacus", "threads": 2, "gpu": None},
        "software": {"torch": "2.9", "python": "3.11"},
    }


def suite(name):
    return importlib.import_module(f"benchmarks.{name}.run").SUITE


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_page_is_that_of_the_published_results(name):
    assert suite(name).page_file.read_text() == suite(name).render(suite(name).published())


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_has_a_template_and_published_suites_a_page(name):
    assert suite(name).name == name
    assert (common.ROOT / "benchmarks" / name / "page.md.jinja").exists()
    assert (suite(name).page is not None) == (name in PUBLISHED)


@pytest.mark.parametrize("file", sorted(common.RESULTS.glob("*.json")), ids=lambda f: f.stem)
def test_results_have_a_full_header(file):
    result = json.loads(file.read_text())
    assert list(result)[: len(header({}))] == list(header({}))
    made = suite(result["suite"]).header(common.CommonOptions(), {})
    assert list(made) == list(header({})) and result["command"].startswith(made["command"][:20])
    assert file.stem.startswith(result["suite"]) and len(result["commit"]) >= 40
    assert result["hardware"].keys() == made["hardware"].keys()
    assert result["software"].keys() == made["software"].keys()


def test_the_lines_of_the_published_pages_are_short():
    for name in PUBLISHED:
        for line in suite(name).page_file.read_text().splitlines():
            assert len(line) <= 100 or line.startswith(("|", "!["))


def test_prose_is_wrapped_and_tables_are_not():
    text = "- a " + "word " * 30 + "1. end\n- b\n\n| " + "x " * 60 + "|"
    lines = common._fill(text).splitlines()
    assert max(map(len, lines[:-1])) <= 98 and lines[-1] == "| " + "x " * 60 + "|"
    assert lines[1].startswith("  word") and "- b" in lines
    assert not any(line.strip().startswith("1.") for line in lines)
    for count in range(1, 12):  # wherever the line ends, "%" stays with its number
        text = "word " * 15 + "x" * count + " is up to 7 % or 8 %, at most 9 %."
        assert not any(line.startswith("%") for line in common._fill(text).splitlines())


def test_tables_from_lines():
    lines = [{"a": 1}, {"a": 2, "b": "x"}]
    assert common.tabulate(lines) == "| a | b |\n| --- | ---: |\n| 1 |  |\n| 2 | x |"
    columns = (common.Column("A", "a", "{:.1f}"), common.Column("B", "b"))
    assert common.cells([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2}], columns) == {"A": "3.0"}


def test_the_note_of_a_result_is_on_its_page():
    result = header({"repeats": 2}) | {"ratios": {}, "note": "Made before."}
    result["settings"] |= {"steps": 2, "steps_of": {}, "images": 1, "noise": 0.1, "prior": "x"}
    assert "**Note.** Made before." in suite("overhead").render([result])


def test_rows_of_other_settings_are_refused(tmp_path):
    file = tmp_path / "row.json"
    assert common.read_row(file) is None
    common.write_json(file, {"settings": {"sizes": (1, 2)}})
    assert common.read_row(file, {"sizes": (1, 2)}) is not None
    with pytest.raises(InputError, match="made with other settings: give another --out"):
        common.read_row(file, {"sizes": (1, 3)})


def test_a_stored_row_is_not_made_again(tmp_path, capsys):
    file, made = tmp_path / "row.json", []

    def make():
        made.append(1)
        return {"psnr": 3.0}

    for _ in range(2):
        assert common.stored_row(file, make, {"seed": 0}) == {"psnr": 3.0}
    assert len(made) == 1 and json.loads(file.read_text())["settings"] == {"seed": 0}
    assert capsys.readouterr().err == "{'psnr': 3.0}\n"
    with pytest.raises(InputError, match="other settings"):
        common.stored_row(file, make, {"seed": 1})


def double(number, options):
    Path(options, f"{number}.txt").write_text(str(2 * number))
    return {"row": number}


@pytest.mark.slow
def test_rows_run_in_new_processes(tmp_path, capsys):
    rows = common.run_rows(double, [0, 1, 2], str(tmp_path), 1, "toy: ")
    assert rows == [{"row": 0}, {"row": 1}, {"row": 2}]
    assert (tmp_path / "2.txt").read_text() == "4"
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in said] == ["toy: 1/3", "toy: 2/3", "toy: 3/3"]
