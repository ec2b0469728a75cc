"""Read RWKV's ``binidx`` pairs: token ids on disk, in the layout of Megatron's memory-mapped indexed dataset.

``NAME.bin`` holds the ids of all sequences one after another. ``NAME.idx`` holds, little endian:

    9 bytes   magic ``MMIDIDX\\0\\0``
    uint64    version, 1
    uint8     dtype code (1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 and 7 floating point, 8 uint16)
    uint64    S, the number of sequences
    uint64    E, the number of entries of the document index
    int32[S]  sequence lengths in tokens
    int64[S]  byte offset of each sequence in the .bin
    int64[E]  document index: document i is the sequences [index[i], index[i+1])

Source: the public description of the format in Megatron-LM's ``indexed_dataset``. Only pairs whose
sequences lie one after another without gaps are read (what every writer produces), so that a document is
one slice of the .bin.
"""

import struct
from pathlib import Path

import numpy as np

from rwkv_rev.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """Read ``NAME.idx`` and check it against ``NAME.bin``.

    Returns the dtype of the ids and the document borders: int64 [documents + 1], in tokens. Documents may
    be empty. Raises DataError when the pair is damaged, truncated, or holds something that is not token
    ids.
    """
    binary = path.with_suffix(".bin")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            if len(header) < HEADER.size or not header.startswith(MAGIC):
                raise DataError(f"{path}: not a binidx index (it does not begin with MMIDIDX)")
            _, version, code, sequences, entries = HEADER.unpack(header)
            if version != 1:
                raise DataError(f"{path}: binidx version {version}; only version 1 is known")
            if code not in DTYPES:
                raise DataError(f"{path}: dtype code {code} is not an integer type; token ids are integers")
            if size < HEADER.size + 12 * sequences + 8 * entries:
                raise DataError(f"{path}: truncated; it announces {sequences} sequences")
            lengths = np.fromfile(file, "<i4", sequences).astype(np.int64)
            pointers = np.fromfile(file, "<i8", sequences)
            documents = np.fromfile(file, "<i8", entries)
        binary_size = binary.stat().st_size
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
    dtype = np.dtype(DTYPES[code])
    if sequences == 0:
        raise DataError(f"{path}: holds no sequences")
    borders = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, out=borders[1:])
    if lengths.min() < 0 or not np.array_equal(pointers, borders[:-1] * dtype.itemsize):
        raise DataError(f"{path}: its sequences do not lie one after another; write the pair again")
    if binary_size != borders[-1] * dtype.itemsize:
        raise DataError(
            f"{binary}: {binary_size} bytes, but its index announces {borders[-1] * dtype.itemsize}"
        )
    if entries < 2:
        return dtype, borders  # no document index: every sequence is a document
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise DataError(
            f"{path}: its document index does not cover its {sequences} sequences; write the pair again"
        )
    return dtype, borders[documents]
