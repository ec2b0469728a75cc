"""What ranks that share a context compute, and one process alone: cases by name, for gloo and for GPUs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import peft
import torch
from bptt_cases import (
    checkpoint_blocks,
    english,
    load,
    random_like,
    random_state,
    random_tokens,
    relative_error,
    tiny_model,
)
from torch import Tensor

from rwkv_rev import convert
from rwkv_rev.bptt.sweep import Sweep

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CHUNK = 11
"""No multiple of any number of ranks."""
LENGTH = 23
"""Two chunks, and one of a single token, which only one rank has."""
VERSIONS = ("4", "5.0", "5.2", "6", "7")


@dataclass(frozen=True)
class Case:
    """A model, what it is given, and how gradients are made."""

    version: str = "5.2"
    strategy: str = "reversible"
    dtype: torch.dtype = torch.float64
    chunk: int = CHUNK
    length: int = LENGTH
    padded: bool = False
    packed: bool = False
    ends_padded: bool = False  # documents that end in padding, behind which a piece begins
    state: bool = True
    embeds: bool = False
    prepare: Callable[[Any], Any] = lambda model: model
    config: dict[str, Any] = field(default_factory=dict)

    def model(self, device: torch.device) -> Any:
        if self.version.startswith("bundled:"):
            model = load(bundled(self.version), self.dtype, layers=2)
        else:
            model = tiny_model(self.version, dtype=self.dtype, **self.config)
        return self.prepare(model).to(device)

    def inputs(self, model: Any, device: torch.device) -> dict[str, Any]:
        real = self.version.startswith("bundled:")
        tokens = english(self.length, 2) if real else random_tokens(self.length, 2)
        found: dict[str, Any] = {"labels": tokens.to(device)}
        if self.embeds:
            width = model.config.hidden_size
            noise = torch.randn(2, self.length, width, generator=torch.Generator().manual_seed(7))
            found["inputs_embeds"] = noise.to(device, self.dtype).requires_grad_()
        else:
            found["input_ids"] = tokens.to(device)
        if self.padded:
            mask = torch.ones_like(tokens)
            mask[0, :CHUNK] = 0  # a chunk without a token in one row
            mask[1, 5] = mask[1, 9:20] = 0
            found["attention_mask"] = mask.to(device)
        if self.ends_padded:
            mask = torch.ones_like(tokens)
            mask[:, 10:14] = 0
            found["attention_mask"] = mask.to(device)
            found["borders"] = torch.zeros_like(mask, dtype=torch.bool).to(device)
            found["borders"][:, [0, 14]] = True
        elif self.packed:
            at = torch.zeros(2, self.length, dtype=torch.bool)
            at[0, [0, 1, 2, 12, 17, 18, 22]] = True  # several in a piece, none in others
            at[1, [0, self.length - 5]] = True
            found["borders"] = at.to(device)
        elif self.state:
            base = getattr(model, "base_model", model)
            base = getattr(base, "model", model) if hasattr(model, "peft_config") else model
            state = (
                random_state(tiny_model(self.version, dtype=self.dtype), 2)
                if not real
                else base(tokens[:, :9].to(device)).state
            )
            found["state"] = state.each(lambda t: t.detach().to(device).clone().requires_grad_())
            found["final_state_gradient"] = random_like(state).each(lambda t: t.to(device, self.dtype))
        return found

    def run(self, group: Any, device: torch.device | str = "cpu", **settings: Any) -> dict[str, Any]:
        """Loss, gradients of all that have one, the final state, and prints of the states that were held."""
        device = torch.device(device)
        model = self.model(device)
        inputs = self.inputs(model, device)
        model.set_context_parallel(group, **settings)
        model.set_bptt(self.strategy, chunk_length=self.chunk)
        held: list[Tensor] = []
        note = Sweep._note_states

        def noted(sweep: Sweep, prints: list[Tensor]) -> None:
            held.extend(part.flatten().cpu() for part in prints)
            note(sweep, prints)

        Sweep._note_states = noted  # type: ignore[method-assign]
        try:
            output = model(**inputs)
        finally:
            Sweep._note_states = note  # type: ignore[method-assign]
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if "state" in inputs:
            named = zip(inputs["state"].names(), inputs["state"].tensors(), strict=True)
            gradients |= {f"state.{name}": tensor.grad for name, tensor in named if tensor.grad is not None}
        if self.embeds:
            gradients["embeds"] = inputs["inputs_embeds"].grad
        return {
            "loss": output.loss.detach().cpu(),
            "gradients": {name: gradient.cpu() for name, gradient in gradients.items()},
            "state": [tensor.cpu() for tensor in output.state.tensors()],
            "held": torch.cat(held) if held else torch.empty(0),
            "tape": (output.report or {}).get("tape_bytes", 0),
        }


@cache
def bundled(name: str) -> Path:
    folder = Path(mkdtemp(prefix="rwkv-rev-context-")) / "model"
    convert(name, folder)
    return folder


def tuned_state(model: Any) -> Any:
    """With an initial state that is trained, alone."""
    model.requires_grad_(False)
    model.add_initial_state()
    with torch.no_grad():
        for number, parameter in enumerate(model.model.initial_wkv):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(next(model.parameters()).dtype)


def slow(model: Any) -> Any:
    """With decays that float64 can divide back over the context."""
    with torch.no_grad():
        for block in model.blocks:
            block.time_mix.time_decay.fill_(-4.0)
    return model


def with_lora(model: Any) -> Any:
    """With low-rank additions that are not zero."""
    config = peft.LoraConfig(r=2, target_modules=["key", "value", "receptance"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return peft.inject_adapter_in_model(config, model)


def checkpointing(model: Any) -> Any:
    checkpoint_blocks(model)
    return model


def of_versions(**settings: Any) -> dict[str, Case]:
    return {version: Case(version, **settings) for version in VERSIONS}


CASES: dict[str, Case] = {
    **{f"bundled {v}": Case(f"bundled:rwkv-{v}", length=129, chunk=64) for v in ("4", "5.2", "6", "7")},
    **{f"{v} padded": case for v, case in of_versions(padded=True).items()},
    **{f"{v} packed": case for v, case in of_versions(packed=True).items()},
    **{f"{v} packed, padded": Case(v, packed=True, padded=True) for v in ("5.2", "6", "7")},
    **{f"{v} ends padded": Case(v, length=20, ends_padded=True) for v in ("5.2", "7")},
    **{f"{v} whole pieces": Case(v, chunk=12, length=24) for v in VERSIONS},
    **{f"{v} float32": Case(v, dtype=torch.float32, padded=True) for v in ("5.2", "7")},
    **{
        f"{v} tuned state": Case(v, prepare=tuned_state, packed=p == "packed", state=False)
        for v, p in (("5.2", ""), ("7", "packed"))
    },
    **{
        f"{v} tuned state, whole pieces{p}": Case(
            v, strategy, chunk=12, length=24, prepare=tuned_state, packed=bool(p), state=False
        )
        for v, strategy, p in (
            ("5.2", "reversible", ""),
            ("6", "truncated", ", packed"),
            ("7", "reversible", ", packed"),
        )
    },
    "lora": Case(prepare=with_lora),
    "checkpointed blocks": Case("7", prepare=checkpointing),
    "lossy": Case(strategy="reversible-lossy", prepare=slow),
    "checkpoint": Case("6", "checkpoint"),
    "truncated": Case("7", "truncated", padded=True),
    "full, one chunk": Case("5.2", "full", chunk=64),
    "auto, one chunk": Case("7", "auto", chunk=64),
    "one token a piece": Case("5.2", chunk=3, length=7),
    "embeds": Case("5.1", embeds=True, padded=True),
}
"""The hardest first: trained weights and real text."""


def assert_equals_one_process(ranks: list[dict[str, Any]], alone: dict[str, Any], dtype: torch.dtype) -> None:
    """Loss, gradients and final state of every rank are those of one process; states are equal to the bit on all."""
    for found in ranks:
        assert relative_error(found["loss"], alone["loss"]) <= TOLERANCE[dtype]
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, truth in alone["gradients"].items():
            assert relative_error(found["gradients"][name], truth) <= TOLERANCE[dtype], name
        for one, truth in zip(found["state"], alone["state"], strict=True):
            assert relative_error(one, truth) <= TOLERANCE[dtype]
    assert_same_states(ranks)


def assert_same_states(ranks: list[dict[str, Any]]) -> None:
    """Exact states and final ones, equal to the bit on all ranks."""
    for found in ranks:
        assert torch.equal(found["held"], ranks[0]["held"])
        assert all(map(torch.equal, found["state"], ranks[0]["state"]))
