"""Formats of data: what a record becomes, token by token, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_page import EXAMPLES, TURNS, Example, by_byte, in_bytes, page_of, tokens_of, weighed

from rwkv_rev.errors import DataError
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer
from rwkv_rev.training.records import Fields
from rwkv_rev.training.rows import RowDataset
from rwkv_rev.training.sources import find_sources
from rwkv_rev.training.token_cache import load_tokens

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
BEGIN, END = "<!-- written by pytest tests/test_records.py --write-docs -->\n", "<!-- end -->\n"
ASKED = "User: What is 2+2?\n\nAssistant:"
EXPECTED = {  # written out: parts in turn, the first without loss
    "A text": ["", "What is 2+2? 4.|"],
    "Prompt and completion": ["2+2=", "4|"],
    "Messages": [ASKED, " 4.\n\n", "User: Sure?\n\nAssistant:", " Yes.\nCount!\n\n|"],
    "Messages, `--train-on last`": [f"{ASKED} 4.\n\nUser: Sure?\n\nAssistant:", " Yes.\nCount!\n\n|"],
    "Messages, `--train-on all`": ["", f"{ASKED} 4.\n\n|"],
    "Conversations": [f"System: Be brief.\n\n{ASKED}", " 4.\n\n|"],
    "Instructions": ["User: Add.\n2, 2\n\nAssistant:", " 4\n\n|"],
    "Instructions with `system` and `history`": [
        f"System: Be brief.\n\n{ASKED}",
        " 4.\n\n",
        "User: Sure?\n\nAssistant:",
        " Yes.\n\n|",
    ],
    "Messages with a `weight`": [f"{ASKED} 4.\n\nUser: Sure?\n\nAssistant:", " Yes.\nCount!\n\n|"],
    "Prompt and completion as turns": [f"{ASKED} 4.\n\nUser: Sure?\n\nAssistant:", " Yes.\nCount!\n\n|"],
    "RWKV's own text, `--train-on assistant`": [
        ASKED,
        " Let me count.\n\n4.\n\n",
        "User: Sure?\n\nAssistant:",
        " Yes.|",
    ],
    "Preference pairs, `--data-format chosen`": [ASKED, " 4.\n\n|"],
}
"""``|`` stands for the end token."""


@pytest.fixture(scope="module")
def world() -> RwkvWorldTokenizer:
    return RwkvWorldTokenizer()


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_formats_byte_by_byte(example: Example, tmp_path: Path) -> None:
    """A text gets no end token, which models of bytes were not trained with; answers get one."""
    expected = in_bytes(EXPECTED[example.name])
    assert by_byte(example, tmp_path) == expected[: -1 if example.name == "A text" else None]


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_formats_token_by_token(example: Example, world: RwkvWorldTokenizer, tmp_path: Path) -> None:
    expected: list[tuple[str, bool]] = []
    for number, part in enumerate(EXPECTED[example.name]):
        ids = world.encode(part.removesuffix("|"))
        expected += [(repr(world.decode([i]))[1:-1], bool(number % 2)) for i in ids]
        expected += [("end", True)] * part.endswith("|")
    assert tokens_of(example, world, tmp_path) == expected


def test_page(world: RwkvWorldTokenizer, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """``pytest tests/test_records.py -k page --write-docs`` writes the examples in docs/data.md."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    made = f"{before}{BEGIN}\n{page_of(world, tmp_path)}\n{END}{rest.partition(END)[2]}"
    if request.config.getoption("--write-docs"):
        PAGE.write_text(made, "utf-8")
    assert PAGE.read_text("utf-8") == made


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


