"""The map of the code: who imports whom, and that files and functions stay short. CONTRIBUTING.md draws it."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = [ROOT / f"nst_{name}.py" for name in ("utils", "controls", "widgets", "stylise")]
FILES = {path.stem: path for path in [*TOP, *ROOT.glob("nst_engine/*.py")]}
ENGINE = {name for name, path in FILES.items() if path.parent.name == "nst_engine"}


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(tree):
    """All words of the imports anywhere in a file: packages, modules and names."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found.update(*(name.split(".") for name in names))
    return found


IMPORTS = {name: imports(tree) & FILES.keys() - {"__init__"} for name, tree in TREES.items()}


def test_imports_run_one_way():
    assert ENGINE > {"losses", "network", "optimiser"}
    assert not {name: found - ENGINE for name, found in IMPORTS.items() if name in ENGINE and found - ENGINE}
    assert IMPORTS["nst_utils"] < ENGINE
    assert IMPORTS["nst_controls"] == {"nst_utils", "painter"}
    assert IMPORTS["nst_widgets"] == {"nst_utils", "nst_controls", "painter", "saved", "scales"}
    assert IMPORTS["nst_stylise"] == {"nst_utils", "run_file", "saved", "styles", "terminal"}
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # a CycleError names the circle


def test_only_the_run_brings_network_losses_and_optimiser_together():
    """It has the network's losses as an objective, of which the optimiser knows nothing."""

    def reach(name):
        return {name}.union(*(reach(other) for other in IMPORTS[name]))

    three = {"network", "losses", "optimiser"}
    assert {name for name in ENGINE if three <= reach(name)} == {"run", "painter"}
    assert IMPORTS["painter"] & {"run", *three} == {"run"}
    assert IMPORTS["run"] & {"objective", *three} == {"objective", "network", "optimiser"}
    assert reach("objective") & three == {"network", "losses"}
    for name in ("optimiser", "evaluation", "convergence", "scales", "tiles"):
        assert not reach(name) & {"network", "losses"}, name
    assert reach("losses") == {"losses"}
    assert {name for name in ENGINE if "network" in IMPORTS[name]} == {"run", "objective"}


def test_in_the_engine_the_notebook_is_known_to_figures_alone():
    assert {name for name in ENGINE if "IPython" in imports(TREES[name])} == {"figures"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_one_sitting(name):
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= {"nst_utils": 240, "nst_widgets": 450, "nst_stylise": 320}.get(name, 300)


def test_no_function_of_the_panel_is_long():
    functions = [
        node
        for node in [*ast.walk(TREES["nst_widgets"]), *ast.walk(TREES["nst_controls"])]
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) > 20
    assert not [node.name for node in functions if node.end_lineno - node.lineno + 1 > 50]


@pytest.mark.parametrize("name", sorted(ENGINE - {"__init__"}))
def test_the_maps_have_every_file(name):
    for page in (FILES["__init__"], ROOT / "CONTRIBUTING.md"):
        assert f"{name}.py" in page.read_text(encoding="utf-8"), page.name
