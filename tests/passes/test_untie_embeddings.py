from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import UntieEmbeddings

from resq_compiler.ir import graph_tools
from resq_compiler.ir.graph_tools import aten
from resq_compiler.pipeline.run import prefill_and_decode

TIED = ["llama", "qwen2", "opt", "gemma3"]


def weights(gm):
    embedding = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)[0].args[0]
    head = gm.graph.find_nodes(op="call_function", target=aten.linear.default)[-1].args[1]
    return embedding, head


@pytest.mark.parametrize("family", TIED)
def test_rewrites(family, build):
    built = build(family, "untie-embeddings")
    embedding, head = weights(built.gm)
    assert embedding.target == head.target
    assert UntieEmbeddings().run(built.gm, built.ctx) == 1
    embedding, head = weights(built.gm)
    assert embedding.target != head.target
    before = graph_tools.get_tensor(built.gm, embedding).clone()
    graph_tools.change_rows(built.gm, head, lambda rows: 2 * rows)
    assert torch.equal(graph_tools.get_tensor(built.gm, embedding), before)
    assert torch.equal(graph_tools.get_tensor(built.gm, head), 2 * before)


@pytest.mark.parametrize("family", ["llama-untied", "qwen3", "gpt_neox"])
def test_leaves_alone(family, build):
    built = build(family, "untie-embeddings")
    assert UntieEmbeddings().run(built.gm, built.ctx) == 0


def test_numerics(build):
    built = build("llama", "untie-embeddings")
    before = prefill_and_decode(built.gm, built.ctx.example_inputs)
    built.pipeline.run(built.gm, [UntieEmbeddings()])
    assert torch.equal(prefill_and_decode(built.gm, built.ctx.example_inputs), before)  # a copy: every bit


@pytest.mark.parametrize("family", TIED)
def test_idempotent(family, build):
    built = build(family, "find-topology")
    assert UntieEmbeddings().run(built.gm, built.ctx) == 0
