"""`encfs sidecar`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from encfs.console.commandline import size_option
from encfs.console.commandparts import CacheOptions, KeyOptions, chosen_platform, opened_artifact
from encfs.console.terminal import Terminal


def command(
    terminal: Terminal,
    config: Annotated[str, typer.Option("--config", metavar="FILE", help="What may be asked for, and is trusted.")],
    registry: CacheOptions,
    memory: Annotated[int | None, size_option("--memory", help="Plaintext that is kept in memory.")] = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", metavar="IP:PORT|unix:PATH", help="Probes and metrics.", show_default=False),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option("--log-format", metavar="text|json", help="How it logs.", show_choices=False),
    ] = "text",
) -> None:
    """Serve a volume of this pod, without any privilege.

    Its FUSE descriptor comes from the node; what may be opened, and is trusted, from a configuration.
    """
    from encfs.audit import audit_of
    from encfs.hardening import protect_keys
    from encfs.image.artifact import image_parts
    from encfs.mount import MountOptions, MountStatus, choose_shape, mount
    from encfs.mount.handover import receive
    from encfs.sidecar import load_config, narrow

    protect_keys()
    allowed = load_config(config)
    handover = receive(f"unix:{allowed.socket}")
    options = MountOptions(foreground=True, listen=listen, log_format=log_format)

    def report(status: MountStatus) -> None:
        handover.tell("ready", status=status.to_json(), size=sum(volume.size for volume in parts.volumes))
        terminal.result(status.to_json(), [f"{request.reference} is served"])
        terminal.flush()

    with handover.reporting():
        request = narrow(allowed, handover.attributes)
        with opened_artifact(
            terminal,
            request.reference,
            KeyOptions(list(request.keys)),
            request.trust,
            registry,
            memory=memory,
            meanwhile="encfs.mount.session",
            served=handover.served,
        ) as artifact:
            handover.check_content(artifact.content_digest)
            parts = image_parts(artifact, chosen_platform(None))
            mount(
                choose_shape(
                    parts.volumes, options, layered=parts.layered, proven=artifact.origin.proven, handed_over=True
                ),
                handover.mountpoint,
                options,
                reference=request.reference,
                content_digest=artifact.content_digest,
                manifest_digest=artifact.manifest_digest,
                owner=artifact,
                on_ready=report,
                handover=handover,
                audit=audit_of(artifact, request.reference),
            )
