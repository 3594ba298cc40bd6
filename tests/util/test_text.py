"""Tables and numbers as people read them."""

from __future__ import annotations

import math

from resq_compiler.util import text

ROWS = [("a", "1"), ("  long", "22")]


def test_a_table_for_the_terminal_keeps_indents_and_aligns_numbers_to_the_right():
    assert text.table(("", "n"), ROWS) == "          n\n------  ---\na         1\n  long   22"


def test_a_table_in_markdown():
    assert text.table(("x", "n"), ROWS, markdown=True).splitlines()[1] == "|:-------|----:|"


def test_a_table_without_rows_is_its_heading():
    assert text.table(("x", "n"), []) == "x    n\n---  ---"


def test_texts_that_look_like_numbers_stay_as_they_are():
    assert text.table(("x",), [("1e5",), ("0.50",)]).splitlines()[2:] == ["1e5", "0.50"]


def test_numbers():
    assert [text.number(v) for v in (None, 12345.6, math.inf, 0.5)] == ["-", "12,346", "inf", "0.500"]
    assert text.percent(0.5) == "50.0 %" and text.percent(None) == "-"
    assert text.megabytes(1.5e6) == "1.5 MB" and text.megabytes(None) == "-"
