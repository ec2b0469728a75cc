"""Where documents begin inside of rows, by any of the names that collators have for it.

* ``borders`` [B, T] bool, true at a document's first token: ours, and the only one that can say that a row's first
  token begins a document, too, whatever state is handed over;
* ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``cu_seqlens`` [documents + 1]: where each begins, and the end, in a single row;
* ``seq_idx`` [B, T], from 0: another number in each document than in the one before;
* ``position_ids`` [B, T] that restart at 0, maybe on a masked token, from which the document's positions count on. A
  hole of masked tokens at 0 that is as long as the text before it is refused: it might be a document's padding as well.

``max_length_q`` and ``max_length_k``, which stand beside these, must be those of the longest document or above, and say
nothing alone. Several that are given must agree. A border on a masked token is one on the row's next valid token, and
none where there is no such token. A row's first token goes on from the state, unless ``borders`` say otherwise.

peft's prompt learning puts its virtual tokens before a row, not before each document in it, and takes ``position_ids``
away before the model is called: packed rows are refused under it.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.exporting import exporting

CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_LONGEST = ("max_length_q", "max_length_k")
PACKED = (*CUMULATIVE, "seq_idx", "position_ids")
PACKING = (*PACKED, *_LONGEST)


def given_borders(
    kwargs: dict[str, Any],
    borders: Tensor | None,
    valid: Tensor | None,
    batch: int,
    length: int,
    *,
    fresh: bool = False,
    embedded: bool = False,
) -> Tensor | None:
    """The borders [B, T] of a batch, bool on the host and on valid tokens, a copy; None where there are none.

    Args:
        kwargs: those that the model has no name for.
        borders: as the model was given them.
        valid: [B, T] bool, or None where every token counts.
        fresh: rows begin with what documents begin with, so that a border on their first token changes nothing.
        embedded: the input are embeddings, as peft makes them of virtual tokens and others.

    Raises:
        ValueError: for borders of another shape or dtype, or that contradict one another, for positions that neither
            count the tokens one by one nor restart at 0, and for numbers below 0; for any under peft's prompt learning.
    """
    named = [*(name for name in PACKED if name in kwargs), *([] if borders is None else ["borders"])]
    if named and embedded and _under_prompt_learning():
        raise ValueError(
            f"{' and '.join(named)} cannot be kept under peft's prompt learning, which puts its virtual tokens before "
            "a row, not before each document in it: give each document a row of its own, without these, or tune the "
            "initial state, with which every document begins"
        )
    there = {name: kwargs[name] for name in PACKED if kwargs.get(name) is not None}
    longest = {name: int(kwargs[name]) for name in _LONGEST if kwargs.get(name) is not None}
    if longest and borders is None and not there and min(longest.values()) < length:
        name, most = min(longest.items(), key=lambda each: each[1])
        raise ValueError(
            f"{name} = {most} says that a row of {length} tokens holds several documents, and not where they begin: "
            "give cu_seq_lens_q, or leave it out"
        )
    if borders is None and not there:
        return None
    if exporting():
        names = " and ".join([*there, *([] if borders is None else ["borders"])])
        raise ValueError(f"{names} cannot be looked at while a model is exported: leave them out")
    for name, tensor in there.items():
        _refuse_fractions(name, tensor)
    if set(there) == {"position_ids"} and borders is None and _count(there["position_ids"]):
        return None
    valid = None if valid is None else valid.cpu()
    found: dict[str, Tensor] = {}
    for name, tensor in there.items():
        if name in CUMULATIVE:
            found[name] = _of_cumulative(name, tensor, batch, length, longest)
        else:
            tensor = _tokens(name, tensor, batch, length)
            found[name] = (_of_positions if name == "position_ids" else _of_numbers)(tensor, valid)
    found = {name: on_valid(at, valid) for name, at in found.items()}
    if borders is not None:
        if borders.dtype != torch.bool or borders.shape != (batch, length):
            raise ValueError(
                f"borders are {borders.dtype} {list(borders.shape)}: give bool {[batch, length]}, true at each "
                "document's first token"
            )
        found["borders"] = on_valid(borders.to("cpu", copy=True), valid)
    first = _first(valid, batch, length)
    name, at = next(reversed(found.items()))
    for other, others in found.items():
        if not torch.equal(others & ~first, at & ~first):
            raise ValueError(
                f"{other} and {name} say of other tokens that they begin a document: give one of them"
            )
    if fresh:
        at = at & ~first
    return at if bool(at.any()) else None


def refuse_empty_documents(kwargs: dict[str, Any]) -> None:
    """Refuse cumulative lengths with a document of no tokens, where each document is asked for something.

    It would have none, and those behind it would move up by one. Repeated last values are what lengths are padded with.
    """
    for name in CUMULATIVE:
        places = [] if kwargs.get(name) is None else kwargs[name].flatten().tolist()
        for place, following in pairwise(places):
            if place == following != places[-1]:
                raise ValueError(
                    f"{name} holds {place} twice: a document of no tokens has no state, and the states behind it would "
                    "be counted as others; leave it out"
                )


def _refuse_fractions(name: str, tensor: Any) -> None:
    given = isinstance(tensor, Tensor)
    if not given or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        what = tensor.dtype if given else f"a {type(tensor).__name__}"
        raise ValueError(f"{name} is {what}: give a tensor of whole numbers, int64 or int32")


def _under_prompt_learning() -> bool:
    """Whether the model is called by peft with virtual tokens; the model has no other trace of it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if type(caller).__module__.split(".")[0] == "peft" and hasattr(caller, "active_peft_config"):
            return bool(caller.active_peft_config.is_prompt_learning)
        frame = frame.f_back
    return False


