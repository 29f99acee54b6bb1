"""torch's global modes, which a notebook may have set, change neither a result nor are they changed."""

import contextlib

import pytest
import torch

from nst_utils import load_vgg19, transfer_style
from style_transfer.engine.evaluation import default_modes


@contextlib.contextmanager
def default(get, put, value):
    """One of torch's defaults is `value`, which `get` tells and `put` sets; afterwards it is what it was."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "meta": lambda: default(torch.get_default_device, torch.set_default_device, "meta"),
}


def modes():
    """What is set."""
    kinds = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_autocast_dtype("cpu")
    return *kinds, *flags, torch.get_default_dtype(), torch.get_default_device()


@pytest.fixture(scope="module")
def plain(content, style, settings):
    return transfer_style(content, style, evaluations=3, **settings)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_nothing_in_a_result(mode, plain, content, style, settings):
    """The network included, which is loaded in that mode; what is set stays, also where a callback looks."""
    usual, seen = modes(), []
    with MODES[mode]():
        during = modes()
        options = settings | {"vgg": load_vgg19(device="cpu")}
        callback = lambda image, step: seen.append(modes())  # noqa: E731
        found = transfer_style(content, style, evaluations=3, callback=callback, **options)
        assert modes() == during != usual and seen == [during] * 3
    assert modes() == usual
    assert torch.equal(found.image, plain.image) and found.history == plain.history


def test_what_is_set_stays_after_an_error():
    with MODES["float64"](), MODES["meta"](), torch.inference_mode():
        during = modes()
        with pytest.raises(KeyboardInterrupt), default_modes():
            assert modes() != during
            raise KeyboardInterrupt
        assert modes() == during


def test_a_callback_that_writes_on_its_image_changes_nothing(plain, content, style, settings):
    images = []

    def spoil(image, step):
        images.append(image.mul_(255))

    found = transfer_style(content, style, evaluations=3, callback=spoil, **settings)
    assert len(images) == 3 and images[0].max() > 2
    assert torch.equal(found.image, plain.image) and found.history == plain.history
