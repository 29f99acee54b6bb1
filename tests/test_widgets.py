"""The panel without a browser: what its painter computes, its states, and that errors come to light.

The states are tested with a painter whose steps wait until the test releases them, and whose clock only they move. So
nothing depends on how fast the machine is. What the real painter computes is seen by hooks on the network it is given,
which the engine's copies keep.
"""

import asyncio
import base64
import datetime
import filecmp
import html
import math
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ipywidgets as widgets
import psutil
import pytest
import torch
from PIL import Image

import nst_utils as nst
from style_transfer.engine.figures import jpeg
from style_transfer.engine.saving import as_png, read_settings
from style_transfer.panel import controls, style_studio
from style_transfer.panel import studio as studio_module
from style_transfer.panel.painter import Painter, Settings, draw_curves
from style_transfer.panel.studio import Studio

CASTLE, NIGHT = nst.IMAGES / "content" / "chenonceau.jpg", nst.IMAGES / "style" / "starry_night.jpg"
WAVE = nst.IMAGES / "style" / "great_wave.jpg"
LAYERS = dict.fromkeys(nst.FIRST_FIVE, 1.0)
TRANSFER = Settings(CASTLE, {NIGHT: 1.0}, 40, "conv1_2", 1.0, 1e4, LAYERS)
# Two scales, 64 and 128 pixels, by a network of two layers.
TWO_SCALES = TRANSFER._replace(size=128, content_layer="conv1_1", layer_weights={"conv1_1": 1.0, "conv1_2": 0.5})


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """No fast bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


# --- The painter ---------------------------------------------------------------------------------


class Watched:
    """A network, `vgg`, and what it and its copies are run for."""

    def __init__(self):
        self.vgg = nst.load_vgg19(device="cpu")
        self.passes = []  # (layer, height of its map, whether a gradient is wanted); targets want none
        self.broken = None  # a height at which evaluations fail
        self.factor = 1.0  # of conv1_1's feature maps
        for name, module in self.vgg.named_children():
            module.register_forward_hook(lambda module, inputs, output, name=name: self.note(name, output))

    def note(self, layer, output):
        if output.shape[-2] == self.broken:
            raise ZeroDivisionError
        self.passes.append((layer, output.shape[-2], output.requires_grad))
        return output * self.factor if layer == "conv1_1" and self.factor != 1 else None

    def targets(self):
        """How many times feature maps were computed as targets."""
        return sum(layer == "conv1_1" and not gradient for layer, _, gradient in self.passes)


@pytest.fixture
def watched():
    return Watched()


@pytest.fixture
def painter(vgg):
    return Painter(vgg)


def steps(painter, settings, count, start=None):
    """The last of `count` steps."""
    for k in range(count):
        step = painter.step(settings, None if k else start)
    return step


def losses_of(vgg, image, settings):
    """(content loss, style loss) of an image by the helper's formulas, of the last style."""
    layer, weights = settings.content_layer, settings.layer_weights
    content, style = (nst.load_image(path, settings.size, "cpu") for path in (settings.content, [*settings.styles][-1]))
    maps = nst.features(vgg, image, (layer, *weights))
    grams = nst.gram_matrices(nst.features(vgg, style, weights))
    content_loss = nst.content_loss(maps, nst.features(vgg, content, [layer]))
    return content_loss.item(), nst.style_loss(maps, grams, weights).item()


def test_a_step_is_one_evaluation_and_every_weight_reaches_its_losses_and_the_curves(watched, vgg):
    painter, weights = Painter(watched.vgg), {"conv1_1": 0.5, "conv3_1": 2.0}
    settings = TRANSFER._replace(content_weight=3.0, style_weight=5e3, layer_weights=weights)
    step = steps(painter, settings, 5, ("content", 0))
    assert watched.passes.count(("conv3_1", 10, True)) == len(painter.curves) == 5
    assert (step.content, step.style) == pytest.approx(losses_of(vgg, painter.run.image, settings), rel=1e-3)
    assert step.total == pytest.approx(3.0 * step.content + 5e3 * step.style, rel=1e-4)
    assert painter.curves[-1] == pytest.approx((step.total, 3 * step.content, 5e3 * step.style))
    assert painter.curves[-1][0] < painter.curves[0][0]


def test_an_evaluation_that_makes_it_worse_changes_neither_picture_nor_losses(watched):
    painter = Painter(watched.vgg)
    best, image = steps(painter, TRANSFER, 3), painter.run.image
    watched.factor = 10.0
    frame = painter.make_frame(TRANSFER, None, "nothing", None, True, ())
    assert frame.evaluations == len(painter.curves) == 4 and frame.step == best
    assert torch.equal(frame.image, image) and painter.curves[3] == painter.curves[2]


@pytest.mark.parametrize("start", [None, ("content", 0), ("present", 0), ("noise", 0)])
def test_from_an_image_the_panel_works_at_full_size_alone(start, painter):
    """However large: what is on display never loses its detail."""
    painter.step(TRANSFER)
    painter.change(TRANSFER._replace(size=1024, content_layer="conv1_1", layer_weights={"conv1_1": 1.0}), start)
    sides = [64, 128, 256, 512, 1024] if start == ("noise", 0) else [1024]
    assert [min(scale) for scale in painter.run.scales] == sides


def test_weights_make_nothing_anew_and_another_image_only_its_own(watched, vgg):
    """And both go on from the present image."""
    painter, blend = Painter(watched.vgg), TRANSFER._replace(styles={NIGHT: 0.7, WAVE: 0.3})
    steps(painter, blend, 5, ("content", 0))
    made, run, content, before = watched.targets(), painter.run, painter.run.task.content, painter.run.image
    del watched.vgg[:]  # whoever wants another copy finds no layer
    weights = LAYERS | {"conv1_1": 0.5}
    weighed = Settings(CASTLE, {NIGHT: 0.0, WAVE: 1.0}, 40, "conv1_2", 2.0, 1e6, weights)
    step = painter.step(weighed)
    assert watched.targets() == made == 3 and painter.run is run and torch.equal(run.image, before)
    assert (step.content, step.style) == pytest.approx(losses_of(vgg, before, weighed), rel=1e-3)
    painter.step(TRANSFER._replace(styles={WAVE: 1.0}))
    assert watched.targets() > made and painter.run is run and torch.equal(run.image, before)
    assert run.task.content is content and len(painter.curves) == 7


