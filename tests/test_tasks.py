"""The three tasks as a notebook calls them: what they give back, where they start and end, and what they refuse."""

import copy
import inspect
import itertools
import math
import types
from unittest import mock

import numpy as np
import pytest
import torch

import nst_utils as nst
from style_transfer.engine.prior import draw_noise

CASTLE, CAT = (nst.IMAGES / "content" / name for name in ("chenonceau.jpg", "kitten_on_fence.jpg"))
NIGHT = nst.IMAGES / "style" / "starry_night.jpg"
QUICK = {"evaluations": 12, "coarse_to_fine": False}
FIRST = {"evaluations": 1, "coarse_to_fine": False}  # the start image


def interrupt(*_):
    raise KeyboardInterrupt


def non_increasing(losses, tolerance=0.0):
    return all(after <= (1 + tolerance) * before for before, after in itertools.pairwise(losses))


def test_a_transfer_gives_its_image_and_every_step_of_its_scales(settings):
    content, calls = nst.load_image(CASTLE, 128, "cpu")[..., :150], []
    options = {"content_weight": 2.0, "style_weight": 3e3, "callback": lambda *seen: calls.append(seen)}
    result = nst.transfer_style(content, nst.load_image(NIGHT, 100, "cpu"), evaluations=25, **options, **settings)
    assert result.image.shape == (1, 3, 128, 150) and result.image.dtype == torch.float32
    assert result.image.min() >= 0 and result.image.max() <= 1 and not result.image.requires_grad
    assert len(result.history) == len(result.times) == result.evaluations == 25
    assert 0 < result.times[0] < result.times[-1] <= result.seconds < 600
    by_scale = {shape: list(steps) for shape, steps in itertools.groupby(result.history, lambda step: step.shape)}
    assert list(by_scale) == [(64, 75), (128, 150)]
    for steps in by_scale.values():  # losses never rise, and do fall
        assert non_increasing([step.total for step in steps]) and steps[-1].total < 0.7 * steps[0].total
    for _, _, total, content_loss, style_loss in result.history:
        assert total == pytest.approx(2.0 * content_loss + 3e3 * style_loss, rel=1e-4)
    assert any(total != pytest.approx(3e3 * a + 2.0 * b, rel=0.1) for *_, total, a, b in result.history)
    assert [step for _, step in calls] == result.history  # the callback sees every evaluation
    for image, step in calls:
        assert image.shape == (1, 3, *step.shape) and 0 <= image.min() and image.max() <= 1
    assert torch.equal(calls[-1][0], result.image)


def test_a_callback_may_do_what_it_likes_with_the_image_and_keep_it(content, settings):
    """It has one of its own each time."""
    kept, steps = [], []
    options = {"evaluations": 7, "init": 0.5 * content, **settings}
    undisturbed = nst.reconstruct_content(content, callback=lambda image, step: kept.append(image), **options)
    copies = [image.clone() for image in kept]
    disturbed = nst.reconstruct_content(
        content, callback=lambda image, step: steps.append(step) or image.mul_(255), **options
    )
    assert torch.equal(disturbed.image, undisturbed.image) and disturbed.history == undisturbed.history == steps
    assert all(torch.equal(image, copy) for image, copy in zip(kept, copies)) and not torch.equal(kept[0], kept[-1])


def test_the_optimiser_moves_only_to_an_image_of_smaller_loss(content, style, vgg):
    """Where the optimiser is, not what is shown, which is the best so far; by the helper's formula."""
    task = nst.Task(content, style, ("conv1_2",), dict.fromkeys(nst.FIRST_FIVE, 1.0))
    optimisation = nst.Run(task, evaluations=30, coarse_to_fine=False, vgg=vgg, precision="float32")
    states = [optimisation.state_dict() for _ in iter(optimisation.step, None)]
    objective = nst.make_objective(vgg, content, style, ("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4)
    totals = [objective(state["optimiser.x"].view_as(content))[0].item() for state in states]
    assert len(totals) == 30 and totals == pytest.approx([state["optimiser.losses"][0] for state in states], rel=1e-3)
    assert non_increasing(totals, 1e-4) and totals[-1] < 0.1 * totals[0]


@pytest.mark.parametrize("evaluations", [1, 2, 5, 9])
def test_the_number_of_evaluations_is_kept_to(evaluations, settings, picture, vgg):
    """Counted at the network, where targets have no gradient, and not in the history."""
    seen = []
    with vgg.conv1_1.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled())):
        result = nst.reconstruct_content(picture(70, 66), evaluations=evaluations, **settings)
    assert sum(seen) == result.evaluations == len(result.history) == evaluations


