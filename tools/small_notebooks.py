"""The notebooks with parameters that keep every run small: what they compute is exact, what they measure is not."""

import copy

from homework import is_parameters

SMALL = {
    "1_content_reconstruction": {"SIZE": 48, "SMALL": 48, "STEPS": 2, "EVALUATIONS": 2},
    "2_texture_synthesis": {"SIZE": 48, "SMALL": 48, "STEPS": 2},
    "3_style_transfer": {
        "SIZE": 48, "SMALL": 48, "STEPS": 2, "TUNING_SIZE": 48, "GALLERY_SIZE": 48, "LARGE_SIZE": 64, "FEWER": 2,
    },
}  # fmt: skip
# A run that the notebook does not limit would go on until it is done.
LIMITED = """
import functools

for _name in ("reconstruct_content", "synthesize_texture", "transfer_style"):
    setattr(nst, _name, functools.partial(getattr(nst, _name), evaluations=3))
"""


def made_small(name, notebook):
    """A notebook with overriding lines at the end of its cell tagged `parameters`."""
    notebook = copy.deepcopy(notebook)
    (cell,) = filter(is_parameters, notebook.cells)
    cell.source += "".join(f"\n{parameter} = {value}" for parameter, value in SMALL[name].items()) + LIMITED
    return notebook
