"""Dumps: complete, deterministic, without weights, written also when a pass fails."""

from __future__ import annotations

import contextlib
import errno
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.fx import GraphModule

from resq_compiler.api import compile, trace
from resq_compiler.errors import DumpError, PassError
from resq_compiler.inspection import dump, dump_files, records
from resq_compiler.pipeline.passes import Pass, PassContext
from resq_compiler.recipes import named
from resq_compiler.tiny import tiny_model, tiny_tokens


def names(directory):
    return {p.name for p in directory.iterdir() if p.is_file()}


def test_every_stage_has_its_files(compiled):
    labels = [s.label for s in compiled.model.stages]
    assert labels[:2] == ["00-capture", "01-canonicalize"]
    assert names(compiled.dump) >= {f"{label}.{kind}" for label in labels for kind in ("txt", "json", "dot")}
    manifest = dump_files.read_manifest(compiled.dump)
    assert [s["label"] for s in manifest["stages"]] == labels
    assert manifest["options"]["weight_method"] == "rtn"


def test_records_say_everything_about_a_quantized_linear(compiled):
    nodes = dump_files.read_stage(compiled.dump, compiled.model.stages[-1].label)
    q = [
        n
        for n in nodes
        if n["facts"].get("LinearPart", {}).get("site", {}).get("name") == "model.layers.1.self_attn.q_proj"
    ]
    assert [n["bits"] for n in q] == ["W4A4", "W8A8"]
    assert [n["precision"] for n in q] == ["4", "8"]
    assert all(n["block"] == 1 and n["pass"] == "quantize-weights" and n["module"].endswith("q_proj") for n in q)
    assert q[0]["values"] == [["float32", [2, 5, 64]]]
    by_name = {n["name"]: n for n in nodes}
    assert all(source in by_name for n in nodes for source in n["inputs"])
    projections = {n["facts"]["Projection"]["basis"] for n in nodes if "Projection" in n["facts"]}
    assert projections == {"U_C", "U_D"}  # the others were fused


def test_noise_of_every_quantizer_and_weight_is_in_the_manifest(compiled):
    noise = dump_files.read_manifest(compiled.dump)["noise"]
    assert {v["kind"] for v in noise.values()} == {"activation", "kv", "weight"}
    low, high = noise["blocks.0.attention_input.part0"], noise["blocks.0.attention_input.part1"]
    assert high["sqnr_db"] > low["sqnr_db"] + 15  # four bits more are worth about 24 dB


def test_dumps_of_equal_compiles_are_equal(compiled, tmp_path):
    again = compile(
        tiny_model("llama"), tiny_tokens(4, 64), recipe="resq", calibration_samples=4, calibration_length=64, weight_method="rtn",
        dump_dir=tmp_path,
    )  # fmt: skip
    assert again.stages
    for name in names(compiled.dump) - {dump_files.TIMING, dump_files.PAGE}:
        assert without_rounding(tmp_path / name) == without_rounding(compiled.dump / name), name


def without_rounding(path):
    """A file without what float sums leave in the logits: their order depends on how memory happens to be aligned."""
    return re.sub(r"(relative_error\W*) [\d.e-]+", r"\1", path.read_text(encoding="utf-8"))


def test_no_weight_is_written(compiled):
    weight = compiled.original.model.layers[0].self_attn.q_proj.weight.detach().flatten()
    for path in compiled.dump.glob("*-*"):
        content = path.read_text()
        assert f"{float(weight[0]):.4f}"[1:] not in content and path.stat().st_size < 10**6


def test_dump_method_writes_the_same_stages(compiled, tmp_path):
    compiled.model.dump(tmp_path / "new" / "dir")
    for label in ("00-capture", "15-quantize-kv-cache"):
        assert (tmp_path / "new" / "dir" / f"{label}.txt").read_bytes() == (compiled.dump / f"{label}.txt").read_bytes()


