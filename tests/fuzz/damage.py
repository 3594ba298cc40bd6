"""Settings of the fuzz tests, and ways to damage a file."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_COMMON = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
FEW, MANY = settings(max_examples=100, **_COMMON), settings(max_examples=2000, **_COMMON)

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.just(10**30), st.floats(allow_subnormal=False), st.text(max_size=8),
    st.sampled_from(["../../x", "aten.add.Tensor", "resq.rope", "float32", "nan"]),
    st.just([]), st.just({}), st.lists(st.integers(-2, 9), max_size=4), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
"""Values to put in the place of others in JSON."""


def damaged(draw, content: bytes) -> bytes:
    """The content of a file, cut off, with other bytes, longer, replaced, or with another value where it is JSON."""
    kind = draw(st.sampled_from(("cut", "bytes", "longer", "other", "json", "json", "json")))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if kind == "longer":
        return content + draw(st.binary(max_size=32))
    if kind == "other":
        return draw(
            st.binary(max_size=64)
            | st.sampled_from([b"", b"[]", b"{}", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 9000])
        )
    if kind == "json" and (changed := _with_another_value(draw, content)) is not None:
        return changed
    changed_bytes = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        if changed_bytes:
            changed_bytes[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(changed_bytes)


def _with_another_value(draw, content: bytes) -> bytes | None:
    """JSON with one value replaced or left out; None for what is no JSON."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    holder, key = [value], 0
    for _ in range(draw(st.integers(0, 7))):  # on the way down, at most
        inner = holder[key]
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not keys:
            break
        holder, key = inner, draw(st.sampled_from(keys))
    if isinstance(holder, dict) and draw(st.booleans()):
        del holder[key]
    else:
        holder[key] = draw(LEAVES)
        if holder is not value and key == 0 and len(holder) == 1 and not isinstance(value, (dict, list)):
            value = holder[0]
    return json.dumps(value).encode()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory by its name."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def put(files: dict[str, bytes], directory: Path) -> Path:
    """The files, written into a directory."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory
