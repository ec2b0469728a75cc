"""Processes of this machine for tests: the ranks of a job, and commands that a test may kill.

A fresh interpreter spends 5 s of processor time on imports before it fine-tunes anything. On Linux these processes are
forked from a server that has imported all of it and computed nothing; elsewhere each starts afresh.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from finetune_cases import environment

START_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
HERE = str(Path(__file__).parent)


def in_ranks(work: Callable[[int], Any], world: int, folder: Path) -> list[Any]:
    """What ``work(rank)``, a function of a module, gives in each of ``world`` gloo processes (files in ``folder``)."""
    context()
    torch.multiprocessing.start_processes(
        _one_rank, args=(work, world, str(folder)), nprocs=world, start_method=START_METHOD
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def wholes(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of tensors, whole where FSDP2 has spread them over a mesh: exchanged at once, not one after another."""
    spread = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "to_local")}
    found = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in spread}
    if spread:
        mesh = next(iter(spread.values())).device_mesh
        own = {name: tensor.to_local().detach().cpu().numpy() for name, tensor in spread.items()}
        group = mesh.get_group(mesh.ndim - 1)
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(parts, own, group=group)
        found |= {name: torch.cat([torch.from_numpy(part[name]) for part in parts]) for name in own}
    return found


def start_command(
    arguments: Sequence[object],
    streams: Path,
    env: dict[str, str],
    module: str = "rwkv_rev.cli",
    *,
    last: int | None = None,
) -> multiprocessing.process.BaseProcess:
    """``python -m MODULE`` as a process of its own, which writes to ``streams``.out and ``streams``.err.

    A fine-tuning run is killed (SIGKILL) after checkpoint ``last``, where it is given.
    """
    launched = () if module == "rwkv_rev.cli" else (True, _server())
    given = ([*map(str, arguments)], str(streams), env, module, *launched)
    target, given = (_command, given) if last is None else (_killed, (last, *given))
    process = context().Process(target=target, args=given)
    process.start()
    return process


def start_command_in_ranks(
    arguments: Sequence[object],
    world: int,
    streams: Path,
    env: dict[str, str],
    *,
    last: Mapping[int, int] | None = None,
) -> list[multiprocessing.process.BaseProcess]:
    """One ``rwkv-rev`` per rank, told about the others as torchrun would; they write to ``streams``.0.out and so on.

    Those in ``last`` are killed after that checkpoint of a fine-tuning run.
    """
    env = env | _of_ranks(world, free_port())
    return [
        start_command(
            arguments,
            Path(f"{streams}.{rank}"),
            env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            last=(last or {}).get(rank),
        )
        for rank in range(world)
    ]


