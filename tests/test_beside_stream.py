"""Shared keys and values, and embeddings of each layer: Gemma 4 E2B as a random model, and a Llama that has both, in which bases fuse."""

from __future__ import annotations

import pytest
import torch
from resq_compiler.backends.fused.lower import lower
from resq_compiler.backends.fused.plain import TORCH
from resq_compiler.backends.fused.runner import prepare
from resq_compiler.passes.insert_prefix import insert

import resq_compiler
from resq_compiler.analysis import sensitivity
from resq_compiler.analysis.dataflow import analyze
from resq_compiler.analysis.topology import Topology
from resq_compiler.api import trace
from resq_compiler.calibration import executor
from resq_compiler.calibration.bases import Bases
from resq_compiler.calibration.statistics import observe, observe_blocks
from resq_compiler.errors import BackendError, TopologyError
from resq_compiler.evaluation.by_blocks import ByBlocks
from resq_compiler.inspection.forecast import Shapes
from resq_compiler.inspection.topology_view import topology_dict, topology_text
from resq_compiler.ir import graph_tools, meta, ops
from resq_compiler.ir.args import set_argument, source
from resq_compiler.ir.views import AppendCache, Attention, Linear, Project
from resq_compiler.learning.end_to_end import Model
from resq_compiler.learning.running import Run
from resq_compiler.pipeline.run import relative_error
from resq_compiler.tiny import tiny_tokens
from tests.analysis.test_sensitivity import at_once
from tests.backends.fused.test_lower import assert_same_bits, calls
from tests.beside_models import BESIDE, LAYERS, beside_model, eager_logits
from tests.families import EXACT, FLOAT, ROUNDING, small

FEW = {"calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32"}
IDS = tiny_tokens(2, 20, seed=5)
MASK = torch.ones(2, 20, dtype=torch.long)
MASK[0, :3] = 0


@pytest.fixture(scope="module")
def gemma():
    """Its named float graph and topology."""
    return trace(small("gemma4_text-layers"))


@pytest.fixture(scope="module")
def llama():
    """The same of the Llama."""
    return trace(beside_model())


@pytest.fixture(scope="module")
def compiled():
    """The Llama by the paper's recipe, 4 bits."""
    return resq_compiler.compile(beside_model(), tiny_tokens(4, 32), recipe="resq", **FEW)


def topology_of(traced) -> Topology:
    return traced[1].facts.get(Topology)


def test_who_keeps_keys_and_values(gemma, llama):
    """Blocks of one kind of attention share; a reader has queries and an output projection alone, and caches nothing."""
    attentions = [block.attention for block in topology_of(gemma).blocks]
    assert [a.keeper for a in attentions] == [0, 1, 0, 1]
    assert [tuple(a.linears) for a in attentions[1:3]] == [("q", "k", "v", "o"), ("q", "o")]
    assert [len(a.caches) for a in attentions] == [2, 2, 0, 0]
    keeper, *readers = topology_of(llama).sharing(topology_of(llama).blocks[2].attention)
    assert keeper.block == 0 and [a.block for a in readers] == [1, 2]
    assert all(a.k is keeper.k and a.value_cache is keeper.value_cache for a in readers)


def test_what_is_made_beside_the_stream(gemma):
    """The projection of the embedded tokens belongs to no block; gate and projection of each are a feed-forward with a fixed order."""
    topology = topology_of(gemma)
    assert [Linear.require(n).name for n in topology.beside] == ["model.per_layer_model_projection"]
    assert topology.beside[0] not in topology.linears
    for block in topology.blocks:
        plain, factored = block.feed_forwards
        assert (len(plain.gates), len(plain.ups), plain.channelwise) == (1, 1, True)
        assert (len(factored.gates), len(factored.ups), factored.channelwise) == (1, 0, False)
        assert "per_layer" in Linear.require(factored.gates[0]).name


