"""The figures of a logit comparison against their definitions, written out."""

import math

import pytest
import torch

from rwkv_rev.equivalence.logits import PIECE, Beside, compare_logits, largest_difference
from rwkv_rev.errors import RwkvRevError

T, V = 3 * PIECE + 7, 11
GENERATOR = torch.Generator().manual_seed(0)
Z = torch.randn(T, V, generator=GENERATOR, dtype=torch.float64)
ZC = Z + 0.1 * torch.randn(T, V, generator=GENERATOR, dtype=torch.float64)
TOKENS = torch.randint(V, (T,), generator=GENERATOR)


@pytest.mark.parametrize("piece", [1, PIECE - 1, PIECE, PIECE + 1, T])
def test_figures_do_not_depend_on_the_pieces(piece: int) -> None:
    found = compare_logits(Z.split(piece), ZC, TOKENS)
    p, pc = Z.softmax(-1), ZC.softmax(-1)
    next_token = TOKENS[1:, None]
    assert found.tokens == T
    assert found.largest == pytest.approx(float((Z - ZC).abs().max()))
    assert found.mean == pytest.approx(float((Z - ZC).abs().mean()))
    assert found.kl == pytest.approx(float((p * (p / pc).log()).sum(-1).mean()))
    assert found.top1 == pytest.approx(float((Z.argmax(-1) == ZC.argmax(-1)).double().mean()))
    assert 0 < found.top1 < 1
    assert found.original_bits == pytest.approx(float(-p[:-1].gather(1, next_token).log2().mean()))
    assert found.converted_bits == pytest.approx(float(-pc[:-1].gather(1, next_token).log2().mean()))


def test_equal_logits() -> None:
    found = compare_logits([Z], Z.clone(), TOKENS)
    assert (found.largest, found.mean, found.kl, found.top1) == (0, 0, 0, 1)


def test_one_token_has_no_bits() -> None:
    found = compare_logits([Z[:1]], ZC[:1], TOKENS[:1])
    assert found.original_bits is None
    assert found.converted_bits is None


@pytest.mark.parametrize("position", [0, T - 1])
def test_nan_is_never_lost(position: int) -> None:
    broken = ZC.clone()
    broken[position, 3] = math.nan
    assert math.isnan(compare_logits(Z.split(50), broken, TOKENS).largest)
    assert math.isnan(compare_logits(broken.split(50), Z, TOKENS).largest)


@pytest.mark.parametrize(
    ("original", "message"),
    [
        (Z[:-1], f"for {T - 1} tokens of {T}"),
        (Z[:, :-1], f"gave {V - 1} logits"),
        (Z.repeat(2, 1), "expected"),
    ],
    ids=["few tokens", "few entries", "many tokens"],
)
def test_other_shapes_are_refused(original: torch.Tensor, message: str) -> None:
    with pytest.raises(RwkvRevError, match=message):
        compare_logits(original.split(10), Z, TOKENS)


@pytest.mark.parametrize(("one", "other"), [(PIECE, T), (50, PIECE), (1, PIECE + 1)])
def test_largest_difference_of_any_pieces(one: int, other: int) -> None:
    exact = float((Z - ZC).abs().max())
    assert largest_difference(Z.split(one), ZC.split(other)) == exact
    beside = Beside(Z.split(one), ZC.split(other))
    assert compare_logits(beside, Z, TOKENS).largest == 0
    assert beside.largest == exact
    broken = ZC.clone()
    broken[0, 0] = math.nan
    assert math.isnan(largest_difference(Z.split(one), broken.split(other)))


def test_largest_difference_of_other_lengths() -> None:
    with pytest.raises(ValueError, match="shorter"):
        largest_difference([Z], [Z[:PIECE]])
