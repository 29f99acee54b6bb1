"""The interactive panel: an optimisation that goes on while its weights are moved.

`style_studio` makes the panel. `Painter` is the optimisation behind it, one evaluation a call, and knows nothing of
widgets; `Studio` is the widgets and the loop that lets the painter work on a thread of its own, so that the kernel
stays free for the panel's events and for other cells.
"""

import asyncio
import functools
import io
import itertools
import json
import math
import re
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import torch
from IPython.display import publish_display_data
from matplotlib.figure import Figure
from PIL.PngImagePlugin import PngInfo

import nst_utils as nst

STYLE_LAYERS = (*nst.FIRST_FIVE, "conv4_1", "conv5_1")  # the assignment's, and what Gatys et al. add below
LIMIT = 225  # evaluations in one go, as in `nst_utils.optimise`; most goes end before, when progress is slow
FRAME = 1 / 30  # seconds: no more than so many pictures a second are drawn
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
    """An optimisation whose settings may change between one evaluation and the next."""

    def __init__(self, vgg):
        self.preparation = nst.Preparation(vgg, vgg.mean.device)
        self.load = functools.lru_cache(maxsize=2)(nst.load_image)  # the content and the style
        self.settings = self.run = None
        self.layers = ()  # of the style, in the present run
        self.image = self.first = None  # the present picture, and the one that the run began with
        self.start = None  # (kind, seed) of that beginning
        self.scales = []  # still to go through, the present one first
        self.history, self.curves = [], []

    def step(self, settings, start=None):
        """Evaluate the network once; return the `Step`, or None when progress has become slow.

        start: None to go on from the present picture, or where to begin again: ("noise", seed), ("content", 0) or
        ("present", 0). Raises what `nst_utils` raises for bad input.
        """
        if start or self.run is None or settings != self.settings:
            self.run = None  # stays so if the settings are refused
            self.run = self.new_run(settings, start)
            self.settings = settings
        run, self.run = self.run, None  # so that after an error the next step begins another
        try:
            self.image, step = next(run)
        except StopIteration:
            return None
        self.run = run
        self.history.append(step)
        self.curves.append((step.total, settings.content_weight * step.content, settings.style_weight * step.style))
        return step

    def new_run(self, settings, start):
        """The run that these settings ask for, from `start` or from the present picture."""
        if start:
            self.layers = ()
        task = nst.as_task(self.task(settings))
        self.layers = tuple(task.style_layers)
        shape = tuple(task.picture.shape[-2:])
        if start or self.image is None:
            self.begin(task, shape, start or ("noise", 0))
        elif shape == self.scales[-1]:
            self.scales = self.scales[self.scales.index(tuple(self.image.shape[-2:])) :]
        else:
            self.image, self.scales = self.preparation.start(task, shape, self.image, coarse_to_fine=False)
        return self.preparation.run(task, self.image, self.scales, LIMIT, self.start[1])

    def begin(self, task, shape, start):
        """Forget the run before, and make the picture that `start` names the present one."""
        kind, seed = start
        if kind == "present" and self.image is None:
            raise ValueError("there is no present picture to start from yet: choose noise or content")
        init = {"noise": None, "content": task.content, "present": self.image}[kind]
        self.image, self.scales = self.preparation.start(task, shape, init, seed, coarse_to_fine=init is None)
        self.first, self.start = self.image, start
        self.history, self.curves = [], []

    def task(self, settings):
        device = self.preparation.device
        content, style = (
            None if path is None else self.load(path, settings.size, device)
            for path in (settings.content, settings.style)
        )
        content_layers = () if content is None else (settings.content_layer,)
        # A layer whose weight has become 0 stays until the next start: another set of layers is prepared anew.
        weights = {} if style is None else dict(settings.layer_weights)
        style_layers = {name: weights.get(name, 0.0) for name in (*self.layers, *weights) if weights}
        return nst.Task(content, style, content_layers, style_layers, settings.content_weight, settings.style_weight)


# --- Drawing -------------------------------------------------------------------------------------


def jpeg(image):
    """A picture (1, 3, H, W) as the bytes of a JPEG file: drawn in a tenth of the time of a PNG."""
    buffer = io.BytesIO()
    nst.to_pil(image).save(buffer, "jpeg", quality=88)
    return buffer.getvalue()


