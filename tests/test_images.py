"""What an image file becomes, what is refused and why, and how images are scaled and compared."""

import contextlib
import io
import math
import struct
import warnings
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.features
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile, putchunk
from watching import OnGPU

from nst_utils import (
    IMAGES,
    Recorder,
    difference_map,
    difference_numbers,
    features,
    image_grid,
    keep_colours,
    load_image,
    load_mask,
    resize,
    to_pil,
)
from style_transfer.engine.checks import MissingFileError
from style_transfer.engine.images import is_picture, luma, pick_device

PHOTOGRAPH = IMAGES / "content" / "chenonceau.jpg"


@pytest.fixture
def saved(tmp_path):
    """saved(image or bytes, name, **options): the path of an image file."""

    def save(image, name="image.png", **options):
        if isinstance(image, bytes):
            (tmp_path / name).write_bytes(image)
        else:
            image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def pixels(image):
    """(H, W, 3) in 8-bit steps, not rounded."""
    return image[0].permute(1, 2, 0).numpy() * 255


# --- Colours -------------------------------------------------------------------------------------


def pair(mode, first, second, **info):
    """An image of two pixels."""
    image = Image.new(mode, (2, 1), first)
    image.putpixel((1, 0), second)
    image.info = info
    return image


def palette(first, second, **info):
    image = pair("P", 0, 1, **info)
    image.putpalette([*first, *second])
    return image


def deep(*values):
    return Image.fromarray(np.array([values], np.uint16))


