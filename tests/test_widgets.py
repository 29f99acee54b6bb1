"""The panel without a browser: the painter's promises, the states, and that errors come to light."""

import asyncio
import datetime
import json
import threading
import time

import pytest
import torch
from PIL import Image

import nst_utils as nst
import nst_widgets
from nst_widgets import Painter, Settings, style_studio

CASTLE, NIGHT = nst.IMAGES / "content" / "chenonceau.jpg", nst.IMAGES / "style" / "starry_night.jpg"
WAVE = nst.IMAGES / "style" / "great_wave.jpg"
LAYERS = tuple((name, 1.0) for name in nst.FIRST_FIVE)
TRANSFER = Settings(CASTLE, NIGHT, 40, "conv1_2", 1.0, 1e4, LAYERS)


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(nst, "pick_precisions", lambda device: ("float32",))


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


def test_every_weight_reaches_the_loss(painter, vgg):
    weights = (("conv1_1", 0.5), ("conv3_1", 2.0))
    step = steps(painter, TRANSFER._replace(content_weight=3.0, style_weight=5e3, layer_weights=weights), 4)
    assert step.total == pytest.approx(3.0 * step.content + 5e3 * step.style, rel=1e-4)
    maps, style = nst.features(vgg, painter.image, dict(weights)), nst.load_image(NIGHT, 40, "cpu")
    targets = nst.gram_matrices(nst.features(vgg, style, dict(weights)))
    assert step.style == pytest.approx(nst.style_loss(maps, targets, dict(weights)).item(), rel=1e-3)
    assert step.style != pytest.approx(nst.style_loss(maps, targets).item(), rel=1e-2)


def counted(monkeypatch, name):
    calls, function = [], getattr(nst, name)
    monkeypatch.setattr(nst, name, lambda *a: calls.append(a) or function(*a))
    return calls


def test_a_weight_goes_on_from_the_present_picture_with_the_targets_it_has(painter, monkeypatch):
    steps(painter, TRANSFER, 6, ("content", 0))
    before = painter.image.clone()
    made = {name: counted(monkeypatch, name) for name in ("make_targets", "prepare_network", "spectral_preconditioner")}
    step = painter.step(TRANSFER._replace(style_weight=1e6))
    assert torch.equal(painter.image, before) and len(painter.history) == 7
    assert step.total == pytest.approx(step.content + 1e6 * step.style, rel=1e-4)
    painter.step(TRANSFER._replace(style_weight=1e6))
    assert not torch.equal(painter.image, before)
    assert made == dict.fromkeys(made, [])


def test_another_picture_makes_new_targets_and_nothing_else(painter, monkeypatch):
    steps(painter, TRANSFER, 4, ("content", 0))
    before = painter.image.clone()
    made = {name: counted(monkeypatch, name) for name in ("make_targets", "prepare_network", "spectral_preconditioner")}
    painter.step(TRANSFER._replace(style=WAVE))
    assert torch.equal(painter.image, before)
    assert {name: len(calls) for name, calls in made.items()} == {
        "make_targets": 1,
        "prepare_network": 0,
        "spectral_preconditioner": 0,
    }


def test_a_textures_weights_go_on_with_the_whitening_it_has(painter, monkeypatch):
    made = counted(monkeypatch, "whiten_style")
    texture = TRANSFER._replace(content=None)
    first = steps(painter, texture, 3)
    assert first.content == 0 and first.total == pytest.approx(1e4 * first.style, rel=1e-4)
    steps(painter, texture._replace(style_weight=1e5, layer_weights=(("conv1_1", 0.5), *LAYERS[1:])), 2)
    assert len(made) == 1
    steps(painter, texture._replace(style=WAVE), 1)
    assert len(made) == 2
    steps(painter, TRANSFER, 2)  # a transfer has no use for it
    assert len(made) == 2


def test_weights_pull_the_picture_different_ways(painter):
    steps(painter, TRANSFER, 8, ("content", 0))
    middle, picture = painter.history[-1], painter.image
    much = steps(painter, TRANSFER._replace(style_weight=1e6), 12)
    painter.image, painter.run = picture, None
    little = steps(painter, TRANSFER._replace(style_weight=1e1), 12)
    assert much.style < 0.7 * middle.style < middle.style < little.style and little.content < middle.content


