import math

import pytest
import torch
from quadratics import coupled, evaluation, quadratic, whole

import nst_utils as nst
from nst_utils import FIRST_FIVE
from style_transfer.engine.evaluation import evaluator, pick_precisions
from style_transfer.engine.objective import Task, as_task, objective_of
from style_transfer.engine.run import Run
from style_transfer.engine.tiles import Objective
from style_transfer.engine.vgg import cut_network

GPU = torch.device("cuda", 0)


def test_an_evaluation_leaves_its_argument_alone():
    matrix, target = coupled()
    evaluate = evaluation(quadratic(matrix, target), torch.zeros(1, 3, 3, 3))
    x = torch.rand(27)
    before = x.clone()
    losses, gradient = evaluate(x)
    assert torch.equal(x, before)
    assert losses[0] == pytest.approx(((x - target) @ matrix @ (x - target)).item(), rel=1e-4)
    torch.testing.assert_close(gradient, 2 * matrix @ (x - target), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "threads"), [((90, 110), 1), ((90, 120), 3)])
def test_a_small_image_is_evaluated_on_one_thread_and_the_number_comes_back(shape, threads):
    found, present = [], torch.get_num_threads()

    def statistics(part, tile):
        found.append(torch.get_num_threads())
        if part.sum() > 1e9:
            raise KeyboardInterrupt
        return [part.square().sum()]

    image = torch.zeros(1, 3, *shape)
    torch.set_num_threads(3)
    try:
        evaluate = evaluator(
            Objective(statistics, lambda found, weights: found[0][None], whole(image)), shape, image.device
        )
        evaluate(torch.zeros(image.numel()), torch.ones(1))
        assert found == [threads] and torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt):
            evaluate(torch.full((image.numel(),), 1e9), torch.ones(1))
        assert found == [threads] * 2 and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(present)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_replayed_graph_gives_the_losses_and_gradient_of_the_cpu(vgg, content, style):
    found, shape = [], tuple(content.shape[-2:])
    for device in (torch.device("cpu"), GPU):
        image, task = (
            content.to(device),
            Task(content.to(device), style.to(device), ("conv1_2",), dict.fromkeys(FIRST_FIVE, 1.0)),
        )
        objective = objective_of(cut_network(vgg, "conv3_1", device, "float32"), task, shape, math.inf)
        evaluate = evaluator(objective, shape, device)
        evaluate(image.flatten(), torch.ones(7))
        losses, gradient = evaluate(image.flatten() * 0.5, task.weights)
        found.append((losses.cpu(), gradient.cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-2, atol=0.01 * found[0][1].abs().max().item())


CASES = [  # (content weight, style weight): as usual; derivatives too small for float16, and much too large
    (1.0, 1e4), (1e-3, 1.0), (1.0, 1e9),
]  # fmt: skip


def in_precision(vgg, task, image, precision):
    """(losses, gradient, how often the network was run) of two evaluations, the second elsewhere."""
    network, runs = cut_network(vgg, "conv3_1", torch.device("cpu"), precision), []
    objective = objective_of(network, task, tuple(image.shape[-2:]), math.inf)
    network.conv1_1.register_forward_hook(lambda *_: runs.append(1))
    evaluate, found = evaluator(objective, image.shape[-2:], image.device, precision), []
    for x in (image.flatten(), 1 - image.flatten()):
        runs.clear()
        found.append((*evaluate(x.clamp(min=0), task.weights), len(runs)))
    return found


@pytest.mark.parametrize("weights", CASES)
def test_float16_gives_the_losses_and_gradient_of_float32(weights, vgg, picture):
    """Its range is from 6e-8 to 65,504: sums for Gram matrices are in float32, and derivatives scaled."""
    content, style, image = picture(40, 48), picture(26, 24, seed=1), picture(40, 48, seed=2)
    task = as_task(Task(content, style, ("conv1_2",), FIRST_FIVE, *weights))
    assert (nst.features(vgg, image, "conv1_2")["conv1_2"].square().sum((2, 3)) > 65504).any()
    expected, found = (in_precision(vgg, task, image, precision) for precision in ("float32", "float16"))
    for (losses, gradient, runs), (losses_16, gradient_16, _) in zip(expected, found):
        torch.testing.assert_close(losses_16, losses, rtol=3e-3, atol=0)
        assert torch.cosine_similarity(gradient_16, gradient, dim=0) > 0.999
        assert gradient_16.norm() / gradient.norm() == pytest.approx(1, rel=0.01) and runs == 1
    assert [runs > 1 for *_, runs in found] == [weights != CASES[1], False]  # a scale is found once


def test_a_loss_that_is_not_finite_in_float16_is_no_matter_of_scale(vgg, picture):
    """The step to it is refused, and the next is evaluated once."""
    task = as_task(Task(picture(24, 28), None, ("conv1_2",)))
    (losses, _, runs), (_, gradient, again) = in_precision(vgg, task, torch.full((1, 3, 24, 28), 1e5), "float16")
    assert losses[0].isnan() and runs == again == 1 and gradient.isfinite().all()


def test_a_gradient_that_no_scale_makes_finite_leaves_the_scale_as_it_was():
    """The root has none at 0. Later gradients are right again, at the first try."""
    seen = []

    def statistics(part, tile):
        seen.append(part)
        return [part.sqrt().sum()]

    image = torch.zeros(1, 3, 2, 2)
    objective = Objective(statistics, lambda found, weights: weights * found[0], whole(image))
    evaluate = evaluator(objective, (2, 2), image.device, "float16")
    losses, gradient = evaluate(image.flatten(), torch.ones(1))
    assert losses == 0 and not gradient.isfinite().any()
    seen.clear()
    losses, gradient = evaluate(torch.full((12,), 0.25), torch.ones(1))
    assert losses == 6 and gradient.tolist() == [1.0] * 12 and len(seen) == 1


def test_a_run_in_float16_ends_as_one_in_float32(vgg, picture):
    task = Task(picture(24, 28), picture(26, 24, seed=1), ("conv1_2",), FIRST_FIVE)
    ends = []
    for precision in ("float32", "float16"):
        run = Run(task, init="content", vgg=vgg, precision=precision, evaluations=40)
        while step := run.step():
            last = step
        ends.append(last)
    assert ends[1].total == pytest.approx(ends[0].total, rel=0.01) and ends[1] != ends[0]


def test_precision_is_chosen_by_the_machine():
    cpu = torch.device("cpu")
    assert pick_precisions(cpu, "float16") == ("float16",)
    assert pick_precisions(cpu) in (("float32",), ("bfloat16", "float32"))
    assert pick_precisions(cpu, "float32") == ("float32",)
    assert pick_precisions(cpu, "bfloat16") == ("bfloat16",)
