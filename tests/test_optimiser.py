import itertools
import math

import pytest
import torch
from quadratics import coupled, evaluation, projected_solution, quadratic

from nst_engine.optimiser import InverseCurvature, projected_lbfgs


def non_increasing(losses):
    return all(after <= before for before, after in itertools.pairwise(losses))


def identity(x):
    return x


def minimise(objective, start, memory=20, precondition=identity, curvature=None):
    """(picture, losses) after each evaluation; objective: picture (1, 3, H, W) -> losses."""
    evaluate = evaluation(objective, start)
    curvature = curvature or InverseCurvature(precondition, start.flatten(), memory)
    for x, losses, _ in projected_lbfgs(evaluate, start.flatten(), curvature):
        yield x.view_as(start), losses


def test_a_separable_quadratic_reaches_the_clamped_target():
    target = torch.linspace(-0.5, 1.5, 27)
    matrix = torch.diag(torch.linspace(1, 5, 27))
    *_, (image, losses) = itertools.islice(minimise(quadratic(matrix, target), torch.full((1, 3, 3, 3), 0.5)), 80)
    torch.testing.assert_close(image.flatten(), target.clamp(0, 1), atol=1e-3, rtol=0)
    assert len(losses) == 2


@pytest.mark.parametrize("precondition", [identity, torch.linspace(0.5, 2, 27).mul], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("memory", [3, 20])
def test_a_coupled_quadratic_reaches_the_projected_solution(memory, precondition):
    matrix, target = coupled()
    solution = projected_solution(matrix, target)
    # Clamping the unconstrained minimum is not the answer here, so a step has to take the bounds into account.
    assert (solution - target.double().clamp(0, 1)).abs().max() > 0.05
    seen = []
    start = torch.rand(1, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    before = start.clone()
    run = list(itertools.islice(minimise(quadratic(matrix, target, seen), start, memory, precondition), 300))
    image, losses = run[-1]
    torch.testing.assert_close(image.flatten().double(), solution, atol=5e-3, rtol=0)
    gap = solution - target.double()
    assert losses[0] == pytest.approx((gap @ matrix.double() @ gap).item(), rel=1e-4)
    assert non_increasing([losses[0] for _, losses in run])
    assert all(0 <= picture.min() and picture.max() <= 1 for picture in seen)  # false for NaN as well
    assert torch.equal(start, before)


def test_pixels_pushed_out_of_range_stay_at_their_bound():
    """[two-metric]: a curvature pair must not move them back inside, against their gradient."""
    matrix, target = coupled()
    seen, held = [], 0
    run = list(itertools.islice(minimise(quadratic(matrix, target, seen), torch.full((1, 3, 3, 3), 0.5)), 60))
    for (image, _), trial in zip(run, seen[1:]):
        x = image.flatten()
        gradient = 2 * matrix @ (x - target)
        blocked = ((x <= 0) & (gradient > 1e-4)) | ((x >= 1) & (gradient < -1e-4))
        assert torch.equal(trial.flatten()[blocked], x[blocked])
        held += blocked.sum().item()
    assert held > 0


def test_what_is_yielded_belongs_together():
    matrix, target = coupled()
    objective = quadratic(matrix, target)
    for image, losses in itertools.islice(minimise(objective, torch.full((1, 3, 3, 3), 0.5)), 40):
        assert image.shape == (1, 3, 3, 3) and not image.requires_grad
        assert objective(image).tolist() == losses


def test_an_evaluation_is_yielded_once_also_when_steps_fail():
    """An objective that cannot be lowered any more after a while: steps are halved, memory dropped, then the end."""
    matrix, target = coupled()
    seen = []

    def objective(image):
        losses = quadratic(matrix, target, seen)(image)
        return losses + 1e6 if len(seen) > 6 else losses

    run = []
    for pair in minimise(objective, torch.full((1, 3, 3, 3), 0.5)):
        run.append(pair)
        assert len(run) == len(seen)
        assert len(run) < 100
    assert len(seen) > 6 + 8  # it tried a fresh start before it gave up
    assert non_increasing([losses[0] for _, losses in run])


def test_a_refused_step_is_tried_half_as_long():
    seen = []

    def objective(image):
        losses = quadratic(torch.eye(27), torch.full((27,), 0.9), seen)(image)
        return losses + 100 * (len(seen) in (2, 3))

    start = torch.full((1, 3, 3, 3), 0.3)
    list(itertools.islice(minimise(objective, start), 4))
    first, second, third = (picture.flatten() - start.flatten() for picture in seen[1:4])
    torch.testing.assert_close([second, third], [first / 2, first / 4])


def test_a_start_that_is_the_minimum_stays_and_ends():
    seen = []
    start = torch.full((1, 3, 3, 3), 0.25)
    run = list(itertools.islice(minimise(quadratic(torch.eye(27), torch.full((27,), 0.25), seen), start), 50))
    assert len(run) < 50 and torch.equal(run[-1][0], start)
    assert all(picture.isfinite().all() for picture in seen)  # a zero gradient must not become a NaN step


def test_bounds_that_block_every_pixel_end_the_run():
    target = torch.cat([torch.full((13,), -1.0), torch.full((14,), 2.0)])
    corner = target.clamp(0, 1).view(1, 3, 3, 3)
    run = list(itertools.islice(minimise(quadratic(torch.eye(27), target), corner), 50))
    assert len(run) < 50 and torch.equal(run[-1][0], corner)


def test_nan_after_the_first_evaluation_leaves_the_picture_alone():
    seen = []

    def objective(image):
        losses = quadratic(torch.eye(27), torch.zeros(27), seen)(image)
        return losses if len(seen) == 1 else losses * math.nan

    start = torch.full((1, 3, 3, 3), 0.5)
    run = list(itertools.islice(minimise(objective, start), 50))
    assert 1 < len(run) < 50
    assert all(torch.equal(image, start) and math.isfinite(losses[0]) for image, losses in run)


def test_nan_now_and_then_is_stepped_around():
    seen = []

    def objective(image):
        losses = quadratic(torch.eye(27), torch.full((27,), 0.9), seen)(image)
        return losses * math.nan if len(seen) % 3 == 0 else losses

    start = torch.full((1, 3, 3, 3), 0.1)
    run = list(itertools.islice(minimise(objective, start), 40))
    assert run[-1][0].isfinite().all() and run[-1][1][0] < 1e-3 * run[0][1][0]


def test_l_bfgs_equals_the_textbook_recursion():
    """The compact form gives the direction of the two-loop recursion (Nocedal & Wright, algorithm 7.4)."""
    generator = torch.Generator().manual_seed(0)
    matrix, _ = coupled()
    scales = torch.rand(27, generator=generator) + 0.5
    curvature = InverseCurvature(scales.mul, torch.zeros(27), memory=5)
    pairs = []
    for _ in range(9):  # more than the memory holds
        s = torch.randn(27, generator=generator)
        curvature.learn(s, matrix @ s)
        pairs = [*pairs, (s, matrix @ s)][-5:]
    curvature.learn(s, -s)  # negative curvature is not taken in
    gradient = torch.randn(27, generator=generator)

    q, alphas = gradient.clone(), []
    for s, y in reversed(pairs):
        alphas.append((s @ q) / (s @ y))
        q -= alphas[-1] * y
    r = max((s @ y) / (y @ (scales * y)) for s, y in pairs) * scales * q
    for (s, y), alpha in zip(pairs, reversed(alphas)):
        r += s * (alpha - (y @ r) / (s @ y))
    torch.testing.assert_close(curvature.times(gradient), r, rtol=1e-3, atol=1e-4)


def test_curvature_is_kept_from_one_objective_to_the_next():
    matrix, target = coupled()
    start = torch.full((1, 3, 3, 3), 0.5)
    curvature = InverseCurvature(identity, start.flatten())
    (*_, (image, _)) = itertools.islice(minimise(quadratic(matrix, target), start, curvature=curvature), 6)
    warm = list(itertools.islice(minimise(quadratic(matrix, target), image, curvature=curvature), 5))
    cold = list(itertools.islice(minimise(quadratic(matrix, target), image), 5))
    best = quadratic(matrix, target)(projected_solution(matrix, target).float())[0].item()
    assert warm[-1][1][0] - best < 0.5 * (cold[-1][1][0] - best)


@pytest.mark.parametrize("memory", [5, 9])
def test_what_was_learned_can_be_stored_and_known_again(memory):
    """By one of the same memory exactly; by one of a smaller as if it had seen the latest pairs only."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(12, 2, 30, generator=generator)
    steps[:, 1] = 2 * steps[:, 0] + 0.1 * steps[:, 1]
    old = InverseCurvature(torch.linspace(0.5, 2, 30).mul, steps[0, 0], 9)
    same = InverseCurvature(old.precondition, steps[0, 0], memory)
    for k, (s, y) in enumerate(steps):
        old.learn(s, y)
        if k >= len(steps) - memory:
            same.learn(s, y)
    new = InverseCurvature(old.precondition, steps[0, 0], memory)
    new.load(old.state())
    vector = torch.randn(30, generator=generator)
    torch.testing.assert_close(new.times(vector), same.times(vector))
    for s, y in steps[:3].flip(2):  # and it learns on, in the place of the oldest
        new.learn(s, y)
        same.learn(s, y)
    torch.testing.assert_close(new.times(vector), same.times(vector))


def test_what_is_learned_is_the_step_that_was_taken():
    """Halved and clamped, if it was."""
    learned, passed = [], []

    class Noted(InverseCurvature):
        def learn(self, s, y):
            learned.append((s, y))
            super().learn(s, y)

    matrix, target = coupled()
    start = torch.full((1, 3, 3, 3), 0.5)
    run = projected_lbfgs(
        evaluation(quadratic(matrix, target), start), start.flatten(), Noted(identity, start.flatten())
    )
    for x, _, gradient in itertools.islice(run, 30):
        if not passed or x is not passed[-1][0]:
            passed.append((x, gradient))
    assert len(learned) == len(passed) - 1 > 5 and any((x == 0).any() or (x == 1).any() for x, _ in passed)
    for (s, y), (before, after) in zip(learned, itertools.pairwise(passed)):
        torch.testing.assert_close(s, after[0] - before[0])
        torch.testing.assert_close(y, after[1] - before[1])
