"""Generate with a compiled model as with any transformers model: several prompts at once, greedy and sampled.

python examples/generate.py COMPILED_DIRECTORY "The capital of France is" "Water boils at"
"""

from __future__ import annotations

import argparse

import resq_compiler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("compiled")
    parser.add_argument("prompts", nargs="*", default=["The capital of France is", "Water boils at"])
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    model = resq_compiler.load(arguments.compiled)
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"  # prompts of several lengths end at the same position
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(arguments.prompts, return_tensors="pt", padding=True)

    for name, options in (("greedy", {"do_sample": False}), ("sampled", {"do_sample": True, "temperature": 0.8})):
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=arguments.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            print(f"[{name}] {text}")


if __name__ == "__main__":
    main()
