"""The stored notebooks are complete runs: nbval passes a cell that was never run without comparing anything."""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from small_notebooks import made_small

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["1_content_reconstruction", "2_texture_synthesis", "3_style_transfer"]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))

notebooks = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def test_all_notebooks_are_there():
    assert [path.stem for path in PATHS] == NAMES


@notebooks
def test_a_notebook_is_valid_and_light(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < 4_000_000


@notebooks
def test_every_cell_was_run_once_in_order(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts and counts == list(range(1, len(counts) + 1))
    assert not [cell.source for cell in code_cells(path) if cell.source.rstrip().endswith(";")]  # nbval ignores a `;`


@notebooks
def test_outputs_hold_no_path_of_a_machine(path):
    home = str(Path.home()).rstrip("/")
    machine = [re.escape(str(ROOT)), r"/(?:home|Users|root|tmp|work)/\w", r"\b[A-Z]:\\\w"]
    machine += [re.escape(home) + "/"] if home else []
    for output in outputs(path):
        texts = [output.get("text", ""), *map(str, (output.get("data") or {}).items())]
        for text in texts:
            if not text.startswith("('image/"):  # base64 holds every short string sooner or later
                found = re.search("|".join(machine), text)
                assert not found, f"{found.group()!r} in {text[:200]!r}"


@notebooks
def test_outputs_hold_neither_errors_nor_progress_bars(path):
    """A stored bar stands at 0 % for ever."""
    for output in outputs(path):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert "optimising" not in str(output.get("data", {}).get("text/plain"))


@notebooks
def test_figures_have_alternative_text(path):
    figures = 0
    for output in outputs(path):
        for kind in {"image/jpeg", "image/png", "image/svg+xml"} & (output.get("data") or {}).keys():
            assert output.metadata.get(kind, {}).get("alt", "").strip(), f"a figure of {path.name} has none"
            figures += 1
    assert figures > 0


@notebooks
def test_the_panel_leaves_a_still_where_there_is_no_kernel(path):
    (panel,) = (
        output for output in outputs(path) if "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    )
    assert len(panel.data["image/jpeg"]) > 20_000 and panel.data["text/plain"].startswith("The panel in use")


@notebooks
def test_the_package_brings_every_picture(path):
    """A notebook opened in Colab has the installed package alone."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = metadata["tool"]["setuptools"]["package-data"]["style_transfer.pictures"]
    sources = "\n".join(cell.source for cell in code_cells(path))
    named = re.findall(r"nst\.IMAGES((?: / \"[^\"]+\")+)", sources)
    names = ["/".join(re.findall(r"\"([^\"]+)\"", name)) for name in named if "." in name]
    assert names and not [name for name in names if not any(fnmatch(name, pattern) for pattern in shipped)]


def test_make_run_prints_nothing_odd(tmp_path):
    """Such as a kernel's warning about connections without encryption."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "tools").mkdir()
    small = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")])
    nbformat.write(small, tmp_path / "notebooks" / "small.ipynb")
    script = shutil.copy(ROOT / "tools" / "run_notebooks.py", tmp_path / "tools")
    command = [sys.executable, script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "rendered" in run.stdout and "small.ipynb: 100%" in run.stderr
    assert not re.search("warning", run.stdout + run.stderr, re.IGNORECASE)


CHANGES = {
    "1_content_reconstruction": [
        "LAYERS = ['conv1_2']",
        "LAYERS = ['conv1_2', 'conv2_1', 'relu3_1']",
        "LAYER = 'conv3_1'",
    ],
    "2_texture_synthesis": ["LAYER_SETS = {'block 1': ('conv1_1', 'conv1_2'), 'block 3': ('conv3_1', 'conv3_2')}"],
    "3_style_transfer": [
        "STYLE_WEIGHT = 5000.0",
        "CONTENT_WEIGHT = 5.0",
        "CONTENT_LAYERS = ('conv4_2',)",
        "STYLE_LAYERS = ('conv1_1', 'conv2_1', 'conv3_1', 'conv4_1', 'conv5_1')",
    ],
}


@pytest.mark.parameters
@pytest.mark.parametrize("name, change", [(name, change) for name in CHANGES for change in CHANGES[name]])
def test_a_changed_parameter_stops_no_cell(name, change):
    notebook = made_small(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4))
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    assert change.split()[0] in parameters.source
    parameters.source += f"\n{change}"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