GOOD = {"messages": TURNS}
ADD = {"instruction": "Add.", "output": "4"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hi"}, "field 'messages' is a str, not a list of turns"),
        ({"messages": None}, "field 'messages' is null, not a list of turns"),
        ({"messages": []}, "field 'messages' is a list without turns"),
        ({"messages": ["hi"]}, "turn 1 of 'messages' is a str, not an object"),
        (
            {"messages": [TURNS[0], {"role": "assistant"}]},
            "turn 2 of 'messages' has no 'content'; it has role",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "turn 1 of 'messages': 'content' is a list, not a string",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": " \n"}]},
            "turn 2 of 'messages': its 'content' is empty",
        ),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            "turn 1 of 'messages' holds half a surrogate pair",
        ),
        ({"messages": TURNS[:1]}, "no turn of the assistant to train on"),
        (
            {"messages": [TURNS[0], {"role": "Assistant", "content": "x"}]},
            "the role 'Assistant' is not known, and no turn is the assistant's.*is written 'assistant'",
        ),
        (
            {"messages": [{"role": "User", "content": "x"}, {"role": "model", "content": "x"}]},
            "the role 'User', 'model' is not known",
        ),
        (
            {"conversations": [{"from": "bing", "value": "x"}]},
            "'from' is 'bing'; known are user, human",
        ),
        (
            {"conversations": [{"from": "human", "text": "x"}]},
            "turn 1 of .* has no 'value'; it has from, text",
        ),
        (
            {"messages": [*TURNS, {"role": "tool", "content": "x"}]},
            "the chat template refuses it: .*role tool",
        ),
        ({"instruction": "Add.", "output": 4}, "field 'output' is a int, not a string"),
        ({"instruction": "Add.", "input": 4, "output": "4"}, "field 'input' is a int, not a string"),
        ({"instruction": "Add.", "output": ""}, "field 'output' is empty"),
        ({"instruction": "Add."}, "no field 'text' .*'instruction' and 'output'"),
        ({"prompt": "x", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "x", "completion": " \n"}, "field 'completion' is empty"),
        ({"prompt": " ", "completion": TURNS[1:2]}, "field 'prompt' is empty"),
        (weighed(None, 0.5, None, None), "turn 2 of 'messages': its 'weight' is 0.5; known are 0, .*, and 1"),
        (weighed(None, True, None, None), "turn 2 of 'messages': its 'weight' is True"),
        (weighed(None, "0", None, None), "turn 2 of 'messages': its 'weight' is '0'"),
        (
            weighed(1, None, None, None),
            r"turn 1 \('What is 2\+2\?'\) has 'weight': 1 and gets no loss, since loss is on .* role is 'user'",
        ),
        (weighed(None, 0, None, 0), "no turn of the assistant to train on: each has the weight 0"),
        (ADD | {"system": 3}, "field 'system' is a int, not a string"),
        (
            {"prompt": "a", "completion": "b", "system": "Be brief."},
            "field 'system' beside texts.*'messages'",
        ),
        (
            {"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"},
            "a field 'system', and another turn of the role system",
        ),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "field 'history' is read beside"),
        (GOOD | {"history": [["c", "d"]]}, "field 'history' is read beside 'instruction'"),
        (ADD | {"history": "[]"}, "field 'history' is no list of pairs of texts"),
        (ADD | {"history": [["a", "b", "c"]]}, "field 'history' is no list of pairs of texts"),
        (ADD | {"history": [["a", 4]]}, "field 'history' is no list of pairs of texts"),
        (ADD | {"history": [["a", "b"], ["c", ""]]}, "pair 2 of 'history': its 'content' is empty"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "a\0b"}]}, r"turn 2 holds '\\x00'"),
        ({"prompt": "a", "completion": "b\0c"}, r"the text holds '\\x00', which .* end of text, token 0"),
        ({"prompt": "a\0", "completion": "b"}, r"the prompt holds '\\x00'"),
        (ADD | {"input": "\0"}, r"turn 1 holds '\\x00'"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "a preference pair, .*DPOTrainer.*data_format chosen",
        ),
        ({"prompt": "What is 2+2?", "completion": TURNS[:1]}, "no turn of the assistant"),
        ({"prompt": TURNS[:1], "completion": "b"}, "field 'prompt' is a list, not a string"),
        (GOOD | {"text": "x"}, "has both 'text' and 'messages'; name what is to be read: .*data_format"),
        (
            GOOD | {"conversations": TURNS[:2]},
            "has both 'messages'/'conversations', which differ; name .*field",
        ),
        (
            {"prompt": "You are a judge.", "completion": TURNS[:2]},
            "field 'prompt' is a text beside a conversation that begins otherwise, 'completion'; write it into its",
        ),
        (
            {"prompt": TURNS[2:3], "completion": TURNS[:2]},
            "'completion' begins with a turn of the user behind",
        ),
        (
            {"prompt": TURNS[:3], "completion": TURNS[2:]},
            "'completion' begins with a turn of the user behind",
        ),
        (
            {"prompt": TURNS[:2], "completion": TURNS[1:]},
            "'completion' begins with a turn of the assistant behi",
        ),
        (
            {"prompt": [TURNS[0], TURNS[1] | {"weight": 1}, TURNS[2]], "completion": TURNS[3:]},
            r"turn 2 \('4.'\) has 'weight': 1 and gets no loss, since it is part of the prompt",
        ),
        *(
            ({"messages": [TURNS[0], TURNS[1] | {name: said}, *TURNS[2:]]}, f"turn 2 .*'{name}'{message}")
            for name, said, message in (
                ("train", False, ": False and gets loss: only 'weight': 0 takes it away"),
                ("loss_weight", 0, ": 0 and gets loss"),
                ("loss", 0.5, " is 0.5; known are 0"),
                ("mask", True, ", which is loss in some tools and no loss in others; write 'weight', 0 or 1"),
                ("function_call", {"name": "f"}, ", which the chat template does not read"),
                ("reasoning_content", "Two.", ", which the chat template does not read"),
                ("refusal", "No.", ", which the chat template does not read"),
            )
        ),
        (
            GOOD | {"tools": [{"name": "f"}]},
            r"field 'tools' is \[\{.*, which is not read; write it into a turn",
        ),
        (ADD | {"weight": 0}, "field 'weight' is 0, which is not read; leave the record out, or the field"),
        (
            {"messages": [{"role": "system", "content": "a"}, *TURNS], "system_prompt": "b"},
            "a field 'system_prompt', and another turn of the role system",
        ),
    ],
)
def test_a_bad_row_is_named(record: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "chat.jsonl", GOOD, record)
    with pytest.raises(DataError, match=rf"chat\.jsonl:2: .*{message}|chat\.jsonl:2: {message}") as caught:
        load_tokens(path, RwkvByteTokenizer(), cache_dir=tmp_path / "cache", num_workers=1)
    assert "\n" not in str(caught.value)


