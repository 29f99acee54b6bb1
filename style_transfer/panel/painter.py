"""A run whose settings may change between one evaluation and the next: what the panel drives, without widgets."""

import functools
from pathlib import Path
from typing import NamedTuple

from torch import nn

from style_transfer.engine.checks import UserError, file_version
from style_transfer.engine.images import load_image
from style_transfer.engine.objective import Style, Task
from style_transfer.engine.run import Run, Step


class Settings(NamedTuple):
    """What the panel's controls say. Hashable, so that a change is a difference."""

    content: Path | None  # None: a texture
    style: Path | None  # None: a reconstruction
    size: int  # shorter side in pixels
    content_layer: str
    content_weight: float
    style_weight: float
    layer_weights: tuple  # ((style layer, weight above 0), ...)
    second: Path | None = None  # a second style, blended with the first
    blend: float = 0.0  # its share, 0 to 1


class Painter:
    """A run on images by path, whose settings may change between one evaluation and the next, and its loss curves."""

    def __init__(self, vgg: nn.Sequential):
        self.vgg = vgg
        self.read = functools.lru_cache(maxsize=3)(lambda path, version, *options: load_image(path, *options))
        self.run = self.asked = None  # asked: the settings that the run has, and the versions of their files
        self.first = self.start = None  # the image that the run began with, and (kind, seed) of that beginning
        self.layers = ()  # of the style, since the start
        self.last = None  # the latest `Step`
        self.curves = []  # after each evaluation since the start: (total, weighted content, weighted style loss)

    def step(self, settings: Settings, start: tuple | None = None) -> Step | None:
        """Evaluate the network once; return the `Step`, or None when the run is done. The next step then goes on.

        start: None to go on from the present image, or where to begin again: ("noise", seed), ("content", 0) or
        ("present", 0). Raises what `nst_utils` raises for bad input.
        """
        asked = settings, *map(file_version, filter(None, (settings.content, settings.style, settings.second)))
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
                raise UserError("there is no present image to start from yet: choose noise or content")
            init = self.run.image if kind == "present" else kind
            self.run = Run(task, init=init, seed=seed, coarse_to_fine=kind == "noise", vgg=self.vgg)
            self.first, self.start, self.curves = self.run.image, (kind, seed), []
        elif task.reference.shape[-2:] != self.run.shape:
            self.run = Run(task, init=self.run.image, coarse_to_fine=False, vgg=self.vgg)
        else:
            self.run.retarget(task)
        self.layers = tuple(task.style_layers)

    def task(self, settings: Settings, layers: tuple) -> Task:
        """layers: of the style, which stay though their weight has become 0: another set would be prepared anew."""
        content, style, second = (
            path and self.read(path, file_version(path), settings.size, self.vgg.mean.device)
            for path in (settings.content, settings.style, settings.second)
        )
        if second is not None:
            style = Style(style, 1 - settings.blend), Style(second, settings.blend)
        weights = dict(settings.layer_weights) if settings.style else {}
        style_layers = {name: weights.get(name, 0.0) for name in (*layers, *weights) if weights}
        content_layers = (settings.content_layer,) if settings.content else ()
        return Task(content, style, content_layers, style_layers, settings.content_weight, settings.style_weight)
