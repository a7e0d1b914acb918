"""The life of a mount: check the place, go to the background, mount, answer until told to end, leave nothing behind.

It ends when somebody unmounts it, on SIGTERM and SIGINT, and on `stop` through the control socket. Not here: requests
(`filesystem`), the control protocol (`control`), opening an artifact (`encfs.artifact`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from encfs import tracing
from encfs.errors import EncfsError, MountError
from encfs.mount.background import Report, run_in_background
from encfs.mount.client import clear_leftovers, is_abandoned
from encfs.mount.companion import Companion, NoCompanion
from encfs.mount.logs import logging_to
from encfs.mount.mountpoint import absolute, check_fuse, prepare
from encfs.mount.options import MountOptions, MountStatus
from encfs.mount.reading import ImageContents
from encfs.mount.runtime import listen, log_path, remove_own_files, runtime_directory, socket_path

if TYPE_CHECKING:
    from encfs.mount.handover import Handover
    from encfs.mount.session import MountPlan
    from encfs.mount.stacking import Shape

#: Seconds until a mount in the background must answer; a source that gives up reports earlier.
READY_TIMEOUT = 120.0

log = logging.getLogger("encfs.mount")


class Closeable(Protocol):
    """What a mount takes over, and closes when it ends."""

    def close(self) -> None: ...


OnReady = Callable[[MountStatus], None]


def mount(
    shape: Shape,
    mountpoint: str | os.PathLike[str],
    options: MountOptions | None = None,
    *,
    reference: str = "",
    content_digest: str = "",
    manifest_digest: str = "",
    owner: Closeable | None = None,
    companion: Companion | None = None,
    on_ready: OnReady | None = None,
    ready_timeout: float = READY_TIMEOUT,
    handover: Handover | None = None,
    audit: Mapping[str, object] | None = None,
) -> MountStatus:
    """Mount what `choose_shape` made of an artifact; `on_ready` is called once it answers through the kernel.

    In the background (the default) this returns then; the daemon is another process, and this one may have no threads.
    In the foreground it returns when the mount has ended. `owner` (the artifact; by default the volumes) is taken over
    and closed in any case. `companion` works beside the mount. With `handover` somebody else has mounted it, and it is
    served in the foreground. `reference` and the digests are shown by `mounts()`. `ready_timeout` in seconds; `audit`
    goes to the log once it answers.
    Raises: MountError; StorageError for runtime directory or log file; FormatError, UnsupportedError for what is no
    EROFS image that can be read; what the volume raises for the image's beginning and its root directory.
    """
    # Not needed by the commands that only look at mounts or end them.
    from encfs.mount.session import MountPlan

    options = options or MountOptions()
    kept = owner or shape.volume
    try:
        # A place that is mounted already must not be looked at: nobody answers yet.
        place = absolute(mountpoint) if handover is None else os.fspath(mountpoint)
        if options.log_file is not None:
            options = replace(options, log_file=options.log_file.absolute())
        if handover is None:
            prepare(place, is_abandoned)
            clear_leftovers(place)
            check_fuse(allow_other=options.allow_other)
        contents = ImageContents(shape.volume, shape.tree)
        plan = MountPlan(
            place,
            options,
            reference,
            content_digest,
            manifest_digest,
            contents,
            options.log_file,
            shape.recipe,
            companion or NoCompanion(),
            handover,
            audit or {},
        )
        if options.foreground or handover is not None:
            with logging_to(options.log_file, options.log_format):
                return _run(plan, on_ready or _nobody)
        report = run_in_background(lambda report: _background(plan, kept, report), timeout=ready_timeout)
        status = MountStatus(**report)  # type: ignore[arg-type]
        if on_ready is not None:
            on_ready(status)
        return status
    finally:
        kept.close()


def _nobody(status: MountStatus) -> None:
    return


def _background(plan: MountPlan, owner: Closeable, report: Report) -> int:
    """The daemon process: report how the start went, and run to the end. Its exit code."""
    try:
        directory = runtime_directory()
        plan = replace(plan, log_file=plan.log_file or log_path(directory, plan.mountpoint))
        with logging_to(plan.log_file, plan.options.log_format):
            try:
                _run(plan, lambda status: report.ready(status.to_json()))
            except EncfsError as error:
                log.error("%s", error)  # noqa: TRY400 - foreseen: the line says it all
                report.failed(error)
            except Exception:
                log.exception("the daemon failed")
                report.failed(MountError("the daemon failed to start", hint=f"the reason is in {plan.log_file}"))
                return 1
        remove_own_files(directory, plan.mountpoint)
    except EncfsError as error:
        report.failed(error)
        return error.exit_code
    else:
        return 0
    finally:
        owner.close()


def _run(plan: MountPlan, on_ready: OnReady) -> MountStatus:
    """Mount, answer until the end, clean up. The last status."""
    import trio

    from encfs.mount.session import Session

    with ExitStack() as stack:
        stack.callback(tracing.finish)
        socket_file = socket_path(runtime_directory(), plan.mountpoint)
        stack.callback(socket_file.unlink, missing_ok=True)
        server = None
        if plan.handover is None or not plan.handover.relayed:
            server = listen(socket_file)
            stack.callback(server.close)
        stack.callback(plan.companion.close)
        session = Session(plan, on_ready)
        stack.callback(session.close)
        stack.enter_context(session.mounted())
        trio.run(session.run, server)
        return session.finish()