HISTORY = [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize(
    ("record", "fields", "expected"),
    [
        (
            ADD | {"system": "Be brief.", "history": HISTORY},
            {},
            [
                *("System: Be brief.\n\nUser: a\n\nAssistant:", " b\n\n"),
                *("User: c\n\nAssistant:", " d\n\n", "User: Add.\n\nAssistant:", " 4\n\n|"),
            ],
        ),
        (
            ADD | {"history": HISTORY[:1]},
            {"train_on": "last"},
            ["User: a\n\nAssistant: b\n\nUser: Add.\n\nAssistant:", " 4\n\n|"],
        ),
        (ADD | {"system": " ", "history": []}, {}, ["User: Add.\n\nAssistant:", " 4\n\n|"]),
        (ADD | {"system": None, "history": None}, {}, ["User: Add.\n\nAssistant:", " 4\n\n|"]),
        ({"messages": TURNS[:2], "system": "Be brief."}, {}, [f"System: Be brief.\n\n{ASKED}", " 4.\n\n|"]),
        (
            {
                "messages": TURNS[:2],
                "system_prompt": "Be brief.",
                "tools": [],
                "weight": 1,
                "conversations": None,
            },
            {},
            [f"System: Be brief.\n\n{ASKED}", " 4.\n\n|"],
        ),
        (
            {
                "messages": [
                    TURNS[0] | {"train": False, "loss_weight": 0},
                    TURNS[1] | {"train": True, "reasoning_content": None, "refusal": "", "tool_calls": []},
                ],
                "conversations": [
                    {"from": "human", "value": "What is 2+2?", "train": 0, "loss_weight": 0},
                    TURNS[1] | {"train": True, "refusal": "", "tool_calls": []},
                ],
            },
            {},
            [ASKED, " 4.\n\n|"],
        ),
        (
            {"prompt": TURNS[:3], "chosen": TURNS, "rejected": TURNS[:2]},
            {"format": "chosen"},
            [f"{ASKED} 4.\n\nUser: Sure?\n\nAssistant:", " Yes.\nCount!\n\n|"],
        ),
        ({"prompt": "What is 2+2? ", "completion": TURNS[:2]}, {}, [ASKED, " 4.\n\n|"]),
        ({"prompt": None, "completion": TURNS[:2]}, {}, [ASKED, " 4.\n\n|"]),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, *TURNS[:2]], "system": "Be brief. "},
            {},
            [f"System: Be brief.\n\n{ASKED}", " 4.\n\n|"],
        ),
        (
            {"prompt": TURNS[:3], "completion": TURNS[3:], "system": "Be brief."},
            {},
            [
                f"System: Be brief.\n\n{ASKED} 4.\n\nUser: Sure?\n\nAssistant:",
                " Yes.\nCount!\n\n|",
            ],
        ),
        ({"prompt": "a", "completion": "b", "system": "", "history": []}, {}, ["a", "b|"]),
        ({"system": "2+2=", "output": "4"}, {"prompt": "system", "completion": "output"}, ["2+2=", "4|"]),
        ({"history": TURNS[:2]}, {"messages": "history"}, [ASKED, " 4.\n\n|"]),
    ],
)
def test_what_stands_beside(record: Any, fields: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    """A system turn and turns before, as files for other trainers have them."""
    assert by_byte(Example("", record, fields), tmp_path) == in_bytes(expected)


def test_an_end_that_no_text_can_say(world: RwkvWorldTokenizer, tmp_path: Path) -> None:
    """World's end token is none of its characters; that of bytes may stand in a template."""
    said = [TURNS[0], {"role": "assistant", "content": f"a\0{world.eos_token}"}]
    found = tokens_of(Example("", {"messages": said}), world, tmp_path)
    assert [text for text, _ in found].count("end") == 1
    ending = RwkvByteTokenizer()
    ending.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    )
    record = {"messages": [{"role": "assistant", "content": "a"}]}
    found = tokens_of(Example("", record), ending, tmp_path)
    assert found == [("a", True), ("end", True)]  # one end is enough
    ending.chat_template = ending.chat_template.replace("{% endfor %}", "{{ '\\n' }}{% endfor %}")
    found = tokens_of(Example("", record), ending, tmp_path)
    assert found == [("a", True), ("end", True), ("\\n", False)]


