"""Statistics of a calibration run taken in parts, by processes that never meet: each writes a file, and a compile adds them up.

    statistics-0003-of-0016.safetensors     sums over the windows 3, 19, 35, ... of those that statistics are taken of
    statistics-0003-of-0016.json            what must be equal for parts to be added, and to be used by a compile

A sum over all parts is the one of a single run but for the order of additions: to 1e-6 of its largest entry with float32 products, to
1e-3 with products in bfloat16. Parts are added in the order of their numbers, so equal files give equal sums.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from resq_compiler.calibration.statistics import Request, by_name, states_of
from resq_compiler.calibration.workdir import tensors_hash
from resq_compiler.errors import CheckpointError, ConfigError

FORM = re.compile(r"(\d+)/(\d+)")
FILE = re.compile(r"statistics-(\d{4,})-of-(\d{4,})\.json")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "3/16". Raises ConfigError."""
        match = FORM.fullmatch(text.strip())
        if match is None or not int(match[1]) < int(match[2]):
            raise ConfigError(f"shard: expected I/N with I from 0 to N - 1, such as 0/4; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def stem(self) -> str:
        """Of its files."""
        return f"statistics-{self.index:04d}-of-{self.count:04d}"

    def of(self, windows: Tensor) -> Tensor:
        """Its windows [m, length] of all [n, length]. Raises ConfigError: it has none."""
        if self.count > len(windows):
            raise ConfigError(
                f"shard {self}: statistics are taken of {len(windows)} windows, so there are at most as many shards; ask for more "
                "(basis_samples, calibration_samples) or for fewer shards"
            )
        return windows[self.index :: self.count]


def write(directory: Path, shard: Shard, requests: Iterable[Request], about: Mapping[str, Any]) -> Path:
    """Write finished statistics; about: what must be equal for parts to be added. Returns the JSON file, which is written last."""
    tensors, final = states_of(requests), directory / f"{shard.stem}.json"
    aside = [directory / f".{shard.stem}.{kind}.partial" for kind in ("safetensors", "json")]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside[0])
        described = {"shard": [shard.index, shard.count], "sha256": tensors_hash(tensors), **about}
        aside[1].write_text(json.dumps(described, indent=1) + "\n")
        os.replace(aside[0], final.with_suffix(".safetensors"))
        os.replace(aside[1], final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"statistics {directory}: could not be written ({error})") from error
    finally:
        for file in aside:
            file.unlink(missing_ok=True)
    return final


@dataclass(frozen=True)
class SavedStatistics:
    """The parts of one calibration run, all of them, in order; hashes: of their tensors; about: what they have in common."""

    files: tuple[Path, ...]
    hashes: tuple[str, ...]
    about: Mapping[str, Any]

    @classmethod
    def open(cls, directories: Sequence[str | Path]) -> SavedStatistics:
        """All parts in some directories.

        Raises CheckpointError: none there, not readable. ConfigError: a part is missing or there twice, or parts are of different runs.
        """
        found: dict[Shard, tuple[Path, dict[str, Any]]] = {}
        hashes: dict[Path, str] = {}
        for file in (f for d in directories for f in sorted(Path(d).expanduser().glob("statistics-*-of-*.json"))):
            about = _read_json(file)
            shard, hashes[file] = Shard(*about.pop("shard")), about.pop("sha256")
            if shard in found:
                raise ConfigError(f"statistics: part {shard} is in {found[shard][0]} and in {file}; give one of them")
            found[shard] = file, about
        if not found:
            raise CheckpointError(
                f"statistics: no file statistics-I-of-N.json in {', '.join(map(str, directories))}; resq calibrate writes them"
            )
        first, about = next(iter(found.values()))
        for file, other in found.values():
            _require_equal(about, other, f"statistics {file} and {first.name} are of different runs")
        files = _in_order(found)
        return cls(files, tuple(hashes[file] for file in files), about)

    def check(self, about: Mapping[str, Any]) -> None:
        """Raise ConfigError unless these are statistics for a compile that says this about itself."""
        _require_equal(self.about, about, f"statistics {self.files[0].parent}: taken for another compile")

    def fill(self, requests: Iterable[Request]) -> None:
        """Let statistics be the sums over all parts. Raises CheckpointError: a file is damaged, or lacks what is asked."""
        requests = list(requests)
        for i, (file, sha256) in enumerate(zip(self.files, self.hashes, strict=True)):
            states = by_name(_read_tensors(file.with_suffix(".safetensors"), sha256))
            for request in requests:
                if request.name not in states:
                    raise CheckpointError(
                        f"{file.with_suffix('.safetensors')}: lacks {request.name}; write the part again"
                    )
                take = request.statistic.restore if i == 0 else request.statistic.merge
                take(states[request.name])


def _in_order(found: Mapping[Shard, tuple[Path, Any]]) -> tuple[Path, ...]:
    counts = sorted({shard.count for shard in found})
    if len(counts) > 1:
        raise ConfigError(f"statistics: parts of {counts[0]} and of {counts[1]} are together; give those of one run")
    missing = [str(Shard(i, counts[0])) for i in range(counts[0]) if Shard(i, counts[0]) not in found]
    if missing:
        raise ConfigError(
            f"statistics: {len(missing)} of {counts[0]} parts are missing: {', '.join(missing[:8])}; run resq calibrate --shard for them"
        )
    return tuple(found[Shard(i, counts[0])][0] for i in range(counts[0]))


def _require_equal(one: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    differ = sorted(k for k in {*one, *other} if one.get(k) != other.get(k))
    if differ:
        raise ConfigError(
            f"{where}: they differ in {', '.join(differ)}; take them with the same model, text, versions and options"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        index, count = about["shard"]
        if FILE.fullmatch(file.name) is None or Shard(int(index), int(count)).stem != file.stem:
            raise ValueError(f"it says that it is part {index}/{count}")
        if not isinstance(about["sha256"], str):
            raise ValueError(f"sha256 is {about['sha256']!r}")
        return {**about, "shard": [int(index), int(count)]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); write the part again") from error


def _read_tensors(file: Path, sha256: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        if tensors_hash(tensors) != sha256:
            raise ValueError("its tensors are not those that were written")
        return tensors
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable ({error}); write the part again") from error
