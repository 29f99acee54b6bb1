"""The panel's widgets: `Controls` that take, a `Display` that shows, and their layout. studio.py moves them."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
from torch import Tensor

import nst_utils as nst
from style_transfer.panel.painter import Settings

STYLE_LAYERS = (*nst.FIRST_FIVE, "conv4_1", "conv5_1")  # the assignment's, and what Gatys et al. add below
SIDE = 512  # pixels: the longer side of the living picture on display
INPUT = 130  # pixels: the height of the images that go in
WRAP = {"flex_flow": "row wrap", "width": "100%"}
LEFT = {"max_width": "100%", "margin": "0 12px 8px 0"}
RIGHT = {"flex": "1 1 340px", "max_width": "600px", "margin": "0 0 8px 0"}
INPUTS = {"max_width": "100%", "margin": "0 12px 8px 0"}
CURVES = {"flex": "1 1 380px", "max_width": "640px"}
HIDDEN = '"position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap"'


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
    layout, style = {"width": "auto", "margin": "0 2px"}, {"description_width": "112px"}
    return getattr(widgets, kind)(description=label, layout=layout, style=style, **options)


def set_slider(slider: widgets.FloatSlider | widgets.FloatLogSlider, value: float, largest: float = 10) -> None:
    """Give a weight's slider a value and a range with this value among its steps, to which the browser rounds."""
    scale = {"max": max(largest, value), "step": value / max(1, round(10 * value)) or 0.1}
    if isinstance(slider, widgets.FloatLogSlider):
        power = math.log10(value)
        scale = {"min": power - max(0, math.ceil(10 * power)) / 10, "max": max(7, power), "step": 0.1}
    with slider.hold_sync(), slider.hold_trait_notifications():
        for name, number in {**scale, "value": value}.items():
            setattr(slider, name, number)


def choose(control: widgets.Dropdown, value, order: Callable) -> None:
    """Choose a value, which is offered from then on if it was not."""
    if value not in control.options:
        chosen, control.options = control.value, order([*control.options, value])
        control.value = chosen
    control.value = value


