"""Tiny random checkpoints of all versions in the layouts that other tools publish.

Written independently of ``converters/names.py``, so that a mistake in those tables shows. Decays, bonuses and
mixes vary by channel and layer as in trained models (mixes leave [0, 1] on both sides); nothing is zero or
constant, so a swapped, dropped or transposed tensor always changes the logits. Equal arguments give equal
values.

Tests import it as ``from foreign import blinkdl_state_dict``.
"""

from typing import Any

import torch

from rwkv_rev.architectures.registry import architecture
from rwkv_rev.architectures.scan import Scan
from rwkv_rev.configuration import RwkvRevConfig

VERSIONS = ("4", "5.0", "5.1", "5.2", "6", "7")
RANKS = {"w": 5, "a": 6, "v": 7, "g": 9}
"""Of RWKV-7's low-rank maps."""
MIX_RANK, DECAY_RANK = 6, 5
"""Of RWKV-6's."""


def scan_of(version: str) -> Scan:
    """The plain loop of a version, over the names that its trainer gives tensors."""
    own = architecture(version).scan
    assert own is not None
    return own(RwkvRevConfig())


def blinkdl_state_dict(
    version: str,
    *,
    layers: int = 2,
    D: int = 32,
    head_size: int = 8,
    vocab: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    bonus: str = "time_faaaa",
    unused: bool = False,
) -> dict[str, torch.Tensor]:
    """State dict as BlinkDL's trainer saves it; ``bonus`` names the bonus of 5.0 (the others have one).

    ``unused``: layer 0 of RWKV-7 holds v0, v1 and v2, too.
    """
    if version not in VERSIONS:
        raise ValueError(f"no version {version!r}")
    generator = torch.Generator().manual_seed(seed)
    heads = D // head_size
    channel_mix = 4 * D if version in ("4", "5.0", "7") else int(3.5 * D) // 32 * 32

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(std).add_(mean).to(dtype)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return normal(rows, columns, std=gain / columns**0.5)

    def mix(layer: int) -> torch.Tensor:
        ramp = torch.linspace(0, 1, D, dtype=torch.float64) ** (1 - layer / layers)
        noise = 0.25 * torch.randn(D, generator=generator, dtype=torch.float64)
        return (ramp + noise).to(dtype).reshape(1, 1, D)

    def norm(prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}.weight": normal(D, mean=1.0, std=0.2), f"{prefix}.bias": normal(D, std=0.1)}

    def decay(count: int, layer: int, low: float, high: float) -> torch.Tensor:
        power = 0.7 + 1.3 * layer / max(layers - 1, 1)
        ramp = low + (high - low) * torch.linspace(0, 1, count, dtype=torch.float64) ** power
        return (ramp + 0.1 * torch.randn(count, generator=generator, dtype=torch.float64)).to(dtype)

    state = {"emb.weight": normal(vocab, D, std=0.5)}
    for i in range(layers):
        block, att, ffn = f"blocks.{i}", f"blocks.{i}.att", f"blocks.{i}.ffn"
        if i == 0:
            state |= norm(f"{block}.ln0")
        state |= norm(f"{block}.ln1")
        state |= norm(f"{block}.ln2")
        if version == "7":
            for letter in "rwkvag":
                state[f"{att}.x_{letter}"] = mix(i)
            for letter, mean in (("w", -3.0), ("a", 0.0), ("v", 0.5), ("g", 0.0)):
                if letter == "v" and i == 0 and not unused:
                    continue
                if letter != "g":
                    state[f"{att}.{letter}0"] = normal(1, 1, D, mean=mean, std=2.0)
                state[f"{att}.{letter}1"] = normal(D, RANKS[letter], std=D**-0.5)
                state[f"{att}.{letter}2"] = normal(RANKS[letter], D, std=RANKS[letter] ** -0.5)
            state[f"{att}.k_k"] = normal(1, 1, D, mean=0.8, std=0.2)
            state[f"{att}.k_a"] = normal(1, 1, D, mean=1.0, std=0.2)
            state[f"{att}.r_k"] = normal(heads, head_size, std=0.2)
            for name in ("receptance", "key", "value", "output"):
                state[f"{att}.{name}.weight"] = matrix(D, D)
            state |= norm(f"{att}.ln_x")
            state[f"{ffn}.x_k"] = mix(i)
            state[f"{ffn}.key.weight"] = matrix(channel_mix, D)
            state[f"{ffn}.value.weight"] = matrix(D, channel_mix, gain=0.5)
            continue
        if version == "6":
            for letter in "xwkvrg":
                state[f"{att}.time_maa_{letter}"] = mix(i)
            state[f"{att}.time_maa_w1"] = normal(D, 5 * MIX_RANK, std=D**-0.5)
            state[f"{att}.time_maa_w2"] = normal(5, MIX_RANK, D, std=0.5 * MIX_RANK**-0.5)
            state[f"{att}.time_decay"] = decay(D, i, -6.0, 0.5).reshape(1, 1, D)
            state[f"{att}.time_decay_w1"] = normal(D, DECAY_RANK, std=D**-0.5)
            state[f"{att}.time_decay_w2"] = normal(DECAY_RANK, D, std=DECAY_RANK**-0.5)
            state[f"{att}.time_faaaa"] = normal(heads, head_size, mean=0.3, std=0.4)
            for name in ("receptance", "key", "value", "output", "gate"):
                state[f"{att}.{name}.weight"] = matrix(D, D)
            state |= norm(f"{att}.ln_x")
            state[f"{ffn}.time_maa_k"] = mix(i)
            state[f"{ffn}.time_maa_r"] = mix(i)
            state[f"{ffn}.key.weight"] = matrix(channel_mix, D)
            state[f"{ffn}.receptance.weight"] = matrix(D, D)
            state[f"{ffn}.value.weight"] = matrix(D, channel_mix, gain=0.5)
            continue
        if version == "4":
            state[f"{att}.time_decay"] = decay(D, i, -5.0, 3.0)
            state[f"{att}.time_first"] = normal(D, mean=-1.2, std=0.5)
        elif version == "5.2":
            state[f"{att}.time_decay"] = decay(D, i, -6.0, 0.5).reshape(heads, head_size)
            state[f"{att}.time_faaaa"] = normal(heads, head_size, mean=0.3, std=0.4)
        else:
            state[f"{att}.time_decay"] = decay(heads, i, -6.0, 0.0)
            state[f"{att}.{bonus if version == '5.0' else 'time_faaaa'}"] = normal(heads, mean=0.3, std=0.4)
        for letter in "kvrg" if version in ("5.1", "5.2") else "kvr":
            state[f"{att}.time_mix_{letter}"] = mix(i)
        for name in ("receptance", "key", "value", "output"):
            state[f"{att}.{name}.weight"] = matrix(D, D)
        if version in ("5.1", "5.2"):
            state[f"{att}.gate.weight"] = matrix(D, D)
        if version != "4":
            state |= norm(f"{att}.ln_x")
        state[f"{ffn}.time_mix_k"] = mix(i)
        state[f"{ffn}.time_mix_r"] = mix(i)
        state[f"{ffn}.key.weight"] = matrix(channel_mix, D)
        state[f"{ffn}.receptance.weight"] = matrix(D, D)
        state[f"{ffn}.value.weight"] = matrix(D, channel_mix, gain=0.5)
    state |= norm("ln_out")
    state["head.weight"] = matrix(vocab, D)
    return state


