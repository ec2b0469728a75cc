"""The Hugging Face classes: loading, padding, carried state, settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    VERSIONS,
    checkpoint_blocks,
    english,
    load,
    random_like,
    random_state,
    random_tokens,
    relative_error,
    tiny_model,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging

from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM, RwkvRevModel, RwkvRevState
from rwkv_rev.bptt_settings import BpttSettings
from rwkv_rev.errors import StrategyError

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative RMS error between two ways through the same arithmetic."""


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= CLOSE[expected.dtype]


def assert_states_close(found: RwkvRevState, expected: RwkvRevState) -> None:
    for a, b in zip(found.tensors(), expected.tensors(), strict=True):
        assert_close(a, b)


def evaluated(version: str, dtype: torch.dtype = torch.float64, **config: Any) -> RwkvRevForCausalLM:
    return tiny_model(version, dtype=dtype, **config).eval()


# --- saving, loading, Auto classes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip(version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every tensor and every setting comes back; decays stay float32 in half precision."""
    model = tiny_model(version)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is RwkvRevForCausalLM
    changes = {"dtype", "_name_or_path"}
    found, expected = loaded.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in found.items() if k not in changes} == {
        k: v for k, v in expected.items() if k not in changes
    }
    parameters = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        strict = name.endswith(model.config.architecture.float32)
        assert parameters[name].dtype == (torch.float32 if strict else dtype), name
        assert torch.equal(parameters[name], parameter.to(parameters[name].dtype)), name


def test_auto_classes(tmp_path: Path) -> None:
    model = tiny_model("5.2")
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is RwkvRevConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is RwkvRevForCausalLM
    assert type(AutoModelForCausalLM.from_config(model.config)) is RwkvRevForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is RwkvRevModel
    tokens = random_tokens(9)
    expected = model.model(tokens)
    assert torch.equal(base(tokens).last_hidden_state, expected.last_hidden_state)


def test_sharded_round_trip(tmp_path: Path) -> None:
    model = tiny_model("5.1")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = RwkvRevForCausalLM.from_pretrained(tmp_path)
    tokens = random_tokens(9)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("version", VERSIONS)
def test_fresh_models_train(version: str) -> None:
    """A model made from a configuration alone predicts uniformly and gets finite gradients."""
    torch.manual_seed(0)
    heads = 1 if version == "4" else 2
    config = RwkvRevConfig(
        rwkv_version=version,
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=heads,
        head_size=16 // heads,
        intermediate_size=32,
        bonus_is_exponential=version == "5.0",
    )
    model, tokens = RwkvRevForCausalLM(config), random_tokens(20)
    model.set_bptt("auto", chunk_length=8)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert 2 < loss.item() < 6
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_configuration_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="num_attention_heads"):
        RwkvRevConfig(num_attention_heads=3)


# --- padding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", ["left", "right", "holes"])
@pytest.mark.parametrize("version", VERSIONS)
def test_padded_rows_are_as_alone(version: str, places: str) -> None:
    """Logits and state of a row do not depend on padding, holes or neighbours."""
    model, lengths, width = evaluated(version), (21, 8, 1), 25
    state = random_state(model, 3)
    batch, mask = random_tokens(width, batch=3), torch.zeros(3, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(row))[:length].sort().values
        where = {"left": torch.arange(width - length, width), "right": torch.arange(length), "holes": order}[
            places
        ]
        mask[row, where] = 1
    found = model(batch, attention_mask=mask, state=state)
    with torch.no_grad():
        model.set_bptt("auto", chunk_length=6)
        streamed = model(batch, attention_mask=mask, state=state)
        model.set_bptt("auto", chunk_length=1024)
    for row in range(3):
        index = torch.tensor([row])
        where = mask[row].bool()
        alone = model(batch[row, where][None], state=state.rows(index))
        for output in (found, streamed):
            assert_close(output.logits[row, where], alone.logits[0])
            assert_states_close(output.state.rows(index), alone.state)


