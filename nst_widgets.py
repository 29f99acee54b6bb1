"""The interactive panel: an optimisation that goes on while its weights are moved.

`style_studio` makes the panel. `Painter` is the run behind it, one evaluation a call, and knows nothing of widgets.
`Controls` and `Display` are the widgets that take and show; `Studio` lays them out, and its loop lets the painter work
on a thread of its own, so that the kernel stays free for the panel's events and for other cells.

A moved slider: `Controls.settings` -> `Painter.step` -> `Run.retarget` -> `Run.step` -> `Display.show`.
"""

import asyncio
import functools
import hashlib
import io
import json
import math
import os
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
from IPython.display import publish_display_data
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

import nst_utils as nst

STYLE_LAYERS = (*nst.FIRST_FIVE, "conv4_1", "conv5_1")  # the assignment's, and what Gatys et al. add below
FRAME = 1 / 30  # seconds: no more than so many images a second are drawn
INPUT = 130  # pixels along the shorter side of the images that go in, as they are shown
CHART = 2.0  # seconds from one drawing of the loss curves to the next, since each takes a tenth of one

# --- The optimisation ----------------------------------------------------------------------------


class Settings(NamedTuple):
    """What the panel's controls say. Hashable, so that a change is a difference."""

    content: Path | None  # None: a texture
    style: Path | None  # None: a reconstruction
    size: int  # shorter side in pixels
    content_layer: str
    content_weight: float
    style_weight: float
    layer_weights: tuple  # ((style layer, weight above 0), ...)


class Painter:
    """A run on images by path, whose settings may change between one evaluation and the next, and its loss curves."""

    def __init__(self, vgg: nn.Sequential):
        self.vgg = vgg
        self.read = functools.lru_cache(maxsize=2)(lambda path, version, *options: nst.load_image(path, *options))
        self.run = self.asked = None  # asked: the settings that the run has, and the versions of their files
        self.first = self.start = None  # the image that the run began with, and (kind, seed) of that beginning
        self.layers = ()  # of the style, since the start
        self.last = None  # the latest `Step`
        self.curves = []  # after each evaluation since the start: (total, weighted content, weighted style loss)

    def step(self, settings: Settings, start: tuple | None = None) -> nst.Step | None:
        """Evaluate the network once; return the `Step`, or None when the run is done. The next step then goes on.

        start: None to go on from the present image, or where to begin again: ("noise", seed), ("content", 0) or
        ("present", 0). Raises what `nst_utils` raises for bad input.
        """
        asked = settings, *map(nst.file_version, filter(None, (settings.content, settings.style)))
        if start or asked != self.asked:
            self.change(settings, start)
            self.asked = asked
        step = self.run.step()
        if step is None:
            self.asked = None
        else:
            self.last = step
            self.curves.append((step.total, settings.content_weight * step.content, settings.style_weight * step.style))
        return step

    def change(self, settings: Settings, start: tuple | None) -> None:
        """Have the run that these settings ask for: another one from `start`, or the present one with another task."""
        task = self.task(settings, () if start else self.layers)
        if start or not self.run:
            kind, seed = start or ("noise", 0)
            if kind == "present" and not self.run:
                raise nst.UserError("there is no present image to start from yet: choose noise or content")
            init = self.run.image if kind == "present" else kind
            self.run = nst.Run(task, init=init, seed=seed, coarse_to_fine=kind == "noise", vgg=self.vgg)
            self.first, self.start, self.curves = self.run.image, (kind, seed), []
        elif task.reference.shape[-2:] != self.run.shape:
            self.run = nst.Run(task, init=self.run.image, coarse_to_fine=False, vgg=self.vgg)
        else:
            self.run.retarget(task)
        self.layers = tuple(task.style_layers)

    def task(self, settings: Settings, layers: tuple) -> nst.Task:
        """layers: of the style, which stay though their weight has become 0: another set would be prepared anew."""
        content, style = (
            path and self.read(path, nst.file_version(path), settings.size, self.vgg.mean.device)
            for path in (settings.content, settings.style)
        )
        weights = dict(settings.layer_weights) if settings.style else {}
        style_layers = {name: weights.get(name, 0.0) for name in (*layers, *weights) if weights}
        content_layers = (settings.content_layer,) if settings.content else ()
        return nst.Task(content, style, content_layers, style_layers, settings.content_weight, settings.style_weight)


# --- The widgets ---------------------------------------------------------------------------------

WRAP = {"flex_flow": "row wrap", "width": "100%"}


def stored(kind: str) -> list[Path]:
    """The images in images/content or images/style."""
    return [path for path in sorted((nst.IMAGES / kind).glob("*")) if nst.is_picture(path)]


