"""Settings in saved images."""

import json

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from style_transfer.engine.images import IMAGES
from style_transfer.engine.saving import as_png, find_picture, read_settings

SETTINGS = {
    "content": "castle.jpg",
    "styles": [],
    "keep_colours": False,
    "size": 130,
    "content_layer": "conv4_2",
    "content_weight": 0.25,
    "style_weight": 3e5,
    "layer_weights": {"conv1_1": 0.5},
    "start": "content",
    "seed": 7,
}
DAMAGED = [
    *({name: value} for name in ("size", "content_layer", "start", "seed") for value in (None, 1.5, ["noise"])),
    *({name: value} for name in ("content_weight", "style_weight") for value in (-1, "much", float("nan"), None)),
    *({"content": value} for value in ("../castle.jpg", 5, ["a"])),
    *({"styles": styles} for styles in ([[None, 1, None]], [["a.jpg", 1, "folder/mask.png"]], [["a.jpg", 1]])),
    *({"styles": [["a.jpg", 0, None]]}, {"size": 0}, {"size": True}, {"start": "here"}, {"keep_colours": "no"}),
    *({"layer_weights": weights} for weights in (None, ["conv1_1"], {"conv1_1": -2}, {"conv9_1": 1})),
]
WITHOUT = [{other: SETTINGS[other] for other in SETTINGS if other != name} for name in SETTINGS]


@pytest.fixture
def written(tmp_path):
    """written(text): the path of a PNG file with this text."""

    def write(text):
        about = PngInfo()
        about.add_text("settings", text)
        Image.new("RGB", (3, 2)).save(tmp_path / "saved.png", pnginfo=about)
        return tmp_path / "saved.png"

    return write


def test_an_image_comes_back_with_its_settings(tmp_path):
    """Its layers may go by number."""
    image, path = torch.arange(24).view(1, 3, 2, 4) / 255, tmp_path / "saved.png"
    path.write_bytes(as_png(image, SETTINGS | {"content_layer": "conv_10", "more": [1, 2]}))
    assert read_settings(path) == SETTINGS | {"more": [1, 2]}
    path.write_bytes(as_png(image, SETTINGS | {"layer_weights": {"conv_1": 0.5}}))
    assert read_settings(path) == SETTINGS
    with Image.open(path) as file:
        assert file.size == (4, 2) and file.getpixel((3, 1)) == (7, 15, 23)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", "[" * 10**5, *map(json.dumps, [*(SETTINGS | change for change in DAMAGED), *WITHOUT])],
    ids=lambda text: text[-40:],
)
def test_damaged_settings_are_refused(text, written, refuses):
    path = written(text)
    with refuses(f"the settings in {str(path)!r} are damaged"):
        read_settings(path)


def test_files_without_settings_are_refused(tmp_path, refuses):
    plain, text = tmp_path / "plain.png", tmp_path / "text.png"
    Image.new("RGB", (3, 2)).save(plain)
    text.write_text("settings")
    for path in (plain, text, IMAGES / "content" / "chenonceau.jpg"):
        with refuses(f"{str(path)!r} holds no settings: give a PNG file that was saved by the panel or by stylise"):
            read_settings(path)
    with pytest.raises(FileNotFoundError, match="give a PNG file"):
        read_settings(tmp_path / "none.png")


def test_an_image_is_found_in_the_given_folder_first_and_then_among_the_projects(tmp_path):
    name = "chenonceau.jpg"
    (tmp_path / name).write_text("no image")
    assert find_picture(name, tmp_path) == IMAGES / "content" / name
    Image.new("RGB", (3, 2)).save(tmp_path / name)
    assert find_picture(name, tmp_path) == tmp_path / name
    for kind in ("style/great_wave.jpg", "masks/chenonceau_sky.png"):
        assert find_picture(kind.split("/")[1]) == IMAGES / kind
    assert find_picture("none.jpg", tmp_path) is None
