"""Which remnants ``auto`` is: lifted only where the tape gains a quarter and a step costs at most half more."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import random_tokens, tiny_model
from finetune_cases import counting_text, settings
from test_lifted_models import lifted

from rwkv_rev import RwkvRevConfig, remnants
from rwkv_rev.architectures.registry import architecture
from rwkv_rev.architectures.rwkv7_tape import SHARES, share
from rwkv_rev.bptt import sweeps
from rwkv_rev.errors import ConfigError
from rwkv_rev.remnants import ChosenRemnants, choose_remnants
from rwkv_rev.training.finetune import run
from rwkv_rev.training.planning import plan


def config(width: int = 2048, version: str = "7") -> RwkvRevConfig:
    sizes = architecture(version).sizes(width)
    return RwkvRevConfig(rwkv_version=version, hidden_size=width, num_hidden_layers=2, **sizes)


def chosen(
    asked: str = "auto", strategy: str = "reversible", width: int = 2048, version: str = "7", **more: Any
) -> ChosenRemnants:
    given = {"chunk": 256, "device": torch.device("cuda"), "trains_all": True} | more
    return choose_remnants(asked, strategy, config(width, version), **given)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One of which lifting was measured; what is changed here holds."""
    found: dict[str, Any] = {"capability": (9, 0), "fused": True}
    monkeypatch.setattr(remnants, "runs_fused", lambda config, device: found["fused"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tiny 2000")
    return found


def test_lifted_where_both_were_measured(gpu: dict[str, Any]) -> None:
    for more in ({}, {"chunk": 512}, {"chunk": 1024}, {"width": 4096}):
        found = chosen(**more)
        assert found.kind == "lifted" and "less tape" in str(found.why), found


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"chunk": 2048}, "less than a quarter"),
        ({"chunk": 255}, "at least 256 tokens"),
        ({"width": 1024}, "2,048 wide"),
        ({"trains_all": False}, "all of whose weights are trained"),
        ({"shared": True}, "share"),
        ({"strategy": "checkpoint"}, "checkpoint keeps no less"),
        ({"device": torch.device("cpu")}, "a CPU"),
        ({"capability": (8, 9)}, "Tiny 2000"),
        ({"fused": False}, "no kernel on cuda"),
        ({"asked": "whole"}, "as set"),
    ],
    ids=str,
)
def test_whole_everywhere_else(gpu: dict[str, Any], more: dict[str, Any], why: str) -> None:
    gpu |= {name: more[name] for name in gpu if name in more}
    found = chosen(**{name: value for name, value in more.items() if name not in gpu})
    assert found.kind == "whole" and why in str(found.why), found


def test_what_is_set_holds() -> None:
    assert chosen("lifted", "checkpoint", 64, chunk=2, device=torch.device("cpu")).kind == "lifted"
    assert chosen(version="6") == chosen("lifted", version="6") == ChosenRemnants("whole", None)


def test_a_quarter_is_saved_wherever_auto_lifts(gpu: dict[str, Any]) -> None:
    """By the model that forgets more; shares grow with C."""
    lengths = sorted({*SHARES, 1, 5, 100, 300, 700, 4000, 8192, 10**6})
    shares = [share(length) for length in lengths]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1
    assert all(share(length) == known for length, known in SHARES.items())
    for length in lengths:
        assert share(length) < 0.75 or chosen(chunk=length).kind == "whole"


def test_sweeps_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model, its chunk and what is trained; the report tells what came of it."""
    model, ids, asked = tiny_model("7", hidden_size=32, head_size=16), random_tokens(100), []

    def choose(*given: Any, **more: Any) -> ChosenRemnants:
        asked.append((*given[:2], more["chunk"], more["trains_all"], more["shared"]))
        return ChosenRemnants("lifted", "")

    monkeypatch.setattr(sweeps, "choose_remnants", choose)
    assert lifted(model, "reversible", 40, "auto", input_ids=ids).report["remnants"] == "lifted"
    model.head.weight.requires_grad_(False)
    lifted(model, "checkpoint", 40, "auto", input_ids=ids)
    assert asked == [("auto", "reversible", 40, True, False), ("auto", "checkpoint", 40, False, False)]
    assert "remnants" not in lifted(model, "reversible", 40, "whole", input_ids=ids).report
    assert len(asked) == 2


def test_plan_and_run_tell(shallow: dict[str, Path], tmp_path: Path) -> None:
    data, said = counting_text(tmp_path / "data.txt"), list[str]()
    config = settings(shallow["7"], data, tmp_path / "out", max_steps=1)
    whole = plan(config).to_dict()
    asked = plan(settings(shallow["7"], data, tmp_path / "out", remnants="lifted")).to_dict()
    assert (whole["remnants"], asked["remnants"], asked["remnants_are"]) == ("whole", "lifted", "as set")
    assert "CPU" in whole["remnants_are"]
    assert asked["memory"]["tape"] < 0.5 * whole["memory"]["tape"]
    assert asked["memory"]["tape_is_estimate"] and not whole["memory"]["tape_is_estimate"]
    run(config, notify=said.append, quiet=True)
    assert sum("whole states" in line for line in said) == 1, said
    for keeps_none in ("full", "truncated"):
        none = plan(
            settings(shallow["7"], data, tmp_path / "none", remnants="lifted", bptt=keeps_none)
        ).to_dict()
        assert none["remnants"] is None and none["memory"]["tape"] == 0
    with pytest.raises(ConfigError, match=r"remnants = 'lifted' .* RWKV-6.*: use auto or whole"):
        plan(settings(shallow["6"], data, tmp_path / "other", remnants="lifted"))


def test_a_shared_context_is_refused(shallow: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"remnants lifted undoes .* use remnants whole"):
        plan(settings(shallow["7"], tmp_path, tmp_path / "out", remnants="lifted", context_parallel=2))