def test_what_leads_past_a_block(gemma, llama):
    """Caches that later blocks read, and factors of later blocks; nothing behind the last one."""
    gm, topology = gemma[0], topology_of(gemma)
    kinds = [
        [graph_tools.target_text(node.target) for node in executor.carried(gm, block.end)] for block in topology.blocks
    ]
    assert kinds == [
        ["append_cache"] * 2 + ["aten.select.int"] * 3,
        ["append_cache"] * 4 + ["aten.select.int"] * 2,
        ["append_cache"] * 2 + ["aten.select.int"],
        [],
    ]
    assert (
        len(executor.carried(llama[0], topology_of(llama).blocks[0].start)) == 1
    )  # the lookup; what is added to it comes later


def test_nothing_leads_past_a_block_elsewhere(build):
    for family in ("llama", "gemma3", "opt", "gpt_neox"):
        built = build(family, before="compute-bases")
        assert not any(executor.carried(built.gm, block.start) for block in built.topology.blocks)


def test_keys_alone_are_not_shared(llama):
    gm = graph_tools.snapshot(llama[0])
    first, second, *_ = gm.graph.find_nodes(op="call_function", target=ops.attention)
    other = gm.graph.find_nodes(op="call_function", target=ops.split_heads)[2]
    with gm.graph.inserting_before(second):
        past = AppendCache.require(Attention.require(first).v).past
        own = graph_tools.emit(gm.graph, ops.append_cache, (past, other), second, "test")
    set_argument(second, "v", own)
    with pytest.raises(
        TopologyError, match=r"nodes attention and attention_1: two attentions share keys or values alone"
    ):
        analyze(gm)


def test_what_is_inspected_can_be_stated(gemma):
    found = topology_dict(topology_of(gemma))
    assert found["blocks"][2]["attention"]["keys_of"] == 0 and "keys_of" not in found["blocks"][1]["attention"]
    assert topology_dict(topology_of(trace(small("gemma4_text-layers"), found))) == found
    text = topology_text("gemma", found)
    assert "4 heads of 16, 2 for keys and values, those of block 0" in text
    assert "beside the stream, for all blocks; stay float: model.per_layer_model_projection" in text
    found["blocks"][2]["attention"]["keys_of"] = 1
    with pytest.raises(TopologyError, match=r"block 2, attention keys_of: the graph says 0, and only it can; got 1"):
        trace(small("gemma4_text-layers"), found)


@pytest.mark.parametrize("factors", [False, True], ids=["keys and values", "factors too"])
def test_exact_passes_keep_the_logits(factors):
    """Of transformers itself, in a prefill and a decode, left-padded; every basis but that of keys fuses."""
    model = beside_model(factors)
    exact = resq_compiler.compile(model, tiny_tokens(4, 32), **FEW, **FLOAT)
    first = exact(IDS[:, :13], attention_mask=MASK[:, :13], use_cache=True)
    second = exact(IDS[:, 13:], attention_mask=MASK, past_key_values=first.past_key_values)
    got, expected = torch.cat((first.logits, second.logits), 1), eager_logits(model, IDS, MASK)
    assert relative_error(got[MASK.bool()], expected[MASK.bool()]) <= EXACT
    facts = [meta.get(node, meta.Projection) for node in exact.graph_module.graph.nodes]
    assert {fact.basis for fact in facts if fact is not None} == {"U_D"}


def test_one_cache_entry_for_all_readers(compiled):
    """Quantized once, in one basis, which the queries of all blocks are turned into."""
    assert len(compiled.cache_specs) == 1
    graph = compiled.graph_module.graph
    assert len(graph.find_nodes(op="call_function", target=ops.append_cache)) == 2
    assert len(graph.find_nodes(op="call_function", target=ops.quantize_dequantize)) == 2
    turned = [Project.require(n) for n in graph.nodes if (p := meta.get(n, meta.Projection)) and p.basis == "U_C"]
    assert len(turned) == 1 + LAYERS and len({view.u for view in turned}) == 1


