"""The page ``docs/peft.md``: the table of peft's methods, made of the test's cases."""

import textwrap
from collections.abc import Iterable

from peft_cases import Method

HEAD = """\
<!-- written by pytest tests/test_peft_methods.py --write-docs -->
# Methods of peft

Every method of [peft](https://github.com/huggingface/peft) by name: exact, or refused by name. Each row is held against
what it says by `tests/test_peft_methods.py`. Layers of peft that no row has are refused where chunks could make a
difference, until they are declared with `rwkv_rev.position_wise`.

**How to use one**, LoRA as the example, with the names of the layers: [python.md](python.md#lora). `head` is the output
layer. A *chunk* is a piece of the context; `full` and `reversible` are [strategies](../README.md#how-it-works).

- **verdict**: `exact`: you can train in chunks, evaluate and generate. `in part`: some of that is refused or limited to
  `full`; the next columns say what, the notes below say why. `refused`: none of it.
- **training**: `exact` is the gradient of `full`, under `reversible` and `checkpoint`, in 2 and in 4 chunks. Where a
  method draws random numbers in training, it is the gradient of what was drawn. `full only`: the strategies that cut
  the context refuse it.
- **evaluation** of a text longer than a chunk: `in chunks`, in memory that does not grow with it, or in `one piece`.
- **generation**: `exact` reads each token once, and gives what reading everything again for each token gives.
  `re-reads`: peft itself reads everything again. `refused`: with the state carried; with `use_cache=False` it is exact.
- **why**: the number of a note below the table. A note `in this type` is the message that you get.

**Packed rows** are refused under prompt tuning, multitask prompts, P-tuning and CPT: virtual tokens stand before a row,
not before each document in it. A tuned initial state is where every document begins.
"""


def peft_page(methods: Iterable[Method], refusals: dict[str, list[str]]) -> str:
    """The page; ``refusals`` are the errors by name of the method."""
    notes: list[str] = []
    rows = [("method", "verdict", "training", "evaluation", "generation", "why")]
    for method in methods:
        remark = [method.note] if method.note else []
        whys = [*remark, *(f"`{line}`" for line in refusals.get(method.name, []))]
        notes += [why for why in whys if why not in notes]
        numbers = " ".join(str(notes.index(why) + 1) for why in whys)
        rows.append(
            (method.name, verdict(method), method.training, method.evaluation, method.generation, numbers)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    texts = [
        textwrap.fill(f"{number}. {note}", 118, subsequent_indent="   ", break_on_hyphens=False)
        for number, note in enumerate(notes, 1)
    ]
    return "\n".join([HEAD, *lines, "", *texts, ""])


def verdict(method: Method) -> str:
    """``exact``, ``refused``, or ``in part`` where some is one and some the other."""
    said = {method.training, method.evaluation, method.generation}
    if said == {"refused"}:
        return "refused"
    return "in part" if said & {"refused", "full only"} else "exact"
