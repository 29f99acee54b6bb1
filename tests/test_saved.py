"""What a saved image says of how it was made."""

import json

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nst_utils import IMAGES
from style_transfer.engine.saving import as_png, find_picture, read_settings

SETTINGS = {
    "content": "castle.jpg",
    "style": None,
    "size": 130,
    "content_layer": "conv4_2",
    "content_weight": 0.25,
    "style_weight": 3e5,
    "layer_weights": {"conv1_1": 0.5},
    "start": "content",
    "seed": 7,
}


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
    image, path = torch.arange(24).view(1, 3, 2, 4) / 255, tmp_path / "saved.png"
    path.write_bytes(as_png(image, SETTINGS | {"more": [1, 2]}))
    assert read_settings(path) == SETTINGS | {"more": [1, 2]}
    with Image.open(path) as file:
        assert file.size == (4, 2) and file.getpixel((3, 1)) == (7, 15, 23)


def test_layers_may_go_by_count(written):
    counted = SETTINGS | {"content_layer": "conv_2", "layer_weights": {"conv_5": 2}}
    found = read_settings(written(json.dumps(counted)))
    assert found["content_layer"] == "conv1_2" and found["layer_weights"] == {"conv3_1": 2.0}


@pytest.mark.parametrize(
    "damage",
    [
        {"size": 0},
        {"styles": []},
        {"styles": [[None, 1, None]]},
        {"styles": [["a.jpg", 0, None], ["b.jpg", 0, None]]},
        {"styles": [["a.jpg", 1, "folder/mask.png"]]},
        {"styles": [["a.jpg", 1]]},
        {"keep_colours": "no"},
        {"size": 2.5},
        {"size": True},
        {"content_layer": "conv9_1"},
        {"content_layer": 3},
        {"content_weight": -1},
        {"content_weight": "much"},
        {"style_weight": float("nan")},
        {"style_weight": None},
        {"layer_weights": ["conv1_1"]},
        {"layer_weights": {"conv1_1": -2}},
        {"layer_weights": None},
        {"start": "here"},
        {"start": ["noise"]},
        {"seed": "one"},
        {"seed": 1.5},
        {"content": "../castle.jpg"},
        {"content": 5},
        {"style": ["a"]},
    ],
    ids=str,
)
def test_settings_that_no_image_can_be_made_with_are_refused(damage, written, refuses):
    path = written(json.dumps(SETTINGS | damage))
    with refuses(f"the settings in {str(path)!r} are damaged"):
        read_settings(path)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_needed(name, written, refuses):
    path = written(json.dumps({other: value for other, value in SETTINGS.items() if other != name}))
    with refuses(f"the settings in {str(path)!r} are damaged"):
        read_settings(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", "[" * 100_000], ids=lambda text: text[:3])
def test_text_that_holds_no_settings_is_refused(text, written, refuses):
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


def test_a_picture_is_found_beside_the_file_first_and_then_among_the_projects(tmp_path):
    name = "chenonceau.jpg"
    assert find_picture(name, tmp_path) == IMAGES / "content" / name
    (tmp_path / name).write_text("no picture")
    assert find_picture(name, tmp_path) == IMAGES / "content" / name
    Image.new("RGB", (3, 2)).save(tmp_path / name)
    assert find_picture(name, tmp_path) == tmp_path / name
    assert find_picture("great_wave.jpg") == IMAGES / "style" / "great_wave.jpg"
    assert find_picture("none.jpg", tmp_path) is None
