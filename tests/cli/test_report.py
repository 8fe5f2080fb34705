"""Pages: what is on them, that they need nothing else, and that they are written whole."""

import base64
import hashlib
import io
import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from unmurk.cli import charts, report, run_page
from unmurk.errors import InputError
from unmurk.evaluation.verdict import Figure, Verdict

pytestmark = pytest.mark.pages


class Page(HTMLParser):
    """The tags of a page, balanced, and the images in it."""

    VOID = {"meta", "link", "img", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            uri = dict(attrs)["src"]
            assert uri.startswith("data:image/png;base64,")
            png = base64.b64decode(uri.partition(",")[2], validate=True)
            self.images.append(np.asarray(Image.open(io.BytesIO(png))))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())


@pytest.fixture
def page(tmp_path):
    def make(*sections, **more):
        path = report.write(tmp_path / "page.html", "A title", sections, **more)
        return Page(path.read_text())

    return make


def comparison(image, **more):
    maps = {report.Column("deviation", "each", "magma"): image / 5}
    return report.Comparison("cells.tif", image, image / 2, maps, **more)


def every_section():
    image = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    curves = {"first": ([1, 2, 3], [1.0, 10.0, 100.0]), "second": ([1, 2], [3.0, math.nan])}
    return [
        report.Text("Words", ["One paragraph.", "Another."]),
        report.Numbers("", {"PSNR": 24.913}),
        report.Table("Scores", ["method", "dB"], [["a", 1.5], ["b", None]], "A caption."),
        report.Images("Pictures", [[image, None]], ["x", "y"], ["row"]),
        report.Comparisons("Both", [comparison(image)]),
        charts.Curves("Course", curves, x="step", y="loss", log_x=True, log_y=True),
        charts.Panels("Small", [charts.Curves(f"c{i}", curves, smooth=True) for i in range(3)]),
    ]


