"""`imagetool broker policy set|show|check`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandline import add_command
from encfs.console.terminal import Terminal
from encfs.errors import FormatError, NotFoundError
from imagetool.cli.broker.parts import DirectoryArgument, changed, opened, require_packages

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from imagetool.broker.policy import Policy
    from imagetool.broker.state import State

app = typer.Typer(name="policy", help="Who gets which key.", rich_markup_mode=None)

PolicyArgument = Annotated[str, typer.Argument(metavar="FILE", help="The policy, TOML.", show_default=False)]


def set_policy(terminal: Terminal, directory: DirectoryArgument, file: PolicyArgument) -> None:
    """Put a policy in force, in the place of the one before. Running brokers take it over at once."""
    text, policy = _read(file)
    moved: list[str] = []
    with opened(directory) as broker:
        from imagetool.broker import state

        def change(connection: Connection) -> tuple[State, Mapping[str, object]]:
            after, paths = state.set_policy(connection, broker.vault, text)
            moved[:] = paths
            return after, {"keys": paths[:100]}

        after = changed(broker, "policy-set", "", change)
    _warn(terminal, policy)
    without = [path for path in sorted(after.entries) if policy.rule_for(path) is None]
    if without:
        terminal.warn(
            f"no rule is for {', '.join(without[:8])}{' and others' if len(without) > 8 else ''}: nobody gets it"
        )
    terminal.result(
        {"directory": directory, "rules": len(policy.rules), "changed": moved},
        [f"{len(policy.rules)} rules in force; {len(moved)} keys are under another rule than before"],
    )


def show(terminal: Terminal, directory: DirectoryArgument) -> None:
    """Print the policy that is in force."""
    with opened(directory) as broker:
        current = broker.load_state()
    terminal.result(
        {"directory": directory, "epoch": current.epoch, "policy": current.policy_text},
        current.policy_text.splitlines(),
    )


def check(terminal: Terminal, file: PolicyArgument) -> None:
    """Check a policy without putting it in force, and print how it is understood."""
    require_packages()
    _, policy = _read(file)
    _warn(terminal, policy)
    lines: list[str] = []
    for rule in policy.rules.values():
        lines.append(rule.pattern)
        lines += [f"  {name}  {_shown(value)}" for name, value in rule.to_json().items() if name != "pattern"]
    terminal.result({"file": file, "rules": [rule.to_json() for rule in policy.rules.values()]}, lines)


def _read(file: str) -> tuple[str, Policy]:
    from imagetool.broker.policy import MAX_POLICY_SIZE, parse_policy

    try:
        with Path(file).open("rb") as stream:
            text = stream.read(MAX_POLICY_SIZE + 1).decode()
    except FileNotFoundError:
        raise NotFoundError(f"the policy {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not UTF-8 (byte {error.start})") from None
    return text, parse_policy(text, file)


def _warn(terminal: Terminal, policy: Policy) -> None:
    from encfs.attestation.evidence import EvidenceKind

    for rule in policy.rules.values():
        if EvidenceKind.SAMPLE in rule.evidence.kinds:
            terminal.warn(f"{rule.pattern} accepts sample evidence, which anyone can make; only serve --demo does, too")
        if rule.evidence.allow_debug:
            terminal.warn(f"{rule.pattern} accepts debuggable guests: their host reads what the key opens")


def _shown(value: object) -> str:
    """As a policy has it: alternatives side by side, members with their names."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} = {' or '.join(_shown(one) for one in _listed(of))}" for name, of in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


add_command(app, "set", set_policy)
add_command(app, "show", show)
add_command(app, "check", check)
