"""The panel without a browser: the painter's promises, the states, and that errors come to light.

The panel's logic is tested on a stand-in for the painter, whose steps the test releases one by one; the real painter is
left to tests that compare ends. So nothing depends on how fast the machine is.
"""

import asyncio
import datetime
import io
import json
import math
import threading
import time
from collections import deque

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import nst_utils as nst
import nst_widgets
from nst_engine import preparation
from nst_engine.prior import enlarge
from nst_widgets import Painter, Settings, Studio, style_studio

CASTLE, NIGHT = nst.IMAGES / "content" / "chenonceau.jpg", nst.IMAGES / "style" / "starry_night.jpg"
WAVE = nst.IMAGES / "style" / "great_wave.jpg"
LAYERS = tuple((name, 1.0) for name in nst.FIRST_FIVE)
TRANSFER = Settings(CASTLE, NIGHT, 40, "conv1_2", 1.0, 1e4, LAYERS)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(preparation, "pick_precisions", lambda *_: ("float32",))


@pytest.fixture
def painter(vgg):
    return Painter(vgg)


def steps(painter, settings, count, start=None):
    """The last of `count` steps."""
    for k in range(count):
        step = painter.step(settings, start if k == 0 else None)
    return step


# --- The painter ---------------------------------------------------------------------------------


def test_a_step_is_one_evaluation_and_its_losses_are_those_of_the_picture(painter, vgg):
    steps(painter, TRANSFER, 5, ("content", 0))
    assert len(painter.history) == 5
    content, style = nst.load_image(CASTLE, 40, "cpu"), nst.load_image(NIGHT, 40, "cpu")
    objective = nst.make_objective(vgg, content, style, ("conv1_2",), nst.FIRST_FIVE, 1.0, 1e4)
    assert painter.history[-1][2:] == pytest.approx(objective(painter.image).tolist(), rel=1e-3)
    assert painter.history[-1].total < painter.history[0].total


def test_from_a_picture_the_panel_works_at_full_size_alone(painter, monkeypatch):
    """However large: what is on display never loses its detail."""
    monkeypatch.setattr(preparation, "BROAD", 8)
    monkeypatch.setattr(nst.Task, "smallest_side", 8)
    for settings, start in ((TRANSFER, ("content", 0)), (TRANSFER, ("present", 0)), (TRANSFER._replace(size=64), None)):
        painter.step(settings, start)
        assert painter.scales == [tuple(painter.image.shape[-2:])] and min(painter.scales[0]) == settings.size
    painter.step(TRANSFER, ("noise", 0))
    assert len(painter.scales) == 3


def test_every_weight_reaches_the_loss(painter, vgg):
    weights = (("conv1_1", 0.5), ("conv3_1", 2.0))
    step = steps(painter, TRANSFER._replace(content_weight=3.0, style_weight=5e3, layer_weights=weights), 4)
    assert step.total == pytest.approx(3.0 * step.content + 5e3 * step.style, rel=1e-4)
    maps, style = nst.features(vgg, painter.image, dict(weights)), nst.load_image(NIGHT, 40, "cpu")
    targets = nst.gram_matrices(nst.features(vgg, style, dict(weights)))
    assert step.style == pytest.approx(nst.style_loss(maps, targets, dict(weights)).item(), rel=1e-3)
    assert step.style != pytest.approx(nst.style_loss(maps, targets).item(), rel=1e-2)


def test_a_weight_goes_on_from_the_present_picture(painter):
    """That it has the targets already is in test_preparation.py."""
    steps(painter, TRANSFER, 6, ("content", 0))
    before = painter.image.clone()
    step = painter.step(TRANSFER._replace(style_weight=1e6))
    assert torch.equal(painter.image, before) and len(painter.history) == 7
    assert step.total == pytest.approx(step.content + 1e6 * step.style, rel=1e-4)
    painter.step(TRANSFER._replace(style_weight=1e6))
    assert not torch.equal(painter.image, before)


