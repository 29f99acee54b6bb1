"""The notebooks as homework: which cell is a question, a test or an exercise, and how many points it gives."""

import re
from pathlib import Path
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NAME = "style-transfer"  # the assignment's, in nbgrader's folders and gradebook
CODE_BLANK = 'raise NotImplementedError("Replace this line with your code.")'
TEXT_BLANK = "*Replace this line with your answer.*"


def read_notebooks(folder):
    """{name: notebook} of the notebooks in a folder."""
    return {path.stem: nbformat.read(path, 4) for path in sorted(folder.glob("*.ipynb"))}


def about(cell):
    """nbgrader's metadata of a cell."""
    return cell.metadata.get("nbgrader", {})


def grade_id(cell):
    return about(cell).get("grade_id")


def points(cell):
    return about(cell).get("points", 0)


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def is_solution(cell):
    """Whether a student fills it in: a question, an exercise, or a function from an earlier notebook."""
    return about(cell).get("solution")


def is_test(cell):
    """Whether it is an autograded test."""
    return about(cell).get("grade") and not is_solution(cell)


def is_question(cell):
    """Whether it is filled in for points."""
    return is_solution(cell) and not grade_id(cell).startswith(("exercise-", "your-"))


class Question(NamedTuple):
    title: str  # of the notebook
    heading: str  # that it stands under
    name: str  # its grade_id
    by_hand: bool
    points: dict  # {grade_id: points} of the cells that it is graded by

    @property
    def most(self):
        return sum(self.points.values())


def questions(notebook):
    """The questions of a notebook, in its order."""
    title = heading = ""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)][-1]
            title = title or heading
        if is_question(cell):
            found.append(Question(title, heading, grade_id(cell), points(cell) > 0, {}))
        if points(cell):
            found[-1].points[grade_id(cell)] = points(cell)
    return found
