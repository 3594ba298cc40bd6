"""What a user states about the topology of a model, instead of what the graph says.

The form is that of `resq inspect MODEL --topology --json`, whole or any part of it, as a dict, a YAML or a JSON file:

    residual: {fusable: false}                       # keep U_A an operator of its own
    head: lm_head
    blocks:
    - index: 0
      attention: {v: model.layers.0.self_attn.v_proj, values_fusable: false}
      feed_forward:
      - {gate: [model.layers.0.mlp.gate_proj], up: [model.layers.0.mlp.up_proj], down: model.layers.0.mlp.down_proj}
    float: [model.layers.0.mlp.down_proj]            # linears that stay float, whatever their role, or without one

Roles are given by the names of linears. Properties may be switched off, never on. Everything else (heads, widths) is read from the
graph and only compared; experts and routers are always those of the graph. Exact passes are checked numerically afterwards, so a wrong
statement stops a compile and changes no result.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

from resq_compiler.analysis.topology import ROLES
from resq_compiler.errors import ConfigError, TopologyError
from resq_compiler.ir import graph_tools
from resq_compiler.ir.views import Linear

_DERIVED = {"model", "hidden_size", "not_fused", "beside"}
_ATTENTION = {*ROLES, "values_fusable", "heads", "kv_heads", "head_dim", "value_dim", "window", "compressed", "keys_of"}
_FEED_FORWARD = {"gate", "up", "down", "channelwise", "experts"}
_RESIDUAL = {"fusable", "values", "writers", "gained_writers", "readers"}
_FORM = "expected the form of `resq inspect MODEL --topology --json`, or a part of it"


@dataclass(frozen=True)
class FeedForwardOverride:
    """gate and up: names of linears, None = as found. down: its name. channelwise: False, or None = as found."""

    down: str
    gate: tuple[str, ...] | None = None
    up: tuple[str, ...] | None = None
    channelwise: bool | None = None


@dataclass(frozen=True)
class BlockOverride:
    """linears: role (q, k, v, o, ...) to name. expected: derived values to compare. feed_forwards: None = as found."""

    linears: Mapping[str, str] = field(default_factory=dict)
    values_fusable: bool | None = None
    expected: Mapping[str, Any] = field(default_factory=dict)
    feed_forwards: tuple[FeedForwardOverride, ...] | None = None


@dataclass(frozen=True)
class TopologyOverrides:
    """Statements about a model; empty: everything as the graph says."""

    head: str | None = None
    fusable: bool | None = None
    hidden_size: int | None = None
    blocks: Mapping[int, BlockOverride] = field(default_factory=dict)
    floats: tuple[str, ...] = ()

    def block(self, index: int) -> BlockOverride:
        """What was said about a block."""
        return self.blocks.get(index, BlockOverride())


def read_overrides(source: TopologyOverrides | Mapping[str, Any] | str | Path | None) -> TopologyOverrides:
    """Overrides from a dict or from a YAML or JSON file. Raises ConfigError: unreadable, unknown keys, values of a wrong kind."""
    if source is None:
        return TopologyOverrides()
    if isinstance(source, TopologyOverrides):
        return source
    if isinstance(source, Mapping):
        return _overrides(source, "topology")
    return _overrides(_read_file(Path(source).expanduser()), f"topology file {source}")


def _read_file(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"topology file {path}: cannot be read as YAML or JSON: {error}; {_FORM}") from error


def _overrides(values: Any, where: str) -> TopologyOverrides:
    _check_keys(values, {"head", "residual", "blocks", "float", *_DERIVED}, where)
    residual = values.get("residual", {})
    _check_keys(residual, _RESIDUAL, f"{where}, residual")
    blocks: dict[int, BlockOverride] = {}
    for i, entry in enumerate(_list(values.get("blocks", []), f"{where}, blocks")):
        place = f"{where}, blocks, entry {i}"
        _check_keys(entry, {"index", "attention", "feed_forward", "routers"}, place)
        index = entry.get("index")
        if type(index) is not int or index < 0 or index in blocks:
            raise ConfigError(f"{place}: expected `index: ` and the number of a block, each once; got {index!r}")
        blocks[index] = _block(entry, f"{where}, block {index}")
    return TopologyOverrides(
        _name(values["head"], f"{where}, head") if "head" in values else None,
        _flag(residual, "fusable", f"{where}, residual"),
        values.get("hidden_size"),
        blocks,
        tuple(_names(values.get("float", []), f"{where}, float")),
    )


def _block(entry: Mapping[str, Any], where: str) -> BlockOverride:
    attention = entry.get("attention", {})
    _check_keys(attention, _ATTENTION, f"{where}, attention")
    linears = {role: _name(attention[role], f"{where}, attention {role}") for role in ROLES if role in attention}
    expected = {key: value for key, value in attention.items() if key not in (*ROLES, "values_fusable")}
    feed_forwards = None
    if "feed_forward" in entry:
        items = _list(entry["feed_forward"], f"{where}, feed_forward")
        feed_forwards = tuple(_feed_forward(item, f"{where}, feed_forward {i}") for i, item in enumerate(items))
    return BlockOverride(linears, _flag(attention, "values_fusable", f"{where}, attention"), expected, feed_forwards)


def _feed_forward(item: Any, where: str) -> FeedForwardOverride:
    _check_keys(item, _FEED_FORWARD, where)
    if "down" not in item:
        raise ConfigError(
            f"{where}: expected `down: ` and the name of its down projection, which tells feed-forwards apart"
        )
    gate, up = (tuple(_names(item[key], f"{where}, {key}")) if key in item else None for key in ("gate", "up"))
    return FeedForwardOverride(_name(item["down"], f"{where}, down"), gate, up, _flag(item, "channelwise", where))


def _check_keys(values: Any, known: set[str], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected keys and values; got {type(values).__name__}; {_FORM}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: expected a list; got {type(value).__name__}; {_FORM}")
    return list(value)


def _names(value: Any, where: str) -> list[str]:
    return [_name(item, where) for item in _list(value, where)]


def _name(value: Any, where: str) -> str:
    """A name, or an entry of `resq inspect --json`, {name, in, out, bias}."""
    name = value.get("name") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{where}: expected the name of a linear, such as model.layers.0.mlp.down_proj; got {value!r}"
        )
    return name


def _flag(values: Mapping[str, Any], key: str, where: str) -> bool | None:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {key}: expected true or false; got {value!r}")
    return value


class LinearNames:
    """The linears of a graph by the names that `resq inspect --topology` shows."""

    def __init__(self, gm: GraphModule):
        self.nodes: dict[str, list[Node]] = {}
        for node in gm.graph.nodes:
            if (linear := Linear.of(node)) is not None:
                self.nodes.setdefault(linear.name, []).append(node)

    def find(self, name: str, where: str) -> Node:
        """The linear of that name. Raises TopologyError: none, or several that share a weight."""
        found = self.nodes.get(name, [])
        if len(found) == 1:
            return found[0]
        near = ", ".join(difflib.get_close_matches(name, self.nodes, 3)) or ", ".join(list(self.nodes)[:5])
        got = f"{len(found)} linears share this weight" if found else f"no linear has this name; near it: {near}"
        raise TopologyError(f"topology override, {where}: {name}: {got}")

    def find_feeding(self, name: str, value: Node, where: str) -> Node:
        """The linear of that name, which `value` must depend on. Raises TopologyError."""
        node = self.find(name, where)
        if node not in graph_tools.ancestors([value]):
            raise TopologyError(
                f"topology override, {where}: expected a linear that node {value.name} depends on; {name} is none"
            )
        return node


def switched_off(found: bool, stated: bool | None, where: str, why: str) -> bool:
    """A property after an override. Raises TopologyError: switched on where the graph says no."""
    if stated and not found:
        raise TopologyError(f"topology override, {where}: cannot be true: {why}")
    return found and stated is not False
