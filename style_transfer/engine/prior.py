"""What natural images have in common, as a Gaussian prior: a preconditioner, and noise to start from.

Neighbouring pixels are correlated, and so are the three colours of a pixel. To second order the covariance at each
frequency f, in cycles per pixel, says it all:

    P(f) = K (0.25 / |f|)^2

with K the covariance of the colours: power falls with the square of frequency, and brightness varies more than colour.
|f| is at least one cycle per longer side. What the network sees of an image is fitted; what it leaves open is filled in
by this prior.

[priors] Mahendran & Vedaldi 2015, Understanding Deep Image Representations by Inverting Them
[colours] Olah, Mordvintsev & Schubert 2017, Feature Visualization
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Shape
from .evaluation import default_modes
from .images import resize

with default_modes():
    # A square root of the covariance of the colours in ImageNet, as published with [colours]. K is scaled to a largest
    # eigenvalue of 1, and a thousandth is added for colours that hardly ever vary.
    _ROOT = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]])
    K = _ROOT @ _ROOT.T / torch.linalg.matrix_norm(_ROOT, 2) ** 2 + 1e-3 * torch.eye(3)

# How much the prior counts against the network's curvature, by the first block in use. Deeper blocks see otherwise than
# the first two convolutions, of which the curvature is: for them the prior counts alone.
PRIOR_WEIGHTS = {1: 0.01, 2: 0.1}


def relative_frequencies(shape: Shape) -> Tensor:
    """|f| / 0.25 for each frequency of a real Fourier transform of `shape`: (H, W // 2 + 1)."""
    rows, columns = torch.fft.fftfreq(shape[0]), torch.fft.rfftfreq(shape[1])
    return torch.hypot(rows[:, None], columns).clamp(min=1 / max(shape)) / 0.25


def draw_noise(shape: Shape, seed: int, device: torch.device, deviation: float = 0.05) -> Tensor:
    """Noise of the prior around grey, of this standard deviation: clouds of soft colours, (1, 3, H, W).

    Drawn on the CPU, so that a seed means the same noise on every device. It is faint where a run starts from it, since
    what a deep layer does not see of it remains in the result.
    """
    white = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed))
    soft = torch.fft.irfft2(torch.fft.rfft2(white) / relative_frequencies(shape), s=shape)
    noise = torch.einsum("ij,jhw->ihw", torch.linalg.cholesky(K), soft)
    return (0.5 + deviation * noise / noise.std()).clamp(0, 1)[None].to(device)


def enlarge(image: Tensor, shape: Shape, seed: int) -> Tensor:
    """An image scaled to a larger `shape`, with noise of the prior as the detail that it lacks.

    For a style: where an image is smooth the network sees nothing and the gradient is small. A content has detail of
    its own in its feature maps, and the noise would have to go again.
    """
    noise = draw_noise(shape, seed, image.device, deviation=0.1)
    detail = noise - resize(resize(noise, image.shape[-2:]), shape)
    return (resize(image, shape) + detail).clamp(0, 1)


def enlarge_change(image: Tensor, init: Tensor, shape: Shape) -> Tensor:
    """An image scaled to a larger `shape`, with the detail of the image `init` that the run started from."""
    change = image - resize(init, image.shape[-2:])
    return (resize(init, shape) + F.interpolate(change, tuple(shape), mode="bicubic")).clamp(0, 1)


def spectral_preconditioner(kernels: Tensor, shape: Shape, weight: float, device: torch.device) -> Callable:
    """The linear function of flat gradients (3 H W,) that divides, at each frequency, by A + `weight` / P.

    kernels: (3, C, 5, 5), the network's first convolutions as one, which responds to fine chroma and coarse brightness
    a thousand times less than to edges; descent is that much slower there. A, its curvature, is a Hermitian 3x3 matrix
    at each frequency, scaled to a largest eigenvalue of 1. Where the network sees, A decides, and elsewhere the prior:
    Wiener's filter. An infinite weight leaves P alone. Padding with zeros keeps opposite borders apart, which are
    neighbours to a Fourier transform.
    """
    padding = 8
    here = "cpu" if torch.device(device).type == "mps" else device  # Apple's GPUs lack some complex arithmetic
    padded = [side + 2 * padding for side in shape]
    overlaps = F.conv2d(kernels, kernels, padding=4).to(here, torch.complex64)  # (3, 3, 9, 9): A as a kernel
    rows, columns = (
        torch.exp(-2j * math.pi * frequencies[:, None] * torch.arange(-4, 5)).to(here)
        for frequencies in (torch.fft.fftfreq(padded[0]), torch.fft.rfftfreq(padded[1]))
    )
    inverse, squares = torch.linalg.inv(K).to(here), relative_frequencies(padded)[..., None, None].to(here) ** 2
    # A few rows at a time: the matrices take much memory, and cuSOLVER refuses more than 65,535 of them.
    few = max(1, 2**15 // len(columns))
    bands = list(zip(rows.split(few), squares.split(few)))

    def curvature(rows):
        return torch.einsum("ijab,ha,wb->hwij", overlaps, rows, columns)

    largest = max(torch.linalg.eigvalsh(curvature(rows)).max() for rows, _ in bands)
    filters = torch.empty(3, 3, *squares.shape[:2], dtype=torch.complex64, device=here)
    for place, (rows, squares) in zip(filters.split(few, dim=2), bands):
        matrices = curvature(rows) / (weight * largest) + squares * inverse
        place.copy_(torch.linalg.inv(matrices).permute(2, 3, 0, 1))

    def precondition(gradient):
        spectrum = torch.fft.rfft2(F.pad(gradient.to(here).view(3, *shape), (padding,) * 4))
        scaled = [torch.fft.irfft2((row * spectrum).sum(0), s=padded) for row in filters]
        return torch.stack([colour[padding:-padding, padding:-padding] for colour in scaled]).flatten().to(device)

    return precondition