def test_a_cache_changes_nothing(compiled):
    whole = compiled(IDS).logits
    first = compiled(IDS[:, :13], use_cache=True)
    second = compiled(IDS[:, 13:], past_key_values=first.past_key_values)
    assert relative_error(torch.cat((first.logits, second.logits), 1), whole) < 1e-5
    tokens = compiled.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(compiled.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False), tokens)


def test_readers_share_the_bases_of_the_keeper(build):
    """Random parts too; the parts of every output projection are respected."""
    built = build(BESIDE, "insert-projections", site_fractions="o.1=1/4")
    bases = built.ctx.facts.get(Bases)
    assert bases.value[0] is bases.value[1] is bases.value[2] and bases.key[0] is bases.key[2]
    plain = build(BESIDE, "rotate-bases", site_fractions="o.1=1/4").ctx.facts.get(Bases)
    change = (plain.value[0][0].mT @ bases.value[0][0]).abs() > 1e-9
    borders = [0, 12, 14, 16]  # of 16 columns: a quarter of block 1's, an eighth of the others
    for start, stop in zip(borders, borders[1:], strict=False):
        assert not change[start:stop, :start].any() and not change[start:stop, stop:].any()


def test_forecasts_count_it(gemma):
    shapes = Shapes.of(gemma[0], topology_of(gemma))
    assert shapes.tables == 131 * 4 * 16  # tokens, layers, width
    assert shapes.beside >= 2 * 16 + 2 * (16 + 32) * 2  # factors of two blocks, keys and values of heads of both widths
    plain = trace(small("gemma4_text"))
    assert (Shapes.of(plain[0], topology_of(plain)).beside, Shapes.of(plain[0], topology_of(plain)).tables) == (0, 0)


def test_statistics_block_by_block_are_those_of_the_whole(gemma):
    """To the bit, of batches whose tokens differ: what leads past blocks is each batch's own."""
    gm, topology = gemma[0], topology_of(gemma)
    nodes = {source(linear) for linear in topology.linears} | {a.new_keys for a in topology.keepers}
    windows = tiny_tokens(3, 32, seed=7)

    def see(run):
        seen: dict = {node: [] for node in nodes}
        with executor.batches_of(32):
            run({node: found.append for node, found in seen.items()})
        return seen

    whole = see(lambda taps: observe(gm, taps, windows, lambda *_: None))
    parts = see(lambda taps: observe_blocks(gm, taps, windows, topology.blocks, None, lambda *_: None))
    for node, values in whole.items():
        assert len(values) == 3
        assert all(torch.equal(a, b) for a, b in zip(values, parts[node], strict=True)), node


def test_gradients_block_by_block_are_those_of_the_whole(gemma):
    """Those of shared keys and values come from all that read them."""
    gm, topology = gemma[0], topology_of(gemma)
    nodes = {p.node for where in sensitivity.places(topology).values() for p in where}
    ids = tiny_tokens(1, 24, seed=3)
    expected = at_once(gm, topology.blocks[0].start, ids, nodes, torch.Generator().manual_seed(1))
    seen = {}
    for values in sensitivity.backward(gm, topology, [ids], nodes, torch.Generator().manual_seed(1), lambda *_: None):
        seen |= {node: (x.detach(), x.grad) for node, x in values.items()}
    assert seen.keys() == nodes
    for node, (x, gradient) in seen.items():
        value, wanted = expected[node]
        assert torch.equal(x, value)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()) + 1e-12)


