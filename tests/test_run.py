"""A run as its users see it, and what it has the network do, which a hook on the network's first layer tells."""

import functools
import gc
import itertools
import math
import weakref
from unittest import mock

import pytest
import torch

import style_transfer.engine.run
from style_transfer.engine.evaluation import RELATIVE_TOLERANCE
from style_transfer.engine.images import resize
from style_transfer.engine.objective import Task
from style_transfer.engine.optimiser import ProjectedLBFGS
from style_transfer.engine.prior import draw_noise, spectral_preconditioner
from style_transfer.engine.run import Run
from style_transfer.engine.schedule import SLOW
from style_transfer.engine.vgg import FIRST_FIVE, first_kernels

BOTH = ("bfloat16", "float32")
EQUAL = dict.fromkeys(FIRST_FIVE, 1.0)  # weights of style layers
OTHER = torch.rand(1, 3, 22, 28, generator=torch.Generator().manual_seed(2))


class Watch:
    """A forward hook of a convolution and of all its copies."""

    def __init__(self):
        self.copies, self.shapes, self.targets = 0, [], []  # targets: weak references to feature maps without a graph
        self.change = lambda output: None  # what takes the place of an evaluation's feature map

    def __deepcopy__(self, memo):
        self.copies += 1
        return self

    def __call__(self, module, inputs, output):
        self.shapes.append(tuple(output.shape[-2:]))
        if torch.is_grad_enabled():
            return self.change(output)
        self.targets.append(weakref.ref(output))

    def alive(self):
        return sum(target() is not None for target in self.targets)


@pytest.fixture
def watch(vgg):
    watch = Watch()
    hook = vgg.conv1_1.register_forward_hook(watch)
    yield watch
    hook.remove()


@pytest.fixture
def made(watch, monkeypatch):
    """made(): how many copies of the network, targets, evaluators and preconditioners have been made so far."""
    counting = [mock.Mock(wraps=make) for make in (style_transfer.engine.run.evaluator, spectral_preconditioner)]
    monkeypatch.setattr(style_transfer.engine.run, "evaluator", counting[0])
    monkeypatch.setattr(style_transfer.engine.run, "spectral_preconditioner", counting[1])
    return lambda: torch.tensor([watch.copies, len(watch.targets), *(made.call_count for made in counting)])


@pytest.fixture
def start(vgg):
    """start(task, shape, **options): a `Run` in float32."""
    return functools.partial(Run, vgg=vgg, precision="float32")


@pytest.fixture
def in_both(vgg, monkeypatch):
    """The same in bfloat16 and float32, where any stage has converged at its eleventh evaluation."""
    monkeypatch.setattr(style_transfer.engine.run, "pick_precisions", lambda _, given: (given,) if given else BOTH)
    for stage in SLOW:
        monkeypatch.setitem(SLOW, stage, (10, 1.0))
    return functools.partial(Run, vgg=vgg)


def take(run, count=None):
    """The next so many steps of a run, or all until it is done."""
    return list(itertools.islice(iter(run.step, None), count))


def precisions_of(steps):
    return "".join(step.precision[0] for step in steps)


def without_gradient(output):
    return output.detach() + 0 * output


def test_each_scale_has_its_evaluations(start, picture):
    task = Task(picture(96, 108), None, ("conv1_1",))
    run, expected = start(task, evaluations=10), [(24, 27)] * 2 + [(48, 54)] * 2 + [(96, 108)] * 6
    assert run.scales == ((24, 27), (48, 54), (96, 108)) and run.shape == (96, 108)
    for k, shape in enumerate(expected):
        assert run.pixels_left == sum(map(math.prod, expected[k:]))
        assert run.step().shape == shape == run.scales[0] == run.image.shape[-2:]
    assert run.step() is None and run.pixels_left == 0
    assert run.describe() == "108 x 96 pixels whole, history size 20"
    assert start(task, (48, 56), coarse_to_fine=False).scales == ((48, 56),)


@pytest.mark.parametrize("evaluations, of_coarse", [(1, 0), (8, 2)])
@pytest.mark.parametrize("content_layers, style_layers", [("1", ""), ("", "1"), ("1", "1")])
def test_a_finer_scale_begins_with_the_enlarged_image_and_for_a_style_with_detail_of_the_seed(
    content_layers, style_layers, evaluations, of_coarse, start, picture, monkeypatch
):
    """The first image of the last scale, evaluated before any step. The others may have no evaluation at all."""
    monkeypatch.setattr(Task, "smallest_side", 32)
    layers = [f"conv1_{name}" for name in content_layers], {f"conv1_{name}": 1.0 for name in style_layers}
    run = start(Task(picture(128, 144), picture(60, 50), *layers), evaluations=evaluations, seed=3)
    image = run.image
    assert torch.equal(image, draw_noise((32, 36), 3, "cpu"))
    for shape in ((64, 72), (128, 144)):
        if take(run, of_coarse):
            image = run.image
        noise = draw_noise(shape, 3, "cpu", deviation=0.1)
        detail = (noise - resize(resize(noise, image.shape[-2:]), shape)) * len(style_layers)
        image = (resize(image, shape) + detail).clamp(0, 1)
    assert run.step().shape == (128, 144)
    torch.testing.assert_close(run.image, image)


