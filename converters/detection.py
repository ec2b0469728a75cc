"""Tell the version and sizes of an RWKV model from the names and shapes of its tensors, or refuse it by name.

By which tensors a generation is told it says itself (:mod:`rwkv_rev.architectures`). L is the highest block number
plus one, V and D come from the embedding, F from the channel mix. File names decide nothing, and ``config.json`` no
size: published ones have ``intermediate_size: null`` and the head size in ``num_attention_heads``. It is only asked for
what no tensor tells: the epsilons of the norms, and whether a head that is not there is the embedding
(``tie_word_embeddings``). What it says must be possible, and in a layout whose classes are made of it, true
(:mod:`rwkv_rev.converters.contradictions`).

Vectors may be stored with extra dimensions of size one ([1, 1, D] or [D], [H, 1, 1] or [H]), as published
files differ; every other shape must be exact. Values are not looked at: see ``reading.check_finite``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rwkv_rev.architectures.architecture import Architecture, Layout, Stored, most_common
from rwkv_rev.architectures.registry import UNKNOWN, generations, supported
from rwkv_rev.configuration import MOST_LAYERS, RwkvRevConfig
from rwkv_rev.converters.adapters import refuse_adapters
from rwkv_rev.converters.contradictions import refuse_contradictions
from rwkv_rev.converters.names import EMBEDDINGS, HEAD, TensorNames, tensor_table
from rwkv_rev.converters.reading import Checkpoint
from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.selection import some
from rwkv_rev.printable import shortened

SUPPORTED = f"{supported()} can be converted"
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Tensors that only another kind of file has. Searched in every name, in this order.
_FOREIGN_KINDS = (
    (r"^_(strategy|version|rescale_layer)$", "was rewritten by the rwkv package; give the original .pth"),
    (r"\.weight_(mx|rx|my|ry)$", "was quantised by the rwkv package; give the original .pth"),
    (r"^blocks\.\d+\.time_mix\.", "is a converted model already; load it with from_pretrained"),
    *((pattern, f"is an RWKV-{version} model; {SUPPORTED}") for version, pattern in UNKNOWN.items()),
    (
        r"^blocks\.\d+\.attention\.",
        "is a transformers base model without its head; give the causal language model",
    ),
)

# What leftover tensors are, where that is known.
_LEFTOVERS = (
    (r"\.tiny_", "the tiny attention of RWKV-4a"),
    (r"pos_emb_", "position embeddings"),
    (r"^(head_[qk]\.|copy_mask)", "a copying head"),
    (r"\.ffnPre\.", "a channel mix in the place of the first time mix"),
    (
        r"\.attn\.x_[rwkvag]$",
        "mixes of flash-linear-attention's later versions beside its first one's attn.x_x",
    ),
    (r"\.time_state$", "a tuned initial state of RWKV-4 or in this layout"),
)


@dataclass(frozen=True)
class Detected:
    """Version and sizes of a checkpoint.

    Attributes:
        version: of the generation.
        num_layers: L.
        D, H, N, F, V: width, heads, head size, channel-mix width, vocabulary. RWKV-4 has H = 1 and N = D.
        bonus_is_exponential: u is the exponential of the stored bonus (5.0 with ``time_first``).
        layout: whose tensor names the file uses.
        layer_norm_epsilon: from ``config.json``, else 1e-5.
        group_norm_epsilon: ``1e-5 * head_size_divisor**2`` from ``config.json``, else 64e-5.
        has_initial_state: the file holds a tuned initial state (``att.time_state``).
        tied: the file holds no head: it is the embedding.
        own: fields of the configuration that the architecture has for itself, as far as the file tells them.
        unusual_shapes: stored shape by foreign name, of the tensors that have not the shape their layout
            usually gives them (extra or fewer dimensions of size one).
    """

    version: str
    num_layers: int
    D: int
    H: int
    N: int
    F: int
    V: int
    bonus_is_exponential: bool
    layout: str
    layer_norm_epsilon: float = 1e-5
    group_norm_epsilon: float = 64e-5
    has_initial_state: bool = False
    tied: bool = False
    own: dict[str, Any] = field(default_factory=dict, hash=False)
    unusual_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def to_config(self, **overrides: Any) -> RwkvRevConfig:
        """The configuration of the converted model; ``overrides`` are fields of :class:`RwkvRevConfig`."""
        fields: dict[str, Any] = {
            "rwkv_version": self.version,
            "vocab_size": self.V,
            "hidden_size": self.D,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.H,
            "head_size": self.N,
            "intermediate_size": self.F,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "group_norm_epsilon": self.group_norm_epsilon,
            "bonus_is_exponential": self.bonus_is_exponential,
            "has_initial_state": self.has_initial_state,
            "tie_word_embeddings": self.tied,
        }
        return RwkvRevConfig(**(fields | self.own | overrides))

    def tensors(self) -> tuple[TensorNames, ...]:
        """Every tensor of the file with its name and shape in the converted model and in the file's layout."""
        table = tensor_table(self.to_config(), self.layout)
        return tuple(row for row in table if not (self.tied and row.name == HEAD))


