"""The token shift of a converted model replaced by a coupled cell: laws, gradients, what is kept, what is refused."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import (
    assert_same_bits,
    checkpoint_blocks,
    differentiate,
    random_like,
    random_state,
    random_tokens,
    relative_errors,
)
from contract_laws import LAWS, Trial, chunks
from test_linear_attention import filled
from torch.utils.checkpoint import checkpoint

import rwkv_rev
from rwkv_rev import RwkvRevConfig, RwkvRevForCausalLM, rewrite
from rwkv_rev.architectures.registry import architecture
from rwkv_rev.cells.coupled import CoupledCell
from rwkv_rev.cells.coupled_feedback import (
    ChannelMixWithFeedback,
    FeedbackState,
    TimeMixRwkv4WithFeedback,
    TimeMixRwkv5WithFeedback,
)
from rwkv_rev.equivalence.naive_model import residual_streams
from rwkv_rev.errors import ConfigError, ReversalMismatchError, StrategyError
from rwkv_rev.loading import load_model
from rwkv_rev.reversal.stepped import Stepped
from rwkv_rev.wkv.naive import EMPTY_EXPONENT

WIDTH, HEADS, LENGTH, CHUNK = 12, 2, 11, 4
VERSIONS = ("4", "5.2")
TOLERANCE = 1e-10
"""Of float64."""


def before_of(version: str, dtype: torch.dtype = torch.float64, **config: Any) -> RwkvRevForCausalLM:
    heads = (
        {"num_attention_heads": 1, "head_size": WIDTH}
        if version == "4"
        else {"num_attention_heads": HEADS, "head_size": WIDTH // HEADS}
    )
    model = RwkvRevForCausalLM(
        RwkvRevConfig(
            rwkv_version=version,
            **{"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 32, "intermediate_size": 24},
            **(heads | config),
        )
    )
    return filled(model).to(dtype).train()


def model_of(version: str, dtype: torch.dtype = torch.float64) -> RwkvRevForCausalLM:
    """Of random values."""
    return filled(rewrite(before_of(version)), 1).to(dtype)


def arguments(model: RwkvRevForCausalLM) -> dict[str, Any]:
    ids, mask = random_tokens(LENGTH, batch=2), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5], mask[1, 5:8] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def cell_of(kind: str) -> tuple[Any, FeedbackState]:
    feedback, generator = CoupledCell(WIDTH), torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64) / 2

    if kind == "channel":
        return ChannelMixWithFeedback(feedback, WIDTH, 24), FeedbackState(random(2, WIDTH // 2))
    if kind == "4":
        memory = torch.zeros(2, 3, WIDTH, dtype=torch.float64)
        memory[:, 2] = EMPTY_EXPONENT
        return TimeMixRwkv4WithFeedback(feedback, WIDTH), FeedbackState(random(2, WIDTH // 2), memory)
    size = WIDTH // HEADS
    given = {"gated": True, "bonus_is_exponential": False, "group_norm_epsilon": 1e-3}
    cell = TimeMixRwkv5WithFeedback(feedback, HEADS, size, (HEADS, size), **given)
    return cell, FeedbackState(random(2, WIDTH // 2), random(HEADS, size, size))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", ["channel", "4", "5.2"])
def test_laws(kind: str, law: str) -> None:
    cell, start = cell_of(kind)
    LAWS[law](Trial(filled(cell).double(), start, chunks(WIDTH, 2, 3)))


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_are_those_of_the_plain_loop(version: str) -> None:
    """To ten digits in float64; float32 rounds, with a grid or without."""
    wide, ids = model_of(version), random_tokens(LENGTH, batch=2)
    tensors = {name: p.detach().double().requires_grad_() for name, p in wide.named_parameters()}
    losses = []
    for row in ids:
        scan = wide.config.architecture.scan(wide.config)
        *_, (_, hidden) = residual_streams(
            tensors, row, scan=scan, group_norm_epsilon=wide.config.group_norm_epsilon
        )
        losses.append(torch.nn.functional.cross_entropy(hidden[:-1] @ tensors["head.weight"].T, row[1:]))
    torch.stack(losses).mean().backward()
    expected = {name: tensor.grad for name, tensor in tensors.items()}

    def error(dtype: torch.dtype, strategy: str) -> float:
        found = differentiate(model_of(version, dtype), strategy, CHUNK, input_ids=ids).gradients
        return max(relative_errors(found, expected).values())

    assert error(torch.float64, "full") < 1e-10
    rounding = error(torch.float32, "full")
    assert rounding < 5e-5
    for strategy in ("reversible", "checkpoint"):
        assert error(torch.float64, strategy) < TOLERANCE
        assert error(torch.float32, strategy) < 1.5 * rounding


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed-blocks"])
@pytest.mark.parametrize("version", VERSIONS)
def test_states_and_masks(version: str, again: bool) -> None:
    model = model_of(version)
    given = arguments(model)
    if version == "5.2":
        state = random_state(model, 2)
        given |= {"state": state, "final_state_gradient": random_like(state)}
    full = differentiate(model, "full", **given)
    if again:
        checkpoint_blocks(model)
    chunked = [differentiate(model, s, CHUNK, **given) for s in ("reversible", "checkpoint")]
    assert_same_bits(*chunked)
    assert max(relative_errors(chunked[0].gradients, full.gradients).values()) < TOLERANCE
    assert full.state.time_feedback.shape == full.state.channel_feedback.shape == (2, 2, 2, WIDTH // 2)
    with pytest.raises(StrategyError, match="a CoupledCell is stepped token by token: use 'reversible'"):
        differentiate(model, "reversible-lossy", CHUNK, **given)


@pytest.mark.parametrize("version", VERSIONS)
def test_autocast(version: str) -> None:
    model, ids = model_of(version, torch.float32), random_tokens(LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        full, *chunked = (
            differentiate(model, s, CHUNK, input_ids=ids) for s in ("full", "reversible", "checkpoint")
        )
    assert_same_bits(*chunked)
    truth = differentiate(model, "full", input_ids=ids).gradients
    rounding = max(relative_errors(full.gradients, truth).values())
    assert max(relative_errors(chunked[0].gradients, truth).values()) < 1.5 * rounding < 1


@pytest.mark.parametrize("version", VERSIONS)
def test_another_arithmetic_on_the_way_back_is_found(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Stepped.undo
    monkeypatch.setattr(Stepped, "undo", lambda *given: honest(*given) + 1)
    with pytest.raises(ReversalMismatchError):
        differentiate(model_of(version, torch.float32), "reversible", CHUNK, input_ids=random_tokens(LENGTH))


@pytest.mark.parametrize("version", VERSIONS)
def test_no_token_shift_is_on_the_tape(version: str) -> None:
    """Less by the D numbers of each shift, rounded up to 16 bytes; more by two prints and two fingerprints a layer."""
    ids = random_tokens(4 * CHUNK)
    before, after = before_of(version, torch.float32), model_of(version, torch.float32)
    shifted, fed = (
        differentiate(m, "reversible", CHUNK, input_ids=ids).report["tape_bytes"] for m in (before, after)
    )
    assert fed <= shifted - (4 - 2) * 2 * (2 * 4 * WIDTH - 4 * 16)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_other_parameters_are_kept(version: str, dtype: torch.dtype) -> None:
    before = before_of(version, dtype)
    before.model.embeddings.weight.requires_grad_(False)
    before.set_bptt("reversible", chunk_length=32)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    after = rewrite(before, token_shift="coupled", seed=3)
    assert torch.equal(torch.rand(3), expected)
    kept, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name, parameter in kept.items():
        assert torch.equal(new[name], parameter) and new[name].dtype == parameter.dtype
        assert new[name].data_ptr() != parameter.data_ptr()
        assert new[name].requires_grad == parameter.requires_grad
    assert all(".feedback." in name for name in new.keys() - kept.keys())
    assert all(parameter.dtype == dtype for parameter in new.values())
    assert after.training and after.bptt.strategy == "reversible" and after.bptt.chunk_length == 32
    assert before.config.rwkv_version == version and after.config.rwkv_version == f"coupled-{version}"
    numbers = [
        sum(t.numel() for n, t in m(random_tokens(3)).state.__dict__.items() if n != "wkv")
        for m in (before, after)
    ]
    assert numbers[0] == numbers[1]  # the same footprint
    assert not torch.equal(rewrite(before, seed=4).blocks[0].time_mix.feedback.first.of_state.weight,
                           after.blocks[0].time_mix.feedback.first.of_state.weight)  # fmt: skip


@pytest.mark.parametrize("every", [1, 2])
def test_how_it_is_computed_is_kept(every: int) -> None:
    """Checkpointed blocks, their very function, and how text is generated; copies, which change by themselves."""
    before = before_of("5.2", torch.float32)
    before._set_gradient_checkpointing(True, partial(checkpoint, preserve_rng_state=False), every)
    before.generation_config.update(max_new_tokens=7, eos_token_id=[3, 5], do_sample=True)
    before.set_bptt("reversible", chunk_length=8)
    after = rewrite(before)
    assert after.model.gradient_checkpointing and after.checkpoints_blocks
    assert [block.recompute for block in after.blocks] == [block.recompute for block in before.blocks]
    assert (after.blocks[1].recompute is None) == (every == 2)
    assert after.generation_config.to_dict() == before.generation_config.to_dict()
    assert after.generation_config.max_new_tokens == 7
    ids = random_tokens(3 * CHUNK)
    after(ids, labels=ids).loss.backward()
    after.model.gradient_checkpointing = False
    after.generation_config.max_new_tokens = 9
    after.set_bptt("full")
    assert before.model.gradient_checkpointing and before.generation_config.max_new_tokens == 7
    assert before.bptt.strategy == "reversible"


def test_the_mean_of_nothing_is_mixed_in_at_first() -> None:
    """Where the shift's vector was there is zero: the same as the model whose shifts are cut, token by token."""
    before = before_of("5.2")
    after, ids = rewrite(before), random_tokens(1)
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-12, atol=1e-12)
    longer = random_tokens(9)
    assert not torch.allclose(after(longer).logits, before(longer).logits, atol=1e-3)


