"""Tuned states as files: RWKV-LM's and web-rwkv's order of indices, by hand; every bit back; refusals in one line.

RWKV-LM's files hold ``blocks.N.att.time_state`` [H, N, N] with the value's index first, which the plain loops of
``foreign.scan_of`` read as they are. web-rwkv's converter exchanges the last two indices and rounds to float16.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import blinkdl_state_dict, scan_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rwkv_rev
from rwkv_rev.converters.tuned_states import read_state, set_state
from rwkv_rev.equivalence.naive_model import naive_logits
from rwkv_rev.errors import CheckpointError, ConfigError, OutputError, SourceError

Cli = Callable[..., tuple[int, str, str]]
TUNED = ("5.0", "5.1", "5.2", "6", "7")
LAYERS, HEADS, SIZE, VOCAB = 2, 4, 8, 256
IDS = torch.tensor([[3, 200, 17, 17, 90, 4]])


def time_state(seed: int = 1, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """A state as RWKV-PEFT saves it."""
    layers, heads, size = (sizes.get(name, usual) for name, usual in
                           (("layers", LAYERS), ("heads", HEADS), ("size", SIZE)))  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return {
        f"blocks.{i}.att.time_state": (0.5 * torch.randn(heads, size, size, generator=generator)).to(dtype)
        for i in range(layers)
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models."""
    root = tmp_path_factory.mktemp("models")
    for version in ("4", *TUNED):
        torch.save(blinkdl_state_dict(version, vocab=VOCAB), root / "a.pth")
        rwkv_rev.convert(root / "a.pth", root / version)
    return {version: root / version for version in ("4", *TUNED)}


def logits(folder: Path) -> Tensor:
    model = rwkv_rev.RwkvRevForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def oracle(version: str, tensors: dict[str, Tensor]) -> Tensor:
    """[T, V], float64, by the names of the original trainer."""
    return torch.cat(list(naive_logits(tensors, IDS[0], scan=scan_of(version))))


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(
    ("version", "dtype"),
    [
        *((version, torch.float32) for version in TUNED),
        *((version, dtype) for version in ("5.2", "7") for dtype in (torch.bfloat16, torch.float64)),
    ],
    ids=str,
)
def test_into_a_folder_and_out(
    models: dict[str, Path], tmp_path: Path, version: str, dtype: torch.dtype
) -> None:
    """Every bit comes back, and the folder is what the conversion of a whole checkpoint with the state makes."""
    torch.save(time_state(dtype=dtype), tmp_path / "state.pth")
    rwkv_rev.load_state(models[version], tmp_path / "state.pth", tmp_path / "with")
    made = rwkv_rev.save_state(tmp_path / "with", tmp_path / "out.pth")
    same_bits(time_state(dtype=dtype), torch.load(tmp_path / "out.pth", weights_only=True))
    assert (made.layers, made.heads, made.head_size, made.version, made.note) == (2, 4, 8, version, None)
    torch.save(blinkdl_state_dict(version, vocab=VOCAB) | time_state(dtype=dtype), tmp_path / "whole.pth")
    rwkv_rev.convert(tmp_path / "whole.pth", tmp_path / "whole")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "with" / "model.safetensors")[name]), name
    assert torch.equal(logits(tmp_path / "with"), logits(tmp_path / "whole"))


@pytest.mark.parametrize("layout", ["rwkv-lm", "web-rwkv"])
@pytest.mark.parametrize("version", TUNED)
def test_the_plain_loop_begins_with_it(
    models: dict[str, Path], tmp_path: Path, version: str, layout: str
) -> None:
    """The order of indices, against code that never saw a converted model."""
    state = {name: tensor.half().float() for name, tensor in time_state().items()}
    if layout == "rwkv-lm":
        torch.save(state, tmp_path / "state.pth")
    else:  # what web-rwkv's convert_safetensors.py does
        turned = {name: tensor.half().transpose(1, 2).contiguous() for name, tensor in state.items()}
        save_file(turned, tmp_path / "state.pth", {"format": "pt"})
    rwkv_rev.load_state(models[version], tmp_path / "state.pth", tmp_path / "with")
    tensors = {n: t.double() for n, t in (blinkdl_state_dict(version, vocab=VOCAB) | state).items()}
    expected = oracle(version, tensors)
    torch.testing.assert_close(logits(tmp_path / "with")[0].double(), expected, rtol=1e-4, atol=1e-4)
    turned_round = {n: t.mT.contiguous() if n.endswith("time_state") else t for n, t in tensors.items()}
    assert not torch.allclose(oracle(version, turned_round), expected, atol=1e-2), (
        "the order would not be seen"
    )


