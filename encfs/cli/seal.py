"""`encfs seal`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.terminal import Terminal

if TYPE_CHECKING:
    from encfs.tpm.policy import PcrValues

#: PCRs that software resets whenever it likes (PC Client Platform TPM Profile, 4.6): debugging and applications.
_RESETTABLE = frozenset({16, 23})


def command(
    terminal: Terminal,
    key_uri: Annotated[
        str,
        typer.Argument(metavar="KEYURI", help="The symmetric key: a key file, kbs:…, tpm2:FILE.", show_default=False),
    ],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The sealed key.", show_default=False)],
    pcrs: Annotated[
        str,
        typer.Option(
            "--tpm2-pcrs",
            metavar="BANK:INDEX[=VALUE],…",
            help="The PCRs it is sealed to, such as sha256:7,11; what they hold now, or the given value in hex.",
            show_default=False,
        ),
    ],
) -> None:
    """Seal a key to this machine's TPM and its PCRs."""
    from encfs.keys.providers import fetched_key
    from encfs.tpm.availability import require_library
    from encfs.tpm.keyfile import policy_document, write_object
    from encfs.tpm.policy import parse_pcrs

    request = parse_pcrs(pcrs)
    require_library()
    from encfs.tpm.sealing import seal

    key = fetched_key(key_uri, bare=True)
    try:
        sealed = seal(key, request)
        kid = key.kid
    finally:
        key.wipe()
    write_object(sealed, output)
    policy = sealed.policy
    values = policy.pcrs if policy is not None else None
    if policy is None or values is None:
        raise TypeError("sealed without PCRs")
    for warning in _warnings(values):
        terminal.warn(warning)
    shown = ", ".join(map(str, values.values))
    terminal.result(
        {"file": output, "kid": kid, "policy": policy_document(policy)},
        [
            f"sealed key  {output}  (opens with -k tpm2:{output}, on this machine only)",
            f"PCRs        {shown} ({values.bank})",
        ],
    )


def _warnings(pcrs: PcrValues) -> Iterator[str]:
    for index, value in pcrs.values.items():
        if index in _RESETTABLE:
            yield f"any program can reset PCR {index}: it proves nothing"
        elif not any(value):
            yield f"PCR {index} is all zeros: nothing was measured into it, so it proves nothing"
