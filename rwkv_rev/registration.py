"""Making transformers' Auto classes know this package, without making ``import rwkv_rev`` slow.

``AutoConfig`` and the tokenizers are registered as soon as transformers' Auto configuration is loaded, before or
after this package, and peft's default layers with peft; the models when the first :class:`RwkvRevConfig` is made,
which is before any model can be.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_TARGETS = "peft.utils.constants"


def install() -> None:
    """Register what is loaded already, and the rest when it is."""
    for module, register in ((_CONFIGURATIONS, register_configuration), (_TARGETS, register_target_modules)):
        known = any(isinstance(f, _RegisterAfterImport) and f.module == module for f in sys.meta_path)
        if module in sys.modules:
            register()
        elif not known:
            sys.meta_path.insert(0, _RegisterAfterImport(module, register))


def register_configuration() -> None:
    """Let ``AutoConfig`` know ``model_type`` ``rwkv_rev``."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from rwkv_rev.configuration import RwkvRevConfig

    AutoConfig.register(RwkvRevConfig.model_type, RwkvRevConfig, exist_ok=True)


def register_models() -> None:
    """Let ``AutoModel``, ``AutoModelForCausalLM`` and ``AutoTokenizer`` know the classes; cheap when repeated."""
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    import rwkv_rev.tokenization  # noqa: F401  (registers its tokenizers)
    from rwkv_rev.configuration import RwkvRevConfig
    from rwkv_rev.modeling import RwkvRevForCausalLM, RwkvRevModel

    register_configuration()
    AutoModel.register(RwkvRevConfig, RwkvRevModel, exist_ok=True)
    AutoModelForCausalLM.register(RwkvRevConfig, RwkvRevForCausalLM, exist_ok=True)
    # Trainer's label smoothing shifts the labels of models that are named here, and of no others; and base models are
    # known as such by their names
    MODEL_MAPPING_NAMES[RwkvRevConfig.model_type] = RwkvRevModel.__name__
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[RwkvRevConfig.model_type] = RwkvRevForCausalLM.__name__
    # trl looks up what a configuration names as its architecture, to load a model by its path
    setattr(transformers, RwkvRevForCausalLM.__name__, RwkvRevForCausalLM)


def register_target_modules() -> None:
    """Let peft know which layers its methods adapt unless ``target_modules`` says so: the linear maps of both cells.

    Methods that need maps of one shape get those that map D to D.
    """
    constants = sys.modules[_TARGETS]
    for name, targets in vars(constants).items():
        method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_TARGET_MODULES_MAPPING")
        if not isinstance(targets, dict) or f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING" != name:
            continue
        if method == "LNTUNING":
            layers = ["ln1", "ln2"]
        elif method in ("VERA", "PVERA", "FROD"):
            layers = ["receptance", "output"]
        elif method == "BEFT":  # of biases, which there are none of
            continue
        elif method == "IA3":  # keys, values, and what goes into the map out of the channel mix
            layers = ["time_mix.key", "time_mix.value", "channel_mix.value"]
        else:
            layers = ["receptance", "key", "value", "gate", "output"]
        targets.setdefault("rwkv_rev", layers)
    feedforward = getattr(constants, "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING", {})
    feedforward.setdefault("rwkv_rev", ["channel_mix.value"])


class _RegisterAfterImport(MetaPathFinder):
    """Runs ``register`` right after ``module`` was imported."""

    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module = module
        self._register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self._register()

        loader.exec_module = execute_and_register
        return spec
