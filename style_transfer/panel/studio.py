"""The interactive panel: an optimisation that goes on while its weights are moved.

`style_studio` makes the panel. `Painter`, is the run behind it, one evaluation a call. `Controls` and
`Display`, in controls.py, are the widgets. `Studio` lets the painter work on a thread of its own, so that the
kernel stays free for the panel's events and for other cells. A moved slider: `Controls.settings` -> `Painter.step` ->
`Run.retarget` -> `Run.step` -> `Display.show`.

A frame is shown as soon as it is made (push), or when the browser asks for it (pull), which it does by acknowledging
what it has been sent. Colab shows nothing that comes from outside a cell or a widget's callback, so there it is pull.
"""

import asyncio
import functools
import hashlib
import math
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from html import escape
from pathlib import Path

import ipywidgets as widgets
import torch
from IPython.display import publish_display_data
from torch import Tensor, nn

import nst_utils as nst
from style_transfer.engine.saving import as_png, read_settings
from style_transfer.engine.schedule import EVALUATIONS
from style_transfer.panel.controls import HIDDEN, INPUT, Controls, Display, Frame, lay_out, tree, uploaded_files
from style_transfer.panel.painter import Painter, Settings

FRAME = 1 / 30  # seconds: no more than so many images a second are drawn
CHART = 2.0  # seconds from one drawing of the loss curves to the next, since each takes a tenth of one
ANSWER = 0.1  # seconds, at most, that the browser waits for the answer to what it asks for
PATIENCE = 60  # seconds without an acknowledgement, after which no browser is taken to be there
SPOKEN = 15  # seconds from one time that a screen reader hears of the loss to the next
BUTTONS = [  # (label, method of `Studio`, icon, tooltip)
    ("Start", "start", "play", "Go on from the present image"),
    ("Pause", "pause", "pause", "Stop at the image on display"),
    ("Step", "step", "step-forward", "One evaluation of the network"),
    ("Restart", "restart", "refresh", "Begin again from the chosen start"),
    ("Snapshot", "keep", "camera", "Keep this image for the difference map"),
    ("Save", "save", "download", "Write a PNG file with the settings in it"),
    ("Reset", "reset", "undo", "The layers and weights that the panel opened with"),
]
STATES = {
    "ready": "Ready: press Start.",
    "running": "Running. The kernel stays free for other cells.",
    "paused": "Paused.",
    "done": "Finished: converged, or all evaluations used. Move a control or press Start to continue.",
    "closed": "Closed. Run the cell again.",
}


def action(method: Callable) -> Callable:
    """A method of `Studio` by which the user acts: an error becomes a note, and a note lives until the next action."""

    @functools.wraps(method)
    def guarded(self, *arguments):
        if self.state == "closed":
            return
        outermost, self.acting = not self.acting, True
        try:
            if outermost and self.note:
                self.tell(note="")
            method(self, *arguments)
        except Exception as error:
            self.tell(note=nst.sentence(error))
        finally:
            self.acting = not outermost

    return guarded


