"""Tell systemd how a service is doing (sd_notify(3)): one datagram a message, where NOTIFY_SOCKET says so."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("encfs.mount")


def notify(message: str) -> None:
    """Send `message`, such as `READY=1`; nothing where nobody has asked for it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect("\0" + address[1:] if address[0] == "@" else address)
            sender.send(message.encode())
    except OSError as error:
        log.info("the service manager cannot be told %s: %s", message, error)


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, half of what the service manager asks of this process; None for none."""
    wanted, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not wanted.isdecimal() or pid != str(os.getpid()) or int(wanted) == 0:
        return None
    return int(wanted) / 2e6
