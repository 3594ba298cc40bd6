from __future__ import annotations

import pytest
import torch
from resq_compiler.passes import ReorderChannels

from resq_compiler.calibration import executor
from resq_compiler.ir import graph_tools
from resq_compiler.tiny import tiny_tokens


def down_inputs(built):
    """Values at the down projections' inputs for the calibration tokens, flattened to [tokens, channels]."""
    nodes = [f.down.args[0] for b in built.topology.blocks for f in b.feed_forwards]
    env = executor.first_tokens(built.gm, tiny_tokens(4, 32))
    executor.Schedule(built.gm, nodes, env).run(env)
    return [env[n].flatten(0, 1) for n in nodes]


@pytest.mark.parametrize("option", ["energy-split", "outliers"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rewrites(family, option, build):
    built = build(family, "reorder-channels", down_proj=option)
    built.pipeline.run(built.gm, [ReorderChannels("energy" if option == "energy-split" else "peak")])
    assert built.pipeline.stages[-1].rewrites == 2
    for x in down_inputs(built):
        size = x.square().sum(0) if option == "energy-split" else x.abs().amax(0)
        assert bool((size[1:] >= size[:-1] * (1 - 1e-5)).all())  # ascending; 1e-5: near ties in float32 sums


def test_leaves_alone_channels_that_are_mixed(build):
    built = build("llama", "reorder-channels", down_proj="energy-split")
    built.topology.blocks[1].feed_forwards[0].channelwise = False
    down = built.topology.blocks[1].feed_forwards[0].down
    before = graph_tools.get_tensor(built.gm, down.args[1])
    built.pipeline.run(built.gm, [ReorderChannels()])
    assert built.pipeline.stages[-1].rewrites == 1  # the other block's
    assert graph_tools.get_tensor(built.gm, down.args[1]) is before
    assert any(f"node {down.name}: " in note and "down_proj='hadamard'" in note for note in built.ctx.notes)


def test_leaves_alone_without_the_option(build):
    stages = [s.name for s in build("llama", "quantize-weights").pipeline.stages]
    assert "reorder-channels" not in stages


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_numerics(family, build):
    built = build(family, "reorder-channels", down_proj="energy-split", double=True)
    built.pipeline.run(built.gm, [ReorderChannels()])
    assert built.pipeline.stages[-1].max_error <= 1e-9  # float64 sums in another order


def test_idempotent(build):
    """The order is that of statistics taken before; run again on fresh ones, nothing moves."""
    built = build("llama", "insert-projections", down_proj="energy-split")
    down = [f.down for b in built.topology.blocks for f in b.feed_forwards]
    before = [graph_tools.get_tensor(built.gm, n.args[1]) for n in down]
    built.pipeline.run(built.gm, [ReorderChannels()])
    after = [graph_tools.get_tensor(built.gm, n.args[1]) for n in down]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
