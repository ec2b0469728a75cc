"""``rwkv-rev plan``: what it prints, what it starts, and what it refuses."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import rwkv_rev
from rwkv_rev.errors import ConfigError
from rwkv_rev.simulation import combinations

Cli = Callable[..., tuple[int, str, str]]

SMALL = ("--params", "1.5b", "--context", "256k", "--gpus", "2")


def commands(out: str) -> list[list[str]]:
    """What it says to type, without the launcher."""
    lines = out.replace(" \\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("torchrun")]


def test_table_and_commands(cli: Cli) -> None:
    code, out, err = cli("plan", *SMALL)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "2 x NVIDIA H100 in 1 machine" in out and "1.53 billion weights (7-1.5b)" in out
    for column in ("dp", "cp", "tokens/s", "sent", "tape"):
        assert f" {column} " in out.replace("\n", " \n")
    assert len(commands(out)) == 3


@pytest.mark.parametrize("more", [(), ("--tune", "lora")])
def test_commands_are_known_to_finetune(cli: Cli, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Every option is there, and the numbers are taken: all that is missing is the model."""
    _, out, _ = cli("plan", "--params", "14b", "--context", "1m", "--gpus", "16", "--tune", "lora")
    _, small, _ = cli("plan", *SMALL, *more)
    found = [words for words in commands(out) + commands(small) if "finetune" in words]
    assert len(found) > 2
    for words in found:
        code, _, err = cli(*words[words.index("finetune") :])
        assert code == 1 and "my-model" in err, err


def test_over_machines(cli: Cli) -> None:
    code, out, _ = cli("plan", "--params", "14b", "--context", "4m", "--gpus", "64", "--gpu", "h100")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert "--nnodes 8 --nproc-per-node 8" in out
    assert "fully_shard over" in out and "docs/finetuning.md#several-gpus-of-one-host" in out
    settings = rwkv_rev.RwkvRevConfig(vocab_size=16, hidden_size=64, num_hidden_layers=1, rwkv_version="4")
    model = rwkv_rev.RwkvRevForCausalLM(settings)
    for call in (found := re.findall(r"set_bptt\(.*?\)", out.replace("\n", " "))):
        eval(f"model.{call}")  # it can be pasted
    assert found and model.bptt.strategy == "reversible"


def test_json(cli: Cli) -> None:
    code, out, _ = cli("plan", *SMALL, "--json")
    found = json.loads(out)
    assert code == 0 and found["shape"] == "7-1.5b" and found["gpus"] == 2
    speeds = [row["tokens_per_second"] for row in found["combinations"]]
    assert speeds == sorted(speeds, reverse=True)
    for row in found["combinations"]:
        assert row["dp"] * row["cp"] == 2 and row["reserved_bytes"] <= 0.85 * found["memory_of_a_gpu"]
        assert row["tape_bytes_in_all"] == 2 * row["tape_bytes"] == row["tape_bytes_per_host"]
        assert sum(row["seconds"].values()) == pytest.approx(row["seconds_per_step"], abs=0.01)
        assert row["finetune"] is (row["shards"] in (1, 2)) and bool(row["loop"]) is not row["finetune"]
    alone = rwkv_rev.plan("1.5b", context=2**18, gpus=2).to_dict()
    assert alone == found


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--params", "7b", "--gpu", "a100"), 2, "gpu = a100: nothing was measured on it; choose one of h100, h200"),
        (("--params", "99b"), 2, "no published shape of RWKV-7 has about that many weights; there are 0.1b"),
        (("--params", "many"), 2, "'many' is no number of weights such as 7b"),
        (("--shape", "7-8b"), 1, "no model shape is called '7-8b'; there are 5.2-15m"),
        (("--shape", "7-7b", "--params", "7b"), 2, "without effect with --shape"),
        (("--params", "7b", "--lora-rank", "4"), 2, "without effect without --tune lora"),
        (("--params", "7b", "--gpus", "12"), 2, "machines of 8 would not be full; use a multiple of 8"),
        (("--params", "7b"), 2, "nothing fits: a card needs at least"),
        (("--params", "1.5b", "--host-memory", "1MB"), 2, "nothing fits: the tape of a machine"),
        (("--params", "1.5b", "--host-memory", "much"), 2, "host_memory = 'much' is not a size"),
        (("--params", "1.5b", "--batch-size", "2", "--most-rows", "1"), 2, "is less than"),
        (("--params", "7b", "--context", "8"), 2, "context = 8: at least"),
        ((), 2, "name a size, such as 7b, or a --shape"),
    ],
)  # fmt: skip
def test_refusals(cli: Cli, words: tuple[str, ...], code: int, message: str) -> None:
    given = words if "--gpus" in words else (*words, "--gpus", "1")
    given = given if "--context" in words else ("--context", "256k", *given)
    found, out, err = cli("plan", *given)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert message in err


def test_sizes_and_names() -> None:
    assert combinations.shape_for("7b", "7") == "7-7b"
    assert combinations.shape_for("14b", "7") == "7-13b"  # of 13.2 billion weights
    assert combinations.shape_for("14B", "6") == "6-14b"
    assert combinations.shape_for("430m", "4") == "4-0.4b"
    with pytest.raises(ConfigError, match="generation = 8: no shape of it was published"):
        rwkv_rev.plan("7b", context="1m", gpus=8, generation="8")
    with pytest.raises(ConfigError, match="gpus = 0 must be from 1"):
        rwkv_rev.plan("7b", context="1m", gpus=0)


def test_what_finetune_shards() -> None:
    """Weights over all cards; over those of a machine in loops of one's own."""
    found = rwkv_rev.plan("1.5b", context="256k", gpus=16).found
    of_all, of_machine = (next(one for one in found if one.layout.shards == shards) for shards in (16, 8))
    assert not combinations.loop(of_all) and "--shard-model" in combinations.start(of_all)
    assert combinations.loop(of_machine) and combinations.start(of_machine)[-1] == "your_loop.py"


def test_fewer_rows_take_less_time() -> None:
    """And larger groups keep more of the tape each."""
    found = rwkv_rev.plan("1.5b", context="1m", gpus=8, most_rows=1).found
    assert {one.layout.dp for one in found} == {1}
    any_rows = rwkv_rev.plan("1.5b", context="1m", gpus=8).found
    assert any_rows[0].tokens_per_second > found[0].tokens_per_second and any_rows[0].total > found[0].total
