"""index.html: one self-contained page over a dump. Nothing is fetched when it is viewed.

Stages share most of their nodes, so each distinct node record is stored once and stages are lists of indices; the whole is
gzipped JSON that the browser unpacks. Layout is dagre 3.1.3's (static/vendor/dagre, MIT licence); folding, drawing and searching are
the scripts beside it in static/.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from resq_compiler.inspection import dump_files

FIELDS = ("name", "op", "target", "text", "inputs", "values", "module", "pass", "block", "bits", "precision", "facts")
SCRIPTS = ("data.js", "graph.js", "compare.js", "tables.js", "summary.js", "search.js", "app.js")
LAYOUT = "vendor/dagre"


def page_data(directory: Path) -> dict[str, Any]:
    """What the page shows: manifest, timing, stages over a pool of node records, diagnostics."""
    manifest = dump_files.read_manifest(directory)
    pool: dict[str, int] = {}
    stages = []
    for info in manifest["stages"]:
        rows = (
            json.dumps([record[f] for f in FIELDS], ensure_ascii=False)
            for record in dump_files.read_stage(directory, info["label"])
        )
        stages.append({"info": info, "nodes": [pool.setdefault(row, len(pool)) for row in rows]})
    return {
        "manifest": {**manifest, "stages": []}, "timing": dump_files.read_optional(directory, dump_files.TIMING) or {}, "stages": stages,
        "pool": [json.loads(row) for row in pool], "plots": plots(directory), "tables": tables(directory),
    }  # fmt: skip


def plots(directory: Path) -> list[dict[str, str]]:
    """Pictures of the dump, with their titles."""
    titles = dump_files.read_optional(directory, "plots/titles.json") or {}
    found = [directory / "plots" / name for name in titles]
    return [{"title": titles[p.name], "png": base64.b64encode(p.read_bytes()).decode()} for p in found if p.is_file()]


def tables(directory: Path) -> list[dict[str, Any]]:
    """Tables of the diagnostics: title, columns, rows."""
    result: list[dict[str, Any]] = []
    for name in ("attribution.json", "activations.json"):
        result += (dump_files.read_optional(directory, name) or {}).get("tables", [])
    return result


def write_page(directory: Path | str) -> Path:
    """Write index.html of a dump and return its path. Raises DumpError: not a dump, or not writable."""
    directory = Path(directory)
    with dump_files.reading(directory):
        data = json.dumps(page_data(directory), ensure_ascii=False, separators=(",", ":")).encode()
        title = dump_files.read_manifest(directory)["model"] or directory.resolve().name
    static = resources.files("resq_compiler.inspection") / "static"
    fields = {
        "title": html.escape(f"resq: {title}"),
        "css": (static / "page.css").read_text(encoding="utf-8"),
        "data": base64.b64encode(gzip.compress(data, 6, mtime=0)).decode(),
        "layout": (static / LAYOUT / "dagre.min.js").read_text(encoding="utf-8"),
        "layout_licence": (static / LAYOUT / "LICENSE").read_text(encoding="utf-8"),
        "script": "\n".join((static / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    template = (static / "page.html").read_text(encoding="utf-8")
    path = directory / dump_files.PAGE
    dump_files.write_file(path, re.sub(r"\{\{(\w+)\}\}", lambda m: fields[m.group(1)], template))
    return path
