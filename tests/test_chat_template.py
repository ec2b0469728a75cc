"""Conversations as text and as tokens: the default template, another, and which tokens the assistant says."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rwkv_rev
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer
from rwkv_rev.tokenization.byte_level import ByteLevelTokenizer
from rwkv_rev.tokenization.chat_template import WORLD_TEMPLATE, parts, read_template, render

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is\n\n\n2+2?\r\n"},
    {"role": "assistant", "content": '"4".'},
    {"role": "user", "content": "\tSure?"},
    {"role": "assistant", "content": "Yes.\n\n1. Count.\n\n2. See!"},
]
WORLD = [  # token by token: text, and whether the assistant says it
    *(("System", 0), (":", 0), (" Be", 0), (" brief", 0), (".", 0), ("\n\n", 0)),
    *(
        ("User", 0),
        (":", 0),
        (" What", 0),
        (" is", 0),
        ("\n", 0),
        ("2", 0),
        ("+", 0),
        ("2", 0),
        ("?", 0),
        ("\n\n", 0),
    ),
    *(("Ass", 0), ("istant", 0), (":", 0), (' "', 1), ("4", 1), ('".', 1), ("\n\n", 1)),
    *(("User", 0), (":", 0), (" Sure", 0), ("?", 0), ("\n\n", 0), ("Ass", 0), ("istant", 0), (":", 0)),
    *((" Yes", 1), (".", 1), ("\n", 1), ("1", 1), (".", 1), (" Count", 1), (".", 1), ("\n", 1)),
    *(("2", 1), (".", 1), (" See", 1), ("!", 1), ("\n\n", 1)),
]
MARKED = {"return_assistant_tokens_mask": True, "return_dict": True}
QUOTING = (  # its borders are where a token of World's would span: ':"', and "\n\n " before a word
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{{ '\n\n' }}"
    "{% endgeneration %}{% else %}{{ ' ' + m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", params=[RwkvByteTokenizer, RwkvWorldTokenizer], ids=["byte", "world"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def by_token(tokenizer: Any, made: Any) -> list[tuple[str, int]]:
    return [
        (tokenizer.decode([token]), spoken)
        for token, spoken in zip(made["input_ids"], made["assistant_masks"], strict=True)
    ]


def test_world_token_by_token() -> None:
    tokenizer = RwkvWorldTokenizer()
    assert by_token(tokenizer, tokenizer.apply_chat_template(TALK, **MARKED)) == WORLD


def test_bytes_token_by_token() -> None:
    tokenizer = RwkvByteTokenizer()
    expected = [(letter, spoken) for text, spoken in WORLD for letter in text]
    assert by_token(tokenizer, tokenizer.apply_chat_template(TALK, **MARKED)) == expected


def test_the_tokenizer_that_transformers_reads_alone(tokenizer: ByteLevelTokenizer, tmp_path: Path) -> None:
    """It tells who speaks by the places of tokens in the text, and the template lies beside it."""
    tokenizer.save_pretrained(tmp_path)
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours, theirs = (made.apply_chat_template(TALK, **MARKED) for made in (tokenizer, fast))
    assert dict(ours) == {name: theirs[name] for name in ours}
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == WORLD_TEMPLATE


def test_no_token_spans_a_border() -> None:
    r"""World has tokens ``:"`` and ``\n\n ``; a chat that reads ``A:`` first never sees them."""
    tokenizer = RwkvWorldTokenizer()
    talk = [{"role": "assistant", "content": '"'}, {"role": "user", "content": "x"}]
    made = tokenizer.apply_chat_template(talk, chat_template=QUOTING, **MARKED)
    assert by_token(tokenizer, made) == [("A", 0), (":", 0), ('"', 1), ("\n\n", 1), (" x", 0)]
    whole = tokenizer.apply_chat_template(talk, chat_template=QUOTING, tokenize=False)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(whole)] == ["A", ':"', "\n\n ", "x"]


def test_batches_padding_truncation_and_tensors(tokenizer: ByteLevelTokenizer) -> None:
    talks = [TALK, TALK[:3]]
    alone = [tokenizer.apply_chat_template(talk, **MARKED) for talk in talks]
    batch = tokenizer.apply_chat_template(talks, padding=True, return_tensors="pt", **MARKED)
    for row, one in enumerate(alone):
        real = batch["attention_mask"][row].bool()
        for name in ("input_ids", "assistant_masks"):
            assert batch[name][row][real].tolist() == one[name]
        assert not batch["assistant_masks"][row][~real].any()
    cut = tokenizer.apply_chat_template(talks[0], truncation=True, max_length=8, **MARKED)
    assert cut["input_ids"] == alone[0]["input_ids"][:8] and len(cut["assistant_masks"]) == 8
    assert tokenizer.apply_chat_template(talks[0], return_dict=False) == alone[0]["input_ids"]
    assert tokenizer.apply_chat_template(talks[0], return_tensors="pt")["input_ids"].shape == (
        1,
        len(alone[0]["input_ids"]),
    )
    asked = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, tokenize=False)
    assert asked.endswith("2+2?\n\nAssistant:")


def test_what_the_template_cannot_say(tokenizer: ByteLevelTokenizer) -> None:
    for message, why in (
        (
            {"role": "tool", "content": "x"},
            "of the role tool; this template knows system, user and assistant",
        ),
        ({"role": "assistant", "content": "x", "tool_calls": [1]}, "tool_calls"),
        ({"role": "user"}, "content"),
    ):
        with pytest.raises(DataError, match=f"the chat template refuses it: .*{why}"):
            render(tokenizer, [message])
    several: Any = type("Several", (), {"chat_template": {"tool_use": "", "rag": ""}})()
    with pytest.raises(
        DataError, match="several chat templates, rag, tool_use, and none is called default: give"
    ):
        render(several, TALK)
    several.chat_template["default"] = QUOTING
    assert render(several, TALK) == render(tokenizer, TALK, template=QUOTING)
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"needs {% generation %} marks"):
        tokenizer.apply_chat_template(TALK, chat_template=plain, **MARKED)
    assert render(tokenizer, TALK, template=plain)[1] == []


def test_a_system_that_says_nothing_is_left_out(tokenizer: ByteLevelTokenizer) -> None:
    talk = [{"role": "system", "content": " \n"}, *TALK[1:3]]
    assert render(tokenizer, talk)[0] == render(tokenizer, TALK[1:3])[0]


def test_parts() -> None:
    assert parts("abcdef", [(0, 2), (4, 6)]) == [("ab", True), ("cd", False), ("ef", True)]
    assert parts("abc", []) == [("abc", False)] and parts("", []) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "is no chat template"),
        ("nothing of it", "leaves out what the user says"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_template(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "t.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_template(path)
    assert "\n" not in str(caught.value)


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text(QUOTING)
    assert read_template(path) == QUOTING


def test_converted_folders_hold_the_template(bundled: dict[str, Path]) -> None:
    assert (bundled["7"] / "chat_template.jinja").read_text("utf-8") == WORLD_TEMPLATE
    assert rwkv_rev.__version__