def test_a_layer_may_come_and_go(watched):
    """Without weight it stays until the next start, so that nothing is prepared anew."""
    painter, shallow = Painter(watched.vgg), TRANSFER._replace(layer_weights={"conv1_1": 1.0, "conv1_2": 1.0})
    before, made = steps(painter, TRANSFER, 3), watched.targets()
    step = painter.step(shallow)
    assert watched.targets() == made and step.style < before.style
    watched.passes.clear()
    painter.step(shallow, ("present", 0))
    assert {layer for layer, *_ in watched.passes} == {"conv1_1", "relu1_1", "conv1_2"}  # nothing deeper is computed


def test_another_size_scales_the_present_image(painter):
    """From a coarse scale, too: to the new size at once."""
    before = painter.make_frame(TWO_SCALES, ("noise", 5), "the start", None, True, ())
    after = painter.make_frame(TWO_SCALES._replace(size=80), None, "the start", None, True, ())
    assert after.step.shape[0] == 80 and painter.run.scales == (after.step.shape,)
    torch.testing.assert_close(after.image, nst.resize(before.image, after.step.shape))
    assert after.evaluations == 2 and after.start == ("noise", 5)
    assert before.mean == 0 <= after.mean < 0.1  # different from the start, which is scaled, too


def test_noise_goes_from_coarse_to_fine_as_the_task_does_and_a_new_weight_changes_no_scale(vgg):
    """With the seed's detail at the finer scale."""
    painter, lighter = Painter(vgg, evaluations=9), TWO_SCALES._replace(style_weight=1e3)
    painter.step(TWO_SCALES, ("noise", 7))
    task = painter.run.task
    assert [min(scale) for scale in painter.run.scales] == [64, 128]
    assert [painter.step(lighter).shape[0] for _ in range(4)] == [64, 64, 64, 128]
    assert painter.step(TWO_SCALES).shape[0] == 128 and len(painter.run.scales) == 1
    run = nst.Run(task, seed=7, vgg=vgg, evaluations=9)
    for count, weight in ((1, 1e4), (4, 1e3), (1, 1e4)):
        run.retarget(task._replace(style_weight=weight))
        last = [run.step() for _ in range(count)][-1]
    assert last == painter.last and torch.equal(run.image, painter.run.image)


def test_a_restart_forgets_and_a_seed_repeats(painter):
    first, again, other = (steps(painter, TRANSFER, 4, ("noise", seed)) for seed in (3, 3, 4))
    assert first == again != other and len(painter.curves) == 4
    present = painter.run.image
    painter.step(TRANSFER, ("present", 0))
    assert torch.equal(painter.run.image, present) and torch.equal(painter.first, present)
    assert len(painter.curves) == 1


def test_a_run_ends_says_why_and_then_may_go_on(vgg):
    painter, found = Painter(vgg, clock=lambda: 0.0), []  # a frame that lasts until the run has ended
    settings = TRANSFER._replace(styles={}, layer_weights={})
    painter.step(settings, ("content", 0))  # the content is its own reconstruction
    for other in (settings, settings, settings._replace(content_layer="conv2_1")):
        frame = painter.make_frame(other, None, "nothing", None, False, ())
        assert frame.ended == painter.run.ended == "no step lowers the loss any more"
        assert painter.step(other) is not None and painter.run.ended is None
        found.append(frame.evaluations)
    assert found == [1, 2, 4]


def test_what_cannot_be_is_refused_and_the_image_stays(painter, refuses):
    steps(painter, TRANSFER, 2)
    before = painter.run.image
    with refuses("no layer has a weight above 0"):
        painter.step(TRANSFER._replace(content_weight=0.0, layer_weights={}))
    assert torch.equal(painter.run.image, before) and painter.step(TRANSFER) is not None


@pytest.mark.parametrize("height", [64, 128])
def test_after_an_error_a_step_goes_on_from_the_present_image(height, watched, vgg):
    """As when memory runs out: at 64 pixels in the midst of a scale; at 128 before the first evaluation there, when the
    image on display is still the coarser one.
    """
    painter, untroubled = Painter(watched.vgg, evaluations=9), Painter(vgg, evaluations=9)
    count, same = (2, 2) if height == 64 else (3, 4)  # of three at the coarse scale
    steps(painter, TWO_SCALES, count, ("noise", 7))
    step = steps(untroubled, TWO_SCALES, same, ("noise", 7))
    watched.broken = height
    for weight in (1e4, 1e3, 1e3):
        with pytest.raises(ZeroDivisionError):
            painter.step(TWO_SCALES._replace(style_weight=weight))
    assert painter.run.image.shape[-2] == 64 and len(painter.curves) == count
    watched.broken = None
    assert painter.step(TWO_SCALES).total == pytest.approx(step.total)
    assert torch.equal(painter.run.image, untroubled.run.image)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_image_whose_file_has_become_another_is_read_again(place, painter, tmp_path):
    paths = [tmp_path / f"{name}.jpg" for name in ("content", "first", "second")]
    settings = TRANSFER._replace(content=paths[0], styles={paths[1]: 0.5, paths[2]: 0.5})
    for path, source in zip(paths, (CASTLE, NIGHT, WAVE)):
        shutil.copy(source, path)
    painter.step(settings)
    shutil.copy(nst.IMAGES / "content" / "cat_with_yarn.jpg", paths[place])
    painter.step(settings)
    task = painter.run.task
    for path, image in zip(paths, (task.content, *(style.image for style in task.styles))):
        assert torch.equal(image, nst.load_image(path, 40, "cpu"))


# --- The states of the panel ---------------------------------------------------------------------


