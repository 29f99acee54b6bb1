"""Damaged image files: an image, or one sentence. This is a sample; set COUNT to try more."""

import io
import random
import re

import pytest
import torch
from PIL import Image, ImageCms

from nst_utils import UserError, load_image

COUNT = 200
NOISE = Image.effect_noise((45, 31), 90)
MODES = {"JPEG": "RGB", "PNG": "RGBA", "WEBP": "RGB", "TIFF": "CMYK", "AVIF": "RGB", "BMP": "RGB", "GIF": "L"}
pytestmark = pytest.mark.filterwarnings("ignore")


def encoded(form):
    """The bytes of an image file, with EXIF and a profile where the format has them."""
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    about = {}
    if form not in ("BMP", "GIF"):
        about["exif"] = Image.Exif()
        about["exif"].update({0x0112: 6, 0x010F: "a camera", 0x011A: 72.5})
        about["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    NOISE.convert(MODES[form]).save(buffer := io.BytesIO(), form, **about)
    return buffer.getvalue()


def damaged(content, chance):
    """Cut off, with flipped bits, or with a block of random bytes."""
    content = bytearray(content)
    place = chance.randrange(len(content))
    kind = chance.choice(("cut", "bits", "block"))
    if kind == "cut":
        return content[:place]
    if kind == "block":
        content[place : place + 60] = chance.randbytes(chance.randrange(1, 60))
        return content
    for _ in range(chance.choice((1, 3, 30))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


@pytest.mark.parametrize("form", MODES)
def test_a_damaged_file_is_an_image_or_a_sentence(form, tmp_path):
    path = tmp_path / "picture"
    sound, refused = encoded(form), 0
    for k in range(COUNT // len(MODES)):
        path.write_bytes(damaged(sound, random.Random(f"{form} {k}")))
        try:
            image = load_image(path, 8, "cpu")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and not re.search(r"\w\. [A-Z]", str(error)), k
        else:
            assert image.dtype == torch.float32 and image.shape[:2] == (1, 3) and min(image.shape[2:]) == 8, k
            assert 0 <= image.min() and image.max() <= 1, k
    assert refused


@pytest.mark.parametrize("form", MODES)
def test_half_a_file_is_named_as_such(form, tmp_path, refuses):
    path = tmp_path / "picture"
    content = encoded(form)
    path.write_bytes(content[: len(content) // 2])
    with refuses(f"{str(path)!r} is cut off"):
        load_image(path)
