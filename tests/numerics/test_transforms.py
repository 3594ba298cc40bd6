"""transforms.py: every kind against the matrix that it stands for, on both sides of a linear."""

from __future__ import annotations

import pytest
import torch

from resq_compiler.errors import QuantError
from resq_compiler.numerics.rotation import random_rotation
from resq_compiler.numerics.seeds import generator
from resq_compiler.numerics.transforms import (
    BlockRotation,
    HadamardRotation,
    HeadRotation,
    Kronecker,
    Permutation,
    Product,
    Rotation,
    Scaling,
    balanced_factors,
)

WIDTH = 24
FP64 = 1e-12  # float64 products in another order


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def rotation(n, index=0):
    return random_rotation(n, "orthogonal", generator(0, "test", index))


BLOCKS = torch.stack([rotation(6, i) for i in range(4)])
ORDER = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
ROTATION, HEADS = Rotation(rotation(WIDTH)), HeadRotation(BLOCKS)
KINDS = [
    ROTATION, HEADS, BlockRotation(BLOCKS, ORDER), HadamardRotation((WIDTH,)), HadamardRotation((16, 8)), Permutation(ORDER),
    Scaling(draw(WIDTH).abs() + 0.5), Kronecker(draw(4, 4), draw(6, 6)), Kronecker(rotation(4), rotation(6)),
    Product((Scaling(draw(WIDTH).abs() + 0.5), BlockRotation(BLOCKS, ORDER), Permutation(ORDER))),
]  # fmt: skip
EACH = pytest.mark.parametrize("transform", KINDS, ids=lambda t: type(t).__name__)


def matrix(transform):
    """T, row by row."""
    return transform.forward(torch.eye(transform.width, dtype=torch.float64))


@EACH
def test_moves_to_a_device(transform):
    moved = transform.to(torch.device("meta"))
    assert type(moved) is type(transform) and moved.width == transform.width
    assert all(t.is_meta for t in moved.tensors.values())
    assert moved.into_outputs(torch.empty(WIDTH, 3, dtype=torch.float64, device="meta")).shape == (WIDTH, 3)


@EACH
def test_is_the_map_of_one_matrix(transform):
    x, t = draw(2, 5, WIDTH), matrix(transform)
    torch.testing.assert_close(transform.forward(x), x @ t, rtol=FP64, atol=FP64)
    torch.testing.assert_close(
        transform.inverse(x), x @ torch.linalg.inv(t), rtol=1e-9, atol=1e-9
    )  # condition of draws
    assert transform.width == WIDTH


@EACH
def test_meets_the_weights_on_both_sides(transform):
    """z Wᵀ T = z (Tᵀ W)ᵀ, and what T did is undone in the weights that read it."""
    writer, bias, reader, z = draw(WIDTH, 7), draw(WIDTH), draw(3, WIDTH), draw(11, 7)
    written = z @ transform.into_outputs(writer).T + transform.into_outputs(bias)
    torch.testing.assert_close(written, transform.forward(z @ writer.T + bias), rtol=FP64, atol=1e-11)
    read = written @ transform.into_inputs(reader).T
    torch.testing.assert_close(read, (z @ writer.T + bias) @ reader.T, rtol=1e-9, atol=1e-9)


@EACH
def test_says_what_it_is(transform):
    t = matrix(transform)
    gap = (t @ t.T - torch.eye(WIDTH, dtype=torch.float64)).abs().max()
    assert transform.orthogonal == bool(gap < 1e-9)
    assert transform.elementwise == bool(((t != 0).sum(0) == 1).all())
    assert 0 <= transform.products <= WIDTH**2


def test_heads_of_queries_share_the_rotation_of_their_key_head():
    x, grouped = draw(3, 2 * WIDTH), HEADS.forward(draw(3, 2 * WIDTH))
    t = torch.block_diag(*BLOCKS.repeat_interleave(2, 0))
    torch.testing.assert_close(grouped, x @ t, rtol=FP64, atol=FP64)


@pytest.mark.parametrize("transform", [ROTATION, HEADS, KINDS[6]], ids=lambda t: type(t).__name__)
def test_learning_starts_from_the_transform_and_stays_of_its_kind(transform):
    learnable = transform.learnable()
    x, target = draw(64, WIDTH), draw(64, WIDTH)
    torch.testing.assert_close(learnable.transform().forward(x), transform.forward(x), rtol=1e-6, atol=1e-6)
    optimizer, losses = torch.optim.Adam(learnable.parameters(), lr=0.02), []
    for _ in range(20):
        loss = (learnable.transform().forward(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    learned = matrix(learnable.transform()).detach()
    assert bool((learned - matrix(transform)).abs().max() > 1e-3)
    if transform.orthogonal:
        gap = learned @ learned.T - torch.eye(WIDTH, dtype=torch.float64)
        assert gap.abs().max() < 1e-5  # the parameters are float32
    else:
        assert torch.equal(learned.diagonal().sign(), transform.s.sign())


def test_learned_rotations_do_not_mix_parts():
    learnable = ROTATION.learnable([16, 8])
    with torch.no_grad():
        for parameter in learnable.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    turn = ROTATION.u.T @ learnable.transform().u.detach()
    assert turn[:16, 16:].abs().max() < 1e-6 and turn[16:, :16].abs().max() < 1e-6
    assert (turn[:16, :16] - torch.eye(16, dtype=torch.float64)).abs().max() > 0.01


def test_what_cannot_be_learned_says_so():
    with pytest.raises(QuantError, match="HadamardRotation has nothing to learn"):
        HadamardRotation((8,)).learnable()
    with pytest.raises(QuantError, match="parts of 24 columns together, got"):
        ROTATION.learnable([3])


def test_kronecker_factors_are_near_each_other():
    assert [balanced_factors(n) for n in (576, 1536, 14336, 7)] == [(24, 24), (32, 48), (112, 128), (1, 7)]
