"""What a process that holds keys can do for them: no core dumps, no look into its memory by others, no swap.

Each is best effort, for the whole process and for good: what the system does not permit is a line in the log. A forked
process inherits the first two and has to lock its memory itself. Wiping single secrets is `encfs.keys.secrets`'.
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
#: The map of the first user namespace (user_namespaces(7)).
_ALL_USERS = ["0", "0", "4294967295"]

_logger = logging.getLogger(__name__)


def forbid_core_files() -> None:
    """No core file of this process; children may lift it for themselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def protect_keys() -> None:
    """For every process that is going to hold keys, before they are read; harmless when called again."""
    forbid_dumps()
    forbid_swapping()


def forbid_dumps() -> None:
    """No core dump of any kind, and no look into the memory by others of the same user. For good."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        _logger.debug("others of this user may look into the memory: %s", os.strerror(ctypes.get_errno()))


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
    """Whether there is no limit. A capability in a user namespace does not lift it."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    try:
        if Path("/proc/self/uid_map").read_text().split() != _ALL_USERS:
            return False
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    except OSError as error:
        _logger.debug("/proc does not say what this process may do: %s", error.strerror)
    return False
