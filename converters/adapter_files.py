"""Adapters in files of their own, read against the model that they belong to, in RWKV-PEFT's layout and in peft's.

RWKV-PEFT (https://github.com/JL-er/RWKV-PEFT, ``rwkvLinear.py``, ``merge/``): a ``.pth`` of
``blocks.N.att.key.lora_A``, ``.lora_B`` or ``.disha``, besides tensors that were trained whole and replace the model's;
``init_pissa.pth`` holds ``.init_lora_A`` and ``.init_lora_B``. It has no alpha, which its own merge script asks for,
too; ours say it where ``state_dict()`` has ``_metadata``, and the generation as well. peft: a folder with
``adapter_config.json``, in our names; ours say the generation in the metadata of their safetensors file.
The formulas are those of :mod:`rwkv_rev.converters.additions`.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_rev.architectures.registry import architectures
from rwkv_rev.converters.adapted_modules import SELECTING, not_adapted, selects
from rwkv_rev.converters.additions import Adapter, Disha, LowRank
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.names import TensorNames, by_foreign, tensor_table
from rwkv_rev.converters.reading import Checkpoint, check_finite, open_checkpoint
from rwkv_rev.errors import CheckpointError, ConfigError, SourceError
from rwkv_rev.folders.hub import LocalCheckpoint
from rwkv_rev.folders.safe_input import read_object
from rwkv_rev.folders.selection import some
from rwkv_rev.folders.source import Source
from rwkv_rev.printable import shortened

ALPHA_KEY, VERSION_KEY = "lora_alpha", "rwkv_version"
CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A|lora_B|disha)")
_PEFT_PART = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight")
_INERT = {  # fields of peft's that change nothing in what is merged, whatever they say
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "task_type"),
}
_READ = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}


def read_adapter(
    model: ConvertedModel, path: str | Path, *, alpha: float | None = None, init: str | Path | None = None
) -> Adapter:
    """An adapter of a model, from RWKV-PEFT's file or a folder of peft's.

    Args:
        model: that it was trained on.
        path: of the file or folder.
        alpha: of a LoRA whose file does not say it.
        init: RWKV-PEFT's file of what PiSSA began with.

    Raises:
        SourceError: if there is no such file.
        CheckpointError: for what is not understood, not whole, or of another model, naming the tensor.
        ConfigError: for both an alpha and an init.
    """
    if alpha is not None and init is not None:
        raise ConfigError("--alpha is without effect beside --init: PiSSA has none; leave it out")
    path = Path(path)
    if path.is_dir():
        if alpha is not None or init is not None:
            given = "alpha" if alpha is not None else "init"
            raise CheckpointError(f"--{given} is without effect: {path / CONFIG_NAME} says it; leave it out")
        return _of_peft(model, path)
    with _open(path) as checkpoint:
        _refuse_other_generation(model, path, checkpoint.metadata.get(VERSION_KEY))
        return _of_rwkv_peft(model, path, checkpoint, alpha, None if init is None else Path(init))


def linear_maps(model: ConvertedModel) -> dict[str, TensorNames]:
    """The maps that RWKV-PEFT knows, by its names (``blocks.0.att.key``); empty where it has no such model."""
    known = model.config.architecture
    if not known.layouts:
        return {}
    rows = by_foreign(tensor_table(model.config, known.own_layout))
    return {
        name.removesuffix(".weight"): parts[0]
        for name, parts in rows.items()
        if name.endswith(".weight") and len(parts[0].shape) == 2 and len(parts) == 1 and name != "emb.weight"
    }


def _of_rwkv_peft(
    model: ConvertedModel, path: Path, checkpoint: Checkpoint, alpha: float | None, init: Path | None
) -> Adapter:
    maps = linear_maps(model)
    parts: dict[str, dict[str, Tensor]] = {}
    whole: list[str] = []
    for name in checkpoint.names():
        if (found := _PART.fullmatch(name)) is None:
            whole.append(name)
            continue
        parts.setdefault(found[1], {})[found[2]] = _read(checkpoint, name)
    if not parts:
        raise CheckpointError(
            f"{path} holds no adapter that is understood (it has {some(whole, 1)}): LoRA's lora_A and lora_B, or disha"
        )
    kinds = {"DiSHA" if "disha" in found else "LoRA" for found in parts.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"{path} holds both LoRA and DiSHA")
    (kind,) = kinds
    if kind == "DiSHA":
        if alpha is not None or init is not None:
            given = "alpha" if alpha is not None else "init"
            raise CheckpointError(
                f"--{given} is without effect: {path} is DiSHA, which has none; leave it out"
            )
        additions: dict[str, LowRank | Disha] = {name: Disha(found["disha"]) for name, found in parts.items()}
    else:
        pairs = {name: _pair(path, name, found) for name, found in parts.items()}
        if init is not None:
            kind, began = "PiSSA", _beginnings(init, pairs)
            additions = {name: LowRank(*pair, 1.0, 1.0, began[name]) for name, pair in pairs.items()}
        else:
            told = _alpha(path, checkpoint.metadata, alpha)
            additions = {name: LowRank(*pair, told, told / len(pair[0])) for name, pair in pairs.items()}
    ours = {}
    for name, addition in additions.items():
        if name not in maps:
            raise CheckpointError(
                f"{path} changes {name}, which is no linear map of {model.directory}; is it another model's?"
            )
        ours[_fitting(model, path, name, maps[name].name, addition)] = addition
    return Adapter(kind, "rwkv-peft", ours, _whole(model, path, checkpoint, whole))


def _of_peft(model: ConvertedModel, folder: Path) -> Adapter:
    settings = read_object(folder / CONFIG_NAME)
    if not settings:
        raise SourceError(f"{folder} holds no {CONFIG_NAME}; give an adapter's folder, or RWKV-PEFT's .pth")
    _refuse_other_methods(folder, settings)
    files = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    file = next((file for file in files if file.exists()), files[0])
    with _open(file, unwrap=False) as checkpoint:
        _refuse_other_generation(
            model, folder, checkpoint.metadata.get(VERSION_KEY) or _version_of_base(settings)
        )
        parts: dict[str, dict[str, Tensor]] = {}
        for name in checkpoint.names():
            if (found := _PEFT_PART.fullmatch(name)) is None:
                raise CheckpointError(
                    f"{file} holds {shortened(name)}, which is no part of a LoRA of linear maps"
                )
            parts.setdefault(found[1], {})[found[2]] = _read(checkpoint, name)
    if not parts:
        raise CheckpointError(f"{file} holds no adapter")
    additions: dict[str, LowRank | Disha] = {}
    for name, halves in parts.items():
        down, up = _pair(file, name, halves)
        if (contradicted := not_adapted(settings, name)) is not None:
            said = shortened(repr(settings[contradicted]), 80)
            raise CheckpointError(
                f"{file} changes {name}, and {CONFIG_NAME} says that it does not: {contradicted} = {said}"
            )
        rank = _for_module(settings, "rank_pattern", name, settings["r"])
        alpha = _for_module(settings, "alpha_pattern", name, settings["lora_alpha"])
        if rank != len(down):
            raise CheckpointError(f"{file}: {name} is of rank {len(down)}, {CONFIG_NAME} says {rank:g}")
        scale = alpha / (len(down) ** 0.5 if settings.get("use_rslora") else len(down))
        addition = LowRank(down, up, alpha, scale)
        weight = f"{name}.weight"
        if weight not in model.names() and not (name == "head" and model.config.tie_word_embeddings):
            raise CheckpointError(
                f"{file} changes {name}, which is no linear map of {model.directory}; is it another model's?"
            )
        additions[_fitting(model, file, name, weight, addition)] = addition
    return Adapter("LoRA", "peft", additions)


def _version_of_base(settings: Mapping[str, Any]) -> str | None:
    """The generation of the folder that peft trained on, if that is here."""
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base or not (Path(base) / "config.json").is_file():
        return None
    version = read_object(Path(base) / "config.json").get(VERSION_KEY)
    return version if isinstance(version, str) else None


def _refuse_other_generation(model: ConvertedModel, path: Path, version: str | None) -> None:
    if version is not None and version != (own := model.config.rwkv_version):
        known = {each.version: each.called for each in architectures()}
        of, this = (known.get(each, shortened(repr(each))) for each in (version, own))
        raise CheckpointError(f"{path} is an adapter of {of}, and {model.directory} is of {this}")


def _refuse_other_methods(folder: Path, settings: Mapping[str, Any]) -> None:
    where = folder / CONFIG_NAME
    instead = "merge it with peft's merge_and_unload"
    if (method := settings.get("peft_type")) != "LORA":
        raise CheckpointError(f"{where}: peft_type = {shortened(repr(method))} is not LORA; {instead}")
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise CheckpointError(f"{where} is damaged: {name} = {shortened(repr(value))}")
    if not isinstance(flag := settings.get("use_rslora"), bool | None):
        raise CheckpointError(
            f"{where} is damaged: use_rslora = {shortened(repr(flag))} is neither true nor false"
        )
    for name in SELECTING:
        if not selects(name, settings.get(name)):
            raise CheckpointError(f"{where} is damaged: {name} = {shortened(repr(settings[name]), 80)}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{where} is damaged: {name} = {shortened(repr(patterns))}")
        for key, value in patterns.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not re.fullmatch(r"[\w.]{1,512}", key):
                raise CheckpointError(
                    f"{where}: {name} = {{{shortened(repr(key))}: …}} is no name; {instead}"
                )
    for name, value in settings.items():
        usual = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}.get(name)
        known = name in _INERT or name in _READ or not value
        if not known or (usual is not None and value not in usual):
            raise CheckpointError(
                f"{where}: {name} = {shortened(repr(value), 80)} is not understood; {instead}"
            )


def _for_module(settings: Mapping[str, Any], field_name: str, module: str, otherwise: float) -> float:
    """What peft's pattern says of a module: the first name that it ends with."""
    patterns = settings.get(field_name) or {}
    return float(next((v for key, v in patterns.items() if f".{module}".endswith(f".{key}")), otherwise))


