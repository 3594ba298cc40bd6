"""The topology of a float model as a tree, with what cannot be fused into weights and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from resq_compiler.analysis.topology import ROLES
from resq_compiler.ir import graph_tools, meta, values
from resq_compiler.ir.views import AppendCache, Embedding, Linear, SplitHeads
from resq_compiler.numerics.hadamard import hadamard_plan
from resq_compiler.numerics.transforms import HadamardRotation

if TYPE_CHECKING:
    from torch.fx import Node

    from resq_compiler.analysis.topology import Attention, Block, Experts, FeedForward, Topology


def topology_dict(topology: Topology) -> dict[str, Any]:
    """Plain values: the residual stream, every block, and what stays an operator of its own."""
    stream = topology.residual
    return {
        "hidden_size": topology.hidden_size,
        "residual": {
            "values": len(stream.values), "writers": [_writer(n) for n in stream.writers],
            "gained_writers": [graph_tools.module_of(n) or n.name for n in stream.gained_writers],
            "readers": len(stream.readers), "fusable": stream.fusable,
        },
        "blocks": [_block_dict(block) for block in topology.blocks],
        "head": _linear(topology.head),
        "float": [_linear(n) for n in topology.floats],
        **({"beside": [_linear(n) for n in topology.beside]} if topology.beside else {}),
        "not_fused": not_fused(topology),
    }  # fmt: skip


def not_fused(topology: Topology) -> list[dict[str, Any]]:
    """What the default recipe cannot fuse: basis, where, why, and what it costs: multiplications a token, and bytes of float32 bases."""
    rows = [*_stream_rows(topology)]
    for block in topology.blocks:
        rows += _attention_rows(block.attention, f"block {block.index}")
        for feed_forward in block.feed_forwards:
            rows += _feed_forward_rows(feed_forward, f"block {block.index}")
    return rows


def _row(basis: str, where: str, why: str, products: int = 0, values: int = 0) -> dict[str, Any]:
    """values: in the bases."""
    return {"basis": basis, "where": where, "why": why, "multiplications": products, "bytes": 4 * values}


def _stream_rows(topology: Topology) -> list[dict[str, Any]]:
    stream, groups = topology.residual, topology.online
    if not groups:
        return []
    if stream.gained_writers:
        first = graph_tools.module_of(stream.gained_writers[0]) or stream.gained_writers[0].name
        why = (
            f"{len(stream.gained_writers)} norms with a gain write into the stream ({first}, ...); a rotation does not commute with "
            "a gain, so U_A is multiplied in before each group of reading linears at run time, each with a basis of its own"
        )
    elif any(group.online for group in groups):
        first = graph_tools.module_of(groups[0].value) or groups[0].value.name
        why = f"{len(groups)} norms ({first}, ...) keep their gains, which would cost too much in the weights (fold-norms)"
    else:
        why = "the topology override says so"
    values = len(groups) * topology.hidden_size**2
    return [_row("U_A", "residual stream", why, values, values)]


def _attention_rows(attention: Attention, where: str) -> list[dict[str, Any]]:
    why = "position embedding stands between the q and k projections and the cache"
    square = attention.key_dim**2
    turned = attention.num_heads + (attention.num_kv_heads if attention.keeps else 0)
    rows = [_row("U_C", where, why, turned * square, square if attention.keeps else 0)]
    if attention.keeps and not attention.value_is_linear:
        node = AppendCache.require(attention.value_cache).new
        split = SplitHeads.of(node)
        direct = split is not None and split.x is attention.v
        why = (
            "the topology override says so" if direct else f"{node.name} stands between the v projection and the cache"
        )
        values = attention.num_kv_heads * attention.value_dim**2
        rows.append(_row("U_B", where, why, values, values))
    return rows


def _feed_forward_rows(feed_forward: FeedForward, where: str) -> list[dict[str, Any]]:
    width = values.width(Linear.require(feed_forward.down).x)
    plan = hadamard_plan(width)
    why = "the activation function stands before down; its inverse is fused"
    if not plan.full_width:
        why += f"; a block transform of width {plan.block} on {width} channels: {plan.reason}"
    rows = [_row("U_D", where, why, HadamardRotation((width,)).products)]
    if not feed_forward.channelwise:
        mixes = (
            "operators before down mix channels, or multiply them by what is made beside the stream, so "
            "down_proj=energy-split and outliers are not possible"
        )
        rows.append(_row("channel order", where, mixes))
    return rows


def _writer(node: Node) -> str:
    site = meta.get(node, meta.LinearSite)
    return site.name if site else str(Embedding.require(node).table.target).removesuffix(".weight")


def _block_dict(block: Block) -> dict[str, Any]:
    attention = block.attention
    return {
        "index": block.index,
        "attention": {
            "heads": attention.num_heads, "kv_heads": attention.num_kv_heads, "head_dim": attention.head_dim,
            "value_dim": attention.value_dim, "window": attention.window, "values_fusable": attention.value_is_linear,
            **({"compressed": attention.compressed} if attention.compressed else {}),
            **({} if attention.keeps else {"keys_of": attention.keeper}),
            **{role: _linear(node) for role, node in attention.linears.items()},
        },
        "feed_forward": [
            {
                "gate": [_linear(n) for n in item.gates], "up": [_linear(n) for n in item.ups], "down": _linear(item.down),
                "channelwise": item.channelwise, **_experts(item.experts),
            }
            for item in block.feed_forwards
        ],
        **({"routers": [_linear(n) for n in block.routers]} if block.routers else {}),
    }  # fmt: skip


def _experts(experts: Experts | None) -> dict[str, Any]:
    """How many experts there are, and how many a token goes through; nothing where there is no mixture."""
    if experts is None:
        return {}
    return {"experts": {"count": experts.count, "choices": experts.choices, "router": _linear(experts.router)["name"]}}


def _linear(node: Node) -> dict[str, Any]:
    site, linear = meta.get(node, meta.LinearSite), Linear.require(node)
    sizes = {"in": values.width(linear.x), "out": values.width(node)}
    return {"name": site.name if site else node.name, **sizes, "bias": linear.bias is not None}


def topology_text(name: str, found: dict[str, Any]) -> str:
    """A tree; neighbouring blocks of one shape are shown once."""
    stream, embedding = found["residual"], found["residual"]["writers"][0]
    fused = "U_A fuses into every writer and reader" if stream["fusable"] else "U_A stays online, see below"
    if stream["fusable"] and any(row["basis"] == "U_A" for row in found["not_fused"]):
        fused = "U_A fuses into every writer and all readers but some, see below"
    lines = [
        f"{name}",
        f"├─ residual stream: {found['hidden_size']} channels, starts at {embedding}; {fused}",
        f"│    {len(stream['writers'])} linears and embeddings write, {len(stream['gained_writers'])} norms write, "
        f"{stream['readers']} groups read",
    ]
    for run in _runs(found["blocks"]):
        lines += _block_lines(run)
    lines.append(f"├─ head: {_linear_text(found['head'])}")
    if found["float"]:
        lines.append("├─ stay float: " + ", ".join(linear["name"] for linear in found["float"]))
    if "beside" in found:
        lines.append(
            "├─ beside the stream, for all blocks; stay float: "
            + ", ".join(linear["name"] for linear in found["beside"])
        )
    lines.append("└─ not fused, operators at run time")
    return "\n".join(lines + _reason_lines(found["not_fused"]))


def _reason_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Equal reasons of several blocks in one line, with what they cost together."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["basis"], row["why"]), []).append(row)
    lines = []
    for (basis, why), members in alike.items():
        first, last = members[0]["where"], members[-1]["where"]
        span = first if len(members) == 1 else f"{first.replace('block', 'blocks')} to {last.removeprefix('block ')}"
        lines.append(f"     {basis} ({span}{_cost_text(members)}): {why}")
    return lines


def _cost_text(rows: list[dict[str, Any]]) -> str:
    products, size = (sum(row[name] for row in rows) for name in ("multiplications", "bytes"))
    if not products:
        return ""
    return f"; {products:,} multiplications a token" + (f", {size / 1e3:,.1f} kB" if size else "")


def _runs(blocks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    runs: list[list[dict[str, Any]]] = []
    for block in blocks:
        if runs and _shape(runs[-1][0]) == _shape(block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _shape(block: dict[str, Any]) -> str:
    """The block without its index and names."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("name", "index")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return json.dumps(strip(block))


