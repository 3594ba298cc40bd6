"""Running a check on many examples, and how they ended: a fuzz test where nothing is answered, or nothing is refused, shows nothing."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import hypothesis
import torch
from hypothesis import given
from hypothesis import strategies as st


def ends_of(check: Callable[[st.DataObject], str], wanted: hypothesis.settings) -> Counter[str]:
    """How the examples ended, as `check` calls it; an example that raises fails."""
    ends: Counter[str] = Counter()

    @wanted
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            ends[check(data)] += 1

    each()
    return ends
