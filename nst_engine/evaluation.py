"""Loss and gradient of an objective: in which precision, and on NVIDIA's GPUs as a CUDA graph."""

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .tiles import loss_and_gradient_of

ROUNDING = {"float32": 0.0, "bfloat16": 0.01}  # how well a loss is known in this precision, as a share of it
REPLAY = {"float32": 1e-3, "bfloat16": 0.05}  # how far a replay may be from the run it repeats, as a share of it


class Objective(NamedTuple):
    """What to minimise, as two functions and the tiles that the first is asked for."""

    statistics: Callable  # of a `Tile`'s window of the picture (1, 3, h, w), and the tile: a list of sums over it
    loss: Callable  # of the whole's sums and a tensor of weights: a 1-D tensor of losses; the first is minimised
    tiles: Sequence  # the picture's `Tile`s
    kept: int = 1  # of how many tiles there is memory for the graph, until the second pass


def pick_precisions(device, precision=None):
    """The network's precisions one after another: (`precision`,), or what is best on `device`.

    bfloat16, where the hardware multiplies it (NVIDIA GPUs from Ampere on, CPUs with AMX or AVX512-BF16), takes half
    the time; where its rounding hides what progress is left, float32 goes on. Elsewhere float32 alone.
    """
    if precision is not None:
        if precision not in ROUNDING:
            raise ValueError(f"unknown precision {precision!r}: use 'bfloat16' or 'float32'")
        return (precision,)
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
    return ("bfloat16", "float32") if fast else ("float32",)


def loss_and_gradient(objective, image, count, precision="float32"):
    """Return the function: flat picture (3 H W,), weights -> (list of losses, flat gradient of the first).

    objective: an `Objective`, computed in `precision`. Only pictures of `image`'s shape and device fit, and tensors of
    `count` weights. Both are copied to where a captured evaluation reads them, so that another weight is no other
    evaluation.
    """
    picture = image.detach().clone()
    present = picture.new_ones(count)
    run = functools.partial(loss_and_gradient_of, objective, picture, present)
    replay = capture(run, image.device, REPLAY[precision])

    def evaluate(x, weights):
        picture.copy_(x.view_as(picture))
        present.copy_(weights)
        losses, gradient = replay()
        return losses.tolist(), gradient.flatten().clone()  # a replay writes over its outputs

    return evaluate


_capturing = threading.Lock()  # the panel's thread and another cell may both want to


@functools.cache
def _stream(device):
    """The stream to capture on: torch's default belongs to whichever device was the first."""
    return torch.cuda.Stream(device)


def capture(run, device, tolerance):
    """Return a function that repeats `run`, whose inputs stay where they are in memory.

    On a CUDA device the kernels of one run are kept as a CUDA graph and replayed: starting some two hundred of them
    one by one takes the host longer than they take. Where that fails, or the first replay is not what `run` gives, to
    the share `tolerance`, a warning says so; then, and on other devices, `run` itself is returned.
    """
    if device.type != "cuda":
        return run
    try:
        with _capturing, torch.cuda.device(device):
            graph, outputs, expected = _record(run, _stream(device))
            graph.replay()
            gaps = [_relative_gap(found, value) for found, value in zip(outputs, expected)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        trouble = str(error).splitlines()[0]
    else:
        same = all(gap <= tolerance for gap in gaps)
        trouble = "" if same else f"the first replay differs from what it repeats, by shares of {gaps}"
    if trouble:
        warnings.warn(
            f"evaluations on {device} are not captured as a CUDA graph and take longer: {trouble}", stacklevel=2
        )
        return run

    def replay():
        graph.replay()
        return outputs

    replay.reads = run  # the graph reads its targets where they are: they must live as long as it does
    return replay


def _record(run, stream):
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


def _relative_gap(found, value):
    """The largest difference as a share of the largest value; nan where something is not finite."""
    return ((found - value).abs().max() / value.abs().max().clamp(min=1e-30)).item()