def test_a_scale_at_which_no_step_lowers_the_loss_gives_way_to_the_next(start, picture, watch):
    watch.change = lambda output: without_gradient(output) if output.shape[-1] == 27 else output
    steps = take(start(Task(picture(48, 54), None, ("conv1_1",)), evaluations=12))
    assert [step.shape for step in steps] == [(24, 27)] + [(48, 54)] * 11


def test_a_large_scale_has_fewer_evaluations_and_float32_is_not_asked_at_its_limit(in_both, picture, monkeypatch):
    monkeypatch.setattr("style_transfer.engine.schedule.LARGE", 24 * 30 / 4)
    assert precisions_of(take(in_both(Task(picture(24, 30), None, ("conv1_1",)), evaluations=10))) == "b" * 5


def test_a_run_has_its_style_as_much_smaller_at_a_coarse_scale(start, picture, watch):
    take(start(Task(None, picture(100, 60), (), {"conv1_1": 1.0}), (128, 144), evaluations=6))
    assert watch.shapes == [(50, 30), *[(64, 72)] * 2, (100, 60), *[(128, 144)] * 4]


def test_what_a_scale_needed_is_gone_when_the_next_begins_and_all_with_the_run(start, picture, watch, monkeypatch):
    """Targets and correction pairs are large: they must go at once, without waiting for the garbage collector."""
    optimisers, alive = weakref.WeakSet(), []

    class Noted(ProjectedLBFGS):
        def __init__(self, *arguments):
            alive.append((len(optimisers), watch.alive()))
            optimisers.add(self)
            super().__init__(*arguments)

    monkeypatch.setattr(style_transfer.engine.run, "ProjectedLBFGS", Noted)
    watch.change = lambda output: alive.append((len(optimisers), watch.alive()))
    gc.collect()
    gc.disable()
    try:
        run = start(Task(picture(96, 108), None, ("conv1_1",)), evaluations=11)
        assert len(take(run)) == 11
        assert alive == [(0, 0), *[(1, 1)] * 2, (0, 0), *[(1, 1)] * 2, (0, 0), *[(1, 1)] * 7]
        del run
        assert not optimisers and not watch.alive()
    finally:
        gc.enable()


def test_a_run_makes_nothing_twice(in_both, picture, made):
    """Two scales, and at the finer one a stage for each precision."""
    steps = take(in_both(Task(None, picture(128, 144), (), {"conv1_1": 1.0})))
    assert {step[:2] for step in steps} == {((64, 72), "bfloat16"), ((128, 144), "bfloat16"), ((128, 144), "float32")}
    assert made().tolist() == [2, 3, 3, 2]


def test_an_image_to_start_from_is_scaled_but_to_no_less_than_512_pixels_a_side(start, picture):
    task, init = Task(picture(30, 36), None, ("conv1_1",)), picture(40, 90, 1)
    torch.testing.assert_close(start(task, init=init).image, resize(init, (30, 36)))
    assert torch.equal(start(task, init="content").image, task.content)
    assert start(task, (1023, 1030), init=init).scales == ((1023, 1030),)
    assert start(task, (1024, 1030), init=init).scales == ((512, 515), (1024, 1030))


def test_images_that_have_a_graph_are_taken_without_it(start, picture):
    content, init = (picture(24, 30, seed).requires_grad_() for seed in (0, 1))
    run = start(Task(2 * content / 2, None, ("conv1_1",)), init=1 - (1 - init))
    for _ in range(3):
        assert not run.image.requires_grad and not run.task.content.requires_grad
        assert not any(torch.is_tensor(value) and value.requires_grad for value in run.state_dict().values())
        run.step()
    assert content.grad is init.grad is None


def test_a_large_image_to_start_from_goes_through_scales_and_keeps_its_detail(start, picture, monkeypatch):
    """What the coarse scale changed is enlarged, and the rest is the image's own."""
    monkeypatch.setattr(style_transfer.engine.run, "BROAD", 32)
    init = picture(64, 96)
    run = start(Task(picture(64, 96, 1), None, ("conv1_1",)), init=init, evaluations=24)
    torch.testing.assert_close(run.image, resize(init, (32, 48)))
    while run.step().shape == (32, 48):
        coarse = run.image
    change = coarse - resize(init, (32, 48))
    assert change.abs().max() > 0.003
    expected = init + torch.nn.functional.interpolate(change, (64, 96), mode="bicubic")
    torch.testing.assert_close(run.image, expected.clamp(0, 1))


