"""What the CPU kernels compute, in PyTorch: attention multiplies the cache's codes with codes of queries and of softmax weights."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from unittest import mock

import torch
from resq_compiler.backends.cpu.target import CPU
from resq_compiler.backends.fused import operators
from resq_compiler.backends.fused.formats import HeadParts
from resq_compiler.backends.fused.torch_kernels import TorchKernels, _visible, _with_slopes
from torch import Tensor

from resq_compiler.ir import ops
from resq_compiler.model.compiled_model import CompiledModel

ONE_TILE = 64
"""Up to so many keys are one tile, in one piece."""


def coded_queries(q: Tensor, parts: HeadParts) -> Tensor:
    """Signed codes of 8 bits, a scale for each part."""
    pieces = []
    for _, first, last in parts.spans:
        piece = q[..., first:last]
        largest = piece.abs().amax(-1, keepdim=True)
        pieces.append(torch.round(piece * (127 / largest)).nan_to_num(0.0) * (largest / 127))
    return torch.cat(pieces, -1)


def coded_weights(p: Tensor) -> Tensor:
    """Unsigned codes of 8 bits, a scale for each row."""
    largest = p.amax(-1, keepdim=True)
    return torch.round(p * (255 / largest)).nan_to_num(0.0) * (largest / 255)


class CodedKernels(TorchKernels):
    """The torch form but for these codes. For contexts of one tile. In float64: the closer to the kernels, the fewer weights fall to the
    next code."""

    def _attended(self, q, cache, scores):
        new, group = q.shape[1], q.shape[2] // cache.keys.shape[1]
        total = min(scores.mask.shape[1], int(cache.start.max()) + new)
        assert total <= ONE_TILE
        keys, values, scales = (
            x.repeat_interleave(group, 1)
            for x in (
                self.cache.read(cache.keys, cache.table, cache.key_parts, total),
                self.cache.read(cache.values, cache.table, cache.value_parts, total),
                self._value_scales(cache, total),
            )
        )
        visible = _visible(cache.start, new, scores.mask[:, :total], scores.window)
        queries, count = q.float().transpose(1, 2), 0
        products = coded_queries(queries, cache.key_parts).double() @ keys.double().mT
        if scores.prefix is not None:
            before, count = [x.double().repeat_interleave(group, 1) for x in scores.prefix], scores.prefix[0].shape[2]
            products = torch.cat(((queries.double() @ before[0].mT).expand(*products.shape[:3], -1), products), -1)
        products = products * scores.scale
        if scores.softcap is not None:
            products = torch.tanh(products / scores.softcap) * scores.softcap
        if scores.slopes is not None:
            products = products + _with_slopes(visible, scores.slopes, cache.start)
        seen = visible if scores.prefix is None else ops.see_prefix(visible, count)
        products = products.masked_fill(~seen, -torch.inf)
        if scores.sinks is not None:
            products = torch.cat((products, scores.sinks[:, None, None].double().expand(*products.shape[:3], 1)), -1)
        p = torch.softmax(products, -1).nan_to_num(0.0)[..., : count + total]
        pieces = []
        for i, (_, first, last) in enumerate(cache.value_parts.spans):
            scale = scales[:, :, None, :, i]
            piece = coded_weights(p[..., count:] * scale) @ (values[..., first:last] / scale.mT).double()
            pieces.append(piece if not count else piece + p[..., :count] @ before[1][..., first:last])
        return torch.cat(pieces, -1).transpose(1, 2).float().contiguous()

    def _value_scales(self, cache, total):
        """[B, G, total, parts]: the last bytes of a row."""
        rows = cache.values[:, :, :total, -4 * len(cache.value_parts.spans) :]
        return rows.clone(memory_format=torch.contiguous_format).view(torch.float32)


@contextmanager
def coded_kernels():
    """The CPU kernels that operators call in PyTorch are this form."""
    with mock.patch.object(operators, "find_target", lambda name: dataclasses.replace(CPU, kernels=FORM)):
        yield


def coded(compiled, compute):
    """compute(model) of a compiled model on this form."""
    model = CompiledModel(compiled.result).use_backend("cpu", engine="torch", allow_fallback=True)
    with coded_kernels():
        return compute(model)


FORM = CodedKernels(CPU.codes, CPU.cache)
