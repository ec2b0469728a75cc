"""A conversation with a model, whose state is carried from turn to turn: each token is read once.

What the user says becomes text by the tokenizer's chat template (:mod:`rwkv_rev.tokenization.chat_template`), which is
asked for the text that a further turn adds; a template that would change what was said before is refused. The answer
ends where the template ends a turn ("\\n\\n" in RWKV World's), or with the model's end of text; the next turn begins
with what of that end the model has not read. So the state is that of the whole conversation, as training reads it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_rev.arguments import checked
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.counts import MOST
from rwkv_rev.device import choose_device
from rwkv_rev.errors import ConfigError, DataError
from rwkv_rev.loading import load_model, load_tokenizer
from rwkv_rev.printable import is_utf8
from rwkv_rev.sampling import Sampling
from rwkv_rev.state import ModelState
from rwkv_rev.state_file import load_state, save_state
from rwkv_rev.tokenization.chat_template import read_template, render
from rwkv_rev.tokenization.special_tokens import refuse_special, special_tokens
from rwkv_rev.wkv.dispatch import choose_kernel

RWKV_SAMPLING = Sampling(1.0, 0.3, 0, 0.5, 0.5, 0.996)
"""What chats with RWKV models are customarily sampled with."""
_LONGEST_CHARACTER = 4  # bytes, and so tokens
_ASKED, _ANSWER = "Question", "Answer"


class Chat:
    """A conversation.

    Args:
        model: in evaluation mode. tokenizer: its own.
        system: said before the first turn, if anything.

    Attributes:
        state: after the tokens read so far; None before the first.
        tokens: how many these are.

    Raises:
        ConfigError: for a chat template that does not go with a carried state. DataError: for a system turn that holds
            a special token of the tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any, *, system: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._refuse_unsaid(system or "", "the system turn")
        self._before = [] if system is None else [{"role": "system", "content": system}]
        self.state: ModelState | None = None
        self.tokens = 0
        self._unread: list[int] = []
        self._begun = False
        ends = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
        self._ends = {i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])}
        asked = [*self._before, {"role": "user", "content": _ASKED}]
        talk = [*asked, {"role": "assistant", "content": _ANSWER}]
        self._talk = talk
        text, spans = render(tokenizer, talk)
        end = spans[-1][1] if spans else len(text)
        opened = render(tokenizer, asked, add_generation_prompt=True)[0]
        if _ANSWER not in text[:end] or not text.startswith(opened):
            raise ConfigError(
                "the chat template writes a turn of the assistant otherwise than it begins one to be answered "
                "(add_generation_prompt); give another by --chat-template FILE"
            )
        self._end = text[text.rindex(_ANSWER) + len(_ANSWER) : end]
        self._after_end = text[end:]
        self._text = text
        self._further("Hello")

    def say(
        self,
        text: str,
        sampling: Sampling = RWKV_SAMPLING,
        *,
        max_new_tokens: int = 2048,
        shown: Callable[[str], object] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> str:
        """The model's answer to the user's next turn.

        Args:
            text: what the user says. sampling: how tokens are chosen.
            max_new_tokens: most tokens of the answer. shown: takes it piece by piece, as it is made.
            stop: asked after each token whether that is enough.

        Raises:
            DataError: for nothing said, what holds a special token of the tokenizer, such as its end of text, or what
                the template refuses. ConfigError: for a wrong number.
        """
        if not 1 <= max_new_tokens <= MOST:
            raise ConfigError(f"max_new_tokens = {max_new_tokens} must be from 1 to {MOST}")
        if not text.strip():
            raise DataError("nothing was said")
        self._refuse_unsaid(text, "what was said")
        ids = self._unread + self._encode(self._further(text) if self._begun else self._first(text))
        processors: Any = sampling.processors(self.tokenizer)
        answer = _Answer(self.tokenizer, self._end, shown)
        self._unread = ids  # should the model fail, they are still to be read
        logits = self.read(ids)
        self._unread, self._begun = [], True
        while True:
            said = torch.tensor([answer.ids], dtype=torch.int64, device=logits.device)
            token = sampling.choose(processors(said, logits))
            if token in self._ends:
                self._unread = self._encode(answer.missing())
                break
            answer.add(token)
            if answer.ended:
                self._unread = answer.last(self._encode)
                break
            self._unread = [token]
            if len(answer.ids) >= max_new_tokens or stop():
                self._unread += self._encode(answer.missing())
                break
            logits = self.read(self._unread)
            self._unread = []
        return answer.close()

    def reset(self) -> None:
        """Forget the conversation."""
        self.state, self.tokens, self._unread, self._begun = None, 0, [], False

    def save(self, path: str | Path) -> None:
        """Write the state after all that was said, the end of the last answer included.

        Raises:
            DataError: before anything was said. OutputError: if there is a file already, or it cannot be written.
        """
        if self._unread:
            self.read(self._unread)
            self._unread = []
        if self.state is None or not self._begun:
            raise DataError("nothing has been said yet, so there is no state to save")
        save_state(self.state, path, self.model.config)

    def load(self, path: str | Path) -> None:
        """Go on from a state that :meth:`save` wrote.

        Raises:
            SourceError, CheckpointError: if it cannot be read, or is of another architecture or other sizes; the
                conversation stays.
        """
        self.state, self.tokens, self._unread, self._begun = load_state(path, self.model), 0, [], True

    @torch.no_grad()
    def read(self, ids: list[int]) -> Tensor:
        """Read tokens; gives the logits [1, V] of the one after them."""
        device = next(self.model.parameters()).device
        output = self.model(torch.tensor([ids], device=device), state=self.state, logits_to_keep=1)
        self.state, self.tokens = output.state, self.tokens + len(ids)
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _refuse_unsaid(self, text: str, name: str) -> None:
        if not is_utf8(text):
            raise DataError(f"{name} holds half a surrogate pair, no text")
        refuse_special(text, special_tokens(self.tokenizer), self.tokenizer, name)

    def _first(self, text: str) -> str:
        said = [*self._before, {"role": "user", "content": text}]
        return render(self.tokenizer, said, add_generation_prompt=True)[0]

    def _further(self, text: str) -> str:
        """What a turn adds to a conversation whose last answer has ended."""
        said = [*self._talk, {"role": "user", "content": text}]
        whole = render(self.tokenizer, said, add_generation_prompt=True)[0]
        if not whole.startswith(self._text):
            raise ConfigError(
                "the chat template writes earlier turns otherwise when another follows, and what was read cannot be "
                "read again; give another by --chat-template FILE"
            )
        return self._after_end + whole[len(self._text) :]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids


class _Answer:
    """Tokens of an answer as text, shown up to what may be the beginning of its end."""

    def __init__(self, tokenizer: Any, end: str, shown: Callable[[str], object]) -> None:
        self.ids: list[int] = []
        self._tokenizer, self._end, self._shown = tokenizer, end, shown
        self._text = ""
        self._told = 0
        self._part: list[int] = []  # tokens of a character that is not whole yet
        self._length_before = 0  # of the text, before the last token
        self._ends_at = -1

    @property
    def ended(self) -> bool:
        return self._ends_at >= 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        self._length_before = len(self._text)
        self._part.append(token)
        piece = self._tokenizer.decode(self._part, skip_special_tokens=False)
        if piece.endswith("\ufffd") and len(self._part) < _LONGEST_CHARACTER:
            return
        self._part = []
        self._text += piece
        if self._end:
            self._ends_at = self._text.find(self._end, max(0, self._length_before - len(self._end)))
        self._tell(self._ends_at if self.ended else len(self._text) - self._overlap())

    def missing(self) -> str:
        """What of its end has not been said."""
        return self._end[self._overlap() :]

    def last(self, encode: Callable[[str], list[int]]) -> list[int]:
        """The last token, which the model has not read, without what it says beyond the end."""
        if self._ends_at + len(self._end) == len(self._text):
            return self.ids[-1:]
        return encode(self._text[self._length_before : self._ends_at + len(self._end)])

    def close(self) -> str:
        """Show the rest; gives the whole, without the blanks around it."""
        if self._part:
            self._text += self._tokenizer.decode(self._part, skip_special_tokens=False)
        end = self._ends_at if self.ended else len(self._text) - self._overlap()
        self._tell(end)
        return self._text[:end].strip()

    def _overlap(self) -> int:
        """Characters at the end of the text that are the beginning of its end."""
        return max((n for n in range(1, len(self._end)) if self._text.endswith(self._end[:n])), default=0)

    def _tell(self, end: int) -> None:
        piece = self._text[self._told : end]
        if not self._text[: self._told].strip():
            piece = piece.lstrip()
        if end > self._told:
            self._told = end
            if piece:
                self._shown(piece)


@checked
def chat(
    directory: str | Path,
    *,
    system: str | None = None,
    chat_template: str | Path | None = None,
    device: str = "auto",
) -> Chat:
    """A conversation with a model folder: ``chat("my-model").say("Hello")``.

    Args:
        directory: a converted or fine-tuned model folder.
        system: said before the first turn, if anything.
        chat_template: file with another template than the tokenizer's.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.

    Raises:
        SourceError, CheckpointError: if the folder is not a whole model. ConfigError: for a template that does not go
            with a carried state. RwkvRevError: for a device that is not there.
    """
    choose_kernel(None, torch.empty(0, device="cpu"))  # refuses a name that the environment gives
    with ConvertedModel(directory):  # refuses what is not a whole model, in one line
        pass
    place = choose_device(device)
    tokenizer = load_tokenizer(directory)
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    model = load_model(directory, place, torch.float32 if place.type == "cpu" else "auto").eval()
    return Chat(model, tokenizer, system=system)
