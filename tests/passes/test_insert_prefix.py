"""insert-prefix: against eager transformers behind the same tokens, and what is found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from resq_compiler.passes import QuantizeWeights
from resq_compiler.passes.insert_prefix import InsertPrefix, Massive, choose, find_massive, insert

import resq_compiler
from resq_compiler.errors import PassError
from resq_compiler.ir import ops
from resq_compiler.ir.graph_tools import get_tensor, is_call, set_tensor
from resq_compiler.pipeline.run import relative_error
from resq_compiler.recipes import named
from resq_compiler.tiny import SLIDING_WINDOW, tiny_tokens

PREFIX = [7, 3, 1]


def run(gm, cache, ids, mask=None, past=None):
    """Logits and cache of the graph for ids [B, S] behind a past."""
    length = past[0].shape[2] if past else 0
    mask = torch.ones(ids.shape[0], length + ids.shape[1], dtype=torch.long) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, length:].contiguous()
    past = past or [torch.zeros(len(ids), c.num_heads, 0, w) for c in cache for w in (c.key_dim, c.value_dim)]
    with torch.no_grad():
        logits, *present = gm(ids, mask, positions, *past)
    return logits, present


def behind_prefix(model, ids):
    """Eager transformers on the prefix and the ids, the logits of the ids."""
    whole = torch.cat((torch.tensor([PREFIX]).expand(len(ids), -1), ids), 1)
    with torch.no_grad():
        return model(input_ids=whole).logits[:, len(PREFIX) :]


@pytest.fixture
def prefixed(build, captured):
    """family -> graph with the prefix, nothing quantized, and the shapes of its cache."""

    def make(family, **options):
        built = build(family, before="quantize-weights", **options)
        insert(built.gm, built.topology, PREFIX)
        built.gm.recompile()
        return built, captured(family).cache

    return make


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "opt", "gpt_neox", "olmo2"])
def test_same_logits_as_eager_behind_the_same_tokens(family, prefixed, tiny):
    built, cache = prefixed(family)
    ids = tiny_tokens(2, SLIDING_WINDOW - len(PREFIX))  # inside a window eager attention sees the prefix too
    logits, present = run(built.gm, cache, ids)
    assert relative_error(logits, behind_prefix(tiny(family), ids)) < 1e-4  # what exact passes may change
    assert present[0].shape[2] == ids.shape[1]  # the prefix takes no place in the cache


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_prefill_and_decode_agree_with_left_padding(family, prefixed, tiny):
    built, cache = prefixed(family)
    ids = tiny_tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    whole, _ = run(built.gm, cache, ids, mask)
    first, past = run(built.gm, cache, ids[:, :8], mask[:, :8])
    last, _ = run(built.gm, cache, ids[:, 8:], mask, past)
    torch.testing.assert_close(last, whole[:, 8:], rtol=1e-4, atol=1e-5)
    alone, _ = run(built.gm, cache, ids[:1, 3:])
    torch.testing.assert_close(whole[:1, 3:], alone, rtol=1e-4, atol=1e-5)


def test_a_window_does_not_hide_the_prefix(prefixed):
    built, cache = prefixed("mistral")
    window = next(b.attention.core.args[3].args[0].args[2] for b in built.topology.blocks)
    ids = tiny_tokens(1, 2 * window)
    before, _ = run(built.gm, cache, ids)
    name = "resq.prefix_value.0"
    set_tensor(built.gm, name, built.gm.get_buffer(name) + 1)
    after, _ = run(built.gm, cache, ids)
    assert float((after - before)[:, -1].abs().max()) > 1e-3


def loud_token(built, token, factor=1e4):
    """Make an embedding so large that its token is massive in the stream."""
    (table,) = [n.args[0] for n in built.gm.graph.nodes if is_call(n, torch.ops.aten.embedding.default)]
    value = get_tensor(built.gm, table).clone()
    value[token] *= factor
    set_tensor(built.gm, str(table.target), value)


def test_massive_tokens_are_found_where_they_are(build):
    built = build("llama", before="quantize-weights")
    windows = torch.randint(10, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    windows[0, 5] = windows[1, 9] = windows[1, 20] = windows[3, 0] = 5
    assert find_massive(built.gm, built.topology, windows, 64).per_window == 0
    loud_token(built, 5)
    found = find_massive(built.gm, built.topology, windows, 64)
    assert found.later == {5: 3} and found.first == {5: 1} and found.windows == 4 and found.per_window == 1


@pytest.mark.parametrize(
    ("massive", "bos", "expected"),
    [
        (Massive(4), 1, []),
        (Massive(4, {9: 4}), 1, [1]),
        (Massive(4, {9: 3, 8: 1}), None, [9]),
        (Massive(4, {9: 4}, {5: 3, 6: 1}), 1, [5, 1]),
        (Massive(4, {9: 4}, {6: 3, 5: 4, 1: 5}), 1, [5, 6, 1]),
        (Massive(1, {9: 1}, {i: 99 - i for i in range(40)}), 77, [0, 1, 2, 3, 4, 5, 6, 77]),
    ],
)
def test_choice(massive, bos, expected):
    found = Massive(massive.windows, Counter(massive.first), Counter(massive.later))
    assert choose(found, bos) == expected


def test_nothing_is_inserted_where_no_token_is_massive(build):
    built = build("llama", before="insert-prefix", prefix_tokens="auto")
    before = str(built.gm.graph)
    assert InsertPrefix().run(built.gm, built.ctx) == 0
    assert str(built.gm.graph) == before
    assert any("no token" in note for note in built.ctx.notes)


def test_the_pass_says_what_it_did_and_does_it_once(build):
    built = build("llama", before="insert-prefix", prefix_tokens="auto")
    loud_token(built, 5)
    built.ctx.calibration = torch.randint(10, 60, (4, 32), generator=torch.Generator().manual_seed(0))
    built.ctx.calibration[:, 0] = 5
    built.ctx.bos_token = 5
    assert InsertPrefix().run(built.gm, built.ctx) == len(built.topology.blocks)
    assert built.ctx.lines == ["prefix: token ids [5]", "massive tokens a window: 1.00 before, 1.00 behind the prefix"]
    assert InsertPrefix().run(built.gm, built.ctx) == 0


def test_positions_in_the_mask_are_an_error():
    model = alibi_model()
    with pytest.raises(PassError, match=r"insert-prefix: node .*causal_mask.*prefix_tokens=none"):
        resq_compiler.compile(
            model, tiny_tokens(4, 32), prefix_tokens="auto", weight_method="rtn", calibration_length=32
        )


def alibi_model():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4)).eval()


def test_a_compiled_model_keeps_its_prefix(tiny, tmp_path):
    options = {"calibration_samples": 4, "calibration_length": 32, "calibration_dtype": "float32"}
    plain = named.passes_for(named.resolve())
    passes = named.before(plain, QuantizeWeights, InsertPrefix(massive=1.5))  # a random model has no massive tokens
    compiled = resq_compiler.compile(tiny("llama"), tiny_tokens(4, 32), recipe=passes, **options)
    assert any("every sequence stands behind the tokens" in note for note in compiled.notes)
    prefix = [n for n in compiled.graph_module.graph.nodes if is_call(n, ops.prepend)]
    assert len(prefix) == 2 * len(compiled.topology.blocks)
    ids = tiny_tokens(2, 9)
    compiled.save_pretrained(tmp_path / "model")
    loaded = resq_compiler.load(tmp_path / "model")
    assert torch.equal(loaded(input_ids=ids).logits, compiled(input_ids=ids).logits)
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=4, do_sample=False),
        compiled.generate(ids, max_new_tokens=4, do_sample=False),
    )
    bare = resq_compiler.compile(tiny("llama"), tiny_tokens(4, 32), **options)
    assert not torch.equal(bare(input_ids=ids).logits, compiled(input_ids=ids).logits)


def test_off_by_default_but_in_the_recipe_that_is_named_after_it():
    found = {r for r in named.RECIPES if "insert-prefix" in [p.name for p in named.passes_for(named.resolve(r))]}
    assert found == {"prefixquant"}
