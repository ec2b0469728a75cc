"""``fully_shard`` of each block over two processes: chunks train, read and generate as those of the whole model.

The same cases run over two GPUs (NCCL) where there are two.
"""

import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from bptt_cases import random_state, random_tokens, relative_error, tiny_model
from peft import LoraConfig, get_peft_model
from processes import in_ranks, wholes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rwkv_rev import position_wise
from rwkv_rev.distributed import sharded_blocks
from rwkv_rev.errors import StrategyError

CHUNK, WORLD, LENGTH, SHORT = 8, 2, 15, 8
"""``SHORT``: of the second process's row where they differ; one chunk, which ``auto`` would store whole."""

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

Settings = dict[str, Any]
CASES: dict[str, Settings] = {
    "4 checkpoint": {"version": "4", "bptt": "checkpoint"},
    "5.2 checkpoint": {"bptt": "checkpoint"},
    "5.2 reversible": {},
    "6 reversible": {"version": "6"},
    "7 checkpoint": {"version": "7", "bptt": "checkpoint"},
    "7 uneven": {"version": "7", "bptt": "auto", "uneven": True},
    "float32": {"dtype": torch.float32},
    "tied": {"tie_word_embeddings": True},
    "lora": {"tune": "lora"},
    "lora on bfloat16": {"version": "7", "tune": "lora", "dtype": torch.bfloat16, "uneven": True},
    "state": {"version": "6", "tune": "state", "uneven": True},
    "packed": {"packed": True},
    "steps": {"steps": 2, "dtype": torch.float32},
    "own loss": {"bptt": "full", "own_loss": True},
}
"""Trained by 5.2, ``reversible`` and in float64 where nothing else is said."""

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}
"""Relative error of a gradient; of additions in float32 to frozen weights in bfloat16, too."""


def model_of(
    *,
    version: str = "5.2",
    bptt: str = "reversible",
    dtype: torch.dtype = torch.float64,
    tune: str = "full",
    **config: Any,
) -> Any:
    model = tiny_model(version, chunk_length=CHUNK, bptt=bptt, dtype=dtype, **config)
    if tune == "lora":
        torch.manual_seed(0)
        targets = LoraConfig(r=2, target_modules=["key", "value"], init_lora_weights=False)
        wrapped = get_peft_model(model, targets, autocast_adapter_dtype=False)
        for parameter in wrapped.parameters():
            if parameter.requires_grad and dtype == torch.bfloat16:
                parameter.data = parameter.data.float()
        return wrapped
    if tune == "state":
        model.requires_grad_(False)
        model.add_initial_state()
        for parameter in model.model.initial_wkv:
            parameter.requires_grad_(True)
    return model


def sharded(model: Any, mesh: Any, **settings: Any) -> Any:
    inner = model.base_model.model if hasattr(model, "peft_config") else model
    for block in inner.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def in_parts(model: Any, mesh: Any) -> Any:
    """As accelerate shards a model, with a unit inside of each block, and somebody's hook on it."""
    for block in model.blocks:
        fully_shard(block.time_mix.key, mesh=mesh)
        fully_shard(block, mesh=mesh)
        block.register_forward_hook(lambda *_: None)
        position_wise(next(reversed(block._forward_hooks.values())))
    fully_shard(model.model.embeddings, mesh=mesh)
    fully_shard([model.model.ln_out, model.head], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def row(rank: int, uneven: bool) -> Tensor:
    return random_tokens(LENGTH, batch=WORLD)[rank : rank + 1, : SHORT if uneven and rank else LENGTH]


def loss_of(model: Any, ids: Tensor, *, packed: bool, own_loss: bool, state: Any) -> Tensor:
    ids = ids.to(next(model.parameters()).device)
    if own_loss:
        logits = model(ids).logits
        return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) + logits.square().mean()
    more = {}
    if packed:
        borders = torch.zeros_like(ids, dtype=torch.bool)
        borders[:, [5, 11]] = True
        more = {"borders": borders, "state": state}
    return cast(Tensor, model(ids, labels=ids, **more).loss)


