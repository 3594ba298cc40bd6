"""What inspecting a real model costs, and what two compiles of it differ in: SmolLM2 with weights rounded to nearest."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

import resq_compiler
from resq_compiler.calibration.data import demo_text
from resq_compiler.frontend.models import embedded_model_path, load_model
from resq_compiler.inspection import dump_files
from resq_compiler.inspection.attribution import attribute
from resq_compiler.inspection.diff import compare, difference_text
from resq_compiler.inspection.page import write_page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiles(tmp_path_factory):
    """Two compiles with dumps, with caches of 4 and of 8 bits, and the float graph of the first."""
    loaded, held, found = load_model(embedded_model_path()), [], SimpleNamespace()
    for bits in (4, 8):
        directory = tmp_path_factory.mktemp(f"kv{bits}")
        compiled = resq_compiler.compile(
            loaded.model, [demo_text()[0]], recipe="resq", tokenizer=loaded.tokenizer, weight_method="rtn", kv_bits=bits,
            calibration_samples=1, calibration_length=256, dump_dir=directory, on_float=None if held else held.append,
        )  # fmt: skip
        found.model, found.first = (compiled, directory) if bits == 4 else (found.model, found.first)
        found.second = directory
    found.projected, found.ids = (
        held[0],
        found.model.tokenizer(demo_text()[1], return_tensors="pt").input_ids[:, :512].view(2, 256),
    )
    return found


def test_a_dump_with_its_page_is_written_within_20_seconds_and_10_megabytes(compiles, tmp_path):
    begun = time.process_time()  # of all threads, so a crowded machine does not count
    compiles.model.dump(tmp_path)
    assert time.process_time() - begun < 20
    assert (tmp_path / dump_files.PAGE).stat().st_size < 10e6
    begun = time.process_time()
    write_page(tmp_path)
    assert time.process_time() - begun < 5


def test_kinds_and_blocks_are_attributed_within_3_minutes(compiles):
    begun = time.process_time()
    costs = attribute(compiles.model.graph_module, compiles.projected, compiles.ids)
    assert time.process_time() - begun < 180
    assert {c.name for c in costs} >= {"everything", "weights", "activations", "kv", "block 0", "block 29"}


def test_two_compiles_differ_in_what_was_asked_for(compiles):
    found = compare(compiles.first, compiles.second)
    assert found.options == {"kv_bits": (4, 8)}
    assert found.bits and all(name.endswith((".key", ".value")) for name in found.bits)
    text = difference_text(found)
    assert "kv_bits: 4 -> 8" in text and len(text.splitlines()) < 120