def test_a_page_asks_for_nothing(page, tmp_path):
    tags = page(*every_section(), subtitle="below").tags
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?://(?!www\.w3\.org)|//[a-z]+\.|@import|<script.*src", text)
    outside = [
        value for _, a in tags for k, value in a.items() if k in ("src", "href", "xlink:href")
    ]
    assert outside
    assert all(value.startswith(("data:", "#")) for value in outside)
    assert {"iframe", "object"}.isdisjoint(tag for tag, _ in tags)
    policy = next(a["content"] for t, a in tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    assert "image-rendering: pixelated" in text
    assert any(a.get("name") == "viewport" for _, a in tags)


def test_the_policy_allows_only_the_script_of_the_page(page, tmp_path):
    page(report.Comparisons("", [comparison(torch.rand(1, 4, 6))]))
    text = (tmp_path / "page.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and text.count("<script") == 1
    page(report.Text("", "no script"))
    plain = (tmp_path / "page.html").read_text()
    assert "<script" not in plain and "script-src" not in plain


def test_a_comparison_shows_both_images_and_its_maps(page):
    image = torch.tensor([[[0.0, 1.0], [0.25, 0.5]]])
    shown = page(report.Comparisons("", [comparison(image, range=(0.0, 0.5))]))
    after, before, deviation = shown.images
    assert before.tolist() == [[0, 255], [128, 255]] and after.tolist() == [[0, 255], [64, 128]]
    assert deviation.shape == (2, 2, 3)
    (slider,) = [a for tag, a in shown.tags if tag == "input"]
    assert slider["type"] == "range" and "cells.tif" in slider["aria-label"]
    names = [a["alt"] for tag, a in shown.tags if tag == "img"]
    seen = [name.split(", values")[0] for name in names]
    what = ("restored", "measured", "deviation")
    assert seen == [f"cells.tif: {w}: 2 by 2 pixels" for w in what]
    spread = "mean 0.438, standard deviation 0.370"
    assert names[1].endswith(f"values from 0 to 1.00, {spread}")
    assert {"measured", "restored", "deviation"} <= set(shown.words)


def test_a_judgement_shows_sentence_advice_and_figures(page):
    passed = Figure("chi2", "chi-square", 1.004, (0.9, 1.15), True, "1 is right.")
    wrong = Figure("noise", "noise found", 2.1, (0.8, 1.25), False, "Also 1.", "too much", "check")
    bars = Figure("bars", "error bars", 0.0, None, True, "Known or not.")
    near = Figure("whiteness", "autocorrelation", 0.024, (0.0, 0.012), True, "0 is right.")
    verdict = Verdict(False, "Not trusted: too much.", (passed, wrong, bars, near), "check <it>")
    shown = page(report.Judgement("Trust?", verdict))
    marks = [a["aria-label"] for tag, a in shown.tags if a.get("class") == "mark"]
    assert marks == ["passed", "failed", "not known", "passed"]
    assert "Trusted: at most 0.012, give or take two standard errors." in shown.words
    assert {"Trust?", "Not trusted: too much.", "check <it>.", "1.00", "2.10", "no"} <= set(
        shown.words
    )
    assert {"1 is right.", "Also 1.", "Trusted: at least 0.900 and at most 1.15."} <= set(
        shown.words
    )
    kinds = [a["class"] for tag, a in shown.tags if a.get("class") in ("passed", "failed")]
    assert kinds == ["passed", "failed", "passed", "passed"]


def test_a_page_is_the_same_every_time(tmp_path):
    texts = [
        report.write(tmp_path / name, "t", every_section()).read_bytes() for name in ("a", "b")
    ]
    assert texts[0] == texts[1]


def test_identifiers_are_unique(page):
    found = [a["id"] for _, a in page(*every_section()).tags if "id" in a]
    assert len(found) == len(set(found)) > 0


def test_words_are_escaped_unless_marked(page, tmp_path):
    from markupsafe import Markup

    words = page(
        report.Text("<b>", "a < b & <script>"),
        report.Text("", Markup("an <em>emphasis</em>")),
        report.Table("", ["<i>"], [["<u>"]]),
        charts.Curves("<s>", {"<q>": ([1], [1]), "r": ([1], [2])}, x="<x>"),
        subtitle="<sub>",
    ).words
    assert {"<b>", "a < b & <script>", "<i>", "<u>", "<s>", "<q>", "<x>", "<sub>"} <= set(words)
    assert "<em>emphasis</em>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "value, text",
    [
        (24.913, "24.91"),
        (0.93124, "0.931"),
        (-0.5, "\u22120.500"),
        (12345, "12\u202f345"),
        (2610.4, "2\u202f610"),
        (0.0, "0"),
        (1e-5, "1e\u221205"),
        (3.2e7, "3.2e+07"),
        (math.inf, "inf"),
        (None, ""),
        (True, "yes"),
        ("-a,b", "-a,b"),
        (np.float32(1.25), "1.25"),
    ],
)
def test_how_values_are_written(value, text):
    assert charts.figure_text(value) == text


def test_table_aligns_numbers_and_marks_the_best(page):
    rows = [["a", 20.0, 3.0, 1], ["b", 25.0, math.nan, None], ["c", 22.0, 1.0, 2]]
    best = {"dB": "max", "FD": "min"}
    tags = page(report.Table("t", ["m", "dB", "FD", "n"], rows, best=best)).tags
    kinds = [a["class"] for tag, a in tags if tag == "td"]
    assert kinds[:4] == ["", "number", "number", "number"]
    assert [i for i, kind in enumerate(kinds) if "best" in kind] == [5, 10]


def test_unit_images_are_exact_and_clipped(page):
    image = torch.tensor([[[0.0, 1.0, 0.5], [-1.0, 2.0, 100 / 255]]])
    (pixels,) = page(report.Images("", [[image]])).images
    assert pixels.tolist() == [[0, 255, 128], [0, 255, 100]]
    colour = torch.stack([torch.full((2, 2), v) for v in (0.0, 0.2, 1.0)])
    (pixels,) = page(report.Images("", [[colour]])).images
    assert pixels[0, 0].tolist() == [0, 51, 255]


def test_ranges_of_values(page):
    dim, bright = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]])
    expected = {
        "each": [[0, 255], [0, 255]],
        "shared": [[0, 64], [128, 255]],
        (0.0, 10.0): [[26, 51], [76, 128]],
        "unit": [[255, 255], [255, 255]],
    }
    for limits, pixels in expected.items():
        shown = page(report.Images("", [[dim], [bright]], [report.Column("c", limits)]))
        assert [image[0].tolist() for image in shown.images[:2]] == pixels
        ends = {"shared": ["1.00", "5.00"], (0.0, 10.0): ["0", "10.00"]}.get(limits, [])
        assert [w for w in shown.words if w in ("0", "1.00", "5.00", "10.00")] == ends
    (flat,) = page(report.Images("", [[dim * 0]], [report.Column("", "each")])).images
    assert flat.tolist() == [[0, 0]]


