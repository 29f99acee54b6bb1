"""Evaluations as a CUDA graph, with a stand-in for the GPU: in which order, what is copied, what happens on failure."""

import contextlib
import math
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from style_transfer.engine import evaluation
from style_transfer.engine.evaluation import CudaGraph, Evaluator
from style_transfer.engine.losses import Weights
from style_transfer.engine.objective import Style, Task, objective_of

GPU = torch.device("cuda", 0)
CAPTURED = ["wait", "run", "run", "wait", "capture", "run", "replay"]  # twice to warm up


class StandIn:
    """torch.cuda, and an evaluator whose runs it captures: a replay repeats the run and overwrites its outputs.

    error: raised at the end of a capture. relative_errors: of a replay's losses and gradient.
    """

    def __init__(self):
        self.events, self.streams, self.error, self.relative_errors = [], [], None, (0.0, 0.0)
        self.captured, self.given = None, []
        stand_in = self

        class Graph:
            def replay(self):
                stand_in.events.append("replay")
                x, *weights = (place() for place in self.places)  # a graph keeps nothing alive but its outputs
                found = stand_in.evaluate(Weights(*weights), x, replayed=True)
                for kept, new, error in zip(self.outputs, found, stand_in.relative_errors):
                    kept.copy_(new * (1 + error))

        class Stream:
            def __init__(self, device=None):
                self.device = device

            def wait_stream(self, other):
                stand_in.events.append("wait")

        @contextlib.contextmanager
        def graph(made, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"  # so that other threads may go on
            assert evaluation._capturing.locked()
            stand_in.events.append("capture")
            stand_in.streams.append(stream)
            stand_in.captured = made
            yield
            stand_in.captured = None
            if stand_in.error:
                raise stand_in.error

        self.replacements = {
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "Stream": Stream,
            "current_stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
        }

    def evaluate(self, weights, x, replayed=False):
        """Made-up losses (content, style, 0 whatever x, sum of x) and gradient."""
        if not replayed:
            self.events.append("run")
        losses = torch.cat([weights.content * x.sum(), weights.style * x.sum(), x.new_zeros(1)])
        outputs = losses, weights.content * x
        if self.captured:
            self.captured.places = [weakref.ref(tensor) for tensor in (x, *weights)]
            self.captured.outputs = outputs
        return outputs

    def call(self, graph, value):
        """(losses, gradient) of a graph at an image and weights of this value, which no call may change."""
        self.given.append((value, torch.full((3,), value), Weights(*torch.full((4, 1), 10 * value))))
        found = graph(self.given[-1][2], self.given[-1][1])
        for value, x, weights in self.given:
            assert x.tolist() == [value] * 3 and all(weight == 10 * value for weight in weights)
        return found


def expected(value):
    """What `StandIn.call` finds."""
    return [30 * value**2, 30 * value**2, 0.0], [10 * value**2] * 3


@pytest.fixture
def cuda(monkeypatch):
    stand_in = StandIn()
    for name, replacement in stand_in.replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    evaluation._stream.cache_clear()
    yield stand_in
    evaluation._stream.cache_clear()


def test_the_first_call_runs_the_second_is_captured_and_all_others_are_replayed(cuda):
    """Inputs are copied to where the graph reads, and outputs from where it writes."""
    graph, values = CudaGraph(cuda, GPU, 1e-3), (2.0, 3.0, 5.0, 7.0)
    found = [cuda.call(graph, value) for value in values]
    assert cuda.events == ["run", *CAPTURED, "replay", "replay", "replay"]
    assert [(losses.tolist(), gradient.tolist()) for losses, gradient in found] == [*map(expected, values)]


def test_each_device_has_one_stream_to_capture_on(cuda):
    for index in (0, 1, 0):
        graph = CudaGraph(cuda, torch.device("cuda", index), 1e-3)
        for _ in range(2):
            cuda.call(graph, 1.0)
    first, second, again = cuda.streams
    assert first is again and [stream.device.index for stream in (first, second)] == [0, 1]


@pytest.mark.parametrize(
    "relative_errors, trusted",
    [((5e-4, 5e-4), True), ((2e-3, 0.0), False), ((0.0, 2e-3), False), ((0.0, math.nan), False)],
)
def test_a_replay_is_trusted_only_if_it_agrees(relative_errors, trusted, cuda, recwarn):
    graph, cuda.relative_errors = CudaGraph(cuda, GPU, 1e-3), relative_errors
    for value in (2.0, 3.0, 5.0):
        cuda.call(graph, value)
    assert cuda.events == ["run", *CAPTURED, *(["replay"] * 2 if trusted else ["run"] * 2)]
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (not trusted) and all("the first replay differs from" in message for message in messages)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_repeated_as_such(value, cuda, recwarn):
    graph = CudaGraph(cuda, GPU, 1e-3)
    for _ in range(2):
        graph(Weights(*torch.ones(4, 1)), torch.tensor([value, 5.0, -1.0]))
    assert cuda.events == ["run", *CAPTURED, "replay"] and not recwarn.list


def test_where_a_capture_fails_evaluations_stay_eager_and_a_warning_says_so(cuda):
    graph = CudaGraph(cuda, GPU, 1e-3)
    cuda.call(graph, 2.0)
    cuda.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.warns(
        UserWarning, match="cuda:0 .*CUDA graph and are slower: operation not permitted when stream is capturing$"
    ):
        losses, gradient = cuda.call(graph, 3.0)
    assert (losses.tolist(), gradient.tolist()) == expected(3.0)
    cuda.events.clear()
    cuda.call(graph, 5.0)
    assert cuda.events == ["run"] and not evaluation._capturing.locked()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")])
def test_an_interrupt_and_too_little_memory_are_passed_on_and_the_next_call_is_captured(error, cuda):
    graph = CudaGraph(cuda, GPU, 1e-3)
    cuda.call(graph, 2.0)
    cuda.error = error
    with pytest.raises(type(error)):
        cuda.call(graph, 3.0)
    cuda.error = None
    cuda.events.clear()
    losses, gradient = cuda.call(graph, 5.0)
    assert (losses.tolist(), gradient.tolist()) == expected(5.0)
    assert cuda.events == [*CAPTURED, "replay"]


def test_an_evaluator_has_a_graph_on_cuda_alone_as_tolerant_as_its_precision():
    tolerances = {name: Evaluator(None, (3, 4), GPU, name).graph.tolerance for name in ("float32", "bfloat16")}
    assert tolerances == {"float32": 1e-3, "bfloat16": 0.05}
    assert Evaluator(None, (3, 4), torch.device("cpu"), "float32").graph is None


@pytest.mark.parametrize(
    "precision, regions, share", [("float32", 2, math.inf), ("bfloat16", 1, math.inf), ("float32", 2, 0.9)]
)
def test_an_evaluation_never_synchronises_with_the_host(precision, regions, share, vgg, picture):
    """torch's fake tensors have no values, and refuse to be asked for one."""
    shape = (22, 36)
    mask = torch.linspace(0, 1, shape[0])[:, None].expand(shape).contiguous()
    styles = [Style(picture(26, 24, seed=1), 1.0, mask), Style(picture(24, 28, seed=2))][2 - regions :]
    task = Task(picture(*shape), styles, ("conv1_2",), {"conv1_1": 1.0, "conv2_1": 2.0})
    network = vgg.cut("conv2_1", torch.device("cpu"), precision)
    budget_bytes = share * network.bytes_per_pixel * math.prod(shape)
    objective = objective_of(network, task, shape, shape, budget_bytes)
    assert (len(objective.tiling.tiles) > 1) == (share < 1)
    evaluator = Evaluator(objective, shape, torch.device("cpu"), precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses, gradient = evaluator(task.weights, picture(*shape).flatten())
        assert losses.shape == (3,) and gradient.shape == (3 * math.prod(shape),)
        for ask in (torch.Tensor.item, bool, torch.Tensor.tolist):
            with pytest.raises(RuntimeError):
                ask(losses[0])
