import copy
import inspect
import itertools
import math

import numpy as np
import pytest
import torch

import nst_utils
from nst_engine.network import cut_network
from nst_engine.prior import draw_noise
from nst_utils import (
    FIRST_FIVE,
    IMAGES,
    Run,
    Task,
    difference_numbers,
    load_image,
    make_objective,
    optimise,
    reconstruct_content,
    resize,
    synthesize_texture,
    transfer_style,
)

QUICK = {"evaluations": 12, "coarse_to_fine": False}


def non_increasing(losses):
    return all(after <= before for before, after in itertools.pairwise(losses))


# --- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def watched(vgg):
    """A function: a network that calls `see(shape)` before each evaluation, of an image of this shape."""

    def watch(see):
        network = copy.deepcopy(vgg)

        def look(module, inputs):
            if torch.is_grad_enabled():  # off while targets are computed
                see(tuple(inputs[0].shape[-2:]))

        network.conv1_1.register_forward_pre_hook(look)
        return network

    return watch


@pytest.fixture(scope="module")
def transfer(settings):
    """One transfer from noise over two scales: (result, what the callback saw)."""
    content = load_image(IMAGES / "content" / "chenonceau.jpg", 128, "cpu")[..., :150]
    style = load_image(IMAGES / "style" / "starry_night.jpg", 100, "cpu")
    calls = []
    result = transfer_style(
        content,
        style,
        evaluations=25,
        content_weight=2.0,
        style_weight=3e3,
        callback=lambda *a: calls.append(a),
        **settings,
    )
    return result, calls


def test_what_a_run_gives_back(transfer):
    result, _ = transfer
    assert result.image.shape == (1, 3, 128, 150) and result.image.dtype == torch.float32
    assert result.image.min() >= 0 and result.image.max() <= 1 and not result.image.requires_grad
    assert len(result.history) == result.evaluations == 25
    assert 0 < result.seconds < 600


def test_losses_never_rise_and_do_fall_at_each_scale(transfer):
    by_scale = {shape: list(steps) for shape, steps in itertools.groupby(transfer[0].history, lambda step: step.shape)}
    assert list(by_scale) == [(64, 75), (128, 150)]
    for steps in by_scale.values():
        assert non_increasing([step.total for step in steps])
        assert steps[-1].total < 0.7 * steps[0].total


def test_the_total_weighs_content_and_style(transfer):
    for step in transfer[0].history:
        assert step.total == pytest.approx(2.0 * step.content + 3e3 * step.style, rel=1e-4)
    assert any(
        step.total != pytest.approx(3e3 * step.content + 2.0 * step.style, rel=0.1) for step in transfer[0].history
    )


def test_the_callback_sees_every_evaluation(transfer):
    result, calls = transfer
    assert [step for _, step in calls] == result.history
    for image, step in calls:
        assert image.shape == (1, 3, *step.shape) and 0 <= image.min() and image.max() <= 1
    assert torch.equal(calls[-1][0], result.image)


def test_the_optimiser_moves_only_to_an_image_of_smaller_loss(content, style, vgg):
    """Where the optimiser is, not what is shown, which is the best so far; by the helper's formula."""
    task = Task(content, style, ("conv1_2",), dict.fromkeys(FIRST_FIVE, 1.0))
    optimisation = Run(task, evaluations=30, coarse_to_fine=False, vgg=vgg, precision="float32")
    states = [optimisation.state_dict() for _ in iter(optimisation.step, None)]
    objective = make_objective(vgg, content, style, ("conv1_2",), FIRST_FIVE, 1.0, 1e4)
    totals = [objective(state["optimiser.x"].view_as(content))[0].item() for state in states]
    assert len(totals) == 30 and totals == pytest.approx([state["optimiser.losses"][0] for state in states], rel=1e-3)
    assert all(after <= 1.0001 * before for before, after in itertools.pairwise(totals))
    assert totals[-1] < 0.1 * totals[0]


@pytest.mark.parametrize("evaluations", [1, 2, 5, 9])
def test_the_number_of_evaluations_is_kept_to(evaluations, settings, picture, watched):
    """Counted at the network, not in the history."""
    seen = []
    options = settings | {"vgg": watched(seen.append)}
    result = reconstruct_content(picture(70, 66), evaluations=evaluations, **options)
    assert len(seen) == result.evaluations == len(result.history) == evaluations


