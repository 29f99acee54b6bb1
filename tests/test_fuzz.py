"""Damaged image files: an image, or one sentence. This is a sample; NST_FUZZ=20000 in the environment tries as many."""

import io
import os
import random
import re
import warnings

import pytest
import torch
from PIL import Image, ImageCms

from nst_utils import UserError, load_image

COUNT = int(os.environ.get("NST_FUZZ", 200))


def sound():
    """{suffix: bytes of pictures of several modes, with EXIF, profile and transparency}."""
    noise = Image.effect_noise((45, 31), 90)
    colours = Image.merge("RGB", (noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "a camera", 72.5
    made = {}
    for form, image in {
        "JPEG": colours, "PNG": colours.convert("RGBA"), "WEBP": colours, "TIFF": noise.convert("CMYK"), "BMP": colours,
        "GIF": colours.quantize(32), "AVIF": colours, "PPM": noise, "JPEG2000": colours,
    }.items():  # fmt: skip
        if form not in Image.SAVE:
            continue
        about = {"exif": exif, "icc_profile": profile} if form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
        image.save(buffer := io.BytesIO(), form, **about)
        made[form] = buffer.getvalue()
    return made


def damaged(content, chance):
    """Cut, with bits flipped, or with random bytes where EXIF stands or anywhere else."""
    content = bytearray(content)
    kind = chance.choice(("cut", "bits", "exif", "block"))
    if kind == "cut":
        return bytes(content[: chance.randrange(len(content))])
    if kind == "bits":
        for _ in range(chance.choice((1, 3, 30))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return bytes(content)
    begin = max(0, content.find(b"Exif")) if kind == "exif" else chance.randrange(len(content))
    begin += chance.randrange(40)
    length = chance.randrange(1, 60)
    content[begin : begin + length] = chance.randbytes(length)
    return bytes(content)


Image.init()
SOUND = sound()


@pytest.mark.parametrize("form", SOUND)
def test_a_damaged_picture_is_an_image_or_a_sentence(form, tmp_path):
    path = tmp_path / "picture"
    outcomes = set()
    for k in range(COUNT // len(SOUND)):
        content = damaged(SOUND[form], random.Random(f"{form} {k}"))
        path.write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = load_image(path, 8, "cpu")
        except UserError as error:
            outcomes.add(str(error).removeprefix(repr(str(path))).split(":")[0])
            assert "\n" not in str(error) and not re.search(r"\w\. [A-Z]", str(error)), k
        else:
            outcomes.add("an image")
            assert image.dtype == torch.float32 and image.shape[:2] == (1, 3) and min(image.shape[2:]) == 8, k
            assert 0 <= image.min() and image.max() <= 1, k
    assert len(outcomes) > 1
