"""The tabs of the app: restore, learn, solve. Each control starts one action of `actions`."""

from collections.abc import Callable, Iterator
from typing import Any

from markupsafe import Markup

from ...errors import InputError
from .actions import Desk, packaged_priors
from .guard import SESSION
from .pictures import preview
from .records import Images, first_of
from .runs import Progress
from .sessions import Session
from .wording import EMPTY, LABELS, command, failed, frame, noted
from .works import Work

__all__ = ["learn_tab", "restore_tab", "session_of", "solve_tab"]

WORK = {"show_progress": "hidden", "concurrency_limit": 2, "concurrency_id": "work"}
"""Options of the buttons that restore: two of them work at a time."""
BRUSH = 20  # widths of the brush to the shorter side of an image
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
RESTORE = """\
Remove noise in one pass, with an error bar for every pixel. Choose what is known about clean
images: a run that has learned from images like yours (next tab) is the best choice. Without one,
`generic` restores images of any kind; it treats the channels of color images one by one.
"""
LEARN = """\
Learn what clean images look like from your noisy ones. It takes minutes to hours, goes on when you
close this page, and can be stopped and continued. A few hundred images, or a few large ones, are
enough. For gray images the networks know edges and textures beforehand, from synthetic drawings.
"""
SOLVE = """\
Undo another corruption with what was learned: fill holes, sharpen, enlarge. The images may be
noisy too.
"""
OWN_NOISE = "Empty: the estimate above."


def session_of(desk: Desk, request: Any) -> Session:
    """Return the session of a request."""
    return desk.session(request.headers.get(SESSION, ""))


def _menu(gr: Any) -> Any:
    return gr.Dropdown(
        choices=packaged_priors(),
        value=None,
        label=LABELS["prior"],
        min_width=280,
        info="What is known about clean images; best is a run on images like yours.",
    )


def _noise_field(gr: Any, info: str) -> Any:
    return gr.Textbox(
        label=LABELS["noise"], min_width=280, max_lines=1, placeholder="automatic", info=info
    )


def _first(noise: str | None, estimated: str) -> str:
    """Return the noise that the user has given, else the estimate."""
    return (noise or "").strip() or estimated


