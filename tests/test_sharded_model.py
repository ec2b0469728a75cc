"""Weights and moments in parts, in three processes: gathered, saved, taken by another model, to the bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens
from processes import in_ranks
from safetensors.torch import save_file
from test_sharded_blocks import model_of

from rwkv_rev.errors import ConfigError
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.sharded import state_bytes
from rwkv_rev.training.sharded_model import shard, take_state, take_weights, whole_state, whole_weights

WORLD = 3
"""Divides no size of the model: some parts are shorter, and some of a few rows are empty."""
KINDS = {"full": "5.2", "lora": "7", "state": "6"}

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_optimizer": True}, "optimizer's state too: leave shard_optimizer"),
        ({"bptt": "truncated"}, "use bptt='reversible'"),
        ({"quantise": "nf4", "tune": "lora"}, "quantise = nf4 makes others"),
        ({"dtype": "float16"}, "use dtype bfloat16"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], message: str) -> None:
    config = FinetuneConfig(model="m", data=["d"], output="o", shard_model=True, **settings)
    with pytest.raises(ConfigError, match=message):
        config.check()


def made(tune: str) -> tuple[Any, torch.optim.Optimizer]:
    model = model_of(version=KINDS[tune], tune=tune)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, fused=True)


def in_parts(tune: str) -> tuple[Any, torch.optim.Optimizer]:
    model, _ = made(tune)
    shard(model, model.blocks, "cpu")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, fused=True)


def step(model: Any, optimizer: torch.optim.Optimizer, rows: slice) -> None:
    ids = random_tokens(15, batch=WORLD)[rows]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def work(folder: Path, rank: int) -> dict[str, Any]:
    found = {}
    own = slice(rank, rank + 1)
    for tune in KINDS:
        model, optimizer = in_parts(tune)
        step(model, optimizer, own)
        weights, state = whole_weights(model), whole_state(optimizer)
        place = folder / tune
        if rank == 0:
            place.mkdir()
            save_file({n.replace(".default.", "."): t for n, t in weights.items()}, place / "w.safetensors")
            torch.save(state, place / "optimizer.pt")
        torch.distributed.barrier()
        other, others = in_parts(tune)
        take_weights(other, place)
        take_state(others, torch.load(place / "optimizer.pt", mmap=True))
        step(model, optimizer, own)
        step(other, others, own)
        went_on, taken = whole_weights(model), whole_weights(other)
        found[tune] = {"first": weights, "state": state, "bytes": state_bytes(optimizer)}
        found[tune] |= {"went on": went_on, "taken": taken}
    return found


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return in_ranks(partial(work, folder), WORLD, folder)


@pytest.mark.parametrize("tune", KINDS)
def test_another_model_goes_on_to_the_bit(by_rank: list[dict[str, Any]], tune: str) -> None:
    first, *others = by_rank
    assert first[tune]["went on"] and first[tune]["went on"].keys() == first[tune]["taken"].keys()
    for name, tensor in first[tune]["went on"].items():
        assert torch.equal(tensor, first[tune]["taken"][name]), name
        assert not torch.equal(tensor, first[tune]["first"][name]), name
    for other in others:
        assert not other[tune]["went on"] and not other[tune]["state"]["state"], "the first alone keeps them"


@pytest.mark.parametrize("tune", KINDS)
def test_what_is_gathered_is_one_processs(by_rank: list[dict[str, Any]], tune: str) -> None:
    model, optimizer = made(tune)
    step(model, optimizer, slice(None))
    found, expected = by_rank[0][tune], optimizer.state_dict()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert list(found["first"]) == names
    assert found["state"]["param_groups"] == expected["param_groups"]
    assert found["state"]["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        for name, value in values.items():
            error = (found["state"]["state"][index][name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error < 1e-9, (names[index], name)
    shares = [rank[tune]["bytes"] for rank in by_rank]
    assert max(shares) < 0.7 * state_bytes(optimizer)
