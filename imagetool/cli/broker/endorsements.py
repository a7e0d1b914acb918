"""`imagetool broker endorsements`."""

from __future__ import annotations

from pathlib import Path

from encfs.console.terminal import Terminal
from imagetool.cli.broker.parts import DirectoryArgument


def command(terminal: Terminal, directory: DirectoryArgument) -> None:
    """List what the broker has to judge evidence by: of which platforms it has Intel's collateral, and until when."""
    from datetime import UTC, datetime

    from imagetool.broker.config import read_config
    from imagetool.broker.endorsements import EndorsementDirectory

    store = EndorsementDirectory(read_config(Path(directory)).endorsements_path).store
    now = datetime.now(UTC)
    for line in store.warnings(now):
        terminal.warn(line)
    certificates = sum(map(len, store.certificates.values()))
    terminal.result(
        {
            "directory": directory,
            "certificates": certificates,
            "collateral": [
                {
                    "file": one.name,
                    "tee": one.collateral.platform.kind,
                    "fmspc": one.collateral.platform.fmspc.hex(),
                    "ca": one.collateral.platform.ca,
                    "expires": f"{one.collateral.expires:%Y-%m-%dT%H:%M:%SZ}",
                    "state": one.state(now),
                }
                for one in store.collateral
            ],
        },
        [
            f"{certificates} certificates of AMD's, collateral for {len(store.collateral)} platforms of Intel's",
            *(
                f"{one.collateral.expires:%Y-%m-%d}  {one.state(now):8}  {one.collateral.platform}  {one.name}"
                for one in store.collateral
            ),
        ],
    )
