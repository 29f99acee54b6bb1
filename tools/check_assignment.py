"""See that the release is clean, and that tools/grade.py gives each of twelve submissions the points it should.

The argument is nbgrader's Python, which makes the release. Minutes.
"""

import ast
import copy
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nbformat
from grade import grade_all, run
from homework import (
    FORMULAS,
    HELPER_BLANK,
    NAME,
    ROOT,
    grade_id,
    is_exercise,
    is_parameters,
    is_question,
    is_solution,
    is_test,
    read_notebooks,
    sections,
)
from small_notebooks import made_small

MARKS = ["BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS"]
ONE, TWO, THREE = "1_content_reconstruction", "2_texture_synthesis", "3_style_transfer"

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
    yield from ((f"the line {line!r}", line) for line in SOLVED)


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


def solved(released, sources):
    """The released notebooks with the questions' blanks filled in; exercises, which nobody grades, stay blank."""
    notebooks = copy.deepcopy(released)
    for name, notebook in notebooks.items():
        answers = {grade_id(cell): cell.source for cell in sources[name].cells if is_question(cell)}
        for cell in filter(is_question, notebook.cells):
            cell.source = answers[grade_id(cell)]
    return notebooks


def changed(notebook, *replacements):
    """A notebook with lines of its questions replaced: (line, other)."""
    notebook = copy.deepcopy(notebook)
    for line, other in replacements:
        cells = [cell for cell in notebook.cells if is_question(cell) and line in cell.source]
        if not cells:
            sys.exit(f"No solution has the line {line!r} that a wrong submission changes.")
        for cell in cells:
            cell.source = cell.source.replace(line, other)
    return notebook


def with_cell(notebook, source):
    """A notebook that begins with another cell."""
    notebook = copy.deepcopy(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(source))
    return notebook


def with_edited_tests(notebook):
    """A notebook whose first test says yes, and whose second is gone."""
    notebook = copy.deepcopy(notebook)
    first, second, *_ = filter(is_test, notebook.cells)
    first.source = "assert True"
    notebook.cells.remove(second)
    return notebook


def with_own_parameters(notebook):
    """A notebook with a photograph that only its student has, and with another weight."""
    notebook = copy.deepcopy(notebook)
    (cell,) = filter(is_parameters, notebook.cells)
    cell.source += '\nCONTENT = "my cat.jpg"\nSTYLE_WEIGHT = 5.0'
    return notebook


class Handed(NamedTuple):
    files: dict  # {path in the folder of submissions: notebook}
    lost: set | None  # the tests that give no points; None: all


CONTENT, GRAM, SIGNED, WEIGHTED, NUMBERS = SOLVED = [  # lines of the solution, which the release must not show
    "return ((F - P) ** 2).mean()",
    "return rows @ rows.T / rows.numel()",
    "return (a - b).abs()",
    "total = CONTENT_WEIGHT * content_part + STYLE_WEIGHT * style_part",
    "return share.item(), gap.mean().item(), psnr.item()",
]


