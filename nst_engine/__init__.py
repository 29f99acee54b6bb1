"""What `nst_utils` and `nst_widgets` stand on; it imports neither of them. A line's home follows from the file's name:

layers.py          the names of VGG-19's layers
weights.py         how weights are read: packaged, torchvision's, a file
network.py         VGG-19 with these weights; the feature maps of a picture
pictures.py        load, save, resize and compare pictures; the device they are on
checks.py          what comes in: brought to one form, or refused in one sentence
losses.py          Gram sums, squared differences, and the losses made of them: the fast forms
prior.py           what natural pictures have in common: preconditioner, noise to start from
tiles.py           loss and gradient of a picture in parts, which processes may share out
evaluation.py      loss and gradient of an objective: precision, CUDA graph
memory.py          what an evaluation needs and what the device has
optimiser.py       projected L-BFGS
stopping.py        when a run ends, and which of its pictures is shown
coarse_to_fine.py  scales, and the precision that is needed: the whole way down
preparation.py     what a run needs, by scale and precision
figures.py         pictures, difference maps and loss curves, drawn

Papers in brackets are named in `nst_utils` or at the top of the file that has them.
"""
