"""Real mounts for tests, each served by a process of its own, over an image in a plain file.

`FileVolume` stands where a decrypted volume stands; the mount cannot tell. Run as a module, this is the program that
mounts one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from encfs.errors import EncfsError, IntegrityError
from encfs.mount import MountOptions, MountStatus, mount, umount
from encfs.mount.mountpoint import top_mount
from encfs.mount.runtime import ENVIRONMENT_VARIABLE

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
    a way that nobody foresaw; with `cold`, nothing is ever at hand.
    """

    path: Path
    broken: Sequence[tuple[int, int]] = ()
    crashing: Sequence[tuple[int, int]] = ()
    cold: bool = False
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
    """A mount in the background, unmounted at the end if it is still there."""
    mountpoint.mkdir(exist_ok=True)
    status = start_mount(image, mountpoint, runtime, *options)
    try:
        yield status
    finally:
        if top_mount(str(mountpoint)) is not None:
            umount(mountpoint, force=True)


def _ranges(text: str) -> tuple[int, int]:
    start, end = text.split("-")
    return int(start), int(end)


def main(arguments: Sequence[str] | None = None) -> int:
    """Mount an image and print the status as JSON; errors as `exit code: message` on stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--broken", type=_ranges, action="append", default=[])
    parser.add_argument("--crashing", type=_ranges, action="append", default=[])
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--suid", action="store_true")
    parser.add_argument("--no-default-permissions", action="store_true")
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--user", type=int)
    parser.add_argument("--ready-timeout", type=float, default=30.0)
    chosen = parser.parse_args(arguments)
    if chosen.user is not None:
        os.setgroups([])
        os.setresgid(chosen.user, chosen.user, chosen.user)
        os.setresuid(chosen.user, chosen.user, chosen.user)
    try:
        mount(
            FileVolume(chosen.image, tuple(chosen.broken), tuple(chosen.crashing), chosen.cold),
            chosen.mountpoint,
            MountOptions(
                foreground=chosen.foreground,
                allow_other=chosen.allow_other,
                dev=chosen.dev,
                suid=chosen.suid,
                default_permissions=not chosen.no_default_permissions,
                log_file=chosen.log_file,
            ),
            reference=f"path:{chosen.image}",
            content_digest="sha256:" + "0" * 64,
            on_ready=lambda status: print(json.dumps(status.to_json()), flush=True),  # noqa: T201 - its output
            ready_timeout=chosen.ready_timeout,
        )
    except EncfsError as error:
        print(f"{error.exit_code}: {error}", file=sys.stderr)  # noqa: T201 - its output
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
