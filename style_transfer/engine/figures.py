"""Figures and films: images, feature maps and loss curves drawn with matplotlib, and the frames of a run."""

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

from .checks import UserError, as_curves, as_file, as_number, as_whole, check_shown, shown
from .images import resize, to_pil

RECORDED_SIDE = 512  # pixels; 100 images take about 7 MB
FRAME_MS = 80  # how long a film shows each frame
LAST_FRAME_MS = 2500  # how long it shows the last one
MAX_FILE_SIDE = 65_000  # pixels; JPEG allows 65,500
MAX_ASPECT = 100  # height / width of a cell in a figure; taller images are drawn narrower

# --- Films ---------------------------------------------------------------------------------------


class FilmFrame(NamedTuple):
    """An image that a `Recorder` kept."""

    evaluation: int  # its number, from 1
    total: float  # loss
    file: bytes  # JPEG

    @property
    def image(self) -> Image.Image:
        """The image in 8-bit RGB."""
        return Image.open(io.BytesIO(self.file))


class Recorder:
    """A callback for `optimise` that keeps at most `most` images of a run: evenly spaced ones and the latest.

    When full, it drops every second image and doubles the interval. It always keeps the first, so `most` = 1 keeps two.
    Images are scaled down to 512 pixels along the longer side and kept as JPEG files. Raises UserError unless `most` is
    an integer, 1 or more.
    """

    def __init__(self, most: int = 100):
        self.most = as_whole(most, "most")
        self.interval = 1  # evaluations
        self.frames = []  # `FilmFrame`s in order

    def __call__(self, image: Tensor, step, evaluation: int | None = None) -> None:
        """Record an image (1, 3, H, W) of a run, unless this evaluation or a later one is already recorded.

        step: its `Step`, or its total loss as a number. evaluation: counted from 1; by default the next.
        """
        check_shown(image, "image")
        evaluation = evaluation or self.evaluations + 1
        if evaluation <= self.evaluations:
            return
        if len(self._evenly_spaced()) >= self.most:
            self.interval *= 2
        sides = image.shape[-2:]
        scale = min(1.0, RECORDED_SIDE / max(sides))
        file = jpeg(resize(image, [max(1, round(side * scale)) for side in sides]))
        self.frames = [*self._evenly_spaced(), FilmFrame(evaluation, float(getattr(step, "total", step)), file)]

    def _evenly_spaced(self) -> list[FilmFrame]:
        """The frames without the last one if it is off the interval."""
        return [frame for frame in self.frames if (frame.evaluation - 1) % self.interval == 0]

    @property
    def evaluations(self) -> int:
        """The number of the last evaluation recorded; 0 before the first."""
        return self.frames[-1].evaluation if self.frames else 0

    def state_dict(self) -> dict:
        """{name: tensor or list} for `load_state_dict`."""
        files = b"".join(frame.file for frame in self.frames)
        return {
            "film_interval": self.interval,
            "film_frames": [(n, total, len(file)) for n, total, file in self.frames],
            "film": torch.from_numpy(np.frombuffer(files, np.uint8).copy()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from the `state_dict` of another recorder, exactly as that one would have."""
        files = io.BytesIO(state["film"].numpy().tobytes())
        self.interval = state["film_interval"]
        self.frames = [FilmFrame(n, total, files.read(length)) for n, total, length in state["film_frames"]]


def film_of(frames: list[FilmFrame], form: str) -> bytes:
    """Encode one or more frames as a film, all enlarged to the size of the last one. form: "gif" or "webp"."""
    images = [frame.image.resize(frames[-1].image.size, Image.Resampling.BICUBIC) for frame in frames]
    durations = [FRAME_MS] * (len(images) - 1) + [LAST_FRAME_MS]
    buffer = io.BytesIO()
    images[0].save(buffer, form, save_all=True, append_images=images[1:], duration=durations, loop=0, quality=85)
    return buffer.getvalue()


# --- Figures -------------------------------------------------------------------------------------


def _new_figure(width: float, height: float, gap: float, row_gap: float) -> Figure:
    """An empty figure of `width` x `height` inches; not from pyplot, since the panel draws on its own thread."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=gap, h_pad=row_gap, wspace=0, hspace=0)
    return figure


def _draw(axes, image: Tensor | None, title: str | None) -> None:
    """Draw an image, or a map (H, W) in false colour, under its title; None leaves the cell empty."""
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)
    if image is None:
        return
    if image.dim() == 2:
        axes.imshow(image.detach().float().cpu().numpy(), cmap="magma")
    else:
        axes.imshow(to_pil(image))


def image_grid(
    images: Iterable,
    titles: list | None = None,
    columns: int | None = None,
    width: float = 2.6,
    rows: list | None = None,
) -> Figure:
    """Draw images (1, 3, H, W), or single maps (H, W) in false colour, in a grid.

    images: row by row; None leaves a cell empty. titles: one for each image, or for each column. columns: by default
    all images are in one row. width: of an image, 0.1 to 100 inches. rows: a label for each row. Raises UserError if
    there is no image, for anything that is neither image nor map, and if the number of titles or labels is wrong.
    """
    images = list(images)
    for k, image in enumerate(images):
        is_map = torch.is_tensor(image) and image.dim() == 2 and image.numel()
        if image is not None and not is_map:
            check_shown(image, f"images[{k}]")
    columns = len(images) or 1 if columns is None else as_whole(columns, "columns")
    titles = list(titles or [""] * len(images))
    if len(titles) not in (len(images), min(columns, len(images))) or all(image is None for image in images):
        raise UserError(f"there are {len(images)} images and {len(titles)} titles: give images, and a title for each")
    width = as_number(width, "width", 0.1, 100, " of inches, 0.1 to 100")
    heights, title_heights = [], []  # of each row, in inches
    for k in range(0, len(images), columns):
        row = slice(k, k + columns)
        aspects = [image.shape[-2] / image.shape[-1] for image in images[row] if image is not None]
        lines = [str(title).count("\n") + 1 for title in titles[row] if title]
        heights.append(width * min(MAX_ASPECT, max(aspects, default=0.1)))
        title_heights.append(0.09 + 0.2 * max(lines, default=0))
    if rows and len(rows) != len(heights):
        raise UserError(f"there are {len(heights)} rows and {len(rows)} labels: give each row a label")
    figure = _new_figure(width * columns + 0.2 * bool(rows), sum(heights + title_heights), 0.03, 0.04)
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    for axes, image, title in itertools.zip_longest(grid.flat, images, titles):
        axes.set_anchor("N")  # aligns the titles of a row
        _draw(axes, image, title)
    for axes, label in zip(grid[:, 0], rows or ()):
        axes.text(-0.03, 0.5, label, rotation=90, ha="right", va="center", fontsize=9, transform=axes.transAxes)
    return figure


def image_table(rows: list, columns: Mapping[str, Tensor], images: list) -> Figure:
    """Draw a table of square images, with smaller ones as row and column headers.

    rows: the images (1, 3, H, W) at the left; columns: {title: image at the top}; images: row by row, one for each of
    `columns`. Raises UserError if `columns` is not a mapping or the number of images is wrong.
    """
    if not isinstance(columns, Mapping):
        raise UserError(f"columns is {shown(columns)}: give {{title: image}}")
    width, count = 2.1, len(columns)  # inches, of one of `images`
    if len(images) != len(rows) * count:
        raise UserError(f"there are {len(images)} images: a table of {len(rows)} x {count} needs {len(rows) * count}")
    widths = [0.4 * width] + [width] * count
    heights = [0.4 * width] + [width] * len(rows)
    figure = _new_figure(sum(widths), sum(heights) + 0.4, 0.03, 0.03)
    grid = figure.subplots(len(heights), len(widths), width_ratios=widths, height_ratios=heights)
    drawn = [None, *columns.values()]
    for k, image in enumerate(rows):
        drawn += [image, *images[k * count : (k + 1) * count]]
    for axes, image, title in itertools.zip_longest(grid.flat, drawn, ["", *columns]):
        _draw(axes, image, title)
    return figure


def filmstrip(recorder: Recorder) -> Figure:
    """Draw six evenly spaced images of a `Recorder`, from the first to the last; fewer if it has fewer.

    Below each are its evaluation and its total loss. Raises UserError if the recorder has no images.
    """
    if not isinstance(recorder, Recorder) or not recorder.frames:
        raise UserError(
            f"recorder is a {type(recorder).__name__} without images: give a Recorder that was the `callback` of a task"
        )
    frames, width = recorder.frames, 1.5  # inches, of one image
    places = {round(k * (len(frames) - 1) / 5) for k in range(6)}
    chosen = [frames[place] for place in sorted(places)]
    last = chosen[-1].image
    figure = _new_figure(width * len(chosen), width * min(MAX_ASPECT, last.height / last.width) + 0.45, 0.02, 0.02)
    for axes, frame in zip(figure.subplots(1, len(chosen), squeeze=False).flat, chosen):
        axes.imshow(frame.image.resize(last.size, Image.Resampling.BICUBIC))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        loss = f"{frame.total:.3g}" if frame.total < 999.5 else f"{frame.total:,.0f}"
        axes.set_xlabel(f"evaluation {frame.evaluation}\nloss {loss}", fontsize=8)
    return figure


def plot_losses(curves: Mapping[str, list], ylabel: str = "loss", seconds: Mapping[str, list] | None = None) -> Figure:
    """Draw curves, {label: loss after each evaluation}, on a log scale.

    seconds: {label: time of each evaluation}, to draw the losses against time. Losses that are not positive are not
    drawn. Raises UserError if the curves are not numbers, and if `seconds` does not have one time per loss.
    """
    curves, seconds = as_curves(curves, "curves"), as_curves(seconds or {}, "seconds")
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for (label, losses), line in zip(curves.items(), itertools.cycle(("-", "--", "-.", ":"))):
        x = seconds.get(label, ()) if seconds else range(1, len(losses) + 1)
        if len(x) != len(losses):
            raise UserError(f"{label!r} has {len(losses)} losses: `seconds` must have as many")
        axes.semilogy(x, losses, line, label=label)
    axes.set(xlabel="seconds" if seconds else "evaluations of the network", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return figure


# --- Files and outputs ---------------------------------------------------------------------------


def show(figure: Figure | Path | Iterable, *arguments, alt: str, form: str = "jpeg", **options) -> None:
    """Show a figure in a notebook, with the alternative text `alt`.

    figure: a Figure, the path of an SVG file, or images, which `image_grid` draws with the other arguments. form:
    "jpeg", which is small, or "png", which is lossless; ignored for an SVG file. The output's plain text is only `alt`,
    so a regression run compares nothing that depends on the machine. Raises UserError for another form, for any other
    file than SVG, for grid options with a finished figure, and as `image_grid` does.
    """
    if form not in ("jpeg", "png"):
        raise UserError(f"form is {shown(form)}: use 'jpeg' or 'png'")
    if isinstance(figure, Figure | Path) and (arguments or options):
        raise UserError("titles, columns, width and rows are for images, and a finished figure was given")
    if isinstance(figure, Path):
        if as_file(figure, "drawing").suffix.lower() != ".svg":
            raise UserError(f"figure is {str(figure)!r}: give an SVG file, or an image that load_image has read")
        kind = "image/svg+xml"
        content = figure.read_text(encoding="utf-8")
    else:
        if not isinstance(figure, Figure):
            figure = image_grid(figure, *arguments, **options)
        dpi = min({"jpeg": 150, "png": 120}[form], MAX_FILE_SIDE / max(figure.get_size_inches()))
        file = io.BytesIO()
        figure.savefig(file, format=form, dpi=dpi, bbox_inches="tight", pad_inches=0.06)
        kind = f"image/{form}"
        content = base64.b64encode(file.getvalue()).decode()
    publish_display_data({kind: content, "text/plain": alt}, metadata={kind: {"alt": alt}})


def jpeg(image: Tensor) -> bytes:
    """Encode an image (1, 3, H, W) as a JPEG file, faster than PNG. One too large for the format is scaled down."""
    buffer = io.BytesIO()
    picture = to_pil(image)
    picture.thumbnail((MAX_FILE_SIDE, MAX_FILE_SIDE))
    picture.save(buffer, "jpeg", quality=90, subsampling="4:4:4")
    return buffer.getvalue()
