"""The panel in a real JupyterLab, driven by a real Chromium: `make test-browser`. Minutes, so no part of `make test`.

It compares ends, or holds the painter at a gate, so nothing depends on the machine's speed. Screenshots are left in
test-artifacts/.
"""

import io
import json

import numpy as np
import pytest
from lab_driver import CHROMIUM, Notebook, chromium, jupyterlab
from PIL import Image

from nst_utils import FIRST_FIVE, IMAGES

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: install Debian's package chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with jupyterlab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


# In the kernel: the painter's steps wait at a gate until it is opened, so that the panel stays in the state it is in.
GATE = """
import threading, style_transfer.panel.studio
panel, gate = style_transfer.panel.studio._open[0], threading.Semaphore(0)
ungated = panel.painter.step
panel.painter.step = lambda *arguments: gate.acquire() and ungated(*arguments)
"""

# In the kernel: the panel's layers and weights, and notebook 3's parameters.
PANEL = """
import style_transfer.panel.studio
now = style_transfer.panel.studio._open[0].controls.settings()
layers, weights = zip(*now.layer_weights)
print(f"{now.content_layer} {now.content_weight:.9g} {layers} {set(weights)} {now.style_weight:.9g}")
"""
NOTEBOOK = 'print(f"{CONTENT_LAYERS[0]} {CONTENT_WEIGHT:.9g} {(*STYLE_LAYERS,)} {{1.0}} {STYLE_WEIGHT:.9g}")'


def difference(one, other):
    """The mean difference of two screenshots, in 8-bit steps."""
    one, other = (np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(float) for picture in (one, other))
    return np.abs(one - other).mean()


