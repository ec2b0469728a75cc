"""States of conversations as files: what is no such state, another model's, or damaged is refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rwkv_rev
from rwkv_rev import state_file
from rwkv_rev.conversation import Chat
from rwkv_rev.errors import CheckpointError, OutputError, RwkvRevError
from rwkv_rev.sampling import Sampling
from rwkv_rev.state_file import load_state

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def chats(bundled: dict[str, Path]) -> dict[str, Chat]:
    return {version: rwkv_rev.chat(bundled[version], device="cpu") for version in ("6", "7")}


@pytest.fixture(scope="module")
def saved(chats: dict[str, Chat], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.safetensors"
    chats["7"].say("Hello", GREEDY, max_new_tokens=1)
    chats["7"].save(path)
    return path


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def refusal(path: Path, chat: Chat) -> str:
    with pytest.raises(RwkvRevError) as caught:
        chat.load(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    return str(caught.value)


def forged(saved: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A file whose tensors are others, and whose checksum is theirs."""
    tensors, told = load_file(saved), metadata(saved)
    change(tensors)
    told["sha256"] = state_file._checksum(told, tensors)
    save_file(tensors, path, told)
    return path


def test_what_it_says_of_itself(saved: Path, chats: dict[str, Chat]) -> None:
    told, config = metadata(saved), chats["7"].model.config
    assert (told["rwkv_version"], told["layers"], told["hidden_size"]) == (
        "7",
        str(config.num_hidden_layers),
        str(config.hidden_size),
    )
    for name, tensor in load_file(saved).items():
        assert torch.equal(getattr(load_state(saved, chats["7"].model), name), tensor)


def test_another_generation(saved: Path, chats: dict[str, Chat]) -> None:
    """Of which the tensors may have the same names and shapes."""
    said = refusal(saved, chats["6"])
    assert said.endswith("is a conversation's state of RWKV-7, and this model is of RWKV-6")


@pytest.mark.parametrize("lacking", ["rwkv_version", "sha256"])
def test_files_that_do_not_say(saved: Path, chats: dict[str, Chat], tmp_path: Path, lacking: str) -> None:
    told = metadata(saved)
    del told[lacking]
    save_file(load_file(saved), tmp_path / "old", told)
    assert f"({lacking}), so nothing tells whether this model can go on from it" in refusal(
        tmp_path / "old", chats["7"]
    )


def test_every_flipped_byte(saved: Path, chats: dict[str, Chat], tmp_path: Path) -> None:
    """In the tensors (the sign or last bits of a number) and in the header: none is read."""
    whole = saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (
        *range(0, header, 23),
        *range(header, len(whole), max(1, len(whole) // 40)),
        len(whole) - 1,
    ):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "b").write_bytes(flipped)
        said = refusal(tmp_path / "b", chats["7"])
        assert place < header or "is damaged: its tensors or their description are not those" in said


def test_numbers_that_no_state_has(saved: Path, chats: dict[str, Chat], tmp_path: Path) -> None:
    model = chats["7"]
    for change, message in (
        (lambda t: t.update(wkv=t["wkv"].int()), ": its wkv is of int32, and a state's numbers are floating"),
        (lambda t: t["wkv"].view(-1)[3:4].fill_(float("nan")), "its wkv holds what is no finite number"),
        (
            lambda t: t.update(wkv=torch.full_like(t["wkv"].double(), 1e300)),
            "its wkv holds numbers beyond float32",
        ),
    ):
        assert message in refusal(forged(saved, tmp_path / "c", change), model)


def test_what_is_no_conversation(
    saved: Path, chats: dict[str, Chat], bundled: dict[str, Path], tmp_path: Path
) -> None:
    """In words of what it is and what would work, not those of a library."""
    layers = {f"blocks.{i}.att.time_state": torch.zeros(2, 8, 8) for i in range(2)}
    torch.save(layers, tmp_path / "st.pth")
    save_file(layers, tmp_path / "st.st")
    torch.save({"emb.weight": torch.zeros(2)}, tmp_path / "model.pth")
    (tmp_path / "empty").touch()
    (tmp_path / "letter.txt").write_text("no state at all")
    (tmp_path / "cut").write_bytes(saved.read_bytes()[:-9])
    shutil.copy(bundled["7"] / "model.safetensors", tmp_path / "whole")
    (tmp_path / "folder").mkdir()
    tuned = "is a tuned initial state and no conversation's: begin with it by rwkv-rev generate --state"
    for name, message in {
        "st.pth": tuned,
        "st.st": tuned,
        "model.pth": "is no conversation that /save wrote, or one that is cut off or damaged",
        "empty": "is empty; give a file that /save wrote",
        "letter.txt": "is no conversation that /save wrote, or one that is cut off or damaged",
        "cut": "is no conversation that /save wrote, or one that is cut off or damaged",
        "whole": "is no conversation that /save wrote: it holds head.weight",
        "folder": "is a folder; give a file that /save wrote",
    }.items():
        assert message in refusal(tmp_path / name, chats["7"]), name


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_a_place_where_no_file_can_be_made(chats: dict[str, Chat], saved: Path) -> None:
    with pytest.raises(OutputError, match=r"^cannot write /proc/x") as caught:
        chats["7"].save("/proc/x")
    assert "another process" not in str(caught.value)
    with pytest.raises(CheckpointError):
        chats["6"].load(saved)
