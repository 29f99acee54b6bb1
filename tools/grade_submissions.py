"""Grade submitted notebooks with nbgrader: a gradebook, grades.csv, a page of feedback for each student, a report.

Everything goes into one folder, an nbgrader course. A second call grades only what has changed, and adds the marks
given by hand in the meantime to grades.csv and feedback.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import nbformat
from collect import collect, files_in, opened
from homework import NAME, ROOT, is_test, questions, read_notebooks
from make_assignment import open_course, write_helper
from nbformat.v4 import new_notebook
from preprocessors import Judge, judged

TOOLS = ROOT / "tools"


def with_other_numbers(notebook, seed):
    """Our notebook, with the seeds in its hidden tests shifted by a hash of the word `seed`."""
    shift = zlib.crc32(seed.encode())  # 0 for no word
    for cell in filter(is_test, notebook.cells):
        shown, mark, hidden = cell.source.partition("### BEGIN HIDDEN TESTS")
        cell.source = shown + mark + re.sub(r"manual_seed\((\w+)\)", rf"manual_seed({shift} + \1)", hidden)
    return notebook


def store(chosen, remarks, sources):
    """Copy what was collected into the course; delete the results of students who handed in something new."""
    for student, said in remarks.items():
        folder = Path("submitted", student)
        (folder / NAME).mkdir(parents=True, exist_ok=True)
        (folder / "remarks.txt").write_text("\n".join(said), "utf-8")
        for name in sources:
            path, content = folder / NAME / f"{name}.ipynb", chosen.get(student, {}).get(name)
            if not path.exists() or content and path.read_text("utf-8") != content:
                path.write_text(content or nbformat.writes(new_notebook()), "utf-8")
                shutil.rmtree(Path("autograded", student), ignore_errors=True)


def graded(path):
    try:
        return judged(nbformat.read(path, 4), path.stem)
    except Exception as error:  # a broken notebook can raise anything
        print(f"{path} cannot be graded: {type(error).__name__}: {error}")
        return judged(new_notebook(), path.stem)


def grade(course, sources):
    """Grade what is not graded yet, on all processors; store each student's points as soon as they are ready."""
    students = sorted({*os.listdir("submitted")} - {*os.listdir("autograded")})
    jobs = [(student, name) for student in students for name in sources]
    pool = ThreadPoolExecutor(os.cpu_count())
    paths = [Path("submitted", student, NAME, f"{name}.ipynb") for student, name in jobs]
    for (student, name), result in zip(jobs, pool.map(graded, paths)):
        Judge.ready[student, name] = result
        if name == list(sources)[-1]:
            print(f"{student}: {course.autograde(NAME, student).get('error', 'graded')}", flush=True)


def account(gradebook, student, asked):
    """A student's ([(question, points or "" if not marked yet, remarks), ...], lines for the report, total points)."""
    notebooks = gradebook.find_submission(NAME, student).notebooks
    grades = {grade.name: grade for notebook in notebooks for grade in notebook.grades}
    comments = {one.name: one.comment for notebook in notebooks for one in notebook.comments}
    said = Path("submitted", student, "remarks.txt").read_text("utf-8").splitlines()
    lost, results = {}, []
    for title, notebook in read_notebooks(Path("autograded", student, NAME)).items():
        lost |= notebook.metadata.lost
        said += [f"{title}: {line}" for line in notebook.metadata.remarks]
    for question in asked:
        own = [grades[name] for name in question.points]
        waits = any(one.needs_manual_grade for one in own)
        score = sum(one.score for one in own)
        why = [] if waits or score >= question.most else map(lost.get, question.points)
        why = filter(None, [*why, comments.get(question.name)])
        results.append((question, "" if waits else f"{score:g}", "\n".join(why)))
    return results, said, f"{sum(one.score for one in grades.values()):g}"


def write_all(course, sources):
    """grades.csv, report.txt and feedback/ of all students so far."""
    asked = sum(map(questions, sources.values()), [])
    page = jinja2.Template((TOOLS / "feedback.html").read_text("utf-8"), autoescape=True)
    rows, report = [["student", *(question.name for question in asked), "total"]], []
    Path("feedback").mkdir(exist_ok=True)
    with course.gradebook as gradebook:
        for student in sorted(os.listdir("autograded")):
            results, said, total = account(gradebook, student, asked)
            # Keep spreadsheets from reading such a name as a formula.
            rows.append([re.sub("^(?=[-+=@])", "'", student), *(points for _, points, _ in results), total])
            html = page.render(student=student, results=results, total=total)
            Path("feedback", f"{student}.html").write_text(html, "utf-8")
            report += [f"{student}: {line}" for line in said]
    with open("grades.csv", "w", newline="", encoding="utf-8-sig") as file:  # so that Excel sees the umlauts
        csv.writer(file).writerows(rows)
    Path("report.txt").write_text("\n".join([*report, ""]), "utf-8")
    print(*report, f"{len(rows) - 1} students: see grades.csv, report.txt and feedback/ in {os.getcwd()}", sep="\n")


def main(submissions, into, student="", seed=""):
    """Grade a folder or zip into the folder `into`; student: grade this one again even if nothing has changed."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    path, sources = Path(submissions), read_notebooks(ROOT / "notebooks")
    files = files_in(path) if path.is_dir() else opened((), (), path.read_bytes)
    chosen, remarks = collect(files if submissions else [], sources)
    if not chosen:
        print(f"There is no notebook of the homework in {submissions!r}: run make grade SUBMISSIONS=folder-or-zip.")
        sys.exit("\n".join(sum(remarks.values(), [])) or 1)
    Path(into).mkdir(exist_ok=True)
    os.chdir(into)
    before = read_notebooks(Path("source", NAME))
    course = open_course(Path.cwd(), lambda notebook: with_other_numbers(notebook, seed))
    shutil.rmtree("helper", ignore_errors=True)
    write_helper(Path("helper"))
    subprocess.run(["sh", TOOLS / f"kernels/{NAME}/sandbox.sh"])  # prints a warning if there is none
    store(chosen, remarks, sources)
    if student or before != read_notebooks(Path("source", NAME)):
        shutil.rmtree(Path("autograded", student), ignore_errors=True)
    Path("autograded").mkdir(exist_ok=True)
    try:
        grade(course, sources)
    except KeyboardInterrupt:
        print("Stopped: all grades so far are saved; the next call grades the rest.")
        write_all(course, sources)
        os._exit(130)
    write_all(course, sources)


if __name__ == "__main__":
    main(*sys.argv[1:])
