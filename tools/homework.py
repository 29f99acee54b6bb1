"""What the notebooks are as homework: which cell is a question, a test or an exercise, and what it is worth."""

import re
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NAME = "style-transfer"  # the assignment's, in nbgrader's folders and gradebook
FORMULAS = ["gram_matrix", "content_loss", "style_loss", "make_objective"]  # blank in the released helper
CODE_BLANK = 'raise NotImplementedError("yours to write, in place of this line")'
TEXT_BLANK = "*Your answer, in place of this line.*"
HELPER_BLANK = 'raise NotImplementedError("yours to write: first in the notebook, then here")'


def read_notebooks(folder):
    """{name: notebook} of the notebooks in a folder."""
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))}


def grade_id(cell):
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def points(cell):
    return cell.metadata.get("nbgrader", {}).get("points", 0)


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def is_solution(cell):
    """Whether a student fills it in."""
    return cell.metadata.get("nbgrader", {}).get("solution", False)


def is_test(cell):
    """Whether a machine grades by it."""
    return cell.metadata.get("nbgrader", {}).get("grade", False) and not is_solution(cell)


def is_exercise(cell):
    """Whether it is filled in without points."""
    return is_solution(cell) and grade_id(cell).startswith("exercise-")


def is_question(cell):
    return is_solution(cell) and not is_exercise(cell)


def is_unpointed(cell):
    """Whether it is filled in on the way, such as a function from an earlier notebook, without points of its own."""
    return is_solution(cell) and grade_id(cell).startswith("your-")


class Question(NamedTuple):
    title: str  # of the notebook
    heading: str  # that it stands under
    name: str  # its grade_id
    by_hand: bool
    points: int
    tests: dict  # {grade_id: points} of the cells that test it


def questions(notebook):
    """The questions of a notebook, in its order, each with the points of its tests."""
    tests = [cell for cell in notebook.cells if is_test(cell)]
    title, _ = next(sections(notebook))
    found = []
    for heading, cell in sections(notebook):
        if is_question(cell) and not is_unpointed(cell):
            own = [test for test in tests if f"{grade_id(test)}-".startswith(f"test-{grade_id(cell)}-")]
            tests = [test for test in tests if test not in own]
            worth = points(cell) + sum(map(points, own))
            if not worth:
                raise ValueError(f"The question {grade_id(cell)} has no test: one is named test-{grade_id(cell)}.")
            by_test = {grade_id(test): points(test) for test in own}
            found.append(Question(title, heading, grade_id(cell), points(cell) > 0, worth, by_test))
    if tests:
        raise ValueError(f"To no question belong these tests: {', '.join(map(grade_id, tests))}.")
    return found


def sections(notebook):
    """(The heading that it stands under, cell) of every cell."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)][-1]
        yield heading, cell
