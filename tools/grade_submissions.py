"""Grade submitted notebooks with nbgrader: a gradebook, grades.csv, a page of feedback for each student, a report.

Everything goes into one folder, which is a course of nbgrader's. A second call grades what has changed since, and puts
the marks given by hand meanwhile into grades.csv and feedback.
"""

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import nbformat
from collect import collect, files_in, opened
from homework import NAME, ROOT, is_test, questions, read_notebooks
from make_assignment import open_course, write_helper
from nbformat.v4 import new_notebook
from preprocessors import Judge, judged

UNLOCKED = (
    "There is no bubblewrap here: students' code runs with your rights, and can read and change your files. "
    "If you do not trust it, grade in a container that you throw away."
)

# --- Grading -------------------------------------------------------------------------------------


def with_other_numbers(notebook, seed):
    """Our notebook with the seeds in the hidden part of its tests moved by a word."""
    shift = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") if seed else 0
    for cell in filter(is_test, notebook.cells):
        shown, mark, hidden = cell.source.partition("### BEGIN HIDDEN TESTS")
        cell.source = shown + mark + re.sub(r"manual_seed\((\w+)\)", rf"manual_seed({shift} + \1)", hidden)
    return notebook


def store(chosen, remarks, sources):
    """Copy what was collected into the course; the students of whom something is new."""
    changed = set()
    for student, said in remarks.items():
        folder = Path("submitted", student)
        (folder / NAME).mkdir(parents=True, exist_ok=True)
        (folder / "remarks.txt").write_text("\n".join(said), encoding="utf-8")
        for name in sources:
            path, content = folder / NAME / f"{name}.ipynb", chosen.get(student, {}).get(name)
            if not path.exists() or content and path.read_text(encoding="utf-8") != content:
                path.write_text(content or nbformat.writes(new_notebook()), encoding="utf-8")
                changed.add(student)
    return changed


def grade(course, students):
    """Grade these students' notebooks on all processors, and store each student's points at once."""
    pool = ThreadPoolExecutor(os.cpu_count())
    running = {}
    for student in students:
        notebooks = read_notebooks(Path("submitted", student, NAME))
        running[student] = {name: pool.submit(judged, notebook, name) for name, notebook in notebooks.items()}
    try:
        for k, (student, futures) in enumerate(running.items(), 1):
            Judge.ready.update({(student, name): future.result() for name, future in futures.items()})
            result = course.autograde(NAME, student)
            print(
                f"{student}: {'graded' if result['success'] else result['error']} ({k} of {len(running)})", flush=True
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --- What is written -----------------------------------------------------------------------------


def account(gradebook, student, asked):
    """(A student's line of grades.csv, page of feedback, sentences for the report)."""
    notebooks = gradebook.find_submission(NAME, student).notebooks
    grades = {grade.name: grade for notebook in notebooks for grade in notebook.grades}
    comments = {one.name: one.comment for notebook in notebooks for one in notebook.comments}
    graded = read_notebooks(Path("autograded", student, NAME))
    said = Path("submitted", student, "remarks.txt").read_text(encoding="utf-8").splitlines()
    row, results = {"student": student}, []
    for title, question in asked:
        own = [grades[name] for name in question.points]
        waits = any(one.needs_manual_grade and one.manual_score is None for one in own)
        score = sum(one.score for one in own)
        row[question.name] = "" if waits else f"{score:g}"
        lost = [] if waits or score >= question.most else map(graded[title].metadata.lost.get, question.points)
        results.append((question, row[question.name], filter(None, [*lost, comments.get(question.name)])))
    for title, notebook in graded.items():
        said += [f"{title}: {line}" for line in notebook.metadata.remarks]
    row["total"] = f"{sum(grade.score for grade in grades.values()):g}"
    row["late"] = "late" if "late" in said else ""
    page = jinja2.Template((ROOT / "tools" / "feedback.html").read_text(encoding="utf-8"), autoescape=True)
    return row, page.render(results=results, **row), said


def write_all(course, sources):
    """grades.csv, report.txt and feedback/ of all students so far."""
    asked = [(name, question) for name, notebook in sources.items() for question in questions(notebook)]
    Path("feedback").mkdir(exist_ok=True)
    rows, report = [], []
    with course.gradebook as gradebook:
        for folder in sorted(Path("autograded").iterdir()):
            row, page, said = account(gradebook, folder.name, asked)
            rows.append(row | {"student": re.sub("^(?=[-+=@])", "'", folder.name)})  # no formula
            Path("feedback", f"{folder.name}.html").write_text(page, encoding="utf-8")
            report += [f"{folder.name}: {line}" for line in said]
    with open("grades.csv", "w", newline="", encoding="utf-8-sig") as file:  # so that Excel sees the umlauts
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    Path("report.txt").write_text("\n".join([*report, ""]), encoding="utf-8")
    print(*report, sep="\n")
    print(f"{len(rows)} students: see grades.csv, report.txt and feedback/ in {Path.cwd()}")


def main(submissions, python, into, student="", seed=""):
    """Grade a folder or zip into the folder `into` by the notebooks' Python; student: alone, even if unchanged."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    os.environ["NOTEBOOKS_PYTHON"] = os.path.abspath(python)
    path, sources = Path(submissions), read_notebooks(ROOT / "notebooks")
    if not submissions or not path.exists():
        sys.exit(f"There is no folder or zip {submissions!r}: say make grade SUBMISSIONS=folder-or-zip.")
    chosen, remarks = collect(files_in(path) if path.is_dir() else opened((), (), path.read_bytes), sources)
    if not chosen:
        sys.exit("\n".join([f"There is no notebook of the homework in {submissions}.", *sum(remarks.values(), [])]))
    Path(into).mkdir(exist_ok=True)
    os.chdir(into)
    before = read_notebooks(Path("source", NAME))
    course = open_course(Path.cwd(), lambda notebook: with_other_numbers(notebook, seed))
    shutil.rmtree("helper", ignore_errors=True)
    write_helper(Path("helper"))
    if subprocess.run(["sh", ROOT / "tools" / "kernels" / NAME / "sandbox.sh"]).returncode:
        print(UNLOCKED)
    changed = store(chosen, remarks, sources)
    if before != read_notebooks(Path("source", NAME)):
        changed = {folder.name for folder in Path("submitted").iterdir()}
    try:
        grade(course, [student] if student else sorted(changed))
    except KeyboardInterrupt:
        print("Stopped: what is graded is stored, and the next call grades the others.")
        write_all(course, sources)
        os._exit(130)
    write_all(course, sources)


if __name__ == "__main__":
    main(*sys.argv[1:])
