"""`encfs run`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.commandline import value_option
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


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="In place of the image's command.", show_default=False),
    ] = None,
    *,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
    environment: Annotated[
        list[str] | None,
        value_option(
            "-e", "--env", metavar="NAME[=VALUE]", help="A variable; without a value as it is here. Repeatable."
        ),
    ] = None,
    user: Annotated[
        str | None,
        value_option("-u", "--user", metavar="USER[:GROUP]", help="Run as this user."),
    ] = None,
    workdir: Annotated[
        str | None,
        value_option("-w", "--workdir", metavar="DIR", help="Begin in this directory."),
    ] = None,
    entrypoint: Annotated[
        str | None,
        value_option("--entrypoint", metavar="PROGRAM", help="In place of the image's; empty for none."),
    ] = None,
    bind: Annotated[
        list[str] | None,
        value_option("--bind", metavar="SRC:DST[:ro]", help="Show a file or directory of this machine. Repeatable."),
    ] = None,
    tmpfs: Annotated[
        list[str] | None,
        value_option("--tmpfs", metavar="DIR", help="An empty directory in memory. Repeatable."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Writing only to /tmp, /dev and --tmpfs.")] = False,
    new_privs: Annotated[
        bool, typer.Option("--new-privs", help="Let programs gain rights, by set-uid bits and file capabilities.")
    ] = False,
    no_host_files: Annotated[
        bool, typer.Option("--no-host-files", help="Without this machine's resolv.conf and hosts.")
    ] = False,
    backend: BackendOption = "fuse",
    memory: MemoryOption = None,
    platform: PlatformOption = None,
) -> None:
    """Run an encrypted container image.

    Its files are fetched, verified and decrypted as they are read. The exit code is the command's, 128 + N after
    signal N.
    """
    from encfs.container.process import ContainerProcess
    from encfs.container.spec import Requests, is_fit_target, make_spec, parse_bind, parse_variable, stop_signal

    if terminal.settings.json:
        raise UsageError("run prints what the command prints, and nothing as JSON", hint="leave --json out")
    for path in tmpfs or ():
        if not is_fit_target(path):
            raise UsageError(f"--tmpfs {path}: not an absolute path below the root")
    requests = Requests(
        command=tuple(words or ()),
        entrypoint=None if entrypoint is None else ((entrypoint,) if entrypoint else ()),
        environment=tuple(parse_variable(text) for text in environment or ()),
        user=user,
        working_directory=workdir,
        binds=tuple(parse_bind(text) for text in bind or ()),
        tmpfs=tuple(tmpfs or ()),
        read_only=read_only,
        new_privileges=new_privs,
        host_files=not no_host_files,
    )
    with ContainerProcess() as process:
        # Imported while that process does the same.
        from encfs.container.serve import serve
        from encfs.hardening import protect_keys
        from encfs.image.artifact import image_parts, require_config
        from encfs.mount.options import MountOptions
        from encfs.mount.reading import ImageContents
        from encfs.mount.stacking import choose_container_shape

        # Of this process, that will hold keys. The container's is its own.
        protect_keys()
        with opened_artifact(terminal, reference, keys, trust, registry, memory=memory, platform=platform) as artifact:
            parts = image_parts(artifact, chosen_platform(platform))
            config = require_config(parts)
            options = MountOptions(backend=backend)
            shape = choose_container_shape(parts.volumes, options, proven=artifact.origin.proven)
            spec = make_spec(config, requests, parts=len(parts.volumes), backend=shape.backend)
            contents = ImageContents(shape.volume, shape.tree)
            outcome = serve(process, contents, spec, stop_signal=stop_signal(config))
    if outcome.error is not None:
        terminal.error(outcome.error)
    raise typer.Exit(outcome.code)
