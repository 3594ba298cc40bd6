"""How fast an exported directory is: prompts, tokens behind them, and where the time goes by operator."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from resq_compiler.backends.onnx.runtime import OnnxDecoder


@dataclass(frozen=True)
class Speed:
    """Rounds of one batch and prompt length; times in seconds.

    first: from the call to the first token, in each round.    rest: for the `new` tokens after it.
    """

    batch: int
    prompt: int
    new: int
    first: tuple[float, ...]
    rest: tuple[float, ...]

    def summary(self) -> dict[str, float | int]:
        """Tokens a second of all sequences together, by best round and by median."""
        read, written = self.batch * self.prompt, self.batch * self.new
        return {
            "batch": self.batch,
            "prompt": self.prompt,
            "prefill_best": read / min(self.first),
            "prefill_median": read / statistics.median(self.first),
            "decode_best": written / min(self.rest),
            "decode_median": written / statistics.median(self.rest),
            "first_token_seconds": statistics.median(self.first),
        }


def measure(decoder: OnnxDecoder, batch: int, prompt: int, new: int, rounds: int) -> Speed:
    """Greedy generation of 1 + new tokens behind prompts of random tokens, after a round that does not count."""
    ids = np.random.default_rng(0).integers(0, decoder.settings["vocab_size"], (batch, prompt))
    times = [_round(decoder, ids, new) for _ in range(rounds + 1)][1:]
    return Speed(batch, prompt, new, tuple(first for first, _ in times), tuple(rest for _, rest in times))


def _round(decoder: OnnxDecoder, ids: np.ndarray, new: int) -> tuple[float, float]:
    steps = decoder.stream(ids, max_new_tokens=new + 1, eos_token_id=[])
    began = time.perf_counter()
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return first - began, time.perf_counter() - first


def time_by_operator(directory: Path, threads: int | None, prompt: int, new: int) -> list[tuple[str, int, float]]:
    """(operator, calls, seconds) of one prompt and `new` tokens behind it, most time first, by ONNX Runtime's own profile."""
    with tempfile.TemporaryDirectory(prefix="resq-bench-") as folder:
        decoder = OnnxDecoder(directory, threads=threads, profile=Path(folder) / "profile")
        _round(decoder, np.random.default_rng(0).integers(0, decoder.settings["vocab_size"], (1, prompt)), new)
        events = json.loads(Path(decoder.session.end_profiling()).read_text())
    seconds, calls = Counter[str](), Counter[str]()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = event["args"]["op_name"]
            seconds[operator] += event["dur"]
            calls[operator] += 1
    return [(name, calls[name], micro / 1e6) for name, micro in seconds.most_common()]