def test_a_layer_may_come_and_go(painter):
    steps(painter, TRANSFER, 3)
    step = painter.step(TRANSFER._replace(layer_weights=LAYERS[:2]))
    assert set(painter.made["networks"][1]["float32"]._modules) == {"conv1_1", "relu1_1", "conv1_2"}
    assert step.style < painter.history[-2].style


def test_another_size_scales_the_present_picture(painter):
    steps(painter, TRANSFER, 3, ("content", 0))
    before = painter.image
    painter.step(TRANSFER._replace(size=64))
    assert painter.image.shape[-2] == 64
    torch.testing.assert_close(painter.image, nst.resize(before, painter.image.shape[-2:]))


def test_noise_goes_from_coarse_to_fine_and_a_new_weight_does_not_send_it_back(painter):
    settings = TRANSFER._replace(size=128)
    assert painter.step(settings, ("noise", 0)).shape[0] == 64
    while painter.step(settings).shape[0] == 64:
        pass
    assert painter.step(settings._replace(style_weight=1e5)).shape[0] == 128


def test_a_restart_forgets_and_a_seed_repeats(painter):
    first = steps(painter, TRANSFER, 4, ("noise", 3))
    again = steps(painter, TRANSFER, 4, ("noise", 3))
    other = steps(painter, TRANSFER, 4, ("noise", 4))
    assert first == again != other and len(painter.history) == 4
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
    with refuses(ValueError, "every weight is 0"):
        painter.step(TRANSFER._replace(content_weight=0.0, layer_weights=()))
    assert painter.image is before
    assert painter.step(TRANSFER) is not None


# --- The panel -----------------------------------------------------------------------------------


async def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


def play(scene, *arguments, **options):
    """Run `scene(panel)`, a coroutine, with a small panel open on the castle and the night; then close it."""

    async def main():
        panel = style_studio(*(arguments or (CASTLE, NIGHT)), size=40, **options)
        try:
            await scene(panel)
        finally:
            panel.close()
            nst_widgets._open.clear()
            await until(lambda: not workers())

    asyncio.run(main())


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("style-studio")]


def says(panel):
    return panel.status.value


def test_start_pause_and_start_again(vgg):
    async def scene(panel):
        assert panel.state == "ready" and panel.shown is None and panel.task is None
        panel.buttons["Start"].click()
        await until(lambda: panel.shown and len(panel.painter.history) > 3)
        assert panel.state == "running" and panel.buttons["Start"].disabled and "Running" in says(panel)
        panel.buttons["Pause"].click()
        assert panel.state == "paused" and panel.buttons["Pause"].disabled and "Paused" in says(panel)
        picture, count = panel.picture.value, len(panel.painter.history)
        await until(panel.task.done)
        assert panel.picture.value == picture and len(panel.painter.history) <= count + 2
        again = time.perf_counter()
        panel.buttons["Start"].click()
        await until(lambda: len(panel.painter.history) > count + 3)
        assert panel.picture.value != picture and panel.state == "running"
        assert panel.moments[0] > again  # the rate on display counts no pause

    play(scene, vgg=vgg)


def test_a_second_press_of_start_makes_no_second_loop(vgg):
    async def scene(panel):
        panel.start()
        panel.start()
        await until(lambda: panel.shown)
        task = panel.task
        panel.pause()
        panel.start()
        await asyncio.sleep(0.05)
        assert panel.task is task and len(asyncio.all_tasks()) == 2  # the scene's and the loop's

    play(scene, vgg=vgg)


def test_step_is_one_evaluation(vgg):
    async def scene(panel):
        for count in (1, 2, 3):
            panel.buttons["Step"].click()
            await until(lambda: panel.state == "paused" and panel.task.done() and panel.shown)
            assert len(panel.painter.history) == count
            panel.tell("ready")
        assert panel.chart.value

    play(scene, vgg=vgg)


