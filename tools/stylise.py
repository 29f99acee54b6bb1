"""The program `stylise`, from a clone; what it does is in style_transfer.stylise.py."""

import signal
import sys


def interrupted(*_):
    """While Python reads torch, which takes seconds, Ctrl-C ends in a sentence, too."""
    sys.exit("interrupted: the same command begins again, nothing is saved")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    from style_transfer.stylise import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
