"""Supervised mounts for tests: the real command, with times that tests can wait for.

Run as a module, this is `encfs` with a supervisor that lets requests wait for `ENCFS_TEST_PATIENCE` seconds only, and
with `ENCFS_TEST_NO_RESEND` believes that the kernel cannot send requests again; it reads the kernel's counters from
the file `ENCFS_TEST_VMSTAT`.
"""

from __future__ import annotations

import os
from pathlib import Path

from encfs.cli import main
from encfs.mount import keeper, supervisor

if __name__ == "__main__":
    supervisor.PATIENCE = float(os.environ.get("ENCFS_TEST_PATIENCE", supervisor.PATIENCE))
    supervisor.VMSTAT = Path(os.environ.get("ENCFS_TEST_VMSTAT", supervisor.VMSTAT))
    if "ENCFS_TEST_NO_RESEND" in os.environ:
        keeper.can_resend = lambda init: False
    main()
