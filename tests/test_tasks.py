"""The three tasks as a notebook calls them: what they return, where they start and end, and what they refuse."""

import copy
import inspect
import math

import numpy as np
import pytest
import torch
from watching import OnGPU

import nst_utils as nst
from style_transfer.engine.prior import draw_noise

CASTLE, CAT = (nst.IMAGES / "content" / name for name in ("chenonceau.jpg", "kitten_on_fence.jpg"))
TASKS = reconstruct, synthesize, transfer = nst.reconstruct_content, nst.synthesize_texture, nst.transfer_style
FIRST = {"evaluations": 1, "coarse_to_fine": False}  # the start image
QUICK = FIRST | {"evaluations": 9}


def same(a, b):
    """Whether two results are equal bit for bit."""
    return torch.equal(a.image, b.image) and a.history == b.history


# --- What they return ----------------------------------------------------------------------------


def test_a_transfer_returns_its_image_and_every_step_of_its_scales(settings, style, vgg):
    content, calls, evaluated = nst.load_image(CASTLE, 128, "cpu")[..., :130], [], []
    weights = {"content_weight": 2.0, "style_weight": 3e3}
    with vgg.conv1_1.register_forward_hook(lambda *_: evaluated.append(torch.is_grad_enabled())):
        result = transfer(
            content, style, evaluations=13, callback=lambda *seen: calls.append(seen), **weights, **settings
        )
    assert sum(evaluated) == result.evaluations == len(result.history) == len(result.times) == 13
    assert result.ended == "the limit of 13 evaluations is reached"
    assert 0 < result.times[0] < result.times[-1] <= result.seconds < 600
    assert [step for _, step in calls] == result.history and torch.equal(result.image, calls[-1][0])
    for image, step in calls:
        assert image.shape == (1, 3, *step.shape) and image.dtype == torch.float32 and not image.requires_grad
        assert 0 <= image.min() and image.max() <= 1
    for steps, shape in ((result.history[:4], (64, 65)), (result.history[4:], (128, 130))):
        totals = [step.total for step in steps if step.shape == shape]
        assert len(totals) == len(steps) and totals == sorted(totals, reverse=True) and totals[-1] < 0.7 * totals[0]
    objective = nst.make_objective(vgg, content, style, ["conv1_2"], nst.FIRST_FIVE, *weights.values())
    assert result.history[-1][2:] == pytest.approx(objective(result.image).tolist(), rel=1e-3)


def test_each_style_layer_counts_by_its_weight(settings, picture, vgg):
    """In a transfer and in a texture, where style and content have other sizes."""
    content, style, image = picture(26, 18), picture(21, 30, 1), picture(26, 18, 2)
    weights, options = {"conv1_1": 4.0, "conv_5": 0.25, "relu2_1": 9.0}, {"init": image, **FIRST, **settings}
    maps, maps_of_style = (nst.features(vgg, each, weights) for each in (image, style))
    expected = nst.style_loss(maps, nst.gram_matrices(maps_of_style), weights).item()
    for result in (
        transfer(content, style, style_layers=weights, **options),
        synthesize(style, weights, shape=(26, 18), **options),
    ):
        (step,) = result.history
        assert step.style == pytest.approx(expected, rel=1e-4)
        assert step.total == pytest.approx(step.content + 1e4 * expected, rel=1e-4)


# --- Where they start ----------------------------------------------------------------------------


def test_defaults_are_the_assignments(settings, style, picture):
    """Bit for bit: conv1_2 with 1, the first five convolutions with 1e4, noise of seed 0; in numbers of any library."""
    few, content = {"evaluations": 3, **settings}, picture(50, 48)
    five, zero = [f"conv_{k}" for k in range(1, 6)], torch.tensor(0)
    said = {"init": "noise", "seed": zero, "coarse_to_fine": True, **settings, "evaluations": np.int64(3)}
    weights = np.float32(1), torch.tensor(1e4)
    assert same(transfer(content, style, **few), transfer(content, style, "conv_2", five, *weights, **said))
    assert same(reconstruct(content, **few), reconstruct(content, iter(["conv1_2"]), **said))
    shape = np.int64(50), torch.tensor(48)
    styles = content, style
    assert same(synthesize(styles, **few), synthesize(styles, five, shape=shape, **said))
    assert inspect.signature(nst.Run).parameters["evaluations"].default == 225


def test_a_seed_is_its_noise_and_repeats_a_run_bit_for_bit(settings, picture):
    runs = []
    for seed in (3, 3, 4):
        first, run = (reconstruct(picture(24, 30), seed=seed, **many, **settings) for many in (FIRST, QUICK))
        assert torch.equal(first.image, draw_noise((24, 30), seed, "cpu"))
        runs.append(run)
    assert same(*runs[:2]) and nst.difference_numbers(runs[0].image, runs[2].image).share > 0.5


