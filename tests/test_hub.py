"""Finding the files of a source: the rules of choice, and the real Hub client against a loopback Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, Repository, commit_id, use_hub
from huggingface_hub.utils import enable_progress_bars

from rwkv_rev.errors import CheckpointError, SourceError
from rwkv_rev.folders.hub import expected_files, resolve
from rwkv_rev.folders.source import parse_source

BIG = bytes(range(256)) * 400  # 102,400 bytes: behind the redirect
OTHER = BIG[::-1]
WORLD = {
    "README.md": b"# RWKV-5 World\n",
    "RWKV-5-World-0.1B-v1.pth": BIG,
    "RWKV-5-World-3B-v2.pth": BIG + OTHER,
    "modeling_evil.py": b"raise SystemExit\n",
    "tokenizer.json": b"{}",
}
EAGLE = {
    "config.json": b'{"model_type": "rwkv5"}',
    "generation_config.json": b"{}",
    "modeling_rwkv5.py": b"raise SystemExit\n",
    "pytorch_model.bin": BIG,
}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": OTHER,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    repositories = {
        "BlinkDL/rwkv-5-world": Repository(WORLD, {"old": {"one.pth": OTHER}}),
        "RWKV/v5-Eagle-7B-HF": Repository(EAGLE),
        "RWKV/sharded": Repository(SHARDED),
        "RWKV/gated": Repository({"model.pth": BIG}, gate="hf_member"),
        "RWKV/private": Repository({"model.pth": BIG}, token="hf_owner"),
        "RWKV/empty": Repository({"README.md": b"nothing yet"}),
    }
    with HubServer(repositories) as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "cache")
        yield server


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def fails(call: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestLocal:
    def test_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        path.write_bytes(BIG)
        local = resolve(parse_source(str(path)))
        assert local.files == (path,)
        assert (local.directory, local.commit, local.index) == (None, None, None)
        assert expected_files(local.source).files == (("model.pth", len(BIG)),)

    @pytest.mark.parametrize("name", ["rwkv-4", "rwkv-5.2", "rwkv-6", "rwkv-7"])
    def test_bundled(self, name: str) -> None:
        (path,) = resolve(parse_source(f"bundled:{name}")).files
        assert path.name == f"{name}.pth"
        assert path.stat().st_size > 2_000_000

    def test_vanished(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        path.write_bytes(BIG)
        source = parse_source(str(path))
        path.unlink()
        assert "does not exist any more" in fails(lambda: resolve(source))

    @pytest.mark.parametrize(
        ("names", "chosen"),
        [
            (["model.safetensors", "pytorch_model.bin", "a.pth", "b.pth"], "model.safetensors"),
            (["pytorch_model.bin", "training_args.bin", "optimizer.pt"], "pytorch_model.bin"),
            (["only.pth", "README.md", "rng_state_0.pth"], "only.pth"),
            (["weights.safetensors"], "weights.safetensors"),
        ],
    )
    def test_choice_without_file(self, tmp_path: Path, names: list[str], chosen: str) -> None:
        write(tmp_path, dict.fromkeys(names, b"x"))
        local = resolve(parse_source(str(tmp_path)))
        assert local.files == (tmp_path / chosen,)
        assert local.directory == tmp_path
        assert local.chosen == chosen

    @pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
    def test_shards_in_index_order(self, tmp_path: Path, form: str) -> None:
        stem, _, suffix = form.rpartition(".")
        second, first = (f"{stem}-0000{i}-of-00002.{suffix}" for i in (2, 1))
        index = json.dumps({"weight_map": {"x": second, "y": first, "z": second}}).encode()
        write(tmp_path, {f"{form}.index.json": index, first: b"x", second: b"yy"})
        local = resolve(parse_source(str(tmp_path)))
        assert [path.name for path in local.files] == [second, first]
        assert local.index == tmp_path / f"{form}.index.json"
        assert expected_files(local.source).files == ((second, 2), (first, 1))

    def test_several_lists_names_and_sizes(self, tmp_path: Path) -> None:
        write(tmp_path, WORLD)
        message = fails(lambda: resolve(parse_source(str(tmp_path))))
        assert "2 checkpoints" in message
        assert "with file" in message
        assert "RWKV-5-World-0.1B-v1.pth (102 kB)" in message
        assert "RWKV-5-World-3B-v2.pth (205 kB)" in message
        assert "README" not in message

    @pytest.mark.parametrize(
        "pattern", ["RWKV-5-World-3B-v2.pth", "*3B*", "RWKV-5-World-3B*.pth", "RWKV-?-World-3B-v2.*"]
    )
    def test_file_by_name_or_glob(self, tmp_path: Path, pattern: str) -> None:
        write(tmp_path, WORLD)
        local = resolve(parse_source(str(tmp_path), file=pattern))
        assert local.chosen == "RWKV-5-World-3B-v2.pth"

    def test_file_in_subdirectory(self, tmp_path: Path) -> None:
        write(tmp_path, {"old/one.pth": b"x", "two.pth": b"y"})
        local = resolve(parse_source(str(tmp_path), file="old/*.pth"))
        assert local.files == (tmp_path / "old/one.pth",)
        assert local.directory == tmp_path

    def test_glob_matches_several_or_none(self, tmp_path: Path) -> None:
        write(tmp_path, WORLD)
        several = fails(lambda: resolve(parse_source(str(tmp_path), file="*.pth")))
        assert "matches 2 files" in several
        assert "RWKV-5-World-0.1B-v1.pth (102 kB)" in several
        none = fails(lambda: resolve(parse_source(str(tmp_path), file="*7B*")))
        assert "no file '*7B*'" in none
        assert "RWKV-5-World-3B-v2.pth (205 kB)" in none

    def test_unreadable_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: Path) -> Iterator[Path]:
            raise PermissionError(13, "Permission denied")

        source = parse_source(str(tmp_path))
        monkeypatch.setattr(Path, "iterdir", refuse)
        assert "cannot be read: Permission denied" in fails(lambda: resolve(source))

    def test_nothing_to_choose(self, tmp_path: Path) -> None:
        assert "no weights" in fails(lambda: resolve(parse_source(str(tmp_path))))
        write(tmp_path, {"model-00001-of-00002.safetensors": b"x"})
        assert "index.json" in fails(lambda: resolve(parse_source(str(tmp_path))))

    def test_missing_shard(self, tmp_path: Path) -> None:
        write(tmp_path, SHARDED)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        assert "lacks the shard model-00002-of-00002" in fails(lambda: resolve(parse_source(str(tmp_path))))

    @pytest.mark.parametrize(
        "index", [b"not json", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"\xff\xfe"]
    )
    def test_damaged_index(self, tmp_path: Path, index: bytes) -> None:
        write(tmp_path, SHARDED | {"model.safetensors.index.json": index})
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            resolve(parse_source(str(tmp_path)))

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b.bin"])
    def test_index_may_not_leave_its_directory(self, tmp_path: Path, name: str) -> None:
        index = json.dumps({"weight_map": {"a": name}}).encode()
        write(tmp_path, {"model.safetensors.index.json": index})
        with pytest.raises(CheckpointError, match="outside its directory"):
            resolve(parse_source(str(tmp_path)))


class TestHub:
    def test_one_file_of_many(self, hub: HubServer) -> None:
        local = resolve(parse_source("BlinkDL/rwkv-5-world", file="*0.1B*"))
        (path,) = local.files
        assert path.read_bytes() == BIG
        assert local.commit == commit_id(WORLD)
        assert local.directory == path.parent
        assert local.directory is not None
        # What travels along: tokenizer and configuration; no code, no other weights.
        assert sorted(p.name for p in local.directory.iterdir()) == [
            "RWKV-5-World-0.1B-v1.pth",
            "tokenizer.json",
        ]

    def test_error_lists_candidates_and_downloads_nothing(self, hub: HubServer) -> None:
        message = fails(lambda: resolve(parse_source("BlinkDL/rwkv-5-world")))
        assert "BlinkDL/rwkv-5-world holds 2 checkpoints" in message
        assert "RWKV-5-World-3B-v2.pth (205 kB)" in message
        assert hub.downloads() == []

    def test_hugging_face_layout(self, hub: HubServer) -> None:
        local = resolve(parse_source("RWKV/v5-Eagle-7B-HF"))
        assert local.directory is not None
        assert {p.name for p in local.directory.iterdir()} == set(EAGLE) - {"modeling_rwkv5.py"}

    def test_shards(self, hub: HubServer) -> None:
        source = parse_source("RWKV/sharded")
        assert expected_files(source).files == tuple(
            (f"model-0000{i}-of-00002.safetensors", len(BIG)) for i in (1, 2)
        )
        assert not any("/cdn/" in request.path for request in hub.requests)
        local = resolve(source)
        assert [path.read_bytes() for path in local.files] == [BIG, OTHER]
        assert local.index is not None

    def test_revision(self, hub: HubServer) -> None:
        by_name = resolve(parse_source("BlinkDL/rwkv-5-world", revision="old"))
        assert by_name.files[0].read_bytes() == OTHER
        assert by_name.commit is not None
        by_commit = resolve(parse_source("BlinkDL/rwkv-5-world", revision=by_name.commit))
        assert by_commit.files == by_name.files

    def test_second_time_comes_from_the_cache(self, hub: HubServer) -> None:
        source = parse_source("RWKV/v5-Eagle-7B-HF")
        first = resolve(source)
        hub.requests.clear()
        assert resolve(source).files == first.files
        assert hub.downloads() == []

    def test_plan_downloads_nothing(self, hub: HubServer) -> None:
        planned = expected_files(parse_source("BlinkDL/rwkv-5-world", file="*3B*"))
        assert planned.files == (("RWKV-5-World-3B-v2.pth", 2 * len(BIG)),)
        assert planned.commit == commit_id(WORLD)
        assert hub.downloads() == []

    def test_cut_download_is_resumed(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        # The client keeps whole pieces of this size; real ones are 10 MB.
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
        hub.cuts = [30_000, 25_000]
        (path,) = resolve(parse_source("BlinkDL/rwkv-5-world", file="*0.1B*")).files
        assert path.read_bytes() == BIG
        ranges = [r.headers.get("Range") for r in hub.requests if "/cdn/" in r.path and r.method == "GET"]
        assert ranges == [None, "bytes=30000-", "bytes=50000-"]

    def test_download_cut_for_good_leaves_no_file(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        hub.cuts = [0] * 20
        message = fails(lambda: resolve(parse_source("BlinkDL/rwkv-5-world", file="*0.1B*")))
        assert "broke off" in message
        assert "run the command again" in message
        assert list((tmp_path / "cache").rglob("*.pth")) == []
        hub.cuts = []
        (path,) = resolve(parse_source("BlinkDL/rwkv-5-world", file="*0.1B*")).files
        assert path.read_bytes() == BIG

    def test_no_such_repository(self, hub: HubServer) -> None:
        message = fails(lambda: resolve(parse_source("BlinkDL/rwkv-99")))
        assert "no repository BlinkDL/rwkv-99" in message
        assert "HF_TOKEN" in message

    def test_no_such_revision(self, hub: HubServer) -> None:
        message = fails(lambda: resolve(parse_source("BlinkDL/rwkv-5-world", revision="v9")))
        assert "no revision 'v9'" in message

    def test_no_weights(self, hub: HubServer) -> None:
        assert "RWKV/empty holds no weights" in fails(lambda: resolve(parse_source("RWKV/empty")))

    def test_gated(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        message = fails(lambda: resolve(parse_source("RWKV/gated")))
        assert "RWKV/gated is gated" in message
        assert "HF_TOKEN" in message
        monkeypatch.setenv("HF_TOKEN", "hf_member")
        assert resolve(parse_source("RWKV/gated")).files[0].read_bytes() == BIG

    def test_private_and_token_stays_on_the_hub(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "no repository RWKV/private" in fails(lambda: resolve(parse_source("RWKV/private")))
        monkeypatch.setenv("HF_TOKEN", "hf_owner")
        assert resolve(parse_source("RWKV/private")).files[0].read_bytes() == BIG
        redirected = [r for r in hub.requests if "/cdn/" in r.path]
        assert redirected
        assert all(r.headers.get("Authorization") is None for r in redirected)

    def test_server_error(self, hub: HubServer) -> None:
        hub.status = 500
        assert "answered 500" in fails(lambda: resolve(parse_source("RWKV/v5-Eagle-7B-HF")))

    def test_failed_transfer_is_one_line(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: object, **kwargs: object) -> str:
            raise RuntimeError("Data processing error:\n  CAS service error")

        monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", broken)
        message = fails(lambda: resolve(parse_source("RWKV/v5-Eagle-7B-HF")))
        assert "failed: Data processing error: CAS service error" in message

    def test_progress_bars(
        self, hub: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TQDM_POSITION", "-1")  # the client shows bars although stderr is no terminal
        # another test's command line, run in this process, may have switched bars off for good
        monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
        enable_progress_bars()
        resolve(parse_source("BlinkDL/rwkv-5-world", file="*0.1B*"), progress=False)
        out, err = capsys.readouterr()
        assert (out, err) == ("", "")
        resolve(parse_source("BlinkDL/rwkv-5-world", file="*3B*"), progress=True)
        out, err = capsys.readouterr()
        assert out == ""
        assert "RWKV-5-World-3B-v2.pth" in err


class TestWithoutConnection:
    @pytest.mark.parametrize("offline", [True, False], ids=["offline-mode", "no-connection"])
    @pytest.mark.parametrize("name", ["RWKV/sharded", "RWKV/v5-Eagle-7B-HF"])
    def test_cached_repository_is_used(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, offline: bool
    ) -> None:
        online = resolve(parse_source(name))
        hub.stop()
        use_hub(monkeypatch, hub.endpoint, tmp_path / "cache", offline=offline)
        local = resolve(parse_source(name))
        assert local.files == online.files
        assert local.directory == online.directory
        assert local.commit == online.commit
        by_commit = resolve(parse_source(name, revision=online.commit))
        assert by_commit.files == online.files

    def test_not_cached(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "cache", offline=True)
        message = fails(lambda: resolve(parse_source("RWKV/sharded")))
        assert "not in the cache" in message
        assert "offline mode is on" in message
        assert hub.requests == []
        hub.stop()
        use_hub(monkeypatch, hub.endpoint, tmp_path / "cache")
        assert "no connection" in fails(lambda: resolve(parse_source("RWKV/sharded")))

    def test_only_what_was_downloaded_can_be_chosen(
        self, hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        resolve(parse_source("BlinkDL/rwkv-5-world", file="*0.1B*"))
        use_hub(monkeypatch, hub.endpoint, tmp_path / "cache", offline=True)
        assert "0.1B" in fails(lambda: resolve(parse_source("BlinkDL/rwkv-5-world", file="*3B*")))


def test_environment_variables_reach_the_client(hub: HubServer, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, as a user sets them, in a process of its own."""
    code = (
        "from rwkv_rev.folders.hub import resolve\n"
        "from rwkv_rev.folders.source import parse_source\n"
        "print(resolve(parse_source('RWKV/v5-Eagle-7B-HF'), progress=False).files[0])\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        path = Path(done.stdout.strip())
        assert path.is_relative_to(tmp_path / "home")
        assert path.read_bytes() == BIG
        assert bool(hub.requests) == (offline == "0")
        hub.requests.clear()
