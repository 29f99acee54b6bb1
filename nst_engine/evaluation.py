"""Loss and gradient of an objective: in which precision, as a CUDA graph, in memory that is kept."""

import ctypes
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

ROUNDING = {"float32": 0.0, "bfloat16": 0.01}  # how well a loss is known in this precision, as a share of it


class Objective(NamedTuple):
    """What to minimise, as two functions."""

    statistics: Callable  # of a picture (1, 3, H, W): sums over its positions
    loss: Callable  # of these sums: a 1-D tensor of losses, of which the first is minimised


def pick_precisions(device, precision=None):
    """The network's precisions one after another: (`precision`,), or what is best on `device`.

    bfloat16, where the hardware multiplies it (NVIDIA GPUs from Ampere on, CPUs with AMX or AVX512-BF16), takes half
    the time until its rounding hides what progress is left; then float32 goes on. Elsewhere float32 alone.
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


def keep_freed_memory():
    """Have the C library keep what an evaluation frees for the next one, up to 2 GiB (glibc, so Linux alone).

    Feature maps are freed and asked for again all the time. Given back to the system, each of their pages is cleared
    when it returns, which took a third of an evaluation at 512 pixels. Other threads than the main one, the panel's
    among them, have small heaps of their own and gain little.
    """
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: from here on a block is the system's and goes back to it. Before version 2.35 refused.
        if mallopt(-3, 2**30):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: more than this, free at the end of the heap, goes back


def loss_and_gradient(objective, image):
    """Return the function: flat picture (3 H W,) -> (list of losses, flat gradient of the first).

    objective: an `Objective`. Only pictures of `image`'s shape and device fit.
    """
    picture = image.detach().clone().requires_grad_()

    def run():
        with torch.enable_grad():
            losses = objective.loss(objective.statistics(picture))
        (gradient,) = torch.autograd.grad(losses[0], picture)
        return losses.detach(), gradient

    replay = capture(run, image.device)

    def evaluate(x):
        with torch.no_grad():
            picture.copy_(x.view_as(picture))
        losses, gradient = replay()
        return losses.tolist(), gradient.flatten().clone()  # a replay writes over its outputs

    return evaluate


def capture(run, device):
    """Return a function that repeats `run`, whose inputs stay where they are in memory.

    On a CUDA device the kernels of one run are kept as a CUDA graph and replayed: starting some two hundred of them
    one by one takes the host longer than they take. Elsewhere `run` itself is returned.
    """
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose algorithms and take their workspaces, which must not be captured
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = run()

    def replay():
        graph.replay()
        return outputs

    return replay
