"""Try the project in an environment as someone would who has only that: tools/try_environment.py PYTHON ...

PYTHON: the interpreter of an environment with torch and ipykernel. The project and what it lacks are installed there;
the versions in COLUMNS must not change. In a folder outside the clone, it pip-installs a clone, runs the program, whole
and in tiles, and the three notebooks, small, set up by their first cell, and drives the panel. Prints a row for
environments/README.md.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from address import NOTEBOOKS, ROOT, first_cell
from nbclient import NotebookClient
from small_notebooks import made_small
from tqdm import tqdm

import style_transfer

COLUMNS = "torch torchvision numpy pillow matplotlib ipywidgets ipython ipykernel".split()
STYLISE = ["-m", "style_transfer.stylise"]
VERSIONS = """
import importlib.metadata, json, platform
found = {name: importlib.metadata.version(name) for name in %r}
print(json.dumps({"Python": platform.python_version()} | found))
"""
PANEL = """
import asyncio, datetime
from pathlib import Path
import nst_utils as nst
from style_transfer.panel import controls
from style_transfer.panel.studio import style_studio

async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)
        panel.display.seen.value = panel.display.sent.value  # as the browser does

files = [nst.IMAGES / "content" / "chenonceau.jpg", nst.IMAGES / "style" / "starry_night.jpg"]
for pull in (False, True):
    panel = style_studio(*files, size=64, pull=pull)
    panel.buttons["Start"].click()
    await until(lambda: panel.shown and panel.shown.evaluations > 3)
    panel.buttons["Pause"].click()
    assert panel.state == "paused"
    panel.buttons["Save"].click()
    content = (nst.IMAGES / "style" / "great_wave.jpg").read_bytes()
    now = datetime.datetime.now(datetime.UTC)
    about = {"name": "wave.jpg", "type": "", "size": 1, "lastModified": 0}
    seven = {"wave.jpg": {"metadata": about, "content": content}}
    eight = ({"name": "wave.jpg", "type": "", "size": 1, "content": memoryview(content), "last_modified": now},)
    assert controls.uploaded_files(seven) == controls.uploaded_files(eight) == [("wave.jpg", content)]
    uploader = panel.controls.uploaders["style"]
    uploader.set_trait("value", seven if isinstance(uploader.value, dict) else eight)
    assert panel.controls.choices["style"].value.name == "wave.jpg", panel.display.status.value
    panel.buttons["Step"].click()
    await until(lambda: panel.state == "paused")
    assert [path.name for path in panel.shown.settings.styles] == ["wave.jpg"]
    panel.close()
    await asyncio.sleep(0.2)
    assert panel.state == "closed"
assert len([*Path("saved").glob("*.png")]) == 2
"""


def attempt(python, home):
    """Try all of it; returns {package: version}. Raises where something fails."""
    folder, clone = home / "empty földer", home / "clone.git"
    folder.mkdir()
    address, version = clone.as_uri(), style_transfer.__version__
    subprocess.run(["git", "clone", "--quiet", "--bare", ROOT, clone], check=True)
    subprocess.run(["git", "-C", clone, "tag", "--force", f"v{version}"], check=True, stdout=subprocess.DEVNULL)

    def run(*words):
        done = subprocess.run([python, *words], cwd=folder, text=True, capture_output=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def versions():
        return json.loads(run("-c", VERSIONS % COLUMNS))

    before = versions()
    run("-m", "pip", "install", "--quiet", f"git+{address}@v{version}")
    assert versions() == before, f"pip has changed {before} to {versions()}"
    pair = ROOT / "images/content/chenonceau.jpg", ROOT / "images/style/starry_night.jpg"
    whole = run(*STYLISE, *pair, *"--size 64 --evaluations 10 -o whole.png".split())
    tiles = run(*STYLISE, *pair, *"--size 512 --evaluations 2 --memory 1.4 -o tiles.png".split())
    assert " whole," in whole and re.search(r"in \d+ tiles", tiles), whole + tiles
    run(*STYLISE, "--like", "whole.png", *pair, "-o", "again.png")
    assert (folder / "again.png").read_bytes() == (folder / "whole.png").read_bytes()
    run("-m", "pip", "uninstall", "--quiet", "--yes", "neural-style-transfer-notebooks")

    run("-m", "ipykernel", "install", "--prefix", home, "--name", "tried")
    os.environ |= {"JUPYTER_PATH": str(home / "share/jupyter"), "TQDM_DISABLE": "1"}
    notebooks = []
    for path in NOTEBOOKS:
        notebook = made_small(nbformat.read(path, 4))
        next(cell for cell in notebook.cells if cell.cell_type == "code").source = first_cell(address, version)
        notebooks.append(notebook)
    for notebook in [*notebooks, nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PANEL)])]:
        about = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=1800, kernel_name="tried", resources=about).execute()
    assert versions() == before, f"the first cell has changed {before} to {versions()}"
    return before


def main():
    for python in sys.argv[1:]:
        with tempfile.TemporaryDirectory(prefix="tried-") as home:
            found = attempt(Path(python).absolute(), Path(home))
            tqdm.write(f"| {' | '.join(found.values())} | all passed |")


if __name__ == "__main__":
    main()
