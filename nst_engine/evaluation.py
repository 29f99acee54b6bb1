"""Losses and gradient of an objective: in which precision, and on how many threads.

[mixed] Micikevicius et al. 2018, Mixed Precision Training
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from .cuda_graph import graphed
from .errors import UserError
from .layers import Shape
from .tiles import Objective, losses_and_gradient

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
