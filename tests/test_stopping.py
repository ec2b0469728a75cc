"""One of several processes, told to stop while it waits in native code for another that is gone."""

import os
import signal
import subprocess
import sys
import time

import pytest

STUCK = """
import ctypes, os, sys, time
from rwkv_rev.cli import stopping
stopping.STUCK = float(sys.argv[1])
stopping.install_handlers()
print("ready", flush=True)
if sys.argv[2] == "native":  # a second lock of what nobody unlocks: no signal interrupts it
    lock = ctypes.create_string_buffer(128)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks by the size that Linux gives them")
@pytest.mark.parametrize("where, world, lines", [("native", "2", 1), ("python", "2", 0), ("python", "", 0)])
def test_a_signal_that_python_does_not_see(where: str, world: str, lines: int) -> None:
    env = os.environ | {"WORLD_SIZE": world, "RANK": "1"}
    started = subprocess.Popen(
        [sys.executable, "-c", STUCK, "0.3", where],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    time.sleep(0.3)
    started.send_signal(signal.SIGTERM)
    try:
        _, told = started.communicate(timeout=30)
    finally:
        started.kill()
    assert started.returncode == 128 + signal.SIGTERM
    assert told.count("\n") == lines and ("waited for another process" in told) == bool(lines)
