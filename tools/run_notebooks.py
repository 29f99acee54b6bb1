"""Execute the notebooks and render reading copies to HTML; with --store, also save the outputs in the notebooks."""

import os
import re
import sys
from pathlib import Path

import nbformat
import zmq
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from tqdm import tqdm
from traitlets.config import Config

# Encrypt connections where zmq can: without that a kernel prints a warning.
CONFIG = Config(AsyncKernelManager={"transport_encryption": "auto"} if zmq.has("curve") else {})
ROOT = Path(__file__).resolve().parent.parent


def make_readable(notebook):
    """Remove regression tests, hidden tests and solution marks, and fold the model answers."""
    notebook.cells = [cell for cell in notebook.cells if not re.search("-check$|^as-stored$", cell.get("id", ""))]
    for cell in notebook.cells:
        source = re.sub("### BEGIN HIDDEN TESTS.*### END HIDDEN TESTS", "", cell.source, flags=re.DOTALL)
        cell.source = re.sub(" *### (BEGIN|END) SOLUTION\n?", "", source).rstrip()
        if cell.cell_type == "markdown" and cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = f"<details><summary>A model answer</summary>\n\n{cell.source}\n\n</details>"


names = [word for word in sys.argv[1:] if word != "--store"] or [""]  # only notebooks whose file name starts so
print(
    "Each notebook takes three to seven minutes on two cores with bfloat16, more than twice that without, "
    "and about one on a GPU."
)
os.environ["TQDM_DISABLE"] = "1"  # no bars inside the notebooks; the one below counts cells
sys.stdout.reconfigure(errors="backslashreplace")  # escape what the terminal cannot show
(ROOT / "rendered").mkdir(exist_ok=True)
for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    if not path.name.startswith(tuple(names)):
        continue
    notebook = nbformat.read(path, 4)
    count = sum(cell.cell_type == "code" for cell in notebook.cells)
    with tqdm(total=count, desc=path.name, unit="cell", disable=False) as bar:
        client = NotebookClient(
            notebook,
            timeout=1800,
            resources={"metadata": {"path": str(path.parent)}},
            store_widget_state=False,
            record_timing=False,
            config=CONFIG,
            on_cell_executed=lambda bar=bar, **_: bar.update(),
        )
        client.execute()
    if "--store" in sys.argv:
        notebook.metadata = nbformat.read(path, 4).metadata  # without the version of this Python
        nbformat.write(notebook, path)
    make_readable(notebook)
    page = ROOT / f"rendered/{path.stem}.html"
    page.write_text(HTMLExporter().from_notebook_node(notebook)[0], "utf-8")
    tqdm.write(f"To read: {page.relative_to(ROOT)}")
print(f"Open the .html files in {ROOT / 'rendered'}, or the notebooks themselves with: make lab")
