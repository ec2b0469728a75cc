"""Conversations with a carried state: the same logits as of everything read at once, and what ends an answer."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_rev
from rwkv_rev.conversation import Chat
from rwkv_rev.errors import CheckpointError, ConfigError, DataError, OutputError, SourceError
from rwkv_rev.sampling import Sampling
from rwkv_rev.state_file import load_state
from rwkv_rev.tokenization import RwkvByteTokenizer, RwkvWorldTokenizer

GREEDY = Sampling(temperature=0)
ENDLESS = (  # the bundled models never say what ends a turn by it
    "{% for m in messages %}{{ m.role + ': ' }}{{ m.content }}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ '</s>' }}{% endgeneration %}{% else %}{{ m.content + '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)


class Parrot:
    """A model that says what it is told to, token by token; its state is the list of what it has read."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.script: Iterator[int] = iter(())
        self.generation_config = SimpleNamespace(eos_token_id=0)

    def parameters(self) -> Iterator[Tensor]:
        yield torch.zeros(1)

    def __call__(self, ids: Tensor, state: list[int] | None, logits_to_keep: int) -> Any:
        logits = torch.zeros(1, 1, self.vocab_size)
        logits[..., next(self.script, 0)] = 1.0
        return SimpleNamespace(state=[*(state or []), *ids[0].tolist()], logits=logits)


def parrot(tokenizer: Any, **options: Any) -> Chat:
    return Chat(Parrot(len(tokenizer) + 300), tokenizer, **options)


