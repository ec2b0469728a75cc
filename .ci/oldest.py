"""Constraints that pin whatever pyproject.toml names at its lower bound: `make test-oldest` installs those versions.

Everything else, what those versions need in turn, is as new as they let it be. Needs nothing but Python.
"""

import re
import tomllib
from pathlib import Path

SELF = "rwkv-rev"


def oldest(requirement: str) -> str:
    """`name>=1.2; marker` as `name==1.2; marker`. Raises ValueError where there is anything but a lower bound."""
    found = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?\s*(?:>=|==)\s*([\w.]+)\s*(;.*)?", requirement)
    if found is None:
        raise ValueError(f"{requirement!r}: a lower bound like name>=1.2 is wanted")
    name, version, marker = found.groups()
    return f"{name}=={version}{marker or ''}"


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    lists = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
    ]
    lines = [oldest(line) for group in lists for line in group if not line.startswith(f"{SELF}[")]
    print("\n".join(sorted(set(lines))))


if __name__ == "__main__":
    main()
