"""torch's global modes, which a notebook may have set, neither change a result nor are they changed."""

import contextlib

import pytest
import torch

from nst_utils import load_vgg19, transfer_style
from style_transfer.engine.evaluation import default_modes, threads
from style_transfer.engine.vgg import CONVOLUTIONS, weights_of


@contextlib.contextmanager
def default(get, put, value):
    """One of torch's defaults is `value`; afterwards it is what it was."""
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
    kinds = [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")]
    flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_autocast_dtype("cpu")
    return *kinds, *flags, torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()


@pytest.fixture(scope="module")
def plain(content, style, settings):
    return transfer_style(content, style, evaluations=3, **settings)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_nothing_in_a_result(mode, plain, content, style, settings):
    """The network is loaded in that mode, too. A callback sees the modes that are set."""
    usual, seen = modes(), []
    with MODES[mode]():
        during = modes()
        options = settings | {"vgg": load_vgg19(device="cpu"), "callback": lambda image, step: seen.append(modes())}
        found = transfer_style(content, style, evaluations=3, **options)
        assert modes() == during != usual and seen == [during] * 3
    assert modes() == usual
    assert torch.equal(found.image, plain.image) and found.history == plain.history


def test_weights_of_either_format_are_float32_whatever_the_default_is():
    oxford, torchvision = {}, {}
    for name in CONVOLUTIONS:
        key = f"block{name[4]}_conv{name[6]}"
        oxford |= {f"{key}_W_table": torch.rand(6), f"{key}_W_q": torch.arange(6).view(2, 3, 1, 1)}
        oxford[f"{key}_b"] = torch.rand(2)
    for k in range(36):
        torchvision |= {f"features.{k}.weight": torch.rand(2, 3, 1, 1), f"features.{k}.bias": torch.rand(2)}
    for state in (oxford, torchvision):
        expected = weights_of(state)
        with MODES["float64"]():
            torch.testing.assert_close(weights_of(state), expected, rtol=0, atol=0)


def test_modes_and_threads_come_back_after_an_error():
    usual = modes()
    with MODES["autocast"](), MODES["meta"](), torch.inference_mode():
        during = modes()
        with pytest.raises(KeyboardInterrupt), default_modes(), threads(3):
            assert modes() == (*usual[:-1], 3)
            raise KeyboardInterrupt
        assert modes() == during


def test_a_callback_that_writes_on_its_image_changes_nothing(plain, content, style, settings):
    images = []

    def spoil(image, step):
        images.append(image.mul_(255))

    found = transfer_style(content, style, evaluations=3, callback=spoil, **settings)
    assert len(images) == 3 and images[0].max() > 2
    assert torch.equal(found.image, plain.image) and found.history == plain.history