def test_a_rewritten_model_is_a_folder(tmp_path: Path) -> None:
    model = rwkv_rev.rewrite(before_of("5.2", torch.float32)).eval()
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model", "cpu", "auto").eval()
    ids = random_tokens(20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        parts = again(ids[:, 7:], state=again(ids[:, :7]).state).logits
    torch.testing.assert_close(parts, model(ids).logits[:, 7:], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_is_refused() -> None:
    model = before_of("5.2")
    with pytest.raises(ConfigError, match="token_shift = 'none' must be one of coupled"):
        rewrite(model, token_shift="none")
    with pytest.raises(
        ConfigError, match=r"token shift of RWKV-4 or 5\.2, not of RWKV-5.2 with coupled feedback"
    ):
        rewrite(rewrite(model))
    settings = {"hidden_size": 12, "num_hidden_layers": 1, "vocab_size": 32}
    for version in ("5.1", "linear-attention"):
        known = architecture(version)
        other = RwkvRevForCausalLM(RwkvRevConfig(rwkv_version=version, **settings, **known.sizes(12)))
        with pytest.raises(ConfigError, match=f"not of {known.called}"):
            rewrite(other)
    with pytest.raises(ConfigError, match="takes a RwkvRevForCausalLM, not a Linear: merge adapters first"):
        rewrite(torch.nn.Linear(2, 2))
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(before_of("5.2"), peft.LoraConfig(r=2, target_modules=["key"]))
    with pytest.raises(ConfigError, match="not a PeftModel: merge adapters first"):
        rewrite(lora)
    with pytest.raises(
        ConfigError, match=r"adapters of peft \(lora at model.blocks.0.time_mix.key\): merge them first"
    ):
        rewrite(lora.get_base_model())
    rewrite(lora.merge_and_unload())
    with pytest.raises(ConfigError, match=f"seed = -1 must be from 0 to {2**63 - 1}"):
        rewrite(model, seed=-1)


class Scaled(torch.nn.Linear):
    """Of the same parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def noted(*_: Any) -> None:
    """A hook."""


@pytest.mark.parametrize(
    ("put", "what"),
    [
        (lambda model: model.register_forward_hook(noted), "the hook noted on the model"),
        (lambda model: model.blocks[1].register_forward_pre_hook(noted), "the hook noted on model.blocks.1"),
        (lambda model: model.head.register_full_backward_hook(noted), "the hook noted on head"),
        (lambda model: model.register_state_dict_post_hook(noted), "the hook noted on the model"),
        (lambda model: model.head.weight.register_hook(noted), "the hook noted on head.weight"),
        (
            lambda model: model.head.weight.register_post_accumulate_grad_hook(noted),
            "the hook noted on head.weight",
        ),
        (lambda model: setattr(model, "head", Scaled(WIDTH, 32, bias=False)), "Scaled at head"),
        (lambda model: setattr(model.head, "forward", noted), "the replaced forward of head"),
    ],
)
def test_what_others_have_put_into_a_model_is_refused_by_name(put: Any, what: str) -> None:
    """A new model would not have it."""
    model = before_of("5.2")
    put(model)
    with pytest.raises(ConfigError, match=f"a new model, which would not have {what}: take it away"):
        rewrite(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_new_cells_of_a_frozen_model_are_trainable(dtype: torch.dtype) -> None:
    model = rewrite(before_of("5.2", dtype).requires_grad_(False))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".feedback." in name} != set()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if dtype == torch.float32:
        ids = random_tokens(LENGTH)
        with model.set_bptt("reversible", chunk_length=CHUNK):
            model(ids, labels=ids).loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
