"""What `make grade` makes of files, before a notebook is run: who handed in what, and what is run of it."""

import copy
import html
import zipfile
from pathlib import Path

import grade
import nbformat
import pytest
from homework import ROOT, grade_id, is_test, questions, read_notebooks

SOURCES = read_notebooks(ROOT / "notebooks")
ONE, TWO, THREE = SOURCES


@pytest.mark.parametrize(
    "path, student, late, number",
    [
        (f"muellerhans_12345_67890_{ONE}-2.ipynb", "muellerhans", False, 2),
        (f"muellerhans_LATE_12345_67890_{ONE}.ipynb", "muellerhans", True, 0),
        (f"Hans Müller_77_assignsubmission_file_/{ONE}.ipynb", "Hans Müller", False, 0),
        (f"submitted/hans/style-transfer/{ONE}.ipynb", "hans", False, 0),
        (f"week 7/hans/assignment/notebooks/{ONE}.ipynb", "hans", False, 0),
        (f"{ONE}_hans.ipynb", "hans", False, 0),
        (f"hans {ONE} (1).ipynb", "hans", False, 0),
        ("my homework.ipynb", "my homework", False, 0),
    ],
)
def test_the_student_is_in_the_names(tmp_path, path, student, late, number):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(SOURCES[ONE], tmp_path / path)
    (found,), remarks = grade.find_submissions([tmp_path], SOURCES)
    assert (found.student, found.name, found.late, found.number) == (student, ONE, late, number) and not remarks


def test_a_notebook_is_recognised_by_its_ids_where_a_platform_drops_the_rest(tmp_path):
    bare = copy.deepcopy(SOURCES[TWO])
    for cell in bare.cells:
        cell.metadata = nbformat.from_dict({})
    nbformat.write(bare, tmp_path / "hans.ipynb")
    ((found,), _) = grade.find_submissions([tmp_path], SOURCES)
    assert found.name == TWO


def test_what_is_no_submission_is_named(tmp_path):
    (tmp_path / "broken.ipynb").write_text("{")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), tmp_path / "other.ipynb")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    nbformat.write(SOURCES[ONE], tmp_path / ".ipynb_checkpoints" / f"{ONE}-checkpoint.ipynb")
    (tmp_path / "odd.zip").write_bytes(b"no zip")
    folders, opened = grade.unpacked(tmp_path, tmp_path / "new")
    found, remarks = grade.find_submissions(folders, SOURCES)
    assert not found and len(remarks) == 2 and len(opened) == 1
    assert (
        "broken.ipynb cannot be read" in remarks[0] and "other.ipynb has none" in remarks[1] and "odd.zip" in opened[0]
    )


def test_a_zip_of_zips_is_opened(tmp_path):
    nbformat.write(SOURCES[THREE], tmp_path / f"{THREE}.ipynb")
    inner, outer = tmp_path / "annab_12_34_work.zip", tmp_path / "all.zip"
    with zipfile.ZipFile(inner, "w") as archive:
        archive.write(tmp_path / f"{THREE}.ipynb", f"assignment/notebooks/{THREE}.ipynb")
    with zipfile.ZipFile(outer, "w") as archive:
        archive.write(inner, inner.name)
        archive.write(tmp_path / f"{THREE}.ipynb", f"carl/{THREE}.ipynb")
    folders, remarks = grade.unpacked(outer, tmp_path / "new")
    found, _ = grade.find_submissions(folders, SOURCES)
    assert sorted(one.student for one in found) == ["annab", "carl"] and not remarks


def test_of_several_the_newest_counts():
    several = [grade.Submission("anna", ONE, Path(__file__), False, number) for number in (1, 3, 2)]
    chosen, remarks = grade.newest(several)
    assert chosen["anna"][ONE].number == 3 and len(remarks) == 2


def submitted(name):
    """A student's notebook: our source without the hidden tests."""
    notebook = read_notebooks(ROOT / "notebooks")[name]
    for cell in notebook.cells:
        cell.source = cell.source.partition("### BEGIN HIDDEN TESTS")[0]
    return notebook


