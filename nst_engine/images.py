"""Images: float32 tensors of shape (1, 3, H, W), RGB, with values in [0, 1]. Read, written, resized, compared."""

import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from .checks import as_whole
from .layers import Shape

IMAGES = Path(__file__).resolve().parent.parent / "images"


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device` as a torch.device; by default the best here: CUDA, then Apple's MPS, then CPU.

    "cuda" becomes "cuda:0", so that a device has one name. A GPU that the installed torch cannot run is passed over
    with a warning. Raises ValueError for a device that this machine lacks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, available in present.items() if available]
    if device is None:
        while not can_compute(here[0]):
            warnings.warn(f"the installed torch cannot use {here.pop(0)!r}, which is passed over", stacklevel=2)
        device = here[0]
    elif not can_compute(device):
        raise ValueError(f"unknown device {device!r}: this machine has {', '.join(here)}")
    chosen = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen


def can_compute(device: str | torch.device) -> bool:
    """Whether the installed torch computes on `device`: a GPU may be there and torch have no code for it."""
    try:
        torch.zeros(1, device=torch.device(device)).add(1).item()
    except (RuntimeError, AssertionError, TypeError, ImportError):
        return False
    return True


# What cameras, phones, browsers and paint programs write. Pillow knows more, some by starting other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "JPEG2000")


def load_image(path: str | Path, size: int = 256, device: str | torch.device | None = None) -> Tensor:
    """Read an image file as float32 (1, 3, H, W), RGB in [0, 1], its shorter side `size` pixels.

    Camera rotation (EXIF) is applied, every colour mode becomes RGB, colours with a profile become sRGB, transparency
    is laid over white. Raises FileNotFoundError if there is no such file, ValueError if it is no image or too large.
    """
    path, device, size = Path(path), pick_device(device), as_whole(size, "size", " of pixels")
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {str(path)!r}: give the path of an image file")
    try:
        with Image.open(path, formats=FORMATS) as file:
            picture = to_srgb(to_8_bits(ImageOps.exif_transpose(file)))
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not a picture that can be read: use a JPEG or PNG file") from error
    scale = size / min(picture.size)
    sides = [max(size, round(side * scale)) for side in picture.size]
    if math.prod(sides) > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{str(path)!r} would be {sides[0]} x {sides[1]} pixels at size {size}: that is too large")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    pixels = np.array(picture.resize(sides, Image.Resampling.LANCZOS))
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).to(device)


def to_8_bits(picture: Image.Image) -> Image.Image:
    """An image of 16 bits, or of floating point in [0, 1], scaled to 8 bits; Pillow would clip its values."""
    if picture.mode[0] not in "IF":
        return picture
    values = np.asarray(picture).astype(np.float64)
    if picture.mode != "F":
        values = values // 257
    elif values.max() <= 1:
        values = np.round(values * 255)
    if not (values.min() >= 0 and values.max() <= 255):
        raise ValueError("neither of 8 or 16 bits nor of floating point in [0, 1]")
    return Image.fromarray(values.astype(np.uint8))


def to_srgb(picture: Image.Image) -> Image.Image:
    """Any colour mode -> RGBA in sRGB, by the image's own colour profile if it has one."""
    rgba = picture.convert("RGBA")
    profile = picture.info.get("icc_profile")
    if profile:
        colours = picture if picture.mode in ("L", "CMYK") else picture.convert("RGB")
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            colours = ImageCms.profileToProfile(colours, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (OSError, ImageCms.PyCMSError):
            warnings.warn("the picture's colour profile is damaged or of other colours: it is left aside", stacklevel=4)
        else:
            colours.putalpha(rgba.getchannel("A"))
            rgba = colours
    return rgba


def to_pil(image: Tensor) -> Image.Image:
    """An image (1, 3, H, W) as an 8-bit RGB image of Pillow's; values are clamped to [0, 1] first."""
    pixels = image.detach()[0].float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize(image: Tensor, shape: Shape) -> Tensor:
    """Scale an image to `shape` = (height, width): bicubic, antialiased, values clamped to [0, 1]."""
    if tuple(image.shape[-2:]) == tuple(shape):
        return image
    return F.interpolate(image, tuple(shape), mode="bicubic", antialias=True).clamp(0, 1)


def difference_map(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference of two images per pixel and channel, (1, 3, H, W) in [0, 1]."""
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}: a difference needs equal shapes")
    return (a.clamp(0, 1) - b.clamp(0, 1)).abs()


def share_changed(a: Tensor, b: Tensor) -> float:
    """The share of pixels, in [0, 1], in which two images differ by at least 1/255 in some channel."""
    # Two 8-bit values one step apart can differ by a hair less than 1/255 once they are float32.
    changed = difference_map(a, b).amax(dim=1) >= 0.9995 / 255
    return changed.count_nonzero().item() / changed.numel()


class Difference(NamedTuple):
    """How far apart two images are, in three numbers."""

    share: float  # of pixels that differ: `share_changed`
    mean: float  # absolute difference, averaged over pixels and channels, in [0, 1]
    psnr: float  # peak signal-to-noise ratio in dB; infinite for equal images


def difference_numbers(a: Tensor, b: Tensor) -> Difference:
    """The `Difference` of two images (1, 3, H, W) of equal shape."""
    gap = difference_map(a, b).cpu().double()  # in this order: Apple's GPUs have no float64
    mse = gap.square().mean().item()
    return Difference(share_changed(a, b), gap.mean().item(), 10 * math.log10(1 / mse) if mse else math.inf)
