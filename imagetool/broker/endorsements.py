"""What vouches for evidence and did not come along with it: certificates of chips, Intel's collateral. Not trusted.

A directory of the operator's: VCEK and VLEK certificates (`*.der`, `*.crt`, `*.cer`, `*.pem`), and collateral
(`*.json`), a file for each platform. What is in it is judged by `encfs.attestation` like anything that comes with
evidence. Collateral is valid for a month or less, so the directory is read anew where its files changed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from encfs.attestation import snp
from encfs.attestation.amd import MAX_CERTIFICATE_SIZE, endorsement_key
from encfs.attestation.certificates import MAX_CERTIFICATES, der_certificates
from encfs.attestation.collateral import MAX_COLLATERAL_SIZE, parse_collateral, require_one_each
from encfs.attestation.evidence import Collateral, Endorsements, Evidence, EvidenceKind
from encfs.errors import EncfsError, FormatError, NotFoundError

#: How long before its end collateral is said to be about to expire: Intel's is valid for 30 days.
EXPIRES_SOON = timedelta(days=7)

_MAX_FILES = 10_000
_MAX_CERTIFICATE_FILE = 2 * MAX_CERTIFICATES * MAX_CERTIFICATE_SIZE
_CERTIFICATES = frozenset({".der", ".crt", ".cer", ".pem"})
_COLLATERAL = ".json"
#: Files as they were when they were read: name, size, time of the last change.
_Files = Sequence[tuple[str, int, int]]
_DAY = 86400.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollateralFile:
    """Collateral, and the name of its file in the directory."""

    name: str
    collateral: Collateral

    def state(self, now: datetime) -> str:
        """`valid`, `expiring` (in a week or less) or `expired`."""
        left = self.collateral.expires - now
        if left <= timedelta(0):
            return "expired"
        return "expiring" if left <= EXPIRES_SOON else "valid"


@dataclass(frozen=True, slots=True)
class EndorsementStore:
    """Certificates by the chip they are of (VLEKs under the empty one), and collateral, one for each platform."""

    certificates: Mapping[bytes, tuple[bytes, ...]]
    collateral: tuple[CollateralFile, ...] = ()

    def for_evidence(self, evidence: Evidence) -> Endorsements:
        """What is known for some evidence, beside what it brought along: that may be of no use."""
        if evidence.kind is EvidenceKind.SNP:
            report = snp.parse_report(evidence.content)
            chip = report.chip_id if report.signing_key == "VCEK" else b""
            return Endorsements(self.certificates.get(chip, ()))
        if evidence.kind in (EvidenceKind.TDX, EvidenceKind.SGX, EvidenceKind.AZURE_TDX_VTPM):
            return Endorsements(collateral=tuple(one.collateral for one in self.collateral))
        return Endorsements()

    def warnings(self, now: datetime) -> list[str]:
        """A line for all collateral that has expired or will soon."""
        states = [(one, one.state(now)) for one in self.collateral]
        return [
            f"{one.name}: the collateral for {one.collateral.platform} "
            f"{'has expired' if state == 'expired' else 'expires'} ({one.collateral.expires:%Y-%m-%dT%H:%M:%SZ}): "
            "fetch it anew"
            for one, state in states
            if state != "valid"
        ]


class EndorsementDirectory:
    """The directory as it was last read; `None` for a broker that has none."""

    def __init__(self, path: Path | None) -> None:
        """Raises: NotFoundError; FormatError naming a file that is of no use, ConflictError two of one platform."""
        self._path = path
        self._files: _Files = _files(path)
        self.store = _load(path, self._files)

    def refresh(self) -> bool:
        """Read what changed since; whether something did. `store` stays as it was where that fails.

        Raises: as the constructor, once for each change.
        """
        files = _files(self._path)
        if files == self._files:
            return False
        self._files = files
        self.store = _load(self._path, files)
        return True


class Reminder:
    """Tells the operator, in the log of the process, what is or will be of no use: when it changes, and once a day."""

    def __init__(self, directory: EndorsementDirectory) -> None:
        self._directory = directory
        self._told: float | None = None
        self._trouble = ""

    def look(self) -> None:
        try:
            changed = self._directory.refresh()
        except (EncfsError, OSError) as error:
            if str(error) != self._trouble:
                self._trouble = str(error)
                _logger.warning("the endorsements stay what they were: %s", error)
            return
        if changed:
            self._trouble = ""
            _logger.info("the endorsements were read anew")
        now = time.monotonic()
        if changed or self._told is None or now - self._told >= _DAY:
            self._told = now
            for line in self._directory.store.warnings(datetime.now(UTC)):
                _logger.warning("%s", line)


def _files(path: Path | None) -> _Files:
    if path is None:
        return ()
    if not path.is_dir():
        raise NotFoundError(f"the directory of endorsements {path} does not exist")
    wanted = sorted(one for one in path.iterdir() if one.suffix in _CERTIFICATES or one.suffix == _COLLATERAL)
    if len(wanted) > _MAX_FILES:
        raise FormatError(f"the directory of endorsements {path} has more than {_MAX_FILES} files")
    return [(one.name, (status := one.stat()).st_size, status.st_mtime_ns) for one in wanted]


def _load(path: Path | None, files: _Files) -> EndorsementStore:
    if path is None:
        return EndorsementStore({})
    certificates: dict[bytes, tuple[bytes, ...]] = {}
    collateral: list[CollateralFile] = []
    for name, _, _ in files:
        file = path / name
        if file.suffix == _COLLATERAL:
            content = _read(file, MAX_COLLATERAL_SIZE)
            collateral.append(CollateralFile(name, parse_collateral(content, str(file))))
            continue
        for der in der_certificates(_read(file, _MAX_CERTIFICATE_FILE), str(file)):
            key = endorsement_key(der)
            if isinstance(key, str):
                raise FormatError(f"{file}: {key}", hint="only VCEK and VLEK certificates belong there")
            certificates[key.chip_id] = (*certificates.get(key.chip_id, ()), der)
    require_one_each((one.name, one.collateral) for one in collateral)
    return EndorsementStore(certificates, tuple(collateral))


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise FormatError(f"{path} is larger than {limit} bytes")
    return content
