"""Whether a TPM can be used here at all, found out without opening it and without its library."""

from __future__ import annotations

import importlib.util
import os

from encfs.errors import KeyProviderError

DEFAULT_TCTI = "device:/dev/tpmrm0"
#: Where the TCTI is looked for, in this order: as tpm2-tools have it, and as tpm2-tss' own programs.
VARIABLES = ("TPM2TOOLS_TCTI", "TSS2_TCTI")


def tcti() -> str:
    """The TCTI to use, `NAME:CONFIGURATION`."""
    return next((value for name in VARIABLES if (value := os.environ.get(name))), DEFAULT_TCTI)


def unavailable() -> str | None:
    """Why no TPM can be used on this machine, or None."""
    if importlib.util.find_spec("tpm2_pytss") is None:
        return "tpm2-pytss is not installed"
    return device_problem(tcti())


def require_library() -> None:
    """Raises: KeyProviderError unless tpm2-pytss can be loaded."""
    try:
        import tpm2_pytss  # noqa: F401
    except ImportError as error:
        raise KeyProviderError(
            f"the TPM library cannot be loaded: {error}", hint="install it: pip install 'encfs[tpm]'"
        ) from None


def device_problem(name: str) -> str | None:
    """What is wrong with the device that a TCTI names, as far as looking at it can tell; None for other TCTIs."""
    kind, _, path = name.partition(":")
    if kind != "device":
        return None
    path = path or "/dev/tpm0"
    if not os.path.exists(path):
        return f"{path} does not exist"
    if not os.access(path, os.R_OK | os.W_OK):
        return f"{path} may not be opened by this user (its group is usually tss)"
    return None
