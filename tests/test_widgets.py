"""The panel without a browser: the painter's promises, the states, and that errors come to light.

The panel's logic is tested on a stand-in for the painter, whose steps the test releases one by one, with a clock that
only these steps move. So nothing depends on how fast the machine is. What the real painter computes is seen by hooks on
the network that it is given, which the engine's copies keep.
"""

import asyncio
import datetime
import html
import io
import json
import math
import re
import shutil
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import nst_utils as nst
import style_transfer.panel.controls
import style_transfer.panel.studio
from style_transfer.engine.checks import MissingFileError, UserError
from style_transfer.engine.saving import as_png, read_settings
from style_transfer.engine.schedule import SLOW
from style_transfer.panel.studio import Painter, Settings, Studio, style_studio

CASTLE, NIGHT = nst.IMAGES / "content" / "chenonceau.jpg", nst.IMAGES / "style" / "starry_night.jpg"
WAVE = nst.IMAGES / "style" / "great_wave.jpg"
LAYERS = tuple((name, 1.0) for name in nst.FIRST_FIVE)
TRANSFER = Settings(CASTLE, NIGHT, 40, "conv1_2", 1.0, 1e4, LAYERS)
# The same from 64 pixels up, by a network of two layers.
THREE_SCALES = TRANSFER._replace(size=256, content_layer="conv1_1", layer_weights=(("conv1_1", 1.0), ("conv1_2", 0.5)))


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """No fast bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Any scale has converged at its eleventh evaluation."""
    for stage in SLOW:
        monkeypatch.setitem(SLOW, stage, (10, 1.0))


@pytest.fixture
def painter(vgg):
    return Painter(vgg)


class Watched:
    """A network, `vgg`, and what it and its copies are run for."""

    def __init__(self):
        self.vgg = nst.load_vgg19(device="cpu")
        self.passes = []  # (layer, height of its map, whether a gradient is wanted); targets have none
        self.broken = None  # a height that no image may have
        for name, module in self.vgg.named_children():
            module.register_forward_hook(lambda module, inputs, output, name=name: self.note(name, output))

    def note(self, layer, output):
        if output.shape[-2] == self.broken:
            raise ZeroDivisionError
        self.passes.append((layer, output.shape[-2], output.requires_grad))

    def targets(self):
        """How many times feature maps were computed as targets."""
        return sum(layer == "conv1_1" and not gradient for layer, _, gradient in self.passes)


@pytest.fixture
def watched():
    return Watched()


def steps(painter, settings, count, start=None):
    """The last of `count` steps."""
    for k in range(count):
        step = painter.step(settings, start if k == 0 else None)
    return step


def test_a_step_is_one_evaluation_and_every_weight_reaches_its_losses_and_the_curves(watched, vgg):
    painter, weights = Painter(watched.vgg), {"conv1_1": 0.5, "conv3_1": 2.0}
    settings = TRANSFER._replace(content_weight=3.0, style_weight=5e3, layer_weights=tuple(weights.items()))
    step = steps(painter, settings, 5, ("content", 0))
    assert watched.passes.count(("conv3_1", 10, True)) == len(painter.curves) == 5
    maps, content, style = (
        nst.features(vgg, image, ("conv1_2", *weights))
        for image in (painter.run.image, *(nst.load_image(path, 40, "cpu") for path in (CASTLE, NIGHT)))
    )
    grams = nst.gram_matrices({name: style[name] for name in weights})
    assert step.content == pytest.approx((maps["conv1_2"] - content["conv1_2"]).square().mean().item(), rel=1e-3)
    assert step.style == pytest.approx(nst.style_loss(maps, grams, weights).item(), rel=1e-3)
    assert step.style != pytest.approx(nst.style_loss(maps, grams).item(), rel=1e-2)
    assert step.total == pytest.approx(3.0 * step.content + 5e3 * step.style, rel=1e-4)
    assert painter.curves[-1] == pytest.approx((step.total, 3 * step.content, 5e3 * step.style))
    assert painter.curves[-1][0] < painter.curves[0][0]


def test_from_an_image_the_panel_works_at_full_size_alone(painter):
    """However large: what is on display never loses its detail."""
    large = TRANSFER._replace(size=1024, content_layer="conv1_1", layer_weights=LAYERS[:1])
    painter.step(TRANSFER)
    for start in (None, ("content", 0), ("present", 0)):
        painter.change(large, start)
        assert painter.run.scales == (tuple(painter.run.image.shape[-2:]),) and min(painter.run.shape) == 1024
    painter.change(large, ("noise", 0))
    assert [min(scale) for scale in painter.run.scales] == [64, 128, 256, 512, 1024]


def test_a_weight_makes_nothing_anew_and_another_image_only_its_own(watched):
    """And both go on from the present image."""
    painter = Painter(watched.vgg)
    steps(painter, TRANSFER, 5, ("content", 0))
    made, run, content, before = watched.targets(), painter.run, painter.run.task.content, painter.run.image
    del watched.vgg[:]  # whoever wants another copy, or other kernels, finds no layer
    weighed = TRANSFER._replace(content_weight=2.0, style_weight=1e6, layer_weights=(("conv1_1", 0.5), *LAYERS[1:]))
    step = painter.step(weighed)
    assert watched.targets() == made == 2 and painter.run is run and len(painter.curves) == 6
    assert torch.equal(run.image, before) and step.total == pytest.approx(2 * step.content + 1e6 * step.style, rel=1e-4)
    painter.step(weighed)
    assert not torch.equal(run.image, before)
    before = run.image
    painter.step(TRANSFER._replace(style=WAVE))
    assert watched.targets() > made and painter.run is run and torch.equal(run.image, before)
    assert run.task.content is content


def test_a_layer_may_come_and_go(watched):
    """Without weight it stays until the next start, so that nothing is prepared anew."""
    painter = Painter(watched.vgg)
    before, made = steps(painter, TRANSFER, 3), watched.targets()
    step = painter.step(TRANSFER._replace(layer_weights=LAYERS[:2]))
    assert watched.targets() == made and step.style < before.style
    watched.passes.clear()
    again = painter.step(TRANSFER._replace(layer_weights=LAYERS[:2]), ("present", 0))
    assert {layer for layer, *_ in watched.passes} == {"conv1_1", "relu1_1", "conv1_2"}  # nothing deeper is computed
    assert again.style == pytest.approx(step.style, rel=1e-4) and len(painter.curves) == 1


def test_another_size_scales_the_present_image(painter):
    """From a coarse scale, too: to the new size at once."""
    painter.step(THREE_SCALES, ("noise", 5))
    before, first = painter.run.image, painter.first
    step = painter.step(THREE_SCALES._replace(size=160))
    assert step.shape[0] == 160 and painter.run.scales == (step.shape,)
    torch.testing.assert_close(painter.run.image, nst.resize(before, step.shape))
    assert len(painter.curves) == 2 and painter.first is first and painter.start == ("noise", 5)


def test_noise_goes_from_coarse_to_fine_as_the_task_does_and_a_new_weight_changes_no_scale(painter, vgg, quick):
    """With the seed's detail at each finer scale."""
    lighter = THREE_SCALES._replace(style_weight=1e3)
    painter.step(THREE_SCALES, ("noise", 7))
    task = painter.run.task
    assert [min(scale) for scale in painter.run.scales] == [64, 128, 256]
    assert painter.step(lighter).shape[0] == 64 and len(painter.run.scales) == 3
    while painter.step(lighter).shape[0] == 64:
        assert painter.run.image.shape[-2] == 64
    assert painter.last.shape[0] == 128
    assert painter.step(THREE_SCALES).shape[0] == 128 and len(painter.run.scales) == 2
    run = nst.Run(task, seed=7, vgg=vgg)
    for count, weight in ((1, 1e4), (len(painter.curves) - 2, 1e3), (1, 1e4)):
        run.retarget(task._replace(style_weight=weight))
        last = [run.step() for _ in range(count)][-1]
    assert last == painter.last and torch.equal(run.image, painter.run.image)


