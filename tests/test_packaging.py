"""The wheel and the editable install hold the whole package and put no generic name into site-packages; the lock pins
everything that pyproject.toml names, at versions that it admits."""

import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
    import importlib.util, sys
    from pathlib import Path
    import rwkv_rev
    from rwkv_rev.bundled import BUNDLED, bundled_path
    import rwkv_rev.cli, rwkv_rev.converters
    from rwkv_rev.folders.source import parse_source

    assert Path(rwkv_rev.__file__).is_relative_to(sys.argv[1]), rwkv_rev.__file__
    assert all(bundled_path(name).stat().st_size > 2_000_000 for name in BUNDLED)
    for name in ("cli", "converters", "tests", "rwkv_rev.tests"):
        assert importlib.util.find_spec(name) is None, name
"""


def python(*arguments: str | Path, cwd: Path) -> None:
    """Run Python away from the checkout, so that nothing is found only because it lies in the current folder."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def installed_names() -> set[str]:
    """Every Python file of the package by its installed name."""
    names = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rwkv_rev").rglob("*.py")}
    for top in ("cli", "converters"):
        names |= {f"rwkv_rev/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / top).rglob("*.py")}
    return names


def locked() -> list[tuple[Requirement, int]]:
    """Every entry of the lock, and its number of hashes."""
    lines = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    entries = [re.split(r"\s+--hash=sha256:[0-9a-f]{64}", line) for line in lines if not line.startswith("#")]
    assert all(rest.strip() == "" for _, *hashes in entries for rest in hashes)
    return [(Requirement(entry), len(hashes)) for entry, *hashes in entries]


def declared() -> list[Requirement]:
    """What pyproject.toml names: to run, in every extra, to build, and to install and lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [
        project["build-system"]["requires"],
        project["project"]["dependencies"],
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    ]
    return [Requirement(line) for group in groups for line in group if not line.startswith("rwkv-rev[")]


def test_lock_pins_what_pyproject_names() -> None:
    versions = {
        canonicalize_name(entry.name): str(entry.specifier).removeprefix("==") for entry, _ in locked()
    }
    for wanted in declared():
        if wanted.name != "torch":
            assert versions[canonicalize_name(wanted.name)] in wanted.specifier, wanted


def test_lock_holds_hashes_and_leaves_the_build_of_torch_open() -> None:
    names = [canonicalize_name(entry.name) for entry, _ in locked()]
    assert len(names) == len(set(names)) > 50  # one version for all systems
    assert all(re.fullmatch(r"==[0-9][^,*]*", str(entry.specifier)) and count for entry, count in locked())
    assert not [name for name in names if re.match(r"torch$|triton|cuda|nvidia", name)]
    assert {"sympy", "networkx", "jinja2", "fsspec"} <= set(names)  # what every build of torch needs
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_oldest_versions_are_the_lower_bounds() -> None:
    """What `make test-oldest` installs."""
    oldest = runpy.run_path(str(ROOT / ".ci" / "oldest.py"))["oldest"]
    for wanted in declared():
        (bound,), pinned = wanted.specifier, Requirement(oldest(str(wanted)))
        assert (pinned.name, pinned.marker) == (wanted.name, wanted.marker)
        assert str(pinned.specifier) == f"=={bound.version}"
    for unclear in ("numpy", "numpy<3", "numpy>=2,<3", "numpy~=2.0"):
        with pytest.raises(ValueError, match="a lower bound like"):
            oldest(unclear)


def test_readme_installs_what_make_installs() -> None:
    """The lock, and the same torch."""
    (torch,) = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = (ROOT / "README.md").read_text()
    assert f"pip install {torch} " in commands
    assert "pip install --no-deps --require-hashes -r requirements.lock" in commands


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the package alone, so that building leaves nothing in the real checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("rwkv_rev", "cli", "converters"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("wheel")
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", checkout / "dist", checkout, cwd=checkout)
    (found,) = (checkout / "dist").glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert installed_names() <= names
    assert {f"rwkv_rev/bundled/rwkv-{version}.pth" for version in ("4", "5.2", "6", "7")} <= names
    assert {name.split("/")[0] for name in names} == {"rwkv_rev", wheel.name.split("-py3")[0] + ".dist-info"}


@pytest.mark.slow
def test_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    python(
        "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path
    )
    assert {path.name for path in target.iterdir()} - {"bin", "Scripts"} == {
        "rwkv_rev",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    script = f"import sys; sys.path.insert(0, {str(target)!r})\n" + textwrap.dedent(CHECK)
    script += "rwkv_rev.cli.main(sys.argv[2:])"
    python("-c", script, target, "convert", "bundled:rwkv-4", "--no-verify", "--quiet", cwd=tmp_path)
    assert (tmp_path / "rwkv-4-rev" / "model.safetensors").exists()


@pytest.mark.slow
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    """In a virtual environment of its own that sees this one's packages, but not this one's install."""
    environment = tmp_path / "venv"
    python("-m", "venv", "--without-pip", environment, cwd=tmp_path)
    bases = {"base": str(environment), "platbase": str(environment)}
    paths = {name: Path(path) for name, path in sysconfig.get_paths("venv", bases).items()}
    inner, site = paths["scripts"] / "python", paths["purelib"]
    # Added as a plain folder: its own .pth files, where an editable install lives, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    python("-m", "pip", "--python", inner, "install", *options, "--editable", checkout, cwd=tmp_path)
    for command in (
        [inner, "-c", textwrap.dedent(CHECK), checkout],
        [inner.with_name("rwkv-rev"), "--version"],
    ):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