@pytest.fixture(scope="module", params=[RwkvByteTokenizer, RwkvWorldTokenizer], ids=["byte", "world"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    (tmp_path / "endless.jinja").write_text(ENDLESS)
    return tmp_path / "endless.jinja"


@pytest.mark.parametrize(
    ("text", "message"), [("a\0b", r"holds '\\x00'"), ("\ud800", "holds half a surrogate")]
)
def test_what_nobody_can_say(text: str, message: str) -> None:
    """As in training; the conversation stays."""
    talk = parrot(RwkvByteTokenizer())
    with pytest.raises(DataError, match=f"what was said {message}"):
        talk.say(text)
    assert talk.state is None
    with pytest.raises(DataError, match=f"the system turn {message}"):
        parrot(RwkvByteTokenizer(), system=text)


ENDS = {
    "turn": " Fine.\n\n",
    "end of text": " Fine.|",
    "half an end, then the end of text": " Fine.\n|",
    "beyond the end": " Fine.\n\n\n\n",
    "characters of several tokens": " Fine 日本🤖é.\n\n",
}


@pytest.mark.parametrize("said", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("template", [None, CHATML], ids=["world", "other"])
def test_what_is_read_is_the_conversation(tokenizer: Any, said: str, template: str | None) -> None:
    """Token by token what ``apply_chat_template`` makes of it, whatever ends the answer."""
    tokenizer = copy.copy(tokenizer)
    if template is not None:
        if "\n|" in said:
            pytest.skip("a line end is no beginning of this template's end")
        tokenizer.chat_template = template
        said = said.strip().replace("\n\n", "</s>")
    chat = parrot(tokenizer, system="Be brief.")
    shown: list[str] = []
    talk = [{"role": "system", "content": "Be brief."}]
    for turn in ("Hi", " How are\nyou? "):
        text, end, _ = said.partition("|")
        chat.model.script = iter([*tokenizer.encode(text), *([0] if end else [])])
        shown.clear()
        answer = chat.say(turn, GREEDY, shown=shown.append)
        assert answer == said.partition("|")[0].partition("</s>")[0].strip() == "".join(shown).strip()
        talk += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    chat.read(chat._unread)
    ids = tokenizer.apply_chat_template(talk, return_dict=False)
    tail = "" if template is None else "\n"  # read with the next turn
    assert tokenizer.decode(chat.state) + tail == tokenizer.decode(ids)
    if template is None and "\n|" not in said:
        assert chat.state == ids


@pytest.mark.parametrize("limit", [7, 999], ids=["longest", "stopped"])
def test_an_answer_that_is_stopped(tokenizer: Any, limit: int) -> None:
    """By Ctrl-C, or at its longest: the turn is ended for it, and the chat goes on."""
    chat = parrot(tokenizer)
    chat.model.script = iter(tokenizer.encode(" on and" + "-on" * 200))
    answer = chat.say("Go", GREEDY, max_new_tokens=limit, stop=lambda: len(chat.state) >= 40)
    chat.model.script = iter(tokenizer.encode(" Yes.\n\n"))
    assert chat.say("Stop", GREEDY) == "Yes."
    chat.read(chat._unread)
    assert (
        tokenizer.decode(chat.state)
        == f"User: Go\n\nAssistant: {answer}\n\nUser: Stop\n\nAssistant: Yes.\n\n"
    )


def test_nothing_is_shown_that_may_be_the_end() -> None:
    tokenizer = RwkvByteTokenizer()
    chat = parrot(tokenizer)
    shown: list[str] = []
    chat.model.script = iter(" a\nb é\n\n".encode())
    assert chat.say("x", GREEDY, shown=shown.append) == "a\nb é"
    assert shown == ["a", "\nb", " ", "é"]


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_logits_are_those_of_the_whole_conversation(
    shallow: dict[str, Path], endless: Path, version: str
) -> None:
    """No token is read twice, and the last logits equal those of everything read at once."""
    chat = rwkv_rev.chat(shallow[version], chat_template=endless, device="cpu")
    chat.model.double()
    read: list[int] = []
    logits = torch.zeros(0)
    inner = chat.read

    def noted(ids: list[int]) -> Tensor:
        nonlocal logits
        read.extend(ids)
        logits = inner(ids)
        return logits

    chat.read = noted  # type: ignore[method-assign]
    answers = [chat.say(turn, GREEDY, max_new_tokens=8) for turn in ("Hello there", "And now?", "Why?")]
    assert all(answers)
    assert chat.tokens == len(read)
    with torch.no_grad():
        whole = chat.model(torch.tensor([read])).logits[:, -1].float()
    torch.testing.assert_close(logits, whole, rtol=1e-6, atol=1e-6)
    text = chat.tokenizer.decode(read)
    assert [text.count(turn) for turn in ("user: Hello there", "user: And now?", "user: Why?")] == [1, 1, 1]


def test_save_load_and_reset(bundled: dict[str, Path], endless: Path, tmp_path: Path) -> None:
    """A state that is loaded goes on as the conversation would have; reset forgets."""

    def say(one: Chat, text: str) -> str:
        return one.say(text, GREEDY, max_new_tokens=24)

    chat, other = (rwkv_rev.chat(bundled["7"], chat_template=endless, device="cpu") for _ in range(2))
    with pytest.raises(DataError, match="nothing has been said yet"):
        chat.save(tmp_path / "a.safetensors")
    first = say(chat, "Hello")
    chat.save(tmp_path / "a.safetensors")
    expected = say(chat, "More")
    other.load(tmp_path / "a.safetensors")
    assert say(other, "More") == expected
    other.reset()
    assert say(other, "Hello") == first != expected and min(len(first), len(expected)) > 3
    with pytest.raises(OutputError, match=r"a\.safetensors is there already; name another"):
        chat.save(tmp_path / "a.safetensors")


def test_states_that_do_not_fit(bundled: dict[str, Path], shallow: dict[str, Path], tmp_path: Path) -> None:
    chat = rwkv_rev.chat(shallow["7"], device="cpu")
    chat.say("Hello", GREEDY, max_new_tokens=1)
    chat.save(tmp_path / "a.safetensors")
    other = rwkv_rev.chat(bundled["7"], device="cpu")
    with pytest.raises(
        CheckpointError, match=r"the state of another model: its time_shift is 2 x 1 x \d+, this model's"
    ):
        other.load(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="is no conversation that /save wrote, or one that is cut"):
        other.load(tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match="no such file"):
        other.load(tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="is no conversation that /save wrote: it holds "):
        load_state(bundled["7"] / "model.safetensors", other.model)


def test_templates_that_do_not_go_with_a_carried_state() -> None:
    tokenizer = RwkvByteTokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    with pytest.raises(ConfigError, match=r"writes .* otherwise"):
        parrot(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(ConfigError, match="otherwise than it begins one"):
        parrot(tokenizer)


def test_what_cannot_be_said(tokenizer: Any) -> None:
    chat = parrot(tokenizer)
    with pytest.raises(DataError, match="nothing was said"):
        chat.say(" \n")
    with pytest.raises(ConfigError, match="max_new_tokens = 0"):
        chat.say("a", max_new_tokens=0)
