"""Writes every test's outcome to a file, for ``run.py``."""

import json
import os
from pathlib import Path

import pytest

import rwkv_rev  # noqa: F401 (registers the Auto classes)

_OUTCOMES: dict[str, str] = {}
_RANK = {"skipped": 0, "passed": 1, "failed": 2}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    before = _OUTCOMES.get(report.nodeid)
    if before is None or _RANK[report.outcome] > _RANK[before]:
        _OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # one of several processes; the first hears of all reports
        return
    Path(os.environ["PEERS_OUTCOMES"]).write_text(json.dumps(_OUTCOMES), "utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of peft's suite, the tests of models that are given to it."""

    def ours(item: pytest.Item) -> bool:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        return item.path.name != "suite_peft.py" or "model_id" in parameters

    items[:] = filter(ours, items)
