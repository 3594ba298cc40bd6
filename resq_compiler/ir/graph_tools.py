"""Small helpers over torch.fx: tensors of a graph by name, new nodes, evaluation of a node on given values."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from resq_compiler.ir import meta, ops
from resq_compiler.ir.promises import (
    Around,
    Changed,
    ChangedEach,
    ChangedRows,
    Promise,
    Promised,
    is_stack,
    is_table,
    written,
)
from resq_compiler.numerics.float64 import by_row_chunks

aten = torch.ops.aten

VIEW_OPS = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.contiguous.default,
    aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.clone.default,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem, aten.flatten.using_ints,
    aten.unflatten.int, aten.select.int,
}  # fmt: skip


def is_call(node: object, *targets: Any) -> TypeGuard[Node]:
    """True for a call_function node with one of the targets."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def writes_into_argument(node: Node) -> bool:
    """Whether a node calls an operator of PyTorch that changes one of its arguments, as copy_ does."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def get_tensor(gm: GraphModule, node: Node) -> Tensor:
    """The values behind a get_attr node, made if they are promised. For shape and dtype alone, ask `held`."""
    return made(gm, str(node.target))


def made(gm: GraphModule, target: str) -> Tensor:
    """The values behind a dotted name."""
    value = tensor_named(gm, target)
    return value.make() if isinstance(value, Promised) else value


def pieces(gm: GraphModule, node: Node) -> Iterator[Tensor]:
    """The values behind a get_attr node, a table that is promised some thousands of rows at a time."""
    value = held(gm, node)
    yield from value.promise.counted_pieces() if is_table(value) else (get_tensor(gm, node),)


def held(gm: GraphModule, node: Node) -> Tensor:
    """What the graph module holds for a get_attr node: shape and dtype are right, values may be promised."""
    return tensor_named(gm, str(node.target))


def tensor_named(gm: GraphModule, target: str) -> Tensor:
    """What the graph module holds under a dotted name."""
    value: Any = gm
    for atom in target.split("."):
        value = getattr(value, atom)
    return value


def owner_and_name(gm: GraphModule, target: str) -> tuple[torch.nn.Module, str]:
    """The module that holds a dotted name (made if absent) and the last part of the name."""
    *path, name = target.split(".")
    module: torch.nn.Module = gm
    for atom in path:
        if not hasattr(module, atom):
            module.add_module(atom, torch.nn.Module())
        module = getattr(module, atom)
    return module, name


def set_tensor(gm: GraphModule, target: str, value: Tensor) -> None:
    """Bind a tensor to a dotted name; the one bound before is released, never written to."""
    module, name = owner_and_name(gm, target)
    if name in module._parameters:
        del module._parameters[name]
    module._buffers.pop(name, None)
    module.register_buffer(name, value.detach())


def change_tensor(
    gm: GraphModule, node: Node, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None, around: Around | None = None
) -> None:  # fmt: skip
    """Bind what `change` makes of a get_attr node's tensor under the same name. shape: of the result, where it is another one."""
    set_tensor(gm, str(node.target), _changed(held(gm, node), change, shape, around))


def change_rows(
    gm: GraphModule, node: Node, change: Callable[[Tensor], Tensor], around: Around | None = None
) -> None:  # fmt: skip
    """`change_tensor` with a float64 function of rows, each for itself; rounded once."""
    value = held(gm, node)
    if isinstance(value, Promised):
        changed: Tensor = Promised(ChangedRows(value.promise, change, around))
    else:
        changed = by_row_chunks(value, change)
    set_tensor(gm, str(node.target), changed)


@contextlib.contextmanager
def substituted(gm: GraphModule, tensors: Mapping[Node, Tensor]) -> Iterator[None]:
    """Inside, other tensors stand behind get_attr nodes."""
    before = {node: held(gm, node) for node in tensors}
    for node, value in tensors.items():
        set_tensor(gm, str(node.target), value)
    try:
        yield
    finally:
        for node, value in before.items():
            set_tensor(gm, str(node.target), value)


