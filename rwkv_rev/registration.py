"""Making transformers' Auto classes know this package, without making ``import rwkv_rev`` slow.

Each table of transformers is filled as soon as its module is loaded, before or after this package, and so are peft's
default layers. Models are entered by their names, as transformers enters its own: the package stands where a model's
module is looked for, ``transformers.models.rwkv_rev``, and its names are loaded when first asked for. So nothing of
ours is imported in the middle of an import of transformers but the configuration and the tokenizers, which need little.

Label smoothing in Trainer, its count of predicted tokens, and what peft does around a call, go wrong with our models in
silence: these functions are wrapped, likewise as soon as they are there. It happens once, also where this package is
loaded again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODEL_TYPE = "rwkv_rev"
_REPLACING = "transformers.processing_utils"  # runs transformers anew, in the place of the first
_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_TOKENIZERS = "transformers.models.auto.tokenization_auto"
_TRAINER = "transformers.trainer"
_TARGETS = "peft.utils.constants"
_ADAPTED = "peft.peft_model"
_WRAPPED = "_wrapped_by_rwkv_rev"


def install() -> None:
    """Register what is loaded already, and the rest when it is."""
    sys.modules[f"transformers.models.{MODEL_TYPE}"] = sys.modules["rwkv_rev"]
    for module, register in (
        ("transformers", register_name),
        (_REPLACING, register_name),
        (_CONFIGURATIONS, register_configuration),
        (_MODELS, register_models),
        (_TOKENIZERS, register_tokenizers),
        (_TRAINER, register_targets),
        (_TARGETS, register_target_modules),
        (_ADAPTED, register_end_of_call),
    ):
        known = any(_registers(finder, module) for finder in sys.meta_path)
        if module in sys.modules:
            register()
        elif not known:
            sys.meta_path.insert(0, _RegisterAfterImport(module, register))


def register_name() -> None:
    """Let ``transformers.RwkvRevForCausalLM`` be ours.

    trl and pipelines so look up what a configuration names as its architecture, to load a model by its path.
    """
    sys.modules["transformers"]._class_to_module["RwkvRevForCausalLM"] = f"models.{MODEL_TYPE}"


def register_configuration() -> None:
    """Let ``AutoConfig`` know ``model_type`` ``rwkv_rev``."""
    from rwkv_rev.configuration import RwkvRevConfig

    sys.modules[_CONFIGURATIONS].AutoConfig.register(MODEL_TYPE, RwkvRevConfig, exist_ok=True)


def register_models() -> None:
    """Let ``AutoModel`` and ``AutoModelForCausalLM`` know the classes; base models are known as such by their names."""
    auto = sys.modules[_MODELS]
    for names, classes, name in (
        (auto.MODEL_MAPPING_NAMES, auto.MODEL_MAPPING, "RwkvRevModel"),
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING, "RwkvRevForCausalLM"),
    ):
        names[MODEL_TYPE] = name
        classes._reverse_config_mapping["RwkvRevConfig"] = MODEL_TYPE


def register_tokenizers() -> None:
    """Let ``AutoTokenizer`` know our tokenizers by name, and the world tokenizer as that of a configuration."""
    from rwkv_rev.configuration import RwkvRevConfig
    from rwkv_rev.tokenization.byte_level import RwkvByteTokenizer
    from rwkv_rev.tokenization.world import RwkvWorldTokenizer

    auto = sys.modules[_TOKENIZERS].AutoTokenizer
    for tokenizer in (RwkvByteTokenizer, RwkvWorldTokenizer):  # the last one stays the configuration's
        auto.register(RwkvRevConfig, tokenizer_class=tokenizer, exist_ok=True)


def register_targets() -> None:
    """Let ``Trainer`` know what our models predict: :mod:`rwkv_rev.label_smoothing`, :mod:`rwkv_rev.predicted_tokens`.

    What needs the model is imported by the first call.
    """
    kind = sys.modules[_TRAINER].Trainer
    if _wrapped_before(kind):
        return
    compute_loss, count = kind.compute_loss, kind._get_num_items_in_batch

    @wraps(compute_loss)
    def compute(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.label_smoother is None:
            return compute_loss(trainer, *args, **kwargs)
        from rwkv_rev.label_smoothing import of_the_next_token

        return of_the_next_token(compute_loss, trainer, *args, **kwargs)

    @wraps(count)
    def count_predicted(trainer: Any, batch_samples: list, *args: Any, **kwargs: Any) -> Any:
        from rwkv_rev.predicted_tokens import with_targets

        return count(trainer, with_targets(trainer, batch_samples), *args, **kwargs)

    kind.compute_loss, kind._get_num_items_in_batch = compute, count_predicted


def _wrapped_before(kind: type) -> bool:
    """Whether functions of a class were wrapped already, by this package or by one that a reload replaced.

    The class is marked, not its functions, around which others may have put theirs.
    """
    before = _WRAPPED in vars(kind)
    setattr(kind, _WRAPPED, True)
    return before


def register_target_modules() -> None:
    """Let peft know which layers its methods adapt unless ``target_modules`` says so: what the architectures name.

    peft looks them up by the kind of the configuration, which is the same for all of these.
    """
    from rwkv_rev.architectures.registry import architectures

    known = architectures()

    def of_all(*each: tuple[str, ...]) -> list[str]:
        return list(dict.fromkeys(target for targets in each for target in targets))

    constants = sys.modules[_TARGETS]
    for name, targets in vars(constants).items():
        method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_TARGET_MODULES_MAPPING")
        if not isinstance(targets, dict) or f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING" != name:
            continue
        if method == "LNTUNING":
            layers = of_all(*(one.targets.norms for one in known))
        elif method in ("VERA", "PVERA", "FROD"):
            layers = of_all(*(one.targets.square for one in known))
        elif method == "BEFT":  # of biases, which there are none of
            continue
        elif method == "IA3":  # keys, values, and what goes into the map out of the channel mix
            layers = of_all(*(one.targets.scaled for one in known))
        else:
            layers = of_all(*(one.lora_targets for one in known))
        targets.setdefault(MODEL_TYPE, layers)
    feedforward = getattr(constants, "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING", {})
    feedforward.setdefault(MODEL_TYPE, of_all(*(one.targets.scaled_inputs for one in known)))


def register_end_of_call() -> None:
    """Let peft take off the hooks that it puts on layers for one call (``adapter_names``) where that ends in an error.

    It does so after a call that succeeds. Hooks that stay would go on choosing adapters in the calls after it.
    """
    adapted = sys.modules[_ADAPTED].PeftModel
    if _wrapped_before(adapted):
        return
    hooks_of_call = adapted._enable_peft_forward_hooks

    @contextmanager
    @wraps(hooks_of_call)
    def enabled(*args: Any, **kwargs: Any) -> Iterator[None]:
        hooks = hooks_of_call(*args, **kwargs)
        hooks.__enter__()
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)  # as after success, whatever has happened

    adapted._enable_peft_forward_hooks = enabled


def _registers(finder: Any, module: str) -> bool:
    """Whether a finder is ours for that module; by name, since it may be of a package that a reload replaced."""
    return type(finder).__name__ == _RegisterAfterImport.__name__ and finder.module == module


class _RegisterAfterImport(MetaPathFinder):
    """Runs ``register`` right after ``module`` was imported; many ask whether it is there long before that."""

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module = module
        self._register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            self._register()

        loader.exec_module = execute_and_register
        return spec