def test_curves_are_drawn_in_a_log_scale_and_each_loss_that_there_is():
    both = draw_curves([(100.0, 10.0, 0.0), (10.0, 1.0, 9.0), (10.0, 1.0, 9.0)])
    lines = re.findall(r'curve-(\d)" points="([^"]*)"', both)
    assert (
        lines[:2] == [("0", "0,0.000 1,0.500 2,0.500 2,0.500"), ("1", "0,0.500 1,1.000 2,1.000 2,1.000")]
        and len(lines) == 3
    )
    assert all(text in both for text in ("total", "content × its weight", ">100<", ">1<", "3 evaluations"))
    alone = draw_curves([(9.0, 0.0, 9.0)] * 999)
    assert alone.count("<polyline") == 1 and "style" not in alone and "998,0.000" in alone and len(alone) < 5000
    assert "0 evaluations" in draw_curves([])


class StandIn(Painter):
    """A painter whose steps wait, on the worker's thread, until the test releases them."""

    def __init__(self):
        super().__init__(None, clock=lambda: self.now)
        self.now, self.seconds = 0.0, 1.0  # its clock, and how long a step takes: longer than a frame
        self.gate = threading.Semaphore(0)
        self.calls = []  # (settings, start) of every step that was begun
        self.begun = []  # likewise of every run whose start was shown before
        self.outcomes = {}  # {number of a step: why the run ends there, or an exception}

    def change(self, settings, start):
        self.begun.append((settings, start))
        self.run = self.run_of(0)

    def run_of(self, count):
        task = SimpleNamespace(content=torch.rand(1, 3, 4, 5))
        image = torch.full((1, 3, 4, 5), min(1.0, count / 50))
        return SimpleNamespace(image=image, task=task, ended=None, shape=(8, 10))

    def step(self, settings, start=None):
        self.calls.append((settings, start))
        assert self.gate.acquire(timeout=120), "no test released this step"
        self.now += self.seconds
        count = len(self.calls)
        outcome = self.outcomes.get(count)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome:
            self.run.ended = outcome
            return None
        if start:
            self.curves = []
            self.start = start
            self.first = torch.zeros(1, 3, 4, 5)
        self.run = self.run_of(count)
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
    assert not panel.buttons[name].disabled
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
        until(panel, lambda before=before: len(panel.painter.calls) > before or panel.working.done())


def start(panel, count=1, name="Start"):
    """Press a button that sets the panel going, and release so many steps."""
    before = len(panel.painter.calls)
    press(panel, name)
    begun(panel, before + 1)
    release(panel, count)


def step(panel):
    """One step of a panel with the real painter, or an error."""
    press(panel, "Step")
    until(panel, lambda: panel.state != "running")


def says(panel):
    return html.unescape(panel.display.status.value)


def note(panel):
    return re.search("</b> (.*?)<br>", says(panel))[1]


def shown(panel, name):
    """The bytes of the image on display, or None if it is hidden."""
    return None if panel.display.boxes[name].layout.display == "none" else panel.display.images[name].value


def shows(panel, name, image):
    """Whether this is the image on display. (pytest would take minutes to tell how two files differ.)"""
    return shown(panel, name) == jpeg(image)


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("style-studio")]


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """opened(make): the panel that a function makes, with a loop of its own, in an empty folder; closed at the end."""
    monkeypatch.chdir(tmp_path)
    panels, loop = [], asyncio.new_event_loop()
    loop.set_debug(True)  # refuses what only the loop's own thread may do

    def open_panel(make):
        async def in_the_loop():
            return make()

        panels.append(loop.run_until_complete(in_the_loop()))
        return panels[-1]

    yield open_panel
    for panel in panels:
        gate = getattr(panel.painter, "gate", threading.Semaphore())
        panel.close()
        gate.release(1000)
    until(SimpleNamespace(loop=loop), lambda: not workers() and not asyncio.all_tasks(loop))
    loop.close()


@pytest.fixture
def stand_in(opened):
    """stand_in(settings, **options): a panel whose painter is a `StandIn`."""
    return lambda settings=TRANSFER, **options: opened(lambda: Studio(settings, StandIn(), **options))


@pytest.fixture
def panel(stand_in):
    return stand_in()


@pytest.fixture
def studio(vgg, opened):
    """studio(content, style, **options): a panel with the real painter, at 40 pixels."""
    return lambda *paths, **options: opened(lambda: style_studio(*paths, **{"size": 40, "vgg": vgg, **options}))


def test_start_pause_and_start_again(panel):
    assert [name for name, button in panel.buttons.items() if button.disabled] == ["Snapshot", "Save"]
    assert panel.buttons["Start"].button_style == "primary"
    start(panel, 2)
    assert "Running" in says(panel) and "2 evaluations · 5 × 4, float32 · loss 2, of content 1.5" in says(panel)
    assert panel.buttons["Pause"].button_style == "primary" and not panel.buttons["Start"].button_style
    assert not any(button.disabled for button in panel.buttons.values())  # it would lose the focus
    press(panel, "Pause")
    image = shown(panel, "picture")
    release(panel)  # the step that was under way
    assert panel.state == "paused" and "Paused" in says(panel) and panel.working.done()
    assert shown(panel, "picture") == image and len(panel.painter.calls) == 3
    start(panel)
    assert shown(panel, "picture") != image and panel.state == "running"


def test_the_rate_on_display_counts_no_pause(panel):
    """It is that of the latest twenty."""
    start(panel)
    panel.painter.seconds = 0.5
    release(panel, 20)
    assert "2.0 evaluations a second" in says(panel)
    press(panel, "Pause")
    release(panel)
    assert "a second" not in says(panel)
    panel.painter.now, panel.painter.seconds = 1000.0, 0.25
    start(panel, 3)
    assert "4.0 evaluations a second" in says(panel)


def test_a_second_press_of_start_makes_no_second_loop(panel):
    for _ in range(2):
        panel.start()
    begun(panel, 1)
    working = panel.working
    press(panel, "Pause")
    press(panel, "Start")
    assert panel.working is working and asyncio.all_tasks(panel.loop) == {working, panel.watching}
    release(panel)
    assert panel.working is working and panel.state == "running"


