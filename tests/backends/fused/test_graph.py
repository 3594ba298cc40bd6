"""The lowered graph is an FX graph like any other: it dumps, exports, is saved, and goes through torch.compile."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from resq_compiler.backends.fused import lower
from torch import Tensor

from resq_compiler.inspection import dump_files
from resq_compiler.ir import graph_tools
from resq_compiler.tiny import tiny_tokens

NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
BLOCK_KERNELS = dict(norm_quantize=2, mixed_linear=4, rope_cache=1, attention_quantize=1, hadamard_quantize=1)


@pytest.fixture(scope="module")
def lowered(compiled, target):
    model = compiled("llama", recipe="resq", weight_method="rtn")
    return lower.lower(graph_tools.snapshot(model.graph_module), target)


@pytest.fixture
def prompt(lowered) -> tuple[Tensor, ...]:
    """Inputs of a prefill of five tokens into a fresh cache."""
    _, _, _, *rest = lower.example_inputs(lowered, past=0)
    return tiny_tokens(2, 5), torch.ones(2, 5, dtype=torch.int64), torch.arange(5).expand(2, 5), *rest


def run(module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the caches it wrote."""
    own = [t.clone() for t in inputs]
    with torch.no_grad():
        logits = module(*own)[0]
    return logits, own[-4:]


def assert_same(ours, expected) -> None:
    # the same kernels on the same operands; what torch computes between them may round differently
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], expected[1], strict=True))


def images(lowered, caches: list[Tensor]) -> list[Tensor]:
    """The keys and values of the prompt, dequantized."""
    parts, cache = [parts for pair in lowered.caches for parts in pair], lowered.target.cache
    table = cache.table(2, cache.capacity(caches[0], 2), torch.device("cpu"))
    return [cache.read(t, table, of, 5) for t, of in zip(caches, parts, strict=True)]


def is_fused(node) -> bool:
    return getattr(node.target, "namespace", "") == "resq"


def test_every_value_has_a_shape(lowered):
    """By the fake implementations: codes of the embedding's width, one scale a part."""
    values = {node.name: node.meta["val"] for node in lowered.graph_module.graph.nodes if node.op == "call_function"}
    low, high, scale, zero_point = values["norm_quantize_default"]
    # 56 and 8 codes: in a byte each, in 28 bytes and 8 padded to 32, or in a byte each with their sum in four bytes behind them
    row_bytes = {"torch": (56, 8), "triton": (32, 32), "cpu": (60, 12)}[lowered.target.name]
    assert (low.shape, high.shape, scale.shape) == ((2, 5, row_bytes[0]), (2, 5, row_bytes[1]), (2, 5, 2))
    assert (low.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.int32)
    assert len(values) == sum(node.op == "call_function" for node in lowered.graph_module.graph.nodes)


def test_fakes_agree_with_kernels(lowered, prompt):
    """Shape, type and strides of every operator's real results are those that its fake implementation says."""

    class Comparing(torch.fx.Interpreter):
        seen = 0

        def run_node(self, n):
            value = super().run_node(n)
            if is_fused(n):
                Comparing.seen += 1
                fake = n.meta["val"]
                pairs = zip(value, fake, strict=True) if isinstance(value, tuple) else [(value, fake)]
                assert all(a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride() for a, b in pairs), (
                    n.format_node()
                )
            return value

    with torch.no_grad():
        Comparing(lowered.graph_module).run(*prompt)
    assert Comparing.seen == 2 * sum(BLOCK_KERNELS.values())


def test_operators_pass_the_library_check(lowered, prompt):
    """torch.library.opcheck: schema (mutation, aliases), fake implementation and AOT dispatch of each kernel, on real operands."""
    checked = set()

    class Checking(torch.fx.Interpreter):
        def run_node(self, n):
            if is_fused(n) and n.target not in checked:
                checked.add(n.target)
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                torch.library.opcheck(n.target, args, kwargs, test_utils=("test_schema", "test_faketensor"))
            return super().run_node(n)

    with torch.no_grad():
        Checking(lowered.graph_module).run(*prompt)
    assert {op._schema.name.partition("::")[2] for op in checked} == set(BLOCK_KERNELS)


def test_it_exports_with_dynamic_shapes_and_is_saved(lowered, prompt, tmp_path):
    dynamic = torch.export.Dim.DYNAMIC
    tokens, rows = {0: dynamic, 1: dynamic}, {0: dynamic}
    # a cache of two pages a sequence: sizes of 1 and equal sizes would become constants
    example = lower.example_inputs(lowered, past=70)
    caches = [rows if lowered.target.name == "triton" else {0: dynamic, 2: dynamic}] * len(lowered.heads)
    shapes = (*[tokens] * (len(example) - len(caches) - 1), rows, *caches)
    exported = torch.export.export(lowered.graph_module, example, dynamic_shapes=shapes, strict=False)
    names = [str(node.target) for node in exported.graph.nodes if is_fused(node)]
    assert len(names) == 2 * sum(BLOCK_KERNELS.values())
    torch.export.save(exported, tmp_path / "lowered.pt2")
    loaded = torch.export.load(tmp_path / "lowered.pt2").module()
    assert_same(run(loaded, prompt), run(lowered.graph_module, prompt))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_it_compiles_without_a_graph_break(lowered, prompt, backend):
    torch._dynamo.reset()
    compiled = torch.compile(lowered.graph_module, backend=backend, fullgraph=True)
    ours, expected = run(compiled, prompt), run(lowered.graph_module, prompt)
    if (
        backend == "inductor"
    ):  # has cosines and sines of its own, so scales differ in their last bits; a moved code would show
        both = ((logits, *images(lowered, caches)) for logits, caches in (ours, expected))
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    else:
        assert_same(ours, expected)


@NEEDS_TRITON
def test_the_dump_of_a_model_has_the_lowered_graph(compiled, sharing, tmp_path):
    model = sharing(compiled("llama", recipe="resq", weight_method="rtn")).use_backend("triton")
    directory = model.dump(tmp_path)
    manifest = dump_files.read_manifest(directory)
    last = manifest["stages"][-1]
    assert last["name"] == "lower-triton" and last["rewrites"] == 2 * sum(BLOCK_KERNELS.values())
    nodes = dump_files.read_stage(directory, last["label"])
    linear = next(n for n in nodes if n["target"] == "mixed_linear")
    assert linear["values"] == [["float32", [2, 5, 128]]]  # q, k and v of one launch
    assert linear["pass"] == "lower-triton" and linear["block"] == 0
    text = (directory / f"{last['label']}.txt").read_text()
    assert "attention_quantize(" in text and "quantized_linear(" not in text
    assert json.loads((directory / "timing.json").read_text())[last["label"]] > 0
    assert model.use_backend("reference").stages[-1].name != "lower-triton"
