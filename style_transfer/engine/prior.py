"""A Gaussian prior of natural images, after [priors] and [colours]: a preconditioner, and noise to start from.

Neighbouring pixels are correlated, and so are the three colours of a pixel. Up to second order, the covariance at
each frequency f, in cycles per pixel, describes this completely:

    P(f) = K (0.25 / |f|)^2

Power falls with the square of frequency. K is the covariance of the colours: brightness varies more than colour. |f| is
clamped from below at one cycle per longer side. A run fits what the network sees of an image; the prior fills in the
rest.

[priors] Mahendran & Vedaldi 2015, Understanding Deep Image Representations by Inverting Them
[colours] Olah, Mordvintsev & Schubert 2017, Feature Visualization
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Shape
from .images import resize

START_DEVIATION, DETAIL_DEVIATION = 0.05, 0.1  # of the noise a run starts from, and of the detail added at a new scale
PADDING_PIXELS = 8  # separates opposite borders, which the Fourier transform makes neighbours
FLOAT32_ON_CPU = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
MAX_MATRICES = 2**15  # inverted at a time: they take much memory, and cuSOLVER refuses more than 65,535

# The weight of the prior relative to the network's curvature, by the first block in use. The curvature is that of the
# first two convolutions. Deeper blocks see the image differently, so for them the weight is infinite: the prior alone.
PRIOR_WEIGHTS = {1: 0.01, 2: 0.1, 3: math.inf, 4: math.inf, 5: math.inf}


def colour_covariance() -> Tensor:
    """K, (3, 3): scaled to a largest eigenvalue of 1, plus 1e-3 on the diagonal for colours that hardly vary.

    Computed from the square root of ImageNet's colour covariance, as published with [colours].
    """
    root = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], **FLOAT32_ON_CPU)
    return root @ root.T / torch.linalg.matrix_norm(root, 2) ** 2 + 1e-3 * torch.eye(3, **FLOAT32_ON_CPU)


def relative_frequencies(shape: Shape) -> Tensor:
    """|f| / 0.25 for each frequency of a real Fourier transform of `shape`: (H, W // 2 + 1)."""
    rows, columns = frequencies(shape)
    return torch.hypot(rows[:, None], columns).clamp(min=1 / max(shape)) / 0.25


def frequencies(shape: Shape) -> tuple[Tensor, Tensor]:
    """The frequencies of a real Fourier transform of `shape` along each side, in cycles per pixel."""
    return torch.fft.fftfreq(shape[0], **FLOAT32_ON_CPU), torch.fft.rfftfreq(shape[1], **FLOAT32_ON_CPU)


def draw_noise(shape: Shape, seed: int, device: torch.device, deviation: float = START_DEVIATION) -> Tensor:
    """Noise drawn from the prior around grey, with standard deviation `deviation`: soft coloured clouds, (1, 3, H, W).

    Drawn on the CPU, so that a seed gives the same noise on every device. A run starts from faint noise, because
    whatever a deep layer does not see of it remains in the result.
    """
    white = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), **FLOAT32_ON_CPU)
    soft = torch.fft.irfft2(torch.fft.rfft2(white) / relative_frequencies(shape), s=shape)
    noise = torch.einsum("ij,jhw->ihw", torch.linalg.cholesky(colour_covariance()), soft)
    return (0.5 + deviation * noise / noise.std()).clamp(0, 1)[None].to(device)


def enlarge(image: Tensor, shape: Shape, seed: int) -> Tensor:
    """An image scaled to a larger `shape`, with noise from the prior as the missing detail.

    Used if there is a style: where an image is smooth, the network sees nothing and the gradient is small. Without one,
    the content's feature maps supply the detail, and the noise would have to be removed again.
    """
    noise = draw_noise(shape, seed, image.device, DETAIL_DEVIATION)
    detail = noise - resize(resize(noise, image.shape[-2:]), shape)
    return (resize(image, shape) + detail).clamp(0, 1)


def enlarge_change(image: Tensor, init: Tensor, shape: Shape) -> Tensor:
    """An image scaled to a larger `shape`, with the detail of the image `init` that the run started from."""
    change = image - resize(init, image.shape[-2:])
    return (resize(init, shape) + F.interpolate(change, tuple(shape), mode="bicubic")).clamp(0, 1)


class SpectralPreconditioner:
    """The linear function of flat gradients (3 H W,) that divides, at each frequency, by A + `weight` / P.

    kernels: (3, C, 5, 5), the network's first convolutions combined into one. They respond to fine chroma and coarse
    brightness a thousand times less than to edges, and descent is that much slower there. A, their curvature, is a
    Hermitian 3x3 matrix at each frequency, scaled to a largest eigenvalue of 1. Where the network sees, A dominates;
    elsewhere the prior does, as in a Wiener filter. With an infinite weight only P counts.
    """

    def __init__(self, kernels: Tensor, shape: Shape, weight: float, device: torch.device):
        self.shape, self.weight, self.device = tuple(shape), weight, torch.device(device)
        self.here = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS lacks complex arithmetic
        self.padded = [side + 2 * PADDING_PIXELS for side in shape]

        # A as a kernel, (3, 3, 9, 9), and the waves that transform it, along rows and columns.
        overlaps = F.conv2d(kernels, kernels, padding=4).to(self.here, torch.complex64)
        offsets = torch.arange(-4, 5, device="cpu")
        phases = [-2j * math.pi * side[:, None] * offsets for side in frequencies(self.padded)]
        row_waves, column_waves = (torch.exp(phase).to(self.here) for phase in phases)

        # 1 / P is the product of these two, up to a factor.
        squares = relative_frequencies(self.padded)[..., None, None].to(self.here) ** 2
        inverse_colours = torch.linalg.inv(colour_covariance()).to(self.here)

        def curvature(waves):
            """A at the frequencies of some rows, (rows, columns, 3, 3)."""
            return torch.einsum("ijab,ha,wb->hwij", overlaps, waves, column_waves)

        rows_at_once = max(1, MAX_MATRICES // len(column_waves))
        bands = list(zip(row_waves.split(rows_at_once), squares.split(rows_at_once)))
        largest = max(torch.linalg.eigvalsh(curvature(waves)).max() for waves, _ in bands)
        self.filters = torch.empty(3, 3, *squares.shape[:2], dtype=torch.complex64, device=self.here)
        for place, (waves, squares) in zip(self.filters.split(rows_at_once, dim=2), bands):
            matrices = curvature(waves) / (weight * largest) + squares * inverse_colours
            place.copy_(torch.linalg.inv(matrices).permute(2, 3, 0, 1))

    def __call__(self, gradient: Tensor) -> Tensor:
        image = gradient.to(self.here).view(3, *self.shape)
        spectrum = torch.fft.rfft2(F.pad(image, (PADDING_PIXELS,) * 4))
        within = slice(PADDING_PIXELS, -PADDING_PIXELS)
        scaled = [torch.fft.irfft2((row * spectrum).sum(0), s=self.padded)[within, within] for row in self.filters]
        return torch.stack(scaled).flatten().to(self.device)
