"""A run as its users see it, and what it has the network do."""

import functools
import gc
import itertools
import math
import re
import weakref

import pytest
import torch
from watching import OnGPU, alive, flat, plateau

from style_transfer.engine.images import resize
from style_transfer.engine.objective import Task
from style_transfer.engine.optimiser import ProjectedLBFGS
from style_transfer.engine.prior import SpectralPreconditioner, draw_noise
from style_transfer.engine.run import Run
from style_transfer.engine.vgg import FIRST_FIVE, first_kernels

CPU = torch.device("cpu")
CONVERGED = "the loss fell by less than 0.5% in 10 evaluations"
NOT_LOWER = "no step lowers the loss any more"


@pytest.fixture
def start(vgg):
    """start(task, shape, **options): a `Run` in float32."""
    return functools.partial(Run, vgg=vgg, precision="float32")


@pytest.fixture
def in_both(vgg, monkeypatch):
    """The same where bfloat16 is fast, so that it comes before float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    return functools.partial(Run, vgg=vgg)


@pytest.fixture
def task(picture):
    return Task(picture(24, 30), None, "conv1_1")


@pytest.fixture
def transfer(picture):
    return Task(picture(24, 30), picture(20, 26, 1), "conv1_2", dict.fromkeys(FIRST_FIVE, 1.0))


def noted(monkeypatch, kind, note=lambda: None):
    """Weak references to all objects of a class that are made from now on; `note` is called before each."""
    made, init = [], kind.__init__

    def noting(self, *arguments):
        note()
        made.append(weakref.ref(self))
        init(self, *arguments)

    monkeypatch.setattr(kind, "__init__", noting)
    return made


@pytest.fixture
def made(watch, monkeypatch):
    """made(): how many networks, targets and preconditioners have been made so far."""
    preconditioners = noted(monkeypatch, SpectralPreconditioner)
    return lambda: [watch.copies, len(watch.targets), len(preconditioners)]


def take(run, count=None):
    """The next so many steps of a run, or all until it is over."""
    return [*itertools.islice(iter(run.step, None), count)]


def precisions_of(steps):
    return "".join(step.precision[0] for step in steps)


# --- Scales --------------------------------------------------------------------------------------


def test_each_scale_has_its_evaluations(start, picture, task):
    run, expected = start(task, (96, 108), evaluations=10), [(24, 27)] * 2 + [(48, 54)] * 2 + [(96, 108)] * 6
    assert run.scales == ((24, 27), (48, 54), (96, 108)) and run.shape == (96, 108)
    for k, shape in enumerate(expected):
        assert run.pixels_left == sum(map(math.prod, expected[k:])) and run.ended is None
        assert run.step().shape == shape == run.scales[0] == run.image.shape[-2:]
    assert run.step() is None and run.pixels_left == 0
    assert start(task, (48, 56), coarse_to_fine=False).scales == ((48, 56),)
    assert start(task, (768, 2048), evaluations=60).state_dict()["limits"] == (8,) * 5 + (35,)


@pytest.mark.parametrize("evaluations", [1, 8])
@pytest.mark.parametrize(
    "content_layers, style_layers, shape",
    [("conv1_1", (), (96, 108)), ("conv1_1", "conv1_1", (128, 144))],
)
def test_a_finer_scale_begins_with_the_enlarged_image_and_for_a_style_with_detail_of_the_seed(
    content_layers, style_layers, shape, evaluations, start, picture
):
    """The first image of the last scale, evaluated before any step. The others may have no evaluation at all."""
    task = Task(picture(*shape), picture(60, 50), content_layers, style_layers)
    run = start(task, evaluations=evaluations, seed=3)
    image, (coarsest, *finer) = run.image, run.scales
    assert torch.equal(image, draw_noise(coarsest, 3, CPU))
    for shape in finer:
        if take(run, evaluations // (2 + len(finer))):
            image = run.image
        noise = draw_noise(shape, 3, CPU, deviation=0.1)
        detail = noise - resize(resize(noise, image.shape[-2:]), shape)
        image = (resize(image, shape) + detail * bool(style_layers)).clamp(0, 1)
    assert run.step().shape == finer[-1]
    torch.testing.assert_close(run.image, image)


def test_a_scale_at_which_no_step_lowers_the_loss_gives_way_to_the_next(start, task, watch):
    watch.change = lambda output: flat(output) if output.shape[-1] == 30 else output
    assert [step.shape for step in take(start(task, (48, 60), evaluations=8))] == [(24, 30)] + [(48, 60)] * 7


def test_a_run_has_its_style_as_much_smaller_at_a_coarse_scale(start, picture, watch):
    take(start(Task(None, picture(100, 60), (), "conv1_1"), (128, 144), evaluations=4))
    assert watch.shapes == [(50, 30), (64, 72), (100, 60), *[(128, 144)] * 3]


def test_an_image_to_start_from_is_scaled_but_to_no_less_than_512_pixels_a_side(start, picture, task):
    init = picture(40, 90, 1)
    torch.testing.assert_close(start(task, init=init).image, resize(init, (24, 30)))
    assert torch.equal(start(task, init="content").image, task.content)
    for shape, scales in ((1023, 1030), ((1023, 1030),)), ((1024, 1030), ((512, 515), (1024, 1030))):
        assert start(task, shape, init=init).scales == scales


def test_a_large_image_to_start_from_goes_through_scales_and_keeps_its_detail(start, picture, task, monkeypatch):
    """What the coarse scale changed is enlarged, and the rest is the image's own."""
    monkeypatch.setattr("style_transfer.engine.run.MIN_SIDE_FROM_IMAGE", 32)
    init = picture(64, 96)
    run = start(task, (64, 96), init=init, evaluations=12)
    torch.testing.assert_close(run.image, resize(init, (32, 48)))
    while run.step().shape == (32, 48):
        coarse = run.image
    change = coarse - resize(init, (32, 48))
    assert change.abs().max() > 0.003
    expected = init + torch.nn.functional.interpolate(change, (64, 96), mode="bicubic")
    torch.testing.assert_close(run.image, expected.clamp(0, 1))