def test_a_button_may_be_pressed_on_another_thread(panel):
    panel.loop.run_until_complete(asyncio.to_thread(panel.buttons["Start"].click))
    begun(panel, 1)
    assert panel.state == "running" and note(panel) == ""


def test_step_is_one_evaluation_however_long_a_frame_lasts_and_may_end_the_run(panel):
    panel.painter.seconds = 0.001
    panel.painter.outcomes[3] = "nothing is left"
    for count in (1, 2):
        start(panel, name="Step")
        assert panel.working.done() and panel.state == "paused"
        assert panel.shown.evaluations == len(panel.painter.calls) == count
    assert panel.display.chart.value == panel.shown.chart
    start(panel, name="Step")
    assert panel.state == "done" and panel.shown.evaluations == 2
    assert "Finished: nothing is left. Move a control or press Start to continue." in says(panel)


def test_step_takes_over_from_a_loop_that_was_just_paused(panel):
    start(panel)
    press(panel, "Pause")
    panel.controls.content_weight.value = 7.0
    press(panel, "Step")
    release(panel)  # began with another weight, and is not what Step asked for
    assert panel.state == "running" and panel.shown.settings.content_weight == 1
    release(panel)
    assert panel.state == "paused" and panel.working.done()
    assert panel.shown.settings.content_weight == 7 and len(panel.painter.calls) == 3


def test_restart_begins_again_from_the_chosen_start(panel):
    start(panel)
    panel.controls.start.value, panel.controls.seed.value = "content", 5
    press(panel, "Restart")
    release(panel, 2)
    assert [start for _, start in panel.painter.calls] == [("noise", 0), None, ("content", 5), None]
    assert panel.shown.start == ("content", 5) and panel.shown.evaluations == 1


def test_until_start_the_beginning_is_on_display(studio, stand_in):
    """So that nothing moves when Start is pressed."""
    panel = studio(CASTLE, NIGHT)
    assert shows(panel, "picture", nst.Run(panel.painter.run.task, vgg=panel.painter.vgg).image)
    panel.controls.start.value = "content"
    for path in (CASTLE, NIGHT):
        panel.controls.offer("content", path)
        assert shows(panel, "picture", nst.load_image(path, 40, "cpu"))
    other = stand_in()
    other.controls.style_weight.value = 30.0  # shows in no start
    other.controls.size.value = 128
    start(other, 0)
    other.controls.size.value = 192
    assert [(settings.size, start) for settings, start in other.painter.begun] == [
        (40, ("noise", 0)),
        (128, ("noise", 0)),
    ]


def test_blend_is_off_without_a_second_style_and_layers_unfold(panel):
    own = panel.controls
    found = [own.blend.disabled, own.folded.layout.display]
    own.choices[controls.SECOND].value, own.unfold.value = WAVE, True
    assert [*found, own.blend.disabled, own.folded.layout.display] == [True, "none", False, ""]


def test_moved_controls_reach_the_next_step_and_reset_takes_weights_back(panel):
    own = panel.controls
    start(panel, 0)
    own.blend.value = 0.75  # means nothing without a second style
    release(panel)
    own.style_weight.value, own.content_weight.value, own.layer_weights["conv1_1"].value = 1e6, 2.5, 0
    own.choices[controls.SECOND].value = WAVE
    release(panel, 2)
    fewer = {name: 1.0 for name in LAYERS if name != "conv1_1"}
    moved = TRANSFER._replace(
        style_weight=1e6, content_weight=2.5, layer_weights=fewer, styles={NIGHT: 0.25, WAVE: 0.75}
    )
    press(panel, "Reset")
    own.choices[controls.SECOND].value = NIGHT  # the first again: no blend
    release(panel)
    assert [settings for settings, _ in panel.painter.calls] == [TRANSFER, TRANSFER, moved, moved, TRANSFER]


@pytest.mark.parametrize("control, value", [("content_layer", "conv2_1"), ("size", 128), ("style_weight", 10.0)])
def test_a_panel_that_has_finished_goes_on_when_a_control_moves(control, value, panel):
    panel.painter.outcomes[2] = "nothing is left"
    start(panel, 2)
    assert panel.state == "done" and panel.working.done() and not panel.buttons["Start"].disabled
    getattr(panel.controls, control).value = value
    begun(panel, 3)
    assert panel.state == "running" and getattr(panel.painter.calls[-1][0], control) == value


def test_a_frame_holds_as_many_evaluations_as_its_time_and_the_last_ones_are_shown(panel):
    panel.painter.seconds = 0.01  # a frame lasts a thirtieth of a second
    panel.painter.outcomes[7] = "nothing is left"
    start(panel, 3)
    assert panel.shown is None
    release(panel, 3)
    assert panel.shown.evaluations == 4
    release(panel)
    assert panel.state == "done" and panel.shown.evaluations == 6


def test_an_error_in_the_loop_comes_to_light(panel):
    panel.painter.outcomes[2] = ZeroDivisionError("division by <zero>")
    start(panel, 2)
    assert panel.state == "paused" and note(panel) == "ZeroDivisionError: division by <zero>"
    assert "<zero>" not in panel.display.status.value
    start(panel, 0)
    assert panel.state == "running" and note(panel) == ""


def test_the_difference_is_to_the_start_or_to_the_snapshot(panel):
    panel.controls.compare.value = "the start"
    start(panel)
    assert panel.shown.mean == pytest.approx(1 / 50) and shown(panel, "difference")  # the stand-in's images
    assert panel.display.captions["difference"].value == "difference map, mean 0.0200"
    panel.painter.run.image = torch.ones(1, 3, 4, 5)  # the painter's is another one by now
    press(panel, "Snapshot")
    assert panel.controls.compare.value == "the snapshot"
    release(panel, 3)
    assert panel.shown.mean == pytest.approx(3 / 50)
    panel.controls.compare.value = "nothing"
    release(panel, 2)
    assert panel.shown.difference is None and shown(panel, "difference") is None


