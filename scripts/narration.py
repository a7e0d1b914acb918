"""How the demo speaks: steps, commands as a user would type them, and claims that are checked."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

BIN = Path(sys.executable).parent


class ClaimError(Exception):
    """Something that the demo says is not so."""


def say(text: str = "") -> None:
    print(text, flush=True)


def step(number: int, text: str) -> None:
    say(f"\n{number}. {text}")


def claim(true: bool, text: str) -> None:
    if not true:
        raise ClaimError(text)
    say(f"   ok: {text}")


def run(*words: str | Path, code: int = 0) -> str:
    """Run one of the two programs as a user would; it must end with exit code `code`. Its output, both kinds."""
    shown = " ".join(str(word) for word in words)
    say(textwrap.fill(shown, 110, initial_indent="   $ ", subsequent_indent="       ", break_on_hyphens=False))
    done = subprocess.run([BIN / words[0], *words[1:]], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != code:
        raise ClaimError(f"{words[0]} {words[1]} exits with {code}; it ended with {done.returncode}:\n{output}")
    return output


def show(output: str, only: str = "") -> None:
    for line in output.splitlines():
        if only in line:
            say(f"     {line}")
