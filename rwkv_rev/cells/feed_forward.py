"""A feed-forward net of one hidden layer, ``Wv relu(Wk x)^2`` (So et al. 2021, "Primer"): RWKV's channel mix without
its token shift and its gate."""

from torch import Tensor, nn

from rwkv_rev.cells.gates import squared_relu
from rwkv_rev.cells.recomputation import not_kept
from rwkv_rev.cells.stateless import StatelessCell


class FeedForward(StatelessCell):
    """The second half of a block that needs no memory there.

    Args:
        hidden_size: D.
        intermediate_size: F.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.value = nn.Linear(intermediate_size, hidden_size, bias=False)

    def compute(self, x: Tensor) -> Tensor:
        key = self.key(x)
        squared = squared_relu(key)
        with not_kept([squared], lambda: [squared_relu(key)]):
            out: Tensor = self.value(squared)
        return out
