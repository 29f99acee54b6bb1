import pytest
import torch
import torch.nn.functional as F

from nst_engine.network import first_kernels
from nst_engine.preparation import sees_detail
from nst_engine.prior import draw_detail, draw_noise, spectral_preconditioner
from nst_utils import IMAGES, load_image


@pytest.mark.parametrize("floor", [0.05, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_the_preconditioner_undoes_the_first_two_convolutions(shape, floor, vgg):
    """Against the dense inverse of A^T A, by autograd through both convolutions, over a field that wraps around."""
    height, width = (side + 16 for side in shape)

    def wrapped(x):
        for weight in (vgg.conv1_1.weight, vgg.conv1_2.weight):
            rows, columns = (torch.arange(-1, side + 1) % side for side in (height, width))
            x = torch.nn.functional.conv2d(x[:, :, rows][..., columns], weight)
        return x

    units = torch.eye(3 * height * width).view(-1, 3, height, width).split(100)
    responses = torch.cat([wrapped(part).flatten(1) for part in units]).double()  # A, transposed
    curvature = responses @ responses.T
    regular = curvature / torch.linalg.eigvalsh(curvature)[-1] + floor * torch.eye(len(curvature))

    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (8, 8, 8, 8)).double().flatten()
    expected = torch.linalg.solve(regular, padded).view(3, height, width)[:, 8:-8, 8:-8]
    found = spectral_preconditioner(first_kernels(vgg), shape, floor, "cpu")(x.flatten())
    torch.testing.assert_close(found.double(), expected.flatten(), rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def fine_colours(image):
    """Covariance (3, 3) of the colours in what a picture loses when halved, and of its differences along a row."""
    halved = [side // 2 for side in image.shape[-2:]]
    detail = image - F.interpolate(F.interpolate(image, halved, mode="area"), image.shape[-2:], mode="bilinear")
    return [torch.cov(values.flatten(2)[0]) for values in (detail, detail.diff(dim=3))]


@pytest.mark.parametrize("shape", [(192, 192), (96, 250), (251, 133)])
def test_drawn_detail_has_the_colours_and_frequencies_of_the_style(shape):
    style = load_image(IMAGES / "style" / "starry_night.jpg", 192, "cpu")
    detail = draw_detail(style, shape, seed=3)
    assert detail.shape == (1, 3, *shape)
    for ours, its in zip(fine_colours(detail), fine_colours(style)):
        torch.testing.assert_close(ours, its, atol=0.3 * its.max().item(), rtol=0)
    coarse, its = (F.avg_pool2d(image, 8).std().item() for image in (detail, style))
    assert coarse < 0.05 * its


def test_drawn_detail_is_noise_of_its_seed(picture):
    first, again, other = (draw_detail(picture(64, 64), (64, 64), seed) for seed in (0, 0, 1))
    assert first.equal(again)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.05
    assert abs(torch.corrcoef(torch.stack([first.flatten(), picture(64, 64).flatten()]))[0, 1]) < 0.05


def test_only_the_first_block_sees_detail():
    assert sees_detail(("conv3_1", "relu1_1")) and sees_detail(["conv_2"])
    assert not sees_detail(()) and not sees_detail(("conv2_1", "conv_5"))


def test_noise_is_uniform_and_its_seeds():
    first, again, other = (draw_noise((40, 50), seed, "cpu") for seed in (0, 0, 1))
    assert first.shape == (1, 3, 40, 50) and first.equal(again) and not first.equal(other)
    assert first.min() < 0.01 and first.max() > 0.99 and abs(first.mean() - 0.5) < 0.02
