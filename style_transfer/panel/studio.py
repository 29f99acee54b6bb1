"""The interactive panel: an optimisation that goes on while its weights are moved.

`style_studio` opens a panel, a `Studio`. Its `Painter` (painter.py) is the run behind it, its `Controls` and `Display`
(controls.py) are the widgets. The painter works on a thread of its own, so the kernel stays free for the panel's events
and for other cells. What a moved slider calls: `Controls.settings` -> `Painter.make_frame` -> `Painter.step` ->
`Run.retarget` -> `Run.step` -> `Studio.show` -> `Display.show`.

Frames are shown as soon as they are made (push), or when the browser asks for one (pull), which it does by
acknowledging what it was sent. Colab shows only what a cell or a widget's callback sends, so it needs pull.
"""

import asyncio
import base64
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from html import escape
from pathlib import Path

import ipywidgets as widgets
import torch
from IPython.display import publish_display_data
from torch import Tensor, nn

from ..engine.checks import UserError, as_whole, file_version, sentence
from ..engine.figures import jpeg
from ..engine.images import IMAGES, keep_colours, load_image, resize
from ..engine.objective import CONTENT_LAYER, CONTENT_WEIGHT, STYLE_LAYERS, STYLE_WEIGHT, Task, as_task
from ..engine.saving import as_png, joint_stem, read_settings, write_numbered
from ..engine.vgg import check_network, layer_name, load_vgg19
from .controls import Controls, Display, lay_out, tree, uploaded_files
from .painter import Painter, PanelFrame, Settings

PREVIEW_PIXELS = 130  # shorter side of the input images' previews
SPEECH_SECONDS = 15  # time between two losses that a screen reader speaks
BUTTONS = [  # (label, method of `Studio`, icon, tooltip)
    ("Start", "start", "play", "Go on from the present image"),
    ("Pause", "pause", "pause", "Stop at the image on display"),
    ("Step", "step", "step-forward", "Evaluate the network once"),
    ("Restart", "restart", "refresh", "Begin again from the chosen start"),
    ("Snapshot", "keep", "camera", "Keep this image for the difference map"),
    ("Save", "save", "download", "Write a PNG file with the settings in it"),
    ("Reset", "reset", "undo", "Go back to the layers and weights that the panel opened with"),
]
STATES = {
    "ready": "Ready: press Start.",
    "running": "Running. The kernel stays free for other cells.",
    "paused": "Paused.",
    "done": "Finished: {}. Move a control or press Start to continue.",
    "closed": "Closed.",
}


# JupyterLab shows an error where a saved panel has no kernel. This style shows the still instead.
RESCUE = """<style>
.jp-OutputArea-child:has(.studio-still) + * > .jp-OutputArea-output.jupyter-widgets { display: none; }
.jp-OutputArea-child:has(+ * > .jp-OutputArea-output.jupyter-widgets) .studio-still { display: block !important; }
</style>"""


@functools.lru_cache(maxsize=9)
def preview(path: Path, version: tuple | None) -> bytes:
    """A small JPEG of an image file. version: its `file_version`, so that a changed file is read again."""
    return jpeg(load_image(path, PREVIEW_PIXELS, "cpu"))


