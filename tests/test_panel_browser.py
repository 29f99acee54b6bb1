"""The panel in a real JupyterLab, driven by a real Chromium: `make test-browser`. Minutes, so no part of `make test`.

It compares ends, so nothing depends on the machine's speed. Screenshots, stills and a film are left in test-artifacts/.
"""

import json

import pytest
from lab_driver import CHROMIUM, PICTURE, Notebook, chromium, jupyterlab
from PIL import Image

from nst_utils import IMAGES

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


# In the kernel: the panel's layers and weights, and notebook 3's parameters.
PANEL = """
now = panel.controls.settings()
print(f"{now.content_layer} {now.content_weight:.9g} {(*now.layer_weights,)} {now.style_weight:.9g}")
"""
NOTEBOOK = 'print(f"{CONTENT_LAYERS[0]} {CONTENT_WEIGHT:.9g} {(*STYLE_LAYERS,)} {STYLE_WEIGHT:.9g}")'
# How many pixels of the panel are beyond its right edge.
OVERFLOW = "(panel => panel.scrollWidth - panel.clientWidth)(document.querySelector('.style-studio'))"
THEME = "jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab %s'})"


def test_a_laptop_shows_picture_and_weights_side_by_side_and_nothing_moves(browser, server):
    book = Notebook(browser, server, "3_style_transfer.ipynb")
    book.open_panel()
    book.toggle_files()
    places = {name: book.button(name) for name in ("Start", "Pause", "Step", "Restart", "Snapshot", "Save", "Reset")}
    places |= {"settings": book.page.locator("button", has_text="Open settings"), "picture": book.page.locator(PICTURE)}
    places |= {"weight": book.slider("style weight"), "style": book.page.locator(".studio-style img")}

    def boxes():
        return {name: place.bounding_box() for name, place in places.items()}

    for theme in ("Dark", "Light"):
        book.page.evaluate(THEME % theme)
        for width, height in ((800, 1000), (1600, 900), (1280, 800)):
            book.page.set_viewport_size({"width": width, "height": height})
            book.show_panel()
            book.screenshot(f"panel_{width}_{theme.lower()}")
            assert book.page.evaluate(OVERFLOW) == 0
    before = boxes()
    *buttons, picture, weight, _ = before.values()
    assert len({box["y"] for box in buttons}) == 1
    assert picture["x"] + picture["width"] < weight["x"] and picture["y"] < weight["y"] < 800 - weight["height"]
    book.count_frames()
    book.button("Start").press("Enter")
    book.wait_for(lambda: book.frames() >= 3)
    assert boxes() == before
    assert book.page.evaluate("document.activeElement.textContent") == "Start"
    book.button("Pause").press("Enter")
    book.page.close()


def test_style_transfer_from_start_to_a_closed_panel(browser, server):
    book = Notebook(browser, server, "3_style_transfer.ipynb")
    book.open_panel()
    book.button("Start").click()
    book.finish()
    assert "341 × 256" in book.status and book.losses()["loss"] < 12
    book.still("panel_content_and_style")

    # While it runs the style weight is dragged up. Then it is little, by the keyboard.
    book.page.get_by_label("size in pixels").select_option("128")
    book.finish()
    middle = book.losses()
    book.button("Restart").click()
    handle = book.slider("style weight")
    box = handle.bounding_box()
    book.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=8)
    book.page.mouse.up()
    book.finish()
    much = book.losses()
    assert much["style"] < 0.5 * middle["style"] and much["content"] > 1.2 * middle["content"]
    for key in ("Home", "PageUp", "PageUp", "PageUp"):
        handle.press(key)
    book.finish()
    little = book.losses()
    assert little["content"] < 0.1 * middle["content"] and little["style"] > 2 * middle["style"]

    # The film of a slider in motion, for the README.
    def more():
        handle.press("ArrowRight")
        handle.press("ArrowRight")
        book.page.wait_for_timeout(500)

    book.film("panel_film", [more] * 24)
    book.finish()
    book.button("Reset").click()
    book.finish()
    assert book.ask(PANEL) == book.ask(NOTEBOOK)

    # A second style, and a slider from the first to the second: the picture follows.
    before = book.pixels()
    book.page.get_by_label("second style").select_option("great wave")
    book.slider("blend").press("End")
    book.finish()
    assert book.pixels() != before
    book.page.get_by_label("second style").select_option("none")

    # An uploaded image, twice: the second time another has been chosen in between. Save offers what it wrote.
    styles = book.page.get_by_label("style", exact=True)
    for _ in range(2):
        styles.select_option("great wave")
        book.wait_for(lambda: book.ask("print(*panel.controls.settings().styles)").endswith("great_wave.jpg"))
        book.upload("style", IMAGES / "style" / "starry_night.jpg")
        book.wait_for(lambda: styles.locator("option:checked").text_content() == "starry_night.jpg")
    book.button("Pause").click()
    book.step()
    book.button("Save").click()
    book.wait_for(lambda: "saved as" in book.status)
    with book.page.expect_download() as download:
        book.page.get_by_text("Download").click()
    (path,) = (server.folder / "saved").iterdir()
    assert download.value.path().read_bytes() == path.read_bytes()
    with Image.open(path) as file:
        about = json.loads(file.text["settings"])
    assert (about["content"], about["styles"][0][0], about["size"]) == ("chenonceau.jpg", "starry_night.jpg", 128)

    # A panel in another cell, at other parameters, closes this one, which keeps its picture.
    parameters = "CONTENT_WEIGHT, STYLE_LAYERS, STYLE_WEIGHT = 0.03, ('conv3_2', 'conv4_1'), 3e4\n"
    cell = book.sources()[book.panel][1]
    book.ask(f"{parameters}from IPython.display import display\ndisplay({cell})")
    assert book.page.get_by_text("This panel was closed, since another was opened.").is_visible()
    book.screenshot("closed")
    assert book.ask(PANEL) == book.ask(NOTEBOOK)
    book.page.close()