def test_an_interrupt_returns_the_best_picture_so_far(settings, content, style):
    seen = []

    def stop(image, step):
        seen.append(image)
        if len(seen) == 4:
            raise KeyboardInterrupt

    result = transfer_style(content, style, callback=stop, **QUICK, **settings)
    assert result.evaluations == len(result.history) == 4
    assert torch.equal(result.image, seen[-1])


def test_an_interrupt_at_a_coarse_scale_returns_the_whole_size(settings, picture):
    def stop(image, step):
        raise KeyboardInterrupt

    result = reconstruct_content(picture(70, 90), callback=stop, evaluations=9, **settings)
    assert result.history[0].shape == (35, 45) and result.image.shape == (1, 3, 70, 90)


def test_a_seed_repeats_a_run_bit_for_bit(settings, content, style):
    runs = [transfer_style(content, style, seed=seed, **QUICK, **settings) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].image, runs[1].image) and runs[0].history == runs[1].history
    assert difference_numbers(runs[0].image, runs[2].image).share > 0.5


def test_a_run_from_noise_starts_with_the_seeds(settings, content):
    start = {"evaluations": 1, "coarse_to_fine": False}
    a, b, default = (
        reconstruct_content(content, **seed, **start, **settings).image for seed in ({"seed": 1}, {"seed": 2}, {})
    )
    assert torch.equal(a, draw_noise(content.shape[-2:], 1, "cpu")) and not torch.equal(a, b)
    assert torch.equal(default, reconstruct_content(content, seed=0, **start, **settings).image)
    state = torch.get_rng_state()
    torch.manual_seed(99)  # the seed alone decides, and the global generator is left as it was
    assert torch.equal(a, reconstruct_content(content, seed=1, **start, **settings).image)
    torch.set_rng_state(state)


def test_content_start_is_the_content(settings, content, style):
    result = transfer_style(content, style, init="content", evaluations=1, coarse_to_fine=False, **settings)
    assert torch.equal(result.image, content)
    assert result.history[0].content == pytest.approx(0, abs=1e-9) and result.history[0].style > 1e-4


def test_style_target_is_the_styles(settings, content, picture):
    """From a picture that is the style, of the content's size, no style is left to learn; the content is."""
    style = picture(*content.shape[-2:])
    result = transfer_style(content, style, init=style, evaluations=1, coarse_to_fine=False, **settings)
    assert result.history[0].style == pytest.approx(0, abs=1e-9) and result.history[0].content > 1e-2


def test_a_start_picture_is_used_and_not_changed(settings, content, picture):
    init = picture(30, 31)  # of another size
    before, content_before = init.clone(), content.clone()
    start = reconstruct_content(content, init=init, evaluations=1, coarse_to_fine=False, **settings)
    torch.testing.assert_close(start.image, resize(init, content.shape[-2:]))
    reconstruct_content(content, init=init, **QUICK, **settings)
    reconstruct_content(content, layers="conv2_1", init="content", **QUICK, **settings)
    assert torch.equal(init, before) and torch.equal(content, content_before)


def test_a_result_is_not_the_content_itself(settings, picture):
    """Painting on the result must not paint on the picture it came from."""
    source = picture(24, 20)
    result = reconstruct_content(source, init="content", evaluations=1, coarse_to_fine=False, **settings)
    result.image.zero_()
    assert torch.equal(source, picture(24, 20))


def test_a_reconstruction_comes_close(settings):
    content = load_image(IMAGES / "content" / "kitten_on_fence.jpg", 64, "cpu")
    result = reconstruct_content(content, evaluations=60, **settings)
    assert difference_numbers(result.image, content).psnr > 18
    assert result.history[-1].style == 0 and result.history[-1].total == pytest.approx(result.history[-1].content)


def gradients(image):
    """How much each pixel differs from the next ones, (H - 1, W - 1)."""
    across, down = image.diff(dim=3).abs()[0, :, :-1], image.diff(dim=2).abs()[0, :, :, :-1]
    return (across + down).mean(dim=0)


@pytest.mark.parametrize("layer", ["conv3_4", "conv4_4"])
def test_a_deep_layer_gives_a_picture_and_no_coloured_noise(layer, settings):
    content = load_image(IMAGES / "content" / "kitten_on_fence.jpg", 48, "cpu")
    result = reconstruct_content(content, layer, evaluations=30, **settings)
    assert gradients(result.image).mean() < 1.7 * gradients(content).mean()
    assert difference_numbers(result.image, content).psnr > 14


