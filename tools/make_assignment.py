"""Write the students' release of the three notebooks, with its handout, into assignment/ and assignment.zip.

Needs nbgrader, so it runs in nbgrader's own environment. nbgrader works in a course folder, which here is temporary.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path

import jinja2
import nbformat
from homework import CODE_BLANK, NAME, ROOT, TEXT_BLANK, questions, read_notebooks
from nbgrader.apps import NbGraderAPI
from traitlets.config import PyFileConfigLoader

# Students need no test tools, and get HANDOUT.md instead of README.md.
CHANGED = [("requirements.txt", r"(nbval|pytest)==.*\n", ""), ("pyproject.toml", "README", "HANDOUT")]
# The functions that are blank in the released helper: signature and docstring, body.
FORMULAS = r'(?ms)^(def (?:gram_matrix|content_loss|style_loss|make_objective)\(.*?""".*?"""\n).*?(?=\n\n\n)'
HELPER_BLANK = 'raise NotImplementedError("yours to write: first in the notebook, then here")'


def open_course(folder, changed=lambda notebook: notebook):
    """Make an nbgrader course with its release in a folder, from our notebooks as `changed` returns them."""
    source = folder / "source" / NAME
    source.mkdir(parents=True, exist_ok=True)
    for name, notebook in read_notebooks(ROOT / "notebooks").items():
        nbformat.write(changed(notebook), source / f"{name}.ipynb")
    config = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT / "tools")).load_config()
    config.CourseDirectory.root = str(folder)
    course = NbGraderAPI(config=config)
    result = course.generate_assignment(NAME)
    assert result["success"], result
    return course


def write_helper(target):
    """Write the helper with blank formulas, the package and the images into the folder `target`."""
    target.mkdir(exist_ok=True)
    for name in ("style_transfer", "images"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    helper = (ROOT / "nst_utils.py").read_text("utf-8")
    (target / "nst_utils.py").write_text(re.sub(FORMULAS, rf"\1    {HELPER_BLANK}", helper), "utf-8")


def write_release(folder, target):
    """Write everything that a student gets into the new folder `target`, from the course in `folder`."""
    shutil.copytree(folder / "release" / NAME, target / "notebooks")
    write_helper(target)
    shutil.copy(ROOT / "LICENSE", target)
    asked = sum(map(questions, read_notebooks(ROOT / "notebooks").values()), [])
    page = jinja2.Template((ROOT / "tools" / "handout.md").read_text("utf-8"))
    page = page.render(asked=asked, code_blank=CODE_BLANK, text_blank=TEXT_BLANK)
    (target / "HANDOUT.md").write_text(page, "utf-8")
    for name, words, others in CHANGED:
        text = (ROOT / name).read_text("utf-8")
        (target / name).write_text(re.sub(words, others, text), "utf-8")


if __name__ == "__main__":
    target = Path(*sys.argv[1:] or [ROOT / "assignment"])
    if target.exists():
        sys.exit(f"{target.name} already exists: move it away first, in case you have worked on it.")
    with tempfile.TemporaryDirectory() as folder:
        open_course(Path(folder))
        write_release(Path(folder), target)
    shutil.make_archive(target, "zip", target.parent, target.name)
    print(f"The students' release is in {target.name}/ and {target.name}.zip; HANDOUT.md explains it.")
