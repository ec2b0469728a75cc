"""DistributedDataParallel over two processes (gloo): gradients equal those of one process on the joined batch."""

from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, relative_error, tiny_model
from processes import in_ranks
from torch import Tensor, nn

from rwkv_rev.errors import StrategyError

CHUNK, LENGTH = 8, 21
ROWS = 4
WORLD = 2

CASES = ["RWKV-5", "RWKV-4", "masked", "checkpointed blocks", "nothing to predict", "weighted"]

pytestmark = pytest.mark.dist


def inputs(case: str, rank: int | None) -> dict[str, Tensor]:
    """The batch of a rank, or the joined batch for None. Rows of a case predict equally many tokens per rank."""
    tokens = random_tokens(LENGTH, batch=ROWS)
    labels = tokens.clone()
    batch = {"input_ids": tokens, "labels": labels}
    if case == "masked":
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
        mask[3, 14:19] = 0
        batch["attention_mask"] = mask
    if case == "nothing to predict":
        labels[:2] = -100
    if case == "weighted":  # in each row the same weights in another order, so that they sum to the same
        weights = torch.linspace(0, 3, LENGTH)
        batch["loss_weights"] = torch.stack(
            [weights.roll(7 * row).index_fill(0, torch.tensor(0), 0) for row in range(ROWS)]
        )
        batch["loss_weights"] *= (weights.sum() / batch["loss_weights"].sum(1))[:, None]
    if rank is not None:
        half = ROWS // WORLD
        batch = {name: tensor[rank * half : (rank + 1) * half] for name, tensor in batch.items()}
    return batch


def model_of(case: str) -> nn.Module:
    model = tiny_model("4" if case == "RWKV-4" else "5.2", chunk_length=CHUNK, bptt="reversible")
    if case == "checkpointed blocks":
        model.model.gradient_checkpointing = True
    return model


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(rank: int, case: str) -> dict[str, dict[str, Tensor]]:
    """Two steps of DistributedDataParallel, then accumulation without and with synchronisation."""
    model = model_of(case)
    # small buckets, so that reduction of some overlaps others
    parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.002)
    found = {}
    batch = inputs(case, rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        parallel(**batch).loss.backward()
        found[f"step {step}"] = gradients_of(model)
        optimizer.step()
    optimizer.zero_grad()
    with parallel.no_sync():
        (parallel(**{name: tensor[:1] for name, tensor in batch.items()}).loss / 2).backward()
    (parallel(**{name: tensor[1:] for name, tensor in batch.items()}).loss / 2).backward()
    found["accumulated"] = gradients_of(model)
    return found


def train_by_states(rank: int, kind: str) -> dict[str, Any]:
    """By a loss of the state alone, which is refused, and by one that every parameter has a part in."""
    found: dict[str, Any] = {}
    for static in (False, True):
        model = model_of("RWKV-5").double()
        parallel = nn.parallel.DistributedDataParallel(model, static_graph=static)
        for step in range(3):
            if static and step == 0:
                with pytest.raises(StrategyError, match=r"static_graph=True.*0 \* output.logits.sum"):
                    states_loss(parallel, rank, kind, 0).backward()
                model = model_of("RWKV-5").double()
                parallel = nn.parallel.DistributedDataParallel(model, static_graph=True)
            model.zero_grad()
            states_loss(parallel, rank, kind, 1).backward()
            found[f"{static} {step}"] = gradients_of(model)
    return found


def states_loss(model: nn.Module, rank: int, kind: str, logits: float) -> Tensor:
    """Of the last state, or of those of all documents, and of so much of the logits."""
    borders = torch.zeros(1, LENGTH, dtype=torch.bool)
    borders[0, 9] = True
    given = {"borders": borders, "return_document_states": True} if kind == "document_states" else {}
    output = model(input_ids=random_tokens(LENGTH, seed=rank), **given)
    loss = output[kind].wkv.tanh().mean()
    return loss + logits * output.logits.tanh().mean() if logits else loss


STATES = ["state", "document_states"]


def work(rank: int) -> dict[str, dict[str, Any]]:
    """One process: every case in turn."""
    return {case: train(rank, case) for case in CASES} | {
        kind: train_by_states(rank, kind) for kind in STATES
    }


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    """Gradients by rank, case and place."""
    return in_ranks(work, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(by_rank: list[dict[str, dict[str, dict[str, Tensor]]]], case: str) -> None:
    """Each step's gradients, and those of accumulation under ``no_sync``, on both ranks."""
    ranks = [found[case] for found in by_rank]
    model = model_of(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected = {}
    # a rank that predicts nothing still counts in the mean over ranks
    share = 0.5 if case == "nothing to predict" else 1.0
    for step in range(2):
        optimizer.zero_grad()
        (share * model(**inputs(case, None)).loss).backward()
        expected[f"step {step}"] = gradients_of(model)
        optimizer.step()
    optimizer.zero_grad()
    for rank in range(WORLD):
        batch = inputs(case, rank)
        for row in range(ROWS // WORLD):
            (model(**{name: tensor[row : row + 1] for name, tensor in batch.items()}).loss / ROWS).backward()
    expected["accumulated"] = gradients_of(model)

    for place, truth in expected.items():
        for rank in ranks:
            for name, gradient in truth.items():
                assert relative_error(rank[place][name], gradient) <= 2e-5, (place, name)
        for name, gradient in ranks[0][place].items():
            assert torch.equal(gradient, ranks[1][place][name])


@pytest.mark.parametrize("kind", STATES)
def test_a_loss_of_states(by_rank: list[dict[str, Any]], kind: str) -> None:
    """``static_graph=True`` looks for tensors in PyTorch's trees, of which states are leaves."""
    model = model_of("RWKV-5").double()
    model.set_bptt("full")
    sum(states_loss(model, rank, kind, 1) / WORLD for rank in range(WORLD)).backward()
    for rank in by_rank:
        for place, gradients in rank[kind].items():
            for name, truth in gradients_of(model).items():
                assert relative_error(gradients[name], truth) <= 1e-10, (place, name)
