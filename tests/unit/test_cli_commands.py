"""How the commands are declared: documentation, help, option groups, start-up."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import typer.main

import encfs.cli
import imagetool.cli
from encfs import errors
from encfs.console import commandline
from encfs.console.commandparts import TrustOptions
from encfs.console.terminal import INTERNAL_ERROR_EXIT_CODE, Settings, Terminal
from encfs.format.frames import DEFAULT_FRAME_SIZE
from encfs.format.writer import DEFAULT_SEGMENT_SIZE
from encfs.keys.jwk import GENERATED_TYPES
from encfs.tpm.structures import RESIDENT_KINDS
from encfs.units import format_size
from imagetool.cli.keygen import KeyType
from imagetool.pipeline.encrypt import LARGE_FRAME_SIZE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cli.md").read_text()
PROGRAMS = {"encfs": encfs.cli.app, "imagetool": imagetool.cli.app}


@dataclass(frozen=True)
class Declared:
    """One command as typer knows it."""

    name: str
    help: str
    options: frozenset[str]


def declared() -> list[Declared]:
    found: list[Declared] = []

    def visit(name: str, command: Any) -> None:
        children = getattr(command, "commands", None)
        if children is not None:
            for child_name, child in children.items():
                visit(f"{name} {child_name}", child)
            return
        options = {word for parameter in command.params for word in parameter.opts if word.startswith("-")}
        found.append(Declared(name, command.help or "", frozenset(options)))

    for program, app in PROGRAMS.items():
        visit(program, typer.main.get_command(app))
    return found


COMMON = frozenset({"--json", "--progress", "-q", "--quiet", "-v", "--verbose", "--debug"})


def section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match is not None, f"docs/cli.md has no section {title!r}"
    return match[1]


def test_every_command_of_the_issue_is_there() -> None:
    assert {command.name for command in declared()} == {
        *(
            "imagetool " + name
            for name in ("keygen", "encrypt", "decrypt", "inspect", "ls", "verify", "sign", "copy", "push", "pull")
        ),
        *("imagetool recipients " + name for name in ("list", "add", "remove")),
        "imagetool attest verify",
        "imagetool convert",
        *(
            "imagetool broker " + name
            for name in ("init", "serve", "key add", "key list", "key remove", "releases", "endorsements")
        ),
        "imagetool release",
        *("imagetool broker policy " + name for name in ("set", "show", "check")),
        *("imagetool ocicrypt " + name for name in ("encrypt", "decrypt", "keyprovider")),
        *("imagetool ocicrypt recipients " + name for name in ("list", "add", "remove")),
        *(
            "encfs " + name
            for name in (
                "mount",
                "run",
                "umount",
                "status",
                "cat",
                "ls",
                "extract",
                "seal",
                "unseal",
                "approve",
                "advance",
                "providers",
                "sidecar",
                "csi-node",
                "attest enrol",
                "attest collect",
            )
        ),
    }


@pytest.mark.parametrize("command", declared(), ids=lambda command: command.name)
def test_the_page_describes_every_command_with_exactly_its_options(command: Declared) -> None:
    text = section(command.name)
    mentioned = {
        word
        for quoted in re.findall(r"`(-[^`]*)`", text)
        for word in re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", quoted, re.I)
    }
    assert command.options >= COMMON
    assert command.options - COMMON <= mentioned, "options that the page does not have"
    assert mentioned - COMMON <= command.options, "options that the command does not have"
    assert command.help
    assert f"    {command.name} " in text or f"    {command.name}\n" in text, "its usage line"


def test_the_page_describes_the_common_options() -> None:
    assert set(re.findall(r"`(--?[a-z]+)", section("Options that every command has"))) >= COMMON | {"--help", "-h"}


def test_the_page_has_no_command_too_many() -> None:
    headings = set(re.findall(r"^## ((?:encfs|imagetool) .*)$", PAGE, re.MULTILINE))
    assert headings == {command.name for command in declared()}


def _kinds(kind: type[errors.EncfsError]) -> Iterator[type[errors.EncfsError]]:
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _kinds(child)


def test_the_page_lists_every_exit_code() -> None:
    rows = re.findall(r"^\| ([0-9, ]+) \|(.*?)\| (.+?) \|$", section("Exit codes"), re.MULTILINE)
    listed = {name: int(codes) for codes, names, _ in rows for name in re.findall(r"`(\w+)`", names)}
    assert listed == {kind.__name__: kind.exit_code for kind in _kinds(errors.EncfsError)}
    codes = {int(code) for codes, _, _ in rows for code in codes.split(",")}
    assert codes == {0, INTERNAL_ERROR_EXIT_CODE, 129, 130, 141, 143, *listed.values()}


def test_help_is_short_and_says_the_defaults() -> None:
    for program, app in PROGRAMS.items():
        group = typer.main.get_command(app)
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            assert not command.get_short_help_str(60).endswith("..."), f"{program} {name}"
    help_text = run("imagetool", "encrypt", "--help").stdout
    text = " ".join(help_text.split())
    frames = f"{format_size(DEFAULT_FRAME_SIZE)}, {format_size(LARGE_FRAME_SIZE)} for large files"
    assert f"[default: {frames}]".replace(" KiB", "KiB") in text
    assert f"[default: {format_size(DEFAULT_SEGMENT_SIZE)}]".replace(" GiB", "GiB") in text


def test_key_types_are_those_of_the_library() -> None:
    assert set(KeyType.__args__) == {*GENERATED_TYPES, *RESIDENT_KINDS}  # type: ignore[attr-defined]


def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from {program}.cli import main; main()", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["-h"]])
def test_help_and_version_load_nothing_heavy(program: str, words: list[str]) -> None:
    code = (
        f"import sys; sys.argv = [{program!r}, *{words!r}]\n"
        f"from {program}.cli import main\n"
        "try: main()\n"
        "finally: print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert program in done.stdout
    heavy = {
        "rich",
        "cryptography",
        "pydantic",
        "jwcrypto",
        "requests",
        "oras",
        "pyfuse3",
        "trio",
        "zstandard",
        "blake3",
    }
    assert not heavy & set(done.stderr.split())


def test_a_command_alone_is_what_it_is_among_all() -> None:
    for name in ("mount", "status", "csi-node"):
        [alone] = click_commands(encfs.cli.application(["--json", name, "x"]))
        assert alone == name
    assert set(click_commands(encfs.cli.application(["no-command"]))) == set(click_commands(encfs.cli.app))
    assert "attest" in click_commands(encfs.cli.application(["attest", "-h"]))
    for name in ("push", "recipients"):
        alone = click_commands(imagetool.cli.application([name, "x"]))
        assert alone == [one for one in click_commands(imagetool.cli.app) if one.split()[0] == name]


def click_commands(app: Any) -> list[str]:
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(program: str, shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = run(program, "--show-completion", shell)
    assert script.returncode == 0
    assert f"_{program.upper()}_COMPLETE" in script.stdout
    code = f"import sys; sys.argv = [{program!r}]; from {program}.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={f"_{program.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": f"{program} ", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "ls" in done.stdout.split()


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("encfs", [], "missing command; see 'encfs --help'"),
        ("encfs", ["mont"], "no such command 'mont'. Did you mean 'mount', 'umount'?; see 'encfs --help'"),
        ("encfs", ["mount"], "missing argument 'REF'; see 'encfs mount --help'"),
        ("encfs", ["ls", "a", "--pinn", "x"], "no such option: --pinn"),
        ("encfs", ["ls", "a", "--min-version", "x"], "invalid value for '--min-version': "),
        ("encfs", ["mount", "a", "b", "--memory", "1q"], "'1q' is not a size; write it as 65536, 64KiB or 1GiB"),
        ("imagetool", ["keygen", "-o", "x", "--type", "dsa"], "invalid value for '--type': 'dsa' is not one of"),
        ("imagetool", ["recipients", "add"], "missing argument 'REF'; see 'imagetool recipients add --help'"),
        ("imagetool", ["--progress", "some", "inspect", "x"], "invalid value for '--progress': 'some' is not one of"),
    ],
)
def test_usage_errors_are_one_line(program: str, words: list[str], message: str) -> None:
    done = run(program, *words)
    assert done.returncode == errors.UsageError.exit_code
    assert done.stdout == ""
    assert done.stderr.startswith(f"{program}: error: {message}")
    assert done.stderr.count("\n") == 1


# The plumbing


@dataclass(frozen=True, slots=True)
class Group:
    size: Annotated[int | None, commandline.size_option("--size", help="A size.", default="4KiB")] = None
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def _program(seen: list[dict[str, object]]) -> typer.Typer:
    app = commandline.application("test", "A program of a test.")

    def look(terminal: Terminal, place: str, group: Group, trust: TrustOptions, *, deep: bool = False) -> None:
        """Look."""
        seen.append({"settings": terminal.settings, "place": place, "group": group, "trust": trust, "deep": deep})

    commandline.add_command(app, "look", look)
    commandline.add_command(app, "other", lambda: None)
    return app


def test_groups_become_options_and_objects_again(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[dict[str, object]] = []
    words = ["look", "here", "--size", "2K", "--name", "a", "--name", "b", "--id", "x", "--deep"]
    with pytest.raises(SystemExit) as caught:
        commandline.main(_program(seen), "test", words)
    assert caught.value.code == 0, capfd.readouterr().err
    assert seen == [
        {
            "settings": Settings(),
            "place": "here",
            "group": Group(size=2048, names=["a", "b"]),
            "trust": TrustOptions(artifact_id="x"),
            "deep": True,
        }
    ]


def test_groups_keep_their_defaults() -> None:
    seen: list[dict[str, object]] = []
    with pytest.raises(SystemExit):
        commandline.main(_program(seen), "test", ["look", "here"])
    assert (seen[0]["group"], seen[0]["trust"], seen[0]["deep"]) == (Group(), TrustOptions(), False)
    assert TrustOptions().given is False
    assert TrustOptions(pin="x").given is True


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "-v", "--progress", "plain", "look", "here"],
        ["look", "here", "--json", "-v", "--progress", "plain"],
        ["--json", "look", "--progress", "plain", "here", "-v"],
        ["--json", "--progress", "none", "look", "here", "-v", "--progress", "plain"],
    ],
)
def test_common_options_stand_before_or_behind_the_command(words: list[str]) -> None:
    seen: list[dict[str, object]] = []
    with pytest.raises(SystemExit) as caught:
        commandline.main(_program(seen), "test", words)
    assert caught.value.code == 0
    assert seen[0]["settings"] == Settings(json=True, verbose=True, progress="plain")
