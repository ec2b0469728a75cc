"""docs/promises.md names tests that exist, other pages files that exist, and the changelog the version."""

import re
from pathlib import Path

import rwkv_rev

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGE = ROOT / "docs" / "promises.md"
NAMED = sorted(set(re.findall(r"`(?:([\w./]*)::)?(test_\w+)`", PAGE.read_text(encoding="utf-8"))))
"""File and test; without its file a test is not found."""


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| test |")]
    assert len(rows) > 30 and all("::test_" in row for row in rows)


def test_the_tests_are_there() -> None:
    texts = {
        file: (TESTS / file).read_text(encoding="utf-8") for file, _ in NAMED if (TESTS / file).is_file()
    }
    assert [(file, name) for file, name in NAMED if f"def {name}(" not in texts.get(file, "")] == []


PAGES = ("docs/architecture.md", "CONTRIBUTING.md")
PATHS = sorted(
    {
        (page, path)
        for page in PAGES
        for path in re.findall(r"`([\w./]+(?:\.py|\.json|/))`", (ROOT / page).read_text(encoding="utf-8"))
    }
)


def test_the_files_are_there() -> None:
    """From the root or from the package; a file that stands after another one of its folder, without the folder."""
    places = [ROOT, ROOT / "rwkv_rev", ROOT / "converters", ROOT / "rwkv_rev" / "equivalence"]
    places.append(ROOT / "rwkv_rev" / "wkv")
    paths = [(page, path) for page, path in PATHS if not re.search(r"[A-Z]{4}|architectures/", path)]
    assert len(paths) > 50
    assert [
        (page, path) for page, path in paths if not any((place / path).exists() for place in places)
    ] == []


def test_the_changelog_knows_the_version() -> None:
    released = re.findall(
        r"^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
    )
    assert released[0] == rwkv_rev.__version__
