from __future__ import annotations

from dataclasses import dataclass

import pytest

from resq_compiler.errors import PassError
from resq_compiler.pipeline.facts import Facts


@dataclass(frozen=True)
class Colour:
    name: str


def test_values_are_kept_by_type():
    facts = Facts([Colour("red"), 3])
    assert facts.get(Colour) == Colour("red") and facts.get(int) == 3 and facts.kinds() == {Colour, int}
    facts.put(Colour("blue"))
    assert list(facts) == [Colour("blue"), 3] and facts.find(str) is None
    facts.drop(Colour)
    facts.drop(str)
    with pytest.raises(PassError, match="Colour is not known yet; expected a pass before this one .*known: int"):
        facts.get(Colour)
