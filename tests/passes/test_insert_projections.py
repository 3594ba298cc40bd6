from __future__ import annotations

from collections import Counter

import pytest
import torch
from resq_compiler.passes import InsertProjections

from resq_compiler.calibration.bases import order_of
from resq_compiler.errors import PassError
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.views import Norm
from resq_compiler.recipes.named import passes_for, resolve

FP64 = 1e-9  # relative; U and its inverse cancel to float64 rounding, near 1e-14


def projections(gm) -> Counter:
    facts = (meta.get(n, meta.Projection) for n in gm.graph.nodes)
    return Counter((f.basis, f.inverse) for f in facts if f)


def test_rewrites(build):
    built = build("llama", "insert-projections")
    assert InsertProjections().run(built.gm, built.ctx) == 22
    assert projections(built.gm) == {
        ("U_A", False): 5, ("U_A", True): 5,  # writers: embedding, 2 o, 2 down; readers: 2 attention, 2 mlp, head
        ("U_B", False): 2, ("U_B", True): 2, ("U_C", False): 4, ("U_D", False): 2, ("U_D", True): 2,
    }  # fmt: skip


def test_rewrites_parallel_blocks_share_a_reader(build):
    built = build("gpt_neox", "insert-projections")
    InsertProjections().run(built.gm, built.ctx)
    assert projections(built.gm)["U_A", False] == 5 and projections(built.gm)["U_A", True] == 5


def test_leaves_alone_a_stream_that_cannot_change_basis(build):
    """Gains that write into the stream: U_A stands with its inverse behind the gain of every reader, and a note says so."""
    built = build("gemma2", "insert-projections")
    InsertProjections().run(built.gm, built.ctx)
    online = [n for n in built.gm.graph.nodes if (f := meta.get(n, meta.Projection)) and f.online and f.basis == "U_A"]
    assert all(Norm.require(n.args[0]).gain is not None for n in online)
    assert [n.args[1].target for n in online] == [f"resq.U_A.{i}" for i in range(4)]  # each has its own
    assert projections(built.gm)["U_A", False] == projections(built.gm)["U_A", True] == 4
    assert [n for n in built.ctx.notes if "U_A stays online" in n]


def test_equal_bases_are_one_tensor(build):
    built = build("olmo2", "insert-projections", recipe="quarot")
    InsertProjections().run(built.gm, built.ctx)
    stream = [n for n in built.gm.graph.find_nodes(op="get_attr") if str(n.target).startswith("resq.U_A")]
    assert [n.target for n in stream] == ["resq.U_A.0"] and len(stream[0].users) == 8


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_permutation_takes_the_gains_along(family, build):
    built = build(family, "insert-projections", recipe="quik")
    norm = built.topology.residual.readers[0].norm
    before = [graph_tools.get_tensor(built.gm, n) for n in (Norm.require(norm).gain, Norm.require(norm).bias) if n]
    InsertProjections().run(built.gm, built.ctx)
    after = [graph_tools.get_tensor(built.gm, n) for n in (Norm.require(norm).gain, Norm.require(norm).bias) if n]
    order = order_of(built.bases.residual)
    assert len(after) == (2 if family == "opt" else 1)
    assert all(torch.equal(new, old[order]) for new, old in zip(after, before, strict=True))


def test_a_rotation_and_gains_that_were_not_folded_are_told(build):
    passes = tuple(item for item in passes_for(resolve("quarot")) if item.name != "fold-norms")
    built = build("llama", "insert-projections", passes=passes)
    with pytest.raises(PassError, match="a norm with a gain reads the stream; expected fold-norms before this"):
        InsertProjections().run(built.gm, built.ctx)


@pytest.mark.parametrize(
    "options, absent",
    [({"kv_bits": 16}, "U_C"), ({"down_proj": "none"}, "U_D"), ({"basis": "none"}, "U_A"), ({"basis": "none"}, "U_B")],
)
def test_leaves_alone_what_options_switch_off(options, absent, build):
    built = build("llama", "insert-projections", **options)
    InsertProjections(down=options.get("down_proj", "hadamard")).run(built.gm, built.ctx)
    assert absent not in {basis for basis, _ in projections(built.gm)}


def test_energy_split_transforms_inside_each_part(build):
    built = build("llama", "fuse-projections", down_proj="energy-split")
    transforms = built.gm.graph.find_nodes(op="call_function", target=ops.hadamard)
    assert {n.args[2] for n in transforms} == {(140, 20)}


def test_block_pca_stands_around_the_transform(build):
    """x -> blocks -> Hadamard -> inverse -> inverse -> down."""
    built = build("llama", "insert-projections", down_proj="block-pca")
    assert InsertProjections().run(built.gm, built.ctx) == 26
    node = built.topology.blocks[0].feed_forwards[0].down
    chain = [node := node.args[0] for _ in range(4)]
    assert [n.target for n in chain] == [ops.project_blocks, ops.hadamard, ops.hadamard, ops.project_blocks]
    assert [meta.get(n, meta.Projection).inverse for n in chain] == [True, True, False, False]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2", "opt", "gpt_neox"])
@pytest.mark.parametrize(
    "options",
    [{}, {"down_proj": "block-pca"}, {"recipe": "quarot"}, {"recipe": "quik"}, {"rotation": "orthogonal"}],
    ids=str,
)
def test_numerics(family, options, build):
    built = build(family, "insert-projections", double=True, **options)
    built.pipeline.run(built.gm, [InsertProjections()])
    assert built.pipeline.stages[-1].max_error <= FP64


def test_idempotent(build):
    """Bases do not nest: a graph that has projections is left alone."""
    built = build("llama", "fuse-projections")
    assert InsertProjections().run(built.gm, built.ctx) == 0
