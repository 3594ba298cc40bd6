from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from resq_compiler.passes import PartitionLinears, QuantizeWeights

from resq_compiler.errors import PassError, TopologyError, VerifyError
from resq_compiler.ir import graph_tools, ops
from resq_compiler.ir.graph_tools import aten
from resq_compiler.pipeline import run
from resq_compiler.pipeline.passes import Pass
from resq_compiler.pipeline.run import relative_error


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the first norm's output."""

    name: ClassVar[str] = "scale"
    factor: float = 1.0

    def run(self, gm, ctx):
        norm = gm.graph.find_nodes(op="call_function", target=ops.rms_norm)[0]
        with gm.graph.inserting_after(norm):
            new = gm.graph.call_function(aten.mul.Tensor, (norm, self.factor))
        norm.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        return 1


@dataclass(frozen=True)
class Coarse(Scale):
    name: ClassVar[str] = "coarse"
    exact: ClassVar[bool] = False


@dataclass(frozen=True)
class Dangling(Pass):
    name: ClassVar[str] = "dangling"

    def run(self, gm, ctx):
        node = gm.graph.find_nodes(op="get_attr")[0]
        node.target = "no.such.tensor"
        return 1


@dataclass(frozen=True)
class Fails(Pass):
    name: ClassVar[str] = "fails"
    error: type = ValueError

    def run(self, gm, ctx):
        raise (
            self.error("node input_ids: reason") if self.error is ValueError else self.error("reason", node="input_ids")
        )


@pytest.fixture
def built(build):
    return build("llama", "fold-norms")


def test_an_exact_pass_that_changes_the_outputs_is_a_bug(built):
    with pytest.raises(VerifyError, match=r"pass \d+ scale: the outputs changed by .* relative"):
        built.pipeline.run(built.gm, [Scale(factor=1.1)])
    last = built.pipeline.stages[-1]
    assert last.name == "scale" and "changed by" in last.failed and last.max_error is None


def test_a_change_below_rounding_passes(built):
    built.pipeline.run(built.gm, [Scale(factor=1.0 + 1e-6)])
    assert 0 < built.pipeline.stages[-1].max_error < 1e-5


def test_an_inexact_pass_may_change_the_outputs_and_says_how_much(built):
    built.pipeline.run(built.gm, [Coarse(factor=1.1)])
    assert built.pipeline.stages[-1].max_error > 1e-3 and not built.pipeline.stages[-1].exact


def test_errors_are_compared_with_the_graph_before_the_pass(built):
    """Two inexact passes that undo each other: each is measured against the one before."""
    built.pipeline.run(built.gm, [Coarse(factor=2.0), Coarse(factor=0.5)])
    first, second = built.pipeline.stages[-2:]
    assert first.max_error > 0.05 and second.max_error > 0.05


def test_non_finite_outputs_fail(built):
    with pytest.raises(VerifyError, match="not finite"):
        built.pipeline.run(built.gm, [Scale(factor=float("inf"))])


@pytest.mark.parametrize("error, expected", [(ValueError, PassError), (TopologyError, TopologyError)])
def test_failures_name_the_pass_and_are_recorded(error, expected, built):
    with pytest.raises(expected, match=r"pass \d+ fails: .*reason"):
        built.pipeline.run(built.gm, [Fails(error)])
    last = built.pipeline.stages[-1]
    assert (last.name, last.failed_node) == ("fails", None if error is ValueError else "input_ids")


def test_malformed_graphs_are_recorded(built):
    with pytest.raises(PassError, match="dangling: .*no.such.tensor"):
        built.pipeline.run(built.gm, [Dangling()])
    assert built.pipeline.stages[-1].name == "dangling"


def test_stages_number_name_and_keep_graphs_without_weights(build):
    seen = []
    built = build("llama", "partition-linears")
    built.pipeline.on_stage = seen.append
    built.pipeline.run(built.gm, [PartitionLinears(), QuantizeWeights()])
    stages = built.pipeline.stages
    assert [s.index for s in stages] == list(range(len(stages))) and seen == stages[-2:]
    assert stages[0].label == "00-capture" and stages[-1].label == f"{len(stages) - 1:02d}-quantize-weights"
    assert all(s.graph.owning_module is None for s in stages)
    assert len(stages[-2].graph.nodes) != len(stages[0].graph.nodes)
    assert all(s.max_error <= run.EXACT_TOLERANCE for s in stages[1:-1]) and stages[-1].max_error > 1e-3


def test_relative_error_closed_form():
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0 and relative_error(2 * a, a) == pytest.approx(1) and relative_error(a * 0, a) == 1


def test_prefill_and_decode_leaves_padding_out(built, tiny):
    """Its logits are those of the eager model at the positions that are not padding."""
    ids, mask, positions, *past = built.ctx.example_inputs
    length = past[0].shape[2]
    old = ids.repeat(1, 2)[:, :length]
    whole = torch.cat((old, ids), 1)
    with torch.no_grad():
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        expected = tiny("llama")(whole, attention_mask=mask, position_ids=places, use_cache=False).logits[mask.bool()]
    got = run.prefill_and_decode(built.gm, built.ctx.example_inputs)
    assert got.shape == (2 * 12 - 2, 131) and relative_error(got, expected) < 1e-5  # float32 rounding


def test_snapshot_is_not_changed_by_later_passes(built):
    copy = graph_tools.snapshot(built.gm)
    before = run.prefill_and_decode(copy, built.ctx.example_inputs)
    built.pipeline.run(built.gm, [Coarse(factor=1.5)])
    assert torch.equal(run.prefill_and_decode(copy, built.ctx.example_inputs), before)
