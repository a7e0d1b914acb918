"""`imagetool keygen`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from encfs.terminal import Terminal

KeyType = Literal["x25519", "p256", "p384", "rsa3072", "ed25519", "mldsa65", "mlkem768x25519", "oct"]


def command(
    terminal: Terminal,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The private key; the public one goes to FILE.pub.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        KeyType,
        typer.Option(
            "--type",
            help="To encrypt to: x25519, p256, p384, rsa3072, mlkem768x25519 (post-quantum), oct (symmetric). "
            "To sign with: ed25519, p256, mldsa65 (post-quantum).",
            metavar="TYPE",
            show_default=True,
        ),
    ] = "x25519",
) -> None:
    """Make a key. Existing files are never overwritten."""
    from encfs.keys.files import write_key_files
    from encfs.keys.jwk import generate_key

    key = generate_key(kind)
    private, public = write_key_files(key, output)
    lines = [f"private key  {private}  (keep it secret)"]
    if public is not None:
        lines.append(f"public key   {public}")
    terminal.result(
        {"type": kind, "kid": key.kid, "private": str(private), "public": str(public) if public else None},
        [*lines, f"key id       {key.kid}"],
    )