def test_a_seed_is_its_noise_and_repeats_a_run_bit_for_bit(settings, content, style):
    """Whatever the global generator's is."""
    runs, seen = [], []
    for seed, other in ((3, 98), (3, 99), (4, 98)):
        options = {"seed": seed, "callback": lambda image, _: seen.append(image), **QUICK, **settings}
        with torch.random.fork_rng():
            torch.manual_seed(other)
            runs.append(nst.transfer_style(content, style, **options))
    for first, seed in ((seen[0], 3), (seen[24], 4)):
        assert torch.equal(first, draw_noise(content.shape[-2:], seed, "cpu"))
    assert torch.equal(runs[0].image, runs[1].image) and runs[0].history == runs[1].history
    assert nst.difference_numbers(runs[0].image, runs[2].image).share > 0.5


def test_from_the_content_or_the_style_only_the_other_is_left_to_learn(settings, picture):
    """Painting on the result does not paint on the picture it came from."""
    content, style = picture(24, 20), picture(24, 20, 1)
    result = nst.transfer_style(content, style, init="content", **FIRST, **settings)
    assert torch.equal(result.image, content)
    assert result.history[0].content == pytest.approx(0, abs=1e-9) and result.history[0].style > 1e-4
    result.image.zero_()
    assert torch.equal(content, picture(24, 20))
    (step,) = nst.transfer_style(content, style, init=style, **FIRST, **settings).history
    assert step.style == pytest.approx(0, abs=1e-9) and step.content > 1e-2


def test_a_start_picture_is_used_and_not_changed(settings, content, picture):
    init = picture(30, 31)  # of another size
    before, content_before = init.clone(), content.clone()
    start = nst.reconstruct_content(content, init=init, **FIRST, **settings)
    torch.testing.assert_close(start.image, nst.resize(init, content.shape[-2:]))
    nst.reconstruct_content(content, init=init, **QUICK, **settings)
    nst.reconstruct_content(content, layers="conv2_1", init="content", **QUICK, **settings)
    assert torch.equal(init, before) and torch.equal(content, content_before)


def gradients(image):
    """How much each pixel differs from the next ones, (H - 1, W - 1)."""
    across, down = image.diff(dim=3).abs()[0, :, :-1], image.diff(dim=2).abs()[0, :, :, :-1]
    return (across + down).mean(dim=0)


@pytest.mark.parametrize("layer", ["conv3_4", "conv4_4"])
def test_a_deep_layer_gives_a_picture_and_no_coloured_noise(layer, settings):
    content = nst.load_image(CAT, 32, "cpu")
    result = nst.reconstruct_content(content, layer, evaluations=20, **settings)
    assert gradients(result.image).mean() < 1.7 * gradients(content).mean()
    assert nst.difference_numbers(result.image, content).psnr > 14


def test_a_transfer_has_no_frame(settings):
    content, style = nst.load_image(CASTLE, 64, "cpu")[..., :64].contiguous(), nst.load_image(NIGHT, 64, "cpu")
    result = nst.transfer_style(content, style, init="content", evaluations=40, **settings)
    change, inside = gradients(result.image), gradients(result.image)[3:-3, 3:-3]
    outside = (change.sum() - inside.sum()) / (change.numel() - inside.numel())
    assert outside < 1.25 * inside.mean()


def test_a_texture_takes_a_shape_of_its_own(settings, style):
    result = nst.synthesize_texture(style, shape=(33, 47), **QUICK, **settings)
    assert result.image.shape == (1, 3, 33, 47)
    assert result.history[-1].total < 0.5 * result.history[0].total and result.history[-1].content == 0
    assert nst.synthesize_texture(style, "conv1_1", **FIRST, **settings).image.shape == style.shape


