"""The checksum of boundary states: one wrong bit, a swap or a shift shows; order of summation does not."""

import pytest
import torch

from rwkv_rev.reversal.fingerprint import checksum, fingerprint

DTYPES = [torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    state = (100 * torch.randn(3, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    whole = fingerprint(state)
    assert whole.dtype == torch.int64 and whole.shape == ()
    seen = {int(whole)}
    for byte in range(state.nbytes):
        for bit in range(8):
            changed = state.clone()
            changed.view(torch.uint8).view(-1)[byte] ^= 1 << bit
            seen.add(int(fingerprint(changed)))
    assert len(seen) == 1 + 8 * state.nbytes


@pytest.mark.parametrize("shape", [(2, 4), (3, 7), (1,), (5,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_changes_the_sum(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    longer = (100 * torch.randn(shape[0] + 1, *shape[1:], generator=torch.Generator().manual_seed(0))).to(
        dtype
    )
    for state in (longer[1:], longer[:-1], longer[1:].clone()):  # whatever the place in memory
        whole = checksum(state)
        assert whole.dtype == torch.int64 and whole.shape == ()
        assert torch.equal(whole, checksum(state.clone()))
        for byte in range(state.nbytes):
            for bit in range(8):
                changed = state.clone()
                changed.view(torch.uint8).view(-1)[byte] ^= 1 << bit
                assert not torch.equal(checksum(changed), whole)


def test_order_and_place_count() -> None:
    a, b = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    prints = [
        fingerprint(a, b),
        fingerprint(b, a),
        fingerprint(a),
        fingerprint(a.flip(0)),
        fingerprint(a.roll(1)),
    ]
    assert len({int(p) for p in prints}) == len(prints)
    zeros = torch.zeros(4)
    assert int(fingerprint(zeros)) != int(fingerprint(torch.tensor([0.0, -0.0, 0.0, 0.0])))


def test_layout_and_threads_do_not_count() -> None:
    state = torch.randn(64, 48, 40, generator=torch.Generator().manual_seed(2))
    expected = fingerprint(state)
    assert torch.equal(fingerprint(state.transpose(0, 2).contiguous().transpose(0, 2)), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(fingerprint(state), expected)
    finally:
        torch.set_num_threads(threads)


def test_gradients_do_not_pass() -> None:
    state = torch.ones(3, requires_grad=True)
    assert not fingerprint(state).requires_grad
    assert torch.equal(fingerprint(state), fingerprint(state.detach()))
