"""Neural style transfer: the engine, the interactive panel, and the program `stylise`."""

from .machine import limit_spinning

__version__ = "1.1.0"

limit_spinning()