class Studio:
    """The panel: controls, the living picture, and the loop that moves it. Made by `style_studio`.

    painter: a `Painter`; only the worker's thread touches it. state: a key of `STATES`. pull: whether a frame is shown
    when the browser asks for it.
    """

    def __init__(self, opening: Settings, painter: Painter, pull: bool = False):
        self.loop, self.pull = asyncio.get_running_loop(), pull
        self.worker = ThreadPoolExecutor(1, "style-studio", torch.set_num_threads, (torch.get_num_threads(),))
        self.painter, self.uploads = painter, tempfile.TemporaryDirectory(prefix="style-studio-")
        self.state, self.turns, self.watching = "ready", None, None  # the asyncio tasks of `work` and `watch`
        self.frame = None  # the `Future` of the frame that is being made
        self.note, self.acting = "", False  # in the status line; whether an action is under way
        self.drawn = {}  # {kind: (path, version) of the image among the inputs}
        self.shown, self.snapshot = None, None  # the last Frame, and an image that was kept
        self.single, self.restarting = False, False  # what the last button asked for
        self.presses = self.answered = 0  # of buttons that ask for a frame, and that the frame under way knows of
        self.moments, self.last_chart, self.last_spoken = deque(maxlen=20), -math.inf, -math.inf
        self.controls = Controls(opening)
        self.display = Display(self.controls.choices)
        self.choices, self.uploaders = self.controls.choices, self.controls.uploaders
        self.content_weight, self.style_weight = self.controls.content_weight, self.controls.style_weight
        self.layer_weights = self.controls.layer_weights
        self.status, self.buttons = self.display.status, {}
        for label, method, icon, tooltip in BUTTONS:
            button = widgets.Button(description=label, icon=icon, tooltip=tooltip, layout={"width": "102px"})
            button.on_click(lambda _, method=method: getattr(self, method)())
            self.buttons[label] = button
        for control in self.controls.inputs():
            control.observe(lambda _: self.moved(), "value")
        for control in (self.controls.start_from, self.controls.seed, self.controls.compare):
            control.observe(lambda _: self.chosen(), "value")
        self.controls.keep_colours.observe(lambda _: self.recolour(), "value")
        for kind, uploader in self.uploaders.items():
            uploader.observe(lambda _, kind=kind: self.take_upload(kind), "value")
        self.controls.opener.observe(lambda _: self.open_settings(), "value")
        self.display.seen.observe(lambda _: self.acknowledged(), "value")
        self.draw_inputs()
        self.view = lay_out(self.controls, self.display, self.buttons.values())
        self.tell()

    # What the buttons do

    @action
    def start(self) -> None:
        """Go on from the present image until paused or until the run is done."""
        self.set_going(False)

    @action
    def step(self) -> None:
        """One evaluation of the network."""
        self.set_going(True)

    @action
    def pause(self) -> None:
        """Stop; what is on display stays. An evaluation under way ends unseen."""
        if self.state == "running":
            self.tell("paused")

    @action
    def restart(self) -> None:
        """Begin again from the chosen start."""
        self.restarting = True
        self.start()

    @action
    def keep(self) -> None:
        """Keep the image on display for the difference map."""
        if self.shown:
            self.snapshot, self.controls.compare.value = self.shown.image, "the snapshot"
            self.tell(note="this image is kept: the difference map shows what changes from here")

    @action
    def save(self) -> None:
        """Write the image on display to saved/, as a PNG file with the settings in its text field "settings"."""
        if not self.shown:
            return self.tell(note="there is no image to save yet: press Start")
        settings, (start, seed) = self.shown.settings, self.shown.start
        names = {kind: getattr(settings, kind) for kind in self.choices}
        about = settings._asdict() | {kind: path.name for kind, path in names.items()}
        second, blend = about.pop("second"), about.pop("blend")
        if second:
            about["styles"] = [(settings.style.name, 1 - blend, None), (second.name, blend, None)]
        about |= {"keep_colours": self.controls.keep_colours.value}
        about |= {"layer_weights": dict(settings.layer_weights), "start": start, "seed": seed}
        about |= {"evaluations": EVALUATIONS, "coarse_to_fine": start == "noise"}  # as the painter runs
        image = as_png(self.image_shown(), about | {"losses": self.shown.step._asdict()})
        stem = nst.joint_stem(*names.values())
        try:
            self.tell(note=f"saved {nst.write_numbered(Path('saved'), stem, '.png', image)}")
        except OSError as error:
            problem = f"cannot be saved in {str(Path('saved').absolute())!r}: {error.strerror}"
            raise nst.UserError(f"the image {problem}") from error

    @action
    def reset(self) -> None:
        """Go back to the layers and weights that the panel opened with."""
        self.controls.reset()

    def close(self) -> None:
        """Stop and take the panel away; no thread, task, widget or image stays behind."""
        self.tell("closed")
        if self.watching and not self.watching.done():
            self.loop.call_soon_threadsafe(self.watching.cancel)
        self.worker.shutdown(wait=False)
        self.uploads.cleanup()
        self.painter = self.shown = self.snapshot = None
        for widget in [self.display.copying, *tree(self.view)]:
            widget.close()

    @action
    def take_upload(self, kind: str) -> None:
        """Offer the uploaded images, and choose the last."""

        def take(path):
            nst.load_image(path, INPUT, "cpu")
            self.controls.offer(kind, path)

        self.take_files(self.uploaders[kind], take)

    @action
    def open_settings(self) -> None:
        """Take up the settings of a saved image."""

        def take(path):
            missing = self.controls.take_all(read_settings(path))
            self.tell(note=f"{', '.join(missing)}, and then press Restart" if missing else "Restart makes it again")

        self.take_files(self.controls.opener, take)

    def take_files(self, uploader: widgets.FileUpload, take: Callable[[Path], None]) -> None:
        """Hand over what was uploaded, each file in a folder of its own; of one that cannot be taken, say why."""
        files = uploaded_files(uploader.value)
        uploader.set_trait("value", type(uploader.value)())  # so that the same file may come again
        for name, content in files:
            given = Path(name).name.encode(errors="replace").decode()
            name = Path(re.sub(r'[\x00-\x1f<>:"/\\|?*]+', " ", given).strip(" .") or "picture")
            folder = Path(self.uploads.name, hashlib.sha256(content).hexdigest())
            path = folder / (nst.joint_stem(name) + name.suffix[:10])
            folder.mkdir(exist_ok=True)
            path.write_bytes(content)
            try:
                take(path)
            except nst.UserError as error:
                self.tell(note=f"{self.note} {str(error).replace(repr(str(path)), repr(given))}".strip())

    @action
    def moved(self) -> None:
        """A control was moved: a panel that had finished goes on."""
        self.draw_inputs()
        if self.state == "done":
            self.start()

    @action
    def recolour(self) -> None:
        """Show the image in other colours; the run is not touched."""
        if self.shown:
            self.put_on_display()

    chosen = action(lambda self: None)  # another start or comparison, which the next step or restart asks for

    def draw_inputs(self) -> None:
        """Show the inputs, those that have been chosen or written anew."""
        paths = {kind: control.value for kind, control in self.choices.items()}
        for kind, path in (paths | {"second style": self.controls.second.value}).items():
            wanted = path, path and nst.file_version(path)
            if self.drawn.get(kind) != wanted:
                self.display.show_input(kind, nst.jpeg(nst.load_image(path, INPUT, "cpu")) if path else b"")
                self.drawn[kind] = wanted

    # One frame after another

    def set_going(self, single: bool) -> None:
        """Set the frames going, for one evaluation or without end; what is under way takes this over."""
        self.single, self.presses = single, self.presses + 1
        if self.state != "running":
            self.moments.clear()  # so that the rate on display counts no pause
        self.tell("running")
        if self.pull:
            self.display.sent.value += 1
        self.loop.call_soon_threadsafe(self.keep_going)  # buttons may be heard on another thread than the loop's

    def keep_going(self) -> None:
        if not self.pull and (self.turns is None or self.turns.done()):
            self.turns = self.loop.create_task(self.work())
        if self.watching is None or self.watching.done():
            self.watching = self.loop.create_task(self.watch())

    async def work(self) -> None:
        """Push: frame after frame, until something else than "running" is asked for."""
        self.exchange()
        while self.frame:
            await asyncio.wait([asyncio.wrap_future(self.frame)])
            self.exchange()

    def acknowledged(self) -> None:
        """The browser has what was sent. Pull: so it asks for the next frame, and is answered at once or a bit later.

        Only the last number is answered: so there is never more than one question, and none waits in a queue.
        """
        if self.pull and self.state == "running" and self.display.seen.value == self.display.sent.value:
            if self.frame:
                wait([self.frame], ANSWER)
            self.exchange()
            self.display.sent.value += 1

    async def watch(self) -> None:
        """Pause when no browser is there: counted while the kernel is free, for otherwise it would hear of none."""
        silent, before = 0, None
        while self.state == "running" and silent < PATIENCE:
            await asyncio.sleep(1)
            seen = self.display.seen.value
            silent, before = 0 if seen != before or seen == self.display.sent.value else silent + 1, seen
        if self.state == "running":
            self.tell("paused", note=f"no browser has shown this panel for {PATIENCE} seconds: Start goes on")

    def exchange(self) -> None:
        """Show the frame that the worker has made, if it has, and have it make the next one."""
        try:
            if self.frame and self.frame.done():
                frame, self.frame = self.frame, None
                self.show(*frame.result())
            if self.state == "running" and not self.frame:
                self.frame = self.have_made()
        except Exception as error:  # nothing else would ever show it
            if self.state != "closed":
                self.tell("paused", note=nst.sentence(error))

    def have_made(self) -> Future:
        """Have the worker make a frame, of what the controls say now."""
        chosen = self.controls.start_from.value, self.controls.seed.value
        start = chosen if self.restarting or not self.shown else None
        self.restarting, self.answered = False, self.presses
        self.draw_inputs()
        asked = self.controls.settings(), start, self.controls.compare.value, self.single
        return self.worker.submit(self.turn, *asked)

    def show(self, frame: Frame, finished: bool) -> None:
        """Show a frame, unless the panel was paused meanwhile, or a button pressed, of which it is not the answer."""
        if self.state == "running" and self.answered == self.presses:
            self.shown = frame
            self.put_on_display()
            self.display.sent.value += not self.pull
            self.tell("done" if finished else "paused" if self.single else None)

    def image_shown(self) -> Tensor:
        """The image of the last frame, in the colours that are asked for."""
        image, content = self.shown.image, self.shown.content
        return image if content is None or not self.controls.keep_colours.value else nst.keep_colours(image, content)

    def put_on_display(self) -> None:
        frame, image = self.shown, self.image_shown()
        self.display.show(frame if image is frame.image else frame._replace(picture=nst.jpeg(image)))

    def turn(self, settings: Settings, start: tuple | None, compare: str, single: bool) -> tuple[Frame, bool]:
        """On the worker's thread: evaluations for as long as a frame lasts, at least one.

        Returns (the `Frame`; whether the run is done).
        """
        painter, begun = self.painter, time.perf_counter()  # close() takes the painter from the panel
        while step := painter.step(settings, start):
            self.moments.append(time.perf_counter())
            start = None
            if single or self.moments[-1] - begun > FRAME:
                break
        return self.draw(painter, settings, compare, with_chart=single or not step), not step

    def draw(self, painter: Painter, settings: Settings, compare: str, with_chart: bool) -> Frame:
        """The `Frame` of the painter's present image; the loss curves are drawn now and then, or `with_chart`."""
        image, difference, mean, chart = painter.run.image, None, math.nan, None
        reference = {"the start": painter.first, "the snapshot": self.snapshot}.get(compare)
        if reference is not None:
            error = nst.difference_map(image, nst.resize(reference, image.shape[-2:]))
            difference, mean = nst.jpeg(error), error.mean().item()
        if len(painter.curves) > 1 and (with_chart or time.perf_counter() > self.last_chart + CHART):
            chart, self.last_chart = nst.draw_losses(painter.curves), time.perf_counter()
        about = image, painter.last, settings, painter.start, len(painter.curves)
        return Frame(*about, nst.jpeg(image), difference, mean, chart, painter.run.task.content)

    def tell(self, state: str | None = None, note: str | None = None) -> None:
        """Change to `state`, and say in the status line what goes on; by default state and note stay."""
        self.state = state or self.state
        self.note = self.note if note is None else note
        running = self.state == "running"
        for name, button in self.buttons.items():
            off = {"Start": running, "Step": running, "Pause": not running}
            button.disabled = self.state == "closed" or off.get(name, False)
        numbers = ""
        if self.shown:
            step, (height, width) = self.shown.step, self.shown.step.shape
            numbers = f"{self.shown.evaluations} evaluations · {width} × {height}, {step.precision} · "
            numbers += f"loss {step.total:.4g}"
            if len(self.choices) == 2:
                numbers += f", of content {step.content:.3g} and style {step.style:.3g}, unweighted"
            if running and len(self.moments) > 1:
                rate = (len(self.moments) - 1) / (self.moments[-1] - self.moments[0])
                numbers += f" · {rate:.1f} evaluations a second"
        text = f"<b>{STATES[self.state]}</b> {escape(self.note)}"
        self.status.value = f'<div data-state="{self.state}" style="line-height:1.4">{text}<br>{numbers}</div>'
        if state or note or time.perf_counter() > self.last_spoken + SPOKEN:
            self.last_spoken = time.perf_counter()
            self.display.spoken.value = f'<div role="status" aria-live="polite" style={HIDDEN}>{text} {numbers}</div>'

    def _ipython_display_(self):
        """Show the panel; where there is no kernel, a still of it in use."""
        form = "_and_".join(self.choices)
        alt = "The panel in use: the living picture, the pictures it is made from, loss curves, buttons and sliders."
        view = {"version_major": 2, "version_minor": 0, "model_id": self.view.model_id}
        still = (nst.IMAGES / f"panel_{form}.jpg").read_bytes()
        bundle = {"application/vnd.jupyter.widget-view+json": view, "image/jpeg": still, "text/plain": alt}
        publish_display_data(bundle, metadata={"image/jpeg": {"alt": alt}})


