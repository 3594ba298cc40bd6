"""Settings and models of any size: a compiled model that answers, or one ResqError that says why not."""

from __future__ import annotations

import contextlib
import tempfile
import typing

import hypothesis
import pytest
from hypothesis import strategies as st

import resq_compiler
from resq_compiler.errors import ResqError
from resq_compiler.model.compiled_model import CompiledModel
from resq_compiler.recipes import named
from resq_compiler.recipes.settings import CHOICES, CompileConfig
from resq_compiler.tiny import TINY_FAMILIES, tiny_model, tiny_tokens
from tests.fuzz.damage import FEW, LEAVES, MANY
from tests.fuzz.ends import ends_of

# a compile takes too long to be shrunk
FOUND_AS_DRAWN = (hypothesis.Phase.explicit, hypothesis.Phase.reuse, hypothesis.Phase.generate)
COMPILES = hypothesis.settings(FEW, max_examples=4)
MANY_COMPILES = hypothesis.settings(MANY, max_examples=300, phases=FOUND_AS_DRAWN)
NUMBERS = st.sampled_from([0, 1, -1, 3, 16, 0.0, 0.1, 1 / 8, 0.25, 0.3, 0.5, 1.0, float("nan"), float("inf")])
TEXTS = st.sampled_from(["mlp=1/4,o=0", "mlp=", "o=2", "all=1/8", "mse", "input", "divergence", ""])
SMALL = {"calibration_samples": 2, "calibration_length": 12, "learning_steps": 1, "basis_samples": 1}


def values(name: str, known: st.SearchStrategy) -> st.SearchStrategy:
    """Values of an option: mostly of those that it names."""
    if name in CHOICES:
        known = st.sampled_from(CHOICES[name])
    elif typing.get_type_hints(CompileConfig)[name] is bool:
        known = st.booleans()
    return known


@st.composite
def settings(draw, odd: bool) -> dict:
    """A recipe and some options. odd: with values that are none."""
    fields = sorted(set(typing.get_type_hints(CompileConfig)) - {"recipe"} - set(SMALL))
    chosen = {"recipe": draw(st.sampled_from(sorted(named.RECIPES)))}
    for name in draw(st.lists(st.sampled_from(fields), max_size=4, unique=True)):
        chosen[name] = draw(values(name, NUMBERS | TEXTS))
        if odd and draw(st.integers(0, 9)) == 0:
            chosen[name] = draw(LEAVES)
    return chosen


@st.composite
def models(draw):
    """A random model of one or two layers; its sizes fit into one another where transformers asks for that."""
    family = draw(st.sampled_from(TINY_FAMILIES))
    groups, of_group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    heads, width = groups * of_group, draw(st.sampled_from([2, 4, 6, 8, 10, 16, 22]))
    hidden, inner = heads * width, draw(st.integers(1, 40))
    sizes = {
        "num_hidden_layers": draw(st.integers(1, 2)), "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": groups,
        "intermediate_size": inner, "vocab_size": draw(st.integers(4, 200)), "tie_word_embeddings": draw(st.booleans()), "head_dim": width,
        "pad_token_id": None,
    }  # fmt: skip
    if family == "opt":
        sizes |= {"ffn_dim": inner, "word_embed_proj_dim": hidden}
    if family in ("qwen3", "gemma2", "gemma3") and draw(st.booleans()):
        sizes["hidden_size"] = draw(st.integers(1, 50))  # heads of a width of their own
    if family == "gemma3":
        sizes["layer_types"] = ["sliding_attention", "full_attention"][: sizes["num_hidden_layers"]]
    if family == "gemma2":
        sizes["layer_types"] = None
    if family in ("gpt_neox", "gpt_neox-sequential"):
        sizes |= {"rotary_pct": draw(st.sampled_from([0.25, 0.5, 1.0]))}
    return family, sizes


def usable(chosen: dict) -> dict:
    """Of some settings those that go together, taken one after the other: what does not is for test_settings."""
    kept = {"recipe": chosen["recipe"]}
    for name, value in chosen.items():
        with contextlib.suppress(ResqError):
            named.passes_for(named.resolve(**{**SMALL, **kept, name: value}))
            kept[name] = value
    return kept


def unforeseen(error: BaseException | None) -> bool:
    """Whether something stands behind a ResqError that nobody raised on purpose, or it speaks of a bug itself."""
    return error is not None and (
        not isinstance(error, ResqError) or "bug" in str(error) or unforeseen(error.__cause__)
    )


def try_settings(data) -> str:
    try:
        named.passes_for(named.resolve(**data.draw(settings(odd=True))))
    except ResqError:
        return "refused"
    return "taken"


def try_models(data) -> str:
    """A model that runs in transformers is compiled, and then computed, saved, exported or run by another backend."""
    family, sizes = data.draw(models())
    tokens = tiny_tokens(2, 12, vocab_size=sizes["vocab_size"])
    try:
        model = tiny_model(family, **sizes)
        model(tokens)
    except Exception:  # transformers does not run it either
        hypothesis.reject()
    use = data.draw(st.sampled_from([saved, exported, on_backend]))
    try:
        compiled = resq_compiler.compile(model, tokens, **usable(data.draw(settings(odd=False))), **SMALL)
        answer = compiled(tokens).logits
        assert answer.shape == (2, 12, sizes["vocab_size"]) and answer.isfinite().all()
        use(compiled, tokens, answer, data)
    except ResqError as error:
        if unforeseen(error):
            raise
        return "refused"
    return use.__name__


def saved(compiled: CompiledModel, tokens, answer, data):
    with tempfile.TemporaryDirectory() as place:
        compiled.save_pretrained(place)
        assert resq_compiler.load(place)(tokens).logits.equal(answer)


def exported(compiled: CompiledModel, tokens, answer, data):
    from resq_compiler.backends.onnx.runtime import OnnxDecoder

    with tempfile.TemporaryDirectory() as place:
        compiled.export_onnx(place, data.draw(st.sampled_from(["qdq", "ort", "weight-only", "native"])), overwrite=True)
        decoder = OnnxDecoder(place, threads=1)
        assert decoder.generate(tokens.numpy(), max_new_tokens=2, eos_token_id=()).shape == (2, 14)


def on_backend(compiled: CompiledModel, tokens, answer, data):
    other = compiled.use_backend(data.draw(st.sampled_from(["cpu", "triton"])))(tokens).logits
    assert other.shape == answer.shape and other.isfinite().all()


def test_settings():
    ends = ends_of(try_settings, FEW)
    assert ends["taken"] > 20 and ends["refused"] > 20


def test_models():
    pytest.importorskip("onnxruntime")
    ends = ends_of(try_models, COMPILES)
    assert ends["refused"] < ends.total()


@pytest.mark.slow
def test_many_settings():
    ends = ends_of(try_settings, MANY)
    assert ends["taken"] > 400 and ends["refused"] > 400


@pytest.mark.slow
def test_many_models():
    pytest.importorskip("onnxruntime")
    ends = ends_of(try_models, MANY_COMPILES)
    assert min(ends[use.__name__] for use in (saved, exported, on_backend)) > 20, ends
