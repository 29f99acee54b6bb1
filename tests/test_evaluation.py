import contextlib
import functools
import gc
import math
import weakref

import pytest
import torch
from quadratics import coupled, evaluation, quadratic, whole

import nst_engine.evaluation
import nst_utils as nst
from nst_engine.checks import as_task
from nst_engine.evaluation import capture, evaluator, pick_precisions
from nst_engine.network import cut_network
from nst_engine.objective import Task, objective_of
from nst_engine.run import Run
from nst_engine.tiles import Objective
from nst_utils import FIRST_FIVE

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


def test_a_replay_overwrites_its_outputs_and_reads_other_images_and_weights(monkeypatch):
    """As a CUDA graph does, which is captured once: the same tensors each time. Earlier results stay."""

    def capture_once(run, device, tolerance):
        outputs = run()

        def replay():
            for kept, new in zip(outputs, run()):
                kept.copy_(new)
            return outputs

        return replay

    monkeypatch.setattr(nst_engine.evaluation, "capture", capture_once)
    image = torch.zeros(1, 3, 2, 2)
    objective = Objective(
        lambda part, tile: [part.square().sum()], lambda found, weights: (weights * found[0]).sum()[None], whole(image)
    )
    evaluate, found = evaluator(objective, image, 2), []
    for value, weights in ((1.0, [1.0, 2.0]), (3.0, [0.0, 5.0])):
        losses, gradient = evaluate(torch.full((12,), value), torch.tensor(weights))
        found += [losses, gradient]
    assert found[0].tolist() == [12 * 3] and found[1].tolist() == [2 * 3] * 12
    assert found[2].tolist() == [12 * 9 * 5] and found[3].tolist() == [2 * 3 * 5] * 12


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
        evaluate = evaluator(Objective(statistics, lambda found, weights: found[0][None], whole(image)), image, 1)
        evaluate(torch.zeros(image.numel()), torch.ones(1))
        assert found == [threads] and torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt):
            evaluate(torch.full((image.numel(),), 1e9), torch.ones(1))
        assert found == [threads] * 2 and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(present)


class FakeCuda:
    """Stands in for torch.cuda: a graph keeps the run that is captured, and overwrites its outputs when replayed."""

    def __init__(self, monkeypatch):
        self.said, self.streams, self.error, self.wrong_by = [], [], None, (0.0, 0.0)
        fake, captured = self, []

        class Graph:
            def replay(self):
                fake.said.append("replay")
                for kept, new, wrong_by in zip(self.outputs, self.run()(), fake.wrong_by):
                    kept.copy_(new * (1 + wrong_by))

        class Stream:
            def __init__(self, device=None):
                self.device = device

            def wait_stream(self, other):
                fake.said.append("wait")

        @contextlib.contextmanager
        def graph(made, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"  # what other threads do is no error
            fake.said.append("capture")
            fake.streams.append(stream)
            captured.append(made)
            yield
            captured.clear()
            if fake.error:
                raise fake.error

        def tracked(run):
            def running():
                fake.said.append("run")
                fake.locked = nst_engine.evaluation._capturing.locked()
                outputs = run()
                for made in captured:
                    made.run, made.outputs = weakref.ref(run), outputs  # a graph keeps nothing alive
                return outputs

            return running

        self.tracked = tracked
        nst_engine.evaluation._stream.cache_clear()
        for name, stand_in in {
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "Stream": Stream,
            "current_stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def capture(self, run, device=GPU, tolerance=1e-3):
        return capture(self.tracked(run), device, tolerance)


@pytest.fixture
def cuda(monkeypatch):
    yield FakeCuda(monkeypatch)
    nst_engine.evaluation._stream.cache_clear()


def test_a_run_is_captured_once_after_a_warm_up_and_then_replayed(cuda):
    """The order of events, with a stand-in for the GPU; that a real one agrees is a test further down."""
    place = torch.ones(3)
    replay = cuda.capture(lambda: (place * 2, place.sum()))
    assert cuda.said == ["wait", "run", "run", "wait", "capture", "run", "replay"] and cuda.locked
    place.fill_(5)
    doubled, total = replay()
    assert doubled.tolist() == [10] * 3 and total.item() == 15
    assert cuda.said[7:] == ["replay"]


def test_each_device_has_one_stream_to_capture_on(cuda):
    for index in (0, 1, 0):
        cuda.capture(lambda: (torch.ones(1),), torch.device("cuda", index))
    first, second, again = cuda.streams
    assert first is again and [stream.device.index for stream in (first, second)] == [0, 1]


def test_a_replay_keeps_alive_what_it_reads(cuda):
    target = torch.ones(3)
    replay, kept = cuda.capture(functools.partial(lambda target: (target * 2,), target)), weakref.ref(target)
    del target
    gc.collect()
    assert kept() is not None
    assert replay()[0].tolist() == [2.0] * 3


def test_where_capture_fails_the_run_itself_is_taken_and_a_warning_says_so(cuda):
    cuda.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.warns(UserWarning, match="cuda:0 .*CUDA graph.*: operation not permitted when stream is capturing$"):
        replay = cuda.capture(lambda: (torch.ones(3),))
    before = len(cuda.said)
    assert replay()[0].tolist() == [1.0] * 3 and cuda.said[before:] == ["run"]
    assert not nst_engine.evaluation._capturing.locked()


@pytest.mark.parametrize(
    "wrong_by, trusted",
    [((5e-4, 5e-4), True), ((2e-3, 2e-3), False), ((0.0, 2e-3), False), ((2e-3, 0.0), False), ((0.0, math.nan), False)],
)
def test_a_replay_is_trusted_only_if_it_is_what_it_repeats(wrong_by, trusted, cuda, recwarn):
    cuda.wrong_by = wrong_by
    replay = cuda.capture(lambda: (torch.tensor([0.0, 3.0]), torch.ones(2)))
    cuda.said.clear()
    replay()
    assert cuda.said == ["replay" if trusted else "run"]
    warned = [str(warning.message).count("first replay differs from") for warning in recwarn]
    assert warned == ([] if trusted else [1])


def test_a_replay_may_be_off_by_the_rounding_of_its_precision(vgg, content, cuda, monkeypatch):
    cuda.wrong_by, tolerances = (0.0, 0.03), []
    assert cuda.capture(lambda: (torch.ones(2), torch.ones(2)), tolerance=0.05).reads
    monkeypatch.setattr(
        nst_engine.evaluation, "capture", lambda run, device, tolerance: tolerances.append(tolerance) or run
    )
    for precision in ("float32", "bfloat16"):
        Run(Task(content, None, ("conv1_1",)), vgg=vgg, precision=precision).step()
    assert tolerances == [1e-3, 0.05]


def test_too_little_memory_while_capturing_is_not_hidden(cuda):
    cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        cuda.capture(lambda: (torch.ones(3),))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_replayed_graph_gives_the_losses_and_gradient_of_the_cpu(vgg, content, style):
    found, shape = [], tuple(content.shape[-2:])
    for device in (torch.device("cpu"), GPU):
        image, task = (
            content.to(device),
            Task(content.to(device), style.to(device), ("conv1_2",), dict.fromkeys(FIRST_FIVE, 1.0)),
        )
        objective = objective_of(cut_network(vgg, "conv3_1", device, "float32"), task, shape, math.inf)
        evaluate = evaluator(objective, image, 7)
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
    evaluate, found = evaluator(objective, image, len(task.weights), precision), []
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