def on_valid(at: Tensor, valid: Tensor | None) -> Tensor:
    """Borders [B, T] moved to the next valid token each."""
    if valid is None:
        return at
    length = at.shape[1]
    place = torch.arange(length, device=at.device).expand_as(at)
    following = torch.where(valid, place, length).flip(1).cummin(dim=1).values.flip(1)
    moved = torch.zeros(len(at), length + 1, dtype=torch.bool, device=at.device)
    return moved.scatter_(1, torch.where(at, following, length), True)[:, :length]


def _first(valid: Tensor | None, batch: int, length: int) -> Tensor:
    """[B, T] bool, true at each row's first valid token."""
    there = torch.ones(batch, length, dtype=torch.bool, device="cpu") if valid is None else valid
    return there & (there.cumsum(dim=1) == 1)


def _count(positions: Tensor) -> bool:
    """Whether positions [..., T] count all tokens one by one."""
    return bool((positions[..., 1:] - positions[..., :-1] == 1).all())


def _tokens(name: str, tensor: Tensor, batch: int, length: int) -> Tensor:
    """[B, T] on the host."""
    if (
        tensor.dim() > 2
        or tensor.shape[-1] != length
        or (tensor.dim() == 2 and len(tensor) not in (1, batch))
    ):
        raise ValueError(
            f"{name} have shape {list(tensor.shape)}, the input {[batch, length]}: give each token one"
        )
    return tensor.cpu().expand(batch, length)


def _before(shape: torch.Size, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The place of the valid token before each one, [B, T], -1 where there is none; and where both are there."""
    place = torch.arange(shape[1], device="cpu").expand(shape)
    latest = place if valid is None else torch.where(valid, place, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    return before, before >= 0 if valid is None else (before >= 0) & valid


def _of_positions(positions: Tensor, valid: Tensor | None) -> Tensor:
    """Where positions [B, T] restart; see the module's docstring.

    Between a valid token of position p and the next one, of position q, are k >= 0 masked ones. The text goes on where
    q counts the valid tokens, p + 1, or the places, p + 1 + k, and the masked ones are all at 0 or none of them is. A
    document begins where q = 0, or where q counts the places from a masked token at 0.
    """
    place = torch.arange(positions.shape[1], device="cpu").expand_as(positions)
    before, there = _before(positions.shape, valid)
    masked = place - before - 1
    step = positions - positions.gather(1, before.clamp(min=0))
    zeros = (positions == 0).cumsum(dim=1)
    between = (zeros - zeros.gather(1, before.clamp(min=0))) - (positions == 0).long()
    goes_on = ((step == 1) | (step == 1 + masked)) & ((between == 0) | (between == masked))
    start = place - positions.long()
    inside = (start > before) & (start < place)
    begins = (positions == 0) | (inside & (positions.gather(1, torch.where(inside, start, place)) == 0))
    for wrong in (there & ~goes_on & ~begins, there & goes_on & begins):
        if bool(wrong.any()):
            row, token = wrong.nonzero()[0].tolist()
            last, at = positions[row, before[row, token]].item(), positions[row, token].item()
            if goes_on[row, token]:
                raise ValueError(
                    f"position_ids may go on or begin a document at token {token} of row {row}: they go from {last} to "
                    f"{at} over masked tokens at 0, which may be a hole or a document's padding. Give borders or "
                    "seq_idx in their place, or none of them if each row is one document"
                )
            raise ValueError(
                f"position_ids go from {last} to {at} at token {token} of row {row}: they must count the tokens one by "
                "one, and restart at 0 where a document begins. Parts of one text on several devices have no place in "
                "a recurrent state: give each row whole"
            )
    return there & begins


def _of_numbers(numbers: Tensor, valid: Tensor | None) -> Tensor:
    if bool(((numbers < 0) if valid is None else (numbers < 0) & valid).any()):
        raise ValueError(
            "seq_idx numbers documents from 0, and is below that on tokens that count: -1, which elsewhere stands for "
            "padding, needs attention_mask 0 here"
        )
    before, there = _before(numbers.shape, valid)
    return there & (numbers != numbers.gather(1, before.clamp(min=0)))


def _of_cumulative(name: str, ends: Tensor, batch: int, length: int, longest: dict[str, int]) -> Tensor:
    if batch != 1:
        raise ValueError(f"{name} tells of documents in a single row, and there are {batch}: use borders")
    places = ends.flatten().tolist()
    rising = all(one <= other for one, other in pairwise(places))
    if ends.dim() != 1 or len(places) < 2 or places[0] != 0 or places[-1] != length or not rising:
        raise ValueError(
            f"{name} must rise from 0 to the row's {length} tokens, by the length of each document; it is {places[:9]}"
        )
    most = max(other - one for one, other in pairwise(places))
    for told, value in longest.items():
        if value < most:
            raise ValueError(
                f"{told} = {value}, and {name} has a document of {most} tokens: give {most}, or leave it out"
            )
    at = torch.zeros(1, length, dtype=torch.bool, device="cpu")
    at[0, [place for place in places if 0 < place < length]] = True
    return at
