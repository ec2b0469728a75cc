"""What transformers decides by names that only registration can fill."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from bptt_cases import english, random_tokens, relative_error, tiny_model
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

import rwkv_rev
from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM

EPSILON = 0.1


class Rows(Dataset):
    """Rows [64] of English bytes."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def trainer(model: RwkvRevForCausalLM, folder: Path, tokens: Tensor, **arguments: object) -> Trainer:
    settings = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True} | arguments
    rows = Rows(tokens)
    return Trainer(
        model=model, args=TrainingArguments(folder, **settings), train_dataset=rows, eval_dataset=rows
    )


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Label smoothing written out: each position predicts the next token."""
    log_p = logits[:, :-1].double().log_softmax(-1)
    likelihood = log_p.gather(-1, labels[:, 1:, None]).mean()
    return -(1 - EPSILON) * likelihood - EPSILON * log_p.mean()


@pytest.fixture
def model(bundled: dict[str, Path]) -> RwkvRevForCausalLM:
    return RwkvRevForCausalLM.from_pretrained(bundled["4"], dtype=torch.float32).train()


def test_label_smoothing_predicts_the_next_token(model: RwkvRevForCausalLM, tmp_path: Path) -> None:
    """Trainer's loss and gradient are those of smoothing written out, and near the plain loss to begin with."""
    tokens = english(64, batch=4)
    made = trainer(model, tmp_path, tokens, label_smoothing_factor=EPSILON)
    loss = made.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = smoothed_loss(model(tokens).logits, tokens)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert relative_error(found[name], parameter.grad) < 1e-4, name
    plain = model(tokens, labels=tokens).loss.item()
    with torch.no_grad():
        uniform = -model(tokens).logits[:, :-1].log_softmax(-1).mean().item()
    assert loss.item() == pytest.approx((1 - EPSILON) * plain + EPSILON * uniform, rel=1e-5)


def test_reloading_shifts_no_label_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "compute_loss", Trainer.compute_loss)  # to be put back
    monkeypatch.setattr(
        PeftModel, "_enable_peft_forward_hooks", vars(PeftModel)["_enable_peft_forward_hooks"]
    )
    model, tokens = tiny_model("5.2", dtype=torch.float64), random_tokens(23, batch=2)
    made = trainer(model, tmp_path, tokens, label_smoothing_factor=EPSILON)
    expected = smoothed_loss(model(tokens).logits, tokens).item()
    enabled = PeftModel._enable_peft_forward_hooks
    for _ in range(2):
        importlib.reload(rwkv_rev)
        found = made.compute_loss(model, {"input_ids": tokens, "labels": tokens})
        assert found.item() == pytest.approx(expected, rel=1e-6)
        assert PeftModel._enable_peft_forward_hooks is enabled


def copied(model: RwkvRevForCausalLM, tokens: Tensor) -> float:
    """Share of positions that predict the token that stands there."""
    with torch.no_grad():
        return (model(tokens).logits.argmax(-1) == tokens).double().mean().item()


@pytest.mark.parametrize("registered", [True, False], ids=["registered", "not registered"])
def test_training_with_label_smoothing_does_not_copy(
    model: RwkvRevForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: bool
) -> None:
    """Some steps of a real Trainer; where it does not know the model, it trains to copy."""
    if not registered:
        monkeypatch.delitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "rwkv_rev")
        monkeypatch.setattr(Trainer, "compute_loss", Trainer.compute_loss.__wrapped__)
    tokens = english(64, batch=8)
    before = copied(model, tokens)  # of repeated letters
    assert before < 0.25
    made = trainer(
        model,
        tmp_path,
        tokens,
        label_smoothing_factor=EPSILON,
        learning_rate=4e-3,
        max_steps=6,
        per_device_train_batch_size=8,
        logging_steps=1,
    )
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert (losses[0] < 3) == registered
    assert copied(model, tokens) < before + 0.1 if registered else copied(model, tokens) > before + 0.4


