"""The panel's worker thread, without widgets: a run whose settings may change, and its frames."""

import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ..engine.checks import file_version
from ..engine.figures import jpeg
from ..engine.images import difference_map, load_image, resize
from ..engine.objective import Style, Task
from ..engine.run import Run, Step
from ..engine.schedule import EVALUATIONS

FRAME_SECONDS = 1 / 30  # a frame evaluates for about this long, at least once
CURVES = ("total", "content × its weight", "style × its weight")
CURVE_POINTS = 300  # about how many are drawn per curve
RATE_EVALUATIONS = 20  # the rate on display is measured over this many


class Settings(NamedTuple):
    """The settings of a run, as read from the controls; a saved image uses the same names."""

    content: Path | None  # None: a texture
    styles: dict  # {path: weight}, to be blended by weight; empty: a reconstruction
    size: int  # shorter side in pixels
    content_layer: str
    content_weight: float
    style_weight: float
    layer_weights: dict  # {style layer: weight above 0}


class PanelFrame(NamedTuple):
    """What the panel shows after one or more evaluations."""

    image: Tensor
    step: Step
    settings: Settings
    start: tuple  # (kind, seed) that the run began with
    evaluations: int  # since that start
    moments: tuple  # seconds on the painter's clock, after each of the latest evaluations
    difference: bytes | None  # a JPEG file
    mean: float  # of the difference map, over pixels and channels; nan without a map
    chart: str  # the loss curves, as HTML
    content: Tensor | None  # the content image, whose colours may be kept
    shape: tuple  # (height, width) of the result
    ended: str | None  # why the run is over, as the end of a sentence; None while it goes on


def draw_curves(curves: list[tuple]) -> str:
    """Loss curves on a log scale, as HTML in the colours of the page; curves: for each evaluation, a loss per curve."""
    named = dict(zip(CURVES, zip(*curves)))
    if not all(any(curve) for curve in named.values()):  # with one loss alone, its curve would hide the total's
        named = {"total": named["total"]}
    losses = [loss for curve in named.values() for loss in curve if loss]
    high = max(losses, default=1.0)
    low = min(losses, default=1.0)
    height = math.log(high / low) or 1.0
    lines = legend = ""
    for k, (name, curve) in enumerate(named.items()):
        points = [f"{n},{math.log(high / max(loss, low)) / height:.3f}" for n, loss in enumerate(curve)]
        points = [*points[:: 1 + len(points) // CURVE_POINTS], points[-1]]
        lines += f'<polyline class="curve-{k}" points="{" ".join(points)}"/>'
        legend += f' <span class="curve-{k}">{name}</span>'
    svg = f'<svg viewBox="0 0 {max(1, len(curves) - 1)} 1" preserveAspectRatio="none">{lines}</svg>'
    return f"<p>loss, log scale:{legend}</p><p>{high:.3g}</p>{svg}<p>{low:.3g}<i>{len(curves)} evaluations</i></p>"


class Painter:
    """A run on image files whose settings may change between two evaluations, and its loss curves.

    vgg: from `load_vgg19`. evaluations: the most that a run may have. clock: a function that returns seconds.
    """

    def __init__(self, vgg: nn.Sequential | None, evaluations: int = EVALUATIONS, clock=time.perf_counter):
        self.vgg = vgg
        self.evaluations = evaluations
        self.clock = clock
        self.read = functools.lru_cache(maxsize=3)(lambda path, version, *options: load_image(path, *options))
        self.run = self.asked = None  # asked: the settings of the run and the versions of their files
        self.start = None  # (kind, seed) that the run began with
        self.first = None  # the image that it began with
        self.layers = ()  # all style layers since that start
        self.last = None  # the latest `Step`
        self.curves = []  # for each evaluation since the start (total, weighted content loss, weighted style loss)

    def step(self, settings: Settings, start: tuple | None = None) -> Step | None:
        """Evaluate the network once and return the `Step`, or None when the run is over; the next call resumes it.

        start: None to go on from the present image, or ("noise", seed), ("content", 0) or ("present", 0) to begin
        again. Raises UserError for bad input.
        """
        asked = settings, [file_version(path) for path in (settings.content, *settings.styles) if path]
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
        """Give the present run another task, or begin another run: from `start`, or at another size."""
        task = self.task(settings, () if start else self.layers)
        begin = functools.partial(Run, task, vgg=self.vgg, evaluations=self.evaluations)
        if start or not self.run:
            kind, seed = start or ("noise", 0)
            init = self.run.image if kind == "present" else kind
            self.run = begin(init=init, seed=seed, coarse_to_fine=kind == "noise")
            self.first = self.run.image
            self.start = kind, seed
            self.curves = []
        elif task.reference.shape[-2:] != self.run.shape:
            self.run = begin(init=self.run.image, coarse_to_fine=False)
        else:
            self.run.retarget(task)
        self.layers = tuple(task.style_layers)

    def task(self, settings: Settings, layers: tuple) -> Task:
        """The `Task` of these settings. layers: style layers to keep, at 0 if unset, so that nothing is rebuilt."""

        def read(path):
            return self.read(path, file_version(path), settings.size, self.vgg.mean.device)

        content = settings.content and read(settings.content)
        content_layers = settings.content_layer if settings.content else ()
        styles = [Style(read(path), weight) for path, weight in settings.styles.items()] or None
        style_layers = dict.fromkeys(layers, 0.0) | settings.layer_weights
        return Task(content, styles, content_layers, style_layers, settings.content_weight, settings.style_weight)

    def make_frame(
        self, settings: Settings, start: tuple | None, compare: str, snapshot: Tensor | None, single: bool,
        moments: tuple,
    ) -> PanelFrame:  # fmt: skip
        """Evaluate for about `FRAME_SECONDS`, at least once, and return the frame to show.

        settings, start: as in `step`. compare: "the start" or "the snapshot" to draw a difference map from that image;
        anything else draws none. single: evaluate only once. moments: the previous frame's.
        """
        begun = self.clock()
        moments = moments or (begun,)
        while step := self.step(settings, start):
            start = None
            moments = (*moments, self.clock())[-RATE_EVALUATIONS:]
            if single or moments[-1] - begun > FRAME_SECONDS:
                break
        image = self.run.image
        difference = None
        mean = math.nan
        reference = {"the start": self.first, "the snapshot": snapshot}.get(compare)
        if reference is not None:
            error = difference_map(image, resize(reference, image.shape[-2:]))
            difference = jpeg(error)
            mean = error.mean().item()
        return PanelFrame(
            image, self.last, settings, self.start, len(self.curves), moments, difference, mean,
            draw_curves(self.curves), self.run.task.content, self.run.shape, None if step else self.run.ended,
        )  # fmt: skip
