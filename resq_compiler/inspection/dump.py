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
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_compiler import __version__
from resq_compiler.errors import DumpError
from resq_compiler.inspection import records, text
from resq_compiler.pipeline.stages import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from resq_compiler.model.compiled_model import CompiledModel

VARIABLE = "RESQ_DUMP_DIR"
FORMAT, VERSION = "resq-dump", 1
MANIFEST, TIMING, PAGE = "dump.json", "timing.json", "index.html"
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
            "options": options or {}, "stages": [], "notes": [], "summary": {}, "noise": {},
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

    def finish(self, compiled: CompiledModel | None = None, tokens: Tensor | None = None) -> Path:
        """Complete the manifest, without a model as that of a compile that failed, and write the page; returns the directory."""
        from resq_compiler.evaluation import report
        from resq_compiler.inspection import page

        if compiled is not None:
            self.manifest["options"] = compiled.options.to_dict()  # as passes resolved them
            self.manifest["notes"] = list(compiled.notes)
            self.manifest["summary"] = report.describe(compiled)
            self.manifest["noise"] = measured_noise(compiled, tokens)
        self._write_manifest()
        page.write_page(self.directory)
        return self.directory

    def _write_manifest(self) -> None:
        write_file(self.directory / MANIFEST, json_text(self.manifest))
        write_file(self.directory / TIMING, json_text(self.seconds))


@dataclass
class Recording:
    """Passes each stage to a listener and, where a dump is wanted, writes it."""

    writer: DumpWriter | None
    listener: Callable[[Stage], None] | None

    def add(self, stage: Stage) -> None:
        """As the pipeline's on_stage."""
        if self.writer is not None:
            self.writer.add(stage)
        if self.listener is not None:
            self.listener(stage)

    def complete(self, compiled: CompiledModel) -> None:
        """Write what is known only after the compile."""
        if self.writer is not None:
            self.writer.finish(compiled)


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
        if record.writer is not None:
            record.writer.finish()
        raise


def dump_compiled(compiled: CompiledModel, directory: Path | str, tokens: Tensor | None = None) -> Path:
    """Write the stages of a compiled model; of a loaded one, whose stages were not saved, its graph."""
    writer = DumpWriter(directory, compiled.source, compiled.options.to_dict())
    stages = compiled.stages or [Stage(0, "loaded", "", compiled.graph_module.graph, 0, 0.0, None)]
    for stage in stages:
        writer.add(stage)
    return writer.finish(compiled, tokens)


def measured_noise(compiled: CompiledModel, tokens: Tensor | None) -> dict[str, Any]:
    """Noise of every quantizer on tokens or, without any, on the model's calibration sample; empty without both."""
    from resq_compiler.inspection.noise import site_noise

    ids = compiled.sample_ids if tokens is None else tokens
    return {} if ids is None else site_noise(compiled.graph_module, ids)


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


def json_text(value: Any) -> str:
    """Readable JSON with a final newline."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_file(path: Path, content: str) -> None:
    """Write text; DumpError where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DumpError:
    """The error for a target that cannot be written."""
    return DumpError(f"dump: cannot write {path}: {error.strerror}; give a writable directory with free space")


def read_manifest(directory: Path | str) -> dict[str, Any]:
    """The manifest of a dump. Raises DumpError for what is not a dump of this version."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        found = "a directory without one" if directory.is_dir() else "a file" if directory.exists() else "nothing"
        raise DumpError(
            f"{directory}: expected a dump (a directory with {MANIFEST}), found {found}; "
            "make one with `resq inspect MODEL --dump DIR` or compile(..., dump_dir=DIR)"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DumpError(f"{path}: not a manifest of a dump; expected format {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise DumpError(
            f"{path}: this dump has version {manifest.get('version')}, resq_compiler {__version__} reads version {VERSION}; "
            "dump again with this release"
        )
    return manifest


def read_json(path: Path) -> Any:
    """A JSON file of a dump. Raises DumpError when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DumpError(f"{path}: cannot be read as JSON ({error}); dump again") from error


def read_stage(directory: Path | str, label: str) -> list[dict[str, Any]]:
    """The node records of one stage of a dump."""
    return read_json(Path(directory) / f"{label}.json")["nodes"]


def read_optional(directory: Path | str, name: str) -> Any:
    """A JSON file of a dump, or None where it was not asked for."""
    path = Path(directory) / name
    return read_json(path) if path.is_file() else None
