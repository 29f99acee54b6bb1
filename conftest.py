"""For every pytest run, the kernels that nbval starts: no progress bars, since it compares what they print, and
encrypted connections where they can be had, without which a kernel prints a warning."""

import os

import zmq
from jupyter_client import KernelManager

os.environ["TQDM_DISABLE"] = "1"
if zmq.has("curve"):
    KernelManager.transport_encryption.default_value = "auto"
