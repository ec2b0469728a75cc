"""What a weight file is, from its first bytes: the suffix is a hint for people.

Downloads that went wrong keep the name of what was wanted: a web page, a JSON error, a Git-LFS pointer.
Reading those as a pickle gives errors nobody can act on, so they are recognised here and refused by name.
"""

from pathlib import Path
from typing import Literal

from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.safe_input import refuse_special

Format = Literal["torch-zip", "torch-pickle", "safetensors"]

# torch.save before 1.6 (or _use_new_zipfile_serialization=False): a pickled magic number comes first.
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_DOWNLOAD = "download the file again (huggingface_hub or `git lfs pull` fetch the real one)"
_BINARY = (
    (b"GGUF", "a GGUF file of llama.cpp; give the original .pth it was made from"),
    (b"fmgg", "a ggml file of rwkv.cpp; give the original .pth it was made from"),
    (b"tjgg", "a ggml file of rwkv.cpp; give the original .pth it was made from"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file; give the PyTorch or safetensors weights"),
)


def sniff(path: Path) -> Format:
    """The format of a weight file.

    Raises:
        SourceError: if it is no regular file.
        CheckpointError: if the file is empty, truncated (safetensors) or something else, naming what it is.
    """
    refuse_special(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not size:
        raise CheckpointError(f"{path} is empty (0 bytes); download it again")
    if head.startswith(b"PK\x03\x04"):
        return "torch-zip"
    if head.startswith(b"\x80") and _LEGACY_MAGIC in head[:32]:
        return "torch-pickle"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 1 << 32:  # before the texts: a length may look like any byte
        if 8 + length > size:
            raise CheckpointError(
                f"{path} is truncated: its header alone needs {8 + length} bytes, it has {size}"
            )
        return "safetensors"
    _refuse_text(path, head)
    for magic, what in _BINARY:
        if head.startswith(magic):
            raise CheckpointError(f"{path} is {what}")
    if head.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a plain Python pickle, which torch.save did not write; save it with torch.save"
        )
    raise CheckpointError(
        f"{path} is neither a PyTorch (.pth, .bin) nor a safetensors file; its first bytes are {head[:8]!r}"
    )


def _refuse_text(path: Path, head: bytes) -> None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git-LFS pointer, not the weights themselves; {_DOWNLOAD}")
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise CheckpointError(f"{path} is a web page (HTML) saved under that name; {_DOWNLOAD}")
    if text.startswith((b"{", b"[")):
        raise CheckpointError(f"{path} is a JSON text, not weights; {_DOWNLOAD}")
    if text and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in text):
        raise CheckpointError(f"{path} is a text file, not weights; {_DOWNLOAD}")
