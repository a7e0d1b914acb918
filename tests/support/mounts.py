"""Real mounts for tests, each served by a process of its own: of an image in a plain file, or of an artifact.

`FileVolume` stands where a decrypted volume stands; the mount cannot tell. Run as a module, this is the program that
mounts either.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from encfs.artifact import Artifact, open_artifact
from encfs.errors import EncfsError, IntegrityError
from encfs.keys.providers import provider_from_uri
from encfs.mount import MountOptions, MountStatus, choose_shape, mount, mounts, umount
from encfs.mount.mountpoint import top_mount, unmount
from encfs.mount.runtime import ENVIRONMENT_VARIABLE
from encfs.oci.layout import Layout
from encfs.trust import TrustPolicy

REPOSITORY = Path(__file__).resolve().parents[2]
#: Seconds for any one command.
_TIMEOUT = 60


@dataclass(slots=True)
class FileStats:
    """What a `FileVolume` counts."""

    bytes_read: int = 0
    waits: int = 0

    def to_json(self) -> dict[str, int]:
        return {"bytes_read": self.bytes_read, "waits": self.waits}


@dataclass(slots=True)
class FileVolume:
    """A volume that is a plain file.

    `broken` are ranges of the image (start, end) whose bytes do not verify; `crashing` are such where reading fails in
    a way that nobody foresaw; with `cold`, nothing is ever at hand, and contents take `delay` seconds once mounted.
    """

    path: Path
    broken: Sequence[tuple[int, int]] = ()
    crashing: Sequence[tuple[int, int]] = ()
    cold: bool = False
    delay: float = 0.0
    size: int = 0
    stats: FileStats = field(default_factory=FileStats)
    _descriptor: int = -1
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        buffer = bytearray(max(0, min(size, self.size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        if self.cold:
            with self._lock:
                self.stats.waits += 1
            if len(buffer) > 65536:
                time.sleep(self.delay)
        for start, end in self.broken:
            if offset < end and start < offset + len(buffer):
                buffer[:] = bytes(len(buffer))
                raise IntegrityError(
                    f"test volume: frame {start // 65536}: its stored bytes are not what the root says"
                )
        for start, end in self.crashing:
            if offset < end and start < offset + len(buffer):
                raise ZeroDivisionError("a bug in a volume")
        done = os.preadv(self._descriptor, [buffer], offset) if buffer else 0
        with self._lock:
            self.stats.bytes_read += done
        return done

    def try_read_into(self, offset: int, buffer: memoryview) -> int | None:
        return None if self.cold else self.read_into(offset, buffer)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def make_image(source: Path, image: Path) -> Path:
    """An image of a directory by erofs-utils; its root is not inode 1."""
    subprocess.run(
        ["mkfs.erofs", "--quiet", str(image), str(source)], check=True, capture_output=True, timeout=_TIMEOUT
    )
    return image


def mount_command(image: Path, mountpoint: Path, *options: str) -> list[str]:
    """A program that mounts an image: `options` as `main` takes them."""
    return [sys.executable, "-m", "tests.support.mounts", str(image), str(mountpoint), *options]


def start_mount(image: Path, mountpoint: Path, runtime: Path, *options: str) -> MountStatus:
    """Mount in the background, in another process: this one may have threads. Raises what the program reports."""
    done = subprocess.run(
        mount_command(image, mountpoint, *options),
        cwd=REPOSITORY,
        env={**os.environ, ENVIRONMENT_VARIABLE: str(runtime)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return MountStatus(**json.loads(done.stdout))


@contextmanager
def mounted(image: Path, mountpoint: Path, runtime: Path, *options: str) -> Iterator[MountStatus]:
    """A mount in the background. It must end without its runtime directory keeping anything."""
    mountpoint.mkdir(exist_ok=True)
    status = start_mount(image, mountpoint, runtime, *options)
    try:
        yield status
    finally:
        detach_all(mountpoint)
        end(status.pid)


@contextmanager
def runtime_directory(path: Path) -> Iterator[None]:
    """Have this process look for daemons there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, str(path))
        yield


