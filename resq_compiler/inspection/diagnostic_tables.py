"""Diagnostics as tables: for the terminal, for the page, and as JSON beside a dump."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from resq_compiler.inspection import dump_files, page
from resq_compiler.inspection.activations import Diagnostics
from resq_compiler.inspection.attribution import Costs
from resq_compiler.util.text import table as aligned

ACTIVATIONS, ATTRIBUTION, TITLES = "activations.json", "attribution.json", "plots/titles.json"
SITE_COLUMNS = (
    "site", "min", "max", "kurtosis", "QSUR", "SQNR raw", "max after U", "kurtosis after U", "QSUR after U", "energy in high part", "SQNR",
    "without 0 %",
)  # fmt: skip
Table = dict[str, Any]


def activation_tables(found: Diagnostics) -> list[Table]:
    """Summary by kind of site, outliers, massive activations, super weights, and every site."""
    sites = site_rows(found)
    return [
        table(f"Kinds of sites on {found.tokens} tokens: medians over blocks (SQNR in dB)", SITE_COLUMNS, _medians(sites)),
        table("Outlier channels, |x| ≥ 6 in ≥ 25 % of layers and at ≥ 6 % of tokens (LLM.int8)",
              ("when", "site", "channel", "layers", "tokens"), found.outliers("before") + found.outliers("after")),
        table("Massive activations of the residual stream, |x| > 100 and > 1000 × median",
              ("channel", "token", "position", "from block", "to block", "value"), massive_rows(found)),
        table("Super weights: spikes through the input and the output of a down projection",
              ("linear", "row", "column", "weight", "input", "output", "share", "token"), found.super_weights),
        table(f"Sites before and after the compile on {found.tokens} tokens", SITE_COLUMNS, sites),
    ]  # fmt: skip


def table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Table:
    """A titled table; rows are dicts by column."""
    return {"title": title, "columns": list(columns), "rows": rows}


def site_rows(found: Diagnostics) -> list[dict[str, Any]]:
    """One row for each site of the original model."""
    rows = []
    for name, before in found.before.items():
        after = found.after.get(name)
        row: dict[str, Any] = {
            "site": name, "min": _short(before.low), "max": _short(before.high), "kurtosis": _short(before.kurtosis),
            "QSUR": _short(before.qsur), "SQNR raw": found.raw_noise_db.get(name),
            "energy in high part": _short(found.high_energy.get(name)), "SQNR": found.noise_db.get(name),
            "without 0 %": _short(None if name not in found.one_sided else 100 * found.one_sided[name]),
        }  # fmt: skip
        if after is not None:
            peak = max(after.high, -after.low)
            row |= {
                "max after U": _short(peak),
                "kurtosis after U": _short(after.kurtosis),
                "QSUR after U": _short(after.qsur),
            }
        rows.append(row)
    return rows


def _medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kinds = dict.fromkeys(row["site"].rpartition(".")[2] for row in rows)
    result = []
    for kind in kinds:
        members = [row for row in rows if row["site"].endswith("." + kind)]
        values = {c: [r[c] for r in members if r.get(c) is not None] for c in SITE_COLUMNS[1:]}
        result.append({"site": kind, **{c: _short(statistics.median(v)) for c, v in values.items() if v}})
    return result


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def massive_rows(found: Diagnostics) -> list[dict[str, Any]]:
    """Massive activations, the same channel at the same token in several blocks as one row; largest first."""
    rows: dict[tuple[int, str, int], dict[str, Any]] = {}
    for item in found.massive:
        block = int(item["site"].split(".")[1])
        key = (item["channel"], item["token"], item["position"])
        row = rows.setdefault(
            key,
            {
                **dict(zip(("channel", "token", "position"), key, strict=True)),
                "from block": block,
                "to block": block,
                "value": 0.0,
            },
        )
        row["to block"] = block
        if abs(item["value"]) > abs(row["value"]):
            row["value"] = _short(item["value"])
    return sorted(rows.values(), key=lambda row: -abs(row["value"]))


def attribution_tables(found: Costs) -> list[Table]:
    """One ranked table for each level."""
    columns = ("name", "KL", "perplexity", "increase %")
    result = []
    for level in dict.fromkeys(c.level for c in found.costs):
        rows = [
            {"name": c.name, "KL": _short(c.kl), "perplexity": _short(c.perplexity), "increase %": _short(100 * c.increase)}
            for c in found.costs if c.level == level
        ]  # fmt: skip
        title = f"Cost of quantizing one {level} alone, against the float model, on {found.tokens} tokens (KL in nats)"
        result.append(table(title, columns, rows))
    return result


def table_text(item: Table, limit: int = 40) -> str:
    """A table for the terminal, its first rows."""
    if not item["rows"]:
        return f"{item['title']}: none"
    cells = [[_cell(row.get(c)).strip() for c in item["columns"]] for row in item["rows"][:limit]]
    lines = [item["title"], aligned(item["columns"], cells, left=len(item["columns"]))]
    hidden = len(item["rows"]) - limit
    return "\n".join(lines + ([f"... and {hidden} more"] if hidden > 0 else []))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", "\\n")


def write_diagnostics(directory: Path, found: Diagnostics | None = None, costs: Costs | None = None) -> list[Path]:
    """Write tables as JSON and plots as PNG into a dump, and its page again. Returns what was written."""
    from resq_compiler.inspection import plots

    dump_files.read_manifest(directory)
    titles: dict[str, str] = {}
    written: list[Path] = []
    if found is not None:
        dump_files.write_file(directory / ACTIVATIONS, dump_files.json_text({"tables": activation_tables(found)}))
        titles |= plots.activation_plots(found, directory / "plots")
        written.append(directory / ACTIVATIONS)
    if costs is not None:
        dump_files.write_file(directory / ATTRIBUTION, dump_files.json_text({"tables": attribution_tables(costs)}))
        titles |= plots.attribution_plots(costs, directory / "plots")
        written.append(directory / ATTRIBUTION)
    earlier = dump_files.read_optional(directory, TITLES) or {}
    dump_files.write_file(directory / TITLES, dump_files.json_text({**earlier, **titles}))
    return [*written, *(directory / "plots" / name for name in titles), page.write_page(directory)]
