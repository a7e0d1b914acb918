"""`encfs mount`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from encfs.console.commandline import size_option, value_option, words_of
from encfs.console.commandparts import (
    BackendOption,
    CacheOptions,
    KeyOptions,
    MemoryOption,
    PlatformOption,
    ReferenceArgument,
    TrustOptions,
    chosen_platform,
    opened_artifact,
)
from encfs.console.terminal import Terminal
from encfs.errors import UsageError

if TYPE_CHECKING:
    from encfs.mount.options import MountStatus


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
    directory: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="The mount point, an existing directory. Not needed with --fuse-fd.",
            show_default=False,
        ),
    ] = "",
    foreground: Annotated[bool, typer.Option("--foreground", "-f", help="Stay, and log to standard error.")] = False,
    memory: MemoryOption = None,
    allow_other: Annotated[bool, typer.Option("--allow-other", help="Let other users in.")] = False,
    suid: Annotated[bool, typer.Option("--suid", help="Honour set-uid bits and capabilities. Root only.")] = False,
    dev: Annotated[bool, typer.Option("--dev", help="Honour device nodes. Root only.")] = False,
    backend: BackendOption = "fuse",
    writable: Annotated[
        bool, typer.Option("--writable", help="Let the mount be written to: into memory, or --upper. Root only.")
    ] = False,
    upper: Annotated[
        str | None,
        value_option("--upper", metavar="DIR", help="Keep what is written in this directory, in clear."),
    ] = None,
    platform: PlatformOption = None,
    prefetch: Annotated[
        str,
        typer.Option(
            "--prefetch",
            metavar="none|all|FILE",
            help="Fetch the artifact in the background: all of it, or the paths that a file lists, one a line.",
        ),
    ] = "none",
    prefetch_rate: Annotated[
        int | None, size_option("--prefetch-rate", help="Bytes a second that this may take.", default="no limit")
    ] = None,
    log_file: Annotated[
        str | None,
        value_option("--log-file", metavar="FILE", help="Where the daemon logs."),
    ] = None,
    fuse_fd: Annotated[
        str | None,
        value_option(
            "--fuse-fd",
            metavar="N|unix:SOCKET",
            help="Serve a descriptor of /dev/fuse that was inherited, or that is handed over at a socket.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        value_option(
            "--listen", metavar="IP:PORT|unix:PATH", help="Answer /healthz, /readyz and /metrics there; loopback only."
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"],
        typer.Option("--log-format", metavar="text|json", help="How the daemon logs.", show_choices=False),
    ] = "text",
    supervised: Annotated[
        bool, typer.Option("--supervise", help="Restart the daemon if it dies; open files and reads go on.")
    ] = False,
) -> None:
    """Mount an artifact, or the root filesystem of an image.

    Every byte read is verified and decrypted on the way. Returns once the mount answers; its daemon goes on in the
    background.
    """
    from encfs.audit import audit_of
    from encfs.hardening import protect_keys
    from encfs.image.artifact import image_parts
    from encfs.lazy import companion_for
    from encfs.mount import MountOptions, choose_shape, mount
    from encfs.prefetching import parse_selection

    if upper is not None and not writable:
        raise UsageError("--upper is given without --writable", hint="give both, or none for a read-only mount")
    if prefetch == "none" and prefetch_rate is not None:
        raise UsageError("--prefetch-rate is given without --prefetch", hint="give both")
    selection = parse_selection(prefetch)
    options = MountOptions(
        foreground=foreground,
        allow_other=allow_other,
        suid=suid,
        dev=dev,
        log_file=Path(log_file) if log_file is not None else None,
        log_format=log_format,
        listen=listen,
        backend=backend,
        writable=writable,
        upper=Path(upper) if upper is not None else None,
    )

    if foreground or fuse_fd is not None:
        # The daemon in the background does the same for itself.
        protect_keys()
    handover = None

    def report(status: MountStatus) -> None:
        if handover is not None:
            handover.tell("ready", status=status.to_json())
        terminal.result(status.to_json(), [f"{reference} is mounted on {status.mountpoint}"])
        terminal.flush()

    if not directory and fuse_fd is None:
        raise UsageError("the mount point is missing", hint="see 'encfs mount --help'")
    if (supervised or fuse_fd is not None) and (backend != "fuse" or writable):
        raise UsageError(
            "--supervise and --fuse-fd are for read-only mounts that the daemon reads", hint="leave out one"
        )
    if supervised:
        if fuse_fd is not None:
            raise UsageError("--supervise mounts by itself", hint="leave out --fuse-fd, or --supervise")
        from encfs.mount.supervisor import supervise

        keys.check_repeatable()
        words = [sys.executable, "-P", "-c", "from encfs.cli import main; main()", "mount", "--progress", "none"]
        words += ["--debug"] * terminal.settings.debug
        words += [word for group in (keys, trust, registry) for word in words_of(group)]
        words += ["--memory", str(memory)] * (memory is not None)
        words += ["--allow-other"] * allow_other + ["--suid"] * suid + ["--dev"] * dev
        words += ["--platform", str(platform)] * (platform is not None) + ["--prefetch", prefetch]
        words += ["--log-format", log_format] + ["--listen", str(listen)] * (listen is not None)
        words += ["--prefetch-rate", str(prefetch_rate)] * (prefetch_rate is not None)
        supervise([*words, reference], directory, options, reference, report)
        return
    if fuse_fd is not None:
        from encfs.mount.handover import receive

        handover = receive(fuse_fd)
    with ExitStack() as stack:
        if handover is not None:
            stack.enter_context(handover.reporting())
        artifact = stack.enter_context(
            opened_artifact(
                terminal,
                reference,
                keys,
                trust,
                registry,
                memory=memory,
                platform=platform,
                meanwhile="encfs.mount.session",
                forking=not foreground and handover is None,
                served=handover.served if handover is not None else None,
            )
        )
        if handover is not None:
            handover.check_content(artifact.content_digest)
        companion = companion_for(artifact, selection, rate=prefetch_rate)
        parts = image_parts(artifact, chosen_platform(platform))
        mount(
            choose_shape(
                parts.volumes,
                options,
                layered=parts.layered,
                proven=artifact.origin.proven,
                handed_over=handover is not None,
            ),
            directory or (handover.mountpoint if handover is not None else "") or f"/dev/fd/{fuse_fd}",
            options,
            reference=reference,
            content_digest=artifact.content_digest,
            manifest_digest=artifact.manifest_digest,
            owner=artifact,
            companion=companion,
            on_ready=report,
            handover=handover,
            audit=audit_of(artifact, reference),
        )
