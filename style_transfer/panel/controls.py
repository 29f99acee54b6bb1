"""The panel's widgets: `Controls` to set, a `Display` to look at, and their layout. studio.py connects them."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ipywidgets as widgets

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
    "chart": "The loss after each evaluation, in a log scale; the status line has the latest.",
}
STYLE_SHEET = """<style>
.style-studio .widget-inline-hbox { width: auto; flex: 1 1 210px; margin: 0 2px; }
.style-studio .widget-inline-hbox > .widget-label { width: 112px; }
.style-studio .widget-button, .style-studio .widget-upload { width: auto; }
.style-studio .widget-label:empty { display: none; }
.style-studio .studio-hidden { display: none; }
.studio-row { flex-flow: row wrap; overflow: visible; }
.studio-row > .widget-vbox { margin: 0 12px 8px 0; }
.studio-picture, .studio-difference { width: 512px; max-width: 100%; }
.studio-controls { flex: 1 1 320px; max-width: 600px; }
.studio-chart { flex: 1 1 380px; max-width: 640px; }
.studio-picture img, .studio-difference img, .studio-chart img { width: 100%; max-height: 512px; object-fit: contain; }
.studio-content img, .studio-style img, .studio-second img { height: 130px; max-width: 400px; object-fit: contain; }
.studio-speech { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
</style>"""


def stored(kind: str) -> list[Path]:
    """The images in images/content or images/style."""
    return [path for path in sorted((IMAGES / kind.split()[-1]).glob("*")) if is_picture(path)]


def labelled_once(paths: list[Path | str]) -> list[tuple[str, Path | str]]:
    """[(label, path), ...] for a Dropdown, where "" is no image, since None would be a blank.

    Files of one name get different labels; the last of them keeps the plain one.
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


def uploaded_files(value: tuple | dict) -> list[tuple[str, bytes]]:
    """[(name, content), ...] from a FileUpload's value: a tuple in ipywidgets 8, a dict by name in ipywidgets 7."""
    named = value.items() if isinstance(value, dict) else ((file["name"], file) for file in value)
    return [(name, bytes(file["content"])) for name, file in named]


def set_slider(slider: widgets.FloatSlider | widgets.FloatLogSlider, value: float, largest: float = 10) -> None:
    """Set a weight's slider, and its range so that the value is one of its steps: browsers round to a step."""
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
    """Choose a value in a Dropdown. If it is not among the options, they get it, in the order of `key`."""
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
                self.choices[kind] = widgets.Dropdown(description=kind, options=labelled_once(stored(kind)))
                self.uploaders[kind] = widgets.FileUpload(accept="image/*", tooltip=f"Upload an image as {kind}")
                self.offer(kind, path)
        self.kinds = [kind for kind in self.choices if kind != SECOND]
        tip = "Those in a PNG file that the panel or stylise saved"
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
        of_both = [self.content_weight, self.style_weight]
        of_style = [self.blend, *self.layer_weights.values()]
        self.weights = [*of_both, self.content_layer, *of_style]
        unused = [] if len(self.kinds) == 2 else [*of_both, self.keep_colours]
        unused += [] if opening.styles else of_style
        unused += [] if opening.content else [self.content_layer]
        for control in unused:
            control.layout.display = "none"
        self.inputs = [*self.choices.values(), *self.weights, self.size]  # what changes the result
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
        """Choose an image; if it is not in its list yet, it becomes the first one there."""
        control = self.choices[kind]
        paths = [offered for _, offered in control.options]
        if path not in paths:
            control.options = labelled_once([path, *paths])  # which chooses the first
        control.value = path

    def take(self, settings: dict) -> None:
        """Set content layer and weights; settings: named as in `Settings`."""
        choose(self.content_layer, settings["content_layer"], LAYERS.index)
        set_slider(self.content_weight, settings["content_weight"])
        set_slider(self.style_weight, settings["style_weight"] or 1.0)
        for name, slider in self.layer_weights.items():
            set_slider(slider, settings["layer_weights"].get(name, 0.0), largest=2)

    def take_all(self, settings: dict) -> list[str]:
        """Set everything that `read_settings` has read; return what the user still has to do, as sentences.

        Raises UserError, before anything is set, if this panel cannot do what the settings say.
        """
        kinds = [kind for kind in ("content", "style") if settings[kind]]
        if kinds != self.kinds:
            needed = " and ".join(kinds)
            raise UserError(f"these are settings for {needed}: open a panel with {needed} only")
        for name, weight in settings["layer_weights"].items():
            if weight and name not in self.layer_weights:
                raise UserError(f"there is no slider for {name} here: open a panel with {name} among its style_layers")
        styles = settings.get("styles", ())
        if len(styles) > 2 or any(mask for _, _, mask in styles):
            raise UserError("these are settings with masks or more than two styles: use stylise --like")
        names = settings | {SECOND: ""}
        missing = []
        if len(styles) == 2:
            (_, weight, _), (names[SECOND], second_weight, _) = styles
            set_slider(self.blend, second_weight / (weight + second_weight), largest=1)
        for kind, control in self.choices.items():
            paths = {path.name if path else "": path for _, path in reversed(control.options)}
            if names[kind] in paths:
                control.value = paths[names[kind]]
            else:
                missing.append(f"upload {names[kind]!r} as {kind}")
        self.keep_colours.value = settings.get("keep_colours", False)
        self.take(settings)
        choose(self.size, settings["size"])
        self.start.value = settings["start"]
        self.seed.value = settings["seed"]
        return missing


class Display:
    """The widgets that show something: images, each with a caption, and the status line.

    kinds: of the images that go in. images, captions, boxes: {name: widget}, for these and the names in `TEXTS`.
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
            self.boxes[name] = widgets.VBox([self.captions[name], self.images[name], speech])
            self.boxes[name].add_class(f"studio-{name.split()[0]}")
            self.show_image(name, None)
        self.status = widgets.HTML()
        self.spoken = widgets.HTML().add_class("studio-speech")
        # The browser copies each number `sent` to `seen`: so the kernel knows that a browser is there.
        self.sent = widgets.IntText()
        self.seen = widgets.IntText()
        self.link = widgets.jsdlink((self.sent, "value"), (self.seen, "value"))

    def show_image(self, name: str, content: bytes | None, caption: str = "") -> None:
        """Show an image file in its box, or hide the box."""
        self.images[name].value, self.captions[name].value = content or b"", caption
        self.boxes[name].layout.display = "" if content else "none"

    def show(self, frame: PanelFrame, picture: bytes) -> None:
        """Show a frame, with its image as a JPEG file. If it has no loss curves, those of an earlier one stay."""
        self.show_image("picture", picture)
        self.show_image("difference", frame.difference, f"difference map, mean {frame.mean:.4f}")
        if frame.chart:
            self.show_image("chart", frame.chart)


def lay_out(controls: Controls, display: Display, buttons: Iterable[widgets.Button]) -> widgets.VBox:
    """The panel: buttons and status line; picture and controls side by side; previews and loss curves."""

    def row(*parts):
        return widgets.HBox(parts).add_class("studio-row")

    boxes, uploaders = display.boxes, controls.uploaders
    hidden = widgets.HBox([display.sent, display.seen]).add_class("studio-hidden")
    left = widgets.VBox([boxes["picture"], boxes["difference"], hidden])
    rows = [widgets.HBox([choice, uploaders[kind]]) for kind, choice in controls.choices.items()]
    rows += controls.weights
    rows += [row(controls.size, controls.compare), row(controls.start, controls.seed), controls.keep_colours]
    folders = " or ".join(f"images/{kind}" for kind in controls.kinds)
    return widgets.VBox(
        [
            widgets.HTML(STYLE_SHEET),
            row(*buttons, uploaders["settings"]),
            display.status,
            display.spoken,
            row(left, widgets.VBox(rows).add_class("studio-controls")),
            row(*(boxes[kind] for kind in controls.choices), boxes["chart"]),
            widgets.HTML(f"<small>Put files of more than 10 MB into {folders} and run this cell again.</small>"),
        ]
    ).add_class("style-studio")