def labelled_once(paths: Iterable[Path]) -> list[tuple[str, Path]]:
    """[(label, path)] for a Dropdown; files of one name have labels of their own, and the last keeps its name."""
    labels = {}
    for path in reversed([*paths]):
        names = path.stem.replace("_", " "), path.name, *(f"{path.name} ({k})" for k in range(2, 1000))
        labels[next(name for name in names if name not in labels)] = path
    return [*labels.items()][::-1]


def in_order(layers: Iterable[str]) -> list[str]:
    """Layers, each once, in the network's order: conv1_1, relu1_1, conv1_2, ..."""
    return sorted(set(layers), key=lambda name: (name[4:], name))


def tree(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """A widget, all that it contains, and their layouts and styles."""
    for part in (widget, getattr(widget, "layout", None), getattr(widget, "style", None)):
        if isinstance(part, widgets.Widget):
            yield part
    for child in getattr(widget, "children", ()):
        yield from tree(child)


def uploaded_files(value: tuple | dict) -> list[tuple[str, bytes]]:
    """[(name, content)] of a FileUpload's value: a tuple since ipywidgets 8, before that a dict by names."""
    named = value.items() if isinstance(value, dict) else ((file["name"], file) for file in value)
    return [(name, bytes(file["content"])) for name, file in named]


def labelled(label: str, kind: str, options: dict) -> widgets.Widget:
    """A control of ipywidgets' class `kind`, with its label to the left."""
    layout, style = {"width": "340px", "max_width": "100%"}, {"description_width": "112px"}
    return getattr(widgets, kind)(description=label, layout=layout, style=style, **options)


class Controls:
    """The widgets that the user sets; opening: the `Settings` they open at. `settings` reads them."""

    def __init__(self, opening: Settings):
        self.opening = opening
        roles = [kind for kind in ("content", "style") if getattr(opening, kind)]
        weight, power = opening.content_weight, math.log10(opening.style_weight or 1.0)
        # The browser rounds a slider's value to its steps, counted from the smallest: the opening one must be a step.
        of_content = {"max": max(10, weight), "step": weight / max(1, round(10 * weight)) or 0.1}
        of_style = {"min": power - max(0, math.ceil(10 * power)) / 10, "max": max(7, power), "step": 0.1}
        of_layer = {"max": 2, "step": 0.1, "readout_format": ".1f"}
        starts = [("noise", "noise"), *[("content", "content")] * ("content" in roles), ("present image", "present")]
        declared = [  # (name, label, kind, options)
            ("content_layer", "content layer", "Dropdown", {"options": in_order({*nst.CONVOLUTIONS, opening[3]})}),
            ("content_weight", "content weight", "FloatSlider", {**of_content, "readout_format": ".3g"}),
            ("style_weight", "style weight", "FloatLogSlider", {**of_style, "readout_format": ".1e"}),
            ("size", "size in pixels", "Dropdown", {"options": sorted({128, 192, 256, 384, 512, opening.size})}),
            ("start_from", "start from", "Dropdown", {"options": starts}),
            ("seed", "noise seed", "BoundedIntText", {"max": 10**6}),
            ("compare", "difference to", "Dropdown", {"options": ["nothing", "the start", "the snapshot"]}),
        ]
        for name, label, kind, options in declared:
            setattr(self, name, labelled(label, kind, options))
        layers = in_order({*STYLE_LAYERS, *dict(opening.layer_weights)})
        self.layer_weights = {name: labelled(f"style {name}", "FloatSlider", of_layer) for name in layers}
        self.choices, self.uploaders = {}, {}
        for kind in roles:
            path, upload = getattr(opening, kind), {"accept": "image/*", "layout": {"width": "160px"}}
            paths = stored(kind)
            options = labelled_once(paths if path in paths else [path, *paths])
            self.choices[kind] = labelled(kind, "Dropdown", {"options": options, "value": path})
            self.uploaders[kind] = widgets.FileUpload(description=f"Upload {kind}", **upload)
        self.size.value = opening.size
        self.reset()

    def inputs(self) -> list[widgets.Widget]:
        """The controls that change the result, in their order in the panel."""
        weights = [self.content_weight, self.style_weight] if len(self.choices) == 2 else []
        content = [self.content_layer] if "content" in self.choices else []
        style = [*self.layer_weights.values()] if "style" in self.choices else []
        return [*self.choices.values(), *weights, *content, *style, self.size]

    def offer(self, kind: str, path: Path) -> None:
        """Choose an image, which is offered first in its list if it is not there yet."""
        control = self.choices[kind]
        paths = [offered for _, offered in control.options]
        if path not in paths:
            control.options = labelled_once([path, *paths])  # a new list has its first image chosen
        control.value = path

    def settings(self) -> Settings:
        content, style = (getattr(self.choices.get(kind), "value", None) for kind in ("content", "style"))
        weights = tuple((name, slider.value) for name, slider in self.layer_weights.items() if slider.value and style)
        totals = self.content_weight.value * bool(content), self.style_weight.value * bool(style)
        return Settings(content, style, self.size.value, self.content_layer.value, *totals, weights)

    def reset(self) -> None:
        """Go back to the layers and weights that the panel opened with."""
        for name in ("content_layer", "content_weight", "style_weight"):
            getattr(self, name).value = getattr(self.opening, name)
        for name, slider in self.layer_weights.items():
            slider.value = dict(self.opening.layer_weights).get(name, 0.0)


class Frame(NamedTuple):
    """What one turn of the loop puts on display."""

    image: Tensor
    step: nst.Step
    settings: Settings
    start: tuple  # (kind, seed) of the run that it belongs to
    evaluations: int  # since that start
    picture: bytes
    difference: bytes | None
    mean: float  # difference to the reference, averaged over pixels and channels; nan without one
    chart: bytes | None


class Display:
    """The widgets that show: the living picture, difference map, loss curves, inputs and status line."""

    def __init__(self, kinds: Iterable[str]):
        fluid = {"width": "100%", "max_width": "400px", "display": "none"}
        self.picture, self.difference, self.chart = (
            widgets.Image(format=form, layout=fluid) for form in ("jpeg", "jpeg", "png")
        )
        small = {"width": "130px", "max_width": "100%"}
        self.inputs = {kind: widgets.Image(format="jpeg", layout=small) for kind in kinds}
        self.picture.add_class("living-picture")
        self.difference.add_class("difference-map")
        self.status = widgets.HTML(layout={"width": "100%"})
        self.caption = widgets.Label(layout={"display": "none"})

    def show(self, frame: Frame) -> None:
        shown = {self.picture: frame.picture, self.chart: frame.chart or self.chart.value}
        for image, value in (shown | {self.difference: frame.difference}).items():
            image.value, image.layout.display = value or b"", "" if value else "none"
        self.caption.layout.display = self.difference.layout.display
        self.caption.value = f"difference map, mean {frame.mean:.4f}"


def lay_out(controls: Controls, display: Display, buttons: Iterable[widgets.Button]) -> widgets.VBox:
    """The panel: buttons and status line, below them the pictures beside the controls, or above them where narrow."""
    column = {"margin": "0 8px 8px 0", "max_width": "100%"}
    inputs = [widgets.VBox([widgets.Label(kind), image], layout=column) for kind, image in display.inputs.items()]
    pictures = [display.picture, display.caption, display.difference, widgets.HBox(inputs, layout=WRAP), display.chart]
    left = widgets.VBox(pictures, layout={"width": "400px", "max_width": "100%", "margin": "0 16px 0 0"})
    chosen, others = controls.inputs()[: len(controls.choices)], controls.inputs()[len(controls.choices) :]
    uploads = widgets.HBox([*controls.uploaders.values()], layout=WRAP)
    folders = " or ".join(f"images/{kind}" for kind in controls.uploaders)
    text = f"Files of more than 10 MB: put them into {folders}, and run this cell again."
    limit = widgets.HTML(
        f'<div style="line-height:1.3;font-size:smaller">{text}</div>', layout={"margin": "2px 2px 6px"}
    )
    rows = [*chosen, uploads, limit, *others, controls.start_from, controls.seed, controls.compare]
    right = widgets.VBox(rows, layout={"width": "360px", "max_width": "100%"})
    return widgets.VBox(
        [widgets.HBox([*buttons], layout=WRAP), display.status, widgets.HBox([left, right], layout=WRAP)]
    )


# --- The panel -----------------------------------------------------------------------------------

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
    "ready": "Ready. Press Start.",
    "running": "Running; the kernel is free for other cells.",
    "paused": "Paused.",
    "done": "Finished: progress is slow, or all evaluations are used up. A moved control or Start goes on.",
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

    painter: a `Painter`; only the worker's thread touches it. state: a key of `STATES`.
    """

    def __init__(self, opening: Settings, painter: Painter):
        self.loop = asyncio.get_running_loop()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="style-studio")
        self.painter, self.uploads = painter, tempfile.TemporaryDirectory(prefix="style-studio-")
        self.state, self.turns = "ready", None  # the loop's asyncio task
        self.note, self.acting = "", False  # in the status line; whether an action is under way
        self.drawn = {}  # {kind: (path, version) of the image among the inputs}
        self.shown, self.snapshot = None, None  # the last Frame, and an image that was kept
        self.single, self.restarting, self.presses = False, False, 0  # what the last button asked for
        self.moments, self.last_chart = deque(maxlen=20), -math.inf
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
        for kind, uploader in self.uploaders.items():
            uploader.observe(lambda _, kind=kind: self.take_upload(kind), "value")
        self.draw_inputs()
        self.view = lay_out(self.controls, self.display, self.buttons.values())
        self.tell()

    # What the buttons do

    @action
    def start(self) -> None:
        """Go on from the present image until paused or until the run is done."""
        self.loop.call_soon_threadsafe(self.set_going, False)

    @action
    def step(self) -> None:
        """One evaluation of the network."""
        self.loop.call_soon_threadsafe(self.set_going, True)

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
        about |= {"layer_weights": dict(settings.layer_weights), "start": start, "seed": seed}
        text = PngInfo()
        text.add_text("settings", json.dumps(about | {"losses": self.shown.step._asdict()}, default=str))
        buffer, stem = io.BytesIO(), nst.joint_stem(*names.values())
        nst.to_pil(self.shown.image).save(buffer, "png", pnginfo=text)
        try:
            self.tell(note=f"saved {nst.write_numbered(Path('saved'), stem, '.png', buffer.getvalue())}")
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
        self.worker.shutdown(wait=False)
        self.uploads.cleanup()
        self.painter = self.shown = self.snapshot = None
        for widget in [*tree(self.view)]:
            widget.close()

    @action
    def take_upload(self, kind: str) -> None:
        """Offer the uploaded images, each in a folder of its own, and choose the last."""
        uploader = self.uploaders[kind]
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
                nst.load_image(path, INPUT, "cpu")
            except nst.UserError as error:
                self.tell(note=f"{self.note} {str(error).replace(repr(str(path)), repr(given))}".strip())
                continue
            self.controls.offer(kind, path)

    @action
    def moved(self) -> None:
        """A control was moved: a panel that had finished goes on."""
        self.draw_inputs()
        if self.state == "done":
            self.start()

    chosen = action(lambda self: None)  # another start or comparison, which the next step or restart asks for

    def draw_inputs(self) -> None:
        """Show the inputs, those that have been chosen or written anew."""
        for kind, control in self.choices.items():
            wanted = control.value, nst.file_version(control.value)
            if self.drawn.get(kind) != wanted:
                self.display.inputs[kind].value = nst.jpeg(nst.load_image(control.value, INPUT, "cpu"))
                self.drawn[kind] = wanted

    # The loop

    def set_going(self, single: bool) -> None:
        """Set the loop going, for one evaluation or without end; a loop still at work takes this over."""
        if self.state == "closed":
            return
        self.single, self.presses = single, self.presses + 1
        idle = self.turns is None or self.turns.done()
        if idle:
            self.moments.clear()  # so that the rate on display counts no pause
        self.tell("running")
        if idle:
            self.turns = self.loop.create_task(self.work())

    async def work(self) -> None:
        """Turn after turn, until something else than "running" is asked for."""
        try:
            while self.state == "running":
                chosen = self.controls.start_from.value, self.controls.seed.value
                start = chosen if self.restarting or not self.shown else None
                self.restarting, presses = False, self.presses
                asked = self.controls.settings(), start, self.controls.compare.value, self.single
                self.draw_inputs()
                frame, finished = await self.loop.run_in_executor(self.worker, self.turn, *asked)
                if self.state != "running":
                    return
                if presses != self.presses:
                    continue  # a button was pressed meanwhile: this is not yet its answer
                self.shown = frame
                self.display.show(frame)
                self.tell("done" if finished else "paused" if self.single else None)
        except Exception as error:  # nothing else would ever show it
            if self.state != "closed":
                self.tell("paused", note=nst.sentence(error))

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
        return Frame(*about, nst.jpeg(image), difference, mean, chart)

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
        self.status.value = (
            f'<div role="status" aria-live="polite" data-state="{self.state}" style="line-height:1.4">'
            f"<b>{STATES[self.state]}</b> {escape(self.note)}<br>{numbers}</div>"
        )

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
    content_weight: float = 1.0, style_weight: float = 1e4, vgg: nn.Sequential | None = None,
) -> Studio:  # fmt: skip
    """A panel in which the optimisation goes on while its weights are moved; it opens ready, and Start sets it going.

    content, style: paths of images. With both, style transfer; with content alone, reconstruction; with style
    alone, texture synthesis. size: shorter side in pixels. content_layer, style_layers (a name or several, each of
    weight 1), content_weight, style_weight: what the controls open at, and Reset returns to. vgg: from `load_vgg19`,
    which is the default. It closes the panel that was open before, so that running a cell again leaves nothing behind.
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
    _open.append(Studio(opening, Painter(nst.load_vgg19() if vgg is None else vgg)))
    return _open[-1]
