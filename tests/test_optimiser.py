"""Projected L-BFGS on small quadratics, against the same descent written with branches and lists."""

import contextlib
import itertools
import math
import random

import pytest
import torch
from quadratics import coupled, evaluation, quadratic

from style_transfer.engine.optimiser import (
    MAX_FIRST_HALVINGS,
    MAX_HALVINGS,
    Iterate,
    ProjectedLBFGS,
    begin,
    keep_newest,
)

SCALES = torch.linspace(0.5, 2, 27).double()
CORNER = torch.arange(27).double() % 2  # every pixel at a bound
MATRIX, TARGET = (part.double() for part in coupled(seed=2))


def even(value):
    return torch.full((27,), value).double()


def descent(optimiser, evaluate, x):
    """The iterate after each evaluation."""
    iterate = Iterate(x)
    while iterate := optimiser.step(iterate, evaluate):
        yield iterate


def two_loops(vector, pairs):
    """The inverse Hessian times a vector (Nocedal & Wright, algorithm 7.4), preconditioned by `SCALES`."""
    if not pairs:
        return 0.02 * SCALES * vector / (SCALES * vector).abs().mean()
    q, alphas = vector, []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q = q - alphas[-1] * y
    r = max((s @ y) / (y @ (SCALES * y)) for s, y in pairs) * SCALES * q
    for (s, y), alpha in zip(pairs, reversed(alphas)):
        r = r + s * (alpha - (y @ r) / (s @ y))
    return r


def reference(evaluate, x, history_size):
    """(image, losses) after each evaluation of the same descent, with branches and lists."""
    (losses, gradient), pairs, halvings = evaluate(x), [], 0
    while True:
        yield x, losses
        if halvings == (MAX_HALVINGS if pairs else MAX_FIRST_HALVINGS):
            if not pairs:
                return
            pairs, halvings = [], 0
        if not halvings:
            free = ~(((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0)))
            direction = two_loops(-gradient * free, pairs) * free
        trial = (x + direction / 2**halvings).clamp(0, 1)
        new_losses, new_gradient = evaluate(trial)
        halvings += 1
        if new_losses[0] < losses[0]:
            s, y = trial - x, new_gradient - gradient
            if s @ y > 1e-4 * s.norm() * y.norm():
                pairs = [*pairs, (s, y)][-history_size:]
            x, losses, gradient, halvings = trial, new_losses, new_gradient, 0


def plain():
    return quadratic(MATRIX, TARGET)


def refusing():
    """Not defined for two images in five."""
    return lambda image: plain()(image) + (math.nan if 7 * image.sum() % 1 < 0.4 else 0)


def near():
    """Its minimum is a two-thousandth of the first step away."""
    return quadratic(MATRIX, even(0.50001))


def closing():
    """From the fourth evaluation on, none is lower."""
    count = itertools.count()
    return lambda image: plain()(image) + 1e6 * (next(count) >= 3)


@pytest.mark.parametrize("history_size", [3, 20])
@pytest.mark.parametrize(
    "objective, least, most", [(plain, 0, 3), (refusing, 15, 25), (near, 9, 14), (closing, 24, 24)]
)
def test_the_descent_is_that_with_branches_and_lists(objective, least, most, history_size):
    """For thirty evaluations, since rounding grows. least, most: how many of them refuse the step."""
    start = even(0.5)
    optimiser = ProjectedLBFGS(start, SCALES.mul, history_size)
    expected = [*itertools.islice(reference(evaluation(objective()), start, history_size), 30)]
    found = [*itertools.islice(descent(optimiser, evaluation(objective()), start), 30)]
    assert len(found) == len(expected) and (len(found) < 30) is (objective is closing)
    for iterate, (x, losses) in zip(found, expected):
        torch.testing.assert_close((iterate.x, iterate.losses), (x, losses), rtol=1e-9, atol=1e-9)
    assert least <= sum(iterate.halvings > 0 for iterate in found) <= most
    assert torch.equal(start, even(0.5))


@pytest.mark.parametrize("history_size", [3, 20])
def test_a_quadratic_is_minimised_within_the_bounds(history_size):
    """In float32: at the end only the bounds keep the gradient from moving a pixel."""
    start, evaluate = torch.full((27,), 0.5), evaluation(quadratic(*coupled()))
    optimiser = ProjectedLBFGS(start, SCALES.float().mul, history_size)
    *_, last = itertools.islice(descent(optimiser, evaluate, start), 300)
    assert (last.x - (last.x - last.gradient).clamp(0, 1)).abs().max() < 0.01


@pytest.mark.parametrize("gradient", [even(0.0), 0.5 - CORNER], ids=["none", "outward"])
def test_a_start_from_which_nothing_is_downhill_stays_and_ends(gradient):
    (only,) = descent(ProjectedLBFGS(CORNER, SCALES.mul), lambda x: (torch.ones(2), gradient), CORNER)
    assert torch.equal(only.x, CORNER)


