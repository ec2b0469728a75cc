"""Prefixes that wrappers put before tensor names: understood, taken away, and told of.

``torch.compile``, DistributedDataParallel, FSDP, DeepSpeed, Lightning and peft save a model's tensors under their own
attribute's name, one before the other in any order: ``module._orig_mod.blocks.0.ln1.weight`` is
``blocks.0.ln1.weight``. Names that no layout has inside (``_orig_mod``, of a compiled block) are taken from any place,
common words (``model``, ``module``) from the front only.
"""

from collections.abc import Iterable
from pathlib import Path

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
    for name in names:
        short, taken = _unwrap(name)
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
