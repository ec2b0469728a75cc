"""From a chat file to a model that answers, by the commands of the README."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_cases import finetune, settings
from transformers import AutoTokenizer

import rwkv_rev
from rwkv_rev.errors import ConfigError
from rwkv_rev.training.planning import plan

Cli = Callable[..., tuple[int, str, str]]
ANSWER = "A goose that remembers."
TALK = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": ANSWER}]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}Bob:{% generation %} {{ m.content }}{{ '\n\n' }}"
    "{% endgeneration %}{% else %}Alice: {{ m.content }}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Bob:{% endif %}"
)


def chat_file(folder: Path) -> Path:
    (folder / "chat.jsonl").write_text(json.dumps({"messages": TALK}) + "\n", "utf-8")
    return folder / "chat.jsonl"


def test_four_lines(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What it was taught it says, in the first turn and in a later one."""
    chat_file(tmp_path)
    monkeypatch.setattr("rwkv_rev.training.saving.has_matplotlib", lambda: False)
    quick = ("--max-steps", "25", "--lr", "2e-3", "--device", "cpu", "--quiet")
    assert cli("convert", "bundled:rwkv-7", "--output", "goose", "--quiet")[0] == 0
    assert cli("finetune", "goose", "--data", "chat.jsonl", "--output", "my-chat", *quick)[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\nWho are you?\n"))
    code, out, _ = cli("chat", "my-chat", "--device", "cpu", "--temperature", "0")
    assert code == 0 and out.splitlines()[0] == ANSWER
    assert rwkv_rev.evaluate("my-chat", "chat.jsonl", context_length=64).total.tokens == len(f" {ANSWER}\n\n")


def test_another_template_is_saved_with_the_model(shallow: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    config = settings(
        shallow["7"],
        chat_file(tmp_path),
        tmp_path / "out",
        chat_template=str(tmp_path / "t.jinja"),
        max_steps=1,
    )
    finetune(config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert text == f"Alice: Who are you?\n\nBob: {ANSWER}\n\n"
    with pytest.raises(ConfigError, match="cannot be read"):
        plan(settings(shallow["7"], tmp_path / "chat.jsonl", tmp_path / "no", chat_template="none.jinja"))


def test_labels_are_the_assistants(shallow: dict[str, Path], tmp_path: Path) -> None:
    """As the trainer gets them; the end token behind the conversation is one."""
    planned = plan(settings(shallow["7"], chat_file(tmp_path), tmp_path / "out"))
    row = planned.order.rows[0]
    said = [i for i in row["labels"].tolist() if i != -100]
    assert bytes(said) == f" {ANSWER}\n\n\0".encode()
    assert bytes(row["input_ids"].tolist()).startswith(b"User: Who are you?\n\nAssistant: A goose")
