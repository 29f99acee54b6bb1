"""What holds for every image, shape and layer, on examples that hypothesis looks for."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import arrays

import nst_utils as nst
from style_transfer.engine.prior import SpectralPreconditioner
from style_transfer.engine.vgg import LAYERS, deepest, layer_name, stride

# No deadline: a test must not fail because a machine is slow.
settings.register_profile(
    "here", deadline=None, max_examples=40, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("here")

sides = st.integers(1, 40)
colours = arrays(np.uint8, st.tuples(sides, sides, st.just(3)))
layers = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4, unique=True)


def image_of(values):
    return torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255


@given(values=colours)
def test_an_image_written_and_read_is_the_same(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "image.png"
    nst.to_pil(image_of(values)).save(path)
    read = nst.load_image(path, min(values.shape[:2]), "cpu")
    assert torch.equal(read, image_of(values))


@given(values=colours, shape=st.tuples(sides, sides))
def test_a_scaled_image_is_one(values, shape):
    scaled = nst.resize(image_of(values), shape)
    assert scaled.shape == (1, 3, *shape) and 0 <= scaled.min() and scaled.max() <= 1
    flat = torch.full((1, 3, *values.shape[:2]), 0.3)
    torch.testing.assert_close(nst.resize(flat, shape), torch.full((1, 3, *shape), 0.3), atol=1e-6, rtol=0)


@given(values=arrays(np.uint8, st.tuples(st.just(2), sides, sides, st.just(3))))
def test_a_difference_has_no_sign_and_no_order(values):
    a, b = map(image_of, values)
    gap, numbers = nst.difference_map(a, b), nst.difference_numbers(a, b)
    steps = np.abs(values[0].astype(int) - values[1])
    torch.testing.assert_close(gap, image_of(steps), rtol=0, atol=1e-6)
    assert numbers.share == pytest.approx((steps.max(-1) > 0).mean())
    assert numbers.mean == pytest.approx(steps.mean() / 255, rel=1e-5)
    expected = 10 * math.log10(255**2 / np.mean(steps**2)) if steps.any() else math.inf
    assert numbers.psnr == pytest.approx(expected, rel=1e-5)


@given(names=layers)
def test_names_are_in_the_networks_order(names):
    last = deepest(names)
    assert last in names and all(LAYERS.index(name) <= LAYERS.index(last) for name in names)
    assert all(stride(name) == 2 ** (int(layer_name(name)[4]) - 1) for name in names)


def test_a_preconditioner_is_scaled_by_the_peak_of_the_curvature_wherever_it_is():
    """These kernels respond most to alternating rows; of a transposed image, to columns. Bands of rows are computed one
    after another, and the peak is not in the first.
    """
    generator = torch.Generator().manual_seed(0)
    kernels = (0.5 + torch.rand(3, 2, 5, 5, generator=generator)) * (-1.0) ** torch.arange(5)[:, None]
    image = torch.randn(3, 400, 500, generator=generator)
    found = [
        SpectralPreconditioner(turned, x.shape[1:], 0.1, torch.device("cpu"))(x.flatten()).view_as(x)
        for turned, x in ((kernels, image), (kernels.mT, image.mT))
    ]
    torch.testing.assert_close(found[0], found[1].mT, rtol=1e-3, atol=1e-4 * found[0].abs().max().item())
