"""`encfs attest enrol`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.commandline import add_command
from encfs.terminal import Terminal

app = typer.Typer(name="attest", help="What this machine can prove about itself.", rich_markup_mode=None)


def enrol(
    terminal: Terminal,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The attestation key; its public half goes to FILE.pub.",
            show_default=False,
        ),
    ],
) -> None:
    """Make an attestation key in this machine's TPM."""
    import hashlib
    from pathlib import Path

    from encfs.keys.files import create_file
    from encfs.tpm.availability import require_library
    from encfs.tpm.keyfile import write_object

    require_library()
    from encfs.tpm.quote import attestation_public_key, create_attestation_key

    made = create_attestation_key()
    public = attestation_public_key(made)
    write_object(made, output)
    place = f"{output}.pub"
    try:
        create_file(place, bytearray(_pem(public)), 0o644)
    except BaseException:
        Path(output).unlink()
        raise
    fingerprint = hashlib.sha256(public).hexdigest()
    terminal.result(
        {"file": output, "public": place, "fingerprint": fingerprint},
        [
            f"attestation key  {output}  (of use with this TPM only)",
            f"public key       {place}",
            f"SHA-256          {fingerprint}",
        ],
    )


def _pem(der: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

    return load_der_public_key(der).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


add_command(app, "enrol", enrol)