def test_a_restart_forgets_and_a_seed_repeats(painter):
    first = steps(painter, TRANSFER, 4, ("noise", 3))
    again = steps(painter, TRANSFER, 4, ("noise", 3))
    other = steps(painter, TRANSFER, 4, ("noise", 4))
    assert first == again != other and len(painter.curves) == 4
    present = painter.run.image
    painter.step(TRANSFER, ("present", 0))
    assert torch.equal(painter.run.image, present) and torch.equal(painter.first, present)
    assert len(painter.curves) == 1 and painter.start == ("present", 0)


def test_it_ends_when_progress_is_slow_and_then_may_go_on(painter):
    settings = TRANSFER._replace(style=None, layer_weights=())
    painter.step(settings, ("content", 0))  # the content is its own reconstruction
    assert painter.step(settings) is None
    assert painter.step(settings) is not None
    assert painter.step(settings) is None
    assert painter.step(settings._replace(content_layer="conv2_1")) is not None
    assert len(painter.curves) == 3


def test_weights_that_are_all_zero_are_refused_and_the_image_stays(painter, refuses):
    steps(painter, TRANSFER, 2)
    before = painter.run.image
    with refuses("every layer named has weight 0"):
        painter.step(TRANSFER._replace(content_weight=0.0, layer_weights=()))
    assert torch.equal(painter.run.image, before) and len(painter.curves) == 2
    assert painter.step(TRANSFER) is not None


@pytest.mark.parametrize("height", [64, 128])
def test_after_an_error_a_step_goes_on_from_the_present_image(height, watched, quick):
    """As when memory runs out: at 64 pixels in the midst of a scale; at 128 before the first evaluation there, when the
    image on display is still the coarser one.
    """
    painter, untroubled = Painter(watched.vgg), Painter(watched.vgg)
    step = steps(untroubled, THREE_SCALES, 3, ("noise", 7))
    while step.shape[0] < height:
        step = untroubled.step(THREE_SCALES)
    count = len(untroubled.curves) - (height == 128)
    steps(painter, THREE_SCALES, count, ("noise", 7))
    watched.broken = height
    for weight in (1e4, 1e3, 1e3):
        with pytest.raises(ZeroDivisionError):
            painter.step(THREE_SCALES._replace(style_weight=weight))
    assert painter.run.image.shape[-2] == 64 and len(painter.curves) == count
    watched.broken = None
    assert painter.step(THREE_SCALES).total == pytest.approx(step.total)
    assert painter.last.shape == step.shape and torch.equal(painter.run.image, untroubled.run.image)


def test_the_chart_shows_the_total_and_both_weighted_losses(monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    assert nst.draw_losses([(9.0, 6.0, 3.0), (5.0, 4.0, 1.0)]).startswith(b"\x89PNG")
    nst.draw_losses([(9.0, 0.0, 9.0), (5.0, 0.0, 5.0)])  # a texture
    curves = [{line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines} for figure in figures]
    both = {"total": [9, 5], "content × its weight": [6, 4], "style × its weight": [3, 1]}
    assert curves == [both, {"total": [9, 5]}]
    assert {axes.get_yscale() for figure in figures for axes in figure.axes} == {"log"}


class StandIn:
    """In the painter's place: a step waits, on the worker's thread, until the test releases it."""

    def __init__(self, clock):
        self.clock, self.gate = clock, threading.Semaphore(0)
        self.calls = []  # (settings, start) of every step that was begun
        self.outcomes = deque()  # of the next steps: None for the end, an exception, or True
        self.run = self.first = self.start = self.last = None
        self.curves = []

    def step(self, settings, start=None):
        self.calls.append((settings, start))
        assert self.gate.acquire(timeout=120), "no test released this step"
        self.clock.now += self.clock.step
        outcome, count = self.outcomes.popleft() if self.outcomes else True, len(self.calls)
        if isinstance(outcome, Exception):
            raise outcome
        if not outcome:
            return None
        if start:
            self.curves, self.start, self.first = [], start, torch.zeros(1, 3, 4, 5)
        image = torch.full((1, 3, 4, 5), (count % 50) / 50)
        self.run = SimpleNamespace(image=image, task=SimpleNamespace(content=None))
        self.last = nst.Step((4, 5), "float32", 4 / count, 3 / count, 1 / count)
        self.curves.append(self.last[2:])
        return self.last


def until(panel, condition):
    """Let the panel's loop run until something holds; between two such calls it stands still."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        panel.loop.run_until_complete(asyncio.sleep(0.002))


def press(panel, name):
    """Press a button, and let the loop hear of it."""
    panel.buttons[name].click()
    panel.loop.run_until_complete(asyncio.sleep(0))


def begun(panel, count):
    """Until the step with this number waits to be released."""
    until(panel, lambda: len(panel.painter.calls) == count)


def release(panel, count=1):
    """Let steps go one by one, and each time wait until the next has begun or the loop has ended."""
    for _ in range(count):
        before = len(panel.painter.calls)
        panel.painter.gate.release()
        until(panel, lambda before=before: len(panel.painter.calls) > before or panel.turns.done())


def start(panel, count=1):
    """Press Start, and release so many steps."""
    before = len(panel.painter.calls)
    press(panel, "Start")
    begun(panel, before + 1)
    release(panel, count)


@pytest.fixture
def clock(monkeypatch):
    """The panel's clock: each step of the stand-in takes `step` seconds, and nothing else any."""
    clock = SimpleNamespace(now=0.0, step=1.0)  # longer than a frame, so that each frame has one evaluation
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def opened():
    """opened(make): the panel that a function makes, with a loop of its own; closed when the test ends."""
    panels, loop = [], asyncio.new_event_loop()

    def open_panel(make):
        async def in_the_loop():
            return make()

        panels.append(loop.run_until_complete(in_the_loop()))
        return panels[-1]

    yield open_panel
    for panel in panels:
        panel.close()
        until(
            panel,
            lambda panel=panel: (
                not workers() and all(task is None or task.done() for task in (panel.turns, panel.watching))
            ),
        )
    loop.close()


@pytest.fixture
def panel(clock, opened):
    """A panel whose painter is a `StandIn`."""
    painter = StandIn(clock)
    yield opened(lambda: Studio(TRANSFER, painter))
    painter.gate.release(1000)


@pytest.fixture
def studio(vgg, opened):
    """studio(content, style, **options): a panel with the real painter, at 40 pixels."""
    return lambda *paths, **options: opened(lambda: style_studio(*paths, **{"size": 40, "vgg": vgg, **options}))


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("style-studio")]


def says(panel):
    return panel.status.value


def pixels(jpeg):
    """The bytes of an image file as whole numbers (H, W, 3)."""
    with Image.open(io.BytesIO(jpeg)) as file:
        return np.asarray(file.convert("RGB")).astype(int)


def test_start_pause_and_start_again(panel):
    assert panel.state == "ready" and panel.shown is None and panel.turns is None
    start(panel, 0)
    assert panel.state == "running" and panel.buttons["Start"].disabled and "Running" in says(panel)
    release(panel, 2)
    assert panel.shown.evaluations == 2 and "2 evaluations" in says(panel) and "5 × 4" in says(panel)
    press(panel, "Pause")
    assert panel.state == "paused" and panel.buttons["Pause"].disabled and "Paused" in says(panel)
    image = panel.display.picture.value
    release(panel)  # the step that was under way
    assert panel.turns.done() and panel.display.picture.value == image and len(panel.painter.calls) == 3
    start(panel)
    assert panel.display.picture.value != image and panel.state == "running"
    assert [start for _, start in panel.painter.calls] == [("noise", 0), None, None, None, None]


