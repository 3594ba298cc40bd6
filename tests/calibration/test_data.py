"""data.py and sampling.py: every kind of calibration data gives the same windows, or an error that says why not."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from resq_compiler.calibration.data import calibration_windows, demo_text, text_windows
from resq_compiler.calibration.self_written import sample_windows
from resq_compiler.errors import DataError
from resq_compiler.frontend.models import embedded_model_path, load_model
from resq_compiler.tiny import tiny_model

VOCAB = 131
IDS = torch.arange(60) * 7 % VOCAB


class ByteTokenizer:
    """One token per byte; special tokens before and behind a text unless told otherwise, if it has any."""

    def __init__(self, before=(), behind=()):
        self.before, self.behind = list(before), list(behind)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = list(text.encode())
        return {"input_ids": [*self.before, *ids, *self.behind] if add_special_tokens else ids}


class MapStyle(Dataset):
    """Has no __iter__ and never raises IndexError, as torch allows."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"input_ids": IDS[20 * (index % 3) :][:20]}


def windows(data, samples=3, length=16, tokenizer=None, **options):
    return calibration_windows(
        data, samples=samples, sequence_length=length, vocab_size=VOCAB, tokenizer=tokenizer, **options
    )


PADDED = {"input_ids": torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS.view(3, 20)], 1), "attention_mask": None}
PADDED["attention_mask"] = torch.ones(3, 22, dtype=torch.long).index_fill(1, torch.tensor([0, 1]), 0)
FORMS = {
    "1-D tensor": IDS,
    "2-D int32 tensor": IDS.view(3, 20).int(),
    "numpy": IDS.numpy().astype(np.uint8),
    "list of ints": IDS.tolist(),
    "lists of ints": IDS.view(3, 20).tolist(),
    "list of 1-D tensors": list(IDS.split(7)),
    "tuple of 2-D tensors": tuple(IDS.view(6, 10).split(2)),
    "one batch": {"input_ids": IDS.view(3, 20).tolist()},
    "batches": [{"input_ids": part} for part in IDS.view(6, 10).split(2)],
    "padded batch": PADDED,
    "dict rows": [{"input_ids": row.tolist(), "attention_mask": [1] * 20} for row in IDS.view(3, 20)],
    "input and label pairs": [(row, -row) for row in IDS.view(3, 20)],
    "DataLoader": DataLoader(TensorDataset(IDS.view(6, 10)), batch_size=4),
    "map-style Dataset": MapStyle(),
}