def change_experts(gm: GraphModule, node: Node, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`change_tensor` of [E, ...] with a function of the values of some experts, each for itself, and of their numbers."""
    value = held(gm, node)
    changed = (
        Promised(ChangedEach(value.promise, change))
        if isinstance(value, Promised)
        else change(value, torch.arange(len(value)))
    )
    set_tensor(gm, str(node.target), changed)


def derive_tensor(
    gm: GraphModule, node: Node, target: str, change: Callable[[Tensor], Tensor], shape: Sequence[int], made_by: str,
    of_experts: bool = False, around: Around | None = None,
) -> Node:  # fmt: skip
    """A new get_attr node for what `change` makes of another one's tensor, which stays as it is. of_experts: of each one for itself."""
    value = held(gm, node)
    if isinstance(value, Promised):
        value.promise.children += 1
        if of_experts:
            return add_tensor(gm, target, Promised(ChangedEach(value.promise, lambda w, _: change(w), shape)), made_by)
    return add_tensor(gm, target, _changed(value, change, shape, around), made_by)


def rows_of(value: Tensor, ids: Tensor) -> Tensor:
    """Some rows of a tensor, or of one that is promised, which are all that is made."""
    return value.promise.rows(ids) if isinstance(value, Promised) else value[ids]


def _changed(
    value: Tensor, change: Callable[[Tensor], Tensor], shape: Sequence[int] | None, around: Around | None
) -> Tensor:  # fmt: skip
    """A promise stays one; a value changes now."""
    if isinstance(value, Promised):
        return Promised(Changed(value.promise, change, shape, around))
    changed, expected = change(value), tuple(value.shape if shape is None else shape)
    assert tuple(changed.shape) == expected, f"{tuple(changed.shape)} where {expected} was announced"
    return changed


def promised_bytes(gm: GraphModule) -> int:
    """Bytes of the tensors of a graph that are promised."""
    return sum(t.nbytes for t in gm.buffers() if isinstance(t, Promised))


def settle(gm: GraphModule, directory: Path | None = None) -> None:
    """Make what is promised still: in memory, or in files of a directory, read page by page when somebody looks."""
    made: dict[Promise, Tensor] = {}
    for i, (name, value) in enumerate(list(gm.named_buffers())):
        if not isinstance(value, Promised):
            continue
        promise = value.promise  # names that share one share the value
        if promise not in made:
            file = None if directory is None else directory / f"tensor-{i:04d}.bin"
            made[promise] = value.make() if file is None else written(promise, file)
        set_tensor(gm, name, made[promise])


def rename_tensor(gm: GraphModule, node: Node, target: str) -> None:
    """Bind the tensor behind a get_attr node to another name, for all nodes that refer to it."""
    old, value = str(node.target), held(gm, node)
    module, name = owner_and_name(gm, old)
    delattr(module, name)
    set_tensor(gm, target, value)
    for other in gm.graph.find_nodes(op="get_attr"):
        if other.target == old:
            other.target = target


def delete_unused_tensors(gm: GraphModule) -> None:
    """Release tensors that no node refers to."""
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for target in [name for name, _ in list(gm.named_buffers()) + list(gm.named_parameters())]:
        if target not in used:
            module, name = owner_and_name(gm, target)
            module._buffers.pop(name, None)
            module._parameters.pop(name, None)


def erase_tensor(gm: GraphModule, node: Node) -> None:
    """Erase a get_attr node that nothing reads, and release its tensor if no other node refers to it."""
    target = str(node.target)
    gm.graph.erase_node(node)
    if not any(str(n.target) == target for n in gm.graph.find_nodes(op="get_attr")):
        module, name = owner_and_name(gm, target)
        delattr(module, name)


def add_tensor(gm: GraphModule, target: str, value: Tensor, made_by: str) -> Node:
    """A new get_attr node for a new tensor, at the top of the graph."""
    module, name = owner_and_name(gm, target)
    if hasattr(module, name):
        raise AssertionError(f"tensor name {target} is taken")
    set_tensor(gm, target, value)
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        node = gm.graph.create_node("get_attr", target, (), {}, name=target.replace(".", "_"))
    return meta.put(node, meta.Origin(module=target.rpartition(".")[0], made_by=made_by))


def emit(
    graph: Graph, target: Callable, args: tuple, like: Node, made_by: str, name: str | None = None, **kwargs: Any
) -> Node:
    """A new call at the graph's insertion point that inherits the provenance of `like`."""
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return meta.put(node, meta.Origin(module=module_of(like), made_by=made_by))


def replace(old: Node, new: Node) -> Node:
    """Put a node in the place of another, which is erased: all its users but `new` itself, and its value where `new` has none yet."""
    if meta.VALUE in old.meta:
        new.meta.setdefault(meta.VALUE, old.meta[meta.VALUE])
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    old.graph.erase_node(old)
    return new


def rewrite(old: Node, target: Callable, args: tuple, made_by: str) -> Node:
    """Put a new call in the place of a node, with its provenance and its value."""
    with old.graph.inserting_after(old):
        new = emit(old.graph, target, args, old, made_by)
    return replace(old, new)


def only_user(node: Node) -> Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def target_text(target: object) -> str:
    """How messages call an operator: `aten.linear`, `rms_norm`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def module_of(node: Node) -> str:
    """Dotted path of the innermost original module that a node belongs to ("" if unknown)."""
    origin = meta.get(node, meta.Origin)
    if origin is not None:
        return origin.module
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    for prefix in ("L['self'].", "L__self___"):
        path = path.removeprefix(prefix)
    return path.removeprefix("model.") if path != "model" else ""


def evaluate(gm: GraphModule, node: Node, env: dict[Node, Any], device: torch.device | None = None) -> Any:
    """Value of a node given values of some of its ancestors; intermediate values are added to env. device: see run_node."""
    pending = [node]
    while pending:
        current = pending[-1]
        if current in env:
            pending.pop()
            continue
        missing = [n for n in current.all_input_nodes if n not in env]
        if missing:
            pending.extend(missing)
            continue
        env[current] = run_node(gm, current, env, device=device)
        pending.pop()
    return env[node]


def run_node(
    gm: GraphModule, node: Node, env: Mapping[Node, Any], substitutes: Mapping[object, Callable] | None = None,
    device: torch.device | None = None,
) -> Any:  # fmt: skip
    """Run one node on values from env; substitutes: operators to call instead of its own; device: where tensors of the model, and new
    ones, are wanted (default: where they lie)."""
    if node.op == "get_attr":
        value = held(gm, node)
        if is_table(value) and all(is_call(user, aten.embedding.default) or is_head(user) for user in node.users):
            return value
        if is_stack(value) and all(is_call(user, ops.expert_linear) for user in node.users):
            return value
        return get_tensor(gm, node) if device is None else get_tensor(gm, node).to(device)
    if node.op != "call_function":
        raise AssertionError(f"no value given for {node.op} node {node.name}")
    args = torch.fx.node.map_arg(node.args, lambda n: env[n])
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: env[n])
    if device is not None:
        args, kwargs = on_device(args, device), on_device(kwargs, device)
    function = (substitutes or {}).get(node.target, node.target)
    assert callable(function)
    return function(*args, **kwargs)


def is_head(node: Node) -> bool:
    """Whether a node is the linear that makes the logits: what follows it, one value after the other, is the output."""
    if not is_call(node, aten.linear.default):
        return False
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "output":
            return True
        if is_call(node, aten.linear.default):
            return False
    return False


def on_device(arguments: Any, device: torch.device) -> Any:
    """Arguments of a call, args or kwargs, with every device among them replaced."""
    if isinstance(arguments, Mapping):
        return {name: device if isinstance(value, torch.device) else value for name, value in arguments.items()}
    return tuple(device if isinstance(value, torch.device) else value for value in arguments)


def move_constructors(gm: GraphModule, device: torch.device) -> None:
    """Let every call of the graph that names a device make its tensors there."""
    moved = False
    for node in gm.graph.nodes:
        if any(isinstance(v, torch.device) and v != device for v in (*node.args, *node.kwargs.values())):
            node.args, node.kwargs, moved = on_device(node.args, device), on_device(node.kwargs, device), True
    if moved:
        gm.recompile()


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """All nodes that the given ones depend on, themselves included."""
    seen: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen


def placeholders(graph: Graph) -> list[Node]:
    """Graph inputs, in order."""
    return list(graph.find_nodes(op="placeholder"))


def output_args(graph: Graph) -> tuple[Node, ...]:
    """Graph outputs, in order."""
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, (list, tuple)), "a captured graph returns logits and cache entries"
    return tuple(outputs)


def snapshot(gm: GraphModule) -> GraphModule:
    """A graph module with its own graph that shares the tensors: passes rebind tensors by name and never write into them."""
    tensors = {str(node.target): held(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    return GraphModule(tensors, copy_graph(gm.graph))


def copy_graph(graph: Graph) -> Graph:
    """A copy of the nodes and their metadata that holds no weights."""
    copy = Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
