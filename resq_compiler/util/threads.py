"""Pieces of work on one thread each. Threads of torch that share an operator of microseconds spend most of their time meeting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def map_threads(do: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """do(piece) of every piece, in order: as many at a time as torch has threads, each on one thread."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [do(piece) for piece in pieces]
    try:
        with ThreadPoolExecutor(min(threads, len(pieces)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(do, pieces))
    finally:
        torch.set_num_threads(threads)  # a thread sets it for threads to come, too