def test_a_new_panel_closes_the_one_before_and_leaves_its_last_picture(studio, monkeypatch):
    """Though the notebook remembers every panel that it was given."""
    made = []
    widgets.Widget.on_widget_constructed(made.append)
    old, published = studio(CASTLE, NIGHT), []
    monkeypatch.setattr(
        studio_module, "publish_display_data", lambda data, *_, **options: published.append((data, options))
    )
    old._ipython_display_()
    picture = shown(old, "picture")
    press(old, "Start")
    new = studio(None, NIGHT)
    widgets.Widget.on_widget_constructed(None)
    (still, _), (view, shown_by), (closed, options) = published
    assert "image/jpeg" in view and base64.b64encode(view["image/jpeg"]).decode() in still["text/html"]
    assert options == {"update": True} | shown_by and base64.b64encode(picture).decode() in closed["text/html"]
    assert closed["text/plain"] == "This panel was closed, since another was opened. Run this cell to open it again."
    until(new, lambda: old.working.done() and not workers())
    for button in old.buttons.values():
        button.click()
    upload(old, "style", "a.jpg", WAVE.read_bytes())
    old.loop.run_until_complete(asyncio.sleep(0))  # so that what they asked the loop for is done
    assert (old.state, note(old), new.state) == ("closed", "", "ready") and not workers() and not [*Path().iterdir()]
    assert old.painter is old.shown is old.snapshot is None
    new.close()
    assert len(made) > 100 and all(widget.comm is None for widget in made)


# --- Messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [(button, None) for button in ("Start", "Pause", "Step", "Restart", "Reset")]
    + [("style_weight", 20.0), ("content_layer", "conv2_2"), ("start", "content"), ("seed", 8)]
    + [("compare", "the start"), ("keep_colours", True), ("blend", 0.3), ("conv1_1", 0.3)],
)
def test_a_note_lives_until_the_next_thing_the_user_does(name, value, panel):
    """Not until the next frame; whatever that thing is."""
    start(panel)
    for button, expected in (("Save", "saved as saved"), ("Snapshot", "this image is kept")):
        press(panel, button)
        release(panel, 2)
        assert note(panel).startswith(expected) and panel.state == "running"
    if name in panel.buttons:
        panel.buttons[name].click()
    else:
        own = panel.controls
        (vars(own) | own.layer_weights)[name].value = value
    assert note(panel) == ""


def test_a_folder_that_cannot_be_written_is_said_and_no_longer_once_it_can(panel, as_nobody, monkeypatch):
    start(panel)
    with as_nobody() as folder:
        monkeypatch.chdir(folder)
        folder.chmod(0o500)
        press(panel, "Save")
        assert note(panel) == f"the image cannot be saved in {str(folder / 'saved')!r}: Permission denied"
        folder.chmod(0o700)
        press(panel, "Save")
        assert note(panel) == "saved as saved/chenonceau_starry_night_001.png"
        monkeypatch.undo()


def test_what_goes_wrong_in_a_control_is_said_and_the_panel_goes_on(panel):
    start(panel)
    panel.controls.offer("style", Path("gone.jpg"))
    assert note(panel) == "no picture at 'gone.jpg': give the path of a file"
    panel.controls.choices["style"].value = NIGHT
    assert note(panel) == ""
    upload(panel, "style", 7, b"")
    unforeseen = note(panel)
    assert unforeseen.startswith("TypeError: ")
    release(panel, 2)
    assert panel.state == "running" and note(panel) == unforeseen


def test_a_screen_reader_hears_what_is_shown_and_the_loss_now_and_then(panel):
    """Each image has a text beside it. The loss is spoken every fifteen seconds, a state or a note at once."""
    assert all(re.fullmatch(r"[\w :;,-]+\.", box.children[-1].value) for box in panel.display.boxes.values())
    heard = []
    panel.display.spoken.observe(lambda change: heard.append(change["new"]), "value")
    start(panel)
    assert [("Running" in text) for text in heard] == [True] and 'aria-live="polite"' in heard[0]
    panel.painter.seconds = 4.0
    release(panel, 9)
    assert [re.search(r"loss ([\d.]+)", text)[1] for text in heard[1:]] == ["0.8", "0.4444"]
    press(panel, "Pause")
    assert "Paused" in heard[-1] and len(heard) == 4
    assert "aria-live" not in says(panel)


# --- Uploads and previews ------------------------------------------------------------------------


def upload(panel, kind, name, content):
    """As the browser does; kind: an image's, or "settings"."""
    about = {"name": name, "type": "", "size": 1, "last_modified": datetime.datetime.now(datetime.UTC)}
    panel.controls.uploaders[kind].set_trait("value", (about | {"content": memoryview(content)},))


NAMES = {  # of a file as it is uploaded: as it is kept
    "..": "picture",
    "a/b\0c.jpg": "b c.jpg",
    300 * "x" + ".jpg": 199 * "x" + ".jpg",
    100 * "浮" + ".jpg": 66 * "浮" + ".jpg",
    "C:\\mine.jpg": "C mine.jpg",
    "<b>ü &.jpg": "b ü &.jpg",
    "a\ud800b.jpg": "a b.jpg",
    "a.0123456789": "a.012345678",
}
KEPT = ["a.b.jpg", "Mu\u0308ller.jpg", "हिन्दी.jpg", "a 🙂.jpg", "it's.jpg"]


@pytest.mark.parametrize("name", [*NAMES, *KEPT])
def test_an_upload_of_any_name_is_offered_and_chosen_and_may_come_again(name, panel):
    choice = panel.controls.choices["style"]
    offered = len(choice.options)
    for _ in range(2):
        upload(panel, "style", name, WAVE.read_bytes())
        path = choice.value
        assert filecmp.cmp(path, WAVE, shallow=False) and str(path).startswith(panel.uploads.name)
        assert path.name == NAMES.get(name, name) and len(choice.options) == offered + 1 and note(panel) == ""
        assert not panel.controls.uploaders["style"].value
        choice.value = NIGHT


