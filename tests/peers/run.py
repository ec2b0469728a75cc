"""Run the common test suites of transformers and peft against our classes: ``make test-peers``.

Their source distributions carry the suites. Those of the installed versions are fetched into ``.peers/`` (nothing of
them is committed), staged as packages ``peer_transformers`` and ``peer_peft``, and run over every version of our model,
as it is by default and with ``reversible`` in short chunks. The outcome is held against ``known.toml``, which lists
what does not pass and why: any other failure fails, and so does a listed test that passes.

    python tests/peers/run.py [transformers] [tokenizers] [peft] [-- further arguments of pytest]
"""

import argparse
import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".peers"
SUITES = {"transformers": "transformers", "tokenizers": "transformers", "peft": "peft"}
"""Our suites, and the distribution whose tests each runs."""
NEEDED = ("parameterized",)
"""Packages that suites import and we do not; pure Python."""
OUTCOMES = "PEERS_OUTCOMES"
"""Environment variable: file that ``conftest.py`` writes the outcomes to."""

_ABSENT = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "../fixtures/sample_text.txt": "Some lines of text.\n\nAnd some more, with numbers: 1, 2, 3.\n",
    "utils/test_configuration_utils.py": (
        'config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "dtype": "float16"}\n'
    ),
}
"""What transformers' suite imports and its distribution leaves out."""


def fetch(name: str) -> Path:
    """The unpacked source distribution of the installed version."""
    version = importlib.metadata.version(name)
    folder = CACHE / f"{name}-{version}"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        source = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        pip(*source, "--dest", str(CACHE), f"{name}=={version}")
        with tarfile.open(CACHE / f"{name}-{version}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    return folder


def stage(name: str) -> None:
    """Make the package ``peer_NAME`` of a distribution's tests."""
    source, package = fetch(name) / "tests", CACHE / "tests" / f"peer_{name}"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(source, package)
    for file, text in (_ABSENT if name == "transformers" else {"__init__.py": ""}).items():
        path = package / file
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, "utf-8")
    site = CACHE / "site"
    missing = [needed for needed in NEEDED if not (site / needed).is_dir()]
    if missing:
        pip("install", "--quiet", "--no-deps", "--target", str(site), *missing)


def pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode:
        raise SystemExit(f"pip {arguments[0]} failed: the suites are fetched when they are first run")


def run(names: list[str], arguments: list[str]) -> dict[str, str]:
    """Outcome (``passed``, ``failed`` or ``skipped``) by test."""
    outcomes = CACHE / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    paths = [str(CACHE / "tests"), str(CACHE / "site"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # small tensors gain nothing from threads
        OUTCOMES: str(outcomes),
    }
    files = [str(HERE / f"suite_{name}.py") for name in names]
    settings = ["-c", str(HERE / "pytest.ini"), "-p", "no:cacheprovider", "--tb=short", "--disable-warnings"]
    pytest = [sys.executable, "-m", "pytest", *settings, *files, *arguments]
    code = subprocess.run(pytest, env=environment, cwd=ROOT).returncode
    if code not in (0, 1) or not outcomes.is_file():  # 1: some failed
        raise SystemExit("the suites did not run to their end")
    return json.loads(outcomes.read_text("utf-8"))


def judge(outcomes: dict[str, str], known: list[dict[str, Any]], *, whole: bool) -> list[str]:
    """What is not as ``known`` says: new failures, listed tests that pass, and, of a whole run, idle entries.

    An entry that ``may_pass`` stands for several tests, of which not all reach what is refused; one that is of
    ``some_cpus`` for numbers that are rounded differently on others.
    """
    wrong = []
    used: set[int] = set()
    for test, outcome in sorted(outcomes.items()):
        entries = [i for i, entry in enumerate(known) if fnmatch.fnmatchcase(test, entry["test"])]
        if outcome == "failed":
            used.update(entries)
            if not entries:
                wrong.append(f"fails: {test}")
        elif outcome == "passed" and any(
            not known[i].get("may_pass") and not known[i].get("some_cpus") for i in entries
        ):
            wrong.append(f"passes, but is listed ({known[entries[0]]['test']}): {test}")
    if whole:
        wrong += [
            f"lists nothing that fails: {e['test']}"
            for i, e in enumerate(known)
            if i not in used and not e.get("some_cpus")
        ]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="which (default: all)")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    names = parser.parse_args(given[:cut]).suites or list(SUITES)
    arguments = given[cut + 1 :]
    shutil.rmtree(CACHE / "models", ignore_errors=True)  # that suite_peft.py makes
    for distribution in sorted({SUITES[name] for name in names}):
        stage(distribution)
    outcomes = run(names, arguments)
    entries = tomllib.loads((HERE / "known.toml").read_text("utf-8"))["known"]
    known = [entry for entry in entries if re.match(rf"suite_({'|'.join(names)})", entry["test"])]
    selected = any(
        argument.startswith(("-k", "--deselect", "-x")) or "::" in argument for argument in arguments
    )
    wrong = judge(outcomes, known, whole=not selected)
    counts = {kind: sum(o == kind for o in outcomes.values()) for kind in ("passed", "failed", "skipped")}
    print(", ".join(f"{count:,} {kind}" for kind, count in counts.items()), "in all")
    for line in wrong:
        print(line)
    if wrong:
        print(f"{len(wrong)} not as tests/peers/known.toml says")
    return 1 if wrong or not outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())
