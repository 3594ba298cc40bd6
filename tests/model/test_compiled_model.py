"""CompiledModel behaves as the transformers model it came from: an exact compile against eager transformers."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache

from resq_compiler.errors import BackendError
from resq_compiler.tiny import tiny_tokenizer, tiny_tokens

EXACT = {"weight_bits": 16, "activation_bits": 16, "kv_bits": 16}
TOLERANCE = 1e-4  # relative, float32: what the pipeline allows an exact pass; measured near 1e-6
FAMILIES = ["llama", "mistral", "gemma2", "opt", pytest.param("qwen3", marks=pytest.mark.slow)]
IDS = tiny_tokens(3, 11, seed=5)
MASK = torch.ones(3, 11, dtype=torch.long)
MASK[0, :4] = 0  # left padding
MASK[1, :1] = 0
POSITIONS = (MASK.cumsum(-1) - 1).clamp_min(0)


@pytest.fixture(scope="module")
def exact(compiled):
    return compiled("llama", **EXACT)


def assert_close(ours, theirs, mask=MASK):
    """Only at real tokens: what a model writes at padding means nothing."""
    ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_eager(compiled, tiny, family):
    model, eager = compiled(family, **EXACT), tiny(family)
    with torch.no_grad():
        assert_close(model(IDS).logits, eager(IDS).logits, torch.ones_like(MASK))
        padded = eager(IDS, attention_mask=MASK, position_ids=POSITIONS).logits
    assert_close(model(input_ids=IDS, attention_mask=MASK, position_ids=POSITIONS).logits, padded)
    assert_close(model(IDS, MASK).logits, padded)  # positions follow from the mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generated_tokens_equal_eager(compiled, tiny, family, options):
    model, eager = compiled(family, **EXACT), tiny(family)
    arguments = {"attention_mask": MASK, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    assert torch.equal(model.generate(IDS, **arguments), eager.generate(IDS, **arguments))


def test_past_continues_as_the_whole(exact):
    whole = exact(IDS, MASK).logits
    first = exact(IDS[:, :6], MASK[:, :6])
    second = exact(IDS[:, 6:9], MASK[:, :9], past_key_values=first.past_key_values)
    third = exact(IDS[:, 9:], MASK, past_key_values=second.past_key_values)
    assert third.past_key_values.get_seq_length() == 11
    assert_close(torch.cat((first.logits, second.logits, third.logits), 1), whole)


def test_quantized_cache_continues_as_the_whole(compiled):
    """Codes of a token do not depend on what comes later, so a cache in two steps holds the same codes."""
    model = compiled("llama")
    whole = model(IDS, MASK)
    first = model(IDS[:, :6], MASK[:, :6])
    second = model(IDS[:, 6:], MASK, past_key_values=first.past_key_values)
    # 0.1: rounding of float sums moves single activations to the next code; a wrong position or mask changes everything
    ours, theirs = torch.cat((first.logits, second.logits), 1)[MASK.bool()], whole.logits[MASK.bool()]
    assert (ours - theirs).norm() <= 0.1 * theirs.norm()


def test_sampling_follows_the_seed(exact):
    def sample(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # transformers samples from the global generator
            return exact.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=True, pad_token_id=0)

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))


def test_forward_leaves_the_global_generator_alone(compiled):
    before = torch.get_rng_state()
    compiled("llama")(IDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_config_comes_along(exact, tiny):
    assert exact.generation_config == tiny("llama").generation_config
    assert exact.can_generate() and exact.config.vocab_size == 131 and exact.dtype == torch.float32


def test_loss_equals_eager(exact, tiny):
    labels = IDS.masked_fill(MASK == 0, -100)
    with torch.no_grad():
        theirs = tiny("llama")(IDS, attention_mask=MASK, position_ids=POSITIONS, labels=labels).loss
    assert exact(IDS, MASK, labels=labels).loss.item() == pytest.approx(theirs.item(), rel=TOLERANCE)


def test_logits_to_keep(exact):
    whole = exact(IDS).logits
    assert torch.equal(exact(IDS, logits_to_keep=1).logits, whole[:, -1:])
    assert torch.equal(exact(IDS, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_output_forms(exact):
    output = exact(IDS, use_cache=False)
    assert output.past_key_values is None and output.loss is None
    logits, cache = exact(IDS, return_dict=False)
    assert torch.equal(logits, output.logits) and isinstance(cache, DynamicCache)


@pytest.mark.parametrize("refused", [
    {"inputs_embeds": torch.zeros(3, 11, 64)}, {"output_attentions": True}, {"output_hidden_states": True}, {"colour": 1},
])  # fmt: skip
def test_what_a_graph_cannot_take_is_refused(exact, refused):
    with pytest.raises(BackendError, match=next(iter(refused))):
        exact(IDS, **refused)


def test_filled_caches_of_other_kinds_are_refused(exact, tiny):
    cache = StaticCache(config=tiny("llama").config, max_cache_len=32)
    with torch.no_grad():
        tiny("llama")(IDS, past_key_values=cache)
    with pytest.raises(BackendError, match="StaticCache"):
        exact(IDS, past_key_values=cache)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["static", "by layer type"])
def test_the_callers_own_cache_is_filled(compiled, tiny, family, kind):
    """Whatever its class, as transformers does it: the same object is given again and again; reset empties it."""
    model, eager = compiled(family, **EXACT), tiny(family)

    def made():
        return (
            StaticCache(config=eager.config, max_cache_len=32)
            if kind == "static"
            else DynamicCache(config=eager.config)
        )

    ours, theirs = made(), made()
    for start, stop in ((0, 6), (6, 7), (7, 11)):
        ids, mask, positions = IDS[:, start:stop], MASK[:, :stop], POSITIONS[:, start:stop]
        output = model(ids, mask, past_key_values=ours)
        assert output.past_key_values is ours and ours.get_seq_length() == stop
        with torch.no_grad():
            expected = eager(ids, attention_mask=mask, position_ids=positions, past_key_values=theirs).logits
        assert_close(output.logits, expected, MASK[:, start:stop])
    ours.reset()
    assert ours.get_seq_length() == 0
    assert_close(model(IDS, MASK, past_key_values=ours).logits, model(IDS, MASK).logits)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generate_with_a_static_cache_and_padding(compiled, tiny, family):
    arguments = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = tiny(family).generate(IDS, **arguments)
    for _ in range(2):
        ours = compiled(family, **EXACT).generate(IDS, cache_implementation="static", **arguments)
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_texts_do_not_see_each_other(compiled, tiny, family):
    """Positions begin again: as transformers has it, apart without a cache and a mask, in one row otherwise."""
    model, eager = compiled(family, **EXACT), tiny(family)
    positions = torch.tensor([[*range(4), *range(7)], [*range(11)], [*range(2), *range(2), *range(50, 57)]])
    for options in ({"use_cache": False}, {"use_cache": True}):
        with torch.no_grad():
            expected = eager(IDS, position_ids=positions, **options).logits
        assert_close(model(IDS, position_ids=positions, **options).logits, expected, torch.ones_like(MASK))
    alone = model(IDS[:1, 4:]).logits
    assert_close(model(IDS, position_ids=positions, use_cache=False).logits[:1, 4:], alone, torch.ones(1, 7))


def test_copies_are_models_of_their_own(compiled):
    model = compiled("llama")
    again = copy.deepcopy(model)
    assert torch.equal(again(IDS, MASK).logits, model(IDS, MASK).logits)
    assert [s.label for s in again.stages] == [s.label for s in model.stages] and again.notes == model.notes
    next(again.buffers()).zero_()
    assert next(model.buffers()).any()


@pytest.mark.parametrize("keep", ["pickle", "torch.save"])
def test_pickled_models_are_the_same(compiled, keep):
    model, file = compiled("llama"), io.BytesIO()
    (pickle.dump if keep == "pickle" else torch.save)(model, file)
    file.seek(0)
    again = pickle.load(file) if keep == "pickle" else torch.load(file, weights_only=False)
    assert torch.equal(again(IDS, MASK).logits, model(IDS, MASK).logits)
    assert (again.options, again.notes, again.source) == (model.options, model.notes, model.source)
    assert torch.equal(again.sample_ids, model.sample_ids)


def test_a_copy_computes_on_the_same_backend(compiled):
    pytest.importorskip("onnxruntime")
    model = copy.deepcopy(compiled("llama")).use_backend("onnx")
    again = copy.deepcopy(model)
    assert again.backend == "onnx" and torch.equal(again(IDS, MASK).logits, model(IDS, MASK).logits)


@pytest.mark.parametrize("change", [
    lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu", torch.float16),
])  # fmt: skip
def test_other_dtypes_are_refused_and_nothing_changes(compiled, change):
    model = compiled("llama")
    before = {name: value.dtype for name, value in model.named_buffers()}
    with pytest.raises(BackendError, match="cannot be made torch.* leave the dtype out"):
        change(model)
    assert {name: value.dtype for name, value in model.named_buffers()} == before


def test_moving_without_another_dtype(compiled):
    model = compiled("llama")
    expected = model(IDS).logits
    assert torch.equal(model.to("cpu").float().to(torch.float32)(IDS).logits, expected)


def test_switches_of_torch_change_nothing(compiled):
    model = compiled("llama")
    expected = model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert torch.equal(model(IDS).logits, expected)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(model(IDS).logits, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def harness(compiled):
    """The quantized model inside lm-eval, with a tokenizer of 131 words."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(128))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return huggingface.HFLM(pretrained=compiled("llama"), tokenizer=fast, batch_size=2, device="cpu", max_length=64)


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def test_lm_eval_loglikelihood(harness, compiled):
    pairs = [("w1 w2 w3", " w4 w5"), ("w7", " w8")]
    results = harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, results, strict=True):
        ids = harness.tokenizer(context + continuation, return_tensors="pt", add_special_tokens=False).input_ids
        start = len(context.split())
        logits = compiled("llama")(ids).logits.log_softmax(-1)[0, start - 1 : -1]
        expected = logits.gather(1, ids[0, start:, None]).sum().item()
        # 2%: a batch pads rows to one length, and rounding moves single activations to the next code
        assert score == pytest.approx(expected, rel=0.02)


def test_lm_eval_generate_until(harness, compiled):
    texts = harness.generate_until(
        requests("generate_until", [("w1 w2 w3", {"until": ["</s>"], "max_gen_toks": 4})]), disable_tqdm=True
    )
    ids = harness.tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    expected = compiled("llama").generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 3:]
    assert texts == [harness.tokenizer.decode(expected, skip_special_tokens=True)]


def test_lm_eval_opens_a_saved_model(compiled, tmp_path):
    """As `lm_eval --model hf --model_args pretrained=DIR`."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = copy.deepcopy(compiled("llama"))
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    opened = huggingface.HFLM(pretrained=str(tmp_path / "model"), device="cpu", max_length=64)
    assert torch.equal(opened.model(IDS).logits, model(IDS).logits)
