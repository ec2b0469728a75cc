"""What a ``config.json`` says of sizes, against the tensors beside it: every contradiction is one line.

Layouts name the fields that must agree (:attr:`.Layout.says`): those of flash-linear-attention, whose classes are made
of them. Published configurations of RWKV-4 to 6 with remote code have no width, and the head size for the number of
heads; nothing is asked of these.
"""

from rwkv_rev.architectures.architecture import Layout
from rwkv_rev.architectures.fla import channel_mix_sizes
from rwkv_rev.configuration import RwkvRevConfig
from rwkv_rev.converters.names import TensorNames
from rwkv_rev.converters.reading import Checkpoint
from rwkv_rev.errors import CheckpointError
from rwkv_rev.printable import shortened


def refuse_contradictions(
    where: str, checkpoint: Checkpoint, config: RwkvRevConfig, layout: Layout, table: tuple[TensorNames, ...]
) -> None:
    """Compare the sizes that ``config.json`` has with those of ``config``, which the tensors of ``table`` gave.

    Raises:
        CheckpointError: naming the first field that contradicts them, its value, and the tensor with its shape.
    """
    said = checkpoint.config
    if not layout.says:
        return
    layers = said.get("num_hidden_layers")
    if layers is not None and layers != config.num_hidden_layers:
        raise CheckpointError(
            f"{where}: config.json says num_hidden_layers = {shortened(repr(layers))}, and there are "
            f"{config.num_hidden_layers} blocks ({layout.block}0 to {config.num_hidden_layers - 1})"
        )
    for field, (letter, tensor) in layout.says.items():
        row = next((row for row in table if row.name.endswith(tensor)), None)
        if row is None or said.get(field) is None:
            continue
        size = config.architecture.shape(letter, config)[0]
        if said[field] != size or isinstance(said[field], bool):
            raise _contradiction(where, checkpoint, field, said[field], row, size)
    ratio = said.get("hidden_ratio")
    if ratio is None or said.get("intermediate_size") is not None:
        return
    row = next(row for row in table if row.name.endswith("channel_mix.key.weight"))
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio < 1 << 20
    if not number or config.intermediate_size not in channel_mix_sizes(config.hidden_size, ratio):
        raise _contradiction(
            where, checkpoint, "hidden_ratio", ratio, row, config.intermediate_size / config.hidden_size
        )


def _contradiction(
    where: str, checkpoint: Checkpoint, field: str, value: object, row: TensorNames, size: float
) -> CheckpointError:
    return CheckpointError(
        f"{where}: config.json says {field} = {shortened(repr(value))}, and {row.foreign} is "
        f"{list(checkpoint.shape(row.foreign))}: {field} would be {size:g}; give the config.json of these weights"
    )
