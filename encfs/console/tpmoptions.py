"""What commands of both programs ask and say about the policy of an object in a TPM."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.errors import UsageError

if TYPE_CHECKING:
    from encfs.tpm.policy import Authorization, PcrRequest, PcrValues, Policy

#: PCRs that software resets whenever it likes (PC Client Platform TPM Profile, 4.6): debugging and applications.
_RESETTABLE = frozenset({16, 23})


@dataclass(frozen=True, slots=True)
class Conditions:
    """What an object in a TPM is to be bound to."""

    pcrs: PcrRequest | None
    authorization: Authorization | None
    counter_index: int | None


@dataclass(frozen=True, slots=True)
class TpmPolicyOptions:
    """The conditions under which the TPM gives back or uses what is made."""

    pcrs: Annotated[
        str | None,
        typer.Option(
            "--tpm2-pcrs",
            metavar="BANK:INDEX[=VALUE],…",
            help="The PCRs it is sealed to, such as sha256:7,11; what they hold now, or the given value in hex.",
            show_default=False,
        ),
    ] = None
    authorize: Annotated[
        str | None,
        typer.Option(
            "--tpm2-authorize",
            metavar="PUBKEY",
            help="Also open with the PCR values that this P-256 key approves (encfs approve).",
            show_default=False,
        ),
    ] = None
    reference: Annotated[
        str,
        typer.Option(
            "--tpm2-reference",
            metavar="TEXT",
            help="Only approvals for this text count; by default those for none.",
            show_default=False,
        ),
    ] = ""
    counter: Annotated[
        str | None,
        typer.Option(
            "--tpm2-nv-counter",
            metavar="INDEX",
            help="Only until this NV counter moves on (encfs advance); it is made if need be.",
            show_default=False,
        ),
    ] = None

    @property
    def given(self) -> bool:
        return bool(self.pcrs or self.authorize or self.reference or self.counter)

    def conditions(self) -> Conditions:
        """Raises: UsageError where there is none, or they do not fit together; KeyFileError."""
        from encfs.keys.files import load_trusted_key
        from encfs.tpm.policy import Authorization, check_conditions, parse_nv_index, parse_pcrs

        request = parse_pcrs(self.pcrs) if self.pcrs is not None else None
        if self.reference and self.authorize is None:
            raise UsageError("--tpm2-reference is for approvals", hint="give --tpm2-authorize PUBKEY, too")
        authorization = (
            Authorization(load_trusted_key(self.authorize), self.reference) if self.authorize is not None else None
        )
        check_conditions(request, authorization)
        return Conditions(request, authorization, parse_nv_index(self.counter) if self.counter is not None else None)


def policy_lines(policy: Policy) -> Iterator[str]:
    """A policy for people."""
    if policy.pcrs is not None:
        yield f"PCRs        {', '.join(map(str, policy.pcrs.values))} ({policy.pcrs.bank})"
    if policy.authorization is not None:
        yield f"approvals   by {policy.authorization.key.kid}"
    if policy.counter is not None:
        yield f"counter     {policy.counter.index:#010x}, up to {policy.counter.value}"


def warn_of_policy(terminal: Terminal, policy: Policy) -> None:
    """PCRs that prove nothing."""
    for warning in _warnings(policy.pcrs):
        terminal.warn(warning)


def _warnings(pcrs: PcrValues | None) -> Iterator[str]:
    for index, value in pcrs.values.items() if pcrs is not None else ():
        if index in _RESETTABLE:
            yield f"any program can reset PCR {index}: it proves nothing"
        elif not any(value):
            yield f"PCR {index} is all zeros: nothing was measured into it, so it proves nothing"
