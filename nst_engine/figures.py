"""Images, single maps and loss curves, drawn."""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping

import torch
from IPython.display import publish_display_data
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from .checks import as_number, as_whole, check_shown
from .errors import UserError
from .film import Recorder
from .images import to_pil


def show_images(images: Iterable, titles: list | None = None, columns: int | None = None, width: float = 2.6) -> Figure:
    """Draw images (1, 3, H, W), or single maps (H, W) in false colour, in a grid; return the Figure.

    columns: by default one row; width: of a panel, in inches. None in `images` leaves that place empty. Raises
    UserError for what is neither.
    """
    images = list(images)
    for k, image in enumerate(images):
        if image is not None and not (torch.is_tensor(image) and image.dim() == 2 and image.numel()):
            check_shown(image, f"images[{k}]")
    titles = list(titles or [""] * len(images))
    if not any(image is not None for image in images) or len(titles) != len(images):
        raise UserError(f"there are {len(images)} images and {len(titles)} titles: give one or more, and each a title")
    width = as_number(width, "width", 0.1, 100, " of inches, 0.1 to 100")
    columns = len(images) if columns is None else as_whole(columns, "columns")
    heights = []  # of the rows in inches: the tallest image, and room for the title's lines
    for k in range(0, len(images), columns):
        shapes = [image.shape[-2:] for image in images[k : k + columns] if image is not None]
        lines = max(text.count("\n") + 1 if text else 0 for text in titles[k : k + columns])
        heights.append(width * max((h / w for h, w in shapes), default=0.0) + 0.09 + 0.2 * lines)
    figure = Figure(figsize=(width * columns, sum(heights)))
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
        axes.set_xlabel(f"{frame.evaluation}\nloss {frame.total:.3g}", fontsize=8)
    return figure


def plot_losses(curves: Mapping[str, list], ylabel: str = "loss", size: tuple = (7.5, 3.2)) -> Figure:
    """Draw {label: the loss after each evaluation} in a log scale; return the Figure, of `size` in inches.

    Where a run goes on to a finer scale the loss jumps, since there is new detail to match.
    """
    figure = Figure(figsize=size, layout="constrained")  # not pyplot's: the panel draws on a thread of its own
    axes = figure.subplots()
    for (label, losses), line in zip(curves.items(), itertools.cycle(("-", "--", "-."))):
        axes.semilogy(range(1, len(losses) + 1), losses, line, label=label, linewidth=1.4)
    axes.set(xlabel="evaluations of the network", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return figure


def display_figure(figure: Figure, alt: str) -> None:
    """Show a Figure in a notebook as a light JPEG with the alternative text `alt`.

    The stored text is `alt` alone, so that a regression run compares nothing that a new machine would change.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=120, pil_kwargs={"quality": 85}, bbox_inches="tight", pad_inches=0.06)
    picture = base64.b64encode(buffer.getvalue()).decode()
    publish_display_data({"image/jpeg": picture, "text/plain": alt}, metadata={"image/jpeg": {"alt": alt}})


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
