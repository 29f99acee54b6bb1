"""The engine."""

from .memory import limit_threads

limit_threads()
