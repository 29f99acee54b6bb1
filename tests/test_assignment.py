"""The homework as an instructor has it: the release, and what `make grade` gives honest and other submissions.

Needs nbgrader's environment; `make test-assignment` makes it. All submissions are graded once, in two calls. They leave
the experiments out, except where they are the case.
"""

import contextlib
import copy
import csv
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from homework import NAME, ROOT, grade_id, is_parameters, is_question, is_solution, is_test, questions, read_notebooks
from lab_driver import ARTEFACTS, CHROMIUM, chromium
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

NBGRADER = ROOT / os.environ.get("NBGRADER", ".venv-nbgrader") / "bin"
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {
    "PATH": f"{NBGRADER}:{os.environ['PATH']}", "NOTEBOOKS_PYTHON": sys.executable, "PYTHONWARNINGS": "ignore",
    "JUPYTER_PATH": str(ROOT / "tools"), "JUPYTER_CONFIG_PATH": str(ROOT / "tools"),
}  # fmt: skip
pytestmark = [
    pytest.mark.assignment,
    pytest.mark.skipif(not NBGRADER.exists(), reason="no nbgrader here: make test-assignment installs it"),
]
SOURCES = read_notebooks(ROOT / "notebooks")
ONE, TWO, THREE = SOURCES
MARKS = ["BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN TESTS", "END HIDDEN TESTS"]
SCRIPT = "<script>hacked = 1</script><img src=x onerror='hacked = 1'><b onclick='hacked = 1'>bold</b>"
WHOLE = {question.name: question.most for source in SOURCES.values() for question in questions(source)}
MACHINES = {question.name for source in SOURCES.values() for question in questions(source) if not question.by_hand}


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    target = tmp_path_factory.mktemp("release") / "assignment"
    subprocess.run(["python", ROOT / "tools" / "make_assignment.py", target], env=ENVIRONMENT, check=True)
    return target


# --- Submissions ---------------------------------------------------------------------------------


def short(notebook):
    """A notebook without what no test needs."""
    kept = {
        "parameters",
        "pictures",
        "title",
        "style-layers-text",
    }  # and the answers that give points or are needed for them
    notebook.cells = [
        cell
        for cell in notebook.cells
        if cell.get("id") in kept
        or is_test(cell)
        or (is_solution(cell) and not grade_id(cell).startswith(("exercise-", "your-pair")))
    ]
    return notebook


def answered(released, *changes):
    """A released notebook, short, with our answers: (line, other) is a line of these that is replaced."""
    notebook = short(copy.deepcopy(released))
    answers = {grade_id(cell): cell.source for source in SOURCES.values() for cell in source.cells if is_solution(cell)}
    left = dict(changes)
    for cell in filter(is_solution, notebook.cells):
        cell.source = answers[grade_id(cell)]
        for line, other in changes:
            if line in cell.source:
                left.pop(line, None)
                cell.source = cell.source.replace(line, other)
    assert not left, f"no answer has {left}"
    return notebook


def with_cell(notebook, source, before=None):
    """A notebook with a cell of a student's own: at its beginning, or before the cell of this grade_id."""
    place = next((k for k, cell in enumerate(notebook.cells) if before and grade_id(cell) == before), 0)
    notebook.cells.insert(place, new_code_cell(source))
    return notebook


def with_source(cell, source):
    return nbformat.from_dict({**copy.deepcopy(cell), "source": source})


def cell_of(notebook, name):
    return next(cell for cell in notebook.cells if grade_id(cell) == name)


GRAM, WRONG_GRAM = "return rows @ rows.T / rows.numel()", "return rows @ rows.T"
LOSS = "return ((F - P) ** 2).mean()"
NUMBERS = "return share.item(), gap.mean().item(), psnr.item()"
LOOPED = """rows = F[0].flatten(1)
    gram = torch.zeros(len(rows), len(rows))
    for i in range(len(rows)):
        for j in range(len(rows)):
            gram[i, j] = (rows[i] * rows[j]).sum() / rows.numel()
    return gram"""