def test_a_transfer_has_no_frame(settings):
    content = load_image(IMAGES / "content" / "chenonceau.jpg", 96, "cpu")[..., :96].contiguous()
    style = load_image(IMAGES / "style" / "starry_night.jpg", 96, "cpu")
    result = transfer_style(content, style, init="content", evaluations=40, **settings)
    change, inside = gradients(result.image), gradients(result.image)[3:-3, 3:-3]
    outside = (change.sum() - inside.sum()) / (change.numel() - inside.numel())
    assert outside < 1.25 * inside.mean()


def test_a_texture_takes_a_shape_of_its_own(settings, style):
    result = synthesize_texture(style, shape=(33, 47), **QUICK, **settings)
    assert result.image.shape == (1, 3, 33, 47)
    assert result.history[-1].total < 0.5 * result.history[0].total and result.history[-1].content == 0
    assert synthesize_texture(style, "conv1_1", **QUICK, **settings).image.shape == style.shape


def test_a_style_may_have_any_size(settings, content, picture):
    result = transfer_style(content, picture(90, 33), evaluations=4, **settings)
    assert result.image.shape == content.shape


def test_a_small_style_survives_the_coarse_scales(settings, picture):
    """12 pixels are enough for conv3_1; the style must not be shrunk below the 4 which that layer needs."""
    content, style = picture(256, 256), picture(12, 12)
    assert transfer_style(content, style, evaluations=4, **settings).image.shape == content.shape


def test_the_weights_pull_the_right_way(settings, content, style):
    styled = transfer_style(content, style, content_weight=1.0, style_weight=1e5, **QUICK, **settings).history[-1]
    kept = transfer_style(content, style, content_weight=100.0, style_weight=1.0, **QUICK, **settings).history[-1]
    assert styled.style < 0.3 * kept.style and kept.content < 0.3 * styled.content


def test_one_weight_may_be_zero(settings, content, style):
    alone = transfer_style(content, style, style_weight=0, **QUICK, **settings)
    torch.testing.assert_close(alone.image, reconstruct_content(content, **QUICK, **settings).image, atol=0.02, rtol=0)


def test_bfloat16_agrees_loosely(settings, content, style):
    single = transfer_style(content, style, **QUICK, **settings)
    half = transfer_style(content, style, **QUICK, **(settings | {"precision": "bfloat16"}))
    assert half.image.dtype == torch.float32
    assert half.history[0].total == pytest.approx(single.history[0].total, rel=0.02)
    assert half.history[0] != single.history[0]  # it was not float32 after all
    assert half.history[-1].total == pytest.approx(single.history[-1].total, rel=0.3)


def test_float32_goes_on_where_bfloat16_ends(settings, content, monkeypatch):
    monkeypatch.setattr("nst_engine.run.pick_precisions", lambda *_: ("bfloat16", "float32"))
    result = reconstruct_content(content, init=torch.full_like(content, 0.5), evaluations=200, **settings)
    precisions = [step.precision for step in result.history]
    switch = precisions.index("float32")
    assert set(precisions[:switch]) == {"bfloat16"} and set(precisions[switch:]) == {"float32"}
    assert result.history[-1].total < 0.1 * result.history[switch].total


def test_float32_is_only_asked_where_rounding_does_not_matter(settings, content, style, monkeypatch):
    """With networks that do not round at all: it is evaluated twice, once when progress is slow and once at the end."""
    cut = cut_network
    monkeypatch.setattr("nst_engine.run.cut_network", lambda vgg, last, device, _: cut(vgg, last, device, "float32"))
    monkeypatch.setattr("nst_engine.run.pick_precisions", lambda *_: ("bfloat16", "float32"))
    result = transfer_style(content, style, init="content", evaluations=300, **settings)
    asked = [k for k, step in enumerate(result.history) if step.precision == "float32"]
    assert len(asked) == 2 and asked[-1] == result.evaluations - 1 < 299


def test_correction_pairs_are_kept_from_bfloat16_to_float32_and_begin_afresh_at_a_finer_scale(
    vgg, picture, monkeypatch
):
    monkeypatch.setattr("nst_engine.run.pick_precisions", lambda *_: ("bfloat16", "float32"))
    optimisation = Run(Task(picture(48, 50), None, ("conv1_2",)), evaluations=1000, vgg=vgg)
    known, pairs = {}, []
    while step := optimisation.step():
        pairs.append(len(optimisation.state_dict()["optimiser.slots"]))
        if optimisation.state_dict()["precision"] == step.precision:  # not where it is only asked
            known.setdefault((step.shape, step.precision), (pairs[-1], pairs[-2:][0]))
    stages = [((24, 25), "bfloat16"), ((48, 50), "bfloat16"), ((48, 50), "float32")]
    assert list(known) == stages
    assert known[stages[0]] == (0, 0) and known[stages[1]][0] == 0 < known[stages[1]][1]
    assert known[stages[2]][0] > 0


