"""The page of the app: its controls, and which action each of them starts.

Everything that depends on a file or a user goes through `markupsafe`: a file name is never HTML.
"""

import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ...errors import InputError
from .actions import Desk, Estimate, Images, Outcome
from .guard import SESSION
from .pictures import preview

__all__ = ["build", "follow"]

EMPTY = Markup("")
LENGTHS = [
    ("2 thousand images: a first look, a minute or two on two cores", 2.0),
    ("20 thousand: rough results", 20.0),
    ("100 thousand: good results (the default of the command line)", 100.0),
    ("400 thousand: the best, for hours", 400.0),
]
KINDS = [
    ("Fill a hole: paint over it", "hole"),
    ("Undo a blur", "blur"),
    ("Enlarge", "sr"),
]
OTHER = ("Another corruption, by its text form", "other")
METHODS = [
    ("red-diff: one best image", "red-diff"),
    ("auto: whatever fits the corruption and the number of answers", "auto"),
    ("snips: several possible answers, with right error bars", "snips"),
    ("pnp-dm: several possible answers", "pnp-dm"),
    ("diffpir: quick", "diffpir"),
    ("ddrm: quick, for blurs and holes", "ddrm"),
]
INTRO = """\
# unmurk

Restore images, and see how far the result can be trusted. Nothing leaves this computer. Each step
shows the command that does the same.
"""
BEHIND = """\
# unmurk

Restore images, and see how far the result can be trusted. Your files are kept on the computer that
runs this app, apart from those of others. Each step shows the command that does the same.
"""
WHERE = "## 1. Your images"
WHAT = "## 2. What to do with them"
RESTORE = """\
Remove noise in one pass, with an error bar for every pixel. Choose what is known about clean
images: a run that has learned from images like yours (next tab) is the best choice.
"""
LEARN = """\
Learn what clean images look like from your noisy ones alone. It takes minutes to hours, goes on
when you close this page, and can be stopped and continued. A few hundred images, or a few large
ones, are enough.
"""
SOLVE = """\
Undo another corruption with what was learned: fill holes, sharpen, enlarge. The images may be
noisy too, with the noise that is shown above.
"""


# -- pieces of text -------------------------------------------------------------------------------


def busy(text: str) -> Markup:
    """Return a line about work in progress."""
    return Markup('<p class="note busy" role="status">{}</p>').format(text + " …")


def failed(text: str) -> Markup:
    """Return a line about what went wrong."""
    return Markup('<p class="note wrong" role="alert">{}</p>').format(text)


def noted(text: str) -> Markup:
    """Return a line about a result."""
    return Markup('<p class="note" role="status">{}</p>').format(text)


def command(text: str) -> Markup:
    """Return a command to copy."""
    return Markup(
        '<p class="soft">The same on the command line:</p>'
        '<pre class="command"><code>{}</code></pre>'
    ).format(text)


def measured(found: Estimate) -> Markup:
    """Return the estimate of the noise."""
    kind = Markup('<li class="{}">{}</li>')
    items = Markup("").join(
        kind.format("wrong" if line.startswith("warning") else "", line) for line in found.lines()
    )
    return Markup('<ul class="estimate">{}</ul>{}').format(items, command(found.command))


def finished(outcome: Outcome) -> Markup:
    """Return the downloads and the page of a result."""
    link = Markup('<a class="file" href="results/{}/{}" download>{}</a>')
    files = Markup(" ").join(link.format(outcome.key, quote(n), n) for n in outcome.files[:40])
    rest = len(outcome.files) - 40
    if rest > 0:
        files += Markup(" and {} more in the archive").format(rest)
    said = Markup("").join(noted(line) for line in outcome.remarks)
    return Markup(
        '<p class="soft">Download, in the format and the range that came in:</p>'
        '<p class="files">{}</p>{}{}{}'
    ).format(files, said, command(outcome.command), frame(outcome.page))


