"""VGG-19 [VGG], frozen: built under the papers' names, cut, and asked for the feature maps of a picture."""

import copy
import functools
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from .layers import layer_name, stride
from .pictures import pick_device
from .weights import convolutions_of, read_weights


def load_vgg19(weights="oxford", device=None):
    """The convolutional part of VGG-19 [VGG], frozen, for pictures in [0, 1].

    weights: "oxford" (the authors' own, from a package, no download), "torchvision" (downloaded once)
    or the path of a weight file in either format. The network is an nn.Sequential of conv1_1, relu1_1,
    ..., pool5 with a buffer `mean`, the colour to subtract from a picture; `features` does that.
    Raises FileNotFoundError if the weights cannot be had, ValueError if they are not VGG-19's.
    """
    return _load_vgg19(str(weights), pick_device(device))


@functools.cache
def _load_vgg19(weights, device):
    state = read_weights(weights)
    try:
        vgg = build_vgg19(*convolutions_of(state))
    except (KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the weights {weights!r} are not those of VGG-19 in Oxford's or torchvision's format"
        ) from error
    if not all(parameter.isfinite().all() and parameter.any() for parameter in vgg.parameters()):
        raise ValueError(f"the weights {weights!r} are damaged: some are not finite, or a layer has zeros alone")
    return vgg.to(device)


def build_vgg19(convolutions, mean):
    """torchvision's VGG-19 layers under the papers' names, with these weights.

    convolutions: {name: (weight (O, I, 3, 3), bias (O,))}; mean: RGB in [0, 1], three numbers.
    """
    names, block, i = [], 1, 1
    modules = make_layers(cfgs["E"], batch_norm=False)
    for module in modules:
        if isinstance(module, nn.Conv2d):
            names.append(f"conv{block}_{i}")
        elif isinstance(module, nn.ReLU):
            names.append(f"relu{block}_{i}")
            module.inplace = False  # in place it would overwrite the convolution's output, which we collect
            i += 1
        else:
            names.append(f"pool{block}")
            block, i = block + 1, 1
    vgg = nn.Sequential(OrderedDict(zip(names, modules)))
    weights = {
        f"{name}.{kind}": value for name, pair in convolutions.items() for kind, value in zip(("weight", "bias"), pair)
    }
    vgg.load_state_dict(weights)
    vgg.conv1_1.padding_mode = "replicate"  # zeros, as it was trained with, draw a frame around every result
    # Subtracted from the picture, not folded into conv1_1's bias: in bfloat16 small numbers are the finer ones.
    vgg.register_buffer("mean", mean.view(1, 3, 1, 1).clone())
    return vgg.eval().requires_grad_(False)


def cut_network(vgg, last, device, precision):
    """A copy of `vgg` that ends with the layer `last`, on `device`, in "float32" or "bfloat16", channels-last."""
    names = [name for name, _ in vgg.named_children()]
    names = names[: 1 + names.index(layer_name(last))]
    network = nn.Sequential(OrderedDict((name, vgg.get_submodule(name)) for name in names))
    network = copy.deepcopy(network).to(device, getattr(torch, precision), memory_format=torch.channels_last)
    network.register_buffer("mean", vgg.mean.to(device))
    return network


def features(vgg, image, layers):
    """Feature maps of a picture at `layers`: {name as given: (1, C, h, w)}; conv* before, relu* after ReLU.

    Block b sees the picture halved b - 1 times, so a side shorter than 2^(b-1) pixels is a ValueError.
    """
    papers_names = [layer_name(name) for name in layers]
    height, width = image.shape[-2:]
    for name in papers_names:
        if min(height, width) < stride(name):
            raise ValueError(
                f"a {height}x{width} picture is too small for {name}: each side needs {stride(name)} pixels or more"
            )
    first = vgg.conv1_1.weight
    x = (image - vgg.mean).to(first.dtype)
    if first.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    maps = {}
    for name, module in vgg.named_children():
        if maps.keys() >= set(papers_names):
            break
        x = module(x)
        if name in papers_names:
            maps[name] = x
    return {name: maps[layer_name(name)] for name in layers}


def map_size(vgg, name, shape):
    """C h w, how many values the feature map of a layer has for a picture of `shape` (H, W)."""
    convolution = vgg.get_submodule(layer_name(name).replace("relu", "conv"))
    return convolution.out_channels * (shape[0] // stride(name)) * (shape[1] // stride(name))


def first_kernels(vgg):
    """conv1_1 and conv1_2 without their ReLUs as one convolution: its kernels, (3, 64, 5, 5), on the CPU."""
    first, second = vgg.conv1_1.weight.float().cpu(), vgg.conv1_2.weight.float().cpu()
    return F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=2)
