"""The panel in a real JupyterLab, driven by a real Chromium: `make test-browser`. Minutes, so no part of `make test`.

It compares ends, or holds the painter at a gate, so nothing depends on the machine's speed. Screenshots are left in
test-artifacts/.
"""

import json

import pytest
from lab_driver import CHROMIUM, Notebook, chromium, jupyterlab
from PIL import Image

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
import threading, nst_widgets
panel, gate = nst_widgets._open[0], threading.Semaphore(0)
ungated = panel.painter.step
panel.painter.step = lambda *arguments: gate.acquire() and ungated(*arguments)
"""


def test_style_transfer_from_start_to_a_closed_panel(browser, server):
    book = Notebook(browser, server, "3_style_transfer.ipynb")
    panel = book.open_panel(whole=True)
    assert book.state == "ready"

    book.count_pictures()
    book.button("Start").click()
    book.finish()
    assert book.pictures() >= 3
    assert "341 × 256" in book.status and book.losses()["loss"] < 12
    book.screenshot("finished")
    book.still("panel_content_and_style")

    # More style weight: the panel goes on by itself, and ends with less style loss for the content loss it has.
    before = book.losses()
    handle = book.slider("style weight")
    box = handle.bounding_box()
    book.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=8)
    book.page.mouse.up()
    book.finish()
    after = book.losses()
    assert after["loss"] > 1.5 * before["loss"]
    assert after["style"] / after["content"] < 0.5 * before["style"] / before["content"]
    book.screenshot("more_style")

    # The kernel answers while the panel runs, and Pause holds at once: what is under way ends unseen.
    book.ask(GATE)
    book.show_panel()
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    assert book.ask("print(6 * 7, panel.state)") == "42 running"
    book.show_panel()
    kept = book.pixels()
    book.button("Pause").click()
    book.wait_for(lambda: book.state == "paused")
    assert book.ask("gate.release(); await panel.task; print(panel.state)") == "paused"
    book.show_panel()
    assert book.pixels() == kept
    book.ask("panel.painter.step = ungated")
    book.show_panel()

    # Another style picture, one evaluation.
    style = book.losses()["style"]
    book.page.get_by_label("style", exact=True).select_option("great wave")
    book.step()
    assert book.losses()["style"] > 2 * style
    book.step()
    book.step()
    assert book.pixels() != kept
    book.screenshot("great_wave")

    book.button("Save").click()
    book.wait_for(lambda: "saved" in book.status)
    (path,) = (server.folder / "saved").iterdir()
    with Image.open(path) as file:
        about = json.loads(file.text["settings"])
    assert about["style"] == "great_wave.jpg" and about["style_weight"] > 2e4

    # The difference map, and the keyboard.
    book.page.get_by_label("difference to").select_option("the start")
    book.button("Step").focus()
    book.page.keyboard.press("Enter")
    book.wait_for(lambda: book.page.locator("img.difference-map").is_visible())
    weight = book.ask("print(panel.style_weight.value)")
    handle.focus()
    book.page.keyboard.press("ArrowLeft")
    assert float(book.ask("print(panel.style_weight.value)")) < float(weight)

    # Dark, and narrow.
    book.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    book.show_panel()
    book.screenshot("dark")
    book.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    book.page.set_viewport_size({"width": 460, "height": 1250})

    def fits():
        controls = book.page.locator(".widget-dropdown, .widget-slider, .widget-button").all()
        boxes = [control.bounding_box() for control in controls]
        return all(box is None or box["x"] + box["width"] <= 460 for box in boxes)

    book.wait_for(fits)
    book.screenshot("narrow")
    book.page.set_viewport_size({"width": 1180, "height": 1250})

    # To run the cell again closes the panel that runs, and leaves no worker.
    book.ask(GATE)
    book.show_panel()
    book.button("Start").click()
    book.wait_for(lambda: book.state == "running")
    book.run(panel)
    book.show_panel()
    book.wait_for(lambda: book.state == "ready")
    left = """
import asyncio, threading
gate.release(10)
await panel.task
workers = [thread for thread in threading.enumerate() if thread.name.startswith("style-studio")]
for worker in workers:
    worker.join(60)
print(panel.state, [worker.is_alive() for worker in workers if worker.is_alive()])
print([task for task in asyncio.all_tasks() if "Studio" in repr(task)])
"""
    assert book.ask(left) == "closed []\n[]"
    book.page.close()


# In the kernel: the loss that the panel should show.
LOSSES = {
    "content": """
names = ["conv3_1"]
print(nst.content_loss(nst.features(vgg, panel.shown.image, names), nst.features(vgg, content, names)).item())
""",
    "style": """
names = [*nst.FIRST_FIVE, "conv4_1"]
grams = nst.gram_matrices(nst.features(vgg, style, names))
print(1e4 * nst.style_loss(nst.features(vgg, panel.shown.image, names), grams).item())
""",
}


@pytest.mark.parametrize(
    "name, form, loss",
    [("1_content_reconstruction", "content", 0.02), ("2_texture_synthesis", "style", 0.05)],
)
def test_the_other_notebooks_panels(browser, server, name, form, loss):
    book = Notebook(browser, server, f"{name}.ipynb")
    book.open_panel(whole=False)
    book.count_pictures()
    book.button("Start").click()
    book.finish()
    assert book.losses()["loss"] < loss and book.pictures() >= 3

    # Another layer: the panel goes on, and in the end shows the loss at that layer.
    if form == "content":
        book.page.get_by_label("content layer").select_option("conv3_1")
    else:
        book.slider("style conv4_1").focus()
        for _ in range(10):
            book.page.keyboard.press("ArrowRight")
    book.finish()
    expected = float(book.ask(LOSSES[form]))
    book.show_panel()
    assert book.losses()["loss"] == pytest.approx(expected, rel=0.02)
    book.still(f"panel_{form}")
    book.page.close()