def data_url(kind: str, content: bytes) -> str:
    """A file as a data URL; kind: its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def action(method: Callable) -> Callable:
    """Make a method of `Studio` a user action: it clears the last note, and an error becomes the new one."""

    @functools.wraps(method)
    def guarded(self, *_):
        if self.state == "closed":
            return
        nested, self.acting = self.acting, True
        try:
            if not nested:
                self.set_status(note="")
            method(self)
        except Exception as error:
            self.set_status(note=sentence(error))
        finally:
            self.acting = nested

    return guarded


class Studio:
    """The panel: it reads the controls, has the worker make frames, and shows them. Made by `style_studio`.

    painter: used only on the worker's thread once started. pull: show a frame when the browser asks for it. state: a
    key of `STATES`.
    """

    current = None  # the panel that is open
    answer_seconds = 0.1  # pull: how long the browser may wait for an answer
    link_bytes = 15_000_000  # the largest file offered as a download; base64 makes it 20 MB
    patience_seconds = 60  # after this long without an acknowledgement, no browser is there

    def __init__(self, opening: Settings, painter: Painter, pull: bool = False):
        self.loop = asyncio.get_running_loop()
        self.pull = pull
        self.painter = painter
        self.worker = ThreadPoolExecutor(1, "style-studio", torch.set_num_threads, (torch.get_num_threads(),))
        self.uploads = tempfile.TemporaryDirectory(prefix="style-studio-")
        self.state = "ready"
        self.note = ""
        self.acting = False  # whether an action is under way
        self.working = self.watching = None  # the tasks of `work` and `watch`
        self.frame = None  # the `Future` of the frame that is being made
        self.shown = self.snapshot = None  # the latest `PanelFrame`, and an image
        self.single = self.restarting = False  # what the last button asked for
        self.beginning = None  # the settings behind the image on display before Start
        self.presses = self.answered = 0  # presses that asked for frames; how many the frame has taken in
        self.spoken_moment = 0.0  # when a screen reader last heard of the loss
        self.controls = controls = Controls(opening)
        self.display = Display(controls.choices)
        self.buttons = {}
        for label, method, icon, tooltip in BUTTONS:
            button = widgets.Button(description=label, icon=icon, tooltip=tooltip)
            button.on_click(getattr(self, method))
            self.buttons[label] = button
        for control in controls.inputs:
            control.observe(self.moved, "value")
        for control in (controls.start, controls.seed, controls.compare, controls.keep_colours):
            control.observe(self.chosen, "value")
        for uploader in controls.uploaders.values():
            uploader.observe(self.take_uploads, "value")
        self.display.seen.observe(self.acknowledged, "value")
        self.draw_inputs()
        self.view = lay_out(controls, self.display, self.buttons.values())
        self.display_id = None  # of the cell's output, once it shows the panel
        self.set_status()

    # What the buttons do

    @action
    def start(self) -> None:
        """Go on from the present image until paused or until the run is over."""
        self.set_going(single=False)

    @action
    def step(self) -> None:
        """Evaluate the network once."""
        self.set_going(single=True)

    @action
    def pause(self) -> None:
        """Stop at the image on display. An evaluation in progress finishes, but is not shown."""
        if self.state == "running":
            self.set_status("paused")

    @action
    def restart(self) -> None:
        """Begin again from the chosen start."""
        self.restarting = True
        self.start()

    @action
    def keep(self) -> None:
        """Keep the image on display for the difference map."""
        self.snapshot = self.shown.image
        self.controls.compare.value = "the snapshot"
        self.set_status(note="this image is kept: the difference map shows what changes from here")

    @action
    def save(self) -> None:
        """Write the image on display to saved/, a PNG file with the settings in it."""
        settings, (start, seed) = self.shown.settings, self.shown.start
        about = settings._asdict() | {
            "content": settings.content and settings.content.name,
            "styles": [(path.name, weight, None) for path, weight in settings.styles.items()],
            "start": start,
            "seed": seed,
            "evaluations": self.painter.evaluations,
            "coarse_to_fine": start == "noise",
            "keep_colours": self.controls.keep_colours.value,
            "losses": self.shown.step._asdict(),
        }
        stem = joint_stem(*filter(None, (settings.content, next(iter(settings.styles), None))))
        image = as_png(self.image_shown(), about)
        try:
            path = write_numbered(Path("saved"), stem, image)
        except OSError as error:
            raise UserError(f"the image cannot be saved in {os.path.abspath('saved')!r}: {error.strerror}") from error
        self.set_status(note=f"saved as {path}")
        link = ""
        if len(image) <= self.link_bytes:
            link = f'<a download="{escape(path.name)}" href="{data_url("image/png", image)}">Download</a>'
        self.display.download.value = link

    @action
    def reset(self) -> None:
        """Go back to the layers and weights that the panel opened with."""
        self.controls.take(self.controls.opening._asdict())

    def close(self, why: str = "") -> None:
        """Stop, and leave the last picture in the panel's place; no thread, task, widget or image stays behind."""
        self.set_status("closed")
        if self.display_id:
            text = f"This panel was closed{why}. Run this cell to open it again."
            source = data_url("image/jpeg", self.display.images["picture"].value)
            html = f'<p>{text}</p><img alt="Its last picture." style="width:512px;max-width:100%" src="{source}">'
            bundle = {"text/html": html, "text/plain": text}
            publish_display_data(bundle, transient={"display_id": self.display_id}, update=True)
        if self.watching and not self.watching.done():
            self.loop.call_soon_threadsafe(self.watching.cancel)
        self.worker.shutdown(wait=False)
        self.uploads.cleanup()
        self.painter = self.shown = self.snapshot = None
        for widget in [self.display.link, *tree(self.view)]:
            widget.close()

    # What the other controls do

    @action
    def moved(self) -> None:
        """A control that changes the result has moved: redraw the inputs, and go on if the run is over."""
        self.draw_inputs()
        if self.state == "done":
            self.start()

    @action
    def chosen(self) -> None:
        """Show the image in the chosen colours. The next frame or Restart reads the other choices."""
        if self.shown:
            self.put_on_display()
        self.draw_inputs()

    @action
    def take_uploads(self) -> None:
        """Take what was uploaded: images, choosing the last one, or the settings in a saved image."""
        for kind, uploader in self.controls.uploaders.items():
            files = uploaded_files(uploader.value)
            uploader.set_trait("value", type(uploader.value)())  # so that the same file can be uploaded again
            for name, content in files:
                self.take_file(kind, name, content)

    def take_file(self, kind: str, name: str, content: bytes) -> None:
        """Store a file in its own folder and take it. If it is unusable, a note says why."""
        given = Path(name).name.encode(errors="replace").decode()
        name = Path(re.sub(r'[\x00-\x1f<>:"/\\|?*]+', " ", given).strip(" .") or "picture")
        path = Path(self.uploads.name, hashlib.sha256(content).hexdigest(), joint_stem(name) + name.suffix[:10])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        try:
            if kind == "settings":
                missing = self.controls.take_all(read_settings(path))
                self.set_status(note=", ".join([*missing, "press Restart to make it again"]))
            else:
                preview(path, file_version(path))
                self.controls.offer(kind, path)
        except UserError as error:
            self.set_status(note=str(error).replace(repr(str(path)), repr(given)))

    def draw_inputs(self) -> None:
        """Show the input images as their files are now and, until Start, the image that the run will start from."""
        for kind, control in self.controls.choices.items():
            path = control.value
            self.display.show_image(kind, path and preview(path, file_version(path)), kind)
        settings = self.controls.settings()
        beginning = settings.content, [*settings.styles], settings.size, self.chosen_start()
        if self.state == "ready" and beginning != self.beginning:
            self.painter.change(settings, self.chosen_start())
            self.display.show_image("picture", jpeg(resize(self.painter.run.image, self.painter.run.shape)))
            self.beginning = beginning

    def chosen_start(self) -> tuple[str, int]:
        """Where a run would begin now: (kind, seed)."""
        return self.controls.start.value, self.controls.seed.value

    # One frame after another

    def set_going(self, single: bool) -> None:
        """Make one frame, or frames until paused. A running loop picks this up."""
        self.single = single
        self.presses += 1
        self.set_status("running")
        self.display.sent.value += self.pull
        self.loop.call_soon_threadsafe(self.keep_going)  # a button's callback may run on another thread than the loop's

    def keep_going(self) -> None:
        """Start the tasks that the state "running" needs."""
        if not self.pull and (self.working is None or self.working.done()):
            self.working = self.loop.create_task(self.work())
        if self.watching is None or self.watching.done():
            self.watching = self.loop.create_task(self.watch())

    async def work(self) -> None:
        """Push: make and show one frame after another while the state is "running"."""
        self.exchange()
        while self.frame:
            await asyncio.wait([asyncio.wrap_future(self.frame)])
            self.exchange()

    def acknowledged(self, _) -> None:
        """The browser has received what it was sent. Pull: it thereby requests the next frame; answer now or soon.

        Only the latest number counts, so there is at most one open request and no queue.
        """
        if self.pull and self.state == "running" and self.display.seen.value == self.display.sent.value:
            if self.frame:
                wait([self.frame], self.answer_seconds)
            self.exchange()
            self.display.sent.value += 1

    async def watch(self) -> None:
        """Pause when no browser is there. Only time when the kernel is free counts: a busy one receives nothing."""
        silent = 0
        before = None
        while self.state == "running" and silent < 60:
            await asyncio.sleep(self.patience_seconds / 60)
            seen = self.display.seen.value
            silent = silent + 1 if seen == before != self.display.sent.value else 0
            before = seen
        if self.state == "running":
            problem = f"no browser has shown this panel for {self.patience_seconds} seconds: press Start to continue"
            self.set_status("paused", problem)

    def exchange(self) -> None:
        """Show the frame if it is ready, and submit the next one."""
        try:
            if self.frame and self.frame.done():
                frame, self.frame = self.frame, None
                self.show(frame.result())
            if self.state == "running" and not self.frame:
                self.submit_frame()
        except Exception as error:  # nothing else would report it
            if self.state != "closed":
                self.set_status("paused", sentence(error))

    def submit_frame(self) -> None:
        """Have the worker make a frame with the controls' present settings."""
        controls = self.controls
        start = None
        moments = ()
        if self.restarting or not self.shown:
            start = self.chosen_start()
        elif self.answered == self.presses:  # not after a button: the rate on display leaves pauses out
            moments = self.shown.moments
        self.restarting = False
        self.answered = self.presses
        self.draw_inputs()
        self.frame = self.worker.submit(
            self.painter.make_frame,
            controls.settings(), start, controls.compare.value, self.snapshot, self.single, moments,
        )  # fmt: skip

    def show(self, frame: PanelFrame) -> None:
        """Show a frame, unless it is no longer wanted: the panel is paused, or a button was pressed in the meantime."""
        if self.state == "running" and self.answered == self.presses:
            self.shown = frame
            self.put_on_display()
            self.display.sent.value += not self.pull
            self.set_status("done" if frame.ended else "paused" if self.single else None)

    def image_shown(self) -> Tensor:
        """The image of the latest frame, in the chosen colours."""
        image = self.shown.image
        return keep_colours(image, self.shown.content) if self.controls.keep_colours.value else image

    def put_on_display(self) -> None:
        """Show the latest frame in the chosen colours."""
        self.display.show(self.shown, jpeg(resize(self.image_shown(), self.shown.shape)))

    def set_status(self, state: str | None = None, note: str | None = None) -> None:
        """Change state and note, where given, and update buttons and status line."""
        self.state = state or self.state
        self.note = self.note if note is None else note
        running = self.state == "running"
        numbers = ""
        moment = 0.0
        # A pressed button stays enabled: disabled, it would lose the keyboard focus.
        self.buttons["Start"].button_style = "" if running else "primary"
        self.buttons["Pause"].button_style = "primary" if running else ""
        for name in ("Snapshot", "Save"):
            self.buttons[name].disabled = not self.shown
        text = STATES[self.state]
        if self.shown:
            step = self.shown.step
            moments = self.shown.moments
            height, width = step.shape
            text = text.format(self.shown.ended)
            moment = moments[-1]
            numbers = f"{self.shown.evaluations} evaluations · {width} × {height}, {step.precision}"
            numbers += f" · loss {step.total:.4g}"
            if len(self.controls.kinds) == 2:
                numbers += f", of content {step.content:.3g} and style {step.style:.3g}, unweighted"
            if running:
                numbers += f" · {(len(moments) - 1) / (moment - moments[0]):.1f} evaluations a second"
        text = f"<b>{text}</b> {escape(self.note)}"
        self.display.status.value = f'<div data-state="{self.state}">{text}<br>{numbers}</div>'
        if state or note or moment > self.spoken_moment + SPEECH_SECONDS:
            self.spoken_moment = moment
            self.display.spoken.value = f'<div role="status" aria-live="polite">{text} {numbers}</div>'

    def _ipython_display_(self):
        """Show the panel; where there is no kernel, a still of it in use."""
        alt = "The panel in use: the current image and its inputs, the loss, buttons and controls."
        still = (IMAGES / f"panel_{'_and_'.join(self.controls.kinds)}.jpg").read_bytes()
        image = f'<img class="studio-still" style="display:none" alt="{alt}" src="{data_url("image/jpeg", still)}">'
        publish_display_data({"text/html": RESCUE + image, "text/plain": ""})
        view = {"version_major": 2, "version_minor": 0, "model_id": self.view.model_id}
        bundle = {"application/vnd.jupyter.widget-view+json": view, "image/jpeg": still, "text/plain": alt}
        self.display_id = self.view.model_id
        publish_display_data(bundle, {"image/jpeg": {"alt": alt}}, transient={"display_id": self.display_id})


