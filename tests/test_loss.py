"""Sub-chunked cross-entropy: values, gradients, what is allocated, and which token predicts which."""

import pytest
import torch
import torch.nn.functional as F
from bptt_cases import differentiate, random_tokens, relative_error, tiny_model
from test_imports import sources
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv_rev import loss as loss_module
from rwkv_rev import position_wise
from rwkv_rev.loss import (
    IGNORE,
    LOGITS_AT_ONCE,
    add_gradients,
    cross_entropy_gradients,
    linear_cross_entropy,
    next_token_targets,
    sum_cross_entropy,
)


@position_wise
class LargestTensor(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(options or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return result


def trainable(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


# --- what is allocated ------------------------------------------------------------------------------------------


STRATEGIES = ["full", "checkpoint", "reversible", "truncated"]


def largest_tensor(strategy: str, vocab: int, chunk: int) -> int:
    """Elements of the largest tensor while a tiny model is differentiated over a chunk and a tail."""
    model = tiny_model("5.2", vocab_size=vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    tokens = random_tokens(chunk if strategy == "full" else chunk + 10, vocab=vocab)
    with LargestTensor() as memory:
        differentiate(model, strategy, chunk, input_ids=tokens)
    with torch.no_grad(), memory, model.set_bptt(strategy, chunk_length=chunk):
        model(tokens, labels=tokens)
    return memory.largest


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_of_a_chunk_never_exist_at_once(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """No tensor is beyond a sub-chunk of logits: forward, backward or streaming. In small, V = 2048 at chunk 256."""
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 2**16)
    assert largest_tensor(strategy, 2048, 256) == 2**16 < 2048 * 256


@pytest.mark.slow
def test_logits_of_a_large_vocabulary() -> None:
    """V = 65536 at chunk 1040, more than a quarter of a GiB of logits in float32: a quarter at once."""
    assert largest_tensor("reversible", 65536, 1040) == LOGITS_AT_ONCE == 65536 * 1024


def test_the_recorder_sees_logits() -> None:
    """The measurement above would notice: plain logits are C x V."""
    model, tokens = tiny_model("5.2", vocab_size=4096), random_tokens(512)
    with LargestTensor() as memory, torch.no_grad():
        model(tokens)
    assert memory.largest == 512 * 4096


# --- values and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 32 * 7, 32 * 15, 2**25])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_loss(monkeypatch: pytest.MonkeyPatch, at_once: int, bias: bool) -> None:
    """Whatever the sub-chunk, the loss and its gradients are cross_entropy's own."""
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    head = nn.Linear(6, 32, bias=bias).double()
    hidden = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(32, (3, 5))
    targets[0, 1:4] = IGNORE
    plain = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum") * 0.25
    expected = torch.autograd.grad(plain, [hidden, *head.parameters()])

    loss = linear_cross_entropy(hidden, head, targets, scale=0.25, vocab_size=32, parameters=trainable(head))
    found = torch.autograd.grad(3 * loss, [hidden, *head.parameters()])
    streamed = sum_cross_entropy(hidden, head, targets, scale=0.25, vocab_size=32)
    finished = cross_entropy_gradients(
        hidden, head, targets, list(head.parameters()), scale=0.25, vocab_size=32, loss_scale=8.0
    )
    for value in (loss, streamed, finished[0]):
        assert value.item() == pytest.approx(plain.item(), rel=1e-12)
    for gradient, scaled, truth in zip(found, [finished[1], *finished[2]], expected, strict=True):
        assert scaled is not None
        assert torch.allclose(gradient, 3 * truth, rtol=1e-12)
        assert torch.allclose(scaled, 8 * truth, rtol=1e-12)


def test_frozen_head() -> None:
    """A head without trainable parameters still passes the gradient on."""
    head = nn.Linear(6, 32, bias=False).requires_grad_(False)
    hidden, targets = torch.randn(2, 4, 6, requires_grad=True), torch.randint(32, (2, 4))
    loss = linear_cross_entropy(hidden, head, targets, scale=1.0, vocab_size=32, parameters=trainable(head))
    truth = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    (found,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(truth, hidden)
    assert relative_error(found, expected) < 1e-6
    assert head.weight.grad is None


def test_no_gradient_wanted() -> None:
    head = nn.Linear(6, 32)
    hidden, targets = torch.randn(2, 4, 6), torch.randint(32, (2, 4))
    with torch.no_grad():
        assert not linear_cross_entropy(
            hidden, head, targets, scale=1.0, vocab_size=32, parameters=trainable(head)
        ).requires_grad


def test_half_precision_is_summed_in_float32() -> None:
    """Sums of many small gradients keep what bfloat16 sums would round away."""
    small = torch.full((4,), 2.0**-9, dtype=torch.bfloat16)
    sums: list[Tensor | None] = [torch.ones(4)]
    for _ in range(256):
        sums = add_gradients(sums, [small])
    assert torch.equal(sums[0], torch.full((4,), 1.5))  # type: ignore[arg-type]
    first = add_gradients([None, None], [small, None])
    assert first[0] is not None and first[0].dtype == torch.float32 and first[1] is None
    assert first[0].data_ptr() != small.data_ptr()


def test_backward_a_second_time_is_refused() -> None:
    head, hidden = nn.Linear(6, 32), torch.randn(2, 4, 6, requires_grad=True)
    loss = linear_cross_entropy(
        hidden, head, torch.randint(32, (2, 4)), scale=1.0, vocab_size=32, parameters=trainable(head)
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the model again"):
        loss.backward()


# --- who predicts whom ------------------------------------------------------------------------------------------


def test_targets_without_a_mask() -> None:
    labels = torch.tensor([[5, 6, IGNORE, 8]])
    assert next_token_targets(labels, None).tolist() == [[6, IGNORE, 8, IGNORE]]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        pytest.param([1, 1, 1, 1, 1], [11, 12, 13, 14, -100], id="none"),
        pytest.param([0, 0, 1, 1, 1], [-100, -100, 13, 14, -100], id="left"),
        pytest.param([1, 1, 1, 0, 0], [11, 12, -100, -100, -100], id="right"),
        pytest.param([1, 0, 0, 1, 1], [13, -100, -100, 14, -100], id="hole"),
        pytest.param([0, 1, 0, 1, 0], [-100, 13, -100, -100, -100], id="holes"),
        pytest.param([0, 0, 1, 0, 0], [-100] * 5, id="one"),
        pytest.param([0, 0, 0, 0, 0], [-100] * 5, id="empty"),
    ],
)
def test_targets_with_a_mask(mask: list[int], expected: list[int]) -> None:
    """A token predicts the label of the row's next valid token; nothing else predicts or is predicted."""
    labels = torch.arange(10, 15)[None]
    assert next_token_targets(labels, torch.tensor([mask]).bool()).tolist() == [expected]


def test_targets_are_those_of_the_compacted_row() -> None:
    """Random masks: dropping the masked tokens first gives the same targets."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(50, 13, generator=generator) < 0.6
    labels = torch.randint(100, (50, 13), generator=generator)
    found = next_token_targets(labels, valid)
    for row in range(50):
        kept = labels[row][valid[row]]
        expected = torch.cat([kept[1:], torch.tensor([IGNORE])])[: len(kept)]
        assert torch.equal(found[row][valid[row]], expected)
        assert (found[row][~valid[row]] == IGNORE).all()


def test_there_is_one_cross_entropy() -> None:
    """Its precision and what it ignores are said once."""
    found = {module for module, path in sources().items() if ".cross_entropy(" in path.read_text("utf-8")}
    assert found == {"rwkv_rev.loss"}