def test_an_easy_picture_costs_less(settings, content, style):
    result = transfer_style(content, style, "conv1_1", "conv1_1", init="content", evaluations=1000, **settings)
    assert result.evaluations < 500
    before, end = result.history[-11].total, result.history[-1].total
    assert before / end - 1 < 1.01 * 0.005  # it had become slow


def test_a_reconstruction_ends_when_nobody_sees_a_change(settings):
    """Its loss would fall for ever."""
    content = load_image(IMAGES / "content" / "kitten_on_fence.jpg", 64, "cpu")
    seen = []
    result = reconstruct_content(content, callback=lambda image, _: seen.append(image), evaluations=500, **settings)
    assert 40 < result.evaluations < 400
    assert difference_numbers(seen[-11], seen[-1]).share < 0.001 < difference_numbers(seen[-13], seen[-3]).share
    assert difference_numbers(result.image, content).psnr > 40


def test_layers_by_either_name_and_one_or_several(settings, content):
    a = reconstruct_content(content, "conv2_1", **QUICK, **settings)
    b = reconstruct_content(content, ["conv_3"], **QUICK, **settings)
    assert torch.equal(a.image, b.image)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_any_precision_become_float32(dtype, settings, content, style):
    content, style = content.to(dtype), style.to(dtype)
    result = transfer_style(content, style, init="content", **QUICK, **settings)
    expected = transfer_style(content.float(), style.float(), init="content", **QUICK, **settings)
    assert result.image.dtype == torch.float32 and torch.equal(result.image, expected.image)
    start = reconstruct_content(content, init=content, evaluations=1, **settings)
    assert torch.equal(start.image, content.float())


def test_numbers_of_other_libraries_are_numbers(settings, content, style):
    options = {"evaluations": 3, "coarse_to_fine": False, "seed": 2}
    others = {"evaluations": np.int64(3), "coarse_to_fine": False, "seed": torch.tensor(2)}
    a = transfer_style(content, style, content_weight=2.0, style_weight=1e3, **options, **settings)
    b = transfer_style(
        content, style, content_weight=np.float32(2), style_weight=torch.tensor(1e3), **others, **settings
    )
    assert torch.equal(a.image, b.image) and a.history == b.history
    shape = (np.int64(33), torch.tensor(47))
    assert synthesize_texture(style, shape=shape, **options, **settings).image.shape == (1, 3, 33, 47)


def test_defaults_are_the_assignments(settings, content, style, picture):
    """Said by hand, bit for bit: conv1_2 with 1, the first five convolutions with 1e4, noise of seed 0."""
    few = {"evaluations": 3, **settings}
    five = ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1")
    assignment = (["conv1_2"], five, 1, 1e4)
    start = {"init": "noise", "seed": 0, "coarse_to_fine": True}
    content = picture(130, 128)
    for default, said in (
        (
            transfer_style(content, style, **few),
            transfer_style(content, style, *assignment, **start, **few),
        ),
        (reconstruct_content(content, **few), reconstruct_content(content, ["conv1_2"], **start, **few)),
        (synthesize_texture(content, **few), synthesize_texture(content, five, shape=(130, 128), **start, **few)),
    ):
        assert torch.equal(default.image, said.image) and default.history == said.history
    texture = synthesize_texture(content, **few).history[-1]
    assert texture.total == pytest.approx(1e4 * texture.style, rel=1e-4)
    assert inspect.signature(Run).parameters["evaluations"].default == 225


class Shell:
    """Stands in for IPython's, whose count identifies the cell."""

    execution_count = 7


