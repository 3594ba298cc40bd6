"""One model in one process, driven by benchmarks/cpu_peers.py: JSON lines in, JSON lines out. Imports only what its kind needs.

    python benchmarks/cpu_peer.py KIND PATH THREADS [--all-logits]

KIND: ort (a directory with model.onnx: float32, or profile native with its library), genai, llama (a .gguf file), torch-float32,
torch-bfloat16, openvino (a directory with openvino_model.xml).
Commands: {"prefill": tokens, "batch": n} (with "keep": 0 all logits, where a peer gives those of the last token only),
{"decode": steps, "context": tokens, "batch": n}, {"measure": FILE, "reference": FILE}, {"store": FILE, "measure": FILE}, {"memory": true}.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOM = 5120  # tokens that a context may hold


class OrtPeer:
    """Plain ONNX Runtime. A native cache is one buffer for past and present; a float one is passed on, as its graph concatenates."""

    def __init__(self, path: Path, threads: int, all_logits: bool):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        library = next(path.glob("libresq_kernels.*"), None)
        if library is not None:
            options.register_custom_ops_library(str(library))
        self.make = onnxruntime.OrtValue.ortvalue_from_numpy
        self.session = onnxruntime.InferenceSession(str(path / "model.onnx"), options, ["CPUExecutionProvider"])
        self.native = library is not None
        self.entries = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self.vocabulary = self.session.get_outputs()[0].shape[2]
        self.version = f"ONNX Runtime {onnxruntime.__version__}"

    def start(self, batch: int) -> dict[str, Any]:
        if not self.native:
            return {e.name: self.make(np.zeros((batch, e.shape[1], 0, e.shape[3]), np.float32)) for e in self.entries}
        binding = self.session.io_binding()
        for entry in self.entries:
            value = self.make(np.empty((batch, entry.shape[1], ROOM, entry.shape[3]), np.uint8))
            binding.bind_ortvalue_input(entry.name, value)
            binding.bind_ortvalue_output(entry.name.replace("past_key_values", "present"), value)
        return {"binding": binding}

    def run(self, ids: np.ndarray, past: int, state: dict[str, Any], keep: int = 1) -> np.ndarray:
        batch, new = ids.shape
        values = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, past + new), np.int64),
            "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
        }
        given = {name: self.make(np.ascontiguousarray(value, np.int64)) for name, value in values.items()}
        return self._bound(given, state["binding"], batch, keep) if self.native else self._passed(given, state)

    def _bound(self, given: dict[str, Any], binding: Any, batch: int, keep: int) -> np.ndarray:
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_input("logits_to_keep", self.make(np.array([keep])))
        logits = np.empty((batch, 1, self.vocabulary), np.float32)
        if keep == 1:
            binding.bind_ortvalue_output("logits", self.make(logits))
        else:
            binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return logits if keep == 1 else self._array(binding.get_outputs()[-1])

    def _passed(self, given: dict[str, Any], state: dict[str, Any]) -> np.ndarray:
        names = [o.name for o in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run_with_ort_values(names, {**given, **state}), strict=True))
        logits = outputs.pop("logits")
        state.update({name.replace("present", "past_key_values"): value for name, value in outputs.items()})
        return self._array(logits)

    def _array(self, value: Any) -> np.ndarray:
        """Without a copy where this version of ONNX Runtime can."""
        return np.from_dlpack(value._ortvalue) if hasattr(value._ortvalue, "__dlpack__") else value.numpy()

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        return self.run(ids[None], 0, self.start(1), 0)[0]


class GenaiPeer:
    """A directory in onnxruntime-genai."""

    def __init__(self, path: Path, threads: int, all_logits: bool):
        import onnxruntime_genai as genai

        self.genai, self.model = genai, genai.Model(str(path))
        self.version = f"onnxruntime-genai {genai.__version__}"

    def start(self, batch: int) -> dict[str, Any]:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=ROOM, batch_size=batch, do_sample=False, min_length=ROOM)
        return {"generator": self.genai.Generator(self.model, parameters)}

    def run(self, ids: np.ndarray, past: int, state: dict[str, Any], keep: int = 1) -> None:
        if past and ids.shape[1] == 1:
            state["generator"].generate_next_token()
        else:
            state["generator"].append_tokens(ids.astype(np.int32))

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        generator = self.start(1)["generator"]
        generator.append_tokens(ids[None].astype(np.int32))
        return np.array(generator.get_output("logits"))[0]


class LlamaPeer:
    """A .gguf file in llama.cpp."""

    def __init__(self, path: Path, threads: int, all_logits: bool):
        import llama_cpp

        self.llama = llama_cpp.Llama(
            str(path), n_ctx=ROOM, n_batch=512, n_threads=threads, n_threads_batch=threads, logits_all=all_logits, verbose=False
        )  # fmt: skip
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def start(self, batch: int) -> dict[str, Any]:
        if batch > 1:
            raise ValueError("one sequence at a time")
        self.llama.reset()
        return {}

    def run(self, ids: np.ndarray, past: int, state: dict[str, Any], keep: int = 1) -> None:
        self.llama.eval(ids[0].tolist())

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        self.start(1)
        self.llama.eval(ids.tolist())
        return np.array(self.llama.scores[: len(ids)], np.float32)


class TorchPeer:
    """The float model in PyTorch, as transformers runs it."""

    def __init__(self, path: Path, threads: int, all_logits: bool, dtype: str = "float32"):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.version = f"PyTorch {torch.__version__}"

    def start(self, batch: int) -> dict[str, Any]:
        return {"past_key_values": None}

    def run(self, ids: np.ndarray, past: int, state: dict[str, Any], keep: int = 1) -> np.ndarray:
        with self.torch.no_grad():
            output = self.model(self.torch.from_numpy(ids), use_cache=True, logits_to_keep=keep, **state)
        state["past_key_values"] = output.past_key_values
        return output.logits.float().numpy()

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        return self.run(ids[None], 0, self.start(1), 0)[0]


class OpenVinoPeer:
    """An OpenVINO model with its cache as state."""

    def __init__(self, path: Path, threads: int, all_logits: bool):
        import openvino

        self.openvino = openvino
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        compiled = openvino.Core().compile_model(str(path / "openvino_model.xml"), "CPU", options)
        self.request = compiled.create_infer_request()
        self.version = f"OpenVINO {openvino.__version__.split('-')[0]}"

    def start(self, batch: int) -> dict[str, Any]:
        self.request.reset_state()
        for variable in self.request.query_state():  # an empty state has no sequences
            shape = list(variable.state.shape)
            variable.state = self.openvino.Tensor(np.zeros([batch, shape[1], 0, shape[3]], np.float32))
        return {}

    def run(self, ids: np.ndarray, past: int, state: dict[str, Any], keep: int = 1) -> np.ndarray:
        batch, new = ids.shape
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, past + new), np.int64),
            "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
        }
        self.request.infer(given, share_inputs=True)
        return self.request.get_tensor("logits").data

    def all_logits(self, ids: np.ndarray) -> np.ndarray:
        return np.array(self.run(ids[None], 0, self.start(1))[0])


def open_peer(kind: str, path: Path, threads: int, all_logits: bool) -> Any:
    if kind.startswith("torch-"):
        return TorchPeer(path, threads, all_logits, kind.removeprefix("torch-"))
    kinds = {"ort": OrtPeer, "genai": GenaiPeer, "llama": LlamaPeer, "openvino": OpenVinoPeer}
    return kinds[kind](path, threads, all_logits)


class Worker:
    """Runs commands on a peer. A context that decodes is kept, and grows from round to round."""

    def __init__(self, peer: Any, vocabulary: int):
        self.peer, self.vocabulary = peer, vocabulary
        self.contexts: dict[tuple[int, int], list[Any]] = {}
        self.newest: tuple[int, int] | None = None

    def prompt(self, batch: int, length: int) -> np.ndarray:
        return np.random.default_rng(0).integers(0, self.vocabulary, (batch, length)).astype(np.int64)

    def prefill(self, length: int, batch: int, keep: int = 1) -> dict[str, float]:
        ids, state = self.prompt(batch, length), self.peer.start(batch)
        began = time.perf_counter()
        self.peer.run(ids, 0, state, keep)
        self.newest = None
        return {"seconds": time.perf_counter() - began}

    def decode(self, steps: int, context: int, batch: int) -> dict[str, float]:
        ids, key = self.prompt(batch, 1), (batch, context)
        one_at_a_time = not isinstance(self.peer, OrtPeer | TorchPeer)
        if key not in self.contexts or (one_at_a_time and self.newest != key):
            state = self.peer.start(batch)
            self.peer.run(self.prompt(batch, context), 0, state)
            self.contexts[key] = [context, state]
        self.newest, (length, state) = key, self.contexts[key]
        for i in range(2):
            self.peer.run(ids, length + i, state)
        began = time.perf_counter()
        for i in range(2, 2 + steps):
            self.peer.run(ids, length + i, state)
        seconds = time.perf_counter() - began
        self.contexts[key][0] = length + 2 + steps
        return {"seconds": seconds}

    def accuracy(self, windows: Path, reference: Path | None, store: Path | None) -> dict[str, float]:
        """Sums over the predicted tokens of windows [n, L]: negative log-likelihood, KL(reference || this) and equal top-1.

        Without a reference this is it."""
        ids = np.load(windows)
        shape = (len(ids), ids.shape[1] - 1, self.vocabulary)
        theirs = np.load(reference, mmap_mode="r") if reference else None
        ours = np.lib.format.open_memmap(store, "w+", np.float32, shape) if store else None
        sums = {"nll": 0.0, "kl": 0.0, "same": 0.0, "tokens": 0.0}
        for n, window in enumerate(ids):
            logits = np.asarray(self.peer.all_logits(window)[:-1, : self.vocabulary])
            for start in range(0, len(logits), 128):
                log_p = log_softmax(logits[start : start + 128].astype(np.float32))
                target = window[start + 1 : start + 1 + len(log_p)]
                sums["nll"] -= float(log_p[np.arange(len(log_p)), target].sum(dtype=np.float64))
                sums["tokens"] += len(log_p)
                if ours is not None:
                    ours[n, start : start + len(log_p)] = log_p
                log_q = log_p if theirs is None else theirs[n, start : start + len(log_p)]
                sums["kl"] += float((np.exp(log_q) * (log_q - log_p)).sum(dtype=np.float64))
                sums["same"] += float((log_q.argmax(-1) == log_p.argmax(-1)).sum())
        count = sums["tokens"]
        return {"perplexity": math.exp(sums["nll"] / count), "kl": sums["kl"] / count, "top1": sums["same"] / count}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if "prefill" in command:
            return self.prefill(command["prefill"], command["batch"], command.get("keep", 1))
        if "decode" in command:
            return self.decode(command["decode"], command["context"], command["batch"])
        if "measure" in command:
            paths = [Path(command[name]) if command.get(name) else None for name in ("reference", "store")]
            return self.accuracy(Path(command["measure"]), *paths)
        return {"resident": resident()}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def resident() -> dict[str, int]:
    """Bytes of this process: memory of its own, and with the pages of files that it maps."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    return {"own": own, "mapped": mapped}


def main() -> None:
    kind, path, threads, vocabulary = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # libraries may print
    began = time.perf_counter()
    worker = Worker(open_peer(kind, path, threads, "--all-logits" in sys.argv), vocabulary)
    print(
        json.dumps({"version": worker.peer.version, "load_seconds": time.perf_counter() - began}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
