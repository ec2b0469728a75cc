"""What the head is handed beside a loss: tokens in rows, and all of them where it may look at positions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bptt_cases import random_tokens, relative_error, tiny_model
from test_evaluate import BYTES
from token_data import make_store
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from rwkv_rev import RwkvRevForCausalLM, position_wise
from rwkv_rev import loss as loss_module
from rwkv_rev.errors import StrategyError
from rwkv_rev.loss import sub_chunks
from rwkv_rev.training.evaluate import evaluate_documents

LENGTH, VOCAB, AGREE = 23, 32, 1e-12
IDS = random_tokens(LENGTH, batch=2)
LABELS = IDS.masked_fill(torch.arange(LENGTH) % 7 == 3, -100)


def running_mean(x: Tensor) -> Tensor:
    return x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None]


class LooksBack(nn.Module):
    """The logits of a token also see the mean of those before it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x + running_mean(x))
        return logits


@contextmanager
def looking(model: RwkvRevForCausalLM, place: str) -> Iterator[None]:
    """With a head that looks at positions."""

    def before(module: nn.Module, given: Any) -> Any:
        return (given[0] + given[0].mean(-2, keepdim=True),)

    def behind(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output + running_mean(output)

    def everywhere(module: nn.Module, given: Any, output: Any) -> Any:
        return behind(module, given, output) if module is model.head else None

    hook: Any = None
    if place == "module":
        model.head = LooksBack(model.head)
    elif place == "pre-hook":
        model.head.register_forward_pre_hook(before)
    elif place == "hook":
        model.head.register_forward_hook(behind)
    elif place == "hook below":
        model.head = nn.Sequential(nn.Identity(), model.head)
        model.head[0].register_forward_hook(behind)
    elif place == "forward":
        forward = model.head.forward
        model.head.forward = lambda x: forward(x + running_mean(x))
    else:
        hook = module_globals.register_module_forward_hook(everywhere)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


PLACES = ("module", "pre-hook", "hook", "hook below", "forward", "global hook")


def model_of(version: str = "5.2") -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of two rows; the last piece has three."""
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", VOCAB * 11)


def of_logits(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())


def gradients(model: RwkvRevForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
@pytest.mark.parametrize("place", PLACES)
def test_an_undeclared_head_sees_all_tokens(place: str, version: str) -> None:
    """The loss and the gradient of its logits."""
    model = model_of(version)
    with looking(model, place):
        with model.set_bptt("full"):
            plain = of_logits(model(IDS).logits)
            expected = gradients(model, plain)
        for strategy in ("full", "auto"):
            with model.set_bptt(strategy):
                loss = model(IDS, labels=LABELS).loss
                found = gradients(model, loss)
            assert loss.item() == pytest.approx(plain.item(), rel=AGREE), strategy
            assert found.keys() == expected.keys()
            for name, truth in expected.items():
                assert relative_error(found[name], truth) < 1e-10, (strategy, name)
        with model.set_bptt("reversible", chunk_length=7), pytest.raises(StrategyError, match="bptt='full'"):
            model(IDS, labels=LABELS)


@pytest.mark.parametrize("place", PLACES)
def test_an_undeclared_head_in_evaluation(place: str) -> None:
    """In every strategy, over one chunk and several; what is read of its logits afterwards are these."""
    model = model_of().eval()
    with looking(model, place), torch.no_grad():
        logits = model(IDS).logits
        for strategy in ("full", "auto", "checkpoint", "reversible", "truncated"):
            for chunk in (7, LENGTH):
                with model.set_bptt(strategy, chunk_length=chunk):
                    output = model(IDS, labels=LABELS)
                    kept = model(IDS, labels=LABELS, return_logits=True)
                assert output.loss.item() == pytest.approx(of_logits(logits).item(), rel=AGREE)
                assert kept.loss.item() == pytest.approx(output.loss.item(), rel=AGREE)
                assert torch.allclose(output.logits + 0, logits, rtol=AGREE)


def test_weights_of_tokens() -> None:
    model, weights = model_of(), torch.rand(2, LENGTH, dtype=torch.float64)
    with looking(model, "module"):
        nats = F.cross_entropy(
            model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none"
        )
        of_each = weights[:, 1:].flatten()
        expected = (nats * of_each).sum() / of_each.sum()
        found = model(IDS, labels=IDS, loss_weights=weights).loss
    assert found.item() == pytest.approx(expected.item(), rel=AGREE)


@position_wise
class Unpacks(nn.Module):
    """Takes rows and tokens apart, and keeps the shapes that it has seen."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.seen = head, set[tuple[int, ...]]()

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, size = x.shape
        self.seen.add((rows, tokens))
        return self.head(x.reshape(rows * tokens, size)).view(rows, tokens, -1)


@pytest.mark.parametrize(("strategy", "chunk"), [("full", LENGTH), ("checkpoint", 7), ("reversible", 7)])
def test_a_declared_head_sees_rows_and_tokens(strategy: str, chunk: int) -> None:
    """[B, n, D], of no more logits than are made at once."""
    model = model_of()
    with model.set_bptt("full"):
        plain = of_logits(model(IDS).logits)
        expected = gradients(model, plain)
    model.head = Unpacks(model.head)
    with model.set_bptt(strategy, chunk_length=chunk):
        loss = model(IDS, labels=LABELS).loss
        found = gradients(model, loss)
        with torch.no_grad():
            streamed = model(IDS, labels=LABELS).loss
    assert loss.item() == pytest.approx(plain.item(), rel=AGREE)
    assert streamed.item() == pytest.approx(plain.item(), rel=AGREE)
    for name, truth in expected.items():
        name = name.replace("head.", "head.head.")
        assert relative_error(found[name], truth) < 1e-10, name
    assert model.head.seen == ({(2, 5), (2, 3)} if strategy == "full" else {(2, 5), (2, 2)})


def test_undeclared_code_elsewhere_leaves_logits_in_pieces() -> None:
    model = model_of()
    model.head = Unpacks(model.head)
    model.model.blocks[0].register_forward_hook(lambda module, given, output: None)
    model(IDS, labels=LABELS).loss.backward()
    with torch.no_grad():
        model(IDS, labels=LABELS)
    assert model.head.seen == {(2, 5), (2, 3)}


@pytest.mark.parametrize(("rows", "length"), [(1, 30), (2, 23), (11, 3), (12, 2), (25, 4)])
def test_pieces_hold_each_token_once(rows: int, length: int) -> None:
    """However many rows there are."""
    seen = torch.zeros(rows, length)
    for piece in sub_chunks((rows, length), VOCAB):
        assert 0 < seen[piece].numel() <= 11
        seen[piece] += 1
    assert (seen == 1).all()
    assert len(sub_chunks((rows, length), VOCAB, whole=True)) == 1


@pytest.mark.parametrize("kind", [LooksBack, Unpacks])
@pytest.mark.parametrize("rows", [1, 2])
def test_documents(tmp_path: Path, kind: Callable[..., nn.Module], rows: int) -> None:
    """``evaluate_documents`` hands a head the same."""
    store = make_store(tmp_path, [20, 33])
    model = tiny_model("5.2", dtype=torch.float64, vocab_size=256).eval()
    model.head = kind(model.head)
    nats = 0.0
    with torch.no_grad():
        for document, length in enumerate((20, 33)):
            ids = torch.from_numpy(store.tokens(document, 0, length))[None].long()
            nats += F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
    with model.set_bptt("auto", chunk_length=7):
        found = evaluate_documents(model, store, BYTES, context_length=64, batch_size=rows)
    assert found.total.tokens == 51 and found.total.nats == pytest.approx(nats, rel=AGREE)
