"""An open TPM: which one, what its return codes mean, and nothing left in it afterwards.

The TPM is named as everywhere by a TCTI, `NAME:CONFIGURATION` (tss2-tctildr(3)), in `TPM2TOOLS_TCTI` or `TSS2_TCTI`;
else it is the kernel's resource manager, /dev/tpmrm0. Behind other TCTIs there may be no resource manager and room for
three objects: whatever is loaded is flushed as soon as it is no longer needed. What is done in a TPM is not done here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tpm2_pytss import ESAPI, ESYS_TR, TSS2_Exception

from encfs.errors import KeyProviderError, KeyRefusedError
from encfs.tpm.availability import DEFAULT_TCTI, device_problem, tcti

_logger = logging.getLogger(__name__)

# Layers of a return code (TCG TSS 2.0 Overview, 4.1): bits 16 to 23.
_LAYER_SHIFT = 16
_TPM_LAYERS = (0, 12)  # the TPM, or a resource manager in its place
_ESYS_LAYER, _TCTI_LAYER = 7, 10

# Return codes of a TPM without what they say of handle, parameter or session (Part 2, 6.6).
AUTH_FAIL, BAD_AUTH, HANDLE, INTEGRITY, SIGNATURE, POLICY_FAIL = 0x8E, 0xA2, 0x8B, 0x9F, 0x9B, 0x9D
VALUE, SIZE, ECC_POINT, CURVE, KEY_SIZE, TYPE, ASYMMETRIC = 0x84, 0x95, 0xA7, 0xA6, 0x87, 0x8A, 0x81
ATTRIBUTES, PCR = 0x82, 0x127
INITIALIZE, FAILURE, POLICY, PCR_CHANGED, NV_UNINITIALIZED, NV_SPACE = 0x100, 0x101, 0x126, 0x128, 0x14A, 0x14B
NV_AUTHORIZATION = 0x149
OBJECT_MEMORY, SESSION_MEMORY, MEMORY, SESSION_HANDLES, OBJECT_HANDLES = 0x902, 0x903, 0x904, 0x905, 0x906
LOCKOUT, RETRY, NV_RATE = 0x921, 0x922, 0x920
# Of the library itself.
_ESYS_BAD_RESPONSES = (0x08, 0x15, 0x18)  # malformed, authorisation failed, insufficient

_BASE_FORMAT_1 = 0x80
_POLICY_HINT = "measurements or policy are not those at sealing; seal again, or approve the new ones with encfs approve"


@contextmanager
def opened_tpm() -> Iterator[ESAPI]:
    """The TPM of this machine, closed at the end.

    Raises: KeyProviderError where there is none that can be used, with the reason.
    """
    # The library prints a line for every error on standard error; ours says the same, better.
    os.environ.setdefault("TSS2_LOG", "all+NONE")
    name = tcti()
    if problem := device_problem(name):
        raise KeyProviderError(f"there is no TPM to use: {problem}", hint=_absent_hint(name))
    try:
        tpm = ESAPI(name)
    except (TSS2_Exception, RuntimeError) as error:
        raise KeyProviderError(f"the TPM at {name} does not answer: {_plain(error)}", hint=_absent_hint(name)) from None
    try:
        yield tpm
    finally:
        tpm.close()


@contextmanager
def flushed(tpm: ESAPI, handle: ESYS_TR) -> Iterator[ESYS_TR]:
    """A transient object or session that is gone at the end."""
    try:
        yield handle
    finally:
        try:
            tpm.flush_context(handle)
        except TSS2_Exception as error:
            # Whatever went wrong before is what the user should hear of.
            _logger.debug("a TPM object could not be flushed: %s", error)


@contextmanager
def translated(doing: str, instead: Mapping[int, Exception] | None = None) -> Iterator[None]:
    """Turn what the library raises into one line. `doing` follows "the TPM refuses to" in it.

    `instead` has what to raise for some of the codes above. Raises: KeyRefusedError where a policy is not met;
    KeyProviderError for everything else.
    """
    try:
        yield
    except TSS2_Exception as error:
        raise _translate(error, doing, instead or {}) from None


def _translate(error: TSS2_Exception, doing: str, instead: Mapping[int, Exception]) -> Exception:
    rc = int(error.rc)
    layer, code = rc >> _LAYER_SHIFT & 0xFF, rc & 0xFFFF
    if layer == _TCTI_LAYER:
        return KeyProviderError(
            f"the TPM at {tcti()} stopped answering: {_plain(error)}", hint="is it still there? try again"
        )
    if layer == _ESYS_LAYER and code in _ESYS_BAD_RESPONSES:
        return KeyRefusedError(
            "an answer of the TPM does not authenticate: something between this program and the TPM changed it",
            hint="do not use this machine before you know what it is",
        )
    if layer not in _TPM_LAYERS:
        return KeyProviderError(f"cannot {doing}: {_plain(error)}")
    code = code & 0x3F | _BASE_FORMAT_1 if code & _BASE_FORMAT_1 else code & 0xFFF
    if code in instead:
        return instead[code]
    if code in (POLICY_FAIL, POLICY, PCR_CHANGED):
        return KeyRefusedError(f"the TPM refuses to {doing}: its policy is not met", hint=_POLICY_HINT)
    message, hint = _KNOWN.get(code, (f"the TPM refuses to {doing}: {_plain(error)}", None))
    return KeyProviderError(message.format(doing=doing), hint=hint)


_FULL = "flush what others left in it: tpm2_flushcontext -t -l -s; or go through /dev/tpmrm0"
_KNOWN: dict[int, tuple[str, str | None]] = {
    LOCKOUT: (
        "the TPM refuses to {doing}: it is locked out after too many wrong passwords",
        "wait, or clear the lockout: tpm2_dictionarylockout --clear-lockout",
    ),
    AUTH_FAIL: ("the TPM refuses to {doing}: a password is set on what it needs", None),
    BAD_AUTH: (
        "the TPM refuses to {doing}: a password is set on what it needs",
        "the owner hierarchy must have none, or a storage root key persist at 0x81000001",
    ),
    INTEGRITY: (
        "the TPM refuses to {doing}: the file was altered, or is of another TPM",
        "take it from where it was made, or make it again on this machine",
    ),
    SIGNATURE: ("the TPM refuses to {doing}: the signature does not verify", "take the approval from who signed it"),
    INITIALIZE: ("the TPM was not started", "a simulator needs --flags startup-clear; else reboot"),
    FAILURE: ("the TPM is in failure mode", "reboot; if that does not help, it is broken"),
    RETRY: ("the TPM is busy", "try again"),
    NV_RATE: ("the TPM allows no write to its memory at present", "try again in a while"),
    NV_SPACE: ("the TPM's memory is full", "undefine an index: tpm2_nvundefine"),
    **dict.fromkeys((OBJECT_MEMORY, MEMORY, OBJECT_HANDLES), ("the TPM has no room for another object", _FULL)),
    **dict.fromkeys((SESSION_MEMORY, SESSION_HANDLES), ("the TPM has no room for another session", _FULL)),
}


#: Codes of a TPM that does not know an algorithm, a curve or a size.
NOT_IMPLEMENTED = (VALUE, CURVE, KEY_SIZE, TYPE, ASYMMETRIC)


def _absent_hint(name: str) -> str:
    if name == DEFAULT_TCTI:
        return "give the machine a TPM (or vTPM), or name one in TPM2TOOLS_TCTI"
    return "check TPM2TOOLS_TCTI or TSS2_TCTI"


def _plain(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