def test_step_takes_over_from_a_loop_that_was_just_paused(vgg):
    async def scene(panel):
        panel.start()
        await until(lambda: panel.shown)
        panel.pause()
        panel.content_weight.value = 7.0
        panel.step()  # the evaluation under way began with another weight, and is none
        await until(lambda: panel.state == "paused" and panel.task.done())
        assert panel.shown.settings.content_weight == 7
        count = len(panel.painter.history)
        await asyncio.sleep(0.3)
        assert panel.state == "paused" and len(panel.painter.history) == count

    play(scene, vgg=vgg)


def test_restart_begins_again_from_the_chosen_start(vgg):
    async def scene(panel):
        panel.start()
        await until(lambda: len(panel.painter.history) > 4)
        panel.start_from.value = "content"
        panel.buttons["Restart"].click()
        content = nst.load_image(CASTLE, 40, "cpu")
        await until(lambda: torch.equal(panel.painter.first, content))
        await until(lambda: panel.shown.step.content < 1)

    play(scene, vgg=vgg)


def test_the_kernel_stays_free_while_it_runs(vgg):
    async def scene(panel):
        panel.start()
        await until(lambda: panel.shown)
        slowest = 0
        for _ in range(40):
            moment = time.monotonic()
            await asyncio.sleep(0)
            slowest = max(slowest, time.monotonic() - moment)
            await asyncio.sleep(0.01)
        assert panel.state == "running" and slowest < 0.25

    play(scene, vgg=vgg)


def test_a_moved_slider_reaches_the_loss_and_reset_takes_it_back(vgg):
    async def scene(panel):
        panel.start()
        await until(lambda: panel.shown)
        panel.style_weight.value, panel.content_weight.value = 1e6, 2.5
        panel.layer_weights["conv1_1"].value = 0
        await until(lambda: panel.painter.settings.content_weight == 2.5)
        panel.pause()
        await until(panel.task.done)
        step = panel.painter.history[-1]
        assert step.total == pytest.approx(2.5 * step.content + 1e6 * step.style, rel=1e-4)
        assert "conv1_1" not in dict(panel.painter.settings.layer_weights)
        panel.buttons["Reset"].click()
        assert panel.settings() == TRANSFER

    play(scene, vgg=vgg)


def test_a_panel_that_has_finished_goes_on_when_a_control_moves(vgg):
    async def scene(panel):
        panel.start_from.value = "content"
        panel.start()
        await until(lambda: panel.state == "done")
        assert panel.task.done() or await asyncio.wait_for(panel.task, 5) is None
        assert "Finished" in says(panel) and not panel.buttons["Start"].disabled
        panel.content_layer.value = "conv2_1"
        await until(lambda: panel.painter.settings.content_layer == "conv2_1")

    play(scene, CASTLE, None, vgg=vgg)


def test_an_error_in_the_loop_comes_to_light(vgg, monkeypatch):
    async def scene(panel):
        panel.start()
        await until(lambda: panel.shown)
        monkeypatch.setattr(Painter, "step", lambda *a: 1 / 0)
        await until(lambda: panel.state == "paused")
        assert "ZeroDivisionError: division by zero" in says(panel)
        monkeypatch.undo()
        panel.start()
        await until(lambda: panel.state == "running" and "ZeroDivision" not in says(panel))

    play(scene, vgg=vgg)


def test_bad_settings_are_answered_in_the_panel(vgg):
    async def scene(panel):
        panel.content_weight.value = 0
        for control in panel.layer_weights.values():
            control.value = 0
        panel.start()
        await until(lambda: panel.state == "paused")
        assert "every weight is 0" in says(panel)
        panel.reset()
        panel.start_from.value = "present"
        panel.start()
        await until(lambda: panel.state == "paused" and "no present picture" in says(panel))
        panel.save()
        assert "no picture to save" in says(panel)

    play(scene, vgg=vgg)


