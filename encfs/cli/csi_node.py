"""`encfs csi-node`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Literal

import typer

from encfs.console.commandline import value_option
from encfs.console.terminal import Terminal
from encfs.errors import UnsupportedError


def command(
    terminal: Terminal,
    endpoint: Annotated[str, typer.Option("--endpoint", metavar="unix:PATH", help="Where kubelet finds the plugin.")],
    node_id: Annotated[str, typer.Option("--node-id", metavar="NAME", help="The node's name.")],
    kubelet: Annotated[
        str, typer.Option("--kubelet-dir", metavar="DIR", help="kubelet's directory on this node.")
    ] = "/var/lib/kubelet",
    daemon_user: Annotated[
        int, typer.Option("--daemon-user", metavar="UID", min=0, help="The user that daemons in pods run as.")
    ] = 65534,
    state: Annotated[
        str | None,
        value_option(
            "--state-dir",
            metavar="DIR",
            help="Where volumes are written down for the next plugin; by default volumes, beside the endpoint.",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option("--log-format", metavar="text|json", help="How it logs.", show_choices=False),
    ] = "text",
) -> None:
    """Mount volumes for daemons in pods (CSI, on the node).

    Their FUSE descriptors are handed over to the daemons. It needs the extra csi, and root. It has no key, and
    decides nothing about trust.
    """
    from encfs.mount.logs import logging_to

    try:
        from encfs.csi.node import Node, endpoint_path, start
    except ImportError:
        raise UnsupportedError("grpcio is not installed", hint="pip install 'encfs[csi]'") from None
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with logging_to(None, log_format):
        path = endpoint_path(endpoint)
        place = Path(state) if state is not None else path.parent / "volumes"
        server = start(Node(node_id, Path(kubelet), daemon_user, place), path)
        terminal.result({"endpoint": endpoint}, [f"serving CSI at {endpoint}"])
        terminal.flush()
        signal.sigwait(signals)
        server.stop(5).wait()