def frame(page: str) -> Markup:
    """Return a page of a result in a frame, which grows with it."""
    return Markup(
        '<iframe class="page" src="{}" title="The images, before and after"></iframe>'
        '<p class="soft"><a href="{}" target="_blank">Open the page alone</a></p>'
    ).format(page, page)


# -- actions --------------------------------------------------------------------------------------


def follow(steps: Generator[str, None, Any]) -> Iterator[tuple[Markup, Any]]:
    """Iterate over lines about an action, each with None; the last one comes with its result.

    >>> def steps():
    ...     yield "Reading"
    ...     return 3
    >>> [result for _, result in follow(steps())]
    [None, 3]
    """
    try:
        while True:
            yield busy(next(steps)), None
    except StopIteration as end:
        yield EMPTY, end.value
    except InputError as error:
        yield failed(str(error)), None
    except Exception as error:  # a mistake of the app: its terminal has the details
        traceback.print_exc(file=sys.stderr)
        yield failed(f"the app failed ({type(error).__name__}): see its terminal"), None


def build(desk: Desk, gr: Any) -> Any:
    """Build the page.

    Args:
        desk: What the app does.
        gr: The module gradio.

    Returns:
        The `gradio.Blocks`.
    """
    with gr.Blocks(title="unmurk", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(INTRO if desk.local else BEHIND)
        images, estimate = gr.State(None), gr.State("")
        parts = _Images(desk, gr, images, estimate)
        gr.Markdown(WHAT)
        with gr.Tabs():
            with gr.Tab("Restore"):
                priors = [_restore(desk, gr, images, estimate)]
            with gr.Tab("Learn"):
                _learn(desk, gr, images, estimate)
            with gr.Tab("Other corruptions") as tab:
                priors.append(_solve(desk, gr, images, estimate, tab))
        _fill_priors(desk, gr, page, priors)
        page.unload(_leave(desk))
        parts.connect()
    return page


def session_of(desk: Desk, request: Any) -> Any:
    """Return the session of a request."""
    return desk.session(request.headers.get(SESSION, ""))


def _leave(desk: Desk) -> Callable[..., None]:
    import gradio as gr

    def leave(request: gr.Request) -> None:
        desk.sessions.tidy()

    return leave


def _fill_priors(desk: Desk, gr: Any, page: Any, priors: list[Any]) -> None:
    """Fill the menus of priors when the page is opened and whenever one is opened."""

    def listed(request: gr.Request) -> list[Any]:
        choices = desk.priors(session_of(desk, request))
        first = next((value for _, value in choices if value.startswith("run:")), None)
        return [gr.update(choices=choices, value=first)] * len(priors)

    def again(chosen: str | None, request: gr.Request) -> Any:
        choices = desk.priors(session_of(desk, request))
        kept = chosen if chosen in {value for _, value in choices} else None
        return gr.update(choices=choices, value=kept)

    page.load(listed, None, priors, api_visibility="private", show_progress="hidden")
    for menu in priors:
        menu.focus(again, menu, menu, api_visibility="private", show_progress="hidden")


class _Images:
    """The first part of the page: drop files or name a folder, and see the noise."""

    def __init__(self, desk: Desk, gr: Any, images: Any, estimate: Any) -> None:
        self.desk, self.gr, self.images, self.estimate = desk, gr, images, estimate
        limits = desk.sessions.limits
        gr.Markdown(WHERE)
        with gr.Row():
            with gr.Column():
                self.files = gr.File(
                    label="Image files",
                    file_count="multiple",
                    height=150,
                )
                gr.Markdown(
                    "TIFF, PNG, JPEG, FITS, DICOM, NIfTI, .npy and more. "
                    f"At most {limits.files} files and {limits.size / 2**20:.0f} MiB at once. "
                    "They are removed when the app ends, or after "
                    f"{limits.hours:g} hours without use.",
                    elem_classes="soft",
                )
            with gr.Column(visible=desk.local):
                self.path = gr.Textbox(
                    label="Or name a folder or a file on this computer",
                    placeholder="/home/me/captures",
                    info="It is read where it is, and never changed.",
                )
                self.use = gr.Button("Use this folder")
        with gr.Row():
            self.example = gr.Button("No images at hand? Take noisy digits", size="sm")
            self.forget = gr.Button("Remove my files now", size="sm")
        with gr.Accordion("Black and white of the files", open=False):
            gr.Markdown(
                "Usually the number type says it. A 12-bit camera in 16-bit files needs 0 and "
                "4095; floats outside of 0 to 1 need theirs."
            )
            with gr.Row():
                self.black = gr.Number(label="Black", value=None)
                self.white = gr.Number(label="White", value=None)
                self.apply = gr.Button("Apply")
        self.status = gr.HTML(noted("No images yet."), elem_id="noise")

    def connect(self) -> None:
        """Connect the controls to the actions."""
        import gradio as gr

        desk = self.desk

        def begin(request: gr.Request, steps: Callable[[Any], Any]) -> Iterator[Any]:
            own = session_of(desk, request)
            last: Images | None = None
            for line, result in follow(steps(own)):
                last = result
                yield line, last, ""
            if last is None:
                return
            for line, result in follow(desk.measure(own, last)):
                done = isinstance(result, Estimate)
                yield (measured(result) if done else line), last, result.noise if done else ""

        def once(call: Callable[[Any], Images]) -> Callable[[Any], Generator[str, None, Images]]:
            def steps(own: Any) -> Generator[str, None, Images]:
                yield "Taking the files"
                return call(own)

            return steps

        def drop(files: list[str] | None, black: Any, white: Any, request: gr.Request) -> Any:
            if not files:
                yield noted("No images yet."), None, ""
                return
            yield from begin(
                request, once(lambda own: _spanned(desk.upload(own, files), black, white))
            )

        def name(path: str, black: Any, white: Any, request: gr.Request) -> Any:
            yield from begin(request, once(lambda own: _spanned(desk.named(path), black, white)))

        def take(request: gr.Request) -> Any:
            yield from begin(request, desk.example)

        def change(known: Images | None, black: Any, white: Any, request: gr.Request) -> Any:
            if known is None:
                yield failed("there are no images yet"), None, ""
                return
            yield from begin(request, once(lambda own: _spanned(known, black, white)))

        def forget(request: gr.Request) -> Any:
            desk.forget(session_of(desk, request))
            return noted("All your files are removed."), None, "", None

        outputs = [self.status, self.images, self.estimate]
        span = [self.black, self.white]
        hidden = {"show_progress": "hidden"}
        self.files.upload(drop, [self.files, *span], outputs, api_name="drop", **hidden)
        self.use.click(name, [self.path, *span], outputs, api_name="name", **hidden)
        self.path.submit(name, [self.path, *span], outputs, api_visibility="private", **hidden)
        self.example.click(take, None, outputs, api_name="example", **hidden)
        self.forget.click(
            forget, None, [*outputs, self.files], api_name="forget", show_progress="hidden"
        )
        self.apply.click(change, [self.images, *span], outputs, api_visibility="private", **hidden)


def _spanned(images: Images, black: Any, white: Any) -> Images:
    """Return images with numbers of black and white, if both are given."""
    if black is None or white is None:
        return Images(images.data, images.label, images.uploaded)
    if not black < white:
        raise InputError("black must be below white")
    return Images(images.data, images.label, images.uploaded, (float(black), float(white)))


def _menu(gr: Any, label: str) -> Any:
    return gr.Dropdown(
        choices=[],
        value=None,
        label=label,
        min_width=280,
        info="What is known about clean images; best is a run on images like yours.",
    )


def _show(steps: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the status and the result of an action that makes a page."""
    for line, outcome in follow(steps):
        yield line, EMPTY if outcome is None else finished(outcome)


def _need(images: Images | None) -> Images:
    if images is None:
        raise InputError("there are no images yet: drop some above")
    return images


def _restore(desk: Desk, gr: Any, images: Any, estimate: Any) -> Any:
    """Build the tab that restores; return its menu of priors."""
    gr.Markdown(RESTORE)
    with gr.Row():
        prior = _menu(gr, "Prior")
        noise = gr.Textbox(
            label="Noise",
            min_width=280,
            placeholder="that of the run",
            info="Leave it empty, unless these images have other noise than those of the run.",
        )
    with gr.Row():
        go = gr.Button("Restore", variant="primary")
        stop = gr.Button("Stop")
    status, result = gr.HTML(""), gr.HTML("")

    def restore(
        images: Images | None, prior: str, noise: str, estimated: str, request: gr.Request
    ) -> Any:
        def steps() -> Any:
            own = session_of(desk, request)
            return (yield from desk.restore(own, _need(images), prior, noise, estimated))

        yield from _show(steps())

    go.click(
        restore,
        [images, prior, noise, estimate],
        [status, result],
        api_name="restore",
        show_progress="hidden",
        concurrency_limit=2,
        concurrency_id="work",
    )
    _stops(desk, gr, stop, status)
    return prior


def _stops(desk: Desk, gr: Any, button: Any, status: Any) -> None:
    def stop(request: gr.Request) -> Any:
        for job in session_of(desk, request).jobs:
            job.stop()
        return noted("Stopped.")

    button.click(stop, None, status, api_visibility="private", queue=False)


# -- the other tabs -------------------------------------------------------------------------------


def _learn(desk: Desk, gr: Any, images: Any, estimate: Any) -> None:
    """Build the tab that learns."""
    gr.Markdown(LEARN)
    with gr.Row():
        name = gr.Textbox(label="Name of the run", value="run-1", min_width=280, max_lines=1)
        kimg = gr.Radio(LENGTHS, value=20.0, label="Length", min_width=280)
    go = gr.Button("Start learning", variant="primary")
    status, shown = gr.HTML(""), gr.HTML("")
    gr.Markdown("### Runs")
    with gr.Row():
        run = gr.Dropdown(
            [], label="Run", min_width=280, info="Its progress appears below, also after a return."
        )
        stop = gr.Button("Stop, and keep what is learned")
        more = gr.Button("Go on")
    progress, picture = gr.HTML(""), gr.HTML("")
    timer = gr.Timer(2.0)

    def start(
        images: Images | None, name: str, kimg: float, noise: str, request: gr.Request
    ) -> Any:
        own = session_of(desk, request)
        try:
            text = desk.learn(own, _need(images), name, noise, kimg)
        except InputError as error:
            return failed(str(error)), EMPTY, gr.skip()
        choices = desk.runs(own).names()
        return (
            noted("Learning has started."),
            command(text),
            gr.update(choices=choices, value=name),
        )

    def look(run: str | None, request: gr.Request) -> Any:
        if not run:
            return EMPTY, EMPTY
        own = session_of(desk, request)
        try:
            found = desk.runs(own).progress(run)
        except InputError as error:
            return failed(str(error)), EMPTY
        bar = Markup('<progress max="1" value="{}" aria-label="Share of the run"></progress>')
        return bar.format(round(found.share, 4)) + noted(found.text()), _run_page(own, found)

    def act(kind: str) -> Callable[..., Any]:
        def action(run: str | None, request: gr.Request) -> Any:
            runs = desk.runs(session_of(desk, request))
            try:
                if not run:
                    raise InputError("choose a run first")
                getattr(runs, kind)(run)
            except InputError as error:
                return failed(str(error))
            return noted("It stops after this step." if kind == "stop" else "It goes on.")

        return action

    def listed(chosen: str | None, request: gr.Request) -> Any:
        runs = desk.runs(session_of(desk, request))
        names = runs.names()
        busy = next((one for one in names[:50] if runs.progress(one).running), None)
        return gr.update(choices=names, value=chosen if chosen in names else busy)

    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    go.click(
        start,
        [images, name, kimg, estimate],
        [status, shown, run],
        api_name="learn",
        show_progress="hidden",
    )
    timer.tick(look, run, [progress, picture], **hidden)
    run.change(look, run, [progress, picture], **hidden)
    run.focus(listed, run, run, **hidden)
    stop.click(act("stop"), run, status, api_name="stop", show_progress="hidden")
    more.click(act("resume"), run, status, api_name="resume", show_progress="hidden")
    page = gr.context.Context.root_block
    page.load(listed, run, run, **hidden)


def _run_page(session: Any, found: Any) -> Markup:
    """Return the page of a run in a frame; its address changes with the page."""
    if found.page is None:
        return noted("The first pictures appear after about a minute.") if found.running else EMPTY
    key = f"run-{found.name}"
    session.results[key] = {"report.html": found.page}
    return frame(f"results/{key}/report.html?v={found.page.stat().st_mtime_ns}")


def _solve(desk: Desk, gr: Any, images: Any, estimate: Any, tab: Any) -> Any:
    """Build the tab for other corruptions; return its menu of priors."""
    gr.Markdown(SOLVE)
    kinds = [*KINDS, OTHER] if desk.local else KINDS
    kind = gr.Radio(kinds, value="hole", label="Corruption")
    with gr.Column(visible=True) as hole:
        editor = gr.ImageEditor(
            label="Paint over what is missing; the hole is the same in all images",
            type="numpy",
            sources=(),
            transforms=(),
            layers=False,
            format="png",
            brush=gr.Brush(default_size="auto", colors=["#D55E00"], color_mode="fixed"),
            eraser=gr.Eraser(default_size="auto"),
            buttons=[],
        )
        load = gr.Button("Show the first image to paint on", size="sm")
    blur = gr.Slider(
        0.5, 8, 1.5, step=0.1, label="Width of the blur in pixels (sigma)", visible=False
    )
    factor = gr.Slider(2, 8, 2, step=1, label="Enlarge this many times", visible=False)
    text = gr.Textbox(
        label="Operator",
        placeholder="inpaint:random,keep=0.4",
        info="As for --operator on the command line.",
        visible=False,
    )
    with gr.Row():
        prior = _menu(gr, "Prior")
        method = gr.Dropdown(
            METHODS,
            value="red-diff",
            label="Solver",
            min_width=280,
            info="How the image is searched for.",
        )
        samples = gr.Slider(
            1,
            16,
            1,
            step=1,
            label="Answers",
            min_width=280,
            info="With more than one: also how they differ.",
        )
    with gr.Row():
        go = gr.Button("Solve", variant="primary")
        stop = gr.Button("Stop")
    status, result = gr.HTML(""), gr.HTML("")

    def switch(kind: str) -> list[Any]:
        return [gr.update(visible=kind == one) for one in ("hole", "blur", "sr", "other")]

    def paint(images: Images | None) -> Any:
        from .actions import first_of

        try:
            return preview(first_of(_need(images))), EMPTY
        except InputError as error:
            return None, failed(str(error))

    def solve(
        images: Images | None,
        kind: str,
        painted: Any,
        blur: float,
        factor: float,
        text: str,
        prior: str,
        method: str,
        samples: float,
        noise: str,
        request: gr.Request,
    ) -> Any:
        operator = {
            "hole": "hole",
            "blur": f"blur:gaussian,sigma={blur:g}",
            "sr": f"sr:average,factor={int(factor)}",
            "other": text,
        }.get(kind, "")
        layers = (painted or {}).get("layers") or []

        def steps() -> Any:
            own = session_of(desk, request)
            return (
                yield from desk.solve(
                    own, _need(images), prior, operator, noise, method, int(samples), layers
                )
            )

        yield from _show(steps())

    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    kind.change(switch, kind, [hole, blur, factor, text], **hidden)
    load.click(paint, images, [editor, status], **hidden)
    go.click(
        solve,
        [images, kind, editor, blur, factor, text, prior, method, samples, estimate],
        [status, result],
        api_name="solve",
        show_progress="hidden",
        concurrency_limit=2,
        concurrency_id="work",
    )
    _stops(desk, gr, stop, status)
    return prior


def file_of(desk: Desk, session: str, key: str, name: str) -> Path | None:
    """Return a file that a session may fetch."""
    return desk.session(session).find(key, name)
