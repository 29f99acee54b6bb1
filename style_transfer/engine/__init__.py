"""The engine: everything that computes. Start reading at run.py.

run.py         the run: the one owner of task, scales, image, precision, curvature and counters
objective.py   what a run minimises: a task, and its objective at each scale
losses.py      statistics of feature maps, losses from statistics, masks
tiles.py       loss and gradient of an image tile by tile; ranks may share the tiles
evaluation.py  precision, CUDA graph of an evaluation, torch's global modes
vgg.py         VGG-19: layers, weights, feature maps
optimiser.py   projected L-BFGS
prior.py       a prior of natural images: preconditioner, starting noise
schedule.py    scales from coarse to fine, and the stopping rule
memory.py      how much memory a run needs and the device has
images.py      read, write, resize and compare images; the device they are on
figures.py     images and loss curves as figures, a run as a film
saving.py      safe file writes, the state file of an unfinished run, settings inside a PNG
checks.py      argument checks: convert to one form, or reject with a one-sentence error

An evaluation: Run.step -> ProjectedLBFGS.step -> Evaluator -> losses_and_gradient -> Objective.statistics -> VGG.
Papers in brackets are named in `nst_utils` or at the top of the file that cites them.
"""

import math

import torch

from ..machine import container_processors

# With more threads than processors, threads would wait for one another.
torch.set_num_threads(math.ceil(min(torch.get_num_threads(), container_processors())))
