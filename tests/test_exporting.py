"""``torch.export``: one graph for prompts of one length, whatever their tokens, masks and the model's decays."""

import pytest
import torch
from bptt_cases import VERSIONS, random_tokens, relative_error, tiny_model
from torch import Tensor, nn

from rwkv_rev.errors import StrategyError
from rwkv_rev.exporting import exporting
from rwkv_rev.wkv import wkv5

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

OLD = torch.__version__.startswith("2.9.")
LAYERS = {"4": 1, "5.0": 1, "5.1": 1, "5.2": 1, "6": 1, "7": 2}
"""Tracing takes its time for each; RWKV-7's second layer reads values of the first."""


def exported(model: nn.Module, inputs: dict[str, Tensor | bool], **dynamic: object) -> nn.Module:
    shapes = {name: dynamic.get(name) for name in inputs} if dynamic else None
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()


@pytest.mark.parametrize(
    ("version", "length"),
    [*((version, 40) for version in ("4", "5.2", "6", "7")), *((version, 1) for version in VERSIONS)],
)
def test_exported_models_compute_the_same(version: str, length: int) -> None:
    model = tiny_model(version, num_hidden_layers=LAYERS[version]).eval()
    inputs = {"input_ids": random_tokens(length, batch=2)}
    graph = exported(model, inputs)
    others = inputs | {"input_ids": random_tokens(length, batch=2, seed=9)}
    with torch.no_grad():
        found, expected = graph(**others), model(**others, use_cache=False)
    assert relative_error(found.logits, expected.logits) < 1e-5
    for tensor, other in zip(found.state, expected.state.tensors(), strict=True):
        assert relative_error(tensor, other) < 1e-5
    assert not exporting()


@pytest.mark.parametrize(
    "version",
    ["4", pytest.param("5.2", marks=pytest.mark.xfail(OLD, reason="torch 2.9 fixes the rows", strict=True))],
)
def test_masks_are_data(version: str) -> None:
    """Exported with a mask of ones, it holds for every mask, and for any number of rows."""
    model = tiny_model(version, num_hidden_layers=LAYERS[version]).eval()
    tokens = random_tokens(8, batch=3)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    graph = exported(model, inputs, input_ids=rows, attention_mask=rows)
    mask = torch.ones(5, 8, dtype=torch.long)
    mask[0, :3] = mask[1, 5:] = mask[2, 3:5] = 0
    others = inputs | {"input_ids": random_tokens(8, batch=5, seed=9), "attention_mask": mask}
    with torch.no_grad():
        found, expected = graph(**others).logits, model(**others).logits
    valid = mask.bool()
    assert relative_error(found[valid], expected[valid]) < 1e-5


def test_decays_are_data() -> None:
    """Exported with mild decays, the kernel holds for every decay."""

    class Kernel(nn.Module):
        def forward(self, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
            return wkv5(r, k, v, log_decay, torch.ones_like(log_decay), state)[0]

    generator = torch.Generator().manual_seed(0)
    r, k, v = (torch.randn(1, 40, 2, 4, generator=generator) for _ in range(3))
    state = torch.randn(1, 2, 4, 4, generator=generator)
    inputs = {"r": r, "k": k, "v": v, "log_decay": torch.full((2, 4), -1e-3), "state": state}
    graph = exported(Kernel(), inputs)
    for decay in (-1e-3, -0.5, -20.0, -300.0):
        others = inputs | {"log_decay": torch.full((2, 4), decay)}
        assert relative_error(graph(**others), Kernel()(**others)) < 1e-5, decay


def test_positions_cannot_be_looked_at() -> None:
    model, tokens = tiny_model("4").eval(), random_tokens(6)
    with pytest.raises(Exception, match="position_ids"):
        exported(model, {"input_ids": tokens, "position_ids": torch.arange(6)[None]})


def test_what_is_not_traced() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, labels=ids).loss

    model, tokens = tiny_model("5.2").eval(), random_tokens(6)
    words = r"torch\.export takes the logits of this model, without gradients: export in torch\.no_grad"
    for strategy in ("full", "reversible"):
        model.set_bptt(strategy, chunk_length=2)
        with torch.enable_grad(), pytest.raises(StrategyError, match=words):
            torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, strict=False)
    with pytest.raises(StrategyError, match=words):
        exported(Loss(), {"ids": tokens})
    with pytest.raises(StrategyError, match=r"torch\.jit\.trace cannot follow this model"):
        torch.jit.trace(Loss(), (tokens,))
