"""What each of the processes of tests/test_processes.py does; what it found goes into a file, as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from resq_compiler import api
from resq_compiler.errors import ConfigError
from resq_compiler.frontend.capture import Captured, capture
from resq_compiler.ir import graph_tools
from resq_compiler.tiny import tiny_model, tiny_tokens
from resq_compiler.util import processes

OPTIONS = {
    "recipe": "resq+", "calibration_samples": 3, "calibration_length": 24,
    "calibration_dtype": "float32",
}  # fmt: skip


def digest(compiled) -> str:
    """Of all tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(compiled.graph_module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def logits(model) -> list:
    """On a text that calibration has not seen."""
    with torch.no_grad():
        return model(tiny_tokens(1, 16, seed=5)).logits.tolist()


def refused(shared: processes.Processes) -> str:
    """What is said of processes that do different work."""
    try:
        processes.require_equal(shared, {"weights": "a", "calibration tokens": f"text {shared.rank}"})
    except ConfigError as error:
        return str(error)
    return "nothing"


def main(directory: Path, rank: int, size: int) -> None:
    """Compile together twice, the second time from a work directory that has all but one block; the capture is made once."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
    model, tokens, work = tiny_model("llama"), tiny_tokens(3, 24), directory / "work"
    first = capture(model)

    def captured(skeleton, weights):
        return Captured(graph_tools.snapshot(first.graph_module), first.cache, first.example_inputs)

    with mock.patch.object(api, "capture_promised", captured):
        alone = api.compile(model, tokens, work_dir=directory / "alone", **OPTIONS) if rank == 0 else None
        together = api.compile(model, tokens, process_group=dist.group.WORLD, work_dir=work, **OPTIONS)
        if rank == 0:
            (work / "block-0001.safetensors").unlink()
        again = api.compile(model, tokens, process_group=dist.group.WORLD, work_dir=work, **OPTIONS)
    found = {
        "digests": [digest(together), digest(again)],
        "logits": logits(together),
        "alone": None if alone is None else logits(alone),
        "float": logits(model),
        "notes": list(together.notes),
        "refused": refused(processes.Processes.of(dist.group.WORLD)),
    }
    (directory / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
