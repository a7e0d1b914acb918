"""Private keys that never leave a TPM: made in it, and used in it to unwrap what was encrypted to their public half.

What the key gives (a shared secret, a decrypted key) comes back through the salted session, encrypted. The key is used
only while its policy of PCRs, approvals and counter is met.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss import (
    ESYS_TR,
    TPM2_ALG,
    TPM2B_ECC_PARAMETER,
    TPM2B_ECC_POINT,
    TPM2B_PUBLIC_KEY_RSA,
    TPMS_ECC_POINT,
    TPMT_RSA_DECRYPT,
)

from encfs.errors import KeyProviderError
from encfs.keys.jwk import KeyKind, PublicKey
from encfs.tpm import structures
from encfs.tpm.connection import ECC_POINT, NOT_IMPLEMENTED, SIZE, VALUE, translated
from encfs.tpm.keyfile import TpmObject
from encfs.tpm.policy import Authorization, PcrRequest, check_conditions
from encfs.tpm.sealing import agreed_policy
from encfs.tpm.storage import Storage, opened_storage


def create_resident_key(
    kind: str,
    request: PcrRequest | None,
    authorization: Authorization | None = None,
    counter_index: int | None = None,
) -> TpmObject:
    """A new private key in this machine's TPM, to be used only while the policy is met. Write it to a file.

    `kind` is one of `structures.RESIDENT_KINDS`, as `imagetool keygen --type` names them.

    Raises: KeyProviderError where the TPM cannot be used or makes no such key; UsageError without any condition.
    """
    check_conditions(request, authorization)
    with opened_storage() as storage:
        policy = agreed_policy(storage, request, authorization, counter_index)
        digest = policy.digest()
        template = structures.resident_key(kind, digest)
        unknown = KeyProviderError(f"this TPM makes no keys of type {kind}")
        try:
            with translated(f"make a key of type {kind}", dict.fromkeys(NOT_IMPLEMENTED, unknown)):
                public, private = storage.create(template)
        except KeyProviderError as error:
            if error is unknown:
                raise KeyProviderError(error.message, hint=_offered(storage)) from None
            raise
        return TpmObject("key", storage.root_name, storage.root_handle, public, private, policy)


def _offered(storage: Storage) -> str:
    """The kinds that this TPM says it makes, found out without making one."""
    found = [kind for kind in structures.RESIDENT_KINDS if storage.makes(structures.resident_key(kind, b""))]
    return f"it makes {', '.join(found)}" if found else "it makes no private keys of any known type"


class ResidentKey:
    """A key of a file, as an `encfs.keys.recipients.UnwrappingKey`: each operation is the TPM's.

    Beside ValueError, operations raise what `encfs.tpm.sealing.unseal` does.
    """

    def __init__(self, found: TpmObject) -> None:
        """Raises: FormatError where it is no private key."""
        self._found = found
        self._public = found.recipient()

    @property
    def kind(self) -> KeyKind:
        return self._public.kind

    @property
    def kid(self) -> str:
        return self._public.kid

    def exchange(self, peer: PublicKey) -> bytes:
        if not isinstance(peer.handle, ec.EllipticCurvePublicKey) or peer.kind is not self.kind:
            raise ValueError("keys of different kinds")
        numbers, size = peer.handle.public_numbers(), (peer.handle.key_size + 7) // 8
        point = TPM2B_ECC_POINT(
            point=TPMS_ECC_POINT(
                x=TPM2B_ECC_PARAMETER(numbers.x.to_bytes(size)),
                y=TPM2B_ECC_PARAMETER(numbers.y.to_bytes(size)),
            )
        )
        with self._used() as (storage, handle, session), translated("use the key", _unfit(ECC_POINT)):
            shared = storage.tpm.ecdh_zgen(handle, point, session1=session)
        # TPMs may leave out leading zeros.
        return bytes(shared.point.x).rjust(size, b"\0")

    def decrypt_oaep(self, data: bytes) -> bytes:
        scheme = TPMT_RSA_DECRYPT(scheme=TPM2_ALG.NULL)
        with self._used() as (storage, handle, session), translated("use the key", _unfit(VALUE, SIZE)):
            return bytes(storage.tpm.rsa_decrypt(handle, TPM2B_PUBLIC_KEY_RSA(data), scheme, session1=session))

    def decrypt_hpke(self, data: bytes, info: bytes) -> bytes:
        raise TypeError("not a hybrid key")

    @contextmanager
    def _used(self) -> Iterator[tuple[Storage, ESYS_TR, ESYS_TR]]:
        found = self._found
        if found.policy is None:
            raise TypeError("a private key without a policy")
        with (
            opened_storage(found.srk_name, found.srk_handle) as storage,
            storage.loaded(found) as handle,
            storage.satisfied(found.policy) as session,
        ):
            yield storage, handle, session


def _unfit(*codes: int) -> dict[int, Exception]:
    """What a TPM says of input that does not fit the key."""
    return {code: ValueError("it is not for this key") for code in codes}
