"""What two functions of a recurrence compute both, left by the one that is called first for the other."""

from typing import Any

from torch import Tensor


class Handover:
    """Of the tokens of one chunk in one layer; of no meaning but to the kernel that leaves and takes it.

    Before the recurrence: what its tokens write, computed for the contribution. In the gradient: what their outputs
    want of the states before them, computed for the pull.
    """

    def __init__(self) -> None:
        self._written: Any = None
        self._pulled: tuple[Tensor, Any] | None = None

    def keep(self, written: Any) -> None:
        self._written = written

    def take(self) -> Any:
        """What was kept, once; None where nothing was."""
        written, self._written = self._written, None
        return written

    def keep_pulled(self, d_out: Tensor, pulled: Any) -> None:
        self._pulled = d_out, pulled

    def take_pulled(self, d_out: Tensor) -> Any:
        """What was kept for this gradient by the outputs, once; None where nothing was, or for another one."""
        kept, self._pulled = self._pulled, None
        if kept is None or kept[0].data_ptr() != d_out.data_ptr() or kept[0].shape != d_out.shape:
            return None
        return kept[1]
