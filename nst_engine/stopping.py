"""When a run ends, and which of its pictures is shown."""

import math
from collections import deque

from IPython import get_ipython

from .pictures import share_changed

# A run stands still when ten evaluations lower the total by less than this share of it:
COARSE = 0.1  # at a coarse scale, whose detail the next one replaces
ROUGH = 0.05  # at full size, when it is asked whether rounding is the cause
FINE = 0.005  # at full size, and the run is done
# or when they change less than this share of the pixels by 1/255 or more, so that nobody sees a difference.
CHANGED = 0.001
SAMPLE = 2**18  # pixels that are looked at

# A coarse scale also ends when its total is down to this share of its first one: the next one begins far above that.
COARSE_END = 0.004


def best_so_far(run):
    """Pass on, after each evaluation, the (picture, `Step`, gradient) of the smallest total so far.

    What is minimised may be something else, or be rounded; what is shown never becomes worse.
    """
    best = None
    for found in run:
        if best is None or found[1].total < best[1].total:
            best = found
        yield best


def sample(image):
    """The picture, or of a large one every second or third row and column and so on: eleven whole ones take memory."""
    step = max(1, math.isqrt(image[0, 0].numel() // SAMPLE))
    return image[..., ::step, ::step].clone() if step > 1 else image


def until_still(run, tolerance, end=0.0):
    """Pass on (picture, `Step`, ...) until it stands still by the share `tolerance`, as said above.

    Or until the total is below the share `end` of the first one.
    """
    last, first = deque(maxlen=11), None
    for found in run:
        yield found
        image, step = found[:2]
        first = first or step
        last.append((sample(image), step.total))
        before, total = last[0]
        if step.total < end * first.total:
            return
        if len(last) == 11 and (step.total > (1 - tolerance) * total or share_changed(before, last[-1][0]) < CHANGED):
            return


_interrupted = set()  # notebook cells whose stop button was pressed


def current_cell():
    """What identifies the notebook cell that is being executed; None in a script."""
    shell = get_ipython()
    return shell and shell.execution_count


def note_interrupt():
    _interrupted.add(current_cell())


def refuse_after_interrupt():
    """Raise KeyboardInterrupt in a cell that was stopped: the button was meant for all of its runs."""
    if current_cell() in _interrupted - {None}:
        raise KeyboardInterrupt