def draw_losses(curves):
    """Loss curves as the bytes of a PNG file; curves: [(total, weighted content loss, weighted style loss), ...]."""
    figure = Figure(figsize=(5.2, 2.1), layout="constrained")  # not pyplot's: this runs beside the main thread
    axes = figure.subplots()
    curves = dict(zip(("total", "content × its weight", "style × its weight"), zip(*curves)))
    for (label, values), colour, line in zip(curves.items(), ("black", "C0", "C1"), ("-", "--", "-.")):
        if any(values):
            axes.semilogy(range(1, len(values) + 1), values, line, color=colour, label=label, linewidth=1.3)
    axes.set_xlabel("evaluations", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return buffer.getvalue()


class Frame(NamedTuple):
    """What one turn of the loop puts on display."""

    image: torch.Tensor
    step: nst.Step
    settings: Settings
    start: tuple  # (kind, seed) of the run that it belongs to
    evaluations: int  # since that start
    picture: bytes
    difference: bytes | None
    mean: float  # difference to the reference, averaged over pixels and channels; nan without one
    chart: bytes | None


# --- The panel -----------------------------------------------------------------------------------


def stored(kind):
    """[(name, path)] of the pictures in images/content or images/style."""
    return [(path.stem.replace("_", " "), path) for path in sorted((nst.IMAGES / kind).glob("*.*"))]


def in_order(layers):
    """Layers, each once, in the network's order: conv1_1, relu1_1, conv1_2, ..."""
    return sorted(set(layers), key=lambda name: (name[4:], name))


def captioned(caption, picture):
    return widgets.VBox([widgets.Label(caption), picture], layout={"margin": "0 8px 8px 0", "max_width": "100%"})


class Studio:
    """The panel: controls, the living picture, and the loop that moves it. Made by `style_studio`.

    opening: the `Settings` that the controls open at, and whose layers and weights Reset goes back to. painter: a
    `Painter`; only the worker's thread touches it. state: "ready", "running", "paused", "done" (progress is slow) or
    "closed".
    """

    def __init__(self, opening, painter):
        before = set(widgets.widget._instances)
        self.loop = asyncio.get_running_loop()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="style-studio")
        self.opening, self.painter = opening, painter
        self.uploads = tempfile.TemporaryDirectory(prefix="style-studio-")
        self.state, self.task = "ready", None
        self.shown, self.snapshot = None, None  # the last Frame, and a picture that was kept
        self.single, self.restarting, self.presses = False, False, 0  # what the last button asked for
        self.moments, self.last_chart = deque(maxlen=20), -math.inf
        self.build()
        self.widgets = [widgets.widget._instances[key] for key in widgets.widget._instances.keys() - before]
        self.tell()

    # Controls

    def build(self):
        content, style, size = self.opening[:3]
        wide = {"layout": {"width": "340px", "max_width": "100%"}, "style": {"description_width": "112px"}}

        def choice(kind, path):
            options = stored(kind)
            if path not in dict(options).values():
                options.append((path.stem.replace("_", " "), path))
            return widgets.Dropdown(options=options, value=path, description=kind, **wide)

        def upload(kind):
            return widgets.FileUpload(accept="image/*", description=f"Upload {kind}", layout={"width": "160px"})

        def slider(kind, description, smallest, largest, form, step=0.1):
            return kind(description=description, min=smallest, max=largest, readout_format=form, step=step, **wide)

        roles = {"content": content, "style": style}
        self.choices = {kind: choice(kind, path) for kind, path in roles.items() if path}
        self.uploaders = {kind: upload(kind) for kind in self.choices}
        offered = in_order({*nst.CONVOLUTIONS, self.opening.content_layer})
        self.content_layer = widgets.Dropdown(options=offered, description="content layer", **wide)
        # The browser rounds a slider's value to its steps, counted from the smallest: the opening one must be a step.
        weight, power = self.opening.content_weight, math.log10(self.opening.style_weight or 1.0)
        step = weight / max(1, round(10 * weight)) or 0.1
        self.content_weight = slider(widgets.FloatSlider, "content weight", 0, max(10, weight), ".3g", step)
        smallest = power - max(0, math.ceil(10 * power)) / 10
        self.style_weight = slider(widgets.FloatLogSlider, "style weight", smallest, max(7, power), ".1e")
        self.layer_weights = {
            name: slider(widgets.FloatSlider, f"style {name}", 0, 2, ".1f")
            for name in in_order({*STYLE_LAYERS, *dict(self.opening.layer_weights)})
        }
        sizes = sorted({128, 192, 256, 384, 512, size})
        self.size = widgets.Dropdown(options=sizes, value=size, description="size in pixels", **wide)
        starts = [("noise", "noise"), *([("content", "content")] if content else []), ("present picture", "present")]
        self.start_from = widgets.Dropdown(options=starts, description="start from", **wide)
        self.seed = widgets.BoundedIntText(0, min=0, max=10**6, description="noise seed", **wide)
        self.compare = widgets.Dropdown(
            options=["nothing", "the start", "the snapshot"],
            description="difference to",
            **wide,
        )
        self.reset()

        actions = {
            "Start": (self.start, "play", "Go on from the present picture"),
            "Pause": (self.pause, "pause", "Stop at the picture on display"),
            "Step": (self.step, "step-forward", "One evaluation of the network"),
            "Restart": (self.restart, "refresh", "Begin again from the chosen start"),
            "Snapshot": (self.keep, "camera", "Keep this picture for the difference map"),
            "Save": (self.save, "download", "Write a PNG file with the settings in it"),
            "Reset": (self.reset, "undo", "The layers and weights that the panel opened with"),
        }
        self.buttons = {}
        for name, (action, icon, tooltip) in actions.items():
            button = widgets.Button(description=name, icon=icon, tooltip=tooltip, layout={"width": "102px"})
            button.on_click(lambda _, action=action: action())
            self.buttons[name] = button

        both = content and style
        weights = [self.content_weight, self.style_weight] if both else []
        layers = [*([self.content_layer] if content else []), *(self.layer_weights.values() if style else [])]
        inputs = [*self.choices.values(), *weights, *layers, self.size]
        for control in inputs:
            control.observe(lambda _: self.moved(), "value")
        for kind, control in self.choices.items():
            control.observe(lambda _, kind=kind: self.draw_input(kind), "value")
            self.uploaders[kind].observe(lambda _, kind=kind: self.take_upload(kind), "value")

        fluid = {"width": "100%", "max_width": "400px"}
        small = {"width": "130px", "max_width": "100%"}
        self.picture = widgets.Image(format="jpeg", layout={**fluid, "display": "none"})
        self.difference = widgets.Image(format="jpeg", layout={**fluid, "display": "none"})
        self.chart = widgets.Image(format="png", layout={**fluid, "display": "none"})
        self.inputs = {kind: widgets.Image(format="jpeg", layout=small) for kind in self.choices}
        self.picture.add_class("living-picture")
        self.difference.add_class("difference-map")
        self.status = widgets.HTML(layout={"width": "100%"})
        self.caption = widgets.Label(layout={"display": "none"})
        for kind in self.choices:
            self.draw_input(kind)

        wrap = {"flex_flow": "row wrap", "width": "100%"}
        pictures = widgets.VBox(
            [
                self.picture,
                self.caption,
                self.difference,
                widgets.HBox([captioned(kind, picture) for kind, picture in self.inputs.items()], layout=wrap),
                self.chart,
            ],
            layout={"width": "400px", "max_width": "100%", "margin": "0 16px 0 0"},
        )
        controls = [*self.choices.values(), widgets.HBox([*self.uploaders.values()], layout=wrap)]
        controls += [*weights, *layers, self.size, self.start_from, self.seed, self.compare]
        self.view = widgets.VBox(
            [
                widgets.HBox([*self.buttons.values()], layout=wrap),
                self.status,
                widgets.HBox(
                    [pictures, widgets.VBox(controls, layout={"width": "360px", "max_width": "100%"})], layout=wrap
                ),
            ]
        )

    def settings(self):
        paths = {kind: control.value for kind, control in self.choices.items()}
        return Settings(
            content=paths.get("content"),
            style=paths.get("style"),
            size=self.size.value,
            content_layer=self.content_layer.value,
            content_weight=self.content_weight.value * ("content" in paths),
            style_weight=self.style_weight.value * ("style" in paths),
            layer_weights=tuple(
                (name, control.value)
                for name, control in self.layer_weights.items()
                if control.value and "style" in paths
            ),
        )

    # What the buttons do

    def start(self):
        """Go on from the present picture until paused or until progress is slow."""
        self.loop.call_soon_threadsafe(self.set_going, False)

    def step(self):
        """One evaluation of the network."""
        self.loop.call_soon_threadsafe(self.set_going, True)

    def pause(self):
        """Stop; what is on display stays. An evaluation under way ends unseen."""
        if self.state == "running":
            self.tell("paused")

    def restart(self):
        """Begin again from the chosen start."""
        self.restarting = True
        self.start()

    def reset(self):
        """The layers and weights that the panel opened with."""
        self.content_layer.value = self.opening.content_layer
        self.content_weight.value, self.style_weight.value = self.opening.content_weight, self.opening.style_weight
        for name, control in self.layer_weights.items():
            control.value = dict(self.opening.layer_weights).get(name, 0.0)

    def keep(self):
        """Keep the picture on display for the difference map."""
        if self.shown:
            self.snapshot = self.shown.image
            self.compare.value = "the snapshot"
            self.tell(note="this picture is kept: the difference map shows what changes from here")

    def save(self):
        """Write the picture on display to saved/, as a PNG file with the settings in its text field "settings"."""
        if not self.shown:
            return self.tell(note="there is no picture to save yet: press Start")
        settings = self.shown.settings
        names = [path.stem for path in (settings.content, settings.style) if path]
        about = settings._asdict() | {
            kind: getattr(settings, kind) and getattr(settings, kind).name for kind in self.choices
        }
        about |= {
            "layer_weights": dict(settings.layer_weights),
            "start": self.shown.start[0],
            "seed": self.shown.start[1],
        }
        text = PngInfo()
        text.add_text("settings", json.dumps(about | {"losses": self.shown.step._asdict()}))
        folder = Path("saved")
        folder.mkdir(exist_ok=True)
        paths = (folder / f"{'_'.join(names)}_{k:03}.png" for k in itertools.count(1))
        path = next(path for path in paths if not path.exists())
        nst.to_pil(self.shown.image).save(path, pnginfo=text)
        self.tell(note=f"saved {path}")

    def close(self):
        """Stop and take the panel away; no thread, task, widget or picture stays behind."""
        self.tell("closed")
        self.worker.shutdown(wait=False)
        self.uploads.cleanup()
        self.painter = self.shown = self.snapshot = None
        for widget in self.widgets:
            widget.close()

    def take_upload(self, kind):
        """Offer the uploaded pictures, each in a folder of its own, and choose the last."""
        for file in self.uploaders[kind].value:
            name = re.sub(r"[^\w.-]+", " ", Path(file["name"]).name).strip(" .")[-60:] or "picture"
            path = Path(tempfile.mkdtemp(dir=self.uploads.name)) / name
            path.write_bytes(file["content"])
            try:
                nst.load_image(path, 32, "cpu")
            except ValueError as error:
                self.tell(note=str(error).replace(str(path), file["name"]))
                continue
            control = self.choices[kind]
            control.options = list((dict(control.options) | {path.stem: path}).items())
            control.value = path

    def draw_input(self, kind):
        self.inputs[kind].value = jpeg(nst.load_image(self.choices[kind].value, 130, "cpu"))

    def moved(self):
        """A control was moved: a panel that had finished goes on."""
        if self.state == "done":
            self.start()

    # The loop

    def set_going(self, single):
        """Set the loop going, for one evaluation or without end; a loop still at work takes this over."""
        if self.state == "closed":
            return
        self.single, self.presses = single, self.presses + 1
        idle = self.task is None or self.task.done()
        if idle:
            self.moments.clear()  # so that the rate on display counts no pause
        self.tell("running")
        if idle:
            self.task = self.loop.create_task(self.work())

    async def work(self):
        try:
            while self.state == "running":
                start = (self.start_from.value, self.seed.value) if self.restarting or not self.shown else None
                self.restarting, presses = False, self.presses
                frame, finished = await self.loop.run_in_executor(
                    self.worker, self.turn, self.settings(), start, self.compare.value, self.single
                )
                if self.state != "running":
                    return
                if presses != self.presses:
                    continue  # a button was pressed meanwhile: this is not yet its answer
                self.show(frame)
                if finished:
                    return self.tell("done")
                if self.single:
                    return self.tell("paused")
        except Exception as error:  # nothing else would ever show it
            if self.state != "closed":
                self.tell("paused", note=f"{type(error).__name__}: {error}")

    def turn(self, settings, start, compare, single):
        """On the worker's thread: evaluations for as long as a frame lasts, at least one.

        Returns (the `Frame`; whether progress has become slow).
        """
        painter, begun, last = self.painter, time.perf_counter(), None  # close() takes the painter from the panel
        while True:
            step = painter.step(settings, start)
            if step is None:
                break
            self.moments.append(time.perf_counter())
            start, last = None, step
            if single or self.moments[-1] - begun > FRAME:
                break
        finished = step is None
        if finished:
            last = painter.history[-1]  # drawn again, so that the curves on display are whole
        return self.draw(painter, last, settings, compare, with_chart=single or finished), finished

    def draw(self, painter, step, settings, compare, with_chart):
        """The `Frame` of the painter's present picture; the loss curves are drawn now and then, or `with_chart`."""
        reference = {"the start": painter.first, "the snapshot": self.snapshot}.get(compare)
        difference, mean = None, math.nan
        if reference is not None:
            gap = nst.difference_map(painter.image, nst.resize(reference, painter.image.shape[-2:]))
            difference, mean = jpeg(gap), gap.mean().item()
        chart = None
        if len(painter.history) > 1 and (with_chart or time.perf_counter() > self.last_chart + CHART):
            chart = draw_losses(painter.curves)
            self.last_chart = time.perf_counter()
        return Frame(
            image=painter.image,
            step=step,
            settings=settings,
            start=painter.start,
            evaluations=len(painter.history),
            picture=jpeg(painter.image),
            difference=difference,
            mean=mean,
            chart=chart,
        )

    def show(self, frame):
        self.shown = frame
        self.picture.value, self.picture.layout.display = frame.picture, ""
        if frame.chart:
            self.chart.value, self.chart.layout.display = frame.chart, ""
        self.difference.layout.display = "" if frame.difference else "none"
        self.caption.layout.display = self.difference.layout.display
        if frame.difference:
            self.difference.value, self.caption.value = frame.difference, f"difference map, mean {frame.mean:.4f}"
        self.tell()

    def tell(self, state=None, note=""):
        """Change to `state`, and say in the status line what goes on."""
        self.state = state or self.state
        running = self.state == "running"
        for name, button in self.buttons.items():
            off = {"Start": running, "Step": running, "Pause": not running}
            button.disabled = self.state == "closed" or off.get(name, False)
        says = {
            "ready": "Ready. Press Start.",
            "running": "Running; the kernel is free for other cells.",
            "paused": "Paused.",
            "done": f"Finished: progress is slow, or {LIMIT} evaluations are done. A moved control or Start goes on.",
            "closed": "Closed. Run the cell again.",
        }[self.state]
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
            f"<b>{says}</b> {escape(note)}<br>{numbers}</div>"
        )

    def _ipython_display_(self):
        """Show the panel; where there is no kernel, a still of it in use."""
        form = "_and_".join(self.choices)
        alt = "The panel in use: the living picture, the pictures it is made from, loss curves, buttons and sliders."
        bundle = {
            "application/vnd.jupyter.widget-view+json": {
                "version_major": 2,
                "version_minor": 0,
                "model_id": self.view.model_id,
            },
            "image/jpeg": (nst.IMAGES / f"panel_{form}.jpg").read_bytes(),
            "text/plain": alt,
        }
        publish_display_data(bundle, metadata={"image/jpeg": {"alt": alt}})


