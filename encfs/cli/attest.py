"""`encfs attest enrol` and `encfs attest collect`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.commandline import add_command
from encfs.console.terminal import Terminal

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


def collect(
    terminal: Terminal,
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The evidence, instead of standard output.", show_default=False
        ),
    ] = None,
    tee: Annotated[
        str, typer.Option("--tee", metavar="NAME", help="Where it comes from; auto is what this machine has.")
    ] = "auto",
    ak: Annotated[
        str | None,
        typer.Option(
            "--ak", metavar="FILE", help="A quote of the TPM by this attestation key (enrol).", show_default=False
        ),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            "--event-log",
            metavar="FILE",
            help="Also write the firmware's event log of the TPM there: it explains the PCRs of a quote.",
            show_default=False,
        ),
    ] = None,
    report_data: Annotated[
        str | None,
        typer.Option(
            "--report-data",
            metavar="HEX",
            help="Up to 64 bytes that the asker chose, to show that the evidence is fresh; random by default.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Ask this machine for evidence of what it is."""
    import json
    import os

    from encfs.attestation.collect.sources import REPORT_DATA_SIZE, event_log, evidence_source
    from encfs.attestation.kbs import to_kbs_evidence
    from encfs.encoding import hex_decode
    from encfs.errors import FormatError, UsageError
    from encfs.keys.files import create_file

    if output is None and terminal.settings.json:
        raise UsageError("collect writes the evidence itself to standard output", hint="give -o FILE with --json")
    try:
        data = hex_decode(report_data, "--report-data") if report_data is not None else os.urandom(32)
    except FormatError as error:
        raise UsageError(error.message) from None
    if len(data) > REPORT_DATA_SIZE:
        raise UsageError(f"--report-data is longer than {REPORT_DATA_SIZE} bytes")
    source = evidence_source(tee, ak=ak)
    events = event_log() if log is not None else b""
    content = json.dumps(to_kbs_evidence(source.collect(data))).encode() + b"\n"
    if log is not None:
        create_file(log, bytearray(events), 0o644)
    if output is None:
        terminal.write(content)
        return
    create_file(output, bytearray(content), 0o644)
    terminal.result(
        {"file": output, "tee": source.tee, "report_data": data.hex()},
        [f"evidence     {output}  ({source.tee})", f"report data  {data.hex()}"],
    )


add_command(app, "enrol", enrol)
add_command(app, "collect", collect)