def test_web_rwkv_by_hand(models: dict[str, Path], tmp_path: Path) -> None:
    """Its names, type and order; what float16 rounds is told, and what it does not hold refused."""
    state = time_state()
    torch.save(state, tmp_path / "state.pth")
    rwkv_rev.load_state(models["6"], tmp_path / "state.pth", tmp_path / "with")
    made = rwkv_rev.save_state(tmp_path / "with", tmp_path / "state.st", to="web-rwkv")
    assert made.note is not None and "rounded to float16" in made.note
    written = load_file(tmp_path / "state.st")
    assert list(written) == list(state)
    for name, tensor in state.items():
        assert written[name].dtype == torch.float16
        assert torch.equal(written[name], tensor.transpose(1, 2).half())
    again = rwkv_rev.save_state(tmp_path / "state.st", tmp_path / "again.st", to="web-rwkv")
    assert again.note is None and again.version == "6"
    assert (tmp_path / "again.st").read_bytes() == (tmp_path / "state.st").read_bytes()
    rwkv_rev.save_state(tmp_path / "state.st", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    same_bits({name: tensor.half() for name, tensor in state.items()}, dict(back))
    torch.save({name: 1e6 * tensor for name, tensor in state.items()}, tmp_path / "large.pth")
    with pytest.raises(OutputError, match=r"values as large as .*web-rwkv reads float16.*to='rwkv-lm'"):
        rwkv_rev.save_state(tmp_path / "large.pth", tmp_path / "large.st", to="web-rwkv")
    assert not (tmp_path / "large.st").exists()


@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_generate_begins_with_it(cli: Cli, models: dict[str, Path], tmp_path: Path, version: str) -> None:
    """A file, a folder that has the state, and a model in memory that is given it: the same bits."""
    torch.save({name: 4 * tensor for name, tensor in time_state().items()}, tmp_path / "s.pth")
    rwkv_rev.load_state(models[version], tmp_path / "s.pth", tmp_path / "with")
    model = rwkv_rev.RwkvRevForCausalLM.from_pretrained(str(models[version]), dtype=torch.float32).eval()
    without = model(IDS).logits.detach()
    set_state(model, read_state(tmp_path / "s.pth"))
    assert torch.equal(model(IDS).logits, logits(tmp_path / "with"))
    assert not torch.allclose(model(IDS).logits, without, atol=1e-2)
    words = ("--prompt", "abc", "--max-new-tokens", 12, "--temperature", 0)
    code, by_folder, _ = cli("generate", tmp_path / "with", *words)
    assert code == 0
    assert cli("generate", models[version], *words, "--state", "s.pth")[1] == by_folder
    assert cli("generate", models[version], *words, "--state", tmp_path / "with")[1] == by_folder
    assert cli("generate", models[version], *words)[1] != by_folder


def test_a_folder_of_half_precision_keeps_a_state_of_float32(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("7", vocab=VOCAB, dtype=torch.bfloat16), tmp_path / "a.pth")
    rwkv_rev.convert(tmp_path / "a.pth", tmp_path / "model")
    torch.save(time_state(), tmp_path / "s.pth")
    rwkv_rev.load_state(tmp_path / "model", tmp_path / "s.pth", tmp_path / "with")
    model = rwkv_rev.RwkvRevForCausalLM.from_pretrained(str(tmp_path / "with"), dtype="auto")
    assert model.dtype == torch.bfloat16 and model.model.initial_wkv is not None
    for i, tensor in enumerate(time_state().values()):
        assert torch.equal(model.model.initial_wkv[i], tensor.mT)
    assert rwkv_rev.verify(tmp_path / "with", tokens=16, oracle="naive").passed


def test_merge(tmp_path: Path) -> None:
    parts = [time_state(seed) for seed in (1, 2, 3)]
    for i, part in enumerate(parts):
        torch.save(part, tmp_path / f"{i}.pth")
    files = [tmp_path / f"{i}.pth" for i in range(3)]
    rwkv_rev.merge_states(files, tmp_path / "sum.pth", weights=[0.7, -0.2, 3])
    rwkv_rev.merge_states(files, tmp_path / "mean.pth")
    found, mean = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("sum", "mean"))
    for name in parts[0]:
        one, two, three = (part[name].double() for part in parts)
        assert torch.equal(found[name], (0.7 * one - 0.2 * two + 3 * three).float())
        torch.testing.assert_close(mean[name], ((one + two + three) / 3).float(), rtol=1e-6, atol=1e-7)


