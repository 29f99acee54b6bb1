"""The panel's widgets: `Controls` to set values, a `Display` of images, and their layout. studio.py connects them."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ipywidgets as widgets
import psutil

from ..engine.checks import UserError
from ..engine.images import IMAGES, is_picture
from ..engine.objective import STYLE_LAYERS
from ..engine.vgg import CONVOLUTIONS, LAYERS
from .painter import PanelFrame, Settings

SLIDER_LAYERS = (*STYLE_LAYERS, "conv4_1", "conv5_1")  # the assignment's, and the deeper ones of Gatys et al.
SECOND = "second style"
TEXTS = {  # what a screen reader says of the images that the panel makes
    "picture": "The image that is being optimised, as it is now.",
    "difference": "Difference map: bright where the image differs from what it is compared to.",
}
STYLE_SHEET = """<style>
.style-studio, .style-studio .widget-box { overflow: visible; }
.style-studio .widget-inline-hbox { width: auto; margin: 0 2px; }
.style-studio .widget-inline-hbox > .widget-label { width: 112px; }
.style-studio .widget-button, .style-studio .widget-upload { width: auto; }
.style-studio .widget-upload { font-size: 0; }
.style-studio .widget-upload i { font-size: 14px; line-height: 26px; margin: 0; }
.studio-row > .widget-upload::after { content: " Open settings"; font-size: 13px; white-space: pre; }
.style-studio .widget-label:empty { display: none; }
.style-studio .widget-html-content { line-height: 1.35; }
.style-studio .studio-status { min-height: 36px; margin: 2px; }
@media (max-width: 900px) { .style-studio .studio-status { min-height: 54px; } }
.style-studio.jupyter-widgets-disconnected > * { opacity: 0.4; pointer-events: none; }
.style-studio.jupyter-widgets-disconnected .studio-status, .style-studio .studio-hidden { display: none; }
.style-studio.jupyter-widgets-disconnected::before { display: none; }
.style-studio .jupyter-widgets-disconnected::before { display: none; }
.style-studio.jupyter-widgets-disconnected::after { order: -1; margin: 2px; font-weight: bold;
  content: "The kernel of this panel has gone. Run this cell to start it again."; }
