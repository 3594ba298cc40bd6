"""Pieces of work on threads of one's own."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.util.threads import map_threads


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_order_and_every_piece_has_one_thread(threads):
    assert map_threads(lambda x: (x, torch.get_num_threads()), range(7)) == [(x, 1) for x in range(7)]
    assert torch.get_num_threads() == threads


def test_an_error_of_a_piece_is_raised_and_threads_are_as_before(threads):
    with pytest.raises(ZeroDivisionError):
        map_threads(lambda x: 1 // x, range(3))
    assert torch.get_num_threads() == threads
    assert torch.ones(4).sum() == 4
