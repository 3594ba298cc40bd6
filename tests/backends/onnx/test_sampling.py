"""How next tokens are chosen: each rule alone, on logits written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from resq_compiler.backends.onnx.runtime import Chooser, OnnxDecoder, Sampling, penalized, text_pieces

from resq_compiler.errors import BackendError

PROBABILITIES = np.array([0.1, 0.5, 0.25, 0.15])
LOGITS = np.log(PROBABILITIES)[None].astype(np.float32)
SEEN = np.array([[0]])


def drawn(times: int = 4000, **settings) -> np.ndarray:
    """Share of each token among seeded draws."""
    choose = Chooser(Sampling(True, **settings))
    return np.bincount([int(choose(LOGITS, SEEN)[0]) for _ in range(times)], minlength=4) / times


def test_greedy_takes_the_likeliest_of_every_row():
    assert list(Chooser(Sampling())(np.array([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]]), np.array([[0], [0]]))) == [1, 0]


def test_plain_sampling_follows_the_probabilities():
    np.testing.assert_allclose(drawn(), PROBABILITIES, atol=0.03)  # four standard deviations of 4000 draws


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        expected = PROBABILITIES ** (1 / temperature)
        np.testing.assert_allclose(drawn(temperature=temperature), expected / expected.sum(), atol=0.03)
    assert drawn(50, temperature=1e-9)[1] == 1


def test_top_k_keeps_the_likeliest():
    np.testing.assert_allclose(drawn(top_k=2), [0, 2 / 3, 1 / 3, 0], atol=0.03)
    assert drawn(50, top_k=1)[1] == 1


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, [1]), (0.6, [1, 2]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    expected = np.zeros(4)
    expected[kept] = PROBABILITIES[kept]
    np.testing.assert_allclose(drawn(top_p=top_p), expected / expected.sum(), atol=0.03)


def test_top_p_counts_after_top_k_and_temperature():
    """Of the two kept by top_k, 2/3 and 1/3, the first alone reaches 0.6."""
    assert drawn(50, top_k=2, top_p=0.6)[1] == 1
    assert drawn(4000, top_k=2, top_p=0.6, temperature=2.0)[2] > 0.3  # flattened, the first alone does not


def test_same_seed_same_draws():
    first, second, other = (Chooser(Sampling(True, seed=s)) for s in (3, 3, 4))
    draws = [[int(c(LOGITS, SEEN)[0]) for _ in range(40)] for c in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]


def test_penalty_of_seen_tokens():
    logits, seen = np.array([[2.0, 1.9, -1.0, -2.0]]), np.array([[0, 2, 0]])
    np.testing.assert_allclose(penalized(logits, seen, 2.0), [[1.0, 1.9, -2.0, -2.0]])
    assert Chooser(Sampling(repetition_penalty=1.5))(logits, seen)[0] == 1 and logits[0, 0] == 2.0


class Letters:
    """Decodes token i to the i-th byte of a text."""

    def __init__(self, text: str):
        self.data = text.encode()

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return bytes(self.data[i] for i in ids).decode(errors="replace")


def test_text_comes_in_whole_characters():
    text = "aé€b"
    steps = [np.array([i]) for i in range(len(text.encode()))]
    assert list(text_pieces(Letters(text), steps)) == ["a", "é", "€", "b"]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [([5, 6], None, "at least one token, got shape"), ([[]], None, "at least one token"), ([[5, 6]], [[1]], "the shape of input_ids"),
     ([[5, 6]], [[1, 0]], "padding on the left")],
)  # fmt: skip
def test_inputs_are_checked(ids, mask, message):
    with pytest.raises(BackendError, match=message):
        OnnxDecoder._checked(ids, mask)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(BackendError, match="expected a directory written by export_onnx"):
        OnnxDecoder(tmp_path)