def test_a_mask_of_ones_is_no_mask() -> None:
    model, tokens = evaluated("5.2"), random_tokens(20, batch=2)
    assert torch.equal(model(tokens).logits, model(tokens, attention_mask=torch.ones_like(tokens)).logits)


# --- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_token_by_token_equals_one_forward(version: str) -> None:
    model, tokens = evaluated(version), random_tokens(30, batch=2)
    whole = model(tokens)
    state, logits = None, []
    for token in tokens.split(1, dim=1):
        output = model(token, state=state)
        state = output.state
        logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), whole.logits)
    assert_states_close(state, whole.state)


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_token_by_token_in_float32(bundled: dict[str, Path], version: str) -> None:
    """The bundled checkpoints, in the arithmetic they are used in."""
    model, tokens = load(bundled[version]).eval(), english(60)
    with torch.no_grad():
        whole, state, logits = model(tokens), None, []
        for token in tokens.split(1, dim=1):
            output = model(token, state=state)
            state = output.state
            logits.append(output.logits)
    assert_close(torch.cat(logits, dim=1), whole.logits)
    assert_states_close(state, whole.state)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("version", VERSIONS)
def test_streaming_without_gradients(version: str, chunk: int) -> None:
    """Under ``no_grad`` long contexts run in chunks: same logits, states and residual streams."""
    model, tokens = evaluated(version, chunk_length=chunk), random_tokens(45, batch=2)
    whole = model(tokens, output_hidden_states=True)
    with torch.no_grad():
        streamed = model(tokens, output_hidden_states=True)
    assert_close(streamed.logits, whole.logits)
    assert_states_close(streamed.state, whole.state)
    assert len(streamed.hidden_states) == model.config.num_hidden_layers + 1
    for found, expected in zip(streamed.hidden_states, whole.hidden_states, strict=True):
        assert_close(found, expected)


def test_the_table_of_the_state_is_in_its_order() -> None:
    """In which the class takes the tensors."""
    page = (Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
    table = page.partition("| field | shape | |\n|---|---|---|\n")[2].partition("\n\n")[0]
    fields = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert tuple(fields) == RwkvRevState.names()


def test_state_rows_and_shapes() -> None:
    model = evaluated("5.2")
    state = random_state(model, 3)
    assert state.batch_size == 3
    assert state.time_shift.shape == state.channel_shift.shape == (2, 3, 16)
    assert state.wkv.shape == (2, 3, 2, 8, 8)
    assert torch.equal(state.rows(torch.tensor([2, 0])).wkv, state.wkv[:, [2, 0]])
    with pytest.raises(ValueError, match="3 rows, the input has 2"):
        model(random_tokens(5, batch=2), state=state)


def test_embeddings_instead_of_ids() -> None:
    model, tokens = evaluated("5.2"), random_tokens(12)
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(tokens).logits)
    for arguments in ({}, {"input_ids": tokens, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**arguments)


def test_logits_to_keep() -> None:
    model, tokens = evaluated("5.2"), random_tokens(12)
    logits = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=3).logits, logits[:, -3:])
    assert_close(model(tokens, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])


def test_tuples_on_request() -> None:
    model, tokens = evaluated("5.2"), random_tokens(12)
    output = model(tokens, return_dict=False)
    assert torch.equal(output[0], model(tokens).logits)
    assert isinstance(output[1], RwkvRevState)


def test_tuples_without_a_gradient() -> None:
    """Logits alone, as trainers want them, unless somebody reads on."""
    model, tokens = evaluated("5.2"), random_tokens(12)
    with torch.no_grad():
        (logits,) = model(tokens, return_dict=False)
        assert torch.equal(logits, model(tokens).logits)
        begun = model(tokens[:, :5], return_dict=False, use_cache=True)
        read_on = model(tokens[:, 5:], state=begun[1], return_dict=False)
    assert isinstance(begun[1], RwkvRevState) and isinstance(read_on[1], RwkvRevState)
    assert_close(read_on[0], logits[:, 5:])