@pytest.mark.parametrize("shape, style_shape, scales", [((48, 50), (90, 33), 1), ((128, 130), (6, 7), 2)])
def test_a_style_may_have_any_size(shape, style_shape, scales, settings, picture):
    """Six pixels are enough for conv3_1; at the coarse scale the style must not have less than the four it needs."""
    result = nst.transfer_style(picture(*shape), picture(*style_shape), evaluations=4, **settings)
    assert result.image.shape == (1, 3, *shape) and len({step.shape for step in result.history}) == scales


def test_the_weights_pull_the_right_way_and_one_may_be_zero(settings, content, style):
    styled, kept, alone = (
        nst.transfer_style(content, style, content_weight=a, style_weight=b, **QUICK, **settings)
        for a, b in ((1.0, 1e5), (100.0, 1.0), (1.0, 0))
    )
    assert styled.history[-1].style < 0.3 * kept.history[-1].style
    assert kept.history[-1].content < 0.3 * styled.history[-1].content
    expected = nst.reconstruct_content(content, **QUICK, **settings)
    torch.testing.assert_close(alone.image, expected.image, atol=0.02, rtol=0)


def test_bfloat16_agrees_loosely(settings, content, style):
    single, half = (
        nst.transfer_style(content, style, **QUICK, **(settings | {"precision": precision}))
        for precision in ("float32", "bfloat16")
    )
    assert half.image.dtype == torch.float32
    assert half.history[0].total == pytest.approx(single.history[0].total, rel=0.02)
    assert half.history[0] != single.history[0]  # it was not float32 after all
    assert half.history[-1].total == pytest.approx(single.history[-1].total, rel=0.3)


def test_the_newest_correction_pairs_are_kept_in_float32_and_none_at_a_finer_scale(vgg, monkeypatch):
    """And float32 goes on from where bfloat16 ends."""
    monkeypatch.setattr("style_transfer.engine.run.pick_precisions", lambda *_: ("bfloat16", "float32"))
    monkeypatch.setattr("style_transfer.engine.run.COSINE", 1.1)  # so that it takes over when it is first asked
    optimisation = nst.Run(nst.Task(nst.load_image(CAT, 48, "cpu"), None, ("conv1_1",)), evaluations=1000, vgg=vgg)
    known, pairs, totals = {}, [], []
    while step := optimisation.step():
        pairs.append(len(optimisation.state_dict()["optimiser.slots"]))
        if optimisation.state_dict()["precision"] == step.precision:  # not where it is only asked
            known.setdefault((step.shape, step.precision), (pairs[-1], pairs[-2:][0]))
        totals += [step.total] * (step.precision == "float32")
    stages = [((24, 42), "bfloat16"), ((48, 85), "bfloat16"), ((48, 85), "float32")]
    assert list(known) == stages
    assert known[stages[0]] == (0, 0) and known[stages[1]][0] == 0 < known[stages[1]][1]
    assert known[stages[2]][0] in (3, 4) and known[stages[2]][1] > 4  # 3 of them, and perhaps the first of its own
    assert totals[-1] < 0.1 * totals[0]


def test_an_easy_picture_costs_less(settings, content, style):
    result = nst.transfer_style(content, style, "conv1_1", "conv1_1", init="content", evaluations=1000, **settings)
    assert result.evaluations < 500
    before, end = result.history[-11].total, result.history[-1].total
    assert before / end - 1 < 1.01 * 0.005  # it had become slow


def test_a_reconstruction_comes_close_and_ends_when_nobody_sees_a_change(settings):
    """Its loss would fall for ever."""
    content, seen = nst.load_image(CAT, 48, "cpu"), []
    result = nst.reconstruct_content(content, callback=lambda image, _: seen.append(image), evaluations=500, **settings)
    totals, full = [step.total for step in result.history], [step.shape for step in result.history].index((48, 85))

    def over(k):
        """Whether nobody sees what ten evaluations have changed, and they have not lowered the loss by much."""
        unseen = nst.difference_numbers(seen[k], seen[k - 10]).psnr > 46
        return unseen and totals[k] > 0.45 * totals[k - 10]

    ends = [over(k) for k in range(full + 10, len(seen))]
    assert ends.pop() and not any(ends) and nst.difference_numbers(result.image, content).psnr > 40
    assert result.history[-1].style == 0 and result.history[-1].total == pytest.approx(result.history[-1].content)