# --- What is made and kept -----------------------------------------------------------------------


def test_what_a_scale_needed_is_gone_when_the_next_begins_or_a_state_is_loaded(start, task, watch, monkeypatch):
    """Targets and correction pairs are large: they must go at once, without waiting for the garbage collector."""
    seen = []
    watch.change = lambda *_: seen.append((alive(optimisers), alive(watch.targets)))
    optimisers = noted(monkeypatch, ProjectedLBFGS, watch.change)
    gc.collect()
    gc.disable()
    try:
        run, other = (start(task, (96, 108), evaluations=7) for _ in range(2))
        take(run)
        assert seen == [(0, 0), (1, 1), (0, 0), (1, 1), (0, 0), *[(1, 1)] * 5]
        other.step()
        state = run.state_dict()
        del run
        assert alive(optimisers) == alive(watch.targets) == 1
        other.load_state_dict(state)
        assert alive(optimisers) == 1 and not alive(watch.targets)
    finally:
        gc.enable()


def test_a_run_makes_nothing_twice(in_both, task, watch, made):
    """Two scales, and at the finer one a stage for each precision."""
    watch.change = plateau
    steps = take(in_both(task, (48, 60)))
    assert {step[:2] for step in steps} == {((24, 30), "bfloat16"), ((48, 60), "bfloat16"), ((48, 60), "float32")}
    assert made() == [2, 3, 2]


def test_images_that_have_a_graph_are_taken_without_it(start, picture):
    content, init = (picture(24, 30, seed).requires_grad_() for seed in (0, 1))
    run = start(Task(2 * content / 2, None, "conv1_1"), init=1 - (1 - init))
    take(run, 2)
    state = [run.task.content, *run.state_dict().values()]
    assert not any(torch.is_tensor(value) and value.requires_grad for value in state)


# --- Steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_layer, style_layer, weight",
    [
        ("conv1_2", "relu1_2", 0.01),
        ("conv2_2", "conv5_1", 0.1),
        ("relu4_1", "conv3_1", math.inf),
        ("conv4_1", "relu5_1", math.inf),
    ],
)
def test_the_first_step_is_down_the_gradient_with_the_prior_weighed_by_the_first_block_in_use(
    content_layer, style_layer, weight, start, picture, vgg
):
    init = 0.3 + 0.4 * picture(32, 36, 1)
    run = start(Task(picture(32, 36), picture(34, 38, 2), content_layer, style_layer), init=init)
    run.step()
    down = -run.state_dict()["image_gradient"]
    while torch.equal(run.image, init):
        run.step()
    direction = SpectralPreconditioner(first_kernels(vgg), (32, 36), weight, CPU)(down)
    assert torch.cosine_similarity(direction, (run.image - init).flatten(), dim=0) > 0.9999


