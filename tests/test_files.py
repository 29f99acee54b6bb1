"""Paths as the user gives them, and files that are written whole or not at all."""

import os
from pathlib import Path

import pytest
from full_disk import full_disk

from style_transfer.engine.checks import MissingFileError, UserError, as_file, file_version
from style_transfer.engine.saving import joint_stem, write_new, write_numbered, write_over

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX")


@pytest.mark.parametrize("what", ["picture", "weights"])
def test_a_path_is_a_file_or_refused_in_a_sentence(what, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    Path("here.jpg").touch()
    for path in ("here.jpg", Path("here.jpg"), next(os.scandir())):
        assert as_file(path, what).name == "here.jpg"
    for missing in ("absent.jpg", "here.jpg/inside.jpg", "", "."):
        with refuses(f"no {what} at {missing!r}", MissingFileError):
            as_file(missing, what)
    for value in (None, b"here.jpg", 7, ["here.jpg"], next(os.scandir(b"."))):
        with refuses(f"no {what} at {value!r}: give the path of a file, as a str or a Path"):
            as_file(value, what)
    for address in ("https://example.org/a.jpg", "file:///a.jpg", "data:/image"):
        with refuses(f"no {what} at {address!r}, which is an address"):
            as_file(address, what)
    for name, why in (("x" * 300, "File name too long"), ("a\0b", "embedded null")):
        with pytest.raises(UserError, match=f"^no {what} can be read at .*: {why}"):
            as_file(name, what)


@posix
def test_a_pipe_is_no_file_and_nobody_waits_for_it(tmp_path, refuses):
    os.mkfifo(tmp_path / "pipe")
    with refuses(f"{str(tmp_path / 'pipe')!r}, which is a device"):
        as_file(tmp_path / "pipe", "picture")


def test_a_file_has_another_version_when_it_is_written_again(tmp_path):
    """Even if its size is the same, or its time of writing is set back."""
    path = tmp_path / "a"
    assert file_version(path) is None
    path.write_bytes(b"one")
    first = file_version(path)
    assert file_version(path) == first
    for content, time in ((b"two!", first[0]), (b"one", first[0] + 1)):
        path.write_bytes(content)
        os.utime(path, ns=(5, time))
        assert file_version(path) != first


def test_stems_are_joined_to_one_that_file_systems_accept(tmp_path):
    assert joint_stem(Path("a/castle.2020.jpg"), Path("night")) == "castle.2020_night"
    for stem in (60 * "浮世絵", 250 * "x", 100 * "é", "\udcff" + 240 * "y"):
        joint = joint_stem(Path(stem + ".png"), Path(f"{stem}.jpg"))
        assert len(os.fsencode(joint)) <= 200 and joint[0] in stem + "_y" and joint.count("_") == 1
        write_new(tmp_path / f"{joint}.safetensors", b"")


@pytest.mark.parametrize("length", [1001, 10**6], ids=["flush fails", "write fails"])
def test_a_file_is_written_whole_or_not_at_all(length, tmp_path):
    path = tmp_path / "a"
    with full_disk(), pytest.raises(OSError):
        write_new(path, bytes(length))
    assert not path.exists()
    write_new(path, b"mine")
    with pytest.raises(FileExistsError):
        write_new(path, b"another's")
    with full_disk(), pytest.raises(UserError, match=f"{path.name}' cannot be written, and is unchanged: .*large"):
        write_over(path, lambda aside: aside.write_bytes(bytes(length)))
    assert path.read_bytes() == b"mine" and [*tmp_path.iterdir()] == [path]
    with open(path, "rb") as reader:
        write_over(path, lambda aside: aside.write_bytes(b"new"))
        assert reader.read() == b"mine"  # it was replaced, not changed
    assert path.read_bytes() == b"new" and [*tmp_path.iterdir()] == [path]


def test_a_numbered_file_takes_the_first_free_number(tmp_path):
    folder = tmp_path / "new"
    assert write_numbered(folder, "a", b"first") == folder / "a_001.png"
    (folder / "a_002.png").mkdir()
    (folder / "a_003.png").symlink_to("nowhere")
    (folder / "a_005.png").touch()
    made = [write_numbered(folder, "a", b"") for _ in range(2)]
    assert [path.name for path in made] == ["a_004.png", "a_006.png"]
    assert (folder / "a_001.png").read_bytes() == b"first"
    with pytest.raises(OSError):
        write_numbered(folder / "a_001.png", "a", b"")
