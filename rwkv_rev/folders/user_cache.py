"""Where this machine's user keeps what can be made again: tokens of data, and where sources lie."""

import os
from pathlib import Path


def user_cache(part: str) -> Path:
    """The folder of one part: in ``$RWKV_REV_CACHE``, else in ``rwkv-rev`` under the Hugging Face home."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("RWKV_REV_CACHE") or Path(HF_HOME, "rwkv-rev")).expanduser() / part