@pytest.mark.parametrize(
    "content_layers, style_layer, expected",
    [
        ("conv1_2", "relu1_2", 0.01),
        ("conv4_2", "conv1_1", 0.01),
        ("conv2_2", "conv5_1", 0.1),
        ("relu4_1", "conv3_1", 1e9),
    ],
)
def test_the_first_step_is_down_the_gradient_with_the_prior_weighed_by_the_first_block_in_use(
    content_layers, style_layer, expected, start, picture, vgg
):
    init, cosines = 0.3 + 0.4 * picture(32, 36, 1), {}
    run = start(Task(picture(32, 36), picture(34, 38, 2), content_layers, {style_layer: 1.0}), init=init)
    run.step()
    down = -run.state_dict()["gradient"]
    while torch.equal(run.image, init):
        run.step()
    for weight in (0.01, 0.1, 1e9):  # which is as good as infinite
        direction = spectral_preconditioner(first_kernels(vgg), (32, 36), weight, "cpu")(down)
        cosines[weight] = torch.cosine_similarity(direction, (run.image - init).flatten(), dim=0).item()
    assert cosines.pop(expected) > 0.9999 > 0.995 > max(cosines.values())


def test_the_image_is_the_best_so_far_and_a_retargeted_run_begins_with_that(start, picture, watch, monkeypatch):
    """Where a loss is not known well, an image of a larger one is accepted: here any, and of five the last is worse."""
    monkeypatch.setitem(RELATIVE_TOLERANCE, "float32", math.inf)
    evaluations, seen = itertools.count(1), []
    watch.change = lambda output: output * 1.1 if next(evaluations) == 5 else output
    task = Task(picture(24, 30), None, ("conv1_1",))
    run = start(task, init=0.9 * task.content)
    for _ in range(5):
        step, state = run.step(), run.state_dict()
        seen.append((state["optimiser.losses"][0], state["optimiser.x"]))
        total, image = min(seen, key=lambda pair: pair[0])
        assert step.total == total and torch.equal(run.image.flatten(), image)
        assert state["totals"][-1] == total and torch.equal(state["window"][-1:], run.image)  # the stopping rule's
    assert seen[4][0] > seen[3][0] == total < seen[2][0]
    run.image.zero_()  # a copy
    run.retarget(task._replace(content_weight=2.0))
    assert run.step().total == pytest.approx(2 * total) and torch.equal(run.image.flatten(), image)


@pytest.mark.parametrize(
    "slow, done, precisions",
    [
        (29, 29, "b" * 11 + "f" + "b" * 11 + "f"),
        (29, 22, "b" * 11 + "f" + "b" * 11 + "f" * 12),
        (28, 29, "b" * 11 + "f" * 12),
        (0, 29, "b" * 11 + "f" * 12),
    ],
)
def test_float32_goes_on_where_the_gradient_of_bfloat16_is_another(
    slow, done, precisions, in_both, start, picture, watch
):
    """It is asked when progress is slow and when the run is done. Few columns of thirty then have the right gradient.

    The others have the opposite one, or all have none: cosines of 0.50 and 0.71, 0.29, 0.30 and nan, in their order.
    """
    evaluations = itertools.count(1)

    def change(output):
        columns = {11: slow, 23: done}.get(next(evaluations), 30)
        right, wrong = output[..., :columns], output[..., columns:]
        return torch.cat([right, (2 * wrong.detach() - wrong) if columns else wrong.detach()], dim=-1)

    watch.change = change
    task = Task(picture(24, 30), None, ("conv1_1",))
    run = in_both(task)
    steps, image = take(run, 11), run.image
    steps += take(run, 1)
    assert torch.equal(run.image, image)
    steps += take(run)
    assert precisions_of(steps) == precisions
    alone = take(start(task, init=image))
    assert steps[11] == alone[0] != steps[10] and precisions_of(alone) == "f" * 11  # until it has converged, too
    assert steps[-1].total < 0.9 * steps[11].total  # it did go on