def test_colour_maps(page):
    import matplotlib

    deviation = torch.linspace(0, 0.4, 6).view(1, 2, 3)
    grid = [[deviation.repeat(3, 1, 1)]]
    shown = page(report.Images("", grid, [report.Column("std", "shared", "magma")]))
    magma = matplotlib.colormaps["magma"](np.linspace(0, 1, 6))[:, :3]
    difference = shown.images[0].reshape(6, 3) / 255 - magma
    assert np.abs(difference).max() < 0.01
    assert shown.images[1].shape == (1, 128, 3)


def test_curves_become_svg_in_the_colours_of_the_page(page, tmp_path):
    xs = torch.linspace(0, 1, 50)
    tags = page(charts.Curves("c", {"a": (xs, xs), "b": (xs, 1 - xs)}, x="time")).tags
    assert [a["class"] for tag, a in tags if tag == "svg"] == ["wide-only", "narrow"]
    text = (tmp_path / "page.html").read_text()
    drawing = text[text.index("<svg") : text.rindex("</svg>")]
    assert "time" in drawing
    assert {"var(--c0)", "var(--c1)", "var(--soft)"} <= set(re.findall(r"var\(--\w+\)", drawing))
    assert not re.search(r"#0[1-4]0[1-4]0\d", drawing)


def test_curves_without_a_positive_value_on_a_logarithmic_axis(page):
    page(charts.Curves("", {"a": ([0, 1], [0.0, -1.0]), "b": ([], [])}, log_x=True, log_y=True))


def test_running_mean():
    y = torch.arange(120.0).double()
    smooth = charts._running_mean(y)
    assert torch.allclose(smooth[2:-2], y[2:-2])
    assert smooth[0] == pytest.approx(1.0)
    gap = y.clone()
    gap[50] = math.nan
    assert charts._running_mean(gap)[50] == pytest.approx((48 + 49 + 51 + 52) / 4)


def test_write_is_atomic(tmp_path, monkeypatch):
    path = report.write(tmp_path / "new" / "page.html", "old", [])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        report.write(path, "new", [])
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


IMAGE = torch.zeros(1, 4, 4)
BAD = {
    "cells": (lambda: report.Table("t", ["a"], [[1, 2]]), "1 cells"),
    "sizes": (
        lambda: report.Comparisons("t", [report.Comparison("a", IMAGE, IMAGE[:, :2])]),
        "differ in size",
    ),
    "grid": (lambda: report.Images("t", [[IMAGE], []]), "one for each label"),
    "labels": (lambda: report.Images("t", [[IMAGE]], rows=["a", "b"]), "one for each label"),
    "channels": (lambda: report.Images("t", [[IMAGE[None]]]), "(C, H, W)"),
    "colour": (lambda: report.Images("t", [[IMAGE]], [report.Column("", "unit", "x")]), "'x'"),
    "lengths": (lambda: charts.Curves("t", {"a": ([1], [1, 2])}), "1 values of x for 2"),
    "picture": (lambda: report.Pictures("t", {"p": __file__}), "no PNG"),
    "no picture": (lambda: report.Pictures("t", {"p": "nowhere.png"}), "nowhere.png"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sections_get_one_line(name, tmp_path):
    make, says = BAD[name]
    with pytest.raises(InputError) as caught:
        report.write(tmp_path / "page.html", "t", [make()])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


# --- Runs ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    config = {"method": "flowdiff", "settings": {"kimg": 4.0, "compile": False}, "note": "<b>"}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"kimg": k / 10, "seconds": k, "loss/prior": 1 / k} for k in range(1, 101)]
    for line in lines[50:]:
        line |= {"loss/flow": -line["kimg"], "skipped": 0}
    lines[-1]["loss/flow"] = math.nan
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in lines))
    return folder


