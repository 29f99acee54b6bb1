"""For every pytest run: no progress bars in the kernels that nbval starts, since it compares what they print."""

import os

os.environ["TQDM_DISABLE"] = "1"
