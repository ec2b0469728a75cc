"""Official initialisation of the head; that of a cell its architecture says (:mod:`rwkv_rev.architectures`)."""

import math

from torch import nn
from transformers import initialization as init


def initialize_head(head: nn.Linear) -> None:
    """The output head: orthogonal, half its natural size."""
    init.orthogonal_(head.weight, gain=0.5 * math.sqrt(max(1, head.out_features / head.in_features)))
