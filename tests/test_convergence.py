import pytest
import torch

from style_transfer.engine.schedule import Window


def evaluations_until_converged(stage, totals, images=None):
    """How many of these evaluations a run has; None if it has not converged. Without `images` every pixel moves."""
    images = images or [torch.full((1, 3, 2, 3), 0.07 * k % 1) for k in range(len(totals))]
    window = Window()
    for k, (image, total) in enumerate(zip(images, totals), 1):
        window = window.extend(image, total)
        if window.converged(stage):
            return k


@pytest.mark.parametrize("stage, count, tolerance", [("coarse", 10, 0.1), ("rough", 5, 0.3), ("fine", 10, 0.005)])
def test_a_loss_that_falls_slowly_has_converged(stage, count, tolerance):
    slow, fast = ([(1 - factor * tolerance) ** (k / count) for k in range(25)] for factor in (0.8, 1.2))
    assert evaluations_until_converged(stage, slow) == count + 1
    assert evaluations_until_converged(stage, fast) is None
    halting = [0.8**k for k in range(20)] + [0.8**19] * 50
    expected = next(k for k in range(count, 70) if halting[k] > (1 - tolerance) * halting[k - count])
    assert evaluations_until_converged(stage, halting) == expected + 1
    assert evaluations_until_converged(stage, [0.0] * 50) is None  # this is for the optimiser to notice


def test_a_coarse_scale_also_ends_at_a_small_share_of_its_first_loss():
    totals = [0.7**k for k in range(30)]
    assert totals[15] > 0.004 > totals[16]
    assert evaluations_until_converged("coarse", totals) == 17
    assert evaluations_until_converged("rough", totals) is evaluations_until_converged("fine", totals) is None


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_an_image_that_nobody_sees_change_has_converged_though_its_loss_falls(stage):
    """46 dB: ten evaluations change it by half a percent of its range, root mean square. Unless the loss falls fast."""

    def count(distance, fall):
        """Of 1000 numbers 100 move, by sqrt(10) times the root mean square."""
        images = [torch.full((1, 5, 10, 20), 0.3) for _ in range(30)]
        for k in range(10, 20):
            images[k][..., :2] += distance * 10**0.5
        return evaluations_until_converged(stage, [fall ** (k / 10) for k in range(30)], images)

    assert count(0.0049, 0.46) == 11
    assert count(0.0052, 0.6) is count(0.0049, 0.44) is None


def test_whether_rounding_is_the_cause_is_asked_by_the_loss_alone():
    assert (
        evaluations_until_converged("rough", [0.6 ** (k / 5) for k in range(30)], [torch.zeros(1, 3, 2, 3)] * 30)
        is None
    )


def test_the_window_holds_eleven_images_and_of_large_ones_a_sample():
    small, large, window = torch.rand(1, 3, 500, 510), torch.rand(1, 3, 1030, 1100), Window()
    for k, image in enumerate([large, small, large] * 5):
        window = window.extend(image, 20.0 - k)
    assert window.totals == tuple(20.0 - k for k in range(4, 15)) and window.first == 20.0
    assert len(window.images) == 11 and window.images[0] is small
    assert torch.equal(window.images[-1], large[..., ::2, ::2])
    assert window.images[-1].untyped_storage().nbytes() == large[..., ::2, ::2].numel() * 4
