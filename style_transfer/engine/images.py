"""Images, float32 tensors (1, 3, H, W) of RGB in [0, 1]: read, converted, resized, compared."""

import contextlib
import io
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .checks import Shape, UserError, as_file, as_shape, as_whole, check_shown, reason, shown

_PACKAGE = Path(__file__).resolve().parents[1]
IMAGES = _PACKAGE / "pictures"  # in an installed package
if not IMAGES.is_dir():
    IMAGES = _PACKAGE.parent / "images"  # in a clone


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """Return `device` as a torch.device; by default the best one here: CUDA, then Apple's MPS, then the CPU.

    "cuda" becomes "cuda:0", so that each device has one name. The default skips, with a warning, a GPU that is too old
    for the installed torch or has no free memory. Raises UserError if torch cannot compute on `device`.
    """
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if device is None:
        while problem := problem_of(here[0]):
            warnings.warn(f"{here.pop(0)!r} {problem}: skipped", stacklevel=2)
        device = here[0]
    elif problem := problem_of(device):
        raise UserError(f"device {device!r} {problem}: this machine has {', '.join(here)}")
    return torch.empty(0, device=device).device


def problem_of(device: str | torch.device) -> str | None:
    """None if torch can compute on `device`; otherwise the reason it cannot, as the end of a sentence."""
    try:
        torch.zeros(1, device=torch.device(device)).add(1).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        if "out of memory" in str(error):
            return "has no free memory (stop other programs that use it)"
        if "no kernel image" in str(error):
            return "is too old for the installed torch (if you can choose, take a T4, not a P100)"
        return "is unknown"
    return None


# --- Reading -------------------------------------------------------------------------------------

# What cameras, phones, scanners and browsers write. Pillow reads more, some formats by starting other programs.
READ_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "HEIF")
MAX_PIXELS = 180_000_000  # of an image after scaling
HEIC_HEAD = re.compile(rb"....ftyp(hei[cfmsx]|hev[cmx]|mif1|msf1)", re.DOTALL)
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # {colour space of a profile: Pillow's mode}


def load_image(
    path: str | Path, size: int = 256, device: str | torch.device | None = None, background: str = "white"
) -> Tensor:
    """Read an image file as float32 (1, 3, H, W), RGB in [0, 1], scaled to `size` pixels along the shorter side.

    Applies the EXIF rotation, converts every colour mode to RGB and colour profiles to sRGB, and puts transparent
    images on the colour `background`: an HTML name, or "#rrggbb" and the like, without regard to its alpha. Raises
    MissingFileError if there is no such file, UserError if it cannot be read as an image, if the result would have more
    than 180 million pixels, and for bad arguments.
    """
    path = as_file(path, "picture")
    device = pick_device(device)
    size = as_whole(size, "size", " of pixels")
    try:
        background = ImageColor.getcolor(background, "RGB")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"background is {shown(background)}: give a colour, such as 'white' or '#336699'") from error
    try:
        picture = to_srgb(decode(path))
        scale = size / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        if width * height > MAX_PIXELS:
            raise UserError(f"would be {width} x {height} pixels at size {size}: that is too large")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
        image = pil_to_tensor(picture.resize((width, height), Image.Resampling.LANCZOS))[None]
        return (image.float() / 255).to(device)
    except Exception as error:  # a decoder may raise anything
        raise UserError(f"{str(path)!r} {explain(path, error)}") from error


def load_mask(path: str | Path, size: int = 256, device: str | torch.device | None = None) -> Tensor:
    """Read an image file as a mask (H, W) in [0, 1]: 1 where it is white, 0 where it is black or transparent.

    Otherwise like `load_image`.
    """
    return luma(load_image(path, size, device, "black"))[0, 0]


def readable_formats() -> list[str]:
    """The `READ_FORMATS` that the installed Pillow can read."""
    with contextlib.suppress(ImportError):  # an optional package, for iPhone photographs
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [name for name in READ_FORMATS if name in Image.OPEN]


