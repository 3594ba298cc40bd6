"""evaluation.py against torch.nn.functional and against the loss that transformers computes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from resq_compiler.calibration.data import demo_text, text_windows
from resq_compiler.errors import DataError
from resq_compiler.evaluation import predictions
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.frontend.models import embedded_model_path, load_model
from resq_compiler.tiny import tiny_model, tiny_tokens

WINDOWS = tiny_tokens(5, 24)


def shifted(seed):
    """A model made of numbers: logits [b, L, 131] that depend on each token."""
    table = torch.randn(131, 131, generator=torch.Generator().manual_seed(seed)) * 3
    return lambda ids: SimpleNamespace(logits=table[ids])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 131 * 7, predictions.CHUNK_BYTES])
def test_agrees_with_torch(monkeypatch, batch_size, chunk_bytes):
    monkeypatch.setattr(predictions, "CHUNK_BYTES", chunk_bytes)
    model, reference = shifted(0), shifted(1)
    result = evaluate(model, WINDOWS, reference, batch_size)
    ours, theirs = (m(WINDOWS[:, :-1]).logits.flatten(0, 1).double() for m in (model, reference))
    nll = F.cross_entropy(ours, WINDOWS[:, 1:].flatten()).item()
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean").item()
    # 1e-6: float32 log-softmax against float64
    assert result.nll == pytest.approx(nll, rel=1e-6) and result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.kl == pytest.approx(kl, rel=1e-6)
    assert result.top1_agreement == (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert result.tokens == 5 * 23 and result.tokens_per_second == pytest.approx(5 * 24 / result.seconds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_loss_of_transformers(dtype):
    model = tiny_model("llama").to(dtype)
    result = evaluate(model, WINDOWS)
    with torch.no_grad():
        assert result.nll == pytest.approx(model(WINDOWS, labels=WINDOWS).loss.item(), rel=1e-5)  # both in float32
    assert result.kl is None and result.top1_agreement is None and result.to_dict()["tokens"] == 115


def test_a_model_agrees_with_itself():
    model = tiny_model("qwen3")
    result = evaluate(model, WINDOWS, reference=model)
    assert result.kl == 0 and result.top1_agreement == 1


def test_logits_of_the_models_are_not_overwritten():
    kept = {}

    def remember(name, model):
        def call(ids):
            output = model(ids)
            kept[name] = (output.logits, output.logits.clone())
            return output

        return call

    evaluate(remember("model", shifted(0)), WINDOWS, remember("reference", shifted(1)))
    assert all(torch.equal(now, before) for now, before in kept.values())


def test_progress_counts_windows():
    steps = []
    evaluate(shifted(0), WINDOWS, batch_size=2, progress=lambda *step: steps.append(step))
    assert steps == [(2, 5), (4, 5), (5, 5)]


def test_hopeless_model_has_infinite_perplexity():
    wrong = torch.full((131,), -1e4).index_fill(0, torch.tensor([130]), 1e4)
    result = evaluate(
        lambda ids: SimpleNamespace(logits=wrong.expand(*ids.shape, 131)), torch.zeros(1, 9, dtype=torch.long)
    )
    assert result.perplexity == math.inf and result.nll == pytest.approx(2e4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_names_the_window_with_bad_logits(bad):
    def breaks(ids):
        logits = shifted(0)(ids).logits
        logits[(ids == WINDOWS[3]).all(1), 7, 5] = bad
        return SimpleNamespace(logits=logits)

    with pytest.raises(DataError, match="model logits of window 3 contain NaN or infinity"):
        evaluate(breaks, WINDOWS, batch_size=2)
    with pytest.raises(DataError, match="reference logits of window 3"):
        evaluate(shifted(0), WINDOWS, breaks, batch_size=2)


@pytest.mark.parametrize(
    "windows",
    [WINDOWS[0], WINDOWS[:, :1], WINDOWS[:0], WINDOWS.float(), WINDOWS.int()],
    ids=lambda w: str(list(w.shape)),
)
def test_refuses_other_windows(windows):
    with pytest.raises(DataError, match="expected windows .* of torch.long"):
        evaluate(shifted(0), windows)


def test_refuses_logits_of_another_shape():
    with pytest.raises(DataError, match=r"expected model logits \[1, 24, 'V'\]; got \[1, 1, 131\]"):
        evaluate(lambda ids: SimpleNamespace(logits=shifted(0)(ids).logits[:, -1:]), WINDOWS)
    narrow = lambda ids: SimpleNamespace(logits=shifted(0)(ids).logits[..., :100])  # noqa: E731
    with pytest.raises(DataError, match="share a vocabulary"):
        evaluate(shifted(0), WINDOWS, narrow)


@pytest.mark.slow
def test_real_model():
    """Loss of the embedded model on its evaluation text: as transformers computes it, and a plausible size."""
    loaded = load_model(embedded_model_path())
    windows = text_windows(demo_text()[1], loaded.tokenizer, 512, 4)
    result = evaluate(loaded.model, windows)
    with torch.no_grad():
        losses = [loaded.model(w[None], labels=w[None]).loss for w in windows]
    assert result.nll == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)  # both in float32
    assert 3 < result.perplexity < 60  # English; an untrained model has 49152
