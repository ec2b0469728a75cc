"""Words about tokens that mean nothing are refused by name; the library would print them as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkv_rev.errors import SourceError
from rwkv_rev.loading import load_tokenizer
from rwkv_rev.tokenization import RwkvByteTokenizer

TOKEN = {"content": "<b>", "special": True}
STRANGE = TOKEN | {"evil\x1b[2J": 1}


def with_file(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        change(values)
        (folder / name).write_text(json.dumps(values))

    return write


@pytest.mark.parametrize(
    "write",
    [
        with_file("tokenizer_config.json", lambda v: v.update({"added_tokens_decoder": {"256": STRANGE}})),
        with_file(
            "tokenizer_config.json", lambda v: v.update({"bos_token": STRANGE | {"__type": "AddedToken"}})
        ),
        with_file(
            "tokenizer_config.json", lambda v: v.update({"a": [{"b": STRANGE | {"__type": "AddedToken"}}]})
        ),
        with_file("special_tokens_map.json", lambda v: v.update({"bos_token": STRANGE})),
        with_file("special_tokens_map.json", lambda v: v.update({"extra_special_tokens": ["<a>", STRANGE]})),
        with_file("tokenizer.json", lambda v: v["added_tokens"].append(STRANGE | {"id": 256})),
    ],
)
def test_strange_fields(
    bundled: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], write: Callable[[Path], None]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled["4"], folder)
    write(folder)
    with pytest.raises(
        SourceError, match=r"a token has the field 'evil\\x1b\[2J', which means nothing"
    ) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_chat_templates_and_added_tokens_pass(bundled: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = RwkvByteTokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tmp_path)
    with_file("tokenizer_config.json", lambda v: v.update({"a": [{"role": "x", "content": "y", "z": 1}]}))(
        tmp_path
    )
    with_file("special_tokens_map.json", lambda v: v.update({"bos_token": TOKEN}))(tmp_path)
    assert "<|user|>" in load_tokenizer(tmp_path).get_vocab()
