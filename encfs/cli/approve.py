"""`encfs approve`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.errors import KeyFileError

if TYPE_CHECKING:
    from encfs.tpm.policy import PcrRequest, PcrValues


def command(
    terminal: Terminal,
    sealed: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A sealed key, made by encfs seal --tpm2-authorize; changed.", show_default=False
        ),
    ],
    key: Annotated[
        str,
        typer.Option("--key", metavar="KEY", help="The private key whose approvals count.", show_default=False),
    ],
    pcrs: Annotated[
        str,
        typer.Option(
            "--tpm2-pcrs",
            metavar="BANK:INDEX[=VALUE],…",
            help="The PCR values to approve; where all are given, no TPM is needed.",
            show_default=False,
        ),
    ],
) -> None:
    """Let a sealed key open with other PCR values, too."""
    from encfs.hardening import protect_keys
    from encfs.keys.files import load_signing_key
    from encfs.tpm.keyfile import load_object, pcrs_document, replace_object, with_approval
    from encfs.tpm.policy import Approval, parse_pcrs

    request = parse_pcrs(pcrs)
    found = load_object(sealed)
    authorization = found.policy.authorization if found.policy is not None else None
    if authorization is None:
        raise KeyFileError(
            f"{sealed} was not sealed for approvals", hint="seal it again with encfs seal --tpm2-authorize PUBKEY"
        )
    protect_keys()
    signer = load_signing_key(key)
    if signer.kid != authorization.key.kid:
        raise KeyFileError(
            f"{key} is not the key whose approvals count for {sealed}",
            hint=f"that is the one with id {authorization.key.kid}",
        )
    values = _values(request)
    approved = with_approval(found, Approval(values, signer.sign(authorization.message(values))))
    replace_object(approved, sealed)
    shown = ", ".join(map(str, values.values))
    terminal.result(
        {"file": sealed, "kid": signer.kid, "pcrs": pcrs_document(values)},
        [f"{sealed}: opens with these values of the PCRs {shown} ({values.bank}), too"],
    )


def _values(request: PcrRequest) -> PcrValues:
    """Those that were given, and this machine's for the others."""
    if request.complete is not None:
        return request.complete
    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm.sealing import present_values

    return present_values(request)
