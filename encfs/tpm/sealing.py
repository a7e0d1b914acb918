"""A key-encryption key sealed by the TPM of this machine, and got back where the policy is met. No key URIs here.

What is sealed (the secret part of an object of kind `sealed`; at most 128 bytes, which every TPM takes):

| offset | size | field |
|---|---|---|
| 0 | 32 | key-encryption key |
| 32 | 0 to 96 | its key id (`kid`), ASCII; none where it is empty |

The key id is inside, so that nobody who can write the file can make the key pass for another.
"""

from __future__ import annotations

from tpm2_pytss import ESAPI, ESYS_TR

from encfs.errors import FormatError, KeyFileError
from encfs.keys.jwkjson import check_kid
from encfs.keys.secrets import KEK_SIZE, SymmetricKey, wipe
from encfs.tpm import structures
from encfs.tpm.connection import translated
from encfs.tpm.counter import current_limit
from encfs.tpm.keyfile import TpmObject
from encfs.tpm.policy import Authorization, PcrRequest, PcrValues, Policy, check_conditions
from encfs.tpm.storage import Storage, opened_storage

#: Longest key id (bytes): 128 bytes are the most that a TPM seals for sure (MAX_SYM_DATA; Part 2, 11.1.14).
MAX_KID_SIZE = 128 - KEK_SIZE


def seal(
    key: SymmetricKey,
    request: PcrRequest | None,
    authorization: Authorization | None = None,
    counter_index: int | None = None,
) -> TpmObject:
    """`key` so that only this machine's TPM gives it back, and only while the policy is met. Write it to a file.

    PCRs that the request gives no value for are sealed to what they hold now, a counter to its present value; the
    counter is made if nothing is at its index.

    Raises: KeyFileError for a key id that is too long; KeyProviderError where the TPM cannot be used; UsageError with
    neither PCRs nor an authorization.
    """
    check_conditions(request, authorization)
    kid = (key.kid or "").encode("ascii")
    if len(kid) > MAX_KID_SIZE:
        raise KeyFileError(f"the key id is longer than the {MAX_KID_SIZE} bytes that a TPM has room for")
    secret = bytearray(key.secret + kid)
    try:
        with opened_storage() as storage:
            policy = agreed_policy(storage, request, authorization, counter_index)
            with translated("seal the key"):
                public, private = storage.create(structures.sealed_data(policy.digest()), secret)
            return TpmObject("sealed", storage.root_name, storage.root_handle, public, private, policy)
    finally:
        wipe(secret)


def agreed_policy(
    storage: Storage, request: PcrRequest | None, authorization: Authorization | None, counter_index: int | None
) -> Policy:
    """The policy of a new object, with this machine's present values where none are given. Raises: as `seal`."""
    pcrs = _values(storage, request) if request is not None else None
    counter = current_limit(storage, counter_index) if counter_index is not None else None
    return Policy(pcrs, authorization, counter)


def unseal(found: TpmObject) -> SymmetricKey:
    """The key of a sealed object, which the caller wipes.

    Raises: KeyFileError for another kind of object; KeyRefusedError, with what differs, where the policy is not met or
    the TPM is another one; KeyProviderError where the TPM cannot be used or does not take the object.
    """
    if found.kind != "sealed" or found.policy is None:
        raise KeyFileError("it holds no sealed key", hint="make one with encfs seal")
    with (
        opened_storage(found.srk_name, found.srk_handle) as storage,
        storage.loaded(found) as handle,
        storage.satisfied(found.policy) as session,
    ):
        secret = _unseal(storage.tpm, handle, session)
    try:
        if len(secret) < KEK_SIZE:
            raise KeyFileError("what is sealed in it is no key", hint="make one with encfs seal")
        return SymmetricKey(secret[:KEK_SIZE], _kid(bytes(secret[KEK_SIZE:])))
    finally:
        wipe(secret)


def present_values(request: PcrRequest) -> PcrValues:
    """What a request asks for, with what this machine's PCRs hold now. Raises: KeyProviderError."""
    with opened_storage() as storage:
        return _values(storage, request)


def _values(storage: Storage, request: PcrRequest) -> PcrValues:
    given = request.complete
    if given is not None:
        return given
    present = storage.read_pcrs(request.bank, [index for index, value in request.values.items() if value is None])
    return PcrValues(
        request.bank,
        {index: present.values[index] if value is None else value for index, value in request.values.items()},
    )


def _unseal(tpm: ESAPI, handle: ESYS_TR, session: ESYS_TR) -> bytearray:
    with translated("unseal the key"):
        return bytearray(bytes(tpm.unseal(handle, session1=session)))


def _kid(text: bytes) -> str | None:
    if not text:
        return None
    try:
        return check_kid(text.decode("ascii"))
    except (UnicodeDecodeError, FormatError):
        raise KeyFileError("what is sealed in it is no key", hint="make one with encfs seal") from None
