"""The options that say what evidence must show, and what is given to judge it by, as the library wants them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from encfs.errors import UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from encfs.attestation.evidence import Endorsements
    from encfs.attestation.policy import EvidencePolicy, SnpTcbFloor

_MAX_FILE = 1 << 20


def _option(*names: str, metavar: str, text: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=text, show_default=False)


@dataclass(frozen=True, slots=True)
class EvidenceOptions:
    """What is known beside the evidence; it is checked, too."""

    chain: Annotated[
        list[str] | None,
        _option("--chain", metavar="FILE", text="Certificates for the evidence (VCEK, VLEK), PEM or DER. Repeatable."),
    ] = None
    collateral: Annotated[
        list[str] | None,
        _option(
            "--collateral", metavar="FILE", text="Intel's collateral, one platform's as JSON of dcap-qvl. Repeatable."
        ),
    ] = None
    event_log: Annotated[
        str | None,
        _option("--event-log", metavar="FILE", text="TPM: the firmware's event log, to be compared with the PCRs."),
    ] = None
    at: Annotated[
        str | None,
        _option("--at", metavar="TIME", text="Judge as of then (2025-06-20T00:00Z), not now: for recorded evidence."),
    ] = None

    def endorsements(self) -> Endorsements:
        """Raises: FormatError, ConflictError, and what reading raises."""
        from encfs.attestation.certificates import der_certificates
        from encfs.attestation.collateral import MAX_COLLATERAL_SIZE, parse_collateral, require_one_each
        from encfs.attestation.eventlog import MAX_EVENT_LOG
        from encfs.attestation.evidence import Endorsements

        certificates = [der for path in self.chain or () for der in der_certificates(read_file(path, _MAX_FILE), path)]
        collateral = require_one_each(
            (path, parse_collateral(read_file(path, MAX_COLLATERAL_SIZE), path)) for path in self.collateral or ()
        )
        log = read_file(self.event_log, MAX_EVENT_LOG) if self.event_log is not None else None
        return Endorsements(tuple(certificates), collateral, log)

    def now(self) -> datetime:
        """Raises: UsageError."""
        from datetime import UTC, datetime

        if self.at is None:
            return datetime.now(UTC)
        try:
            found = datetime.fromisoformat(self.at)
        except ValueError:
            raise UsageError(f"{self.at[:40]!a} is not a time", hint="write 2025-06-20T00:00Z") from None
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class PolicyOptions:
    """What evidence must show. Nothing asked is nothing proven but that it is genuine and not for debugging."""

    kinds: Annotated[
        list[str] | None,
        _option("--kind", metavar="KIND", text="Only evidence of this kind, such as snp or tpm. Repeatable."),
    ] = None
    measurements: Annotated[
        list[str] | None,
        _option("--measurement", metavar="HEX", text="MEASUREMENT, MRTD or MRENCLAVE: one of these. Repeatable."),
    ] = None
    signers: Annotated[
        list[str] | None,
        _option("--signer", metavar="HEX", text="SNP's ID key digest, SGX's MRSIGNER: one of these. Repeatable."),
    ] = None
    product_ids: Annotated[
        list[int] | None, _option("--product-id", metavar="N", text="SGX's product id. Repeatable.")
    ] = None
    min_svn: Annotated[int, _option("--min-svn", metavar="N", text="Lowest version (SVN) of the guest or enclave.")] = 0
    host_data: Annotated[
        list[str] | None,
        _option("--host-data", metavar="HEX", text="HOST_DATA or MRCONFIGID: one of these. Repeatable."),
    ] = None
    report_data: Annotated[
        str | None,
        _option("--report-data", metavar="HEX", text="The fresh data that the evidence must carry, up to 64 bytes."),
    ] = None
    nonce: Annotated[str | None, _option("--nonce", metavar="TEXT", text="The nonce that a token must carry.")] = None
    pcrs: Annotated[
        list[str] | None,
        _option("--pcr", metavar="INDEX=HEX", text="TPM: what a PCR (SHA-256) holds. Repeatable."),
    ] = None
    rtmrs: Annotated[
        list[str] | None, _option("--rtmr", metavar="INDEX=HEX", text="TDX: what an RTMR holds. Repeatable.")
    ] = None
    event_log_pcrs: Annotated[
        list[int] | None,
        _option(
            "--event-log-pcr",
            metavar="INDEX",
            text="TPM: with --event-log, a PCR that it has to explain, instead of all. Repeatable.",
        ),
    ] = None
    attestation_keys: Annotated[
        list[str] | None,
        _option("--attestation-key", metavar="FILE", text="TPM: an enrolled key (encfs attest enrol). Repeatable."),
    ] = None
    issuers: Annotated[
        list[str] | None, _option("--issuer", metavar="URL", text="Who may have issued a token. Repeatable.")
    ] = None
    token_keys: Annotated[
        list[str] | None,
        _option("--token-keys", metavar="FILE", text="Keys that sign tokens: JWK set, PEM. Repeatable."),
    ] = None
    token_authorities: Annotated[
        list[str] | None,
        _option("--token-authority", metavar="FILE", text="Who certifies keys that sign tokens. Repeatable."),
    ] = None
    tcb_floors: Annotated[
        list[str] | None,
        _option("--tcb-floor", metavar="NAME=N,…", text="SNP: lowest firmware versions; product=Milan. Repeatable."),
    ] = None
    tcb_statuses: Annotated[
        list[str] | None,
        _option("--tcb-status", metavar="NAME", text="TDX, SGX: an allowed status beside UpToDate. Repeatable."),
    ] = None
    max_vmpl: Annotated[int, _option("--max-vmpl", metavar="N", text="SNP: the least privileged VMPL allowed (0).")] = 0
    allow_debug: Annotated[
        bool, typer.Option("--allow-debug", help="Accept what can be debugged, and so has no secrets.")
    ] = False
    allow_migration: Annotated[
        bool, typer.Option("--allow-migration", help="Accept guests that may be moved to another machine.")
    ] = False
    allow_missing_collateral: Annotated[
        bool, typer.Option("--allow-missing-collateral", help="TDX, SGX: without TCB status and revocation.")
    ] = False
    allow_sample: Annotated[
        bool, typer.Option("--allow-sample", help="Accept evidence for demonstrations, which proves nothing.")
    ] = False

    def policy(self) -> EvidencePolicy:
        """Raises: UsageError, FormatError for files, and what reading raises."""
        from encfs.attestation.certificates import der_certificates
        from encfs.attestation.policy import EvidencePolicy
        from encfs.attestation.tokens import trusted_keys

        return EvidencePolicy(
            kinds=self._kinds(),
            measurements=_all_hex(self.measurements, "--measurement"),
            signers=_all_hex(self.signers, "--signer"),
            product_ids=tuple(self.product_ids or ()),
            min_svn=self.min_svn,
            host_data=_all_hex(self.host_data, "--host-data"),
            report_data=_hex(self.report_data, "--report-data") if self.report_data is not None else None,
            nonce=self.nonce,
            allow_debug=self.allow_debug,
            allow_migration=self.allow_migration,
            max_vmpl=self.max_vmpl,
            tcb_floors=tuple(_floor(text) for text in self.tcb_floors or ()),
            tcb_statuses=frozenset({"UpToDate", *(self.tcb_statuses or ())}),
            allow_missing_collateral=self.allow_missing_collateral,
            rtmrs=_registers(self.rtmrs, "--rtmr", 4, 48),
            pcrs=_registers(self.pcrs, "--pcr", 24, 32),
            event_log_pcrs=frozenset(self.event_log_pcrs) if self.event_log_pcrs else None,
            attestation_keys=tuple(
                key for path in self.attestation_keys or () for key in trusted_keys(read_file(path, _MAX_FILE), path)
            ),
            issuers=tuple(self.issuers or ()),
            token_keys=tuple(
                key for path in self.token_keys or () for key in trusted_keys(read_file(path, _MAX_FILE), path)
            ),
            token_authorities=tuple(
                der
                for path in self.token_authorities or ()
                for der in der_certificates(read_file(path, _MAX_FILE), path)
            ),
        )

    def _kinds(self) -> frozenset[Any]:
        from encfs.attestation.evidence import EvidenceKind
        from encfs.attestation.policy import GENUINE_KINDS

        known = {kind.value: kind for kind in EvidenceKind}
        for name in self.kinds or ():
            if name not in known:
                raise UsageError(f"--kind {name[:32]!a} is not known", hint=f"one of {', '.join(sorted(known))}")
        kinds = frozenset(known[name] for name in self.kinds) if self.kinds else GENUINE_KINDS
        return kinds | {EvidenceKind.SAMPLE} if self.allow_sample else kinds - {EvidenceKind.SAMPLE}


def read_file(path: str, limit: int) -> bytes:
    """A file's content. Raises: FormatError where it is larger than `limit` bytes; OSError."""
    from encfs.errors import FormatError

    with open(path, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise FormatError(f"{path} is larger than {limit} bytes")
    return content


def _hex(text: str, option: str) -> bytes:
    from encfs.encoding import hex_decode
    from encfs.errors import FormatError

    try:
        return hex_decode(text.lower(), option)
    except FormatError:
        raise UsageError(f"{option} is not hexadecimal") from None


def _all_hex(texts: Iterable[str] | None, option: str) -> tuple[bytes, ...]:
    return tuple(_hex(text, option) for text in texts or ())


def _registers(texts: Iterable[str] | None, option: str, count: int, size: int) -> dict[int, tuple[bytes, ...]]:
    found: dict[int, tuple[bytes, ...]] = {}
    for text in texts or ():
        index, separator, value = text.partition("=")
        if not separator or not (index.isascii() and index.isdecimal() and len(index) < 3 and int(index) < count):
            raise UsageError(f"{option} {text[:24]!a} is not INDEX=HEX, with an index below {count}")
        content = _hex(value, option)
        if len(content) != size:
            raise UsageError(f"{option} {index} is not {size} bytes")
        found[int(index)] = (*found.get(int(index), ()), content)
    return found


def _floor(text: str) -> SnpTcbFloor:
    from encfs.attestation.amd import PRODUCTS
    from encfs.attestation.policy import SnpTcbFloor

    values: dict[str, Any] = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name == "product" and value in PRODUCTS:
            values[name] = value
        elif (
            name in ("bootloader", "tee", "snp", "microcode", "fmc")
            and (value.isascii() and value.isdecimal())
            and len(value) < 4
            and int(value) < 256
        ):
            values[name] = int(value)
        else:
            raise UsageError(
                f"--tcb-floor has {word[:24]!a}",
                hint=f"write bootloader=N,tee=N,snp=N,microcode=N,fmc=N and product={'|'.join(PRODUCTS)}",
            )
    return SnpTcbFloor(**values)