def test_commands(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    torch.save(time_state(), tmp_path / "a.pth")
    code, out, err = cli("state", "load", models["5.2"], "a.pth", "--output", "with")
    assert (code, err) == (0, "") and "wrote with" in out
    code, out, err = cli("state", "save", "with", "--output", "b.st", "--to", "web-rwkv")
    assert code == 0 and "b.st: 2 layers of 4 heads of 8, float16, layout web-rwkv" in out
    assert err.startswith("note: values are rounded to float16") and err.count("\n") == 1
    code, out, _ = cli("state", "merge", "a.pth", "b.st", "--weights", "2,-1", "--output", "c.pth", "--json")
    assert code == 0 and '"version": "5.2"' in out
    assert (
        "c.pth already exists; pass --force" in cli("state", "merge", "a.pth", "b.st", "--output", "c.pth")[2]
    )
    assert cli("state", "merge", "a.pth", "b.st", "--output", "c.pth", "--force", "--quiet")[:2] == (
        0,
        "c.pth\n",
    )
    assert (
        cli("state", "save", "a.pth", "--output", "b.st", "--force")[0] == 0
    )  # one format in the other's place
    with safe_open(tmp_path / "with" / "model.safetensors", "pt") as file:
        assert "model.initial_wkv.1" in file.keys()  # noqa: SIM118


def broken(kind: str) -> dict[str, Tensor]:
    state = time_state()
    last = f"blocks.{LAYERS - 1}.att.time_state"
    if kind == "hole":
        del state["blocks.0.att.time_state"]
    elif kind == "nan":
        state[last][0, 1, 2] = float("nan")
    elif kind == "flat":
        state[last] = state[last].flatten(1)
    elif kind == "uneven":
        state[last] = state[last][:1]
    elif kind == "whole":
        state |= blinkdl_state_dict("6")
    elif kind == "none":
        state = {"weights": torch.ones(2)}
    elif kind == "integers":
        state = {name: tensor.long() for name, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hole", "lacks blocks.0.att.time_state, and has that of block 1"),
        ("nan", "blocks.1.att.time_state has 1 value that is NaN or infinite"),
        ("flat", "blocks.1.att.time_state has the shape (4, 64); all layers have one, heads x size x size"),
        ("uneven", "blocks.1.att.time_state has the shape (1, 8, 8)"),
        ("whole", "holds other tensors beside a tuned state (emb.weight"),
        ("none", "is no state file: it holds weights and no blocks.0.att.time_state"),
        ("integers", "blocks.0.att.time_state is of int64"),
    ],
)
def test_bad_files(cli: Cli, models: dict[str, Path], tmp_path: Path, kind: str, message: str) -> None:
    torch.save(broken(kind), tmp_path / "bad.pth")
    for words in (("state", "save", "bad.pth", "--output", "out.pth"),
                  ("state", "load", models["6"], "bad.pth", "--output", "out"),
                  ("state", "merge", "bad.pth", "bad.pth", "--output", "out.pth"),
                  ("generate", models["6"], "--prompt", "a", "--state", "bad.pth")):  # fmt: skip
        code, out, err = cli(*words)
        assert (code, out, err.count("\n")) == (1, "", 1) and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


@pytest.mark.parametrize(
    ("version", "sizes", "message"),
    [
        ("7", {"layers": 3}, "has 3 layers of 4 heads of 8, {model} has 2 layers of 4 heads of 8"),
        ("7", {"layers": 1}, "has 1 layer of 4 heads of 8, {model} has 2 layers"),
        ("6", {"heads": 1, "size": 16}, "has 2 layers of 1 head of 16, {model} has"),
        ("4", {}, "{model} is a model of RWKV-4, which takes no state files; those of RWKV-5"),
    ],
)
def test_another_model(
    cli: Cli, models: dict[str, Path], tmp_path: Path, version: str, sizes: dict[str, int], message: str
) -> None:
    torch.save(time_state(**sizes), tmp_path / "s.pth")
    for words in (("state", "load", models[version], "s.pth", "--output", "out"),
                  ("generate", models[version], "--prompt", "a", "--state", "s.pth")):  # fmt: skip
        code, out, err = cli(*words)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message.format(model=models[version]) in err


