"""Losses and gradient of an objective: in which precision, on how many threads, on NVIDIA GPUs as a CUDA graph.

[mixed] Micikevicius et al. 2018, Mixed Precision Training
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .errors import UserError
from .tiles import Objective, losses_and_gradient

RELATIVE_TOLERANCE = {"float32": 0.0, "bfloat16": 0.01, "float16": 0.002}  # how well a loss is known in it
SMALL = 10_000  # pixels: fewer are evaluated on one thread
REPLAY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}  # how far a replay may be from what it repeats
SCALE = 2.0**16  # of derivatives in float16, which has no number between 0 and 6e-8 [mixed]


def pick_precisions(device: torch.device, precision: str | None = None) -> tuple[str, ...]:
    """The network's precisions one after another: (`precision`,), or what is best on `device`.

    bfloat16, where the hardware multiplies it (NVIDIA GPUs from Ampere on, CPUs with AMX or AVX512-BF16), takes half
    the time; where its rounding hides the progress that is left, float32 takes over. Elsewhere float32 alone. float16
    is not chosen by itself: meant for NVIDIA's Volta and Turing, it has been tried on processors alone.
    """
    if precision is not None:
        if precision not in [*RELATIVE_TOLERANCE]:
            raise UserError(f"unknown precision {precision!r}: use 'bfloat16', 'float16' or 'float32'")
        return (precision,)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        # torch before 2.11 does not say.
        instructions = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        fast = instructions.get("amx_bf16") or instructions.get("avx512_bf16")
    return ("bfloat16", "float32") if fast else ("float32",)


def evaluator(objective: Objective, image: Tensor, count: int, precision: str = "float32") -> Callable:
    """The function: flat image (3 H W,), weights -> (losses (k,), flat gradient of the first).

    objective: an `Objective`, computed in `precision`. Only images of `image`'s shape and device fit, and tensors of
    `count` weights. Both are copied to where a CUDA graph reads them, so other weights need no other graph. In float16
    derivatives are scaled up; where that is too much for it, the scale is halved, from then on.
    """
    place, present = image.detach().clone(), image.new_ones(count)
    scale = image.new_tensor(SCALE if precision == "float16" else 1.0)
    run = functools.partial(losses_and_gradient, objective, place, present, scale)
    replay = capture(run, image.device, REPLAY_TOLERANCE[precision])

    def evaluate(x, weights):
        place.copy_(x.view_as(place))
        present.copy_(weights)
        with one_thread(place[0, 0].numel() < SMALL and not place.is_cuda):
            losses, gradient = replay()
            while precision == "float16" and losses[0].isfinite() and scale > 0 and not gradient.isfinite().all():
                scale.mul_(0.5)
                losses, gradient = replay()
        return losses.clone(), gradient.flatten().clone()  # a replay overwrites its outputs

    return evaluate


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Compute on one thread, if `wanted`; afterwards on as many as before.

    On processors that are shared or rationed, the threads of a small operation wait for the one that is kept waiting:
    an evaluation at 64 x 85 pixels takes 26 ms on one thread and 17 on two, and beside two busy processes 40 to 46 on
    one and 60 to 590 on two.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if wanted:
            torch.set_num_threads(threads)


_capturing = threading.Lock()  # the panel's thread and another cell may both want to


@functools.cache
def _stream(device):
    """The stream to capture on: torch's default belongs to whichever device was the first."""
    return torch.cuda.Stream(device)


def capture(run: Callable, device: torch.device, tolerance: float) -> Callable:
    """A function that repeats `run`, whose inputs stay where they are in memory.

    On a CUDA device the kernels of one run are captured as a CUDA graph and replayed: to launch some two hundred of
    them one by one takes the host longer than they take. Where that fails, or the first replay differs from the run by
    more than the relative `tolerance`, a warning says so; then, and on other devices, `run` itself is returned.
    """
    if device.type != "cuda":
        return run
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


def _relative_error(found, value):
    """The largest error relative to the largest value; nan where something is not finite."""
    return ((found - value).abs().max() / value.abs().max().clamp(min=1e-30)).item()