def style_studio(
    content: str | Path | None = None, style: str | Path | None = None, *, size: int = 256,
    content_layer: str = CONTENT_LAYER, style_layers: str | Iterable[str] | Mapping[str, float] = STYLE_LAYERS,
    content_weight: float = CONTENT_WEIGHT, style_weight: float = STYLE_WEIGHT, vgg: nn.Sequential | None = None,
    pull: bool | None = None,
) -> Studio:  # fmt: skip
    """Open a panel, in which the optimisation goes on while its weights are moved; Start sets it going.

    content, style: paths of images; both for style transfer, content alone for reconstruction, style alone for texture
    synthesis. size: shorter side of the result in pixels. content_layer, style_layers (one name, several, or
    {name: weight}), content_weight, style_weight: what the controls open with and Reset goes back to. vgg: from
    `load_vgg19`, which is the default. pull: show a frame when the browser asks for it, not when it is made; by default
    only in Colab, which needs it.
    Call it on the last line of a notebook cell. Closes the panel that was open before. Raises UserError for bad
    input.
    """
    if content is None and style is None:
        raise UserError("content and style are both None: give the path of at least one image")
    images = [None if path is None else load_image(path, 32, "cpu") for path in (content, style)]
    size = as_whole(size, "size", " of pixels")
    content_layer = layer_name(content_layer)
    layers = () if content is None else content_layer, () if style is None else style_layers
    task = as_task(Task(*images, *layers, content_weight, style_weight))
    if task.style and not task.style_weight:
        raise UserError(f"style_weight is {style_weight!r}: the panel's slider starts above 0: give more, or no style")
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise UserError("no event loop runs here: call style_studio in a cell of a notebook") from error
    vgg = load_vgg19() if vgg is None else vgg
    check_network(vgg)
    if Studio.current:
        Studio.current.close(", since another was opened")
    content, style = (None if path is None else Path(os.path.abspath(path)) for path in (content, style))
    layer_weights = {layer_name(name): weight for name, weight in task.style_layers.items() if weight}
    about = size, content_layer, task.content_weight, task.style_weight, layer_weights
    if pull is None:
        pull = "google.colab" in sys.modules
    Studio.current = panel = Studio(Settings(content, {style: 1.0} if style else {}, *about), Painter(vgg), pull)
    return panel
