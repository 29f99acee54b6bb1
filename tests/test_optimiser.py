import itertools
import math

import pytest
import torch
from quadratics import coupled, evaluation, projected_solution, quadratic

from nst_engine.optimiser import MAX_HALVINGS, Iterate, ProjectedLBFGS, accept, begin


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


def never_rises(iterates):
    return all(after.losses[0] <= before.losses[0] for before, after in itertools.pairwise(iterates))


def test_a_separable_quadratic_reaches_the_clamped_target():
    target = torch.linspace(-0.5, 1.5, 27)
    last = descend(quadratic(torch.diag(torch.linspace(1, 5, 27)), target), even(0.5), 80)[-1]
    torch.testing.assert_close(last.x, target.clamp(0, 1), atol=1e-3, rtol=0)
    assert len(last.losses) == 2


@pytest.mark.parametrize("precondition", [identity, torch.linspace(0.5, 2, 27).mul], ids=["plain", "preconditioned"])
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
    assert iterates[-1].losses[0] == pytest.approx((gap @ matrix.double() @ gap).item(), rel=1e-4)
    assert never_rises(iterates)
    assert all(0 <= image.min() and image.max() <= 1 for image in seen)  # false for NaN as well
    assert torch.equal(start, before)


def test_pixels_pushed_out_of_range_stay_at_their_bound():
    """[two-metric]: a correction pair must not move them back inside, against their gradient."""
    matrix, target = coupled()
    seen, held = [], 0
    for iterate, trial in zip(descend(quadratic(matrix, target, seen), even(0.5), 60), seen[1:]):
        gradient = 2 * matrix @ (iterate.x - target)
        blocked = ((iterate.x <= 0) & (gradient > 1e-4)) | ((iterate.x >= 1) & (gradient < -1e-4))
        assert torch.equal(trial[blocked], iterate.x[blocked])
        held += blocked.sum().item()
    assert held > 0


def test_losses_and_gradient_are_those_at_the_iterate():
    matrix, target = coupled()
    for iterate in descend(quadratic(matrix, target), even(0.5), 40):
        assert quadratic(matrix, target)(iterate.x).tolist() == iterate.losses
        torch.testing.assert_close(iterate.gradient, 2 * matrix @ (iterate.x - target), atol=1e-4, rtol=1e-4)


def test_the_first_step_is_down_the_preconditioned_gradient_by_a_fiftieth_on_average():
    matrix, target = coupled()
    seen, scales = [], torch.linspace(0.5, 2, 27)
    descend(quadratic(matrix, target, seen), even(0.5), 2, scales.mul)
    down = -scales * (matrix @ (even(0.5) - target))
    torch.testing.assert_close(seen[1] - seen[0], 0.02 * down / down.abs().mean(), atol=1e-6, rtol=1e-4)


def test_refused_steps_are_halved_then_the_correction_pairs_are_discarded_then_the_end():
    """An objective that cannot be lowered any more after six evaluations; each step is one evaluation."""
    seen = []

    def objective(image):
        losses = quadratic(*coupled(), seen)(image)
        return losses + 1e6 * (len(seen) > 6)

    iterates = descend(objective, even(0.5), 100)
    assert len(iterates) == len(seen) == 6 + 2 * MAX_HALVINGS
    assert iterates[6].slots and not iterates[-1].slots and never_rises(iterates)
    assert torch.equal(iterates[-1].x, seen[5])
    for trials in (seen[6 : 6 + MAX_HALVINGS], seen[6 + MAX_HALVINGS :]):
        inside = (trials[0] > 0) & (trials[0] < 1)
        assert inside.any()
        for before, after in itertools.pairwise(trials):
            torch.testing.assert_close((after - seen[5])[inside], (before - seen[5])[inside] / 2, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "start, target",
    [(even(0.25), even(0.25)), (torch.arange(27) % 2.0, 3 * (torch.arange(27) % 2.0) - 1)],
    ids=["the minimum", "every pixel pushed out of range"],
)
def test_a_start_from_which_nothing_is_downhill_stays_and_ends(start, target):
    (only,) = descend(quadratic(torch.eye(27), target), start, 50)
    assert torch.equal(only.x, start)


