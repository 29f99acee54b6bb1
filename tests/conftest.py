"""Fixtures for all tests: the network, small images, and checks of error messages and permissions."""

import contextlib
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, not an installed copy

import style_transfer  # noqa: E402, F401  before torch, since it sets how OpenMP's threads wait

# isort: split
import torch  # noqa: E402
from watching import Watch  # noqa: E402

import nst_utils  # noqa: E402

torch.set_num_threads(1)  # the images are small: on shared cores two threads would mostly wait for each other


@pytest.fixture(scope="session")
def vgg():
    return nst_utils.load_vgg19(device="cpu")


@pytest.fixture
def watch(vgg):
    with Watch(vgg) as watch:
        yield watch


@pytest.fixture(scope="session")
def content():
    return nst_utils.load_image(nst_utils.IMAGES / "content" / "chenonceau.jpg", 48, "cpu")


@pytest.fixture(scope="session")
def style():
    return nst_utils.load_image(nst_utils.IMAGES / "style" / "starry_night.jpg", 40, "cpu")


@pytest.fixture(scope="session")
def picture():
    """picture(height, width, seed=0): noise."""

    def draw(height, width, seed=0):
        return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture(scope="session")
def settings(vgg):
    """Options that all optimisations here share: float32 on every machine, no progress bar."""
    return {"vgg": vgg, "precision": "float32", "progress": False}


@pytest.fixture
def refuses():
    """`with refuses(text)`: exactly that exception is raised, and its message is one sentence that contains `text`."""

    @contextlib.contextmanager
    def check(text, error=nst_utils.UserError):
        with pytest.raises(error, match=re.escape(text)) as caught:
            yield
        message = str(caught.value)
        assert caught.type is error
        assert "\n" not in message
        assert not re.search(r"\w\. [A-Z]", message), "more than one sentence"

    return check


@pytest.fixture
def as_nobody():
    """`with as_nobody() as folder`: an empty folder, and a user for whom permissions hold, unlike for a superuser."""

    @contextlib.contextmanager
    def become():
        if not hasattr(os, "geteuid"):
            pytest.skip("needs POSIX permissions")
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
