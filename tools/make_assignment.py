"""Write the students' release of the three notebooks, with its handout, into assignment/ and assignment.zip.

Needs nbgrader, so it runs in nbgrader's own environment. nbgrader works in a course folder, which here is temporary.
"""

import ast
import os
import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from homework import CODE_BLANK, FORMULAS, HELPER_BLANK, NAME, ROOT, TEXT_BLANK, questions, read_notebooks
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config

COPIED = ["style_transfer", "tools/stylise.py", "images"]
COPIED += ["pyproject.toml", "LICENSE"]
READING = 20  # minutes for the rest of a notebook
MINUTES = {
    "content-loss": 5,
    "descent": 25,
    "broken-loops": 15,
    "difference": 10,
    "which-layers": 20,
    "gram-matrix": 15,
    "style-loss": 10,
    "style-gradient": 20,
    "style-layers": 20,
    "textures-differ": 20,
    "objective": 20,
    "own-pair": 25,
}

# nbgrader starts alembic by its name alone.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


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
    (target / "requirements.txt").write_text(requirements(), encoding="utf-8")
    helper = (ROOT / "nst_utils.py").read_text(encoding="utf-8")
    (target / "nst_utils.py").write_text(with_blanks(helper, FORMULAS), encoding="utf-8")
    (target / "HANDOUT.md").write_text(page, encoding="utf-8")


def requirements():
    """The pinned requirements that the notebooks have, without those of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {package(line) for line in project["dependencies"] + project["optional-dependencies"]["notebooks"]}
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in pinned if package(line) in named)


def package(requirement):
    return re.split(r"[=<>]", requirement)[0]


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


if __name__ == "__main__":
    target = Path(*sys.argv[1:] or [ROOT / "assignment"])
    for path in (target, target.with_suffix(".zip")):
        if path.exists():
            sys.exit(f"{path.name} is there already: move it away first, since you may have worked on it.")
    with tempfile.TemporaryDirectory() as folder:
        write_release(open_course(Path(folder)), target)
    shutil.make_archive(target, "zip", target.parent, target.name)
    print(f"The students' release is in {target.name}/ and {target.name}.zip; HANDOUT.md says what it asks for.")