def test_a_weight_makes_nothing_anew_and_another_picture_only_its_own(painter):
    def misses():
        kept = painter.preparation
        functions = (kept.cut_network, kept.evaluation_of, kept.preconditioner, painter.load)
        return [function.cache_info().misses for function in functions]

    steps(painter, TRANSFER, 4, ("content", 0))
    assert misses() == [1, 1, 1, 2]
    painter.step(TRANSFER._replace(content_weight=2.0, layer_weights=(("conv1_1", 0.5), *LAYERS[1:])))
    assert misses() == [1, 1, 1, 2]
    before = painter.image.clone()
    painter.step(TRANSFER._replace(style=WAVE))
    assert misses() == [1, 2, 1, 3] and torch.equal(painter.image, before)


def test_a_texture_has_the_style_loss_alone(painter):
    step = steps(painter, TRANSFER._replace(content=None), 3)
    assert step.content == 0 and step.total == pytest.approx(1e4 * step.style, rel=1e-4)


def test_weights_pull_the_picture_different_ways(painter):
    steps(painter, TRANSFER, 8, ("content", 0))
    middle, picture = painter.history[-1], painter.image
    much = steps(painter, TRANSFER._replace(style_weight=1e6), 12)
    painter.image, painter.run = picture, None
    little = steps(painter, TRANSFER._replace(style_weight=1e1), 12)
    assert much.style < 0.7 * middle.style < middle.style < little.style and little.content < middle.content


def test_a_layer_may_come_and_go(painter):
    """Without weight it stays until the next start, so that nothing is prepared anew."""
    steps(painter, TRANSFER, 3)
    made = painter.preparation.evaluation_of.cache_info().misses
    step = painter.step(TRANSFER._replace(layer_weights=LAYERS[:2]))
    assert painter.preparation.evaluation_of.cache_info().misses == made
    assert step.style < painter.history[-2].style
    painter.step(TRANSFER._replace(layer_weights=LAYERS[:2]), ("present", 0))
    network = painter.preparation.network(painter.task(painter.settings), "float32")
    assert list(network._modules) == ["conv1_1", "relu1_1", "conv1_2"]  # nothing deeper is computed
    assert painter.history[0].style == pytest.approx(step.style, rel=1e-4)


def test_another_size_scales_the_present_picture(painter):
    steps(painter, TRANSFER, 3, ("content", 0))
    before = painter.image
    painter.step(TRANSFER._replace(size=64))
    assert painter.image.shape[-2] == 64
    torch.testing.assert_close(painter.image, nst.resize(before, painter.image.shape[-2:]))


def test_noise_goes_from_coarse_to_fine_and_a_new_weight_does_not_send_it_back(painter):
    settings = TRANSFER._replace(size=128)
    assert painter.step(settings, ("noise", 7)).shape[0] == 64
    coarse = painter.image
    while painter.step(settings).shape[0] == 64:
        coarse = painter.image
    assert torch.equal(painter.image, enlarge(coarse, painter.image.shape[-2:], 7))
    assert painter.step(settings._replace(style_weight=1e5)).shape[0] == 128


def test_a_restart_forgets_and_a_seed_repeats(painter):
    first = steps(painter, TRANSFER, 4, ("noise", 3))
    again = steps(painter, TRANSFER, 4, ("noise", 3))
    other = steps(painter, TRANSFER, 4, ("noise", 4))
    assert first == again != other and len(painter.history) == len(painter.curves) == 4
    present = painter.image.clone()
    painter.step(TRANSFER, ("present", 0))
    assert torch.equal(painter.image, present) and len(painter.history) == 1


def test_it_ends_when_progress_is_slow_and_then_may_go_on(painter):
    settings = TRANSFER._replace(style=None, layer_weights=())
    painter.step(settings, ("content", 0))  # the content is its own reconstruction
    assert painter.step(settings) is None
    assert painter.step(settings._replace(content_layer="conv2_1")) is not None


def test_weights_that_are_all_zero_are_refused_and_the_picture_stays(painter, refuses):
    steps(painter, TRANSFER, 2)
    before = painter.image
    with refuses(ValueError, "every layer named has weight 0"):
        painter.step(TRANSFER._replace(content_weight=0.0, layer_weights=()))
    assert painter.image is before
    assert painter.step(TRANSFER) is not None


# --- The panel -----------------------------------------------------------------------------------