.studio-row { flex-flow: row wrap; align-items: flex-start; }
.studio-choice { align-items: center; }
.style-studio a { display: block; margin: 6px; text-decoration: underline; }
.studio-row > .widget-vbox { margin: 0 12px 8px 0; }
.studio-row > .widget-dropdown, .studio-row > .widget-text, .studio-choice > .widget-dropdown { flex: 1 1 210px; }
.style-studio .studio-left { flex: 1 1 400px; max-width: 512px; }
.style-studio .studio-controls { flex: 1 1 320px; min-width: 0; max-width: min(600px, 100%); margin-right: 0; }
.studio-picture img, .studio-difference img { width: 100%; max-height: 512px; object-fit: contain; }
.studio-content img, .studio-style img, .studio-second img { height: 130px; max-width: 400px; object-fit: contain; }
.studio-speech { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.style-studio .studio-chart { flex: 1 1 360px; max-width: 600px; min-height: 180px; font-size: 12px; }
.studio-chart .widget-html-content { width: 100%; }
.studio-chart p { margin: 0; }
.studio-chart i { float: right; font-style: normal; }
.studio-chart svg { display: block; width: 100%; height: 110px; overflow: visible; border: solid; border-width: 1px 0; }
.studio-chart polyline { fill: none; stroke: currentColor; stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.studio-chart span { margin-left: 8px; border-bottom: 2px solid; }
.curve-1 { color: #d9772b; }
.curve-2 { color: #2f9e6e; }
</style>"""


def labelled_once(paths: list[Path | str]) -> list[tuple[str, Path | str]]:
    """[(label, path), ...] for a Dropdown. "" stands for no image, because None would show nothing.

    Files with the same name get different labels; the last one keeps the plain name.
    """
    labels = {}
    for path in reversed(paths):
        label = path.stem.replace("_", " ") if path else "none"
        if label in labels:
            label = path.name
        while label in labels:
            label += " (another)"
        labels[label] = path
    return list(labels.items())[::-1]


def tree(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    """A widget and all widgets inside it, with their layouts and styles."""
    yield widget
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None), *getattr(widget, "children", ())):
        if isinstance(part, widgets.Widget):
            yield from tree(part)


def upload_limit() -> str:
    """A sentence on files that are too large to upload: the kernel cannot report them, since they never arrive."""
    command = ""
    with contextlib.suppress(psutil.Error):
        command = str(psutil.Process(os.getppid()).cmdline())
    found = re.search(r"websocket_max_message_size\W+(\d+)", command)
    limit = f"{int(found[1]) // 1_050_000} MB (this server's limit)" if found else "10 MB (the limit of most servers)"
    return f"Uploads above {limit} are lost. Put larger files beside this notebook and give style_studio their paths."


def uploaded_files(value: tuple | dict) -> list[tuple[str, bytes]]:
    """[(name, content), ...] from a FileUpload's value: a tuple in ipywidgets 8, a dict by name in ipywidgets 7."""
    named = value.items() if isinstance(value, dict) else ((file["name"], file) for file in value)
    return [(name, bytes(file["content"])) for name, file in named]


def set_slider(slider: widgets.FloatSlider | widgets.FloatLogSlider, value: float, largest: float = 10) -> None:
    """Set a weight's slider. Adjust its range so that the value is one of its steps: browsers round to a step."""
    with slider.hold_sync(), slider.hold_trait_notifications():
        if isinstance(slider, widgets.FloatLogSlider):
            power = math.log10(value)
            slider.min = power - max(0, math.ceil(10 * power)) / 10
            slider.max = max(7, power)
        else:
            slider.max = max(largest, value)
            slider.step = value / max(1, round(10 * value)) or 0.1
        slider.value = value


def choose(control: widgets.Dropdown, value, key: Callable | None = None) -> None:
    """Choose a value in a Dropdown. If it is not an option yet, add it and sort the options by `key`."""
    if value not in control.options:
        control.options = sorted([*control.options, value], key=key)
    control.value = value


class Controls:
    """The widgets that the user sets. `settings` reads them.

    opening: the settings that they open with. kinds: "content", "style" or both: what the panel works with.
    """

    def __init__(self, opening: Settings):
        self.opening = opening
        self.choices = {}
        self.uploaders = {}
        style = next(iter(opening.styles), None)
        for kind, path in (("content", opening.content), ("style", style), (SECOND, style and "")):
            if path is not None:
                folder = IMAGES / kind.split()[-1]  # images/content or images/style
                stored = [path for path in sorted(folder.glob("*")) if is_picture(path)]
                self.choices[kind] = widgets.Dropdown(description=kind, options=labelled_once(stored))
                self.uploaders[kind] = widgets.FileUpload(accept="image/*", tooltip=f"Upload an image as {kind}")
                self.offer(kind, path)
        self.kinds = [kind for kind in self.choices if kind != SECOND]
        tip = "Use the settings in a PNG file saved by the panel or stylise"
        self.uploaders["settings"] = widgets.FileUpload(description="Open settings", accept=".png", tooltip=tip)
        self.blend = widgets.FloatSlider(description="blend", max=1.0, step=0.05, value=0.5)
        self.content_weight = widgets.FloatSlider(description="content weight", readout_format=".3g")
        self.style_weight = widgets.FloatLogSlider(description="style weight", readout_format=".1e")
        self.content_layer = widgets.Dropdown(description="content layer", options=CONVOLUTIONS)
        self.layer_weights = {
            name: widgets.FloatSlider(description=f"style {name}", readout_format=".3g")
            for name in sorted({*SLIDER_LAYERS, *opening.layer_weights}, key=LAYERS.index)
        }
        self.size = widgets.Dropdown(description="size in pixels", options=[128, 192, 256, 384, 512])
        starts = {"noise": "noise", "content": "content", "present image": "present"}
        if not opening.content:
            del starts["content"]
        self.start = widgets.Dropdown(description="start from", options=starts)
        self.seed = widgets.IntText(description="noise seed")
        self.compare = widgets.Dropdown(description="difference from", options=["nothing", "the start", "the snapshot"])
        self.keep_colours = widgets.Checkbox(description="Keep the colours of the content image")
        self.unfold = widgets.Checkbox(description="Weights of the style layers", value=not opening.content)
        self.folded = widgets.VBox([*self.layer_weights.values()])
        widgets.dlink((self.unfold, "value"), (self.folded.layout, "display"), lambda shown: "" if shown else "none")
        if opening.styles:
            widgets.dlink((self.choices[SECOND], "value"), (self.blend, "disabled"), lambda path: not path)
        self.weights = [self.blend, self.content_weight, self.style_weight, self.content_layer]
        unused = []
        if len(self.kinds) == 1:
            unused += [self.content_weight, self.style_weight, self.keep_colours]
        if not opening.styles:
            unused += [self.blend, self.unfold]
        if not opening.content:
            unused.append(self.content_layer)
        for control in unused:
            control.layout.display = "none"
        # What changes the result:
        self.inputs = [*self.choices.values(), *self.weights, *self.layer_weights.values(), self.size]
        choose(self.size, opening.size)
        self.take(opening._asdict())

    def settings(self) -> Settings:
        """What the controls say now."""
        values = {kind: control.value for kind, control in self.choices.items()}
        content, style, second = map(values.get, ("content", "style", SECOND))
        styles = layer_weights = {}
        if style:
            share = self.blend.value
            styles = {style: 1.0} if second in ("", style) else {style: 1 - share, second: share}
            layer_weights = {name: slider.value for name, slider in self.layer_weights.items() if slider.value}
        weights = self.content_weight.value, self.style_weight.value, layer_weights
        return Settings(content, styles, self.size.value, self.content_layer.value, *weights)

    def offer(self, kind: str, path: Path | str) -> None:
        """Choose an image. If it is not in its list yet, add it at the top."""
        control = self.choices[kind]
        paths = [offered for _, offered in control.options]
        if path not in paths:
            control.options = labelled_once([path, *paths])  # which chooses the first
        control.value = path

    def take(self, settings: dict) -> None:
        """Set content layer and weights. settings: a dict with the names of `Settings`."""
        choose(self.content_layer, settings["content_layer"], LAYERS.index)
        set_slider(self.content_weight, settings["content_weight"])
        set_slider(self.style_weight, settings["style_weight"] or 1.0)
        for name, slider in self.layer_weights.items():
            set_slider(slider, settings["layer_weights"].get(name, 0.0), largest=2)

    def take_all(self, settings: dict) -> list[str]:
        """Set everything that `read_settings` has read; return what the user still has to do, in phrases for a note.

        Raises UserError, before anything is set, if this panel cannot do what the settings say.
        """
        styles = settings["styles"]
        chosen = settings["content"], *(name for name, _, _ in styles), ""
        names = dict(zip(("content", "style", SECOND), chosen))
        kinds = [kind for kind in ("content", "style") if names[kind]]
        if kinds != self.kinds:
            needed = " and ".join(kinds)
            raise UserError(f"these are settings for {needed}: open a panel with {needed} only")
        for name, weight in settings["layer_weights"].items():
            if weight and name not in self.layer_weights:
                raise UserError(f"there is no slider for {name} here: open a panel with {name} among its style_layers")
        if len(styles) > 2 or any(mask for _, _, mask in styles):
            raise UserError("these are settings with masks or more than two styles: use stylise --like")
        missing = []
        if len(styles) == 2:
            (_, weight, _), (_, second_weight, _) = styles
            set_slider(self.blend, second_weight / (weight + second_weight), largest=1)
        for kind, control in self.choices.items():
            paths = {path.name if path else "": path for _, path in reversed(control.options)}
            if names[kind] in paths:
                control.value = paths[names[kind]]
            else:
                missing.append(f"upload {names[kind]!r} as {kind}")
        self.keep_colours.value = settings["keep_colours"]
        self.take(settings)
        choose(self.size, settings["size"])
        self.start.value = settings["start"]
        self.seed.value = settings["seed"]
        return missing


class Display:
    """The widgets that show something: images, each with a caption, and the status line.

    kinds: names of the input images. images, captions, boxes: {name: widget}, for these and the names in `TEXTS`.
    """

    def __init__(self, kinds: Iterable[str]):
        self.images = {}
        self.captions = {}
        self.boxes = {}
        for name in (*TEXTS, *kinds):
            self.images[name] = widgets.Image(format="jpeg")
            self.captions[name] = widgets.Label()
            # For screen readers: ipywidgets has no alternative text.
            speech = widgets.HTML(TEXTS.get(name, f"The {name} image.")).add_class("studio-speech")
            box = widgets.VBox([self.captions[name], self.images[name], speech])
            self.boxes[name] = box.add_class(f"studio-{name.split()[0]}")
            self.show_image(name, None)
        self.chart = widgets.HTML().add_class("studio-chart")
        self.status = widgets.HTML().add_class("studio-status")
        self.download = widgets.HTML()
        self.spoken = widgets.HTML().add_class("studio-speech")
        # The browser copies `sent` to `seen`, which tells the kernel that a browser is there.
        self.sent = widgets.IntText()
        self.seen = widgets.IntText()
        self.link = widgets.jsdlink((self.sent, "value"), (self.seen, "value"))

    def show_image(self, name: str, content: bytes | None, caption: str = "") -> None:
        """Show an image file in its box, or hide the box."""
        self.images[name].value, self.captions[name].value = content or b"", caption
        self.boxes[name].layout.display = "" if content else "none"

    def show(self, frame: PanelFrame, picture: bytes) -> None:
        """Show a frame. picture: its image as a JPEG file."""
        self.show_image("picture", picture)
        self.show_image("difference", frame.difference, f"difference map, mean {frame.mean:.4f}")
        self.chart.value = frame.chart


def lay_out(controls: Controls, display: Display, buttons: Iterable[widgets.Button]) -> widgets.VBox:
    """The panel: buttons and status line; picture and controls side by side; previews and loss curves."""

    def row(*parts):
        return widgets.HBox(parts).add_class("studio-row")

    boxes, uploaders = display.boxes, controls.uploaders
    hidden = widgets.HBox([display.sent, display.seen]).add_class("studio-hidden")
    left = widgets.VBox([boxes["picture"], boxes["difference"], hidden]).add_class("studio-left")
    rows = []
    for kind, choice in controls.choices.items():
        rows.append(widgets.HBox([choice, uploaders[kind]]).add_class("studio-choice"))
    rows += [*controls.weights, controls.unfold, controls.folded]
    rows += [row(controls.size, controls.compare), row(controls.start, controls.seed), controls.keep_colours]
    return widgets.VBox(
        [
            row(*buttons, uploaders["settings"], display.download),
            display.status,
            row(left, widgets.VBox(rows).add_class("studio-controls")),
            row(*(boxes[kind] for kind in controls.choices), display.chart),
            widgets.HTML(f"<small>{upload_limit()}</small>{STYLE_SHEET}"),
            display.spoken,
        ]
    ).add_class("style-studio")
