"""The page of the app: its images and its tabs."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

from ...errors import InputError
from .actions import Desk
from .records import Estimate, Images
from .tabs import learn_tab, restore_tab, session_of, solve_tab
from .wording import LABELS, failed, follow, measured, noted

__all__ = ["build"]

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
STILL = "The images can be restored all the same, with the noise of the run or the one you give."
RANGE = "Give the numbers of black and white above, and press Apply."
NONE = noted("No images yet.")
WHERE = "## 1. Your images"
WHAT = "## 2. What to do with them"


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
                priors = [restore_tab(desk, gr, images, estimate)]
            with gr.Tab("Learn"):
                learn_tab(desk, gr, images, estimate)
            with gr.Tab("Other corruptions") as tab:
                priors.append(solve_tab(desk, gr, images, estimate, tab))
        _fill_priors(desk, gr, page, priors)
        page.unload(_leave(desk))
        parts.connect()
    return page


def _leave(desk: Desk) -> Callable[..., None]:
    import gradio as gr

    def leave(request: gr.Request) -> None:
        desk.sessions.tidy()

    return leave


def _fill_priors(desk: Desk, gr: Any, page: Any, priors: list[Any]) -> None:
    """Fill the menus of priors when the page is opened and whenever one is opened."""

    def listed(request: gr.Request) -> list[Any]:
        choices = desk.priors(session_of(desk, request))
        first = next(value for _, value in choices)  # a run, if there is one
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
        with gr.Accordion(LABELS["range"], open=False):
            gr.Markdown(
                "Usually the number type says it. A 12-bit camera in 16-bit files needs 0 and "
                "4095; floats outside of 0 to 1 need theirs."
            )
            with gr.Row():
                self.black = gr.Number(label="Black", value=None)
                self.white = gr.Number(label="White", value=None)
                self.apply = gr.Button("Apply")
        self.status = gr.HTML(NONE, elem_id="noise")

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
            found: Estimate | None = None
            for line, found in follow(desk.measure(own, last)):
                yield (measured(found) if found else line), last, found.noise if found else ""
            if found is None and not desk.readable(last):
                desk.discard(own, last)
                yield line, None, ""
                return
            own.kept["images"] = last, found
            if found is None:
                yield line + noted(RANGE if LABELS["range"] in line else STILL), last, ""

        def once(call: Callable[[Any], Images]) -> Callable[[Any], Generator[str, None, Images]]:
            def steps(own: Any) -> Generator[str, None, Images]:
                yield "Taking the files"
                return call(own)

            return steps

        def clear(before: Images | None, request: gr.Request) -> Any:
            desk.discard(session_of(desk, request), before)
            return NONE, None, ""

        def drop(
            files: list[str] | None,
            black: Any,
            white: Any,
            before: Images | None,
            request: gr.Request,
        ) -> Any:
            if not files:
                yield clear(before, request)
                return

            def received(own: Any) -> Images:
                try:
                    return _spanned(desk.upload(own, files), black, white)
                finally:  # not before: the files may be among those that come now
                    desk.discard(own, before)

            yield from begin(request, once(received))

        def name(path: str, black: Any, white: Any, request: gr.Request) -> Any:
            yield from begin(request, once(lambda own: _spanned(desk.named(path), black, white)))

        def example(request: gr.Request) -> Any:
            yield from begin(request, desk.example)

        def change(known: Images | None, black: Any, white: Any, request: gr.Request) -> Any:
            if known is None:
                yield failed("there are no images yet"), None, ""
                return
            yield from begin(request, once(lambda own: _spanned(known, black, white)))

        def again(request: gr.Request) -> Any:
            own = session_of(desk, request)
            images, found = own.kept.get("images", (None, None))
            if images is None:
                return NONE, None, ""
            own.shared.add(images.data)
            line = noted(f"Your images: {images.label}")
            if found is None:
                return line + noted(STILL), images, ""
            return line + measured(found), images, found.noise

        def forget(request: gr.Request) -> Any:
            desk.forget(session_of(desk, request))
            return noted("All your files are removed."), None, "", None

        outputs = [self.status, self.images, self.estimate]
        span = [self.black, self.white]
        hidden = {"show_progress": "hidden"}
        self.files.upload(
            drop, [self.files, *span, self.images], outputs, api_name="drop", **hidden
        )
        self.files.delete(
            drop,
            [self.files, *span, self.images],
            outputs,
            api_visibility="private",
            **hidden,
        )
        self.files.clear(
            clear, self.images, outputs, api_visibility="private", show_progress="hidden"
        )
        page = gr.context.Context.root_block
        page.load(again, None, outputs, api_visibility="private", show_progress="hidden")
        self.use.click(name, [self.path, *span], outputs, api_name="name", **hidden)
        self.path.submit(name, [self.path, *span], outputs, api_visibility="private", **hidden)
        self.example.click(example, None, outputs, api_name="example", **hidden)
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
