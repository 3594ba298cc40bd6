"""The shared library of kernels: where it is, its functions, and how units of work are shared among threads."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from resq_compiler.errors import BackendError

VERSION = 9
MAX_PARTS = 4
MAX_FACTORS = 6
MAX_HEAD = 256
MAX_ENTRY = 1024
MAX_COLUMNS = 65536
POINTER, INT64, INT32, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Part(ctypes.Structure):
    """rk_part."""

    _fields_ = [("width", INT64), ("groups", INT32), ("bits", INT32), ("clip", FLOAT)]


class LinearPart(ctypes.Structure):
    """rk_linear_part."""

    _fields_ = [("part", Part), ("weight_bits", INT32), ("x", POINTER), ("weight", POINTER)]


class MixedLinearArgs(ctypes.Structure):
    """rk_mixed_linear_args."""

    _fields_ = [
        ("rows", INT64), ("channels", INT64), ("parts", INT32), ("part", LinearPart * MAX_PARTS),
        ("scale", POINTER), ("zero_point", POINTER), ("weight_scale", POINTER), ("weight_sum", POINTER), ("bias", POINTER),
        ("residual", POINTER), ("residual_stride", INT64), ("y", POINTER), ("y_stride", INT64),
    ]  # fmt: skip


class GroupedLinearArgs(ctypes.Structure):
    """rk_grouped_linear_args."""

    _fields_ = [
        ("linear", MixedLinearArgs), ("groups", INT64), ("expert", POINTER), ("first_row", POINTER), ("weight_at", POINTER),
        ("weight_bits", POINTER),
    ]  # fmt: skip


class CombinedLinearArgs(ctypes.Structure):
    """rk_combined_linear_args."""

    _fields_ = [("grouped", GroupedLinearArgs), ("tokens", INT64), ("token", POINTER), ("share", POINTER)]


class CodesOut(ctypes.Structure):
    """rk_codes."""

    _fields_ = [
        ("parts", INT32), ("part", Part * MAX_PARTS), ("rows", POINTER * MAX_PARTS), ("scale", POINTER), ("zero_point", POINTER),
    ]  # fmt: skip


class NormQuantizeArgs(ctypes.Structure):
    """rk_norm_quantize_args."""

    _fields_ = [
        ("rows", INT64), ("x", POINTER), ("x_stride", INT64), ("norm", INT32), ("epsilon", FLOAT), ("weight", POINTER),
        ("bias", POINTER), ("out", CodesOut),
    ]  # fmt: skip


class Transform(ctypes.Structure):
    """rk_transform."""

    _fields_ = [
        ("blocks", INT64),
        ("factors", INT32),
        ("order", INT32 * MAX_FACTORS),
        ("factor", POINTER * MAX_FACTORS),
    ]


class HadamardQuantizeArgs(ctypes.Structure):
    """rk_hadamard_quantize_args."""

    _fields_ = [
        ("rows", INT64), ("gate", POINTER), ("up", POINTER), ("gate_stride", INT64), ("up_stride", INT64), ("activation", INT32),
        ("limit", FLOAT), ("slope", FLOAT), ("transform", Transform * MAX_PARTS), ("out", CodesOut),
    ]  # fmt: skip


class Head(ctypes.Structure):
    """rk_head."""

    _fields_ = [("low", INT32), ("high", INT32), ("low_bits", INT32), ("high_bits", INT32)]


class RopeCacheArgs(ctypes.Structure):
    """rk_rope_cache_args."""

    _fields_ = [
        ("batch", INT64), ("tokens", INT64), ("heads", INT64), ("kv_heads", INT64), ("q", POINTER), ("k", POINTER), ("v", POINTER),
        ("q_stride", INT64), ("k_stride", INT64), ("v_stride", INT64), ("cos", POINTER), ("sin", POINTER), ("rotary", INT64),
        ("rotary_batch_stride", INT64), ("basis", POINTER), ("bases", INT64), ("q_norm", POINTER), ("k_norm", POINTER),
        ("epsilon", FLOAT), ("clip", FLOAT), ("key", Head), ("value", Head), ("key_cache", POINTER), ("value_cache", POINTER),
        ("capacity", INT64), ("start", POINTER), ("q_out", POINTER),
    ]  # fmt: skip


class CacheImageArgs(ctypes.Structure):
    """rk_cache_image_args."""

    _fields_ = [
        ("batch", INT64), ("heads", INT64), ("tokens", INT64), ("total", INT64), ("x", POINTER), ("head", Head), ("clip", FLOAT),
        ("cache", POINTER), ("capacity", INT64), ("start", POINTER), ("out", POINTER),
    ]  # fmt: skip


class AttentionArgs(ctypes.Structure):
    """rk_attention_args."""

    _fields_ = [
        ("batch", INT64), ("tokens", INT64), ("heads", INT64), ("kv_heads", INT64), ("q", POINTER), ("key", Head), ("value", Head),
        ("key_cache", POINTER), ("value_cache", POINTER), ("capacity", INT64), ("start", POINTER), ("mask", POINTER),
        ("mask_stride", INT64), ("scale", FLOAT), ("softcap", FLOAT), ("window", INT64), ("sinks", POINTER),
        ("slopes", POINTER), ("prefix", INT64), ("prefix_keys", POINTER), ("prefix_values", POINTER), ("scratch", POINTER),
        ("out", POINTER), ("codes", CodesOut),
    ]  # fmt: skip


class CacheCodesArgs(ctypes.Structure):
    """rk_cache_codes_args."""

    _fields_ = [
        ("batch", INT64), ("heads", INT64), ("tokens", INT64), ("total", INT64), ("x", POINTER), ("head", Head), ("clip", FLOAT),
        ("cache", POINTER), ("capacity", INT64), ("start", POINTER), ("out", CodesOut),
    ]  # fmt: skip


class LatentAttentionArgs(ctypes.Structure):
    """rk_latent_attention_args."""

    _fields_ = [
        ("batch", INT64), ("tokens", INT64), ("heads", INT64), ("own", INT64), ("values", INT64), ("q", POINTER), ("latent", Head),
        ("rotary", Head), ("latent_cache", POINTER), ("rotary_cache", POINTER), ("capacity", INT64), ("start", POINTER),
        ("mask", POINTER), ("mask_stride", INT64), ("scale", FLOAT), ("parts", INT32), ("part", LinearPart * MAX_PARTS),
        ("weight_scale", POINTER), ("expanded", POINTER), ("total", INT64), ("out", POINTER),
    ]  # fmt: skip


KERNELS: dict[str, type[ctypes.Structure]] = {
    "mixed_linear": MixedLinearArgs,
    "grouped_linear": GroupedLinearArgs,
    "combined_linear": CombinedLinearArgs,
    "norm_quantize": NormQuantizeArgs,
    "hadamard_quantize": HadamardQuantizeArgs,
    "rope_cache": RopeCacheArgs,
    "cache_image": CacheImageArgs,
    "cache_codes": CacheCodesArgs,
    "attention": AttentionArgs,
    "latent_attention": LatentAttentionArgs,
}
"""Every kernel with the type of its arguments."""


class Library:
    """A loaded library. Kernels are called by name with their argument structure.

    Raises: BackendError: the file cannot be loaded, or is of another version.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            _check_whole(path)
            self._functions = ctypes.CDLL(str(path))
        except OSError as e:
            raise BackendError(
                f"cpu kernels: {path} cannot be loaded ({e}); install again: pip install ./kernels"
            ) from e
        try:
            found = self._functions.rk_version()
            self._declare()
        except AttributeError as e:
            raise BackendError(
                f"cpu kernels: {path} lacks a function ({e}); install again: pip install ./kernels"
            ) from e
        if found != VERSION:
            raise BackendError(
                f"cpu kernels: {path} has interface version {found}, expected {VERSION}; install again: pip install ./kernels"
            )

    def _declare(self) -> None:
        functions = self._functions
        functions.rk_instruction_set.restype = ctypes.c_char_p
        functions.rk_row_bytes.restype = functions.rk_tile_bytes.restype = INT64
        functions.rk_row_bytes.argtypes = [ctypes.POINTER(Part)]
        functions.rk_tile_bytes.argtypes = [ctypes.POINTER(Part), INT32]
        scratch = functions.rk_attention_scratch
        scratch.argtypes, scratch.restype = [ctypes.POINTER(AttentionArgs)], INT64
        functions.rk_latent_expands.argtypes = [ctypes.POINTER(LatentAttentionArgs)]
        for name, arguments in KERNELS.items():
            units, kernel = (getattr(functions, f"rk_{name}{end}") for end in ("_units", ""))
            units.argtypes, units.restype = [ctypes.POINTER(arguments)], INT64
            kernel.argtypes, kernel.restype = [ctypes.POINTER(arguments), INT64, INT64], None

    def instruction_sets(self) -> dict[str, bool]:
        """Those compiled in, best first, and whether this processor has them."""
        found: dict[str, bool] = {}
        while (name := self._functions.rk_instruction_set(len(found))) is not None:
            found[name.decode()] = bool(self._functions.rk_supported(len(found)))
        return found

    @property
    def selected(self) -> str:
        """The instruction set in use."""
        return list(self.instruction_sets())[self._functions.rk_selected()]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Within it, kernels of another instruction set. Raises BackendError: not compiled in, or the processor lacks it."""
        sets, before = list(self.instruction_sets()), self._functions.rk_selected()
        if name not in sets or self._functions.rk_select(sets.index(name)):
            able = [each for each, supported in self.instruction_sets().items() if supported]
            raise BackendError(f"cpu kernels: instruction set {name!r} cannot be used here; choose one of {able}")
        try:
            yield
        finally:
            self._functions.rk_select(before)

    def row_bytes(self, width: int, groups: int) -> int:
        """Bytes of one row of activations of a part."""
        return self._functions.rk_row_bytes(Part(width, groups, 8, 1.0))

    def tile_bytes(self, width: int, groups: int, weight_bits: int) -> int:
        """Bytes of 64 output channels of a part's weights."""
        return self._functions.rk_tile_bytes(Part(width, groups, 8, 1.0), weight_bits)

    def attention_scratch(self, arguments: AttentionArgs) -> int:
        """Bytes of scratch with which attention can be shared among more threads."""
        return self._functions.rk_attention_scratch(arguments)

    def latent_expands(self, arguments: LatentAttentionArgs) -> bool:
        """Whether making keys and values of all tokens is less work than turning queries."""
        return bool(self._functions.rk_latent_expands(arguments))

    def run(self, name: str, arguments: ctypes.Structure, threads: int = 1) -> None:
        """Compute all units of a kernel, in as many equal pieces as threads; the result does not depend on their number."""
        kernel = getattr(self._functions, f"rk_{name}")
        units = getattr(self._functions, f"rk_{name}_units")(arguments)
        threads = max(1, min(threads, units))
        if threads == 1:
            kernel(arguments, 0, units)
            return
        edges = [units * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda i: kernel(arguments, edges[i], edges[i + 1]), range(threads)))


