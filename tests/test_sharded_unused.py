"""``fully_shard`` over two and three processes, of which one has no use for some parameters: gradients are the mean.

Such parameters: a tuned initial state in a row that goes on from a given one, an adapter that is not the active one,
a block whose output is replaced, the embedding beside ``inputs_embeds``; and all of the head, where nothing is
predicted. FSDP2 reduces what has a gradient, so the processes would send buffers of different sizes.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bptt_cases import random_state, random_tokens, relative_error, tiny_model
from peft import LoraConfig, get_peft_model
from processes import in_ranks, wholes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rwkv_rev import position_wise

CHUNK, LENGTH = 8, 15

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

KINDS = ["start", "tuned alone", "adapter", "block", "labels", "mask", "embeds"]
CASES = {
    **{f"{kind} {bptt}": (kind, bptt, "6") for kind in KINDS for bptt in ("auto", "full")},
    **{f"start {version}": ("start", "auto", version) for version in ("5.2", "7")},
    **{f"{kind} 4": (kind, "auto", "4") for kind in ("labels", "adapter", "block")},
    "labels checkpoint": ("labels", "checkpoint", "7"),
    "adapter, own loss": ("adapter", "full", "6"),
}
"""A cause, a strategy, a generation."""
OF_THREE = [*(f"{kind} auto" for kind in KINDS), "labels checkpoint", "adapter, own loss", "start 7"]
OF_TWO = [name for name in CASES if name not in OF_THREE[: len(KINDS)]]
"""Cases of so many processes: each cause, and the last process is the odd one."""


def model_of(kind: str, bptt: str, version: str) -> Any:
    model = tiny_model(version, chunk_length=CHUNK, bptt=bptt, dtype=torch.float64)
    torch.manual_seed(0)
    if kind in ("start", "tuned alone"):
        model.requires_grad_(kind == "start")
        model.add_initial_state()
        for parameter in model.model.initial_wkv:
            parameter.data.normal_()
            parameter.requires_grad_(True)
    if kind == "adapter":
        settings = LoraConfig(r=2, target_modules=["key", "value", "head"], init_lora_weights=False)
        wrapped = get_peft_model(model, settings, adapter_name="one")
        wrapped.add_adapter("other", settings)
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return wrapped
    return model


def sharded(model: Any, mesh: Any) -> Any:
    for block in (model.base_model.model if hasattr(model, "peft_config") else model).blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def of_rank(model: Any, kind: str, rank: int, world: int, stack: ExitStack) -> dict[str, Any]:
    """What the model is called with; the last process is the one that has no use for some parameters."""
    ids = random_tokens(LENGTH, batch=world)[rank : rank + 1]
    odd = rank == world - 1
    given: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if kind in ("start", "tuned alone"):
        borders = torch.zeros_like(ids, dtype=torch.bool)
        borders[:, [5, 11]] = not odd
        given |= {
            "borders": borders,
            "state": random_state(tiny_model(model.config.rwkv_version).double(), 1),
        }
    if kind == "adapter" and odd:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.base_model.set_adapter("other")
        stack.callback(model.base_model.set_adapter, "one")
        for parameter in trained:
            parameter.requires_grad_(True)
    if kind == "block" and odd:
        hook = position_wise(lambda _, arguments, output: (arguments[0], *output[1:]))
        stack.enter_context(removing(model.blocks[1].register_forward_hook(hook)))
    if kind == "labels" and odd:
        given["labels"] = torch.full_like(ids, -100)
    if kind == "mask" and odd:
        given["attention_mask"] = torch.zeros_like(ids)
    if kind == "embeds" and odd:
        torch.manual_seed(1)
        given["inputs_embeds"] = torch.randn(1, LENGTH, model.config.hidden_size, dtype=torch.float64)
        del given["input_ids"]
    return given


class removing:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def trained(
    model: Any, kind: str, ranks: list[int], world: int, *, own_loss: bool = False
) -> dict[str, Tensor]:
    """Whole gradients of these processes' rows; of several rows their mean."""
    for rank in ranks:
        with ExitStack() as stack:
            given = of_rank(model, kind, rank, world, stack)
            if own_loss:
                del given["labels"]
            output = model(**given)
            loss = output.logits.square().mean() if own_loss else output.loss
            (loss / len(ranks)).backward()
    return wholes({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def work(rank: int) -> dict[str, Any]:
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {}
    for name in OF_TWO if world == 2 else OF_THREE:
        kind, bptt, version = CASES[name]
        model = sharded(model_of(kind, bptt, version), mesh)
        found[name] = trained(model, kind, [rank], world, own_loss="own loss" in name)
    return found


@pytest.fixture(scope="module", params=[2, 3])
def by_rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_ranks(work, request.param, cast(Path, tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("name", CASES)
def test_the_mean_of_all_processes(by_rank: list[dict[str, Any]], name: str) -> None:
    if name not in by_rank[0]:
        pytest.skip("not of so many processes")
    kind, bptt, version = CASES[name]
    ranks, own_loss = [*range(len(by_rank))], "own loss" in name
    expected = trained(model_of(kind, bptt, version), kind, ranks, len(ranks), own_loss=own_loss)
    for found in by_rank:
        assert expected.keys() == found[name].keys()
        for key, value in found[name].items():
            assert relative_error(value, expected[key]) <= 1e-10, key
