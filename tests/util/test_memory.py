"""What a compile asks of the garbage collector and of the C allocator."""

import gc
import weakref

import pytest
import torch

from resq_compiler.ir.promises import in_memory
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


@pytest.fixture
def trims(monkeypatch):
    """An entry for each trim; none is done."""
    done: list[str] = []
    monkeypatch.setattr(memory, "trim", lambda: done.append("trim"))
    return done


def test_free_pages_go_back_as_bytes_are_let_go_of(trims):
    memory.gone(memory.SPARED)
    assert trims == []
    with pytest.raises(KeyError), memory.sparing():
        assert len(trims) == 1
        memory.gone(memory.SPARED - 1)
        assert len(trims) == 1
        memory.gone(1)
        memory.gone(memory.SPARED - 1)
        assert len(trims) == 2
        raise KeyError
    assert len(trims) == 3
    memory.gone(memory.SPARED)
    assert len(trims) == 3


def test_made_tensors_count_when_they_are_let_go_of(trims, monkeypatch):
    monkeypatch.setattr(memory, "SPARED", 400)
    promise = in_memory(torch.ones(10, 10))
    with memory.sparing():
        trims.clear()
        value = promise.made()
        assert trims == []
        del value
        assert trims == ["trim"]
