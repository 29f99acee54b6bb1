"""Who handed in what: the notebooks in a folder or a zip, as Canvas, Moodle, nbgrader or people make them.

A notebook is recognised by its questions, whatever its file is called. The student is named by the outermost folder,
or by the file name that a platform gives. Nothing is unpacked to disk.
"""

import io
import re
import time
import unicodedata
import zipfile
from functools import partial
from pathlib import PurePosixPath

import nbformat
from homework import NAME, grade_id

MOST_BYTES = 1_000_000_000  # of a zip when unpacked
OTHERS = {NAME, *"assignment notebooks submitted submissions release".split()}  # names that are not students'
CANVAS = re.compile(r"(?P<name>[^_]+)_(?P<late>LATE_)?(?P<id>\d+)_\d+_.*?(-(?P<number>\d+))?")
MOODLE = re.compile(r"(?P<name>.+?)_(?P<late>)(?P<id>\d+)_assignsubmission.*(?P<number>)")


def files_in(folder, path=()):
    """Yield (path, as names of folders, zips and file; time; function that reads it, or an error) for each file."""
    for entry in sorted(folder.iterdir()):
        below = (*path, entry.name.encode("utf-8", "replace").decode())
        if entry.is_dir():
            yield from files_in(entry, below)
        elif entry.is_file():
            yield from opened(below, time.localtime(entry.stat().st_mtime)[:6], entry.read_bytes)


def opened(path, when, read):
    """Yield a file, or the files in it if it is a zip, as `files_in` does."""
    if path and not path[-1].lower().endswith(".zip"):
        yield path, when, read
        return
    try:
        archive = zipfile.ZipFile(io.BytesIO(read()))
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > MOST_BYTES:
            raise ValueError("it unpacks to more than a gigabyte")
        for entry in entries:
            inner = PurePosixPath(entry.filename.replace("\\", "/")).parts
            if not entry.is_dir():
                yield from opened((*path, *inner), entry.date_time, partial(archive.read, entry))
    except Exception as error:  # a broken zip can raise anything
        yield path, when, error


def student_of(path, notebooks):
    """(Student, late, resubmission number) by the outermost name that tells; the last two are Canvas's only."""
    for k, part in enumerate(path):
        part = unicodedata.normalize("NFC", part)  # a Mac's umlauts are two characters
        is_file = k == len(path) - 1 or part.lower().endswith(".zip")
        stem = re.sub(r"(\.\w{1,5})+$", "", part) if is_file else part
        stem = re.sub(rf"({'|'.join(notebooks)})( \(\d+\))?", "", stem)
        joined = stem != part  # an extension or a notebook's name was removed
        stem = re.sub(r"[^\w .,()@-]", lambda found: f"_{ord(found[0]):x}", stem)
        if found := is_file and CANVAS.fullmatch(stem) or MOODLE.fullmatch(stem):
            return f"{found['name']}_{found['id']}", bool(found["late"]), int(found["number"] or 0)
        stem = stem.strip(" _-.") if joined else stem
        if stem and stem.lower() not in OTHERS and (k < len(path) - 1 or re.search(r"[^\W\d_]", stem)):
            return stem[:60] + stem[60:][-20:], False, 0  # a long name keeps its beginning and end
    return "unknown", False, 0


def without_wrapping(files, notebooks):
    """Drop a folder around all files if it holds Canvas's names, or files of one name from several students."""
    inner = [(path[1:], *rest) for path, *rest in files]
    students = {student_of(path[:-1], notebooks)[0] for path, *_ in inner} - {"unknown"}
    doubles = len({path[-1:] for path, *_ in inner}) < len(inner)
    canvas = all(path and CANVAS.fullmatch(path[0]) for path, *_ in inner)
    if len({path[:1] for path, *_ in files}) != 1 or not canvas and (len(students) < 2 or not doubles):
        return files
    return without_wrapping(inner, notebooks)


def recognised(notebook, sources):
    """The name of our notebook that shares the most questions and tests with this one; None if none does."""
    keys = {grade_id(cell) or cell.get("id") for cell in notebook.cells} - {None}
    common = {name: len(keys & set(map(grade_id, ours.cells))) for name, ours in sources.items()}
    return max(common, key=common.get) if any(common.values()) else None


def collect(files, sources):
    """({student: {notebook: its text}}, {student: sentences on the files})."""
    chosen, newest, remarks = {}, {}, {}
    files = [file for file in files if not re.search(r"(^|/)(\.|__MACOSX)", "/".join(file[0]))]
    for path, when, read in without_wrapping(files, sources):
        student, late, number = student_of(path, sources)
        said, where = remarks.setdefault(student, []), "/".join(path)
        said += ["late"] if late and "late" not in said else []
        if isinstance(read, Exception):
            said.append(f"{where} cannot be opened as a zip: {read}")
        elif not where.lower().endswith(".ipynb"):
            said.append(f"{where} was ignored")
        else:
            try:
                # Drop the \r of Windows line ends, and surrogate escapes, which cannot be encoded.
                content = re.sub(r"(?i)(?<!\\)\\(r(?=\\n)|ud[89a-f]..)", "", read().decode("utf-8-sig"))
                name = recognised(nbformat.reads(content, 4), sources)
            except Exception as error:  # a broken notebook can raise anything
                said.append(f"{where} cannot be read as a notebook: {str(error)[:80]}")
                continue
            rank = number, when, where
            before = newest.get((student, name), rank)
            if before != rank:
                said.append(f"{name} was handed in twice: {max(before, rank)[2]} counts")
            if not name:
                said.append(f"{where} has none of the homework's questions")
            elif rank >= before:
                newest[student, name] = rank
                chosen.setdefault(student, {})[name] = content
    return chosen, remarks
