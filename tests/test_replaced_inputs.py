"""``--force`` deletes nothing that the command itself reads, in every command that has it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., tuple[int, str, str]]
COMMANDS = {
    "merge": "merge BASE run/adapter --output run",
    "merge of a file": "merge BASE run/lora.pth --alpha 1 --output run",
    "merge, init": "merge BASE lora.pth --init run/init_pissa.pth --output run",
    "merge over the base": "merge run run/adapter --output run",
    "adapter": "adapter BASE run/adapter --to peft --output run",
    "adapter over itself": "adapter BASE run/lora.pth --alpha 1 --output run/lora.pth",
    "adapter over the base's weights": "adapter run lora.pth --alpha 1 --output run/model.safetensors",
    "state load": "state load BASE run/st.pth --output run",
    "state load of a folder": "state load BASE run/inner --output run",
    "state save over itself": "state save run/st.pth --output run/st.pth",
    "state save over weights": "state save run --output run/model.safetensors",
    "state merge": "state merge st.pth run/st.pth --output run/st.pth",
    "export": "export run --to hf --output run",
    "export over weights": "export run --output run/model.safetensors",
    "convert": "convert run/lora.pth --output run",
    "convert, tokenizer": "convert lora.pth --tokenizer run --output run",
    "init, tokenizer": "init --architecture 5.2 --tokenizer run/inner --output run",
    "finetune": "finetune BASE --data run/book.txt --output run",
    "finetune, a folder": "finetune BASE --data run/inner --output run",
    "finetune, a folder around it": "finetune BASE --data . --output run",
    "finetune, a glob": "finetune BASE --data run/*.txt --output run",
    "finetune, eval": "finetune BASE --data book.txt --eval-data run/book.txt --eval-every 1 --output run",
    "finetune, template": "finetune BASE --data book.txt --chat-template run/t.jinja --output run",
    "finetune, prompt": "finetune BASE --data book.txt --sample-prompt @run/book.txt --output run",
    "finetune, config": "finetune BASE --data book.txt --config run/c.yaml --output run",
    "finetune over the base": "finetune run --data book.txt --output run",
    "finetune, a link": "finetune BASE --data link.txt --output run",
}


@pytest.fixture(scope="module")
def stage(shallow: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder ``run`` with everything inside that a command may read."""
    root = tmp_path_factory.mktemp("stage")
    run = root / "run"
    shutil.copytree(shallow["7"], run)
    (run / "adapter").mkdir()
    (run / "inner").mkdir()
    (run / "t.jinja").write_text("{{ messages[0].content }}")
    (run / "c.yaml").write_text("max_steps: 1\n")
    for folder in (root, run, run / "inner"):
        (folder / "book.txt").write_text("once\n" * 50)
    for name in ("lora.pth", "st.pth", "init_pissa.pth"):
        for folder in (root, run):
            (folder / name).write_bytes(b"PK\x03\x04")
    return root


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_is_read_is_not_replaced(
    cli: Cli, stage: Path, shallow: dict[str, Path], tmp_path: Path, command: str
) -> None:
    shutil.copytree(stage, tmp_path, dirs_exist_ok=True)
    if "link.txt" in command:
        (tmp_path / "link.txt").symlink_to(tmp_path / "run/book.txt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    words = [str(shallow["7"]) if word == "BASE" else word for word in command.split()]
    code, out, err = cli(*words, "--force")
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert "run" in err and err.endswith("; choose another --output\n")
    assert any(says in err for says in ("which is read to make it", "holds the", "inside the model's"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_from_python_too(stage: Path, shallow: dict[str, Path], tmp_path: Path) -> None:
    """The library refuses by itself."""
    import rwkv_rev
    from rwkv_rev.errors import OutputError

    shutil.copytree(stage, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    for call in (
        lambda: rwkv_rev.save_state(run / "st.pth", run / "st.pth", force=True),
        lambda: rwkv_rev.merge_states([run / "st.pth"] * 2, run / "st.pth", force=True),
        lambda: rwkv_rev.save_adapter(shallow["7"], run / "adapter", run, to="peft", force=True),
    ):
        with pytest.raises(OutputError, match="which is read to make it"):
            call()
