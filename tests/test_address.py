"""The address stands in pyproject.toml, the version in style_transfer; all that names them agrees with it."""

import ast
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
from address import NOTEBOOKS, ROOT, citation, first_cell, known, readme, set_address

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README, CITATION = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CITATION.cff"))
GITHUB = "https://github.com/someone/style.transfer"
IN_COLAB = {"torch", "torchvision", "numpy", "pillow", "matplotlib", "ipython", "ipywidgets"}


def test_all_that_names_them_agrees():
    assert (readme(README, *known(PYPROJECT)), citation(CITATION, *known(PYPROJECT))) == (README, CITATION)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_the_same_cell(path):
    cells = nbformat.read(path, as_version=4).cells
    first = next(k for k, cell in enumerate(cells) if cell.cell_type == "code")
    assert first == 1 and cells[first].source == first_cell(*known(PYPROJECT)) and not cells[first].outputs
    assert len(cells[first].source.splitlines()) <= 10


def test_the_cell_fetches_what_the_code_needs_but_nothing_that_colab_has():
    needs = {re.match(r"[\w-]+", text)[0] for text in tomllib.loads(PYPROJECT)["project"]["dependencies"]}
    names = re.search(r"for name in (\(.*?\))", first_cell("", "1"))[1]
    assert {*ast.literal_eval(names)} == needs - IN_COLAB and needs > IN_COLAB


def test_where_the_helper_is_installed_the_cell_does_nothing_and_elsewhere_it_asks_for_an_address(tmp_path):
    """-I: an installed helper is found as long as it is on the path that is given."""
    cell = f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]\n"
    cell += "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"

    def run(*path):
        source = f"{cell}sys.path += {[*path]}\n" + first_cell("", "1.1.0")
        return subprocess.run(
            [sys.executable, "-m", "IPython", "-c", source], cwd=tmp_path, capture_output=True, text=True
        )

    done = run(str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run()
    assert done.returncode != 0 and "nst_utils is not installed: set ADDRESS above" in done.stdout + done.stderr


def test_an_address_is_set_and_changed():
    once = set_address(PYPROJECT, GITHUB)
    assert known(once) == (GITHUB, known(PYPROJECT)[1]) and tomllib.loads(once)["project"]["scripts"]
    assert set_address(set_address(PYPROJECT, "https://example.org/one.git/"), f"{GITHUB}.git") == once
    assert known(set_address(PYPROJECT, "https://example.org/one.git/"))[0] == "https://example.org/one"
    for wrong in ("github.com/a/b", "", 'https://a"b', "git@github.com:a/b", "https://a b"):
        with pytest.raises(SystemExit, match="give that of a git repository, https://"):
            set_address(PYPROJECT, wrong)


def test_badges_and_citation_have_address_and_version():
    text = readme(README, GITHUB, "2.3.4")
    for path in NOTEBOOKS:
        opened = f"https://colab.research.google.com/github/someone/style.transfer/blob/v2.3.4/notebooks/{path.name}"
        assert text.count(f"(notebooks/{path.name}) [![Open in Colab](") == text.count(f"({opened})") == 1
    assert f"git clone {GITHUB} " in text and len(text.split()) <= 800
    assert readme(text, GITHUB, "2.3.4") == text
    elsewhere = readme(text, "https://example.org/one", "2.3.4")
    assert "Open in Colab" not in elsewhere and "git clone https://example.org/one " in elsewhere
    assert readme(elsewhere, "", "2.3.4") == readme(README, "", "2.3.4")
    cited = citation(CITATION, GITHUB, "2.3.4")
    assert f'version: 2.3.4\nrepository-code: "{GITHUB}"\n' in cited and citation(cited, GITHUB, "2.3.4") == cited
    assert citation(cited, "", known(PYPROJECT)[1]) == citation(CITATION, "", known(PYPROJECT)[1])


def test_the_cell_has_address_and_tag():
    cell = first_cell(GITHUB, "2.3.4")
    assert f'ADDRESS, TAG = "{GITHUB}", "v2.3.4"' in cell
    assert {*re.findall(r"ADDRESS|TAG", cell.partition("%pip")[2])} == {"ADDRESS", "TAG"}


def test_the_changes_begin_with_this_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+?),? ", changes, flags=re.MULTILINE)[1] == known(PYPROJECT)[1]