def test_the_rate_on_display_counts_no_pause(panel, clock):
    clock.step = 0.5
    start(panel, 3)
    assert "2.0 evaluations a second" in says(panel)
    press(panel, "Pause")
    release(panel)
    assert "a second" not in says(panel)
    clock.now, clock.step = 1000.0, 0.25
    start(panel, 3)
    assert "4.0 evaluations a second" in says(panel)


def test_a_second_press_of_start_makes_no_second_loop(panel):
    press(panel, "Start")
    press(panel, "Start")
    begun(panel, 1)
    turns = panel.turns
    press(panel, "Pause")
    press(panel, "Start")
    assert panel.turns is turns and asyncio.all_tasks(panel.loop) == {turns, panel.watching}
    release(panel)
    assert panel.turns is turns and panel.state == "running"


def test_step_is_one_evaluation_however_long_a_frame_lasts(panel, clock):
    clock.step = 0.0
    for count in (1, 2, 3):
        press(panel, "Step")
        begun(panel, count)
        release(panel)
        assert panel.turns.done() and panel.state == "paused"
        assert panel.shown.evaluations == len(panel.painter.calls) == count
    assert panel.display.chart.value


def test_step_takes_over_from_a_loop_that_was_just_paused(panel):
    start(panel)
    press(panel, "Pause")
    panel.content_weight.value = 7.0
    press(panel, "Step")
    release(panel)  # began with another weight, and is not what Step asked for
    assert panel.state == "running" and panel.shown.settings.content_weight == 1
    release(panel)
    assert panel.state == "paused" and panel.turns.done()
    assert panel.shown.settings.content_weight == 7 and len(panel.painter.calls) == 3


def test_restart_begins_again_from_the_chosen_start(panel):
    start(panel)
    panel.controls.start_from.value, panel.controls.seed.value = "content", 5
    press(panel, "Restart")
    release(panel)
    assert panel.shown.start == ("noise", 0)  # the step under way is of the run before
    release(panel)
    assert [start for _, start in panel.painter.calls] == [("noise", 0), None, ("content", 5), None]
    assert panel.shown.start == ("content", 5) and panel.shown.evaluations == 1


def test_a_moved_slider_reaches_the_next_step_and_reset_takes_it_back(panel):
    start(panel, 0)
    panel.style_weight.value, panel.content_weight.value = 1e6, 2.5
    panel.layer_weights["conv1_1"].value = 0
    release(panel)
    before, after = (settings for settings, _ in panel.painter.calls)
    assert before == TRANSFER
    assert after == TRANSFER._replace(style_weight=1e6, content_weight=2.5, layer_weights=LAYERS[1:])
    press(panel, "Reset")
    release(panel)
    assert panel.painter.calls[-1][0] == TRANSFER


@pytest.mark.parametrize(
    "control, value", [("content_layer", "conv2_1"), ("size", 128), ("style_weight", 10.0), ("content_weight", 2.0)]
)
def test_a_panel_that_has_finished_goes_on_when_a_control_moves(control, value, panel):
    panel.painter.outcomes.extend([True, True, None])
    start(panel, 3)
    assert panel.state == "done" and panel.turns.done()
    assert "Finished" in says(panel) and not panel.buttons["Start"].disabled
    getattr(panel.controls, control).value = value
    begun(panel, 4)
    assert panel.state == "running" and getattr(panel.painter.calls[-1][0], control) == value


def test_the_chart_is_drawn_now_and_then_and_at_the_end(panel, clock):
    panel.painter.outcomes.extend([True, True, True, True, True, None])
    drawn = [False]
    start(panel, 0)
    for clock.step in (1.0, 1.0, 1.0, 1.5, 1.0, 0.0):
        release(panel)
        drawn.append(panel.shown.chart is not None)
        assert bool(panel.display.chart.value) == any(drawn)
    assert drawn[1:] == [False, True, False, True, False, True]  # from two evaluations on, 2 s apart
    assert panel.state == "done" and panel.display.chart.value == panel.shown.chart


def test_a_frame_holds_as_many_evaluations_as_its_time_and_the_last_ones_are_shown(panel, clock):
    clock.step = 0.01  # a frame lasts a thirtieth of a second
    panel.painter.outcomes.extend([*6 * [True], None])
    start(panel, 3)
    assert panel.shown is None
    release(panel, 3)
    assert panel.shown.evaluations == 4
    release(panel)
    assert panel.state == "done" and panel.shown.evaluations == 6 and panel.display.chart.value


def test_an_error_in_the_loop_comes_to_light(panel):
    panel.painter.outcomes.extend([True, ZeroDivisionError("division by <zero>")])
    start(panel, 2)
    assert panel.state == "paused" and "ZeroDivisionError: division by &lt;zero&gt;" in says(panel)
    start(panel, 0)
    assert panel.state == "running" and "ZeroDivision" not in says(panel)


def test_the_difference_is_to_the_start_or_to_the_snapshot(panel):
    panel.controls.compare.value = "the start"
    start(panel)
    assert panel.shown.mean == pytest.approx(1 / 50) and panel.display.difference.value  # the stand-in's images
    assert panel.display.caption.value == "difference map, mean 0.0200"
    kept = panel.shown.image
    panel.painter.run = SimpleNamespace(
        image=torch.ones(1, 3, 4, 5), task=SimpleNamespace(content=None)
    )  # the painter's is another one by now
    press(panel, "Snapshot")
    assert panel.snapshot is kept and panel.controls.compare.value == "the snapshot"
    release(panel, 3)
    assert panel.shown.mean == pytest.approx(3 / 50)
    panel.controls.compare.value = "nothing"
    release(panel, 2)
    assert panel.shown.difference is None and panel.display.difference.layout.display == "none"


