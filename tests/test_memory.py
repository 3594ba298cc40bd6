"""What a compile asks of the garbage collector and of the C allocator."""

import gc
import weakref

import pytest

from resq_compiler import memory


class Cycle:
    def __init__(self):
        self.itself = self


def test_collections_inside_see_only_what_is_new():
    old = Cycle()
    known = weakref.ref(old)
    with memory.settled():
        assert gc.get_freeze_count() > 0
        del old
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None and known() is not None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert known() is None


def test_objects_thaw_after_an_error():
    with pytest.raises(KeyError), memory.settled():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_the_caller_froze_stays_frozen():
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        with memory.settled():
            assert gc.get_freeze_count() == count
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()