def detect(checkpoint: Checkpoint) -> Detected:
    """Version and sizes of ``checkpoint``; all its tensors are then known to be there in the right shapes.

    Reads names, shapes and dtypes only.

    Raises:
        CheckpointError: naming the tensors that are missing, left over, of a wrong shape or dtype, or the
            kind of model or file it is instead.
    """
    where = str(checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.files[0].parent)
    names = checkpoint.names()
    _refuse_foreign_kinds(where, checkpoint)
    architecture = _sizes(where, checkpoint)
    table = architecture.tensors()
    config = architecture.to_config()
    _compare_names(where, architecture, table, checkpoint)
    unusual = _compare_shapes(where, checkpoint, table, config.architecture.letters)
    layouts = config.architecture.layouts
    refuse_contradictions(
        where, checkpoint, config, layouts[config.architecture.column(architecture.layout)], table
    )
    for name in names:
        if checkpoint.dtype(name) not in FLOAT_DTYPES:
            dtype = str(checkpoint.dtype(name)).removeprefix("torch.")
            raise CheckpointError(
                f"{where}: {shortened(name)} is {dtype}, not a floating-point dtype; give unquantised weights"
            )
    architecture.unusual_shapes.update(unusual)
    return architecture


def _refuse_foreign_kinds(where: str, checkpoint: Checkpoint) -> None:
    names = checkpoint.names()
    if names and all(name.endswith(".time_state") for name in names):
        raise CheckpointError(
            f"{where} holds tuned initial states, not a whole model; convert the model's own .pth, then rwkv-rev state "
            f"load MODEL {where} ({some(names, 1)})"
        )
    refuse_adapters(where, [checkpoint.stored_name(name) for name in names])
    for pattern, what in _FOREIGN_KINDS:
        found = [checkpoint.stored_name(name) for name in names if re.search(pattern, name)]
        if found:
            raise CheckpointError(f"{where} {what} (it has {some(found, 1)})")


@dataclass(frozen=True)
class _Candidate:
    """A generation in one of its layouts (``column`` of their names)."""

    architecture: Architecture
    column: int

    @property
    def layout(self) -> Layout:
        return self.architecture.layouts[self.column]

    @property
    def kinds(self) -> dict[str, str]:
        """The tensors of a block: names in this layout, and in the generation's first one."""
        first = self.architecture.initial_state
        rows = (*self.architecture.block, *(() if first is None else (first,)))
        return {
            str(row.foreign[self.column]): str(row.foreign[0]) for row in rows if row.foreign[self.column]
        }

    def name(self, ours: str) -> str:
        """What the layout calls a tensor, without the block's name if it is of a block."""
        rows = (*self.architecture.outside, *self.architecture.block, *self.architecture.after)
        return next(str(row.foreign[self.column]) for row in rows if row.ours == ours)

    def by_block(self, names: Iterable[str]) -> dict[int, set[str]]:
        """The names in each block, without the block's."""
        return _by_block(names, rf"{re.escape(self.layout.block)}(\d+)\.(.+)")