@pytest.mark.parametrize(
    "layers, other", [("conv2_1", ["conv_3"]), (("conv1_1", "conv2_1"), iter(("conv1_1", "conv2_1")))]
)
def test_layers_by_either_name_and_one_or_several_or_from_a_generator(layers, other, settings, content):
    runs = [nst.reconstruct_content(content, given, **QUICK, **settings) for given in (layers, other)]
    assert torch.equal(runs[0].image, runs[1].image) and runs[0].history == runs[1].history


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_any_precision_become_float32(dtype, settings, content, style):
    content, style, options = content.to(dtype), style.to(dtype), {"init": "content", "evaluations": 3, **settings}
    result = nst.transfer_style(content, style, **options)
    expected = nst.transfer_style(content.float(), style.float(), **options)
    assert result.image.dtype == torch.float32 and torch.equal(result.image, expected.image)
    assert torch.equal(nst.reconstruct_content(content, init=content, **FIRST, **settings).image, content.float())


def test_numbers_of_other_libraries_are_numbers(settings, content, style):
    plain = {"evaluations": 3, "seed": 2, "content_weight": 2.0, "style_weight": 1e3}
    others = dict(zip(plain, (np.int64(3), torch.tensor(2), np.float32(2), torch.tensor(1e3))))
    a, b = (nst.transfer_style(content, style, **options, **settings) for options in (plain, others))
    assert torch.equal(a.image, b.image) and a.history == b.history
    shape = (np.int64(33), torch.tensor(47))
    assert nst.synthesize_texture(style, shape=shape, **FIRST, **settings).image.shape == (1, 3, 33, 47)


def test_defaults_are_the_assignments(settings, style, picture):
    """Said by hand, bit for bit: conv1_2 with 1, the first five convolutions with 1e4, noise of seed 0."""
    few, content = {"evaluations": 3, **settings}, picture(130, 128)
    five = ("conv1_1", "conv1_2", "conv2_1", "conv2_2", "conv3_1")
    said = {"init": "noise", "seed": 0, "coarse_to_fine": True, **few}
    transfer, reconstruction, texture = nst.transfer_style, nst.reconstruct_content, nst.synthesize_texture
    for default, by_hand in (
        (transfer(content, style, **few), transfer(content, style, ["conv1_2"], five, 1, 1e4, **said)),
        (reconstruction(content, **few), reconstruction(content, ["conv1_2"], **said)),
        (made := texture(content, **few), texture(content, five, shape=(130, 128), **said)),
    ):
        assert torch.equal(default.image, by_hand.image) and default.history == by_hand.history
    assert made.history[-1].total == pytest.approx(1e4 * made.history[-1].style, rel=1e-4)
    assert inspect.signature(nst.Run).parameters["evaluations"].default == 225


def test_an_interrupt_returns_the_best_picture_so_far(settings, content, style):
    seen = []

    def stop(image, step):
        seen.append(image)
        if len(seen) == 4:
            raise KeyboardInterrupt

    result = nst.transfer_style(content, style, callback=stop, **QUICK, **settings)
    assert result.evaluations == len(result.history) == 4 and torch.equal(result.image, seen[-1])


def test_an_interrupt_at_a_coarse_scale_returns_the_whole_size_and_in_a_script_the_next_run_begins(settings, picture):
    for _ in range(2):
        result = nst.reconstruct_content(picture(70, 90), callback=interrupt, evaluations=9, **settings)
        assert result.evaluations == 1
        assert result.history[0].shape == (35, 45) and result.image.shape == (1, 3, 70, 90)


def test_an_interrupt_ends_the_cell_and_not_one_run_of_a_loop(settings, content, monkeypatch):
    shell = types.SimpleNamespace(execution_count=7)  # stands in for IPython's, whose count identifies the cell
    monkeypatch.setattr(nst, "get_ipython", lambda: shell)
    monkeypatch.setattr(nst, "_interrupted", set())
    finished = []
    with pytest.raises(KeyboardInterrupt):
        for _ in range(3):
            finished.append(nst.reconstruct_content(content, callback=interrupt, **QUICK, **settings))
    assert len(finished) == 1 and finished[0].evaluations == 1  # its picture is kept
    shell.execution_count += 1  # the next cell
    assert nst.reconstruct_content(content, **QUICK, **settings).evaluations == 12