MACHINES = {62: "x86_64", 183: "aarch64"}  # of ELF files


def _check_whole(path: Path) -> None:
    """Raise OSError when an ELF file is cut short, which would end the process that loads it, or of another machine. Its section
    table comes last."""
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, 2)
    if header[:5] == b"\x7fELF\x02":  # 64 bits
        (kind,), machine = struct.unpack_from("<H", header, 18), platform.machine().lower()
        if MACHINES.get(kind, machine) != {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine):
            raise OSError(f"it was built for {MACHINES[kind]}, this machine is {machine}")
        (offset,), (entry, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        if size < offset + entry * count:
            raise OSError(f"the file is cut short: {size} bytes of {offset + entry * count}")


def unavailable() -> str | None:
    """None when the kernels are installed, else what is missing and what to do. Never raises."""
    if importlib.util.find_spec("resq_kernels") is None:
        return "the CPU kernels are not installed: pip install ./kernels (needs a C compiler, or fetches ziglang)"
    return None


@lru_cache(maxsize=1)
def library() -> Library:
    """The installed library. Raises BackendError: there is none, or it cannot be used."""
    reason = unavailable()
    if reason is not None:
        raise BackendError(f"cpu kernels: {reason}")
    import resq_kernels

    return Library(resq_kernels.LIBRARY)


def description() -> str:
    """The instruction set that the kernels would use here, or why there are none. Never raises."""
    try:
        return library().selected
    except BackendError as e:
        return str(e).removeprefix("cpu kernels: ")
