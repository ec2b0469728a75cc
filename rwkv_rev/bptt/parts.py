"""A packed row in parts of whole documents: nothing is handed from one part to the next.

Documents of one row know nothing of each other. Where they are shorter than a chunk, as many as fit into one are
computed together, whichever they are: once, with their graph, as a context of one chunk is, without a first sweep,
records and comparisons. A document that is longer than a chunk is a part by itself, of several chunks, and takes two
sweeps. Padding behind the last document is left out.

    chunks of 8      aaaaaabb|bbbcccdd|ddde        the second sweep computes three chunks, the first one two of them
    parts            aaaaaae | bbbbbccc | ddddd    three chunks are computed once

The documents are laid into parts by best fit (:mod:`rwkv_rev.best_fit`), in each in the order of the row. Parts are
taken where they cost less, if going forwards costs one for each chunk, and coming back two.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rwkv_rev.best_fit import best_fit
from rwkv_rev.bptt.strategy import LossInputs
from rwkv_rev.cells.borders import Borders


@dataclass(frozen=True)
class Part:
    """Some documents of a row; ``places`` int64 [n] of their tokens, or None for the whole batch."""

    inputs: LossInputs
    places: Tensor | None = None
    holds_first: bool = True
    holds_last: bool = True


def parts_of(inputs: LossInputs, length: int) -> list[Part]:
    """The batch in parts for chunks of ``length`` tokens; as it is where nothing is gained."""
    if inputs.borders is None or inputs.group is not None or inputs.targets.shape[0] > 1:
        return [Part(inputs)]
    documents = documents_of(inputs.borders)
    laid = laid_out([stop - start for start, stop in documents], length)
    costs = [_cost(sum(documents[each][1] - documents[each][0] for each in part), length) for part in laid]
    if sum(costs) >= _cost(inputs.length, length):
        return [Part(inputs)]
    found = []
    for part in laid:
        places = torch.cat([torch.arange(*documents[each], device="cpu") for each in part])
        last = part[-1] == len(documents) - 1
        found.append(Part(inputs.taken(places, ends=last), places, part[0] == 0, last))
    return found


def documents_of(borders: Borders) -> list[tuple[int, int]]:
    """Where the documents of a single row begin and end; the first one begins with the row, the last one is valid."""
    begins = borders.at[0].nonzero().flatten().tolist()
    end = borders.at.shape[1]
    if borders.valid is not None and bool(borders.valid.any()):
        end = int(borders.valid[0].nonzero()[-1]) + 1
    return list(pairwise([*([] if begins[:1] == [0] else [0]), *begins, end]))


def laid_out(lengths: list[int], room: int) -> list[list[int]]:
    """Documents so long in parts, each in the order of the row; what does not fit is alone."""
    alone = sorted(
        (each for each in range(len(lengths)) if lengths[each] > room), key=lambda each: -lengths[each]
    )
    short = np.array([each for each in range(len(lengths)) if lengths[each] <= room], np.int64)
    pieces, starts = best_fit(np.array(lengths, np.int64)[short], room, np.arange(len(short)))
    parts = (short[pieces[start:stop]] for start, stop in pairwise(starts))
    return [*([each] for each in alone), *(sorted(part.tolist()) for part in parts)]


def _cost(tokens: int, length: int) -> int:
    return 3 * -(-tokens // length) - 1


def embeds_of_all(parts: list[Part], found: list[Tensor | None], like: Tensor | None) -> Tensor | None:
    """The gradient by the embeddings [B, T, D], from each part's."""
    if like is None or parts[0].places is None or all(gradient is None for gradient in found):
        return found[0]
    total = torch.zeros_like(like)
    for part, gradient in zip(parts, found, strict=True):
        assert part.places is not None
        if gradient is not None:
            total[:, part.places.to(total.device)] = gradient
    return total
