"""The model card says where a model came from and nothing about the machine that made it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.conversion import convert
from rwkv_rev.converters.card import model_card

RECORD: dict[str, Any] = {
    "source": "BlinkDL/rwkv-5-world",
    "file": "RWKV-5-World-0.4B-v2.pth",
    "revision": "main",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "sha256": {"RWKV-5-World-0.4B-v2.pth": "ab" * 32},
    "layout": "blinkdl",
    "dtypes": {"bfloat16": 582},
    "versions": {"rwkv-rev": "1.2.3", "torch": "2.13.0"},
}
CONFIG = RwkvRevConfig(dtype="bfloat16", group_norm_epsilon=1e-5)


def report(text: str) -> SimpleNamespace:
    return SimpleNamespace(passed=True, table=lambda: text)


def test_hub_source() -> None:
    text = model_card(CONFIG, RECORD)
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "BlinkDL/rwkv-5-world"
    assert "rwkv-5.2" in header["tags"]
    assert ModelCard(text).data.library_name == "transformers"
    for expected in (
        "| file | RWKV-5-World-0.4B-v2.pth |",
        "| revision | main |",
        f"| commit | {RECORD['commit']} |",
        f"| SHA-256 of RWKV-5-World-0.4B-v2.pth | {'ab' * 32} |",
        "| rwkv-rev version | 1.2.3 |",
        "| version | RWKV-5.2 |",
        "| heads | 32 of size 64 |",
        "| GroupNorm eps | 1e-05 |",
        "exactly those of the source",
        "Not verified at conversion",
    ):
        assert expected in text


def test_verification_table_is_markdown() -> None:
    rows = "| oracle | Δ |\n|---|---|\n| rwkv | 1e-6 |"
    table = f"RWKV-5.2, against BlinkDL/rwkv-5-world\n\n{rows}\n\nnaive: not run\nPASS"
    text = model_card(CONFIG, RECORD, report(table))
    assert f"\n\n{rows}\n\n" in text
    assert text.rstrip().endswith("PASS")


@pytest.mark.parametrize(
    ("stored", "written", "words"),
    [
        ("bfloat16", "float32", "exactly those"),
        ("float32", "bfloat16", "rounded to bfloat16"),
        ("bfloat16", "float16", "rounded to float16"),
    ],
)
def test_rounded_values_are_said_to_be(stored: str, written: str, words: str) -> None:
    assert words in model_card(RwkvRevConfig(dtype=written), RECORD | {"dtypes": {stored: 3}})


def test_no_local_path(tmp_path: Path) -> None:
    local = str(tmp_path / "secret" / "model.pth")
    record = RECORD | {"source": local, "file": None, "revision": None, "commit": None}
    text = model_card(CONFIG, record, report(f"RWKV-5.2, against {local}\nPASS"))
    assert str(tmp_path) not in text
    assert "against model.pth" in text
    assert "base_model" not in text


def test_a_conversion_writes_it(tmp_path: Path) -> None:
    result = convert("bundled:rwkv-4", tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text()
    assert "| source | bundled:rwkv-4 |" in text
    assert result.record["sha256"]["rwkv-4.pth"] in text
    assert "heads" not in text
    assert "bfloat16 (114 tensors)" in text
    assert torch.__version__ in text
    assert str(tmp_path) not in text


def test_a_model_that_was_saved_and_not_converted_has_a_card() -> None:
    card = model_card(CONFIG, {"source": "my-model"}, training=[("steps", 2)])
    assert "my-model" in card
    assert "SHA-256" not in card


NAMES = (
    "<img src=x onerror=alert(1)>",
    "a`b`",
    "[x](http://evil)",
    "![i](//e)",
    "a|b",
    "**b**",
    "# h",
    "x\n## y",
    "<!--",
)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text(name: str) -> None:
    """As the source's name, a file's, and data of a fine-tuning run: no HTML, no links, no lines of their own."""
    record = RECORD | {"source": name, "file": name, "commit": None, "sha256": {name: "0" * 64}}
    for text in (
        model_card(CONFIG, record, report(f"RWKV-5.2, against {name}\nPASS")),
        model_card(CONFIG, record, training=[("data", name)]),
    ):
        body = text.split("---", 2)[2]
        assert not set(re.findall(r"(?<!\\)<[^>]|(?<!\\)\]\(|(?<!\\)!\[|://", body)), body
        assert "\n## y" not in body and "`b`" not in body and "**b" not in body
        for line in body.splitlines():
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
