"""Evaluate losses and gradient of an objective: precision, CPU threads, CUDA graph, and torch's global modes."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import Shape, UserError
from .losses import Weights
from .tiles import losses_and_gradient

RELATIVE_TOLERANCE = {"float32": 0.0, "bfloat16": 0.01}  # by what share a loss may rise through rounding alone
REPLAY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # relative error of a replayed graph against an eager evaluation

_capturing = threading.Lock()  # the panel's thread and another cell may both want to capture


def pick_precisions(device: torch.device, precision: str | None = None) -> tuple[str, ...]:
    """The precisions that a run uses in turn: (`precision`,), or by default the best for `device`.

    Where the hardware multiplies bfloat16 (NVIDIA GPUs from Ampere on, CPUs with AMX or AVX512-BF16), it halves the
    time; float32 takes over when rounding hides further progress. Elsewhere float32 alone. Raises UserError for an
    unknown precision.
    """
    if precision is not None:
        if not isinstance(precision, str) or precision not in RELATIVE_TOLERANCE:
            raise UserError(f"unknown precision {precision!r}: use 'bfloat16' or 'float32'")
        return (precision,)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # since torch 2.11
        instructions = torch.cpu.get_capabilities()
        fast = instructions.get("amx_bf16") or instructions.get("avx512_bf16")
    else:
        fast = False
    return ("bfloat16", "float32") if fast else ("float32",)


class Evaluator:
    """Evaluates an `Objective`'s losses and the gradient of the first, the total, at one scale in one precision.

    On NVIDIA GPUs, evaluations are replayed from a CUDA graph.
    """

    def __init__(self, objective, shape: Shape, device: torch.device, precision: str):
        self.objective, self.shape = objective, shape
        self.graph = CudaGraph(self, device, REPLAY_TOLERANCE[precision]) if device.type == "cuda" else None

    def __call__(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        """(losses (3,), flat gradient of the first) at a flat image (3 H W,)."""
        return self.graph(weights, x) if self.graph else self.evaluate(weights, x)

    def evaluate(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, eagerly: pure tensor operations that never synchronise with the host."""
        losses, gradient = losses_and_gradient(self.objective, x.view(1, 3, *self.shape), weights)
        return losses, gradient.flatten()


class CudaGraph:
    """An evaluator's kernels, captured once and then launched together.

    Launching some hundred kernels one by one takes the host longer than the GPU needs to run them. The first call is
    eager. The second captures a graph, which is used if its first replay agrees with an eager evaluation to within the
    relative `tolerance`. Otherwise a warning says so, and evaluations stay eager.
    """

    def __init__(self, evaluator: Evaluator, device: torch.device, tolerance: float):
        self.evaluator, self.device, self.tolerance = evaluator, device, tolerance
        self.calls, self.failed = 0, False
        self.inputs = self.graph = self.outputs = None  # the graph reads and writes fixed addresses

    def __call__(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.graph is None and self.calls > 1 and not self.failed:
            self.inputs = Weights(*(weight.clone() for weight in weights)), x.detach().clone()
            self.failed = not self.capture()
        if self.graph is None:
            return self.evaluator.evaluate(weights, x)
        places = *self.inputs[0], self.inputs[1]
        for place, value in zip(places, (*weights, x)):
            place.copy_(value)
        self.graph.replay()
        losses, gradient = self.outputs
        return losses.clone(), gradient.clone()  # the next replay overwrites them

    def capture(self) -> bool:
        """Capture the evaluation at `inputs`; return whether the first replay agrees with an eager evaluation."""
        try:
            with _capturing, torch.cuda.device(self.device):
                graph, outputs, expected = self._capture_on(_stream(self.device))
                graph.replay()
                agrees = all(_agree(found, value, self.tolerance) for found, value in zip(outputs, expected))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            problem = str(error).splitlines()[0]
        else:
            if agrees:
                self.outputs, self.graph = outputs, graph  # set last, so an interrupted capture is retried
                return True
            problem = f"the first replay differs from an eager evaluation by more than {self.tolerance:g}"
        warnings.warn(f"evaluations on {self.device} have no CUDA graph and are slower: {problem}", stacklevel=4)
        return False

    def _capture_on(self, stream):
        """Capture on a stream; return the graph, its outputs, and the outputs of an eager evaluation."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # warm up: choosing algorithms and allocating workspaces cannot be captured
                expected = [value.clone() for value in self.evaluator.evaluate(*self.inputs)]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = self.evaluator.evaluate(*self.inputs)
        return graph, outputs, expected


@functools.cache
def _stream(device):
    """The stream to capture on; torch's default capture stream belongs to the first device used."""
    return torch.cuda.Stream(device)


def _agree(found: Tensor, value: Tensor, tolerance: float) -> bool:
    """Whether all errors are within `tolerance` times the largest finite value; inf and nan must match exactly."""
    largest = value.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(found, value, rtol=0, atol=tolerance * largest, equal_nan=True)


# --- torch's global modes ------------------------------------------------------------------------


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
    """Enable gradients, disable inference mode and autocast, create new tensors on the CPU; restore all on exit.

    These modes are all thread-local.
    """
    with torch.inference_mode(False), torch.enable_grad(), contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on `count` threads; restore the previous number on exit."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
