import functools
import itertools
import math
import random

import pytest
import torch
from quadratics import coupled, evaluation, projected_solution, quadratic

from style_transfer.engine.optimiser import (
    MAX_HALVINGS,
    Iterate,
    ProjectedLBFGS,
    accept,
    begin,
    gradient_cosine,
    keep_newest,
    slots_of,
)

SCALES = torch.linspace(0.5, 2, 27)


def identity(x):
    return x


def even(value):
    return torch.full((27,), value)


def descend(objective, x, most, precondition=identity, history_size=20):
    """The iterate after each of at most so many evaluations from a flat image (27,)."""
    optimiser, evaluate = ProjectedLBFGS(x, precondition, history_size), evaluation(objective, x.view(1, 3, 3, 3))
    iterate, iterates = Iterate(x), []
    while len(iterates) < most and (iterate := optimiser.step(iterate, evaluate)):
        iterates.append(iterate)
    return iterates


def striped(image):
    """A quadratic that is not defined for two images in five, so that steps are refused now and then."""
    return quadratic(*coupled())(image) + (math.nan if 7 * image.sum() % 1 < 0.4 else 0.0)


def never_rises(iterates):
    return all(after.losses[0] <= before.losses[0] for before, after in itertools.pairwise(iterates))


@pytest.mark.parametrize("precondition", [identity, SCALES.mul], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("history_size", [3, 20])
def test_a_coupled_quadratic_reaches_the_projected_solution(history_size, precondition):
    matrix, target = coupled()
    solution = projected_solution(matrix, target)
    # Clamping the unconstrained minimum is not the answer here, so a step has to take the bounds into account.
    assert (solution - target.double().clamp(0, 1)).abs().max() > 0.05
    seen, start = [], torch.rand(27, generator=torch.Generator().manual_seed(1))
    before = start.clone()
    iterates = descend(quadratic(matrix, target, seen), start, 300, precondition, history_size)
    torch.testing.assert_close(iterates[-1].x.double(), solution, atol=5e-3, rtol=0)
    gap = solution - target.double()
    assert iterates[-1].losses[0].item() == pytest.approx((gap @ matrix.double() @ gap).item(), rel=1e-4)
    assert never_rises(iterates)
    assert all(0 <= image.min() and image.max() <= 1 for image in seen)  # false for NaN as well
    assert torch.equal(start, before)


def test_pixels_pushed_out_of_range_stay_at_their_bound():
    """[two-metric]: a correction pair must not move them back inside, against their gradient."""
    matrix, target = coupled()
    seen, held = [], 0
    for (x, losses, gradient, *_), trial in zip(descend(quadratic(matrix, target, seen), even(0.5), 60), seen[1:]):
        assert torch.equal(quadratic(matrix, target)(x), losses)
        torch.testing.assert_close(gradient, 2 * matrix @ (x - target), atol=1e-4, rtol=1e-4)
        blocked = ((x <= 0) & (gradient > 1e-4)) | ((x >= 1) & (gradient < -1e-4))
        assert torch.equal(trial[blocked], x[blocked])
        held += blocked.sum().item()
    assert held > 0


def test_refused_steps_are_halved_then_the_correction_pairs_are_discarded_then_the_end():
    """An objective that cannot be lowered any more after six evaluations; each step is one evaluation."""
    seen = []

    def objective(image):
        losses = quadratic(*coupled(), seen)(image)
        return losses + 1e6 * (len(seen) > 6)

    iterates = descend(objective, even(0.5), 100)
    assert len(iterates) == len(seen) == 6 + 2 * MAX_HALVINGS
    assert slots_of(iterates[6]) and not slots_of(iterates[-1]) and never_rises(iterates)
    assert torch.equal(iterates[-1].x, seen[5])
    for trials in (seen[6 : 6 + MAX_HALVINGS], seen[6 + MAX_HALVINGS :]):
        steps = torch.stack(trials)[:, (trials[0] > 0) & (trials[0] < 1)] - seen[5][(trials[0] > 0) & (trials[0] < 1)]
        assert steps.any()
        torch.testing.assert_close(steps[1:], steps[:-1] / 2, atol=1e-6, rtol=1e-3)
    assert not torch.allclose(seen[6], seen[6 + MAX_HALVINGS], atol=1e-3)  # another direction, without the pairs


@pytest.mark.parametrize("start, target", [(even(0.25), even(0.25)), (SCALES.round() % 2, SCALES.round() % 2 * 3 - 1)])
def test_a_start_from_which_nothing_is_downhill_stays_and_ends(start, target):
    """Being the minimum, or with every pixel pushed out of range."""
    (only,) = descend(quadratic(torch.eye(27), target), start, 50)
    assert torch.equal(only.x, start)


def test_nan_after_the_first_evaluation_leaves_the_image_alone():
    iterates = descend(lambda image: quadratic(torch.eye(27), even(0.0))(image) / (image.mean() == 0.5), even(0.5), 50)
    assert len(iterates) == 1 + MAX_HALVINGS
    assert all(torch.equal(iterate.x, even(0.5)) and math.isfinite(iterate.losses[0]) for iterate in iterates)


@pytest.mark.parametrize(
    "loss, tolerance, accepted", [(2.0, 0.0, False), (2.01, 0.01, True), (2.03, 0.01, False), (math.nan, 0.01, False)]
)
def test_a_loss_may_rise_by_its_relative_tolerance(loss, tolerance, accepted):
    before = begin(Iterate(even(0.5)), torch.tensor([2.0, 7.0]), even(1.0))
    before = before._replace(halvings=torch.tensor(1))
    after = accept(before, even(0.375), torch.tensor([loss, 6.0]), even(0.5), tolerance)
    expected = ([loss, 6.0], 0, -0.125, -0.5) if accepted else ([2.0, 7.0], 2, 0.0, 0.0)
    assert after.losses.tolist() == pytest.approx(expected[0]) and after.halvings == expected[1]
    assert all(torch.equal(*both) for both in zip(after.pending, map(even, expected[2:])))
    assert torch.equal(after.x, even(0.375 if accepted else 0.5))


def updated(optimiser, pairs, iterate=None):
    """The iterate after updates by these correction pairs."""
    for pair in pairs:
        iterate = optimiser.update((iterate or Iterate(pair[0]))._replace(pending=tuple(pair)))
    return iterate


def drawn_pairs(count):
    """Correction pairs of a quadratic, (count, 2, 27)."""
    s = torch.randn(count, 27, generator=torch.Generator().manual_seed(0))
    return torch.stack([s, s @ coupled()[0]], dim=1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_pair_of_hardly_any_curvature_is_dropped_and_a_full_history_loses_its_oldest_alone(scale):
    """Curvature is a cosine, 1e-4 or more, whatever the lengths of the step and of the gradient's change."""
    optimiser, used, found = ProjectedLBFGS(SCALES, SCALES.mul, 2), [], None
    one, other = torch.eye(27)[:2]
    for cosine in (0.5e-4, 2e-4, 2e-4, 0.0, 2e-4):
        found = updated(optimiser, [(one / scale, scale * (cosine * one + other))], found)
        used.append(len(slots_of(found)))
    assert used == [0, 1, 2, 2, 2]


def test_an_infinite_first_loss_is_named(refuses):
    with refuses("the loss of the first image is inf"):
        begin(Iterate(even(0.5)), torch.tensor([math.inf, 7.0]), even(1.0))


def two_loops(vector, pairs, scales):
    """The inverse Hessian times a vector (Nocedal & Wright, algorithm 7.4), preconditioned by `scales`."""
    if not pairs:
        return 0.02 * scales * vector / (scales * vector).abs().mean()
    q, alphas = vector.clone(), []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q = q - alphas[-1] * y
    r = max((s @ y) / (y @ (scales * y)) for s, y in pairs) * scales * q
    for (s, y), alpha in zip(pairs, reversed(alphas)):
        r = r + s * (alpha - (y @ r) / (s @ y))
    return r


def test_l_bfgs_equals_the_textbook_recursion():
    """In its compact form; before there is a pair, with fewer than the history holds, and with more."""
    scales, vector = SCALES.double(), torch.randn(27, generator=torch.Generator().manual_seed(1)).double()
    optimiser, pairs, iterate = ProjectedLBFGS(vector, scales.mul, history_size=5), drawn_pairs(9).double(), None
    for count in range(10):
        if count:
            iterate = updated(optimiser, pairs[count - 1 : count], iterate)
        found = optimiser.matvec(vector, iterate or Iterate(vector))
        expected = two_loops(vector, [*pairs[max(0, count - 5) : count]], scales)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    dropped = updated(optimiser, [(pairs[3, 0], -pairs[3, 1])], iterate)  # of negative curvature
    assert dropped.pending == () and torch.equal(optimiser.matvec(vector, dropped), found)
    newest = optimiser.matvec(vector, keep_newest(iterate, 2))
    torch.testing.assert_close(newest, two_loops(vector, [*pairs[-2:]], scales), rtol=1e-9, atol=1e-12)
    one = updated(optimiser, pairs[:1])
    assert slots_of(keep_newest(one, 2)) == slots_of(one) == [0] and keep_newest(Iterate(vector), 2).curvature is None


def test_gradient_cosine_is_in_the_metric_of_the_preconditioner():
    up, aside, weights = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), torch.tensor([1.0, 3.0])
    assert gradient_cosine(up, aside, lambda x: x) == pytest.approx(0.6)
    assert gradient_cosine(up, aside, weights.mul) == pytest.approx(3 / 57**0.5)
    assert gradient_cosine(up, -2 * up, weights.mul) == pytest.approx(-1)


def by_the_host(objective, x, most, scales, history_size):
    """(image, loss) after each evaluation of the same descent, written with branches and lists."""

    def evaluate(x):
        image = x.clone().requires_grad_()
        loss = objective(image)[0]
        return loss.item(), torch.autograd.grad(loss, image)[0]

    (loss, gradient), pairs, halvings, found = evaluate(x), [], 0, []
    while len(found) < most:
        found.append((x, loss))
        if halvings == MAX_HALVINGS:
            if not pairs:
                break
            pairs, halvings = [], 0
        if not halvings:
            free = ~(((x <= 0) & (gradient > 0)) | ((x >= 1) & (gradient < 0)))
            direction = two_loops(-gradient * free, pairs, scales) * free
        trial = (x + direction / 2**halvings).clamp(0, 1)
        new_loss, new_gradient = evaluate(trial)
        halvings += 1
        if new_loss < loss:
            s, y = trial - x, new_gradient - gradient
            if s @ y > 1e-4 * s.norm() * y.norm():
                pairs = [*pairs, (s, y)][-history_size:]
            x, loss, gradient, halvings = trial, new_loss, new_gradient, 0
    return found


def plain(image, count):
    return 0.0


def refusing(image, count):
    return math.nan if 7 * image.sum() % 1 < 0.4 else 0.0


def closing(image, count):
    """From the ninth evaluation on, none is lower."""
    return 1e6 * (count >= 9)


@pytest.mark.parametrize("history_size, at_once", [(3, False), (20, False), (3, True), (20, True)])
@pytest.mark.parametrize("more, least, most", [(plain, 0, 3), (refusing, 15, 25), (closing, 16, 17)])
def test_a_descent_without_branches_is_that_with_branches(more, least, most, history_size, at_once):
    """In float64, to 1e-9. Rounding grows, so for thirty evaluations; least, most: how many refuse the step.

    at_once: by what a CUDA graph would hold.
    """
    matrix, target = (part.double() for part in coupled(seed=2))
    counts = itertools.count(), itertools.count()

    def objective(image, count):
        return quadratic(matrix, target)(image) + more(image.detach(), next(count))

    def evaluate(x):
        image = x.clone().requires_grad_()
        losses = objective(image, counts[0])
        return losses.detach(), torch.autograd.grad(losses[0], image)[0]

    scales, start = SCALES.double(), torch.full((27,), 0.5, dtype=torch.float64)
    optimiser, iterate, halved = ProjectedLBFGS(start, scales.mul, history_size), Iterate(start), 0
    expected = by_the_host(lambda image: objective(image, counts[1]), start, 30, scales, history_size)
    whole = functools.partial(optimiser.step_in_tensors, 0.0, evaluate)

    def step(iterate):
        at_first = iterate.losses is None
        return optimiser.step_with(whole, iterate) if at_once and not at_first else optimiser.step(iterate, evaluate)

    for x, loss in expected:
        iterate = step(iterate)
        torch.testing.assert_close(iterate.x, x, rtol=1e-9, atol=1e-9)
        assert iterate.losses[0].item() == pytest.approx(loss, rel=1e-9)
        halved += (iterate.halvings > 0).item()
    assert least <= halved <= most
    assert (len(expected) < 30) is (step(iterate) is None) is (more is closing)


def test_between_two_evaluations_no_value_is_asked_for():
    """So a GPU need not wait, and a CUDA graph can hold it: the device "meta" has no values, and refuses."""
    x = torch.empty(27, device="meta")
    optimiser = ProjectedLBFGS(x, torch.empty(27, device="meta").mul, 3, "meta")
    losses, halvings = torch.empty(2, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    iterate = Iterate(x, losses, x, halvings, (x, x))
    for _ in range(2):
        found, trial, downhill = optimiser.propose(optimiser.update(iterate))
        iterate = accept(found, trial, losses, x, 0.0)
        assert iterate.x.shape == (27,) and iterate.curvature.sy.shape == (3, 3) and downhill.shape == ()
    with pytest.raises(RuntimeError, match="meta"):
        bool(downhill)


def test_correction_pairs_serve_the_next_objective():
    """`begin` keeps them, and forgets the step that was being halved."""
    matrix, target = coupled()
    evaluate = evaluation(quadratic(matrix, target), torch.zeros(1, 3, 3, 3))
    optimiser, best = ProjectedLBFGS(target, identity), evaluate(projected_solution(matrix, target).float())[0][0]

    def steps(iterate, count):
        return steps(optimiser.step(iterate, evaluate), count - 1) if count else iterate

    warm = steps(Iterate(even(0.5)), 6)
    warm = begin(warm._replace(halvings=torch.tensor(3)), *evaluate(warm.x))
    assert warm.halvings == 0
    warm_loss, cold_loss = steps(warm, 5).losses[0], steps(Iterate(warm.x), 6).losses[0]
    assert warm_loss - best < 0.5 * (cold_loss - best)


@pytest.mark.parametrize("history_size", [5, 8, 9, 12])
def test_correction_pairs_can_be_stored_and_loaded(history_size):
    """Exactly into a history of the same size or a larger; into a smaller as if it had seen the newest pairs only."""
    pairs, stored = drawn_pairs(16), ProjectedLBFGS(SCALES, SCALES.mul, 9)
    same, other = (ProjectedLBFGS(SCALES, SCALES.mul, history_size) for _ in range(2))
    found = other.load_state_dict(stored.state_dict(updated(stored, pairs[:13])))
    expected = updated(same, pairs[13 - min(history_size, 9) : 13])
    for more in (pairs[:0], pairs[13:]):  # and it goes on, in the place of the oldest
        found, expected = updated(other, more, found), updated(same, more, expected)
        torch.testing.assert_close(other.matvec(SCALES, found), same.matvec(SCALES, expected))


def test_a_step_can_be_done_again_where_it_was_interrupted_or_elsewhere_from_what_was_stored():
    """Also with a full history, whose oldest pair an update writes over, and where a step has been refused."""
    chance, interrupted = random.Random(0), set()

    def interrupting(function):
        def called(x):
            if chance.random() < 0.4:
                interrupted.add(function)
                raise KeyboardInterrupt
            return function(x)

        return called

    def insist(action):
        while True:
            try:
                return action()
            except KeyboardInterrupt:
                pass

    undisturbed, evaluate = (
        descend(striped, even(0.5), 30, SCALES.mul, 3),
        evaluation(striped, torch.zeros(1, 3, 3, 3)),
    )
    optimiser, other = (ProjectedLBFGS(SCALES, each, 3) for each in (interrupting(SCALES.mul), SCALES.mul))
    iterate, again = Iterate(even(0.5)), interrupting(evaluate)
    for expected in undisturbed:
        stored = insist(lambda iterate=iterate: optimiser.state_dict(iterate))
        elsewhere = other.step(other.load_state_dict(stored), evaluate)
        insist(lambda iterate=iterate: optimiser.update(iterate))  # and what it returns is lost
        found = insist(lambda iterate=iterate: optimiser.step(iterate, again))
        for iterate in (elsewhere, found):
            assert all(torch.equal(iterate[k], expected[k]) for k in range(4))
            assert slots_of(iterate) == slots_of(expected)
    found = {(iterate.halvings.item(), len(slots_of(iterate))) for iterate in undisturbed}
    assert len(interrupted) == 2 and {(0, 3), (1, 3)} <= found


def test_nan_now_and_then_is_stepped_around_and_the_correction_pair_is_of_the_step_that_was_taken():
    """Halved and clamped, if it was."""
    iterates, best = descend(striped, even(0.5), 40), quadratic(*coupled())(projected_solution(*coupled()).float())
    assert iterates[-1].losses[0].item() == pytest.approx(best[0].item(), rel=1e-4)
    taken = [(before, after) for before, after in itertools.pairwise(iterates[:30]) if not after.halvings]
    assert any(before.halvings and (after.x % 1 == 0).any() for before, after in taken)
    for before, after in taken:
        assert torch.equal(after.pending[0], after.x - before.x)
        assert torch.equal(after.pending[1], after.gradient - before.gradient)
