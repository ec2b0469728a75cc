"""Options that would be without effect are refused by name, whatever command they are given to."""

from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]
SOURCE = "bundled:rwkv-4"


@pytest.mark.parametrize(
    ("words", "option", "why"),
    [
        (("convert", SOURCE, "--output", "out", "--group-norm-eps", "1e-5"), "group_norm_eps", "no GroupNorm"),
        (("convert", SOURCE, "--output", "out", "--json", "--quiet"), "--quiet", "beside --json"),
        (("export", "MODEL", "--output", "out", "--max-shard-size", "5GB"), "max_shard_size", "one file"),
        (("export", "MODEL", "--output", "out", "--json", "--quiet"), "--quiet", "beside --json"),
        (("finetune", "MODEL", "--json", "--quiet"), "--quiet", "beside --json"),
        (("verify", "MODEL", "--chunk", "8", "--no-reversal", "--no-gradients"), "chunk", "neither --reversal nor"),
        (("verify", "MODEL", "--file", "a.pth"), "--file", "choose from an --original"),
        (("generate", "MODEL", "--prompt", "a", "--temperature", "0", "--top-p", "1"), "top_p", "temperature = 0"),
        (("inspect", SOURCE, "--batch-size", "2"), "--batch-size", "without --context-length"),
        (("inspect", SOURCE, "--chunk-length", "1024"), "--chunk-length", "without --context-length"),
        (("inspect", SOURCE, "--device", "cuda"), "--device", "without --context-length"),
        (("bench", "kernels", "--shape", "5.2-15m"), "--shape", "on bench kernels"),
        (("bench", "kernels", "--quick"), "--quick", "on bench kernels"),
        (("bench", "convert", "--lengths", "1k"), "--lengths", "on bench convert"),
        (("bench", "memory", "--repeats", "3"), "--repeats", "on bench memory"),
        (("bench", "training", "--memory-limit", "1GB"), "--memory-limit", "on bench training"),
        (("bench", "--strategies", "full", "--chunk-length", "64"), "--chunk-length", "on full"),
        (("bench", "--strategies", "full,truncated", "--tape", "disk"), "--tape", "on full,truncated"),
        (("bench", "--rows", "rows.json", "--device", "cpu"), "--device", "with --rows"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_without_effect(
    cli: Cli, bundled: dict[str, Path], tmp_path: Path, words: tuple[str, ...], option: str, why: str
) -> None:
    code, out, err = cli(*(str(bundled["4"]) if word == "MODEL" else word for word in words))
    assert code != 0 and out == "" and err.count("\n") == 1
    assert option in err and why in err
    assert not list(tmp_path.iterdir())


def test_what_means_something_stays(cli: Cli, bundled: dict[str, Path]) -> None:
    forecast = ("--context-length", "4k", "--batch-size", 2, "--chunk-length", 512, "--device", "cpu")
    assert cli("inspect", SOURCE, *forecast)[0] == 0
    code, out, _ = cli("generate", bundled["4"], "--prompt", "a", "--top-p", 0.5, "--max-new-tokens", 1)
    assert code == 0 and out.startswith("a")
