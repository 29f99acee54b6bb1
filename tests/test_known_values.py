"""Losses between stored images at 96 pixels, which must come out the same on every machine.

They hold weights, colour order, mean colour, layers and formulas to what they were when the numbers were written down.
"""

import pytest

from nst_utils import IMAGES, content_loss, features, gram_matrices, load_image, style_loss

CONTENT = {"conv1_2": 32.18, "conv2_2": 231.3, "conv3_4": 993.5, "conv4_4": 428.5, "conv5_4": 1.556}
STYLE = {"conv1_1": 1.38e-5, "conv1_2": 0.03026, "conv2_1": 0.01248, "conv2_2": 0.01353, "conv3_1": 0.007635}


def stored(name):
    return load_image(IMAGES / f"{name}.jpg", 96, "cpu")


def test_content_loss_of_two_content_images(vgg):
    a, b = (features(vgg, stored(f"content/{name}"), CONTENT) for name in ("eileen_collins", "cat_tortoiseshell"))
    found = {name: content_loss({name: a[name]}, {name: b[name]}).item() for name in CONTENT}
    assert found == pytest.approx(CONTENT, rel=0.01)


def test_style_loss_of_two_style_images(vgg):
    a, b = (features(vgg, stored(f"style/{name}"), STYLE) for name in ("starry_night", "self_portrait_straw_hat"))
    found = {name: style_loss({name: a[name]}, gram_matrices({name: b[name]})).item() for name in STYLE}
    assert found == pytest.approx(STYLE, rel=0.01)
