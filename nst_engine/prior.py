"""What is known of pictures and of the network before any step: a preconditioner, and noise to begin with.

[noise] Galerne, Gousseau & Morel 2011, Random Phase Textures: Theory and Synthesis.
"""

import math

import torch
import torch.nn.functional as F

from .pictures import resize


def draw_noise(shape, seed, device):
    """A picture of uniform noise; drawn on the CPU, so that a seed means the same noise on every device."""
    return torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(seed)).to(device)


def draw_detail(style, shape, seed):
    """What a picture enlarged twofold lacks: noise like the finest detail of `style`, (1, 3, *shape) around 0.

    White noise convolved with what the style loses when halved ([noise]): its frequencies and colours, random phases.
    """
    detail = style - resize(resize(style, [max(1, side // 2) for side in style.shape[-2:]]), style.shape[-2:])
    white = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed)).to(style.device)
    used = math.prod(map(min, shape, style.shape[-2:]))  # of its pixels: rfft2 cuts or pads it to `shape`
    return torch.fft.irfft2(torch.fft.rfft2(detail, s=shape) * torch.fft.rfft2(white), s=shape) / math.sqrt(used)


def spectral_preconditioner(kernels, shape, floor, device):
    """Return the linear function of flat gradients (3 H W,) that undoes how unevenly the network sees frequencies.

    kernels: (3, C, 5, 5), the network's first convolutions as one, A. It responds to fine chroma and coarse brightness
    a thousand times less than to edges, and descent on |A x|^2 is that much slower there. Its curvature A^T A is a
    Hermitian 3x3 matrix at each frequency; we divide by it, in the Fourier domain, after a `floor`, as a share of its
    largest eigenvalue, for what the layer hardly sees at all. A margin of zeros keeps opposite borders, which are
    neighbours to a Fourier transform, apart.
    """
    margin = 8
    height, width = (side + 2 * margin for side in shape)
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
