import contextlib
import math
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
import PIL.features
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngImageFile

from nst_utils import (
    IMAGES,
    difference_map,
    difference_numbers,
    features,
    image_grid,
    keep_colours,
    load_image,
    load_mask,
    resize,
    to_pil,
)  # fmt: skip
from style_transfer.engine.checks import MissingFileError
from style_transfer.engine.images import is_picture, luma, pick_device


def saved(folder, image, suffix=".png", **options):
    path = folder / f"image{suffix}"
    image.save(path, **options)
    return path


def pixel(image, row=0, column=0):
    """A pixel's colour in 8-bit steps."""
    return (image[0, :, row, column] * 255).round().int().tolist()


def palette_image():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return image


# mode -> (image of 6x4 pixels in one colour, file type, the colour to expect, its tolerance)
MODES = {
    "RGB": (Image.new("RGB", (6, 4), (10, 200, 30)), ".png", [10, 200, 30], 0),
    "L": (Image.new("L", (6, 4), 77), ".png", [77, 77, 77], 0),
    "LA": (Image.new("LA", (6, 4), (77, 255)), ".png", [77, 77, 77], 0),
    "LA, transparent": (Image.new("LA", (6, 4), (77, 0)), ".png", [255, 255, 255], 0),
    "RGBA": (Image.new("RGBA", (6, 4), (10, 200, 30, 255)), ".png", [10, 200, 30], 0),
    "RGBA, transparent": (Image.new("RGBA", (6, 4), (10, 200, 30, 0)), ".png", [255, 255, 255], 0),
    "RGBA, half": (Image.new("RGBA", (6, 4), (0, 100, 255, 51)), ".png", [204, 224, 255], 1),  # a fifth of it
    "P": (palette_image(), ".png", [10, 200, 30], 0),
    "1": (Image.new("1", (6, 4), 1), ".png", [255, 255, 255], 0),
    "CMYK": (Image.new("CMYK", (6, 4), (0, 255, 255, 0)), ".tif", [255, 0, 0], 0),
    "I;16": (Image.fromarray(np.full((4, 6), 100 * 257, np.uint16)), ".png", [100, 100, 100], 0),
    "I": (Image.fromarray(np.full((4, 6), 100 * 257, np.int32)), ".tif", [100, 100, 100], 0),
    "F": (Image.fromarray(np.full((4, 6), 100, np.float32)), ".tif", [100, 100, 100], 0),
    "F, white": (Image.fromarray(np.ones((4, 6), np.float32)), ".tif", [255, 255, 255], 0),
    "F, 0 to 1": (Image.fromarray(np.full((4, 6), 0.4, np.float32)), ".tif", [102, 102, 102], 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_colour_mode_becomes_rgb(mode, tmp_path):
    image, suffix, colour, tolerance = MODES[mode]
    read = load_image(saved(tmp_path, image, suffix), size=4, device="cpu")
    assert read.shape == (1, 3, 4, 6) and read.dtype == torch.float32
    assert pixel(read) == pytest.approx(colour, abs=tolerance)
    assert torch.equal(read, read[:, :, :1, :1].expand_as(read))  # it has one colour


def test_palette_transparency_is_laid_over_white(tmp_path):
    image = palette_image()
    image.putpixel((0, 0), 0)
    read = load_image(saved(tmp_path, image, transparency=0), size=4, device="cpu")
    assert pixel(read) == [255, 255, 255] and pixel(read, 0, 1) == [10, 200, 30]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896], [65535, 65278, 256]], np.uint16)
    read = load_image(saved(tmp_path, Image.fromarray(values)), size=2, device="cpu")
    assert (read[0, 1] * 255).round().int().tolist() == [[0, 1, 128], [255, 254, 1]]


