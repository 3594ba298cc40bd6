"""What differs between two dumps: options, sizes, stages, graphs, bits, noise."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resq_compiler.inspection import dump_files

COMPARED = ("target", "text", "values", "module", "pass", "block", "bits", "facts")
STAGE_FIELDS = ("options", "nodes", "rewrites", "relative_error", "failed", "failed_node")
MEASURED = ("WeightNoise.relative",)  # differs from node to node: nodes are alike without having the same one
Change = tuple[Any, Any]


@dataclass
class StageDifference:
    """Nodes by what happened to them from A to B, changed fields of the stage itself, and changed numbers of operators."""

    label: str
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, dict[str, Change]] = field(default_factory=dict)
    fields: dict[str, Change] = field(default_factory=dict)
    operators: dict[str, Change] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """True when the stage is the same in both."""
        return not (self.added or self.removed or self.changed or self.fields)


@dataclass
class Difference:
    """Two dumps compared. names: model and scheme of both. summary: bits and bytes. only_a, only_b: stages the other has not.

    noise_by_kind: medians over blocks of the sites that both have.
    """

    names: tuple[str, str]
    options: dict[str, Change]
    summary: dict[str, Change]
    only_a: list[str]
    only_b: list[str]
    stages: list[StageDifference]
    bits: dict[str, Change]
    noise: dict[str, Change]
    noise_by_kind: dict[str, Change]

    @property
    def empty(self) -> bool:
        """True when nothing differs (times are never compared)."""
        rest = self.options or self.summary or self.only_a or self.only_b or self.bits or self.noise
        return not rest and all(s.empty for s in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; stages that do not differ are left out."""
        stages = {
            s.label: {"added": s.added, "removed": s.removed, "changed": s.changed, "fields": s.fields, "operators": s.operators}
            for s in self.stages if not s.empty
        }  # fmt: skip
        return {
            "equal": self.empty, "names": self.names, "options": self.options, "summary": self.summary, "only_a": self.only_a,
            "only_b": self.only_b, "stages": stages,
            "bits": self.bits, "noise": self.noise, "noise_by_kind": self.noise_by_kind,
        }  # fmt: skip


def compare(directory_a: Path | str, directory_b: Path | str) -> Difference:
    """Compare two dumps. Stages meet by the name of their pass. Raises DumpError: not a dump, another version, damaged."""
    with dump_files.reading(directory_a, directory_b):
        found = _compared(directory_a, directory_b)
        difference_text(found)  # values of other types show there
        return found


def _compared(directory_a: Path | str, directory_b: Path | str) -> Difference:
    a, b = dump_files.read_manifest(directory_a), dump_files.read_manifest(directory_b)
    stages_a, stages_b = ({s["name"]: s for s in m["stages"]} for m in (a, b))
    common = [name for name in stages_a if name in stages_b]
    stages = [_compare_stage(Path(directory_a), Path(directory_b), stages_a[n], stages_b[n]) for n in common]
    noise_a, noise_b = ({k: v.get("sqnr_db") for k, v in m["noise"].items()} for m in (a, b))
    return Difference(
        (_name(a), _name(b)),
        _changes(a["options"], b["options"]),
        _changes(_flat(a.get("summary", {})), _flat(b.get("summary", {}))),
        [s["label"] for n, s in stages_a.items() if n not in stages_b],
        [s["label"] for n, s in stages_b.items() if n not in stages_a],
        stages,
        _changes(_site_bits(directory_a, a), _site_bits(directory_b, b)),
        _changes(noise_a, noise_b),
        _by_kind(noise_a, noise_b),
    )


def _name(manifest: dict[str, Any]) -> str:
    scheme = manifest.get("summary", {}).get("scheme", "")
    return " ".join(
        filter(
            None, (str(manifest["options"].get("recipe", "")), scheme, "of", Path(manifest["model"]).name or "a model")
        )
    )


def _flat(summary: dict[str, Any]) -> dict[str, Any]:
    """average_bits and memory_bytes as one level."""
    kinds = {"average_bits": "average bits", "memory_bytes": "bytes"}
    return {
        f"{title}, {k.replace('_', ' ')}": v for key, title in kinds.items() for k, v in summary.get(key, {}).items()
    }


def _kind(site: str) -> str:
    """The name of a site without its block: blocks.*.key."""
    return re.sub(r"\.\d+\.", ".*.", site, count=1)


def _by_kind(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Change]:
    """Medians over blocks of what both dumps measured; the name of a kind is that of its sites without their block."""
    kinds: dict[str, list[str]] = {}
    for name in a.keys() & b.keys():
        kinds.setdefault(_kind(name), []).append(name)
    medians = {
        k: tuple(round(statistics.median(n[x] for x in names), 2) for n in (a, b)) for k, names in sorted(kinds.items())
    }
    return {k: pair for k, pair in medians.items() if pair[0] != pair[1]}


def _compare_stage(a: Path, b: Path, info_a: dict[str, Any], info_b: dict[str, Any]) -> StageDifference:
    result = StageDifference(info_b["label"])
    result.fields = _changes({f: info_a[f] for f in STAGE_FIELDS}, {f: info_b[f] for f in STAGE_FIELDS})
    before = {r["name"]: r for r in dump_files.read_stage(a, info_a["label"])}
    after = {r["name"]: r for r in dump_files.read_stage(b, info_b["label"])}
    result.operators = _changes(
        *(Counter(r["target"] for r in side.values() if r["op"] == "call_function") for side in (before, after))
    )
    result.removed = [n for n in before if n not in after]
    result.added = [n for n in after if n not in before]
    for name in before.keys() & after.keys():
        changes = _changes({f: before[name][f] for f in COMPARED}, {f: after[name][f] for f in COMPARED})
        if changes:
            result.changed[name] = changes
    result.changed = {n: result.changed[n] for n in after if n in result.changed}
    return result


