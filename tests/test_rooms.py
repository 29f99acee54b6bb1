"""The map of the code: who imports whom, and that the files stay short. CONTRIBUTING.md draws it."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path for path in [ROOT / "nst_utils.py", ROOT / "nst_widgets.py", *ROOT.glob("nst_engine/*.py")]}
ENGINE = {name for name, path in FILES.items() if path.parent.name == "nst_engine"}


def imports(path):
    """The project's own files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[-1] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[-1], *(alias.name for alias in node.names)}
    return found & FILES.keys() - {"__init__"}


IMPORTS = {name: imports(path) for name, path in FILES.items()}


def test_imports_run_one_way():
    assert ENGINE > {"losses", "network", "optimiser"}
    assert not {name: found - ENGINE for name, found in IMPORTS.items() if name in ENGINE and found - ENGINE}
    assert IMPORTS["nst_utils"] < ENGINE
    assert IMPORTS["nst_widgets"] == {"nst_utils"}
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # a CycleError names the circle


def test_only_the_preparation_brings_network_losses_and_optimiser_together():
    def reach(name):
        return {name}.union(*(reach(other) for other in IMPORTS[name]))

    assert not (reach("optimiser") | reach("evaluation") | reach("coarse_to_fine")) & {"network", "losses"}
    assert not reach("losses") & {"network", "optimiser"}
    assert {name for name in ENGINE if "network" in IMPORTS[name]} == {"preparation"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_in_one_sitting(name):
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= {"nst_utils": 320, "nst_widgets": 600}.get(name, 300)


@pytest.mark.parametrize("name", sorted(ENGINE - {"__init__"}))
def test_the_maps_have_every_file(name):
    for page in (FILES["__init__"], ROOT / "CONTRIBUTING.md"):
        assert f"{name}.py" in page.read_text(encoding="utf-8"), page.name