def test_a_saved_file_is_the_image_on_display_with_its_settings(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    press(panel, "Save")
    assert "no image to save" in says(panel)
    start(panel)
    for _ in range(2):
        press(panel, "Save")
    files = [tmp_path / "saved" / f"chenonceau_starry_night_00{k}.png" for k in (1, 2)]
    files[0].unlink()
    panel.controls.seed.value, panel.style_weight.value = 7, 10.0  # chosen after this image was made
    panel.painter.run = SimpleNamespace(
        image=torch.ones(1, 3, 4, 5), task=SimpleNamespace(content=None)
    )  # the painter's is another one by now
    press(panel, "Save")
    assert sorted((tmp_path / "saved").iterdir()) == files
    with Image.open(files[0]) as file:
        about = json.loads(file.text["settings"])
    assert (about["content"], about["style"], about["size"]) == ("chenonceau.jpg", "starry_night.jpg", 40)
    assert about["style_weight"] == 1e4 and about["layer_weights"] == dict(LAYERS)
    assert (about["evaluations"], about["coarse_to_fine"]) == (225, True)
    assert about["losses"]["total"] == 4 and (about["start"], about["seed"]) == ("noise", 0)
    written = pixels(files[0].read_bytes())
    assert np.array_equal(written, np.asarray(nst.to_pil(panel.shown.image)))
    assert np.abs(written - pixels(panel.display.picture.value)).max() <= 2  # that one is a JPEG


def test_the_images_that_go_in_are_shown(panel):
    panel.choices["style"].value = WAVE
    for kind, path in (("content", CASTLE), ("style", WAVE)):
        expected = np.asarray(nst.to_pil(nst.load_image(path, 130, "cpu")))
        difference = np.abs(pixels(panel.display.inputs[kind].value) - expected)
        assert difference.mean() < 10  # a JPEG; another image differs by some sixty


def note(panel):
    return html.unescape(re.search("</b> (.*?)<br>", says(panel))[1])


def test_a_note_lives_until_the_next_thing_the_user_does(panel, tmp_path, monkeypatch):
    """Not until the next frame; whatever that thing is."""
    monkeypatch.chdir(tmp_path)
    start(panel)
    controls = panel.controls
    actions = {
        "Pause": lambda: press(panel, "Pause"),
        "Step": lambda: (press(panel, "Step"), release(panel, 2)),
        "Start": lambda: start(panel, 1),
        "a weight": lambda: controls.style_weight.set_trait("value", 20.0),
        "a layer": lambda: controls.content_layer.set_trait("value", "conv2_2"),
        "another image": lambda: panel.choices["style"].set_trait("value", WAVE),
        "another start": lambda: controls.start_from.set_trait("value", "content"),
        "another seed": lambda: controls.seed.set_trait("value", 8),
        "another comparison": lambda: controls.compare.set_trait("value", "the start"),
        "Reset": lambda: press(panel, "Reset"),
        "Restart": lambda: press(panel, "Restart"),
    }
    for k, (name, act) in enumerate(actions.items(), 1):
        press(panel, "Save")
        expected = f"saved {Path('saved', f'chenonceau_{panel.shown.settings.style.stem}')}"
        assert note(panel).startswith(expected) and len([*Path("saved").iterdir()]) == k
        if panel.state == "running":
            release(panel, 2)
            assert note(panel).startswith(expected), name
        act()
        assert note(panel) == "", name


def test_what_goes_wrong_in_a_button_is_said_and_goes_when_it_succeeds(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(panel)
    press(panel, "Save")
    assert "saved" in note(panel)
    shutil.rmtree("saved")
    Path("saved").touch()
    press(panel, "Save")
    sentence = f"the image cannot be saved in {str(tmp_path / 'saved')!r}: Not a directory"
    assert note(panel) == sentence
    release(panel, 3)
    assert note(panel) == sentence and panel.state == "running" and Path("saved").read_bytes() == b""
    Path("saved").unlink()
    press(panel, "Save")
    assert note(panel) == f"saved {Path('saved', 'chenonceau_starry_night_001.png')}"


def test_a_folder_that_cannot_be_written_is_said(panel, as_nobody, monkeypatch):
    start(panel)
    with as_nobody() as folder:
        monkeypatch.chdir(folder)
        folder.chmod(0o500)
        press(panel, "Save")
        assert note(panel) == f"the image cannot be saved in {str(folder / 'saved')!r}: Permission denied"
        monkeypatch.undo()


def test_what_goes_wrong_in_a_control_is_said(panel, tmp_path):
    """Another image that has gone, and an upload that is none: the panel goes on with what it has."""
    start(panel)
    gone = tmp_path / "gone.jpg"
    shutil.copy(WAVE, gone)
    panel.controls.offer("style", gone)
    gone.unlink()
    panel.choices["style"].value = NIGHT
    panel.choices["style"].value = gone
    assert note(panel) == f"no picture at {str(gone)!r}: give the path of a file"
    panel.choices["style"].value = NIGHT
    assert note(panel) == ""
    upload(panel, "style", (7, b""))
    unforeseen = note(panel)
    assert unforeseen.startswith("TypeError: ")
    release(panel, 2)
    assert panel.state == "running" and note(panel) == unforeseen


def test_panels_that_save_at_once_lose_nothing(panel, opened, clock, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(panel)
    panels = [opened(lambda: Studio(TRANSFER, StandIn(clock))) for _ in range(6)]

    def save(other):
        for _ in range(15):
            other.save()
            said.append(note(other))

    said = []
    threads = [threading.Thread(target=save, args=(other,)) for other in panels]
    for other, thread in zip(panels, threads):
        other.shown = panel.shown
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*said}) == len([*Path("saved").iterdir()]) == 90 and all(text.startswith("saved") for text in said)


def test_names_of_any_length_can_be_saved(panel, tmp_path, monkeypatch):
    """File systems count bytes, of which an ideogram has three."""
    monkeypatch.chdir(tmp_path)
    for kind, letter in (("content", "浮"), ("style", "é")):
        upload(panel, kind, (f"{letter * 150}.jpg", WAVE.read_bytes()))
    start(panel)
    press(panel, "Save")
    (file,) = Path("saved").iterdir()
    assert note(panel) == f"saved {file}" and file.name.startswith("浮浮") and "_éé" in file.name


def upload(panel, kind, *files):
    """As the browser does; kind: "content", "style" or "settings"; files: (name, content)."""
    now, uploader = datetime.datetime.now(datetime.UTC), panel.uploaders.get(kind, panel.controls.opener)
    about = [{"name": name, "type": "", "size": len(content), "last_modified": now} for name, content in files]
    if isinstance(uploader.value, dict):  # ipywidgets 7
        value = {name: {"metadata": each, "content": content} for each, (name, content) in zip(about, files)}
    else:
        value = tuple(each | {"content": memoryview(content)} for each, (_, content) in zip(about, files))
    uploader.set_trait("value", value)


def test_an_upload_of_any_name_is_offered_and_a_file_that_is_no_image_is_not(panel):
    choice, stems = panel.choices["style"], set()
    offered = len(choice.options)
    upload(panel, "style", ("notes.txt", b"no picture"))
    assert "'notes.txt' is not a picture" in note(panel) and len(choice.options) == offered
    names = ("..", "a.b.jpg", "a/b\0c.jpg", 300 * "x" + ".jpg", "C:\\mine.jpg", "<b>ü &.jpg", "../mine.jpg")
    for name in names:
        before = choice.value
        upload(panel, "style", (name, WAVE.read_bytes()))
        assert choice.value.read_bytes() == WAVE.read_bytes() and str(choice.value).startswith(panel.uploads.name)
        stems.add(choice.value.stem)
        assert choice.value != before and len(choice.options) == offered + len(stems) and note(panel) == ""
    assert choice.value.name == "mine.jpg" and "a.b" in stems
    press(panel, "Step")
    begun(panel, 1)
    assert panel.painter.calls[0][0].style == choice.value


def test_uploads_of_one_name_do_not_meet(panel):
    """A style named like the content, another image of the same name, a damaged one: each keeps its own."""
    castle, wave, night = (path.read_bytes() for path in (CASTLE, WAVE, NIGHT))
    upload(panel, "content", ("mine.jpg", castle))
    upload(panel, "style", ("mine.jpg", wave))
    content, style = panel.choices["content"].value, panel.choices["style"].value
    assert (content.read_bytes(), style.read_bytes()) == (castle, wave)
    upload(panel, "style", ("mine.jpg", night))
    changed = panel.choices["style"].value
    assert changed != style and changed.read_bytes() == night  # another path, so that nothing old is remembered
    labels = dict(panel.choices["style"].options)
    assert (labels["mine"], labels["mine.jpg"]) == (style, changed)
    upload(panel, "style", ("mine.jpg", night[:999]))
    assert "'mine.jpg' is cut off" in note(panel)
    assert panel.choices["style"].value == changed and changed.read_bytes() == night


def test_uploads_have_either_form_of_ipywidgets():
    expected = [("a.jpg", b"one"), ("b c.png", b"two")]
    eight = tuple({"name": name, "size": 3, "content": memoryview(content)} for name, content in expected)
    seven = {name: {"metadata": {"name": name, "size": 3}, "content": content} for name, content in expected}
    assert (
        style_transfer.panel.controls.uploaded_files(eight)
        == style_transfer.panel.controls.uploaded_files(seven)
        == expected
    )
    assert style_transfer.panel.controls.uploaded_files(()) == style_transfer.panel.controls.uploaded_files({}) == []


def test_the_same_file_may_be_uploaded_again(panel):
    choice = panel.choices["content"]
    for _ in range(2):
        upload(panel, "content", ("holiday.jpg", CASTLE.read_bytes()))
        assert choice.value.name == "holiday.jpg" and not panel.uploaders["content"].value
        choice.value = CASTLE
    assert [path.name for _, path in choice.options].count("holiday.jpg") == 1


def test_of_two_files_the_sound_one_is_taken_and_the_other_named(panel):
    bad, good = ("bad.jpg", b"x"), ("good.jpg", WAVE.read_bytes())
    for files in ((bad, good), (good, bad)):
        panel.choices["style"].value = NIGHT
        upload(panel, "style", *files)
        assert panel.choices["style"].value.name == "good.jpg" and "'bad.jpg' is not a picture" in note(panel)


def test_of_several_files_that_are_no_images_each_is_named(panel):
    thin = io.BytesIO()
    Image.new("L", (20000, 1)).save(thin, "png")
    files = ("bad.jpg", b"x"), ("thin.png", thin.getvalue()), ("notes.txt", b"y")
    upload(panel, "style", *files)
    assert "'bad.jpg' is not a picture" in note(panel) and "'notes.txt' is not a picture" in note(panel)
    assert "'thin.png' would be 2600000 x 130 pixels" in note(panel)
    assert panel.choices["style"].value == NIGHT and len(panel.choices["style"].options) == 8


@pytest.mark.parametrize("name", ["Mu\u0308ller", "हिन्दी", "浮世絵", "a 🙂", "e\u0301", "two  words", "it's"])
def test_a_name_is_kept_in_every_script(name, panel):
    """With the marks that belong to its letters; macOS writes them apart."""
    upload(panel, "style", (f"{name}.jpg", WAVE.read_bytes()))
    assert panel.choices["style"].value.name == f"{name}.jpg" and note(panel) == ""
    assert name in dict(panel.choices["style"].options)


def test_half_a_character_in_a_name_is_replaced(panel):
    upload(panel, "style", ("a\ud800b.jpg", WAVE.read_bytes()))
    assert panel.choices["style"].value.name == "a b.jpg" and note(panel) == ""


def test_a_closed_panel_does_nothing(panel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(panel)
    panel.painter.gate.release(1000)
    painter = panel.painter
    panel.close()
    panel.loop.run_until_complete(asyncio.sleep(0.01))
    assert panel.watching.done()
    for method in ("start", "step", "pause", "restart", "keep", "save", "reset", "moved"):
        getattr(panel, method)()
    upload(panel, "style", ("a.jpg", WAVE.read_bytes()))
    assert panel.state == "closed" and note(panel) == "" and not [*tmp_path.iterdir()]
    panel.painter = painter


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures with what else there is in one; images are read from there."""
    folder = tmp_path / "images"
    for kind, path in (("content", CASTLE), ("style", NIGHT)):
        (folder / kind / ".ipynb_checkpoints").mkdir(parents=True)
        for junk in (".DS_Store", "Thumbs.db", "notes.txt", "CREDITS.md", "Apple.jpg", "desktop.ini", "._mine.jpg"):
            (folder / kind / junk).write_bytes(b"\0\5\x16\7 no picture")
        shutil.copy(WAVE, folder / kind / "great_wave.jpg")
        shutil.copy(path, folder / kind / path.name)
        shutil.copy(WAVE, folder / kind / ".hidden.jpg")
        Image.open(WAVE).save(folder / kind / "great_wave.png")
    monkeypatch.setattr(nst, "IMAGES", folder)
    return folder


def test_pictures_alone_are_offered_each_by_a_name_of_its_own(pictures, clock, opened):
    night = pictures / "style" / NIGHT.name
    panel = opened(lambda: Studio(TRANSFER._replace(style=night), StandIn(clock)))
    assert [(label, path.name) for label, path in panel.choices["style"].options] == [
        ("great_wave.jpg", "great_wave.jpg"),
        ("great wave", "great_wave.png"),
        ("starry night", NIGHT.name),
    ]
    chosen = []
    panel.choices["style"].observe(lambda change: chosen.append(change.new.name), "value")
    upload(panel, "style", ("great wave.jpg", NIGHT.read_bytes()))
    assert chosen == ["great wave.jpg"]  # at once, with no other in between
    labels = [label for label, _ in panel.choices["style"].options]
    assert len({*labels}) == len(labels) == 4 and note(panel) == ""
    assert {path.name for _, path in panel.choices["style"].options} == {
        "great_wave.jpg", "great_wave.png", "great wave.jpg", NIGHT.name
    }  # fmt: skip


def test_what_to_do_with_large_files_stands_at_the_buttons(panel, opened, clock):
    texts = [
        widget.value for widget in style_transfer.panel.controls.tree(panel.view) if isinstance(widget, widgets.HTML)
    ]
    assert any("more than 10 MB: put them into images/content or images/style" in text for text in texts)
    panel = opened(lambda: Studio(TRANSFER._replace(content=None), StandIn(clock)))
    texts = [
        widget.value for widget in style_transfer.panel.controls.tree(panel.view) if isinstance(widget, widgets.HTML)
    ]
    assert any("put them into images/style, and run" in text for text in texts)


def test_a_file_that_is_written_again_is_seen_by_the_run_and_among_the_inputs(painter, studio, tmp_path):
    mine = tmp_path / "mine.jpg"
    shutil.copy(WAVE, mine)
    steps(painter, TRANSFER._replace(style=mine), 2)
    before = painter.run.task.style
    shutil.copy(NIGHT, mine)
    painter.step(TRANSFER._replace(style=mine))
    assert torch.equal(painter.run.task.style, nst.load_image(NIGHT, 40, "cpu")) and len(painter.curves) == 3
    assert not torch.equal(painter.run.task.style, before)
    panel = studio(CASTLE, mine)
    panel.step()
    until(panel, lambda: panel.state == "paused")
    shown = panel.display.inputs["style"].value
    shutil.copy(WAVE, mine)
    panel.step()
    until(panel, lambda: panel.state == "paused" and panel.shown.evaluations == 2)
    assert panel.display.inputs["style"].value == nst.jpeg(nst.load_image(WAVE, 130, "cpu")) != shown
    mine.unlink()
    panel.step()
    until(
        panel,
        lambda: panel.state == "paused" and note(panel) == f"no picture at {str(mine)!r}: give the path of a file",
    )


def test_a_relative_path_is_that_of_when_it_was_given(studio, tmp_path, monkeypatch):
    shutil.copy(WAVE, tmp_path / "mine.jpg")
    monkeypatch.chdir(tmp_path)
    panel = studio("mine.jpg", Path("mine.jpg"))
    monkeypatch.chdir(nst.IMAGES)
    panel.step()
    until(panel, lambda: panel.state == "paused")
    assert panel.shown and note(panel) == "" and panel.choices["style"].value == tmp_path / "mine.jpg"


@pytest.mark.parametrize(
    "content, style, weights, helper",
    [
        (CASTLE, None, (1.0, 0.0), nst.reconstruct_content),
        (None, NIGHT, (0.0, 1e4), nst.synthesize_texture),
        (CASTLE, NIGHT, (1.0, 1e4), nst.transfer_style),
    ],
)
def test_a_form_runs_to_the_same_end_as_its_notebooks_task(content, style, weights, helper, studio, vgg, quick):
    size = 24 if style else 50  # the reconstruction has two scales
    panel = studio(content, style, size=size)
    settings = panel.controls.settings()
    assert (settings.content, settings.style) == (content, style)
    assert (settings.content_weight, settings.style_weight) == weights
    assert settings.layer_weights == (LAYERS if style else ())
    assert set(panel.choices) == {kind for kind, path in (("content", content), ("style", style)) if path}
    panel.step()  # shows the losses of the image on display
    until(panel, lambda: panel.state == "paused")
    step = panel.shown.step
    assert step.total == pytest.approx(weights[0] * step.content + weights[1] * step.style, rel=1e-4)
    assert bool(step.content) == bool(content) and bool(step.style) == bool(style)
    assert torch.equal(panel.shown.image, panel.painter.first) and panel.shown.evaluations == 1
    panel.start()
    until(panel, lambda: panel.state == "done")
    images = [nst.load_image(path, size, "cpu") for path in (content, style) if path]
    result = helper(*images, vgg=vgg, progress=False)
    assert torch.equal(panel.shown.image, result.image) and panel.shown.step == result.history[-1]
    assert panel.shown.evaluations == result.evaluations and panel.display.chart.value


def test_the_difference_is_to_an_image_of_another_size_too(studio):
    panel = studio(CASTLE, NIGHT)
    panel.controls.compare.value = "the start"
    panel.step()
    until(panel, lambda: panel.state == "paused")
    assert panel.shown.mean == 0
    panel.controls.size.value = 128
    panel.step()
    until(panel, lambda: panel.state == "paused" and panel.shown.evaluations == 2)
    assert panel.shown.image.shape[-2] == 128 and 0 <= panel.shown.mean < 0.1


def test_bad_settings_are_answered_in_the_panel(studio):
    panel = studio(CASTLE, NIGHT)
    for control in (panel.content_weight, *panel.layer_weights.values()):
        control.value = 0
    panel.start()
    until(panel, lambda: panel.state == "paused")
    assert "every layer named has weight 0" in says(panel)
    panel.reset()
    panel.controls.start_from.value = "present"
    panel.start()
    until(panel, lambda: panel.state == "paused" and "no present image" in says(panel))


def test_a_new_panel_closes_the_one_before_and_leaves_nothing_behind(studio):
    """However often the cell is run, and though the notebook remembers every panel it was given."""
    made = []
    widgets.Widget.on_widget_constructed(made.append)
    try:
        panel = studio(CASTLE, NIGHT)
        panel.start()
        until(panel, lambda: panel.turns)
        panels = [panel, *(studio(CASTLE, NIGHT) for _ in range(2))]
    finally:
        widgets.Widget.on_widget_constructed(None)
    assert [each.state for each in panels] == ["closed", "closed", "ready"]
    assert {widget.comm is None for widget in made} == {False, True}  # the last panel's are open
    until(panel, lambda: panel.turns.done() and not workers())
    for name in ("start", "step", "pause", "restart"):
        getattr(panel, name)()
    panel.loop.run_until_complete(asyncio.sleep(0))  # so that what they asked the loop for is done
    assert panel.state == "closed" and not workers()
    panels[-1].close()
    assert len(made) > 3 * 60 and all(widget.comm is None for widget in made)
    assert all(panel.painter is panel.shown is panel.snapshot is None for panel in panels)


# Content layer, style layers, content weight, style weight: as they are given, and as the controls show them.
OPENINGS = [
    (("conv1_2", nst.FIRST_FIVE, 1, 1e4), ("conv1_2", nst.FIRST_FIVE, 1.0, 1e4)),
    (("relu3_1", "conv_6", 0, 7), ("relu3_1", ("conv3_2",), 0.0, 7.0)),
    (("conv_9", ["conv4_1", "relu3_1"], 0.03, 3e4), ("conv4_1", ("relu3_1", "conv4_1"), 0.03, 3e4)),
    (("conv_16", (), torch.tensor(1234.5), 3e11), ("conv5_4", (), 1234.5, 3e11)),
    (("conv1_1", "conv5_1", 10.7, 2e-3), ("conv1_1", ("conv5_1",), 10.7, 2e-3)),
]
PARAMETERS = ("content_layer", "style_layers", "content_weight", "style_weight")


@pytest.mark.parametrize("given, expected", OPENINGS)
def test_the_controls_open_at_the_parameters_and_reset_goes_back_to_them(given, expected, studio):
    """The browser leaves them as they are: it rounds a slider to a whole number of steps from the smallest value."""
    panel = studio(CASTLE, NIGHT, **dict(zip(PARAMETERS, given)))

    def shown():
        layers, weights = zip(*panel.controls.settings().layer_weights) if expected[1] else ((), ())
        assert set(weights) <= {1.0}
        return panel.controls.content_layer.value, layers, panel.content_weight.value, panel.style_weight.value

    opening = shown()
    assert opening[:3] == expected[:3] and opening[3] == pytest.approx(expected[3], rel=1e-12)
    for control, value in ((panel.content_weight, opening[2]), (panel.style_weight, math.log10(opening[3]))):
        taken = (value - control.min) / control.step
        assert taken == pytest.approx(round(taken), abs=1e-6) and control.step <= 0.15
    for control in (panel.content_weight, panel.style_weight, *panel.layer_weights.values()):
        control.value = 1.5
    panel.controls.content_layer.value = "conv5_3"
    press(panel, "Reset")
    assert shown() == opening


def test_another_style_layer_has_a_slider_in_the_networks_order(studio):
    panel = studio(CASTLE, NIGHT, content_layer="relu4_2", style_layers=("conv5_4", "relu3_1"))
    assert list(panel.layer_weights) == [*nst.FIRST_FIVE, "relu3_1", "conv4_1", "conv5_1", "conv5_4"]
    offered = panel.controls.content_layer.options
    assert list(offered) == [*nst.CONVOLUTIONS[:10], "relu4_2", *nst.CONVOLUTIONS[10:]]
    sliders = [*panel.layer_weights.values()]
    assert [control for control in style_transfer.panel.controls.tree(panel.view) if control in sliders] == sliders


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"content_layer": "conv6_1"}, "unknown layer 'conv6_1'"),
        ({"content_layer": ("conv1_2",)}, "unknown layer ('conv1_2',)"),
        ({"style_layers": ("conv1_1", "conv9")}, "unknown layer 'conv9'"),
        ({"style_layers": ("conv1_1", "conv_1")}, "conv1_1 is among them twice"),
        ({"content_weight": -1}, "content_weight is -1"),
        ({"content_weight": "1"}, "content_weight is '1'"),
        ({"style_weight": math.nan}, "style_weight is nan"),
        ({"style_weight": 2e12}, "style_weight is 2000000000000.0"),
        ({"style_weight": 0}, "style_weight is 0: the panel's slider begins above 0"),
        ({"content": None, "style_layers": ()}, "no layers given"),
        ({"style": None, "content_weight": 0}, "every layer named has weight 0"),
        ({"content": None, "style": None}, "content and style are both None"),
        ({"vgg": "oxford"}, "vgg is 'oxford': give a network from load_vgg19"),
        ({"content": "missing.jpg"}, "no picture at 'missing.jpg'"),
        *[({"size": size}, f"size is {size!r}") for size in (0, 2.5, "256", None)],
        ({}, "no event loop runs here: call style_studio in a cell of a notebook"),
    ],
)
def test_a_panel_that_cannot_be_is_refused_in_a_sentence(options, sentence, vgg, refuses):
    with refuses(sentence, MissingFileError if sentence.startswith("no picture") else UserError):
        style_studio(**({"content": CASTLE, "style": NIGHT, "vgg": vgg} | options))


# Frames that the browser asks for, and browsers that are gone


def acknowledge(panel):
    """As the browser does with each number that it is sent."""
    panel.display.seen.value = panel.display.sent.value


@pytest.fixture
def pulled(clock, opened):
    """A panel whose frames the browser asks for."""
    painter = StandIn(clock)
    yield opened(lambda: Studio(TRANSFER, painter, pull=True))
    painter.gate.release(1000)


def made(panel):
    """Until the worker has made the frame that is under way; the loop runs meanwhile."""
    panel.painter.gate.release()
    until(panel, panel.frame.done)


def test_a_frame_that_the_browser_asks_for_is_shown_in_its_callback(pulled):
    press(pulled, "Start")
    assert pulled.state == "running" and pulled.display.sent.value == 1 and not pulled.painter.calls
    for count in range(1, 5):
        acknowledge(pulled)
        begun(pulled, count)
        assert (pulled.shown.evaluations if pulled.shown else 0) == count - 1
        before = pulled.display.picture.value
        made(pulled)
        assert pulled.display.picture.value == before
    acknowledge(pulled)
    assert pulled.shown.evaluations == 4 and pulled.display.sent.value == 6 and pulled.turns is None


def test_what_is_asked_for_while_a_frame_is_made_waits_in_no_queue(pulled):
    press(pulled, "Start")
    for _ in range(4):
        acknowledge(pulled)
    begun(pulled, 1)
    sent = pulled.display.sent.value
    assert len(pulled.painter.calls) == 1 and sent == 5
    pulled.display.seen.value = sent - 2  # an answer that comes late
    assert pulled.display.sent.value == sent
    made(pulled)
    acknowledge(pulled)
    assert pulled.shown.evaluations == 1


def test_pause_step_and_the_end_where_the_browser_asks(pulled):
    press(pulled, "Start")
    acknowledge(pulled)
    begun(pulled, 1)
    press(pulled, "Pause")
    made(pulled)
    sent = pulled.display.sent.value
    acknowledge(pulled)
    assert pulled.state == "paused" and pulled.shown is None and pulled.display.sent.value == sent
    pulled.painter.outcomes.extend([True, None])
    press(pulled, "Step")
    acknowledge(pulled)  # shows no frame from before the pause
    begun(pulled, 2)
    assert pulled.shown is None
    made(pulled)
    acknowledge(pulled)
    assert pulled.state == "paused" and pulled.shown.evaluations == 1
    press(pulled, "Start")
    acknowledge(pulled)
    begun(pulled, 3)
    made(pulled)
    acknowledge(pulled)
    assert pulled.state == "done" and len(pulled.painter.calls) == 3


def test_an_error_comes_to_light_where_the_browser_asks(pulled):
    pulled.painter.outcomes.append(ZeroDivisionError("by hand"))
    press(pulled, "Start")
    acknowledge(pulled)
    made(pulled)
    acknowledge(pulled)
    assert pulled.state == "paused" and note(pulled) == "ZeroDivisionError: by hand"


@pytest.mark.parametrize("pull", [False, True])
def test_a_panel_that_no_browser_shows_is_paused(pull, clock, opened, monkeypatch):
    """Counted while the kernel is free: a cell that takes long is no absence."""
    monkeypatch.setattr(style_transfer.panel.studio, "PATIENCE", 1)
    panel = opened(lambda: Studio(TRANSFER, StandIn(clock), pull))
    press(panel, "Start")
    if not pull:
        begun(panel, 1)
        release(panel)
    acknowledge(panel)
    time.sleep(2.2)
    panel.loop.run_until_complete(asyncio.sleep(0.1))
    assert panel.state == "running"
    panel.painter.gate.release(1000)
    until(panel, lambda: panel.state != "running")
    assert panel.state == "paused" and note(panel).startswith("no browser has shown this panel for 1 seconds")
    until(panel, lambda: panel.frame is None or panel.frame.done())
    calls = len(panel.painter.calls)
    panel.loop.run_until_complete(asyncio.sleep(0.1))
    assert len(panel.painter.calls) == calls
    press(panel, "Start")
    assert panel.state == "running" and note(panel) == ""


def test_a_panel_that_a_browser_shows_goes_on(panel, monkeypatch):
    monkeypatch.setattr(style_transfer.panel.studio, "PATIENCE", 1)
    start(panel)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        acknowledge(panel)
        release(panel)
    assert panel.state == "running"


def test_colab_is_where_the_browser_asks(studio, monkeypatch):
    assert not studio(CASTLE, NIGHT).pull and studio(CASTLE, NIGHT, pull=True).pull
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    assert studio(CASTLE, NIGHT).pull and not studio(CASTLE, NIGHT, pull=False).pull


# Settings of a saved image


@pytest.fixture
def saved(panel, tmp_path, monkeypatch):
    """The settings of a saved image, as `Settings`, and the bytes of its file."""
    monkeypatch.chdir(tmp_path)
    settings = Settings(CASTLE, WAVE, 150, "conv2_2", 0.03, 3e5, (("conv1_1", 0.25), ("conv4_1", 3.0)))
    panel.controls.take_all(
        settings._asdict()
        | {
            "content": CASTLE.name,
            "style": WAVE.name,
            "start": "content",
            "seed": 11,
            "layer_weights": dict(settings.layer_weights),
        }
    )
    start(panel)
    press(panel, "Save")
    press(panel, "Pause")
    release(panel)
    path = Path("saved", "chenonceau_great_wave_001.png")
    assert not read_settings(path)["coarse_to_fine"]
    return settings, path.read_bytes()


def test_settings_of_a_saved_image_are_taken_up(saved, studio):
    settings, content = saved
    other = studio(CASTLE, NIGHT)
    upload(other, "settings", ("mine.png", content))
    assert note(other) == "Restart makes it again"
    controls = other.controls
    assert controls.settings() == settings and (controls.start_from.value, controls.seed.value) == ("content", 11)
    assert 128 in controls.size.options
    for slider in (controls.content_weight, *controls.layer_weights.values()):  # the browser rounds to steps
        assert abs(slider.value / slider.step - round(slider.value / slider.step)) < 1e-9
    press(other, "Reset")
    assert controls.settings()._replace(style=NIGHT, size=40) == Settings(CASTLE, NIGHT, 40, *TRANSFER[3:])


def test_what_a_panel_has_not_is_said_and_asked_for(saved, studio, opened, clock):
    settings, content = saved
    alone = studio(None, NIGHT)
    before = alone.controls.settings()
    upload(alone, "settings", ("mine.png", content))
    assert "an image of content and style: open a panel with content and style, and no other" in note(alone)
    assert alone.controls.settings() == before
    other = studio(CASTLE, NIGHT)
    names = {"content": "castle.jpg", "style": WAVE.name, "start": "noise", "seed": 0, "size": 64}
    about = settings._asdict() | names | {"layer_weights": {"conv1_1": 1.0}}
    upload(other, "settings", ("theirs.png", as_png(torch.zeros(1, 3, 2, 2), about)))
    assert note(other) == "upload 'castle.jpg' as content, and then press Restart"
    assert other.controls.settings()[:3] == (CASTLE, WAVE, 64)
    before = other.controls.settings()
    deeper = about | {"layer_weights": {"conv5_3": 1.0}, "size": 80}
    upload(other, "settings", ("theirs.png", as_png(torch.zeros(1, 3, 2, 2), deeper)))
    assert note(other) == "there is no slider for conv5_3 here: open a panel with it among style_layers"
    upload(other, "settings", ("theirs.png", as_png(torch.zeros(1, 3, 2, 2), about | {"seed": -1})))
    assert note(other) == "the seed is -1: a panel's are 0 to 1000000"
    assert other.controls.settings() == before
    upload(other, "settings", ("wave.jpg", WAVE.read_bytes()))
    assert note(other).startswith("'wave.jpg' holds no settings: give a PNG file that was saved")
    assert other.controls.settings() == before


# Two styles, colours, and what a screen reader hears


def test_a_blend_has_both_styles_losses_and_its_slider_moves_no_image_or_layer(watched, vgg):
    """Shares 0 and 1 are the one and the other style alone. A moved slider prepares nothing anew."""
    painter, totals, made = Painter(watched.vgg), {}, []
    for blend in (0.0, 0.3, 1.0):
        settings = TRANSFER._replace(second=WAVE, blend=blend)
        totals[blend] = steps(Painter(vgg), settings, 1, ("content", 0)).style
        painter.step(settings)
        made.append(watched.targets())
        assert painter.run.task.weights[-2:].tolist() == pytest.approx([1 - blend, blend])
    assert made == made[:1] * 3
    for blend, path in ((0.0, NIGHT), (1.0, WAVE)):
        alone = steps(Painter(vgg), TRANSFER._replace(style=path), 1, ("content", 0)).style
        assert totals[blend] == pytest.approx(alone, rel=1e-4)
    assert totals[0.3] < 0.7 * totals[0.0] + 0.3 * totals[1.0]  # by the distance between both, which none can lower


@pytest.mark.parametrize("kind", ["content", "style", "second"])
def test_an_image_whose_file_has_become_another_is_read_again(kind, painter, tmp_path):
    own = {name: tmp_path / f"{name}.jpg" for name in ("content", "style", "second")}
    for path, stored in zip(own.values(), (CASTLE, NIGHT, WAVE)):
        shutil.copy(stored, path)
    settings = TRANSFER._replace(**own, blend=0.5)
    painter.step(settings)
    of_task = {"content": lambda task: task.content, "style": lambda task: task.styles[0].image}
    of_task["second"] = lambda task: task.styles[1].image
    before = of_task[kind](painter.run.task)
    with Image.open(own[kind]) as image:
        turned = image.transpose(Image.Transpose.ROTATE_180)
    turned.save(own[kind], quality=95)
    painter.step(settings)
    after = of_task[kind](painter.run.task)
    assert after.shape == before.shape and not torch.equal(after, before)
    assert torch.equal(after, nst.load_image(own[kind], 40, "cpu"))


def test_a_second_style_and_the_slider_reach_the_next_step(panel):
    controls = panel.controls
    assert controls.second.label == "none" and controls.settings() == TRANSFER
    assert [path for _, path in controls.second.options][1:] == [path for _, path in controls.choices["style"].options]
    start(panel, 0)
    controls.blend.value = 0.75  # without a second style it has no meaning
    release(panel)
    controls.second.value = WAVE
    release(panel)
    controls.blend.value = 0.2
    release(panel, 2)
    found = [settings for settings, _ in panel.painter.calls]
    assert found[:2] == [TRANSFER, TRANSFER]
    assert found[2] == TRANSFER._replace(second=WAVE, blend=0.75) and found[-1].blend == 0.2
    assert pixels(panel.display.inputs["second style"].value).shape[0] == 130
    assert panel.display.boxes["second style"].layout.display == ""
    controls.second.value = ""
    assert panel.display.boxes["second style"].layout.display == "none"


def test_an_uploaded_style_may_be_the_second_and_what_was_chosen_stays(panel):
    panel.controls.second.value = WAVE
    upload(panel, "style", ("mine.jpg", WAVE.read_bytes()))
    assert panel.controls.second.value == WAVE
    path = panel.choices["style"].value
    panel.choices["style"].value = NIGHT
    panel.controls.second.value = path
    assert panel.controls.settings()[1::6] == (NIGHT, path)


def test_colours_are_kept_on_display_and_in_the_file_and_the_run_is_not_touched(studio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = studio(CASTLE, NIGHT)
    press(panel, "Step")
    until(panel, lambda: panel.state == "paused")
    image, plain = panel.shown.image, panel.display.picture.value
    expected = nst.keep_colours(image, nst.load_image(CASTLE, 40, "cpu"))
    evaluations = panel.shown.evaluations
    panel.controls.keep_colours.value = True
    assert np.abs(pixels(panel.display.picture.value) - np.asarray(nst.to_pil(expected))).mean() < 6
    press(panel, "Save")
    with Image.open("saved/chenonceau_starry_night_001.png") as file:
        assert np.array_equal(np.asarray(file), np.asarray(nst.to_pil(expected)))
    assert read_settings("saved/chenonceau_starry_night_001.png")["keep_colours"] is True
    assert panel.state == "paused" and panel.shown.evaluations == evaluations and panel.shown.image is image
    press(panel, "Step")
    until(panel, lambda: panel.state == "paused")
    assert panel.shown.evaluations == evaluations + 1
    again = nst.keep_colours(panel.shown.image, nst.load_image(CASTLE, 40, "cpu"))
    assert np.abs(pixels(panel.display.picture.value) - np.asarray(nst.to_pil(again))).mean() < 6
    panel.controls.keep_colours.value = False
    assert panel.display.picture.value == panel.shown.picture != plain


def test_settings_of_two_styles_and_of_kept_colours_are_saved_and_taken_up(studio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = studio(CASTLE, NIGHT)
    panel.controls.second.value, panel.controls.blend.value, panel.controls.keep_colours.value = WAVE, 0.25, True
    press(panel, "Step")
    until(panel, lambda: panel.state == "paused")
    press(panel, "Save")
    path = Path("saved/chenonceau_starry_night_001.png")
    saved = read_settings(path)
    assert saved["styles"] == [["starry_night.jpg", 0.75, None], ["great_wave.jpg", 0.25, None]]
    assert "second" not in saved and str(nst.IMAGES) not in json.dumps(saved)
    settings, content = panel.controls.settings(), path.read_bytes()
    other = studio(CASTLE, WAVE)
    upload(other, "settings", ("mine.png", content))
    assert note(other) == "Restart makes it again"
    assert other.controls.settings() == settings and other.controls.keep_colours.value
    masked = saved | {"styles": [["starry_night.jpg", 1, "sky.png"], ["great_wave.jpg", 1, "rest"]], "size": 80}
    upload(other, "settings", ("theirs.png", as_png(torch.zeros(1, 3, 2, 2), masked)))
    assert "an image with masks, or of more than two styles: stylise --like makes it again" in note(other)
    assert other.controls.settings() == settings
    unknown = saved | {"styles": [["starry_night.jpg", 3, None], ["mine.jpg", 2, None]]}
    upload(other, "settings", ("theirs.png", as_png(torch.zeros(1, 3, 2, 2), unknown)))
    asked = "upload 'mine.jpg' as style, choose it as the second and 'starry_night.jpg' as style again"
    assert note(other) == f"{asked}, and then press Restart"
    assert not other.controls.second.value and other.controls.blend.value == pytest.approx(0.4)
    before = saved.copy()
    del before["styles"], before["keep_colours"]  # as the first version wrote them
    upload(other, "settings", ("old.png", as_png(torch.zeros(1, 3, 2, 2), before)))
    assert other.controls.settings() == TRANSFER and not other.controls.keep_colours.value


@pytest.mark.parametrize(
    ("paths", "controls"),
    [((CASTLE, NIGHT), 3), ((None, NIGHT), 2), ((CASTLE, None), 0)],
)
def test_controls_that_mean_nothing_are_not_there(paths, controls, studio):
    panel = studio(*paths)
    shown = [*style_transfer.panel.controls.tree(panel.view)]
    own = panel.controls.second, panel.controls.blend, panel.controls.keep_colours
    assert [control in shown for control in own] == [True] * controls + [False] * (3 - controls)


def test_a_screen_reader_hears_what_is_shown_and_the_loss_now_and_then(panel, clock):
    """Each image has a text beside it. The loss is spoken every fifteen seconds, a state or a note at once."""
    for box in style_transfer.panel.controls.tree(panel.view):
        for k, child in enumerate(getattr(box, "children", ())):
            if isinstance(child, widgets.Image):
                assert re.search(r">[\w :;,-]+\.</span>", box.children[k + 1].value)
    heard = []
    panel.display.spoken.observe(lambda change: heard.append(change["new"]), "value")
    start(panel)
    assert [("Running" in text) for text in heard] == [True] and 'aria-live="polite"' in heard[0]
    clock.step = 4.0
    release(panel, 9)
    assert [re.search(r"loss ([\d.]+)", text)[1] for text in heard[1:]] == ["0.8", "0.4444"]
    press(panel, "Pause")
    assert "Paused" in heard[-1] and len(heard) == 4
    assert "aria-live" not in says(panel)