GLOBAL_LAYERS = [
    ("{**content_targets, **style_targets}", "{*CONTENT_LAYERS, *STYLE_LAYERS}"),
    ("for name, target in content_targets.items())", "for name, target in content_targets.items() if name in maps)"),
    ("for name in style_targets}", "for name in STYLE_LAYERS}"),
]
CLAMP = "        image.data.clamp_(0, 1)\n        losses.append(value.item())\n    return image.detach(), losses"
CLAMP_AT_END = "        losses.append(value.item())\n    return image.detach().clamp(0, 1), losses"
PLAIN = [("optimiser = torch.optim.Adam([image], lr=rate)", "optimiser = torch.optim.SGD([image], lr=rate)")]
TAKEN = """
import torch.nn.functional as F
!pip install nothing-of-this-name
%pip install nothing-of-this-name
%matplotlib inline
import rich.traceback
rich.traceback.install()
abs = zip = min = 0
def pow(x): return x * x
open(nst.IMAGES / "mine.txt", "w").write("x")
exit()
own = nst.load_image("my cat.jpg")
"""
WEIGHTED = "CONTENT_WEIGHT * content_part + STYLE_WEIGHT"
SWAPPED = "STYLE_WEIGHT * content_part + CONTENT_WEIGHT"
FUNCTIONAL = "import torch.nn.functional as F"
MEAN = "((grams[name] - target) ** 2).mean()"
SQUARED = ("return (a - b).abs()", "return (a - b) ** 2"), ("gap = difference_map(a, b)", "gap = (a - b).abs()")
STYLE_SUM = f"sum({MEAN} for name, target in targets.items())"
CUT_SUM = (STYLE_SUM, f"torch.tensor({STYLE_SUM})")
CUT_PART = ("STYLE_WEIGHT * style_part", "STYLE_WEIGHT * style_part.item()")
SETTINGS = """
from __future__ import annotations
import gc, os, sys
import nst_utils as nst  # the helper
os.environ["KMP_DUPLICATE_LIB_OK"] = "TRUE"
torch.backends.cudnn.benchmark = False
print(torch.__version__, sys.version, gc.collect())
# inspect what nst_utils.content_loss gives
print(nst.layer_name("conv_4"), isinstance(CONTENT, torch.Tensor))
def mine(image): return nst.to_pil(nst.reconstruct_content(image, "conv1_1").image)
"""
TRICKS = """
from unittest import mock
pytest.MonkeyPatch().setattr(torch, "allclose", print)
torch.allclose, other = print, 0
torch.allclose: object = print
x = 0; torch.Tensor.max = print
h = nst
T = torch
from sys import modules
InteractiveShell.instance().events
for source in In: print(source)
linecache.cache
runpy.run_path("images.py")
"""
HELPERS = [(NUMBERS, "return nst.difference_numbers(a, b)"), (LOSS, "return nst.content_loss({0: F}, {0: P})")]


def honest(released):
    """{student: (notebooks, what they lose)} of work that was done in good faith."""
    one, two, three = (released[name] for name in SOURCES)
    merged = answered(two)
    cell_of(merged, "gram-matrix").source += "\n" + cell_of(merged, "test-gram-matrix").source
    merged.cells.remove(cell_of(merged, "test-gram-matrix"))
    edited = answered(two)
    for place in (0, len(edited.cells)):
        test = cell_of(edited, "test-gram-matrix")
        edited.cells.insert(place, with_source(test, "assert gram_matrix(F).sum() == 0"))
    split = answered(two)
    answer = cell_of(split, "style-layers")
    place = split.cells.index(answer)
    text = new_markdown_cell(f"All of my text, {SCRIPT} and [a link](javascript:hacked=1)")
    answer.source = cell_of(two, "style-layers").source
    kinds = "text/html", "image/svg+xml", "text/markdown"
    hostile = {**dict.fromkeys(kinds, f"<svg>{SCRIPT}</svg>"), "application/javascript": "hacked = 1"}
    outputs = [new_output("display_data", data={kind: source}) for kind, source in hostile.items()]
    split.cells[place + 1 : place + 1] = [text, new_code_cell("1", outputs=outputs), new_markdown_cell("The rest.")]
    reordered = answered(one)
    reordered.cells.append(reordered.cells.pop(reordered.cells.index(cell_of(reordered, "content-loss"))))
    parameters = answered(three)
    next(filter(is_parameters, parameters.cells)).source += '\nCONTENT = "my cat.jpg"\nSTYLE_WEIGHT = 5.0'
    hungry = with_cell(answered(one), "hoard = [bytearray(10**8) for k in range(10**6)]", "descent")
    return {
        "everything": ([answered(one), answered(two), answered(three)], {}),
        "tensors": ([answered(one, ("losses.append(value.item())", "losses.append(value.detach())"))], {}),
        "clamp at the end": ([answered(one, (CLAMP, CLAMP_AT_END))], {"descent": 0}),
        "loops": ([answered(two, (f"rows = F[0].flatten(1)\n    {GRAM}", LOOPED))], {}),
        "plain descent": ([answered(one, *PLAIN)], {"descent": 0}),
        "above zero": ([answered(one, (">= 1 / 255", "> 0"))], {"difference": 0}),
        "own names": ([with_cell(answered(one, (LOSS, "return pow(F - P).mean()")), TAKEN, "content-loss")], {}),
        "functional": ([with_cell(answered(two, (MEAN, "F.mse_loss(grams[name], target)")), FUNCTIONAL)], {}),
        "global layers": ([answered(three, *GLOBAL_LAYERS)], {}),
        "wrong gram": ([answered(two, (GRAM, WRONG_GRAM)), answered(three, (GRAM, WRONG_GRAM))], {"gram-matrix": 0}),
        "merged": ([merged], {}),
        "edited copies": ([edited], {}),
        "split": ([split], {}),
        "reordered": ([reordered], {}),
        "own image": ([parameters], {}),
        "memory without end": ([hungry], {}),
        "signed": ([answered(one, ("return (a - b).abs()", "return a - b"))], {"difference": 0}),
        "swapped": ([answered(three, (WEIGHTED, SWAPPED))], {"objective": 3}),
        "squared map": ([answered(one, *SQUARED)], {"difference": 0}),
        "cut loss": ([answered(two, CUT_SUM)], {"style-loss": 0}),
        "cut total": ([answered(three, CUT_PART)], {"objective": 3}),
        "settings": ([with_cell(answered(one), SETTINGS, "descent")], {}),
    }