@pytest.mark.parametrize("layout", ["rwkv-lm", "web-rwkv"])
def test_another_generation(models: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """Our files say which, without another key beside the tensors."""
    torch.save(time_state(), tmp_path / "s.pth")
    rwkv_rev.load_state(models["6"], tmp_path / "s.pth", tmp_path / "with")
    rwkv_rev.save_state(tmp_path / "with", tmp_path / "of-6", to=layout)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"of-6 is a state of RWKV-6, .*7 is of RWKV-7"):
        rwkv_rev.load_state(models["7"], tmp_path / "of-6", tmp_path / "out")
    rwkv_rev.load_state(models["7"], tmp_path / "s.pth", tmp_path / "seven")
    with pytest.raises(CheckpointError, match=r"seven is a state of RWKV-7, .*of-6 is of RWKV-6"):
        rwkv_rev.merge_states([tmp_path / "of-6", tmp_path / "seven"], tmp_path / "out.pth")
    assert rwkv_rev.merge_states([tmp_path / "s.pth", tmp_path / "of-6"], tmp_path / "o.pth").version == "6"


def test_beyond_float32(cli: Cli, models: dict[str, Path], tmp_path: Path) -> None:
    """In which memories are kept: neither read, nor written as infinities."""
    large = time_state(dtype=torch.float64)
    large["blocks.1.att.time_state"][0, 1, 2] = 1e300
    torch.save(large, tmp_path / "large.pth")
    torch.save(time_state(), tmp_path / "s.pth")
    for words in (("state", "save", "large.pth", "--output", "out.pth"),
                  ("state", "load", models["6"], "large.pth", "--output", "out"),
                  ("state", "merge", "s.pth", "large.pth", "--output", "out.pth"),
                  ("generate", models["6"], "--prompt", "a", "--state", "large.pth")):  # fmt: skip
        code, out, err = cli(*words)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "large.pth: blocks.1.att.time_state holds values as large as 1e+300, beyond float32" in err
    for weights in ("1e308,1e308", "1e308,-1e308", "1e39,0"):
        code, out, err = cli("state", "merge", "s.pth", "s.pth", "--weights", weights, "--output", "out.pth")
        beyond = weights != "1e308,-1e308"  # whose sum is zero
        assert (code, err.count("\n")) == ((2, 1) if beyond else (0, 0))
        assert ("make a sum beyond float32 in layer 0; give smaller ones" in err) == beyond
        assert (tmp_path / "out.pth").exists() != beyond
        (tmp_path / "out.pth").unlink(missing_ok=True)


def test_other_refusals(models: dict[str, Path], tmp_path: Path) -> None:
    torch.save(time_state(), tmp_path / "s.pth")
    out = tmp_path / "out"
    with pytest.raises(
        CheckpointError, match=r"has no tuned initial state; tune one: rwkv-rev finetune .* --tune"
    ):
        rwkv_rev.save_state(models["6"], out)
    with pytest.raises(CheckpointError, match=r"has no tuned initial state; those of RWKV-5.* can have one"):
        rwkv_rev.save_state(models["4"], out)
    with pytest.raises(SourceError, match=r"there is no .*nowhere"):
        rwkv_rev.save_state(tmp_path / "nowhere", out)
    with pytest.raises(ConfigError, match="1 weight for 2 states; give one each"):
        rwkv_rev.merge_states([out, out], out, weights=[1])
    with pytest.raises(ConfigError, match="must be two states or more"):
        rwkv_rev.merge_states([out], out)
    with pytest.raises(ConfigError, match="weights = inf must be finite"):
        rwkv_rev.merge_states([out, out], out, weights=[1, float("inf")])
    with pytest.raises(OutputError, match="holds the model itself"):
        rwkv_rev.load_state(models["6"], tmp_path / "s.pth", models["6"], force=True)
    save_file({"wkv": torch.ones(2)}, tmp_path / "talk", {"kind": "rwkv-rev state"})
    with pytest.raises(CheckpointError, match="is the state of a conversation, which chat reads by /load"):
        rwkv_rev.save_state(tmp_path / "talk", out)
    assert not out.exists()