@dataclass(frozen=True)
class BrokenPass(Pass):
    """Makes a product of shapes that do not fit."""

    name: ClassVar[str] = "broken"

    def run(self, gm: GraphModule, ctx: PassContext) -> int:
        first = next(n for n in gm.graph.nodes if n.op == "call_function")
        with gm.graph.inserting_after(first):
            bad = gm.graph.create_node("call_function", torch.ops.aten.mm.default, (first, first), name="bad_product")
        gm.graph.output_node().args = ((bad, *gm.graph.output_node().args[0][1:]),)
        return 1


def test_a_failing_pass_is_dumped_and_its_node_marked(monkeypatch, tmp_path):
    first, *others = named.passes_for(named.resolve("rtn"))
    monkeypatch.setenv("RESQ_DUMP_DIR", str(tmp_path))
    with pytest.raises(PassError, match="pass 2 broken: node bad_product"):
        compile(tiny_model("llama"), recipe=(first, BrokenPass(), *others))
    manifest = dump_files.read_manifest(tmp_path)
    assert [s["failed_node"] for s in manifest["stages"]] == [None, None, "bad_product"]
    assert ">>> FAILED HERE >>> %bad_product" in (tmp_path / "02-broken.txt").read_text()
    assert 'color="red"' in (tmp_path / "02-broken.dot").read_text()


def test_blocks_of_nodes_without_facts_come_from_modules():
    gm, _ = trace(tiny_model("gpt_neox"))
    blocks = records.blocks_of(gm.graph)
    attention = [n for n in gm.graph.nodes if records.target_name(n) == "attention"]
    assert [blocks[n] for n in attention] == [0, 1]


def test_not_a_dump(tmp_path):
    with pytest.raises(DumpError, match=r"expected a dump .*resq inspect MODEL --dump DIR"):
        dump_files.read_manifest(tmp_path)
    (tmp_path / "file").write_text("")
    for name, found in (("absent", "nothing"), ("file", "a file")):
        with pytest.raises(DumpError, match=rf"{name}: expected a dump .*, found {found}; "):
            dump_files.read_manifest(tmp_path / name)
    (tmp_path / "dump.json").write_text("{")
    with pytest.raises(DumpError, match="cannot be read as JSON"):
        dump_files.read_manifest(tmp_path)
    (tmp_path / "dump.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DumpError, match="not a manifest of a dump"):
        dump_files.read_manifest(tmp_path)


def test_another_version(tmp_path):
    (tmp_path / "dump.json").write_text(json.dumps({"format": "resq-dump", "version": 99}))
    with pytest.raises(DumpError, match="version 99.* reads version 1; dump again"):
        dump_files.read_manifest(tmp_path)


def test_unwritable_target(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DumpError, match=r"cannot write .*file.*; give a writable directory"):
        dump.DumpWriter(tmp_path / "file" / "dump")
    with pytest.raises(DumpError, match=r"cannot write .*file.*; give a writable directory"):
        dump_files.write_file(tmp_path / "file" / "a.txt", "x")


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "00-old.txt").write_text("from an earlier dump")
    dump.DumpWriter(tmp_path)
    assert names(tmp_path) == {"mine.txt", "dump.json", "timing.json"}


@pytest.mark.parametrize("fails", [False, True], ids=["compile succeeds", "compile fails"])
def test_a_disk_that_fills_up_ends_the_dump_and_nothing_else(fails, monkeypatch, tmp_path, caplog):
    write = Path.write_text

    def full(self, content, **options):
        if self.name.startswith(".02-"):
            write(self, content[:10], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content, **options)

    def stop(stage):
        if fails and stage.index == 3:
            raise PassError("stopped")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PassError, match="stopped") if fails else contextlib.nullcontext():
        compile(tiny_model("llama"), recipe="rtn", dump_dir=tmp_path, on_stage=stop)
    assert "No space left on device" in caplog.text and "its dump ends here" in caplog.text
    assert [s["label"] for s in dump_files.read_manifest(tmp_path)["stages"]] == ["00-capture", "01-canonicalize"]
    assert not list(tmp_path.glob(".*"))
