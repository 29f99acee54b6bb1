import math

import pytest
import torch
import torch.nn.functional as F

from style_transfer.engine.prior import K, draw_noise, relative_frequencies, spectral_preconditioner
from style_transfer.engine.vgg import first_kernels


def circulant(rows):
    """The matrix of a linear function that wraps around, from its outputs (3, C, H, W) for a unit of each colour."""
    height, width = rows.shape[-2:]
    moved = [row.roll((i, j), (-2, -1)) for row in rows for i in range(height) for j in range(width)]
    return torch.stack(moved).flatten(1)


@pytest.mark.parametrize("weight", [0.01, 0.1, math.inf])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_the_preconditioner_divides_by_curvature_and_prior(shape, weight, vgg):
    """Against the dense inverse of A + weight / P, over a field that wraps around; A by both convolutions in turn."""
    height, width = padded = [side + 16 for side in shape]
    units = torch.eye(3, dtype=torch.float64)[..., None, None] * (torch.arange(height * width) == 0).view(padded)

    def convolved(x):
        for weights in (vgg.conv1_1.weight, vgg.conv1_2.weight):
            rows, columns = (torch.arange(-1, side + 1) % side for side in padded)
            x = F.conv2d(x[:, :, rows][..., columns], weights.double())
        return x

    def precision(x):
        spectrum = torch.fft.rfft2(x) * relative_frequencies(padded).double() ** 2
        return torch.einsum("ij,njhw->nihw", torch.linalg.inv(K.double()), torch.fft.irfft2(spectrum, s=padded))

    divisor = circulant(precision(units))
    if weight < math.inf:
        responses = circulant(convolved(units))  # A's root, transposed
        curvature = circulant((responses[:: height * width] @ responses.T).view(3, 3, *padded))
        divisor = divisor * weight + curvature / torch.linalg.eigvalsh(curvature)[-1]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.solve(divisor, F.pad(x, (8, 8, 8, 8)).double().flatten())
    expected = expected.view(3, height, width)[:, 8:-8, 8:-8].flatten()
    found = spectral_preconditioner(first_kernels(vgg), shape, weight, "cpu")(x.flatten()).double()
    found = found * (expected.norm() / found.norm())  # a factor is the optimiser's to find
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_noise_is_the_priors():
    """Around grey, of standard deviation 0.05; power falls with the square of frequency; brightness varies the most."""
    noise = torch.cat([draw_noise((96, 128), seed, "cpu") for seed in range(12)]).double()
    assert noise.shape == (12, 3, 96, 128) and 0 <= noise.min() and noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01) and noise.std().item() == pytest.approx(0.05, rel=0.1)
    power = torch.fft.rfft2(noise - 0.5).abs().square().mean(dim=(0, 1))
    frequencies = relative_frequencies((96, 128))
    levels = [power[(frequencies > f) & (frequencies < 1.2 * f)].mean() * f**2 for f in (0.1, 0.3, 1.0)]
    assert max(levels) < 1.4 * min(levels)
    colours = torch.cov(noise.movedim(1, 0).flatten(1))
    torch.testing.assert_close(colours / colours.trace(), (K / K.trace()).double(), atol=0.03, rtol=0)


def test_noise_is_its_seeds():
    first, again, other = (draw_noise((40, 50), seed, "cpu") for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    gaps = torch.stack([(image - 0.5).flatten() for image in (first, other)])
    assert abs(torch.corrcoef(gaps)[0, 1]) < 0.5  # few independent values in so soft an image


def test_frequencies_are_one_cycle_per_longer_side_at_least():
    frequencies = relative_frequencies((6, 8))
    assert frequencies.shape == (6, 5) and frequencies[0, 0] == pytest.approx(1 / 8 / 0.25)
    assert frequencies[0, 4] == pytest.approx(0.5 / 0.25)


def test_a_tall_image_is_preconditioned_as_a_wide_one(vgg):
    """Their frequencies go by bands of rows, which are other ones."""
    kernels, x = first_kernels(vgg), torch.randn(3, 700, 200, generator=torch.Generator().manual_seed(0))
    tall = spectral_preconditioner(kernels, (700, 200), 0.01, "cpu")(x.flatten()).view(3, 700, 200)
    wide = spectral_preconditioner(kernels.mT, (200, 700), 0.01, "cpu")(x.mT.flatten()).view(3, 200, 700)
    torch.testing.assert_close(tall, wide.mT, rtol=1e-3, atol=1e-4 * wide.abs().max().item())