class StandIn:
    """In the painter's place: a step waits, on the worker's thread, until the test releases it."""

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.calls = []  # (settings, start) of every step that was begun
        self.outcomes = deque()  # of the next steps: None for slow progress, an exception, or True
        self.image = self.first = self.start = None
        self.history, self.curves = [], []

    def step(self, settings, start=None):
        self.calls.append((settings, start))
        assert self.gate.acquire(timeout=120), "no test released this step"
        outcome = self.outcomes.popleft() if self.outcomes else True
        if outcome is None:
            return None
        if isinstance(outcome, Exception):
            raise outcome
        if start:
            self.history, self.curves, self.start, self.first = [], [], start, torch.zeros(1, 3, 4, 5)
        self.image = torch.full((1, 3, 4, 5), (len(self.calls) % 50) / 50)
        self.history.append(nst.Step((4, 5), "float32", 3 / len(self.calls), 2 / len(self.calls), 1 / len(self.calls)))
        self.curves.append(self.history[-1][2:])
        return self.history[-1]


async def until(condition):
    """Wait for something that, once it holds, holds until the test goes on."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.005)


async def begun(panel, count):
    """Until the step with this number waits to be released."""
    await until(lambda: len(panel.painter.calls) == count)


async def release(panel):
    """Let one step go, and wait until the next one has begun or the loop has ended."""
    count = len(panel.painter.calls)
    panel.painter.gate.release()
    await until(lambda: len(panel.painter.calls) > count or panel.task.done())


@pytest.fixture
def play(monkeypatch):
    """Run `scene(panel)`, a coroutine, with a panel whose painter is a `StandIn`: one evaluation a frame."""
    monkeypatch.setattr(nst_widgets, "FRAME", -1.0)

    def run(scene, **opening):
        async def main():
            painter = StandIn()
            panel = Studio(TRANSFER._replace(**opening), painter)
            try:
                await scene(panel)
            finally:
                panel.close()
                painter.gate.release(1000)
                await until(lambda: not workers())

        asyncio.run(main())

    return run


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("style-studio")]


def says(panel):
    return panel.status.value


def test_start_pause_and_start_again(play):
    async def scene(panel):
        assert panel.state == "ready" and panel.shown is None and panel.task is None
        panel.buttons["Start"].click()
        await begun(panel, 1)
        assert panel.state == "running" and panel.buttons["Start"].disabled and "Running" in says(panel)
        await release(panel)
        await release(panel)
        assert panel.shown.evaluations == 2 and "2 evaluations" in says(panel) and "5 × 4" in says(panel)
        panel.buttons["Pause"].click()
        assert panel.state == "paused" and panel.buttons["Pause"].disabled and "Paused" in says(panel)
        picture = panel.picture.value
        await release(panel)  # the step that was under way
        assert panel.task.done() and panel.picture.value == picture and len(panel.painter.calls) == 3
        again = time.perf_counter()
        panel.buttons["Start"].click()
        await begun(panel, 4)
        await release(panel)
        assert panel.picture.value != picture and panel.state == "running"
        assert panel.moments[0] > again  # the rate on display counts no pause
        assert [start for _, start in panel.painter.calls] == [("noise", 0), None, None, None, None]

    play(scene)


def test_a_second_press_of_start_makes_no_second_loop(play):
    async def scene(panel):
        panel.start()
        panel.start()
        await begun(panel, 1)
        task = panel.task
        panel.pause()
        panel.start()
        await until(lambda: panel.presses == 3)
        assert panel.task is task and len(asyncio.all_tasks()) == 2  # the scene's and the loop's
        await release(panel)
        assert panel.task is task and panel.state == "running"

    play(scene)


def test_step_is_one_evaluation_however_long_a_frame_lasts(play, monkeypatch):
    monkeypatch.setattr(nst_widgets, "FRAME", math.inf)

    async def scene(panel):
        for count in (1, 2, 3):
            panel.buttons["Step"].click()
            await begun(panel, count)
            await release(panel)
            assert panel.task.done() and panel.state == "paused"
            assert panel.shown.evaluations == len(panel.painter.calls) == count
        assert panel.chart.value

    play(scene)


def test_step_takes_over_from_a_loop_that_was_just_paused(play):
    async def scene(panel):
        panel.start()
        await begun(panel, 1)
        await release(panel)
        panel.pause()
        panel.content_weight.value = 7.0
        panel.step()
        await until(lambda: panel.presses == 2)
        await release(panel)  # began with another weight, and is not what Step asked for
        assert panel.state == "running" and panel.shown.settings.content_weight == 1
        await release(panel)
        assert panel.state == "paused" and panel.task.done()
        assert panel.shown.settings.content_weight == 7 and len(panel.painter.calls) == 3

    play(scene)


def test_restart_begins_again_from_the_chosen_start(play):
    async def scene(panel):
        panel.start()
        await begun(panel, 1)
        await release(panel)
        panel.start_from.value, panel.seed.value = "content", 5
        panel.buttons["Restart"].click()
        await until(lambda: panel.presses == 2)
        await release(panel)
        assert panel.shown.start == ("noise", 0)  # the step under way is of the run before
        await release(panel)
        assert [start for _, start in panel.painter.calls] == [("noise", 0), None, ("content", 5), None]
        assert panel.shown.start == ("content", 5) and panel.shown.evaluations == 1

    play(scene)


def test_a_moved_slider_reaches_the_next_step_and_reset_takes_it_back(play):
    async def scene(panel):
        panel.start()
        await begun(panel, 1)
        panel.style_weight.value, panel.content_weight.value = 1e6, 2.5
        panel.layer_weights["conv1_1"].value = 0
        await release(panel)
        before, after = (settings for settings, _ in panel.painter.calls)
        assert before == TRANSFER
        assert after == TRANSFER._replace(style_weight=1e6, content_weight=2.5, layer_weights=LAYERS[1:])
        panel.buttons["Reset"].click()
        await release(panel)
        assert panel.painter.calls[-1][0] == TRANSFER

    play(scene)


@pytest.mark.parametrize(
    "control, value", [("content_layer", "conv2_1"), ("size", 128), ("style_weight", 10.0), ("content_weight", 2.0)]
)
def test_a_panel_that_has_finished_goes_on_when_a_control_moves(control, value, play):
    async def scene(panel):
        panel.last_chart = math.inf  # none is due before the end
        panel.painter.outcomes.extend([True, True, None])
        panel.start()
        await begun(panel, 1)
        for _ in range(2):
            await release(panel)
            assert not panel.chart.value
        await release(panel)
        assert panel.state == "done" and panel.task.done() and panel.chart.value  # with all that was evaluated
        assert "Finished" in says(panel) and not panel.buttons["Start"].disabled
        getattr(panel, control).value = value
        await begun(panel, 4)
        assert panel.state == "running" and getattr(panel.painter.calls[-1][0], control) == value

    play(scene)


def test_a_frame_holds_as_many_evaluations_as_its_time_and_the_last_ones_are_shown(play, monkeypatch):
    monkeypatch.setattr(nst_widgets, "FRAME", math.inf)

    async def scene(panel):
        panel.painter.outcomes.extend([True, True, True, None])
        panel.start()
        await begun(panel, 1)
        for _ in range(3):
            await release(panel)
            assert panel.shown is None
        await release(panel)
        assert panel.state == "done" and panel.shown.evaluations == 3 and panel.chart.value

    play(scene)


def test_an_error_in_the_loop_comes_to_light(play):
    async def scene(panel):
        panel.painter.outcomes.extend([True, ZeroDivisionError("division by <zero>")])
        panel.start()
        await begun(panel, 1)
        await release(panel)
        await release(panel)
        assert panel.state == "paused" and "ZeroDivisionError: division by &lt;zero&gt;" in says(panel)
        panel.start()
        await begun(panel, 3)
        assert panel.state == "running" and "ZeroDivision" not in says(panel)

    play(scene)


def test_the_difference_is_to_the_start_or_to_the_snapshot(play):
    async def scene(panel):
        panel.compare.value = "the start"
        panel.start()
        await begun(panel, 1)
        await release(panel)
        assert panel.shown.mean == pytest.approx(1 / 50) and panel.difference.value  # the stand-in's pictures
        kept = panel.shown.image
        panel.buttons["Snapshot"].click()
        assert panel.snapshot is kept and panel.compare.value == "the snapshot"
        await release(panel)
        await release(panel)
        assert panel.shown.mean == pytest.approx(2 / 50)
        panel.compare.value = "nothing"
        await release(panel)
        await release(panel)
        assert panel.shown.difference is None and panel.difference.layout.display == "none"

    play(scene)


def test_a_saved_picture_carries_its_settings(play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def scene(panel):
        panel.save()
        assert "no picture to save" in says(panel)
        panel.start()
        await begun(panel, 1)
        await release(panel)
        for _ in range(2):
            panel.buttons["Save"].click()
        (tmp_path / "saved" / "chenonceau_starry_night_001.png").unlink()
        panel.seed.value, panel.style_weight.value = 7, 10.0  # chosen after this picture was made
        panel.buttons["Save"].click()

    play(scene)
    files = sorted((tmp_path / "saved").iterdir())
    assert [file.name for file in files] == ["chenonceau_starry_night_001.png", "chenonceau_starry_night_002.png"]
    with Image.open(files[0]) as file:
        about = json.loads(file.text["settings"])
    assert (about["content"], about["style"], about["size"]) == ("chenonceau.jpg", "starry_night.jpg", 40)
    assert about["style_weight"] == 1e4 and about["layer_weights"] == dict(LAYERS)
    assert about["losses"]["total"] > 0 and (about["start"], about["seed"]) == ("noise", 0)


def test_the_saved_file_is_the_picture_on_display(play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = []

    async def scene(panel):
        panel.start()
        await begun(panel, 1)
        await release(panel)
        await release(panel)
        panel.save()
        saved.append(panel.shown.image)
        with Image.open(io.BytesIO(panel.picture.value)) as displayed:
            saved.append(np.asarray(displayed.convert("RGB")).astype(int))

    play(scene)
    (path,) = (tmp_path / "saved").iterdir()
    written = np.asarray(Image.open(path))
    assert np.array_equal(written, np.asarray(nst.to_pil(saved[0])))
    assert np.abs(written - saved[1]).max() <= 2  # that one is a JPEG


def test_the_chart_shows_the_total_and_both_weighted_losses(monkeypatch):
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    assert nst_widgets.draw_losses([(9.0, 6.0, 3.0), (5.0, 4.0, 1.0)]).startswith(b"\x89PNG")
    nst_widgets.draw_losses([(9.0, 0.0, 9.0), (5.0, 0.0, 5.0)])  # a texture
    curves = [{line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines} for figure in figures]
    both = {"total": [9, 5], "content × its weight": [6, 4], "style × its weight": [3, 1]}
    assert curves == [both, {"total": [9, 5], "style × its weight": [9, 5]}]
    assert {axes.get_yscale() for figure in figures for axes in figure.axes} == {"log"}


def test_the_painters_curves_are_the_weighted_losses(painter):
    step = steps(painter, TRANSFER._replace(content_weight=3.0, style_weight=5e3), 2)
    assert painter.curves[-1] == pytest.approx((step.total, 3 * step.content, 5e3 * step.style))
    assert sum(painter.curves[-1][1:]) == pytest.approx(step.total, rel=1e-4)


def test_the_pictures_that_go_in_are_shown(play):
    async def scene(panel):
        panel.choices["style"].value = WAVE
        for kind, path in (("content", CASTLE), ("style", WAVE)):
            with Image.open(io.BytesIO(panel.inputs[kind].value)) as displayed:
                shown = np.asarray(displayed).astype(int)
            expected = np.asarray(nst.to_pil(nst.load_image(path, 130, "cpu")))
            assert np.abs(shown - expected).mean() < 10  # a JPEG; another picture differs by some sixty

    play(scene)


def test_a_seed_is_the_noises(painter, vgg):
    painter.step(TRANSFER, ("noise", 5))
    content = nst.load_image(CASTLE, 40, "cpu")
    expected = nst.optimise(painter.task(TRANSFER), content.shape[-2:], seed=5, evaluations=1, vgg=vgg, progress=False)
    assert torch.equal(painter.image, expected.image) and painter.start == ("noise", 5)


def uploaded(name, content):
    now = datetime.datetime.now(datetime.UTC)
    return {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": now}


def test_an_upload_is_offered_and_a_file_that_is_no_picture_is_not(play):
    async def scene(panel):
        offered = len(panel.choices["style"].options)
        panel.uploaders["style"].value = (uploaded("notes.txt", b"no picture"),)
        assert "not a picture" in says(panel) and len(panel.choices["style"].options) == offered
        panel.uploaders["style"].value = (uploaded("../mine.jpg", WAVE.read_bytes()),)
        chosen = panel.choices["style"].value
        assert chosen.name == "mine.jpg" and str(chosen).startswith(panel.uploads.name)
        assert len(panel.choices["style"].options) == offered + 1
        panel.buttons["Step"].click()
        await begun(panel, 1)
        assert panel.painter.calls[0][0].style == chosen

    play(scene)


def test_uploads_of_one_name_do_not_meet(play):
    """A style named like the content, another picture of the same name, a damaged one: each keeps its own."""

    async def scene(panel):
        castle, wave, night = (path.read_bytes() for path in (CASTLE, WAVE, NIGHT))
        panel.uploaders["content"].value = (uploaded("mine.jpg", castle),)
        panel.uploaders["style"].value = (uploaded("mine.jpg", wave),)
        content, style = panel.choices["content"].value, panel.choices["style"].value
        assert (content.read_bytes(), style.read_bytes()) == (castle, wave)
        panel.uploaders["style"].value = (uploaded("mine.jpg", night),)
        changed = panel.choices["style"].value
        assert changed != style and changed.read_bytes() == night  # another path, so that nothing old is remembered
        assert [name for name, _ in panel.choices["style"].options].count("mine") == 1
        panel.uploaders["style"].value = (uploaded("mine.jpg", night[:999]),)
        assert "'mine.jpg' is not a picture" in says(panel).replace("&#x27;", "'")
        assert panel.choices["style"].value == changed and changed.read_bytes() == night

    play(scene)


@pytest.mark.parametrize("name", ["..", "", ".", "\0", "a/b\0c.jpg", 300 * "x" + ".jpg", "C:\\mine.jpg", "<b>ü &.jpg"])
def test_an_upload_may_have_any_name(name, play):
    async def scene(panel):
        panel.uploaders["style"].value = (uploaded(name, WAVE.read_bytes()),)
        chosen = panel.choices["style"].value
        assert chosen.read_bytes() == WAVE.read_bytes() and str(chosen).startswith(panel.uploads.name)

    play(scene)


FORMS = [(CASTLE, None, (1.0, 0.0)), (None, NIGHT, (0.0, 1e4)), (CASTLE, NIGHT, (1.0, 1e4))]


@pytest.mark.parametrize("content, style, weights", FORMS)
def test_the_forms_ask_for_what_their_notebook_does(content, style, weights, play):
    async def scene(panel):
        settings = panel.settings()
        assert (settings.content, settings.style) == (content, style)
        assert (settings.content_weight, settings.style_weight) == weights
        assert settings.layer_weights == (LAYERS if style else ())
        assert set(panel.choices) == {kind for kind, path in (("content", content), ("style", style)) if path}

    play(scene, content=content, style=style)


# --- The panel with the real painter ---------------------------------------------------------------


def play_real(scene, *paths, vgg, **options):
    async def main():
        panel = style_studio(*paths, size=40, vgg=vgg, **options)
        try:
            await scene(panel)
        finally:
            panel.close()
            nst_widgets._open.clear()
            await until(lambda: not workers())

    asyncio.run(main())


@pytest.mark.parametrize("content, style, weights", FORMS)
def test_a_step_shows_the_losses_of_the_picture_on_display(content, style, weights, vgg):
    async def scene(panel):
        panel.step()
        await until(lambda: panel.state == "paused")
        step = panel.shown.step
        assert step.total == pytest.approx(weights[0] * step.content + weights[1] * step.style, rel=1e-4)
        assert torch.equal(panel.shown.image, panel.painter.first) and panel.shown.evaluations == 1

    play_real(scene, content, style, vgg=vgg)


@pytest.mark.parametrize("content, style, weights", FORMS)
def test_it_runs_to_the_same_end_as_the_task(content, style, weights, vgg):
    async def scene(panel):
        panel.start()
        await until(lambda: panel.state == "done")
        options = {"vgg": vgg, "progress": False}
        pictures = [nst.load_image(path, 40, "cpu") for path in (content, style) if path]
        if len(pictures) == 2:
            result = nst.transfer_style(*pictures, **options)
        else:
            result = (nst.reconstruct_content if content else nst.synthesize_texture)(*pictures, **options)
        assert torch.equal(panel.shown.image, result.image) and panel.shown.step == result.history[-1]
        assert panel.shown.evaluations == result.evaluations and panel.chart.value

    play_real(scene, content, style, vgg=vgg)


def test_the_difference_is_to_a_picture_of_another_size_too(vgg):
    async def scene(panel):
        panel.compare.value = "the start"
        panel.step()
        await until(lambda: panel.state == "paused")
        assert panel.shown.mean == 0
        panel.size.value = 128
        panel.step()
        await until(lambda: panel.state == "paused" and panel.shown.evaluations == 2)
        assert panel.shown.image.shape[-2] == 128 and 0 <= panel.shown.mean < 0.1

    play_real(scene, CASTLE, NIGHT, vgg=vgg)


def test_bad_settings_are_answered_in_the_panel(vgg):
    async def scene(panel):
        panel.content_weight.value = 0
        for control in panel.layer_weights.values():
            control.value = 0
        panel.start()
        await until(lambda: panel.state == "paused")
        assert "every layer named has weight 0" in says(panel)
        panel.reset()
        panel.start_from.value = "present"
        panel.start()
        await until(lambda: panel.state == "paused" and "no present picture" in says(panel))

    play_real(scene, CASTLE, NIGHT, vgg=vgg)


def test_a_new_panel_closes_the_one_before_and_leaves_nothing_behind(vgg):
    async def scene(panel):
        panel.start()
        await until(lambda: panel.task)
        second = style_studio(CASTLE, NIGHT, size=40, vgg=vgg)
        assert panel.state == "closed"
        await until(panel.task.done)
        await until(lambda: not workers())
        for press in (panel.start, panel.step, panel.pause, panel.restart):
            press()
        await asyncio.sleep(0)  # so that what they asked the loop for is done
        assert panel.state == "closed" and not workers()
        second.close()

    play_real(scene, CASTLE, NIGHT, vgg=vgg)


def test_closing_leaves_no_widget_and_no_painter(vgg):
    """However often the cell is run, and though the notebook remembers every panel it was given."""

    async def scene(first):
        panels = [first]
        for _ in range(3):
            panels.append(style_studio(CASTLE, NIGHT, size=40, vgg=vgg))
        panels[-1].close()
        assert len(widgets.widget._instances) == before
        for panel in panels:
            await until(lambda panel=panel: panel.task is None or panel.task.done())
            assert panel.painter is panel.shown is panel.snapshot is None

    before = len(widgets.widget._instances)
    play_real(scene, CASTLE, NIGHT, vgg=vgg)


def test_after_an_error_a_step_goes_on_from_the_present_picture(painter, monkeypatch):
    """At a coarse scale, as when memory runs out."""
    settings = TRANSFER._replace(size=128)
    steps(painter, settings, 3)
    present, evaluation = painter.image, painter.preparation.evaluation

    def failing(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(painter.preparation, "evaluation", failing)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            painter.step(settings._replace(style_weight=1e3))
    monkeypatch.setattr(painter.preparation, "evaluation", evaluation)
    assert painter.step(settings).shape[0] == 64
    assert torch.equal(painter.image, present) and len(painter.history) == 4


def test_without_an_event_loop_or_with_a_size_that_is_none(vgg, refuses):
    with refuses(ValueError, "no event loop runs here: call style_studio in a cell of a notebook"):
        style_studio(CASTLE, NIGHT, vgg=vgg)
    for size in (0, 2.5, "256", None):
        with refuses(ValueError, f"size is {size!r}"):
            style_studio(CASTLE, NIGHT, size=size, vgg=vgg)


# Content layer, style layers, content weight, style weight: as they are given, and as the controls show them.
OPENINGS = [
    (("conv1_2", nst.FIRST_FIVE, 1, 1e4), ("conv1_2", nst.FIRST_FIVE, 1.0, 1e4)),
    (("relu3_1", "conv_6", 0, 7), ("relu3_1", ("conv3_2",), 0.0, 7.0)),
    (
        ("conv_9", ["conv4_1", "relu3_1", "conv_5"], 0.03, 3e4),
        ("conv4_1", ("conv3_1", "relu3_1", "conv4_1"), 0.03, 3e4),
    ),
    (("conv_16", (), torch.tensor(1234.5), 3e11), ("conv5_4", (), 1234.5, 3e11)),
    (("conv1_1", "conv5_1", 10.7, 2e-3), ("conv1_1", ("conv5_1",), 10.7, 2e-3)),
]
PARAMETERS = ("content_layer", "style_layers", "content_weight", "style_weight")


@pytest.mark.parametrize("given, expected", OPENINGS)
def test_the_controls_open_at_the_parameters_and_reset_goes_back_to_them(given, expected, vgg):
    async def scene(panel):
        def shown():
            layers, weights = zip(*panel.settings().layer_weights) if expected[1] else ((), ())
            assert set(weights) <= {1.0}
            return panel.content_layer.value, layers, panel.content_weight.value, panel.style_weight.value

        opening = shown()
        assert opening[:3] == expected[:3] and opening[3] == pytest.approx(expected[3], rel=1e-12)
        for control in (panel.content_weight, panel.style_weight, *panel.layer_weights.values()):
            control.value = 1.5
        panel.content_layer.value = "conv5_3"
        panel.buttons["Reset"].click()
        assert shown() == opening

    play_real(scene, CASTLE, NIGHT, vgg=vgg, **dict(zip(PARAMETERS, given)))


@pytest.mark.parametrize("given, expected", OPENINGS)
def test_the_browser_leaves_the_weights_as_they_were_given(given, expected, vgg):
    """It rounds the value of a slider to a whole number of steps from the smallest."""

    async def scene(panel):
        style, content = panel.style_weight, panel.content_weight
        for control, value in ((content, content.value), (style, math.log10(style.value))):
            taken = (value - control.min) / control.step
            assert taken == pytest.approx(round(taken), abs=1e-6) and control.step <= 0.15

    play_real(scene, CASTLE, NIGHT, vgg=vgg, **dict(zip(PARAMETERS, given)))


def test_another_style_layer_has_a_slider_in_the_networks_order(vgg):
    async def scene(panel):
        assert list(panel.layer_weights) == [*nst.FIRST_FIVE, "relu3_1", "conv4_1", "conv5_1", "conv5_4"]
        assert list(panel.content_layer.options) == [*nst.CONVOLUTIONS[:10], "relu4_2", *nst.CONVOLUTIONS[10:]]
        shown = panel.view.children[-1].children[1].children
        assert [control for control in shown if control in panel.layer_weights.values()] == [
            *panel.layer_weights.values()
        ]

    play_real(scene, CASTLE, NIGHT, vgg=vgg, content_layer="relu4_2", style_layers=("conv5_4", "relu3_1"))


@pytest.mark.parametrize(
    "option, value, sentence",
    [
        ("content_layer", "conv6_1", "unknown layer 'conv6_1'"),
        ("content_layer", ("conv1_2",), "unknown layer ('conv1_2',)"),
        ("style_layers", ("conv1_1", "conv9"), "unknown layer 'conv9'"),
        ("style_layers", ("conv1_1", "conv_1"), "conv1_1 is among them twice"),
        ("content_weight", -1, "content_weight is -1"),
        ("content_weight", "1", "content_weight is '1'"),
        ("style_weight", math.nan, "style_weight is nan"),
        ("style_weight", 2e12, "style_weight is 2000000000000.0"),
        ("style_weight", 0, "style_weight is 0: the panel's slider begins above 0"),
    ],
)
def test_a_bad_layer_or_weight_is_refused_in_a_sentence(option, value, sentence, refuses):
    with refuses(ValueError, sentence):
        style_studio(CASTLE, NIGHT, **{option: value})


def test_a_panel_with_nothing_to_match_is_refused(refuses):
    with refuses(ValueError, "no layers given"):
        style_studio(style=NIGHT, style_layers=())
    with refuses(ValueError, "every layer named has weight 0"):
        style_studio(CASTLE, content_weight=0)


def test_a_panel_without_pictures_or_with_a_missing_one(refuses):
    with refuses(ValueError, "content and style are both None"):
        style_studio()
    with refuses(FileNotFoundError, "no picture at 'missing.jpg'"):
        style_studio("missing.jpg", NIGHT)