def test_a_panel_without_its_kernel_claims_nothing_and_shows_its_still(browser, server):
    book = Notebook(browser, server, "1_content_reconstruction.ipynb")
    book.open_panel()
    book.page.evaluate("jupyterapp.commands.execute('docmanager:save')")
    book.page.evaluate("jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    book.wait_for(lambda: not book.page.get_by_text("Ready: press Start").is_visible())
    book.screenshot("restarted")
    panel = book.panel
    book.page.close()
    book = Notebook(browser, server, "1_content_reconstruction.ipynb")
    book.panel = panel
    book.show_panel()
    # In a trusted notebook the one that the style sheet shows, in another the image beside the view.
    still = ".studio-still, .jp-OutputArea-child:has(.studio-still) + * .jp-RenderedImage img"
    book.page.locator(still).locator("visible=true").first.wait_for()
    assert not book.page.get_by_text("Error displaying widget").locator("visible=true").count()
    book.screenshot("reopened")
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
    book.step()
    assert "cut.jpg" not in book.status
    book.page.close()


def test_what_a_deep_layer_loses_comes_back(browser, server):
    book = Notebook(browser, server, "1_content_reconstruction.ipynb")
    book.open_panel(128)
    book.button("Start").click()
    book.finish()
    assert book.losses()["loss"] < 0.02
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
    assert book.losses()["loss"] == pytest.approx(float(book.ask(at_layer)), rel=0.02)
    book.page.get_by_label("content layer").select_option("conv1_2")
    book.finish()
    assert book.difference < lost / 5
    book.page.close()


def test_another_seed_is_another_piece(browser, server):
    book = Notebook(browser, server, "2_texture_synthesis.ipynb")
    book.open_panel(128)
    book.button("Start").click()
    book.finish()
    loss = book.losses()["loss"]
    assert loss < 0.05
    book.still("panel_style")
    book.button("Snapshot").click()
    book.page.get_by_label("noise seed").fill("1")
    book.page.keyboard.press("Enter")
    book.button("Restart").click()
    book.finish()
    assert book.difference > 0.05 and book.losses()["loss"] < 2 * loss
    book.page.close()


# In the kernel: the painter begins again when its run is over, so that the panel runs until it is stopped.
NO_END = """
calls = []
ending = panel.painter.step

def endless(settings, start=None):
    calls.append(start)
    return ending(settings, start) or ending(settings, ("noise", 0))

panel.painter.step = endless
print(panel.pull)
"""

# In the kernel: a file says when the panel runs no more, since there is no page that could be asked.
LOST = """
import asyncio, json
from pathlib import Path
panel.patience_seconds = 2

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
    """A panel of each kind pauses at once, and stops when the page is closed."""
    book = Notebook(browser, server, "2_texture_synthesis.ipynb")
    book.open_panel()
    source = book.sources()[book.panel][1]
    book.set_source(book.panel, source.replace("vgg=vgg", f"vgg=vgg, pull={pull}").replace("size=SIZE", "size=64"))
    book.run(book.panel)
    book.show_panel()
    assert book.ask(NO_END) == str(pull)
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    book.count_frames()
    book.wait_for(lambda: book.frames() >= 5)
    book.button("Pause").click()
    book.wait_for(lambda: book.state == "paused")
    book.count_frames()
    book.ask("import asyncio; await asyncio.sleep(0.5)")
    assert book.frames() == 0
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    book.ask(LOST)
    book.page.close()
    lost = server.folder / "lost.json"
    book.wait_for(lost.exists)
    state, note, before, after = json.loads(lost.read_text())
    lost.unlink()
    assert (state, note) == ("paused", "no browser has shown this panel for 2 seconds: press Start to continue")
    assert before == after > 0