@pytest.mark.parametrize("tuples", [False, True])
def test_trainer_predicts_logits_alone(tmp_path: Path, tuples: bool) -> None:
    """Without labels too, when a state and a cache lie beside the logits."""
    model, rows = (
        evaluated("5.2", torch.float32),
        [{"input_ids": random_tokens(9, seed=i)[0]} for i in range(3)],
    )
    model.config.return_dict = not tuples
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, per_device_eval_batch_size=2, disable_tqdm=True
    )
    found = torch.from_numpy(Trainer(model, arguments).predict(rows).predictions)
    assert_close(found, torch.cat([model(row["input_ids"][None])[0].detach() for row in rows]))


# --- settings ---------------------------------------------------------------------------------------------------


def test_set_bptt_as_a_context_manager(tmp_path: Path) -> None:
    """It sets at once, and puts back what was there, also after an exception."""
    model = tiny_model("5.2")
    before = model.bptt
    chosen = model.set_bptt("checkpoint", chunk_length=5, tape="disk", tape_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match="inside"), chosen:
        assert model.bptt == BpttSettings("checkpoint", 5, "disk", str(tmp_path))
        with model.set_bptt("full"):
            assert (model.bptt.strategy, model.bptt.chunk_length) == ("full", 5)
        assert model.bptt.strategy == "checkpoint"
        raise RuntimeError("inside")
    assert model.bptt == before == BpttSettings()
    model.set_bptt("truncated")
    assert model.bptt == BpttSettings("truncated")


def test_settings_of_a_run_are_not_saved(tmp_path: Path) -> None:
    """Who loads the model trains as they choose, on a machine that has no such folder."""
    model = tiny_model("5.2")
    model.set_bptt("truncated", chunk_length=8, tape="disk", tape_dir=str(tmp_path))
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert not {"bptt", "chunk_length", "tape", "tape_dir"} & saved.keys()
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    assert RwkvRevForCausalLM.from_pretrained(tmp_path / "model").bptt == BpttSettings()


def test_settings_in_older_folders_are_ignored(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tiny_model("5.2").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    file.write_text(
        json.dumps(saved | {"bptt": "auto", "chunk_length": 1024, "tape": "host", "tape_dir": None})
    )
    RwkvRevForCausalLM.from_pretrained(tmp_path)
    assert not recwarn, "what everybody had is no news"
    file.write_text(json.dumps(saved | {"bptt": "truncated", "tape_dir": "/somewhere"}))
    with pytest.warns(UserWarning, match=r"bptt='truncated', tape_dir='/somewhere': .*call model.set_bptt"):
        model = RwkvRevForCausalLM.from_pretrained(tmp_path)
    assert model.bptt == BpttSettings()
    model.save_pretrained(tmp_path / "again")
    assert "truncated" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("backwards", {}), "'backwards'.*reversible"),
        (("reversible", {"chunk_length": 0}), "chunk_length = 0"),
        (("reversible", {"tape": "cloud"}), "'cloud'.*host"),
    ],
)
def test_settings_that_do_not_exist(arguments: tuple[str, dict[str, Any]], message: str) -> None:
    model = tiny_model("5.2")
    before = model.config.to_dict()
    with pytest.raises(StrategyError, match=message):
        model.set_bptt(arguments[0], **arguments[1])
    assert model.config.to_dict() == before


def test_a_tape_directory_that_is_not_there(tmp_path: Path) -> None:
    """Found when it is set, and where it has gone since."""
    model, tokens = tiny_model("5.2"), random_tokens(40)
    folder = tmp_path / "tape"
    with pytest.raises(StrategyError, match="tape_dir"):
        model.set_bptt("reversible", chunk_length=8, tape="disk", tape_dir=str(folder))
    folder.mkdir()
    model.set_bptt("reversible", chunk_length=8, tape="disk", tape_dir=str(folder))
    folder.rmdir()
    with pytest.raises(StrategyError, match="tape_dir"):
        model(tokens, labels=tokens)


