"""The model card (README.md) of a converted folder: what it is, where it came from, and that it is equal."""

import re
from itertools import pairwise
from typing import Any

import torch
import yaml

from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.folders.redaction import file_name, public_text


def model_card(
    config: RwkvRevConfig,
    record: dict[str, Any],
    verification: Any = None,
    training: list[tuple[str, object]] | None = None,
) -> str:
    """Markdown of the card.

    Args:
        config: of the converted model.
        record: contents of ``conversion.json``.
        verification: report of the verification, or None if it was not asked for.
        training: fields and values of a fine-tuning run, for a model whose values are no longer the source's.
    """
    name = _source_name(record)
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*_tags(config), "rwkv-rev", "reversible"],
    }
    if _is_hub(record):
        header["base_model"] = record["source"]
    if training is None:
        title, values = f"# {plain(name)}, reversible", _values(config, record)
        last = "## Verification\n\n" + _verification(verification, record)
    else:
        title, values = f"# {plain(name)}, reversible, fine-tuned", "They were fine-tuned; see below."
        last = "## Fine-tuning\n\n" + _table(("field", "value"), training)
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        title,
        f"{config.architecture.called} weights of {plain(name)} in the form that rwkv-rev runs and trains as "
        f"time-reversible cells. {values}",
        _usage(),
        "## Source\n\n" + _table(("field", "value"), _provenance(record)),
        "## Architecture\n\n" + _table(("field", "value"), _architecture(config)),
        last,
    ]
    return "\n\n".join(sections) + "\n"


def fresh_card(config: RwkvRevConfig, name: str, record: dict[str, Any]) -> str:
    """Markdown of the card of a model that was initialised and not trained; ``name`` is its folder's."""
    header = {"library_name": "transformers", "tags": [*_tags(config), "rwkv-rev", "reversible"]}
    versions = [(f"{package} version", version) for package, version in record["versions"].items()]
    made = [("seed", record["initialised"]["seed"]), *versions]
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {plain(name)}, untrained",
        f"A freshly initialised model of {config.architecture.called}, to be trained by `rwkv-rev finetune`: its "
        "output is noise.",
        _usage(),
        "## Initialisation\n\n" + _table(("field", "value"), made),
        "## Architecture\n\n" + _table(("field", "value"), _architecture(config)),
    ]
    return "\n\n".join(sections) + "\n"


def adapter_card(base: str, name: str, training: list[tuple[str, object]]) -> str:
    """Markdown of the card of low-rank additions; ``base`` and ``name`` are the model's folder and theirs."""
    header = {"library_name": "peft", "tags": ["lora", "rwkv", "rwkv-rev"]}
    sections = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {plain(name)}, low-rank additions",
        f"LoRA for {plain(base)}, without which it is nothing: `rwkv-rev generate BASE --adapter PATH`, or merged into "
        "its weights: `rwkv-rev merge BASE PATH --output MODEL`.",
        "## Fine-tuning\n\n" + _table(("field", "value"), training),
    ]
    return "\n\n".join(sections) + "\n"


def _usage() -> str:
    return (
        "```python\n"
        "import rwkv_rev\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        "```"
    )


def _tags(config: RwkvRevConfig) -> list[str]:
    known = config.architecture
    return ["rwkv", f"rwkv-{known.version}"] if known.layouts else [known.version]


def _is_hub(record: dict[str, Any]) -> bool:
    source = record["source"]
    return (
        "/" in source
        and not source.startswith(("/", ".", "~", "bundled:"))
        and record.get("commit") is not None
    )


def _source_name(record: dict[str, Any]) -> str:
    source = str(record["source"])
    return source if _is_hub(record) else file_name(source)


def _provenance(record: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("source", _source_name(record))]
    rows += [(key, record[key]) for key in ("file", "revision", "commit") if record.get(key)]
    # a model that was saved rather than converted has a record without what only a conversion knows
    rows += [(f"SHA-256 of {name}", digest) for name, digest in record.get("sha256", {}).items()]
    if "layout" in record:
        rows.append(("layout", record["layout"]))
    if "dtypes" in record:
        rows.append(("dtypes", ", ".join(f"{dtype} ({n} tensors)" for dtype, n in record["dtypes"].items())))
    rows += [(f"{package} version", version) for package, version in record.get("versions", {}).items()]
    return rows


def _architecture(config: RwkvRevConfig) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("version", config.architecture.called),
        ("layers", config.num_hidden_layers),
        ("width", config.hidden_size),
    ]
    rows += config.architecture.facts(config).items()
    rows.append(("channel mix width", config.intermediate_size))
    rows.append(("vocabulary", config.vocab_size))
    rows.append(("stored dtype", _name(_dtype(config))))
    return rows


def _verification(report: Any, record: dict[str, Any]) -> str:
    if report is None:
        return "Not verified at conversion. Run `rwkv-rev verify PATH`."
    # The table is Markdown; each line after its rows becomes a paragraph. No path of this machine goes in.
    text = public_text(str(report.table()).replace(str(record["source"]), plain(_source_name(record))))
    lines = [line for line in text.splitlines() if line]
    breaks = ["\n" if a[0] == b[0] == "|" else "\n\n" for a, b in pairwise(lines)]
    return "".join(line + end for line, end in zip(lines, [*breaks, ""], strict=True))


def _table(columns: tuple[str, ...], rows: list[tuple[str, object]]) -> str:
    cells = [
        columns,
        tuple("---" for _ in columns),
        *(tuple(plain(str(cell)) for cell in row) for row in rows),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def plain(text: str) -> str:
    """A name as Markdown shows it: no HTML, no link, no code, one line."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("://", "&#58;//")
    return re.sub(r"[\\`*\[\]|~!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", shown)


def _values(config: RwkvRevConfig, record: dict[str, Any]) -> str:
    written = _dtype(config)
    if all(torch.promote_types(getattr(torch, name), written) == written for name in record["dtypes"]):
        return "The values of the weights are exactly those of the source."
    return f"The values of the weights are those of the source, rounded to {_name(written)}."


def _dtype(config: RwkvRevConfig) -> torch.dtype:
    dtype = config.dtype
    found: torch.dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
