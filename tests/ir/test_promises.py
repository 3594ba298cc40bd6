"""Promises: the same values as changing a tensor at once, made when something computes, and let go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.fx import Graph, GraphModule

from resq_compiler.ir import graph_tools, ops, promises
from resq_compiler.ir.promises import Changed, ChangedRows, Promised, in_memory


def graph_of(value: torch.Tensor) -> tuple[GraphModule, torch.fx.Node]:
    graph = Graph()
    weight = graph.create_node("get_attr", "w")
    graph.output(weight)
    return GraphModule({"w": value}, graph), weight


def counted(shape: tuple[int, ...]) -> tuple[promises.Stored, list[tuple[int, int]]]:
    value, reads = torch.randn(shape, generator=torch.Generator().manual_seed(0)), list[tuple[int, int]]()

    def read(start: int, stop: int) -> torch.Tensor:
        reads.append((start, stop))
        return value[start:stop].clone()

    return promises.Stored(shape, torch.float32, read), reads


def test_changes_of_a_promise_are_those_of_the_tensor() -> None:
    value = torch.randn(9000, 6, generator=torch.Generator().manual_seed(1))
    u = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    now, node = graph_of(value)
    later, promised = graph_of(Promised(in_memory(value)))
    for gm, weight in ((now, node), (later, promised)):
        graph_tools.change_rows(gm, weight, lambda w: w @ u)
        graph_tools.change_tensor(gm, weight, lambda w: w[:, :4].contiguous(), (9000, 4))
        graph_tools.change_rows(gm, weight, lambda w: w * 0.1)
    assert isinstance(graph_tools.held(later, promised), Promised)
    assert torch.equal(graph_tools.get_tensor(later, promised), graph_tools.get_tensor(now, node))


def test_one_expert_is_made_of_what_it_comes_from() -> None:
    """A stack of matrices, turned, split, and permuted by an order for each expert."""
    matrices = [[counted((4, 6)) for _ in range(2)] for _ in range(5)]
    whole = promises.Stacked([[promise for promise, _ in each] for each in matrices])
    value = torch.stack([torch.cat([promise.whole() for promise, _ in each]) for each in matrices])
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    u = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    now, node = graph_of(value)
    later, promised = graph_of(Promised(whole))
    found = []
    for gm, weight in ((now, node), (later, promised)):
        graph_tools.change_rows(gm, weight, lambda w: w @ u)
        half = graph_tools.derive_tensor(
            gm, weight, "middle", lambda w: w[..., 2:5, :], (5, 3, 6), "test", of_experts=True
        )
        graph_tools.change_experts(
            gm, half, lambda w, i: torch.stack([a[:, b] for a, b in zip(w, order[i], strict=True)])
        )
        found.append(half)
    for _, reads in (one for each in matrices for one in each):
        reads.clear()
    third = graph_tools.rows_of(graph_tools.held(later, found[1]), torch.tensor([3]))
    assert torch.equal(third, graph_tools.get_tensor(now, found[0])[3:4])
    assert [len(reads) for each in matrices for _, reads in each] == [0] * 6 + [1, 1] + [0] * 2
    assert torch.equal(graph_tools.get_tensor(later, found[1]), graph_tools.get_tensor(now, found[0]))


def test_experts_that_no_token_chose_are_not_made(monkeypatch) -> None:
    monkeypatch.setattr(promises, "TABLE", 1)
    promise, reads = counted((5, 3, 4))
    value, x = promise.whole(), torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(1))
    reads.clear()
    indices = torch.tensor([[1], [3]])
    found = ops.expert_linear(x, Promised(promise), indices)
    assert reads == [(1, 2), (3, 4)]
    assert torch.equal(found, ops.expert_linear(x, value, indices))


def test_shape_is_known_and_nothing_is_read() -> None:
    promise, reads = counted((10, 4))
    gm, weight = graph_of(Promised(promise))
    other = graph_tools.derive_tensor(gm, weight, "first", lambda w: w[:5], (5, 4), "test")
    held = graph_tools.held(gm, other)
    assert (tuple(held.shape), held.dtype, held.device.type, held.nbytes) == ((5, 4), torch.float32, "cpu", 80)
    assert isinstance(copy.deepcopy(gm).w, Promised) and isinstance(graph_tools.snapshot(gm).w, Promised)
    assert reads == []


def test_an_operator_makes_what_it_meets() -> None:
    promise, reads = counted((10, 4))
    weight, x = Promised(ChangedRows(promise, lambda w: w * 2)), torch.ones(3, 4)
    assert torch.equal(torch.ops.aten.linear.default(x, weight), x @ (promise.whole() * 2).mT)
    assert reads == [(0, 10), (0, 10)]


def test_values_are_let_go() -> None:
    promise, _ = counted((64, 16))
    promises.ledger.reset()
    before = promises.ledger.held
    value = Promised(promise).make()
    assert promises.ledger.made == 1 and promises.ledger.held == before + value.nbytes
    del value
    assert promises.ledger.held == before


def test_what_several_come_from_is_made_once() -> None:
    promise, reads = counted((8, 6))
    gm, weight = graph_of(Promised(promise))
    parts = [
        graph_tools.derive_tensor(
            gm, weight, f"part{i}", lambda w, i=i: w[:, 3 * i : 3 * i + 3].clone(), (8, 3), "test"
        )
        for i in range(2)
    ]
    with promises.keeping():
        values = [graph_tools.get_tensor(gm, part) for part in parts]
        assert len(reads) == 1
        graph_tools.get_tensor(gm, parts[0])  # all that come from it were made: it was let go
    assert len(reads) == 2 and torch.equal(torch.cat(values, 1), promise.whole())
    reads.clear()
    with promises.keeping(until_end=True):
        for _ in range(2):
            for part in parts:
                graph_tools.get_tensor(gm, part)
    assert len(reads) == 1


@pytest.mark.parametrize(("experts", "changes"), [(5, 5), (2, 2 + 2 * 3)])
def test_an_expert_that_several_ask_for_is_made_once_while_there_is_room(
    monkeypatch, experts: int, changes: int
) -> None:
    """experts: how many there is room for."""
    monkeypatch.setattr(promises, "HELD_ROWS", experts * 4 * 6 * 4)
    value, turned = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0)), []
    gm, weight = graph_of(Promised(in_memory(value)))
    graph_tools.change_rows(gm, weight, lambda w: (turned.append(len(w)), w * 2)[1])
    parts = [
        graph_tools.derive_tensor(gm, weight, f"part{i}", lambda w, i=i: w[..., 3 * i : 3 * i + 3].clone(), (5, 4, 3), "test", True)
        for i in range(2)
    ]  # fmt: skip
    with promises.keeping():
        found = [
            torch.cat([graph_tools.rows_of(graph_tools.held(gm, part), torch.tensor([e])) for e in range(5)])
            for part in parts
        ]
    assert torch.equal(torch.cat(found, -1), value * 2)
    assert len(turned) == changes


def test_wide_rows_are_fewer_at_a_time() -> None:
    promise, reads = counted((5, promises.PIECE // 8))
    assert [len(piece) for piece in promise.pieces()] == [2, 2, 1] and reads == [(0, 2), (2, 4), (4, 5)]


def test_a_value_is_written_piece_by_piece(tmp_path) -> None:
    promise, reads = counted((9000, 3))
    changed = ChangedRows(promise, lambda w: w + 1)
    assert torch.equal(promises.written(changed, tmp_path / "w.bin"), (promise.whole().double() + 1).float())
    assert reads[:3] == [(0, 4096), (4096, 8192), (8192, 9000)]
    turned = Changed(in_memory(torch.arange(6.0).reshape(2, 3)), lambda w: w.t().contiguous(), (3, 2))
    assert promises.written(turned, tmp_path / "t.bin").tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


def table(monkeypatch, rows: int = 9000) -> tuple[Promised, torch.Tensor, list[tuple[int, int]]]:
    """A promise that counts as a table, its value, and what was read of it."""
    monkeypatch.setattr(promises, "TABLE", 1)
    promise, reads = counted((rows, 4))
    changed = ChangedRows(promise, lambda w: w @ torch.arange(16.0, dtype=torch.float64).reshape(4, 4))
    value = changed.whole()
    reads.clear()
    promises.ledger.reset()
    return Promised(changed), value, reads


def test_a_lookup_reads_the_rows_it_needs(monkeypatch) -> None:
    weight, value, reads = table(monkeypatch)
    ids = torch.tensor([[7, 3], [7, 8999]])
    assert torch.equal(torch.ops.aten.embedding.default(weight, ids), value[ids])
    assert reads == [(3, 4), (7, 8), (8999, 9000)]
    assert promises.ledger.most - promises.ledger.held <= 2 * 3 * 4 * 4


def test_a_product_with_a_table_holds_a_piece_at_a_time(monkeypatch) -> None:
    weight, value, reads = table(monkeypatch)
    x, bias = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)), torch.arange(9000.0)
    held = promises.ledger.held
    found = torch.ops.aten.linear.default(x, weight, bias)
    assert reads == [(0, 4096), (4096, 8192), (8192, 9000)]
    assert promises.ledger.most - held <= 2 * 4096 * 4 * 4  # the next is made while the last is still named
    torch.testing.assert_close(found, torch.nn.functional.linear(x, value, bias))


def test_a_product_with_a_table_in_the_dtype_of_its_input(monkeypatch) -> None:
    weight, value, _ = table(monkeypatch)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(weight.promise.times(x), torch.nn.functional.linear(x, value.bfloat16()))


def test_a_product_of_few_rows_goes_around_the_change() -> None:
    """y = (x T^-1) W^T in place of x (W T^-T)^T, and no matrix is made but the one that they come from."""
    generator = torch.Generator().manual_seed(2)
    of, reads = counted((6, 8))
    s = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    made: list[str] = []

    def scaled(w: torch.Tensor) -> torch.Tensor:
        made.append("rows")
        return w * s

    def turned(w: torch.Tensor) -> torch.Tensor:
        made.append("whole")
        return w.flip(0)

    rows = ChangedRows(of, scaled, promises.Around(before=lambda x: x * s))
    weight = Promised(Changed(rows, turned, around=promises.Around(after=lambda y: y.flip(-1))))
    few, many = torch.randn(5, 8, generator=generator), torch.randn(8, 8, generator=generator)
    few.requires_grad_()
    found = torch.ops.aten.linear.default(few, weight)
    gradient = torch.randn(5, 6, generator=generator)
    found.backward(gradient)
    assert not made and reads == [(0, 6)] * 2
    torch.testing.assert_close(found.detach(), few.detach() @ weight.make().T)
    torch.testing.assert_close(few.grad, gradient @ weight.make())
    made.clear()
    found = torch.ops.aten.linear.default(many, weight)
    assert made == ["rows", "whole"]
    torch.testing.assert_close(found, many @ weight.make().T)


def test_only_a_head_is_a_table(monkeypatch, captured) -> None:
    """Weights of blocks are made whole: each is read by every batch, and a piece at a time each would be made again for every one."""
    monkeypatch.setattr(promises, "TABLE", 1)
    gm = captured("llama").graph_module
    heads = [node.name for node in gm.graph.nodes if graph_tools.is_head(node)]
    assert len(heads) == 1
    for node in gm.graph.find_nodes(op="get_attr"):
        graph_tools.set_tensor(gm, str(node.target), Promised(in_memory(graph_tools.get_tensor(gm, node))))
    tables = {
        str(node.target)
        for node in gm.graph.find_nodes(op="get_attr")
        if isinstance(graph_tools.run_node(gm, node, {}), Promised)
    }
    readers = {
        user.name
        for name in tables
        for node in gm.graph.find_nodes(op="get_attr")
        if node.target == name
        for user in node.users
    }
    assert heads[0] in readers and all("embedding" in name or name in heads for name in readers)


def test_gradients_go_through_a_table(monkeypatch) -> None:
    weight, value, _ = table(monkeypatch)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.ops.aten.linear.default(ours, weight).square().sum().backward()
    torch.nn.functional.linear(theirs, value).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)  # sums of 9,000 terms


def test_a_graph_makes_no_table_for_lookups_and_products(monkeypatch) -> None:
    weight, value, _ = table(monkeypatch, 20000)
    graph, before = Graph(), promises.ledger.held
    ids, held = graph.placeholder("ids"), graph.create_node("get_attr", "w")
    rows = graph.call_function(graph_tools.aten.embedding.default, (held, ids))
    logits = graph.call_function(graph_tools.aten.linear.default, (rows, held))
    graph.output((logits,))
    gm = GraphModule({"w": weight}, graph)
    env = {ids: torch.tensor([[4, 2]])}
    found = graph_tools.evaluate(gm, logits, env)
    assert isinstance(env[held], Promised) and promises.ledger.most - before < value.nbytes / 2
    torch.testing.assert_close(found, value[env[ids]] @ value.mT)
    turned = graph.call_function(graph_tools.aten.t.default, (held,))
    assert torch.equal(graph_tools.evaluate(gm, turned, {}), value.mT)  # who needs all of it gets it
