"""``rwkv-rev chat`` from a pipe and in a terminal."""

import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_cases import environment
from processes import context

import rwkv_rev
from rwkv_rev.cli import main
from rwkv_rev.sampling import Sampling

Cli = Callable[..., tuple[int, str, str]]
QUICK = ("--temperature", "0", "--max-new-tokens", "8", "--device", "cpu")
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ '</s>' }}{% endfor %}"
"""One whose end the bundled models never say."""


@pytest.fixture
def say(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    def run(model: Path, text: str, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return cli("chat", model, *QUICK, *options)

    return run


def in_terminal(name: str, arguments: list[str], env: dict[str, str]) -> None:
    """The command as a process of its own, in a session of its own, at the terminal of that name."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for number in range(3):
        os.dup2(terminal, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "rww"[number]) for number in range(3))
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    main(arguments)


def told(err: str) -> list[str]:
    return [line for line in err.splitlines() if "Loading weights" not in line]


def test_from_a_pipe(bundled: dict[str, Path], say: Cli, tmp_path: Path) -> None:
    """An answer to each line; a state that is saved and loaded goes on as if nothing had been between."""
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat-template", str(template))
    chat = rwkv_rev.chat(bundled["7"], device="cpu", chat_template=template)
    sampling = Sampling(0, 0.3, 0, 0.5, 0.5, 0.996)
    expected = [chat.say(turn, sampling, max_new_tokens=8) for turn in ("Hello", "And you?")]
    assert all(expected)
    assert say(bundled["7"], "Hello\nAnd you?\n", *options)[:2] == (
        0,
        "".join(f"{answer}\n" for answer in expected),
    )
    script = "Hello\n/save a.safetensors\n\n/reset\nOther\n/load a.safetensors\nAnd you?\n/help\n"
    code, out, err = say(bundled["7"], script, *options)
    assert code == 0 and (out.splitlines()[0], out.splitlines()[-1]) == (expected[0], expected[1])
    assert told(err)[:3] == [
        "the state is in a.safetensors",
        "the conversation is forgotten",
        "the conversation goes on from a.safetensors",
    ]
    assert "/save FILE" in err and (tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/save\n", "/save needs a file: /save FILE"),
        ("/quit now\n", "/quit is no command of the chat as it stands there; /help lists them"),
        ("/load none.safetensors\n", "none.safetensors: no such file"),
        ("/save a.safetensors\n", "nothing has been said yet, so there is no state to save"),
    ],
)
def test_what_cannot_be_done_ends_a_script(
    bundled: dict[str, Path], say: Cli, text: str, message: str
) -> None:
    code, out, err = say(bundled["4"], text + "Hello\n")
    assert (code, out, told(err)) == (1, "", [f"error: {message}"])


@pytest.mark.parametrize("end", ["/exit", "/quit", "/quit "])
def test_a_script_may_end_the_chat(bundled: dict[str, Path], say: Cli, end: str) -> None:
    """What stands behind is not said, nor is it missed."""
    code, out, err = say(bundled["4"], f"{end}\nHello\n/nothing\n")
    assert (code, out, told(err)) == (0, "", [])
    _, _, err = say(bundled["4"], "/help\n")
    assert "/exit " in err and "/quit" in err


def test_options(bundled: dict[str, Path], say: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("no template")
    for options, message in (
        (("--top-k", "5"), "top_k = 5 is without effect at temperature = 0"),
        (("--chat-template", "t.jinja"), "t.jinja is no chat template"),
        (("--penalty-decay", "2"), "2.0 must be at most 1"),
    ):
        code, out, err = say(bundled["4"], "Hello\n", *options)
        assert code == 2 and out == "" and message in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal of POSIX")
def test_in_a_terminal(bundled: dict[str, Path], tmp_path: Path) -> None:
    """Ctrl-C stops an answer, and at the prompt clears the line; Ctrl-D ends the chat."""
    import pty
    import select

    template = tmp_path / "endless.jinja"  # the model never says what ends its turn
    template.write_text(TEMPLATE)

    ours, theirs = pty.openpty()
    command = ["chat", str(bundled["7"]), "--device", "cpu"]
    command += ["--max-new-tokens", "1000000", "--temperature", "0", "--presence-penalty", "0"]
    command += ["--frequency-penalty", "0", "--chat-template", str(template)]
    process = context().Process(target=in_terminal, args=(os.ttyname(theirs), command, environment()))
    process.start()
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while not re.search(pattern, seen, re.DOTALL):
            assert select.select([ours], [], [], max(0.0, end - time.monotonic()))[0], seen
            seen += os.read(ours, 1 << 16).decode("utf-8", "replace")
        seen = ""

    try:
        wait_for(r"ends the chat.*> ")
        os.close(theirs)
        for _ in range(2):
            os.write(ours, b"Hello\n")
            wait_for("Hello.{50}")
            os.killpg(process.pid, signal.SIGINT)
            wait_for("> ")
        os.write(ours, b"/nothing\n")
        wait_for("error: /nothing is no command.*> ")
        time.sleep(0.5)  # until it waits for the keyboard
        os.killpg(process.pid, signal.SIGINT)
        wait_for("> ")
        os.write(ours, b"\x04")
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()
        os.close(ours)