def test_run_report(run, tmp_path):
    picture = tmp_path / "some_digits.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(picture)
    path = run_page.run_report(run, [picture], sections=[report.Text("Extra", "words")])
    assert path == run / "report.html"
    page = Page(path.read_text())
    assert [a["aria-label"] for t, a in page.tags if t == "svg"] == [
        "loss/prior",
        "loss/flow",
    ]
    assert page.images[0].tolist() == np.arange(12).reshape(3, 4).tolist()
    assert {"digits", "flowdiff", "some digits", "Extra", "10\u202f000", "0:01:40"} <= set(
        page.words
    )
    assert {"settings.kimg", "4.0", "settings.compile", "false", "<b>"} <= set(page.words)
    assert "Constant throughout: skipped = 0." in page.words


def test_the_verdict_comes_after_the_images_and_in_the_subtitle(run):
    verdict = Verdict(False, "Not trusted: too short.", (), "learn longer")
    verdict.save(run)
    image = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = report.Comparisons("Images", [comparison(image)])
    words = Page(run_page.run_report(run, sections=[images]).read_text()).words
    places = [words.index(w) for w in ("Images", "Can the result be trusted?", "images seen")]
    assert places == sorted(places)
    assert "flowdiff · not trusted: see the verdict" in words and "learn longer." in words


def test_a_curve_has_a_gap_where_a_part_is_not_trained(run):
    points = [(k / 10, 1.0) for k in [*range(1, 11), *range(40, 51)]]
    xs, ys = run_page._parted(points)
    assert [x for x, y in zip(xs, ys, strict=True) if math.isnan(y)] == [2.5]
    assert [(x, y) for x, y in zip(xs, ys, strict=True) if not math.isnan(y)] == points
    assert run_page._parted(points[:1]) == ([0.1], [1.0])


def test_all_charts_of_a_run_have_the_same_axis(run):
    lines = run_page._read_metrics(run / "metrics.jsonl")
    (panels,) = run_page._course(lines)
    assert [chart.x_range for chart in panels.charts] == [(0.0, 10.0)] * 2


def test_settings_are_folded_and_commands_can_be_copied(run, tmp_path):
    page = Page(run_page.run_report(run).read_text())
    assert page.tags.count(("details", {})) == 1
    commands = report.Commands("Next", {"restore more": "unmurk restore a --out b"})
    words = Page(report.write(tmp_path / "p.html", "t", [commands]).read_text()).words
    assert "restore more unmurk restore a --out b" in " ".join(words)


def test_metrics_of_a_continued_run_are_taken_once(run):
    path = run / "metrics.jsonl"
    lines = [
        '{"kimg": 1, "a": 1}',
        '{"kimg": 2, "a": 2}',
        '{"kimg": 3, "a": 3}',
        '{"kimg": 2, "a": 20}',
        '{"kimg": 2, "b": 5}',
        '{"kimg": 4, "a": 4}',
        '{"kimg": 5, "a',
    ]
    path.write_text("\n".join(lines))
    assert run_page._read_metrics(path) == [
        {"kimg": 1.0, "a": 1},
        {"kimg": 2.0, "a": 20, "b": 5},
        {"kimg": 4.0, "a": 4},
    ]
    path.write_text("\n".join(lines[-1:] + lines[:2]))
    with pytest.raises(InputError, match="line 1"):
        run_page.run_report(run)


def test_a_run_that_has_just_begun(run):
    (run / "metrics.jsonl").write_text("")
    page = Page(run_page.run_report(run, path=run / "other.html").read_text())
    assert "images seen" in page.words
    (run / "metrics.jsonl").write_text('{"kimg": 1, "loss/prior": NaN}\n')
    run_page.run_report(run)


def test_the_weights_kept_are_said_and_not_drawn(run):
    taken = [(4, 1), (6, 1), (8, 0), (10, 0)]
    lines = [{"kimg": k, "check/gap": 1 / k, "check/kept": kept} for k, kept in taken]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = Page(run_page.run_report(run, path=run / "other.html").read_text())
    words = " ".join(page.words)
    assert f"those after {charts.figure_text(6000)} images" in words
    assert "check/gap" in words and "check/kept" not in words


def test_a_folder_that_holds_no_run(run, tmp_path):
    with pytest.raises(InputError, match="holds no run: config.json"):
        run_page.run_report(tmp_path)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"holds no run: metrics\.jsonl"):
        run_page.run_report(run)
    for text in ("{", "[1]", "3"):
        (run / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            run_page.run_report(run)