class Controls:
    """The widgets that the user sets; opening: the `Settings` they open at. `settings` reads them."""

    def __init__(self, opening: Settings):
        self.opening = opening
        roles = [kind for kind in ("content", "style") if getattr(opening, kind)]
        of_layer = {"readout_format": ".3g"}
        starts = [("noise", "noise"), *[("content", "content")] * ("content" in roles), ("present image", "present")]
        declared = [  # (name, label, kind, options)
            ("content_layer", "content layer", "Dropdown", {"options": in_order({*nst.CONVOLUTIONS, opening[3]})}),
            ("content_weight", "content weight", "FloatSlider", {"readout_format": ".3g"}),
            ("style_weight", "style weight", "FloatLogSlider", {"readout_format": ".1e"}),
            ("size", "size in pixels", "Dropdown", {"options": sorted({128, 192, 256, 384, 512, opening.size})}),
            ("start_from", "start from", "Dropdown", {"options": starts}),
            ("seed", "noise seed", "BoundedIntText", {"max": 10**6}),
            ("compare", "difference from", "Dropdown", {"options": ["nothing", "the start", "the snapshot"]}),
            ("second", "second style", "Dropdown", {"options": [("none", "")]}),
            ("blend", "blend", "FloatSlider", {"max": 1.0, "step": 0.05, "value": 0.5}),
            ("keep_colours", "Keep the colours of the content image", "Checkbox", {}),
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
        self.offer_second()
        tooltip = "Those of a PNG file that was saved here or by stylise"
        self.opener = widgets.FileUpload(
            description="Open settings", accept=".png", tooltip=tooltip, layout={"width": "168px"}
        )
        self.size.value = opening.size
        self.reset()

    def inputs(self) -> list[widgets.Widget]:
        """The controls that change the result, in their order in the panel."""
        weights = [self.content_weight, self.style_weight] if len(self.choices) == 2 else []
        content = [self.content_layer] if "content" in self.choices else []
        style = [*self.layer_weights.values()] if "style" in self.choices else []
        several = [self.second, self.blend] if "style" in self.choices else []
        return [*self.choices.values(), *several, *weights, *content, *style, self.size]

    def offer(self, kind: str, path: Path) -> None:
        """Choose an image, which is offered first in its list if it is not there yet."""
        control = self.choices[kind]
        paths = [offered for _, offered in control.options]
        if path not in paths:
            control.options = labelled_once([path, *paths])  # a new list has its first image chosen
        control.value = path
        self.offer_second()

    def offer_second(self) -> None:
        """Offer the styles as a second one, too; "" is none, as a Dropdown shows None as a blank. The choice stays."""
        chosen = self.second.value
        self.second.options = [("none", ""), *getattr(self.choices.get("style"), "options", ())]
        self.second.value = chosen

    def settings(self) -> Settings:
        content, style = (getattr(self.choices.get(kind), "value", None) for kind in ("content", "style"))
        weights = tuple((name, slider.value) for name, slider in self.layer_weights.items() if slider.value and style)
        totals = self.content_weight.value * bool(content), self.style_weight.value * bool(style)
        blend = self.blend.value if self.second.value else 0.0
        single = content, style, self.size.value, self.content_layer.value, *totals, weights
        return Settings(*single, self.second.value or None, blend)

    def reset(self) -> None:
        """Go back to the layers and weights that the panel opened with."""
        self.take(self.opening._asdict() | {"layer_weights": dict(self.opening.layer_weights)})

    def take(self, settings: dict) -> None:
        """Take up a content layer and weights."""
        choose(self.content_layer, settings["content_layer"], in_order)
        set_slider(self.content_weight, settings["content_weight"])
        set_slider(self.style_weight, settings["style_weight"] or 1.0)
        for name, slider in self.layer_weights.items():
            set_slider(slider, settings["layer_weights"].get(name, 0.0), largest=2)

    def offered(self, kind: str, name: str) -> Path | None:
        """The image of that name among those that are offered."""
        return next((path for _, path in self.choices[kind].options if path.name == name), None)

    def take_all(self, settings: dict) -> list[str]:
        """Take up all settings of a saved image; returns what is missing, as sentences. Raises UserError if unfit."""
        kinds = [kind for kind in ("content", "style") if settings[kind]]
        if kinds != [*self.choices]:
            what = "an image of " + " and ".join(kinds)
            raise nst.UserError(f"they are those of {what}: open a panel with {' and '.join(kinds)}, and no other")
        strange = [
            name for name, weight in settings["layer_weights"].items() if weight and name not in self.layer_weights
        ]
        if strange:
            raise nst.UserError(f"there is no slider for {strange[0]} here: open a panel with it among style_layers")
        if not 0 <= settings["seed"] <= self.seed.max:
            raise nst.UserError(f"the seed is {settings['seed']}: a panel's are 0 to {self.seed.max}")
        names, weights, masks = [*zip(*settings.get("styles", [])), (), (), ()][:3]
        if len(names) > 2 or any(masks):
            raise nst.UserError(
                "they are those of an image with masks, or of more than two styles: stylise --like makes it again"
            )
        missing = []
        for kind in kinds:
            if path := self.offered(kind, settings[kind]):
                self.choices[kind].value = path
            else:
                missing.append(f"upload {settings[kind]!r} as {kind}")
        self.second.value = len(names) == 2 and self.offered("style", names[1]) or ""
        if len(names) == 2 and not self.second.value:
            missing.append(f"upload {names[1]!r} as style, choose it as the second and {names[0]!r} as style again")
        if len(names) == 2:
            set_slider(self.blend, weights[1] / sum(weights), largest=1)
        self.keep_colours.value = settings.get("keep_colours", False)
        self.take(settings)
        choose(self.size, settings["size"], sorted)
        self.start_from.value, self.seed.value = settings["start"], settings["seed"]
        return missing


class Frame(NamedTuple):
    """What one turn of the loop puts on display."""

    image: Tensor
    step: nst.Step
    settings: Settings
    start: tuple  # (kind, seed) of the run that it belongs to
    evaluations: int  # since that start
    picture: bytes
    difference: bytes | None
    mean: float  # difference from the reference, averaged over pixels and channels; nan without one
    chart: bytes | None
    content: Tensor | None  # whose colours may be kept


class Display:
    """The widgets that show: the living picture, difference map, loss curves, inputs and status line."""

    def __init__(self, kinds: Iterable[str]):
        fluid = {"width": "100%", "max_width": "100%"}
        self.picture, self.difference = (
            widgets.Image(format="jpeg", layout={**fluid, "display": "none"}) for _ in range(2)
        )
        self.chart = widgets.Image(format="png", layout={**fluid, "display": "none", "max_width": "640px"})
        small = {"height": f"{INPUT}px", "width": "auto", "align_self": "flex-start"}
        self.inputs = {kind: widgets.Image(format="jpeg", layout=small) for kind in (*kinds, "second style")}
        self.boxes = {
            kind: widgets.VBox([widgets.Label(kind), described(image, f"The {kind} image.")])
            for kind, image in self.inputs.items()
        }
        self.picture.add_class("living-picture")
        self.difference.add_class("difference-map")
        self.status = widgets.HTML(layout={"width": "100%"})
        self.spoken = widgets.HTML(layout={"width": "100%", "height": "0", "margin": "0"})
        self.caption = widgets.Label(layout={"display": "none"})
        # The browser copies the number `sent` to `seen`, by which the kernel hears that it is there.
        self.sent, self.seen = (widgets.IntText(layout={"display": "none"}) for _ in range(2))
        self.copying = widgets.jsdlink((self.sent, "value"), (self.seen, "value"))

    def show(self, frame: Frame) -> None:
        shown = {self.picture: frame.picture, self.chart: frame.chart or self.chart.value}
        for image, value in (shown | {self.difference: frame.difference}).items():
            image.value, image.layout.display = value or b"", "" if value else "none"
        height, width = frame.image.shape[-2:]
        for image in (self.picture, self.difference):
            image.layout.width = f"{round(SIDE * min(1, width / height))}px"
        self.caption.layout.display = self.difference.layout.display
        self.caption.value = f"difference map, mean {frame.mean:.4f}"

    def show_input(self, kind: str, picture: bytes) -> None:
        """Show an image among the inputs; empty: none."""
        self.inputs[kind].value, self.boxes[kind].layout.display = picture, "" if picture else "none"


def described(image: widgets.Image, text: str) -> widgets.VBox:
    """An image and, for screen readers, what it shows: ipywidgets has no alternative text."""
    return widgets.VBox(
        [image, widgets.HTML(f"<span style={HIDDEN}>{text}</span>", layout={"height": "0", "margin": "0"})]
    )


def lay_out(controls: Controls, display: Display, buttons: Iterable[widgets.Button]) -> widgets.VBox:
    """The panel: buttons and status line; the living picture and the controls to its right; inputs and loss curves."""
    picture, difference, chart = (
        described(image, text)
        for image, text in (
            (display.picture, "The image that is being optimised, as it is now."),
            (display.difference, "Difference map: bright where the image differs from what it is compared to."),
            (display.chart, "The loss after each evaluation, in a log scale; the status line has the latest."),
        )
    )
    left = [picture, display.caption, difference, display.sent, display.seen]
    several = len(controls.choices) == 2
    rows = [*controls.inputs()[:-1], *[controls.keep_colours] * several]
    pairs = (controls.size, controls.compare), (controls.start_from, controls.seed)
    for control in (*pairs[0], *pairs[1]):
        control.layout.flex = "1 1 220px"
    rows += [widgets.HBox(two, layout=WRAP) for two in pairs]
    inputs = [
        widgets.VBox([box, *filter(None, [controls.uploaders.get(kind)])], layout=INPUTS)
        for kind, box in display.boxes.items()
    ]
    folders = " or ".join(f"images/{kind}" for kind in controls.uploaders)
    text = f"Files of more than 10 MB: put them into {folders}, and run this cell again."
    limit = widgets.HTML(f'<div style="line-height:1.3;font-size:smaller">{text}</div>')
    return widgets.VBox(
        [
            widgets.HBox([*buttons, controls.opener], layout=WRAP),
            display.status,
            display.spoken,
            widgets.HBox([widgets.VBox(left, layout=LEFT), widgets.VBox(rows, layout=RIGHT)], layout=WRAP),
            widgets.HBox([*inputs, widgets.VBox([chart], layout=CURVES)], layout=WRAP),
            limit,
        ]
    )
