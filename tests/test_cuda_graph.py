import contextlib
import functools
import gc
import math
import weakref
from unittest import mock

import pytest
import torch
from quadratics import coupled, quadratic
from torch._subclasses.fake_tensor import FakeTensorMode

import style_transfer.engine.evaluation
from nst_utils import FIRST_FIVE
from style_transfer.engine.evaluation import REPLAY_TOLERANCE, capture, graphed
from style_transfer.engine.objective import Style, Task
from style_transfer.engine.optimiser import Iterate, ProjectedLBFGS
from style_transfer.engine.run import Run

GPU = torch.device("cuda", 0)


class FakeCuda:
    """Stands in for torch.cuda: a graph keeps the run that is captured, and overwrites its outputs when replayed."""

    def __init__(self, monkeypatch):
        self.said, self.streams, self.error, self.wrong_by = [], [], None, (0.0,) * 10
        fake, captured = self, []

        class Graph:
            def replay(self):
                fake.said.append("replay")
                inputs = [place() for place in self.places]
                for kept, new, wrong_by in zip(self.outputs, self.run()(*inputs), fake.wrong_by):
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
            def running(*inputs):
                fake.said.append("run")
                fake.locked = style_transfer.engine.evaluation._capturing.locked()
                outputs = run(*inputs)
                for made in captured:  # a graph keeps nothing alive but its outputs
                    made.run, made.places, made.outputs = weakref.ref(run), [*map(weakref.ref, inputs)], outputs
                return outputs

            return running

        self.tracked = tracked
        style_transfer.engine.evaluation._stream.cache_clear()
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

    def graphed(self, function, device=GPU):
        return graphed(self.tracked(function), device, 1e-3)


@pytest.fixture
def cuda(monkeypatch):
    yield FakeCuda(monkeypatch)
    style_transfer.engine.evaluation._stream.cache_clear()


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
    assert not style_transfer.engine.evaluation._capturing.locked()


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


def test_a_replay_may_be_off_by_the_rounding_of_its_precision(vgg, content, monkeypatch):
    tolerances = []
    monkeypatch.setattr(
        "style_transfer.engine.evaluation.graphed",
        lambda function, device, tolerance: tolerances.append(tolerance) or function,
    )
    for precision in ("float32", "bfloat16"):
        Run(Task(content, None, ("conv1_1",)), vgg=vgg, precision=precision).step()
    assert tolerances == [1e-3, 0.05] == [REPLAY_TOLERANCE[precision] for precision in ("float32", "bfloat16")]


@pytest.mark.parametrize("wrong_by, trusted", [(0.0, True), (5e-4, True), (2e-3, False), (math.nan, False)])
def test_what_is_not_finite_is_repeated_as_such(wrong_by, trusted, cuda, recwarn):
    """In float16 a gradient may be infinite until its scale is found."""
    cuda.wrong_by = (wrong_by,)
    values = torch.tensor([math.inf, -math.inf, math.nan, 5.0, 0.0])
    replay = cuda.capture(lambda: (values.clone(),))
    assert hasattr(replay, "reads") is trusted and len(recwarn) == (not trusted)


def test_too_little_memory_while_capturing_is_not_hidden(cuda):
    cuda.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        cuda.capture(lambda: (torch.ones(3),))


def test_a_function_is_captured_at_its_second_call_and_from_then_on_replayed(cuda):
    """Its first call has the libraries choose; inputs are copied to where the graph reads, and outputs from there."""
    call, inputs, found = cuda.graphed(lambda x, y: (x * y, x.sum())), [], []
    for value in (2.0, 3.0, 5.0, 7.0):
        inputs.append((torch.full((3,), value), torch.full((), 10 * value)))
        found.append(call(*inputs[-1]))
    replays = ["run", "wait", "run", "run", "wait", "capture", "run", "replay", "replay", "replay", "replay"]
    assert cuda.said == replays
    for value, (x, y), (product, total) in zip((2.0, 3.0, 5.0, 7.0), inputs, found):
        assert x.tolist() == [value] * 3 and y == 10 * value
        assert product.tolist() == [10 * value**2] * 3 and total == 3 * value


def test_a_capture_that_is_interrupted_is_made_at_the_next_call(cuda):
    call = cuda.graphed(lambda x: (2 * x,))
    call(torch.ones(1))
    cuda.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        call(torch.ones(1))
    cuda.error = None
    assert [call(torch.full((1,), value))[0].item() for value in (3.0, 4.0)] == [6.0, 8.0]
    assert cuda.said.count("capture") == 2 and cuda.said[-1] == "replay"


def test_where_there_is_no_cuda_a_function_stays_what_it_is(cuda):
    assert graphed(len, torch.device("cpu"), 1e-3) is len


