"""The verdict on peers' suites: what is new, what passes though it is listed, and entries that list nothing."""

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

PEERS = Path(__file__).parent / "peers"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers_run", PEERS / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verdict(run: ModuleType) -> None:
    known = [{"test": "a.py::*test_one*"}, {"test": "a.py::*test_gone"}]
    outcomes = {
        "a.py::A::test_one[x]": "failed",
        "a.py::B::test_one[y]": "skipped",
        "a.py::A::test_two": "passed",
    }
    assert run.judge(outcomes, known, whole=False) == []
    assert run.judge(outcomes, known, whole=True) == ["lists nothing that fails: a.py::*test_gone"]
    outcomes |= {"a.py::B::test_one[y]": "passed", "a.py::A::test_two": "failed"}
    assert run.judge(outcomes, known, whole=False) == [
        "fails: a.py::A::test_two",
        "passes, but is listed (a.py::*test_one*): a.py::B::test_one[y]",
    ]


def test_every_exception_has_a_suite_and_a_reason(run: ModuleType) -> None:
    known = tomllib.loads((PEERS / "known.toml").read_text("utf-8"))["known"]
    for entry in known:
        assert set(entry) - {"may_pass", "some_cpus"} == {"test", "reason"}
        assert len(entry["reason"]) > 20
        suite = entry["test"].split(".py::")[0].removeprefix("suite_")
        assert suite in run.SUITES
        assert "[" not in entry["test"]  # would be a set of characters
    assert {path.stem.removeprefix("suite_") for path in PEERS.glob("suite_*.py")} == set(run.SUITES)