def known_mounts(runtime: Path) -> list[MountStatus]:
    """What `mounts()` says of this runtime directory. Mounts of other tests are seen in /proc, and left out."""
    with runtime_directory(runtime):
        return [status for status in mounts() if status.state != "foreign"]


def end_mount(
    runtime: Path, mountpoint: Path, *, timeout: float = 60.0, lazy: bool = False, force: bool = False
) -> None:
    """`umount()` with this runtime directory."""
    with runtime_directory(runtime):
        umount(mountpoint, timeout=timeout, lazy=lazy, force=force)


def detach_all(mountpoint: Path) -> None:
    """Whatever a test left mounted there."""
    while top_mount(str(mountpoint)) is not None:
        unmount(str(mountpoint), lazy=True)


def end(pid: int) -> None:
    """Make sure that a daemon is gone: it has some seconds after its mount is, then it is killed."""
    if not wait_for_end(pid):
        os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"the daemon {pid} did not end with its mount")


def wait_for_end(pid: int, seconds: float = 60.0) -> bool:
    """Whether a process has ended within the time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def is_mounted(mountpoint: Path) -> bool:
    return top_mount(str(mountpoint)) is not None


def _open(layout: Path, key: Path) -> Artifact:
    return open_artifact(
        Layout(str(layout)), keys=[provider_from_uri(f"file:{key}")], trust=TrustPolicy(allow_unsigned=True)
    )


def _ranges(text: str) -> tuple[int, int]:
    start, end = text.split("-")
    return int(start), int(end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount an image and print the status as JSON; errors as `exit code: message` on stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--key", type=Path, help="the image is a layout, and this opens the artifact in it")
    parser.add_argument("--broken", type=_ranges, action="append", default=[])
    parser.add_argument("--crashing", type=_ranges, action="append", default=[])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--suid", action="store_true")
    parser.add_argument("--no-default-permissions", action="store_true")
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--user", type=int)
    parser.add_argument("--backend", choices=("fuse", "erofs", "auto"), default="fuse")
    parser.add_argument("--loop", action="store_true")
    parser.add_argument("--ready-timeout", type=float, default=30.0)
    chosen = parser.parse_args(arguments)
    if chosen.user is not None:
        # The interpreter may be installed where users cannot go: everything is imported before.
        import encfs.mount.session  # noqa: F401

        os.setgroups([])
        os.setresgid(chosen.user, chosen.user, chosen.user)
        os.setresuid(chosen.user, chosen.user, chosen.user)
    try:
        artifact = _open(chosen.image, chosen.key) if chosen.key else None
        options = MountOptions(
            foreground=chosen.foreground,
            allow_other=chosen.allow_other,
            dev=chosen.dev,
            suid=chosen.suid,
            default_permissions=not chosen.no_default_permissions,
            log_file=chosen.log_file,
            backend=chosen.backend,
        )
        volume = (
            artifact.volumes[0]
            if artifact
            else FileVolume(chosen.image, tuple(chosen.broken), tuple(chosen.crashing), chosen.cold, chosen.delay)
        )
        shape = choose_shape([volume], options)
        if chosen.loop and shape.recipe is not None:
            shape = replace(shape, recipe=replace(shape.recipe, loop=True))
        mount(
            shape,
            chosen.mountpoint,
            options,
            reference=f"path:{chosen.image}",
            content_digest=artifact.content_digest if artifact else "sha256:" + "0" * 64,
            owner=artifact,
            on_ready=lambda status: print(json.dumps(status.to_json()), flush=True),  # noqa: T201 - its output
            ready_timeout=chosen.ready_timeout,
        )
    except EncfsError as error:
        print(f"{error.exit_code}: {error}", file=sys.stderr)  # noqa: T201 - its output
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
