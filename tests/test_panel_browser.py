"""The panel in a real JupyterLab, driven by a real Chromium: `make test-browser`. Minutes, so no part of `make test`.

Screenshots are left in test-artifacts/.
"""

import json
import time

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


def test_style_transfer_from_start_to_a_closed_panel(browser, server):
    book = Notebook(browser, server, "3_style_transfer.ipynb")
    panel = book.open_panel(whole=True)
    assert book.state == "ready"

    book.button("Start").click()
    book.sees_change(5)
    assert book.state == "running"
    book.wait_for(lambda: "341 × 256" in book.status, 90)
    book.wait_for(lambda: book.losses()["loss"] < 4, 90)
    book.screenshot("running")
    book.still("panel_content_and_style")

    # More style weight: the total jumps, and of the two losses the style's falls faster than before.
    before = book.losses()
    handle = book.page.locator(".widget-hslider", has_text="style weight").locator(".noUi-handle")
    box = handle.bounding_box()
    book.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=8)
    book.page.mouse.up()
    book.wait_for(lambda: book.losses()["loss"] > 1.5 * before["loss"], 10)
    share = before["style"] / before["content"]
    book.wait_for(lambda: book.losses()["style"] / book.losses()["content"] < 0.5 * share, 60)
    book.screenshot("more_style")

    # The kernel answers while the panel runs.
    assert book.ask("print(6 * 7)") == "42"
    assert book.state == "running"
    book.show_panel()

    # Another style picture.
    style = book.losses()["style"]
    book.page.get_by_label("style", exact=True).select_option("great wave")
    book.wait_for(lambda: book.losses()["style"] > 2 * style)
    book.sees_change()
    book.screenshot("great_wave")

    # Pause holds at once, and for good.
    book.button("Pause").click()
    clicked = time.monotonic()
    book.wait_for(lambda: book.state == "paused")
    assert time.monotonic() - clicked < 0.5
    kept = book.pixels()
    time.sleep(2)
    assert book.pixels() == kept

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
    handle.focus()
    weight = book.ask("import nst_widgets; print(nst_widgets._open[0].style_weight.value)")
    handle.focus()
    book.page.keyboard.press("ArrowLeft")
    assert float(book.ask("print(nst_widgets._open[0].style_weight.value)")) < float(weight)

    # Dark, and narrow.
    book.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    book.show_panel()
    book.button("Start").click()
    book.sees_change()
    book.screenshot("dark")
    book.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    book.page.set_viewport_size({"width": 460, "height": 1250})
    time.sleep(1)
    book.screenshot("narrow")
    for control in book.page.locator(".widget-dropdown, .widget-slider, .widget-button").all():
        box = control.bounding_box()
        assert box is None or box["x"] + box["width"] <= 460

    # To run the cell again closes the panel that runs, and leaves no worker.
    assert book.state == "running"
    book.run(panel)
    time.sleep(2)
    assert book.state == "ready"
    left = book.ask(
        "import asyncio, threading\n"
        "print([t.name for t in threading.enumerate() if t.name.startswith('style-studio')], "
        "[t for t in asyncio.all_tasks() if 'Studio' in repr(t)])"
    )
    assert left == "[] []"
    book.page.close()


@pytest.mark.parametrize(
    "name, form, loss",
    [("1_content_reconstruction", "content", 0.02), ("2_texture_synthesis", "style", 0.05)],
)
def test_the_other_notebooks_panels(browser, server, name, form, loss):
    book = Notebook(browser, server, f"{name}.ipynb")
    book.open_panel(whole=False)
    book.button("Start").click()
    book.sees_change(5)
    book.wait_for(lambda: book.losses()["loss"] < loss, 60)
    if form == "content":
        book.page.get_by_label("content layer").select_option("conv3_1")
        book.wait_for(lambda: book.losses()["loss"] > loss)
    else:
        # Paused, and the last evaluation shown, so that the next one is of that picture: one layer more to match.
        book.button("Pause").click()
        book.wait_for(lambda: book.state == "paused")
        book.step()
        loss = book.losses()["loss"]
        book.page.locator(".widget-hslider", has_text="style conv4_1").locator(".noUi-handle").focus()
        for _ in range(10):
            book.page.keyboard.press("ArrowRight")
        book.step()
        assert book.losses()["loss"] > loss
        book.button("Start").click()
    book.sees_change()
    time.sleep(3)
    book.still(f"panel_{form}")
    book.page.close()