@pytest.mark.parametrize(
    "precision, rise", [("bfloat16", 0.005), ("bfloat16", 0.05), ("float32", 0.005), ("float32", math.nan)]
)
def test_the_image_is_the_best_so_far_and_not_the_latest(precision, rise, start, task, watch):
    """The loss of the fifth image rises: bfloat16 accepts it, to its precision of 1 %, and float32 refuses it."""
    outputs, run = [], start(task, precision=precision)

    def change(output):
        outputs.append(output)
        if len(outputs) == 5:
            more = (rise * best.total) ** 0.5 * torch.randn(output.shape, generator=torch.Generator())
            return outputs[3].detach() + more + 0 * output

    watch.change = change
    *_, before, best = take(run, 4)
    image = run.image
    assert best.total < before.total and run.step() == best and torch.equal(run.image, image)
    state = run.state_dict()
    assert torch.equal(state["x"], image.flatten()) is not (precision == "bfloat16" and rise < 0.01)
    assert state["totals"][-1] == best.total and torch.equal(state["window"][-1:], image)  # the stopping rule's
    run.image.zero_()  # a copy
    run.retarget(task._replace(content_weight=2.0))
    assert run.step().total == pytest.approx(2 * best.total) and torch.equal(run.image, image)


@pytest.mark.parametrize(
    "columns, precisions", [((29, 28), "b{6}fb{11}f"), ((29, 26), "b{6}fb{11}ff+"), ((1,), "b{6}ff+")]
)
def test_float32_goes_on_where_the_gradient_of_bfloat16_is_another(columns, precisions, in_both, task, watch):
    """Asked when progress is slow, and when the run is over. Then only so many columns of 30 have the right gradient.

    The others have the opposite one. The cosines are 0.7, 0.5, 0.3 and -0.9.
    """
    latest, right = [None], iter(columns)

    def change(output):
        asked = latest.pop() == torch.bfloat16 != output.dtype
        latest.append(output.dtype)
        columns = next(right) if asked else 30
        wrong = output[..., columns:]
        return plateau(torch.cat([output[..., :columns], 2 * wrong.detach() - wrong], dim=-1))

    watch.change = change
    run = in_both(task, evaluations=40)
    assert re.fullmatch(precisions, precisions_of(take(run))) and run.ended == CONVERGED


def test_the_best_image_and_the_three_newest_correction_pairs_go_on_in_float32(in_both, start, task, watch):
    """Which has no gradient here."""
    watch.change = lambda output: flat(output) if output.dtype == torch.float32 else output
    run, seen = in_both(task), []
    while step := run.step():
        seen.append((step, run.image, len(run.state_dict()["slots"])))
    (_, before, pairs), (step, image, kept) = seen[-2:]
    assert pairs > kept == 3 and torch.equal(before, image) and run.ended == NOT_LOWER
    assert [step] == take(start(task, init=image))


@pytest.mark.parametrize(
    "fast, change, evaluations, precisions, ended",
    [
        (False, None, 3, "fff", "the limit of 3 evaluations is reached"),
        (False, None, 99, "f{12,80}", "the image changed by less than 0.5% in 10 evaluations"),
        (False, flat, 3, "f", NOT_LOWER),
        (False, plateau, 99, "f{12}", CONVERGED),
        (True, flat, 3, "bf", NOT_LOWER),
        (True, plateau, 8, "b{7}f", "the limit of 8 evaluations is reached"),
        (True, plateau, 19, "b{7}fb{11}", "the limit of 19 evaluations is reached"),
        (True, plateau, 20, "b{7}fb{11}f", CONVERGED),
    ],
)
def test_a_run_says_why_it_is_over(fast, change, evaluations, precisions, ended, start, in_both, task, watch):
    """And its state does, until it gets another task. It starts near its end."""
    make = functools.partial(in_both if fast else start, task, init=0.99 * task.content, evaluations=evaluations)
    run, again, watch.change = make(), make(), change or watch.change
    assert re.fullmatch(precisions, precisions_of(take(run))) and run.ended == ended
    again.load_state_dict(run.state_dict())
    for over in (run, again):
        assert over.step() is None and over.ended == ended and torch.equal(over.image, run.image)
    run.retarget(task)
    assert run.ended is None and run.step()


def test_a_run_from_an_almost_optimal_image_finds_a_first_step_and_goes_on(start, task):
    """Which is far shorter than the usual one: the trials before it do not count as evaluations without progress."""
    run = start(task, init=0.9999 * task.content)
    first, *_, last = take(run)
    assert last.total < 0.1 * first.total and run.evaluations_left < 200, (first, last, run.ended)


