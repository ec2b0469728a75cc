"""Messages name what their reader can type: options on the command line, arguments in Python."""

from collections.abc import Callable
from pathlib import Path

import pytest

import rwkv_rev
from rwkv_rev.errors import OutputError, RwkvRevError, options_in_messages


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("pass --force to replace it", "pass force=True to replace it"),
        ("(--no-verify writes it)", "(verify=False writes it)"),
        ("choose another --output", "choose another output"),
        ("use a shorter --chunk-length, or --tune lora", "use a shorter chunk_length, or tune='lora'"),
        ("--dtype auto, bfloat16 or float32", "dtype='auto', bfloat16 or float32"),
        ("--resume auto goes on with it, --force throws", "resume='auto' goes on with it, force=True throws"),
        ("name it with --original SOURCE", "name it with original=SOURCE"),
        ("use --tokenizer world|byte|neox|PATH|HUB_ID", "use tokenizer=world|byte|neox|PATH|HUB_ID"),
        ("with --file: a, b", "with file: a, b"),
        ("a file called my--force or ---force", "a file called my--force or ---force"),
        ("--multi_gpu (or torchrun --nproc-per-node 2)", "--multi_gpu (or torchrun --nproc-per-node 2)"),
        (
            "accelerate launch --multi_gpu, and --shard-optimizer",
            "accelerate launch --multi_gpu, and shard_optimizer=True",
        ),
        ("put it there: --set end_token=0, or --pack", "put it there: end_token=0, or pack=True"),
        ("pip install --upgrade torch", "pip install --upgrade torch"),
        ("use --force, then rwkv-rev convert --force", "use force=True, then rwkv-rev convert --force"),
    ],
)
def test_options_and_arguments(option: str, argument: str) -> None:
    assert str(RwkvRevError(option)) == argument
    with options_in_messages():
        assert str(RwkvRevError(option)) == option


def test_an_output_that_exists(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    code, _, errors = cli("convert", "bundled:rwkv-4", "--output", "model")
    assert code == 1 and "model already exists; pass --force to replace it" in errors
    with pytest.raises(OutputError, match="pass force=True to replace it, or choose another output"):
        rwkv_rev.convert("bundled:rwkv-4", tmp_path / "model")
