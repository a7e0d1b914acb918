"""Plain values of options are what typer makes of them, without what typer needs for that."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.core import TyperCommand

from encfs.console.commandline import size_option
from encfs.console.commandvalues import Command
from encfs.errors import UsageError

WORDS: list[list[str]] = [
    [],
    ["--text", ""],
    ["--text", "-", "--number", "7", "--negative", "-3"],
    ["--number", " 7"],
    ["--number", "007"],
    ["--number", "1_000"],
    ["--number", "٣"],
    ["--number", "65"],
    ["--number", "0"],
    ["--number", "9" * 18],
    ["--number", "9" * 40],
    ["--number", "7.0"],
    ["--number", "x"],
    ["--fraction", "1.5"],
    ["--fraction", "nan"],
    ["--choice", "one"],
    ["--choice", "ONE"],
    ["--choice", "three"],
    ["--several", "a", "--several", "b"],
    ["--numbers", "1", "--numbers", "-1"],
    ["--numbers", "1", "--numbers", "x"],
    ["--size", "64KiB"],
    ["--size", "x"],
    ["--flag"],
    ["word", "other"],
]


def command(
    words: Annotated[list[str] | None, typer.Argument()] = None,
    text: Annotated[str | None, typer.Option()] = None,
    number: Annotated[int | None, typer.Option(min=1, max=64)] = None,
    negative: Annotated[int, typer.Option()] = 5,
    fraction: Annotated[float | None, typer.Option(min=0.1)] = None,
    choice: Annotated[Literal["one", "two"], typer.Option()] = "one",
    several: Annotated[list[str] | None, typer.Option()] = None,
    numbers: Annotated[list[int] | None, typer.Option()] = None,
    size: Annotated[int | None, size_option("--size", help="x")] = None,
    *,
    flag: Annotated[bool, typer.Option("--flag")] = False,
) -> None:
    raise Called([words, text, number, negative, fraction, choice, several, numbers, size, flag])


class Called(Exception):  # noqa: N818 - not an error
    """The command, with these values."""


def outcome(words: list[str], kind: type[TyperCommand]) -> tuple[str, Any]:
    app = typer.Typer()
    app.command(cls=kind)(command)
    try:
        app(words, standalone_mode=False)
    except Called as called:
        return "called", [(type(value), repr(value)) for value in called.args[0]]
    except typer.TyperException as error:
        return "refused", error.format_message()
    except UsageError as error:
        return "refused", error.message
    raise AssertionError


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_values_and_refusals_are_typers_own(words: list[str]) -> None:
    assert outcome(words, Command) == outcome(words, TyperCommand)


def test_a_command_line_as_it_is_used_does_not_load_pydantic() -> None:
    program = (
        "import sys\nfrom encfs.cli import application\nfrom encfs.console.commandline import main\n"
        "try: main(application(sys.argv[1:]), 'encfs', sys.argv[1:])\n"
        "except SystemExit: print('pydantic' in sys.modules)\n"
    )
    words = ["mount", "oci:nothing:v1", "/nowhere", "-k", "nothing.jwk", "--trust", "x.pub", "--id", "x"]
    words += ["--min-version", "3", "--cache-size", "1GiB", "--concurrency", "8", "--backend", "auto"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n", done.stderr
    assert "x.pub" in done.stderr
