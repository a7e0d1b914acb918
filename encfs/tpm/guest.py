"""What Azure's guest attestation wants of a confidential VM's vTPM: a quote, and a key that MAA and vaults encrypt to.

The key is made for one attestation and forgotten with it: RSA-2048, under the present values of the PCRs that are
quoted, and certified by the attestation key (AK) that the paravisor vouches for. Its private half never leaves the TPM.
Sources: Azure/cvm-attestation-tools; Azure/confidential-computing-cvm-guest-attestation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2B_DATA,
    TPM2B_PUBLIC,
    TPM2B_PUBLIC_KEY_RSA,
    TPM2B_SENSITIVE_CREATE,
    TPMS_SCHEME_HASH,
    TPMT_PUBLIC,
    TPMT_RSA_DECRYPT,
    TPMT_SIG_SCHEME,
    TPMU_ASYM_SCHEME,
)

from encfs.errors import KeyProviderError
from encfs.tpm import structures
from encfs.tpm.connection import HANDLE, SIZE, VALUE, flushed, translated
from encfs.tpm.policy import PcrValues, Policy
from encfs.tpm.quote import AZURE_AK_HANDLE, Quote, azure_report, quote_with_handle, raw_rsa_signature, read_nv
from encfs.tpm.storage import Storage, opened_storage

#: PCRs that are quoted and that the key is bound to: what the firmware measures.
PCRS = tuple(range(8))
KEY_BITS = 2048
_AK_CERTIFICATE_INDEX = 0x01C101D0
_HASHES = {"sha1": TPM2_ALG.SHA1, "sha256": TPM2_ALG.SHA256, "sha384": TPM2_ALG.SHA384}


@dataclass(frozen=True, slots=True)
class GuestStatement:
    """All that goes to MAA from the vTPM. Public areas are TPM2B_PUBLIC, `certification` is a TPMS_ATTEST."""

    report: bytes = field(repr=False)
    ak_certificate: bytes = field(repr=False)
    ak_public: bytes = field(repr=False)
    quote: Quote = field(repr=False)
    key_public: bytes = field(repr=False)
    certification: bytes = field(repr=False)
    #: Raw RSA.
    certification_signature: bytes = field(repr=False)


class GuestKey:
    """The key while it is in the TPM. Made by `opened_guest`; operations raise ValueError for what is not for it."""

    def __init__(self, storage: Storage, handle: ESYS_TR, policy: Policy, statement: GuestStatement) -> None:
        self._storage, self._handle, self._policy = storage, handle, policy
        self.statement = statement

    def decrypt_pkcs1(self, data: bytes) -> bytes:
        """RSAES-PKCS1-v1_5, as MAA encrypts the key of its token."""
        return self._decrypt(data, TPMT_RSA_DECRYPT(scheme=TPM2_ALG.RSAES))

    def decrypt_oaep(self, data: bytes, digest: str) -> bytes:
        """RSA-OAEP with `sha1`, `sha256` or `sha384`, as vaults wrap what they release."""
        details = TPMU_ASYM_SCHEME(oaep=TPMS_SCHEME_HASH(hashAlg=_HASHES[digest]))
        return self._decrypt(data, TPMT_RSA_DECRYPT(scheme=TPM2_ALG.OAEP, details=details))

    def _decrypt(self, data: bytes, scheme: TPMT_RSA_DECRYPT) -> bytes:
        # Zero is nobody's ciphertext, and puts some TPMs into failure mode.
        if len(data) != KEY_BITS // 8 or not any(data):
            raise ValueError("it is not for this key")
        unfit = dict.fromkeys((VALUE, SIZE), ValueError("it is not for this key"))
        with self._storage.satisfied(self._policy) as session, translated("use the key", unfit):
            return bytes(
                self._storage.tpm.rsa_decrypt(self._handle, TPM2B_PUBLIC_KEY_RSA(data), scheme, session1=session)
            )


@contextmanager
def opened_guest(pcrs: Sequence[int] = PCRS) -> Iterator[GuestKey]:
    """A fresh key of this confidential VM, with what vouches for it.

    Raises: KeyProviderError where this is no Azure confidential VM or the TPM cannot be used.
    """
    with opened_storage() as storage:
        report = azure_report(storage)
        certificate = read_nv(storage, _AK_CERTIFICATE_INDEX, "the certificate of its attestation key")
        quote = quote_with_handle(storage, AZURE_AK_HANDLE, b"", "sha256", list(pcrs))
        policy = Policy(PcrValues("sha256", {index: quote.pcrs[index] for index in pcrs}))
        # A TPM makes the same primary key of the same template: what is unique about it has to be new.
        area, _ = TPMT_PUBLIC.unmarshal(structures.transport_key(policy.digest(), os.urandom(KEY_BITS // 8)))
        with translated("make a key for one attestation"):
            handle, public, _, _, _ = storage.tpm.create_primary(
                TPM2B_SENSITIVE_CREATE(), TPM2B_PUBLIC(publicArea=area), ESYS_TR.OWNER, session1=storage.session()
            )
        with flushed(storage.tpm, handle):
            ak, ak_public = _attestation_key(storage)
            with translated("certify the key"):
                certified, signature = storage.tpm.certify(
                    handle,
                    ak,
                    TPM2B_DATA(),
                    TPMT_SIG_SCHEME(scheme=TPM2_ALG.NULL),
                    session1=ESYS_TR.PASSWORD,
                    session2=storage.session(),
                )
            statement = GuestStatement(
                report,
                certificate,
                ak_public,
                quote,
                bytes(public.marshal()),
                bytes(certified),
                raw_rsa_signature(bytes(signature.marshal())),
            )
            yield GuestKey(storage, handle, policy, statement)


def _attestation_key(storage: Storage) -> tuple[ESYS_TR, bytes]:
    absent = KeyProviderError(f"no attestation key is at {AZURE_AK_HANDLE:#010x}: this is no Azure confidential VM")
    with translated("look at the attestation key", {HANDLE: absent}):
        ak = storage.tpm.tr_from_tpmpublic(AZURE_AK_HANDLE)
        public, _, _ = storage.tpm.read_public(ak)
    return ak, bytes(public.marshal())
