"""torch's global modes, which the user may have set, are put aside while the engine computes."""

import contextlib
from collections.abc import Iterator

import torch


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
