"""Fixtures for all tests: the network, small pictures, and a check of error messages."""

import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, not an installed copy

import nst_utils  # noqa: E402
from nst_utils import UserError  # noqa: E402

torch.set_num_threads(1)  # the pictures are small: where others share the cores, two threads wait for each other


@pytest.fixture(scope="session")
def vgg():
    return nst_utils.load_vgg19(device="cpu")


@pytest.fixture(scope="session")
def content():
    return nst_utils.load_image(nst_utils.IMAGES / "content" / "chenonceau.jpg", 48, "cpu")


@pytest.fixture(scope="session")
def style():
    return nst_utils.load_image(nst_utils.IMAGES / "style" / "starry_night.jpg", 40, "cpu")


@pytest.fixture(scope="session")
def settings(vgg):
    """Options every optimisation here shares: float32 on every machine, no progress bar."""
    return {"vgg": vgg, "precision": "float32", "progress": False}


@pytest.fixture
def refuses():
    """`with refuses(value)`: exactly that exception, its message one sentence that names the value."""

    @contextlib.contextmanager
    def check(value, error=UserError):
        with pytest.raises(error, match=re.escape(value)) as caught:
            yield
        message = str(caught.value)
        assert caught.type is error
        assert "\n" not in message
        assert not re.search(r"\w\. [A-Z]", message), "more than one sentence"

    return check


@pytest.fixture
def as_nobody():
    """`with as_nobody() as folder`: an empty folder, where permissions hold; for a superuser they do not."""

    @contextlib.contextmanager
    def become():
        if not hasattr(os, "geteuid"):
            pytest.skip("the permissions of POSIX")
        with tempfile.TemporaryDirectory() as folder:
            user = os.geteuid()
            if user == 0:
                os.chown(folder, 65534, 65534)
                os.seteuid(65534)
            try:
                yield Path(folder)
            finally:
                os.seteuid(user)

    return become


def random_picture(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def picture():
    """picture(height, width, seed=0): seeded noise."""
    return random_picture
