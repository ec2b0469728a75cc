"""Numbers of different widths without gaps: what is pushed is popped, in as many bits as were asked for."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_rev.reversal.bit_stack import BitStack, pack, widths_of


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    steps=st.integers(1, 6),
    size=st.integers(1, 5),
    widest=st.sampled_from([0, 1, 2, 5, 31, 32, 33, 51]),
)
def test_what_is_pushed_is_popped(seed: int, batch: int, steps: int, size: int, widest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(0, widest + 1, (batch, steps, size), generator=generator)
    values = torch.randint(0, 2**62, (batch, steps, size), generator=generator) & ((1 << widths) - 1)
    values[0] = (1 << widths[0]) - 1  # the largest that fit
    sizes = widths.sum(dim=(1, 2))
    wide = widest > 32
    words = pack(values.flatten(), widths.flatten(), int(sizes.sum()), wide=wide)
    assert words.dtype == torch.int32 and len(words) == -(-int(sizes.sum()) // 32)
    stack = BitStack.of(words, sizes, wide=wide)
    for step in reversed(range(steps)):
        assert torch.equal(stack.pop(widths[:, step]), values[:, step])


def test_a_width_tells_as_many_apart_as_there_are() -> None:
    counts = [1, 2, 3, 4, 5, 8, 9, 2**32 - 1, 2**32, 2**51 - 3, 2**51]
    found = widths_of(torch.tensor(counts, dtype=torch.float64))
    assert found.tolist() == [(count - 1).bit_length() for count in counts]


def test_a_stack_that_is_asked_for_more_than_it_has_gives_numbers() -> None:
    """A wrong state asks for wrong widths: that is compared, and must not end in an index that does not exist."""
    stack = BitStack.of(torch.zeros(1, dtype=torch.int32), torch.tensor([7, 9]), wide=True)
    for _ in range(20):
        assert stack.pop(torch.full((2, 3), 51)).shape == (2, 3)