def _alpha(path: Path, metadata: Mapping[str, str], given: float | None) -> float:
    try:
        told = float(metadata[ALPHA_KEY]) if ALPHA_KEY in metadata else None
    except ValueError:
        told = float("nan")
    for value in (told, given):
        if value is not None and not 0 < value < float("inf"):
            raise CheckpointError(f"{path}: alpha = {value} is no number above 0 to scale by")
    if told is not None and given is not None and told != given:
        raise CheckpointError(f"--alpha {given:g} contradicts {path}, which says {told:g}; leave it out")
    if told is None and given is None:
        raise CheckpointError(
            f"{path} does not say its alpha: give the lora_alpha it was trained with as --alpha X, or, for PiSSA, its "
            "init_pissa.pth as --init FILE"
        )
    return told if told is not None else given  # type: ignore[return-value]


def _beginnings(init: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A_0 and B_0 of every map."""
    with _open(init) as checkpoint:
        parts: dict[str, dict[str, Tensor]] = {}
        for name in checkpoint.names():
            module, _, last = name.rpartition(".init_")
            if last not in ("lora_A", "lora_B"):
                raise CheckpointError(
                    f"{init} holds {shortened(name)}; it must be the init_pissa.pth of that run"
                )
            parts.setdefault(module, {})[last] = _read(checkpoint, name)
    if parts.keys() != pairs.keys():
        odd = sorted(parts.keys() ^ pairs.keys())
        raise CheckpointError(f"{init} and the adapter differ in {some(odd, 1)}; it must be that run's own")
    halves = {name: _pair(init, name, both, "init_") for name, both in parts.items()}
    for name, (down, up) in halves.items():
        if (down.shape, up.shape) != tuple(tensor.shape for tensor in pairs[name]):
            raise CheckpointError(
                f"{init}: {name} has other shapes than in the adapter; it must be that run's own"
            )
    return halves


def _pair(where: Path, name: str, found: Mapping[str, Tensor], prefix: str = "") -> tuple[Tensor, Tensor]:
    for part in ("lora_A", "lora_B"):
        if part not in found:
            raise CheckpointError(f"{where} lacks {name}.{prefix}{part}, the other half of what it has")
        if found[part].dim() != 2:
            shape = tuple(found[part].shape)
            raise CheckpointError(f"{where}: {name}.{prefix}{part} has the shape {shape}, which is no matrix")
    down, up = found["lora_A"], found["lora_B"]
    if not 0 < len(down) == up.shape[1]:
        raise CheckpointError(
            f"{where}: the rank of {name}.{prefix}lora_A is {len(down)}, that of {prefix}lora_B {up.shape[1]}"
        )
    return down, up


def _fitting(model: ConvertedModel, where: Path, name: str, weight: str, addition: LowRank | Disha) -> str:
    """Our name of the weight, known to be a map that the addition fits."""
    if weight == "head.weight" and model.config.tie_word_embeddings:
        raise CheckpointError(
            f"{where} changes the head, which in {model.directory} is the embedding too (tie_word_embeddings)"
        )
    shape = model.shape(weight)
    if len(shape) != 2 or weight == "model.embeddings.weight" or not addition.fits(shape):
        tensors = (addition.values,) if isinstance(addition, Disha) else (addition.down, addition.up)
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise CheckpointError(
            f"{where}: {name} has {shapes}, which fits no map of {shape}; is it another model's?"
        )
    return weight


def _whole(model: ConvertedModel, path: Path, checkpoint: Checkpoint, names: list[str]) -> dict[str, Tensor]:
    rows = by_foreign(tensor_table(model.config, model.config.architecture.own_layout))
    found: dict[str, Tensor] = {}
    for name in names:
        if name not in rows:
            raise CheckpointError(
                f"{path} holds {shortened(name)}, which is neither LoRA nor DiSHA nor of the model"
            )
        first = rows[name][0]
        tensor = _read(checkpoint, name)
        same = tuple(tensor.shape) == first.foreign_shape
        if not same and not (first.squeezable and tensor.numel() == math.prod(first.shape)):
            raise CheckpointError(
                f"{path}: {name} has the shape {tuple(tensor.shape)}, in {model.directory} {first.foreign_shape}"
            )
        found |= {row.name: row.of(tensor) for row in rows[name]}
    return found


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    if not checkpoint.dtype(name).is_floating_point or checkpoint.dtype(name).itemsize < 2:
        raise CheckpointError(f"{checkpoint.file_of(name)}: {shortened(name)} is of {checkpoint.dtype(name)}")
    tensor = checkpoint.tensor(name)
    check_finite(name, tensor)
    return tensor


def _open(path: Path, *, unwrap: bool = True) -> Checkpoint:
    if not path.exists():
        raise SourceError(f"there is no {path}; give RWKV-PEFT's .pth, or a folder of peft's")
    return open_checkpoint(LocalCheckpoint(Source("file", str(path)), (path,)), unwrap=unwrap)
