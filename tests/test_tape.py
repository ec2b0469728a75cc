"""The tape: what is pushed comes back, last in first out, and nothing stays behind on the disk."""

import errno
import os
import signal
import sys
import tempfile
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from processes import context, run_python
from torch import Tensor

from rwkv_rev.errors import StrategyError
from rwkv_rev.reversal import tape as tape_module
from rwkv_rev.reversal.tape import Tape

PLACES = ("host", "device", "disk")
CPU = torch.device("cpu")
Record = list[list[Tensor]]


def record(seed: int, layers: int = 2) -> Record:
    """Tensors of every kind that strategies push: packed bytes of odd length, scalars, empty, strided, half, bool."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randint(0, 256, (2 * seed + layer + 1,), generator=generator, dtype=torch.uint8),
            torch.randn(3, 5, generator=generator),
            torch.randn(4, 3, generator=generator).to(torch.bfloat16).t(),
            torch.tensor(2**62 + seed),
            torch.empty(0, dtype=torch.uint8),
            torch.randn(2, 3, generator=generator, dtype=torch.float64),
            torch.rand(1, 7, generator=generator) < 0.5,
            torch.randint(-9, 9, (2, 2, 3), generator=generator, dtype=torch.int32),
        ]
        for layer in range(layers)
    ]


def assert_same(found: Record, expected: Record) -> None:
    for found_layer, layer in zip(found, expected, strict=True):
        for got, want in zip(found_layer, layer, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("place", PLACES)
def test_last_in_first_out(place: str, tmp_path: Path) -> None:
    with Tape(place, CPU, tmp_path) as tape:
        records = [record(seed) for seed in range(20)]
        for item in records:
            tape.push(item)
        assert len(tape) == 20
        for item in reversed(records[10:]):
            assert_same(tape.pop(), item)
        tape.push(records[3])
        assert_same(tape.pop(), records[3])
        for item in reversed(records[:10]):
            assert_same(tape.pop(), item)
        assert len(tape) == 0 and tape.nbytes == 0


@pytest.mark.parametrize("place", PLACES)
def test_values_are_copied(place: str, tmp_path: Path) -> None:
    with Tape(place, CPU, tmp_path) as tape:
        tensor = torch.ones(5, requires_grad=True)
        tape.push([[tensor]])
        with torch.no_grad():
            tensor.zero_()
        found = tape.pop()[0][0]
        assert torch.equal(found, torch.ones(5)) and not found.requires_grad


@pytest.mark.parametrize("place", PLACES)
def test_it_knows_its_bytes(place: str, tmp_path: Path) -> None:
    with Tape(place, CPU, tmp_path) as tape:
        tape.push([[torch.zeros(1000), torch.zeros(3, dtype=torch.uint8)], [torch.zeros(500)]])
        first = tape.nbytes
        assert 6003 <= first <= 6003 + 3 * 15  # rounded up to 16 bytes each
        tape.push([[torch.zeros(100)]])
        assert tape.peak_nbytes == tape.nbytes == first + 400
        tape.pop()
        assert tape.nbytes == first and tape.peak_nbytes == first + 400
        tape.close()
        assert tape.nbytes == 0 and tape.peak_nbytes == first + 400


@pytest.mark.parametrize("place", PLACES)
def test_more_than_one_slab(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_module, "_SMALLEST_SLAB", 2**12)
    monkeypatch.setattr(tape_module, "_LARGEST_SLAB", 2**14)
    with Tape(place, CPU, tmp_path) as tape:
        records = [[[torch.full((size,), float(size))]] for size in (10, 3000, 1, 20000, 5, 4096, 4096)]
        for item in records:
            tape.push(item)
        for item in reversed(records):
            assert_same(tape.pop(), item)


@pytest.mark.parametrize("place", PLACES)
def test_closing_twice_and_using_what_was_popped_afterwards(place: str, tmp_path: Path) -> None:
    with Tape(place, CPU, tmp_path) as tape:
        tape.push([[torch.arange(100_000)]])
        kept = tape.pop()[0][0]
    tape.close()
    assert torch.equal(kept, torch.arange(100_000))


# --- nothing stays behind -------------------------------------------------------------------------------------------


def open_files() -> list[str]:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    return [str(link.readlink()) for link in folder.iterdir() if link.is_symlink()]


def leftovers(folder: Path) -> list[str]:
    return [name for name in open_files() if name.startswith(str(folder))] + [
        str(p) for p in folder.iterdir()
    ]


def test_the_file_is_gone_after_close_and_has_no_name_before(tmp_path: Path) -> None:
    with Tape("disk", CPU, tmp_path) as tape:
        tape.push(record(0))
        assert list(tmp_path.iterdir()) == []
        assert leftovers(tmp_path)  # an open file without a name
    assert leftovers(tmp_path) == []


def test_the_file_is_gone_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Tape("disk", CPU, tmp_path) as tape:
        tape.push(record(0))
        raise ZeroDivisionError
    assert leftovers(tmp_path) == []


def fill_and_wait(folder: Path, mebibytes: int, told: Connection) -> None:
    tape = Tape("disk", CPU, folder)
    block = torch.ones(2**20, dtype=torch.uint8)
    for _ in range(mebibytes):
        tape.push([[block]])
    told.send("full")
    time.sleep(60)


def kill_with_a_tape(folder: Path, mebibytes: int) -> None:
    """Fill a tape in a process of its own, kill that, and look at the folder; then make a tape there again."""
    started = context()
    here, there = started.Pipe(duplex=False)
    process = started.Process(target=fill_and_wait, args=(folder, mebibytes, there))
    process.start()
    there.close()
    try:
        assert here.recv() == "full"  # an EOFError where the process has ended
        assert list(folder.iterdir()) == []
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(folder.iterdir()) == []
    with Tape("disk", CPU, folder) as tape:
        tape.push(record(1))
        assert_same(tape.pop(), record(1))


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    kill_with_a_tape(tmp_path, 128)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_process_with_several_slabs_leaves_no_file(tmp_path: Path) -> None:
    if free_bytes(tmp_path) < 2**30:
        pytest.skip("needs 1 GiB of free disk")
    kill_with_a_tape(tmp_path, 600)  # slabs grow up to 256 MiB


# --- refusals -------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[StrategyError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_place_that_does_not_exist() -> None:
    with pytest.raises(StrategyError) as error:
        Tape("cloud", CPU)
    assert "'cloud'" in one_line(error) and "'disk'" in one_line(error)


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_folder_that_cannot_be_written(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "tape"
    if kind == "a file":
        folder.write_text("")
    with pytest.raises(StrategyError) as error:
        Tape("disk", CPU, folder)
    assert str(folder) in one_line(error) and "tape_dir" in one_line(error)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StrategyError):
        Tape("disk", CPU, tmp_path)


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tape("disk", CPU, tmp_path) as tape:
        tape.push(record(0))
        monkeypatch.setattr(tape_module, "_grow", no_room)
        with pytest.raises(StrategyError) as error:
            for _ in range(20):
                tape.push([[torch.ones(2**20)]])
    assert "No space left" in one_line(error) and "tape_dir" in one_line(error)
    assert leftovers(tmp_path) == []


def test_a_real_limit_on_the_file_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    script = f"""
        import resource, signal, torch
        from rwkv_rev.errors import StrategyError
        from rwkv_rev.reversal.tape import Tape
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 2**20, 20 * 2**20))
        try:
            with Tape("disk", torch.device("cpu"), {str(tmp_path)!r}) as tape:
                for _ in range(40):
                    tape.push([[torch.ones(2**20, dtype=torch.uint8)]])
        except StrategyError as error:
            print(error)
    """
    done = run_python([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert done.stdout.startswith("the disk tape cannot grow") and done.stdout.count("\n") == 1


@pytest.mark.parametrize("allocate", ["fallocate", "zeros"])
def test_the_file_is_allocated_ahead(allocate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file on a full disk would kill the process at the first write into a hole."""
    if allocate == "zeros":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    elif not hasattr(os, "posix_fallocate"):
        pytest.skip("needs posix_fallocate")
    grow: Callable[..., None] = tape_module._grow
    size = tape_module._SMALLEST_SLAB + 4096
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        grow(file, 0, size)
        grow(file, size, 8192)
        status = os.fstat(file.fileno())
        assert status.st_size == size + 8192
        assert status.st_blocks * 512 >= status.st_size


