"""The panel in a real JupyterLab, driven by a real Chromium: `make test-browser`. Minutes, so no part of `make test`.

Screenshots are left in test-artifacts/.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
ARTEFACTS = ROOT / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
OPTIONS += " --disable-component-update --disable-sync"
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: install Debian's package chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A JupyterLab of its own on the loopback address: (base address, token, folder of notebooks)."""
    home = tmp_path_factory.mktemp("lab")
    folder = home / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".*", "saved"))
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(home / name.lower()) for name in own} | {"HOME": str(home)}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=2)
                break
            except OSError:
                assert process.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
        yield address, token, folder
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser():
    ARTEFACTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield chromium
        chromium.close()


class Notebook:
    """A notebook open in JupyterLab."""

    def __init__(self, browser, server, name):
        address, token, _ = server
        self.page = browser.new_page(viewport={"width": 1180, "height": 1250})
        self.page.goto(f"{address}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={token}&reset")
        self.page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=90_000
        )
        self.page.evaluate("jupyterapp.commands.execute('application:set-mode', {mode: 'single-document'})")
        if self.page.locator(".jp-SideBar .lm-mod-current").count():
            self.page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")

    def sources(self):
        return self.page.evaluate(
            "jupyterapp.shell.currentWidget.content.widgets.map(c => [c.model.type, c.model.sharedModel.source])"
        )

    def run_cell(self, index):
        """Run one cell without waiting for it."""
        self.page.evaluate(
            """index => { const notebook = jupyterapp.shell.currentWidget.content; notebook.activeCellIndex = index;
                notebook.deselectAll(); void jupyterapp.commands.execute('notebook:run-cell'); }""",
            index,
        )

    def wait_for_cell(self, index, seconds):
        """Wait until a cell has run; return its text outputs."""
        state = "(c => [c.model.executionState, c.model.executionCount])(jupyterapp.shell.currentWidget.content.widgets[index])"
        self.page.wait_for_function(
            f"index => {{ const s = {state}; return s[0] === 'idle' && s[1] !== null; }}",
            arg=index,
            timeout=1000 * seconds,
        )
        outputs = self.page.evaluate(
            "index => jupyterapp.shell.currentWidget.content.widgets[index].model.sharedModel.outputs", index
        )
        assert not [output for output in outputs if output["output_type"] == "error"], outputs
        return "".join("".join(output.get("text", "")) for output in outputs)

    def run(self, index, seconds=400):
        self.page.evaluate(
            "index => jupyterapp.shell.currentWidget.content.widgets[index].model.clearExecution()", index
        )
        self.run_cell(index)
        return self.wait_for_cell(index, seconds)

    def ask(self, code):
        """Run `code` in a new last cell; return what it prints."""
        last = len(self.sources()) - 1
        self.page.evaluate(
            """([index, code]) => { const notebook = jupyterapp.shell.currentWidget.content;
                notebook.model.sharedModel.insertCell(index + 1, {cell_type: 'code', source: code}); }""",
            [last, code],
        )
        return self.run(last + 1, 30).strip()

    def open_panel(self, whole):
        """Run every cell up to the panel, or only those up to the network; return the panel's place."""
        sources = self.sources()
        panel = next(k for k, (kind, text) in enumerate(sources) if kind == "code" and text.startswith("style_studio("))
        network = next(k for k, (_, text) in enumerate(sources) if "vgg = nst.load_vgg19" in text)
        for k, (kind, _) in enumerate(sources[:panel]):
            if kind == "code" and (whole or k <= network):
                self.run(k)
        self.run(panel)
        self.button("Start").scroll_into_view_if_needed()
        return panel

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def state(self):
        return self.page.locator("[data-state]").get_attribute("data-state")

    def wait_for(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.page.locator("[data-state]").inner_text()
            time.sleep(0.03)

    @property
    def picture(self):
        """The address of the living picture in the browser, another one for every frame."""
        return self.page.locator("img[title='The living picture']").get_attribute("src")

    def pixels(self):
        return self.page.locator("img[title='The living picture']").screenshot()

    def losses(self):
        text = self.page.locator("[data-state]").inner_text()
        return {name: float(value) for name, value in re.findall(r"(loss|content|style) ([\d.e+-]+\d)", text)}

    def sees_change(self, frames=3, seconds=20):
        seen = set()
        self.wait_for(lambda: seen.add(self.picture) or len(seen) > frames, seconds)

    def screenshot(self, name):
        self.page.screenshot(path=ARTEFACTS / f"{name}.png")

    def still(self, name):
        """The panel alone, as the notebooks show it where there is no kernel."""
        path = ARTEFACTS / f"{name}.png"
        self.page.locator(".jp-OutputArea-output:has([data-state]) > .jupyter-widgets").first.screenshot(path=path)
        with Image.open(path) as file:
            file.convert("RGB").save(path.with_suffix(".jpg"), quality=85)


def test_style_transfer_from_start_to_a_closed_panel(browser, server):
    book = Notebook(browser, server, "3_style_transfer.ipynb")
    panel = book.open_panel(whole=True)
    assert book.state == "ready"

    book.button("Start").click()
    book.sees_change(5)
    assert book.state == "running"
    book.wait_for(lambda: book.losses()["loss"] < 20, 60)
    book.screenshot("running")
    book.still("panel_content_and_style")

    # More style weight: the style loss falls below where it would have gone.
    before = book.losses()
    handle = book.page.locator(".widget-hslider", has_text="style weight").locator(".noUi-handle")
    box = handle.bounding_box()
    book.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    book.page.mouse.down()
    book.page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=8)
    book.page.mouse.up()
    book.wait_for(lambda: book.losses()["loss"] > 1.5 * before["loss"], 10)
    book.wait_for(lambda: book.losses()["style"] < 0.8 * before["style"], 60)
    assert book.losses()["content"] > before["content"]
    book.screenshot("more_style")

    # The kernel answers while the panel runs.
    assert book.ask("print(6 * 7)") == "42"
    assert book.state == "running"
    book.button("Start").scroll_into_view_if_needed()

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
    book.wait_for(lambda: "saved" in book.page.locator("[data-state]").inner_text())
    (path,) = (server[2] / "saved").iterdir()
    with Image.open(path) as file:
        about = json.loads(file.text["settings"])
    assert about["style"] == "great_wave.jpg" and about["style_weight"] > 2e4

    # The difference map, and the keyboard.
    book.page.get_by_label("difference to").select_option("the start")
    book.button("Step").focus()
    book.page.keyboard.press("Enter")
    book.wait_for(lambda: book.page.locator("img[title='Difference map']").is_visible())
    handle.focus()
    weight = book.ask("import nst_widgets; print(nst_widgets._open[0].style_weight.value)")
    handle.focus()
    book.page.keyboard.press("ArrowLeft")
    assert float(book.ask("print(nst_widgets._open[0].style_weight.value)")) < float(weight)

    # Dark, and narrow.
    book.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    book.button("Start").scroll_into_view_if_needed()
    book.button("Start").click()
    book.sees_change()
    book.screenshot("dark")
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
    [("1_content_reconstruction", "content", 0.02), ("2_texture_synthesis", "style", 2.0)],
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
        before = book.losses()["style"]
        book.page.locator(".widget-hslider", has_text="style conv4_1").locator(".noUi-handle").press("PageUp")
        book.wait_for(lambda: book.losses()["style"] > before)
    book.sees_change()
    time.sleep(3)
    book.still(f"panel_{form}")
    book.page.close()
