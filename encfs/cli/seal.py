"""`encfs seal`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.console.tpmoptions import TpmPolicyOptions, policy_lines, warn_of_policy


def command(
    terminal: Terminal,
    key_uri: Annotated[
        str,
        typer.Argument(metavar="KEYURI", help="The symmetric key: a key file, kbs:…, tpm2:FILE.", show_default=False),
    ],
    output: Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="The sealed key.", show_default=False)],
    tpm2: TpmPolicyOptions,
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
    from encfs.hardening import protect_keys
    from encfs.keys.providers import fetched_key
    from encfs.tpm.availability import require_library
    from encfs.tpm.keyfile import policy_document, write_object

    under = _under(snp=snp, gramine=gramine, derivation=derivation)
    if under is not None:
        if tpm2.given:
            raise UsageError("a key is sealed to the TPM or under a derived key, not both", hint="seal it twice")
        _seal_under(terminal, key_uri, under, output)
        return
    conditions = tpm2.conditions()
    require_library()
    from encfs.tpm.sealing import seal

    protect_keys()
    key = fetched_key(key_uri, bare=True)
    try:
        sealed = seal(key, conditions.pcrs, conditions.authorization, conditions.counter_index)
        kid = key.kid
    finally:
        key.wipe()
    write_object(sealed, output)
    policy = sealed.policy
    if policy is None:
        raise TypeError("sealed without a policy")
    warn_of_policy(terminal, policy)
    first = f"sealed key  {output}  (the key URI tpm2:{output}, on this machine only)"
    terminal.result({"file": output, "kid": kid, "policy": policy_document(policy)}, [first, *policy_lines(policy)])


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
    from encfs.hardening import protect_keys
    from encfs.keys.providers import fetched_key
    from encfs.keys.sealedfile import seal_under, write_sealed

    protect_keys()
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
