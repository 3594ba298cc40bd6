"""What a compile asks of the garbage collector and of the C allocator."""

import gc
import weakref

import pytest

from resq_compiler.util import memory


class Cycle:
    def __init__(self):
        self.itself = self


@pytest.fixture
def frozen(monkeypatch):
    """A collector whose count of frozen objects is this list's length: the real one changes whenever an object dies."""
    held: list[str] = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(held))
    monkeypatch.setattr(gc, "freeze", lambda: held.append("frozen"))
    monkeypatch.setattr(gc, "unfreeze", held.clear)
    return held


def test_collections_inside_see_only_what_is_new():
    old = Cycle()
    known = weakref.ref(old)
    with memory.settled():
        del old
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None and known() is not None
    gc.collect()
    assert known() is None


def test_objects_thaw_after_an_error(frozen):
    with pytest.raises(KeyError), memory.settled():
        assert frozen == ["frozen"]
        raise KeyError
    assert frozen == []


def test_what_the_caller_froze_stays_frozen(frozen):
    frozen.append("the caller's")
    with memory.settled():
        assert frozen == ["the caller's"]
    assert frozen == ["the caller's"]