def decode(path: Path) -> Image.Image:
    """The image in a file, in 8 bits and upright, in the file's own colours."""
    # Given a path, Pillow memory-maps some files and then rotates them wrongly, so pass it a stream.
    with open(path, "rb") as stream, Image.open(stream, formats=readable_formats()) as file:
        bits = re.search(r";(\d+)", str(file.tile))  # per channel; absent if 8
        file.load()
        with contextlib.suppress(Exception):  # ignore damaged EXIF: only its rotation is used
            ImageOps.exif_transpose(file, in_place=True)
        return to_8_bits(file, int(bits[1]) if bits else 8).copy()


def explain(path: Path, error: Exception) -> str:
    """Why a file could not be read, as the rest of a sentence that begins with its path."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "has too many pixels: scale it down, or raise Pillow's limit, Image.MAX_IMAGE_PIXELS"
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        return "has too many pixels for the free memory: scale it down"
    if isinstance(error, Warning):
        return f"causes a warning, and warnings are errors here: {text}"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {reason(error)}"
    with open(path, "rb") as file:
        head = file.read(64)
    if HEIC_HEAD.match(head) and b"avif" not in head:
        return "is a HEIC photograph: convert it to JPEG, or run 'pip install pillow-heif'"
    if not any(accepts and accepts(head) is True for _, accepts in map(Image.OPEN.get, readable_formats())):
        return "is not a picture in a supported format: use a JPEG or PNG file"
    if "truncated" in text.lower():
        return "is cut off: copy or download it again"
    cause = "" if isinstance(error, UnidentifiedImageError) else f" ({text[:80] or type(error).__name__})"
    return f"is cut off, damaged or of an unsupported kind{cause}: copy it again, or save it as PNG"


def is_picture(path: Path) -> bool:
    """Whether a file is not hidden and starts like an image that `load_image` can read."""
    try:
        with Image.open(path, formats=readable_formats()):
            return not path.name.startswith(".")
    except Exception as error:
        return isinstance(error, Image.DecompressionBombError)  # an image, but too large


def to_8_bits(picture: Image.Image, bits: int) -> Image.Image:
    """Convert 16-bit grey values, which Pillow would clip, and a transparent colour of `bits` bits to 8 bits.

    Pillow has already converted all other pixels. The colour profile is kept. Raises UserError for 32 bits.
    """
    transparent = picture.info.get("transparency")
    if picture.mode in ("I", "F"):
        raise UserError("has 32 bits per pixel: save it with 8 or 16")
    if not picture.mode.startswith("I;16"):
        if bits == 16 and isinstance(transparent, tuple):
            picture.info["transparency"] = tuple(value // 256 for value in transparent)
        if picture.mode == "L" and transparent is not None:
            picture.info["transparency"] = transparent * 255 // (2**bits - 1)
        return picture
    values = np.asarray(picture)
    grey = Image.fromarray(np.round(values * (255 / 65535)).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(values != transparent).convert("L"))
    grey.info = picture.info
    return grey


def to_srgb(picture: Image.Image) -> Image.Image:
    """Convert any colour mode to RGBA in sRGB, using the image's colour profile if it has one."""
    rgba = picture.convert("RGBA")
    embedded = picture.info.get("icc_profile")
    if not embedded:
        return rgba
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        mode = PROFILE_MODES[profile.profile.xcolor_space.strip()]
        red, green, blue, alpha = rgba.split()
        grey = red.tobytes() == green.tobytes() == blue.tobytes()
        if (mode == "CMYK") != (picture.mode == "CMYK") or (mode == "L" and not grey):
            raise ValueError("the profile is for another colour space")
        srgb = ImageCms.createProfile("sRGB")
        colours = ImageCms.profileToProfile(picture.convert(mode), profile, srgb, outputMode="RGB")
    except (OSError, ValueError, TypeError, KeyError, ImportError, ImageCms.PyCMSError):
        warnings.warn("ignored the image's colour profile: it is damaged or for another colour space", stacklevel=3)
        return rgba
    colours.putalpha(alpha)
    return colours