def test_a_start_image_is_scaled_and_stays_as_it_is(settings, picture):
    """From the content or the style only the other is left to match."""
    content, style, other = images = picture(24, 20), picture(24, 20, 1), picture(30, 31, 2)
    before = [image.clone() for image in images]
    for init, start in (("content", content), (style, style), (other, nst.resize(other, (24, 20)))):
        first, _ = (transfer(content, style, init=init, **many, **settings) for many in (FIRST, QUICK))
        torch.testing.assert_close(first.image, start)
        assert (first.history[0].content < 1e-9) == (start is content)
        assert (first.history[0].style < 1e-9) == (start is style)
        first.image.zero_()
    assert all(map(torch.equal, images, before))


def test_a_texture_takes_a_shape_of_its_own(settings, style):
    result = synthesize(style, shape=(33, 47), **QUICK, **settings)
    assert result.image.shape == (1, 3, 33, 47)
    assert result.history[-1].total < 0.5 * result.history[0].total and result.history[-1].content == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_any_precision_become_float32(dtype, settings, picture):
    images = [picture(24, 30, seed).to(dtype) for seed in range(3)]
    result, expected = (
        transfer(*images[:2], init=images[2], evaluations=2, **settings)
        for images in (images, [image.float() for image in images])
    )
    assert result.image.dtype == torch.float32 and same(result, expected)


# --- How they end --------------------------------------------------------------------------------


def test_a_run_that_has_converged_says_why(settings, content, style):
    """The loss of a reconstruction would fall for ever."""
    cat = nst.load_image(CAT, 32, "cpu")
    result = reconstruct(cat, evaluations=500, **settings)
    assert result.ended == "the image changed by less than 0.5% in 10 evaluations" and result.evaluations < 250
    assert nst.difference_numbers(result.image, cat).psnr > 37
    result = transfer(content, style, "conv1_1", "conv1_1", init="content", evaluations=1000, **settings)
    assert result.ended == "the loss fell by less than 0.5% in 10 evaluations" and result.evaluations < 500


@pytest.mark.parametrize("layer", ["conv3_4", "conv4_4"])
def test_a_deep_layer_gives_an_image_and_no_coloured_noise(layer, settings):
    content = nst.load_image(CAT, 32, "cpu")
    image = reconstruct(content, layer, evaluations=20, **settings).image
    roughness, of_content = (each.diff(dim=3).abs().mean() for each in (image, content))
    assert roughness < 1.7 * of_content and nst.difference_numbers(image, content).psnr > 14


def test_bfloat16_agrees_loosely(settings, picture):
    exact, loose = (
        transfer(picture(24, 30), picture(24, 24, 1), evaluations=4, **settings | {"precision": precision})
        for precision in ("float32", "bfloat16")
    )
    assert loose.image.dtype == torch.float32 and loose.history[0] != exact.history[0]
    totals = [[step.total for step in result.history] for result in (exact, loose)]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


@pytest.mark.parametrize("count, side", [(1, 24), (5, 48)])
def test_an_interrupt_is_passed_on_and_the_result_so_far_is_kept(count, side, settings, picture, monkeypatch):
    """At its whole size, from a coarse scale too."""
    seen = []

    def stop(image, step):
        seen.append(image)
        if len(seen) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(nst, "last_result", None)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(picture(48, 54), callback=stop, evaluations=9, **settings)
    result = nst.last_result
    assert result.evaluations == len(result.history) == count and result.ended is None
    assert seen[-1].shape[2] == side and torch.equal(result.image, nst.resize(seen[-1], (48, 54)))
    reconstruct(picture(24, 27), **FIRST, **settings)
    assert nst.last_result is result