# --- what it takes of the process's memory --------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_record_leaves_some_bytes_and_no_objects(place: str, tmp_path: Path) -> None:
    """Of records whose sizes depend on the data: a context of a million tokens has many."""
    records = [[[torch.zeros(50 + n % 7), torch.zeros(2, 3)], [torch.zeros(n % 5)]] for n in range(1000)]
    with Tape(place, CPU, tmp_path) as tape:
        tape.push(records[0])
        tracemalloc.start()
        for item in records:
            tape.push(item)
        left, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert left < 300 * len(records)
        for item in reversed(records):
            assert_same(tape.pop(), item)


def mapped_bytes(folder: Path) -> int:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    ranges = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(folder) in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def test_one_piece_of_the_file_is_mapped(tmp_path: Path) -> None:
    block = torch.ones(2**20, dtype=torch.uint8)
    with Tape("disk", CPU, tmp_path) as tape:
        for number in range(20):
            tape.push([[block * number]])
            assert 0 < mapped_bytes(tmp_path) <= tape_module._LARGEST_PIECE
        for number in reversed(range(20)):
            assert_same(tape.pop(), [[block * number]])
            assert mapped_bytes(tmp_path) <= tape_module._LARGEST_PIECE


@pytest.mark.parametrize("place", PLACES)
def test_records_without_bytes(place: str, tmp_path: Path) -> None:
    with Tape(place, CPU, tmp_path) as tape:
        records: list[Record] = [[[]], [[torch.empty(0)], []], [[torch.ones(3)]], [[]]]
        for item in records:
            tape.push(item)
        for item in reversed(records):
            assert_same(tape.pop(), item)
