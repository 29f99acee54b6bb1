"""When a run ends, and which of its pictures is shown."""

from IPython import get_ipython

# A stage ends when ten evaluations lower the total by less than this share of it:
COARSE = 0.1  # at a coarse scale, whose detail the next one replaces
ROUGH = 0.05  # at full size before the last stage, which refines
FINE = 0.005  # in the last stage

# A coarse scale also ends when its total is down to this share of its first one: the next one begins far above that.
COARSE_END = 0.004


def best_so_far(run):
    """Pass on, after each evaluation, the (picture, `Step`) of the smallest total so far.

    What is minimised may be something else, or be rounded; what is shown never becomes worse.
    """
    best = None
    for image, step in run:
        if best is None or step.total < best[1].total:
            best = image, step
        yield best


def until_slow(run, tolerance, end):
    """Pass on (picture, `Step`) until ten evaluations lower the total by less than the share `tolerance` of it.

    Or until the total is below the share `end` of the first one.
    """
    totals = []
    for image, step in run:
        yield image, step
        totals.append(step.total)
        if totals[-1] < end * totals[0]:
            return
        if len(totals) > 10 and totals[-1] > (1 - tolerance) * totals[-11]:
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
