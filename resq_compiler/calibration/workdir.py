"""Work directories: a compile that was interrupted goes on where it stopped, with bit-identical results.

    fingerprint.json         which compile this is: passes, versions, hashes of the weights and of the calibration tokens
    statistics.safetensors   what passes asked for of the calibration run, when it has been taken
    block-0000.safetensors   weight codes, when the block is finished; its inputs are recomputed from the blocks before
    tensor-0000.bin          float weights of a large model's result, embeddings mostly
    batches.json             tokens of a batch, when there was no memory for more

Every file is written aside and then renamed: a name is there whole or not at all. It holds the hash of its tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from resq_compiler.analysis.overrides import TopologyOverrides
from resq_compiler.errors import CheckpointError, ConfigError
from resq_compiler.ir import graph_tools
from resq_compiler.ir.promises import Kept, Promised
from resq_compiler.numerics.weights import QuantizedWeight
from resq_compiler.util import processes

FINGERPRINT, BATCHES = "fingerprint.json", "batches.json"
LAYOUT = 3  # of these files


class WorkDirectory:
    """Named sets of tensors of one compile."""

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any], temporary: bool = False):
        """Open or make the directory. temporary: nobody goes on from it. Raises ConfigError: it belongs to another compile, or to
        something else."""
        self.path, self.temporary = Path(path).expanduser(), temporary
        known = self._read_fingerprint()
        if known is None:
            self._write(FINGERPRINT, lambda file: file.write_text(json.dumps(fingerprint, indent=1)))
        elif known != fingerprint:
            differ = sorted(k for k in {*known, *fingerprint} if known.get(k) != fingerprint.get(k))
            raise ConfigError(
                f"work_dir {path}: belongs to another compile, which differs in {', '.join(differ)}; "
                "give another directory, or delete this one"
            )

    def _read_fingerprint(self) -> dict[str, Any] | None:
        file = self.path / FINGERPRINT
        if not file.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
                raise ConfigError(f"work_dir {self.path}: holds something else; give a new or empty directory")
            return None
        try:
            return dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{file}: not readable ({error}); delete the work directory and start again"
            ) from error

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        aside = self.path / f".{name}.partial"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write(aside)
            os.replace(aside, self.path / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"work_dir {self.path}: {name} could not be written ({error})") from error
        finally:
            aside.unlink(missing_ok=True)

    def batch_tokens(self) -> int | None:
        """Tokens of a batch, if there was no memory for as many as usual. Raises CheckpointError: damaged."""
        file = self.path / BATCHES
        try:
            return int(json.loads(file.read_text())["tokens"]) if file.exists() else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{file}: not readable ({error}); delete this file") from error

    def use_batches(self, tokens: int) -> None:
        """Let the next compile here run batches of so many tokens."""
        self._write(BATCHES, lambda file: file.write_text(json.dumps({"tokens": tokens})))

    def save(self, name: str, tensors: Mapping[str, Tensor], notes: Iterable[str] = ()) -> None:
        """Keep tensors, and what was noted while they were made. Raises CheckpointError: cannot be written."""
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        about = {"notes": json.dumps(list(notes)), "sha256": tensors_hash(whole)}
        self._write(f"{name}.safetensors", lambda file: save_file(whole, file, about))

    def load(self, name: str) -> tuple[dict[str, Tensor], list[str]] | None:
        """What `save` kept under a name; None if it never did. Raises CheckpointError: damaged."""
        file = self.path / f"{name}.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
                about = opened.metadata()
            if about["sha256"] != tensors_hash(tensors):
                raise ValueError("its tensors are not those that were written")
            return tensors, [str(note) for note in json.loads(about["notes"])]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{file}: not readable ({error}); delete this file, and its work is done again"
            ) from error


def temporary(owner: object) -> WorkDirectory:
    """A work directory that nobody goes on from: it is removed with its owner."""
    path = tempfile.mkdtemp(prefix="resq-")
    weakref.finalize(owner, shutil.rmtree, path, ignore_errors=True)
    return WorkDirectory(path, {"temporary": True}, temporary=True)


def fingerprint(
    settings: Mapping[str, Any], weights: str, windows: Tensor | None, overrides: TopologyOverrides | None = None
) -> dict[str, Any]:
    """What must be equal for two compiles to share work; settings: passes, seed and versions, as plain values; weights: their digest."""
    return {
        "layout": LAYOUT,
        **settings,
        "topology": repr(overrides or TopologyOverrides()),
        "weights": weights,
        "calibration tokens": tensors_hash({} if windows is None else {"windows": windows}),
    }


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and values, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def shared_load(work: WorkDirectory | None, name: str) -> tuple[dict[str, Tensor], list[str]] | None:
    """What the first of the processes that share the work kept under a name: it alone has the work directory."""
    shared = processes.current()
    saved = None if work is None else work.load(name)
    tensors = shared.tensors_of_first(None if saved is None else saved[0])
    return None if tensors is None else (tensors, shared.agreed([] if saved is None else saved[1]))


def _block_name(block: int) -> str:
    return f"block-{block:04d}"


def block_codes(work: WorkDirectory | None, block: int) -> tuple[list[list[QuantizedWeight]], list[str]] | None:
    """The codes of a finished block, for each group of linears its parts, and what was noted. None where it is still to do."""
    saved = shared_load(work, _block_name(block))
    if saved is None:
        return None
    tensors, notes = saved
    groups: list[list[QuantizedWeight]] = []
    while f"{len(groups)}.0.qdata" in tensors:
        parts: list[QuantizedWeight] = []
        while (name := f"{len(groups)}.{len(parts)}") + ".qdata" in tensors:
            size = int(tensors[f"{name}.group_size"]) if f"{name}.group_size" in tensors else None
            parts.append(
                QuantizedWeight(tensors[f"{name}.qdata"], tensors[f"{name}.scale"], int(tensors[f"{name}.bits"]), size)
            )
        groups.append(parts)
    return groups, notes


def keep_block(
    work: WorkDirectory | None, block: int, groups: list[list[QuantizedWeight]], notes: list[str]
) -> None:  # fmt: skip
    """Keep the codes of a block that is finished, if there is a work directory."""
    if work is None:
        return
    tensors: dict[str, Tensor] = {}
    for i, parts in enumerate(groups):
        for j, part in enumerate(parts):
            name = f"{i}.{j}"
            tensors |= {
                f"{name}.qdata": part.qdata,
                f"{name}.scale": part.scale,
                f"{name}.bits": torch.tensor(part.bits),
            }
            if part.group_size is not None:
                tensors[f"{name}.group_size"] = torch.tensor(part.group_size)
    work.save(_block_name(block), tensors, notes)


def put_away(
    gm: GraphModule, work: WorkDirectory | None, block: int, groups: Sequence[Sequence[Sequence[str]]]
) -> None:
    """Let go of the codes of a block, if it is kept: they are read again when something computes with them.

    groups: names of the codes of each part, of each linear, of each group, as `keep_block` got them stacked.
    """
    file = None if work is None else work.path / f"{_block_name(block)}.safetensors"
    if file is None or not file.exists():
        return
    for i, linears in enumerate(groups):
        start = 0
        for parts in linears:
            for j, name in enumerate(parts):
                codes = graph_tools.tensor_named(gm, name)
                graph_tools.set_tensor(gm, name, Promised(Kept(file, f"{i}.{j}.qdata", codes, start)))
            start += codes.shape[-2]
