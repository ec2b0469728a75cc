"""Every method of peft on a tiny model, and what is promised of it: the rows of ``docs/peft.md``.

A method that is new in peft has to be named here before ``tests/test_peft_methods.py`` passes. Adapters get weights
other than those they start from, so that leaving one out shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from packaging.version import Version
from torch import Tensor, nn

from rwkv_rev import RwkvRevForCausalLM

BATCH, LENGTH = 2, 24
MAPS = ["key", "value"]
"""Linear maps of both mixes, two of which go to another width."""
CALL = [3, 4]
"""Tokens that call the activated adapter."""
TASKS = {"task_ids": torch.tensor([0, 1])}

Adapt = Callable[[RwkvRevForCausalLM, bool, Path], nn.Module]
"""Puts an adapter into a model; told whether it shall draw random numbers in training, and a folder for its files."""


class NotInThisPeft(Exception):
    """The installed peft is older than the method."""


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: as in the table.
        adapt: puts the adapter into a model.
        kinds: names of ``PeftType`` that it stands for.
        training: ``exact`` in every strategy, ``full only``, or ``refused``.
        evaluation: ``in chunks``, in ``one piece``, or ``refused``.
        generation: ``exact``, or ``refused`` with the state carried.
        draws: ``never``, where it has something random to switch on ``asked``, ``always`` in training.
        refusal: words of the error.
        inputs: further arguments of each call.
        note: a remark for the table.
        needs: a package that peft needs for it.
        since: the oldest peft with which it is tested; before, it was not there, or did not work by itself.
    """

    name: str
    adapt: Adapt
    kinds: tuple[str, ...] = ()
    training: str = "exact"
    evaluation: str = "in chunks"
    generation: str = "exact"
    draws: str = "never"
    refusal: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    needs: str = ""
    since: str = "0"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def adapted(
    method: Method, folder: Path, *, draws: bool = False, version: str = "5.2"
) -> tuple[RwkvRevForCausalLM, nn.Module]:
    """The model and peft's wrapper of it, in training mode and float64, where rounding hides nothing.

    Raises:
        NotInThisPeft, ImportError: if the installed packages do not have it.
    """
    if Version(peft.__version__) < Version(method.since):
        raise NotInThisPeft(f"{method.name} is tested from peft {method.since} on")
    if method.needs:
        import_module(method.needs)
    model = tiny_model(version)
    torch.manual_seed(0)
    wrapped = method.adapt(model, draws, folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, wrapped.double().train()


def made(method: Method, folder: Path, **options: Any) -> tuple[RwkvRevForCausalLM, nn.Module]:
    """:func:`adapted`; skips what the installed packages do not have."""
    try:
        return adapted(method, folder, **options)
    except (NotInThisPeft, ModuleNotFoundError) as error:
        pytest.skip(str(error))


def tokens() -> Tensor:
    """Text [B, T] with the call of the activated adapter, at places that chunks cut off."""
    ids = random_tokens(LENGTH, BATCH)
    ids[0, 5:7] = ids[1, 14:16] = torch.tensor(CALL)
    return ids


def settings_of(config: str, **settings: Any) -> peft.PeftConfig:
    """A configuration by its name, without settings that are None.

    Raises:
        NotInThisPeft: if the installed peft does not know it, or one of the settings.
    """
    kind = getattr(peft, config, None)
    if kind is None or not settings.keys() <= {of.name for of in fields(kind)}:
        raise NotInThisPeft(f"peft {peft.__version__} has no {config} with {', '.join(settings)}")
    return kind(**{name: value for name, value in settings.items() if value is not None})


def plain(config: str, drawing: dict[str, Any] | None = None, **settings: Any) -> Adapt:
    """An adapter by the name of its configuration; ``drawing`` are settings that make it draw."""

    def adapt(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
        chosen = (
            {"task_type": "CAUSAL_LM", "target_modules": MAPS} | settings | ((drawing or {}) if draws else {})
        )
        if chosen["target_modules"] is None:
            del chosen["target_modules"]
        return peft.get_peft_model(model, settings_of(config, **chosen))

    return adapt


def lora(**settings: Any) -> Adapt:
    return plain("LoraConfig", {"lora_dropout": 0.3}, **({"r": 4} | settings))


def virtual(config: str, **settings: Any) -> Adapt:
    """Virtual tokens before the text."""
    return plain(config, target_modules=None, num_virtual_tokens=3, **settings)


def two_loras(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    wrapped = lora()(model, draws, folder)
    wrapped.add_adapter("second", peft.LoraConfig(r=2, target_modules=["key"], task_type="CAUSAL_LM"))
    wrapped.base_model.set_adapter(["default", "second"])
    return wrapped


def lora_and_loha(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    first = peft.LoraConfig(r=4, target_modules=["key"], lora_dropout=0.3 if draws else 0.0)
    wrapped = peft.PeftMixedModel(model, first, "first")
    wrapped.add_adapter("second", peft.LoHaConfig(r=4, target_modules=["value"]))
    wrapped.set_adapter(["first", "second"])
    return wrapped


def merged(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    """LoRA added into the weights; the last norm is still trained."""
    wrapped = lora(init_lora_weights=False)(model, draws, folder)
    wrapped.merge_adapter()
    model.model.ln_out.requires_grad_(True)
    return wrapped


def switched_off(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    """LoRA that is there and does nothing; the last norm is trained."""
    wrapped = lora(init_lora_weights=False)(model, draws, folder)
    wrapped.base_model.disable_adapter_layers()
    model.model.ln_out.requires_grad_(True)
    return wrapped


def eva(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    wrapped = lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))(model, draws, folder)
    batches = [
        {"input_ids": random_tokens(LENGTH, BATCH, seed=seed), "attention_mask": torch.ones(BATCH, LENGTH)}
        for seed in (7, 8)
    ]
    peft.initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    return wrapped


def corda(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = settings_of(
        "LoraConfig",
        r=4,
        target_modules=MAPS,
        task_type="CAUSAL_LM",
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="kpm"),
    )

    @torch.no_grad()
    def read() -> None:
        model(random_tokens(LENGTH, seed=7))

    preprocess_corda(model, config, run_model=read)
    return peft.get_peft_model(model, config)


def lora_ga(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    if not hasattr(peft, "LoraGAConfig"):
        raise NotInThisPeft("LoraGAConfig")
    settings = {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}
    config = settings_of("LoraConfig", r=4, target_modules=MAPS, task_type="CAUSAL_LM", **settings)

    def step() -> None:
        ids = random_tokens(LENGTH, BATCH, seed=7)
        model(ids, labels=ids).loss.backward()

    peft.preprocess_loraga(model, config, step)
    return peft.get_peft_model(model, config)


def adamss(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    wrapped = plain("AdamssConfig", r=4, num_subspaces=2)(model, draws, folder)
    for module in model.modules():
        if hasattr(module, "adamss_A"):
            module.dtype = torch.float64  # to which it casts what it reads
    return wrapped


def expert(seed: int, folder: Path) -> str:
    """The folder of a LoRA that somebody trained before."""
    config = peft.LoraConfig(r=4, target_modules=MAPS, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(seed)
    path = folder / f"expert-{seed}"
    peft.get_peft_model(tiny_model("5.2"), config).save_pretrained(path)
    return str(path)


def arrow(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    """Two experts, to one of which each token goes, and a general one taken off them."""
    if not hasattr(peft, "create_arrow_model"):
        raise NotInThisPeft("create_arrow_model")
    experts = [expert(seed, folder) for seed in (1, 2, 3)]
    wrapped = peft.create_arrow_model(
        model,
        experts[:2],
        peft.ArrowConfig(top_k=1, use_gks=True, rng_seed=0),
        general_adapter_paths=experts[2:],
    )
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("task_" in name)
    return wrapped


def x_lora(model: RwkvRevForCausalLM, draws: bool, folder: Path) -> nn.Module:
    model.config.use_cache = False  # as it demands
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(seed): expert(seed, folder) for seed in (0, 1)},
        xlora_dropout_p=0.0,
        layerwise_scalings=True,
    )
    return peft.get_peft_model(model, config)


BLOCKS = {
    "target_modules_bd_a": ["key", "receptance"],
    "target_modules_bd_b": ["value", "output"],
    "nblocks": 2,
}
EMBEDDED = [*MAPS, "embeddings"]
CPT = {"cpt_token_ids": [1, 2, 3, 4], "cpt_tokens_type_mask": [1, 2, 3, 4], "cpt_mask": [1] * 4}
PER_CALL = "it draws once for a whole call, in chunks once for each chunk: another draw than under `full`"

METHODS = [
    # --- LoRA, its ways to begin, and its variants ---------------------------------------------------------------
    Method("LoRA", lora(target_modules="all-linear"), ("LORA",), draws="asked"),
    Method("LoRA, rank-stabilised", lora(use_rslora=True), draws="asked"),
    Method("LoRA, also on the head", lora(target_modules=[*EMBEDDED, "head"]), draws="asked"),
    Method("LoRA with biases", lora(bias="all", lora_bias=True)),
    Method(
        "LoRA of some layers", lora(layers_to_transform=[1], layers_pattern="blocks", rank_pattern={"key": 2})
    ),
    Method("LoRA, modules_to_save", lora(modules_to_save=["head", "embeddings", "ln1", "ln_x", "ln_out"])),
    Method("LoRA, cells to save", lora(target_modules=["head"], modules_to_save=["time_mix"])),
    Method("LoRA and new tokens", lora(trainable_token_indices=[3, 7])),
    Method("LoRA on weights", lora(target_modules=[], target_parameters=["key.weight"])),
    Method(
        "LoRA on cell weights",
        lora(target_modules=[], target_parameters=["time_mix.time_decay"]),
        training="full only",
        evaluation="one piece",
        refusal="in the place of a whole cell",
    ),
    Method("LoRA merged", merged),
    Method("LoRA switched off", switched_off),
    Method("LoRA twice", two_loras, draws="asked"),
    Method("LoRA with LoHa", lora_and_loha, draws="asked"),
    Method("PiSSA", lora(init_lora_weights="pissa")),
    Method("OLoRA", lora(init_lora_weights="olora")),
    Method("orthogonal LoRA", lora(init_lora_weights="orthogonal"), since="0.19"),
    Method("EVA", eva),
    Method("CorDA", corda, needs="attr"),
    Method("LoRA-GA", lora_ga),
    Method("MiCA", lora(init_lora_weights="mica", target_modules=EMBEDDED), since="0.21"),
    Method("DoRA", lora(use_dora=True, target_modules=EMBEDDED), draws="asked"),
    Method("KaSA", lora(kasa_config={})),
    Method("BD-LoRA", lora(use_bdlora=BLOCKS)),
    Method(
        "QALoRA",
        lora(use_qalora=True, qalora_group_size=4),
        note="on a linear layer that GPTQ has not quantised, which it is tested on, it is plain LoRA",
    ),
    Method("Arrow", arrow),
    Method("VeLoRA, random", lora(velora_config={"num_groups": 4, "init_type": "random"}), draws="asked"),
    Method("VeLoRA", lora(velora_config={"num_groups": 4}), training="full only", refusal="VeLoRA"),
    Method(
        "MonteCLoRA",
        lora(monteclora_config={"buffer_size": 5, "num_samples": 2}),
        training="full only",
        refusal="MonteCLoRA",
    ),
    Method(
        "activated LoRA",
        lora(alora_invocation_tokens=CALL),
        training="full only",
        evaluation="one piece",
        refusal="activated LoRA",
    ),
    Method(
        "X-LoRA",
        x_lora,
        ("XLORA",),
        training="full only",
        evaluation="one piece",
        generation="re-reads",
        refusal="X-LoRA",
    ),
    # --- other adapters of weights and activations ---------------------------------------------------------------
    Method(
        "AdaLoRA",
        plain(
            "AdaLoraConfig", {"lora_dropout": 0.3}, total_step=100, tinit=1, tfinal=1, target_r=2, init_r=4
        ),
        ("ADALORA",),
        draws="asked",
    ),
    Method("AdaMSS", adamss, ("ADAMSS",), needs="sklearn"),
    Method("BEFT", plain("BeftConfig"), ("BEFT",)),
    Method(
        "BOFT",
        plain("BOFTConfig", {"boft_dropout": 0.5}, boft_block_size=4),
        ("BOFT",),
        draws="asked",
        note=PER_CALL,
    ),
    Method("Bone", plain("BoneConfig", r=4), ("BONE",), note="in older peft; its successor is MiSS"),
    Method("C3A", plain("C3AConfig", block_size=8), ("C3A",)),
    Method("DEFT", plain("DeftConfig", {"deft_dropout": 0.3}, r=4), ("DEFT",), draws="asked"),
    Method("DeLoRA", plain("DeloraConfig", {"module_dropout": 0.3}, r=4), ("DELORA",), draws="asked"),
    Method("FourierFT", plain("FourierFTConfig", n_frequency=40, scaling=10.0), ("FOURIERFT",)),
    Method("FRoD", plain("FrodConfig", {"frod_dropout": 0.3}, progressbar=False), ("FROD",), draws="asked"),
    Method("GLoRA", plain("GloraConfig", r=4), ("GLORA",)),
    Method(
        "GraLoRA",
        plain("GraloraConfig", {"gralora_dropout": 0.3}, r=4, hybrid_r=2),
        ("GRALORA",),
        draws="asked",
    ),
    Method(
        "HiRA",
        plain("HiraConfig", {"hira_dropout": 0.3}, r=4, target_modules=EMBEDDED),
        ("HIRA",),
        draws="asked",
    ),
    Method("HRA", plain("HRAConfig", r=4), ("HRA",), since="0.19"),
    Method("IA3", plain("IA3Config", feedforward_modules=["value"]), ("IA3",)),
    Method(
        "Lily",
        plain("LilyConfig", r=4),
        ("LILY",),
        training="full only",
        evaluation="one piece",
        generation="refused",
        refusal="Lily",
    ),
    Method(
        "LN tuning",
        plain("LNTuningConfig", target_modules=["ln0", "ln1", "ln2", "ln_x", "ln_out"]),
        ("LN_TUNING",),
    ),
    Method(
        "LoHa",
        plain("LoHaConfig", {"rank_dropout": 0.3, "module_dropout": 0.3}, r=4),
        ("LOHA",),
        draws="asked",
        note=PER_CALL,
    ),
    Method(
        "LoKr",
        plain("LoKrConfig", {"rank_dropout": 0.3, "module_dropout": 0.3}, r=4),
        ("LOKR",),
        draws="asked",
        note=PER_CALL,
    ),
    Method("MiSS", plain("MissConfig", {"miss_dropout": 0.3}, r=4), ("MISS",), draws="asked"),
    Method("MiSS, Bat", plain("MissConfig", r=4, init_weights="bat")),
    Method("MiSS, mini", plain("MissConfig", r=4, mini_r=2, init_weights="mini")),
    Method(
        "OFT",
        plain("OFTConfig", oft_block_size=4, module_dropout=0.5, target_modules=EMBEDDED),
        ("OFT",),
        since="0.19",
    ),
    Method(
        "OFT, coft",
        plain("OFTConfig", oft_block_size=4, coft=True, eps=0.5),
        training="full only",
        refusal="OFT with coft",
        since="0.19",
    ),
    Method("OSF", plain("OSFConfig"), ("OSF",)),
    Method("PEANuT", plain("PeanutConfig", r=4), ("PEANUT",)),
    Method(
        "Poly",
        plain("PolyConfig", r=4, n_tasks=2, n_skills=2),
        ("POLY",),
        draws="always",
        inputs=TASKS,
        note=f"{PER_CALL}; with task_ids and a loss of your own: full only",
    ),
    Method("PSOFT", plain("PsoftConfig", {"psoft_dropout": 0.3}, r=4), ("PSOFT",), draws="asked"),
    Method("PVeRA", plain("PveraConfig", {"pvera_dropout": 0.3}, r=8), ("PVERA",), draws="always"),
    Method(
        "PVeRA, generator_seed",
        plain("PveraConfig", r=8, generator_seed=3),
        training="full only",
        refusal="PVeRA",
    ),
    Method("RandLoRA", plain("RandLoraConfig", {"randlora_dropout": 0.3}, r=4), ("RANDLORA",), draws="asked"),
    Method("RoAd", plain("RoadConfig", group_size=4), ("ROAD",)),
    Method("RoAd, variant 4", plain("RoadConfig", group_size=4, variant="road_4")),
    Method(
        "ShadowPEFT",
        plain("ShadowConfig", target_modules=r".*\.blocks\.\d+", shadow_dropout=0.0),
        ("SHADOW",),
        training="full only",
        evaluation="one piece",
        generation="refused",
        refusal="ShadowPEFT",
    ),
    Method("SHiRA", plain("ShiraConfig", r=2), ("SHIRA",)),
    Method(
        "SuperTuning",
        plain("SupertuningConfig", {"lora_dropout": 0.3}, sparsity=0.9, r=4),
        ("SUPERTUNING",),
        draws="asked",
    ),
    Method(
        "TinyLoRA",
        plain("TinyLoraConfig", {"tinylora_dropout": 0.3}, u=8, target_modules=EMBEDDED),
        ("TINYLORA",),
        draws="asked",
    ),
    Method(
        "trainable tokens",
        plain("TrainableTokensConfig", target_modules=["embeddings"], token_indices=[3, 7]),
        ("TRAINABLE_TOKENS",),
    ),
    Method(
        "Uni-LoRA",
        plain("UniLoraConfig", {"unilora_dropout": 0.3}, r=4, theta_d_length=32),
        ("UNILORA",),
        draws="asked",
    ),
    Method(
        "VB-LoRA",
        plain("VBLoRAConfig", {"vblora_dropout": 0.3}, r=4, num_vectors=8, vector_length=8),
        ("VBLORA",),
        draws="asked",
    ),
    Method("VeRA", plain("VeraConfig", {"vera_dropout": 0.3}, r=8), ("VERA",), draws="asked"),
    Method("WaveFT", plain("WaveFTConfig", n_frequency=40), ("WAVEFT",)),
    # --- virtual tokens ------------------------------------------------------------------------------------------
    Method("prompt tuning", virtual("PromptTuningConfig"), ("PROMPT_TUNING",)),
    Method(
        "multitask prompts",
        virtual("MultitaskPromptTuningConfig", num_tasks=2),
        ("MULTITASK_PROMPT_TUNING",),
        inputs=TASKS,
    ),
    Method("P-tuning", virtual("PromptEncoderConfig", encoder_hidden_size=8), ("P_TUNING",)),
    Method(
        "CPT",
        plain("CPTConfig", target_modules=None, **CPT),
        ("CPT",),
        training="full only",
        refusal="return_logits",
        inputs={"return_logits": True},
        note="pass `return_logits=True` beside labels: CPT computes its loss from logits",
    ),
    Method(
        "prefix tuning",
        virtual("PrefixTuningConfig"),
        ("PREFIX_TUNING",),
        training="refused",
        evaluation="refused",
        generation="refused",
        refusal="keys and values",
        since="0.19",
    ),
    Method(
        "Cartridge",
        virtual("CartridgeConfig"),
        ("CARTRIDGE",),
        training="refused",
        evaluation="refused",
        generation="refused",
        refusal="keys and values",
    ),
    Method(
        "adaption prompt",
        plain("AdaptionPromptConfig", target_modules=None, adapter_len=2, adapter_layers=1),
        ("ADAPTION_PROMPT",),
        training="refused",
        evaluation="refused",
        generation="refused",
        refusal="adaption prompt",
    ),
]
