"""Imports run one way: panel, program and helper import the engine, and the engine imports none of them."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.relative_to(ROOT): path for path in [ROOT / "nst_utils.py", *ROOT.glob("style_transfer/**/*.py")]}


def imported(path):
    """The project's files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else node.module
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        files = (Path(*name.split(".")) for name in names)
        found |= {file for name in files for file in (name.with_suffix(".py"), name / "__init__.py") if file in FILES}
    return found


def test_imports_run_one_way():
    imports = {name: imported(path) for name, path in FILES.items()}
    package = Path("style_transfer")
    base = {package / "__init__.py", package / "machine.py"}
    engine = {name for name in imports if name.parts[:2] == ("style_transfer", "engine")}
    assert len(engine) > 10 and imports[package / "engine" / "run.py"] & engine
    assert imports[package / "panel" / "studio.py"] & engine
    assert not {name: imports[name] - engine - base for name in engine if imports[name] - engine - base}
    assert imports[Path("nst_utils.py")] <= engine | base and not imports[package / "machine.py"]
    order = {name: found - {name, name.parent / "__init__.py"} for name, found in imports.items()}
    list(graphlib.TopologicalSorter(order).static_order())  # a CycleError names the circle
