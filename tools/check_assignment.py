"""Grade the assignment's solution and four wrong submissions with nbgrader, and see that each gets what it should.

The argument is the Python that runs the notebooks: the reader's, since nbgrader's environment has no torch. Minutes.
"""

import ast
import copy
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import nbformat
from make_assignment import (
    FORMULAS,
    HELPER_BLANK,
    NAME,
    ROOT,
    done,
    grade_id,
    is_exercise,
    is_question,
    is_solution,
    is_test,
    open_course,
    read_notebooks,
    sections,
    write_release,
)
from small_notebooks import made_small
from sqlalchemy.exc import SAWarning

MARKS = ["BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS"]


class Mistake(NamedTuple):
    right: str  # a line of the solution
    wrong: str  # in its place
    fails: set  # the tests that must notice; all others must not


MISTAKES = {
    "gram": Mistake(
        "return rows @ rows.T / rows.numel()",
        "return rows @ rows.T",
        {"test-gram-matrix", "test-formulas", "test-objective-parts"},
    ),
    "signed": Mistake("return (a - b).abs()", "return a - b", {"test-difference"}),
    "swapped": Mistake(
        "total = CONTENT_WEIGHT * content_part + STYLE_WEIGHT * style_part",
        "total = STYLE_WEIGHT * content_part + CONTENT_WEIGHT * style_part",
        {"test-objective-total"},
    ),
}

# --- The release shows nothing that it should not ------------------------------------------------


def regions(source, kind):
    """The texts between the markers BEGIN and END of a kind, without indentation."""
    found, inside = [], False
    for line in map(str.strip, source.splitlines()):
        if f"BEGIN {kind}" in line:
            found, inside = [*found, []], True
        elif f"END {kind}" in line:
            inside = False
        elif inside:
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def secrets(sources):
    """(Where from, text) of everything in the notebooks that a student must not see."""
    for name, notebook in sources.items():
        for cell in notebook.cells:
            hidden = regions(cell.source, "HIDDEN TESTS") if is_test(cell) else []
            solved = (regions(cell.source, "SOLUTION") or [cell.source]) if is_solution(cell) else []
            yield from ((f"{name}'s {grade_id(cell)}", text) for text in hidden + solved if text)
    yield from ((f"the line {mistake.right!r}", mistake.right) for mistake in MISTAKES.values())


def leaks(sources, release):
    """Sentences on what a release shows too much of; the engine has fast forms of the formulas, which stay."""
    notebooks = read_notebooks(release / "notebooks")
    texts = {name: "\n".join(cell.source for cell in notebook.cells) for name, notebook in notebooks.items()}
    texts |= {path.name: path.read_text(encoding="utf-8") for path in release.iterdir() if path.is_file()}
    texts = {name: "\n".join(map(str.strip, text.splitlines())) for name, text in texts.items()}
    for name, text in texts.items():
        yield from (f"The release's {name} shows {place}." for place, secret in secrets(sources) if secret in text)
        yield from (f"The release's {name} has the mark {mark}." for mark in MARKS if mark in text)
    for name, notebook in notebooks.items():
        if any(cell.get("outputs") for cell in notebook.cells):
            yield f"The release's {name} has outputs."


def formulas_left(helper):
    """Sentences on the formulas that are not blank in the released helper."""
    functions = {node.name: node for node in ast.parse(helper).body if isinstance(node, ast.FunctionDef)}
    for name in FORMULAS:
        if ast.unparse(functions[name].body[1:]) != ast.unparse(ast.parse(HELPER_BLANK)):
            yield f"The release's nst_utils.py still has {name}."


def without_hidden_tests(sources):
    """Sentences on the tests that a student sees whole."""
    for name, notebook in sources.items():
        for cell in filter(is_test, notebook.cells):
            if not any(regions(cell.source, "HIDDEN TESTS")):
                yield f"In {name}, {grade_id(cell)} hides no test, so an answer can be written to fit it."


# --- Submissions ---------------------------------------------------------------------------------


def solved(released, sources):
    """The released notebooks with the questions' blanks filled in; exercises, which nobody grades, stay blank."""
    notebooks = copy.deepcopy(released)
    for name, notebook in notebooks.items():
        answers = {grade_id(cell): cell.source for cell in sources[name].cells if is_question(cell)}
        for cell in filter(is_question, notebook.cells):
            cell.source = answers[grade_id(cell)]
    return notebooks


def mistaken(solution, mistake):
    """The solution's notebooks that hold a line, with the wrong one in its place."""
    notebooks = copy.deepcopy(solution)
    changed = {}
    for name, notebook in notebooks.items():
        for cell in filter(is_question, notebook.cells):
            if mistake.right in cell.source:
                cell.source = cell.source.replace(mistake.right, mistake.wrong)
                changed[name] = notebook
    if not changed:
        sys.exit(f"No solution has the line {mistake.right!r} that a wrong submission changes.")
    return changed


