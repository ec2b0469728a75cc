"""``finetune --push-to-hub`` through the real Hub client to a Hub on loopback, and what happens when it is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from finetune_cases import counting_text, finetune, settings
from hub_server import HubServer, use_hub

from rwkv_rev.converters.converted import ConvertedModel
from rwkv_rev.errors import OutputError
from rwkv_rev.modeling import RwkvRevForCausalLM
from rwkv_rev.training.config import FinetuneConfig

# The client's own way of sending large files to an LFS store (the Hub itself takes them by Xet).
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer({}) as server:
        server.writers = {"hf_me": "me"}
        use_hub(monkeypatch, server.endpoint, tmp_path / "hub-cache")
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield server


def run(model: Path, folder: Path, repository: str = "me/tuned") -> FinetuneConfig:
    folder.mkdir(exist_ok=True)
    data = counting_text(folder / "data.txt", 60)
    return settings(
        model,
        data,
        folder / "out",
        max_steps=1,
        context_length=256,
        push_to_hub=repository,
        tune="lora",
        lora_rank=4,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_uploads_the_whole_folder(hub: HubServer, shallow: dict[str, Path], tmp_path: Path) -> None:
    events = tmp_path / "out.training" / "runs" / "events.out.tfevents.1"  # as TensorBoard leaves them
    events.parent.mkdir(parents=True)
    events.write_text(str(tmp_path))
    result = finetune(run(shallow["5.2"], tmp_path))
    assert result.address == f"{hub.endpoint}/me/tuned"
    uploaded, local = hub.repositories["me/tuned"].files, contents(tmp_path / "out")
    assert uploaded.keys() == local.keys() - {"training/runs/events.out.tfevents.1"} != local.keys()
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "training/log.jsonl"} <= uploaded.keys()
    for name, content in uploaded.items():
        assert str(tmp_path).encode() not in content, name
        if name != "conversion.json":
            assert content == local[name], name
    record, before = json.loads(uploaded["conversion.json"]), json.loads(local["conversion.json"])
    assert record == before
    assert hub.messages == ["Upload a model fine-tuned by rwkv-rev"]
    again = finetune(run(shallow["5.2"], tmp_path / "again"))  # a repository that exists gets a second commit
    assert again.address == result.address and len(hub.messages) == 2


def test_what_was_uploaded_is_a_model(hub: HubServer, shallow: dict[str, Path], tmp_path: Path) -> None:
    finetune(run(shallow["5.2"], tmp_path))
    for name, content in hub.repositories["me/tuned"].files.items():
        path = tmp_path / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with ConvertedModel(tmp_path / "downloaded") as model:
        assert model.config.rwkv_version == "5.2"
    RwkvRevForCausalLM.from_pretrained(str(tmp_path / "downloaded"))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("create", "create refused on purpose"),
        ("preupload", "preupload refused on purpose"),
        ("batch", "batch refused on purpose"),
        ("lfs", "lfs refused on purpose"),
        ("commit", "commit refused on purpose"),
    ],
)
def test_a_refused_upload_leaves_the_model(
    hub: HubServer, shallow: dict[str, Path], tmp_path: Path, step: str, reason: str
) -> None:
    hub.refusals = {step: 403}
    with pytest.raises(OutputError, match="the Hub did not take me/tuned") as error:
        finetune(run(shallow["5.2"], tmp_path))
    text = str(error.value)
    assert reason in text and "\n" not in text
    assert f"to upload it later: rwkv-rev publish {tmp_path / 'out'} me/tuned" in text
    assert not hub.messages
    RwkvRevForCausalLM.from_pretrained(str(tmp_path / "out"))
    assert (tmp_path / "out" / "README.md").is_file() and not (tmp_path / "out.training").exists()


def test_another_ones_namespace(hub: HubServer, shallow: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"did not take you/tuned.*403") as error:
        finetune(run(shallow["5.2"], tmp_path, "you/tuned"))
    assert "\n" not in str(error.value) and (tmp_path / "out" / "config.json").is_file()


def test_the_hub_is_gone_afterwards(hub: HubServer, shallow: dict[str, Path], tmp_path: Path) -> None:
    hub.stop()
    with pytest.raises(OutputError, match="the Hub did not take me/tuned") as error:
        finetune(run(shallow["5.2"], tmp_path))
    assert "\n" not in str(error.value) and (tmp_path / "out" / "config.json").is_file()


def test_known_before_the_first_step(
    hub: HubServer, shallow: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repository, message in (("me/a/b", "is no name of a repository"), ("me/..", "is no name of a")):
        with pytest.raises(OutputError, match=message):
            finetune(run(shallow["5.2"], tmp_path, repository))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OutputError, match="not signed in; use hf auth login or set HF_TOKEN") as error:
        finetune(run(shallow["5.2"], tmp_path))
    assert "\n" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set"):
        finetune(run(shallow["5.2"], tmp_path))
    assert not hub.requests
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()