def test_uploads_of_one_name_do_not_meet(panel):
    """A style named like the content, another image of the same name: each keeps its own."""
    names = {path.read_bytes(): path.stem for path in (CASTLE, WAVE, NIGHT)}
    castle, wave, night = names
    upload(panel, "content", "mine.jpg", castle)
    choices = panel.controls.choices
    for content in (wave, night, castle):
        upload(panel, "style", "mine.jpg", content)
    labels = [(label, names[path.read_bytes()]) for label, path in choices["style"].options[:3]]
    assert labels == [("mine.jpg (another)", "chenonceau"), ("mine.jpg", "starry_night"), ("mine", "great_wave")]
    assert {names[choices[kind].value.read_bytes()] for kind in ("content", "style")} == {"chenonceau"}


@pytest.mark.parametrize("kind", ["content", "style", controls.SECOND])
def test_a_file_that_is_no_image_is_named_and_the_choice_stays(kind, panel):
    choice = panel.controls.choices[kind]
    before = choice.value, len(choice.options)
    for name, content, problem in (
        ("notes.txt", b"no picture", " is not a picture"),
        ("cut.jpg", NIGHT.read_bytes()[:999], " is cut off"),
    ):
        upload(panel, kind, name, content)
        assert note(panel).startswith(f"{name!r}{problem}") and (choice.value, len(choice.options)) == before
    upload(panel, kind, "mine.jpg", WAVE.read_bytes())
    assert choice.value.name == "mine.jpg" and note(panel) == ""


@pytest.mark.parametrize(
    "command, limit", [("x --y={'websocket_max_message_size': 300000000}", "285 MB"), ("x", "10 MB")]
)
def test_what_is_too_large_to_upload_is_said(command, limit, monkeypatch):
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: command.split())
    assert f"Uploads above {limit} (" in controls.upload_limit()


def test_uploads_have_either_form_of_ipywidgets():
    eight = {"name": "a.jpg", "content": memoryview(b"one")}, {"name": "b c.png", "content": memoryview(b"two")}
    seven = {"a.jpg": {"content": b"one"}, "b c.png": {"content": b"two"}}
    for value, expected in ((eight, 2), (seven, 2), ((), 0), ({}, 0)):
        assert controls.uploaded_files(value) == [("a.jpg", b"one"), ("b c.png", b"two")][:expected]


def test_the_images_that_go_in_are_shown_as_their_files_are_now(studio, tmp_path, monkeypatch):
    """A relative path is that of when it was given."""
    mine = tmp_path / "mine.jpg"
    shutil.copy(WAVE, mine)
    panel = studio(CASTLE, "mine.jpg")
    monkeypatch.chdir(nst.IMAGES)
    for source in (WAVE, NIGHT):
        shutil.copy(source, mine)
        step(panel)
        for kind, path in (("content", CASTLE), ("style", source)):
            assert shows(panel, kind, nst.load_image(path, 130, "cpu"))
    assert panel.shown.evaluations == 2 and shown(panel, controls.SECOND) is None
    panel.controls.choices[controls.SECOND].value = WAVE
    assert shows(panel, controls.SECOND, nst.load_image(WAVE, 130, "cpu"))
    mine.unlink()
    step(panel)
    assert note(panel) == f"no picture at {str(mine)!r}: give the path of a file" and panel.state == "paused"


def test_pictures_alone_are_offered_each_by_a_name_of_its_own(stand_in, tmp_path, monkeypatch):
    (tmp_path / "style" / ".ipynb_checkpoints").mkdir(parents=True)
    monkeypatch.setattr(controls, "IMAGES", tmp_path)
    for junk in (".DS_Store", "notes.txt", "Apple.jpg", "._mine.jpg"):
        (tmp_path / "style" / junk).write_bytes(b"\0\5\x16\7 no picture")
    for name in ("great_wave.jpg", "great_wave.png", ".hidden.jpg", "night.jpg"):
        shutil.copy(WAVE, tmp_path / "style" / name)
    panel = stand_in(TRANSFER._replace(content=None, styles={tmp_path / "style" / "night.jpg": 1.0}))
    expected = [("great_wave.jpg", "great_wave.jpg"), ("great wave", "great_wave.png"), ("night", "night.jpg")]
    choice, chosen = panel.controls.choices["style"], []
    assert [(label, path.name) for label, path in choice.options] == expected
    assert panel.controls.choices[controls.SECOND].options[0] == ("none", "")
    choice.observe(lambda change: chosen.append(change.new.name), "value")
    upload(panel, "style", "great wave.jpg", NIGHT.read_bytes())
    assert chosen == ["great wave.jpg"]  # at once, with no other in between
    assert [(label, path.name) for label, path in choice.options] == [("great wave.jpg", "great wave.jpg"), *expected]


# --- Saved images, their settings and colours ----------------------------------------------------


def test_a_saved_file_is_the_image_on_display_with_its_settings(panel):
    start(panel)
    panel.controls.seed.value, panel.controls.style_weight.value = 7, 10.0  # chosen after this image was made
    panel.painter.run.image = torch.ones(1, 3, 4, 5)  # the painter's is another one by now
    for k in (1, 2):
        press(panel, "Save")
        path = Path("saved", f"chenonceau_starry_night_00{k}.png")
        assert note(panel) == f"saved as {path}"
    saved = read_settings(path)
    assert (saved["content"], saved["style_weight"]) == ("chenonceau.jpg", 1e4)
    assert saved["styles"] == [["starry_night.jpg", 1, None]]
    assert (saved["start"], saved["seed"], saved["evaluations"], saved["coarse_to_fine"]) == ("noise", 0, 225, True)
    assert saved["losses"] == {"shape": [4, 5], "precision": "float32", "total": 4, "content": 3, "style": 1}
    assert Image.open(path).tobytes() == nst.to_pil(panel.shown.image).tobytes()
    assert shows(panel, "picture", nst.resize(panel.shown.image, (8, 10)))  # at the size of the result
    link = panel.display.download.value
    assert f'download="{path.name}"' in link and base64.b64encode(path.read_bytes()).decode() in link
    panel.link_bytes = 10
    press(panel, "Save")
    assert not panel.display.download.value


