"""What a process that holds keys can do for them: no core dumps, no look into its memory by others, no swap.

Each is best effort and for the whole process. Wiping single secrets is `encfs.keys.secrets`'.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
from pathlib import Path

#: prctl(2), mlockall(2), capabilities(7).
_PR_SET_DUMPABLE = 4
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14

_logger = logging.getLogger(__name__)


def forbid_core_files() -> None:
    """No core file of this process; children may lift it for themselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def forbid_dumps() -> None:
    """No core dump of any kind, and no look into the memory by others of the same user. For good."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def forbid_swapping() -> bool:
    """Keep all memory of this process out of swap, where that is permitted without a limit; whether it is now.

    Under a limit (RLIMIT_MEMLOCK) nothing is locked: later allocations beyond it would fail.
    """
    if not _may_lock():
        _logger.debug("memory is not locked: the limit on locked memory is too low (ulimit -l)")
        return False
    library = ctypes.CDLL(None, use_errno=True)
    # Only pages that are touched: reserved ranges (thread stacks, arenas) would all become resident.
    if library.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        _logger.debug("memory is not locked: %s", os.strerror(ctypes.get_errno() or errno.EPERM))
        return False
    return True


def _may_lock() -> bool:
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False
