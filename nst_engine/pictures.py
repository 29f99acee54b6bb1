"""Pictures: float32 tensors of shape (1, 3, H, W), RGB, with values in [0, 1]."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

IMAGES = Path(__file__).resolve().parent.parent / "images"


def pick_device(device=None):
    """Return `device` as a torch.device; by default the best here: CUDA, then Apple's MPS, then CPU.

    Raises ValueError for a device that this machine lacks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, available in present.items() if available]
    if device is None:
        return torch.device(here[0])
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise ValueError(f"unknown device {device!r}: this machine has {', '.join(here)}") from error
    if chosen.type not in here:
        raise ValueError(f"unknown device {device!r}: this machine has {', '.join(here)}")
    return chosen


def load_image(path, size=256, device=None):
    """Read a picture file as float32 (1, 3, H, W), RGB in [0, 1], its shorter side `size` pixels.

    Camera rotation (EXIF) is applied, every colour mode becomes RGB, transparency is laid over white.
    Raises FileNotFoundError if there is no such file, ValueError if it is no picture.
    """
    path, device = Path(path), pick_device(device)
    if not path.is_file():
        raise FileNotFoundError(f"no picture at {str(path)!r}: give the path of an image file")
    if type(size) is not int or size < 1:
        raise ValueError(f"size is {size!r}: it must be a whole number of pixels, 1 or more")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip instead of scale
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            picture = picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not a picture that can be read: use a JPEG or PNG file") from error
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    scale = size / min(picture.size)
    sides = [max(size, round(side * scale)) for side in picture.size]
    pixels = np.array(picture.resize(sides, Image.Resampling.LANCZOS))
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).to(device)


def to_pil(image):
    """Turn a picture (1, 3, H, W) into an 8-bit RGB PIL image; values are clamped to [0, 1] first."""
    pixels = image.detach()[0].float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize(image, shape):
    """Scale a picture to `shape` = (height, width): bicubic, antialiased, values kept in [0, 1]."""
    if tuple(image.shape[-2:]) == tuple(shape):
        return image
    return F.interpolate(image, tuple(shape), mode="bicubic", antialias=True).clamp(0, 1)


def difference_map(a, b):
    """Absolute difference of two pictures per pixel and channel, (1, 3, H, W) in [0, 1]."""
    if a.shape != b.shape:
        raise ValueError(f"pictures of shapes {tuple(a.shape)} and {tuple(b.shape)}: a difference needs equal shapes")
    return (a.clamp(0, 1) - b.clamp(0, 1)).abs()


class Difference(NamedTuple):
    """How far two pictures are apart, in three numbers."""

    share: float  # of the pixels, in [0, 1], that differ by at least 1/255 in some channel
    mean: float  # absolute difference, averaged over pixels and channels, in [0, 1]
    psnr: float  # peak signal-to-noise ratio in dB; infinite for equal pictures


def difference_numbers(a, b):
    """The `Difference` of two pictures (1, 3, H, W) of equal shape."""
    gap = difference_map(a, b).cpu().double()  # in this order: Apple's GPUs have no float64
    # Two 8-bit values one step apart can differ by a hair less than 1/255 once they are float32.
    share = (gap.amax(dim=1) >= 0.9995 / 255).double().mean().item()
    mse = gap.square().mean().item()
    return Difference(share, gap.mean().item(), 10 * math.log10(1 / mse) if mse else math.inf)