_open = []  # the one panel that is open


def style_studio(
    content=None,
    style=None,
    *,
    size=256,
    content_layer="conv1_2",
    style_layers=nst.FIRST_FIVE,
    content_weight=1.0,
    style_weight=1e4,
    vgg=None,
):
    """A panel in which the optimisation goes on while its weights are moved; it opens ready, and Start sets it going.

    content, style: paths of pictures. With both, style transfer; with content alone, reconstruction; with style
    alone, texture synthesis. size: shorter side in pixels. content_layer, style_layers (a name or several, each of
    weight 1), content_weight, style_weight: what the controls open at, and Reset goes back to. vgg: from `load_vgg19`,
    which is the default. It closes the panel that was open before, so that running a cell again leaves nothing behind.
    To be called in a notebook, as the last line of a cell. Raises FileNotFoundError or ValueError for bad input.
    """
    if content is None and style is None:
        raise ValueError("content and style are both None: give the path of at least one picture")
    size = nst.as_whole(size, "size", " of pixels")
    content, style = (None if path is None else Path(path) for path in (content, style))
    pictures = [path and nst.load_image(path, 32, "cpu") for path in (content, style)]
    content_layer = nst.layer_name(content_layer)
    layer_weights = tuple((nst.layer_name(name), 1.0) for name in nst.as_layers(style_layers))
    layers = (content_layer,) if content else (), dict(layer_weights) if style else {}
    task = nst.as_task(nst.Task(*pictures, *layers, content_weight, style_weight))
    if style and not task.style_weight:
        raise ValueError(
            f"style_weight is {style_weight!r}: the panel's slider begins above 0, so give more or no style"
        )
    try:
        asyncio.get_running_loop()
    except RuntimeError as error:
        raise ValueError("no event loop runs here: call style_studio in a cell of a notebook") from error
    while _open:
        _open.pop().close()
    opening = Settings(content, style, size, content_layer, task.content_weight, task.style_weight, layer_weights)
    _open.append(Studio(opening, Painter(vgg or nst.load_vgg19())))
    return _open[-1]
