"""Images: float32 tensors of shape (1, 3, H, W), RGB, with values in [0, 1]. Read, written, resized, compared."""

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
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from .checks import Shape, UserError, as_file, as_shape, as_whole, check_shown, reason

# Of an installed package its data, of a clone the folder at the top.
_FOLDERS = Path(__file__).resolve().parents[1] / "pictures", Path(__file__).resolve().parents[2] / "images"
IMAGES = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[-1])


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device` as a torch.device; by default the best here: CUDA, then Apple's MPS, then CPU.

    "cuda" becomes "cuda:0", so that a device has one name. A GPU that the installed torch cannot run, or that has no
    memory left, is passed over with a warning. Raises UserError for a device that this machine lacks, or that is full.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, available in present.items() if available]
    if device is None:
        while problem := problem_of(here[0]):
            name = here.pop(0)
            warnings.warn(f"{name!r} {problem}, and is passed over", stacklevel=2)
        device = here[0]
    elif problem := problem_of(device):
        raise UserError(f"device {device!r} {problem}: this machine has {', '.join(here)}")
    chosen = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(chosen) == "cuda" else chosen


def problem_of(device: str | torch.device) -> str | None:
    """None if torch computes on `device`, or why it does not, as the end of a sentence."""
    try:
        torch.zeros(1, device=torch.device(device)).add(1).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        if "out of memory" in str(error):
            return "has no memory left (end what else runs on it)"
        if "no kernel image" in str(error):
            return "is older than the installed torch has code for (where there is a choice, take a T4, not a P100)"
        return "is unknown"
    return None


# --- Reading -------------------------------------------------------------------------------------

# What cameras, phones, browsers and paint programs write. Pillow knows more, some by starting other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "JPEG2000", "HEIF")
MOST_PIXELS = 180_000_000  # of an image at the size that is asked for
HEIC = re.compile(rb"....ftyp(hei[cfmsx]|hev[cmx]|mif1|msf1)", re.DOTALL)
# By EXIF's orientation, how the image is turned to stand as the camera was held.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
PROFILED = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # a profile's colours, and Pillow's mode for them


def load_image(
    path: str | Path, size: int = 256, device: str | torch.device | None = None, background: str = "white"
) -> Tensor:
    """Read an image file as float32 (1, 3, H, W), RGB in [0, 1], its shorter side `size` pixels.

    Camera rotation (EXIF) is applied, every colour mode becomes RGB, colours with a profile become sRGB, transparency
    is laid over `background`. Raises MissingFileError if there is no such file, UserError if it cannot be read or is no
    image, or if the result would have more than 180 million pixels.
    """
    path, device, size = as_file(path, "picture"), pick_device(device), as_whole(size, "size", " of pixels")
    try:
        picture = to_srgb(decode(path))
        scale = size / min(picture.size)
        sides = [max(size, round(side * scale)) for side in picture.size]
        if math.prod(sides) > MOST_PIXELS:
            raise UserError(f"would be {sides[0]} x {sides[1]} pixels at size {size}: that is too large")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture).convert("RGB")
        pixels = np.array(picture.resize(sides, Image.Resampling.LANCZOS))
        return (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255).to(device)
    except Exception as error:  # decoders raise whatever their authors thought of
        raise UserError(f"{str(path)!r} {what_is_wrong(path, error)}") from error


def load_mask(path: str | Path, size: int = 256, device: str | torch.device | None = None) -> Tensor:
    """Read an image file as a mask (H, W) in [0, 1]: 1 where it is white, 0 where black or transparent."""
    return luma(load_image(path, size, device, "black"))[0, 0]


def readable_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow reads."""
    with contextlib.suppress(ImportError):  # photographs of iPhones, where the package for them is installed
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decode(path: Path) -> Image.Image:
    """The image in a file, of 8 bits and standing as the camera was held."""
    # Opened here: of a path, Pillow maps some files into memory, and turns them wrongly.
    with open(path, "rb") as stream, Image.open(stream, formats=readable_formats()) as file:
        deep = any(";16" in str(tile) for tile in file.tile)
        file.load()
        orientation = 1
        with contextlib.suppress(Exception):  # an entry that is damaged: nothing else of EXIF is used
            orientation = file.getexif().get(0x0112)
        picture = to_8_bits(file, deep)
        return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture.copy()


def what_is_wrong(path: Path, error: Exception) -> str:
    """Why a file could not be read, as the end of a sentence that begins with its path."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "has too many pixels: scale it down, or raise Pillow's limit, Image.MAX_IMAGE_PIXELS"
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        return "has too many pixels for the memory that is free: scale it down"
    if isinstance(error, Warning):
        return f"is read with a warning, and warnings are errors here: {text}"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {reason(error)}"
    with open(path, "rb") as file:
        head = file.read(64)
    if HEIC.match(head) and b"avif" not in head:
        return "is a HEIC photograph: convert it to JPEG, or run 'pip install pillow-heif'"
    if not any(accepts and accepts(head) is True for _, accepts in map(Image.OPEN.get, readable_formats())):
        return "is not a picture in a format that is read here: use a JPEG or PNG file"
    if "truncated" in text.lower():
        return "is cut off: copy or download it again"
    cause = "" if isinstance(error, UnidentifiedImageError) else f" ({text[:80] or type(error).__name__})"
    return f"is cut off, damaged or of a kind that is not read here{cause}: copy it again, or save it as PNG"


def is_picture(path: Path) -> bool:
    """Whether a file begins as a picture that `load_image` reads; hidden files are none."""
    try:
        with Image.open(path, formats=readable_formats()):
            return not Path(path).name.startswith(".")
    except Exception as error:
        return isinstance(error, Image.DecompressionBombError)  # one of too many pixels


def to_8_bits(picture: Image.Image, deep: bool) -> Image.Image:
    """An image of 16 bits, or of floating point in [0, 1], scaled to 8 bits; Pillow would clip its values.

    With its colour profile and its transparency. deep: whether the file has 16 bits; of colours Pillow keeps 8.
    """
    transparent = picture.info.get("transparency")
    if picture.mode[0] not in "IF":
        if deep and isinstance(transparent, tuple):
            picture.info["transparency"] = tuple(value // 256 for value in transparent)
        return picture
    values = np.asarray(picture).astype(np.float64)
    opaque, white = values != transparent, 65535
    if picture.mode == "F":
        white = 1 if values.max() <= 1 else 255
    if not (values.min() >= 0 and values.max() <= white):
        found = f"from {values.min():g} to {values.max():g}"
        raise UserError(f"has values {found}, neither of 8 or 16 bits nor of floating point in [0, 1]")
    grey = Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(opaque).convert("L"))
    grey.info = picture.info
    return grey


def to_srgb(picture: Image.Image) -> Image.Image:
    """Any colour mode -> RGBA in sRGB, by the image's own colour profile if it has one."""
    rgba, embedded = picture.convert("RGBA"), picture.info.get("icc_profile")
    if not embedded:
        return rgba
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
        mode, own = PROFILED[profile.profile.xcolor_space.strip()], Image.getmodebase(picture.mode)
        red, green, blue, _ = rgba.split()
        grey = own == "L" or red.tobytes() == green.tobytes() == blue.tobytes()
        if (mode == "CMYK") != (picture.mode == "CMYK") or (mode == "L" and not grey):
            raise ValueError("the profile is of other colours")
        srgb = ImageCms.createProfile("sRGB")
        colours = ImageCms.profileToProfile(picture.convert(mode), profile, srgb, outputMode="RGB")
    except (OSError, ValueError, TypeError, KeyError, ImportError, ImageCms.PyCMSError):
        warnings.warn("the picture's colour profile is damaged or of other colours: it is left aside", stacklevel=3)
        return rgba
    colours.putalpha(rgba.getchannel("A"))
    return colours


# --- Writing, resizing, comparing ----------------------------------------------------------------


def to_pil(image: Tensor) -> Image.Image:
    """An image (1, 3, H, W) as an 8-bit RGB image of Pillow's; values, from -1 to 2, are clamped to [0, 1] first.

    Raises UserError for anything else.
    """
    check_shown(image, "image")
    pixels = image.detach()[0].float().clamp(0, 1).mul(255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def resize(image: Tensor, shape: Shape) -> Tensor:
    """Scale an image to `shape` = (height, width): bicubic, antialiased, values clamped to [0, 1].

    Raises UserError for what is no image or no shape.
    """
    check_shown(image, "image")
    shape = as_shape(shape)
    if math.prod(shape) > MOST_PIXELS:
        raise UserError(f"shape is {shape}: that is too large")
    if tuple(image.shape[-2:]) == shape:
        return image
    if image.dtype in (torch.float16, torch.bfloat16):  # of which torch resizes none on a CPU
        image = image.float()
    return F.interpolate(image, shape, mode="bicubic", antialias=True).clamp(0, 1)


def luma(image: Tensor) -> Tensor:
    """The luma of an image, (1, 1, H, W), as ITU-R BT.601 weighs red, green and blue."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=image.device, dtype=image.dtype)
    return (image * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def keep_colours(image: Tensor, content: Tensor) -> Tensor:
    """The luma of `image` with the chroma of `content`, which is resized to it: (1, 3, H, W) in [0, 1].

    Where that would leave [0, 1], the chroma is scaled down, which keeps the hue: clipping would not. Luma alone is
    taken over in Gatys et al. 2016, Preserving Color in Neural Artistic Style Transfer. Raises UserError for no image.
    """
    check_shown(image, "image")
    content = resize(content, image.shape[-2:]).clamp(0, 1).to(image.device)
    grey, chroma = luma(image.clamp(0, 1)), content - luma(content)
    room = torch.where(chroma > 0, 1 - grey, grey) / chroma.abs().clamp(min=1e-6)
    return (grey + chroma * room.amin(1, keepdim=True).clamp(max=1)).clamp(0, 1)


def difference_map(a: Tensor, b: Tensor) -> Tensor:
    """Absolute difference of two images per pixel and channel, (1, 3, H, W) in [0, 1].

    Values from -1 to 2 are clamped to [0, 1] first. Raises UserError for other values, and for images of two shapes.
    """
    check_shown(a, "the first image")
    check_shown(b, "the second image")
    if a.shape != b.shape:
        raise UserError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}: a difference needs equal shapes")
    if a.device != b.device:
        raise UserError(f"images on {a.device} and {b.device}: a difference needs both on one device")
    return _gap(a, b)


def _gap(a, b):
    return (a.clamp(0, 1) - b.clamp(0, 1)).abs()


def share_changed(a: Tensor, b: Tensor) -> float:
    """The share of pixels, in [0, 1], in which two images differ by at least 1/255 in some channel."""
    # Two 8-bit values one step apart can differ by a hair less than 1/255 once they are float32.
    changed = _gap(a, b).amax(dim=1) >= 0.9995 / 255
    return changed.count_nonzero().item() / changed.numel()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two images in dB; infinite for equal ones."""
    mse = _gap(a, b).square().mean().item()
    return 10 * math.log10(1 / mse) if mse else math.inf


class Difference(NamedTuple):
    """How far apart two images are, in three numbers."""

    share: float  # of pixels that differ: `share_changed`
    mean: float  # absolute difference, averaged over pixels and channels, in [0, 1]
    psnr: float  # peak signal-to-noise ratio in dB; infinite for equal images


def difference_numbers(a: Tensor, b: Tensor) -> Difference:
    """The `Difference` of two images (1, 3, H, W) of equal shape."""
    mean = difference_map(a, b).mean().item()
    exact = (image.cpu().double() for image in (a, b))  # in this order: Apple's GPUs have no float64
    return Difference(share_changed(a, b), mean, psnr(*exact))
