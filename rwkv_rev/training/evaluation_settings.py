"""Settings of what happens at the evaluations of a run, which of them go together, and which mean nothing."""

from typing import TYPE_CHECKING

from rwkv_rev.errors import ConfigError

if TYPE_CHECKING:
    from rwkv_rev.training.config import FinetuneConfig


def refuse_evaluations(config: "FinetuneConfig") -> None:
    """Raise ConfigError for what is to happen at evaluations that there are none of, and for what has no effect."""
    if config.eval_every and not config.eval_data and not config.sample_prompt:
        raise ConfigError(
            "--eval-every needs held-out text: --eval-data FILE (or prompts: --sample-prompt TEXT)"
        )
    for option, wanted in (("--keep-best", config.keep_best), ("--patience", config.patience)):
        if wanted and not config.eval_data:
            raise ConfigError(
                f"{option} needs held-out text, read on the way: --eval-data FILE --eval-every N"
            )
        if wanted and not config.eval_every:
            raise ConfigError(f"{option} needs evaluations on the way: --eval-every N")
    if config.patience is None and config.min_delta:
        raise ConfigError("min_delta belongs to --patience N; this run has none")
    for name in ("sample_tokens", "sample_temperature", "sample_chat"):
        if not config.sample_prompt and getattr(config, name) != getattr(type(config), name):
            raise ConfigError(f"{name} belongs to --sample-prompt TEXT; this run has none")
    if config.sample_temperature and not config.sample_temperature >= 0.01:
        raise ConfigError(f"sample_temperature = {config.sample_temperature} must be 0, or at least 0.01")
