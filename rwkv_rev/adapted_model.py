"""A model folder with what stands around its linear maps: fewer bits inside, an adapter outside."""

from pathlib import Path
from typing import Any

import torch

from rwkv_rev.converters.adapter_files import read_adapter
from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.errors import RwkvRevError, SourceError
from rwkv_rev.foreign.adapters import without_peft_warnings
from rwkv_rev.loading import damaged, load_config, load_model, load_quantised


def load_adapted(
    directory: str | Path,
    device: torch.device,
    dtype: torch.dtype | str,
    *,
    quantised: str | None = None,
    adapter: str | Path | None = None,
) -> Any:
    """:func:`load_model`, or :func:`load_quantised`, with an adapter in peft's layout around its linear maps.

    Args:
        quantised: a kind, in which case a ``dtype`` of ``auto`` is the stored one.
        adapter: its folder.

    Raises:
        RwkvRevError: when peft is missing. CheckpointError, SourceError: for an adapter that is none of this model.
    """
    if adapter is not None:
        if Path(adapter).is_file():
            raise SourceError(
                f"{adapter} is no folder of peft's: rwkv-rev adapter BASE {adapter} --to peft --output FOLDER makes one"
            )
        with ConvertedModel(directory) as source:
            read_adapter(source, adapter)  # refuses what is not understood, or of another model
    if quantised is None:
        model = load_model(directory, device, dtype)
    else:
        wanted = load_config(directory).dtype if dtype == "auto" else dtype
        model = load_quantised(directory, device, wanted or torch.float32, quantised)  # type: ignore[arg-type]
    if adapter is not None:
        try:
            from peft import PeftModel
        except ImportError as error:
            raise RwkvRevError("an adapter needs peft: pip install 'rwkv-rev[train]'") from error
        with damaged(f"{adapter} cannot be loaded"), without_peft_warnings():
            PeftModel.from_pretrained(model, str(adapter))  # changes model in place
    return model
