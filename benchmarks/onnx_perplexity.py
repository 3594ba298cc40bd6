"""Perplexity of ONNX exports beside the reference backend's, on the same windows of a text.

    python benchmarks/onnx_perplexity.py COMPILED_DIR TEXT [--profiles ort qdq weight-only] [--windows 8] [--length 512] [--skip 60000]

Integers are equal where a profile is exact, but float32 sums in another order move a value across a tie now and then, and 4 bits
amplify that: logits of single tokens differ, perplexity must not. KL and top-1 agreement are against the reference backend; the row
with noise is the reference backend itself after its embeddings were multiplied by 1 ± 2^-22, the yardstick for the others.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from resq_compiler.backends.onnx import export
from resq_compiler.backends.onnx import session as sessions

from resq_compiler import load
from resq_compiler.evaluation.predictions import evaluate
from resq_compiler.ir.graph_tools import get_tensor


def logits_of(session: Any) -> Callable[[torch.Tensor], Any]:
    """Token ids [B, S] to an object with logits, on an empty cache."""

    def run(ids: torch.Tensor) -> Any:
        batch, length = ids.shape
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((batch, length), np.int64),
                 "position_ids": np.arange(length)[None].repeat(batch, 0)}  # fmt: skip
        for entry in session.get_inputs()[3:]:
            feeds[entry.name] = np.zeros([batch, entry.shape[1], 0, entry.shape[3]], np.float32)
        return SimpleNamespace(logits=torch.from_numpy(session.run(["logits"], feeds)[0]))

    return run


def windows_of(arguments: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """Token ids [windows, length]; TEXT is a text file, or a .pt tensor of ids."""
    path = Path(arguments.text)
    ids = (
        torch.load(path, weights_only=True)
        if path.suffix == ".pt"
        else tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    )
    count = arguments.windows * arguments.length
    if len(ids) < arguments.skip + count:
        raise SystemExit(f"{path}: {len(ids)} tokens; --skip and the windows need {arguments.skip + count}")
    return ids[arguments.skip : arguments.skip + count].view(arguments.windows, arguments.length)


@contextmanager
def noisy_embedding(compiled: Any) -> Iterator[None]:
    """The embedding table times 1 ± 2^-22 at random while the context lasts."""
    node = next(n for n in compiled.graph_module.graph.nodes if n.target is torch.ops.aten.embedding.default)
    table = get_tensor(compiled.graph_module, node.args[0])
    kept = table.clone()
    signs = torch.randint(0, 2, table.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2 - 1
    with torch.no_grad():
        table.mul_(1 + signs * 2.0**-22)
        yield
        table.copy_(kept)


def expected_logits(compiled: Any, windows: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """The reference backend's logits, computed once for every window."""
    with torch.no_grad():
        made = {tuple(w.tolist()): compiled(w[None]).logits for w in windows}
    return lambda ids: SimpleNamespace(logits=torch.cat([made[tuple(w.tolist())] for w in ids]))


def show(name: str, got: Any, result: Any) -> None:
    """One row."""
    ratio = got.perplexity / result.perplexity
    print(f"{name:26s} perplexity {got.perplexity:8.4f} ({100 * (ratio - 1):+.2f} %)  KL {got.kl:.4f}  "
          f"same top-1 {100 * got.top1_agreement:.1f} %", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("compiled")
    parser.add_argument("text")
    parser.add_argument("--profiles", nargs="+", default=["ort", "qdq", "weight-only"])
    parser.add_argument("--embedding", default="float16")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--skip", type=int, default=60000)
    arguments = parser.parse_args()
    compiled = load(Path(arguments.compiled))
    windows = windows_of(arguments, compiled.tokenizer)
    expected = expected_logits(compiled, windows)
    result = evaluate(expected, windows)
    print(f"{'reference backend':26s} perplexity {result.perplexity:8.4f}   {windows.numel()} tokens", flush=True)
    with noisy_embedding(compiled):
        show("reference with noise", evaluate(compiled, windows, reference=expected), result)
    for profile in arguments.profiles:
        with tempfile.TemporaryDirectory(prefix="onnx-perplexity-") as directory:
            export.save_model(export.draft_model(compiled, profile, embedding=arguments.embedding), Path(directory))
            session = sessions.open_session(Path(directory) / export.MODEL_FILE)
            show(profile, evaluate(logits_of(session), windows, reference=expected), result)


if __name__ == "__main__":
    main()
