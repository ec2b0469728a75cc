"""Files that hold additions to a model and not the model: recognised by their tensors' names, refused with the way out.

    LoRA          peft ``….lora_A.weight``, RWKV-PEFT ``….lora_A``; PiSSA is a LoRA that began with singular vectors,
                  RWKV-PEFT keeps those in a file of their own (``….init_lora_A``)
    DiSHA, bone   RWKV-PEFT ``….disha`` and before ``….bone``; peft ``….bone_…`` and since 0.18 ``….miss_…``
    others        peft names each tensor of a method after it (``….lokr_w1``)

RWKV-PEFT: https://github.com/JL-er/RWKV-PEFT; peft: the ``prefix`` of each tuner.
"""

import re
from collections.abc import Sequence

from rwkv_rev.errors import CheckpointError
from rwkv_rev.folders.selection import some

_KINDS = (
    (r"\.init_lora_[AB]$", "the initial values of PiSSA"),
    (r"\.lora_(A|B|embedding_A|embedding_B|E|ranknum|magnitude_vector)\b", "LoRA"),
    (r"\.disha$", "DiSHA"),
    (r"\.(bone|bone_\w*|miss_\w*)(\.|$)", "DiSHA (bone)"),
    (
        r"\.(lokr|hada|oft|boft|ia3|hra|vera_lambda|vblora|fourierft|randlora|c3a|shira|road|ln_tuning"
        r"|trainable_tokens|gralora|delora|waveft|tinylora|unilora|hira|osf|psoft|lily)_\w+",
        "peft",
    ),
    (r"^(prompt_embeddings|prompt_encoder\.)", "peft prompt"),
)
_MERGED = ("LoRA", "DiSHA", "the initial values of PiSSA")
_WHOLE = re.compile(r"(^|\.)(emb|embeddings)(\.base_layer)?\.weight$")


def refuse_adapters(where: str, names: Sequence[str]) -> None:
    """Refuse a file with tensors of an adapter, alone or beside the model's.

    Raises:
        CheckpointError: naming the kind and what to do.
    """
    for pattern, kind in _KINDS:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            continue
        if any(_WHOLE.search(name) for name in names):
            raise CheckpointError(
                f"{where} holds {kind} adapter weights that are not merged (it has {some(found, 1)}); merge them into "
                "the model first"
            )
        how = (
            "rwkv-rev merge BASE ADAPTER"
            if kind in _MERGED
            else "by the tool that made it, in peft merge_and_unload"
        )
        raise CheckpointError(
            f"{where} is a {kind} adapter alone (it has {some(found, 1)}): it needs its base model; convert that, then "
            f"merge: {how}"
        )
