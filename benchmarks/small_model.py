"""A small trained model of another family, for benchmarks that need one where no model hub is at hand.

    python benchmarks/small_model.py --family opt --output out/small-opt

Trains a decoder of the family (6 layers, width 128) and a byte-pair tokenizer of 1024 tokens on the English that Python
brings along: the language reference and the docstrings of the standard library. Writes a Hugging Face directory, with
text.txt beside it whose last tenth was not trained on. Same Python, seed and machine: same model.
"""

from __future__ import annotations

import argparse
import ast
import math
import sys
import sysconfig
from pathlib import Path

import torch

LENGTH, BATCH = 256, 8
HELD_OUT = 0.1  # of the tokens, at the end
SIZES = {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 2048}
FAMILIES = {
    "opt": {**SIZES, "ffn_dim": 512, "word_embed_proj_dim": 128, "dropout": 0.0},
    "qwen3": {**SIZES, "intermediate_size": 384, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gpt_neox": {**SIZES, "intermediate_size": 512, "rotary_pct": 0.5},
    "mixtral": {
        **SIZES, "intermediate_size": 256, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2,
        "sliding_window": None, "output_router_logits": True, "router_aux_loss_coef": 0.02,
    },
}  # fmt: skip


def main() -> None:
    """Write text and tokenizer, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="opt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    text = english()
    tokenizer = make_tokenizer(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "text.txt").write_text(text, encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    held_out = int(len(ids) * (1 - HELD_OUT))
    model = train(arguments.family, ids[:held_out], arguments.steps, arguments.seed)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    sys.stdout.write(
        f"{len(ids)} tokens, the first {held_out} trained on; held-out perplexity {perplexity(model, ids[held_out:]):.3f}\n"
    )


def english() -> str:
    """The language reference, then the docstrings of the standard library, in a fixed order."""
    from pydoc_data.topics import topics

    pieces = [topics[name] for name in sorted(topics)]
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(file.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        pieces += [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]
    mixed = [piece for start in range(10) for piece in pieces[start::10]]  # so that the held-out tenth has all kinds
    return "\n\n".join(mixed)


def make_tokenizer(text: str):
    """A byte-pair tokenizer of 1024 tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(text.split("\n\n"), vocab_size=1024, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>")


def train(family: str, ids: torch.Tensor, steps: int, seed: int):
    """AdamW with warm-up and cosine decay on random windows."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    tokens = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.random.default_generator.set_state(generator.get_state())
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**FAMILIES[family], **tokens)).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * i / steps)))
    )
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            sys.stderr.write(f"step {step}/{steps}: loss {loss.item():.3f}\n")
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # the loss that spreads tokens over experts is for training alone
    return model.eval()


@torch.no_grad()
def perplexity(model, ids: torch.Tensor) -> float:
    """Over the windows of held-out tokens."""
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
