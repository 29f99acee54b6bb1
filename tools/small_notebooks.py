"""Notebooks with parameters that keep every run small: exact results still hold, measured ones need not."""

from homework import is_parameters

# The wrappers limit runs that the notebook does not. Setting a parameter that a notebook lacks does no harm.
SMALL = """

SIZE = SMALL = TUNING_SIZE = START_SIZE = GALLERY_SIZE = 48
LARGE_SIZE = 64
STEPS = FEWER = 2
EVALUATIONS = 8  # enough for a step from the photograph to be accepted

import functools

for _name in ("reconstruct_content", "synthesize_texture", "transfer_style"):
    setattr(nst, _name, functools.partial(getattr(nst, _name), evaluations=3))
"""


def made_small(notebook):
    """Append overriding lines to the notebook's cell tagged `parameters`, in place, and return it."""
    for cell in filter(is_parameters, notebook.cells):
        cell.source += SMALL
    return notebook
