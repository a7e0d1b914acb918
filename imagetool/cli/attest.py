"""`imagetool attest verify`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandline import add_command
from encfs.console.terminal import Terminal
from encfs.errors import EvidenceRefusedError
from imagetool.cli.evidencepolicy import EvidenceOptions, PolicyOptions

if TYPE_CHECKING:
    from encfs.attestation.verdict import Verdict

app = typer.Typer(name="attest", help="Judge evidence of trusted execution environments.", rich_markup_mode=None)


def verify(
    terminal: Terminal,
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="Evidence of any kind: report, quote, JSON, token.", show_default=False),
    ],
    evidence: EvidenceOptions,
    asked: PolicyOptions,
) -> None:
    """Judge evidence: is it genuine, and what was asked for?"""
    from encfs.attestation.evidence import MAX_EVIDENCE_SIZE
    from encfs.attestation.verify import verify_evidence
    from imagetool.cli.evidencepolicy import read_file

    verdict = verify_evidence(
        read_file(file, MAX_EVIDENCE_SIZE), asked.policy(), endorsements=evidence.endorsements(), now=evidence.now()
    )
    terminal.result({"file": file, **verdict.to_json()}, _lines(file, verdict))
    if not verdict.accepted:
        raise EvidenceRefusedError(
            f"{file} is refused: {', '.join(dict.fromkeys(verdict.codes))}",
            hint="docs/attestation.md says what each asks for",
        )


def _lines(file: str, verdict: Verdict) -> Iterator[str]:
    yield f"{file}: {verdict.kind}, {'accepted' if verdict.accepted else 'refused'}"
    for reason in verdict.reasons:
        yield f"refused    {reason.code.value}: {reason.message}"
    for reason in verdict.unchecked:
        yield f"unchecked  {reason.code.value}: {reason.message}"
    for name, value in verdict.to_json()["claims"].items():  # type: ignore[attr-defined]
        if name == "events":
            yield from (f"event      {one}" for one in value)
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key}={one}" for key, one in value.items())
        yield f"claim      {name}: {value}"


add_command(app, "verify", verify)
