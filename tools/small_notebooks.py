"""The notebooks with parameters that keep every run small: what they compute is exact, what they measure is not."""

from homework import is_parameters

# A run that the notebook does not limit would go on until it is done. A parameter that a notebook lacks does no harm.
SMALL = """

SIZE = SMALL = TUNING_SIZE = START_SIZE = GALLERY_SIZE = 48
LARGE_SIZE = 64
STEPS = EVALUATIONS = FEWER = 2

import functools

for _name in ("reconstruct_content", "synthesize_texture", "transfer_style"):
    setattr(nst, _name, functools.partial(getattr(nst, _name), evaluations=3))
"""


def made_small(notebook):
    """A notebook, changed: with overriding lines at the end of its cell tagged `parameters`."""
    for cell in filter(is_parameters, notebook.cells):
        cell.source += SMALL
    return notebook