def free_port() -> int:
    """Of a server that will listen soon: below those from which connections take theirs by themselves."""
    while True:
        port = random.SystemRandom().randrange(12000, 32000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _of_ranks(world: int, port: int) -> dict[str, str]:
    """What torchrun says to all ranks alike."""
    sizes = {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def run_command(
    *arguments: object,
    world: int = 1,
    env: dict[str, str] | None = None,
    timeout: float = 300,
    module: str = "rwkv_rev.cli",
) -> subprocess.CompletedProcess[str]:
    """Wait for ``rwkv-rev``, in one process or several: rank 0's output, everybody's errors, the largest exit code.

    Or for another ``module``, in one process.
    """
    env = environment() if env is None else env
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder) / "rank"
        if world == 1:
            started = [start_command(arguments, Path(f"{streams}.0"), env, module)]
        else:
            started = start_command_in_ranks(arguments, world, streams, env)
        for process in started:
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
        codes = [process.exitcode for process in started]
        errors = "".join(Path(f"{streams}.{rank}.err").read_text("utf-8") for rank in range(world))
        output = Path(f"{streams}.0.out").read_text("utf-8")
    return subprocess.CompletedProcess(arguments, max(abs(code or 0) for code in codes), output, errors)


def run_commands(
    commands: Mapping[str, Sequence[object]],
    world: int = 1,
    *,
    env: dict[str, str] | None = None,
    more: Mapping[str, dict[str, str]] | None = None,
    timeout: float = 600,
) -> dict[str, subprocess.CompletedProcess[str]]:
    """As :func:`run_command`, one after another in the same processes: they start, and torch makes its plans for
    sharded tensors, once. All must succeed. ``more`` is the environment of one of them.
    """
    jobs = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, command) in enumerate(commands.items()):
            own = (environment() if env is None else env) | (more or {}).get(name, {})
            own |= {} if world == 1 else _of_ranks(world, free_port())
            jobs[name] = ([*map(str, command)], f"{folder}/{number}", own)
        started = [
            context().Process(target=_commands, args=([*jobs.values()], rank, world)) for rank in range(world)
        ]
        for process in started:
            process.start()
        multiprocessing.connection.wait([process.sentinel for process in started], timeout)
        for process in started:
            process.join(120)  # where one has failed, the others wait for it in vain
            if process.exitcode is None:
                process.kill()
                process.join()
        done = {}
        for name, (arguments, streams, _) in jobs.items():
            said = [Path(f"{streams}.{rank}.err") for rank in range(world)]
            errors = "".join(file.read_text("utf-8") for file in said if file.exists())
            whole = [Path(f"{streams}.{rank}.done").exists() for rank in range(world)]
            assert all(whole), (name, whole, errors[-4000:])
            output = Path(f"{streams}.0.out").read_text("utf-8")
            done[name] = subprocess.CompletedProcess(arguments, 0, output, errors)
    return done


def run_python(
    command: Sequence[object],
    *,
    input: str = "",
    env: dict[str, str] | None = None,
    check: bool = False,
    text: bool = True,
    **_: object,
) -> subprocess.CompletedProcess[Any]:
    """As ``subprocess.run`` with both streams captured, of ``[sys.executable, "-c", CODE, ...]``, or ``"-m", MODULE``,
    or a FILE: forked where there is a server, so that nothing is imported once more.

    In place of ``subprocess.run`` where a program starts others of its own, too.
    """
    env = dict(os.environ) if env is None else env
    python, *words = map(str, command)
    assert python == sys.executable, command
    if START_METHOD == "spawn":
        return subprocess.run(
            [python, *words], input=input, env=env, check=check, capture_output=True, text=True
        )
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder) / "python"
        streams.with_suffix(".in").write_text(input, "utf-8")
        process = context().Process(target=_python, args=(words, str(streams), env))
        process.start()
        process.join()
        out, errors = (streams.with_suffix(f".{name}").read_text("utf-8") for name in ("out", "err"))
    done = subprocess.CompletedProcess([python, *words], process.exitcode or 0, out, errors)
    if check:
        done.check_returncode()
    return done


def context() -> Any:
    """Starts processes. The server reads the environment once, when it imports: nobody's Hub, no GPU, one thread."""
    if START_METHOD == "forkserver":
        from multiprocessing import forkserver

        former = dict(os.environ)
        path = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ.update(environment(PYTHONPATH=path))
        try:
            forkserver.set_forkserver_preload(["preloaded"])
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(former)
    return multiprocessing.get_context(START_METHOD)


