"""Write the students' release of the three notebooks, with its handout, into assignment/.

Needs nbgrader, so it runs in nbgrader's own environment. nbgrader works in a course folder, which here is temporary.
"""

import ast
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import nbformat
import zmq
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
NAME = "style-transfer"  # the assignment's, in nbgrader's folders and gradebook
COPIED = ["nst_engine", "nst_controls.py", "nst_widgets.py", "nst_stylise.py", "tools/stylise.py", "images"]
COPIED += ["requirements.txt", "pyproject.toml", "LICENSE"]
FORMULAS = ["gram_matrix", "content_loss", "style_loss", "make_objective"]
CODE_BLANK = 'raise NotImplementedError("yours to write, in place of this line")'
TEXT_BLANK = "*Your answer, in place of this line.*"
HELPER_BLANK = 'raise NotImplementedError("yours to write: first in the notebook, then here")'
READING = 25  # minutes for the rest of a notebook
MINUTES = {
    "content-loss": 10,
    "descent": 25,
    "difference": 15,
    "which-layers": 20,
    "gram-matrix": 20,
    "style-loss": 15,
    "style-layers": 20,
    "textures-differ": 20,
    "formulas": 5,
    "objective": 25,
    "noise-or-photograph": 20,
}

# nbgrader starts alembic by its name alone.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def read_notebooks(folder):
    """{name: notebook} of the notebooks in a folder."""
    return {path.stem: nbformat.read(path, as_version=4) for path in sorted(folder.glob("*.ipynb"))}


# --- What a cell is to nbgrader ------------------------------------------------------------------


def grade_id(cell):
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def points(cell):
    return cell.metadata.get("nbgrader", {}).get("points", 0)


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


def is_copied(cell):
    """Whether it is a function that the student has written in an earlier notebook."""
    return is_solution(cell) and grade_id(cell).startswith("your-")


# --- The release ---------------------------------------------------------------------------------


def open_course(folder):
    """nbgrader's course in a folder, with our notebooks as its source."""
    source = folder / "source" / NAME
    source.mkdir(parents=True)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, source)
    config = Config()
    config.CourseDirectory.root = str(folder)
    config.NbGraderAPI.log_level = "ERROR"
    config.ClearSolutions.code_stub = {"python": CODE_BLANK}
    config.ClearSolutions.text_stub = TEXT_BLANK
    config.Execute.timeout = 1800
    if zmq.has("curve"):  # encrypted connections: without them a kernel prints a warning
        config.AsyncKernelManager.transport_encryption = "auto"
    return NbGraderAPI(config=config)


def done(result):
    """Nothing, or nbgrader's own account of what went wrong."""
    if not result["success"]:
        sys.exit(f"nbgrader failed:\n{result.get('log', '')}\n{result.get('error', '')}")


def write_release(course, target):
    """Everything that a student gets, in the new folder `target`."""
    page = handout(read_notebooks(ROOT / "notebooks"))
    done(course.generate_assignment(NAME))
    shutil.copytree(Path(course.coursedir.root) / "release" / NAME, target / "notebooks")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    helper = (ROOT / "nst_utils.py").read_text(encoding="utf-8")
    (target / "nst_utils.py").write_text(with_blanks(helper, FORMULAS), encoding="utf-8")
    (target / "HANDOUT.md").write_text(page, encoding="utf-8")


def with_blanks(source, names):
    """Python source with the bodies of these functions blank; signature and docstring stay."""
    lines = source.splitlines()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    # From the last to the first, so that the others' line numbers hold.
    for function in sorted((functions[name] for name in names), key=lambda node: node.lineno, reverse=True):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        lines[body[0].lineno - 1 : function.end_lineno] = [" " * body[0].col_offset + HELPER_BLANK]
    return "\n".join(lines) + "\n"


# --- The handout ---------------------------------------------------------------------------------


class Question(NamedTuple):
    title: str  # of the notebook
    heading: str  # that it stands under
    name: str  # its grade_id
    by_hand: bool
    points: int


def handout(notebooks):
    """The handout page; what a question is worth comes from the notebooks."""
    rows = [question for notebook in notebooks.values() for question in questions(notebook)]
    if list(MINUTES) != [row.name for row in rows]:
        sys.exit(f"MINUTES has {', '.join(MINUTES)}, the notebooks have {', '.join(row.name for row in rows)}.")
    hand, total = sum(row.points for row in rows if row.by_hand), sum(row.points for row in rows)
    return (
        (ROOT / "tools" / "handout.md")
        .read_text(encoding="utf-8")
        .format(
            table=table(rows, total),
            code_blank=CODE_BLANK,
            text_blank=TEXT_BLANK,
            reading=READING,
            hours=f"{round((sum(MINUTES.values()) + READING * len(notebooks)) / 30) / 2:g}",
            machine=total - hand,
            hand=hand,
        )
    )


def table(rows, total):
    lines = ["| notebook | question | graded | points | minutes |", "|---|---|---|---|---|"]
    for row in rows:
        way = "by hand" if row.by_hand else "by machine"
        lines.append(f"| {row.title} | {row.heading} (`{row.name}`) | {way} | {row.points} | {MINUTES[row.name]} |")
    return "\n".join([*lines, f"| | | | **{total}** | **{sum(MINUTES.values())}** |"])


def questions(notebook):
    """The questions of a notebook, in its order, each with the points of its tests."""
    tests = [cell for cell in notebook.cells if is_test(cell)]
    title, _ = next(sections(notebook))
    found = []
    for heading, cell in sections(notebook):
        if is_question(cell) and not is_copied(cell):
            own = [test for test in tests if f"{grade_id(test)}-".startswith(f"test-{grade_id(cell)}-")]
            tests = [test for test in tests if test not in own]
            worth = points(cell) + sum(map(points, own))
            if not worth:
                sys.exit(f"The question {grade_id(cell)} has no test: one is named test-{grade_id(cell)}.")
            found.append(Question(title, heading, grade_id(cell), points(cell) > 0, worth))
    if tests:
        sys.exit(f"To no question belong these tests: {', '.join(map(grade_id, tests))}.")
    return found


def sections(notebook):
    """(The heading that it stands under, cell) of every cell."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)][-1]
        yield heading, cell


if __name__ == "__main__":
    if (ROOT / "assignment").exists():
        sys.exit("The folder assignment/ is there already: move it away first, since you may have worked on it.")
    with tempfile.TemporaryDirectory() as folder:
        write_release(open_course(Path(folder)), ROOT / "assignment")
    print("The students' release is in assignment/, and what it asks for in its HANDOUT.md.")
