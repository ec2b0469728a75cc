"""Checks that several commands share: a wrong value is a usage error (exit code 2)."""

import typer

DEFAULT_SHARD_SIZE = "5GB"


def shard_size(value: str) -> str:
    """Callback of ``--max-shard-size``."""
    if value != DEFAULT_SHARD_SIZE:
        from rwkv_rev.converters.rewriter import parse_size
        from rwkv_rev.errors import OutputError

        try:
            parse_size(value)
        except OutputError as error:
            raise typer.BadParameter(str(error)) from error
    return value
