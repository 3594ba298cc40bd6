"""A dump: a directory with every stage of a compile as text, JSON and Graphviz, a manifest, and a page.

    dump.json              what was compiled: options, stages, noise, notes
    00-capture.txt .json .dot, 01-canonicalize.txt ...     one set for each pass: the graph after it, also when it failed
    timing.json            seconds of each pass
    index.html             the page, made from the files above (page.py)
    activations.json, attribution.json, plots/              diagnostics, where they were asked for

Weights are never written. Equal compiles give equal files, but for timing.json and the rounding errors in `relative_error`, which
depend on how memory is aligned. Stages are written as they are made, so a compile that fails leaves all stages before it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from resq_compiler import __version__
from resq_compiler.errors import DumpError
from resq_compiler.evaluation import sizes
from resq_compiler.inspection import page, records, text
from resq_compiler.inspection.dump_files import FORMAT, MANIFEST, TIMING, VERSION, json_text, unwritable, write_file
from resq_compiler.inspection.noise import noise_by_name
from resq_compiler.pipeline.stages import Stage
from resq_compiler.result import CompileResult

log = logging.getLogger("resq_compiler")

VARIABLE = "RESQ_DUMP_DIR"
OURS = re.compile(
    r"\d\d-.*\.(txt|json|dot|svg)|dump\.json|timing\.json|index\.html|activations\.json|attribution\.json"
)


class DumpWriter:
    """Writes a dump stage by stage. Use `add` as the pipeline's on_stage, then `finish`.

    Args:    directory: made if absent; files of an earlier dump in it are replaced, other files are left alone.
             model: what was compiled, for headings. options: plain values of the CompileConfig.
    Raises:  DumpError: the directory cannot be written.
    """

    def __init__(self, directory: Path | str, model: str = "", options: dict[str, Any] | None = None):
        self.directory = Path(directory)
        self.manifest: dict[str, Any] = {
            "format": FORMAT, "version": VERSION, "made_by": f"resq_compiler {__version__}", "model": model,
            "options": options or {}, "passes": "", "stages": [], "notes": [], "summary": {}, "noise": {},
        }  # fmt: skip
        self.seconds: dict[str, float] = {}
        self._prepare()

    def _prepare(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if OURS.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise unwritable(self.directory, error) from error
        self._write_manifest()

    def add(self, stage: Stage) -> None:
        """Write one stage."""
        nodes = records.graph_records(stage.graph)
        entry = stage_entry(stage, len(nodes))
        self.manifest["stages"].append(entry)
        self.seconds[stage.label] = round(stage.seconds, 4)
        header = [f"{k}: {v}" for k, v in entry.items() if v not in (None, "") and k not in ("label", "lines")]
        header += stage.lines
        write_file(
            self.directory / f"{stage.label}.txt", text.graph_text([stage.label, *header], nodes, stage.failed_node)
        )
        write_file(self.directory / f"{stage.label}.dot", text.graph_dot(stage.label, nodes, stage.failed_node))
        write_file(self.directory / f"{stage.label}.json", stage_json(entry, nodes))
        self._write_manifest()

    def finish(self, result: CompileResult | None = None, tokens: Tensor | None = None) -> Path:
        """Complete the manifest, without a result as that of a compile that failed, and write the page; returns the directory."""
        if result is not None:
            self.manifest["options"] = result.options.to_dict()  # as passes resolved them
            self.manifest["passes"] = result.passes
            self.manifest["notes"] = list(result.notes)
            self.manifest["summary"] = sizes.describe(result)
            self.manifest["noise"] = measured_noise(result, tokens)
        self._write_manifest()
        page.write_page(self.directory)
        return self.directory

    def _write_manifest(self) -> None:
        write_file(self.directory / MANIFEST, json_text(self.manifest))
        write_file(self.directory / TIMING, json_text(self.seconds))


@dataclass
class Recording:
    """Passes each stage to a listener and, where a dump is wanted, writes it. A disk that fills up ends the dump, not the compile."""

    writer: DumpWriter | None
    listener: Callable[[Stage], None] | None

    def add(self, stage: Stage) -> None:
        """As the pipeline's on_stage."""
        if self.writer is not None:
            self._try(self.writer.add, stage)
        if self.listener is not None:
            self.listener(stage)

    def complete(self, result: CompileResult | None = None) -> None:
        """Write what is known only after the compile; without a result, of one that failed."""
        if self.writer is not None:
            self._try(self.writer.finish, result)

    def _try(self, write: Callable[[Any], object], value: Any) -> None:
        try:
            write(value)
        except DumpError as error:
            self.writer = None
            log.warning("%s. The compile goes on; its dump ends here", error)


def target_directory(directory: Path | str | None) -> Path | None:
    """Where to dump: `directory`, else RESQ_DUMP_DIR, else nowhere. Made, so that a wrong one is an error before any work."""
    named = directory or os.environ.get(VARIABLE)
    if not named:
        return None
    path = Path(named)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


@contextmanager
def recording(
    directory: Path | str | None, model: str, options: dict[str, Any], listener: Callable[[Stage], None] | None
) -> Iterator[Recording]:
    """Record a compile into `directory` (default: RESQ_DUMP_DIR, else nowhere); complete also when the compile fails."""
    target = target_directory(directory)
    record = Recording(DumpWriter(target, model, options) if target else None, listener)
    try:
        yield record
    except Exception:
        record.complete()
        raise


def dump_result(result: CompileResult, directory: Path | str, tokens: Tensor | None = None) -> Path:
    """Write the stages of a compile; of a loaded model, whose stages were not saved, its graph."""
    writer = DumpWriter(directory, result.source, result.options.to_dict())
    for stage in result.stages or (Stage(0, "loaded", "", result.graph_module.graph, 0, 0.0, None),):
        writer.add(stage)
    return writer.finish(result, tokens)


def measured_noise(result: CompileResult, tokens: Tensor | None) -> dict[str, Any]:
    """Noise of every quantizer on tokens or, without any, on the model's calibration sample; empty without both."""
    ids = result.sample_ids if tokens is None else tokens
    return {} if ids is None else noise_by_name(result.graph_module, ids)


def stage_entry(stage: Stage, nodes: int) -> dict[str, Any]:
    """What the manifest says about a stage."""
    error = None if stage.max_error is None else float(f"{stage.max_error:.3e}")
    return {
        "label": stage.label, "name": stage.name, "options": stage.options, "nodes": nodes, "rewrites": stage.rewrites,
        "relative_error": error, "exact": stage.exact, "failed": stage.failed, "failed_node": stage.failed_node,
        "lines": list(stage.lines),
    }  # fmt: skip


def stage_json(entry: dict[str, Any], nodes: list[dict[str, Any]]) -> str:
    """A stage as JSON, one node on each line, so that line-by-line tools can compare dumps."""
    body = ",\n".join(json.dumps(record, ensure_ascii=False) for record in nodes)
    return f'{{"format": "{FORMAT}", "version": {VERSION}, "stage": {json.dumps(entry)}, "nodes": [\n{body}\n]}}\n'
