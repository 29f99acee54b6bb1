"""Five broken formulas, each noticed by a unit test and by a cell of a notebook.

Each formula is broken in a copy of the project, in the helper and in the engine's fast form; the function and the
expression are found by syntax. `pytest -m breaks -rP` takes some minutes and prints what noticed each break.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from small_notebooks import made_small

ROOT = Path(__file__).resolve().parents[1]
COPIED = "nst_utils.py conftest.py pyproject.toml style_transfer tests tools notebooks images".split()
HELPER = "nst_utils.py"
OBJECTIVE, LOSSES, IMAGES = (f"style_transfer/engine/{name}.py" for name in ("objective", "losses", "images"))
CONTENT, TEXTURE, TRANSFER = "1_content_reconstruction", "2_texture_synthesis", "3_style_transfer"


# --- Changes of one expression: a node of a syntax tree -> the node that replaces it --------------


def without_division(numerator):
    """Leave out a division whose numerator contains this name."""

    def change(node):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            names = {part.id for part in ast.walk(node.left) if isinstance(part, ast.Name)}
            return node.left if numerator in names else node
        return node

    return change


def summed(node):
    """Sum where there is a mean."""
    return ast.Attribute(node.value, "sum") if isinstance(node, ast.Attribute) and node.attr == "mean" else node


def signed(node):
    """Leave out the absolute value."""
    is_abs = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "abs"
    return node.func.value if is_abs else node


def exchanged(expressions):
    """Put one expression for another: {expression: its replacement}."""

    def change(node):
        found = expressions.get(ast.unparse(node)) if isinstance(node, ast.Name | ast.Attribute) else None
        return ast.parse(found, mode="eval").body if found else node

    return change


WEIGHTS = exchanged({"content_weight": "style_weight", "style_weight": "content_weight"})
FAST_WEIGHTS = exchanged({"weights.content": "weights.style", "weights.style": "weights.content"})
IMAGE_OF_EACH = exchanged({"content": "style", "style": "content"})
FAST_IMAGE_OF_EACH = exchanged(
    {"self.content": "(self.styles or [Style(self.content)])[0].image", "style.image": "self.reference"}
)

# {what is broken: (file, function, change, file of unit tests, notebook)}
BREAKS = {
    "Gram matrix not divided": (HELPER, "gram_matrix", without_division("rows"), "test_losses", TEXTURE),
    "fast Gram matrix not divided": (OBJECTIVE, "statistics", without_division("gram_sum"), "test_losses", TEXTURE),
    "content loss summed": (HELPER, "content_loss", summed, "test_losses", CONTENT),
    "fast content loss summed": (OBJECTIVE, "statistics", without_division("square_sum"), "test_losses", CONTENT),
    "weights swapped": (HELPER, "make_objective", WEIGHTS, "test_losses", TRANSFER),
    "fast weights swapped": (LOSSES, "losses_from", FAST_WEIGHTS, "test_losses", TRANSFER),
    "targets exchanged": (HELPER, "make_objective", IMAGE_OF_EACH, "test_losses", TRANSFER),
    "fast targets exchanged": (OBJECTIVE, "at_scale", FAST_IMAGE_OF_EACH, "test_losses", TRANSFER),
    "difference map signed": (IMAGES, "difference_map", signed, "test_images", CONTENT),
}


class Changer(ast.NodeTransformer):
    def __init__(self, change):
        self.change = change

    def generic_visit(self, node):
        return self.change(super().generic_visit(node))


def broken(source, function, change):
    """The source with its one function of that name changed."""
    tree = ast.parse(source)
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)
    before = ast.unparse(found)
    found.body = [Changer(change).visit(statement) for statement in found.body]
    ast.fix_missing_locations(tree)
    assert ast.unparse(found) != before, f"{function} has nothing to break"
    return ast.unparse(tree)


def copy_of_project(folder):
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


def environment_of(folder):
    """For a process that imports the copy and not the installed package."""
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def first_failing_test(folder, file):
    """The first test of a file that fails in a copy, or None."""
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", f"tests/{file}.py"]
    done = subprocess.run(command, cwd=folder, env=environment_of(folder), capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert done.returncode == len(failed) <= 1, done.stdout + done.stderr
    return failed[0] if failed else None


def first_failing_cell(folder, name):
    """(number, source) of the first cell of a notebook, executed small, that raises an error in a copy, or None."""
    notebook = made_small(nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4))
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    client = NotebookClient(notebook, timeout=1800, startup_timeout=600, resources=resources)
    try:
        client.execute(env=environment_of(folder))
    except CellExecutionError:
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        return next((number, cell.source) for number, cell in enumerate(cells) if has_error(cell))
    return None


def has_error(cell):
    return any(output.output_type == "error" for output in cell.outputs)


@pytest.mark.breaks
@pytest.mark.parametrize("name", [CONTENT, TEXTURE, TRANSFER])
def test_a_small_notebook_runs_where_nothing_is_broken(name, tmp_path):
    assert first_failing_cell(copy_of_project(tmp_path), name) is None


@pytest.mark.breaks
@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_noticed_by_a_unit_test_and_by_a_notebook_cell(name, tmp_path):
    path, function, change, tests, notebook = BREAKS[name]
    copy = copy_of_project(tmp_path)
    source = (copy / path).read_text(encoding="utf-8")
    (copy / path).write_text(broken(source, function, change), encoding="utf-8")
    test = first_failing_test(copy, tests)
    cell = first_failing_cell(copy, notebook)
    assert test and cell, f"noticed by {test} and {cell}"
    print(f"{name}: {test}; {notebook}, code cell {cell[0]}:\n{cell[1]}")