CORNERS = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}  # by rows


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", [*CORNERS, 0, 9])
def test_camera_rotation_is_applied(orientation, suffix, tmp_path):
    """All eight; what is none leaves the image as it is stored."""
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (0, 0, 0)}
    image = Image.new("RGB", (32, 16))
    for k, colour in enumerate(colours.values()):
        image.paste(colour, (16 * (k % 2), 8 * (k // 2), 16 + 16 * (k % 2), 8 + 8 * (k // 2)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, image, suffix, exif=exif, **({"quality": 100} if suffix != ".tif" else {}))
    read = load_image(path, size=16, device="cpu")
    assert read.shape == (1, 3, *((32, 16) if orientation in (5, 6, 7, 8) else (16, 32)))
    height, width = read.shape[-2:]
    corners = [pixel(read, row * (height - 5) + 2, column * (width - 5) + 2) for row in (0, 1) for column in (0, 1)]
    expected = CORNERS.get(orientation, "abcd")
    assert np.abs(np.array(corners) - [colours[name] for name in expected]).max() < 40


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "1", "F"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_an_uncompressed_tiff_is_turned_as_another_image_is(orientation, mode, tmp_path):
    values = (np.arange(24).reshape(4, 6) % 2 if mode == "1" else np.arange(24).reshape(4, 6)) * 10
    values = values.astype({"I;16": np.uint16, "F": np.float32}.get(mode, np.uint8)) * (257 if mode == "I;16" else 1)
    image = Image.fromarray(values) if mode in ("I;16", "F") else Image.fromarray(values).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    tiff, png = (saved(tmp_path, image, suffix, exif=exif) for suffix in (".tif", ".png" if mode != "F" else ".tiff"))
    expected = np.asarray(ImageOps.exif_transpose(image_with(image, exif)).convert("L" if mode == "1" else mode), float)
    if mode == "RGB":
        expected = expected[..., 0]
    found = load_image(tiff, min(expected.shape), "cpu")
    assert found.shape[2:] == expected.shape
    assert np.abs(found[0, 0].numpy() * 255 - expected / (257 if mode == "I;16" else 1)).max() < 0.6
    assert torch.equal(found, load_image(png, min(expected.shape), "cpu"))


def image_with(image, exif):
    image = image.copy()
    image.getexif()[0x0112] = exif[0x0112]
    return image


def entry(tag, kind, count, value):
    return struct.pack("<2HI", tag, kind, count) + value.ljust(4, b"\0")


TURN = entry(0x112, 3, 1, struct.pack("<H", 6))
ODD_EXIF = {
    "a resolution of -1/0": (entry(0x11A, 10, 1, struct.pack("<I", 38)), struct.pack("<2i", -1, 0)),
    "a table that is cut off": (b"\x1a\x01\x05", b""),
    "a value beyond the end": (entry(0x11A, 5, 7, struct.pack("<I", 60000)), b""),
    "a text where a number belongs": (entry(0x11A, 2, 4, b"abc\0"), b""),
    "a type that is none": (entry(0x11A, 99, 1, b"\xff" * 4), b""),
    "a table of photography that is none": (entry(0x8769, 4, 1, struct.pack("<I", 3)), b""),
}


@pytest.mark.parametrize("odd", ODD_EXIF)
def test_an_odd_entry_of_exif_leaves_a_sound_picture_and_its_rotation(odd, tmp_path):
    more, values = ODD_EXIF[odd]
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + TURN + more + bytes(4) * bool(values) + values
    for suffix in (".jpg", ".png", ".webp"):
        path = saved(tmp_path, Image.new("RGB", (40, 30), "red"), suffix, exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of corrupt EXIF
            assert load_image(path, 16, "cpu").shape == (1, 3, 21, 16)


@pytest.mark.parametrize("head", [b"II*\0\x08\0\0\0\x01\0" + entry(0x112, 2, 2, b"6\0"), b"no EXIF", b""])
def test_an_orientation_that_cannot_be_read_turns_nothing(head, tmp_path):
    exif = b"Exif\0\0" + head + bytes(4)
    for suffix in (".jpg", ".webp"):
        path = saved(tmp_path, Image.new("RGB", (40, 30)), suffix, exif=exif)
        assert load_image(path, 16, "cpu").shape == (1, 3, 16, 21)


def test_pixels_and_channels_arrive_unchanged_and_are_written_so(tmp_path):
    values = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)  # every value
    read = load_image(saved(tmp_path, Image.fromarray(values)), size=16, device="cpu")
    assert np.array_equal(read.numpy(), values.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
    assert to_pil(read).mode == "RGB" and np.array_equal(np.asarray(to_pil(read)), values)


@pytest.mark.parametrize(
    "width, height, size, shape",
    [(40, 20, 10, (10, 20)), (20, 40, 10, (20, 10)), (30, 20, 7, (7, 10)), (3, 5, 32, (53, 32)), (9, 9, 1, (1, 1))],
)
def test_the_shorter_side_gets_the_size_and_the_aspect_stays(width, height, size, shape, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    read = load_image(saved(tmp_path, Image.fromarray(values)), size=size, device="cpu")
    assert read.shape == (1, 3, *shape)
    assert read.min() >= 0 and read.max() <= 1  # Lanczos overshoots where nothing clips it


def test_the_default_size_is_256():
    assert min(load_image(IMAGES / "content" / "chenonceau.jpg").shape[-2:]) == 256


def test_a_missing_image_and_a_folder_are_named(tmp_path, refuses):
    for path in (tmp_path / "absent.jpg", tmp_path):
        with refuses(f"no picture at {str(path)!r}", MissingFileError):
            load_image(path)
    for path in (None, b"a.jpg", 3):
        with refuses(f"no picture at {path!r}"):
            load_image(path)


def written_as(suffix, **options):
    """A function: the bytes of a picture in the format of this suffix."""

    def made(folder):
        return saved(folder, Image.effect_noise((90, 70), 90).convert("RGB"), suffix, **options).read_bytes()

    return made


def half_of(suffix):
    return lambda folder: (whole := written_as(suffix)(folder))[: len(whole) // 2]


WRONG = {
    "text": (lambda _: b"not a picture", "is not a picture in a format that is read here: use a JPEG or PNG file"),
    "nothing": (lambda _: b"", "is not a picture in a format"),
    "another image format": (written_as(".tga"), "is not a picture in a format"),
    "HEIC": (lambda _: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 99, "is a HEIC photograph: convert it to JPEG"),
    "HEIC, as others write it": (lambda _: b"\0\0\0\x18ftypmif1\0\0\0\0miafheic" + b"\n" * 99, "is a HEIC photograph"),
    **{
        f"half of a {suffix}": (half_of(suffix), "is cut off")
        for suffix in (".jpg", ".png", ".webp", ".tif", ".bmp", ".gif", ".ppm", ".jp2")
    },
    "a head alone": (lambda folder: written_as(".jpg")(folder)[:40], "is cut off"),
    "half of an AVIF that names itself otherwise": (
        lambda _: b"\0\0\0\x20ftypmif1\0\0\0\0mif1avifmiaf" + b"\0" * 99,
        "is cut off, damaged or of a kind" if PIL.features.check("avif") else "is not a picture in a format"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_why_a_file_is_no_image_is_said(wrong, tmp_path, refuses):
    make, why = WRONG[wrong]
    path = tmp_path / "photograph.jpg"
    path.write_bytes(make(tmp_path))
    with refuses(f"{str(path)!r} {why}"):
        load_image(path)
    assert not is_picture(path) or why.startswith("is cut off")


def test_a_file_without_permission_is_said(as_nobody, refuses):
    with as_nobody() as folder:
        path = saved(folder, Image.new("RGB", (6, 4)))
        path.chmod(0)
        with refuses(f"{str(path)!r} cannot be read: Permission denied"):
            load_image(path)


@pytest.mark.parametrize("limit", [None, 20, 10**9])
def test_pillows_limit_is_its_users(limit, tmp_path, monkeypatch, refuses):
    """Lifted, as is often done, it is no longer one; where it holds, it is said what is too large."""
    path = saved(tmp_path, Image.new("RGB", (9, 7)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with refuses(f"{str(path)!r} has too many pixels") if limit == 20 else contextlib.nullcontext():
        assert load_image(path, 14, "cpu").shape == (1, 3, 14, 18)
    assert is_picture(path)


@pytest.mark.parametrize("category", [None, Image.DecompressionBombWarning])
def test_a_warning_of_many_pixels_may_be_an_error(category, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    path = saved(tmp_path, Image.new("RGB", (9, 7)))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if category else "ignore", Image.DecompressionBombWarning)
        with refuses("has too many pixels") if category else contextlib.nullcontext():
            assert load_image(path, 7, "cpu").shape == (1, 3, 7, 9)


def test_a_decoder_may_raise_what_it_likes(tmp_path, monkeypatch, refuses):
    path = saved(tmp_path, Image.new("RGB", (9, 7)))
    for error in (
        struct.error("x"),
        ZeroDivisionError(),
        IndexError("y"),
        AssertionError(),
        EOFError(),
        RecursionError(),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PngImageFile, "load", mock.Mock(side_effect=error))
            named = str(error) or type(error).__name__
            with refuses(f"{str(path)!r} is cut off, damaged or of a kind that is not read here ({named})"):
                load_image(path)
    monkeypatch.setattr(PngImageFile, "load", mock.Mock(side_effect=MemoryError))
    with refuses(f"{str(path)!r} has too many pixels for the memory that is free"):
        load_image(path)


def test_formats_are_those_that_this_pillow_has(tmp_path, monkeypatch, refuses):
    path = saved(tmp_path, Image.new("RGB", (6, 4)))
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    assert load_image(path, 4, "cpu").shape == (1, 3, 4, 6)
    monkeypatch.delitem(Image.OPEN, "PNG")
    with refuses("is not a picture in a format that is read here"):
        load_image(path)


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (6, 4)))
    assert is_picture(path) and not is_picture(tmp_path) and not is_picture(tmp_path / "absent.png")
    assert is_picture(path.rename(tmp_path / "without a suffix"))
    assert not is_picture((tmp_path / "without a suffix").rename(tmp_path / ".hidden.png"))


@pytest.mark.parametrize("value", [70000, -1, np.float32(300), np.float32(-0.1), np.float32("nan")])
def test_values_that_have_no_known_white_are_refused(value, tmp_path, refuses):
    """32-bit and floating-point TIFF: neither clipped nor wrapped around."""
    values = np.array([[0, value], [1, 2]], np.float32 if isinstance(value, np.floating) else np.int32)
    path = saved(tmp_path, Image.fromarray(values), ".tif")
    with refuses(str(path)):
        load_image(path)


def test_a_format_that_would_start_another_program_is_refused(tmp_path, monkeypatch, refuses):
    """Ghostscript, for one."""
    path = saved(tmp_path, Image.new("RGB", (6, 4)), ".eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    with refuses(f"{str(path)!r} is not a"):
        load_image(path)


def test_an_image_that_would_become_too_long_is_refused(tmp_path, refuses):
    path = saved(tmp_path, Image.new("RGB", (10000, 1)))
    assert load_image(path, size=4, device="cpu").shape == (1, 3, 4, 40000)
    with refuses("would be 2560000 x 256 pixels at size 256"):
        load_image(path)


def profile_with_red_and_green_exchanged():
    """sRGB's profile, in which two entries of the table of tags have changed their names."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    head, tail = data[:400], data[400:]
    return head.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ") + tail


@pytest.mark.parametrize("mode, alpha", [("RGB", ()), ("RGBA", (255,)), ("RGBA", (0,)), ("P", ())])
def test_colours_with_a_profile_become_srgb(mode, alpha, tmp_path):
    image = Image.new(mode if mode == "RGBA" else "RGB", (6, 4), (200, 30, 40, *alpha))
    image = image.quantize(4) if mode == "P" else image
    path = saved(tmp_path, image, icc_profile=profile_with_red_and_green_exchanged())
    expected = [255, 255, 255] if alpha == (0,) else [30, 200, 40]
    assert pixel(load_image(path, size=4, device="cpu")) == pytest.approx(expected, abs=12)


COLOURS = {"P": (7, 60, 90), "RGB": (9, 9, 10), "RGBA": (7, 9, 9, 255), "CMYK": (1, 2, 3, 4)}


def profile_of(space):
    """sRGB's profile, in which another space is named."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data[:16] + space + data[20:]


@pytest.mark.parametrize(
    "mode, space, given",
    [
        *[(mode, b"GRAY", "L") for mode in ("1", "L", "LA", "I;16")],
        *[(mode, b"RGB ", "RGB") for mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")],
        ("CMYK", b"CMYK", "CMYK"),
        *[(mode, b"GRAY", None) for mode in ("RGB", "RGBA", "P", "CMYK")],
        *[(mode, b"CMYK", None) for mode in ("L", "RGB", "P")],
        ("CMYK", b"RGB ", None),
        ("RGB", b"XYZ ", None),
    ],
)
def test_a_profile_is_given_the_colours_that_it_is_of(mode, space, given, tmp_path, monkeypatch):
    """Or left aside with a warning, if they would have to be guessed: None. What it does is the library's business."""
    modes = []
    monkeypatch.setattr(
        ImageCms, "profileToProfile", lambda image, *_, **__: modes.append(image.mode) or image.convert("RGB")
    )
    image = (
        Image.new("RGB", (6, 4), "navy").quantize(4) if mode == "P" else Image.new(mode, (6, 4), COLOURS.get(mode, 0))
    )
    path = saved(tmp_path, image, ".tif" if mode == "CMYK" else ".png", icc_profile=profile_of(space))
    with (
        contextlib.nullcontext() if given else pytest.warns(UserWarning, match="damaged or of other colours") as caught
    ):
        load_image(path)
    assert modes == [given] * bool(given) and (given or caught[0].filename == __file__)


def linear_grey_profile():
    """A profile of grey without the usual gamma, after ICC.1: header, table of tags, white point and curve."""

    def xyz(*values):
        return struct.pack(">3i", *(round(65536 * value) for value in values))

    white = xyz(0.9642, 1, 0.8249)
    tags = {
        b"desc": b"desc" + struct.pack(">4xI", 2) + b"g\0" + bytes(80),
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv" + struct.pack(">4xIH2x", 1, 256),
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">2I", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4x4s12s12x4s28x12s48x", 128 + len(table + body), b"\x02\x10\0\0", b"mntrGRAYXYZ ", b"acsp", white
    )
    return head + table + body


def in_16_bits(value):
    return Image.fromarray(np.full((4, 6), value, np.uint16))


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("L", (6, 4), 55), 128),
        (in_16_bits(55 * 257), 128),
        (Image.new("LA", (6, 4), (55, 255)), 128),
        (Image.new("LA", (6, 4), (55, 0)), 255),
        (Image.new("1", (6, 4), 1), 255),
        (Image.new("1", (6, 4), 0), 0),
    ],
)
def test_grey_with_a_profile_becomes_srgb(image, expected, tmp_path, recwarn):
    path = saved(tmp_path, image, icc_profile=linear_grey_profile())
    assert pixel(load_image(path, 4, "cpu")) == pytest.approx([expected] * 3, abs=2) and not recwarn.list


def png_of_16_bits(values, transparent):
    """Grey (H, W) or colours (H, W, 3), of which one is transparent; Pillow writes no such colours."""
    values = np.asarray(values, ">u2")
    height, width, channels = (*values.shape, 1)[:3]
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">2I5B", width, height, 16, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": np.asarray(transparent, ">u2").tobytes(), b"IDAT": zlib.compress(rows)}
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in {**chunks, b"IEND": b""}.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_in_16_bits_one_grey_may_be_transparent_and_its_neighbour_not(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_of_16_bits([[20560, 20561, 0], [40000, 65535, 20560]], 20560))
    read = load_image(path, 2, "cpu")
    assert [pixel(read, 0, k)[0] for k in range(3)] == [255, 80, 0]
    assert [pixel(read, 1, k)[0] for k in range(3)] == [156, 255, 255]


@pytest.mark.parametrize("transparent", [(1000, 20000, 300), (100, 50, 20)])
def test_in_16_bits_one_colour_may_be_transparent(transparent, tmp_path):
    """Also one so dark that it would be a colour of 8 bits."""
    path = tmp_path / "a.png"
    path.write_bytes(png_of_16_bits([[transparent, [60000, 0, 100], [25700, 12850, 5140]]], transparent))
    read = load_image(path, 1, "cpu")
    assert [pixel(read, 0, k) for k in range(3)] == [[255, 255, 255], [234, 0, 0], [100, 50, 20]]


def test_in_8_bits_one_colour_may_be_transparent(tmp_path):
    image = Image.new("RGB", (6, 4), (100, 50, 20))
    image.putpixel((0, 0), (1, 2, 3))
    read = load_image(saved(tmp_path, image, transparency=(1, 2, 3)), 4, "cpu")
    assert pixel(read) == [255, 255, 255] and pixel(read, 1, 1) == [100, 50, 20]


def test_a_picture_whose_profile_cannot_be_applied_at_all_is_read(tmp_path, monkeypatch):
    """Pillow may have been built without the library for it, and says so when it is asked."""
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", mock.Mock(side_effect=ImportError))
    with pytest.warns(UserWarning, match="it is left aside"):
        path = saved(tmp_path, Image.new("L", (6, 4), 70), icc_profile=linear_grey_profile())
        assert pixel(load_image(path, 4, "cpu")) == [70, 70, 70]


def test_grey_that_is_stored_as_colours_has_its_profile_too(tmp_path, recwarn):
    for image in (Image.new("RGBA", (6, 4), (55, 55, 55, 255)), Image.new("L", (6, 4), 55).convert("P")):
        path = saved(tmp_path, image, icc_profile=linear_grey_profile())
        assert pixel(load_image(path, 4, "cpu")) == pytest.approx([128] * 3, abs=2) and not recwarn.list


def test_a_damaged_profile_is_left_aside_with_a_warning(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (6, 4), (200, 30, 40)), icc_profile=b"no profile")
    with pytest.warns(UserWarning, match="colour profile is damaged"):
        assert pixel(load_image(path, size=4, device="cpu")) == [200, 30, 40]


@pytest.mark.skipif(not PIL.features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_broken_avif_is_named(tmp_path, refuses):
    """Pillow's AVIF decoder reports damage as RuntimeError, where others say OSError."""
    path = saved(tmp_path, Image.effect_noise((32, 32), 90).convert("RGB"), ".avif")
    head, tail = path.read_bytes().split(b"mdat", 1)
    path.write_bytes(head + b"mdat" + bytes(len(tail)))
    with refuses(str(path)):
        load_image(path)


def test_what_is_too_fine_for_a_smaller_image_is_averaged_not_sampled():
    stripes = torch.tensor([0.0, 1.0]).repeat(45).expand(1, 3, 90, 90)
    assert (resize(stripes, (30, 30)) - 0.5).abs().mean() < 0.05


@pytest.mark.parametrize("size", [0, -3, 2.5, "256", None, True, 10**400, torch.zeros(50, 50)])
def test_a_bad_size_is_named(size, refuses):
    with refuses(f"size is {repr(size)[:10]}"):
        load_image(IMAGES / "content" / "chenonceau.jpg", size)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "", 3.5])
def test_an_unknown_device_is_named(device, refuses):
    with refuses(f"device {device!r} is unknown: this machine has "):
        pick_device(device)


def test_numbers_of_other_libraries_are_sizes(tmp_path):
    path = saved(tmp_path, Image.new("RGB", (6, 4)))
    for size in (np.int64(8), torch.tensor(8)):
        assert load_image(path, size, "cpu").shape == (1, 3, 8, 12)


def test_cuda_is_the_present_one_by_its_full_name(monkeypatch):
    """So that a network is loaded once for "cuda" and "cuda:0"; with a stand-in for the device."""
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n))
    for device in (None, "cuda", "cuda:0", torch.device("cuda")):
        assert str(pick_device(device)) == "cuda:0"


def test_a_gpu_that_this_torch_cannot_run_is_passed_over(monkeypatch, refuses):
    def no_code_for(n, device):
        if device.type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return torch.ones(n)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "zeros", no_code_for)
    with pytest.warns(UserWarning, match="^'cuda' is older than the installed torch.*take a T4.*, and is passed over$"):
        assert pick_device() == torch.device("cpu")
    with refuses("device 'cuda' is older than the installed torch has code for"):
        pick_device("cuda")


def test_a_full_gpu_is_no_unknown_device(monkeypatch, refuses):
    def full(n, device):
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return torch.ones(n)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "zeros", full)
    with refuses("device 'cuda' has no memory left (end what else runs on it): this machine has cuda, cpu"):
        pick_device("cuda")
    with pytest.warns(UserWarning, match=r"^'cuda' has no memory left .*, and is passed over$"):
        assert pick_device() == torch.device("cpu")


def test_the_device_is_one_this_machine_has():
    assert pick_device("cpu") == torch.device("cpu")
    assert torch.ones(1, device=pick_device()).item() == 1


def test_to_pil_rounds_and_clamps_and_leaves_the_image_alone():
    image = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 1.7]).view(1, 1, 2, 2).repeat(1, 3, 1, 1).requires_grad_()
    before = image.detach().clone()
    assert np.asarray(to_pil(image))[:, :, 0].tolist() == [[0, 0], [1, 255]]
    assert torch.equal(image, before)


