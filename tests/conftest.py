"""Fixtures shared by the tests: one thread each, the bundled checkpoints converted once a process, the commands.

Nothing heavy is imported before a fixture needs it: the process that only hands tests out imports this file too.
"""

import gc
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest

import rwkv_rev

collect_ignore = ["peers"]  # `make test-peers` has settings of its own
BUNDLED = {"4": "rwkv-4", "5.2": "rwkv-5.2", "6": "rwkv-6", "7": "rwkv-7"}
LONGEST = (
    "test_finetune_sharded",
    "test_bptt",
    "test_finetune_dist",
    "test_context_parallel",
    "test_borders",
    "test_trl_gradients",
    "test_finetune",
    "test_peft_methods",
    "test_forecast",
    "test_oracle_table",
    "test_memory_flat",
    "test_fresh",
    "test_faults",
    "test_cells",
    "test_sharded_context",
    "test_lasting",
    "test_trl_long",
    "test_samples",
    "test_sharded_unused",
    "test_bptt_integration",
    "test_token_cell",
    "test_token_models",
    "test_bench",
    "test_foreign_code",
    "test_fast",
    "test_registration",
    "test_finetune_context",
    "test_exporting",
    "test_lifted_models",
    "test_compile",
    "test_wkv",
    "test_sharded_blocks",
    "test_examples",
    "test_golden",
    "test_cli",
    "test_tokenization",
    "test_best",
    "test_peft",
    "test_parts",
    "test_finetune_dtype",
    "test_oracles",
    "test_pasted",
    "test_verification",
)
"""Files of more than 13 s, longest first."""


def pytest_collectstart() -> None:
    """Nothing that collection imports is garbage: looking for it would take a fifth of the time."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With ``--dist loadfile`` the file that is handed out last decides when a run ends: let it be a short one."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """What collection made lives as long as the process: looking for garbage in it, even once, takes 0.5 s."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(10_000, 10, 10)  # tests leave little behind, and make many objects


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write the tables in docs/ that tests make")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and test processes that run side by side lose much by them."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_logged() -> None:
    """Python writes what no handler takes to the standard error."""
    logging.getLogger().addHandler(logging.NullHandler())


@pytest.fixture(scope="session", autouse=True)
def several_chunks() -> Iterator[None]:
    """Of a few tokens each, in contexts of a few: chunks of up to 4 tokens are run one by one there, as longer ones
    are. (What runs them as one chunk of 64 is tested in test_small_chunks.py.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rwkv_rev.forecast.TINY_CHUNK", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def seeds_of_what_is_there() -> Iterator[None]:
    """For each kind of device that is not there, torch would keep each seed, with a traceback in words."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cuda", "xpu", "mtia"):
            devices = getattr(torch, name, None)
            if devices is not None and not devices.is_available():
                patch.setattr(devices, "manual_seed_all", lambda seed: None, raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def imported_for_good() -> None:
    """Nor is what earlier files imported: trainers look for garbage at each start, which costs up to 0.1 s."""
    if len(gc.get_objects()) > 30_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave nothing in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_REV_CACHE", str(tmp_path_factory.mktemp("rwkv-rev-cache")))
        yield


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever tests ran before, and in whichever process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the converted bundled checkpoints, by version; all take 0.2 s."""
    root = tmp_path_factory.mktemp("bundled")
    for name in BUNDLED.values():
        rwkv_rev.convert(f"bundled:{name}", root / name)
    return {version: root / name for version, name in BUNDLED.items()}


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Like ``bundled``, but of two layers: for runs that do not depend on their number, in a third of the time."""
    import torch

    root = tmp_path_factory.mktemp("shallow")
    for name in BUNDLED.values():
        weights = torch.load(files("rwkv_rev.bundled") / f"{name}.pth", map_location="cpu", weights_only=True)
        kept = {key: value for key, value in weights.items() if not re.match(r"blocks\.([2-9]|\d\d)", key)}
        torch.save(kept, root / f"{name}.pth")
        rwkv_rev.convert(root / f"{name}.pth", root / name)
    return {version: root / name for version, name in BUNDLED.items()}


@pytest.fixture(scope="module")
def numbered_datasets() -> Iterator[None]:
    """For the name of a file of what it made, which is not written here, datasets hashes code and tokenizers."""
    numbers = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("arrow_dataset", "fingerprint"):
            patch.setattr(f"datasets.{module}.update_fingerprint", lambda *_: f"{next(numbers):016x}")
        yield


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in an empty folder; gives the exit code, stdout and stderr."""
    from rwkv_rev.cli import main

    monkeypatch.chdir(tmp_path)
    for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "error")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("warnings.showwarning", None)
    monkeypatch.setattr("rwkv_rev.progress.EVERY", 1e6)  # whatever else this machine does

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return int(exit_.value.code or 0), streams.out, streams.err

    return run