@pytest.mark.parametrize("history_size", [3, 20])
def test_a_descent_by_graphs_of_whole_steps_is_that_by_steps(history_size, cuda):
    """With a stand-in for the GPU. Steps are refused, pairs dropped and discarded, and at the end there is no step."""
    matrix, target = (part.double() for part in coupled(seed=2))

    def evaluate(x, refuse=0.0):
        image = x.clone().requires_grad_()
        losses = quadratic(matrix, target)(image)
        gradient = torch.autograd.grad(losses[0], image)[0]
        return losses.detach() + torch.where(7 * x.sum() % 1 < refuse, math.nan, 0.0), gradient

    scales, start = torch.linspace(0.5, 2, 27).double(), torch.full((27,), 0.5, dtype=torch.float64)
    one, other = (ProjectedLBFGS(start, scales.mul, history_size) for _ in range(2))
    refuse = torch.tensor(0.4)
    refusing = lambda x: evaluate(x, refuse)  # noqa: E731
    whole = cuda.graphed(functools.partial(other.step_in_tensors, 0.0, refusing))
    iterate, halved = one.step(Iterate(start), refusing), 0
    assert iterate.losses[0].isfinite()
    found = iterate
    for count in range(200):
        refuse.fill_(1.0 if count > 30 else 0.4)  # from then on no step is taken
        iterate, found = one.step(iterate, refusing), other.step_with(whole, found)
        if iterate is None:
            break
        halved += (iterate.halvings > 0).item()
        assert all(torch.equal(*both) for both in zip(iterate[:4], found[:4]))
        assert all(torch.equal(*both) for both in zip(iterate.pending, found.pending))
        assert all(torch.equal(*both) for both in zip(iterate.curvature, found.curvature))
    assert iterate is None is found and halved > 20 and cuda.said.count("capture") == 1


def end_of(task, **options):
    run = Run(task, **options)
    while step := run.step():
        last = step
    return last, run.image


@pytest.mark.parametrize(
    "precision, init, shape, weight", [("float32", "noise", (130, 136), 1e4), ("float16", "content", (24, 24), 1e9)]
)
def test_a_run_by_whole_steps_is_that_by_steps(precision, init, shape, weight, vgg, picture, monkeypatch):
    """Over two scales; and where float16's scale is halved, for the first evaluation and for steps each by itself."""
    task = Task(picture(*shape), picture(70, 66, seed=1), ("conv1_2",), FIRST_FIVE, 1.0, weight)
    options = {"init": init, "vgg": vgg, "precision": precision, "evaluations": 12}
    expected = end_of(task, **options)
    monkeypatch.setattr(style_transfer.engine.evaluation, "WHOLE_STEPS", ("cpu",))
    whole = mock.Mock(wraps=ProjectedLBFGS.step_with)
    monkeypatch.setattr(ProjectedLBFGS, "step_with", lambda *arguments: whole(*arguments))
    found = end_of(task, **options)
    assert found[0].total == pytest.approx(expected[0].total, rel=0.01)
    assert precision == "float16" or torch.equal(found[1], expected[1])
    assert whole.call_count == 12 - {"noise": 2, "content": 1}[init]  # all but the first of each scale


@pytest.mark.parametrize(
    "precision, regions, budget_bytes, parts",
    [("float32", 2, 1e12, "whole"), ("bfloat16", 1, 1e12, "whole"), ("float16", 1, 1e12, "whole"),
     ("float32", 2, 9e6, "in 9 tiles")],
)  # fmt: skip
def test_what_a_graph_would_hold_asks_for_no_value(precision, regions, budget_bytes, parts, vgg, picture, monkeypatch):
    """Neither evaluation nor whole step: torch's fake tensors have none, and refuse."""
    functions = []

    def checked(function, device, tolerance):
        def call(*inputs):
            functions.append(function)
            with FakeTensorMode(allow_non_fake_inputs=True):
                function(*inputs)
            return function(*inputs)

        return call

    monkeypatch.setattr("style_transfer.engine.evaluation.graphed", checked)
    monkeypatch.setattr(style_transfer.engine.evaluation, "WHOLE_STEPS", ("cpu",))
    shape = (48, 56) if parts != "whole" else (24, 26)
    mask = torch.linspace(0, 1, shape[0])[:, None].expand(shape).contiguous()
    styles = [Style(picture(26, 24, seed=1), 1.0, mask), Style(picture(24, 28, seed=2))][2 - regions :]
    task = Task(picture(*shape), styles, ("conv1_2",), FIRST_FIVE)
    run = Run(task, init="content", vgg=vgg, precision=precision)
    run.budget_bytes = budget_bytes
    assert parts in run.describe()
    assert run.step() and run.step()
    assert len({*functions}) == 2


@pytest.mark.parametrize("ask", [torch.Tensor.item, bool, torch.Tensor.tolist])
def test_a_value_that_is_asked_for_would_be_noticed(ask):
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError):
        ask(torch.ones(1).sum())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_whole_steps_on_a_gpu_end_as_steps_do(precision, vgg, content, style, monkeypatch, recwarn):
    """A graph that is not captured warns."""
    task = Task(content.to(GPU), style.to(GPU), ("conv1_2",), FIRST_FIVE)
    expected = end_of(task, vgg=vgg, precision="float32")
    monkeypatch.setattr(style_transfer.engine.evaluation, "WHOLE_STEPS", ("cuda",))
    found = end_of(task, vgg=vgg, precision=precision)
    assert found[0].total == pytest.approx(expected[0].total, rel=0.01) and not recwarn.list
