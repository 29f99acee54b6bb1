"""How the tools start the kernels that run the notebooks."""

import zmq
from traitlets.config import Config

# Encrypted connections, where they can be had: without them a kernel prints a warning.
CONFIG = Config(AsyncKernelManager={"transport_encryption": "auto"} if zmq.has("curve") else {})