def test_style_transfer_from_start_to_a_closed_panel(browser, server):
    book = Notebook(browser, server, "3_style_transfer.ipynb")
    panel = book.open_panel()
    assert book.state == "ready"

    book.count_frames()
    book.button("Start").click()
    book.finish()
    assert book.frames() >= 3
    assert "341 × 256" in book.status and book.losses()["loss"] < 12
    book.screenshot("finished")
    book.still("panel_content_and_style")

    # The kernel answers while the panel runs, and Pause holds at once: what is under way ends unseen.
    book.page.get_by_label("size in pixels").select_option("128")
    book.finish()
    middle = book.losses()
    book.ask(GATE)
    book.show_panel()
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    assert book.ask("print(6 * 7, panel.state)") == "42 running"
    book.show_panel()
    kept = book.pixels()
    book.button("Pause").click()
    book.wait_for(lambda: book.state == "paused")
    assert book.ask("gate.release(); await panel.turns; print(panel.state)") == "paused"
    book.show_panel()
    assert book.pixels() == kept

    # While it runs the style weight is dragged up. Then it is little, by the keyboard.
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    handle = book.slider("style weight")
    box = handle.bounding_box()
    book.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=8)
    book.page.mouse.up()
    book.ask("panel.painter.step = ungated; gate.release(10)")
    book.finish()
    much = book.losses()
    assert much["style"] < 0.5 * middle["style"] and much["content"] > 1.2 * middle["content"]
    book.screenshot("more_style")
    for key in ("Home", "PageUp", "PageUp", "PageUp"):
        handle.press(key)
    book.finish()
    little = book.losses()
    assert little["content"] < 0.1 * middle["content"] and little["style"] > 2 * middle["style"]
    book.screenshot("little_style")

    # The film of a slider in motion, for the README.
    def more():
        handle.press("ArrowRight")
        handle.press("ArrowRight")
        book.page.wait_for_timeout(500)

    book.film("panel_film", [more] * 24)
    book.finish()

    # Reset puts the weights back to the notebook's.
    book.button("Reset").click()
    book.finish()
    assert book.ask(PANEL) == book.ask(NOTEBOOK)
    book.show_panel()

    # A second style, and a slider from the first to the second: the picture follows.
    pictures = [book.pixels()]
    book.page.get_by_label("second style").select_option("great wave")
    for key in ("Home", "PageUp", "End"):
        book.slider("blend").press(key)
        book.finish()
        pictures.append(book.pixels())
    near, far = (difference(picture, pictures[0]) for picture in (pictures[1], pictures[3]))
    assert near < 0.2 * far and difference(pictures[2], pictures[0]) < far
    losses = """
maps = nst.features(vgg, panel.shown.image, nst.FIRST_FIVE)
for name in ("starry_night", "great_wave"):
    image = nst.load_image(nst.IMAGES / "style" / f"{name}.jpg", 128)
    print(nst.style_loss(maps, nst.gram_matrices(nst.features(vgg, image, nst.FIRST_FIVE))).item())
"""
    to_the_first, to_the_second = map(float, book.ask(losses).split())
    book.show_panel()
    assert to_the_second < 0.2 * to_the_first
    book.screenshot("blended")

    # The photograph's colours, at once and without an evaluation, and back.
    status, box = book.status, book.page.get_by_label("Keep the colours of the content image")
    box.check()
    book.wait_for(lambda: difference(book.pixels(), pictures[3]) > 5)
    assert book.status == status
    book.screenshot("colours_kept")
    box.uncheck()
    book.wait_for(lambda: book.pixels() == pictures[3])
    book.page.get_by_label("second style").select_option("none")
    book.finish()

    # Another image: one of those that are there, and an uploaded one, which Save writes down.
    book.step()
    style = book.losses()["style"]
    styles = book.page.get_by_label("style", exact=True)
    styles.select_option("great wave")
    book.step()
    assert book.losses()["style"] > 2 * style
    for _ in range(2):  # the second time, another has been chosen in between
        styles.select_option("great wave")
        book.upload("style", IMAGES / "style" / "starry_night.jpg")
        book.wait_for(lambda: styles.locator("option:checked").text_content() == "starry_night.jpg")
    book.step()
    assert book.losses()["style"] < 2 * style
    book.screenshot("uploaded")
    book.button("Save").click()
    book.wait_for(lambda: "saved" in book.status)
    (path,) = (server.folder / "saved").iterdir()
    with Image.open(path) as file:
        about = json.loads(file.text["settings"])
    assert (about["content"], about["style"], about["size"]) == ("chenonceau.jpg", "starry_night.jpg", 128)

    # The difference map.
    book.page.get_by_label("difference from").select_option("the start")
    book.button("Step").press("Enter")
    book.wait_for(lambda: book.page.locator("img.difference-map").is_visible())

    # Dark, and narrow.
    book.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    book.show_panel()
    book.screenshot("dark")
    book.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    book.page.set_viewport_size({"width": 460, "height": 1400})

    def fits():
        controls = book.page.locator(".widget-dropdown, .widget-slider, .widget-button").all()
        boxes = [control.bounding_box() for control in controls]
        return all(box is None or box["x"] + box["width"] <= 460 for box in boxes)

    book.wait_for(fits)
    book.screenshot("narrow")
    book.page.set_viewport_size({"width": 1180, "height": 1400})

    # To run the cell again closes the panel that runs, and leaves no worker. The new one opens at new parameters, and
    # Reset goes back to them.
    book.ask(GATE + "CONTENT_WEIGHT, STYLE_LAYERS, STYLE_WEIGHT = 0.03, ('conv3_2', 'conv4_1'), 3e4")
    book.show_panel()
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    book.run(panel)
    book.show_panel()
    book.wait_for(lambda: book.state == "ready")
    book.screenshot("opened_again")
    notebook = book.ask(NOTEBOOK)
    assert book.ask(PANEL) == notebook
    book.show_panel()
    for name in ("content weight", "style weight", "style conv3_2"):
        book.slider(name).press("Home")
    book.page.get_by_label("content layer").select_option("conv4_1")
    assert book.ask(PANEL) != notebook
    book.show_panel()
    book.button("Reset").click()
    assert book.ask(PANEL) == notebook
    left = """
import asyncio, threading
gate.release(10)
await panel.turns
workers = [thread for thread in threading.enumerate() if thread.name.startswith("style-studio")]
for worker in workers:
    worker.join(60)
print(panel.state, [worker.is_alive() for worker in workers if worker.is_alive()])
print([task for task in asyncio.all_tasks() if "Studio" in repr(task)])
"""
    assert book.ask(left) == "closed []\n[]"
    book.page.close()


def test_a_large_file_may_be_uploaded_and_a_damaged_one_is_named(browser, server, tmp_path):
    """Above 10 MB, where a server that was started otherwise would end the connection."""
    book = Notebook(browser, server, "2_texture_synthesis.ipynb")
    book.open_panel()
    styles, large, damaged = book.page.get_by_label("style", exact=True), tmp_path / "large.png", tmp_path / "cut.jpg"
    Image.effect_noise((2600, 2400), 90).convert("RGB").save(large, compress_level=0)
    assert large.stat().st_size > 18e6
    book.upload("style", large)
    book.wait_for(lambda: styles.locator("option:checked").text_content() == "large")
    damaged.write_bytes((IMAGES / "style" / "great_wave.jpg").read_bytes()[:9000])
    book.upload("style", damaged)
    book.wait_for(lambda: "'cut.jpg' is cut off" in book.status)
    assert styles.locator("option:checked").text_content() == "large"
    book.screenshot("large_upload")
    book.step()
    assert "cut.jpg" not in book.status
    book.page.close()


def test_what_a_deep_layer_loses_comes_back(browser, server):
    book = Notebook(browser, server, "1_content_reconstruction.ipynb")
    book.open_panel()
    book.count_frames()
    book.button("Start").click()
    book.finish()
    assert book.losses()["loss"] < 0.02 and book.frames() >= 3
    book.button("Snapshot").click()
    book.page.get_by_label("content layer").select_option("conv4_4")
    book.button("Restart").click()
    book.finish()
    lost = book.difference
    assert lost > 0.03
    book.still("panel_content")
    at_layer = """
maps = [nst.features(vgg, image, ["conv4_4"]) for image in (panel.shown.image, content)]
print(nst.content_loss(*maps).item())
"""
    expected = float(book.ask(at_layer))
    book.show_panel()
    assert book.losses()["loss"] == pytest.approx(expected, rel=0.02)

    book.page.get_by_label("content layer").select_option("conv1_2")
    book.finish()
    assert book.difference < lost / 5
    book.page.close()


