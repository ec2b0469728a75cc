"""The Python of README.md and docs/python.md runs, block after block, and does what the pages say."""

import re
import runpy
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from bptt_cases import tiny_model
from pasted import blocks

import rwkv_rev
from rwkv_rev.cache import CACHE_NAME

ROOT = Path(__file__).parents[1]

# peft still uses a name that transformers 5 renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def run(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, blocks: int | None = None
) -> dict[str, Any]:
    """What the page's blocks leave behind, or the first ``blocks`` of them; they run in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "rwkv_rev.training.saving.has_matplotlib", lambda: False
    )  # a curve takes as long as a run
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {"__name__": "example"}
    for found in islice(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), blocks):
        code = found[1].replace(".cache.", f".{CACHE_NAME}.")
        line = text[: found.start(1)].count("\n")
        exec(compile("\n" * line + code, page, "exec"), names)  # lines as in the page
    return names


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
    ],
)
def test_lines_of_prose_fit(page: str) -> None:
    """In 120 columns; the rows of a table, and images, have no other line to go to."""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 120 or line.startswith(("|", "!")), f"{page}:{number} has {len(line)} characters"


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("A state is what is left of a text. " * 20, encoding="utf-8")
    run("README.md", tmp_path, monkeypatch, blocks=1)
    names = run("README.md", tmp_path, monkeypatch)  # whoever runs it again finds the model there
    assert names["loss"].isfinite() and names["input_ids"].shape[1] > 2 * names["model"].bptt.chunk_length
    assert all(parameter.grad is not None for parameter in names["model"].parameters())
    assert names["answer"].shape[1] > names["question_ids"].shape[1]


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_the_readmes_hook_steers_every_version(version: str) -> None:
    """By what it adds to the block's output, with the gradient of ``full``."""
    (code,) = (block for block in blocks("README.md") if "def steer" in block)
    model = tiny_model(version, num_hidden_layers=4, dtype=torch.float64)
    ids = torch.randint(0, model.vocab_size, (2, 11))

    def outcome(strategy: str) -> list[torch.Tensor]:
        with model.set_bptt(strategy, chunk_length=4):
            loss = model(ids, labels=ids).loss
            return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def steered(module: Any, args: Any, output: Any) -> Any:
        hidden, *rest = output
        if isinstance(hidden, tuple):
            return ((hidden[0] + 0.1, *hidden[1:]), *rest)
        return (hidden + 0.1, *rest)

    by_hand = model.model.blocks[3].register_forward_hook(steered)
    expected = outcome("full")
    by_hand.remove()
    exec(code, {"rwkv_rev": rwkv_rev, "model": model})
    for strategy in ("full", "checkpoint", "reversible"):
        torch.testing.assert_close(outcome(strategy), expected, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What docs/python.md leaves behind, and the folder in which it ran."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        return run("docs/python.md", folder, patch), folder


def test_python_page(page: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    names, place = page
    monkeypatch.chdir(place)
    assert names["ids"].shape[1] > 2 * 128
    assert names["error"] < 1e-5 and names["adapter_error"] < 1e-5
    assert names["merged"].config.vocab_size == 256 and Path("merged/model.safetensors").exists()
    assert names["state"].wkv.grad.any()
    assert names["found"]["eval_accuracy"] > 0.3
    for folder in ("merged", "tuned", "trained", "chat"):  # model folders like any other
        rows = 258 if folder == "chat" else 256
        assert len(names["AutoTokenizer"].from_pretrained(folder)) == rows == names["load"](folder).vocab_size
        assert rwkv_rev.generate(folder, "Hi", max_new_tokens=2).startswith("Hi")
    assert rwkv_rev.verify("chat", original="chat", oracle="naive", tokens=40).passed
    rwkv_rev.export("chat", "chat-hf", to="hf")
    assert (
        "<|user|>" in names["AutoTokenizer"].from_pretrained("chat-hf", trust_remote_code=False).get_vocab()
    )
    tuned, ids = names["load"]("tuned"), names["ids"]
    with torch.no_grad():
        assert tuned(ids, labels=ids).loss < names["loss"]  # of the step before


def test_a_false_declaration_is_found_by_the_comparison(
    page: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page says: more than 0.1, and no error."""
    names, place = page
    monkeypatch.chdir(place)
    names["model"] = names["load"]()
    hook = names["rwkv_rev"].position_wise(
        lambda module, args, output: (output[0] + output[0].mean(1, keepdim=True), *output[1:])
    )
    names["model"].model.blocks[3].register_forward_hook(hook)
    pairs = zip(names["gradient"]("reversible"), names["gradient"]("full"), strict=True)
    assert max(float((one - other).norm() / other.norm()) for one, other in pairs) > 0.1


@pytest.mark.parametrize(
    ("script", "model", "tokens", "message"),
    [
        ("exact", "rwkv-6", 300, "bundled:rwkv-6 is RWKV-6, and RWKV-7 alone is lifted"),
        ("exact", "rwkv-7", 30, "30 tokens: chunks of 64 need 129 or more"),
        ("table", "rwkv-6", 300, "bundled:rwkv-6 is RWKV-6, and RWKV-7 alone is lifted"),
        ("table", "rwkv-7", 30, "the text has 30 tokens; two chunks of 16 need 32"),
    ],
)  # fmt: skip
def test_scripts_of_lifting_refuse_in_one_line(
    script: str, model: str, tokens: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "book.txt").write_text("a" * tokens, encoding="utf-8")
    words = [
        f"bundled:{model}",
        "--text",
        str(tmp_path / "book.txt"),
        *(["--chunks", "64"] if script == "exact" else []),
    ]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as refused:
        runpy.run_path(str(ROOT / "examples" / "lifting" / f"{script}.py"), run_name="__main__")
    said = str(refused.value)
    assert said.startswith(f"error: {message}") and "\n" not in said
