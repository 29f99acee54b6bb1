"""What a figure shows: its pixels against the pictures, its curves and titles against what they are of."""

import base64
import io

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from nst_utils import image_grid, image_table, plot_losses, show, to_pil
from style_transfer.engine import figures


def drawn(axes):
    """The picture in an axes, as 8-bit values (H, W, 3)."""
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def plain(colour):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 20, 30)


def test_pictures_are_shown_in_order_each_under_its_title(picture):
    pictures = [picture(8, 12, seed) for seed in range(3)]
    figure = image_grid(pictures, ["a", "b", "c"], columns=2)
    assert titles(figure) == ["a", "b", "c", ""]
    for axes, image in zip(figure.axes, pictures):
        assert np.array_equal(drawn(axes), np.asarray(to_pil(image)))
    assert not figure.axes[3].get_images()


def test_a_row_is_as_high_as_its_tallest_picture(picture):
    for shapes, height in (([(10, 40)], 0.5), ([(40, 10), (10, 10)], 8.0)):
        figure = image_grid([picture(*shape) for shape in shapes], width=2.0)
        assert figure.get_size_inches() == pytest.approx((2 * len(shapes), height), abs=0.2)


def test_what_is_seen_is_the_picture():
    """Rendered: a red picture beside a blue one, upright and in its own colours."""
    blue = plain([0.0, 0.0, 1.0]).clone()
    blue[:, :, :10] = 1.0  # its upper half white
    figure = image_grid([plain([1.0, 0.0, 0.0]), blue], ["red", "blue"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    height, width = pixels.shape[:2]

    def at(axes, down):
        box = axes.get_window_extent()
        return pixels[round(height - box.y1 + down * box.height), round(box.x0 + box.width / 2)].tolist()

    assert at(figure.axes[0], 0.5) == [255, 0, 0]
    assert at(figure.axes[1], 0.25) == [255, 255, 255] and at(figure.axes[1], 0.75) == [0, 0, 255]


def test_a_place_may_be_left_empty_and_a_map_is_drawn_in_false_colour(picture):
    figure = image_grid([None, torch.arange(12.0).view(3, 4)], ["", "map"])
    assert not figure.axes[0].get_images()
    (image,) = figure.axes[1].get_images()
    assert image.get_cmap().name == "magma" and np.array_equal(image.get_array(), np.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("images, names", [([], None), ([None], [""]), (3, ["a", "b"]), (1, ["a", "b"])])
def test_nothing_to_show_or_another_number_of_titles_is_refused(images, names, picture, refuses):
    images = [picture(4, 4)] * images if isinstance(images, int) else images
    with refuses(f"there are {len(images)} images and {len(names or images)} titles"):
        image_grid(images, names)


def test_a_row_may_be_empty_and_a_width_is_of_inches(refuses):
    assert len(image_grid([plain([1.0, 0.0, 0.0]), None, None, None], columns=2).axes) == 4
    for width in (0, -1, "a", float("nan")):
        with refuses(f"width is {width!r}"):
            image_grid([plain([1.0, 0.0, 0.0])], width=width)


def test_a_curve_is_the_losses_after_each_evaluation():
    figure = plot_losses({"coarse to fine": [8.0, 4.0, 6.0, 2.0], "one scale": [3.0, 1.0]}, ylabel="loss / noise's")
    (axes,) = figure.axes
    curves = {line.get_label(): line for line in axes.lines}
    assert list(curves) == ["coarse to fine", "one scale"] and axes.get_yscale() == "log"
    assert curves["coarse to fine"].get_xdata().tolist() == [1, 2, 3, 4]
    assert curves["coarse to fine"].get_ydata().tolist() == [8, 4, 6, 2]
    assert curves["one scale"].get_ydata().tolist() == [3, 1] and axes.get_ylabel() == "loss / noise's"


def test_what_is_published_is_the_figure_and_its_alternative_text(monkeypatch):
    published = []
    monkeypatch.setattr(figures, "publish_display_data", lambda data, metadata: published.append((data, metadata)))
    show([plain([1.0, 0.0, 0.0])], alt="a red picture")
    ((data, metadata),) = published
    assert data["text/plain"] == "a red picture" and metadata == {"image/jpeg": {"alt": "a red picture"}}
    with Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"]))) as image:
        assert image.format == "JPEG"
        middle = image.getpixel((image.width // 2, image.height // 2))
    assert middle == pytest.approx((254, 0, 0), abs=6)


def test_rows_and_columns_have_labels():
    red, blue = plain([1.0, 0.0, 0.0]), plain([0.0, 0.0, 1.0])
    figure = image_grid([red, blue, red, blue], ["left", "right"], columns=2, rows=["above", "below"])
    assert [axes.get_title() for axes in figure.axes] == ["left", "right", "", ""]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes] == [["above"], [], ["below"], []]


def test_a_label_for_each_row(refuses):
    with refuses("2 rows and 3 labels"):
        image_grid([plain([1.0, 0.0, 0.0])] * 4, columns=2, rows=["a", "b", "c"])


def test_a_table_has_what_its_images_are_made_of_along_its_edges():
    colours = [plain([k / 10, 0.0, 0.0]) for k in range(10)]
    figure = image_table(colours[:2], {"x": colours[2], "y": colours[3], "z": colours[4]}, colours[4:])
    shown = [round(float(axes.images[0].get_array()[0, 0, 0]) / 25.5) if axes.images else None for axes in figure.axes]
    assert shown == [None, 2, 3, 4, 0, 4, 5, 6, 1, 7, 8, 9]
    assert [axes.get_title() for axes in figure.axes][:4] == ["", "x", "y", "z"]


def test_losses_against_seconds():
    figure = plot_losses({"fast": [3.0, 1.0], "slow": [4.0]}, seconds={"fast": [0.5, 0.75], "slow": [2.0]})
    (axes,) = figure.axes
    assert {line.get_label(): list(line.get_xdata()) for line in axes.lines} == {"fast": [0.5, 0.75], "slow": [2.0]}
    assert axes.get_xlabel() == "seconds"


def test_a_drawing_and_a_png_are_published_as_they_are(monkeypatch, tmp_path):
    published = []
    monkeypatch.setattr(figures, "publish_display_data", lambda data, metadata: published.append((data, metadata)))
    (tmp_path / "drawing.svg").write_text("<svg>ä</svg>", encoding="utf-8")
    show(tmp_path / "drawing.svg", alt="a drawing")
    show(image_grid([torch.eye(3)]), alt="a map", form="png")
    (drawing, _), (grid, metadata) = published
    assert drawing == {"image/svg+xml": "<svg>ä</svg>", "text/plain": "a drawing"}
    assert base64.b64decode(grid["image/png"]).startswith(b"\x89PNG") and metadata["image/png"] == {"alt": "a map"}
