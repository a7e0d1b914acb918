"""`imagetool keygen`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from encfs.console.terminal import Terminal
from encfs.console.tpmoptions import TpmPolicyOptions, policy_lines, warn_of_policy

KeyType = Literal["x25519", "p256", "p384", "rsa2048", "rsa3072", "ed25519", "mldsa65", "mlkem768x25519", "oct"]


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
    tpm: TpmPolicyOptions,
    kind: Annotated[
        KeyType | None,
        typer.Option(
            "--type",
            help="To encrypt to: x25519, p256, p384, rsa3072, mlkem768x25519 (post-quantum), oct (symmetric). "
            "To sign with: ed25519, p256, mldsa65 (post-quantum).",
            metavar="TYPE",
            show_default="x25519; p256 with --tpm2",
        ),
    ] = None,
    tpm2: Annotated[
        bool,
        typer.Option(
            "--tpm2", help="A key in this machine's TPM, which it never leaves: p256, p384, rsa2048, rsa3072."
        ),
    ] = False,
) -> None:
    """Make a key. Existing files are never overwritten."""
    from encfs.errors import UsageError

    if tpm2:
        _in_tpm(terminal, output, tpm, kind or "p256")
        return
    if tpm.given:
        raise UsageError("a policy is for keys in a TPM", hint="give --tpm2, too")
    from encfs.hardening import protect_keys
    from encfs.keys.files import write_key_files
    from encfs.keys.jwk import generate_key

    protect_keys()
    kind = kind or "x25519"
    if kind == "rsa2048":
        raise UsageError("rsa2048 is for keys in a TPM", hint="--type rsa3072, or --tpm2")
    key = generate_key(kind)
    private, public = write_key_files(key, output)
    lines = [f"private key  {private}  (keep it secret)"]
    if public is not None:
        lines.append(f"public key   {public}")
    terminal.result(
        {
            "type": kind,
            "kid": key.kid,
            "private": str(private),
            "public": str(public) if public else None,
            "policy": None,
        },
        [*lines, f"key id       {key.kid}"],
    )


def _in_tpm(terminal: Terminal, output: str, options: TpmPolicyOptions, kind: KeyType) -> None:
    from pathlib import Path

    from encfs.errors import UsageError
    from encfs.keys.files import write_public_key
    from encfs.tpm.availability import require_library
    from encfs.tpm.keyfile import policy_document, write_object
    from encfs.tpm.structures import RESIDENT_KINDS

    if kind not in RESIDENT_KINDS:
        raise UsageError(f"a TPM makes no keys of type {kind}", hint=f"--type {', '.join(RESIDENT_KINDS)}")
    conditions = options.conditions()
    require_library()
    from encfs.tpm.resident import create_resident_key

    made = create_resident_key(kind, conditions.pcrs, conditions.authorization, conditions.counter_index)
    if made.policy is None:
        raise TypeError("a key without a policy")
    public = made.recipient()
    place = f"{output}.pub"
    write_object(made, output)
    try:
        write_public_key(public, place)
    except BaseException:
        Path(output).unlink()
        raise
    warn_of_policy(terminal, made.policy)
    document = {"private": output, "public": place, "policy": policy_document(made.policy)}
    lines = [
        f"private key  {output}  (the key URI tpm2:{output}, in this machine's TPM only)",
        f"public key   {place}",
        f"key id       {public.kid}",
        *policy_lines(made.policy),
    ]
    terminal.result({"type": kind, "kid": public.kid, **document}, lines)