_open = []  # the one panel that is open


def style_studio(
    content: str | Path | None = None, style: str | Path | None = None, *, size: int = 256,
    content_layer: str = "conv1_2", style_layers: str | Iterable[str] = nst.FIRST_FIVE,
    content_weight: float = 1.0, style_weight: float = 1e4, vgg: nn.Sequential | None = None, pull: bool | None = None,
) -> Studio:  # fmt: skip
    """A panel in which the optimisation goes on while its weights are moved; it opens ready, and Start sets it going.

    content, style: paths of images. With both, style transfer; with content alone, reconstruction; with style
    alone, texture synthesis. size: shorter side in pixels. content_layer, style_layers (a name or several, each of
    weight 1), content_weight, style_weight: what the controls open at, and Reset returns to. vgg: from `load_vgg19`,
    which is the default. pull: whether a frame is shown when the browser asks for it, instead of when it is made; by
    default in Colab alone, which needs it. It closes the panel that was open before, so that running a cell again
    leaves nothing behind.
    To be called in a notebook, as the last line of a cell. Raises UserError for bad input.
    """
    if content is None and style is None:
        raise nst.UserError("content and style are both None: give the path of at least one image")
    size = nst.as_whole(size, "size", " of pixels")
    if vgg is not None:
        nst.check_network(vgg)
    images = [None if path is None else nst.load_image(path, 32, "cpu") for path in (content, style)]
    content, style = (None if path is None else Path(os.path.abspath(path)) for path in (content, style))
    content_layer = nst.layer_name(content_layer)
    layer_weights = tuple((nst.layer_name(name), 1.0) for name in nst.as_layers(style_layers))
    layers = (content_layer,) if content else (), dict(layer_weights) if style else {}
    task = nst.as_task(nst.Task(*images, *layers, content_weight, style_weight))
    if style and not task.style_weight:
        raise nst.UserError(
            f"style_weight is {style_weight!r}: the panel's slider begins above 0: give more or no style"
        )
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise nst.UserError("no event loop runs here: call style_studio in a cell of a notebook") from error
    while _open:
        _open.pop().close()
    opening = Settings(content, style, size, content_layer, task.content_weight, task.style_weight, layer_weights)
    pull = "google.colab" in sys.modules if pull is None else bool(pull)
    _open.append(Studio(opening, Painter(nst.load_vgg19() if vgg is None else vgg), pull))
    return _open[-1]