def test_nan_after_the_first_evaluation_leaves_the_image_alone():
    seen = []

    def objective(image):
        losses = quadratic(torch.eye(27), even(0.0), seen)(image)
        return losses if len(seen) == 1 else losses * math.nan

    iterates = descend(objective, even(0.5), 50)
    assert len(iterates) == 1 + MAX_HALVINGS
    assert all(torch.equal(iterate.x, even(0.5)) and math.isfinite(iterate.losses[0]) for iterate in iterates)


def test_nan_now_and_then_is_stepped_around():
    seen = []

    def objective(image):
        losses = quadratic(torch.eye(27), even(0.9), seen)(image)
        return losses * math.nan if len(seen) % 3 == 0 else losses

    iterates = descend(objective, even(0.1), 40)
    assert iterates[-1].x.isfinite().all() and iterates[-1].losses[0] < 1e-3 * iterates[0].losses[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_first_loss_that_is_not_finite_is_refused(loss, refuses):
    with refuses(ValueError, f"{loss}"):
        ProjectedLBFGS(even(0.5), identity).step(Iterate(even(0.5)), lambda x: ([loss], x))


@pytest.mark.parametrize("loss, accepted", [(2.0, False), (2.009, True), (2.021, False), (math.nan, False)])
def test_a_loss_may_rise_by_its_relative_tolerance(loss, accepted):
    tolerance = 0.0 if loss == 2.0 else 0.01
    before = begin(Iterate(even(0.5)), [2.0, 7.0], even(1.0))._replace(direction=even(-0.25), halvings=1)
    after = accept(before, even(0.375), [loss, 6.0], even(0.5), tolerance)
    if accepted:
        assert torch.equal(after.x, even(0.375)) and after.losses == [loss, 6.0] and after.direction is None
        assert after.halvings == 0 and torch.equal(torch.stack(after.pending), torch.stack([even(-0.125), even(-0.5)]))
    else:
        assert after == before._replace(halvings=2)


def updated(optimiser, pairs, iterate=None):
    """The iterate after updates by these correction pairs."""
    for pair in pairs:
        iterate = optimiser.update((iterate or Iterate(pair[0]))._replace(pending=tuple(pair)))
    return iterate


def drawn_pairs(count):
    """Correction pairs of a quadratic, (count, 2, 27)."""
    s = torch.randn(count, 27, generator=torch.Generator().manual_seed(0))
    return torch.stack([s, s @ coupled()[0]], dim=1)


def test_l_bfgs_equals_the_textbook_recursion():
    """The compact form gives the direction of the two-loop recursion (Nocedal & Wright, algorithm 7.4)."""
    scales, gradient = torch.rand(2, 27, generator=torch.Generator().manual_seed(1)) + 0.5
    optimiser, pairs = ProjectedLBFGS(gradient, scales.mul, history_size=5), drawn_pairs(9)
    iterate = updated(optimiser, pairs)  # more than the history holds
    negative = torch.stack([pairs[3, 0], -pairs[3, 1]])
    iterate = updated(optimiser, [negative], iterate)  # a pair of negative curvature is dropped
    assert iterate.pending == ()

    q, alphas = gradient.clone(), []
    for s, y in pairs[-5:].flip(0):
        alphas.append((s @ q) / (s @ y))
        q -= alphas[-1] * y
    r = max((s @ y) / (y @ (scales * y)) for s, y in pairs[-5:]) * scales * q
    for (s, y), alpha in zip(pairs[-5:], reversed(alphas)):
        r += s * (alpha - (y @ r) / (s @ y))
    torch.testing.assert_close(optimiser.matvec(gradient, iterate), r, rtol=1e-3, atol=1e-4)


def test_correction_pairs_serve_the_next_objective():
    """`begin` keeps them, and forgets the step that was being halved."""
    matrix, target = coupled()
    optimiser, evaluate = (
        ProjectedLBFGS(target, identity),
        evaluation(quadratic(matrix, target), torch.zeros(1, 3, 3, 3)),
    )

    def loss_after(iterate):
        for _ in range(5):
            iterate = optimiser.step(iterate, evaluate)
        return iterate.losses[0]

    warm = Iterate(even(0.5))
    for _ in range(6):
        warm = optimiser.step(warm, evaluate)
    warm = begin(warm._replace(direction=even(1.0), halvings=3), *evaluate(warm.x))
    assert warm.direction is None and warm.halvings == 0
    least = quadratic(matrix, target)(projected_solution(matrix, target).float())[0].item()
    warm, cold = loss_after(warm), loss_after(begin(Iterate(warm.x), *evaluate(warm.x)))
    assert warm - least < 0.5 * (cold - least)


@pytest.mark.parametrize("history_size", [5, 9, 12])
def test_correction_pairs_can_be_stored_and_loaded(history_size):
    """Exactly into a history of the same size or a larger; into a smaller as if it had seen the newest pairs only."""
    pairs, scales = drawn_pairs(16), torch.linspace(0.5, 2, 27)
    optimiser, same, other = (ProjectedLBFGS(scales, scales.mul, size) for size in (9, history_size, history_size))
    iterate = updated(optimiser, pairs[:13])
    expected = updated(same, pairs[13 - min(history_size, 9) : 13])
    found = other.load_state_dict(optimiser.state_dict(iterate))
    for more in (pairs[:0], pairs[13:]):  # and it goes on, in the place of the oldest
        found, expected = updated(other, more, found), updated(same, more, expected)
        torch.testing.assert_close(other.matvec(scales, found), same.matvec(scales, expected))


def test_all_of_an_iterate_can_be_stored_and_loaded():
    """At each of its evaluations, among them the first, refused ones and some with a pending correction pair."""
    matrix, target = coupled()
    start, seen = even(0.5), []

    def objective(image):
        losses = quadratic(matrix, target, seen)(image)
        return losses + 1e6 * (len(seen) in (4, 8, 9))

    optimiser, evaluate = ProjectedLBFGS(start, identity, 4), evaluation(objective, start.view(1, 3, 3, 3))
    iterate, kinds = Iterate(start), set()
    for _ in range(14):
        kinds.add((iterate.losses is None, iterate.halvings, len(iterate.pending), len(iterate.slots)))
        other = ProjectedLBFGS(start, identity, 4)
        loaded = other.load_state_dict(optimiser.state_dict(iterate))
        count = len(seen)
        after = optimiser.step(iterate, evaluate)
        del seen[count:]
        again = other.step(loaded, evaluate)
        assert torch.equal(again.x, after.x) and again.losses == after.losses and again.halvings == after.halvings
        iterate = after
    assert kinds >= {(True, 0, 0, 0), (False, 0, 0, 0), (False, 1, 0, 2), (False, 2, 0, 4), (False, 0, 2, 4)}


def test_a_step_that_is_interrupted_anywhere_can_be_done_again():
    """Also with a full history, whose oldest pair an update writes over."""
    interrupted = []

    def interrupting(function):
        calls = itertools.count(1)

        def called(x):
            if next(calls) % 2:
                interrupted.append(function)
                raise KeyboardInterrupt
            return function(x)

        return called

    start, scales = even(0.5), torch.linspace(0.5, 2, 27)
    plain = descend(quadratic(*coupled()), start, 20, scales.mul, 3)
    optimiser = ProjectedLBFGS(start, interrupting(scales.mul), 3)
    evaluate, iterate = interrupting(evaluation(quadratic(*coupled()), start.view(1, 3, 3, 3))), Iterate(start)
    for expected in plain:
        while True:
            try:
                optimiser.update(iterate)  # and what it returns is lost
                iterate = optimiser.step(iterate, evaluate)
                break
            except KeyboardInterrupt:
                pass
        assert torch.equal(iterate.x, expected.x) and iterate.slots == expected.slots
    assert len(expected.slots) == 3 and len(interrupted) > 40


def test_the_correction_pair_is_of_the_step_that_was_taken():
    """Halved and clamped, if it was."""
    start, seen = even(0.5), []

    def objective(image):
        losses = quadratic(*coupled(), seen)(image)
        return losses + 1e6 * (len(seen) in (4, 9))

    optimiser, evaluate = ProjectedLBFGS(start, identity, 30), evaluation(objective, start.view(1, 3, 3, 3))
    before, taken, kinds = optimiser.step(Iterate(start), evaluate), [], set()
    for _ in range(20):
        after = optimiser.step(before, evaluate)
        if after.x is not before.x:
            kinds.add((before.halvings > 0, ((after.x == 0) | (after.x == 1)).any().item()))
            taken.append((after.x - before.x, after.gradient - before.gradient))
        before = after
    state = optimiser.state_dict(optimiser.update(before))
    assert len(taken) == len(state["s"]) and {(True, False), (False, True)} <= kinds
    for name, expected in zip("sy", zip(*taken)):
        assert torch.equal(state[name], torch.stack(expected))