def _one_rank(rank: int, work: Callable[[int], Any], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def _command(
    arguments: list[str],
    streams: str,
    env: dict[str, str],
    module: str,
    alone: bool = True,
    server: dict[str, Any] | None = None,
) -> None:
    """``alone`` where nobody else writes to ``streams``; a rank beside its launcher has a session of its own.

    What a launcher starts is forked from ``server``, where that is given.
    """
    _begin(streams, env, alone)
    try:
        if module == "rwkv_rev.cli":
            from rwkv_rev.cli import main

            if arguments[0] == "finetune":
                _without_curve()
            main(arguments)
        else:
            if START_METHOD == "forkserver" and server is not None:
                _fork_workers(streams, server, fresh="0" if module == "torch.distributed.run" else "")
            sys.argv = [module, *arguments]
            sys.modules.pop(module, None)  # imported by the server
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # what comes when the command is over ends the process, and nothing of multiprocessing's
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def _killed(last: int, *given: Any) -> None:
    from rwkv_rev.training.trainer import RwkvRevTrainer

    save = RwkvRevTrainer._save_checkpoint

    def then_killed(trainer: RwkvRevTrainer, *arguments: Any) -> None:
        save(trainer, *arguments)
        if trainer.state.global_step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    RwkvRevTrainer._save_checkpoint = then_killed  # type: ignore[method-assign]
    _command(*given)


def _commands(jobs: list[tuple[list[str], str, dict[str, str]]], rank: int, world: int) -> None:
    """Of one rank. What libraries keep of a group of processes goes with the command."""
    from accelerate.state import AcceleratorState, GradientState

    own = {} if world == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for arguments, streams, env in jobs:
        code: object = 1
        try:
            _command(arguments, f"{streams}.{rank}", env | own, "rwkv_rev.cli")
        except SystemExit as end:
            code = end.code
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if code:
            raise SystemExit(code)
        Path(f"{streams}.{rank}.done").touch()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def _begin(streams: str, env: dict[str, str], alone: bool = True) -> None:
    """As a process that was started with these streams and this environment."""
    assert START_METHOD == "spawn" or "preloaded" in sys.modules, "the server swallows an ImportError"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started by ignores
    os.environ.clear()
    os.environ.update(env)
    if not alone:
        os.setsid()
    for number, ending in ((1, "out"), (2, "err")):
        how = os.O_WRONLY | os.O_APPEND | (os.O_CREAT | os.O_TRUNC if alone else 0)
        file = os.open(f"{streams}.{ending}", how)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)


def _python(words: list[str], streams: str, env: dict[str, str]) -> None:
    _begin(streams, env)
    sys.stdin = os.fdopen(os.open(f"{streams}.in", os.O_RDONLY), encoding="utf-8")
    sys.argv = words[1:] if words[0].startswith("-") else words
    if words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def _without_curve() -> None:
    """As in ``finetune_cases.finetune``; what torchrun starts afresh draws it."""
    from rwkv_rev.training import saving

    saving.has_matplotlib = lambda: False


def _server() -> dict[str, Any] | None:
    """By what a process that it forked finds the server again."""
    context()
    if START_METHOD == "spawn":
        return None
    from multiprocessing import forkserver

    names = ("_forkserver_address", "_forkserver_authkey")  # the latter of Python 3.14
    found = forkserver._forkserver
    return {name: getattr(found, name) for name in names if hasattr(found, name)}


def _fork_workers(streams: str, server: dict[str, Any], fresh: str) -> None:
    """What torch's launcher starts as ``python -u -m rwkv_rev.cli ...`` is forked from the server, too, but for the
    rank ``fresh``, which is started as it says."""
    from multiprocessing import forkserver

    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    vars(forkserver._forkserver).update(server)
    forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None
    start = subprocess_handler.SubprocessHandler._popen

    def popen(self: Any, args: Sequence[str], env: dict[str, str]) -> Any:
        return start(self, args, env) if env["RANK"] == fresh else _Forked(streams, args, env)

    subprocess_handler.SubprocessHandler._popen = popen


class _Forked:
    """As much of ``subprocess.Popen`` as the launcher asks for."""

    def __init__(self, streams: str, command: Sequence[str], env: dict[str, str]) -> None:
        python, *module, subcommand = command[:5]
        assert (python, module) == (sys.executable, ["-u", "-m", "rwkv_rev.cli"]), command
        self.process = context().Process(
            target=_command, args=([subcommand, *command[5:]], streams, env, "rwkv_rev.cli", False)
        )
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> None:
        self.process.join(timeout)
