import math

import numpy as np
import PIL.features
import pytest
import torch
from PIL import Image, ImageCms

from nst_engine.errors import MissingFileError
from nst_engine.images import pick_device
from nst_utils import IMAGES, difference_map, difference_numbers, load_image, resize, to_pil


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
    assert (read[0, 1] * 255).round().int().tolist() == [[0, 1, 128], [255, 254, 0]]


def test_camera_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # stored on its side: turn clockwise to display, so that top left becomes top right
    read = load_image(saved(tmp_path, image, exif=exif), size=2, device="cpu")
    assert read.shape == (1, 3, 4, 2)
    assert pixel(read, 0, 1) == [255, 0, 0] and pixel(read, 0, 0) == [255, 255, 255]


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
        with refuses(str(path), MissingFileError):
            load_image(path)


def test_a_file_that_is_no_image_is_named(tmp_path, refuses):
    text, empty = tmp_path / "text.jpg", tmp_path / "empty.png"
    text.write_text("not a picture")
    empty.touch()
    whole = saved(tmp_path, Image.effect_noise((64, 64), 90), ".jpg").read_bytes()
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(whole[: len(whole) // 2])
    for path in (text, empty, truncated):
        with refuses(str(path)):
            load_image(path)


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


@pytest.mark.parametrize("mode, given", [("CMYK", "CMYK"), ("L", "L"), ("LA", "RGB"), ("P", "RGB")])
def test_a_profile_is_given_the_colours_that_it_is_of(mode, given, tmp_path, monkeypatch):
    """Ink and grey as they are; where they go from there is the library's business."""
    modes = []
    monkeypatch.setattr(
        ImageCms, "profileToProfile", lambda image, *_, **__: modes.append(image.mode) or image.convert("RGB")
    )
    load_image(saved(tmp_path, Image.new(mode, (6, 4)), ".tif", icc_profile=profile_with_red_and_green_exchanged()))
    assert modes == [given]


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


@pytest.mark.parametrize("size", [0, -3, 2.5, "256", None, True])
def test_a_bad_size_is_named(size, refuses):
    with refuses(f"size is {size!r}"):
        load_image(IMAGES / "content" / "chenonceau.jpg", size)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta", "", 3.5])
def test_an_unknown_device_is_named(device, refuses):
    with refuses(f"unknown device {device!r}"):
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
    with pytest.warns(UserWarning, match="^the installed torch cannot use 'cuda', which is passed over$"):
        assert pick_device() == torch.device("cpu")
    with refuses("unknown device 'cuda'"):
        pick_device("cuda")


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


def test_less_than_one_8_bit_step_does_not_count():
    a = torch.full((1, 3, 4, 5), 0.5)
    assert difference_numbers(a, a + 0.9 / 255).share == 0


def test_different_shapes_have_no_difference(refuses, picture):
    for difference in (difference_map, difference_numbers):
        with refuses("(1, 3, 4, 5) and (1, 3, 5, 4)"):
            difference(picture(4, 5), picture(5, 4))