def test_the_difference_is_to_the_start_or_to_the_snapshot(vgg):
    async def scene(panel):
        panel.start_from.value, panel.compare.value = "content", "the start"
        panel.start()
        await until(lambda: len(panel.painter.history) > 5)
        assert panel.shown.mean > 0 and panel.difference.value
        expected = nst.difference_map(panel.shown.image, nst.load_image(CASTLE, 40, "cpu")).mean().item()
        assert panel.shown.mean == pytest.approx(expected, rel=1e-5)
        panel.pause()
        kept = panel.shown.image
        panel.buttons["Snapshot"].click()
        assert panel.snapshot is kept and panel.compare.value == "the snapshot"
        panel.start()
        await until(lambda: 0 < panel.shown.mean < expected)
        panel.compare.value = "nothing"
        await until(lambda: panel.shown.difference is None)
        assert panel.difference.layout.display == "none"

    play(scene, vgg=vgg)


def test_a_saved_picture_carries_its_settings(vgg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def scene(panel):
        panel.start()
        await until(lambda: len(panel.painter.history) > 2)
        panel.pause()
        for _ in range(2):
            panel.buttons["Save"].click()
        (tmp_path / "saved" / "chenonceau_starry_night_001.png").unlink()
        panel.seed.value = 7  # chosen after this picture's start
        panel.buttons["Save"].click()

    play(scene, vgg=vgg)
    files = sorted((tmp_path / "saved").iterdir())
    assert [file.name for file in files] == ["chenonceau_starry_night_001.png", "chenonceau_starry_night_002.png"]
    with Image.open(files[0]) as file:
        about = json.loads(file.text["settings"])
    assert (about["content"], about["style"], about["size"]) == ("chenonceau.jpg", "starry_night.jpg", 40)
    assert about["style_weight"] == 1e4 and about["layer_weights"] == dict(LAYERS)
    assert about["losses"]["total"] > 0 and (about["start"], about["seed"]) == ("noise", 0)


def uploaded(name, content):
    now = datetime.datetime.now(datetime.UTC)
    return {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": now}


def test_an_upload_is_offered_and_a_file_that_is_no_picture_is_not(vgg, tmp_path):
    async def scene(panel):
        offered = len(panel.choices["style"].options)
        panel.uploaders["style"].value = (uploaded("notes.txt", b"no picture"),)
        assert "not a picture" in says(panel) and len(panel.choices["style"].options) == offered
        panel.uploaders["style"].value = (uploaded("../mine.jpg", WAVE.read_bytes()),)
        chosen = panel.choices["style"].value
        assert chosen.name == "mine.jpg" and str(chosen).startswith(panel.uploads.name)
        assert len(panel.choices["style"].options) == offered + 1
        panel.buttons["Step"].click()
        await until(lambda: panel.shown)

    play(scene, vgg=vgg)


@pytest.mark.parametrize(
    "content, style, weights", [(CASTLE, None, (1.0, 0.0)), (None, NIGHT, (0.0, 1e4)), (CASTLE, NIGHT, (1.0, 1e4))]
)
def test_the_forms_ask_for_what_their_notebook_does(content, style, weights, vgg):
    async def scene(panel):
        settings = panel.settings()
        assert (settings.content, settings.style) == (content, style)
        assert (settings.content_weight, settings.style_weight) == weights
        assert settings.layer_weights == (LAYERS if style else ())
        assert set(panel.choices) == {kind for kind, path in (("content", content), ("style", style)) if path}
        panel.step()
        await until(lambda: panel.shown)
        step = panel.shown.step
        assert step.total == pytest.approx(weights[0] * step.content + weights[1] * step.style, rel=1e-4)

    play(scene, content, style, vgg=vgg)


def test_a_new_panel_closes_the_one_before_and_leaves_nothing_behind(vgg):
    async def scene(panel):
        panel.start()
        await until(lambda: panel.shown)
        second = style_studio(CASTLE, NIGHT, size=40, vgg=vgg)
        assert panel.state == "closed"
        await until(panel.task.done)
        await until(lambda: not workers())
        panel.start()
        panel.pause()
        await asyncio.sleep(0.05)
        assert panel.state == "closed" and not workers()
        second.close()

    play(scene, vgg=vgg)


def test_a_panel_without_pictures_or_with_a_missing_one(refuses):
    with refuses(ValueError, "content and style are both None"):
        style_studio()
    with refuses(FileNotFoundError, "no picture at 'missing.jpg'"):
        style_studio("missing.jpg", NIGHT)
