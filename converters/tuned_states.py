"""A tuned initial state in a file of its own: the memory [H, N, N] that each layer begins a context with.

    rwkv-lm    ``.pth``          RWKV-LM's and RWKV-PEFT's state tuning: value index first, any dtype
    web-rwkv   ``.safetensors``  web-rwkv's: key index first, float16, the one type that it reads

Both call it ``blocks.N.att.time_state`` and hold nothing else, and the shape is that of RWKV-5, 6 and 7 alike. Which of
the two orders a file has is told by its format; what generation it was tuned for is not told by the files of other
tools. Ours say it in a place that these do not read: ``_metadata`` of the dictionary, as PyTorch's own ``state_dict()``
has it, and ``__metadata__`` of safetensors. Sources: RWKV-PEFT's ``merge_state.py``; web-rwkv's
``convert_safetensors.py`` (which transposes) and ``read_state``.

Limit: a state by itself is some layers of matrices. One that was tuned for another model of the same generation and
sizes is not told apart.
"""

import functools
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from rwkv_rev.architectures.registry import architecture, generations, with_tuned_state
from rwkv_rev.arguments import checked
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.converters.edited import Edit, write_edited
from rwkv_rev.converters.reading import Checkpoint, check_finite, open_checkpoint
from rwkv_rev.converters.rewriter import Entry, Shard, write_shard
from rwkv_rev.converters.torch_files import write_torch
from rwkv_rev.errors import CheckpointError, ConfigError, OutputError, SourceError
from rwkv_rev.folders.hub import LocalCheckpoint
from rwkv_rev.folders.safe_output import check_output, whole_file
from rwkv_rev.folders.selection import some
from rwkv_rev.folders.source import Source
from rwkv_rev.printable import counted, shortened

if TYPE_CHECKING:
    from rwkv_rev.configuration import RwkvRevConfig
    from rwkv_rev.modeling import RwkvRevForCausalLM

StateLayout = Literal["rwkv-lm", "web-rwkv"]
VERSION_KEY = "rwkv_version"
_NAME = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.att\.time_state")
_OURS = "model.initial_wkv."


@dataclass(frozen=True)
class TunedState:
    """A tuned initial state.

    Attributes:
        layers: [H, N, N] of each layer, key index first, as a converted model has it.
        version: of the generation that it was tuned for; None where the file does not say.
        source: what it was read from, for messages.
    """

    layers: tuple[Tensor, ...]
    version: str | None
    source: str

    @property
    def sizes(self) -> str:
        """``6 layers of 4 heads of 16``."""
        heads, size, _ = self.layers[0].shape
        return f"{counted(len(self.layers), 'layer')} of {counted(heads, 'head')} of {size}"


@dataclass(frozen=True)
class StateFile:
    """A state file that was written.

    Attributes:
        path: of the file. layout: ``rwkv-lm`` or ``web-rwkv``.
        layers, heads, head_size: L, H and N.
        version: of the generation, None where no source told it.
        dtype: of its values.
        note: what the layout cannot hold, for people; None where nothing is lost.
    """

    path: Path
    layout: str
    layers: int
    heads: int
    head_size: int
    version: str | None
    dtype: str
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return vars(self) | {"path": str(self.path)}


@checked
def save_state(
    source: str | Path,
    output: str | Path,
    *,
    to: Literal["rwkv-lm", "web-rwkv"] = "rwkv-lm",
    force: bool = False,
) -> StateFile:
    """Write the tuned initial state of a model, or of another state file, as a file of its own.

    Args:
        source: a model folder with a tuned state, or a state file in either layout.
        output: the file to make.
        to: ``rwkv-lm``, a ``.pth``, every value as it is; ``web-rwkv``, safetensors rounded to float16.
        force: replace an existing file, at the very end.

    Raises:
        SourceError, CheckpointError: for a source without a tuned state, or whose state is damaged.
        OutputError: if ``output`` exists without ``force``, cannot be written, or float16 does not hold the values.
    """
    check_output(Path(output).absolute(), force=force, directory=False, inputs=[source])
    return _write(read_state(source), Path(output), to, force=force)


