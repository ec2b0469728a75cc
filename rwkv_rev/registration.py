"""Making transformers' Auto classes know this package, without making ``import rwkv_rev`` slow.

``AutoConfig`` and the tokenizers are registered as soon as transformers' Auto configuration is loaded, before or
after this package; the models when the first :class:`RwkvRevConfig` is made, which is before any model can be.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Register the configuration now if transformers' registry is loaded, else when it is."""
    if _CONFIGURATIONS in sys.modules:
        register_configuration()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


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


class _RegisterAfterImport(MetaPathFinder):
    """Runs :func:`register_configuration` right after transformers' registry of configurations was imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CONFIGURATIONS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register_configuration()

        loader.exec_module = execute_and_register
        return spec
