"""Change the engine on purpose in hundreds of small ways, in a copy, and list the changes that no test notices.

mutmut makes the changes and tries each on the file's own tests alone; but for those of several processes, which a
change may leave waiting for each other. The survivors are written to benchmarks/results/mutants.md. Why one may survive
is written there by hand, in the last column; it is kept as long as the same mutation survives. Some twenty minutes.
Arguments: the files to try, by default all; the rows of the others are kept.
"""

import ast
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "mutants.md"
FILES = {f"nst_engine/{name}.py": [f"tests/test_{name}.py"] for name in ("losses", "optimiser", "tiles")}
FILES["nst_engine/losses.py"].append("tests/test_styles.py")  # masks
PARTS = ["nst_engine", "nst_utils.py", "nst_controls.py", "nst_widgets.py", "tests", "images", "conftest.py"]
HEAD = ["| file | line | mutation | reason |", "|---|---|---|---|"]
NOTICED = {"killed", "timeout", "segfault", "caught by type check"}


def mutmut(copy, *arguments):
    """What it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def survivors(path, tests):
    """[(line, mutation)] of the mutations in a file that its tests do not notice."""
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(folder) / part)
        settings = {"source_paths": [path], "also_copy": PARTS, "timeout_multiplier": 2.0, "timeout_constant": 20.0}
        settings |= {"pytest_add_cli_args_test_selection": tests, "pytest_add_cli_args": ["-k", "not test_processes"]}
        lines = [f"{name} = {value!r}" for name, value in settings.items()]
        (Path(folder) / "pyproject.toml").write_text("\n".join(["[tool.mutmut]", *lines, ""]), encoding="utf-8")
        print(path, *re.findall(r"\d+/\d+ [^\r\n]*", mutmut(folder, "run"))[-1:], flush=True)
        found = re.findall(r"(\S+__mutmut_\d+): (.*)", mutmut(folder, "results"))
        shown = [(name, mutmut(folder, "show", name)) for name, status in found if status not in NOTICED]
        source = (Path(folder) / path).read_text(encoding="utf-8")
    return sorted(described(source, name, diff) for name, diff in shown)


def described(source, name, diff):
    """(line, mutation) of a mutation, whose name is that of a function and a number; `diff` counts from its start."""
    *owner, function = re.fullmatch(r".*\.x(?:_|ǁ(\w+)ǁ)(\w+)__mutmut_\d+", name).groups()
    scopes = [ast.parse(source)]
    if owner[0]:
        scopes = [node for node in scopes[0].body if getattr(node, "name", None) == owner[0]]
    (node,) = (node for node in scopes[0].body if getattr(node, "name", None) == function)
    first = min(part.lineno for part in (node, *node.decorator_list))
    hunk = diff[diff.index("@@") :].splitlines()
    start, before = int(re.match(r"@@ -(\d+)", hunk[0])[1]), [line for line in hunk[1:] if line[:1] != "+"]
    removed = next(k for k, line in enumerate(before) if line.startswith("-"))
    old, new = (" ".join(line[1:].strip() for line in hunk[1:] if line[:1] == sign) for sign in "-+")
    return first + start - 1 + removed, f"`{old}` → `{new}`".replace("|", "\\|")


def main():
    rows = collections.defaultdict(list)  # file: [(line, mutation, reason)]
    for row in TABLE.read_text(encoding="utf-8").splitlines()[2:] if TABLE.exists() else []:
        path, line, mutation, reason = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1])
        rows[path.strip("`")].append((int(line), mutation, reason))
    for path, tests in FILES.items():
        if sys.argv[1:] and not any(word in path for word in sys.argv[1:]):
            continue
        reasons = collections.defaultdict(list)
        for _, mutation, reason in rows[path]:
            reasons[mutation].append(reason)
        rows[path] = [
            (line, text, reasons[text].pop(0) if reasons[text] else "") for line, text in survivors(path, tests)
        ]
        body = [f"| `{path}` | {line} | {text} | {reason} |" for path in FILES for line, text, reason in rows[path]]
        TABLE.write_text("\n".join([*HEAD, *body, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
