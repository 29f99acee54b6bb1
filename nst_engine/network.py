"""VGG-19 [VGG], frozen: built under the papers' names, cut, and asked for the feature maps of an image."""

import copy
import functools
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from .checks import check_shown
from .errors import UserError, shown
from .files import as_file, file_version
from .images import pick_device
from .layers import LAYERS, Shape, as_names, check_size, layer_name, stride
from .modes import default_modes
from .weights import ADVICE, NAMED, convolutions_of, place_of, read_weights


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