def test_special_tokens_in_a_turn(tmp_path: Path) -> None:
    """They would be read as the template's own."""
    tokenizer = RwkvByteTokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    path = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x<|im_end|>"}, TURNS[1]]})
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: turn 1 holds '<\|im_end\|>', .* a special token, token 256"
    ):
        load_tokens(path, tokenizer, cache_dir=tmp_path / "cache", num_workers=1)
    texts = write(tmp_path / "b.jsonl", {"prompt": "x<|im_end|>", "completion": "y"})
    store = load_tokens(texts, tokenizer, cache_dir=tmp_path / "cache", num_workers=1)
    assert store.tokens(0).tolist() == [ord("x"), 256, ord("y"), 0]


ANSWER = "{% generation %}{{ m.content }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("user", "assistant", "message"),
    [
        ("{{ m.content }}", "{% generation %}{% endgeneration %}{{ m.content }}", "not what is said there"),
        ("{{ m.content }}", "{% generation %}{{ m.text }}!{% endgeneration %}", "not what is said there"),
        (ANSWER, "{{ m.content }}", "what others say"),
        ("{% generation %}{{ m.content }}", "{{ m.content }}{% endgeneration %}", "what others say"),
    ],
)
def test_marks_around_something_else(user: str, assistant: str, message: str, tmp_path: Path) -> None:
    tokenizer = RwkvByteTokenizer()
    answer = assistant.replace("m.", "messages[1].")
    tokenizer.chat_template = f"{{% for m in messages if m.role == 'user' %}}{user}{answer}{{% endfor %}}"
    path = write(tmp_path / "a.jsonl", {"messages": TURNS[:2]})
    with pytest.raises(
        DataError, match=rf"a\.jsonl:1: .* marks of the assistant's turn 1 hold {message}: put them"
    ):
        load_tokens(path, tokenizer, cache_dir=tmp_path / "cache", num_workers=1)


def test_chosen_texts_without_a_prompt(tmp_path: Path) -> None:
    """Refused with what would work, which does."""
    talk = "\n\nHuman: Hi\n\nAssistant: Yo"
    record = {"chosen": talk, "rejected": talk}
    with pytest.raises(DataError, match=r"up to the last 'Assistant:'\).* text_field chosen trains"):
        by_byte(Example("", record, {"format": "chosen"}), tmp_path)
    cut = record | {"prompt": talk[:-3], "chosen": talk[-3:]}
    for made, fields in ((cut, {"format": "chosen"}), (record, {"text": "chosen"})):
        found = by_byte(Example("", made, fields), tmp_path)
        assert "".join(text for text, _ in found).removesuffix("end") == repr(talk)[1:-1]


