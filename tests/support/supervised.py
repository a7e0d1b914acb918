"""Supervised mounts for tests: the real command, with times that tests can wait for.

Run as a module, this is `encfs` with a supervisor that lets requests wait for `ENCFS_TEST_PATIENCE` seconds only, and
with `ENCFS_TEST_NO_RESEND` believes that the kernel cannot send requests again; it reads the kernel's counters from
the file `ENCFS_TEST_VMSTAT`; with `ENCFS_TEST_OTHER_SESSION` a successor negotiates something else.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

from encfs.cli import main
from encfs.mount import daemonprocess, keeper, supervisor

if __name__ == "__main__":
    supervisor.PATIENCE = float(os.environ.get("ENCFS_TEST_PATIENCE", supervisor.PATIENCE))
    daemonprocess.VMSTAT = Path(os.environ.get("ENCFS_TEST_VMSTAT", daemonprocess.VMSTAT))
    if "ENCFS_TEST_NO_RESEND" in os.environ:
        keeper.can_resend = lambda init: False
    if "ENCFS_TEST_OTHER_SESSION" in os.environ:
        # As if another version negotiated something else: what was negotiated is said to be something else.
        rehearse = keeper.Keeper.rehearse

        def rehearse_otherwise(self: keeper.Keeper, channel: socket.socket, *, relayed: bool = False) -> None:
            other = replace(self, init_reply=(self.init_reply or b"") + b"?")
            rehearse(other, channel, relayed=relayed)

        keeper.Keeper.rehearse = rehearse_otherwise  # type: ignore[method-assign]
    main()
