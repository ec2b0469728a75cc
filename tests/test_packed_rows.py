"""Positions that restart inside of rows with padding, against a loop that knows where its documents begin."""

import random
from collections.abc import Callable
from itertools import groupby, pairwise

import pytest
import torch
from bptt_cases import Outcome, assert_same_bits, differentiate, random_tokens, tiny_model
from torch import Tensor

from rwkv_rev.packed_rows import given_borders

Document = list[int]
"""The mask of its tokens."""


def counted(mask: Document) -> list[int]:
    """The valid tokens before each one."""
    return [sum(mask[: place + 1]) - 1 for place in range(len(mask))]


def filled(mask: Document, positions: list[int], fill: int) -> list[int]:
    return [position if valid else fill for valid, position in zip(mask, positions, strict=True)]


MAKERS: dict[str, Callable[[Document], list[int]]] = {
    "places": lambda mask: list(range(len(mask))),
    "places, padding 0": lambda mask: filled(mask, list(range(len(mask))), 0),
    "cumsum - 1": counted,
    "cumsum - 1, not below 0": lambda mask: [max(0, at) for at in counted(mask)],
    "cumsum - 1, padding 0": lambda mask: filled(mask, counted(mask), 0),
    "cumsum - 1, padding 1": lambda mask: filled(mask, counted(mask), 1),
}
PLACES = ("places", "places, padding 0")


def padded(draw: random.Random, *, holes: bool = False) -> Document:
    tokens = [1] * draw.randint(1, 4)
    padding = [0] * draw.randint(0, 4)
    if holes and len(tokens) > 1:
        at = draw.randint(1, len(tokens) - 1)
        tokens[at:at] = [0] * draw.randint(0, 4)
    return padding + tokens if draw.random() < 0.5 else tokens + padding


def found(mask: list[int], positions: list[int]) -> list[int]:
    """Places of the borders that one row's positions tell of."""
    at = given_borders(
        {"position_ids": torch.tensor([positions])},
        None,
        torch.tensor([mask]).bool(),
        1,
        len(mask),
        fresh=True,
    )
    return [] if at is None else at[0].nonzero().flatten().tolist()


def begins(documents: list[Document]) -> list[int]:
    """Each document's first valid token, but the row's."""
    places, start = [], 0
    for mask in documents:
        places.append(start + mask.index(1))
        start += len(mask)
    return places[1:]


def doubtful(maker: str, documents: list[Document]) -> bool:
    """Whether a document's padding might be a hole in the one before, or a hole be padding of another document."""
    if maker in PLACES:  # the document's first valid token counts on
        return any(len(one) - one[::-1].index(1) == other.index(1) for one, other in pairwise(documents))
    lengths = [[len(list(run)) for _, run in groupby(mask)][1 - mask[0] :] for mask in documents]
    return any(len(runs) > 2 and runs[0] <= runs[1] for runs in lengths)  # as long as the text before it


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
def test_padded_documents_in_a_row(maker: str, holes: bool) -> None:
    """The right borders, or an error where a hole would look the same: never others."""
    draw, clear = random.Random(14), 0
    for _ in range(250):
        documents = [padded(draw, holes=holes) for _ in range(draw.randint(1, 4))]
        mask = [valid for document in documents for valid in document]
        positions = [position for document in documents for position in MAKERS[maker](document)]
        try:
            assert found(mask, positions) == begins(documents), (mask, positions)
        except ValueError as error:
            assert "\n" not in str(error)
            assert doubtful(maker, documents), (mask, positions)
        clear += not doubtful(maker, documents)
    assert clear > 37


@pytest.mark.parametrize("maker", MAKERS)
def test_a_document_with_holes_goes_on(maker: str) -> None:
    """Refused is a hole of zeros alone that is as long as the text before it, which might be padding."""
    for before in range(1, 5):
        for hole in range(5):
            for left in range(3):
                mask = [0] * left + [1] * before + [0] * hole + [1, 1]
                positions = MAKERS[maker](mask)
                between, behind = positions[left + before :][:hole], positions[left + before + hole]
                if not any(between) and behind <= hole:
                    with pytest.raises(ValueError, match=r"may go on or begin a document .*seq_idx"):
                        found(mask, positions)
                else:
                    assert found(mask, positions) == [], (mask, positions)


@pytest.mark.parametrize(
    ("mask", "positions", "expected"),
    [
        ([0, 1, 1, 1, 0, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3], [5]),  # padded on the left, then laid in a row
        ([0, 1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 2, 1, 0, 1, 2], [5]),
        ([0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 2, 0, 0, 1, 2], [5]),
        ([1, 1, 1, 0, 1, 1, 1, 0], [0, 1, 2, 3, 0, 1, 2, 3], [4]),
        ([1, 1, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3, 4, 5], [4]),  # goes on from 1 to 2, but by a 0 and a 1
        ([1, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 0, 1, 2, 3, 4], [4]),  # a document of padding in between
        ([0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 2, 3, 4], []),
        ([0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7], []),
        ([1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 2, 3, 4, 0, 0, 0], []),  # padding at the row's end
        ([0, 0, 1, 1, 1, 0, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7], []),
    ],
)  # fmt: skip
def test_rows(mask: list[int], positions: list[int], expected: list[int]) -> None:
    assert found(mask, positions) == expected


@pytest.mark.parametrize(
    ("mask", "positions", "message"),
    [
        ([1, 1, 1, 1, 0, 1, 1, 1], [0, 1, 2, 3, 9, 1, 2, 3], "go from 3 to 1 at token 5 of row 0"),
        ([1, 1, 1, 1, 0, 1, 1, 1], [0, 1, 2, 3, 3, 3, 4, 5], "go from 3 to 3 at token 5"),
        ([1, 1, 1, 1, 0, 1, 1, 1], [0, 1, 2, 3, 4, 8, 9, 10], "go from 3 to 8 at token 5"),
        ([1, 1, 1, 1, 0, 0, 1, 1], [0, 1, 2, 3, 0, 7, 9, 10], "go from 3 to 9 at token 6"),
        ([1, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4, 5, 6], "may go on or begin a document at token 2 of row 0"),
        ([1, 1, 0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 2, 3, 4, 5], "may go on or begin a document at token 4 of row 0"),
    ],
)  # fmt: skip
def test_positions_that_say_nothing_clear_are_refused(
    mask: list[int], positions: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        found(mask, positions)


def test_the_row_of_two_is_its_documents() -> None:
    """Through the model: the same bits as by the other names."""
    model, ids = tiny_model("7", dtype=torch.float64), random_tokens(8)
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1]])
    labels = ids.masked_fill(mask == 0, -100)

    def outcome(**given: Tensor) -> Outcome:
        return differentiate(
            model, "reversible", 4, input_ids=ids, attention_mask=mask, labels=labels, **given
        )

    expected = outcome(seq_idx=torch.tensor([[0] * 4 + [1] * 4]))
    assert expected.loss != outcome().loss
    for positions in ([0, 1, 2, 3] * 2, [1, 0, 1, 2] * 2, [0, 0, 1, 2] * 2):
        assert_same_bits(outcome(position_ids=torch.tensor([positions])), expected)


def test_padded_batches_go_on() -> None:
    """Each row by itself, and by positions that all rows share."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    of_each = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 1, 1]])
    for positions in (of_each, of_each.masked_fill(mask == 0, 0), torch.arange(5)[None], torch.arange(5)):
        assert given_borders({"position_ids": positions}, None, mask.bool(), 3, 5) is None