@pytest.mark.parametrize(
    ("record", "fields", "expected"),
    [
        ({"talk": TURNS[:2], "text": "x"}, {"messages": "talk"}, f"{ASKED} 4.\n\n"),
        (GOOD | {"text": "x"}, {"format": "text"}, "x"),
        (
            {"instruction": "a", "output": "b", "text": "x"},
            {"format": "instruction"},
            "User: a\n\nAssistant: b\n\n",
        ),
        ({"instruction": "a", "input": None, "output": "b"}, {}, "User: a\n\nAssistant: b\n\n"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"format": "chosen"}, "ab"),
        (
            {"prompt": "What is 2+2?", "chosen": TURNS[:2], "rejected": TURNS[:2]},
            {"format": "chosen"},
            f"{ASKED} 4.\n\n",
        ),
        (
            {"prompt": "What is 2+2?", "chosen": TURNS[1:2], "rejected": []},
            {"format": "chosen"},
            f"{ASKED} 4.\n\n",
        ),
    ],
)
def test_what_is_read_by_name(record: Any, fields: dict[str, Any], expected: str, tmp_path: Path) -> None:
    found = by_byte(Example("", record, fields), tmp_path)
    ended = "text" not in fields.get("format", "")
    assert "".join(text for text, _ in found) == repr(expected)[1:-1] + "end" * ended


@pytest.mark.parametrize(
    ("fields", "kinds", "message"),
    [
        ({"messages": "m"}, ["text"], "a field 'm' was named, but none of the data has fields"),
        ({"format": "messages"}, ["text", "binidx"], "the format messages is one of records"),
        ({"train_on": "last"}, ["binidx"], "train_on last: of the token ids of a .bin/.idx pair"),
    ],
)
def test_what_would_be_without_effect(fields: dict[str, Any], kinds: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Fields(**fields).refuse_unused(kinds)


def test_chosen_turns_need_no_prompt(tmp_path: Path) -> None:
    record = {"chosen": TURNS[1:2], "rejected": TURNS[3:]}
    assert by_byte(Example("", record, {"format": "chosen"}), tmp_path) == in_bytes(
        ["Assistant:", " 4.\n\n|"]
    )


def test_csv_and_parquet(tmp_path: Path) -> None:
    """Instructions in a table; a list of turns in a column of a parquet file."""
    (tmp_path / "a.csv").write_text('instruction,input,output\nAdd.,"2, 2",4\n')
    (piece,) = find_sources(tmp_path / "a.csv")[0].pieces()
    assert [turn["content"] for turn in piece.turns] == ["Add.\n\n2, 2", "4"]
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = {"messages": [TURNS], "id": [1], "system": ["Be brief."]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    (piece,) = find_sources(tmp_path / "a.parquet")[0].pieces()
    assert list(piece.turns) == [{"role": "system", "content": "Be brief."}, *TURNS]


def test_rows_and_slices_keep_the_mask(tmp_path: Path) -> None:
    """Labels of rows cut anywhere are those of the whole document."""
    path = write(tmp_path / "chat.jsonl", {"text": "plain"}, GOOD, {"prompt": "a", "completion": "b"})
    store = load_tokens(path, RwkvByteTokenizer(), cache_dir=tmp_path / "cache", num_workers=1)
    whole = store.loss(1)
    assert (
        0 < whole.sum() < len(whole) and store.loss(0).all() and store.loss(2).tolist() == [False, True, True]
    )
    assert store.prompt_lengths().tolist() == [0, len(ASKED), 1] and store.ends_added().tolist() == [0, 1, 1]
    for start in range(0, len(whole), 3):
        assert store.loss(1, start, start + 7).tolist() == whole[start : start + 7].tolist()
    labels = [label for row in RowDataset(store, 10) for label in row["labels"].tolist()]
    ids = store.tokens(1).tolist()
    wanted = [i if loss else -100 for i, loss in zip(ids, whole.tolist(), strict=True)]
    first = len(ASKED) // 10 * 10  # rows of the prompt alone are left out
    assert labels == [*b"plain", *wanted[first:], -100, *b"b\0"]
