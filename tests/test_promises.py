"""docs/promises.md names tests that exist, other pages files that exist, and the changelog the version."""

import re
from pathlib import Path

import pytest

import rwkv_rev

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = ROOT / "docs" / "promises.md"
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))))


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) > 30 and all("::test_" in row for row in rows)


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{file}-{name}" for file, name in NAMED])
def test_the_test_is_there(file: str, name: str) -> None:
    assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8")


PAGES = ("docs/architecture.md", "CONTRIBUTING.md")
PATHS = sorted(
    {
        (page, path)
        for page in PAGES
        for path in re.findall(r"`([\w./]+(?:\.py|\.json|/))`", (ROOT / page).read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_the_file_is_there(page: str, path: str) -> None:
    """From the root or from the package; a file that stands after another one of its folder, without the folder."""
    if not re.search(r"[A-Z]{4}|architectures/", path):
        places = [ROOT, ROOT / "rwkv_rev", ROOT / "converters", ROOT / "rwkv_rev" / "equivalence"]
        assert any((place / path).exists() for place in [*places, ROOT / "rwkv_rev" / "wkv"])


def test_the_changelog_knows_the_version() -> None:
    released = re.findall(
        r"^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
    )
    assert released[0] == rwkv_rev.__version__
