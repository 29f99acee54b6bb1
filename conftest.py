"""Turn off progress bars in the kernels that nbval starts: it compares what they print."""

import os

os.environ["TQDM_DISABLE"] = "1"
