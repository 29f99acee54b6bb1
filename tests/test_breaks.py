"""tools/break_it.py takes an hour and is run by hand; that each of its breaks still finds its line is checked here."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORMULAS = runpy.run_path(str(ROOT / "tools" / "break_it.py"))["FORMULAS"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_break_changes_one_line_and_leaves_python(name):
    path, code, broken = FORMULAS[name]
    source = (ROOT / path).read_text(encoding="utf-8")
    assert source.count(code) == 1 and code != broken
    compile(source.replace(code, broken), path, "exec")
