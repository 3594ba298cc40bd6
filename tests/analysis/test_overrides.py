"""Statements of the user about the topology: what they change, that they change no result, and how wrong ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from resq_compiler.passes import FindTopology

from resq_compiler.analysis.dataflow import analyze
from resq_compiler.analysis.overrides import TopologyOverrides, read_overrides
from resq_compiler.cli import main
from resq_compiler.errors import ConfigError, TopologyError
from resq_compiler.inspection.topology_view import topology_dict, topology_text
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.graph_tools import aten, is_call
from resq_compiler.ir.views import Linear
from resq_compiler.pipeline.run import prefill_and_decode, relative_error
from resq_compiler.tiny import TINY_FAMILIES, tiny_model

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FLOAT16 = {"weight_bits": 16, "activation_bits": 16, "kv_bits": 16}


def block(**attention):
    return {"blocks": [{"index": 0, "attention": attention}]}


def found_by(build, family, stated):
    built = build(family, "find-topology")
    return analyze(built.gm, read_overrides(stated))


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_what_inspect_prints_states_what_is_found(family, build):
    found = topology_dict(build(family, "fold-norms").topology)
    assert topology_dict(found_by(build, family, json.loads(json.dumps(found)))) == found


@pytest.fixture
def run_with(build):
    """(stated, family) -> the graph after all exact passes under these statements; the pipeline compares the logits pass by pass."""

    def run(stated, family="llama", **options):
        built = build(family, "find-topology", **FLOAT16, **options)
        before = prefill_and_decode(built.gm, built.ctx.example_inputs)
        built.ctx.overrides = read_overrides(stated)
        with torch.no_grad():
            built.pipeline.run(built.gm, [p for p in built.rest if p.exact])
        assert (
            relative_error(prefill_and_decode(built.gm, built.ctx.example_inputs), before) <= 1e-5
        )  # float32 rounding
        return built

    return run


def targets_of(built, basis):
    return [n for n in built.gm.graph.nodes if (fact := meta.get(n, meta.Projection)) and fact.basis == basis]


def test_a_stream_that_stays_in_its_basis(run_with):
    assert not targets_of(run_with({}), "U_A")
    built = run_with({"residual": {"fusable": False}})
    assert len(targets_of(built, "U_A")) == 4  # before attention and feed-forward of two blocks
    assert any("the topology override says so" in note for note in built.ctx.notes)


def test_layer_norms_of_a_stream_that_stays_in_its_basis(run_with):
    built = run_with({"residual": {"fusable": False}}, "opt")
    assert built.gm.graph.find_nodes(op="call_function", target=aten.layer_norm.default)


def test_values_that_stay_in_their_basis(run_with):
    """With key/value groups of equal width, o is the only place where the inverse of U_B can go: it still fuses."""
    (left,) = targets_of(run_with(block(values_fusable=False)), "U_B")
    assert is_call(left, ops.project_heads) and not meta.get(left, meta.Projection).inverse


def test_linears_that_stay_float(run_with):
    names = [f"{MLP}.down_proj", f"{ATTENTION}.o_proj"]
    built = run_with({"float": names}, high_fraction=0.0)
    whole = [n for n in built.gm.graph.nodes if is_call(n, aten.linear.default) and not meta.get(n, meta.LinearPart)]
    assert {meta.get(n, meta.LinearSite).name for n in whole} == {*names, "lm_head.untied"}
    assert len(built.gm.graph.find_nodes(op="call_function", target=ops.hadamard)) == 1  # block 1 alone


def test_float_linears_of_a_compiled_model(compile_tiny):
    compiled, _ = compile_tiny("llama", topology=(stated := Stated({"float": [f"{MLP}.down_proj"]})))
    assert stated is not None and f"{MLP}.down_proj.weight" in dict(compiled.graph_module.named_buffers())
    assert not any(n.startswith(f"{MLP}.down_proj.") and "qdata" in n for n, _ in compiled.graph_module.named_buffers())
    assert any("model.layers.1.mlp.down_proj" in n and "qdata" in n for n, _ in compiled.graph_module.named_buffers())


class Stated(dict):
    """A dict that can be part of a key: compile_tiny makes each set of options once."""

    def __hash__(self):
        return hash(json.dumps(self))

    def __lt__(self, other):
        return False


def add_low_rank_queries(built):
    """q = second(first(x)): a linear between the stream and the queries, as low-rank projections have it."""
    q = next(
        n
        for n in built.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
        if "q_proj" in Linear.require(n).name
    )
    eye = graph_tools.add_tensor(built.gm, f"{ATTENTION}.first.weight", torch.eye(64), "test")
    eye.meta["val"] = torch.eye(64)
    with built.gm.graph.inserting_before(q):
        first = built.gm.graph.call_function(aten.linear.default, (q.args[0], eye))
    first.meta["val"] = q.args[0].meta["val"]
    q.update_arg(0, first)
    built.gm.recompile()
    return built


def test_a_structure_that_is_not_understood_until_it_is_stated(build):
    built = add_low_rank_queries(build("llama", "find-topology"))
    with pytest.raises(TopologyError, match=r"node linear\w*.*reads the residual stream"):
        FindTopology().run(built.gm, built.ctx)
    built.ctx.overrides = read_overrides({"float": [f"{ATTENTION}.first"], **block(q=f"{ATTENTION}.q_proj")})
    with torch.no_grad():
        built.pipeline.run(built.gm, [p for p in built.rest if p.exact])
    assert built.topology.blocks[0].attention.q.op == "call_function"


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"head": "lm_heat"}, r"head: lm_heat: no linear has this name; near it: lm_head"),
        ({"float": ["model.layers.9.mlp.down_proj"]}, r"float: model.layers.9.mlp.down_proj: .*near it: model.layers.\d"),
        (block(q=f"{MLP}.up_proj"), r"block 0, attention q: expected a linear that node \w+ depends on; .*up_proj is none"),
        (block(o=f"{MLP}.down_proj"), r"block 0, attention o: expected .*o_proj, the linear that reads node \w+; got .*down_proj"),
        (block(heads=8), r"block 0, attention heads: the graph says 4, and only it can; got 8"),
        ({"hidden_size": 65}, r"hidden_size: the graph says 64; got 65"),
        ({"blocks": [{"index": 7}]}, r"block 7: the model has the blocks 0 to 1"),
        ({"blocks": [{"index": 0, "feed_forward": [{"down": "lm_head"}]}]}, r"no linear lm_head there; expected one of .*down_proj"),
        (
            {"blocks": [{"index": 0, "feed_forward": [{"down": f"{MLP}.down_proj", "up": [f"{ATTENTION}.q_proj"]}]}]},
            r"feed_forward .*down_proj: .*q_proj does not stand before it",
        ),
    ],
)  # fmt: skip
def test_statements_that_the_graph_refutes(stated, message, build):
    with pytest.raises(TopologyError, match=r"^topology override, .*" + message):
        found_by(build, "llama", stated)


def test_nothing_can_be_switched_on(build):
    with pytest.raises(
        TopologyError, match=r"residual fusable: cannot be true: norms with a gain write into the stream: rms_norm"
    ):
        found_by(build, "gemma2", {"residual": {"fusable": True}})


def test_a_refuted_statement_names_the_pass(run_with):
    with pytest.raises(TopologyError, match=r"pass \d find-topology: topology override, head"):
        run_with({"head": "nothing"})


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"residuals": {}}, "topology: unknown key 'residuals'; did you mean residual"),
        ({"residual": {"fusable": "no"}}, "topology, residual: fusable: expected true or false; got 'no'"),
        ({"blocks": {"0": {}}}, "topology, blocks: expected a list; got dict"),
        ({"blocks": [{"attention": {}}]}, "blocks, entry 0: expected `index: ` and the number of a block, each once; got None"),
        ({"blocks": [{"index": 0}, {"index": 0}]}, "blocks, entry 1: expected `index: `"),
        (block(qq="x"), "block 0, attention: unknown key 'qq'"),
        (block(q=3), "block 0, attention q: expected the name of a linear"),
        ({"blocks": [{"index": 0, "feed_forward": [{"up": []}]}]}, "feed_forward 0: expected `down: `"),
        ({"float": "lm_head"}, "topology, float: expected a list; got str"),
        ([], "got list"),
    ],
)  # fmt: skip
def test_malformed_statements(stated, message, tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(stated))
    with pytest.raises(ConfigError) as caught:
        read_overrides(file)
    assert message.removeprefix("topology") in str(caught.value) and str(file) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "t.yaml").write_text("a: [")
    for name in ("t.yaml", "absent.yaml"):
        with pytest.raises(ConfigError, match=rf"topology file .*{name}: cannot be read as YAML or JSON"):
            read_overrides(tmp_path / name)


def test_nothing_stated():
    assert read_overrides(None) == TopologyOverrides() == read_overrides({})


def test_command_line(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "float")
    file = tmp_path / "t.yaml"
    file.write_text(f"residual: {{fusable: false}}\nfloat: [{MLP}.down_proj]\n")
    assert main.main(["inspect", str(tmp_path / "float"), "--topology", "--topology-file", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"stay float: {MLP}.down_proj" in shown
    assert any("U_A (" in line and line.endswith("the topology override says so") for line in shown.splitlines())
    file.write_text("float: [nothing]")
    assert main.main(["inspect", str(tmp_path / "float"), "--topology-file", str(file)]) == 2
    assert "find-topology: topology override, float: nothing: no linear has this name" in capsys.readouterr().err


def test_text_and_dict_agree(build):
    topology = found_by(build, "llama", {"float": [f"{MLP}.down_proj"]})
    assert f"stay float: {MLP}.down_proj" in topology_text("x", topology_dict(topology))
