"""The state as transformers' ``generate`` carries it: a cache that is updated in place, reordered and cropped.

A recurrent state holds no positions: what was read cannot be cut off its end. While a cache *records* (assisted
generation: drafts are read at once and some are rejected) it keeps the state before each piece that was read. ``crop``
goes back to one of these and reads again what of its piece is to stay, so that rejected tokens are read once, accepted
ones at most twice, and a prompt once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.utils import ALL_CACHE_NAMES

from rwkv_rev.state import ModelState

CACHE_NAME: str = ALL_CACHE_NAMES[0]
"""What the installed transformers calls a cache in outputs and arguments: ``past_key_values``, since 5.24 ``cache``."""


@dataclass(frozen=True)
class Piece:
    """Tokens read at once: the state before them, how many, and a way to the state after the first n of them."""

    before: ModelState
    length: int
    read_first: Callable[[int], ModelState]


class RwkvRevCache(Cache):
    """A :class:`ModelState` that a forward pass replaces by the state after its tokens.

    Attributes:
        state: state after the last token read; None before the first one.
        reordered: beam search has moved rows, so that they are no longer those of the sequences it returns.
    """

    max_cache_len = -1  # no limit; prompt learning in peft asks

    def __init__(self, state: ModelState | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.reordered = False
        self._is_user_defined = False
        self._length = 0
        self._pieces: list[Piece] | None = None
        self.start()

    def start(self) -> None:
        """Make what is held the past of a new text: counted as one token, since how many it holds is not known."""
        self._length = 0 if self.state is None else 1
        self._pieces = None

    def take(self, state: ModelState, piece: Piece) -> None:
        """Take the state after ``piece``."""
        self.state = state
        self._length += piece.length
        if self._pieces is not None:
            self._pieces.append(piece)

    # --- what transformers and peft ask of a cache -------------------------------------------------------------

    @property
    def is_croppable(self) -> bool:
        """Whether ``crop`` works: while recording."""
        return self._pieces is not None

    def activate_past_recording(self) -> None:
        """Keep what ``crop`` needs, from now on."""
        if self._pieces is None:
            self._pieces = []

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens, which were read since the last crop.

        Raises:
            RuntimeError: for tokens that were not recorded.
        """
        remove, pieces = -tokens_to_remove, self._pieces or []
        while remove > 0 and pieces:
            piece = pieces.pop()
            kept = max(piece.length - remove, 0)
            self.state = piece.read_first(kept) if kept else piece.before
            self._length -= piece.length - kept
            remove -= piece.length - kept
        if remove != 0:
            raise RuntimeError(
                f"a recurrent state cannot forget {remove} tokens that were not recorded; "
                "call activate_past_recording() before they are read, and crop() with a negative number"
            )
        pieces.clear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read since :meth:`start`, and one for a state that was there before."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a state never fills up."""
        return -1

    def __len__(self) -> int:
        return 0 if self.state is None else self.state.layers

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.reordered = None, False
        self.start()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of the beams that go on."""
        self.batch_select_indices(beam_idx)
        self.reordered = True

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices`` (int64 [B'])."""
        if self.state is not None:
            self.state = self.state.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put every row ``repeats`` times, one beside the other."""
        if self.state is not None:
            self.state = repeated(self.state, repeats)


def repeated(state: ModelState, repeats: int) -> ModelState:
    """Every row ``repeats`` times, one beside the other."""
    return state.rows(torch.arange(state.batch_size, device="cpu").repeat_interleave(repeats))


def handed_over(**arguments: Any) -> tuple[ModelState | None, RwkvRevCache | None]:
    """The past among the arguments ``state``, ``past_key_values`` and ``cache``, which mean the same.

    Returns:
        The state, and the cache that it came in, if any.

    Raises:
        ValueError: for two pasts, or one that is not this model's.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, ModelState | RwkvRevCache):
            raise ValueError(
                f"{name} is a {type(value).__name__}, but an RWKV model's past is its state: hand over an output's "
                "state (keys and values, as prefix tuning makes them, have no place in it; prompt tuning, P-tuning "
                "and tuning the initial state do what prefix tuning does)"
            )
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are one and the same; hand over one of them")
    past = next(iter(given.values()), None)
    return (past.state, past) if isinstance(past, RwkvRevCache) else (past, None)
