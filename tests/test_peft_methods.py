"""peft's methods, all of them by name: exact, or refused by name; and the table of this in ``docs/peft.md``.

Exact means: where nothing is drawn, the gradient is that of ``full``; where something is, that of one graph over the
chunks with the same draws; evaluation in chunks gives what one piece gives; generation with the state carried gives
what reading everything again for each token gives. ``pytest tests/test_peft_methods.py --write-docs`` writes the table.
"""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import relative_error, tiny_model
from one_graph import in_one_graph
from peft.utils.peft_types import PeftType
from peft_cases import METHODS, Method, made, tokens
from peft_page import peft_page
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM, base_model
from rwkv_rev.errors import StrategyError

TOLERANCE = 1e-9
"""Relative RMS error per parameter, in float64."""
ROUNDING = 1e-10
"""The same, of the whole gradient: that of a scalar is a sum in which nearly everything may cancel."""
IN_FLOAT32 = ("C3A", "DEFT", "FourierFT")
"""Methods that compute in float32 whatever the model's dtype."""
OF_FLOAT32 = 1000
"""A factor on both tolerances for them."""
CHUNK = 10
"""A chunk length: three chunks, the last of them shorter. Virtual tokens before the text move the borders."""
STRATEGIES = ("reversible", "checkpoint")
WHOLE = 64
"""A chunk length for one piece."""
DOCS = Path(__file__).parents[1] / "docs" / "peft.md"

# peft still uses names that transformers 5 renamed, and warns of much of its own
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore::UserWarning:peft"
)


_shared: dict[str, tuple[RwkvRevForCausalLM, nn.Module]] = {}


def shared(method: Method, folder: Path) -> tuple[RwkvRevForCausalLM, nn.Module]:
    """As ``made``, once for all tests that change nothing of it, nor see an error inside."""
    if str(method) not in _shared:
        _shared[str(method)] = made(method, folder)
    model, wrapped = _shared[str(method)]
    return model, wrapped.train()


def gradients(
    model: RwkvRevForCausalLM, wrapped: nn.Module, strategy: str, length: int, seed: int = 5, **inputs: Any
) -> dict[str, Tensor]:
    """Gradients by name, and the loss, of what is trained."""
    wrapped.zero_grad()
    torch.manual_seed(seed)
    ids = tokens()
    with model.set_bptt(strategy, chunk_length=length):
        loss = wrapped(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def assert_equal_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], what: Any, factor: float = 1
) -> None:
    assert found.keys() == expected.keys()
    whole = sum(float(gradient.double().norm()) ** 2 for gradient in expected.values()) ** 0.5
    for name, gradient in expected.items():
        error = float((found[name] - gradient).double().norm())
        allowed = factor * (TOLERANCE * float(gradient.double().norm()) + ROUNDING * whole)
        assert error <= allowed, (what, name, error)


def test_every_method_of_peft_is_named() -> None:
    """A new one has to be looked at, and put into ``tests/peft_cases.py``."""
    named = [kind for method in METHODS for kind in method.kinds]
    assert len(named) == len(set(named))
    assert {kind.value for kind in PeftType} <= set(named)


@pytest.mark.parametrize("method", [m for m in METHODS if m.training == "exact"], ids=str)
def test_gradient(method: Method, tmp_path: Path) -> None:
    """Equal to that of ``full``, with every dropout off."""
    model, wrapped = shared(method, tmp_path)
    if method.draws == "always":
        wrapped.eval()
    expected = gradients(model, wrapped, "full", WHOLE, **method.inputs)
    assert any(bool(gradient.any()) for name, gradient in expected.items() if name != "loss")
    factor = OF_FLOAT32 if str(method) in IN_FLOAT32 else 1
    found = gradients(model, wrapped, "reversible", CHUNK, **method.inputs)
    assert_equal_gradients(found, expected, "reversible", factor)