def _candidates(names: Sequence[str]) -> list[_Candidate]:
    """What a file with these names may be, from the newest to the oldest."""
    every = [
        _Candidate(known, column) for known in reversed(generations()) for column in range(len(known.layouts))
    ]
    marked = [
        known
        for known in every
        if known.layout.mark and any(name.startswith(known.layout.mark) for name in names)
    ]
    return marked or [known for known in every if not known.layout.mark]


def _sizes(where: str, checkpoint: Checkpoint) -> Detected:
    names = checkpoint.names()
    candidates = _candidates(names)
    there = []
    for known in candidates:
        sign = known.layout.sign or known.name(known.architecture.sign)
        if any(sign in kinds for kinds in known.by_block(names).values()):
            there.append(known)
    there.sort(key=lambda known: not known.layout.sign)  # what has a sign of its own is told by it
    layout = candidates[0].layout
    if not there:
        oldest = candidates[-1]
        sign = oldest.name(oldest.architecture.sign)
        raise CheckpointError(
            f"{where} is not an RWKV model: no {layout.block}0.{sign} but {some(names)}; {SUPPORTED}"
        )
    any_of_them = there[0]  # they call what all have the same
    blocks = any_of_them.by_block(names)

    def shapes(kind: str) -> dict[int, tuple[int, ...]]:
        """Of the tensors of that kind, by their blocks."""
        having = [i for i in sorted(blocks) if kind in blocks[i]]
        return {i: checkpoint.shape(f"{layout.block}{i}.{kind}") for i in having}

    layers = max(blocks) + 1
    if layers > len(names):
        raise CheckpointError(
            f"{where} has a block {layers - 1} but only {len(names)} tensors; blocks are missing"
        )
    embedding, head = any_of_them.name(EMBEDDINGS), any_of_them.name(HEAD)
    if embedding not in names or len(checkpoint.shape(embedding)) != 2:
        raise CheckpointError(f"{where} is not a whole RWKV model: missing {embedding} [V, D]")
    # The width most of these agree on, so that a single wrong shape is blamed on its own tensor.
    norm = f"{layout.block}0.{any_of_them.name('ln1.weight')}"
    witnesses = (embedding, head, any_of_them.name("model.ln_out.weight"), norm)
    width = most_common(checkpoint.shape(n)[-1:] for n in witnesses if n in names)
    vocab = checkpoint.shape(embedding)[0]
    key, value = (any_of_them.name(f"channel_mix.{name}.weight") for name in ("key", "value"))
    if not shapes(key):
        raise CheckpointError(f"{where} is not a whole RWKV model: missing {layout.block}0.{key}")
    widths = [shape[:1] for shape in shapes(key).values()] + [shape[1:] for shape in shapes(value).values()]
    channel_mix = (*most_common(widths), 0)[0]
    D = width[0] if width else 0
    for size, of in ((vocab, embedding), (D, embedding), (channel_mix, f"{layout.block}0.{key}")):
        if not size:
            raise CheckpointError(f"{where} is not a whole RWKV model: {of} has no rows or columns")
    kinds = set().union(*blocks.values())
    for known in there:
        stored = Stored(D, {own: shapes(kind) for kind, own in known.kinds.items() if kind in kinds})
        try:
            told = known.architecture.told_by(stored)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
        if told is not None:
            break
    else:
        raise CheckpointError(f"{where} is an RWKV model of another kind; {SUPPORTED}")
    _refuse_impossible_sizes(where, checkpoint.config)
    try:
        layer_norm_epsilon, group_norm_epsilon = known.architecture.epsilons(
            checkpoint.config, known.layout.name, told["head_size"]
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None
    tied = known.column > 0 and checkpoint.config.get("tie_word_embeddings") is True and head not in names
    return Detected(
        version=known.architecture.version,
        num_layers=layers,
        D=D,
        H=told["num_attention_heads"],
        N=told["head_size"],
        F=channel_mix,
        V=vocab,
        bonus_is_exponential=told.get("bonus_is_exponential", False),
        layout=known.layout.name,
        layer_norm_epsilon=layer_norm_epsilon,
        group_norm_epsilon=group_norm_epsilon,
        has_initial_state=told.get("has_initial_state", False),
        tied=tied,
        own={name: told[name] for name in known.architecture.fields if name in told},
    )


def _by_block(names: Iterable[str], pattern: str) -> dict[int, set[str]]:
    blocks: dict[int, set[str]] = {}
    for name in names:
        if match := re.fullmatch(pattern, name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    return blocks


def _refuse_impossible_sizes(where: str, config: dict[str, Any]) -> None:
    """Sizes of a config.json decide nothing, but one that no model has tells of a damaged file."""
    for name, most in (("num_hidden_layers", MOST_LAYERS), ("vocab_size", 1 << 31), ("hidden_size", 1 << 31)):
        size = config.get(name)
        if size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise CheckpointError(f"{where}: config.json is damaged: {name} = {shortened(repr(size))}")
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise CheckpointError(
            f"{where}: config.json says tie_word_embeddings = {shortened(repr(tied))}; it must be true or false"
        )


def _compare_names(
    where: str, architecture: Detected, table: Sequence[TensorNames], checkpoint: Checkpoint
) -> None:
    names = checkpoint.names()
    present, expected = set(names), {entry.foreign for entry in table}
    missing = sorted(expected - present)
    leftover = [name for name in names if name not in expected]
    if not missing and not leftover:
        return
    states = {entry.foreign for entry in table if entry.name.startswith("model.initial_wkv.")}
    if not leftover and states.issuperset(missing):
        raise CheckpointError(
            f"{where} has an incomplete tuned initial state: missing {some(missing)}; give one for every layer, or "
            "remove those that are there"
        )
    faults = []
    if missing:
        faults.append(f"missing {some(missing)}")
    if leftover:
        meaning = next((what for pattern, what in _LEFTOVERS if re.search(pattern, leftover[0])), None)
        unsupported = f" ({meaning}, which is not supported)" if meaning else ""
        faults.append(f"left over {some([checkpoint.stored_name(name) for name in leftover])}{unsupported}")
    hint = SUPPORTED if leftover else "use a whole copy of the checkpoint"
    raise CheckpointError(
        f"{where} looks like RWKV-{architecture.version} but is not: {'; '.join(faults)}; {hint}"
    )


def _compare_shapes(
    where: str, checkpoint: Checkpoint, table: Sequence[TensorNames], sizes: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Stored shapes that are right but unusual; refuses wrong ones. ``sizes``: an architecture's own, by letters."""
    unusual: dict[str, tuple[int, ...]] = {}
    wrong: dict[str, set[str]] = {}  # in order, and once for all pieces of a tensor, with its own sizes
    for entry in table:
        shape = checkpoint.shape(entry.foreign)
        if shape == entry.foreign_shape:
            continue
        usual = entry.shape if entry.piece is None else entry.foreign_shape
        if entry.squeezable and _squeezed(shape) == _squeezed(usual) and 0 not in shape:
            unusual[entry.foreign] = shape
        else:
            own = {sizes[letter] for letter in entry.letters.split() if letter in sizes}
            wrong[f"{entry.foreign} is {list(shape)} instead of {list(entry.foreign_shape)}"] = own
    if wrong:
        hint = "use an undamaged copy of the checkpoint, as it was trained"
        if len(wrong) > 1 and all(wrong.values()):  # both maps of a pair, say
            named = " and ".join(sorted(name.replace("_", " ") for name in set().union(*wrong.values())))
            hint = f"all layers must have the same {named}"
        raise CheckpointError(f"{where} has wrong shapes: {some(list(wrong))}; {hint}")
    return unusual


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
