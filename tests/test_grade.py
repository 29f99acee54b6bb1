"""Whom `make grade` takes a file for, and what it makes of files that are no notebooks: before anything is run."""

import io
import json
import os
import zipfile

import nbformat
import pytest
from collect import MOST_BYTES, collect, files_in, opened
from homework import ROOT, questions, read_notebooks

SOURCES = read_notebooks(ROOT / "notebooks")
ONE, TWO, THREE = SOURCES
TEXTS = {name: (ROOT / "notebooks" / f"{name}.ipynb").read_bytes() for name in SOURCES}


def zip_of(files):
    """The bytes of a zip: {path: bytes, or (bytes, year)}."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for path, content in files.items():
            content, year = content if isinstance(content, tuple) else (content, 2026)
            archive.writestr(zipfile.ZipInfo(path, (year, 1, 1, 0, 0, 0)), content)
    return written.getvalue()


def collected(files):
    """What `collect` makes of a zip of these files."""
    return collect(opened((), (), lambda: zip_of(files)), SOURCES)


@pytest.mark.parametrize(
    "path, student",
    [
        (f"muellerhans_12345_67890_{ONE}-2.ipynb", "muellerhans_12345"),
        (f"muellerhans_LATE_12345_67890_{ONE}.ipynb", "muellerhans_12345"),
        (f"Hans Müller_77_assignsubmission_file_/{ONE}.ipynb", "Hans Müller_77"),
        (f"submitted/hans/style-transfer/{ONE}.ipynb", "hans"),
        (f"hans/assignment/notebooks/week 7/{ONE}.ipynb", "hans"),
        (f"{ONE}_hans.ipynb", "hans"),
        (f"hans {ONE} (1).ipynb", "hans"),
        ("my homework.ipynb", "my homework"),
        (f"jane/final_{ONE}.ipynb", "jane"),
        (f"2024_001_anna/{ONE}.ipynb", "2024_001_anna"),
        (f"group_12_3/{ONE}.ipynb", "group_12_3"),
        (f"<img src=x>/{ONE}.ipynb", "_3cimg src_3dx_3e"),
        (f"{'long ' * 40}/{ONE}.ipynb", "long " * 12 + "long " * 4),
        (f"Hans Mu\u0308ller/{ONE}.ipynb", "Hans Müller"),
        (f"{ONE}.IPYNB", "unknown"),
    ],
)
def test_the_outermost_name_is_the_student(path, student):
    chosen, remarks = collected({path: TEXTS[ONE]})
    assert list(chosen) == list(remarks) == [student] and list(chosen[student]) == [ONE]
    assert remarks[student] == (["late"] if "LATE" in path else [])


def test_namesakes_and_similar_folders_are_not_merged():
    names = ["Jane/", "jane/", "-jane/", "jane_/", "a<b/", "a>b/", "smithjohn_11_9_", "smithjohn_21_9_"]
    names += [f"{'long ' * 30}{k}/" for k in (1, 2)]
    paths = [f"{name}{ONE}.ipynb" for name in names]
    chosen, _ = collected({path: TEXTS[ONE] for path in paths})
    others = [f"{'long ' * 12}ong {'long ' * 3}{k}" for k in (1, 2)]  # 60 characters of the beginning, 20 of the end
    assert {*chosen} == {"Jane", "jane", "-jane", "jane_", "a_3cb", "a_3eb", "smithjohn_11", "smithjohn_21", *others}


def test_zips_belong_to_the_outermost_name_and_a_folder_around_all_to_nobody():
    work = zip_of({f"assignment/{TWO}.ipynb": TEXTS[TWO]})
    chosen, _ = collected({
        "week 7/annab_12_34_work.zip": work, "week 7/carl/all/work.zip": work, f"week 7/dora/{TWO}.ipynb": TEXTS[TWO],
    })  # fmt: skip
    assert sorted(chosen) == ["annab_12", "carl", "dora"] and all([*own] == [TWO] for own in chosen.values())
    chosen, _ = collected({f"week 7/{name}_9_{TWO}.ipynb": TEXTS[TWO] for name in ("annab_12", "carl_LATE_13")})
    assert sorted(chosen) == ["annab_12", "carl_13"]


def test_of_two_the_newer_counts_by_the_times_in_the_zip():
    one = SOURCES[ONE].copy()
    old, new = (nbformat.writes(nbformat.from_dict({**one, "metadata": {"year": year}})) for year in (2025, 2026))
    chosen, remarks = collected(
        {f"anna/a/{ONE}.ipynb": (new, 2026), f"anna/b/{ONE}.ipynb": (old, 2025), f"ben/{TWO}.ipynb": b""}
    )
    assert json.loads(chosen["anna"][ONE])["metadata"]["year"] == 2026
    assert remarks["anna"] == [f"{ONE} was handed in twice: anna/a/{ONE}.ipynb counts"]


def test_a_notebook_is_recognised_by_its_questions_in_whatever_form_it_comes():
    bare = json.loads(TEXTS[TWO])
    for cell in bare["cells"]:
        cell["metadata"] = {}
    other = json.loads(TEXTS[ONE])
    for cell in other["cells"]:
        del cell["id"]
        cell["source"] = "\r\n".join("".join(cell["source"]).splitlines()) + "\ud83d"
    other["nbformat_minor"] = 0
    chosen, remarks = collected({
        "anna/only ids.ipynb": json.dumps(bare), "anna/no ids.ipynb": b"\xef\xbb\xbf" + json.dumps(other).encode()
    })  # fmt: skip
    assert {*chosen["anna"]} == {ONE, TWO} and not remarks["anna"] and "\\r\\n" not in chosen["anna"][ONE]
    assert all("\ud83d" not in cell.source for cell in nbformat.reads(chosen["anna"][ONE], 4).cells)


def test_what_is_no_notebook_of_ours_is_named_and_its_student_has_a_row(tmp_path):
    empty = nbformat.writes(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]))
    encrypted = bytearray(zip_of({f"{ONE}.ipynb": b"x"}))
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        encrypted[encrypted.find(mark) + (6 if mark[2] == 3 else 8)] |= 1
    files = {
        "broken.ipynb": b"{", "other.ipynb": empty.encode(), "work.rar": b"", f"{ONE}.ipynb.txt": b"", "page.html": b"",
        "odd.zip": b"no zip", "locked.zip": bytes(encrypted), "list.ipynb": b"[1]", "latin.ipynb": b"\xe9",
    }  # fmt: skip
    for k, (name, content) in enumerate(files.items()):
        (tmp_path / f"student {k}").mkdir()
        (tmp_path / f"student {k}" / name).write_bytes(content)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / f"{ONE}.ipynb").write_bytes(TEXTS[ONE])
    os.mkfifo(tmp_path / "pipe.ipynb")
    chosen, remarks = collect(files_in(tmp_path), SOURCES)
    words = ["cannot be read as", "has none of", "ignored", "ignored", "ignored", "as a zip", "cannot be read"]
    words += ["cannot be read as", "cannot be read as"]
    assert not chosen and [*remarks] == [f"student {k}" for k in range(len(files))]
    for (name, said), word, path in zip(remarks.items(), words, files):
        assert len(said) == 1 and f"{name}/{path}" in said[0] and word in said[0]


def test_a_zip_of_more_than_a_gigabyte_is_refused():
    with io.BytesIO() as written:
        with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("anna/zeros.ipynb", b"0" * 1000)
        content = bytearray(written.getvalue())
    place = content.find(b"PK\x01\x02") + 24
    content[place : place + 4] = (MOST_BYTES + 1).to_bytes(4, "little")
    chosen, remarks = collect(opened((), (), lambda: bytes(content)), SOURCES)
    assert not chosen and "more than a gigabyte" in remarks["unknown"][0]


def test_the_points_of_the_homework():
    asked = {question.name: question for source in SOURCES.values() for question in questions(source)}
    assert sum(question.most for question in asked.values()) == 40
    assert sum(question.most for question in asked.values() if question.by_hand) == 19
    assert asked["objective"].points == {"test-objective-parts": 3, "test-objective-total": 2}
