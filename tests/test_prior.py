import math

import pytest
import torch
import torch.nn.functional as F

from style_transfer.engine.prior import SpectralPreconditioner, colour_covariance, draw_noise
from style_transfer.engine.vgg import first_kernels

CPU = torch.device("cpu")
K = colour_covariance().double()


def relative_frequencies(height, width):
    """|f| / 0.25, at least one cycle per longer side, for each frequency of a Fourier transform."""
    f = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)).double()
    return f.clamp(min=1 / max(height, width)) / 0.25


@pytest.mark.parametrize("shape, weight", [((1, 1), 0.1), ((2, 5), 0.1), ((12, 5), 0.01), ((3, 4), math.inf)])
def test_the_preconditioner_divides_by_curvature_and_prior(shape, weight, vgg):
    """A is how both convolutions in turn, over a field that wraps around, respond to a unit of each colour."""
    height, width = padded = [side + 16 for side in shape]
    responses = torch.eye(3)[..., None, None] * (torch.arange(height * width) == 0).view(padded)
    for layer in (vgg.conv1_1, vgg.conv1_2):
        responses = F.conv2d(F.pad(responses, (1, 1, 1, 1), mode="circular"), layer.weight)
    spectra = torch.fft.fft2(responses.double())
    curvature = torch.einsum("ichw,jchw->hwij", spectra.conj(), spectra)
    curvature /= weight * torch.linalg.eigvalsh(curvature).max()
    divisor = curvature + relative_frequencies(*padded)[..., None, None] ** 2 * torch.linalg.inv(K)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    spectrum = torch.fft.fft2(F.pad(x, (8, 8, 8, 8)).double()).movedim(0, -1)
    expected = torch.fft.ifft2(torch.linalg.solve(divisor, spectrum).movedim(-1, 0)).real[:, 8:-8, 8:-8]
    found = SpectralPreconditioner(first_kernels(vgg), shape, weight, CPU)(x.flatten()).double().view_as(x)
    found *= expected.norm() / found.norm()  # a factor is the optimiser's to find
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_noise_is_its_seeds_and_the_priors():
    """Around grey, of standard deviation 0.05; power falls with the square of frequency; brightness varies the most."""
    noise = torch.cat([draw_noise((96, 128), seed, CPU) for seed in range(12)]).double()
    assert torch.equal(draw_noise((96, 128), 1, CPU)[0].double(), noise[1]) and not torch.equal(noise[0], noise[1])
    assert noise.shape == (12, 3, 96, 128) and 0 <= noise.min() and noise.max() <= 1
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01) and noise.std().item() == pytest.approx(0.05, rel=0.1)
    power, frequencies = torch.fft.fft2(noise - 0.5).abs().square().mean(dim=(0, 1)), relative_frequencies(96, 128)
    levels = [power[(frequencies > f) & (frequencies < 1.2 * f)].mean() * f**2 for f in (0.1, 0.3, 1.0)]
    assert max(levels) < 1.4 * min(levels)
    colours = torch.cov(noise.movedim(1, 0).flatten(1))
    torch.testing.assert_close(colours / colours.trace(), K / K.trace(), atol=0.03, rtol=0)