@checked
def load_state(directory: str | Path, state: str | Path, output: str | Path, *, force: bool = False) -> Path:
    """Write a model folder anew with a tuned initial state in it, with which all its contexts begin.

    Args:
        directory: a converted or fine-tuned model folder; a state that it has is replaced in the new one.
        state: a state file in either layout, or another model folder with a tuned state.
        output: the folder to make.
        force: replace an existing model folder, at the very end.

    Raises:
        SourceError, CheckpointError: for what is no model or no state, and for a state of another shape, number of
            layers or generation.
        OutputError: if ``output`` cannot be written.
    """
    found = read_state(state)
    with ConvertedModel(directory) as model:
        refuse_other_model(found, model.config, str(directory))
        tensors = {f"{_OURS}{i}": tensor.contiguous() for i, tensor in enumerate(found.layers)}
        edit = Edit(
            changed={name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
            read=tensors.__getitem__,
            config={"has_initial_state": True},
            entry={"settings": {"tune": "state", "state": Path(state).name}},
            card=(("tuned initial state", Path(state).name),),
        )
        return write_edited(model, Path(output), edit, force=force, inputs=[state])


@checked
def merge_states(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    to: Literal["rwkv-lm", "web-rwkv"] = "rwkv-lm",
    force: bool = False,
) -> StateFile:
    """Write the weighted sum of several tuned states, w_1 S_1 + w_2 S_2 + …, summed in float64, as float32.

    Args:
        sources: state files or model folders, at least two, of one shape, number of layers and generation.
        output: the file to make.
        weights: one for each source, of any sign; the mean when None.
        to: as :func:`save_state`.
        force: replace an existing file, at the very end.

    Raises:
        ConfigError: for fewer than two sources, other weights than one finite number each, and a sum beyond float32.
        SourceError, CheckpointError, OutputError: as :func:`save_state`, and for states that do not fit each other.
    """
    if len(sources) < 2:
        raise ConfigError(f"sources = {shortened(repr(list(map(str, sources))))} must be two states or more")
    shares = [1 / len(sources)] * len(sources) if weights is None else list(weights)
    if len(shares) != len(sources):
        raise ConfigError(
            f"weights = {', '.join(f'{share:g}' for share in shares)}: {counted(len(shares), 'weight')} for "
            f"{counted(len(sources), 'state')}; give one each"
        )
    for share in shares:
        if not abs(share) < float("inf"):
            raise ConfigError(f"weights = {share} must be finite")
    check_output(Path(output).absolute(), force=force, directory=False, inputs=sources)
    states = [read_state(source) for source in sources]
    first = next((state for state in states if state.version is not None), states[0])
    for state in states:
        _refuse_differing(state, first)
    layers: list[Tensor] = []
    for parts in zip(*(state.layers for state in states), strict=True):
        total = sum(share * part.double() for share, part in zip(shares, parts, strict=True))
        assert isinstance(total, Tensor)
        if not bool(torch.isfinite(total.float()).all()):
            raise ConfigError(
                f"weights = {', '.join(f'{share:g}' for share in shares)} make a sum beyond float32 in layer "
                f"{len(layers)}; give smaller ones"
            )
        layers.append(total.float())
    merged = replace(first, layers=tuple(layers), source="the sum")
    return _write(merged, Path(output), to, force=force)


def read_state(source: str | Path) -> TunedState:
    """The tuned state in a file of either layout, or in a model folder.

    Raises:
        SourceError: if there is no such file or folder.
        CheckpointError: if it holds no tuned state, one that is damaged or beyond float32, or other tensors too.
    """
    source = Path(source)
    if source.is_dir():
        return _of_folder(source)
    if not source.exists():
        raise SourceError(f"there is no {source}; give a state file, or a model folder with a tuned state")
    with open_checkpoint(LocalCheckpoint(Source("file", str(source)), (source,))) as checkpoint:
        return _of_file(source, checkpoint)


def refuse_other_model(state: TunedState, config: "RwkvRevConfig", name: str) -> None:
    """Refuse a state that a model of this configuration cannot begin with; ``name`` is the model's.

    Raises:
        CheckpointError: naming what differs: the generation, the number of layers, or the shape.
    """
    known = config.architecture
    if not known.tunes_state or known.initial_state is None:
        raise CheckpointError(
            f"{name} is a model of {known.called}, which takes no state files; those of {with_tuned_state()} do"
        )
    heads, size, _ = known.memory_shape(config)
    blank = torch.empty(0).expand(heads, size, 0)
    wanted = TunedState((blank,) * config.num_hidden_layers, config.rwkv_version, name)
    _refuse_differing(state, wanted)


def set_state(model: "RwkvRevForCausalLM", state: TunedState, name: str = "the model") -> None:
    """Let every context of a model in memory begin with a tuned state.

    Raises:
        CheckpointError: as :func:`refuse_other_model`.
    """
    refuse_other_model(state, model.config, name)
    model.add_initial_state()
    own = model.model.initial_wkv
    assert own is not None
    with torch.no_grad():
        for parameter, tensor in zip(own, state.layers, strict=True):
            parameter.copy_(tensor)


def _refuse_differing(state: TunedState, wanted: TunedState) -> None:
    if state.version is not None and wanted.version is not None and state.version != wanted.version:
        of, other = (architecture(version).called for version in (state.version, wanted.version))
        raise CheckpointError(f"{state.source} is a state of {of}, {wanted.source} is of {other}")
    if state.sizes != wanted.sizes:
        raise CheckpointError(f"{state.source} has {state.sizes}, {wanted.source} has {wanted.sizes}")


def _of_folder(directory: Path) -> TunedState:
    with ConvertedModel(directory) as model:
        known = model.config.architecture
        if not model.config.has_initial_state:
            how = (
                f"tune one: rwkv-rev finetune {directory} --tune state"
                if known.tunes_state
                else f"those of {with_tuned_state()} can have one"
            )
            raise CheckpointError(f"{directory} has no tuned initial state; {how}")
        if known.initial_state is None:
            raise CheckpointError(
                f"{directory} is a model of {known.called}, whose state no other tool reads"
            )
        layers = tuple(model.tensor(f"{_OURS}{i}").clone() for i in range(model.config.num_hidden_layers))
        for i, tensor in enumerate(layers):
            _check_values(directory, f"{_OURS}{i}", tensor)
        return TunedState(layers, model.config.rwkv_version, str(directory))


def _of_file(path: Path, checkpoint: Checkpoint) -> TunedState:
    numbers = {name: found[1] for name in checkpoint.names() if (found := _NAME.fullmatch(name))}
    if others := [checkpoint.stored_name(name) for name in checkpoint.names() if name not in numbers]:
        if numbers:
            raise CheckpointError(
                f"{path} holds other tensors beside a tuned state ({some(others, 1)}); of a whole checkpoint, convert "
                "it: its state comes along"
            )
        if checkpoint.metadata.get("kind") == "rwkv-rev state":
            raise CheckpointError(
                f"{path} is the state of a conversation, which chat reads by /load, and no tuned one"
            )
        raise CheckpointError(
            f"{path} is no state file: it holds {some(others, 1)} and no blocks.0.att.time_state"
        )
    stored = {int(number): name for name, number in numbers.items()}
    count = max(stored) + 1
    if missing := [i for i in range(min(count, len(stored) + 1)) if i not in stored]:
        raise CheckpointError(
            f"{path} lacks blocks.{missing[0]}.att.time_state, and has that of block {count - 1}"
        )
    first = checkpoint.shape(stored[0])
    for i in range(count):
        shape, dtype = checkpoint.shape(stored[i]), checkpoint.dtype(stored[i])
        if len(shape) != 3 or shape[1] != shape[2] or shape != first or not all(shape):
            raise CheckpointError(
                f"{path}: {stored[i]} has the shape {shape}; all layers have one, heads x size x size"
            )
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise CheckpointError(f"{path}: {stored[i]} is of {str(dtype).removeprefix('torch.')}")
    layers = []
    for i in range(count):
        tensor = checkpoint.tensor(stored[i])
        _check_values(path, stored[i], tensor)
        layers.append(
            (tensor if checkpoint.is_safetensors else tensor.mT).clone(memory_format=torch.contiguous_format)
        )
    version = checkpoint.metadata.get(VERSION_KEY)
    if version is not None and version not in (
        known.version for known in generations() if known.initial_state
    ):
        raise CheckpointError(f"{path} says that it is a state of {shortened(repr(version))}, which has none")
    return TunedState(tuple(layers), version, str(path))


def _check_values(where: Path, name: str, tensor: Tensor) -> None:
    """Refuse what is not finite, or would not be in float32, in which memories are kept."""
    check_finite(name, tensor)
    if not bool(torch.isfinite(tensor.float()).all()):
        largest = float(tensor.abs().max())
        raise CheckpointError(f"{where}: {name} holds values as large as {largest:.3g}, beyond float32")


def _write(state: TunedState, output: Path, to: StateLayout, *, force: bool) -> StateFile:
    if to not in get_args(StateLayout):
        raise OutputError(
            f"a state cannot be written as {to!r}; choose one of {', '.join(get_args(StateLayout))}"
        )
    names = [f"blocks.{i}.att.time_state" for i in range(len(state.layers))]
    told = {} if state.version is None else {VERSION_KEY: state.version}
    if to == "rwkv-lm":
        tensors = OrderedDict(
            (name, tensor.mT.contiguous()) for name, tensor in zip(names, state.layers, strict=True)
        )
        write_torch(tensors, output, force=force, metadata=told)
        dtype, note = functools.reduce(torch.promote_types, (each.dtype for each in state.layers)), None
    else:
        dtype, note = torch.float16, _refuse_or_tell(state)
        by_name = dict(zip(names, state.layers, strict=True))
        entries = [Entry(name, name, tuple(tensor.shape), dtype) for name, tensor in by_name.items()]
        with whole_file(output, force=force) as path:
            write_shard(
                Shard(path.name, entries), path.parent, lambda entry: by_name[entry.name], metadata=told
            )
    heads, size, _ = state.layers[0].shape
    name = str(dtype).removeprefix("torch.")
    return StateFile(output, to, len(names), heads, size, state.version, name, note)


def _refuse_or_tell(state: TunedState) -> str | None:
    """What float16 does to the values; raises OutputError where it has none for one."""
    farthest = 0.0
    for tensor in state.layers:
        wide = tensor.double()
        if (largest := float(wide.abs().max())) > torch.finfo(torch.float16).max:
            raise OutputError(
                f"{state.source} holds values as large as {largest:.3g}, and web-rwkv reads float16, up to 65504; "
                "write it --to rwkv-lm"
            )
        farthest = max(farthest, float((wide - wide.half().double()).abs().max()))
    return (
        f"values are rounded to float16, the type that web-rwkv reads, by at most {farthest:.2g}"
        if farthest
        else None
    )