SAVED = {
    "content": "chenonceau.jpg",
    "styles": [["great_wave.jpg", 1, None]],
    "size": 150,
    "content_layer": "conv2_2",
    "content_weight": 0.03,
    "style_weight": 3e5,
    "layer_weights": {"conv1_1": 0.25, "conv4_1": 3.0},
    "start": "content",
    "seed": -11,
    "keep_colours": True,
}


def open_settings(panel, settings):
    upload(panel, "settings", "mine.png", as_png(torch.zeros(1, 3, 2, 2), settings))
    return note(panel)


def test_settings_of_a_saved_image_are_taken_up(panel):
    own = panel.controls
    assert open_settings(panel, SAVED) == "press Restart to make it again"
    assert own.settings() == Settings(CASTLE, {WAVE: 1.0}, 150, "conv2_2", 0.03, 3e5, SAVED["layer_weights"])
    assert 128 in own.size.options and 150 in own.size.options
    start(panel)
    press(panel, "Save")
    saved = read_settings("saved/chenonceau_great_wave_001.png")
    assert saved | SAVED == saved and not saved["coarse_to_fine"]
    press(panel, "Reset")
    assert own.settings() == TRANSFER._replace(styles={WAVE: 1.0}, size=150)


def test_settings_of_two_styles_are_saved_and_taken_up(stand_in, panel):
    panel.controls.choices[controls.SECOND].value, panel.controls.blend.value = WAVE, 0.25
    start(panel)
    press(panel, "Save")
    saved = read_settings("saved/chenonceau_starry_night_001.png")
    assert saved["styles"] == [["starry_night.jpg", 0.75, None], ["great_wave.jpg", 0.25, None]]
    other = stand_in(TRANSFER._replace(styles={WAVE: 1.0}))
    assert open_settings(other, saved) == "press Restart to make it again"
    assert other.controls.settings() == panel.controls.settings()
    unknown = saved | {"content": "mine.jpg", "styles": [["starry_night.jpg", 3, None], ["other.jpg", 2, None]]}
    expected = "upload 'mine.jpg' as content, upload 'other.jpg' as second style, press Restart to make it again"
    assert open_settings(other, unknown) == expected and other.controls.blend.value == pytest.approx(0.4)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"styles": []}, "these are settings for content: open a panel with content only"),
        ({"layer_weights": {"conv5_3": 1.0}}, "there is no slider for conv5_3 here: open a panel with conv5_3 among"),
        ({"styles": [["a.jpg", 1, "sky.png"], ["b.jpg", 1, "rest"]]}, "these are settings with masks or more than two"),
        ({"styles": [["a.jpg", 1, None]] * 3}, "these are settings with masks or more than two styles: use stylise"),
        ({"size": 0}, "the settings in 'mine.png' are damaged, size is 0"),
    ],
)
def test_settings_that_a_panel_cannot_take_change_nothing(settings, sentence, panel):
    assert open_settings(panel, SAVED | settings).startswith(sentence)
    assert panel.controls.settings() == TRANSFER and panel.controls.seed.value == 0


def test_colours_are_kept_on_display_and_in_the_file_and_the_run_is_not_touched(studio):
    panel, castle = studio(CASTLE, NIGHT), nst.load_image(CASTLE, 40, "cpu")
    step(panel)
    image, plain = panel.shown.image, shown(panel, "picture")
    for kept in (True, False, True):
        panel.controls.keep_colours.value = kept
        assert (shown(panel, "picture") == plain) == (not kept) and panel.shown.image is image
    press(panel, "Save")
    saved = Image.open("saved/chenonceau_starry_night_001.png")
    assert saved.tobytes() == nst.to_pil(nst.keep_colours(image, castle)).tobytes()
    step(panel)
    assert shows(panel, "picture", nst.keep_colours(panel.shown.image, castle))
    assert panel.shown.evaluations == 2


# --- What a panel opens with ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, style, helper, hidden",
    [
        (CASTLE, None, nst.reconstruct_content, "content_weight style_weight blend keep_colours"),
        (None, NIGHT, nst.synthesize_texture, "content_weight style_weight content_layer keep_colours"),
        (CASTLE, NIGHT, nst.transfer_style, ""),
    ],
)
def test_a_form_makes_the_image_of_its_notebooks_task_and_shows_no_other_controls(
    content, style, helper, hidden, studio, vgg
):
    size = 24 if style else 50  # the reconstruction has two scales
    panel, painter = studio(content, style, size=size, style_weight=1e4 * bool(style)), Painter(vgg, evaluations=7)
    while painter.step(panel.controls.settings()):
        pass
    images = [nst.load_image(path, size, "cpu") for path in (content, style) if path]
    result = helper(*images, vgg=vgg, evaluations=7, progress=False)
    assert torch.equal(painter.run.image, result.image) and len(painter.curves) == result.evaluations == 7
    for name in ("content_weight", "style_weight", "content_layer", "blend", "keep_colours"):
        assert (getattr(panel.controls, name).layout.display == "none") == (name in hidden)
    starts = panel.controls.start.options
    assert bool(panel.controls.folded.layout.display) == bool(content) == ("content" in starts)  # else layers in sight


# Content layer, style layers, content weight, style weight: as they are given, and as the controls show them.
OPENINGS = [
    (("relu3_1", "conv_6", 0, 7), ("relu3_1", {"conv3_2": 1.0}, 0.0, 7.0)),
    (("conv_9", ["conv4_1", "relu3_1"], 0.03, 3e4), ("conv4_1", {"relu3_1": 1.0, "conv4_1": 1.0}, 0.03, 3e4)),
    (("conv_16", (), torch.tensor(1234.5), 3e11), ("conv5_4", {}, 1234.5, 3e11)),
    (("conv1_1", {"conv5_1": 0.3, "conv_2": 0}, 10.7, 2e-3), ("conv1_1", {"conv5_1": 0.3}, 10.7, 2e-3)),
]


