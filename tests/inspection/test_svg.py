"""Static pictures: one open block of each kind, every operator drawn, equal input gives equal text."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from resq_compiler.errors import DumpError
from resq_compiler.inspection import dump, svg
from resq_compiler.inspection.text import COLOURS

graphlay = pytest.importorskip("graphlay")
TEXT = "{http://www.w3.org/2000/svg}text"


def words(picture):
    return [" ".join(element.itertext()) for element in ElementTree.fromstring(picture).iter(TEXT)]


def renamed(record, block):
    """A node of block 1 as it would be in another block."""

    def name(old):
        return f"{old}_copy{block}" if old in members else old

    members = renamed.members
    return {**record, "name": name(record["name"]), "inputs": [name(n) for n in record["inputs"]], "block": block}


@pytest.fixture
def records(compiled):
    return dump.read_stage(compiled.dump, "13-quantize-kv-cache")


def test_every_operator_of_an_open_block_is_drawn_with_its_colour(records):
    picture = svg.graph_svg(records)
    found = words(picture)
    assert "block 0" in found and "quantized_linear  W4A4" in found and "project U_C" in found
    high = sum(r["target"] == "quantized_linear" and r["bits"] == "W8A8" and r["block"] == 0 for r in records)
    drawn = found.count("quantized_linear  W8A8")
    assert high == 6 and drawn in (6, 12)  # six linears have a high part; block 1 is drawn too where it differs
    assert all(COLOURS[precision] in picture for precision in ("float", "4", "8", "mixed"))


def test_equal_blocks_are_folded_into_one_box(records):
    members = [r for r in records if r["block"] == 1]
    renamed.members = {r["name"] for r in members}
    copies = [renamed(r, block) for block in (2, 3, 4) for r in members]
    found = words(svg.graph_svg([*records, *copies]))
    assert "blocks 2 to 4" in found or "blocks 1 to 4" in found
    assert len(found) < 1.2 * len(words(svg.graph_svg(records)))


def test_equal_stages_give_equal_pictures(compiled, records):
    assert svg.graph_svg(records) == (compiled.dump / "13-quantize-kv-cache.svg").read_text()


def test_the_failing_node_is_marked_and_its_block_is_open(records):
    node = next(r["name"] for r in records if r["block"] == 1 and r["target"] == "attention")
    picture = svg.graph_svg(records, node)
    assert picture.count(svg.FAILED) == 1 and "block 1" in words(picture)


def test_a_graph_with_missing_and_circular_inputs_is_drawn(records):
    first = next(r for r in records if r["target"] == "rms_norm")
    broken = [{**r, "inputs": [*r["inputs"], "nowhere", first["name"]]} if r is first else r for r in records]
    assert "rms_norm" in words(svg.graph_svg(broken))


def test_without_the_library_the_error_names_the_extra(records, monkeypatch):
    monkeypatch.setattr(svg, "library_available", lambda: False)
    with pytest.raises(DumpError, match=r"graphlay: pip install 'resq_compiler\[inspect\]'"):
        svg.graph_svg(records)