@pytest.mark.parametrize("method", [m for m in METHODS if m.draws != "never"], ids=str)
def test_gradient_of_what_was_drawn(method: Method, tmp_path: Path) -> None:
    """Dropouts on: equal to that of one graph over the chunks, with the same draws; by ``checkpoint`` for a third."""
    model, wrapped = made(method, tmp_path, draws=True)
    with in_one_graph(CHUNK):
        expected = gradients(model, wrapped, "full", CHUNK, **method.inputs)
        with torch.no_grad():
            torch.manual_seed(6)
            other = wrapped(input_ids=tokens(), labels=tokens(), **method.inputs).loss
    assert other != expected["loss"], "nothing is drawn"
    for strategy in STRATEGIES if METHODS.index(method) % 3 == 0 else ("reversible",):
        found = gradients(model, wrapped, strategy, CHUNK, **method.inputs)
        assert_equal_gradients(found, expected, strategy)


@pytest.mark.parametrize("method", [m for m in METHODS if m.training == "full only"], ids=str)
def test_gradient_in_chunks_is_refused(method: Method, tmp_path: Path) -> None:
    model, wrapped = made(method, tmp_path)
    found = gradients(model, wrapped, "full", WHOLE, **method.inputs)
    assert any(bool(gradient.any()) for name, gradient in found.items() if name != "loss")
    for strategy in STRATEGIES:
        with pytest.raises(StrategyError, match=method.refusal):
            gradients(model, wrapped, strategy, CHUNK, **method.inputs)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the pieces that the blocks have read, one after another."""
    read: list[int] = []
    run = base_model.run_layers

    def counted(blocks: Any, x: Tensor, *others: Any, **named: Any) -> Any:
        read.append(x.shape[1])
        return run(blocks, x, *others, **named)

    monkeypatch.setattr(base_model, "run_layers", counted)
    return read


@cache
def logits_without_adapter() -> Tensor:
    return tiny_model("5.2").double().eval()(tokens()).logits


@pytest.mark.parametrize("method", [m for m in METHODS if m.evaluation != "refused"], ids=str)
@torch.no_grad()
def test_evaluation(method: Method, tmp_path: Path, pieces: list[int]) -> None:
    """Logits and loss of a text longer than a chunk: equal to those of one piece, and read as the table says."""
    model, wrapped = shared(method, tmp_path)
    wrapped.eval()
    ids = tokens()
    outputs = []
    for length in (WHOLE, CHUNK):
        model.set_bptt("auto", chunk_length=length)
        pieces.clear()
        logits = wrapped(input_ids=ids, **method.inputs).logits
        chunks = min(pieces) < ids.shape[1]
        outputs.append((logits, wrapped(input_ids=ids, labels=ids, **method.inputs).loss))
    (whole, loss), (cut, summed) = outputs
    assert chunks == (method.evaluation == "in chunks"), pieces
    torch.testing.assert_close(cut, whole, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(summed, loss, rtol=1e-7, atol=0)
    assert relative_error(whole[:, -ids.shape[1] :], logits_without_adapter()) > 1e-3, (
        "the adapter does nothing"
    )


def greedy(wrapped: nn.Module, prompt: Tensor, count: int, **inputs: Any) -> Tensor:
    """The prompt [B, T] and ``count`` more tokens, everything read again for each of them."""
    for _ in range(count):
        following = wrapped(input_ids=prompt, **inputs).logits[:, -1].argmax(dim=-1)
        prompt = torch.cat([prompt, following[:, None]], dim=1)
    return prompt


@pytest.mark.parametrize("method", [m for m in METHODS if m.generation != "refused"], ids=str)
@torch.no_grad()
def test_generation(method: Method, tmp_path: Path, pieces: list[int]) -> None:
    """The tokens that reading everything again for each of them gives; each token is read once."""
    model, wrapped = shared(method, tmp_path)
    wrapped.eval()
    model.set_bptt("auto", chunk_length=CHUNK)
    model.generation_config.eos_token_id = None  # no token ends a text of random numbers
    prompt, count = tokens()[:, :16], 3
    inputs = {name: value for name, value in method.inputs.items() if name != "return_logits"}
    expected = greedy(wrapped, prompt, count, **inputs)
    pieces.clear()
    mask = torch.ones_like(prompt)
    found = wrapped.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, **inputs
    )
    assert torch.equal(found, expected)
    virtual = getattr(next(iter(wrapped.peft_config.values())), "num_virtual_tokens", 0)
    if method.generation == "exact":
        assert sum(pieces) == virtual + expected.shape[1] - 1


_told: dict[tuple[str, str], str] = {}


def refusal(method: Method, folder: Path, what: str) -> str:
    """What the user is told who trains in chunks, evaluates or generates with this method; found out once."""
    if (str(method), what) in _told:
        return _told[str(method), what]
    ids = tokens()
    with pytest.raises((StrategyError, ValueError), match=method.refusal) as caught:
        model, wrapped = made(method, folder)
        if what == "training":
            gradients(model, wrapped, "reversible", 8, **method.inputs)
        elif what == "evaluation":
            wrapped.eval()(input_ids=ids)
        else:
            wrapped.eval().generate(input_ids=ids, max_new_tokens=2)
    return _told.setdefault((str(method), what), str(caught.value))


REFUSED = [
    (method, what)
    for method, what in product(METHODS, ("training", "evaluation", "generation"))
    if getattr(method, what) in ("refused", "full only")
]


@pytest.mark.parametrize(("method", "what"), REFUSED, ids=str)
def test_refusal(method: Method, what: str, tmp_path: Path) -> None:
    """One clear line."""
    assert "\n" not in refusal(method, tmp_path, what)


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.evaluation == "one piece" and m.generation == "refused"], ids=str
)
@torch.no_grad()
def test_generation_by_reading_again(method: Method, tmp_path: Path) -> None:
    """The way out that the refusal names; and nothing goes on from a state."""
    model, wrapped = made(method, tmp_path)
    wrapped.eval()
    model.generation_config.eos_token_id = None
    prompt = tokens()[:, :16]
    expected = greedy(wrapped, prompt, 3)
    mask = torch.ones_like(prompt)
    found = wrapped.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=3, do_sample=False, use_cache=False
    )
    assert torch.equal(found, expected)
    state = wrapped(input_ids=prompt).state
    with pytest.raises(StrategyError, match=method.refusal):
        wrapped(input_ids=prompt[:, :1], state=state)


VIRTUAL = [m for m in METHODS if m.name in ("prompt tuning", "multitask prompts", "P-tuning", "CPT")]
PACKED_ROWS = {
    "position_ids": lambda ids: (torch.arange(ids.shape[1]) % 14)[None].expand_as(ids),
    "seq_idx": lambda ids: (torch.arange(ids.shape[1]) // 14)[None].expand_as(ids),
    "cu_seq_lens_q": lambda ids: torch.tensor([0, 14, ids.shape[1]]),
    "borders": lambda ids: (torch.arange(ids.shape[1]) % 14 == 0)[None].expand_as(ids),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft's own, as it takes them away
@pytest.mark.parametrize("name", PACKED_ROWS)
@pytest.mark.parametrize("method", VIRTUAL, ids=str)
def test_packed_rows_under_prompt_learning_are_refused(method: Method, name: str, tmp_path: Path) -> None:
    """Virtual tokens stand before a row, and not before each document in it: one line, whatever borders are called."""
    model, wrapped = made(method, tmp_path)
    ids = tokens()[:1]
    inputs = {key: value[:1] if isinstance(value, Tensor) else value for key, value in method.inputs.items()}
    packed = {name: PACKED_ROWS[name](ids)}
    for strategy, labels in product(("full", "reversible"), ({}, {"labels": ids})):
        with (
            model.set_bptt(strategy, chunk_length=8),
            pytest.raises(ValueError, match=f"{name}.* give each document a row of its own") as caught,
        ):
            wrapped(input_ids=ids, **labels, **inputs, **packed)
        assert "\n" not in str(caught.value)


@torch.no_grad()
def test_positions_that_are_none_are_nobodys_borders() -> None:
    """As wrappers hand them on that have none: nothing is refused."""
    model = tiny_model("5.2").eval()
    embeddings = model.model.embeddings(tokens())
    found = model(inputs_embeds=embeddings, position_ids=None).logits
    assert torch.equal(found, model(inputs_embeds=embeddings).logits)


def test_docs(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """``docs/peft.md`` is what comes of the cases above; ``--write-docs`` writes it."""
    lines: dict[str, list[str]] = {}
    for method, what in REFUSED:
        line = refusal(method, tmp_path, what)
        if line not in lines.setdefault(method.name, []):
            lines[method.name].append(line)
    page = peft_page(METHODS, lines)
    if request.config.getoption("write_docs"):
        DOCS.write_text(page)
    assert DOCS.read_text() == page, "write it anew: pytest tests/test_peft_methods.py -k docs --write-docs"