def test_parameters_and_tests_are_put_back():
    notebook = submitted(ONE)
    for cell in notebook.cells:
        if is_test(cell):
            cell.source = "assert True"
        if cell.id == "parameters":
            cell.source = "import colorsys\nSIZE = 5000"
    cells = grade.prepared(ONE, SOURCES[ONE], notebook).cells
    run = {cell.id: cell.source for cell in cells}
    assert [cell.source for cell in cells].index("import colorsys\nSIZE = 5000") == list(run).index("parameters") - 1
    assert "SIZE = 5000" not in run["parameters"] and "SIZE = 48" in run["parameters"]
    tests = [cell for cell in SOURCES[ONE].cells if is_test(cell)]
    assert all(cell.source in run[cell.id] and run[cell.id].startswith("guard.before()") for cell in tests)


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_run_ends_with_the_last_test(name):
    cells = grade.prepared(name, SOURCES[name], submitted(name)).cells
    assert is_test(cells[-1]) and sum(map(is_test, cells)) == sum(map(is_test, SOURCES[name].cells))
    assert cells[0].source.endswith("guard.begin()")


def test_a_deleted_cell_comes_back_in_its_place():
    notebook = submitted(TWO)
    whole = [cell.id for cell in notebook.cells if cell.cell_type == "code" and cell.id != "set-up"]
    whole = whole[: whole.index("test-style-gradient") + 1]
    notebook.cells = [cell for cell in notebook.cells if not is_test(cell) and cell.id != "parameters"]
    assert [cell.id for cell in grade.prepared(TWO, SOURCES[TWO], notebook).cells[1:]] == whole


def test_a_word_moves_the_hidden_seeds_only():
    source = "manual_seed(1)\n### BEGIN HIDDEN TESTS\nmanual_seed(2)\nmanual_seed(size)"
    moved = "manual_seed(1)\n### BEGIN HIDDEN TESTS\nmanual_seed(70 + 2)\nmanual_seed(70 + size)"
    assert grade.with_other_numbers(source, 70) == moved


def asked():
    return [question for source in SOURCES.values() for question in questions(source)]


def test_points_and_feedback(tmp_path):
    verdicts = {
        "test-content-loss": grade.Verdict(True, ""),
        "test-descent": grade.Verdict(False, grade.explained("AssertionError", "nothing <moved>\nmore")),
    }
    graded = grade.Graded("Ann/a", True, {name: submitted(name) for name in SOURCES}, verdicts)
    grade.write_all(tmp_path / "grades", [graded], asked(), ["Ann/a: late"])
    header, row = (tmp_path / "grades" / "grades.csv").read_text(encoding="utf-8-sig").splitlines()
    points = dict(zip(header.split(","), row.split(",")))
    assert points["content-loss"] == "2" and points["descent"] == "0" and points["which-layers"] == ""
    assert points["by machine"] == "2" and points["late"] == "late"
    page = (tmp_path / "grades" / "feedback" / "Ann_a.html").read_text(encoding="utf-8")
    assert "nothing &lt;moved&gt;" in page and "48 dB" in page and "not handed in" in page
    for question in filter(lambda question: question.by_hand, asked()):
        (answer,) = (
            cell.source for source in SOURCES.values() for cell in source.cells if grade_id(cell) == question.name
        )
        assert html.escape(answer) in page
    tests = [cell.source.partition("### BEGIN HIDDEN TESTS")[2] for source in SOURCES.values() for cell in source.cells]
    hidden = [line.strip() for test in tests for line in test.splitlines() if "assert" in line]
    assert hidden and not [line for line in hidden if line in page]


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("NotImplementedError", "yours to write", "left blank"),
        ("AssertionError", "", "other numbers than the example"),
        ("KeyboardInterrupt", "", "stopped after 60 seconds"),
        ("TypeError", "unsupported operand type(s) for -: 'dict' and 'dict'", "a dictionary stands where"),
        ("RuntimeError", "Trying to backward through the graph a second time (or", "in place"),
        ("NameError", "name 'x' is not defined", "NameError: name 'x' is not defined"),
    ],
)
def test_an_error_gets_a_sentence(name, value, words):
    assert words in grade.explained(name, value)