@pytest.mark.parametrize(
    "loss, tolerance, accepted", [(2.0, 0.0, False), (2.01, 0.01, True), (2.03, 0.01, False), (math.nan, 0.01, False)]
)
def test_a_loss_may_rise_by_its_relative_tolerance(loss, tolerance, accepted):
    losses, optimiser = iter([2.0, loss]), ProjectedLBFGS(even(0.5), SCALES.mul)

    def evaluate(x):
        return torch.tensor([next(losses), 7.0]), 1 / SCALES

    after = optimiser.step(optimiser.step(Iterate(even(0.5)), evaluate), evaluate, tolerance)
    assert after.losses[0] == pytest.approx(loss if accepted else 2.0) and after.halvings == (not accepted)
    torch.testing.assert_close(after.x, even(0.48 if accepted else 0.5))


def updated(optimiser, pairs, iterate=None):
    """The iterate after updates by these correction pairs."""
    for pair in pairs:
        iterate = optimiser.update((iterate or Iterate(pair[0]))._replace(pending=tuple(pair)))
    return iterate


def drawn_pairs(count):
    """Correction pairs of a quadratic, (count, 2, 27)."""
    s = torch.randn(count, 27, generator=torch.Generator().manual_seed(0)).double()
    return torch.stack([s, s @ MATRIX], dim=1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_pair_of_hardly_any_curvature_is_dropped_and_a_full_history_loses_its_oldest_alone(scale):
    """Curvature is a cosine, 1e-4 or more, whatever the lengths of the step and of the gradient's change."""
    optimiser, used, found = ProjectedLBFGS(SCALES, SCALES.mul, 2), [], None
    one, other = torch.eye(27).double()[:2]
    for cosine in (0.5e-4, 2e-4, -2e-4, 2e-4, 0.0, 2e-4):
        found = updated(optimiser, [(one / scale, scale * (cosine * one + other))], found)
        used.append(found.curvature.ages.count_nonzero())
    assert used == [0, 1, 1, 2, 2, 2] and found.pending == ()


@pytest.mark.parametrize("count", [2, 8, 9, 12])
def test_the_newest_pairs_are_kept_or_loaded_into_a_history_of_another_size(count):
    """As if there had never been others."""
    pairs, stored = drawn_pairs(16), ProjectedLBFGS(SCALES, SCALES.mul, 9)
    same, other = (ProjectedLBFGS(SCALES, SCALES.mul, count) for _ in range(2))
    before = updated(stored, pairs[:13])
    found = other.load_state_dict(stored.state_dict(before))
    expected = updated(same, pairs[13 - min(count, 9) : 13])
    torch.testing.assert_close(stored.matvec(SCALES, keep_newest(before, count)), same.matvec(SCALES, expected))
    for more in (pairs[:0], pairs[13:]):  # and it goes on, replacing the oldest
        found, expected = updated(other, more, found), updated(same, more, expected)
        torch.testing.assert_close(other.matvec(SCALES, found), same.matvec(SCALES, expected))


def test_a_new_beginning_keeps_the_correction_pairs_and_forgets_the_halvings():
    before = updated(ProjectedLBFGS(SCALES, SCALES.mul), drawn_pairs(1))._replace(halvings=torch.tensor(3))
    after = begin(before, torch.tensor([2.0]), SCALES)
    assert after.halvings == 0 and after.curvature is before.curvature


def test_a_step_interrupted_in_the_preconditioner_or_the_evaluation_can_be_done_again():
    """Also with a full history, whose oldest pair an update overwrites, and where a step has been refused."""
    chance, interrupted, seen = random.Random(0), set(), set()

    def interrupting(function):
        def called(x):
            if chance.random() < 0.4:
                interrupted.add(function)
                raise KeyboardInterrupt
            return function(x)

        return called

    def insist(function, *arguments):
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return function(*arguments)

    evaluate, iterate = evaluation(refusing()), Iterate(even(0.5))
    undisturbed = descent(ProjectedLBFGS(SCALES, SCALES.mul, 3), evaluate, even(0.5))
    optimiser = ProjectedLBFGS(SCALES, interrupting(SCALES.mul), 3)
    for expected in itertools.islice(undisturbed, 30):
        insist(optimiser.update, iterate)  # and what it returns is lost
        iterate = insist(optimiser.step, iterate, interrupting(evaluate))
        ages = [each.curvature.ages if each.curvature else torch.zeros(3) for each in (iterate, expected)]
        assert all(map(torch.equal, iterate[:4], expected[:4])) and torch.equal(*ages)
        seen.add((iterate.halvings.item(), ages[0].count_nonzero().item()))
    assert len(interrupted) == 2 and {(0, 3), (1, 3)} <= seen
