"""`encfs mount`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.commandline import size_option
from encfs.commandparts import CacheOptions, KeyOptions, ReferenceArgument, TrustOptions, opened_artifact
from encfs.terminal import Terminal

if TYPE_CHECKING:
    from encfs.mount.options import MountStatus


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="The mount point, an existing directory.", show_default=False)
    ],
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
    foreground: Annotated[bool, typer.Option("--foreground", "-f", help="Stay, and log to standard error.")] = False,
    memory: Annotated[
        int | None, size_option("--memory", help="Plaintext that the daemon keeps, beside the kernel's page cache.")
    ] = None,
    allow_other: Annotated[bool, typer.Option("--allow-other", help="Let other users in.")] = False,
    suid: Annotated[bool, typer.Option("--suid", help="Honour set-uid bits and capabilities. Root only.")] = False,
    dev: Annotated[bool, typer.Option("--dev", help="Honour device nodes. Root only.")] = False,
    log_file: Annotated[
        str | None,
        typer.Option("--log-file", metavar="FILE", help="Where the daemon logs.", show_default=False),
    ] = None,
) -> None:
    """Mount an artifact read-only. Every byte read is verified and decrypted on the way.

    Returns once the mount answers; its daemon goes on in the background.
    """
    from encfs.browse import single_volume
    from encfs.mount import MountOptions, mount

    options = MountOptions(
        foreground=foreground,
        allow_other=allow_other,
        suid=suid,
        dev=dev,
        log_file=Path(log_file) if log_file is not None else None,
    )

    def report(status: MountStatus) -> None:
        terminal.result(status.to_json(), [f"{reference} is mounted on {status.mountpoint}"])
        terminal.flush()

    with opened_artifact(terminal, reference, keys, trust, registry, memory=memory) as artifact:
        mount(
            single_volume(artifact),
            directory,
            options,
            reference=reference,
            content_digest=artifact.content_digest,
            owner=artifact,
            on_ready=report,
        )
