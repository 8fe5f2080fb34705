"""What the page of the app does by itself."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from tests.cli.app.processes import Popen
from unmurk.cli.app.guard import SESSION
from unmurk.cli.app.runs import Progress, Runs
from unmurk.cli.app.tabs import learn_tab

SKIPPED = "left as it is"


@pytest.fixture
def process():
    return Popen


@pytest.fixture
def tick(desk):
    """What the page asks every two seconds: the chosen run to (run, progress, pictures)."""
    gr = MagicMock()  # the real one is for the browser tests
    gr.update, gr.skip = dict, lambda: SKIPPED
    learn_tab(desk, gr, MagicMock(), MagicMock())
    asked = gr.Timer.return_value.tick.call_args.args[0]
    return lambda run: asked(run, SimpleNamespace(headers={SESSION: "A" * 32}))


@pytest.mark.parametrize("busy", ["", "second"])
def test_a_page_that_shows_no_run_takes_the_one_that_is_learning(busy, tick, monkeypatch):
    names = ["first", "second", "third"]
    monkeypatch.setattr(Runs, "names", lambda self: names)
    monkeypatch.setattr(
        Runs, "progress", lambda self, name: Progress(name, 2.0, 20.0, running=name == busy)
    )
    run, progress, picture = tick(None)
    assert progress == picture == ""
    if not busy:
        assert run == SKIPPED
        return
    assert run["value"] == "second" and run["choices"] == names
    run, progress, _ = tick("second")
    assert run == SKIPPED and "second is learning: 10%" in progress
