"""`snp:[OPTION[,OPTION…]]`: a key that the SEV-SNP firmware derives for this guest alone.

The key is derived from a secret of the chip and from what the guest is: its launch measurement and its policy are
always mixed in. Without the policy a debug guest with the same measurement would derive the same key. It never leaves
this chip: an artifact or a sealed key that it opens cannot be opened on another machine.

| option | |
|---|---|
| `image-id`, `family-id` | mix in what the guest's ID block says |
| `svn=N` | mix in the guest's version, N at most the one in its ID block: an older guest cannot derive it |
| `tcb=HEX` | mix in a TCB version (16 hex digits as in reports, at most the committed one): older firmware cannot |
| `vmpl=N` | the privilege level that is mixed in, 0 (the default) to 3, not below the caller's |
| `root=vcek` or `root=vmrk` | the chip's secret (the default), or the migration agent's, which moves with the guest |
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs.attestation.collect.sev_guest import (
    DEVICE,
    KEY_FIELDS,
    ROOT_KEYS,
    Ioctl,
    derive_key,
    device_problem,
)
from encfs.errors import AttestationError, KeyFileError, KeyProviderError
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import KEK_SIZE, SymmetricKey, wipe
from encfs.strictjson import show_name

#: Tells this key from all others that may be made of the same derived key.
LABEL = b"encfs/1 kek snp"
_ALWAYS = KEY_FIELDS["policy"] | KEY_FIELDS["measurement"]
_NUMBER = re.compile(r"[0-9]{1,10}", re.ASCII)
_TCB = re.compile(r"[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True, slots=True)
class SnpKeyOptions:
    """What is mixed into a derived key beside the policy and the measurement. `tcb` is as in reports, 8 bytes."""

    image_id: bool = False
    family_id: bool = False
    svn: int | None = None
    tcb: bytes | None = None
    vmpl: int = 0
    root: str = "vcek"

    @property
    def fields(self) -> int:
        """GUEST_FIELD_SELECT."""
        chosen = {"image-id": self.image_id, "family-id": self.family_id}
        chosen |= {"svn": self.svn is not None, "tcb": self.tcb is not None}
        return _ALWAYS | sum(KEY_FIELDS[name] for name, wanted in chosen.items() if wanted)


def parse_options(text: str) -> SnpKeyOptions:
    """Options as they stand behind `snp:`. Raises: KeyFileError."""
    values: dict[str, object] = {}
    for word in text.split(",") if text else ():
        name, _, value = word.partition("=")
        field = name.replace("-", "_")
        if field in values:
            raise KeyFileError(f"the option {name} is given twice in the key URI snp:{text}")
        match name:
            case "image-id" | "family-id" if word == name:
                values[field] = True
            case "svn" if _NUMBER.fullmatch(value) and int(value) < 1 << 32:
                values[field] = int(value)
            case "vmpl" if value in ("0", "1", "2", "3"):
                values[field] = int(value)
            case "tcb" if _TCB.fullmatch(value):
                values[field] = bytes.fromhex(value)
            case "root" if value in ROOT_KEYS:
                values[field] = value
            case _:
                raise KeyFileError(
                    f"the option {show_name(word)} of the key URI is not known",
                    hint="snp: takes image-id, family-id, svn=N, tcb=16 HEX DIGITS, vmpl=0…3, root=vcek|vmrk",
                )
    return SnpKeyOptions(**values)  # type: ignore[arg-type]


def derived_kek(
    options: SnpKeyOptions = SnpKeyOptions(),
    *,
    device: Path = DEVICE,
    ioctl: Ioctl = fcntl.ioctl,
) -> bytearray:
    """The key-encryption key of this guest under these options: 32 bytes, which the caller wipes.

    Raises: KeyProviderError where this is no SNP guest, or the firmware refuses.
    """
    try:
        key = derive_key(
            fields=options.fields,
            root_key=ROOT_KEYS[options.root],
            vmpl=options.vmpl,
            guest_svn=options.svn or 0,
            tcb_version=int.from_bytes(options.tcb or b"", "little"),
            device=device,
            ioctl=ioctl,
        )
    except AttestationError as error:
        raise KeyProviderError(error.message, hint=error.hint) from None
    kek = bytearray(KEK_SIZE)
    try:
        HKDF(SHA256(), KEK_SIZE, salt=None, info=LABEL).derive_into(key, kek)
    finally:
        wipe(key)
    return kek


class SnpProvider:
    """Unwraps with the key that firmware derives, asked for anew each time."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._options = parse_options(text)

    @staticmethod
    def unavailable() -> str | None:
        return device_problem()

    @property
    def uri(self) -> str:
        return f"snp:{self._text}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        key = SymmetricKey(derived_kek(self._options))
        try:
            return unwrap_with_key(key, recipients, content_digest, self.uri)
        finally:
            key.wipe()

    def close(self) -> None:
        return