def blank(released, *cells):
    """A notebook of blanks with cells of a student's own at its beginning."""
    notebook = short(copy.deepcopy(released))
    for source in reversed(cells):
        with_cell(notebook, source)
    return notebook


def cheats(released):
    """{student: notebooks}, none of which may get points from the machine."""
    one = released[ONE]
    copied = blank(one)
    for cell in [*filter(is_test, copied.cells)]:
        copied.cells.insert(0, with_source(cell, "assert True"))
        copied.cells.append(with_source(cell, "assert True"))
    faked = blank(one)
    faked.cells += [copy.deepcopy(cell) for name in (TWO, THREE) for cell in filter(is_test, released[name].cells)]
    quiet = "get_ipython().set_custom_exc((Exception,), lambda *_, **__: None)"
    tree = "import ast\nclass T(ast.NodeTransformer):\n    def visit_Assert(self, node): return ast.Pass()\n"
    return {
        "copied tests": [copied],
        "faked": [faked],
        "custom exception": [blank(one, quiet)],
        "transformer": [blank(one, f"{tree}get_ipython().ast_transformers.append(T())")],
        "tricks": [blank(one, TRICKS)],
        "prints": [blank(one, "print('passed')\ndef content_loss(F, P):\n    print('passed')\n    raise SystemExit")],
        "helpers": [answered(one, *HELPERS)],
        "dies": [answered(one, (LOSS, "import os; os._exit(0)"))],
        "patched": [answered(one, (LOSS, "torch.Tensor.__format__ = lambda *_: '3'; return torch.tensor(3.0)"))],
    }


HONEST, CHEATS = list(honest(SOURCES)), list(cheats(SOURCES))


