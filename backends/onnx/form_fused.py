"""Norms, rotary embedding and attention as the operators of opset 23, where the graph allows them; the cache's codes in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from resq_compiler.backends.onnx.forms import Form, repeats_half
from resq_compiler.backends.onnx.images import parts_image
from resq_compiler.backends.onnx.values import Cache, Emitted, PendingCodes, Value
from torch.fx import Node

from resq_compiler.errors import BackendError
from resq_compiler.ir import values
from resq_compiler.ir.views import Attention, QuantizeDequantize

if TYPE_CHECKING:
    from resq_compiler.backends.onnx.lowering import Lowering


class FusedForm(Form):
    """RMSNormalization, RotaryEmbedding and Attention."""

    opset: ClassVar[int] = 23

    def cache_codes(self, low: Lowering, view: QuantizeDequantize, value: Value) -> Emitted:
        """Put off until attention, which has the other entry too."""
        return PendingCodes(view, value)

    def settled(self, low: Lowering, value: Emitted) -> Emitted:
        if not isinstance(value, PendingCodes):
            return value
        return low.once(("settled", value.view.node), lambda: self._entries(low, value.view, value.value))

    def _entries(self, low: Lowering, view: QuantizeDequantize, value: Value) -> Value:
        """The image of cache codes; `value` may hold the heads of keys and values."""
        if view.clip == 1.0:
            return Value(parts_image(low, low.by_head(value), view.parts), value.heads, split=True, by_head=True)
        image = super().cache_codes(low, view, value)
        assert isinstance(image, Value)
        return image

    def append(self, low: Lowering, past: Emitted, new: Node, present: str, heads: int, width: int) -> Emitted:
        value = low.value(new)
        if isinstance(value, PendingCodes) and isinstance(past, Value):
            return Cache(past.name, value, present, heads, width)
        return super().append(low, past, new, present, heads, width)

    def rms_norm(self, low: Lowering, x: str, gain: str, eps: float) -> str:
        return low.b.op("RMSNormalization", x, gain, axis=-1, epsilon=eps)

    def rope(self, low: Lowering, value: Value, cos: Node, sin: Node, width: int) -> Value:
        """RotaryEmbedding on [B, S, heads * D], with the half tables of the graph: no limit on positions."""
        turn = values.width(cos)
        if not (repeats_half(cos) and repeats_half(sin)):
            return super().rope(low, value, cos, sin, width)
        tables = [self._half_table(low, t, turn // 2) for t in (cos, sin)]
        partial = turn if turn < width else 0  # 0: all columns turn
        y = low.b.op("RotaryEmbedding", low.tokens(value), *tables, num_heads=value.heads, rotary_embedding_dim=partial)
        return Value(y, value.heads, split=True)

    @staticmethod
    def _half_table(low: Lowering, node: Node, half: int) -> str:
        """cos or sin [B, 1, S, 2 half] as [B, S, half]."""

        def make() -> str:
            first = low.b.op("Slice", low.exact(node), low.b.ints(0), low.b.ints(half), low.b.ints(-1))
            return low.b.op("Squeeze", first, low.b.ints(1))

        return low.once(("half table", node), make)

    def attention(self, low: Lowering, view: Attention) -> Value:
        """The Attention operator, which also appends to the cache, when nothing else reads the cache here."""
        keys, entries = low.value(view.k), low.value(view.v)
        own = attention_readers(view.k) == 1 == attention_readers(view.v)
        caches = isinstance(keys, Cache) and isinstance(entries, Cache)
        plain = view.softcap is None and view.sinks is None
        if not (own and caches and plain) or view.mask is None:
            return super().attention(low, view)
        assert isinstance(keys, Cache) and isinstance(entries, Cache)
        queries = low.token_major(view.q)
        new = (low.tokens(x) for x in self._new_entries(low, keys.new, entries.new))
        y, new_keys, new_values = low.b.several(
            "Attention", low.tokens(queries), *new, self.bias(low, view.mask), keys.past, entries.past,
            outputs=[low.b.fresh("attention"), keys.present, entries.present],
            q_num_heads=queries.heads, kv_num_heads=keys.heads, scale=view.scale,
        )  # fmt: skip
        low.memo["present", keys.present], low.memo["present", entries.present] = new_keys, new_values
        return Value(y, queries.heads, split=True)

    def _new_entries(
        self, low: Lowering, keys: Value | PendingCodes, entries: Value | PendingCodes
    ) -> tuple[Value, Value]:
        """Keys and values of the new tokens; quantized in one go, as heads side by side, where they are alike."""
        if not (isinstance(keys, PendingCodes) and isinstance(entries, PendingCodes) and are_alike(keys, entries)):
            return self._settled_value(low, keys), self._settled_value(low, entries)
        heads = keys.value.heads
        both = low.b.op("Concat", low.by_head(keys.value), low.by_head(entries.value), axis=2)
        image = self._entries(low, keys.view, Value(both, 2 * heads, split=True, by_head=True))
        width = heads * values.width(keys.view.node)
        first, second = low.b.split(low.tokens(image), [width, width])
        return Value(first, heads, split=True), Value(second, heads, split=True)

    def _settled_value(self, low: Lowering, value: Value | PendingCodes) -> Value:
        settled = self.settled(low, value)
        if not isinstance(settled, Value):
            raise BackendError(f"onnx: expected new keys or values as one tensor, got {settled}")
        return settled


def are_alike(keys: PendingCodes, entries: PendingCodes) -> bool:
    """Whether one quantizer can do both."""
    first, second = keys.view, entries.view
    return (first.parts, first.clip, keys.value.heads) == (second.parts, second.clip, entries.value.heads)


def attention_readers(node: Node) -> int:
    """How many attention operators read a cache entry."""
    return sum(Attention.of(user) is not None for user in node.users)
