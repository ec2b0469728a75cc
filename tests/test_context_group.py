"""What is refused where ranks share a context, and how an error of one becomes one of all."""

import copy
import io
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from bptt_cases import random_tokens, tiny_model
from processes import in_ranks

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM, position_wise
from rwkv_rev.architectures.registry import architecture
from rwkv_rev.distributed import agreement
from rwkv_rev.errors import ContextParallelError, ReversalMismatchError, RwkvRevError, StrategyError

WORLD = 2
SHORTLY = 20
"""Seconds; a second is how long an error may stay unseen."""

pytestmark = pytest.mark.dist


def model_of(version: str = "5.2", strategy: str = "reversible", chunk: int = 8, **config: Any) -> Any:
    model = tiny_model(version, chunk_length=chunk, bptt=strategy, **config)
    model.set_context_parallel(dist.group.WORLD)
    return model


def loss(model: Any, rank: int = 0, **inputs: Any) -> None:
    tokens = random_tokens(30)
    model(tokens, labels=tokens, **inputs).loss.backward()


def other_batch(rank: int) -> None:
    tokens = random_tokens(30, seed=rank)
    model_of()(tokens, labels=tokens)


def other_labels(rank: int) -> None:
    tokens = random_tokens(30)
    model_of()(tokens, labels=torch.full_like(tokens, rank))


def other_chunk(rank: int) -> None:
    loss(model_of(chunk=8 + rank))


def other_weights(rank: int) -> None:
    loss(model_of(seed=rank))


def other_head(rank: int) -> None:
    model = model_of()
    if rank:  # no state depends on it
        model.head.weight.data[3, 2] += 1e-3
    loss(model)


def other_places(rank: int) -> None:
    model = model_of()
    one, other = (block.time_mix.key.weight for block in model.blocks[:2])
    if rank:
        one.data, other.data = other.data, one.data
    loss(model)


def other_rows(rank: int) -> None:
    model = model_of()
    if rank:
        model.head.weight.data = model.head.weight.data.flip(0)
    loss(model)


def other_buffer(rank: int) -> None:
    class Steered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("direction", torch.full((16,), 0.1 * rank), persistent=False)

        def forward(self, module: Any, given: Any, x: torch.Tensor) -> torch.Tensor:
            return x + self.direction

    model = model_of()
    model.blocks[0].ln1.steered = steered = Steered()
    model.blocks[0].ln1.register_forward_hook(position_wise(steered))
    loss(model)


def other_scale(rank: int) -> None:
    model = tiny_model("5.2", chunk_length=8, bptt="reversible")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8 + rank, init_lora_weights=False))
    model.set_context_parallel(dist.group.WORLD)
    loss(adapted)


def other_epsilon(rank: int) -> None:
    model = model_of()
    model.blocks[1].ln1.eps = 1e-5 + 1e-2 * rank
    loss(model)


def full(rank: int) -> None:
    loss(model_of(strategy="full"))


def lossy(rank: int) -> None:
    loss(model_of("4", strategy="reversible-lossy"))


def own_loss(rank: int) -> None:
    model_of()(random_tokens(30)).logits.sum().backward()


def lifted(rank: int) -> None:
    model = model_of("7")
    model.set_bptt("reversible", remnants="lifted")
    loss(model)


def logits_beside(rank: int) -> None:
    tokens = random_tokens(30)
    model_of()(tokens, labels=tokens, return_logits=True)


def no_rwkv(rank: int) -> None:
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 32, **architecture("coupled").sizes(12)}
    model = RwkvRevForCausalLM(RwkvRevConfig(rwkv_version="coupled", **sizes))
    model.set_bptt("reversible", chunk_length=8)
    model.set_context_parallel(dist.group.WORLD)
    loss(model)


def no_group(rank: int) -> None:
    model_of().set_context_parallel("cp")


class Broken(Exception):
    pass


def one_fails(rank: int) -> None:
    """In the third call of a layer on rank 1."""
    model, calls = model_of(), []

    def hook(*_: Any) -> None:
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            raise Broken("no memory left\nand more lines")

    model.model.blocks[1].register_forward_hook(position_wise(hook))
    loss(model)


def one_mismatches(rank: int) -> None:
    """Weights of rank 1 change between the sweeps, behind our back."""
    model, calls = model_of(), []

    def hook(module: Any, *_: Any) -> None:
        calls.append(1)
        if rank == 1 and len(calls) == 6:  # of the second sweep
            module.ln2.bias.data = module.ln2.bias.data + 0.1

    model.model.blocks[0].register_forward_hook(position_wise(hook))
    loss(model)


REFUSED: dict[str, tuple[Callable[[int], None], type[RwkvRevError], str]] = {
    "another batch": (
        other_batch,
        ContextParallelError,
        "the input of rank 1 of the context group is not that of rank 0",
    ),
    "other labels": (other_labels, ContextParallelError, "the labels of rank 1"),
    "another chunk": (other_chunk, ContextParallelError, "the gradient settings (strategy, chunk_length"),
    "other weights": (
        other_weights,
        ContextParallelError,
        "the weights or buffers of rank 1 of the context group is not that",
    ),
    "weights of other layers": (other_places, ContextParallelError, "the weights or buffers of rank 1"),
    "rows in another order": (other_rows, ContextParallelError, "the weights or buffers of rank 1"),
    "another buffer": (other_buffer, ContextParallelError, "the weights or buffers of rank 1"),
    "another scale": (other_scale, ContextParallelError, "what modules go by (scales of adapters, eps"),
    "another epsilon": (other_epsilon, ContextParallelError, "make the same model on every rank"),
    "another output layer": (other_head, ContextParallelError, "start all ranks from the same weights"),
    "full": (full, StrategyError, "use 'reversible'"),
    "lossy": (lossy, StrategyError, "cannot be divided back; use 'reversible'"),
    "a loss of one's own": (own_loss, StrategyError, "give the model labels"),
    "lifted states": (lifted, StrategyError, "use remnants='whole'"),
    "logits beside the loss": (
        logits_beside,
        StrategyError,
        "return_logits is not there under context parallelism",
    ),
    "another cell": (
        no_rwkv,
        StrategyError,
        "is not passed between ranks: context parallelism is for RWKV-4, 5, 6 and 7",
    ),
    "no group": (
        no_group,
        ContextParallelError,
        "takes a torch.distributed process group or a device mesh, not a str",
    ),
}