def test_trainer_evaluates_with_label_smoothing(model: RwkvRevForCausalLM, tmp_path: Path) -> None:
    tokens = english(64, batch=4)
    made = trainer(model, tmp_path, tokens, label_smoothing_factor=EPSILON, per_device_eval_batch_size=4)
    assert made.label_names == ["labels"]
    found = made.evaluate()["eval_loss"]
    model.eval()
    with torch.no_grad():
        assert found == pytest.approx(smoothed_loss(model(tokens).logits, tokens).item(), rel=1e-5)


def test_predictions_hold_logits_only(tmp_path: Path) -> None:
    """State and report are no predictions."""
    model, tokens = tiny_model("5.2"), random_tokens(12, batch=3)

    class Unlabelled(Rows):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": self.tokens[index]}

    made = trainer(model, tmp_path, tokens)
    predictions = made.predict(Unlabelled(tokens)).predictions
    model.eval()
    torch.testing.assert_close(torch.from_numpy(predictions), model(tokens).logits.detach())


def test_lookups_by_configuration_are_as_before(bundled: dict[str, Path]) -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["rwkv_rev"] == "RwkvRevForCausalLM"
    assert RwkvRevConfig in MODEL_FOR_CAUSAL_LM_MAPPING
    assert MODEL_FOR_CAUSAL_LM_MAPPING[RwkvRevConfig] is RwkvRevForCausalLM
    assert MODEL_FOR_CAUSAL_LM_MAPPING.get(RwkvRevConfig, None) is RwkvRevForCausalLM
    config = RwkvRevConfig.from_pretrained(bundled["4"])
    assert type(AutoModelForCausalLM.from_config(config)) is RwkvRevForCausalLM


def test_the_architecture_that_a_configuration_names_is_found(bundled: dict[str, Path]) -> None:
    """As trl looks it up to load a model by its path."""
    (name,) = RwkvRevConfig.from_pretrained(bundled["4"]).architectures
    assert getattr(transformers, name) is RwkvRevForCausalLM


