"""What `nst_utils`, the panel and the program stand on; it imports none of them. A new reader begins with run.py.

run.py          the run: the one owner of task, scales, image, precision, curvature and counters
painter.py      a run whose settings change: what the panel drives
saved.py        a saved PNG file says how it was made
run_file.py     the file of a run that goes on after an interruption
terminal.py     what the program prints, into terminals of every kind
objective.py    what a run minimises: a task, and its objective made of network, targets and losses
styles.py       several styles, blended or each in its region, by masks
losses.py       the losses in two parts: statistics of feature maps, losses from statistics
optimiser.py    projected L-BFGS
convergence.py  the stopping rule
scales.py       coarse to fine: the scales, and how many evaluations each has
prior.py        what natural images have in common: preconditioner, noise to start from
tiles.py        loss and gradient of an image tile by tile; ranks may share the tiles
evaluation.py   in which precision an evaluation is made, and on how many threads
cuda_graph.py   a function of tensors as a CUDA graph
memory.py       what a run takes and what the device has
container.py    what a container leaves of memory and processors
network.py      VGG-19 with its weights; the feature maps of an image
weights.py      how weights are read: packaged, torchvision's, a file
layers.py       the names of VGG-19's layers
images.py       load, save, resize and compare images, keep colours; the device they are on
checks.py       arguments: brought to one form, or refused in one sentence
errors.py       what the user can mend, as an exception of its own
files.py        paths as the user gives them, and writing without loss
modes.py        torch's global modes, put aside while the engine computes
figures.py      images, difference maps and loss curves, drawn
film.py         what is kept of a run, to be shown as a film

Papers in brackets are named in `nst_utils` or at the top of the file that has them.
"""

from .container import limit_threads

limit_threads()
