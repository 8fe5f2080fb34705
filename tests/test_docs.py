"""The documentation: its snippets run, its commands parse, its links and names exist.

A page is a script: its ```python blocks and notebook cells run one after the other, in a folder of
their own. Hidden preparation stands in comments that begin with ``<!-- test``. Of the ```console
blocks every ``$ unmurk`` line goes through the real parser, and runs too if the block is preceded
by ``<!-- run -->``. Solving is cut to two steps, learning to 100 images (KIMG), and in notebook
cells other budgets are cut too (BUDGETS); ``make docs-full`` runs them whole.
"""

import doctest
import importlib
import json
import pkgutil
import re
import shlex
import statistics
from pathlib import Path

import pytest

import unmurk

pytestmark = pytest.mark.usefixtures("registries")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"_build", "gallery", "generated", "jupyter_execute"}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"] + sorted(
    page for page in DOCS.rglob("*.md") if not GENERATED & set(page.relative_to(DOCS).parts)
)
BLOCK = re.compile(
    r"<!-- test\n(?P<hidden>.*?)-->"
    r"|(?P<mark><!-- run -->\s*\n)?"
    r"^(?P<fence>`{3,})(?P<kind>\{code-cell\}|python|console|shell)[^\n]*\n(?P<body>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
KIMG = re.compile(r"\bkimg=([\d.]+)")
BUDGETS = [
    (r"\blimit=\d{3,}", "limit=64"),
    (r"\"nuclei\"\)\.images", '"nuclei").images[:24]'),
    (r"\bsteps=\d+", "steps=4"),
    (r"\bsamples=\d+", "samples=2"),
    (r'method="snips",', 'method="snips", steps=6,'),
]


def name(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """Kind (hidden, python, cell, console, run or shell) and text of each block of a page."""
    for match in BLOCK.finditer(page.read_text()):
        if match["hidden"] is not None:
            yield "hidden", match["hidden"]
        elif match["kind"] == "{code-cell}":
            body = re.sub(r"\A(?::[^\n]*\n)+\n?", "", match["body"])
            for pattern, short in BUDGETS:
                body = re.sub(pattern, short, body)
            yield "cell", shortened(body)
        elif match["kind"] == "python":
            yield "python", shortened(match["body"])
        else:
            yield ("run" if match["mark"] else match["kind"]), match["body"]


def shortened(code):
    """Code that learns from at most 100 images."""
    return KIMG.sub(lambda found: f"kimg={min(float(found[1]), 0.1)}", code)


def commands(text):
    """Arguments of every call of unmurk in a console or shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("$ ").split("  #")[0]
        found = re.search(r"(?:^|\s)(?:-m )?unmurk\s+((?:--)?[a-z].*)$", line)
        if found and not line.startswith("unmurk:"):
            yield shlex.split(found[1])


def code_of(page):
    """The page as one script; None where it has no code."""
    from unmurk.cli.main import main

    parts, shown = [], False
    for kind, text in blocks(page):
        if kind in ("hidden", "python", "cell"):
            parts.append(text)
            shown |= kind != "hidden"
        elif kind == "run":
            shown = True
            for args in commands(text):
                steps = [i + 1 for i, word in enumerate(args) if word == "--steps"]
                short = ["2" if i in steps else word for i, word in enumerate(args)]
                parts.append(f"assert __main({short!r}) == 0")
    return ("\n".join(parts), {"__name__": "__page__", "__main": main}) if shown else None


WITH_CODE = [
    page
    for page in PAGES
    if re.search(r"^```(python|\{code-cell\})|<!-- run", page.read_text(), re.M)
]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(DOCS)
    source, scope = code_of(page)
    exec(compile(source, name(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page):
    from unmurk.cli.main import _parse

    for kind, text in blocks(page):
        if kind not in ("console", "run", "shell"):
            continue
        for args in commands(text):
            assert args[0].startswith("--") or not isinstance(_parse(args), int), args


def links(page):
    text = re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    yield from re.findall(r"\]\(([^()\s]+)\)", text)
    yield from re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = page.parent / target if target else page
        assert file.exists(), link
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_wraps_at_100_characters(page):
    """Tables, code, formulas, HTML, pictures and what cannot be broken may be longer."""
    text = re.sub(r"^(```|\$\$).*?\1$", "", page.read_text(), flags=re.M | re.S)
    free = re.compile(r"\s*(\||<|\$\$|!\[|#)|\S+$")
    long = [line for line in text.splitlines() if len(line) > 100 and not free.match(line)]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_is_a_comment_of_the_site(page):
    """MyST leaves out lines that begin with %, such as the rest of a sentence after a number."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S)
    assert not [line for line in text.splitlines() if re.match(r" *%", line)]


def anchors(text):
    """The anchors of the headings of a page, as MyST and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain} | set(
        re.findall(r"^\(([\w-]+)\)=$", text, re.M)
    )


def test_pages_that_the_code_names_exist():
    for path in (ROOT / "unmurk").rglob("*"):
        if path.suffix in {".py", ".jinja", ".md"}:
            for page in re.findall(r"\bdocs/[\w/]+\.md", path.read_text()):
                assert (ROOT / page).exists(), f"{path} names {page}"


NO_ATTRIBUTES = {"unmurk.jsonl", "unmurk.readers", "unmurk.learners", "unmurk.no_such_group"}
"""A file, and groups of entry points."""


def test_dotted_names_of_the_pages_work_after_one_import():
    """In prose, code and links of all pages, and in the docstrings of the package."""
    sources = [*PAGES, *(ROOT / "unmurk").rglob("*.py")]
    found = {
        (dotted, name(page))
        for page in sources
        for dotted in re.findall(r"\bunmurk(?:\.[A-Za-z_]\w*)+", page.read_text())
        if dotted not in NO_ATTRIBUTES
    }
    assert ("unmurk.solvers.restoration.solve", "docs/api/index.md") in found
    wrong = []
    for dotted, page in sorted(found):
        value = unmurk
        for part in dotted.split(".")[1:]:
            value = getattr(value, part, None)
        if value is None:
            wrong.append(f"{page}: {dotted}")
    assert not wrong, wrong


def test_tests_that_the_pages_name_exist():
    tests = {
        path.relative_to(ROOT / "tests").with_suffix("").as_posix(): path.read_text()
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    for page in PAGES:
        for file, test in re.findall(r"`((?:\w+/)*test_\w+)(?:::(\w+))?`", page.read_text()):
            assert file in tests, f"{name(page)} names {file}"
            assert not test or f"def test_{test}(" in tests[file], f"{name(page)}: {file}::{test}"


def test_figures_of_the_readme_are_those_of_the_results():
    sets = json.loads((ROOT / "benchmarks/results/learn-small.json").read_text())["sets"]
    text = (ROOT / "README.md").read_text()
    for method in ("em", "ambient", "flowdiff", "clean"):
        found = [
            f"{sets[name]['rows'][method]['posterior_psnr']:.2f}" for name in ("digits", "nuclei")
        ]
        assert re.search(
            rf"\|[^|\n]*{method}[^|\n]*\|\W*{found[0]}\W*\|\W*{found[1]}\W*\|", text
        ), method


TASKS = ("deblur", "inpaint")


def test_figures_of_the_first_pages_are_those_of_the_results():
    """The front page and the page for reviewers: decibels and certification, as measured."""
    read = {
        name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        for name in ("captures", "learn-small", "learn-long", "certify")
    }
    results = read["captures"]["results"]

    def scores(row: str, score: str = "psnr", folds: range = range(4)) -> list[float]:
        name, _, learned = row.partition("|")
        keys = [f"fmd-{name}-{fold}" + f"-{learned}-0" * bool(learned) for fold in folds]
        return [value for key in keys for value in results[key][score]]

    def middle(row: str, score: str = "psnr", folds: range = range(4)) -> str:
        return f"{statistics.median(scores(row, score, folds)):.2f}"

    mine, rival, last = "flowdiff_generic|5min", "bm3d_anscombe", range(3, 4)
    front, method, readme = (
        " ".join((ROOT / name).read_text().split())
        for name in ("docs/index.md", "docs/start/method.md", "README.md")
    )
    best, bm3d, none = middle(mine), middle(rival), middle("generic")
    assert f"from {middle('capture')} to {best} dB; BM3D reaches {bm3d} dB" in front
    assert f"restores to {best} dB after five minutes, and BM3D to {bm3d}; without" in readme
    assert f"without learning, `generic` reaches {none}" in readme
    text = f"{best} dB; BM3D with the Anscombe transform {bm3d}, non-local means "
    assert text + f"{middle('nlm_anscombe')}, the capture {middle('capture')}." in method
    gaps = [a - b for a, b in zip(scores(mine), scores(rival), strict=True)]
    assert len(gaps) == 16
    error = statistics.stdev(gaps) / 4
    text = f"it is {statistics.mean(gaps):.2f} dB above BM3D on average, with a standard error of "
    assert text + f"{error:.2f}" in method
    text = f"now `flowdiff` after five minutes is {statistics.mean(gaps):.2f} dB above BM3D "
    changes = " ".join((ROOT / "CHANGELOG.md").read_text().split())
    assert text + f"(standard error {error:.2f}, sixteen fields)" in changes
    late = scores("flowdiff_generic|15min", "psnr", last)
    later = statistics.median(late) - statistics.median(scores(rival, "psnr", last))
    assert f"on four of the fields, it is {later:.2f} dB above BM3D" in method
    assert f"reaches {none}. The 90 % intervals of the bright parts hold" in method
    held = statistics.median(scores(mine, "coverage"))
    assert f"of the bright parts hold {held:.0%}".replace("%", " %") in method
    checking = (ROOT / "docs/guide/checking.md").read_text()
    assert f"{held:.0%} in the bright parts of [real".replace("%", " %") in checking
    assert f"intervals hold {held:.0%} of the bright parts".replace("%", " %") in changes
    text = f"({middle(mine, 'published')}, BM3D {middle(rival, 'published')}). On four of the "
    text += f"fields Noise2Void reaches {middle('noise2void|5min', 'psnr', last)} dB after five "
    text += f"minutes, and `flowdiff` {middle('flowdiff|2min', 'psnr', last)} from nothing and "
    text += f"{middle('flowdiff_generic|2min', 'psnr', last)} from `generic` after two"
    assert text in method
    guide = " ".join((ROOT / "docs/guide/learners.md").read_text().split())
    text = f"repeated captures {middle('flowdiff_repeats|2min', 'psnr', last)} dB, single ones "
    assert text + middle("flowdiff|2min", "psnr", last) in guide

    rows = ("flowdiff_generic-3-2min-0", "bm3d_anscombe-3", "capture-3")
    ours, theirs, noisy = (results[f"nuclei-{row}"]["psnr"] for row in rows)
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    text = "{:.2f} dB after two minutes from `generic`, BM3D {:.2f}, the capture {:.2f}; field by "
    text = text.format(*map(statistics.median, (ours, theirs, noisy)))
    text += f"field {statistics.mean(gaps):.2f} dB above BM3D (standard error "
    assert text + f"{statistics.stdev(gaps) / 4:.2f})" in method

    digits, nuclei = (read["learn-small"]["sets"][name]["rows"] for name in ("digits", "nuclei"))
    psnr = {key: f"{row['posterior_psnr']:.2f}" for key, row in digits.items()}
    both = [f"{nuclei[key]['posterior_psnr']:.2f}" for key in ("flowdiff", "clean")]
    ours, clean, start = psnr["flowdiff"], psnr["clean"], psnr["mean"]
    started = psnr["flowdiff_generic"], f"{nuclei['flowdiff_generic']['posterior_psnr']:.2f}"
    assert f"drawings | **{started[0]}** | **{started[1]}** |" in readme
    assert f"in the same time: {started[0]} and {started[1]} dB" in method
    frechet = [digits[key]["prior_frechet"] for key in ("flowdiff_generic", "flowdiff")]
    assert "(Fréchet distance {:.1f}, {:.1f} from nothing)".format(*frechet) in method
    assert f"{ours} dB (learned from clean images: {clean})" in method
    assert f"{both[0]} ({both[1]})" in method and f"{psnr['elbo']} dB on digits" in method
    rows = (digits["mean"], digits["flowdiff"])
    columns = ("ssim", "coverage", "prior_frechet")
    alike, covered, apart = ([row[key] for row in rows] for key in columns)
    text = f"reaches {start} dB on digits**, with SSIM {alike[0]:.2f} against {alike[1]:.2f} and "
    text += (
        f"coverage of 90 % intervals {covered[0]:.2f} against {covered[1]:.2f}; its new digits "
    )
    text += f"are nearer to real ones (Fréchet distance {apart[0]:.1f} against {apart[1]:.1f})"
    assert text in method
    assert f"alone | {start}" in readme
    tasks = [[digits[key]["downstream"][task] for key in ("flowdiff", "clean")] for task in TASKS]
    text = (
        "deblurring: {:.2f} dB, with the prior from clean images {:.2f}; a hole: {:.2f} and {:.2f}"
    )
    assert text.format(*tasks[0], *tasks[1]) in method

    long = {name: part["rows"] for name, part in read["learn-long"]["sets"].items()}

    def means(name: str, form: str) -> str:
        rows = long[name]
        return form.format(*(rows[row]["posterior_psnr"] for row in ("flowdiff", "clean")))

    text = means("digits", "digits {:.2f} dB ({:.2f}), ")
    text += means("nuclei", "nuclei {:.2f} ({:.2f}), ")
    text += means("dogs-masks", "masked dogs {:.2f} ({:.2f}), ")
    text += means("dogs-blur", "blurred dogs {:.2f} ({:.2f}); ")
    apart = [long["dogs-blur"][row]["posterior_psnr"] for row in ("clean", "flowdiff")]
    assert f"it is {apart[0] - apart[1]:.2f} dB behind a run on clean dogs of eight" in changes
    pair = ("flowdiff", "diffem")
    blur, masks = ([long[f"dogs-{kind}"][row] for row in pair] for kind in ("blur", "masks"))
    apart = [blur[0]["posterior_psnr"] - blur[1]["posterior_psnr"]]
    apart += [row["posterior_psnr"] for row in masks]
    apart += [row[f"{of}_swd"] for of in ("posterior", "prior") for row in reversed(masks)]
    told = "{:.1f} dB above that on blurred dogs, but level on masked dogs ({:.2f}, {:.2f} dB), "
    told += "where the posterior samples of `em` are nearer to real images (SWD {:.3f}, {:.3f}), "
    told += "and its new images further ({:.3f}, {:.3f})"
    assert told.format(*apart) in method
    digits = long["digits"]
    apart = [digits[row]["prior_frechet"] for row in ("flowdiff", "clean", "ambient")]
    text += "Fréchet distance of new digits {:.1f} ({:.1f}); ".format(*apart)
    text += f"`ambient` on digits {digits['ambient']['posterior_psnr']:.2f} dB, {apart[2]:.1f}."
    assert text in method
    ours, theirs = (digits[row]["downstream"] for row in ("flowdiff", "clean"))
    behind = statistics.mean(theirs[task] - ours[task] for task in ours)
    assert f"the prior of digits is {behind:.2f} dB behind that from clean images" in method
    assert means("digits", "digits have {:.2f} dB (25.10; from clean images {:.2f})") in changes
    assert means("nuclei", "nuclei {:.2f} (31.97; {:.2f})") in changes

    earned = [(row["solver"], row["earned"]) for row in read["certify"]["rows"]]
    of = len([one for one, _ in earned if one == "snips"])
    assert earned.count(("snips", "posterior")) == earned.count(("red-diff", "point")) == of
    assert f"`snips` on all {of} exact problems" in method and f"on all {of}, most" in method


@pytest.mark.presets
def test_doctests(tmp_path, monkeypatch):
    """Every example in a docstring prints what it says."""
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder, runner = (
        doctest.DocTestFinder(),
        doctest.DocTestRunner(verbose=False, optionflags=flags),
    )
    for found in pkgutil.walk_packages(unmurk.__path__, "unmurk."):
        if found.name.endswith("__main__"):
            continue
        for test in finder.find(importlib.import_module(found.name)):
            if test.examples:
                runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


WITHOUT_EXAMPLE = {
    "download",  # fetches weights
    "inception_features",
    "lpips",
    *("Czi", "Lif", "Nd2", "OmeZarr"),  # need a file of a microscope
}


def test_every_public_object_of_the_library_has_an_example():
    missing = set()
    for found in pkgutil.walk_packages(unmurk.__path__, "unmurk."):
        if found.name.startswith("unmurk.cli") or found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            own = getattr(thing, "__module__", "") == found.name
            if own and callable(thing) and ">>>" not in (thing.__doc__ or ""):
                missing.add(public)
    assert missing == WITHOUT_EXAMPLE


def test_pages_that_fetch_are_noticed(monkeypatch):
    """The builds of the site, whose warnings are errors, call this for every page."""
    monkeypatch.syspath_prepend(DOCS / "_ext")
    pytest.importorskip("sphinx", reason="the documentation needs unmurk[docs]")
    from offline import fetched

    own = (
        '<img src="_images/a.png"><a href="https://arxiv.org"><link rel="canonical" href="//a.b">'
    )
    assert fetched(own) == []
    others = ['<script async src="https://a.b/c.js', "<link href='//a.b/c.css"]
    assert fetched("\n".join(f'{tag}">' for tag in others)) == others


MODULE = '''
__all__ = ["Limit", "MOST", "UNSAID", "f", "other"]
from elsewhere import other
MOST: int = 3
"""The largest number."""
UNSAID = 4
HIDDEN = 5
"""It is not public."""
class Limit: ...
def f(): ...
'''


def test_the_api_pages_hold_classes_functions_and_documented_constants(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_ext")
    pytest.importorskip("sphinx", reason="the documentation needs unmurk[docs]")
    import apipages

    file = tmp_path / "module.py"
    file.write_text(MODULE)
    found = apipages.defined(file, apipages.public(file))
    assert found == {"Limit": "autoclass", "MOST": "autodata", "f": "autofunction"}
    page = apipages.page("module", found).splitlines()
    assert page[page.index(".. autodata:: MOST") + 1] == "   :no-value:"