def test_an_interrupt_ends_the_cell_and_not_one_run_of_a_loop(settings, content, monkeypatch):
    monkeypatch.setattr(nst_utils, "get_ipython", lambda: Shell)
    monkeypatch.setattr(nst_utils, "_interrupted", set())
    finished = []

    def stop(image, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            finished.append(reconstruct_content(content, callback=stop, **QUICK, **settings))
    assert len(finished) == 1 and finished[0].evaluations == 1  # its picture is kept
    monkeypatch.setattr(Shell, "execution_count", 8)  # the next cell
    assert reconstruct_content(content, **QUICK, **settings).evaluations == 12


def test_in_a_script_the_next_run_begins(settings, content):
    def stop(image, step):
        raise KeyboardInterrupt

    for _ in range(2):
        assert reconstruct_content(content, callback=stop, **QUICK, **settings).evaluations == 1


def test_an_interrupt_before_the_first_evaluation_is_an_interrupt(settings, content, watched):
    """There is no image yet that could be the result."""

    def interrupt(shape):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct_content(content, **QUICK, **(settings | {"vgg": watched(interrupt)}))


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["content_weight", "style_weight"])
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, -math.inf, 1e13, "1", None, torch.ones(1), 1j])
def test_a_bad_weight_is_named(name, weight, settings, content, style, refuses):
    with refuses(ValueError, f"{name} is {weight!r}"):
        transfer_style(content, style, **{name: weight}, **settings)


@pytest.mark.parametrize("evaluations", [0, -1, 2.5, None, True, torch.tensor(2.0)])
def test_a_bad_number_of_evaluations_is_named(evaluations, settings, content, refuses):
    with refuses(ValueError, f"evaluations is {evaluations!r}"):
        reconstruct_content(content, evaluations=evaluations, **settings)


def test_a_bad_weight_of_a_layer_is_named(settings, content, style, refuses):
    for weight in (-1.0, math.inf, "1"):
        task = Task(content, style, ("conv1_2",), {"conv1_1": 1.0, "conv2_1": weight})
        with refuses(ValueError, f"weight of conv2_1 is {weight!r}"):
            optimise(task, (8, 8), **settings)


def test_an_infinite_first_loss_is_refused(settings, content, refuses):
    """A network may answer with any numbers."""
    vgg = copy.deepcopy(settings["vgg"])
    vgg.conv2_1.weight.mul_(1e25)
    with refuses(ValueError, "the loss of the first image is inf"):
        reconstruct_content(content, "conv2_1", **(settings | {"vgg": vgg}))


def test_a_layer_named_twice_is_refused(settings, content, style, refuses):
    for layers in (("conv1_2", "conv1_2"), ["conv1_1", "conv1_2", "conv_2"]):
        for run in (
            lambda layers=layers: reconstruct_content(content, layers, **settings),
            lambda layers=layers: synthesize_texture(style, layers, **settings),
            lambda layers=layers: transfer_style(content, style, layers, **settings),
            lambda layers=layers: transfer_style(content, style, style_layers=layers, **settings),
        ):
            with refuses(ValueError, "conv1_2 is among them twice"):
                run()
    task = Task(content, style, (), {"conv1_2": 1.0, "conv_2": 1.0})
    with refuses(ValueError, "conv1_2 is among them twice"):
        optimise(task, (8, 8), **settings)


class Elsewhere(torch.Tensor):
    """A picture that says it is on a GPU."""

    device = torch.device("cuda", 0)


def test_pictures_on_two_devices_are_refused(settings, content, style, refuses):
    with refuses(ValueError, "content is on cpu and style on cuda:0"):
        transfer_style(content, style.as_subclass(Elsewhere), **settings)


@pytest.mark.parametrize("seed", [1.5, None, "0", 2**64, -(2**63) - 1])
def test_a_bad_seed_is_named(seed, settings, content, refuses):
    with refuses(ValueError, f"seed is {seed!r}"):
        reconstruct_content(content, seed=seed, **settings)


def test_an_unknown_start_is_named(settings, content, style, refuses):
    with refuses(ValueError, "unknown init 'white'"):
        transfer_style(content, style, init="white", **settings)
    with refuses(ValueError, "unknown init 'content'"):  # a texture has none
        synthesize_texture(style, init="content", **settings)


def test_an_unknown_precision_is_named(settings, content, refuses):
    with refuses(ValueError, "unknown precision 'float16'"):
        reconstruct_content(content, **(settings | {"precision": "float16"}))


def test_no_layers(settings, content, style, refuses):
    for run in (
        lambda: reconstruct_content(content, [], **settings),
        lambda: synthesize_texture(style, (), **settings),
        lambda: transfer_style(content, style, (), (), **settings),
    ):
        with refuses(ValueError, "no layers given"):
            run()


