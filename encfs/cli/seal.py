"""`encfs seal`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.terminal import Terminal

if TYPE_CHECKING:
    from encfs.tpm.policy import PcrValues, Policy

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
        str | None,
        typer.Option(
            "--tpm2-pcrs",
            metavar="BANK:INDEX[=VALUE],…",
            help="The PCRs it is sealed to, such as sha256:7,11; what they hold now, or the given value in hex.",
            show_default=False,
        ),
    ] = None,
    authorize: Annotated[
        str | None,
        typer.Option(
            "--tpm2-authorize",
            metavar="PUBKEY",
            help="Also open with the PCR values that this P-256 key approves (encfs approve).",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            "--tpm2-reference",
            metavar="TEXT",
            help="Only approvals for this text count; by default those for none.",
            show_default=False,
        ),
    ] = "",
    counter: Annotated[
        str | None,
        typer.Option(
            "--tpm2-nv-counter",
            metavar="INDEX",
            help="Only until this NV counter moves on (encfs advance); it is made if need be.",
            show_default=False,
        ),
    ] = None,
    snp: Annotated[
        bool, typer.Option("--snp", help="Not to the TPM: under a key that this SEV-SNP guest's firmware derives.")
    ] = False,
    gramine: Annotated[
        bool, typer.Option("--gramine", help="Not to the TPM: under the sealing key of this SGX enclave (Gramine).")
    ] = False,
    derivation: Annotated[
        str | None,
        typer.Option(
            "--derivation",
            metavar="TEXT",
            help="What stands behind snp: or gramine: in the key URI of the derived key.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Seal a key to this machine's TPM, guest or enclave."""
    from encfs.errors import UsageError
    from encfs.hardening import forbid_dumps
    from encfs.keys.files import load_trusted_key
    from encfs.keys.providers import fetched_key
    from encfs.tpm.availability import require_library
    from encfs.tpm.keyfile import policy_document, write_object
    from encfs.tpm.policy import Authorization, check_conditions, parse_nv_index, parse_pcrs

    under = _under(snp=snp, gramine=gramine, derivation=derivation)
    if under is not None:
        if pcrs or authorize or reference or counter:
            raise UsageError("a key is sealed to the TPM or under a derived key, not both", hint="seal it twice")
        _seal_under(terminal, key_uri, under, output)
        return
    request = parse_pcrs(pcrs) if pcrs is not None else None
    if reference and authorize is None:
        raise UsageError("--tpm2-reference is for approvals", hint="give --tpm2-authorize PUBKEY, too")
    authorization = Authorization(load_trusted_key(authorize), reference) if authorize is not None else None
    check_conditions(request, authorization)
    index = parse_nv_index(counter) if counter is not None else None
    require_library()
    from encfs.tpm.sealing import seal

    forbid_dumps()
    key = fetched_key(key_uri, bare=True)
    try:
        sealed = seal(key, request, authorization, index)
        kid = key.kid
    finally:
        key.wipe()
    write_object(sealed, output)
    policy = sealed.policy
    if policy is None:
        raise TypeError("sealed without a policy")
    for warning in _warnings(policy.pcrs):
        terminal.warn(warning)
    terminal.result({"file": output, "kid": kid, "policy": policy_document(policy)}, _lines(output, policy))


def _under(*, snp: bool, gramine: bool, derivation: str | None) -> str | None:
    """The key URI of the derived key; None for the TPM. Raises: UsageError."""
    from encfs.errors import UsageError

    if snp and gramine:
        raise UsageError("--snp and --gramine are given together", hint="seal it twice")
    if not snp and not gramine:
        if derivation is not None:
            raise UsageError("--derivation is for --snp and --gramine")
        return None
    return f"{'snp' if snp else 'gramine'}:{derivation or ''}"


def _seal_under(terminal: Terminal, key_uri: str, under: str, output: str) -> None:
    from encfs.hardening import forbid_dumps
    from encfs.keys.providers import fetched_key
    from encfs.keys.sealedfile import seal_under, write_sealed

    forbid_dumps()
    key = fetched_key(key_uri, bare=True)
    try:
        sealed = seal_under(key, under)
    finally:
        key.wipe()
    write_sealed(sealed, output)
    terminal.result(
        {"file": output, "kid": sealed.kid, "policy": {"under": under}},
        [f"sealed key  {output}  (the key URI sealed:{output}, here only)", f"under       {under}"],
    )


def _lines(output: str, policy: Policy) -> Iterator[str]:
    yield f"sealed key  {output}  (the key URI tpm2:{output}, on this machine only)"
    if policy.pcrs is not None:
        yield f"PCRs        {', '.join(map(str, policy.pcrs.values))} ({policy.pcrs.bank})"
    if policy.authorization is not None:
        yield f"approvals   by {policy.authorization.key.kid}"
    if policy.counter is not None:
        yield f"counter     {policy.counter.index:#010x}, up to {policy.counter.value}"


def _warnings(pcrs: PcrValues | None) -> Iterator[str]:
    for index, value in pcrs.values.items() if pcrs is not None else ():
        if index in _RESETTABLE:
            yield f"any program can reset PCR {index}: it proves nothing"
        elif not any(value):
            yield f"PCR {index} is all zeros: nothing was measured into it, so it proves nothing"