_HF_NAMES = {
    "blocks.0.ln0.": "blocks.0.pre_ln.",
    ".att.": ".attention.",
    ".ffn.": ".feed_forward.",
    "emb.": "embeddings.",
}
_HF_ENDINGS = {
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
    "time_mix_g": "time_mix_gate",
}


def hf_name(name: str) -> str:
    """The name of a BlinkDL tensor in transformers' RWKV-4 class and in the published v5 repositories."""
    for old, new in _HF_NAMES.items():
        name = name.replace(old, new)
    stem, _, ending = name.rpartition(".")
    if ending in _HF_ENDINGS:
        name = f"{stem}.{_HF_ENDINGS[ending]}"
    return name if name == "head.weight" else f"rwkv.{name}"


_FLA_NAMES = {
    "blocks.0.ln0.": "blocks.0.pre_norm.",
    "blocks.": "model.layers.",
    ".ln1.": ".attn_norm.",
    ".ln2.": ".ffn_norm.",
    ".att.": ".attn.",
    "emb.": "model.embeddings.",
    "ln_out.": "model.norm.",
    "head.": "lm_head.",
    ".attn.receptance.": ".attn.r_proj.",
    ".attn.key.": ".attn.k_proj.",
    ".attn.value.": ".attn.v_proj.",
    ".attn.output.": ".attn.o_proj.",
    ".attn.ln_x.": ".attn.g_norm.",
}
_FLA_LINEAR = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}


def fla_state_dict(**kwargs: Any) -> dict[str, torch.Tensor]:
    """The same values as :func:`blinkdl_state_dict` of RWKV-7, as flash-linear-attention's class holds them."""
    found = {}
    for name, tensor in blinkdl_state_dict("7", **kwargs).items():
        for old, new in _FLA_NAMES.items():
            name = name.replace(old, new)
        stem, _, last = name.rpartition(".")
        if last in ("k_k", "k_a", "w0", "a0", "v0") or name.endswith("ffn.x_k"):
            tensor = tensor.flatten()
        if last[0] in RANKS and last[1:] in _FLA_LINEAR:
            tensor = tensor.mT.contiguous() if last[1] in "12" else tensor
            name = f"{stem}.{last[0]}_lora.lora.{_FLA_LINEAR[last[1]]}"
        found[name] = tensor
    return found


