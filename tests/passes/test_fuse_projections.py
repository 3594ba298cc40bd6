from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from resq_compiler.passes import FuseProjections

from resq_compiler.ir import graph_tools, meta, ops

FP64 = 1e-9  # relative; products with U in float64


def left(gm) -> Counter:
    facts = (meta.get(n, meta.Projection) for n in gm.graph.nodes)
    return Counter((f.basis, f.inverse) for f in facts if f)


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "opt"])
def test_rewrites(family, build):
    """Only U_C (after RoPE) and the Hadamard transform itself stay operators."""
    built = build(family, "fuse-projections")
    before = left(built.gm)
    assert FuseProjections().run(built.gm, built.ctx) == sum(before.values()) - 6
    assert left(built.gm) == {("U_C", False): 4, ("U_D", False): 2}


def test_weights_are_the_closed_forms(build, tiny):
    """llama, block 0, against the model's own modules: W_o <- U_A^T W_o blockdiag(U_B), W_v <- blockdiag(U_B)^T W_v diag(g) U_A."""
    built = build("llama", "partition-linears", double=True)
    layer, bases = copy.deepcopy(tiny("llama")).double().model.layers[0], built.bases
    u, heads = bases.residual, bases.value[0]
    block_kv, block_q = torch.block_diag(*heads), torch.block_diag(*heads.repeat_interleave(2, 0))
    gain = layer.input_layernorm.weight.detach()
    attention = built.topology.blocks[0].attention
    found = {role: graph_tools.get_tensor(built.gm, getattr(attention, role).args[1]) for role in "vo"}
    expected_v = block_kv.T @ layer.self_attn.v_proj.weight.detach() @ gain.diag() @ u
    expected_o = u.T @ layer.self_attn.o_proj.weight.detach() @ block_q
    torch.testing.assert_close(found["v"], expected_v, rtol=1e-9, atol=1e-9)  # float64 products in another order
    torch.testing.assert_close(found["o"], expected_o, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_leaves_alone(family, build):
    """Post-norm models: U_A cannot pass the gains and stays; only its inverse meets the linears."""
    built = build(family, "partition-linears")
    assert left(built.gm)["U_A", False] == 4 and left(built.gm)["U_A", True] == 0


def test_leaves_alone_a_value_with_another_reader(build):
    built = build("llama", "fuse-projections")
    node = next(n for n in built.gm.graph.find_nodes(op="call_function", target=ops.project_heads) if not n.args[2:])
    with built.gm.graph.inserting_after(node.args[0]):
        other = built.gm.graph.call_function(torch.ops.aten.relu.default, (node.args[0],))
    outputs = graph_tools.output_args(built.gm.graph)
    built.gm.graph.output_node().args = ((*outputs, other),)
    FuseProjections().run(built.gm, built.ctx)
    assert left(built.gm)["U_B", False] == 1 and left(built.gm)["U_B", True] == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt_neox-sequential"])
@pytest.mark.parametrize("options", [{}, {"recipe": "quarot"}, {"down_proj": "energy-split"}], ids=str)
def test_numerics(family, options, build):
    built = build(family, "fuse-projections", double=True, **options)
    built.pipeline.run(built.gm, [FuseProjections()])
    assert built.pipeline.stages[-1].max_error <= FP64


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_idempotent(family, build):
    built = build(family, "partition-linears")
    assert FuseProjections().run(built.gm, built.ctx) == 0
