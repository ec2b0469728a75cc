"""What runs a chunk in both sweeps: one launch after another, or by recordings (:mod:`.cuda_graphs`)."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from rwkv_rev import random_state
from rwkv_rev.bptt.backward_sweep import Sums, differentiate
from rwkv_rev.cells.block import ExactStates

if TYPE_CHECKING:
    from rwkv_rev.bptt.strategy import Chunk
    from rwkv_rev.bptt.sweep import Sweep


class Runner:
    """Runs chunks of a sweep one launch after another."""

    def __init__(self, sweep: "Sweep") -> None:
        self.sweep = sweep
        self._pending: Callable[[], Callable[[], None]] | None = None

    def advance(self, chunk: "Chunk", states: list[ExactStates]) -> list[ExactStates]:
        """A chunk forwards, its record onto the tape; exact states after it, which hold until the next call."""
        sweep = self.sweep
        advanced, record = sweep.advance(chunk, states)
        sweep.note_compared(record.compared)
        self._flush()  # only now: the device is busy with this chunk
        if chunk.index == 0:
            sweep.prints[0] = [layer.print for layer in advanced]
        else:
            self._pending = partial(self._push, record.start())
        sweep.note_coarse(record.coarse)
        return [layer.states for layer in advanced]

    def begin(self, sums: Sums) -> None:
        """Called before the second sweep."""

    def finish(self, sums: Sums) -> None:
        """Called after it, before anything of ``sums`` is handed out."""

    def turn(self, states: list[ExactStates]) -> list[ExactStates]:
        """Called between the sweeps: the same states, to be kept."""
        self._flush()
        return states

    def differentiate(
        self,
        chunk: "Chunk",
        states: list[ExactStates],
        to_end: list[list[Tensor]] | None,
        sums: Sums,
    ) -> tuple[list[ExactStates], list[list[Tensor]]]:
        """A chunk backwards: exact states before it and gradients by their values; all else goes into ``sums``.

        ``states`` are those after it, or before it for the last chunk. What is returned holds until the next call.
        """
        record = self.sweep.tape.pop() if self.sweep.is_inner(chunk) else None
        random_state.restore(self.sweep.random[chunk.index])
        return differentiate(self.sweep, chunk, states, record, to_end, sums)

    def _flush(self) -> None:
        """Put the record of the chunk before on the tape."""
        self._take_out()()

    def _push(self, record: Callable[[], list[list[Tensor]]]) -> Callable[[], None]:
        self.sweep.tape.push(record())
        return lambda: None

    def _take_out(self) -> Callable[[], None]:
        """Keep of the last chunk's record what the next launches overwrite; what is returned puts it on the tape."""
        pending, self._pending = self._pending, None
        return (lambda: None) if pending is None else pending()