def test_float32_is_not_asked_at_the_limit_of_evaluations_or_of_a_large_scale(in_both, task, watch):
    """Which has fewer evaluations than the run."""
    watch.change = plateau
    run, large = in_both(task, (48, 60), evaluations=9), in_both(task, evaluations=9)
    large.load_state_dict(large.state_dict() | {"limits": (6,)})
    assert precisions_of(take(run)) == "b" * 9 and precisions_of(take(large)) == "b" * 6
    assert run.ended == large.ended == "the limit of 9 evaluations is reached"


# --- Another task --------------------------------------------------------------------------------

OTHER = torch.full((1, 3, 22, 28), 0.3)


@pytest.mark.parametrize(
    "expected, changes",
    [
        ([0, 0, 0], {"style_weight": 1e6, "content_weight": 2.0, "style_layers": dict.fromkeys(FIRST_FIVE, 0.5)}),
        ([0, 2, 0], {"style": OTHER}),
        ([0, 1, 0], {"content": None, "content_layers": ()}),
        ([0, 2, 0], {"content_layers": FIRST_FIVE[1::-1], "style_layers": FIRST_FIVE[1:]}),
        ([1, 2, 0], {"style_layers": (*FIRST_FIVE, "conv3_2")}),
        ([1, 2, 1], {"content_layers": "conv2_1", "style_layers": "conv2_2"}),
    ],
)
def test_a_retargeted_run_makes_what_it_needs_and_goes_on_as_a_new_one(changes, expected, start, transfer, made):
    """Of networks, targets, preconditioners. Losses, limit, correction pairs are those of a new run."""
    run, other = start(transfer, evaluations=6), transfer._replace(**changes)
    take(run, 4)
    first, image = made(), run.image
    run.retarget(other)
    assert torch.equal(run.image, image)
    steps = take(run)
    assert first == [1, 2, 1] and [after - before for before, after in zip(first, made())] == expected
    new = start(other, (24, 30), init=image, evaluations=6)
    assert len(steps) == 6 and steps == take(new) and torch.equal(run.image, new.image)


@pytest.mark.parametrize("count", [4, 12, 20])
def test_a_retargeted_run_begins_its_precisions_and_its_stopping_rule_afresh(count, in_both, task, watch):
    """In each stage, and when it is over."""
    watch.change = plateau
    run, other = in_both(task), task._replace(content_weight=7.0)
    take(run, count)
    new = in_both(other, init=run.image)
    run.retarget(other)
    assert take(run) == take(new) and run.ended == new.ended == CONVERGED


def test_a_run_retargeted_before_the_first_evaluation_of_a_scale_keeps_the_scales_and_begins_their_limits_afresh(
    start, task, watch
):
    """It begins with the enlarged image."""

    def interrupt(output):
        raise KeyboardInterrupt

    run = start(task, (96, 120), evaluations=7)
    take(run, 1)
    coarse, change, watch.change = run.image, watch.change, interrupt
    with pytest.raises(KeyboardInterrupt):
        run.step()
    watch.change = change
    run.retarget(task._replace(content_weight=2.0))
    assert run.scales == ((48, 60), (96, 120)) and run.pixels_left == 2 * 48 * 60 + 5 * 96 * 120
    assert torch.equal(run.image, coarse)
    run.step()
    torch.testing.assert_close(run.image, resize(coarse, (48, 60)))


def test_a_bad_task_is_refused_and_leaves_the_run_as_it_was(start, transfer, refuses):
    run, twin = (start(transfer, (15, 30), evaluations=6) for _ in range(2))
    assert take(run, 3) == take(twin, 3)
    elsewhere = {name: getattr(transfer, name).as_subclass(OnGPU) for name in ("content", "style")}
    for changes, named in (
        ({"content_layers": "conv5_1", "style_weight": -1.0}, "style_weight is -1.0"),
        ({"content_layers": "conv5_1", **elsewhere}, "cuda:0 and the run on cpu"),
        ({"content_layers": "conv6_1"}, "conv6_1"),
        ({"content_layers": "conv5_1"}, "a 15x30 image is too small for conv5_1"),
    ):
        with refuses(named):
            run.retarget(transfer._replace(**changes))
    assert take(run) == take(twin) and torch.equal(run.image, twin.image)
