"""Directories of profile native in onnxruntime-genai as it is: streaming, a chat, a batch of prompts of different lengths."""

from __future__ import annotations

import numpy as np
import pytest
from resq_compiler.backends.cpu import library as libraries
from resq_compiler.backends.onnx import export_onnx
from resq_compiler.backends.onnx.runtime import OnnxDecoder

from resq_compiler.tiny import tiny_tokenizer, tiny_tokens

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
NEW = 8


@pytest.fixture(scope="module")
def directory(library, compile_tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "library", lambda: library)
        compiled, _ = compile_tiny("llama", recipe="resq", weight_method="rtn", lm_head_bits=8)
        for holder in (compiled.config, compiled.generation_config):
            patch.setattr(holder, "eos_token_id", None)
        path = tmp_path_factory.mktemp("genai") / "model"
        yield export_onnx(compiled, path, "native", embedding="float32", tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def decoder(directory):
    return OnnxDecoder(directory, threads=1)


def generator_of(model, length, batch=1):
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, batch_size=batch, do_sample=False)
    return genai.Generator(model, parameters)


def test_tokens_one_by_one(directory, decoder):
    """Every token as it comes."""
    ids = tiny_tokens(1, 200, seed=3).numpy()
    generator = generator_of(genai.Model(str(directory)), 200 + NEW)
    generator.append_tokens(ids[0].astype(np.int32))
    got = []
    for _ in range(NEW):
        generator.generate_next_token()
        got.append(int(generator.get_next_tokens()[0]))
    assert got == decoder.generate(ids, max_new_tokens=NEW, eos_token_id=[])[0, 200:].tolist()


def test_a_chat_of_two_turns(directory, decoder):
    """Tokens appended behind what was generated: the cache goes on."""
    turns = [tiny_tokens(1, 6, seed=1).numpy(), tiny_tokens(1, 5, seed=2).numpy()]
    generator = generator_of(genai.Model(str(directory)), 64)
    expected = np.zeros((1, 0), np.int64)
    for turn in turns:
        generator.append_tokens(turn[0].astype(np.int32))
        for _ in range(NEW):
            generator.generate_next_token()
        expected = decoder.generate(np.concatenate([expected, turn], 1), max_new_tokens=NEW, eos_token_id=[])
    assert np.array_equal(generator.get_sequence(0), expected[0])


@pytest.mark.parametrize("length", [9, 200])
def test_a_batch_padded_on_the_right(directory, decoder, length):
    """As onnxruntime-genai pads; each row continues as it does alone, up to a padding token, which ends it there."""
    model = genai.Model(str(directory))
    pad = int(decoder.settings["pad_token_id"])
    rows = [row[row != pad] for row in tiny_tokens(3, length, seed=5).numpy()]
    lengths = [min(map(len, rows)), len(rows[1]) - 3, len(rows[2])]
    rows = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    longest = max(map(len, rows))
    batch = np.full((3, longest), pad, np.int32)
    for row, tokens in zip(batch, rows, strict=True):
        row[: len(tokens)] = tokens
    generator = generator_of(model, longest + NEW, batch=3)
    generator.append_tokens(batch)
    for _ in range(NEW):
        generator.generate_next_token()
    for i, tokens in enumerate(rows):
        alone = decoder.generate(tokens[None], max_new_tokens=NEW, eos_token_id=[])[0, len(tokens) :]
        ends = [*np.flatnonzero(alone == pad), NEW]
        assert np.array_equal(generator.get_sequence(i)[longest : longest + ends[0]], alone[: ends[0]]) and ends[0] > 0