def _block_lines(blocks: list[dict[str, Any]]) -> list[str]:
    first, last = blocks[0], blocks[-1]
    title = (
        f"block {first['index']}" if first is last else f"blocks {first['index']} to {last['index']}, all as the first"
    )
    a = first["attention"]
    window = f", window of {a['window']}" if a["window"] else ""
    roles = [role for role in ROLES if role in a]
    width = max(4, *map(len, roles))
    basis = "U_B fuses into v and o" if a["values_fusable"] else "U_B stays online"
    lines = [
        f"├─ {title}",
        f"│  ├─ {_attention_text(a)}{window}; {basis}",
        *(f"│  │    {role:<{width}} {_linear_text(a[role])}" for role in roles),
    ]
    for i, item in enumerate(first["feed_forward"]):
        branch, stem = ("└─", "  ") if i == len(first["feed_forward"]) - 1 else ("├─", "│ ")
        experts = item.get("experts")
        kind = (
            f"{experts['choices']} of {experts['count']} experts, chosen by {experts['router']}"
            if experts
            else "feed-forward"
        )
        lines.append(
            f"│  {branch} {kind}: "
            + ("elementwise between up and down" if item["channelwise"] else "channels keep their order")
        )
        lines += [f"│  {stem}   {role:<4} {_linear_text(n)}" for role in ("gate", "up") for n in item[role]]
        lines.append(f"│  {stem}   down {_linear_text(item['down'])}")
    return lines


def _attention_text(a: dict[str, Any]) -> str:
    """Heads, and what is cached of latent attention."""
    heads = f"{a['heads']} heads of {a['head_dim']}"
    if "compressed" not in a:
        whose = f", those of block {a['keys_of']}" if "keys_of" in a else ""
        return f"attention: {heads}, {a['kv_heads']} for keys and values{whose}"
    sizes = a["compressed"]
    queries = f", queries to {sizes['qlatent']}" if "qlatent" in sizes else ""
    return f"latent attention: {heads}; keys and values compressed to {sizes['latent']} + {sizes['rotary']} rotary columns{queries}"


def _linear_text(linear: dict[str, Any]) -> str:
    return f"{linear['name']}  {linear['in']} → {linear['out']}" + (" + bias" if linear["bias"] else "")