RAGGED = [IDS[:7].tolist(), IDS[7:30].tolist(), IDS[30:].tolist()]
FORMS |= {
    "ragged batch": {"input_ids": RAGGED},
    "ragged batch of tensors": {"input_ids": [torch.tensor(row) for row in RAGGED]},
    "ragged and masked": {
        "input_ids": [[5, *RAGGED[0]], RAGGED[1], [9, 9, *RAGGED[2]]],
        "attention_mask": [[0, *[1] * 7], [1] * 23, [0, 0, *[1] * 30]],
    },
    "ragged lists": RAGGED,
    "rows of None between": [None, {"input_ids": RAGGED[0]}, {"input_ids": None}, {"input_ids": RAGGED[1] + RAGGED[2]}],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*holds None")
def test_token_ids_in_every_form(form):
    result = windows(FORMS[form])
    assert result.dtype == torch.long and result.is_contiguous()
    assert torch.equal(result, IDS[:48].view(3, 16))


TEXTS = ["one text of 21 bytes\n", "", "and another, which has 32 bytes.", "the rest"]


class ChatTokenizer(ByteTokenizer):
    """With a chat template that knows users alone."""

    chat_template = "a template"

    def apply_chat_template(self, messages, tokenize):
        assert tokenize is False
        if any(m["role"] != "user" for m in messages):
            raise ValueError("unknown role")
        return "".join(f"<{m['content']}>" for m in messages)


CHAT = [{"role": "user", "content": "first"}, {"role": "user", "content": "and second"}]


@pytest.mark.parametrize("data", [
    [{"messages": CHAT}, {"messages": CHAT}], [CHAT, CHAT], {"messages": [CHAT, CHAT]},
    [{"messages": CHAT}, None, {"messages": None}, {"messages": CHAT}],
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*holds None")
def test_conversations_are_written_by_the_chat_template(data, tmp_path):
    expected = list(b"<first><and second>" * 2)
    assert windows(data, 1, 38, ChatTokenizer()).flatten().tolist() == expected
    if isinstance(data, list) and not isinstance(data[0], list):
        file = tmp_path / "chat.jsonl"
        file.write_text("\n".join(map(json.dumps, data)), encoding="utf-8-sig")
        assert windows(file, 1, 38, ChatTokenizer()).flatten().tolist() == expected


def test_one_conversation():
    assert windows(CHAT, 1, 19, ChatTokenizer()).flatten().tolist() == list(b"<first><and second>")


@pytest.mark.parametrize(("data", "tokenizer", "message"), [
    ([CHAT], ByteTokenizer(), "messages need a tokenizer with a chat template"),
    (CHAT, None, "messages need a tokenizer with a chat template"),
    ([[{"role": "robot", "content": "x"}]], ChatTokenizer(), r"does not take these messages \(ValueError: unknown role\)"),
    ([None, {"text": None}], ByteTokenizer(), r"empty \(0 tokens came\)"),
    ({"input_ids": RAGGED, "attention_mask": [[1] * 7]}, None, "expected a row of attention_mask for every row"),
    ({"input_ids": RAGGED, "attention_mask": [[1], [1], [1]]}, None, r"row 0: expected attention_mask \[7\]"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*holds None")
def test_rows_that_cannot_be_taken(data, tokenizer, message):
    with pytest.raises(DataError, match=message):
        windows(data, 1, 16, tokenizer)


def test_rows_of_none_are_told():
    with pytest.warns(UserWarning, match="calibration data, item 0: holds None; such rows are left out"):
        found = windows([None, "some text of more than 16 bytes"], 1, 16, ByteTokenizer())
    assert bytes(found[0].tolist()) == b"some text of mor"


def test_texts_from_a_loader_and_a_file_with_a_byte_order_mark(tmp_path):
    expected = windows(TEXTS, 1, 50, ByteTokenizer())
    assert torch.equal(windows(DataLoader(TEXTS, batch_size=3), 1, 50, ByteTokenizer()), expected)
    for name, text in (("a.txt", "".join(TEXTS)), ("a.jsonl", "\n".join(json.dumps({"text": t}) for t in TEXTS))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert torch.equal(windows(tmp_path / name, 1, 50, ByteTokenizer()), expected)


def test_texts_in_every_form(tmp_path):
    joined = "".join(TEXTS)
    expected = torch.tensor(list(joined.encode()))[:48].view(3, 16)
    (tmp_path / "t.txt").write_text(joined)
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps({"text": t, "id": 1}) for t in TEXTS))
    forms = [TEXTS, iter(TEXTS), [{"text": t} for t in TEXTS], [{"text": TEXTS[:2]}, {"text": TEXTS[2:]}]]
    forms += [DataLoader(TEXTS, batch_size=3), tmp_path / "t.txt", str(tmp_path / "t.txt"), tmp_path / "t.jsonl"]
    for form in forms:
        assert torch.equal(windows(form, tokenizer=ByteTokenizer()), expected), form


def test_datasets_library():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    expected = windows(TEXTS, tokenizer=ByteTokenizer())
    assert torch.equal(windows(table, tokenizer=ByteTokenizer()), expected)
    assert torch.equal(windows(table.to_iterable_dataset(), tokenizer=ByteTokenizer()), expected)
    with pytest.raises(DataError, match="got the keys train"):
        windows(datasets.DatasetDict(train=table), tokenizer=ByteTokenizer())


def test_reads_no_further_than_needed():
    def endless():
        for _ in range(4):
            yield IDS
        raise AssertionError("read on")

    assert windows(endless(), samples=15).shape == (15, 16)  # 240 tokens, exactly four pieces


def test_fewer_windows_than_asked_for_are_announced():
    with pytest.warns(
        UserWarning, match=r"5 windows of 16 tokens were asked for \(80 tokens\); 60 tokens came: using 3"
    ):
        assert windows(IDS, samples=5).shape == (3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        windows(IDS, samples=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"it is empty \(0 tokens came\), one window needs 16"),
        (torch.empty(0, dtype=torch.long), "it is empty"),
        ([""], "it is empty"),
        (IDS[:15], "only 15 tokens came, one window needs 16"),
        ([IDS, torch.tensor([3, VOCAB])], r"item 1: token 1 is 131; expected ids from 0 to below .* 131"),
        ([-1, 2], "token 0 is -1"),
        (torch.rand(3, 20), r"expected token ids as integers \(torch.long\); got torch.float32 \[3, 20\]"),
        (torch.ones(20, dtype=torch.bool), "got torch.bool"),
        (IDS.view(3, 4, 5), r"got the shape \[3, 4, 5\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(59)}, r"expected attention_mask \[60\].*got \[59\]"),
        ({"input_ids": [[[1, 2], [3]], [[4]]]}, "rows of one length; got list of 2, the first a list"),
        ({"tokens": IDS}, "got the keys tokens"),
        ([object()], "item 0: expected a text, token ids, messages, or a dict.*got object"),
        ([()], "item 0: .*got tuple of 0"),
        (5, "expected a list of texts, a path.*got int"),
        ("some text", r"expected a path to .txt or .jsonl; got 'some text'; put a text into a list"),
        ("absent.txt", "cannot read absent.txt: .*No such file"),
    ],
)
def test_errors(data, message):
    with pytest.raises(DataError, match="calibration data.*" + message):
        windows(data, samples=5, tokenizer=ByteTokenizer())


def test_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="item 0: a text needs a tokenizer"):
        windows(["text"])
    with pytest.raises(DataError, match="None needs the model"):
        windows(None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected an object in JSON"),
        ('{"content": ""}', 'field "text", or "messages"; got the fields content'),
        ("[1]", "got list"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line)
    with pytest.raises(DataError, match=f"c.jsonl, line 3: .*{message}"):
        windows(path, tokenizer=ByteTokenizer())


def test_windows_of_text_begin_as_the_tokenizer_begins_a_text(tmp_path):
    text, tokenizer = "".join(TEXTS), ByteTokenizer(before=[130], behind=[129])
    ids = torch.tensor(list(text.encode()))
    expected = torch.cat((torch.full((3, 1), 130), ids[:45].view(3, 15)), 1)
    assert torch.equal(windows(TEXTS, tokenizer=tokenizer), expected)
    assert torch.equal(text_windows(text, tokenizer, 16, 3), expected)
    assert torch.equal(
        text_windows(text, tokenizer, 16, 2, skip=7), torch.cat((expected[:2, :1], ids[7:37].view(2, 15)), 1)
    )
    assert torch.equal(windows(TEXTS, tokenizer=tokenizer, bos="never"), ids[:48].view(3, 16))
    assert torch.equal(text_windows(text, tokenizer, 16, 3, bos="never"), ids[:48].view(3, 16))
    assert torch.equal(windows(IDS, tokenizer=tokenizer), IDS[:48].view(3, 16))  # token ids are taken as they are
    with pytest.raises(DataError, match="holds none but the 1 that begin a text"):
        text_windows(text, tokenizer, 1)


def test_self_written_text_begins_with_the_start_of_a_text():
    model = tiny_model("llama")
    found = windows(None, model=model, tokenizer=ByteTokenizer(before=[7, 9]))
    assert found.shape == (3, 16) and found[:, :2].tolist() == [[7, 9]] * 3
    assert len({tuple(row) for row in found.tolist()}) == 3  # written, each its own
    without = windows(None, model=model)
    assert torch.equal(windows(None, model=model, tokenizer=ByteTokenizer(before=[7]), bos="never"), without)
    assert torch.equal(windows(None, model=model, tokenizer=ByteTokenizer()), without)


def test_file_that_is_not_text(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"cannot read .*b.txt: .*expected a file of UTF-8 text"):
        windows(tmp_path / "b.txt", tokenizer=ByteTokenizer())


def test_text_windows(tmp_path):
    text = "evaluation text, long enough for a few windows.txt"
    ids = torch.tensor(list(text.encode()))
    assert torch.equal(text_windows(text + "\n", ByteTokenizer(), 10), ids[:50].view(5, 10))
    assert torch.equal(text_windows(ids, None, 10, 2, skip=25), ids[25:45].view(2, 10))
    (tmp_path / "e.txt").write_text(text)
    assert torch.equal(text_windows(str(tmp_path / "e.txt"), ByteTokenizer(), 25), ids.view(2, 25))
    with pytest.raises(DataError, match="evaluation data: only 5 tokens came, one window needs 10"):
        text_windows(ids, None, 10, skip=45)
    with pytest.raises(DataError, match="evaluation data: expected a text, a path or token ids; got None"):
        text_windows(None, None, 10)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_self_written_text_follows_the_model(family):
    """With logits a thousand times larger, sampling is the argmax: what the model says without a cache."""
    model = tiny_model(family)
    model.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 1000))
    ids = sample_windows(model, 5, 20, seed=1, batch_size=2)
    assert ids.shape == (5, 20) and len(ids[:, 0].unique()) > 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits.argmax(-1)[:, :-1], ids[:, 1:])


def test_self_written_text_has_the_models_probabilities():
    """Second tokens of 4000 windows that the model starts alike: frequencies within sampling error of its softmax."""
    model = tiny_model("llama", num_hidden_layers=1, vocab_size=7)
    ids = sample_windows(model, 4000, 2, seed=0, batch_size=1000)
    with torch.no_grad():
        expected = model(torch.arange(7)[:, None]).logits[:, 0].softmax(-1)
    for first in range(7):
        drawn = ids[ids[:, 0] == first, 1]
        error = torch.bincount(drawn, minlength=7) / len(drawn) - expected[first]
        assert error.abs().max() < 0.1  # five standard deviations of a frequency out of about 570 draws


def test_self_written_text_is_seeded_and_leaves_no_trace():
    model = tiny_model("llama").train()
    before, steps = torch.get_rng_state(), []
    options = {"samples": 40, "model": model, "progress": lambda *step: steps.append(step)}
    first, again, other = (windows(None, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (40, 16) and first.max() < VOCAB
    assert steps[0] == (2, 32) and steps[29] == (32, 32)  # two batches of 15 steps; the first token needs no step


def test_self_written_text_stops_at_nan():
    model = tiny_model("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(DataError, match="self-written calibration text: .*NaN or infinite at position 1"):
        windows(None, model=model)


def test_demo_text_parts_share_no_paragraph():
    parts = [{" ".join(p.split()) for p in text.split("\n\n")} for text in demo_text()]
    assert not parts[0] & parts[1]
    assert min(map(len, demo_text())) > 150_000  # characters; English has four to a token
    assert demo_text() == demo_text()


@pytest.mark.slow
def test_demo_text_is_long_enough_for_the_protocol():
    tokenizer = load_model(embedded_model_path()).tokenizer
    calibration, evaluation = demo_text()
    assert text_windows(calibration, tokenizer, 512, 64).shape == (64, 512)
    assert text_windows(evaluation, tokenizer, 2048, 20).shape == (20, 2048)
