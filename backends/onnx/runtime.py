"""Generate with an exported directory: ONNX Runtime, numpy and the directory's own settings; no PyTorch model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from resq_compiler.backends.onnx import session as ort
from resq_compiler.backends.onnx.export import LONGEST_KEY, LONGEST_ROW_KEY, MODEL_FILE
from resq_compiler.backends.onnx.kept_logits import KEEP
from resq_compiler.backends.onnx.profiles import NATIVE_PREFILL_CHUNK, PREFILL_CHUNK
from resq_compiler.backends.onnx.shared_buffers import BoundSession, GrowingCache

from resq_compiler.errors import BackendError
from resq_compiler.frontend.long_rope import short_length


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. do_sample False: the likeliest one; temperature, top_k and top_p apply otherwise.

    repetition_penalty: above 1, logits of tokens that were seen are divided by it where positive, multiplied where negative.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0


class OnnxDecoder:
    """An exported decoder. Load with `OnnxDecoder(directory)`; `generate` for token ids, `stream` for one token at a time."""

    def __init__(
        self, directory: str | Path, *, threads: int | None = None, session_options: dict[str, str] | None = None,
        profile: Path | None = None,
    ):  # fmt: skip
        """threads: of one operator; default, torch's setting. profile: as open_session.

        Raises BackendError: no model there, or onnxruntime cannot load it.
        """
        self.directory = Path(directory)
        path = self.directory / MODEL_FILE
        if not path.is_file():
            raise BackendError(f"{path} does not exist; expected a directory written by export_onnx")
        self.session = ort.open_session(path, threads=threads, extra_options=session_options, profile=profile)
        self.past_inputs = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.settings = self._settings()
        self._bound = BoundSession(self.session) if ort.is_native(self.session) else None
        self.short_length = short_length(self.settings)
        self.longest_text, self.longest_row = (self._limit(key) for key in (LONGEST_KEY, LONGEST_ROW_KEY))

    def _limit(self, key: str) -> int | None:
        """A number of positions in the metadata of the model, if there is one."""
        found = ort.session_metadata(self.session).get(key)
        if found is not None and not (found.isdecimal() and found.isascii()):
            raise BackendError(
                f"{key} in the metadata of the model: expected a number, got {found[:80]!r}; export the model again"
            )
        return None if found is None else int(found)

    def _settings(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            path = self.directory / name
            if path.is_file():
                found = read_settings(path)
                of_text = found.get("text_config")  # of a model that sees or hears too
                for part in (of_text if isinstance(of_text, dict) else {}, found):
                    merged.update({k: v for k, v in part.items() if v is not None})
        for name in ("eos_token_id", "pad_token_id"):
            value = merged.get(name, 0)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if not all(type(token) is int and abs(token) < 2**31 for token in ids):
                raise BackendError(
                    f"{self.directory}: {name}: expected a token id; got {value!r}; export the model again"
                )
        return merged

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the directory. Raises BackendError when it has none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.directory)
        except Exception as error:  # transformers raises what its many readers raise
            raise BackendError(
                f"{self.directory}: no tokenizer can be read there; export with tokenizer=, or pass token ids"
            ) from error

    def empty_past(self, batch: int) -> dict[str, Any]:
        """Cache inputs for a batch that has seen no token."""
        import onnxruntime

        dtypes = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
        values = {}
        for entry in self.past_inputs:
            shape = [batch, entry.shape[1], 0, entry.shape[3]]
            values[entry.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtypes[entry.type]))
        return values

    def forward(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Logits [B, S, vocabulary] (an OrtValue) and the cache with the new tokens, ready to be the next past."""
        import onnxruntime

        values = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if any(i.name == KEEP for i in self.session.get_overridable_initializers()):
            values[KEEP] = np.zeros(1, np.int64)
        inputs = {
            k: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v, np.int64)) for k, v in values.items()
        }
        outputs = ort.run(self.session, {**inputs, **past})
        return outputs.pop("logits"), {k.replace("present.", "past_key_values."): v for k, v in outputs.items()}

    def stream(
        self, input_ids: Sequence[Sequence[int]] | np.ndarray, attention_mask: np.ndarray | None = None, *, max_new_tokens: int = 64,
        sampling: Sampling | None = None, eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """Yield the next tokens [B] one step at a time until every row has ended or max_new_tokens is reached.

        input_ids [B, S], padded on the left where attention_mask is 0. A row that has ended yields the pad token.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        ends = self._ends(eos_token_id)
        pad, last = self._pad(ends), set(ends.tolist())
        choose = Chooser(sampling or Sampling())
        cache = self._new_cache(len(ids))
        logits = self._prefill(cache, ids, mask)
        done = [False] * len(ids)
        seen, positions = ids, mask.sum(1, keepdims=True) - 1
        for step in range(1, max_new_tokens + 1):
            tokens = choose(logits, seen)
            if any(done):
                tokens[done] = pad
            yield tokens
            seen = np.concatenate([seen, tokens[:, None]], 1)
            done = [is_done or token in last for is_done, token in zip(done, tokens.tolist(), strict=True)]
            if all(done) or step == max_new_tokens:
                return
            mask, positions = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1), positions + 1
            if mask.shape[1] - 1 == self.short_length:
                cache = self._new_cache(len(ids))  # its keys would be those of the short factors
                logits = self._prefill(cache, seen, mask)
                continue
            logits = self._step(cache, tokens[:, None], mask, positions)

    def generate(
        self, input_ids: Sequence[Sequence[int]] | np.ndarray, attention_mask: np.ndarray | None = None, *,
        streamer: Callable[[np.ndarray], None] | None = None, **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """Prompt and continuation, int64 [B, S + new]; options as `stream`. streamer is called with the tokens [B] of each step."""
        ids, mask = self._checked(input_ids, attention_mask)
        pieces = [ids]
        for tokens in self.stream(ids, mask, **options):
            pieces.append(tokens[:, None])
            if streamer is not None:
                streamer(tokens)
        return np.concatenate(pieces, 1)

    def generate_text(self, prompt: str, *, chat: bool = False, **options: Any) -> Iterator[str]:
        """Yield the text that follows a prompt, piece by piece. chat: put the prompt into the tokenizer's chat template."""
        tokenizer = self.tokenizer
        if chat:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        yield from text_pieces(tokenizer, self.stream([ids], **options))

    def _prefill(self, cache: GrowingCache | PassedCache, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits [B, vocabulary] of the last token of a prompt."""
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        length = ids.shape[1]
        whole = self.short_length is not None and length > self.short_length  # the last position decides for all
        usual = PREFILL_CHUNK if self._bound is None else NATIVE_PREFILL_CHUNK
        chunk = length if whole else usual
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            logits = self._step(cache, ids[:, start:stop], mask[:, :stop], positions[:, start:stop])
        return logits

    def _step(
        self, cache: GrowingCache | PassedCache, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Append the tokens ids [B, S]; logits of the last one, [B, vocabulary]. Raises BackendError: past the learned positions."""
        if self.longest_text is not None and positions.max() >= self.longest_text:
            raise BackendError(
                f"{self.directory}: position {positions.max()}: this model has learned {self.longest_text} positions; prompt and new "
                "tokens together may be no more"
            )
        if self.longest_row is not None and mask.shape[1] > self.longest_row:
            raise BackendError(
                f"{self.directory}: a row of {mask.shape[1]} tokens, padding among them: this model has biases for {self.longest_row}"
            )
        return cache.step(ids, mask, positions)

    def _new_cache(self, batch: int) -> GrowingCache | PassedCache:
        return PassedCache(self, batch) if self._bound is None else GrowingCache(self._bound, batch)

    @staticmethod
    def _checked(input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        ids = np.asarray(input_ids, np.int64)
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise BackendError(f"input_ids: expected [batch, tokens] with at least one token, got shape {ids.shape}")
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
        if mask.shape != ids.shape or not mask[:, -1].all():
            raise BackendError(
                "attention_mask: expected the shape of input_ids and padding on the left (last column all 1)"
            )
        return ids, mask

    def _ends(self, given: int | Sequence[int] | None) -> np.ndarray:
        value = self.settings.get("eos_token_id", []) if given is None else given
        ends = np.atleast_1d(np.asarray(value, np.int64))
        return ends[ends >= 0]  # some models say -1 for a token they have not

    def _pad(self, ends: np.ndarray) -> int:
        pad = self.settings.get("pad_token_id", -1)
        return int(pad) if pad >= 0 else int(ends[0]) if ends.size else 0


class PassedCache:
    """The cache of one batch while it generates: a step's outputs are the next one's inputs."""

    def __init__(self, decoder: OnnxDecoder, batch: int):
        self.decoder, self.past = decoder, decoder.empty_past(batch)

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Append the tokens ids [B, S]; logits of the last one, [B, vocabulary]."""
        logits, self.past = self.decoder.forward(ids, mask, positions, self.past)
        return last_row(logits)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object of an exported directory. Raises BackendError: unreadable, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackendError(f"{path}: not readable as JSON ({error}); it is damaged: export the model again") from error
    if not isinstance(found, dict):
        raise BackendError(f"{path}: expected a JSON object, got {type(found).__name__}; export the model again")
    return found


def text_pieces(tokenizer: Any, steps: Iterable[np.ndarray]) -> Iterator[str]:
    """The text of the first row of every step, as soon as its characters are complete."""
    seen: list[int] = []
    shown = ""
    for tokens in steps:
        seen.append(int(tokens[0]))
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character whose bytes are not complete yet
            yield text[len(shown) :]
            shown = text


def last_row(logits: Any) -> np.ndarray:
    """Logits of the last token, [B, vocabulary], without copying the others."""
    return ort.to_torch(logits)[:, -1].numpy()


class Chooser:
    """Chooses next tokens from logits [B, vocabulary] and the tokens so far [B, T], by greedy search or seeded sampling."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
        if self.sampling.repetition_penalty != 1.0:
            logits = penalized(logits, seen, self.sampling.repetition_penalty)
        if not self.sampling.do_sample:
            return logits.argmax(-1)
        return np.array([self._sample(row.astype(np.float64)) for row in logits])

    def _sample(self, row: np.ndarray) -> int:
        settings = self.sampling
        order = np.argsort(-row, kind="stable")
        if settings.top_k:
            order = order[: settings.top_k]
        scores = row[order] / max(settings.temperature, 1e-6)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        kept = np.searchsorted(weights.cumsum(), min(settings.top_p, 1.0)) + 1
        weights = weights[:kept] / weights[:kept].sum()
        return int(self.random.choice(order[:kept], p=weights))


def penalized(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Logits with those of seen tokens made smaller."""
    chosen = np.take_along_axis(logits, seen, 1)
    result = logits.copy()
    np.put_along_axis(result, seen, np.where(chosen > 0, chosen / penalty, chosen * penalty), 1)
    return result