def test_an_interrupt_before_the_first_evaluation_is_an_interrupt(settings, content, vgg):
    """There is no image yet that could be the result."""

    def look(*_):
        if torch.is_grad_enabled():  # off while targets are computed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), vgg.conv1_1.register_forward_hook(look):
        nst.reconstruct_content(content, **QUICK, **settings)


def test_the_bar_is_there_unless_it_is_not_wanted(settings, content, monkeypatch):
    bar = mock.Mock(wraps=nst.tqdm)
    monkeypatch.setattr(nst, "tqdm", bar)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for progress in (True, False, True):
        nst.reconstruct_content(content, **FIRST, **(settings | {"progress": progress}))
        if not progress:
            monkeypatch.setenv("TQDM_DISABLE", "1")
    assert [call.kwargs["disable"] for call in bar.call_args_list] == [False, True, True]


class Elsewhere(torch.Tensor):
    """A picture that says it is on a GPU."""

    device = torch.device("cuda", 0)


WEIGHTS = [-1.0, math.nan, math.inf, -math.inf, 1e13, "1", None, torch.ones(1), 1j]
VALUES = [
    ("reconstruction", "evaluations", [0, -1, 2.5, None, True, torch.tensor(2.0)]),
    ("transfer", "content_weight", WEIGHTS),
    ("transfer", "style_weight", WEIGHTS),
    ("reconstruction", "seed", [1.5, None, "0", 2**64, -(2**63) - 1]),
    ("texture", "shape", [(0, 5), (5, -1), (5,), (5, 5, 5), (5.5, 5), "ab", 5]),
]
BAD_PICTURES = [
    *[(str(size), torch.rand(size)) for size in [(3, 8, 8), (2, 3, 8, 8), (1, 1, 8, 8), (1, 8, 8, 3), (1, 3, 0, 8)]],
    ("torch.uint8", torch.zeros(1, 3, 8, 8, dtype=torch.uint8)),
    *[("values outside [0, 1]", bad) for bad in (torch.rand(1, 3, 8, 8) + 0.5, -torch.rand(1, 3, 8, 8))],
    ("not finite", torch.full((1, 3, 8, 8), math.nan)),
]
SMALL = torch.rand(1, 3, 15, 41)
TWICE = "conv1_2 is among them twice"
NO_WEIGHT = "content_weight is {} and style_weight {}, and every layer named has weight 0"
LAYERS = [("reconstruction", "layers"), ("texture", "layers")]
LAYERS += [("transfer", "content_layers"), ("transfer", "style_layers")]
REFUSED = [  # (what is said, task, options)
    *[(f"{name} is {value!r}", task, {name: value}) for task, name, values in VALUES for value in values],
    *[(f"init is {type(init).__name__}", "reconstruction", {"init": init}) for init in (None, 0, [[0.5]])],
    ("unknown init 'white'", "transfer", {"init": "white"}),
    ("unknown init 'content'", "texture", {"init": "content"}),  # it has none
    ("unknown precision 'half'", "reconstruction", {"precision": "half"}),
    *[(reason, "reconstruction", {name: bad}) for reason, bad in BAD_PICTURES for name in ("content", "init")],
    *[(reason, "transfer", {"style": bad}) for reason, bad in BAD_PICTURES],
    ("content is str", "reconstruction", {"content": "chenonceau.jpg"}),
    ("style is str", "transfer", {"style": "chenonceau.jpg"}),
    *[("content is NoneType", task, {"content": None}) for task in ("reconstruction", "transfer")],
    *[("style is NoneType", task, {"style": None}) for task in ("texture", "transfer")],
    ("a 15x40 image is too small for conv5_1", "texture", {"layers": "conv5_1", "shape": (15, 40)}),
    ("a 15x41 image is too small for conv5_1", "reconstruction", {"layers": "conv5_1", "content": SMALL}),
    ("the images are on cpu and cuda:0", "transfer", {"style": SMALL.as_subclass(Elsewhere)}),
    *[("no layers given", task, {"layers": none}) for task, none in (("reconstruction", []), ("texture", ()))],
    ("no layers given", "transfer", {"content_layers": (), "style_layers": ()}),
    (NO_WEIGHT.format(0, 0), "transfer", {"content_weight": 0, "style_weight": 0}),
    (NO_WEIGHT.format(0, 10000.0), "transfer", {"style_layers": (), "content_weight": 0}),
    (NO_WEIGHT.format(1.0, 0), "transfer", {"content_layers": (), "style_weight": 0}),
    *[(TWICE, task, {name: ("conv1_2", "conv1_2")}) for task, name in LAYERS],
    *[(TWICE, task, {name: ["conv1_1", "conv1_2", "conv_2"]}) for task, name in LAYERS],
    *[("unknown layer 'conv_17'", task, {name: "conv_17"}) for task, name in LAYERS],
    ("unknown layer 'conv_17'", "texture", {"layers": ["conv1_1", "conv_17"]}),
    ("unknown layer b'conv1_1'", "texture", {"layers": b"conv1_1"}),
    ("unknown precision ['float32']", "texture", {"precision": ["float32"]}),
    ("memory is 1e-12: that is too few GiB", "texture", {"memory": 1e-12}),
    ("memory is 1000", "texture", {"memory": 10**400}),
    ("content_weight is 1000", "transfer", {"content_weight": 10**400}),
    ("evaluations is 1000", "transfer", {"evaluations": 10**400}),
    ("callback is 5: give a function of an image and a Step", "transfer", {"callback": 5}),
    ("vgg is 'oxford': give a network from load_vgg19", "transfer", {"vgg": "oxford"}),
]


