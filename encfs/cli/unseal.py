"""`encfs unseal`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.errors import UsageError


def command(
    terminal: Terminal,
    sealed: Annotated[
        str, typer.Argument(metavar="FILE", help="A sealed key, made by encfs seal.", show_default=False)
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Write the key there, not to standard output.", show_default=False
        ),
    ] = None,
) -> None:
    """Get a sealed key back on this machine, as a JWK."""
    import json
    import sys

    from encfs.hardening import protect_keys
    from encfs.keys.files import write_key_files
    from encfs.keys.jwkjson import private_jwk
    from encfs.keys.providers import fetched_key
    from encfs.keys.sealedfile import is_sealed_under

    if output is None and terminal.settings.json:
        raise UsageError("unseal writes the key itself; there is nothing to print as JSON", hint="give -o FILE")
    if output is None and sys.stdout is not None and sys.stdout.isatty():
        raise UsageError("unseal does not show a key on a terminal", hint="give -o FILE, or redirect standard output")
    protect_keys()
    key = fetched_key(f"sealed:{sealed}" if is_sealed_under(sealed) else f"tpm2:{sealed}")
    try:
        if output is None:
            terminal.write(json.dumps(private_jwk(key), indent=2).encode() + b"\n")
            return
        write_key_files(key, output)
    finally:
        key.wipe()
    terminal.result({"file": output, "kid": key.kid}, [f"key  {output}  (keep it secret)"])
