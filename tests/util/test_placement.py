"""placement.py: whole or not at all, and a directory that exists is never renamed or removed."""

from __future__ import annotations

import errno
import os

import pytest

from resq_compiler.errors import CheckpointError
from resq_compiler.util import placement

OLD, NEW = {"index": "old", "a": "old a", "gone": "old g"}, {"index": "new", "a": "new a", "b": "new b"}


def write(directory, files):
    for name, text in files.items():
        (directory / name).write_text(text)


def read(directory):
    return {p.name: p.read_text() for p in directory.iterdir()}


@pytest.fixture
def target(tmp_path):
    """A directory with old files and one of the user."""
    path = tmp_path / "target"
    path.mkdir()
    write(path, {**OLD, "mine": "kept"})
    return path


def replace(path, files=NEW, old=OLD):
    with placement.replacing(path, old, last="index") as fresh:
        write(fresh, files)


@pytest.fixture
def no_rename_of(monkeypatch):
    """Makes os.rename and os.replace of one directory fail, as those of a mount point do."""

    def refuse(directory):
        for name in ("rename", "replace"):
            real = getattr(os, name)

            def move(source, destination, real=real):
                if os.path.realpath(source) == str(directory) or os.path.realpath(destination) == str(directory):
                    raise OSError(errno.EBUSY, "Device or resource busy")
                real(source, destination)

            monkeypatch.setattr(os, name, move)

    return refuse


def test_new_directory(tmp_path):
    replace(tmp_path / "some" / "where")
    assert read(tmp_path / "some" / "where") == NEW


def test_replaces_old_files_and_keeps_others(target):
    replace(target)
    assert read(target) == {**NEW, "mine": "kept"}


def test_mount_point(target, no_rename_of):
    no_rename_of(target)
    (target / "lost+found").mkdir()
    assert placement.contents(target) == {*OLD, "mine"}
    replace(target, old=placement.contents(target))
    (target / "lost+found").rmdir()
    assert read(target) == NEW


@pytest.mark.parametrize("form", ["symlink", "dangling", "dot"])
def test_targets_that_are_not_plain_names(form, target, tmp_path, monkeypatch):
    if form == "dot":
        monkeypatch.chdir(target)
        replace(placement.Path("."))
        assert os.getcwd() == str(target) and os.path.exists("index")
    else:
        link = tmp_path / "link"
        link.symlink_to(target if form == "symlink" else tmp_path / "later")
        replace(link)
        assert link.is_symlink() and read(link)["index"] == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_parent_that_is_not_writable(target):
    target.parent.chmod(0o500)
    try:
        placement.check(target)
        replace(target)
    finally:
        target.parent.chmod(0o700)
    assert read(target) == {**NEW, "mine": "kept"}


@pytest.mark.parametrize("failing", range(6))
@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EACCES, errno.ENOSPC])
def test_any_rename_that_fails_is_undone(target, monkeypatch, failing, code):
    """Three old files leave, three new ones come; the n-th move fails."""
    before, real, calls = read(target), os.rename, []

    def rename(source, destination):
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError(code, os.strerror(code))
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match=os.strerror(code)):
        replace(target)
    assert read(target) == before


def test_files_that_cannot_be_moved_back_are_named(target, monkeypatch):
    real, calls = os.rename, []

    def rename(source, destination):
        calls.append(source)
        if len(calls) > 2:
            raise OSError(errno.EIO, "input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(CheckpointError, match="former files could not be moved back .*they are in (.*)$") as caught:
        replace(target)
    former = placement.Path(str(caught.value).rpartition(" ")[2])
    assert read(former) == {"index": "old", "a": "old a"}


def test_order_of_moves(target, monkeypatch):
    """The index leaves first and comes last, so no reader finds an index of one set with files of the other."""
    seen, real = [], os.rename

    def rename(source, destination):
        seen.append((target / "index").exists())
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    replace(target)
    assert seen == [True, False, False, False, False, False]


@pytest.mark.parametrize("exists", [True, False])
def test_an_error_inside_changes_nothing(exists, target, tmp_path):
    path = target if exists else tmp_path / "absent"
    with pytest.raises(KeyboardInterrupt), placement.replacing(path, OLD, last="index") as fresh:
        write(fresh, NEW)
        raise KeyboardInterrupt
    assert read(target) == {**OLD, "mine": "kept"} and [p.name for p in tmp_path.iterdir()] == ["target"]


def test_names_of_old_files_cannot_lead_out_of_the_directory(target, tmp_path):
    (tmp_path / "precious").write_text("kept")
    replace(target, old=[*OLD, "../precious"])
    assert (tmp_path / "precious").read_text() == "kept"


def test_check_leaves_no_trace(target, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    placement.check(target)
    placement.check(tmp_path / "not" / "there")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(NotADirectoryError):
        placement.check(target / "index")
    with pytest.raises(NotADirectoryError):
        placement.check(target / "index" / "below")
