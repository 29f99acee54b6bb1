"""What a figure shows: which image where, under which title, and which curve."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from nst_utils import IMAGES, filmstrip, image_grid, image_table, plot_losses, show, to_pil
from style_transfer.engine import figures


def plain(*colour):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 20, 30)


RED = plain(1.0, 0.0, 0.0)


def drawn(figure):
    """What each place shows, as arrays."""
    return [axes.images[0].get_array() if axes.images else None for axes in figure.axes]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_images_and_maps_are_drawn_row_by_row_under_their_titles(picture):
    images = [picture(8, 12, 0), None, picture(8, 12, 1), torch.arange(12.0).view(3, 4)]
    figure = image_grid(images, ["a", "b", "c", 4], columns=3)
    assert titles(figure) == ["a", "b", "c", "4", "", ""]
    first, empty, third, false_colour, *rest = drawn(figure)
    assert np.array_equal(first, to_pil(images[0])) and np.array_equal(third, to_pil(images[2]))
    assert np.array_equal(false_colour, images[3]) and figure.axes[3].images[0].get_cmap().name == "magma"
    assert empty is None and rest == [None, None]


def test_columns_have_titles_and_rows_labels():
    figure = image_grid([RED] * 6, ["left", "right"], columns=2, rows=["1", "2", "3"])
    assert titles(figure) == ["left", "right", "", "", "", ""]
    assert [[text.get_text() for text in axes.texts] for axes in figure.axes[::2]] == [["1"], ["2"], ["3"]]
    assert figure.get_size_inches()[0] == pytest.approx(5.4)


SIZES = [
    ([(10, 40)], 1, None, (2, 0.59)),
    ([(10, 10), (40, 10)], 2, ["", "one\ntwo"], (4, 8.49)),
    ([(10, 10), (10, 20), (20, 10)], 2, ["", "one", "one"], (4, 6.58)),
]


@pytest.mark.parametrize("shapes, columns, names, inches", SIZES)
def test_a_row_is_as_high_as_its_tallest_image_and_title(shapes, columns, names, inches, picture):
    figure = image_grid([picture(*shape) for shape in shapes], names, columns, width=2.0)
    assert figure.get_size_inches() == pytest.approx(inches)


@pytest.mark.parametrize(
    "images, options, why",
    [
        ([], {}, "there are 0 images and 0 titles"),
        ([None], {"titles": [""]}, "there are 1 images and 1 titles"),
        ([RED] * 3, {"titles": ["a", "b"]}, "there are 3 images and 2 titles"),
        ([RED] * 4, {"columns": 2, "rows": ["a", "b", "c"]}, "there are 2 rows and 3 labels"),
        ([RED], {"columns": 0}, "columns is 0"),
        ([RED], {"width": 0}, "width is 0"),
        ([RED], {"width": float("nan")}, "width is nan: it must be a finite number of inches, 0.1 to 100"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused(images, options, why, refuses):
    with refuses(why):
        image_grid(images, **options)


def test_a_table_has_smaller_images_along_its_edges():
    shades = [plain(k / 10, 0.0, 0.0) for k in range(10)]
    figure = image_table(shades[:2], dict(zip("xyz", shades[2:5])), shades[4:])
    corner, *places = drawn(figure)
    assert corner is None
    assert [round(place[0, 0, 0] / 25.5) for place in places] == [2, 3, 4, 0, 4, 5, 6, 1, 7, 8, 9]
    assert titles(figure) == ["", *"xyz", *[""] * 8]
    assert figure.get_size_inches() == pytest.approx((7.14, 5.44))


@pytest.mark.parametrize("count", [2, 4])
def test_a_table_needs_an_image_for_each_place(count, refuses):
    with refuses(f"there are {count} images: a table of 3 x 1 needs 3"):
        image_table([RED] * 3, {"red": RED}, [RED] * count)


LOSSES = {"fast": [8.0, 4.0, 6.0], "slow": [3.0]}
SECONDS = {"fast": [0.5, 0.75, 1.5], "slow": [2.0]}
COUNTED = {"fast": [1, 2, 3], "slow": [1]}


@pytest.mark.parametrize(
    "seconds, x, label", [(None, COUNTED, "evaluations of the network"), (SECONDS, SECONDS, "seconds")]
)
def test_curves_are_losses_against_evaluations_or_seconds(seconds, x, label):
    figure = plot_losses(LOSSES, "relative loss", seconds)
    axes = figure.axes[0]
    assert {line.get_label(): [*line.get_ydata()] for line in axes.lines} == LOSSES
    assert {line.get_label(): [*line.get_xdata()] for line in axes.lines} == x
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == (label, "relative loss", "log")


@pytest.mark.parametrize(
    "draw, arguments, words",
    [
        (plot_losses, [[1.0]], "curves is [1.0]: it must be {label: numbers, one per evaluation}"),
        (plot_losses, [{"a": "xy"}], "curves is {'a': 'xy'}: it must be"),
        (plot_losses, [LOSSES, "", [2.0]], "seconds is [2.0]: it must be"),
        (plot_losses, [LOSSES, "", {"fast": [1, 2]}], "'fast' has 3 losses: `seconds` must have as many"),
        (filmstrip, [[RED]], "recorder is a list without images: give a Recorder that was"),
        (image_table, [[RED], [RED], [RED]], ": give {title: image}"),
    ],
)
def test_other_arguments_are_refused_in_a_sentence(draw, arguments, words, refuses):
    with refuses(words):
        draw(*arguments)


@pytest.fixture
def published(monkeypatch):
    """What a cell shows: [(data, metadata), ...]."""
    outputs = []
    monkeypatch.setattr(figures, "publish_display_data", lambda data, metadata: outputs.append((data, metadata)))
    return outputs


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_what_is_seen_are_the_images_upright_and_the_text_is_the_alternative(form, published):
    flag = torch.cat([plain(1.0, 1.0, 1.0), plain(0.0, 0.0, 1.0)], dim=2)
    show([RED, flag], ["", ""], alt="red, and a flag", width=2.0, form=form)
    show(image_grid([RED, flag], width=2.0), alt="red, and a flag", form=form)
    (data, metadata), again = published
    assert again == (data, metadata)
    assert data["text/plain"] == "red, and a flag" and metadata == {f"image/{form}": {"alt": "red, and a flag"}}
    with Image.open(io.BytesIO(base64.b64decode(data[f"image/{form}"]))) as file:
        assert file.format == form.upper()
        seen = np.asarray(file.convert("RGB")).astype(int)
    height, width = (side // 4 for side in seen.shape[:2])
    for row, column, colour in ((1, 1, (255, 0, 0)), (1, 3, (255, 255, 255)), (3, 3, (0, 0, 255))):
        assert seen[row * height, column * width] == pytest.approx(colour, abs=6)


def test_a_drawing_is_published_as_it_is(published, tmp_path):
    (tmp_path / "drawing.svg").write_text("<svg>ä</svg>", encoding="utf-8")
    show(tmp_path / "drawing.svg", alt="a drawing")
    data = {"image/svg+xml": "<svg>ä</svg>", "text/plain": "a drawing"}
    assert published == [(data, {"image/svg+xml": {"alt": "a drawing"}})]


@pytest.mark.parametrize(
    "arguments, options, why",
    [
        ([[RED]], {"form": "gif"}, "form is 'gif': use 'jpeg' or 'png'"),
        ([image_grid([RED]), ["red"]], {}, "titles, columns, width and rows are for images"),
        ([IMAGES / "schematic.svg"], {"width": 3}, "titles, columns, width and rows are for images"),
        ([IMAGES / "poster.jpg"], {}, f"figure is {str(IMAGES / 'poster.jpg')!r}: give an SVG file"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments, options, why, published, refuses):
    with refuses(why):
        show(*arguments, alt="red", **options)
    assert not published


def test_what_is_too_long_for_a_file_is_scaled_down(published):
    column = torch.zeros(1, 3, 70000, 1)
    show([column] * 5, alt="columns", columns=1, width=1.5)
    for content in (figures.jpeg(column), base64.b64decode(published[0][0]["image/jpeg"])):
        with Image.open(io.BytesIO(content)) as file:
            assert 60_000 < file.height <= 65_500


def test_a_preview_is_a_jpeg_of_the_image():
    with Image.open(io.BytesIO(figures.jpeg(RED))) as file:
        assert file.format == "JPEG" and file.size == (30, 20)
        assert file.getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=3)
