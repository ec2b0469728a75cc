"""The tensor names of RWKV-4/5 models: one table, ours beside those of the three foreign layouts.

Layouts:
    ``blinkdl``       the trainer's own ``.pth`` (https://github.com/BlinkDL/RWKV-LM), all versions;
    ``transformers``  ``RwkvForCausalLM`` of transformers, RWKV-4 only;
    ``v5-hub``        the published RWKV-5 repositories with remote code (``RWKV/v5-Eagle-7B-HF``), which
                      extend the names of ``transformers``.

Vectors that mix a token with the one before have the shape [1, 1, D] in every foreign layout and [D] in ours;
all other shapes agree. A tuned initial state exists in ``blinkdl`` alone. Shapes are written in the
letters B, T, D, H, N, F, V of the README.
"""

from dataclasses import dataclass
from typing import Literal

from rwkv_rev.configuration import RwkvRevConfig

Layout = Literal["blinkdl", "transformers", "v5-hub"]
LAYOUTS: tuple[Layout, ...] = ("blinkdl", "transformers", "v5-hub")

HEAD, EMBEDDINGS = "head.weight", "model.embeddings.weight"
"""Ours, and one tensor where a model's ``tie_word_embeddings`` is true: then a file may hold the second alone."""

_ALL = ("4", "5.0", "5.1", "5.2")
_HEADS = ("5.0", "5.1", "5.2")
_GATE = ("5.1", "5.2")


@dataclass(frozen=True)
class TensorNames:
    """One tensor: its name and shape in a converted model, and in a foreign layout."""

    name: str
    shape: tuple[int, ...]
    foreign: str
    foreign_shape: tuple[int, ...]
    transposed: bool = False  # the last two dimensions are exchanged in the foreign layout


@dataclass(frozen=True)
class _Row:
    ours: str
    blinkdl: str
    hugging_face: str  # shared by transformers and v5-hub
    shape: str  # letters; "decay" is the shape of time_decay, "mix" is D for us and [1, 1, D] elsewhere
    versions: tuple[str, ...] = _ALL


# In the order in which the original trainer stores them.
_BEFORE = (_Row("model.embeddings.weight", "emb.weight", "rwkv.embeddings.weight", "V D"),)
_FIRST_BLOCK = (
    _Row("model.ln0.weight", "blocks.0.ln0.weight", "rwkv.blocks.0.pre_ln.weight", "D"),
    _Row("model.ln0.bias", "blocks.0.ln0.bias", "rwkv.blocks.0.pre_ln.bias", "D"),
)
_EACH_BLOCK = (
    _Row("ln1.weight", "ln1.weight", "ln1.weight", "D"),
    _Row("ln1.bias", "ln1.bias", "ln1.bias", "D"),
    _Row("ln2.weight", "ln2.weight", "ln2.weight", "D"),
    _Row("ln2.bias", "ln2.bias", "ln2.bias", "D"),
    _Row("time_mix.mix_key", "att.time_mix_k", "attention.time_mix_key", "mix"),
    _Row("time_mix.mix_value", "att.time_mix_v", "attention.time_mix_value", "mix"),
    _Row("time_mix.mix_receptance", "att.time_mix_r", "attention.time_mix_receptance", "mix"),
    _Row("time_mix.mix_gate", "att.time_mix_g", "attention.time_mix_gate", "mix", _GATE),
    _Row("time_mix.time_decay", "att.time_decay", "attention.time_decay", "decay"),
    _Row("time_mix.bonus", "att.{bonus}", "attention.{bonus}", "decay"),
    _Row("time_mix.receptance.weight", "att.receptance.weight", "attention.receptance.weight", "D D"),
    _Row("time_mix.key.weight", "att.key.weight", "attention.key.weight", "D D"),
    _Row("time_mix.value.weight", "att.value.weight", "attention.value.weight", "D D"),
    _Row("time_mix.output.weight", "att.output.weight", "attention.output.weight", "D D"),
    _Row("time_mix.gate.weight", "att.gate.weight", "attention.gate.weight", "D D", _GATE),
    _Row("time_mix.ln_x.weight", "att.ln_x.weight", "attention.ln_x.weight", "D", _HEADS),
    _Row("time_mix.ln_x.bias", "att.ln_x.bias", "attention.ln_x.bias", "D", _HEADS),
    _Row("channel_mix.mix_key", "ffn.time_mix_k", "feed_forward.time_mix_key", "mix"),
    _Row("channel_mix.mix_receptance", "ffn.time_mix_r", "feed_forward.time_mix_receptance", "mix"),
    _Row("channel_mix.key.weight", "ffn.key.weight", "feed_forward.key.weight", "F D"),
    _Row("channel_mix.receptance.weight", "ffn.receptance.weight", "feed_forward.receptance.weight", "D D"),
    _Row("channel_mix.value.weight", "ffn.value.weight", "feed_forward.value.weight", "D F"),
)
_AFTER = (
    _Row("model.ln_out.weight", "ln_out.weight", "rwkv.ln_out.weight", "D"),
    _Row("model.ln_out.bias", "ln_out.bias", "rwkv.ln_out.bias", "D"),
    _Row("head.weight", "head.weight", "head.weight", "V D"),
)


def tensor_table(config: RwkvRevConfig, layout: Layout) -> tuple[TensorNames, ...]:
    """Every tensor of a model, in the order of the original trainer, with its name and shape in ``layout``.

    Raises:
        ValueError: if ``layout`` cannot hold the version (``transformers`` is RWKV-4 only, ``v5-hub`` RWKV-5
            only).
    """
    version = config.rwkv_version
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} must be one of {', '.join(LAYOUTS)}")
    if (layout == "transformers") != (version == "4") and layout != "blinkdl":
        raise ValueError(
            f"the layout {layout!r} does not exist for RWKV-{version}; use {hub_layout(version)!r}"
        )
    bonus = "time_first" if version == "4" or config.bonus_is_exponential else "time_faaaa"
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
    }

    def entry(row: _Row, ours: str = "", blinkdl: str = "", hugging_face: str = "") -> TensorNames:
        if row.shape == "decay":
            shape = config.decay_shape
        elif row.shape == "mix":
            shape = (config.hidden_size,)
        else:
            shape = tuple(sizes[letter] for letter in row.shape.split())
        foreign = blinkdl + row.blinkdl if layout == "blinkdl" else hugging_face + row.hugging_face
        return TensorNames(
            name=ours + row.ours,
            shape=shape,
            foreign=foreign.format(bonus=bonus),
            foreign_shape=(1, 1, *shape) if row.shape == "mix" else shape,
        )

    table = [entry(row) for row in _BEFORE]
    for i in range(config.num_hidden_layers):
        if i == 0:
            table += [entry(row) for row in _FIRST_BLOCK]
        prefixes = (f"model.blocks.{i}.", f"blocks.{i}.", f"rwkv.blocks.{i}.")
        table += [entry(row, *prefixes) for row in _EACH_BLOCK if version in row.versions]
        if config.has_initial_state and layout == "blinkdl":
            state = (config.num_attention_heads, config.head_size, config.head_size)
            foreign = f"blocks.{i}.att.time_state"  # value index first there, key index first here
            table.append(TensorNames(f"model.initial_wkv.{i}", state, foreign, state, transposed=True))
    table += [entry(row) for row in _AFTER]
    return tuple(table)


def hub_layout(version: str) -> Layout:
    """The layout that Hugging Face repositories of this version use."""
    return "transformers" if version == "4" else "v5-hub"
