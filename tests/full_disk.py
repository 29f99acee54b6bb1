"""A disk that is full, for tests of what happens then."""

import contextlib

import pytest


@contextlib.contextmanager
def full_disk(limit=1000):
    """This process can write no file beyond so many bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