def test_another_seed_is_another_piece_and_block_1_is_grain(browser, server):
    book = Notebook(browser, server, "2_texture_synthesis.ipynb")
    book.open_panel()

    def style_loss(layers):
        """Of the image on display, by the helper's formulas, at 128 pixels."""
        images = "panel.shown.image", "nst.load_image(STYLE, 128, vgg.mean.device)"
        of_image, of_style = (f"nst.features(vgg, {image}, {layers})" for image in images)
        loss = float(book.ask(f"print(nst.style_loss({of_image}, nst.gram_matrices({of_style})).item())"))
        book.show_panel()
        return loss

    book.count_frames()
    book.button("Start").click()
    book.finish()
    assert book.losses()["loss"] < 0.05 and book.frames() >= 3
    book.still("panel_style")

    book.page.get_by_label("size in pixels").select_option("128")  # the rest is the same at any size, and sooner here
    book.finish()
    strokes = style_loss(FIRST_FIVE)
    book.button("Snapshot").click()
    book.page.get_by_label("noise seed").fill("1")
    book.page.keyboard.press("Enter")
    book.button("Restart").click()
    book.finish()
    assert book.difference > 0.05

    for name in FIRST_FIVE[2:]:
        book.slider(f"style {name}").press("Home")
    book.button("Restart").click()
    book.finish()
    assert book.losses()["loss"] == pytest.approx(1e4 * style_loss(FIRST_FIVE[:2]), rel=0.02)
    assert style_loss(FIRST_FIVE) > 1000 * strokes
    book.screenshot("grain")

    # The panel had finished, so the weights' way back is its Start.
    book.button("Reset").click()
    book.finish()
    assert style_loss(FIRST_FIVE) < 5 * strokes
    book.page.close()


# In the kernel: the painter begins again when its run is done, so that the panel runs until it is stopped.
NO_END = """
import style_transfer.panel.studio
panel, calls = style_transfer.panel.studio._open[0], []
ending = panel.painter.step

def endless(settings, start=None):
    calls.append(start)
    return ending(settings, start) or ending(settings, ("noise", 0))

panel.painter.step = endless
"""

# In the kernel: a file says when the panel runs no more, since there is no page that could be asked.
LOST = """
import asyncio, json
from pathlib import Path
style_transfer.panel.studio.PATIENCE = 2

async def report():
    while panel.state == "running":
        await asyncio.sleep(0.05)
    await asyncio.wrap_future(panel.worker.submit(len, calls))  # what was under way has ended
    before = len(calls)
    await asyncio.sleep(1)
    Path("lost.json").write_text(json.dumps([panel.state, panel.note, before, len(calls)]))

reporting = asyncio.get_running_loop().create_task(report())
"""


@pytest.mark.parametrize("pull", [False, True])
def test_frames_that_are_sent_and_frames_that_the_browser_asks_for(pull, browser, server):
    """A panel of each kind runs to its end, pauses at once, and stops when the page is closed."""
    book = Notebook(browser, server, "2_texture_synthesis.ipynb")
    panel = book.open_panel()
    source = book.sources()[panel][1]
    book.page.evaluate(
        "([i, code]) => { jupyterapp.shell.currentWidget.content.widgets[i].model.sharedModel.source = code; }",
        [panel, source.replace("vgg=vgg", f"vgg=vgg, pull={pull}").replace("size=SIZE", "size=64")],
    )
    book.run(panel)
    book.show_panel()
    book.count_frames()
    book.button("Start").click()
    book.finish()
    assert book.frames() >= 3 and book.losses()["loss"] < 1
    assert book.ask("import style_transfer.panel.studio; print(style_transfer.panel.studio._open[0].pull)") == str(pull)
    book.screenshot(f"pull_{pull}")
    book.ask(NO_END)
    book.show_panel()
    book.button("Restart").click()
    book.wait_for(lambda: book.state == "running")
    book.count_frames()
    book.wait_for(lambda: book.frames() >= 5)
    book.button("Pause").click()
    book.wait_for(lambda: book.state == "paused")
    book.count_frames()
    book.ask("import asyncio; await asyncio.sleep(0.5)")
    assert book.frames() == 0
    book.show_panel()
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    book.ask(LOST)
    book.page.close()
    lost = server.folder / "lost.json"
    book.wait_for(lost.exists)
    state, note, before, after = json.loads(lost.read_text())
    lost.unlink()
    assert (state, note) == ("paused", "no browser has shown this panel for 2 seconds: Start goes on")
    assert before == after > 0