@pytest.mark.parametrize(
    "expected, changes",
    [
        ([0, 0, 0, 0], {"style_weight": 1e6, "content_weight": 2.0}),
        ([0, 0, 0, 0], {"style_layers": dict.fromkeys(FIRST_FIVE, 0.5)}),
        ([0, 0, 0, 0], {"style_layers": EQUAL | {"conv1_1": 0.0}}),
        ([0, 2, 1, 0], {"style": OTHER}),
        ([0, 2, 1, 0], {"content": OTHER}),
        ([0, 1, 1, 0], {"content": None, "content_layers": ()}),
        ([0, 2, 1, 0], {"content_layers": "conv2_1"}),
        ([0, 2, 1, 0], {"style_layers": dict(zip(reversed(FIRST_FIVE), (1, 2, 3, 4, 5)))}),
        ([0, 2, 1, 0], {"content_layers": FIRST_FIVE[1::-1], "style_layers": dict.fromkeys(FIRST_FIVE[1:], 1.0)}),
        ([1, 2, 1, 0], {"style_layers": EQUAL | {"conv3_2": 1.0}}),
        ([1, 2, 1, 1], {"content_layers": "conv2_1", "style_layers": {"conv2_2": 1.0}}),
    ],
)
def test_a_retargeted_run_makes_what_it_needs_and_goes_on_as_a_new_one(changes, expected, start, picture, made):
    """Of networks, targets, evaluators, preconditioners. Losses, limit, correction pairs are those of a new run."""
    task = Task(picture(24, 30), picture(20, 26, 1), ("conv1_2",), EQUAL)
    run = start(task, evaluations=6)
    before, first, image = take(run, 4), made(), run.image
    run.retarget(task._replace(**changes))
    assert torch.equal(run.image, image)
    steps = take(run)
    assert first.tolist() == [1, 2, 1, 1] and (made() - first).tolist() == expected
    new = start(task._replace(**changes), (24, 30), init=image, evaluations=6)
    assert len(steps) == 6 and steps == take(new) and torch.equal(run.image, new.image) and steps[0] != before[-1]


@pytest.mark.parametrize("count", [1, 6, 13])
def test_a_retargeted_run_begins_its_precisions_and_its_stopping_rule_afresh(count, in_both, picture, watch):
    """It has no gradient in bfloat16 here, and is done after 13 evaluations."""
    watch.change = lambda output: without_gradient(output) if output.dtype == torch.bfloat16 else output
    task = Task(picture(24, 30), picture(20, 26, 1), ("conv1_2",), {"conv1_1": 1.0, "conv2_1": 1.0})
    run = in_both(task, evaluations=20)
    assert precisions_of(take(run, count)) == "b" + "f" * (count - 1) and (run.step() is None) == (count == 13)
    run.retarget(task._replace(content_weight=7.0))
    assert precisions_of(take(run)) == "b" + "f" * 12


def test_a_retargeted_run_keeps_the_scales_that_are_left_and_begins_their_limits_afresh(start, picture):
    task = Task(picture(96, 108), None, ("conv1_1",))
    run, other = start(task, evaluations=11), task._replace(content=picture(90, 70, 1))
    assert len(take(run, 3)) == 3
    image = run.image
    run.retarget(other)
    assert run.scales == ((48, 54), (96, 108)) and torch.equal(run.image, image)
    assert run.pixels_left == 3 * 48 * 54 + 8 * 96 * 108
    steps = take(run)
    assert [step.shape for step in steps] == [(48, 54)] * 3 + [(96, 108)] * 8
    assert steps[:3] == take(start(other, (48, 54), init=image), 3)


def test_a_run_retargeted_before_the_first_evaluation_of_a_scale_begins_with_the_enlarged_image(start, picture, watch):
    task = Task(picture(48, 54), None, ("conv1_1",))
    run = start(task, evaluations=9)
    take(run, 3)
    coarse = run.image
    watch.change = mock.Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    watch.change = lambda output: output
    run.retarget(task._replace(content_weight=2.0))
    assert run.scales == ((48, 54),) and torch.equal(run.image, coarse)
    assert run.step().shape == (48, 54)
    torch.testing.assert_close(run.image, resize(coarse, (48, 54)))


def test_a_bad_task_is_refused_and_leaves_the_run_as_it_was(start, picture, refuses):
    task = Task(picture(24, 30), picture(20, 26, 1), ("conv1_2",), {"conv1_1": 1.0})
    run, twin = (start(task, evaluations=9) for _ in range(2))
    assert take(run, 4) == take(twin, 4)
    on_gpu = type("OnGPU", (torch.Tensor,), {"device": torch.device("cuda", 0)})  # so it says
    for changes, named in (
        ({"style_weight": -1.0}, "style_weight is -1.0"),
        ({"content": picture(24, 30) + 1}, "content has values outside"),
        ({"content_layers": ("conv6_1",)}, "conv6_1"),
        ({name: getattr(task, name).as_subclass(on_gpu) for name in ("content", "style")}, "cuda:0 and the run on cpu"),
    ):
        with refuses(named):
            run.retarget(task._replace(**changes))
    assert take(run) == take(twin) and torch.equal(run.image, twin.image)
