"""Write a fine-tuned model as a normal model folder: weights, tokenizer, card, record, log and curve.

Low-rank additions to weights in 4 or 8 bits are written alone, as peft's folder with the same log, curve and card: they
were trained beside those weights, and what is stored is others.

Tensors that training did not change are stored as the source stored them, bit for bit; changed ones in float32
unless ``save_dtype`` says otherwise. ``conversion.json`` gains a ``finetuned`` list, one entry for each run, by which
``verify`` and ``export`` know that the values are no longer the original's.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig

from rwkv_rev.converters.adapter_files import VERSION_KEY
from rwkv_rev.converters.card import adapter_card, model_card
from rwkv_rev.converters.converted import RECORD_NAME, ConvertedModel, read_record
from rwkv_rev.converters.rewriter import Entry, shard_layout, write_shards
from rwkv_rev.folders.folder import tokenizer_files
from rwkv_rev.folders.redaction import public
from rwkv_rev.folders.safe_output import whole_directory
from rwkv_rev.json_text import json_text
from rwkv_rev.loading import load_config
from rwkv_rev.tokenization.chat_template import CHAT_TEMPLATE_FILE, read_template
from rwkv_rev.training.config import FinetuneConfig
from rwkv_rev.training.plots import has_matplotlib, plot_losses
from rwkv_rev.training.samples import SAMPLES_NAME
from rwkv_rev.training.tuning import merged

SHARD_SIZE = "5GB"
HISTORY = "training"
SUMMARY_NAME = "summary.json"


def save_finetuned(
    model: nn.Module,
    planned: dict[str, Any],
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    config: FinetuneConfig,
) -> None:
    """Make ``config.output`` out of a trained model.

    Args:
        model: the trained model, or peft's wrapper; low-rank additions are merged into it.
        planned: plain values of the plan. result: plain values of the outcome.
        rows: of the log.
        config: of the run.

    Raises:
        OutputError: if the folder cannot be written. CheckpointError: for weights that are not finite.
    """
    source = Path(config.model)
    output = Path(config.output)
    planned, result = (public(json.loads(json.dumps(values, default=str))) for values in (planned, result))
    with whole_directory(output, force=config.force) as folder:
        if result["adapter_only"]:
            _save_adapter(model, folder, source.resolve().name)
            _copy_tokenizer(source, folder, config)
            card = adapter_card(source.resolve().name, output.name, _card_rows(planned, result, config))
            (folder / "README.md").write_text(card, "utf-8")
            _save_history(folder, planned, result, rows, config)
            return
        if hasattr(model, "peft_config"):
            _save_adapter(model, folder / "adapter", source.resolve().name)
        with ConvertedModel(source) as before:
            known = set(before.names())
            plain = merged(model, lambda name: before.tensor(name) if name in known else None)
            shared = plain.all_tied_weights_keys  # the head, where it is the embedding: stored once
            tensors = {n: tensor.detach() for n, tensor in plain.state_dict().items() if n not in shared}
            dtype = _write_weights(tensors, before, folder, config.save_dtype)
        _copy_tokenizer(source, folder, config)
        model_config = load_config(source)
        model_config.dtype = dtype
        model_config.has_initial_state = any(name.startswith("model.initial_wkv.") for name in tensors)
        model_config.save_pretrained(str(folder))
        if (source / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(str(source)).save_pretrained(str(folder))
        record = _record(source, planned, result)
        (folder / RECORD_NAME).write_text(json_text(record, indent=2) + "\n", "utf-8")
        card = model_card(model_config, record, training=_card_rows(planned, result, config))
        (folder / "README.md").write_text(card, "utf-8")
        _save_history(folder, planned, result, rows, config)


def _copy_tokenizer(source: Path, folder: Path, config: FinetuneConfig) -> None:
    for file in tokenizer_files(source):
        shutil.copyfile(file, folder / file.name)
    if config.chat_template is not None:
        (folder / CHAT_TEMPLATE_FILE).write_text(read_template(config.chat_template), "utf-8", newline="")


def _save_history(
    folder: Path,
    planned: dict[str, Any],
    result: dict[str, Any],
    rows: list[dict[str, Any]],
    config: FinetuneConfig,
) -> None:
    history = folder / HISTORY
    history.mkdir()
    (history / "log.jsonl").write_text("".join(json_text(row) + "\n" for row in rows), "utf-8")
    summary = {"plan": planned, "result": result}
    (history / SUMMARY_NAME).write_text(json_text(summary, indent=2) + "\n", "utf-8")
    if config.sample_prompt:
        shutil.copyfile(config.working_directory / SAMPLES_NAME, history / SAMPLES_NAME)
    events = config.working_directory / "runs"
    if events.is_dir():  # TensorBoard's
        shutil.copytree(events, history / "runs", ignore=_links)
    if has_matplotlib():
        title = f"{Path(config.output).name}: {config.tune}".replace("$", r"\$")
        plot_losses(rows, history / "loss.png", title)


def _links(folder: str, names: list[str]) -> list[str]:
    """What is not copied: links, of whatever they point to, and what is neither file nor folder."""
    paths = [Path(folder, name) for name in names]
    return [path.name for path in paths if path.is_symlink() or not (path.is_file() or path.is_dir())]


def _write_weights(
    tensors: dict[str, torch.Tensor], before: ConvertedModel, folder: Path, save_dtype: str
) -> torch.dtype:
    """Returns the narrowest dtype that holds every stored value."""
    changed_dtype = torch.float32 if save_dtype == "auto" else getattr(torch, save_dtype)
    known = set(before.names())

    def stored_dtype(name: str) -> torch.dtype:
        if name.startswith("model.initial_wkv."):
            return torch.float32
        if name in known and torch.equal(before.tensor(name).float(), tensors[name].float()):
            return before.dtype(name)
        return changed_dtype if tensors[name].is_floating_point() else tensors[name].dtype

    entries = [Entry(name, name, tuple(tensors[name].shape), stored_dtype(name)) for name in tensors]
    write_shards(shard_layout(entries, SHARD_SIZE), folder, lambda entry: tensors[entry.name])
    return functools.reduce(torch.promote_types, (entry.dtype for entry in entries))


def _save_adapter(model: Any, folder: Path, base: str) -> None:
    """The low-rank additions alone, for peft; with the generation, and without the path of this machine."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    tensors, told = folder / "adapter_model.safetensors", {VERSION_KEY: model.config.rwkv_version}
    save_file(load_file(tensors), folder / "marked", metadata={"format": "pt"} | told)
    (folder / "marked").replace(tensors)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _record(source: Path, planned: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    record = {"source": source.resolve().name} | read_record(source)
    run = {
        "settings": planned["settings"],
        "steps": result["steps"],
        "last_loss": result["last_loss"],
    }
    return public(record) | {"finetuned": [*record.get("finetuned", []), run]}


def _card_rows(
    planned: dict[str, Any], result: dict[str, Any], config: FinetuneConfig
) -> list[tuple[str, object]]:
    settings, data = planned["settings"], planned["data"]
    rows: list[tuple[str, object]] = [
        ("fine-tuned from", settings["model"]),
        ("data", ", ".join(settings["data"])),
        ("documents", f"{data['documents']:,} ({data['tokens']:,} tokens, longest {data['longest']:,})"),
        ("context length", f"{config.context_length:,} tokens"),
        ("gradient", f"{settings['bptt']}, chunks of {settings['chunk_length']:,}"),
        (
            "tuned",
            f"{config.tune} ({result['trainable_parameters']:,} of {result['parameters']:,} parameters)",
        ),
        ("steps", f"{result['steps']:,}, about {planned['tokens_per_step']:,.0f} tokens each"),
        ("learning rate", f"{settings['lr']:g}, {config.lr_schedule}"),
        ("arithmetic", settings["dtype"]),
        ("training loss", f"{result['first_loss']:.4f} to {result['last_loss']:.4f} nats per token"),
    ]
    if result.get("best_step"):
        rows.append(("kept", f"step {result['best_step']:,}, the lowest held-out loss"))
    if settings["objective"] != "next-token":
        rows.append(("objective", settings["objective"]))
    if config.quantise is not None:
        rows.append(("frozen weights", f"{config.quantise}, by bitsandbytes"))
    if config.carry_state:
        rows.append(("carried state", f"yes, gradient cut every {config.context_length:,} tokens"))
    if result.get("held_out"):
        before, after = result["held_out"]["before"], result["held_out"]["after"]
        rows.append(("held-out", f"{before:.4f} to {after:.4f} bits per byte"))
    return rows