@pytest.mark.parametrize("given, expected", OPENINGS)
def test_the_controls_open_at_the_parameters_and_reset_goes_back_to_them(given, expected, studio):
    """The browser leaves them as they are: it rounds a slider to a whole number of steps from the smallest value."""
    names = "content_layer", "style_layers", "content_weight", "style_weight"
    panel = studio(CASTLE, NIGHT, **dict(zip(names, given)))
    own, opening = panel.controls, panel.controls.settings()
    assert (opening.content_layer, opening.layer_weights, opening.content_weight) == expected[:3]
    assert opening.style_weight == pytest.approx(expected[3], rel=1e-12)
    for layers in (own.layer_weights, own.content_layer.options):
        assert list(layers) == sorted(layers, key=lambda name: name[4:])  # the network's order
    for control, value in ((own.content_weight, expected[2]), (own.style_weight, math.log10(expected[3]))):
        taken = (value - control.min) / control.step
        assert taken == pytest.approx(round(taken), abs=1e-6) and control.step <= 0.15
    for control in (own.content_weight, own.style_weight, *own.layer_weights.values()):
        control.value = 1.5
    own.content_layer.value = "conv5_3"
    press(panel, "Reset")
    assert own.settings() == opening


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"content_layer": "conv6_1"}, "unknown layer 'conv6_1'"),
        ({"content_weight": -1}, "content_weight is -1"),
        ({"style_weight": 0}, "style_weight is 0: the panel's slider starts above 0"),
        ({"content": None, "style_layers": ()}, "no layers given"),
        ({"style": None, "content_weight": 0}, "no layer has a weight above 0"),
        ({"content": None, "style": None}, "content and style are both None"),
        ({"vgg": "oxford"}, "vgg is 'oxford': give a network from load_vgg19"),
        ({"size": 2.5}, "size is 2.5"),
    ],
)
def test_a_panel_that_cannot_be_is_refused_in_a_sentence(options, sentence, studio, refuses):
    with refuses(sentence):
        studio(**({"content": CASTLE, "style": NIGHT} | options))


def test_a_panel_without_a_loop_is_refused(vgg, refuses):
    with refuses("no event loop runs here: call style_studio in a cell of a notebook"):
        style_studio(CASTLE, vgg=vgg)


# --- Frames that the browser asks for, and browsers that are gone --------------------------------


def acknowledge(panel):
    """As the browser does with each number that it is sent."""
    panel.display.seen.value = panel.display.sent.value


def made(panel):
    """Until the worker has made the frame that is under way; the loop runs meanwhile."""
    panel.painter.gate.release()
    until(panel, panel.frame.done)


@pytest.fixture
def pulled(stand_in):
    """A panel whose frames the browser asks for. It answers at once."""
    panel = stand_in(pull=True)
    panel.answer_seconds = 0
    return panel


def test_a_frame_that_the_browser_asks_for_is_shown_in_its_callback(pulled):
    press(pulled, "Start")
    assert pulled.state == "running" and pulled.display.sent.value == 1 and not pulled.painter.calls
    acknowledge(pulled)
    for count in range(1, 4):
        made(pulled)
        assert (pulled.shown.evaluations if pulled.shown else 0) == count - 1
        acknowledge(pulled)
        assert pulled.shown.evaluations == count and pulled.display.sent.value == count + 2
    assert pulled.working is None


def test_a_browser_that_waits_longer_than_an_evaluation_gets_its_frame_at_once(pulled):
    pulled.answer_seconds = 120
    press(pulled, "Start")
    acknowledge(pulled)
    threading.Timer(0.02, pulled.painter.gate.release).start()
    acknowledge(pulled)
    assert pulled.shown.evaluations == 1


def test_what_is_asked_for_while_a_frame_is_made_waits_in_no_queue(pulled):
    press(pulled, "Start")
    for _ in range(4):
        acknowledge(pulled)
    begun(pulled, 1)
    sent = pulled.display.sent.value
    assert sent == 5
    pulled.display.seen.value = sent - 2  # an answer that comes late
    assert pulled.display.sent.value == sent
    made(pulled)
    acknowledge(pulled)
    assert pulled.shown.evaluations == 1


def test_pause_step_an_error_and_the_end_where_the_browser_asks(pulled):
    pulled.painter.outcomes |= {3: ZeroDivisionError("by hand"), 4: "nothing is left"}
    press(pulled, "Start")
    acknowledge(pulled)
    begun(pulled, 1)
    press(pulled, "Pause")
    made(pulled)
    sent = pulled.display.sent.value
    acknowledge(pulled)
    assert pulled.state == "paused" and pulled.shown is None and pulled.display.sent.value == sent
    found = []
    for button in ("Step", "Start", "Start"):
        press(pulled, button)
        acknowledge(pulled)  # shows no frame from before the pause
        made(pulled)
        acknowledge(pulled)
        found.append((pulled.state, note(pulled), pulled.shown.evaluations))
    assert found == [("paused", "", 1), ("paused", "ZeroDivisionError: by hand", 1), ("done", "", 1)]


@pytest.mark.parametrize("pull", [False, True])
def test_a_panel_that_no_browser_shows_is_paused(pull, stand_in):
    """Counted while the kernel is free: a cell that takes long is no absence."""
    panel = stand_in(pull=pull)
    panel.patience_seconds = 0.6
    press(panel, "Start")
    panel.loop.call_soon(time.sleep, 0.7)
    panel.loop.run_until_complete(asyncio.sleep(0.01))
    acknowledge(panel)
    assert panel.state == "running"
    panel.painter.gate.release(1000)
    until(panel, lambda: panel.state != "running")
    assert panel.state == "paused" and note(panel).startswith("no browser has shown this panel for 0.6 seconds")
    until(panel, lambda: panel.working is None or panel.working.done())
    press(panel, "Start")
    assert panel.state == "running" and note(panel) == ""


def test_a_panel_that_a_browser_shows_goes_on(panel):
    panel.patience_seconds = 0.12
    start(panel)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        acknowledge(panel)
        release(panel)
    assert panel.state == "running"


def test_colab_is_where_the_browser_asks(studio, monkeypatch):
    assert not studio(CASTLE).pull
    monkeypatch.setitem(sys.modules, "google.colab", None)
    assert studio(CASTLE).pull and not studio(CASTLE, pull=False).pull
