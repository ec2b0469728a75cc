r"""Conversations as text: RWKV World's template, and where in the text the assistant speaks.

    User: Hello

    Assistant: Hi. What can I do for you?

    User: ...

An empty line ends a turn, and nothing else: turns are stripped, and empty lines in them left out, as RWKV's authors ask
for ("replace \n\n in the prompt by \n", https://huggingface.co/BlinkDL/rwkv7-g1). Another template is a file in
transformers' Jinja, in which ``{% generation %}`` and ``{% endgeneration %}`` stand around what the assistant says,
the mark that ends its turn included; loss on the assistant's turns needs them.

The text is cut where the assistant begins and ends, and the parts are tokenised apart (:func:`parts`): no token spans a
border, neither "\n\n" and the next word nor a colon and what the assistant quotes. A chat reads just these tokens: the
user's turn, then what the model says, token by token. (A ``tokenizer.json`` by itself reads the whole text, and gives
the same tokens wherever none of them spans a border. With World's vocabulary and template none can.)
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.printable import shortened

WORLD_TEMPLATE = r"""{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{%- set known = "; this template knows system, user and assistant" -%}
{{- raise_exception("a turn of the role " + (message['role'] | string) + known) -}}
{%- elif message['tool_calls'] -%}
{{- raise_exception("a turn with tool_calls, which this template has no words for") -}}
{%- endif -%}
{%- set text = message['content'].strip().replace('\r\n', '\n').replace('\r', '\n') -%}
{%- set text = text.split('\n') | select | join('\n') -%}
{%- if message['role'] == 'assistant' -%}
{{- 'Assistant:' -}}
{%- generation -%}
{{- ' ' + text + '\n\n' -}}
{%- endgeneration -%}
{%- elif text or message['role'] == 'user' -%}
{{- message['role'].capitalize() + ': ' + text + '\n\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""
"""RWKV World's: ``System: ...``, ``User: ...`` and ``Assistant: ...``, an empty line behind each."""

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""Where transformers keeps it in a folder; it goes before one in ``tokenizer_config.json``."""
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SAID_BESIDE = (  # fields of a turn that hold what is said or done in it
    *("tool_calls", "function_call", "tools", "reasoning_content", "reasoning", "thinking", "refusal"),
    *("audio", "images"),
)
Messages = Sequence[Mapping[str, Any]]


def read_template(path: str | Path) -> str:
    """The template in a file.

    Raises:
        ConfigError: if it cannot be read, or is no template that says anything of a message.
    """
    from jinja2 import TemplateError

    try:
        template = Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}") from error
    try:
        said = render_jinja_template(
            conversations=[[{"role": "user", "content": "Hello"}]],
            chat_template=template,
            bos_token="",
            eos_token="",
        )[0][0]
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no chat template: {_one_line(error)}") from error
    if "Hello" not in said:
        raise ConfigError(
            f"{path} is no chat template: it leaves out what the user says (messages[0]['content'])"
        )
    return template


def tells_who_speaks(template: str) -> bool:
    """Whether a template marks what the assistant says."""
    return _MARK.search(template) is not None


def parts(text: str, spans: Sequence[Sequence[int]]) -> list[tuple[str, bool]]:
    """Cut a text where ``spans`` ([begin, end) in characters, in order) begin and end.

    Returns:
        (part, whether it is in a span), none of them empty.
    """
    found, at = [], 0
    for begin, end in spans:
        found += [(text[at:begin], False), (text[begin:end], True)]
        at = end
    return [(part, spoken) for part, spoken in [*found, (text[at:], False)] if part]


def render(
    tokenizer: Any,
    messages: Messages,
    *,
    template: str | None = None,
    add_generation_prompt: bool = False,
    **more: Any,
) -> tuple[str, list[list[int]]]:
    """The text of a conversation by a tokenizer's template, and the spans that the assistant says.

    Args:
        tokenizer: of transformers. template: in place of its own; World's, where it has none.
        messages: objects with ``role`` and ``content``.
        add_generation_prompt: with the beginning of the assistant's next turn.
        more: what else the template takes.

    Returns:
        The text, and [begin, end) of each span in characters; no spans by a template without marks.

    Raises:
        DataError: for what the template refuses, and for what is said in fields of a turn that it does not read.
    """
    from jinja2 import TemplateError

    template = template or _own_template(tokenizer)
    for number, message in enumerate(messages, start=1):
        for name in _SAID_BESIDE:
            if dict(message).get(name) and name not in template:
                raise DataError(
                    f"turn {number} has '{name}', which the chat template does not read; write it into the content, or "
                    "leave it out"
                )
    marked = tells_who_speaks(template)
    try:
        made: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **(dict(getattr(tokenizer, "special_tokens_map", {})) | more),
        )
    except (TemplateError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the chat template refuses it: {_one_line(error)}") from error
    return made[0][0], [list(span) for span in made[1][0]] if marked else []


def refuse_misplaced_marks(tokenizer: Any, roles: Sequence[str]) -> None:
    """Raise DataError if the marks of a tokenizer's template do not stand around what the assistant says.

    A conversation of the same roles is rendered with numbers for what is said: the n-th span must hold that of the
    assistant's n-th turn, and no other.
    """
    named = dict(getattr(tokenizer, "special_tokens_map", {}))
    told = tuple((name, text) for name, text in named.items() if isinstance(text, str))
    _refuse_misplaced(_own_template(tokenizer), told, tuple(roles))


@lru_cache(maxsize=256)
def _refuse_misplaced(template: str, named: tuple[tuple[str, str], ...], roles: tuple[str, ...]) -> None:
    said = [f"90210{number:05}" for number in range(len(roles))]
    turns = [{"role": role, "content": number} for role, number in zip(roles, said, strict=True)]
    more: dict[str, Any] = dict(named)
    text, spans = render(None, turns, template=template, **more)
    heard = [re.findall(r"90210\d{5}", text[begin:end]) for begin, end in spans]
    answers = [number for number, role in zip(said, roles, strict=True) if role == "assistant"]
    for number, (found, answer) in enumerate(zip(heard, answers, strict=False), start=1):
        if found != [answer]:
            what = "what others say" if set(found) - {answer} else "not what is said there"
            raise DataError(
                f"the chat template's {{% generation %}} marks of the assistant's turn {number} hold {what}: put them "
                "around the content of the assistant's turns and what ends these (--chat-template FILE)"
            )


def _own_template(tokenizer: Any) -> str:
    """A tokenizer's template; of several by name the default one."""
    own: Any = getattr(tokenizer, "chat_template", None) or WORLD_TEMPLATE
    if not isinstance(own, dict):
        return str(own)
    if "default" in own:
        return str(own["default"])
    names = ", ".join(map(shortened, sorted(own)[:8]))
    raise DataError(
        f"the tokenizer has several chat templates, {names}, and none is called default: give one by "
        "--chat-template FILE"
    )


def tokenised_chat(
    tokenizer: Any,
    conversation: Any,
    template: str,
    *,
    add_generation_prompt: bool = False,
    padding: Any = False,
    truncation: bool = False,
    max_length: int | None = None,
    return_tensors: Any = None,
    return_dict: bool = True,
    return_assistant_tokens_mask: bool = False,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """``apply_chat_template`` of transformers, with the parts of a conversation tokenised apart.

    Args:
        tokenizer: of transformers. conversation: one, or a list of several. template: with marks of who speaks.
        padding, truncation, max_length, return_tensors, tokenizer_kwargs: as a call of the tokenizer takes them.
        return_dict: ``input_ids``, ``attention_mask``, and ``assistant_masks`` (1 where the assistant speaks) if
            ``return_assistant_tokens_mask``; else the ids alone.

    Raises:
        DataError: for what the template refuses.
    """
    for name in ("tokenize", "continue_final_message", "sanitize_control_tokens"):
        more.pop(name, None)
    if not conversation:
        raise DataError("a chat of no messages; give at least one")
    several = not isinstance(conversation[0], Mapping)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
    for messages in conversation if several else [conversation]:
        messages = getattr(messages, "messages", messages)
        said = render(
            tokenizer, messages, template=template, add_generation_prompt=add_generation_prompt, **more
        )
        ids: list[int] = []
        mask: list[int] = []
        for part, spoken in parts(*said):
            read = tokenizer(part, add_special_tokens=False, **(tokenizer_kwargs or {}))["input_ids"]
            ids += read
            mask += [int(spoken)] * len(read)
        if truncation and (most := max_length or tokenizer.model_max_length) < len(ids):
            kept = slice(-most, None) if tokenizer.truncation_side == "left" else slice(most)
            ids, mask = ids[kept], mask[kept]
        batch["input_ids"].append(ids)
        batch["assistant_masks"].append(mask)
    padded = tokenizer.pad({"input_ids": batch["input_ids"]}, padding=padding, max_length=max_length)
    length = [len(ids) for ids in padded["input_ids"]]
    left = tokenizer.padding_side == "left"
    padded["assistant_masks"] = [
        [0] * (n - len(mask)) + mask if left else mask + [0] * (n - len(mask))
        for n, mask in zip(length, batch["assistant_masks"], strict=True)
    ]
    if not return_assistant_tokens_mask:
        del padded["assistant_masks"]
    if not several and return_tensors is None:
        padded = type(padded)({name: values[0] for name, values in padded.items()})
    padded.convert_to_tensors(return_tensors)
    return padded if return_dict else padded["input_ids"]


def _one_line(error: BaseException) -> str:
    return shortened(" ".join(str(error).split()), 300) or type(error).__name__