def test_learning_by_blocks_is_the_whole(gemma):
    """Values and gradients of a run of the whole graph; the weights that make shared keys feel all that read them."""
    gm, topology = gemma[0], topology_of(gemma)
    ids, logits = tiny_tokens(2, 24, seed=3), graph_tools.output_args(gm.graph)[0]
    names = [str(Linear.require(n).weight.target) for n in (topology.blocks[0].attention.k, topology.beside[0])]

    def weights_of_run():
        leaves = {name: graph_tools.made(gm, name).detach().clone().requires_grad_() for name in names}
        return leaves, Run(gm, quantized=False, tensor=lambda name, value: leaves.get(name, value))

    def loss_of(found):
        return found.float().log_softmax(-1)[..., 3].sum()

    whole, run = weights_of_run()
    with torch.enable_grad():
        loss_of(run.to([logits], executor.first_tokens(gm, ids))[logits]).backward()
    parts, run = weights_of_run()
    with torch.enable_grad():
        Model(gm, topology).backward(run, ids, [lambda found: 2 * loss_of(found)] * 2)
    for name in names:
        expected = whole[name].grad
        torch.testing.assert_close(parts[name].grad, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_evaluation_block_by_block(compiled):
    """To the bit, with what leads past blocks."""
    batches = [tiny_tokens(2, 20, seed=seed) for seed in (5, 6)]
    by_blocks = ByBlocks(compiled.graph_module, compiled)
    assert len(by_blocks._cuts) > LAYERS
    by_blocks.prepare(batches)
    for ids in batches:
        assert torch.equal(by_blocks(ids).logits, compiled(ids).logits)


def test_prefix_tokens_are_read_by_all(build):
    """The keys and values of the prefix stand before those that every reader sees: as if the tokens had been there."""
    built = build(BESIDE, "quantize-activations", kv_bits=16)
    gm, prefix = built.gm, [7, 9]
    long = torch.cat((torch.tensor([prefix, prefix]), IDS), 1)

    def logits(graph, ids):
        given = executor.first_tokens(graph, ids)
        return graph(*given.values())[0]

    expected = logits(gm, long)[:, 2:]
    insert(gm, built.topology, prefix)
    gm.recompile()
    assert relative_error(logits(gm, IDS), expected) < 1e-5
    assert len(gm.graph.find_nodes(op="call_function", target=ops.prepend)) == 2


def test_static_scales_of_two_feed_forwards():
    """Each has its own, though their quantizers have one name."""
    model = small("gemma4_text-layers")
    found = resq_compiler.compile(model, tiny_tokens(4, 32), recipe="prefixquant", **FEW)
    buffers = dict(found.graph_module.named_buffers())
    for block in range(4):
        first, second = (buffers[f"resq.static.blocks.{block}.down_input.part0{n}.scale"] for n in ("", ".1"))
        assert not torch.equal(first, second)


def test_a_recipe_that_finds_nothing_to_learn():
    """U_A stays online, and norms stand between the linears of values and the cache: said in a note."""
    found = resq_compiler.compile(small("gemma4_text-layers"), tiny_tokens(4, 32), recipe="spinquant", **FEW)
    assert any(note.startswith("learn-rotations: nothing is learned") for note in found.notes)


def test_lowered_once_for_all_readers(compiled):
    """The first attention writes the cache; the others only read it. The same bits, in a prefill and a decode."""
    gm = compiled.graph_module
    runner = prepare(gm, TORCH, torch.float32, False, 1)
    assert calls(runner)["rope_cache"] == 1 and calls(runner)["attention_quantize"] == LAYERS
    assert not runner.reasons and len(runner.left) == LAYERS - 1
    assert_same_bits(gm, runner)


def test_triton_kernels_compute_it(compiled):
    """In the interpreter. A value at a tie may fall to the neighbouring code, and then moves one token."""

    def pieces():
        first = compiled(IDS[:, :7], use_cache=True)
        second = compiled(IDS[:, 7:9], past_key_values=first.past_key_values)
        return torch.cat((first.logits, second.logits), 1)

    expected = pieces()
    compiled.use_backend("triton")
    try:
        errors = (pieces() - expected).norm(dim=-1) / expected.norm(dim=-1)
    finally:
        compiled.use_backend("reference")
    assert float(errors.median()) < ROUNDING


def test_a_cache_is_packed_for_all_or_none(compiled):
    gm = graph_tools.snapshot(compiled.graph_module)
    *_, last = gm.graph.find_nodes(op="call_function", target=ops.attention)
    set_argument(last, "mask", None)
    with pytest.raises(BackendError, match=rf"cannot take 3 nodes:\n  attention: node {last.name} reads the same keys"):
        lower(gm, TORCH)
