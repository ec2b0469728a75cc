"""What a figure was measured on: every row of a benchmark carries these fields."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from rwkv_rev.version import __version__


def environment(device: torch.device, dtype: torch.dtype, command: str) -> dict[str, Any]:
    """Hardware, versions, dtype and the command, as plain values.

    Args:
        device: what was measured.
        dtype: of the model's weights and activations.
        command: what a user types to measure it again.
    """
    versions = {"torch": torch.__version__, "python": platform.python_version(), "rwkv-rev": __version__}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {
        "hardware": hardware(device),
        "versions": versions,
        "dtype": str(dtype).removeprefix("torch."),
        "command": command,
    }


def hardware(device: torch.device) -> str:
    """Name of the device; for the CPU also how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