def test_the_bar_is_there_unless_it_is_not_wanted(settings, picture, monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE")
    for progress, shown in ((True, True), (False, False), (True, False)):
        reconstruct(picture(24, 27), **FIRST, **settings | {"progress": progress})
        assert ("optimising" in capsys.readouterr().err) == shown
        if not progress:
            monkeypatch.setenv("TQDM_DISABLE", "1")


# --- What they refuse ----------------------------------------------------------------------------


class Used(Exception):
    """Somebody has asked whether it is true."""


class Nothing:
    """No value of any option."""

    def __bool__(self):
        raise Used


@pytest.fixture
def arguments(settings, content, style):
    """arguments(task): with them it would run."""
    known = settings | FIRST | {"content": content, "style": style, "task": nst.Task(content, None, "conv1_1")}
    return lambda task: {name: known[name] for name in inspect.signature(task).parameters if name in known}


@pytest.mark.parametrize("task", [nst.optimise, *TASKS])
def test_every_option_is_shown_and_used_or_refused(task, arguments, refuses):
    """Shown with the default of `Run`; of an unknown one the nearest is named."""
    options, shown = arguments(task), inspect.signature(task).parameters
    for name in shown:
        with pytest.raises((nst.UserError, Used)):
            task(**options | {name: Nothing()})
    for option in inspect.signature(nst.Run).parameters.values():
        assert option.kind is not option.KEYWORD_ONLY or shown[option.name] == option
    for unknown, nearest in {"iterations": "evaluations", "memry": "memory", "zzz": ", ".join(shown)}.items():
        with refuses(f"{task.__name__} has no option {unknown!r}: use {nearest}"):
            task(**options, **{unknown: 10})


def noise():
    return torch.rand(1, 3, 15, 41)


VALUES = [
    (reconstruct, "evaluations", [0, 2.5, None, True, torch.tensor(2.0)]),
    (transfer, "content_weight", [-1.0, math.nan, math.inf, -math.inf, 1e13, "1", None, torch.ones(1), 1j]),
    (transfer, "style_weight", [-1.0, math.nan, None]),
    (reconstruct, "seed", [1.5, None, "0", 2**64, -(2**63) - 1]),
    (synthesize, "shape", [(0, 5), (5, -1), (5,), (5, 5, 5), (5.5, 5), "ab", 5]),
    (nst.optimise, "task", [None, 5, "transfer", (1, 2)]),
]
BAD_IMAGES = {
    "not finite": noise() * math.nan, "outside [0, 1]": 1.1 + noise(), "is str": "chenonceau.jpg",
    "outside [0, 1] or not finite, -0.5 to 1.75:": torch.linspace(-0.5, 1.75, 60).view(1, 3, 4, 5),
}  # fmt: skip
TWICE, UNKNOWN, NONE = "conv1_2 is named twice", "unknown layer 'conv_17'", "no layers given"
LAYERS = {TWICE: ["conv1_1", "conv1_2", "conv_2"], UNKNOWN: "conv_17"}
REFUSED = [  # (task, option, {what is said: value})
    *[(task, option, {f"{option} is {value!r}": value}) for task, option, values in VALUES for value in values],
    (reconstruct, "content", BAD_IMAGES | {"content is NoneType": None}),
    (transfer, "content", {"content is NoneType": None}),
    (transfer, "style", {"style is NoneType": None, "style has values outside": -noise()}),
    (synthesize, "style", {"style is NoneType": None}),
    (transfer, "style", {"the images are on cpu and cuda:0": noise().as_subclass(OnGPU)}),
    (reconstruct, "init", {"init is NoneType": None, "init is int": 0, "init is list": [[0.5]]}),
    (transfer, "init", {"unknown init 'white'": "white", "init has values outside": -noise()}),
    (synthesize, "init", {"unknown init 'content'": "content"}),  # it has none
    (reconstruct, "layers", LAYERS | {NONE: []}),
    (synthesize, "layers", LAYERS | {NONE: (), "unknown layer b'conv1_1'": b"conv1_1"}),
    (synthesize, "layers", {"weight of conv2_1 is -1.0": {"conv1_1": 1.0, "conv2_1": -1.0}}),
    (transfer, "content_layers", LAYERS),
    (transfer, "style_layers", LAYERS | {"weight of conv2_1 is '1'": {"conv1_1": 1.0, "conv2_1": "1"}}),
    (transfer, "coarse_to_fine", {f"coarse_to_fine is {value!r}: use True or False": value for value in ("no", None)}),
    *[(transfer, option, {f"{option} is 1000": 10**400}) for option in ("memory", "content_weight", "evaluations")],
    (transfer, "callback", {"callback is 5: give a function of an image and a Step": 5}),
    (nst.optimise, "task", {"... (Tensor): give a Task": noise()}),  # a long value is shown by its beginning
]


@pytest.mark.parametrize(
    "task, options, text",
    [(task, {name: value}, text) for task, name, cases in REFUSED for text, value in cases.items()]
    + [
        (synthesize, {"layers": "conv5_1", "shape": (15, 40)}, "a 15x40 image is too small for conv5_1"),
        (reconstruct, {"layers": "conv5_1", "content": noise()}, "a 15x41 image is too small for conv5_1"),
        (transfer, {"content_layers": (), "style_layers": {}}, NONE),
        (transfer, {"content_weight": 0, "style_weight": 0}, "content_weight is 0 and style_weight 0, and no layer"),
        (transfer, {"content_weight": 0, "style_layers": ()}, "content_weight is 0 and style_weight 10000.0, and"),
        (transfer, {"content_layers": (), "style_weight": 0}, "content_weight is 1.0 and style_weight 0, and no layer"),
        (nst.optimise, {"task": nst.Task("a.jpg", noise(), (), "conv1_1")}, "content is str"),  # without layers, too
    ],
)
def test_bad_input_is_named_in_one_sentence(task, options, text, arguments, refuses):
    with refuses(text):
        task(**arguments(task) | options)


def test_an_infinite_first_loss_is_refused(settings, content, refuses):
    """A network may answer with any numbers."""
    vgg = copy.deepcopy(settings["vgg"])
    for factor, loss in ((1e25, "inf"), (math.nan, "nan")):
        vgg.conv2_1.weight.mul_(factor)
        with refuses(f"the loss of the first image is {loss}"):
            reconstruct(content, "conv2_1", **settings | {"vgg": vgg})