def submissions(solution, blank):
    """{student: what is handed in}, in the forms that Canvas, Moodle, nbgrader and people make."""
    one, two, three = (solution[name] for name in (ONE, TWO, THREE))
    swapped = "total = STYLE_WEIGHT * content_part + CONTENT_WEIGHT * style_part"
    wrapped = "import sys; return sys.modules['style_transfer.engine.images'].difference_numbers(a, b)"
    imported = "from nst_utils import content_loss as _right"
    replaced = "import torch\nabs = min = lambda *_: 0\ntorch.allclose = torch.isclose = lambda *_, **__: True"
    return {
        "solution": Handed({f"solution_12345_67890_{name}-1.ipynb": solution[name] for name in solution}, set()),
        "blank": Handed({f"blank_LATE_12345_67891_{name}.ipynb": blank[name] for name in blank}, None),
        "gram": Handed(
            {
                f"submitted/gram/{NAME}/{TWO}.ipynb": changed(two, (GRAM, "return rows @ rows.T")),
                f"submitted/gram/{NAME}/{THREE}.ipynb": changed(three, (GRAM, "return rows @ rows.T")),
            },
            {"test-gram-matrix", "test-style-gradient", "test-objective-parts"},
        ),
        "signed": Handed(
            {f"signed_77_assignsubmission_file_/{ONE}.ipynb": changed(one, (SIGNED, "return a - b"))},
            {"test-difference"},
        ),
        "swapped": Handed({f"swapped/{THREE}.ipynb": changed(three, (WEIGHTED, swapped))}, {"test-objective-total"}),
        "own": Handed({f"own/notebooks/{THREE}.ipynb": with_own_parameters(three)}, set()),
        "edited": Handed(
            {f"edited_{TWO}.ipynb": with_edited_tests(changed(two, (GRAM, "return rows @ rows.T")))},
            {"test-gram-matrix", "test-style-gradient"},
        ),
        "examples": Handed(
            {f"{ONE}_examples.ipynb": changed(one, (CONTENT, "return 3.0"), (NUMBERS, "return 0.25, 0.1, 12.218"))},
            {"test-content-loss", "test-difference"},
        ),
        "wrapped": Handed({f"{ONE} (wrapped).ipynb": changed(one, (NUMBERS, wrapped))}, {"test-difference"}),
        "imported": Handed(
            {f"imported/{ONE}.ipynb": with_cell(changed(one, (CONTENT, "return _right({0: F}, {0: P})")), imported)},
            {"test-content-loss"},
        ),
        "replaced": Handed(
            {f"replaced/{ONE}.ipynb": with_cell(changed(one, (CONTENT, "return torch.tensor(7.0)")), replaced)},
            {"test-content-loss"},
        ),
        "renamed": Handed({"renamed/final version 2.ipynb": two}, set()),
    }


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


def misgraded(student, handed, verdicts):
    """Sentences on the tests that gave a submission other points than they should."""
    lost = verdicts.keys() if handed.lost is None else handed.lost
    for test in lost - verdicts.keys():
        yield f"{student}: there is no test {test}."
    for test, found in verdicts.items():
        if found.passed == (test in lost):
            yield f"{student}: {test} {'passed' if found.passed else 'failed'}. {found.sentence}"


def run_whole(notebooks, helper):
    """The notebooks, executed at small sizes with the helper of this folder."""
    small = {name: made_small(name, notebook) for name, notebook in notebooks.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda notebook: run(notebook, helper, 600, 600), small.values()))
    return small


def check(folder, nbgrader):
    """Make the release and grade all submissions in a folder; sentences on what is wrong."""
    release = folder / "release"
    subprocess.run([nbgrader, ROOT / "tools" / "make_assignment.py", release], check=True)
    sources, released = read_notebooks(ROOT / "notebooks"), read_notebooks(release / "notebooks")
    problems = [*leaks(sources, release), *without_hidden_tests(sources)]
    problems += formulas_left((release / "nst_utils.py").read_text(encoding="utf-8"))
    if problems:
        return problems

    # On the helper that students have, whoever fills in the blanks gets to the end.
    solution = solved(released, sources)
    problems += stops(run_whole(solution, release))
    problems += early_stops(run_whole(released, release))

    handed = submissions(solution, released)
    for one in handed.values():
        for name, notebook in one.files.items():
            path = folder / "submissions" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, path)
    graded, remarks = grade_all(folder / "submissions", folder / "grades", seed="other numbers")
    print((folder / "grades" / "grades.csv").read_text(encoding="utf-8-sig"), *remarks, sep="\n")
    for one in graded:
        problems += misgraded(one.student, handed[one.student], one.verdicts)
    if {one.student for one in graded} != handed.keys():
        problems.append(f"Graded were {sorted(one.student for one in graded)}, not {sorted(handed)}.")
    return problems


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        problems = check(Path(temporary), sys.argv[1])
    if problems:
        sys.exit("\n".join(problems))
    print("The release hides what it should, and every submission got its points.")