def grade(course, student, notebooks):
    """Hand in and grade: {test: (points, most points)} of these notebooks, and the notebooks as executed."""
    start = time.perf_counter()
    folder = Path(course.coursedir.root) / "submitted" / student / NAME
    folder.mkdir(parents=True)
    for name, notebook in notebooks.items():
        nbformat.write(made_small(name, notebook), folder / f"{name}.ipynb")
    done(course.autograde(NAME, student))
    with course.gradebook as gradebook:
        graded = [part for part in gradebook.find_submission(NAME, student).notebooks if part.name in notebooks]
        found = [grade for part in graded for grade in part.grades if grade.cell.cell_type == "code"]
        scores = {grade.cell.name: (grade.auto_score, grade.cell.max_score) for grade in found}
    print(f"{student}: graded in {time.perf_counter() - start:.0f} s", flush=True)
    return scores, read_notebooks(Path(course.coursedir.root) / "autograded" / student / NAME)


def use_kernel(folder, python, helper):
    """From now on the notebooks run in this Python, with helper, panel and engine of the folder `helper`."""
    kernel = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "metadata": {"supported_encryption": ["curve"]},
        # Small pictures are slower on several threads than on one.
        "env": {"PYTHONPATH": str(helper), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"},
    }
    os.environ["JUPYTER_PATH"] = str(folder)
    (folder / "kernels" / "python3").mkdir(parents=True, exist_ok=True)
    (folder / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")


# --- What each gets ------------------------------------------------------------------------------


def errors(notebook):
    """(Cell, name of the error) of every cell that failed, in order."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield cell, output.ename


def stops(executed):
    """Sentences on the solved notebooks' cells that need what is blank in the helper, where nobody is told of it."""
    for name, notebook in executed.items():
        told = [cell for heading, cell in sections(notebook) if heading.startswith("The helper's") or is_exercise(cell)]
        for cell, error in errors(notebook):
            if error == "NotImplementedError" and cell not in told:
                yield f"In {name}, this cell cannot be run with the released helper: {cell.source.splitlines()[0]}"


def early_stops(executed):
    """Sentences on the blank notebooks that fail before their first blank."""
    for name, notebook in executed.items():
        cell, error = next(errors(notebook), (None, "nothing"))
        if error != "NotImplementedError":
            yield f"The release's {name} stops not at its first blank but at {error}."


def misgraded(student, scores, fails):
    """Sentences on the tests that gave a submission other points than they should."""
    for test in fails - scores.keys():
        yield f"{student}: there is no test {test}."
    for test, (score, most) in scores.items():
        due = 0 if test in fails else most
        if score != due:
            yield f"{student}: {test} gave {score:g} points of {most:g} where {due:g} are due."


def print_table(scores):
    columns = list(scores)
    print(f"{'test':24}{'of':>4}" + "".join(f"{student:>10}" for student in columns))
    for test, (_, most) in scores["solution"].items():
        points = [f"{scores[student][test][0]:g}" if test in scores[student] else "-" for student in columns]
        print(f"{test:24}{most:4g}" + "".join(f"{text:>10}" for text in points))


def check(folder, python):
    """Make the release and grade all submissions in a folder; sentences on what is wrong."""
    course = open_course(folder / "course")
    release = folder / "release"
    write_release(course, release)
    sources, released = read_notebooks(ROOT / "notebooks"), read_notebooks(release / "notebooks")
    problems = [*leaks(sources, release), *without_hidden_tests(sources)]
    problems += formulas_left((release / "nst_utils.py").read_text(encoding="utf-8"))
    if problems:
        return problems
    solution = solved(released, sources)

    # The solution runs on the helper that students have, so that whoever fills in the blanks gets to the end.
    use_kernel(folder / "jupyter", python, release)
    scores = {}
    scores["solution"], executed = grade(course, "solution", solution)
    problems += [*misgraded("solution", scores["solution"], set()), *stops(executed)]

    # All others run on the full one: neither tests nor blanks may be served by it.
    use_kernel(folder / "jupyter", python, ROOT)
    scores["blank"], executed = grade(course, "blank", released)
    problems += [*misgraded("blank", scores["blank"], set(scores["solution"])), *early_stops(executed)]
    for student, mistake in MISTAKES.items():
        scores[student], _ = grade(course, student, mistaken(solution, mistake))
        problems += misgraded(student, scores[student], mistake.fails)
    print_table(scores)
    return problems


if __name__ == "__main__":
    warnings.simplefilter("ignore", SAWarning)  # about nbgrader's own use of its gradebook
    with tempfile.TemporaryDirectory() as temporary:
        problems = check(Path(temporary), Path(sys.argv[1]).absolute())
    if problems:
        sys.exit("\n".join(problems))
    print("The release hides what it should, and every submission got its points.")