def test_resize_keeps_range_and_does_nothing_at_the_same_shape():
    stripes = (torch.arange(24) // 3 % 2).float().expand(1, 3, 20, 24)  # bicubic overshoots at edges
    assert resize(stripes, (20, 24)) is stripes
    for shape in ((33, 50), (7, 5), (1, 1)):
        scaled = resize(stripes, shape)
        assert scaled.shape == (1, 3, *shape) and scaled.min() >= 0 and scaled.max() <= 1
    assert resize(stripes, (5, 6)).mean().item() == pytest.approx(0.5, abs=0.05)


def test_difference_map_compares_what_is_displayed():
    a, b = torch.full((1, 3, 2, 2), 1.5), torch.full((1, 3, 2, 2), -0.5)
    assert torch.equal(difference_map(a, b), torch.ones(1, 3, 2, 2))


def test_equal_images_do_not_differ(picture):
    assert difference_numbers(picture(4, 6), picture(4, 6)) == (0, 0, math.inf)


def test_one_8_bit_step_in_one_channel_counts_as_a_pixel():
    for value in range(255):  # in float32 some of these steps are a hair less than 1/255
        a = torch.full((1, 3, 4, 5), value) / 255
        b = a.clone()
        b[0, 1, 2, 3] = torch.tensor(value + 1) / 255
        for numbers in (difference_numbers(a, b), difference_numbers(b, a)):
            assert numbers.share == 1 / 20, value
            assert numbers.mean == pytest.approx(1 / 255 / 60, rel=1e-4)
            assert numbers.psnr == pytest.approx(10 * math.log10(60 * 255**2), abs=1e-3)


NO_IMAGES = {
    "no tensor": (np.zeros((1, 3, 4, 5), np.float32), "is ndarray: an image is a float tensor (1, 3, H, W)"),
    "a picture of Pillow's": (Image.new("RGB", (6, 4)), "is Image: an image"),
    "no first dimension": (torch.zeros(3, 4, 5), "is (3, 4, 5) torch.float32"),
    "two images": (torch.zeros(2, 3, 4, 5), "is (2, 3, 4, 5)"),
    "four channels": (torch.zeros(1, 4, 5, 6), "is (1, 4, 5, 6)"),
    "no pixels": (torch.zeros(1, 3, 0, 6), "is (1, 3, 0, 6)"),
    "bytes": (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), "is (1, 3, 4, 5) torch.uint8"),
    "complex": (torch.zeros(1, 3, 4, 5, dtype=torch.complex64), "is (1, 3, 4, 5) torch.complex64"),
    "to 255": (torch.full((1, 3, 4, 5), 255.0), "has values outside [-1, 2] or not finite"),
    "without their mean": (torch.full((1, 3, 4, 5), -1.1), "has values outside [-1, 2]"),
    "not a number": (
        torch.zeros(1, 3, 4, 5).index_fill(3, torch.tensor(2), math.nan),
        "has values outside [-1, 2] or not",
    ),
    "sparse": (torch.zeros(1, 3, 4, 5).to_sparse(), "is Tensor: an image"),
    "without memory": (torch.zeros(1, 3, 4, 5, device="meta"), ""),
    "of 8 bits": (torch.zeros(1, 3, 4, 5, dtype=torch.float8_e4m3fn), "is (1, 3, 4, 5) torch.float8_e4m3fn"),
    "endless": (torch.full((1, 3, 4, 5), math.inf), "has values outside [-1, 2] or not"),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_is_no_image_is_refused_at_every_door(case, vgg, picture, refuses):
    value, sentence = NO_IMAGES[case]
    good = picture(4, 5)
    doors = {
        "image ": [lambda: to_pil(value), lambda: resize(value, (4, 5)), lambda: features(vgg, value, "conv1_1")],
        "the first image ": [lambda: difference_map(value, good), lambda: difference_numbers(value, good)],
        "the second image ": [lambda: difference_map(good, value), lambda: difference_numbers(good, value)],
        "images[1] ": [lambda: image_grid([good, value, None])],
    }
    for name, uses in doors.items():
        for use in uses:
            with refuses(name + sentence):
                use()


def test_images_of_half_precision_are_taken(picture):
    for dtype in (torch.float16, torch.bfloat16):
        image = picture(4, 5).to(dtype)
        assert resize(image, (8, 9)).shape == (1, 3, 8, 9) and to_pil(image).size == (5, 4)
        assert difference_map(image, image).max() == 0


def test_a_difference_needs_one_device(picture, refuses):
    on_gpu = type("OnGPU", (torch.Tensor,), {"device": torch.device("cuda", 0)})  # so it says
    with refuses("images on cuda:0 and cpu: a difference needs both on one device"):
        difference_map(picture(4, 5).as_subclass(on_gpu), picture(4, 5))


def test_what_does_not_fit_into_memory_is_said(tmp_path, monkeypatch, refuses):
    path = saved(tmp_path, Image.new("RGB", (9, 7)))
    for error in (MemoryError(), RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 9 bytes")):
        with monkeypatch.context() as patch, refuses(f"{str(path)!r} has too many pixels for the memory that is free"):
            patch.setattr(torch, "from_numpy", mock.Mock(side_effect=error))
            load_image(path)
    with refuses("shape is (1000000, 1000000): that is too large"):
        resize(torch.zeros(1, 3, 4, 5), (10**6, 10**6))


def test_a_little_outside_is_taken_and_a_graph_too(vgg):
    image = torch.tensor([-1.0, -0.2, 0.5, 1.1, 1.7, 2.0]).view(1, 1, 2, 3).repeat(1, 3, 1, 1).requires_grad_()
    assert np.asarray(to_pil(image))[0, :, 0].tolist() == [0, 0, 128]
    assert difference_map(image, image + 0.0).max() == 0
    assert image_grid([image, image[0, 0]]) and resize(image, (5, 7)).requires_grad
    features(vgg, image, "conv1_1")["conv1_1"].sum().backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [20, None, (5,), (4, 5, 6), (0, 3), (2.5, 3), "45", (torch.nan, 3)])
def test_what_is_no_shape_is_refused(shape, picture, refuses):
    with refuses(f"shape is {shape!r}: it must be (height, width)"):
        resize(picture(4, 5), shape)


def test_less_than_one_8_bit_step_does_not_count():
    a = torch.full((1, 3, 4, 5), 0.5)
    assert difference_numbers(a, a + 0.9 / 255).share == 0


def test_different_shapes_have_no_difference(refuses, picture):
    for difference in (difference_map, difference_numbers):
        with refuses("(1, 3, 4, 5) and (1, 3, 5, 4)"):
            difference(picture(4, 5), picture(5, 4))


def hue(image):
    """Chroma as directions: zero where there is none."""
    chroma = image - luma(image)
    return torch.nn.functional.normalize(chroma, dim=1)


def test_colours_are_kept_with_the_images_luma_and_the_contents_hue(picture):
    image, content = picture(20, 30), picture(20, 30, 1)
    found = keep_colours(image, content)
    torch.testing.assert_close(luma(found), luma(image))
    assert found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(hue(found), hue(content), atol=2e-3, rtol=0)
    chroma, wanted = (x - luma(x) for x in (found, content))
    full = ((luma(image) + wanted >= 0) & (luma(image) + wanted <= 1)).all(1, keepdim=True)
    assert 0.05 < full.float().mean() < 0.95  # of some pixels all of it, of others as much as there is room for
    torch.testing.assert_close((chroma * full), (wanted * full))
    assert (chroma.norm(dim=1) <= wanted.norm(dim=1) + 1e-5).all()


def test_colours_of_an_image_onto_itself_change_nothing_and_of_grey_take_all(picture):
    image = picture(8, 9)
    torch.testing.assert_close(keep_colours(image, image), image)
    grey = keep_colours(image, torch.full((1, 3, 16, 18), 0.3))
    torch.testing.assert_close(grey, luma(image).expand(1, 3, 8, 9))
    for value in (0.0, 1.0):  # black and white have room for no colour
        torch.testing.assert_close(
            keep_colours(torch.full((1, 3, 8, 9), value), image), torch.full((1, 3, 8, 9), value)
        )


def test_the_luma_is_what_television_shows():
    red, green, blue = torch.eye(3).view(3, 1, 3, 1, 1)
    assert [luma(x).item() for x in (red, green, blue)] == pytest.approx([0.299, 0.587, 0.114])


def test_a_mask_is_an_images_luma(tmp_path, refuses):
    Image.fromarray(np.array([[0, 255], [128, 0], [0, 64]], np.uint8)).save(tmp_path / "mask.png")
    found = load_mask(tmp_path / "mask.png", 2, "cpu")
    torch.testing.assert_close(found, torch.tensor([[0, 255], [128, 0], [0, 64]]) / 255)
    white = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    white.putpixel((1, 2), (255, 255, 255, 255))
    white.save(tmp_path / "transparent.png")
    found = load_mask(tmp_path / "transparent.png", 4, "cpu")
    assert found.sum() == found[2, 1] == 1
    with refuses("no picture at", MissingFileError):
        load_mask(tmp_path / "other.png")
    with refuses("image is str"):
        keep_colours("photo.jpg", torch.rand(1, 3, 4, 4))
