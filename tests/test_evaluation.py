"""An evaluation: how straight the way to the network is, in which precision, on how many threads, on which device."""

import inspect
import math
from pathlib import Path

import pytest
import torch

import style_transfer
from nst_utils import FIRST_FIVE, Run, Task
from style_transfer.engine.evaluation import Evaluator, pick_precisions
from style_transfer.engine.objective import objective_of
from style_transfer.engine.tiles import losses_and_gradient

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PACKAGE = Path(style_transfer.__file__).parent


def test_an_evaluation_is_of_flat_images_and_leaves_them_alone(vgg, content, style):
    shape, task = tuple(content.shape[-2:]), Task(content, style, ("conv1_2",), {"conv1_1": 1.0, "conv2_1": 2.0})
    objective = objective_of(vgg.cut("conv2_1", CPU, "float32"), task, shape, shape, math.inf)
    evaluator, x = Evaluator(objective, shape, CPU, "float32"), style.new_full((content.numel(),), 0.3)
    losses, gradient = evaluator(task.weights, x)
    assert torch.equal(x, torch.full_like(x, 0.3)) and not x.requires_grad and x.grad is None
    assert losses.shape == (3,) and not losses.requires_grad and gradient.shape == x.shape
    expected = losses_and_gradient(objective, x.view_as(content), task.weights)
    assert torch.equal(losses, expected[0]) and torch.equal(gradient.view_as(content), expected[1])


def test_an_evaluation_passes_at_most_eight_frames_of_our_own_from_step_to_network(watch, vgg, picture):
    chains = []

    def note(output):
        frames = inspect.stack(context=0)
        chains.append([frame.function for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)])

    watch.change = note
    run = Run(Task(picture(24, 28), picture(26, 24, 1), "conv1_2", FIRST_FIVE), vgg=vgg, coarse_to_fine=False)
    run.step()
    chains.clear()
    run.step()
    (chain,) = chains
    assert (chain[0], chain[-1]) == ("feature_maps", "step") and len(chain[1:-1]) <= 8, chain


@pytest.mark.parametrize("shape, threads", [((90, 110), 1), ((90, 120), 3)])
def test_a_small_image_is_evaluated_on_one_thread_and_afterwards_all_are_back(shape, threads, watch, vgg, picture):
    counts, present = [], torch.get_num_threads()

    def note(output):
        counts.append(torch.get_num_threads())
        if len(counts) > 2:
            raise KeyboardInterrupt

    torch.set_num_threads(3)
    try:
        watch.change = note
        run = Run(Task(picture(*shape), None, "conv1_1"), vgg=vgg, coarse_to_fine=False, precision="float32")
        assert run.step() and run.step() and torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt):
            run.step()
        assert counts == [threads] * 3 and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(present)


BOTH = ("bfloat16", "float32")


@pytest.mark.parametrize("capability, expected", [((7, 5), BOTH[1:]), ((8, 0), BOTH), ((8, 9), BOTH), ((9, 0), BOTH)])
def test_bfloat16_comes_first_on_gpus_that_multiply_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precisions(GPU) == expected


@pytest.mark.parametrize(
    "capabilities, expected",
    [({"amx_bf16": True}, BOTH), ({"amx_bf16": False, "avx512_bf16": True}, BOTH), ({"avx2": True}, BOTH[1:])],
)
def test_bfloat16_comes_first_on_processors_that_multiply_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_precisions(CPU) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # before torch 2.11
    assert pick_precisions(CPU) == pick_precisions(torch.device("mps")) == BOTH[1:]


@pytest.mark.parametrize("precision", ["float16", "fast", 16, ["float32"]])
def test_a_precision_may_be_chosen_of_two(precision, refuses):
    assert [pick_precisions(device, name) for device in (CPU, GPU) for name in BOTH] == [(name,) for name in BOTH] * 2
    with refuses(f"unknown precision {precision!r}: use 'bfloat16' or 'float32'"):
        pick_precisions(CPU, precision)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_replayed_graph_gives_the_losses_and_gradient_of_the_cpu(vgg, content, style, recwarn):
    """A graph that is not captured warns."""
    found, shape = [], tuple(content.shape[-2:])
    for device in (CPU, GPU):
        image = content.to(device)
        task = Task(image, style.to(device), ("conv1_2",), dict.fromkeys(FIRST_FIVE, 1.0))
        objective = objective_of(vgg.cut("conv3_1", device, "float32"), task, shape, shape, math.inf)
        evaluator = Evaluator(objective, shape, device, "float32")
        for scale in (1.0, 0.8, 0.5):
            losses, gradient = evaluator(task.weights, image.flatten() * scale)
        found.append((losses.cpu(), gradient.cpu()))
    assert not recwarn.list
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-2, atol=0.01 * found[0][1].abs().max().item())