def test_logits_beside_the_loss() -> None:
    """Only where the whole graph is kept; elsewhere refused by name."""
    model, tokens = tiny_model("5.2", chunk_length=16), random_tokens(16)
    assert "logits" not in model(tokens, labels=tokens)
    output = model(tokens, labels=tokens, return_logits=True)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], tokens[0, 1:])
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    output.loss.backward()
    longer = random_tokens(17)
    with pytest.raises(StrategyError, match="full"):
        model(longer, labels=longer, return_logits=True)


def test_hidden_states_beside_the_loss() -> None:
    """As without labels; refused by name in chunks, where they are not kept, and given where no graph is."""
    model, tokens = tiny_model("5.2", chunk_length=16), random_tokens(16)
    expected = model(tokens, output_hidden_states=True).hidden_states
    output = model(tokens, labels=tokens, output_hidden_states=True)
    assert output.loss.item() == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-6)
    assert len(output.hidden_states) == len(expected)
    for found, stream in zip(output.hidden_states, expected, strict=True):
        assert torch.equal(found, stream)
    output.loss.backward()
    longer = random_tokens(17)
    for strategy in ("auto", "reversible"):
        with (
            model.set_bptt(strategy),
            pytest.raises(StrategyError, match="output_hidden_states beside a loss"),
        ):
            model(longer, labels=longer, output_hidden_states=True)
    with torch.no_grad():
        assert model(longer, labels=longer, output_hidden_states=True).hidden_states[0].shape[1] == 17


def test_a_further_objective_beside_logits() -> None:
    """``final_state_gradient`` counts there too."""
    model, tokens = tiny_model("5.2"), random_tokens(16)
    further = random_like(model.initial_state(1))
    gradients = []
    for beside in ({}, {"return_logits": True}, {"output_hidden_states": True}):
        model.zero_grad()
        output = model(tokens, labels=tokens, final_state_gradient=further, **beside)
        assert not output.state.wkv.requires_grad
        output.loss.backward()
        gradients.append(model.model.blocks[0].time_mix.key.weight.grad.clone())
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


def test_activation_checkpointing_of_a_plain_forward() -> None:
    """Without labels too, blocks are computed again when the gradient is taken: same logits, same gradient."""
    model, tokens = tiny_model("5.2"), random_tokens(20)
    gradients = []
    for recompute in (False, True):
        if recompute:
            checkpoint_blocks(model)
        model.zero_grad()
        logits = model(tokens).logits
        logits.square().sum().backward()
        gradients.append((logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert torch.equal(gradients[0][0], gradients[1][0])
    for name, gradient in gradients[0][1].items():
        assert torch.equal(gradient, gradients[1][1][name]), name


@pytest.mark.parametrize(
    ("strategy", "in_sweeps"),
    [
        ("auto", True),
        ("reversible", True),
        ("checkpoint", True),
        ("reversible-lossy", False),
        ("truncated", False),
    ],
)
def test_a_stored_graph_is_told_of(strategy: str, in_sweeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the model computes the loss, nor without a gradient, nor within a chunk, nor where it is meant."""
    told: list[str] = []
    monkeypatch.setattr(logging.get_logger("rwkv_rev.bptt.any_loss"), "warning_once", told.append)
    model, tokens = tiny_model("5.2"), random_tokens(20)
    model.set_bptt(strategy, chunk_length=8)
    model(tokens, labels=tokens).loss.backward()
    model(tokens[:, :8])
    model.eval()(tokens)
    with torch.no_grad():
        model.train()(tokens)
    with model.set_bptt("full"):
        model(tokens, output_hidden_states=True)
    assert not told
    model(tokens)
    model.model(tokens)
    assert bool(told) is not in_sweeps
    model(tokens, output_hidden_states=True)
    model(tokens, use_cache=True)
    assert len(told) == (2 if in_sweeps else 4) and "\n" not in told[0]
    assert "the graph of a whole context is stored" in told[0] and f"bptt={strategy!r}" in told[0]
