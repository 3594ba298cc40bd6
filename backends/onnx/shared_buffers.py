"""A session of profile `native` whose cache is written in place: past and present of an entry are one buffer with room to grow.

ONNX Runtime binds the buffers once; a step gives it ids, mask and positions, and nothing of the past is copied. The weights of a
step have swept the caches of the processor when the next one begins, so that every object touched there waits for memory: what is
bound stays bound, and an input of the same shape as before is written where the last one lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from resq_compiler.backends.onnx.kept_logits import KEEP
from resq_compiler.backends.onnx.session import flushes
from torch import Tensor

from resq_compiler.util.torch_state import denormals

ROOM = 256  # tokens that a fresh cache has room for, and one that has grown behind those it grew for


class BoundSession:
    """Runs a session on buffers uint8 [B, G, capacity, bytes of a packed row], keys and values of every layer in order.

    weights: by name, where the model takes them as inputs; read where they lie.
    """

    def __init__(self, session: Any, weights: Mapping[str, np.ndarray] | None = None):
        self.session = session
        self.entries = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
        self.vocabulary = int(session.get_outputs()[0].shape[2])
        self.keeps = any(i.name == KEEP for i in session.get_overridable_initializers())
        self._flushed = flushes(session)
        self._binding = session.io_binding()
        self._buffers: tuple[Tensor, ...] = ()
        self._inputs: dict[str, np.ndarray] = {}  # what is bound, by name
        for name, array in (weights or {}).items():
            self._binding.bind_ortvalue_input(name, _value(array))

    def run(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, buffers: Sequence[Tensor], keep: int
    ) -> np.ndarray:
        """Logits [B, min(keep, S), vocabulary] of the last `keep` tokens (0: all S); buffers have room for all that mask counts."""
        self._bind(buffers)
        self._give("input_ids", ids)
        self._give("attention_mask", mask)
        self._give("position_ids", positions)
        if self.keeps:
            self._give(KEEP, np.array([keep]))
        batch, binding = len(ids), self._binding
        if keep != 1 or not self.keeps:
            binding.bind_output("logits")  # the declared shape has one position, so ONNX Runtime makes the tensor
            self._run()
            return binding.get_outputs()[-1].numpy()[:, -keep:]
        logits = np.empty((batch, 1, self.vocabulary), np.float32)
        binding.bind_ortvalue_output("logits", _value(logits))
        self._run()
        return logits

    def _run(self) -> None:
        with denormals(self._flushed):
            self.session.run_with_iobinding(self._binding)

    def _give(self, name: str, value: np.ndarray) -> None:
        bound = self._inputs.get(name)
        if bound is not None and bound.shape == value.shape:
            bound[...] = value
            return
        self._inputs[name] = bound = np.array(value, np.int64)
        self._binding.bind_ortvalue_input(name, _value(bound))

    def _bind(self, buffers: Sequence[Tensor]) -> None:
        if buffers is self._buffers:
            return
        if len(self._buffers) == len(buffers) and all(a is b for a, b in zip(self._buffers, buffers, strict=True)):
            return
        self._buffers = tuple(buffers)
        for entry, buffer in zip(self.entries, buffers, strict=True):
            value = _value(buffer.numpy())
            self._binding.bind_ortvalue_input(entry.name, value)
            self._binding.bind_ortvalue_output(entry.name.replace("past_key_values.", "present."), value)

    def buffer(self, index: int, batch: int, capacity: int) -> Tensor:
        """The buffer of an entry for a batch that has seen no token."""
        entry = self.entries[index]
        return torch.empty(batch, entry.shape[1], capacity, entry.shape[3], dtype=torch.uint8)

    def buffers(self, batch: int, capacity: int) -> tuple[Tensor, ...]:
        """The buffers of all entries."""
        return tuple(self.buffer(i, batch, capacity) for i in range(len(self.entries)))


def _value(array: np.ndarray) -> Any:
    """An OrtValue over the memory of an array, which it keeps alive."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


class GrowingCache:
    """The cache of one batch while it generates."""

    def __init__(self, bound: BoundSession, batch: int):
        self.bound = bound
        self.buffers = bound.buffers(batch, ROOM)
        self.capacity, self.length = ROOM, 0

    def step(self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Append the tokens ids [B, S]; logits of the last one, [B, vocabulary]."""
        self._reserve(self.length + ids.shape[1])
        self.length += ids.shape[1]
        return self.bound.run(ids, mask, positions, self.buffers, 1)[:, -1]

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        self.capacity = max(tokens + ROOM, 2 * self.capacity)
        larger = self.bound.buffers(len(self.buffers[0]), self.capacity)
        for new, old in zip(larger, self.buffers, strict=True):
            new[:, :, : self.length] = old[:, :, : self.length]
        self.buffers = larger