# --- Converting, resizing, comparing -------------------------------------------------------------


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image (1, 3, H, W) to 8-bit RGB, rounded, as a PIL.Image.

    Values from -1 to 2 are clamped to [0, 1]. Raises UserError for other values and for anything but an image.
    """
    check_shown(image, "image")
    pixels = image.detach()[0].float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize(image: Tensor, shape: Shape) -> Tensor:
    """Scale an image to `shape` = (height, width): bicubic, antialiased, clamped to [0, 1].

    An image that already has that shape is returned unchanged, without clamping. Raises UserError if `image` is not an
    image (values from -1 to 2 pass), if `shape` is not a shape, and for more than 180 million pixels.
    """
    check_shown(image, "image")
    shape = as_shape(shape)
    if math.prod(shape) > MAX_PIXELS:
        raise UserError(f"shape is {shape}: that is too large")
    if tuple(image.shape[-2:]) == shape:
        return image
    if image.dtype in (torch.float16, torch.bfloat16):  # torch cannot resize these on a CPU
        image = image.float()
    return F.interpolate(image, shape, mode="bicubic", antialias=True).clamp(0, 1)


def luma(image: Tensor) -> Tensor:
    """The luma (1, 1, H, W) of an image (1, 3, H, W), with the weights of ITU-R BT.601."""
    weights = image.new_tensor([0.299, 0.587, 0.114])
    return (image * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def keep_colours(image: Tensor, content: Tensor) -> Tensor:
    """Combine the luma of `image` with the chroma of `content`: (1, 3, H, W) in [0, 1], of the shape of `image`.

    `content` is resized to `image`. Where the result would leave [0, 1], the chroma is scaled down, since clipping
    would change the hue. After Gatys et al. 2016, Preserving Color in Neural Artistic Style Transfer. Raises UserError
    if either is not an image (values from -1 to 2 pass).
    """
    check_shown(image, "image")
    check_shown(content, "content")
    content = resize(content, image.shape[-2:]).clamp(0, 1).to(image.device)
    grey = luma(image.clamp(0, 1))
    chroma = content - luma(content)
    headroom = torch.where(chroma > 0, 1 - grey, grey)
    factor = (headroom / chroma.abs().clamp(min=1e-6)).amin(1, keepdim=True).clamp(max=1)
    return (grey + chroma * factor).clamp(0, 1)


def difference_map(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference between two images per pixel and channel, (1, 3, H, W) in [0, 1].

    Values from -1 to 2 are clamped to [0, 1] first. Raises UserError for other values and unequal shapes or devices.
    """
    check_shown(a, "the first image")
    check_shown(b, "the second image")
    if a.shape != b.shape:
        raise UserError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}: a difference needs equal shapes")
    if a.device != b.device:
        raise UserError(f"images on {a.device} and {b.device}: a difference needs both on one device")
    return (a.clamp(0, 1) - b.clamp(0, 1)).abs()


class Difference(NamedTuple):
    """How much two images differ, in three numbers."""

    share: float  # of pixels that differ by at least 1/255 in some channel, in [0, 1]
    mean: float  # absolute difference, in [0, 1], averaged over pixels and channels
    psnr: float  # peak signal-to-noise ratio in dB; infinite for equal images


def difference_numbers(a: Tensor, b: Tensor) -> Difference:
    """The `Difference` of two images (1, 3, H, W). Raises UserError as `difference_map` does."""
    gap = difference_map(a, b)
    # In float32, 8-bit values one step apart may differ by slightly less than 1/255.
    changed = gap.amax(dim=1) >= 0.9995 / 255
    share = changed.count_nonzero().item() / changed.numel()
    mse = gap.cpu().double().square().mean().item()  # on the CPU, since MPS has no float64
    psnr = 10 * math.log10(1 / mse) if mse else math.inf
    return Difference(share, gap.mean().item(), psnr)