def trained(
    model: Any,
    ranks: list[int],
    *,
    uneven: bool = False,
    packed: bool = False,
    own_loss: bool = False,
    steps: int = 1,
    **_: Any,
) -> dict[str, Tensor]:
    """Whole gradients of each step, losses and the norm by which they are clipped, of these processes' rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    device = next(model.parameters()).device
    states = {
        rank: random_state(tiny_model("5.2").double(), 1).each(lambda t: t.to(device).requires_grad_())
        for rank in (ranks if packed else ())
    }
    found: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        for again in range(steps):  # accumulated
            for rank in ranks:
                ids = row(rank, uneven).roll(again, dims=1)
                loss = loss_of(model, ids, packed=packed, own_loss=own_loss, state=states.get(rank))
                (loss / len(ranks)).backward()
                found[f"loss {step} {again} {rank}"] = loss.detach()
        if steps > 1:  # torch takes long to plan each of these for sharded tensors
            norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        found[f"norm {step}"] = whole(norm)
        gradients = {f"{name} {step}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= wholes(gradients)
        if step + 1 < steps:
            optimizer.step()
    for rank, state in states.items():
        named = zip(state.names(), state.tensors(), strict=True)
        found |= {f"state {rank} {name}": cast(Tensor, tensor.grad) for name, tensor in named}
    return {name: tensor.cpu() for name, tensor in found.items()}


def whole(tensor: Any) -> Tensor:
    return cast(Tensor, tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def read(model: Any, rank: int, *, frozen: bool = False) -> dict[str, Tensor]:
    """Losses and logits without gradients, and what is generated, from contexts of different lengths."""
    model.eval()
    ids = row(rank, uneven=True).to(next(model.parameters()).device)
    with torch.set_grad_enabled(frozen):
        found = {"loss": model(ids, labels=ids).loss}
    with torch.no_grad():
        found["logits"] = model(ids).logits
    model.generation_config.eos_token_id = 17  # where one of them stops before the other
    found["text"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def refusals(mesh: Any) -> dict[str, str]:
    ids = random_tokens(LENGTH).to(mesh.device_type)
    found = {}

    def refused(name: str, model: Any, call: Any = lambda model: model(ids, labels=ids)) -> None:
        try:
            call(model)
        except (StrategyError, ValueError) as error:
            found[name] = str(error)

    def fresh(**settings: Any) -> Any:
        return model_of(**settings).to(mesh.device_type)

    refused("truncated", sharded(fresh(bptt="truncated"), mesh))
    scaled = sharded(fresh(), mesh)
    scaled.model.blocks[1].set_gradient_divide_factor(3.0)
    refused("reduction", scaled)
    refused(
        "output_dtype", sharded(fresh(), mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float32))
    )
    refused("float16", sharded(fresh(dtype=torch.float16), mesh))
    quantised = fresh().requires_grad_(False)
    key = quantised.model.blocks[0].channel_mix.key
    key.weight = nn.Parameter(key.weight.data.to(torch.uint8), requires_grad=False)
    quantised.model.blocks[0].channel_mix.value.weight.requires_grad_(True)
    try:
        refused("quantised", sharded(quantised, mesh))
    except RuntimeError as error:  # of FSDP2 in PyTorch 2.11, which takes no such weight itself
        found["quantised"] = str(error)
    refused(
        "cache",
        sharded(fresh(), mesh).eval(),
        lambda model: model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0),
    )
    return found


def work(rank: int, kind: str = "cpu") -> dict[str, Any]:
    mesh = init_device_mesh(kind, (WORLD,))
    sharded_blocks.SMALL = 4  # these weights are small, and shall be freed
    found: dict[str, Any] = {"kind": kind}
    for name, case in CASES.items():
        model = sharded(model_of(**model_settings(case)).to(kind), mesh)
        found[name] = trained(model, [rank], **case)
    parts = [parameter for block in model.model.blocks for parameter in block.parameters()]
    found["kept"] = sum(p.to_local().numel() for p in parts), sum(p.numel() for p in parts)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for bptt in ("full", "reversible"):
        model = sharded(model_of(bptt=bptt, dtype=torch.float32).to(kind), mesh, mp_policy=policy)
        found[f"bfloat16 {bptt}"] = trained(model, [rank])
    for name in ("parts", "parts uneven"):
        model = in_parts(model_of().to(kind), mesh)
        found[f"read in {name}"] = read(model, rank)
        found[name] = trained(model.train(), [rank], uneven=name != "parts")
    frozen = sharded(model_of().requires_grad_(False).to(kind), mesh)
    found["read frozen"] = read(frozen, rank, frozen=True)
    replicas = init_device_mesh(kind, (WORLD, 1), mesh_dim_names=("replicas", "shards"))
    found["replicas"] = trained(sharded(model_of(tune="lora").to(kind), replicas), [rank])
    gathered = sharded(model_of().to(kind), mesh, reshard_after_forward=False)
    found["read"] = read(gathered, rank)
    found["after reading"] = trained(gathered.train(), [rank])
    found["refused"] = refusals(mesh)
    return found


def model_settings(case: Settings) -> Settings:
    return {n: v for n, v in case.items() if n not in ("uneven", "packed", "own_loss", "steps")}


def work_on_gpu(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=WORLD)
    torch.save(work(rank, "cuda"), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA devices"),
            ],
        ),
    ],
)
def by_rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    if request.param == "cpu":
        return in_ranks(work, WORLD, folder)
    torch.multiprocessing.spawn(work_on_gpu, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_as_whole(by_rank: list[dict[str, Any]], name: str, case: Settings) -> None:
    expected = trained(model_of(**model_settings(case)).to(by_rank[0]["kind"]), list(range(WORLD)), **case)
    for rank, found in enumerate(by_rank):
        for key, value in found[name].items():
            truth = expected[key] / (1 / WORLD if key.startswith("state") else 1)
            error = relative_error(value, truth)
            assert error <= TOLERANCES[case.get("dtype", torch.float64)], (rank, key, error)
        assert {key for key in expected if "loss" not in key and "state " not in key} <= found[name].keys()


@pytest.mark.parametrize("name", CASES)
def test_trains_as_the_whole_model(by_rank: list[dict[str, Any]], name: str) -> None:
    assert_as_whole(by_rank, name, CASES[name])


@pytest.mark.parametrize(
    "name, case",
    [
        ("replicas", {"tune": "lora"}),
        ("after reading", {}),
        ("parts", {}),
        ("parts uneven", {"uneven": True}),
    ],
)
def test_other_ways_to_shard(by_rank: list[dict[str, Any]], name: str, case: Settings) -> None:
    assert_as_whole(by_rank, name, case)


def test_reads_as_the_whole_model(by_rank: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(by_rank):
        for name, expected in read(model_of().to(found["kind"]), rank).items():
            for case in ("read", "read in parts", "read frozen"):
                assert relative_error(found[case][name], expected) <= 1e-10, (case, name)


def test_a_process_keeps_its_part(by_rank: list[dict[str, Any]]) -> None:
    parts, numbers = zip(*(found["kept"] for found in by_rank), strict=True)
    assert sum(parts) == numbers[0] and max(parts) < 0.6 * numbers[0]


def test_both_strategies_agree_to_the_bit(by_rank: list[dict[str, Any]]) -> None:
    for found in by_rank:
        one, other = (found[f"5.2 {bptt}"] for bptt in ("checkpoint", "reversible"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_policy_of_mixed_precision(by_rank: list[dict[str, Any]]) -> None:
    """Computed in bfloat16 as ``full`` is; gradients are as far from each other as bfloat16 makes them."""
    for found in by_rank:
        one, other = (found[f"bfloat16 {bptt}"] for bptt in ("full", "reversible"))
        sides = [torch.cat([side[n].flatten() for n in one if "weight" in n]) for side in (one, other)]
        assert relative_error(sides[1], sides[0]) < 3e-2


@pytest.mark.parametrize(
    "name, words",
    [
        ("truncated", "shard the model as one unit"),
        ("reduction", "was given another reduction"),
        ("output_dtype", "has an output_dtype"),
        ("float16", "use bfloat16"),
        ("quantised", r"weight is of torch\.uint8|only Tensors of floating point"),
        ("cache", "without handing out its cache"),
    ],
)
def test_refused_by_name(by_rank: list[dict[str, Any]], name: str, words: str) -> None:
    for found in by_rank:
        assert re.search(words, found["refused"][name])


@pytest.mark.parametrize("bptt", ["reversible", "truncated"])
def test_zero3_is_refused(bptt: str) -> None:
    """Parameters as DeepSpeed leaves them."""
    model = model_of(bptt=bptt)
    for parameter in model.parameters():
        parameter.ds_tensor, parameter.data = parameter.data, torch.empty(0, dtype=parameter.dtype)
    ids = random_tokens(LENGTH)
    with pytest.raises(StrategyError, match=r"ZeRO-3 .* FSDP2"):
        model(ids, labels=ids)
