"""What is kept of a run, to be shown: a few of its images as a figure, or many as a film.

Images, single maps and loss curves, drawn and shown."""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from IPython.display import publish_display_data
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .checks import UserError, as_number, as_whole, check_shown
from .images import resize, to_pil

QUALITY = 95  # of the JPEG in which an image is kept: with 100 of 512 pixels some 10 MB
SHOWN, HELD = 80, 2500  # ms, an image of a film and the last


class Frame(NamedTuple):
    """An image of a run."""

    image: Image.Image  # of Pillow's
    evaluation: int  # its number, from 1
    total: float  # the loss


class Recorder:
    """A callback of `optimise` that keeps images at even steps of evaluations, at most `most`, and the last.

    Where there would be more, every other one goes and the steps become twice as long. Larger ones are scaled to `side`
    pixels along the longer side.
    """

    def __init__(self, most: int = 100, side: int = 512):
        self.most, self.side, self.every = as_whole(most, "most"), as_whole(side, "side", " of pixels"), 1
        self.kept = {}  # {evaluation: (total loss, JPEG file)}

    def __call__(self, image: Tensor, step) -> None:
        """Look at an image; step: its `Step`, or its loss as a number."""
        kept = {n: frame for n, frame in self.kept.items() if (n - 1) % self.every == 0}
        if len(kept) >= self.most:
            self.every *= 2
            kept = {n: frame for n, frame in kept.items() if (n - 1) % self.every == 0}
        scale, buffer = min(1.0, self.side / max(image.shape[-2:])), io.BytesIO()
        smaller = resize(image, tuple(max(1, round(side * scale)) for side in image.shape[-2:]))
        to_pil(smaller).save(buffer, "jpeg", quality=QUALITY, subsampling=0)
        self.kept = kept | {self.evaluations + 1: (getattr(step, "total", step), buffer.getvalue())}

    @property
    def evaluations(self) -> int:
        """How many it has seen."""
        return max(self.kept, default=0)

    @property
    def frames(self) -> list[Frame]:
        """What is kept, in order."""
        return [Frame(Image.open(io.BytesIO(data)), n, total) for n, (total, data) in self.kept.items()]

    def state_dict(self) -> dict:
        """{name: tensor or list}, for `load_state_dict`."""
        files = b"".join(data for _, data in self.kept.values())
        kept = [(n, total, len(data)) for n, (total, data) in self.kept.items()]
        return {
            "film_every": self.every,
            "film_kept": kept,
            "film": torch.from_numpy(np.frombuffer(files, np.uint8).copy()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from the `state_dict` of another, as if it had gone on itself."""
        files = io.BytesIO(state["film"].numpy().tobytes())
        self.every = state["film_every"]
        self.kept = {n: (total, files.read(length)) for n, total, length in state["film_kept"]}


def film_of(frames: list[Frame], form: str) -> bytes:
    """A GIF or WebP file of images, all enlarged to the size of the last, which is held. form: "gif" or "webp"."""
    images = [frame.image.resize(frames[-1].image.size, Image.Resampling.BICUBIC) for frame in frames]
    times, buffer = [SHOWN] * (len(images) - 1) + [HELD], io.BytesIO()
    images[0].save(buffer, form, save_all=True, append_images=images[1:], duration=times, loop=0, quality=85)
    return buffer.getvalue()


def image_grid(
    images: Iterable, titles: list | None = None, columns: int | None = None, width: float = 2.6,
    rows: list | None = None,
) -> Figure:  # fmt: skip
    """Draw images (1, 3, H, W), or single maps (H, W) in false colour, in a grid; return the Figure.

    titles: of the images, or of the first row alone; rows: labels of the rows. columns: by default one row. width: of
    an image, in inches. None in `images` leaves that place empty. Raises UserError for what is neither image nor map.
    """
    images = list(images)
    for k, image in enumerate(images):
        if image is not None and not (torch.is_tensor(image) and image.dim() == 2 and image.numel()):
            check_shown(image, f"images[{k}]")
    columns = max(1, len(images)) if columns is None else as_whole(columns, "columns")
    titles = list(titles or [""] * len(images))
    titles += [""] * (len(images) - len(titles) if len(titles) == columns else 0)
    if not any(image is not None for image in images) or len(titles) != len(images):
        raise UserError(f"there are {len(images)} images and {len(titles)} titles: give one or more, and each a title")
    width = as_number(width, "width", 0.1, 100, " of inches, 0.1 to 100")
    heights, above = [], []  # of each row in inches: the tallest image, and the room for the lines of its titles
    for k in range(0, len(images), columns):
        shapes = [image.shape[-2:] for image in images[k : k + columns] if image is not None]
        lines = max(text.count("\n") + 1 if text else 0 for text in titles[k : k + columns])
        heights.append(width * max((h / w for h, w in shapes), default=0.1))
        above.append(0.09 + 0.2 * lines)
    labels = 0.2 if rows else 0.0  # inches beside the first column
    figure = Figure(figsize=(width * columns + labels, sum(heights + above)))
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.04, wspace=0, hspace=0)
    grid = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("N")  # so that the titles of a row stand on one line
    for axes, image, text in zip(grid.flat, images, titles):
        if image is not None and image.dim() == 2:
            axes.imshow(image.detach().float().cpu().numpy(), cmap="magma")
        elif image is not None:
            axes.imshow(to_pil(image))
        axes.set_title(text, fontsize=9)
    if len(rows or grid) != len(grid):
        raise UserError(f"there are {len(grid)} rows and {len(rows)} labels: give each row a label")
    for axes, text in zip(grid[:, 0], rows or ()):
        axes.text(-0.03, 0.5, text, rotation=90, ha="right", va="center", fontsize=9, transform=axes.transAxes)
    return figure


def image_table(rows: list, columns: Mapping[str, Tensor], images: list, width: float = 2.1) -> Figure:
    """Draw images and, small along the edges, what they are made of; return the Figure. All are squares.

    rows: images; columns: {title: image}; images: row by row, for each of `rows` one for each of `columns`. width: of
    one of `images`, in inches.
    """
    sizes = [0.4 * width, *[width] * len(columns)], [0.4 * width, *[width] * len(rows)]
    figure = Figure(figsize=(sum(sizes[0]), sum(sizes[1]) + 0.4))
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(1 + len(rows), 1 + len(columns), width_ratios=sizes[0], height_ratios=sizes[1])
    shown = [None, *columns.values()]
    for k, image in enumerate(rows):
        shown += [image, *images[k * len(columns) : (k + 1) * len(columns)]]
    for axes, image in zip(grid.flat, shown):
        axes.set_axis_off()
        if image is not None:
            axes.imshow(to_pil(image))
    for axes, title in zip(grid[0, 1:], columns):
        axes.set_title(title, fontsize=9)
    return figure


def filmstrip(recorder: Recorder, count: int = 6, width: float = 1.7) -> Figure:
    """Draw `count` of the images that a `Recorder` has kept, evenly spaced, the first and the last among them.

    Under each stand its evaluation and its total loss. width: of an image, in inches. Raises UserError without images.
    """
    frames = recorder.frames
    count = min(as_whole(count, "count"), len(frames))
    if not frames:
        raise UserError("the recorder has no images yet: give it to a task as `callback`")
    chosen = [frames[round(k * (len(frames) - 1) / (count - 1))] for k in range(count)] if count > 1 else frames[-1:]
    figure = Figure(figsize=(width * len(chosen), width * chosen[-1].image.height / chosen[-1].image.width + 0.45))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axes, frame in zip(figure.subplots(1, len(chosen), squeeze=False).flat, chosen):
        axes.imshow(frame.image.resize(chosen[-1].image.size, Image.Resampling.BICUBIC))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        loss = f"{frame.total:.3g}" if frame.total < 999.5 else f"{frame.total:,.0f}"
        axes.set_xlabel(f"{frame.evaluation}\nloss {loss}", fontsize=8)
    return figure


def plot_losses(
    curves: Mapping[str, list], ylabel: str = "loss", size: tuple = (7.5, 3.2), seconds: Mapping | None = None
) -> Figure:
    """Draw {label: the loss after each evaluation} in a log scale; return the Figure, of `size` in inches.

    seconds: {label: the time of each evaluation}, for loss against time. Where a run goes on to a finer scale the loss
    jumps, since there is new detail to match.
    """
    figure = Figure(figsize=size, layout="constrained")  # not pyplot's: the panel draws on a thread of its own
    axes = figure.subplots()
    for (label, losses), line in zip(curves.items(), itertools.cycle(("-", "--", "-."))):
        x = seconds[label] if seconds else range(1, len(losses) + 1)
        axes.semilogy(x, losses, line, label=label, linewidth=1.4)
    axes.set(xlabel="seconds" if seconds else "evaluations of the network", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return figure


def show(figure: Figure | Path | Iterable, *arguments, alt: str, form: str = "jpeg", **options) -> None:
    """Show a figure in a notebook, with the alternative text `alt`.

    figure: a Figure; images, which `image_grid` draws with the other arguments; or the path of an SVG file. form:
    "jpeg", which is light, or "png", where each pixel counts. The stored text is `alt` alone, so that a regression run
    compares nothing that a new machine would change.
    """
    if isinstance(figure, Path):
        data = {"image/svg+xml": figure.read_text(encoding="utf-8")}
    else:
        figure, buffer = (
            figure if isinstance(figure, Figure) else image_grid(figure, *arguments, **options),
            io.BytesIO(),
        )
        quality = {"pil_kwargs": {"quality": 85}} if form == "jpeg" else {}
        figure.savefig(buffer, format=form, dpi=120, bbox_inches="tight", pad_inches=0.06, **quality)
        data = {f"image/{form}": base64.b64encode(buffer.getvalue()).decode()}
    publish_display_data(data | {"text/plain": alt}, metadata={kind: {"alt": alt} for kind in data})


def jpeg(image: Tensor) -> bytes:
    """An image (1, 3, H, W) as the bytes of a JPEG file: drawn in a tenth of the time of a PNG."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "jpeg", quality=88)
    return buffer.getvalue()


def draw_losses(curves: list[tuple]) -> bytes:
    """Loss curves as the bytes of a PNG file; curves: [(total, weighted content loss, weighted style loss), ...]."""
    totals, contents, styles = zip(*curves)
    both = any(contents) and any(styles)  # or else the other curve would lie on the total
    named = {"total": totals} | ({"content × its weight": contents, "style × its weight": styles} if both else {})
    figure = plot_losses(named, size=(5.6, 2.3))
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()
