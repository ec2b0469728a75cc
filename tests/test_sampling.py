"""How tokens are chosen: penalties against those of the ``rwkv`` package, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_rev
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.sampling import SaidBefore, Sampling, uncounted_ids
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer

PENALTIES = {"presence_penalty": 0.3, "frequency_penalty": 0.7, "penalty_decay": 0.9}


def test_the_penalty_written_out() -> None:
    """Token 2 was said 1 and 3 tokens ago, token 5 (uncounted) 2 ago; token 1 is prompt."""
    found = SaidBefore(0.5, 2.0, 0.9, prompt_length=1, uncounted=(5,))(
        torch.tensor([[1, 2, 5, 2]]), torch.zeros(1, 7)
    )
    expected = torch.zeros(1, 7)
    expected[0, 2] = -(0.5 + 2.0 * (1 + 0.9**2))
    expected[0, 5] = -0.5
    torch.testing.assert_close(found, expected)
    nothing = torch.randn(2, 7)
    assert SaidBefore(1, 1, 1, prompt_length=3)(torch.zeros(2, 3, dtype=torch.int64), nothing) is nothing


def test_against_the_rwkv_package(bundled: dict[str, Path]) -> None:
    """The likeliest tokens under penalties, which repeat without them, by its pipeline on the same logits."""
    utils = pytest.importorskip("rwkv.utils")
    table = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    table[:, 48:58] += 1.5  # digits
    table[:, 97:101] += 1.5

    def forward(tokens: list[int], state: Any) -> tuple[Tensor, Any]:
        return table[tokens[-1]].clone(), state

    pipeline = object.__new__(
        utils.PIPELINE
    )  # made the usual way, it reads a vocabulary, for longer than all of this
    pipeline.model = SimpleNamespace(forward=forward)
    pipeline.tokenizer = SimpleNamespace(
        encode=lambda text: list(text.encode("latin-1")), decode=lambda ids: bytes(ids).decode("latin-1")
    )
    args = utils.PIPELINE_ARGS(
        temperature=0, top_p=0, alpha_presence=0.3, alpha_frequency=0.7, alpha_decay=0.9, token_stop=[]
    )
    expected = list(pipeline.generate("a", token_count=40, args=args).encode("latin-1"))
    sampling = Sampling(temperature=0, **PENALTIES)
    processors = sampling.processors(RwkvByteTokenizer())
    said: list[int] = []
    for _ in expected:
        logits = table[said[-1] if said else ord("a")][None]
        said.append(sampling.choose(processors(torch.tensor([said], dtype=torch.int64), logits)))
    assert said == expected and len(set(expected)) > 5


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.5, 0.6, 0), (2.0, 0.6, 0), (2.0, 0.9, 3), (0.7, 0.3, 0)]
)
def test_the_order_of_the_rwkv_package(temperature: float, top_p: float, top_k: int) -> None:
    """Top-p of the probabilities as they are, and the temperature of what is left."""
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -1.0]])
    probs = torch.softmax(logits[0], -1)
    kept = min(n for n in range(1, 7) if float(probs[:n].sum()) >= top_p)
    expected = torch.where(torch.arange(6) < min(kept, top_k or 6), probs ** (1 / temperature), 0.0)
    sampling = Sampling(temperature, top_p, top_k)
    found = sampling.processors(RwkvByteTokenizer())(torch.zeros(1, 0, dtype=torch.int64), logits)
    torch.testing.assert_close(torch.softmax(found[0], -1), expected / expected.sum())
    if (utils := pytest.importorskip("rwkv.utils")) is not None:
        draw = utils.PIPELINE.sample_logits
        drawn = [draw(None, logits[0].clone(), temperature, top_p, top_k) for _ in range(300)]
        assert set(drawn) <= set(expected.nonzero().flatten().tolist())
        assert abs(drawn.count(0) / 300 - float(expected[0] / expected.sum())) < 0.15


def test_generate_takes_them(bundled: dict[str, Path]) -> None:
    """The same tokens as transformers' generate with the processor; without it they repeat."""
    asked: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "device": "cpu"}
    plain = rwkv_rev.generate(bundled["7"], "A ", **asked)
    found = rwkv_rev.generate(
        bundled["7"], "A ", **asked, presence_penalty=5, frequency_penalty=5, penalty_decay=1
    )
    assert len(set(found[2:])) > len(set(plain[2:]))
    few = rwkv_rev.generate(bundled["7"], "A ", max_new_tokens=24, top_k=1, seed=1, device="cpu")
    assert few == plain


def test_uncounted_tokens() -> None:
    world = RwkvWorldTokenizer()
    texts = {world.decode([i]) for i in uncounted_ids(world)}
    assert texts >= {" ", "\t", "0", "9"} and all(text in " \t0123456789" for text in texts)
    assert uncounted_ids(RwkvByteTokenizer()) == (9, 32, *range(48, 58))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": -1}, "top_k = -1 must be from 0"),
        ({"presence_penalty": -1.0}, "presence_penalty = -1.0 must be a number from 0 to 1000"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty = nan"),
        ({"penalty_decay": 1.5}, "penalty_decay = 1.5 must be from 0 to 1"),
        ({"temperature": float("inf")}, "temperature = inf"),
    ],
)
def test_what_means_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**given)


def test_a_prompt_with_a_byte_that_ends_a_text(bundled: dict[str, Path]) -> None:
    with pytest.raises(
        DataError, match=r"the prompt holds '\\x00', which this tokenizer reads as the end of text"
    ):
        rwkv_rev.generate(bundled["7"], "a\0b", max_new_tokens=1, device="cpu")


def test_without_effect(bundled: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="top_k = 5 is without effect at temperature = 0"):
        rwkv_rev.generate(bundled["4"], "a", temperature=0, top_k=5)