def outcome(call: Callable[[int], None], rank: int) -> tuple[str, str, float]:
    """The error's type and text, and seconds."""
    start = time.perf_counter()
    try:
        call(rank)
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return "", "", time.perf_counter() - start


def refused(rank: int) -> dict[str, tuple[str, str, float]]:
    found = {name: outcome(call, rank) for name, (call, _, _) in REFUSED.items()}
    found["afterwards"] = outcome(lambda _: loss(model_of()), rank)
    return found


def read_alone(rank: int) -> dict[str, Any]:
    """Without gradients, by each rank for itself; copies and files of a model."""
    model = model_of()
    tokens = random_tokens(30)
    with torch.no_grad():
        logits = model(tokens).logits
        value = model(tokens, labels=tokens).loss
        model.set_context_parallel(None)
        alone = model(tokens, labels=tokens).loss
    model.set_context_parallel(dist.group.WORLD)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    loss(copied)
    return {
        "logits": logits,
        "losses": (value, alone),
        "copied": copied.model.context_group is model.model.context_group,
        "read": read.model.context_group,
    }


def failing(rank: int) -> dict[str, tuple[str, str, float]]:
    first = outcome(one_fails, rank)
    return {
        "fails": first,
        "afterwards": outcome(lambda _: loss(model_of()), rank) if rank == 9 else ("", "", 0.0),
    }


def mismatching(rank: int) -> dict[str, tuple[str, str, float]]:
    return {"mismatches": outcome(one_mismatches, rank)}


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str, float]]]:
    return in_ranks(refused, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", list(REFUSED))
def test_is_refused_on_every_rank(by_rank: list[dict[str, tuple[str, str, float]]], name: str) -> None:
    _, kind, words = REFUSED[name]
    for found in by_rank:
        assert found[name][0] == kind.__name__, found[name]
        assert words in found[name][1]


def test_the_group_works_after_a_refusal(by_rank: list[dict[str, tuple[str, str, float]]]) -> None:
    assert [found["afterwards"][0] for found in by_rank] == ["", ""]


def test_without_gradients(tmp_path: Any) -> None:
    expected = tiny_model("5.2").eval()
    for found in in_ranks(read_alone, WORLD, tmp_path):
        assert torch.allclose(found["logits"], expected(random_tokens(30)).logits, atol=1e-5)
        one, other = found["losses"]
        assert torch.allclose(one, other, rtol=1e-6)
        assert found["copied"] and found["read"] is None


def test_an_error_of_one_rank_ends_all(tmp_path: Any) -> None:
    other, own = (found["fails"] for found in in_ranks(failing, WORLD, tmp_path))
    assert own[0] == "Broken"
    assert other[0] == ContextParallelError.__name__
    assert other[1] == "rank 1 of the context group failed: Broken: no memory left"
    assert max(own[2], other[2]) < SHORTLY


def test_a_mismatch_on_one_rank_ends_all(tmp_path: Any) -> None:
    found = [each["mismatches"] for each in in_ranks(mismatching, WORLD, tmp_path)]
    assert all(
        kind in (ReversalMismatchError.__name__, ContextParallelError.__name__) for kind, *_ in found
    ), found
    assert any(kind == ReversalMismatchError.__name__ for kind, *_ in found)
    assert max(seconds for *_, seconds in found) < SHORTLY


@pytest.mark.parametrize("setting", ["cp_size", "sp_size"])
@pytest.mark.parametrize("own_loss", [False, True])
def test_contexts_that_accelerate_splits_are_refused(
    monkeypatch: pytest.MonkeyPatch, setting: str, own_loss: bool
) -> None:
    """As its ``Accelerator(parallelism_config=...)`` leaves the state that all share."""
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState

    if setting not in {field.name for field in fields(ParallelismConfig)}:
        pytest.skip("this accelerate has no such setting")
    more = {"sp_backend": "deepspeed"} if setting == "sp_size" else {}
    config = ParallelismConfig(**{setting: 2}, **more)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", config)
    model, ids = tiny_model("5.2"), random_tokens(30)
    with pytest.raises(StrategyError, match=rf"{setting} = 2: .* model\.set_context_parallel"):
        model(ids, labels=None if own_loss else ids)
    with torch.no_grad():
        model(ids)  # every process reads its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("one", "other"), [(3, 9), (3, 40_003), (4_096, 16_384), (50_000, 50_001)])
def test_words_that_have_changed_places(dtype: torch.dtype, one: int, other: int) -> None:
    """In a row of the table that is summed, in a column, in both, and in what fills no row."""
    tensor = torch.arange(50_003).remainder(97).to(dtype)
    moved = tensor.clone()
    moved[one], moved[other] = tensor[other], tensor[one]
    assert not torch.equal(moved, tensor)
    device = torch.device("cpu")
    first, second, again = (agreement._weights([each], device) for each in (tensor, moved, tensor.clone()))
    assert first == again and first != second
