"""NV counters: numbers in a TPM that only grow. A key that is sealed to one opens until the counter moves on.

A counter that is undefined and made anew does not start lower than any counter of the TPM ever was (TPM 2.0 Library,
Part 1, 37.2.5), so what was superseded stays so. Clearing the TPM undefines counters, and the storage root key changes.
"""

from __future__ import annotations

from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2_NT, TPM2B_NV_PUBLIC, TPMA_NV, TPMS_NV_PUBLIC

from encfs.errors import KeyProviderError
from encfs.tpm.connection import (
    ATTRIBUTES,
    HANDLE,
    NV_AUTHORIZATION,
    NV_UNINITIALIZED,
    VALUE,
    translated,
)
from encfs.tpm.policy import CounterLimit
from encfs.tpm.storage import Storage

_SIZE = 8
# Used without a password: whoever may use the TPM may move it on, which takes access away and never gives it.
_NEEDED = TPMA_NV.AUTHREAD | TPMA_NV.AUTHWRITE
_ATTRIBUTES = (
    _NEEDED | TPMA_NV.OWNERREAD | TPMA_NV.OWNERWRITE | TPMA_NV.NO_DA | (TPM2_NT.COUNTER << TPMA_NV.TPM2_NT_SHIFT)
)


class _AbsentError(Exception):
    """Nothing is at an index."""


def current_limit(storage: Storage, index: int) -> CounterLimit:
    """The counter at an index, as a limit at its present value; it is made there if nothing is.

    Raises: KeyProviderError where something else is there, or the TPM has no room.
    """
    try:
        handle = _found(storage, index)
    except _AbsentError:
        handle = _made(storage, index)
    what = f"the NV counter {index:#010x}"
    try:
        value = _read(storage, handle, what)
    except _AbsentError:  # defined, and never incremented: its name changes when it is
        _increment(storage, handle, what)
        handle = _found(storage, index)
        value = _read(storage, handle, what)
    return CounterLimit(index, bytes(storage.tpm.tr_get_name(handle)), value)


def value(storage: Storage, index: int) -> int:
    """The value of a counter. Raises: KeyProviderError where there is none or it has none yet."""
    what = f"the NV counter {index:#010x}"
    try:
        return _read(storage, _found(storage, index), what)
    except _AbsentError:
        raise _absent(what) from None


def advance(storage: Storage, index: int) -> int:
    """Move a counter on, and return its value: what was sealed to it before does not open any more.

    Raises: KeyProviderError where there is none.
    """
    what = f"the NV counter {index:#010x}"
    try:
        handle = _found(storage, index)
    except _AbsentError:
        raise _absent(what) from None
    _increment(storage, handle, what)
    return _read(storage, handle, what)


def _absent(what: str) -> KeyProviderError:
    return KeyProviderError(
        f"{what} is not there", hint="encfs seal --tpm2-nv-counter makes one; list them: tpm2_nvreadpublic"
    )


def _found(storage: Storage, index: int) -> ESYS_TR:
    """Raises: _AbsentError; KeyProviderError where it is no counter that can be used without a password."""
    what = f"the NV counter {index:#010x}"
    with translated(f"look at {what}", {HANDLE: _AbsentError()}):
        handle = storage.tpm.tr_from_tpmpublic(index, session1=storage.answers_encrypted())
        public, _ = storage.tpm.nv_read_public(handle, session1=storage.answers_encrypted())
    attributes = int(public.nvPublic.attributes)
    kind = (attributes & TPMA_NV.TPM2_NT_MASK) >> TPMA_NV.TPM2_NT_SHIFT
    if kind != TPM2_NT.COUNTER or attributes & _NEEDED != _NEEDED:
        raise KeyProviderError(
            f"the NV index {index:#010x} is in use, and is no counter without a password", hint="choose another index"
        )
    if attributes & TPMA_NV.ORDERLY:
        raise KeyProviderError(
            f"{what} is an orderly one, which a loss of power sets back", hint="choose another index"
        )
    return handle


def _made(storage: Storage, index: int) -> ESYS_TR:
    public = TPMS_NV_PUBLIC(nvIndex=index, nameAlg=TPM2_ALG.SHA256, attributes=_ATTRIBUTES, dataSize=_SIZE)
    unfit = KeyProviderError(
        f"the TPM makes no counter at {index:#010x}", hint="choose an index of the owner's range, such as 0x01800100"
    )
    with translated(f"make an NV counter at {index:#010x}", {ATTRIBUTES: unfit, VALUE: unfit, HANDLE: unfit}):
        return storage.tpm.nv_define_space(b"", TPM2B_NV_PUBLIC(nvPublic=public), session1=storage.session())


def _increment(storage: Storage, handle: ESYS_TR, what: str) -> None:
    with translated(f"move {what} on"):
        storage.tpm.nv_increment(handle, session1=storage.authenticated())


def _read(storage: Storage, handle: ESYS_TR, what: str) -> int:
    """Raises: _AbsentError where it was never incremented."""
    unread = {NV_UNINITIALIZED: _AbsentError()}
    locked = KeyProviderError(f"{what} is locked against reading", hint="choose another index")
    with translated(f"read {what}", unread | {NV_AUTHORIZATION: locked}):
        return int.from_bytes(bytes(storage.tpm.nv_read(handle, _SIZE, session1=storage.answers_encrypted())))
