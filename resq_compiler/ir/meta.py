"""Facts attached to graph nodes. The only file that spells the keys of `node.meta`.

Values are frozen dataclasses: copies of a graph share them, so they must not change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from torch.fx import Node

from resq_compiler.errors import VerifyError

RARE = "rare"  # marks a field of a fact that is written only where it says something
VALUE = "val"  # torch.fx's own key for the fake value of a node; read it through values.py


@dataclass(frozen=True)
class Origin:
    """Where a node came from: the module that made it in the original model, and the pass that made this node."""

    key: ClassVar[str] = "resq.origin"
    module: str = ""
    made_by: str = "capture"


@dataclass(frozen=True)
class LinearSite:
    """A linear of the original model. `role` is q, k, v, o, up, gate, down, router or head; found by dataflow.

    Of latent attention: q_a and kv_a make compressed vectors, of which q_b, k_b and v_b make queries, keys and values; k_rope makes the
    rotary columns of keys, q_rope or q_b_rope those of queries.
    """

    key: ClassVar[str] = "resq.linear"
    name: str
    role: str
    block: int | None


@dataclass(frozen=True)
class LinearPart:
    """One of the same-precision pieces of linear `site`: columns start:stop (of each of `heads` heads for o); 16 bits = float.

    expert_bits: of the weights of each expert, where these differ; weight_bits is the most of them.
    """

    key: ClassVar[str] = "resq.part"
    site: LinearSite
    index: int
    start: int
    stop: int
    weight_bits: int
    activation_bits: int
    heads: int = 1
    expert_bits: tuple[int, ...] | None = field(default=None, metadata={RARE: True})

    @property
    def mean_weight_bits(self) -> float:
        """Of its weights, those of all experts."""
        return self.weight_bits if self.expert_bits is None else sum(self.expert_bits) / len(self.expert_bits)

    @property
    def weight_bits_text(self) -> str:
        """Such as 4, or 2-6 where experts differ."""
        return str(self.weight_bits) if self.expert_bits is None else f"{min(self.expert_bits)}-{self.weight_bits}"

    def bits_of(self, expert: int) -> int:
        """Of the weights of an expert; of other linears, of all weights."""
        return self.weight_bits if self.expert_bits is None else self.expert_bits[expert]


@dataclass(frozen=True)
class WeightNoise:
    """What rounding did to the weight of a linear part: Frobenius norm of the change over that of the weight."""

    key: ClassVar[str] = "resq.weight_noise"
    relative: float


@dataclass(frozen=True)
class Projection:
    """An orthogonal change of basis: U_A, U_B, U_C, U_D, or U_L of compressed vectors; U_A has no block.

    `inverse` marks the transposed one; `online`: never fused.
    """

    key: ClassVar[str] = "resq.projection"
    basis: str
    inverse: bool = False
    online: bool = False
    block: int | None = None


@dataclass(frozen=True)
class QuantizerSite:
    """A place where values become integers: the input of linears, or a cache entry. `name` is stable across compiles."""

    key: ClassVar[str] = "resq.quantizer"
    name: str
    kind: str  # "activation" or "kv"
    block: int | None
    bits: int


Fact = TypeVar("Fact")


def get(node: Node, fact: type[Fact]) -> Fact | None:
    """The fact of that type on the node, or None."""
    return node.meta.get(key_of(fact))


def require(node: Node, fact: type[Fact]) -> Fact:
    """The fact of that type on the node. Raises VerifyError: it is not there."""
    found = get(node, fact)
    if found is None:
        raise VerifyError(
            f"node {node.name}: expected the fact {fact.__name__}, which no pass has put there: {node.format_node()}",
            node=node.name,
        )
    return found


def key_of(fact: Any) -> str:
    """The key of a kind of fact."""
    return fact.key


def to_dict(fact: Any) -> dict[str, Any]:
    """All fields of a fact, but those that most nodes have nothing to say in."""
    rare = {each.name for each in fields(fact) if each.metadata.get(RARE)}
    return {name: value for name, value in asdict(fact).items() if value is not None or name not in rare}


def put(node: Node, value: object) -> Node:
    """Attach a fact; returns the node."""
    node.meta[key_of(value)] = value
    return node


def facts(node: Node) -> list[object]:
    """All facts on the node, for dumps."""
    return [value for key, value in sorted(node.meta.items()) if key.startswith("resq.")]