def _show(own: Session, part: str, steps: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the status and the result of an action, which goes on when the page is closed."""
    own.kept[part] = work = Work(steps)
    yield from work.watch()


def _show_again(desk: Desk, gr: Any, part: str, outputs: list[Any]) -> None:
    """Show the last action of a part of the page when the page is opened again."""

    def again(request: gr.Request) -> Any:
        work = session_of(desk, request).kept.get(part)
        yield from [(EMPTY, EMPTY)] if work is None else work.watch()

    page = gr.context.Context.root_block
    page.load(again, None, outputs, api_visibility="private", show_progress="hidden")


def _need(images: Images | None) -> Images:
    if images is None:
        raise InputError("there are no images yet: drop some above")
    return images


def restore_tab(desk: Desk, gr: Any, images: Any, estimate: Any) -> Any:
    """Build the tab that restores; return its menu of priors."""
    gr.Markdown(RESTORE)
    with gr.Row():
        prior = _menu(gr)
        noise = _noise_field(gr, "Empty: that of the run; with generic, the estimate above.")
    with gr.Row():
        go = gr.Button("Restore", variant="primary")
        stop = gr.Button("Stop")
    status, result = gr.HTML(""), gr.HTML("")

    def restore(
        images: Images | None, prior: str, noise: str, estimated: str, request: gr.Request
    ) -> Any:
        own = session_of(desk, request)

        def steps() -> Any:
            return (yield from desk.restore(own, _need(images), prior, noise, estimated))

        yield from _show(own, "restore", steps())

    go.click(
        restore,
        [images, prior, noise, estimate],
        [status, result],
        api_name="restore",
        **WORK,
    )
    _stops(desk, gr, stop, status)
    _show_again(desk, gr, "restore", [status, result])
    return prior


def _stops(desk: Desk, gr: Any, button: Any, status: Any) -> None:
    def stop(request: gr.Request) -> Any:
        for job in session_of(desk, request).jobs:
            job.stop()
        return noted("Stopped.")

    button.click(stop, None, status, api_visibility="private", show_progress="hidden")


# -- the other tabs -------------------------------------------------------------------------------


def learn_tab(desk: Desk, gr: Any, images: Any, estimate: Any) -> None:
    """Build the tab that learns."""
    gr.Markdown(LEARN)
    with gr.Row():
        name = gr.Textbox(label="Name of the run", value="run-1", min_width=280, max_lines=1)
        noise = _noise_field(gr, OWN_NOISE)
    kimg = gr.Radio(LENGTHS, value=20.0, label=LABELS["kimg"])
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
        images: Images | None,
        name: str,
        kimg: float,
        noise: str,
        estimated: str,
        request: gr.Request,
    ) -> Any:
        own = session_of(desk, request)
        try:
            text = desk.learn(own, _need(images), name, _first(noise, estimated), kimg)
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

    def watch(run: str | None, request: gr.Request) -> Any:
        if run:
            return gr.skip(), *look(run, request)
        found = listed(None, request)  # in case that the page missed its first list
        return found if found["value"] else gr.skip(), EMPTY, EMPTY

    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    go.click(
        start,
        [images, name, kimg, noise, estimate],
        [status, shown, run],
        api_name="learn",
        show_progress="hidden",
    )
    timer.tick(watch, run, [run, progress, picture], **hidden)
    run.change(look, run, [progress, picture], **hidden)
    run.focus(listed, run, run, **hidden)
    stop.click(act("stop"), run, status, api_name="stop", show_progress="hidden")
    more.click(act("resume"), run, status, api_name="resume", show_progress="hidden")
    page = gr.context.Context.root_block
    page.load(listed, run, run, **hidden)


def _run_page(session: Session, found: Progress) -> Markup:
    """Return the page of a run in a frame; its address changes with the page."""
    if found.page is None:
        return noted("The first pictures appear after about a minute.") if found.running else EMPTY
    key = f"run-{found.name}"
    session.results[key] = {"report.html": found.page}
    return frame(f"results/{key}/report.html?v={found.page.stat().st_mtime_ns}")


def _brush(gr: Any, size: Any) -> Any:
    return gr.Brush(default_size=size, colors=["#D55E00"], color_mode="fixed")


def solve_tab(desk: Desk, gr: Any, images: Any, estimate: Any, tab: Any) -> Any:
    """Build the tab for other corruptions; return its menu of priors."""
    gr.Markdown(SOLVE)
    kinds = [*KINDS, OTHER] if desk.local else KINDS
    kind = gr.Radio(kinds, value="hole", label="Corruption")
    with gr.Column(visible=True) as hole:
        gr.Markdown(
            "Show the first image, and paint over what is missing. The hole is the same in all "
            "images.",
            elem_classes="soft",
        )
        editor = gr.ImageEditor(
            label="Paint",
            type="numpy",
            sources=(),
            transforms=(),
            layers=False,
            format="png",
            brush=_brush(gr, "auto"),
            eraser=gr.Eraser(default_size="auto"),
            buttons=[],
        )
        load = gr.Button("Show the first image to paint on", size="sm")
    blur = gr.Slider(
        0.5, 8, 1.5, step=0.1, label="Width of the blur in pixels (sigma)", visible=False
    )
    factor = gr.Slider(2, 8, 2, step=1, label="Enlarge this many times", visible=False)
    text = gr.Textbox(
        label=LABELS["operator"],
        placeholder="inpaint:random,keep=0.4",
        info="A text form, such as blur:motion,length=9 or inpaint:file,path=mask.png.",
        visible=False,
    )
    with gr.Row():
        prior = _menu(gr)
        noise = _noise_field(gr, OWN_NOISE)
    with gr.Row():
        method = gr.Dropdown(
            METHODS,
            value="red-diff",
            label=LABELS["method"],
            min_width=280,
            info="How the image is searched for.",
        )
        samples = gr.Slider(
            1,
            16,
            1,
            step=1,
            label=LABELS["samples"],
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
        try:
            shown = preview(first_of(_need(images)))
            size = max(1, min(shown.shape[:2]) // BRUSH)
            brush, eraser = _brush(gr, size), gr.Eraser(default_size=size)
            return gr.update(value=shown, brush=brush, eraser=eraser), EMPTY
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
        estimated: str,
        request: gr.Request,
    ) -> Any:
        operator = {
            "hole": "hole",
            "blur": f"blur:gaussian,sigma={blur:g}",
            "sr": f"sr:average,factor={int(factor)}",
            "other": text,
        }.get(kind, "")
        layers = (painted or {}).get("layers") or []

        own = session_of(desk, request)

        def steps() -> Any:
            known = _first(noise, estimated)
            return (
                yield from desk.solve(
                    own, _need(images), prior, operator, known, method, int(samples), layers
                )
            )

        yield from _show(own, "solve", steps())

    hidden = {"show_progress": "hidden", "api_visibility": "private"}
    kind.change(switch, kind, [hole, blur, factor, text], **hidden)
    load.click(paint, images, [editor, status], **hidden)
    go.click(
        solve,
        [images, kind, editor, blur, factor, text, prior, method, samples, noise, estimate],
        [status, result],
        api_name="solve",
        **WORK,
    )
    _stops(desk, gr, stop, status)
    _show_again(desk, gr, "solve", [status, result])
    return prior
