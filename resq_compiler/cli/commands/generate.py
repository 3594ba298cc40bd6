"""resq generate: continue a prompt, word by word on stdout."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from resq_compiler.cli.commands import common
from resq_compiler.errors import ConfigError, DataError

NO_TOKENIZER = "has no tokenizer, so a prompt cannot be read; save one into the directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `resq generate`."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a compiled model, a directory of `resq export` (ONNX Runtime runs it), or a float one: {common.MODEL_HELP}",
    )
    parser.add_argument("-p", "--prompt", required=True, help="text to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--system", help="system message, with --chat")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest share (default: 1)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the likeliest K; 0 (default): all"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="(default: 1, none)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    common.add_backend_argument(parser)
    common.add_device_argument(parser, "where the model lies and runs")


def run(arguments: argparse.Namespace) -> int:
    """Generate; with --json nothing is printed before the end."""
    _check(arguments)
    if common.is_exported_directory(arguments.model):
        text, count, seconds = _generate_exported(arguments)
    else:
        text, count, seconds = _generate_model(arguments)
    result = {"prompt": arguments.prompt, "text": text, "new_tokens": count, "seconds": seconds}
    if arguments.json:
        common.show(arguments, result, "")
    elif not arguments.quiet:
        sys.stderr.write(f"{count} tokens in {seconds:.1f} s: {count / seconds:.1f} tokens/s, prefill included\n")
    return 0


def _generate_model(arguments: argparse.Namespace) -> tuple[str, int, float]:
    """Text, number of new tokens and seconds, by transformers' own search over the model's backend."""
    from resq_compiler.frontend.positions import longest_text

    opened = common.open_model(arguments.model, arguments.backend, arguments.device)
    if opened.tokenizer is None:
        raise DataError(f"{opened.name}: {NO_TOKENIZER}")
    inputs = _inputs(opened.tokenizer, arguments)
    _check_length(inputs, longest_text(opened.model), arguments)
    ids, seconds = _generate(opened, inputs, arguments)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return opened.tokenizer.decode(new, skip_special_tokens=True), len(new), seconds


def _generate_exported(arguments: argparse.Namespace) -> tuple[str, int, float]:
    """The same by the small ONNX runtime: no PyTorch model is loaded."""
    from resq_compiler.backends.onnx.runtime import OnnxDecoder, Sampling, text_pieces

    common.check_exported(arguments.model, arguments.backend, arguments.device)
    common.quiet_libraries()
    decoder = OnnxDecoder(Path(arguments.model).expanduser())
    tokenizer = decoder.tokenizer
    sampling = Sampling(
        arguments.temperature > 0, arguments.temperature or 1.0, arguments.top_k, arguments.top_p, arguments.seed,
        arguments.repetition_penalty,
    )  # fmt: skip
    inputs = _inputs(tokenizer, arguments)
    _check_length(inputs, decoder.longest_text, arguments)
    began, tokens = time.perf_counter(), []  # type: float, list[int]
    steps = decoder.stream(inputs["input_ids"].numpy(), max_new_tokens=arguments.max_new_tokens, sampling=sampling)
    for piece in text_pieces(tokenizer, _noted(steps, tokens)):
        if not arguments.json:
            print(piece, end="", flush=True)
    if not arguments.json:
        print()
    return tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), time.perf_counter() - began


def _noted(steps: Iterable[Any], tokens: list[int]) -> Iterator[Any]:
    """The same steps; their first tokens are added to the list."""
    for step in steps:
        tokens.append(int(step[0]))
        yield step


def _check(arguments: argparse.Namespace) -> None:
    if arguments.system and not arguments.chat:
        raise ConfigError("resq generate: --system needs --chat")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1 or arguments.top_k < 0 or arguments.max_new_tokens < 1:
        raise ConfigError(
            "resq generate: expected --temperature of at least 0, --top-p above 0 and at most 1, --top-k of at least 0, "
            f"--max-new-tokens of at least 1; got {arguments.temperature}, {arguments.top_p}, {arguments.top_k}, "
            f"{arguments.max_new_tokens}"
        )
    if arguments.temperature == 0 and (arguments.top_p < 1 or arguments.top_k or arguments.seed):
        raise ConfigError(
            "resq generate: --top-p, --top-k and --seed are about sampling, and temperature 0 takes the likeliest token; "
            "add --temperature, such as 0.8, or leave them out"
        )


def _check_length(inputs: Any, longest: int | None, arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a text that outgrows the positions a model has learned."""
    prompt = inputs["input_ids"].shape[1]
    if longest is not None and prompt + arguments.max_new_tokens > longest:
        raise ConfigError(
            f"resq generate: {prompt} tokens of prompt and {arguments.max_new_tokens} new ones, but the model has learned {longest} "
            f"positions; shorten the prompt, or give --max-new-tokens of at most {max(longest - prompt, 0)}"
        )


def _inputs(tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if arguments.chat:
        if not tokenizer.chat_template:
            raise DataError("--chat: this model's tokenizer has no chat template; leave --chat out")
        messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
        messages.append({"role": "user", "content": prompt})
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("resq generate: the prompt is empty; give a text of at least one token")
    return inputs


def _generate(opened: common.OpenModel, inputs: Any, arguments: argparse.Namespace) -> tuple[Any, float]:
    import torch
    from transformers import TextStreamer

    sampling = arguments.temperature > 0
    options: dict[str, Any] = {"do_sample": sampling, "repetition_penalty": arguments.repetition_penalty}
    unused: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}  # else transformers warns about them
    chosen = {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
    options |= chosen if sampling else unused
    streamer = None if arguments.json else TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):  # transformers samples from the global generator
        torch.default_generator.manual_seed(arguments.seed)
        ids = opened.model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], streamer=streamer,
            max_new_tokens=arguments.max_new_tokens, pad_token_id=_pad(opened), **options,
        )  # fmt: skip
    return ids, time.perf_counter() - began


def _pad(opened: common.OpenModel) -> int:
    tokenizer = opened.tokenizer
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if found is None else found