def test_layers_without_weight(settings, content, style, refuses):
    with refuses(ValueError, "content_weight is 0 and style_weight 0, and every layer named has weight 0"):
        transfer_style(content, style, content_weight=0, style_weight=0, **settings)
    with refuses(ValueError, "content_weight is 0 and style_weight 10000.0, and every layer named has weight 0"):
        transfer_style(content, style, style_layers=(), content_weight=0, **settings)
    with refuses(ValueError, "content_weight is 1.0 and style_weight 0, and every layer named has weight 0"):
        transfer_style(content, style, content_layers=(), style_weight=0, **settings)


def test_unknown_layers_are_named(settings, content, style, refuses):
    for run in (
        lambda: reconstruct_content(content, "conv_17", **settings),
        lambda: synthesize_texture(style, ["conv1_1", "conv_17"], **settings),
        lambda: transfer_style(content, style, "conv_17", **settings),
        lambda: transfer_style(content, style, style_layers="conv_17", **settings),
    ):
        with refuses(ValueError, "unknown layer 'conv_17'"):
            run()


def test_a_picture_too_small_for_its_layers(settings, picture, refuses):
    with refuses(ValueError, "a 15x40 image is too small for conv5_1"):
        reconstruct_content(picture(15, 40), "conv5_1", **settings)


BAD_PICTURES = {
    "(3, 8, 8)": torch.rand(3, 8, 8),
    "(2, 3, 8, 8)": torch.rand(2, 3, 8, 8),
    "(1, 1, 8, 8)": torch.rand(1, 1, 8, 8),
    "(1, 8, 8, 3)": torch.rand(1, 8, 8, 3),
    "(1, 3, 0, 8)": torch.rand(1, 3, 0, 8),
    "torch.uint8": torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
    "str": "chenonceau.jpg",
    "values outside [0, 1]": torch.rand(1, 3, 8, 8) + 0.5,
    "values outside [0, 1] ": -torch.rand(1, 3, 8, 8),
    "not finite": torch.full((1, 3, 8, 8), math.nan),
}


@pytest.mark.parametrize("reason", BAD_PICTURES)
def test_a_bad_picture_is_named(reason, settings, content, style, refuses):
    bad, reason = BAD_PICTURES[reason], reason.strip()
    for name, run in {
        "content": lambda: reconstruct_content(bad, **settings),
        "style": lambda: transfer_style(content, bad, **settings),
        "init": lambda: reconstruct_content(content, init=bad, **settings),
    }.items():
        if not (name == "init" and isinstance(bad, str)):  # there a string is the name of a start
            with refuses(ValueError, reason):
                run()


def test_a_picture_left_out_is_named(settings, content, style, refuses):
    for name, run in {
        "content": lambda: reconstruct_content(None, **settings),
        "style": lambda: synthesize_texture(None, **settings),
        "content ": lambda: transfer_style(None, style, **settings),
        "style ": lambda: transfer_style(content, None, **settings),
    }.items():
        with refuses(ValueError, f"{name.strip()} is NoneType"):
            run()


@pytest.mark.parametrize("init", [None, 0, [[0.5]]])
def test_a_start_that_is_no_picture_is_named(init, settings, content, refuses):
    with refuses(ValueError, f"init is {type(init).__name__}"):
        reconstruct_content(content, init=init, **settings)


@pytest.mark.parametrize("shape", [(0, 5), (5, -1), (5,), (5, 5, 5), (5.5, 5), "ab", 5])
def test_a_bad_shape_is_named(shape, settings, style, refuses):
    with refuses(ValueError, f"shape is {shape!r}"):
        synthesize_texture(style, "conv1_1", shape=shape, **settings)


def test_the_bar_is_there_unless_it_is_not_wanted(settings, content, monkeypatch):
    silent = []

    class Bar(nst_utils.tqdm):
        def __init__(self, *arguments, disable, **options):
            silent.append(disable)
            super().__init__(*arguments, disable=True, **options)

    monkeypatch.setattr(nst_utils, "tqdm", Bar)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for progress in (True, False):
        reconstruct_content(content, evaluations=1, **(settings | {"progress": progress}))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    reconstruct_content(content, evaluations=1, **(settings | {"progress": True}))
    assert silent == [False, True, True]


def test_a_picture_without_layers_is_looked_at_too(settings, style, refuses):
    with refuses(ValueError, "content is str"):
        optimise(Task("a.jpg", style, (), {"conv1_1": 1.0}), **settings)


def test_layers_may_come_from_a_generator(settings, content):
    layers = ("conv1_1", "conv2_1")
    runs = [reconstruct_content(content, given, evaluations=2, **settings) for given in (layers, iter(layers))]
    assert runs[0].history == runs[1].history
