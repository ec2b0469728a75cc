"""The tape of RWKV-7 with lifted remnants against whole states, by chunk length.

    python examples/lifting/table.py bundled:rwkv-7 --text book.txt

Bits are per number of the state and chunk, over all layers: used, the entropy (log2 of one over the singular values of
the chunk's transition, each from 0 to 32), and 32. The last columns are bytes per token on the tape, token shifts too.
"""

import argparse
import sys
from pathlib import Path

from rwkv_rev.converters.inspection import inspect_source
from rwkv_rev.equivalence.forgetting import measure_source
from rwkv_rev.errors import RwkvRevError, SourceError

LENGTHS = tuple(2**power for power in range(4, 12))


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=16, help="of each length, at most 8,192 tokens")
    asked = parser.parse_args(given)
    try:
        table(asked.source, asked.text, asked.chunks)
    except RwkvRevError as error:
        sys.exit(f"error: {error}")


def table(source: str, text: Path, chunks: int) -> None:
    """Print it, a row for each length.

    Raises:
        SourceError: for a model that is no RWKV-7, and as of :func:`measure_source`.
        DataError: for a text that is too short.
    """
    if (version := inspect_source(source).config.rwkv_version) != "7":
        raise SourceError(f"{source} is RWKV-{version}, and RWKV-7 alone is lifted")
    print("| C | bits used | entropy | of whole states | layers, least to most | tape | of whole |")
    print("|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        tokens = max(2 * length, min(chunks * length, 8192))
        (found,) = measure_source(source, text, tokens=tokens, chunk_length=length).chunks
        total, numbers = found.total, found.total.whole / 32
        shares = [100 * layer.remnants / layer.whole for layer in found.layers]
        whole = found.tape_bytes + (total.whole - total.remnants) / 8
        assert total.theory is not None
        print(
            f"| {length:,} | {total.remnants / numbers:.1f} | {total.theory / numbers:.1f} "
            f"| {100 * total.remnants / total.whole:.0f} % | {min(shares):.0f} to {max(shares):.0f} % "
            f"| {found.tape_bytes / found.counted:,.0f} | {whole / found.counted:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
