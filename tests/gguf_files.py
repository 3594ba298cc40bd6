"""GGUF files of small random models."""

from __future__ import annotations

from pathlib import Path

import torch


def small_llama(path: Path, factors: dict[str, list[float]] | None = None, **keys: str | float) -> Path:
    """Write a llama of one block and 16 tokens. factors: more tensors. keys: more keys, with two underscores for a dot."""
    import gguf

    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {"token_embd": (16, 16), "output": (16, 16)}
    sizes |= {"blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16), "blk.0.ffn_down": (16, 32)}
    sizes |= {f"blk.0.attn_{kind}": (16, 16) for kind in ("q", "k", "v", "output")}
    sizes |= {name: (16,) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64), writer.add_embedding_length(16), writer.add_block_count(1)
    writer.add_feed_forward_length(32), writer.add_head_count(2), writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(10000.0), writer.add_vocab_size(16)
    for name, value in keys.items():
        key = name.replace("__", ".")
        writer.add_string(key, value) if isinstance(value, str) else writer.add_float32(key, value)
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(size, generator=generator).numpy())
    for name, values in (factors or {}).items():
        writer.add_tensor(name, torch.tensor(values).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path
