"""Drives the panel in a real JupyterLab with a real Chromium."""

import contextlib
import io
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
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
ARTEFACTS = ROOT / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
OPTIONS += " --disable-component-update --disable-sync"
PICTURE = ".studio-picture img"


class Server(NamedTuple):
    address: str
    token: str
    folder: Path  # a copy of the notebooks


@contextlib.contextmanager
def jupyterlab(home):
    """A JupyterLab on the loopback address with a token and directories of its own, under `home`."""
    folder = home / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".*", "saved"))
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = os.environ | {"HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        environment[name] = str(home / name.lower())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"]
    # The limit of a message, as `make lab` has it.
    command += [re.search(r"(--ServerApp.tornado_settings)='(.*)'", (ROOT / "Makefile").read_text()).expand(r"\1=\2")]
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
        yield Server(address, token, folder)
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def chromium():
    ARTEFACTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield browser
        browser.close()


class Notebook:
    """A notebook open in JupyterLab."""

    def __init__(self, browser, server, name):
        self.asking = None  # the place of the cell that `ask` runs
        self.page = browser.new_page(viewport={"width": 1180, "height": 1400})
        self.page.set_default_timeout(120_000)  # only a page that hangs takes so long, on the slowest machine
        self.page.goto(f"{server.address}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={server.token}")
        self.page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        self.page.evaluate("jupyterapp.commands.execute('application:set-mode', {mode: 'single-document'})")
        if self.page.locator(".jp-SideBar .lm-mod-current").count():
            self.toggle_files()

    def toggle_files(self):
        """Open or close the file browser."""
        self.page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")

    def sources(self):
        return self.page.evaluate(
            "jupyterapp.shell.currentWidget.content.widgets.map(c => [c.model.type, c.model.sharedModel.source])"
        )

    def set_source(self, index, code):
        self.page.evaluate(
            "([i, code]) => { jupyterapp.shell.currentWidget.content.widgets[i].model.sharedModel.source = code; }",
            [index, code],
        )

    def run(self, index, seconds=400):
        """Run a cell and return its text outputs."""
        self.page.evaluate(
            """index => { const notebook = jupyterapp.shell.currentWidget.content; notebook.activeCellIndex = index;
                notebook.widgets[index].model.clearExecution();
                notebook.deselectAll(); void jupyterapp.commands.execute('notebook:run-cell'); }""",
            index,
        )
        self.page.wait_for_function(
            """index => { const { model } = jupyterapp.shell.currentWidget.content.widgets[index];
                return model.executionState === 'idle' && model.executionCount !== null; }""",
            arg=index,
            timeout=1000 * seconds,
        )
        outputs = self.page.evaluate(
            "index => jupyterapp.shell.currentWidget.content.widgets[index].model.sharedModel.outputs", index
        )
        assert not [output for output in outputs if output["output_type"] == "error"], outputs
        return "".join("".join(output.get("text", "")) for output in outputs)

    def ask(self, code):
        """Run `code` in a last cell of its own, where `panel` is the open panel; return what it prints."""
        if self.asking is None:
            self.asking = len(self.sources())
            self.page.evaluate(
                """index => jupyterapp.shell.currentWidget.content.model.sharedModel.insertCell(
                    index, {cell_type: 'code', source: ''})""",
                self.asking,
            )
        self.set_source(self.asking, f"from style_transfer.panel.studio import Studio\npanel = Studio.current\n{code}")
        answer = self.run(self.asking, 120).strip()
        self.show_panel()
        return answer

    def open_panel(self, size=256):
        """Run the cells up to the network, and the panel's; size: of its image."""
        sources = self.sources()
        self.panel = next(k for k, (kind, text) in enumerate(sources) if kind == "code" and "style_studio(" in text)
        network = next(k for k, (_, text) in enumerate(sources) if "vgg = nst.load_vgg19" in text)
        for k, (kind, text) in enumerate(sources[: network + 1]):
            if kind == "code":
                self.set_source(k, re.sub(r"(?m)^SIZE = \d+", f"SIZE = {size}", text))
                self.run(k)
        self.run(self.panel)
        self.show_panel()

    def show_panel(self):
        """Scroll to the panel's cell, since JupyterLab draws only what is near the window."""
        self.page.evaluate("i => jupyterapp.shell.currentWidget.content.scrollToItem(i, 'start')", self.panel)
        self.page.wait_for_timeout(500)

    def button(self, name):
        # Not by its role's name, in which Chromium counts the icon's glyph.
        return self.page.locator("button.widget-button", has_text=re.compile(f"^{name}$"))

    @property
    def state(self):
        return self.page.locator("[data-state]").get_attribute("data-state")

    @property
    def status(self):
        return self.page.locator("[data-state]").text_content()

    def wait_for(self, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.status
            time.sleep(0.03)

    def step(self):
        """Press Step and wait for its evaluation."""
        before = self.status
        self.button("Step").click()
        # One reading of the page, since between two the panel may go from paused to running.
        self.wait_for(lambda: (now := self.status).startswith("Paused.") and now != before)

    def pixels(self):
        return self.page.locator(PICTURE).screenshot()

    def losses(self):
        text = self.status
        return {name: float(value) for name, value in re.findall(r"(loss|content|style) ([\d.e+-]+\d)", text)}

    @property
    def difference(self):
        """The mean of the difference map, as its caption says."""
        return float(self.page.get_by_text("difference map, mean").text_content().split()[-1])

    def upload(self, kind, path):
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_title(f"Upload an image as {kind}", exact=True).click()
        chooser.value.set_files(path)

    def slider(self, name):
        """The handle of a slider, to be dragged or moved with the arrow keys."""
        return self.page.locator(".widget-hslider", has_text=name).locator(".noUi-handle")

    def count_frames(self):
        """Begin to count the frames that the browser is given."""
        self.page.locator(PICTURE).evaluate(
            """image => { window.counted = 0; window.counter?.disconnect();
                window.counter = new MutationObserver(() => window.counted++);
                window.counter.observe(image, {attributes: true, attributeFilter: ['src']}); }"""
        )

    def frames(self):
        return self.page.evaluate("window.counted")

    def finish(self, seconds=3600):
        """Wait until the panel has finished with the settings that its controls show."""
        end = time.monotonic() + seconds
        ask = "import asyncio; await asyncio.sleep(0)\n"
        ask += "print(panel.state == 'done' and panel.shown.settings == panel.controls.settings(), panel.state)"
        # The kernel answers only after it has heard of the last control, and has done what that asked the loop for.
        while not (answer := self.ask(ask)).startswith("True"):
            assert answer.split()[1] in ("running", "done"), answer
            assert time.monotonic() < end, answer
            time.sleep(0.5)
        self.wait_for(lambda: self.state == "done")

    def screenshot(self, name):
        self.page.screenshot(path=ARTEFACTS / f"{name}.png")

    def picture(self):
        """The panel alone, as an image of Pillow's."""
        return Image.open(io.BytesIO(self.page.locator(".style-studio").screenshot())).convert("RGB")

    def still(self, name):
        """The panel under a banner, as the notebooks show it where there is no kernel."""
        image = ImageOps.expand(self.picture(), (0, 64, 0, 0), "#e8eef7")
        font = ImageFont.load_default(26)
        place = image.width / 2, 32
        ImageDraw.Draw(image).text(place, "A still. Run this cell to start the panel.", "black", font, "mm")
        image.save(ARTEFACTS / f"{name}.jpg", quality=70, optimize=True, progressive=True)

    def film(self, name, moves, width=640):
        """A film of the panel: an image after each of the `moves`, functions, and the last is held."""
        images = []
        for move in moves:
            move()
            image = self.picture()
            images.append(image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS))
        palette = images[-1].quantize(128)  # one for all, or colours that stay would change
        images = [image.resize(images[0].size).quantize(palette=palette, dither=0) for image in images]
        times = [250] * (len(images) - 1) + [2000]
        path = ARTEFACTS / f"{name}.gif"
        images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)
