"""The trained byte-level checkpoints that ship with the package, and where they lie on disk.

All were trained on plain-text documentation at context 512 (bfloat16, one token per byte), RWKV-7 for a minute only.
They are what ``bundled:rwkv-4``, ``bundled:rwkv-5.2``, ``bundled:rwkv-6`` and ``bundled:rwkv-7`` name, so that every
command works offline from the first minute.
"""

from pathlib import Path

BUNDLED = ("rwkv-4", "rwkv-5.2", "rwkv-6", "rwkv-7")


def bundled_path(name: str) -> Path:
    """Path of the bundled ``.pth`` file called ``name`` (one of :data:`BUNDLED`).

    Raises:
        KeyError: if no checkpoint of that name is bundled.
    """
    if name not in BUNDLED:
        raise KeyError(name)
    return Path(__file__).with_name(f"{name}.pth")
