"""Paths as the user gives them, and files that are written once, whole or not at all."""

import os
from pathlib import Path

import pytest

from style_transfer.engine.checks import MissingFileError, UserError, as_file, file_version
from style_transfer.engine.saving import joint_stem, write_new, write_numbered


@pytest.mark.parametrize("what", ["picture", "weights"])
def test_a_path_is_a_file_or_a_sentence(what, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    Path("here.jpg").touch()
    assert as_file("here.jpg", what) == as_file(Path("here.jpg"), what) == Path("here.jpg")
    assert as_file(next(os.scandir()), what).name == "here.jpg"
    for missing in ("absent.jpg", "here.jpg/inside.jpg", "", "."):
        with refuses(f"no {what} at {str(Path(missing)) if missing == '.' else missing!r}", MissingFileError):
            as_file(missing, what)
    with pytest.raises(FileNotFoundError):  # as Python calls it
        as_file("absent.jpg", what)
    for value in (None, b"here.jpg", 7, ["here.jpg"], 0.5, next(os.scandir(b"."))):
        with refuses(f"no {what} at {value!r}: give the path of a file, as a str or a Path"):
            as_file(value, what)
    for address in ("https://example.org/a.jpg", "file:///a.jpg", "data:/image"):
        with refuses(f"no {what} at {address!r}, which is an address"):
            as_file(address, what)
    for name, why in (("x" * 300, "File name too long"), ("a\0b", "embedded null")):
        with pytest.raises(UserError, match=f"{why}") as caught:
            as_file(name, what)
        assert str(caught.value).startswith(f"no {what} can be read at {name!r}: ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the pipes of POSIX")
def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path, refuses):
    os.mkfifo(tmp_path / "pipe")
    with refuses(f"{str(tmp_path / 'pipe')!r}, which is a device"):
        as_file(tmp_path / "pipe", "picture")


def test_a_folder_without_permission_is_said(as_nobody, refuses):
    with as_nobody() as folder:
        path = folder / "a.jpg"
        path.touch()
        assert as_file(path, "picture") == path
        folder.chmod(0o600)
        with refuses(f"can be read at {str(path)!r}: Permission denied"):
            as_file(path, "picture")


def test_a_file_has_another_version_when_it_is_written_again(tmp_path):
    """Though its size is the same, or its time of writing is set back."""
    path = tmp_path / "a"
    assert file_version(path) is None
    path.write_bytes(b"one")
    first = file_version(path)
    assert file_version(path) == first
    os.utime(path, ns=(5, first[0]))
    path.write_bytes(b"two!")
    os.utime(path, ns=(5, first[0]))
    assert file_version(path) != first
    path.write_bytes(b"one")
    os.utime(path, ns=(5, first[0] + 1))
    assert file_version(path) != first


def test_names_become_one_that_a_file_system_takes(tmp_path):
    assert joint_stem(Path("a/castle.2020.jpg"), Path("night")) == "castle.2020_night"
    for stem in (60 * "浮世絵", 250 * "x", 100 * "é", "\udcff" + 240 * "y"):
        joint = joint_stem(Path(stem + ".png"), Path(f"{stem}.jpg"))
        assert len(os.fsencode(joint)) <= 200 and joint[0] in stem + "_y" and joint.count("_") == 1
        write_new(tmp_path / f"{joint}.safetensors", b"")


def test_a_new_file_is_written_once_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_new(path, b"mine")
    with pytest.raises(FileExistsError):
        write_new(path, b"another's")
    assert path.read_bytes() == b"mine"
    with pytest.raises(TypeError):
        write_new(tmp_path / "b", "no bytes")
    assert [*tmp_path.iterdir()] == [path]


def test_a_numbered_file_takes_the_first_number_that_is_free(tmp_path):
    for expected in ("001", "002"):
        assert write_numbered(tmp_path / "new", "a", ".png", expected.encode()).name == f"a_{expected}.png"
    (tmp_path / "new" / "a_003.png").mkdir()
    (tmp_path / "new" / "a_001.png").unlink()
    (tmp_path / "new" / "a_004.png").symlink_to("nowhere")
    made = [write_numbered(tmp_path / "new", "a", ".png", b"") for _ in range(2)]
    assert [path.name for path in made] == ["a_001.png", "a_005.png"]
    assert (tmp_path / "new" / "a_002.png").read_bytes() == b"002"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        write_numbered(tmp_path / "file", "a", ".png", b"")
