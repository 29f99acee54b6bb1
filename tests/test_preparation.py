"""One place prepares what a run needs, and nothing in it is made twice."""

import gc
import math
import weakref

import pytest
import torch

from nst_engine import preparation
from nst_engine.preparation import Preparation, Task
from nst_utils import FIRST_FIVE

CPU = torch.device("cpu")
MADE = ("cut_network", "evaluation_of", "spectral_preconditioner", "first_kernels")


@pytest.fixture
def made(monkeypatch):
    """{what: how often it was made}."""
    counts = dict.fromkeys(MADE, 0)

    def counting(name, make):
        def counted(*arguments):
            counts[name] += 1
            return make(*arguments)

        return counted

    for name in MADE:
        monkeypatch.setattr(preparation, name, counting(name, getattr(preparation, name)))
    return counts


def run(prepared, task, shape, evaluations=1000):
    image, scales = prepared.start(task, shape, None)
    return list(prepared.run(task, image, scales, evaluations))


@pytest.mark.parametrize("precisions", [("float32",), ("bfloat16", "float32")])
def test_a_run_makes_nothing_twice(precisions, vgg, picture, made, monkeypatch):
    """Two scales, and at the finer one a stage for each precision."""
    monkeypatch.setattr(preparation, "pick_precisions", lambda *_: precisions)
    task = Task(None, picture(8, 8).repeat_interleave(16, -1).repeat_interleave(16, -2), (), {"conv1_1": 1.0})
    steps = [step for _, step in run(Preparation(vgg, CPU), task, (128, 128))]
    stages = len({(step.shape, step.precision) for step in steps})
    assert stages == len(precisions) + 1
    assert made == {
        "cut_network": len(precisions),
        "evaluation_of": stages,
        "spectral_preconditioner": 2,
        "first_kernels": 1,
    }


def test_the_next_run_has_what_the_one_before_had(vgg, content, style, made):
    """As when a weight is moved in the panel, and then a picture changed."""
    prepared, shape = Preparation(vgg, CPU, "float32"), tuple(content.shape[-2:])
    task = Task(content, style, ("conv1_2",), dict.fromkeys(FIRST_FIVE, 1.0))

    def made_by(task):
        before = dict(made)
        list(prepared.run(task, content, [shape], 1))
        return {name: made[name] - before[name] for name in MADE if made[name] > before[name]}

    assert made_by(task).keys() == set(MADE)
    assert made_by(task._replace(style_weight=1e6, content_weight=2.0)) == {}
    assert made_by(task._replace(style_layers=dict.fromkeys(FIRST_FIVE, 0.5))) == {}
    assert made_by(task._replace(style_layers=dict.fromkeys(FIRST_FIVE, 1.0) | {"conv1_1": 0.0})) == {}
    assert made_by(task._replace(style=content)) == {"evaluation_of": 1}
    assert made_by(task._replace(content_layers=("conv2_1",))) == {"evaluation_of": 1}


def test_nothing_outlives_a_preparation(vgg, content, monkeypatch):
    """Targets are large: they must go at once, without waiting for the collector of circles."""
    made, objective = [], preparation.objective_of

    def noting(*arguments):
        made.append(objective(*arguments).statistics)  # its closure holds the targets
        return objective(*arguments)._replace(statistics=made[-1])

    monkeypatch.setattr(preparation, "objective_of", noting)
    gc.collect()
    gc.disable()
    try:
        prepared = Preparation(vgg, CPU, "float32")
        task, shape = Task(content, None, ("conv1_2",)), tuple(content.shape[-2:])
        list(prepared.run(task, content * 0.9, [shape], 3))
        kept = weakref.ref(made[-1])
        made.clear()
        assert kept() is not None
        del prepared
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("large, kept", [(32 * 32, 1), (math.inf, 2)])
def test_before_a_large_scale_what_coarser_ones_needed_goes(large, kept, vgg, picture, monkeypatch):
    monkeypatch.setattr(preparation, "LARGE", large)
    prepared, image = Preparation(vgg, CPU, "float32"), picture(64, 64)
    list(prepared.run(Task(image, None, ("conv1_1",)), image[..., ::2, ::2], [(32, 32), (64, 64)], 4))
    for each in (prepared.evaluation_of, prepared.preconditioner):
        assert each.cache_info().currsize == kept


def test_a_coarse_scale_has_content_and_style_as_much_smaller(vgg, picture, monkeypatch):
    """The content of the scale's shape; the style by the same factor, but large enough for its deepest layer."""
    sizes, objective = [], preparation.objective_of

    def noting(network, content, style, *rest):
        sizes.append((tuple(content.shape[-2:]), tuple(style.shape[-2:])))
        return objective(network, content, style, *rest)

    monkeypatch.setattr(preparation, "objective_of", noting)
    prepared = Preparation(vgg, CPU, "float32")
    for style, layer, expected in (
        (picture(100, 60), "conv1_1", [(25, 15), (50, 30), (100, 60)]),
        (picture(24, 40), "conv3_1", [(6, 10), (12, 20), (24, 40)]),
        (picture(10, 12), "conv3_1", [(4, 5), (5, 6), (10, 12)]),
        (picture(12, 30), "conv4_1", [(8, 20), (8, 20), (12, 30)]),
    ):
        sizes.clear()
        task = Task(picture(256, 300), style, ("conv1_1",), {layer: 1.0})
        for shape in ((64, 75), (128, 150), (256, 300)):
            prepared.evaluation(task, shape, (256, 300), "float32")
        assert sizes == list(zip([(64, 75), (128, 150), (256, 300)], expected))


def test_a_run_has_its_style_as_much_smaller_at_a_coarse_scale(vgg, picture, monkeypatch):
    sizes, objective = [], preparation.objective_of

    def noting(network, content, style, *rest):
        sizes.append(tuple(style.shape[-2:]))
        return objective(network, content, style, *rest)

    monkeypatch.setattr(preparation, "objective_of", noting)
    run(Preparation(vgg, CPU, "float32"), Task(None, picture(100, 60), (), {"conv1_1": 1.0}), (128, 128), 6)
    assert sizes == [(50, 30), (100, 60)]


def test_the_weight_of_the_prior_goes_by_the_first_block_in_use(vgg, picture):
    weights, prepared = [], Preparation(vgg, CPU, "float32")

    def noting(kernels, shape, weight, device):
        weights.append(weight)
        return lambda gradient: gradient

    prepared.preconditioner = noting
    for content_layers, style_layers in (
        (("conv1_2",), {}),
        (("conv4_2",), {"conv1_1": 1.0}),
        (("conv2_2", "conv5_1"), {}),
        ((), {"relu3_1": 1.0, "conv4_1": 1.0}),
    ):
        image = picture(32, 32)
        list(prepared.run(Task(image, image, content_layers, style_layers), image, [(32, 32)], 1))
    assert weights == [0.01, 0.01, 0.1, math.inf]


@pytest.mark.parametrize(
    "content_layers, style_layers, noisy", [(("conv1_1",), {}, False), ((), {"conv1_1": 1.0}, True)]
)
def test_a_finer_scale_has_drawn_detail_for_a_style_alone(content_layers, style_layers, noisy, vgg, picture):
    flat = torch.full((1, 3, 128, 128), 0.5)
    seen, task = [], Task(flat, flat, content_layers, style_layers)
    for image, step in Preparation(vgg, CPU, "float32").run(task, flat[..., ::2, ::2], [(64, 64), (128, 128)], 40, 1):
        seen += [image] if step.shape == (128, 128) else []
    assert (seen[0].std() > 0.01) == noisy