def packed_state_dict(shape: tuple[int, ...] = (6, 32), **kwargs: Any) -> dict[str, torch.Tensor]:
    """RWKV-7 as flash-linear-attention's first version holds it: the mixes of r, w, k, v, a, g in one tensor."""
    found = hf_state_dict("7", **kwargs)
    for i in range(len({name.split(".")[2] for name in found if name.startswith("model.layers.")})):
        mixes = [found.pop(f"model.layers.{i}.attn.x_{letter}").flatten() for letter in "rwkvag"]
        found[f"model.layers.{i}.attn.x_x"] = torch.stack(mixes).view(shape)
    return found


_FLA_OF_6 = {
    "att.time_maa_x": "attn.x_proj.0.mu",
    "att.time_decay": "attn.w_proj.linear.lora.2.bias",
    "att.time_decay_w1": "attn.w_proj.linear.lora.0.weight",
    "att.time_decay_w2": "attn.w_proj.linear.lora.2.weight",
    "att.time_faaaa": "attn.bonus",
    **{
        f"att.{name}.weight": f"attn.{name[0]}_proj.linear.weight"
        for name in ("receptance", "key", "value", "gate")
    },
    "ffn.key.weight": "ffn.key.linear.weight",
    "ffn.receptance.weight": "ffn.receptance.linear.weight",
    "ffn.time_maa_k": "ffn.key.mu",
    "ffn.time_maa_r": "ffn.receptance.mu",
}


def fla_state_dict_of_6(**kwargs: Any) -> dict[str, torch.Tensor]:
    """The same values as :func:`blinkdl_state_dict` of RWKV-6, as flash-linear-attention's class holds them.

    Its five mixes are those of r, w, k, v, g, in one tensor; the trainer's low-rank maps those of w, k, v, r, g.
    """
    found = {}
    state = blinkdl_state_dict("6", **kwargs)
    for name, tensor in state.items():
        block, _, last = name.partition(".att.")
        stem = ".".join(name.split(".")[2:])
        place = f"model.layers.{name.split('.')[1]}."
        if last == "time_maa_w1":
            w, k, v, r, g = tensor.chunk(5, 1)
            found[f"{place}attn.x_proj.0.linear.weight"] = torch.cat((r, w, k, v, g), 1).mT.contiguous()
        elif last == "time_maa_w2":
            w, k, v, r, g = tensor.unbind(0)
            found[f"{place}attn.x_proj.2.weight"] = torch.cat((r, w, k, v, g), 0).mT.contiguous()
        elif last == "time_maa_w":
            parts = [state[f"{block}.att.time_maa_{letter}"].flatten() for letter in "rwkvg"]
            found[f"{place}attn.x_bias"] = torch.stack(parts)
        elif last in ("time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g"):
            continue
        elif stem in _FLA_OF_6:
            tensor = tensor.mT.contiguous() if last.startswith("time_decay_w") else tensor
            found[place + _FLA_OF_6[stem]] = tensor.flatten() if tensor.dim() == 3 else tensor
        else:
            for old, new in _FLA_NAMES.items():
                name = name.replace(old, new)
            found[name] = tensor
    return found


def hf_state_dict(version: str, **kwargs: Any) -> dict[str, torch.Tensor]:
    """The same values as :func:`blinkdl_state_dict` as the repositories of Hugging Face name them."""
    if version == "7":
        return fla_state_dict(**kwargs)
    return {hf_name(name): tensor for name, tensor in blinkdl_state_dict(version, **kwargs).items()}


def hf_config(
    version: str, *, layers: int = 2, D: int = 32, head_size: int = 8, vocab: int = 64, **_: Any
) -> dict[str, Any]:
    """``config.json`` as published; for v5 without F, and with the head size in ``num_attention_heads``."""
    common = {
        "attention_hidden_size": D,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": D,
        "layer_norm_epsilon": 1e-5,
        "num_hidden_layers": layers,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocab,
    }
    if version == "4":
        return common | {
            "architectures": ["RwkvForCausalLM"],
            "context_length": 1024,
            "intermediate_size": 4 * D,
            "model_type": "rwkv",
        }
    if version == "6":
        return common | {
            "architectures": ["Rwkv6ForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_rwkv6.Rwkv6Config",
                "AutoModelForCausalLM": "modeling_rwkv6.Rwkv6ForCausalLM",
            },
            "head_size": head_size,
            "head_size_divisor": 8,
            "intermediate_size": None,
            "model_type": "rwkv6",
            "num_attention_heads": head_size,
        }
    if version == "7":
        return common | {
            "architectures": ["RWKV7ForCausalLM"],
            "attn": None,
            "head_dim": head_size,
            "hidden_act": "sqrelu",
            "model_type": "rwkv7",
            "norm_eps": 1e-5,  # and N times that the GroupNorm's
        }
    return common | {
        "architectures": ["Rwkv5ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_rwkv5.Rwkv5Config",
            "AutoModelForCausalLM": "modeling_rwkv5.Rwkv5ForCausalLM",
        },
        "head_size_divisor": 8,
        "intermediate_size": None,
        "model_type": "rwkv5",
        "model_version": version.replace(".", "_"),
        "num_attention_heads": head_size,
    }
