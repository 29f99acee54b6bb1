import pytest
import torch

from nst_engine.convergence import Window


def evaluations_until_converged(stage, totals, images=None):
    """How many of these evaluations a run has; None if it has not converged. Without `images` every pixel moves."""
    images = images or [torch.full((1, 3, 2, 3), 0.07 * k % 1) for k in range(len(totals))]
    window = Window()
    for k, (image, total) in enumerate(zip(images, totals), 1):
        window = window.extend(image, total)
        if window.converged(stage):
            return k


@pytest.mark.parametrize("stage, tolerance", [("coarse", 0.1), ("rough", 0.05), ("fine", 0.005)])
def test_a_loss_that_falls_slowly_over_ten_evaluations_has_converged(stage, tolerance):
    slow, fast = ([(1 - factor * tolerance) ** (k / 10) for k in range(25)] for factor in (0.8, 1.2))
    assert evaluations_until_converged(stage, slow) == 11
    assert evaluations_until_converged(stage, fast) is None
    assert evaluations_until_converged(stage, [0.8**k for k in range(20)] + [0.8**19] * 50) == 30
    assert evaluations_until_converged(stage, [0.0] * 50) is None  # this is for the optimiser to notice


def test_a_coarse_scale_also_ends_at_a_small_share_of_its_first_loss():
    totals = [0.7**k for k in range(30)]
    assert totals[15] > 0.004 > totals[16]
    assert evaluations_until_converged("coarse", totals) == 17
    assert evaluations_until_converged("rough", totals) is evaluations_until_converged("fine", totals) is None


@pytest.mark.parametrize(
    "pixels, distance, count", [(1, 0.5, 11), (2, 0.5, None), (2000, 0.9 / 255, 11), (2, 1.1 / 255, None)]
)
def test_an_image_that_nobody_sees_change_has_converged_though_its_loss_falls(pixels, distance, count):
    """Of 2000 pixels one is less than a thousandth and two are not; each moves in one colour within ten evaluations."""
    images = []
    for k in range(30):
        image = torch.zeros(1, 3, 2000)
        image[:, 1, :pixels] = distance * (k // 10 % 2)
        images.append(image.view(1, 3, 40, 50))
    assert evaluations_until_converged("fine", [0.5**k for k in range(30)], images) == count


def test_the_window_holds_eleven_images_and_of_large_ones_a_sample():
    small, large, window = torch.rand(1, 3, 500, 510), torch.rand(1, 3, 1030, 1100), Window()
    for k, image in enumerate([large, small, large] * 5):
        window = window.extend(image, 20.0 - k)
    assert window.totals == tuple(20.0 - k for k in range(4, 15)) and window.first == 20.0
    assert len(window.images) == 11 and window.images[0] is small
    assert torch.equal(window.images[-1], large[..., ::2, ::2])
    assert window.images[-1].untyped_storage().nbytes() == large[..., ::2, ::2].numel() * 4