@pytest.mark.parametrize("sentence, task, options", REFUSED)
def test_bad_input_is_named_in_one_sentence(sentence, task, options, settings, content, style, refuses):
    helper, pictures = {
        "reconstruction": (nst.reconstruct_content, {"content": content}),
        "texture": (nst.synthesize_texture, {"style": style}),
        "transfer": (nst.transfer_style, {"content": content, "style": style}),
    }[task]
    with refuses(sentence):
        helper(**(pictures | settings | options))


@pytest.mark.parametrize("task", [None, 5, "transfer", (1, 2)])
def test_what_is_no_task_is_refused(task, settings, content, refuses):
    run = nst.Run(nst.Task(content, None, ("conv1_1",)), vgg=settings["vgg"])
    for use in (nst.Run, nst.optimise, run.retarget):
        with refuses(f"task is {task!r}: give a Task"):
            use(task)
    for state in (None, {}, [1]):
        with refuses(f"the state is {state!r}: give what state_dict of a run has returned"):
            run.load_state_dict(state)


def test_style_layers_without_weights_have_one_each(content, style):
    tasks = (nst.Task(content, style, "conv1_2", layers) for layers in (["conv1_1"], {"conv1_1": 1.0}))
    assert nst.as_task(next(tasks)).style_layers == nst.as_task(next(tasks)).style_layers == {"conv1_1": 1.0}


def test_a_long_value_is_named_by_its_beginning(content, refuses):
    """And where an image is out of range, how far."""
    with pytest.raises(nst.UserError, match=r"no picture at tensor\(\[\[\[\[.* \(Tensor\): give the path") as caught:
        nst.load_image(content)
    assert len(str(caught.value)) < 200
    with refuses("content has values outside [0, 1] or not finite, -0.5 to 1.75: an image holds RGB in [0, 1]"):
        nst.reconstruct_content(torch.linspace(-0.5, 1.75, 60).view(1, 3, 4, 5))


def test_a_bad_task_is_named_in_one_sentence(settings, content, style, refuses):
    """What no helper passes on."""
    for layers, sentence in (
        ({"conv1_2": 1.0, "conv_2": 1.0}, TWICE),
        *[({"conv1_1": 1.0, "conv2_1": bad}, f"weight of conv2_1 is {bad!r}") for bad in (-1.0, math.inf, "1")],
    ):
        with refuses(sentence):
            nst.optimise(nst.Task(content, style, ("conv1_2",), layers), (8, 8), **settings)
    with refuses("content is str"):  # though it has no layers
        nst.optimise(nst.Task("a.jpg", style, (), {"conv1_1": 1.0}), **settings)


def test_an_infinite_first_loss_is_refused(settings, content, refuses):
    """A network may answer with any numbers."""
    vgg = copy.deepcopy(settings["vgg"])
    vgg.conv2_1.weight.mul_(1e25)
    with refuses("the loss of the first image is inf"):
        nst.reconstruct_content(content, "conv2_1", **(settings | {"vgg": vgg}))
