"""What does not go with a model whose weights are spread over the processes (``shard_model``)."""

from typing import TYPE_CHECKING

from rwkv_rev.errors import ConfigError

if TYPE_CHECKING:
    from rwkv_rev.training.config import FinetuneConfig


def refuse_sharding(config: "FinetuneConfig") -> None:
    """Raise ConfigError for settings that need the weights whole, or spread something once more."""
    if not config.shard_model:
        return
    if config.shard_optimizer:
        raise ConfigError("--shard-model spreads the optimizer's state too: leave --shard-optimizer out")
    if config.bptt == "truncated":
        raise ConfigError(
            "--shard-model gathers each block for the exact sweeps, and --bptt truncated needs all of them at once: "
            "use --bptt reversible"
        )
    if config.quantise is not None:
        raise ConfigError(
            f"--shard-model spreads floating-point weights, and quantise = {config.quantise} makes others of them: "
            "leave one of the two out"
        )
    if config.dtype == "float16":
        raise ConfigError(
            "--shard-model needs one scale of the loss for all processes, which float16 finds in each for itself: use "
            "--dtype bfloat16"
        )