def png(bits, row, transparent):
    """A row of grey values or colours, one of them transparent: files that Pillow does not write."""
    row = np.array(row)
    digits = "".join(f"{value:0{bits}b}" for value in row.flat)
    file = io.BytesIO()
    file.write(b"\x89PNG\r\n\x1a\n")
    putchunk(file, b"IHDR", struct.pack(">2I5B", len(row), 1, bits, 2 * (row.ndim - 1), 0, 0, 0))
    putchunk(file, b"tRNS", np.asarray(transparent, ">u2").tobytes())
    putchunk(file, b"IDAT", zlib.compress(int(digits, 2).to_bytes(1 + len(digits) // 8, "big")))
    putchunk(file, b"IEND")
    return file.getvalue()


WHITE, GREEN, NAVY = (255, 255, 255), (10, 200, 30), (0, 0, 128)
FILES = {  # {file: (image, the colours or greys that are read)}
    "colours.png": (pair("RGB", GREEN, NAVY), (GREEN, NAVY)),
    "grey.png": (pair("L", 77, 0), (77, 0)),
    "transparent_grey.png": (pair("LA", (77, 255), (77, 0)), (77, 255)),
    "transparent.png": (pair("RGBA", (*GREEN, 0), (0, 100, 255, 51)), (WHITE, (204, 224, 255))),
    "palette.gif": (palette(GREEN, NAVY), (GREEN, NAVY)),
    "transparent_palette.png": (palette(GREEN, NAVY, transparency=1), (GREEN, WHITE)),
    "transparent_colour.png": (pair("RGB", GREEN, NAVY, transparency=GREEN), (WHITE, NAVY)),
    "black_and_white.png": (pair("1", 1, 0), (255, 0)),
    "inks.tif": (pair("CMYK", (0, 255, 255, 0), (255, 0, 0, 0)), ((255, 0, 0), (0, 255, 255))),
    "16_bits.png": (deep(255, 65278), (1, 254)),
    "16_bits_of_a_scanner.tif": (deep(25700, 65535), (100, 255)),
    "transparent_bit.png": (png(1, [0, 1] * 4, 1), (0, 255) * 4),
    "transparent_2_bits.png": (png(2, [0, 1, 2, 3], 1), (0, 255, 170, 255)),
    "transparent_4_bits.png": (png(4, [0, 5, 10, 14], 10), (0, 85, 255, 238)),
    "transparent_16_bits.png": (png(16, [20560, 20561, 0], 20560), (255, 80, 0)),
    "transparent_16_bit_colour.png": (
        png(16, [(1000, 20000, 300), (60000, 0, 100)], (1000, 20000, 300)),
        (WHITE, (234, 0, 0)),
    ),
    "dark.png": (png(16, [(100, 50, 20), (25700, 12850, 5140)], (100, 50, 20)), (WHITE, (100, 50, 20))),
}


@pytest.mark.parametrize("name", FILES)
def test_every_colour_mode_becomes_rgb_on_white(name, saved):
    image, expected = FILES[name]
    read = load_image(saved(image, name), 1, "cpu")
    assert read.dtype == torch.float32 and read.shape == (1, 3, 1, len(expected))
    assert np.abs(pixels(read)[0] - np.reshape(expected, (len(expected), -1))).max() < 0.6


def test_a_background_is_a_colour(saved, refuses):
    path = saved(pair("LA", (77, 255), (77, 51)))
    assert pixels(load_image(path, 1, "cpu", "#33669980"))[0, 1] == pytest.approx((56, 97, 138))
    for background in ("whit", "", None, (1, 2, 3)):
        with refuses(f"background is {background!r}: give a colour, such as 'white'"):
            load_image(path, 1, "cpu", background)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused_not_clipped(dtype, saved, refuses):
    path = saved(Image.fromarray(np.full((4, 6), 100, dtype)), "a.tif")
    with refuses(f"{str(path)!r} has 32 bits per pixel: save it with 8 or 16"):
        load_image(path)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def named(space):
    """sRGB's profile, which names another colour space."""
    return SRGB[:16] + space + SRGB[20:]


def linear_grey():
    """A profile of grey values that are proportional to the light."""
    profile = bytearray(named(b"GRAY").replace(b"rTRC", b"kTRC"))
    curve = profile.index(b"para")
    profile[curve + 8 : curve + 16] = struct.pack(">H2xI", 0, 65536)
    return bytes(profile)


EXCHANGED = SRGB.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")  # red and green
RED = (200, 30, 40)
PROFILES = [  # (image, its profile, its first colour then, and about how exactly)
    (pair("RGBA", (*RED, 255), (*RED, 0)), EXCHANGED, [30, 200, 40], 12),
    (palette(RED, NAVY), EXCHANGED, [30, 200, 40], 12),
    (deep(55 * 257, 0), linear_grey(), [128] * 3, 2),
    (pair("LA", (55, 255), (55, 0)), linear_grey(), [128] * 3, 2),
    (pair("RGB", (55, 55, 55), (0, 0, 0)), linear_grey(), [128] * 3, 2),
]


@pytest.mark.parametrize("image, profile, expected, tolerance", PROFILES)
def test_a_profile_leads_to_srgb_and_keeps_transparency(image, profile, expected, tolerance, saved, recwarn):
    read = pixels(load_image(saved(image, icc_profile=profile), 1, "cpu"))
    assert read[0, 0] == pytest.approx(expected, abs=tolerance) and not recwarn.list
    assert "A" not in image.mode or read[0, 1] == pytest.approx(WHITE)


IGNORED = "ignored the image's colour profile"
PIXEL = {"L": 7, "P": 7, "RGB": (9, 9, 10), "CMYK": (1, 2, 3, 4)}


@pytest.mark.parametrize(
    "mode, space, converted",
    [
        ("L", b"RGB ", "RGB"),
        ("CMYK", b"CMYK", "CMYK"),
        ("RGB", b"GRAY", None),
        ("CMYK", b"RGB ", None),
        ("RGB", b"CMYK", None),
        ("RGB", b"XYZ ", None),
    ],
)
def test_a_profile_gets_its_own_colours_or_is_ignored_with_a_warning(mode, space, converted, saved, monkeypatch):
    """With a stand-in for the conversion; None: the colours would have to be guessed."""
    convert = mock.Mock(side_effect=lambda image, *_, **__: image.convert("RGB"))
    monkeypatch.setattr(ImageCms, "profileToProfile", convert)
    path = saved(Image.new(mode, (6, 4), PIXEL[mode]), "a.tif", icc_profile=named(space))
    with contextlib.nullcontext() if converted else pytest.warns(UserWarning, match=IGNORED) as caught:
        load_image(path)
    assert [call.args[0].mode for call in convert.mock_calls] == [converted] * bool(converted)
    assert converted or caught[0].filename == __file__


def test_a_damaged_profile_and_a_missing_library_leave_the_colours(saved, monkeypatch):
    for profile in (b"no profile", SRGB):
        path = saved(pair("RGB", RED, RED), icc_profile=profile)
        with pytest.warns(UserWarning, match=IGNORED):
            assert pixels(load_image(path, 1, "cpu"))[0, 0] == pytest.approx(RED)
        monkeypatch.setattr(ImageCms, "ImageCmsProfile", mock.Mock(side_effect=ImportError))  # so Pillow says it


# --- Rotation ------------------------------------------------------------------------------------

QUARTERS = np.array([[0, 85], [170, 255]], np.uint8)
CORNERS = {1: "0123", 2: "1032", 3: "3210", 4: "2301", 5: "0213", 6: "2031", 7: "3120", 8: "1302"}  # row by row
STORED = [
    *((f"a.{form}", "RGB") for form in ("jpg", "png", "webp")),
    *(("a.tif", mode) for mode in ("RGB", "L", "I;16", "1")),
]


@pytest.mark.parametrize("name, mode", STORED)
@pytest.mark.parametrize("orientation", [*CORNERS, 0, 9])
def test_camera_rotation_is_applied(orientation, name, mode, saved):
    """All eight; an unknown one turns nothing."""
    values = QUARTERS.repeat(8, axis=0).repeat(16, axis=1)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert(mode, dither=Image.Dither.NONE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = pixels(load_image(saved(image, name, exif=exif), 16, "cpu"))
    assert read.shape == ((32, 16, 3) if orientation in (5, 6, 7, 8) else (16, 32, 3))
    height, width = read.shape[:2]
    found = read[height // 4 :: height // 2, width // 4 :: width // 2, 0].flatten()
    expected = QUARTERS.flatten()[[*map(int, CORNERS.get(orientation, "0123"))]]
    np.testing.assert_allclose(found, (expected > 127) * 255 if mode == "1" else expected, atol=10)


def entry(tag, kind, count, value):
    return struct.pack("<2HI", tag, kind, count) + value.ljust(4, b"\0")


TURN = entry(0x112, 3, 1, struct.pack("<H", 6))
ODD_EXIF = {  # {what: (the entries, what follows them, whether the rotation can be read)}
    "a resolution of -1/0": (TURN + entry(0x11A, 10, 1, struct.pack("<I", 38)), struct.pack("<4x2i", -1, 0), True),
    "a table that is cut off": (TURN + b"\x1a\x01\x05", b"", True),
    "a value beyond the end": (TURN + entry(0x11A, 5, 7, struct.pack("<I", 60000)), b"", True),
    "a subtable that is none": (TURN + entry(0x8769, 4, 1, struct.pack("<I", 3)), b"", True),
    "a rotation in words": (entry(0x112, 2, 2, b"6\0") + bytes(12), bytes(4), False),
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("odd", [*ODD_EXIF, "no EXIF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_leaves_a_sound_image_and_its_rotation(odd, name, saved):
    exif, turned = b"Exif\0\0no EXIF", False
    if odd in ODD_EXIF:
        entries, values, turned = ODD_EXIF[odd]
        exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + values
    path = saved(Image.new("RGB", (40, 30)), name, exif=exif)
    assert load_image(path, 16, "cpu").shape == (1, 3, *((21, 16) if turned else (16, 21)))


# --- Sizes and pixels ----------------------------------------------------------------------------


SIZES = [(40, 20, np.int64(10), (10, 20)), (20, 41, torch.tensor(10), (20, 10)), (3, 5, 31, (52, 31))]


@pytest.mark.parametrize("width, height, size, shape", SIZES)
def test_the_shorter_side_gets_the_size_and_the_aspect_stays(width, height, size, shape, saved):
    read = load_image(saved(Image.effect_noise((width, height), 90)), size, "cpu")
    assert read.shape == (1, 3, *shape)
    assert read.min() >= 0 and read.max() <= 1  # Lanczos overshoots


@pytest.mark.parametrize("size", [0, 2.5, "256", None, True, 10**400, torch.zeros(50, 50)])
def test_a_bad_size_is_named(size, refuses):
    with refuses(f"size is {repr(size)[:10]}"):
        load_image(PHOTOGRAPH, size)


def test_an_image_that_would_become_too_long_is_refused(saved, refuses):
    path = saved(Image.new("RGB", (10000, 1)))
    assert load_image(path, 4, "cpu").shape == (1, 3, 4, 40000)
    with refuses("would be 2560000 x 256 pixels at size 256: that is too large"):
        load_image(path)


def test_a_mask_is_an_images_luma_on_black(saved):
    path = saved(pair("LA", (64, 255), (255, 0)))
    torch.testing.assert_close(load_mask(path, 1, "cpu"), torch.tensor([[64 / 255, 0]]))
    assert load_mask(path, 2, "cpu").shape == (2, 4) and min(load_mask(path).shape) == 256


# --- Files that are refused ----------------------------------------------------------------------


def test_a_missing_image_is_named(tmp_path, refuses):
    for load in (load_image, load_mask):
        with refuses("no picture at 'absent.jpg'", MissingFileError):
            load("absent.jpg")


@pytest.mark.parametrize("address", ["https://example.org/a.jpg", "s3://b/a.jpg", "file:/a.jpg"])
def test_an_address_is_named_as_it_was_given(address, refuses):
    for path in (address, Path(address)):  # which has lost one slash
        with refuses(f"no picture at {address!r}, which is an address"):
            load_image(path)


def head(*brands):
    """The beginning of a HEIC or AVIF file."""
    return b"\0\0\0\x18ftyp" + brands[0] + bytes(4) + b"".join(brands[1:]) + b"\n" * 99


NO_AVIF = "is not a picture in a supported format"
WRONG = {
    "text": (b"not a picture", "is not a picture in a supported format: use a JPEG or PNG file"),
    "nothing": (b"", "is not a picture in a supported format"),
    "HEIC": (head(b"heic", b"mif1", b"heic"), "is a HEIC photograph: convert it to JPEG"),
    "HEIC of other cameras": (head(b"mif1", b"miaf", b"heic"), "is a HEIC photograph"),
    "HEIC of a sequence": (head(b"msf1"), "is a HEIC photograph"),
    "AVIF": (head(b"mif1", b"mif1", b"avif"), "is cut off, damaged" if PIL.features.check("avif") else NO_AVIF),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_it_is_said_why_a_file_is_no_image(wrong, saved, refuses):
    content, why = WRONG[wrong]
    path = saved(content, "a.jpg")
    with refuses(f"{str(path)!r} {why}"):
        load_image(path)
    assert not is_picture(path)


@pytest.mark.parametrize("form", ["tga", "ppm", "jp2", "eps"])
def test_other_formats_are_refused(form, saved, monkeypatch, refuses):
    """Among them one for which Pillow starts another program."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", mock.Mock(side_effect=AssertionError("started")))
    path = saved(Image.new("RGB", (6, 4)), f"image.{form}")
    with refuses(f"{str(path)!r} is not a picture in a supported format"):
        load_image(path)


def test_a_file_without_permission_is_named(as_nobody, refuses):
    with as_nobody() as folder:
        path = folder / "image.png"
        path.touch(0)
        with refuses(f"{str(path)!r} cannot be read: Permission denied"):
            load_image(path)


@pytest.mark.parametrize(
    "limit, category, refused",
    [(None, "error", False), (40, "ignore", False), (40, "error", True), (20, "ignore", True)],
)
@pytest.mark.filterwarnings("ignore")
def test_pillows_limit_of_pixels_is_the_users(limit, category, refused, saved, monkeypatch, refuses):
    """Of 63 pixels: beyond the limit is a warning, twice beyond it an error."""
    path = saved(Image.new("RGB", (9, 7)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(category, Image.DecompressionBombWarning)
        with refuses(f"{str(path)!r} has too many pixels: scale it") if refused else contextlib.nullcontext():
            assert load_image(path, 14, "cpu").shape == (1, 3, 14, 18)
    assert is_picture(path)


NO_MEMORY = "has too many pixels for the free memory"
DAMAGED = "is cut off, damaged or of an unsupported kind"
RAISED = [
    (struct.error("two\nlines"), f"{DAMAGED} (two lines)"),
    (AssertionError(), f"{DAMAGED} (AssertionError)"),
    (UserWarning("odd"), "causes a warning, and warnings are errors here: odd"),
    (MemoryError(), NO_MEMORY),
    (RuntimeError("[enforce fail] can't allocate memory: you tried to allocate 9 bytes"), NO_MEMORY),
]


@pytest.mark.parametrize("error, why", RAISED)
def test_a_decoder_may_raise_anything(error, why, saved, monkeypatch, refuses):
    path = saved(Image.new("RGB", (9, 7)))
    monkeypatch.setattr(PngImageFile, "load", mock.Mock(side_effect=error))
    with refuses(f"{str(path)!r} {why}"):
        load_image(path)


def test_hidden_files_and_folders_are_no_pictures(saved, tmp_path):
    path = saved(Image.new("RGB", (6, 4)))
    assert is_picture(path) and not is_picture(tmp_path) and not is_picture(tmp_path / "absent.png")
    assert is_picture(path.rename(tmp_path / "without a suffix"))
    assert not is_picture((tmp_path / "without a suffix").rename(tmp_path / ".hidden.png"))


# --- Devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "", 3.5])
def test_an_unknown_device_is_named(device, refuses):
    with refuses(f"device {device!r} is unknown: this machine has "):
        pick_device(device)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(error): a stand-in for a CUDA device that raises an error."""

    def install(error):
        def zeros(n, device):
            if device.type == "cuda":
                raise error
            return torch.ones(n)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch, "zeros", zeros)

    return install


@pytest.mark.parametrize(
    "error, problem",
    [
        (RuntimeError("CUDA error: no kernel image is available"), "is too old for the installed torch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."), "has no free memory"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_skipped(error, problem, gpu, refuses):
    gpu(error)
    with pytest.warns(UserWarning, match=f"^'cuda' {problem} .*: skipped$"):
        assert pick_device() == torch.device("cpu")
    with refuses(f"device 'cuda' {problem}"):
        pick_device("cuda")


# --- Resizing and comparing ----------------------------------------------------------------------


def test_to_pil_rounds_and_clamps_and_leaves_the_image_alone():
    image = torch.tensor([[-0.5, 0.4999 / 255, 1.7], [0.5001 / 255, 1.0, 0.5]]).T.reshape(1, 3, 1, 2).requires_grad_()
    before = image.detach().clone()
    assert np.asarray(to_pil(image)).tolist() == [[[0, 0, 255], [1, 255, 128]]]
    assert to_pil(image).mode == "RGB" and torch.equal(image, before)


def test_resize_averages_and_does_nothing_at_the_same_shape():
    stripes = (torch.arange(24) % 2).float().expand(1, 3, 20, 24)
    assert resize(stripes, (20, 24)) is stripes
    assert (resize(stripes, (20, 8)) - 0.5).abs().mean() < 0.05
    enlarged = resize(stripes, (33, 50))  # bicubic overshoots at edges
    assert enlarged.shape == (1, 3, 33, 50) and enlarged.min() >= 0 and enlarged.max() <= 1


@pytest.mark.parametrize("shape, why", [((0, 3), "it must be (height, width)"), ((10**6, 10**3), "that is too large")])
def test_what_is_no_shape_and_too_many_pixels_are_refused(shape, why, picture, refuses):
    with refuses(f"shape is {shape}: {why}"):
        resize(picture(4, 5), shape)


def test_a_difference_is_of_what_is_displayed_and_has_no_sign():
    a, b = torch.full((1, 3, 2, 2), 1.5), torch.full((1, 3, 2, 2), -0.5)
    for first, second in ((a, b), (b, a)):
        assert torch.equal(difference_map(first, second), torch.ones(1, 3, 2, 2))
        assert difference_numbers(first, second) == (1, 1, 0)
    assert difference_numbers(a, a) == (0, 0, math.inf)


def test_one_8_bit_step_in_one_channel_counts_as_a_pixel():
    for value in range(255):  # in float32 some of these steps are slightly less than 1/255
        a = torch.full((1, 3, 4, 5), value) / 255
        b = a.clone()
        b[0, 1, 2, 3] = torch.tensor(value + 1) / 255
        assert difference_numbers(b, a).share == 1 / 20, value
    assert difference_numbers(a, a - 0.9 / 255).share == 0


NO_IMAGES = {
    "of numpy": (np.zeros((1, 3, 4, 5), np.float32), "is ndarray: an image is a float tensor (1, 3, H, W)"),
    "no first dimension": (torch.zeros(3, 4, 5), "is (3, 4, 5) torch.float32"),
    "two images": (torch.zeros(2, 3, 4, 5), "is (2, 3, 4, 5)"),
    "four channels": (torch.zeros(1, 4, 5, 6), "is (1, 4, 5, 6)"),
    "no pixels": (torch.zeros(1, 3, 0, 6), "is (1, 3, 0, 6)"),
    "bytes": (torch.zeros(1, 3, 4, 5, dtype=torch.uint8), "is (1, 3, 4, 5) torch.uint8"),
    "sparse": (torch.zeros(1, 3, 4, 5).to_sparse(), "is Tensor: an image"),
    "without memory": (torch.zeros(1, 3, 4, 5, device="meta"), "is "),
    "to 255": (torch.full((1, 3, 4, 5), 255.0), "has values outside [-1, 2] or not finite, 255 to 255"),
    "below": (torch.full((1, 3, 4, 5), -1.1), "has values outside [-1, 2]"),
    "not a number": (torch.full((1, 3, 4, 5), math.nan), "has values outside [-1, 2]"),
}


@pytest.mark.parametrize("case", NO_IMAGES)
def test_what_is_no_image_is_refused_at_every_door(case, vgg, picture, refuses):
    value, why = NO_IMAGES[case]
    good = picture(4, 5)
    doors = {
        "image": [to_pil, lambda x: resize(x, (4, 5)), lambda x: features(vgg, x, "conv1_1")],
        "the first image": [lambda x: difference_map(x, good), lambda x: difference_numbers(x, good)],
        "the second image": [lambda x: difference_map(good, x), lambda x: difference_numbers(good, x)],
        "images[1]": [lambda x: image_grid([good, x, None])],
        "content": [lambda x: keep_colours(good, x)],
    }
    doors["image"] += [lambda x: keep_colours(x, good), lambda x: Recorder()(x, 1.0)]
    for name, uses in doors.items():
        for use in uses:
            with refuses(f"{name} {why}"):
                use(value)


def test_half_precision_values_a_little_outside_and_a_graph_pass(picture):
    for dtype in (torch.float16, torch.bfloat16):
        image = picture(4, 5).to(dtype)
        assert resize(image, (8, 9)).shape == (1, 3, 8, 9) and to_pil(image).size == (5, 4)
        assert difference_map(image, image).max() == 0
    half = torch.full((1, 3, 4, 5), 0.01, dtype=torch.float16)
    assert difference_numbers(half, half + 2**-17).psnr == pytest.approx(20 * math.log10(2**17))
    image = (3 * picture(4, 5) - 1).requires_grad_()
    assert difference_map(image, image + 0.0).max() == 0
    assert image_grid([image, image[0, 0]]) and resize(image, (5, 7)).requires_grad


def test_a_difference_needs_equal_shapes_on_one_device(refuses, picture):
    with refuses("(1, 3, 4, 5) and (1, 3, 5, 4)"):
        difference_map(picture(4, 5), picture(5, 4))
    with refuses("images on cuda:0 and cpu: a difference needs both on one device"):
        difference_map(picture(4, 5).as_subclass(OnGPU), picture(4, 5))


# --- Colours of the content ----------------------------------------------------------------------


def test_luma_has_the_weights_of_television():
    assert luma(torch.eye(3).view(1, 3, 1, 3)).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])


def test_colours_are_kept_with_the_images_luma_and_the_contents_hue(picture):
    image, wide = picture(20, 30), picture(20, 30, 1) - 0.02
    found, content = keep_colours(image, wide), wide.clamp(0, 1)
    torch.testing.assert_close(luma(found), luma(image))
    chroma, wanted = found - luma(found), content - luma(content)
    share = (chroma * wanted).sum(1, keepdim=True) / (wanted * wanted).sum(1, keepdim=True)
    torch.testing.assert_close(chroma, share * wanted, atol=1e-5, rtol=0)
    room = torch.minimum(found, 1 - found).amin(1, keepdim=True)  # to the edge of the range
    assert room.min() >= 0 and share.max() < 1 + 1e-5
    scaled = share < 1 - 1e-5
    assert 0.05 < scaled.float().mean() < 0.95 and room[scaled].max() < 1e-5


def test_black_white_grey_and_the_image_itself_keep_what_they_have(picture):
    image, black = picture(8, 9), torch.zeros(1, 3, 8, 9)
    grey = luma(image).expand(1, 3, 8, 9)
    for content, expected in ((image, image), (torch.full((1, 3, 16, 18), 0.3), grey)):
        torch.testing.assert_close(keep_colours(image, content), expected)
    for plain in (black, 1 - black):
        torch.testing.assert_close(keep_colours(plain, image), plain)
