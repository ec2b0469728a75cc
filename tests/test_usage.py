"""Usage errors: one line, with what would work; no option twice; every number by one rule."""

import re
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer

from rwkv_rev.cli import COMMANDS, _load, build_app, output

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("finetune", "--lrr", "1"), "there is no option --lrr; did you mean --lr? (rwkv-rev finetune --help)"),
        (("eval", "m", "--context-lenght", "1"), "no option --context-lenght; did you mean --context-length?"),
        (("eval", "m", "--zzzz"), "there is no option --zzzz (rwkv-rev eval --help)"),
        (("--versoin",), "there is no option --versoin; did you mean --version? (rwkv-rev --help)"),
        (("fintune",), "no such command 'fintune'. Did you mean 'finetune'? (rwkv-rev --help)"),
        (("eval",), "missing argument 'DIR' (rwkv-rev eval --help)"),
        (("verify", "a", "b"), "got unexpected extra argument(s) (b) (rwkv-rev verify --help)"),
        (("finetune", "--lr"), "option '--lr' requires an argument"),
        (("verify", "a", "--oracle", "foo"), "'--oracle': 'foo' is not one of 'auto', 'rwkv'"),
        (("inspect", "x", "a\x1b[2Jb\n"), r"argument(s) (a\x1b[2Jb"),
    ],
    ids=lambda value: " ".join(value).encode("unicode_escape").decode() if isinstance(value, tuple) else "",
)  # fmt: skip
def test_one_line(cli: Cli, words: tuple[str, ...], message: str) -> None:
    code, out, err = cli(*words)
    assert (code, out, err.count("\n")) == (2, "", 1) and "\x1b" not in err
    assert err.startswith("error: ") and message in err


def test_without_a_word_there_is_help(cli: Cli) -> None:
    code, _, err = cli()
    assert code == 2 and err.startswith("Usage: rwkv-rev")


def numeric_options() -> Iterator[tuple[str, str]]:
    """Command and option of every number."""
    for name, _ in COMMANDS:
        command: Any = typer.main.get_command(build_app(name))
        command = command.commands[name]
        for each in getattr(command, "commands", {name: command}).values():
            for param in each.params:
                if param.metavar in ("N", "X", "T", "C", "B"):
                    yield name, param.opts[0]


NUMERIC = list(numeric_options())


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in NUMERIC))
def test_numbers_are_plain(cli: Cli, name: str) -> None:
    """As in files of settings: what readers disagree about is refused, by the option's name.

    A text or two for each option; all texts for each command.
    """
    options = [option for command, option in NUMERIC if command == name]
    texts, wrong = ["1_0", "010", "1 0", "١٠", "ten", ""], {}
    for turn in range(max(len(options), len(texts))):
        option, text = options[turn % len(options)], texts[turn % len(texts)]
        code, _, err = cli(name, option, text)
        if code != 2 or option not in err or not re.search("is not a (plain|number of tokens)", err):
            wrong[option, text] = err
    assert wrong == {}


def functions(name: str) -> list[Any]:
    """Of a command, or of each of several under one name."""
    loaded = _load(name)
    return (
        [each.callback for each in loaded.registered_commands]
        if isinstance(loaded, typer.Typer)
        else [loaded]
    )


def test_every_number_is_looked_at() -> None:
    numbers = [
        name
        for name, _ in COMMANDS
        for function in functions(name)
        for hint in typing.get_type_hints(function).values()
        if hint is Any or any(kind in (hint, *typing.get_args(hint)) for kind in (int, float))  # Any: or auto
    ]
    assert len(numbers) == len(NUMERIC) > 30


@pytest.mark.parametrize("option", ["--lengths", "--chunk-length", "--memory-limit"])
@pytest.mark.parametrize("text", ["1_0", "010"])
def test_numbers_of_bench(cli: Cli, option: str, text: str) -> None:
    kind = "memory" if option == "--memory-limit" else "training"
    code, _, err = cli("bench", kind, "--device", "cpu", option, text)
    assert code != 0 and text in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "m", "--lr", "1", "--lr", "2"),
        ("inspect", "m", "--json", "--json"),
        ("convert", "m", "--verify", "--no-verify"),
        ("generate", "m", "--prompt", "a", "--seed", "1", "--seed", "1"),
    ],
    ids=lambda words: words[-1],
)
def test_no_option_twice(cli: Cli, words: tuple[str, ...]) -> None:
    code, _, err = cli(*words)
    option = words[-1].replace("--no-", "--") if words[-1].startswith("--") else words[-2]
    assert code == 2 and option in err and "it is given 2 times; give it once" in err


def test_a_terminal_has_long_lines_folded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "warning: " + "some words " * 30
    output.note(text)
    assert capsys.readouterr().err == text + "\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for columns in (60, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        output.note(text)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) > 3 and max(map(len, lines)) <= min(columns, 80)
        assert " ".join(lines).split() == text.split()
