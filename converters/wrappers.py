"""Prefixes that wrappers put before tensor names: understood, taken away, and told of.

``torch.compile``, DistributedDataParallel, FSDP, DeepSpeed, Lightning and peft save a model's tensors under their own
attribute's name, one before the other in any order: ``module._orig_mod.blocks.0.ln1.weight`` is
``blocks.0.ln1.weight``. Names that no layout has inside (``_orig_mod``, of a compiled block) are taken from any place,
common words (``model``, ``module``) from the front only, and not where a layout itself begins with one
(``model.layers.0.attn.r_proj.weight``).
"""

from collections.abc import Iterable
from pathlib import Path

from rwkv_rev.architectures.registry import generations
from rwkv_rev.errors import CheckpointError
from rwkv_rev.printable import shortened

ANYWHERE = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
IN_FRONT = (*ANYWHERE, "module", "base_model", "model")


def plain_names(where: Path, names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The stored name by plain name, in order, and the prefixes that were taken away, in the order they were met.

    Raises:
        CheckpointError: if two names are one without their prefixes.
    """
    plain: dict[str, str] = {}
    wrappers: dict[str, None] = {}
    found = [(name, *_unwrap(name)) for name in names]
    own = _own_fronts([short for _, short, _ in found])
    for name, short, taken in found:
        front = own.get(short.split(".")[0], "")
        if front and taken.endswith(front):
            short, taken = front + short, taken.removesuffix(front)
        if short in plain:
            both = f"{shortened(plain[short])} and {shortened(name)}"
            raise CheckpointError(
                f"{where} holds both {both}, which are one tensor without their prefixes; remove one of them"
            )
        plain[short] = name
        if taken:
            wrappers[taken] = None
    return plain, tuple(wrappers)


def note_on_wrappers(wrappers: tuple[str, ...]) -> str:
    """What people are told of prefixes that were taken away."""
    return (
        f"names of tensors carry {', '.join(wrappers)}, which a wrapper put there: read without; "
        "export writes plain names"
    )


def _unwrap(name: str) -> tuple[str, str]:
    """A name without wrappers, and what was taken from it."""
    parts = name.split(".")
    front = 0
    while front < len(parts) - 1 and parts[front] in IN_FRONT:
        front += 1
    inside = [part for part in parts[front:-1] if part in ANYWHERE]
    kept = [part for part in parts[front:-1] if part not in ANYWHERE]
    return ".".join([*kept, parts[-1]]), "".join(f"{part}." for part in [*parts[:front], *inside])


def _own_fronts(names: list[str]) -> dict[str, str]:
    """What looks like a wrapper's prefix and is the layout's own, by what stands behind: ``{"layers": "model."}``."""
    for layout, column in ((known, place) for known in generations() for place in range(len(known.layouts))):
        block = layout.layouts[column].block
        short, front = _unwrap(block + "0.x")
        if front and any(name.startswith(short.removesuffix("0.x")) for name in names):
            rows = [str(row.foreign[column]) for row in (*layout.outside, *layout.after)]
            fronts = dict(_unwrap(name) for name in (block, *rows))
            return {short.split(".")[0]: front for short, front in fronts.items() if front}
    return {}