def test_pipeline(bundled: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.pipelines.base.logger.error", lambda text, *_: said.append(text))
    made = pipeline(
        "text-generation",
        model=AutoModelForCausalLM.from_pretrained(bundled["4"], dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(bundled["4"]),
    )
    text = made("The ", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert len(text) == 4
    assert not said  # that the model is not supported


CONFIGURATION_ALONE = """
import pickle
given = pickle.loads(bytes.fromhex(sys.argv[2]))
ours = {name.removeprefix("rwkv_rev.") for name in sys.modules if name.startswith("rwkv_rev")}
needed = {"rwkv_rev", "architectures", "architectures.registry", "configuration", "registration", "version"}
assert ours == needed, ours
from transformers import AutoConfig
# the first configuration imports the architecture that it names, and no other
assert AutoConfig.for_model("rwkv_rev", hidden_size=64, num_attention_heads=1).architecture.version == "5.2"
assert "rwkv_rev.architectures.rwkv5" in sys.modules and "rwkv_rev.architectures.rwkv4" not in sys.modules
"""
ORDERS = {
    "ours first": "import importlib.util, rwkv_rev; assert importlib.util.find_spec('transformers')\n"
    "import transformers.processing_utils\n"
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    "assert 'rwkv_rev.modeling' not in sys.modules  # loaded when it is used",
    "transformers first": "from transformers import AutoModel, AutoTokenizer; import rwkv_rev",
    "our model first": "from rwkv_rev import RwkvRevForCausalLM",
    "a pickled configuration": CONFIGURATION_ALONE,
}
PURGE = """
for name in [name for name in sys.modules if name.split(".")[0] == "rwkv_rev"]:
    del sys.modules[name]
import rwkv_rev
importlib.reload(rwkv_rev)
"""
WRAPPED = """
from transformers import Trainer
from peft import PeftModel
def layers(function):
    return 1 + layers(function.__wrapped__) if hasattr(function, "__wrapped__") else 0
assert [layers(Trainer.compute_loss), layers(Trainer._get_num_items_in_batch)] == [1, 1]
assert layers(PeftModel._enable_peft_forward_hooks) == 3  # of contextmanager's two
"""
OLDER = """
from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM
from transformers import Trainer, TrainingArguments
class Mine(RwkvRevForCausalLM):
    pass
torch.manual_seed(0)
config = RwkvRevConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, head_size=8, num_attention_heads=2)
model = Mine(config).double()
model.set_bptt("reversible", chunk_length=4)
arguments = TrainingArguments(sys.argv[1] + "/made", label_smoothing_factor=0.1, report_to=[], use_cpu=True)
made = Trainer(model, arguments, train_dataset=[1])
ids = torch.arange(12)[None] % 5
batch = {"input_ids": ids, "labels": ids, "attention_mask": (ids < 4).long()}
def found():
    return made.compute_loss(model, dict(batch)).item(), made._get_num_items_in_batch([batch], "cpu").item()
before = found()
"""
"""A model of classes that a reload replaced."""
QUESTIONS = {
    "config": "assert type(transformers.AutoConfig.from_pretrained(folder)).__name__ == 'RwkvRevConfig'",
    "tokenizer": "assert type(transformers.AutoTokenizer.from_pretrained(folder)).__name__ == 'RwkvByteTokenizer'",
    "base": "assert type(transformers.AutoModel.from_pretrained(folder)).__name__ == 'RwkvRevModel'",
    "model": "assert type(transformers.AutoModelForCausalLM.from_config(given or transformers.AutoConfig"
    ".from_pretrained(folder))).__name__ == 'RwkvRevForCausalLM'",
    "name": "assert transformers.RwkvRevForCausalLM.__module__ == 'rwkv_rev.modeling'",
}
IN_CHILDREN = """
import importlib.util, os, sys
import accelerate, huggingface_hub.hf_api, jinja2, psutil, regex, tokenizers, torch  # what all of them need, once
import torch._dynamo, torch.distributed.checkpoint, torch.nn.attention.flex_attention
for name in ("scipy.optimize", "PIL.ImageOps"):
    if importlib.util.find_spec(name.split(".")[0]):
        importlib.import_module(name)
folder, given = sys.argv[1], None
assert not {"transformers", "rwkv_rev"} & {*sys.modules}
failed = 0
for script in sys.argv[3:]:
    if child := os.fork():
        failed |= os.waitpid(child, 0)[1]
        continue
    try:
        exec(script)
    except BaseException as error:
        print(script, repr(error), sep="\\n", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
sys.exit(failed != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="one interpreter is forked for each order")
def test_auto_classes_know_ours_in_any_order(bundled: dict[str, Path]) -> None:
    """In a fresh process, whatever is imported first and asked for first; and importing them imports no model.

    Loading this package anew wraps nothing twice, and changes nothing for models that are there.
    """
    scripts = []
    for order, first in zip(ORDERS, ["tokenizer", "base", "config", "name"], strict=True):
        others = [question for name, question in QUESTIONS.items() if name != first]
        scripts.append("\n".join([ORDERS[order], "import transformers", QUESTIONS[first], *others]))
    scripts.append("import rwkv_rev" + PURGE + WRAPPED)
    scripts.append(OLDER + PURGE + WRAPPED + "assert found() == before, (found(), before)")
    config = pickle.dumps(RwkvRevConfig.from_pretrained(bundled["4"])).hex()
    done = subprocess.run(
        [sys.executable, "-c", IN_CHILDREN, str(bundled["4"]), config, *scripts],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_import_alone_loads_nothing_heavy() -> None:
    """Not even transformers, which takes seconds."""
    script = (
        "import sys, rwkv_rev\n"
        "assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
