"""torch's global modes, which the user may have set, are put aside while the engine computes.

A function of tensors as a CUDA graph: its kernels are captured once, and from then on started together.

To launch some hundred kernels one by one takes the host longer than they take. It knows neither losses nor optimiser.


Losses and gradient of an objective: in which precision, and on how many threads.

[mixed] Micikevicius et al. 2018, Mixed Precision Training
"""

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .checks import Shape, UserError
from .tiles import Objective, losses_and_gradient


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """Gradients on, no inference mode, no autocast, new tensors in float32 on the CPU; afterwards as it was.

    All but the default dtype are of the current thread alone. That one is set only where it is another.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


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


RELATIVE_TOLERANCE = {"float32": 0.0, "bfloat16": 0.01, "float16": 0.002}  # how well a loss is known in it
SMALL = 10_000  # pixels: fewer are evaluated on one thread
REPLAY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}  # how far a replay may be from what it repeats
SCALE = 2.0**16  # of derivatives in float16, which has no number between 0 and 6e-8 [mixed]
MAX_HALVINGS = 64  # of that scale; where none is small enough, the gradient stays as it is and the scale as it was


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


def evaluator(objective: Objective, shape: Shape, device: torch.device, precision: str = "float32") -> Callable:
    """The function: flat image (3 H W,) of `shape` (H, W), weights -> (losses (k,), flat gradient of the first)."""
    call = prepare(lambda evaluate, x: evaluate(x), objective, shape, device, precision)
    return lambda x, weights: call(weights, x)


def prepare(compute: Callable, objective: Objective, shape: Shape, device: torch.device, precision: str) -> Callable:
    """Make a computation around an evaluation ready: the function weights, *tensors -> compute(evaluate, *tensors).

    compute: calls `evaluate` once, asks for no tensor's value, and gives a sequence of tensors; it may be called twice
    for the same tensors. evaluate: flat image of `shape` -> (losses, flat gradient of the first), in `precision`. On
    NVIDIA GPUs all of it is one CUDA graph. In float16 derivatives are scaled up; where that is too much for it, the
    scale is halved, from then on, and `compute` is called again.
    """
    scaled = precision == "float16"
    scale = torch.tensor(SCALE if scaled else 1.0, device=device)

    def run(scale, weights, *tensors):
        finite = []

        def evaluate(x):
            losses, gradient = losses_and_gradient(objective, x.view(1, 3, *shape), weights, scale)
            if scaled:
                finite.append(gradient.isfinite().all() | ~losses[0].isfinite())
            return losses, gradient.flatten()

        return [*compute(evaluate, *tensors), *finite]

    repeat = graphed(run, device, REPLAY_TOLERANCE[precision])

    def call(weights, *tensors):
        nonlocal scale
        with one_thread(math.prod(shape) < SMALL and device.type != "cuda"):
            if not scaled:
                return repeat(scale, weights, *tensors)
            for power in range(MAX_HALVINGS):
                *found, finite = repeat(scale * 0.5**power, weights, *tensors)
                if finite:
                    scale = scale * 0.5**power
                    break
        return found

    return call


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