def run_grader(*arguments):
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "cp1252"}
    command = ["python", ROOT / "tools" / "grade_submissions.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, encoding="cp1252", errors="replace")


class Grading:
    """The folder that `make grade` has written."""

    def __init__(self, folder, said):
        self.folder, self.said = folder, said

    def row(self, student):
        with (self.folder / "grades.csv").open(encoding="utf-8-sig", newline="") as file:
            return next(row for row in csv.DictReader(file) if row["student"] == student)

    def report(self, student):
        lines = (self.folder / "report.txt").read_text(encoding="utf-8").splitlines()
        return "\n".join(line.removeprefix(f"{student}: ") for line in lines if line.startswith(f"{student}: "))

    def feedback(self, student):
        return (self.folder / "feedback" / f"{student}.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def handed_in(release):
    released = read_notebooks(release / "notebooks")
    return honest(released) | {student: (notebooks, None) for student, notebooks in cheats(released).items()}


@pytest.fixture(scope="session")
def graded(handed_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    for student, (notebooks, _) in handed_in.items():
        (folder / "all" / student).mkdir(parents=True)
        for k, notebook in enumerate(notebooks):
            nbformat.write(notebook, folder / "all" / student / f"homework {k}.ipynb")
    (folder / "all" / "@SUM(1)").mkdir()
    (folder / "all" / "@SUM(1)" / "work.rar").write_bytes(b"")
    done = run_grader(folder / "all", folder / "grading", "", "other numbers")
    assert done.returncode == 0, done.stdout + done.stderr
    return Grading(folder / "grading", done.stdout)


# --- The release ---------------------------------------------------------------------------------


def regions(source, kind):
    """The texts between the marks of a kind, without indentation."""
    found = re.findall(rf"### BEGIN {kind}\n(.*?)\n\s*### END {kind}", source, re.DOTALL)
    return ["\n".join(map(str.strip, text.splitlines())) for text in found]


def test_the_release_shows_neither_answers_nor_hidden_tests_nor_outputs(release):
    notebooks = read_notebooks(release / "notebooks")
    texts = ["\n".join(cell.source for cell in notebook.cells) for notebook in notebooks.values()]
    texts += [path.read_text(encoding="utf-8") for path in release.iterdir() if path.is_file()]
    shown = "\n".join(line.strip() for text in texts for line in text.splitlines())
    for cell in (cell for source in SOURCES.values() for cell in source.cells if is_test(cell) or is_solution(cell)):
        secrets = regions(cell.source, "HIDDEN TESTS") if is_test(cell) else regions(cell.source, "SOLUTION")
        assert secrets or cell.cell_type == "markdown", f"{grade_id(cell)} hides nothing"
        assert not [secret for secret in secrets or [cell.source] if secret in shown]
    assert not [mark for mark in MARKS if mark in shown]
    assert not [cell for notebook in notebooks.values() for cell in notebook.cells if cell.get("outputs")]
    assert (release / "nst_utils.py").read_text(encoding="utf-8").count("yours to write: first in the notebook") == 4


def test_the_release_opens_as_the_handout_says(release, tmp_path):
    """pip installs it into an environment of its own; the packages that it requires are those of this one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "own"], check=True)
    (packages,) = tmp_path.glob("own/lib/*/site-packages")
    (packages / "base.pth").write_text(str(Path(pytest.__file__).parents[1]))
    assert "pip install -r requirements.txt -e .\n" in (release / "HANDOUT.md").read_text(encoding="utf-8")
    python = tmp_path / "own" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", "."], cwd=release, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    (first, second) = (
        next(cell.source for cell in SOURCES[ONE].cells if cell.id == name) for name in ("set-up", "parameters")
    )
    command = [python, "-m", "IPython", "-c", f"{first}\n{second}\nprint(nst.__file__, CONTENT.exists())"]
    done = subprocess.run(command, cwd=release / "notebooks", env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == f"{release / 'nst_utils.py'} True", done.stdout + done.stderr


# --- Grades --------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", HONEST)
def test_honest_work_gets_its_points(graded, handed_in, student):
    notebooks, lost = handed_in[student]
    row = graded.row(student)
    asked = {grade_id(cell) for notebook in notebooks for cell in notebook.cells if is_question(cell)}
    due = {name: str(lost.get(name, WHOLE[name] if name in asked else 0)) for name in MACHINES}
    assert {name: row[name] for name in MACHINES} == due, graded.report(student)


@pytest.mark.parametrize("student", CHEATS)
def test_a_cheat_gets_no_points_from_the_machine(graded, student):
    row = graded.row(student)
    if student in ("custom exception", "transformer", "tricks", "helpers", "dies", "patched"):  # a person decides
        assert "is held" in graded.report(student) or "held for a look" in graded.report(student)
        assert all(row[name] in ("", "0") for name in MACHINES) and "" in row.values()
    else:
        assert all(row[name] == "0" for name in MACHINES), graded.report(student)


def test_the_report_says_what_was_odd(graded):
    assert "test-gram-matrix was missing" in graded.report("merged")
    assert "test-gram-matrix was doubled" in graded.report("edited copies")
    said = graded.report("@SUM(1)")
    assert "@SUM(1)/work.rar was ignored" in said and "no readable notebook" in said
    assert "which-layers was left blank" in graded.report("copied tests")
    said = graded.report("tricks").splitlines()
    assert not {f"{ONE}: held for a look: {line}" for line in TRICKS.strip().splitlines()} - {*said}, said
    assert graded.row("'@SUM(1)")["total"] == "0" and graded.row("split")["style-layers"] == ""
    assert graded.row("copied tests")["which-layers"] == "0"


def test_feedback_gives_reasons_but_neither_hidden_tests_nor_answers_nor_scripts(graded):
    page = graded.feedback("signed")
    assert "0 of 3" in page and "not yet marked, of 4" in page
    for name in [*HONEST, *CHEATS]:
        page = graded.feedback(name)
        assert "<script" not in page and "onerror" not in page
        for cell in (cell for source in SOURCES.values() for cell in source.cells if grade_id(cell)):
            secrets = regions(cell.source, "HIDDEN TESTS") + regions(cell.source, "SOLUTION")
            lines = {line.strip() for secret in secrets for line in secret.splitlines() if "=" in line}
            assert not [line for line in lines if line in page]


def test_a_second_call_grades_what_has_changed(graded, handed_in, tmp_path):
    before = {path: path.read_bytes() for path in (graded.folder / "autograded").rglob("*.ipynb")}
    notebook = copy.deepcopy(handed_in["loops"][0][0])
    cell_of(notebook, "gram-matrix").source = "pass"
    for student, content in {"loops": notebook, "merged": handed_in["merged"][0][0]}.items():
        (tmp_path / student).mkdir()
        nbformat.write(content, tmp_path / student / "again.ipynb")
    done = run_grader(tmp_path, graded.folder, "", "other numbers")
    assert done.stdout.count(": graded\n") == 1 and "loops: graded\n" in done.stdout, done.stdout + done.stderr
    after = {path: path.read_bytes() for path in before}
    assert {path.parts[-3] for path in before if before[path] != after[path]} == {"loops"}
    assert graded.row("loops")["gram-matrix"] == "0" and graded.row("everything")["gram-matrix"] == "3"


@pytest.mark.parametrize(
    "submissions, words", [("", "no notebook of the homework in ''"), (".", "no notebook of the homework")]
)
def test_nothing_to_grade_is_a_sentence(tmp_path, submissions, words):
    done = run_grader(submissions and tmp_path, tmp_path / "grading")
    assert done.returncode == 1 and words in done.stdout and not (tmp_path / "grading").exists()


@contextlib.contextmanager
def marking(folder, home):
    """The address of the pages that `make mark` opens, with a token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (recipe,) = re.findall(r"FOR_NBGRADER\) (jupyter lab (?:.*\\\n)+.*)", MAKEFILE)
    options = f"--no-browser --allow-root --ServerApp.port={port} --IdentityProvider.token=token"
    with open(home / "log", "w") as log:
        command = ["sh", "-c", f"{recipe} {options}"]
        environment = ENVIRONMENT | {"HOME": str(home)}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token=token", timeout=2)
                break
            assert process.poll() is None, (home / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/formgrader"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def submission(grading, student, notebook):
    """nbgrader's number of a submitted notebook."""
    with contextlib.closing(sqlite3.connect(grading.folder / "gradebook.db")) as book:
        (found,) = book.execute(
            "select one.id from submitted_notebook one join submitted_assignment work on one.assignment_id = work.id "
            "join notebook on one.notebook_id = notebook.id where work.student_id = ? and notebook.name = ?",
            (student, notebook),
        )
    return found[0]


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: install Debian's package chromium")
def test_a_text_is_marked_in_the_browser_where_no_script_of_a_student_runs(graded, tmp_path):
    with marking(graded.folder, tmp_path) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1180, "height": 1400})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/gradebook/style-transfer?token=token")
        page.get_by_role("link", name=TWO).wait_for()
        page.screenshot(path=ARTEFACTS / "marking-notebooks.png")
        page.goto(f"{address}/submissions/{submission(graded, 'split', TWO)}/")
        page.get_by_text("All of my text").wait_for()
        assert page.get_by_text("one each: a claim, a number from the table").count()
        page.get_by_text("bold").first.click()
        page.get_by_role("link", name="a link").click()
        page.locator("#style-layers").fill("3")
        page.locator("#style-layers-comment").fill("Quote the <b>number</b>.")
        with page.expect_response(
            lambda response: "/api/comment/" in response.url and response.request.method == "PUT"
        ):
            page.locator("#style-layers").focus()
        page.screenshot(path=ARTEFACTS / "marking-texts.png", full_page=True)
        assert page.evaluate("typeof hacked") == "undefined"
        page.goto(f"{address}/submissions/{submission(graded, 'dies', ONE)}/")
        page.get_by_text("Held for a look").first.wait_for()
        page.screenshot(path=ARTEFACTS / "marking-held.png", full_page=True)
    (tmp_path / "again" / "split").mkdir(parents=True)
    shutil.copy(graded.folder / "submitted" / "split" / NAME / f"{TWO}.ipynb", tmp_path / "again" / "split")
    done = run_grader(tmp_path / "again", graded.folder, "", "other numbers")
    row = graded.row("split")
    assert row["style-layers"] == "3" and float(row["total"]) == 3 + sum(float(row[name]) for name in MACHINES)
    assert "Quote the &lt;b&gt;number&lt;/b&gt;." in graded.feedback("split"), done.stdout + done.stderr
