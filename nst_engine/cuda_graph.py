"""A function of tensors as a CUDA graph: its kernels are captured once, and from then on started together.

To launch some hundred kernels one by one takes the host longer than they take. It knows neither losses nor optimiser.
"""

import functools
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WHOLE_STEPS = ()  # types of device; not yet "cuda", since this has been tried on processors alone

_capturing = threading.Lock()  # the panel's thread and another cell may both want to


def whole_steps(device: torch.device) -> bool:
    """Whether a graph is to hold a whole step of the optimiser, and not the evaluation in it alone."""
    return device.type in WHOLE_STEPS


def graphed(function: Callable, device: torch.device, tolerance: float) -> Callable:
    """The same function: tensors on `device`, of the same shapes each time -> a sequence of tensors.

    On a CUDA device its first call warms up, and from the second on it is replayed as a graph, if a replay agrees with
    it to the relative `tolerance`. So it must ask for no tensor's value, and what else it reads must stay where it is.
    """
    if device.type != "cuda":
        return function
    calls, places, replay = 0, (), None

    def call(*inputs):
        nonlocal calls, places, replay
        calls += 1
        if calls == 1:
            return function(*inputs)
        if replay is None:
            places = [x.detach().clone() for x in inputs]  # where the graph reads
            replay = capture(functools.partial(function, *places), device, tolerance)
        for place, x in zip(places, inputs):
            place.copy_(x)
        return [output.clone() for output in replay()]  # the next replay overwrites them

    return call


def capture(run: Callable, device: torch.device, tolerance: float) -> Callable:
    """A function that repeats `run`, whose inputs stay where they are in memory, on a CUDA device.

    Where that fails, or the first replay differs from the run by more than the relative `tolerance`, a warning says so,
    and `run` itself is returned.
    """
    try:
        with _capturing, torch.cuda.device(device):
            graph, outputs, expected = _capture_graph(run, _stream(device))
            graph.replay()
            errors = [_relative_error(found, value) for found, value in zip(outputs, expected)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        trouble = str(error).splitlines()[0]
    else:
        same = all(error <= tolerance for error in errors)
        trouble = "" if same else f"the first replay differs from what it repeats, by relative errors of {errors}"
    if trouble:
        warnings.warn(f"evaluations on {device} are slower, not captured as a CUDA graph: {trouble}", stacklevel=2)
        return run

    def replay():
        graph.replay()
        return outputs

    replay.reads = run  # the graph reads its targets where they are: they must live as long as it does
    return replay


@functools.cache
def _stream(device):
    """The stream to capture on: torch's default belongs to whichever device was the first."""
    return torch.cuda.Stream(device)


def _capture_graph(run, stream):
    """(graph, its outputs, what an eager run gave)."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries choose algorithms and take their workspaces, which must not be captured
            expected = [value.clone() for value in run()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = run()
    return graph, outputs, expected


def _relative_error(found: Tensor, value: Tensor) -> float:
    """The largest error relative to the largest finite value; nan or inf where only one of the two is finite."""
    found, value = found.double(), value.double()
    same = (found == value) | (found.isnan() & value.isnan())  # in float16 a gradient may be neither, at first
    largest = value.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)
    return (torch.where(same, 0, (found - value).abs()).max() / largest).item()
