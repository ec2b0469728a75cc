"""Fields of the configuration that an architecture has for itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_generation import TOY

from rwkv_rev.architectures import registry
from rwkv_rev.architectures.architecture import LETTERS
from rwkv_rev.architectures.fields import Field
from rwkv_rev.architectures.registry import architectures
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.names import tensor_table

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "vocab_size": 40,
    **TOY.sizes(24),
}


def check(config: Any) -> None:
    if config.rank > config.hidden_size:
        raise ValueError(f"rank = {config.rank} must be at most hidden_size = {config.hidden_size}")


RANKED = replace(
    TOY,
    version="ranked",
    fields={
        "rank": Field(
            int, lambda config: config.hidden_size // 4, "of the low-rank maps", least=1, most=1024
        ),
        "limit": Field(float, 0.5, "of forgetting", least=0, most=1),
        "format": Field(str, "int32", "of the memory", among=("int16", "int32", "int64")),
        "bounded": Field(bool, False, "whether there is a limit"),
    },
    letters={"R": "rank"},
    check=check,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ARCHITECTURES, "ranked", RANKED)


def ranked(**given: Any) -> RwkvRevConfig:
    return RwkvRevConfig(rwkv_version="ranked", **(SIZES | given))


def test_defaults_and_values() -> None:
    config = ranked()
    assert (config.rank, config.limit, config.format, config.bounded) == (6, 0.5, "int32", False)
    config = ranked(rank=3, limit=1, format="int16", bounded=True)
    assert (config.rank, config.limit, config.format, config.bounded) == (3, 1.0, "int16", True)
    assert type(config.limit) is float


def test_saved_and_read(tmp_path: Path) -> None:
    ranked(rank=3).save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert (stored["rank"], stored["limit"], stored["format"]) == (3, 0.5, "int32")
    assert RwkvRevConfig.from_pretrained(str(tmp_path)).rank == 3
    del stored["rank"], stored["format"]
    (tmp_path / "config.json").write_text(json.dumps(stored), "utf-8")
    with pytest.raises(
        ValueError, match=r"^a configuration of RWKV-ranked says rank, format, and this one does not$"
    ):
        RwkvRevConfig.from_pretrained(str(tmp_path))
    assert RwkvRevConfig.from_pretrained(str(tmp_path), rank=2, format="int16").rank == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank = 0 must be from 1 to 1024"),
        ({"rank": 2.0}, "rank = 2.0 must be a whole number"),
        ({"rank": True}, "rank = True must be a whole number"),
        ({"rank": None}, "rank = None must be a whole number"),
        ({"rank": 25}, "rank = 25 must be at most hidden_size = 24"),
        ({"limit": float("nan")}, "limit = nan must be from 0 to 1"),
        ({"limit": "1"}, "limit = '1' must be a number"),
        ({"format": "int8"}, "format = 'int8' must be one of int16, int32, int64"),
        ({"bounded": 1}, "bounded = 1 must be true or false"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ranked(**given)


def test_letters() -> None:
    config = ranked(rank=3)
    assert RANKED.shape("5 R D", config) == (5, 3, 24)
    assert RANKED.shape("D 5*R", config) == (24, 15)


def test_other_architectures_have_no_such_field() -> None:
    assert not hasattr(RwkvRevConfig(), "rank")
    assert "rank" not in RwkvRevConfig().to_dict()


def test_no_name_is_taken() -> None:
    for known in architectures():
        assert not [name for name in known.fields if hasattr(RwkvRevConfig, name)]
        assert not set(known.letters) & set(LETTERS)


def test_a_tensor_that_the_lowest_block_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    mix, *rest = (row for row in RANKED.block if row.ours.startswith("time_mix."))
    known = replace(RANKED, block=(replace(mix, lowest=1), *rest))
    monkeypatch.setitem(registry.ARCHITECTURES, "ranked", known)
    table = tensor_table(ranked(), "toy-pth")
    assert [row.name for row in table if row.name.endswith(mix.ours)] == [
        f"model.blocks.{i}.{mix.ours}" for i in (1, 2)
    ]