def _changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Change]:
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}


def _site_bits(directory: Path | str, manifest: dict[str, Any]) -> dict[str, str]:
    """Bits of every part of a linear and of every quantizer, in the last stage."""
    if not manifest["stages"]:
        return {}
    found = {}
    for record in dump_files.read_stage(directory, manifest["stages"][-1]["label"]):
        part, site = record["facts"].get("LinearPart"), record["facts"].get("QuantizerSite")
        if part is not None:
            columns = f"{record['bits'] or 'float'}, columns {part['start']}:{part['stop']}"
            found[f"{part['site']['name']}.part{part['index']}"] = columns
        elif site is not None:
            found[site["name"]] = record["bits"]
    return found


def difference_text(found: Difference, limit: int = 20) -> str:
    """For the terminal: each section with at most `limit` lines; a change that later stages keep is told once."""
    if found.empty:
        return "equal: options, graphs, bits and noise"
    lines = [f"A: {found.names[0]}", f"B: {found.names[1]}"]
    _section(lines, "options", [f"{k}: {a!r} -> {b!r}" for k, (a, b) in found.options.items()], limit)
    _section(
        lines, "bits and sizes", [f"{k}: {_number(a)} -> {_number(b)}" for k, (a, b) in found.summary.items()], limit
    )
    only = [f"only in A: {label}" for label in found.only_a] + [f"only in B: {label}" for label in found.only_b]
    _section(lines, "passes", only, limit)
    told: set[str] = set()
    for stage in found.stages:
        _section(lines, f"stage {stage.label}", _stage_lines(stage, told), limit)
    _section(lines, "bits", _bits_lines(found.bits), limit)
    _section(
        lines,
        "noise by kind of site, dB (medians over blocks, largest change first)",
        _noise_lines(found.noise_by_kind),
        limit,
    )
    _section(lines, "noise of each site, dB (largest change first)", _noise_lines(found.noise), limit)
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _section(lines: list[str], title: str, content: list[str], limit: int) -> None:
    if content:
        hidden = len(content) - limit
        lines += [
            title,
            *(f"  {line}" for line in content[:limit]),
            *([f"  ... and {hidden} more"] if hidden > 0 else []),
        ]


def _stage_lines(stage: StageDifference, told: set[str]) -> list[str]:
    """What a stage adds to what is told already, in groups: nodes alike in the fields that changed, and how, share a line."""
    lines = [f"{k}: {a} -> {b}" for k, (a, b) in stage.fields.items()]
    if stage.operators:
        lines.append("operators: " + ", ".join(f"{k} {a or 0} -> {b or 0}" for k, (a, b) in stage.operators.items()))
    lines += [f"+ %{name}" for name in stage.added] + [f"- %{name}" for name in stage.removed]
    groups: dict[str, list[str]] = {}
    for name, changes in stage.changed.items():
        leaves = _leaf_changes(changes)
        line = f"~ %{name}: " + "; ".join(f"{k}: {_shown(a)} -> {_shown(b)}" for k, (a, b) in leaves.items())
        if line not in told:
            groups.setdefault(
                repr([(k, None if k in MEASURED else pair) for k, pair in leaves.items() if k != "text"]), []
            ).append(line)
            told.add(line)
    for members in groups.values():
        alike = "alike but for the figures" if any(f" {k}: " in members[0] for k in MEASURED) else "alike"
        lines.append(members[0] + (f" (and {len(members) - 1} {alike})" if len(members) > 1 else ""))
    new = [line for line in lines if line not in told or line.startswith("~")]
    told.update(new)
    return new


def _leaf_changes(changes: dict[str, Change]) -> dict[str, Change]:
    """Changed fields, facts down to the single value: WeightNoise.relative instead of all facts of a node."""
    return {
        k: v for field, (a, b) in changes.items() for k, v in _changes(_leaves(field, a), _leaves(field, b)).items()
    }


def _leaves(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path.removeprefix("facts."): value}
    return {k: leaf for key, inner in value.items() for k, leaf in _leaves(f"{path}.{key}", inner).items()}


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _bits_lines(bits: dict[str, Change]) -> list[str]:
    """Sites of one kind that changed alike share a line."""
    groups: dict[tuple[str, Any, Any], list[str]] = {}
    for name, (a, b) in bits.items():
        groups.setdefault((_kind(name), a, b), []).append(name)
    return [
        f"{kind if len(names) > 1 else names[0]}: {a or '-'} -> {b or '-'}"
        + (f" ({len(names)} blocks)" if len(names) > 1 else "")
        for (kind, a, b), names in groups.items()
    ]


def _noise_lines(noise: dict[str, Change]) -> list[str]:
    """Ranked changes; first, sites that one side alone has are counted."""
    counts = [sum(pair[side] is None for pair in noise.values()) for side in (1, 0)]
    lines = [f"only in {name}: {count} sites" for name, count in zip("AB", counts, strict=True) if count]
    both = {k: pair for k, pair in noise.items() if None not in pair}
    ranked = sorted(both.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    return lines + [f"{k}: {a} -> {b} ({b - a:+.2f})" for k, (a, b) in ranked]
