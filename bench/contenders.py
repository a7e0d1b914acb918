"""Encrypted trees that can be mounted: ours and the peer's, each prepared once and mounted anew for every run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.environment import Usage, run, run_measured, say, tool
from encfs.keys.files import write_key_files
from encfs.keys.jwk import generate_key

_MOUNT_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """A live mount and the process behind it."""

    path: Path
    pid: int


class Contender(Protocol):
    """One way to keep `source` encrypted. `stored` is where its ciphertext lies."""

    @property
    def name(self) -> str: ...

    @property
    def stored(self) -> Path: ...

    def mounted(self) -> contextlib.AbstractContextManager[Mounted]: ...


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """A recipient's private key and, beside it, the public one."""

    private: Path
    public: Path

    @classmethod
    def make(cls, directory: Path) -> KeyFiles:
        key = generate_key("x25519")
        private, public = write_key_files(key, directory / "bench.jwk")
        assert public is not None, "an X25519 key has a public half"
        return cls(private, public)


def encrypt_command(source: Path, layout: Path, keys: KeyFiles, options: Sequence[str] = ()) -> list[str]:
    return [tool("imagetool"), "encrypt", str(source), f"oci:{layout}:bench", "-r", str(keys.public), *options]


def mount_command(layout: Path, target: Path, keys: KeyFiles, options: Sequence[str] = ()) -> list[str]:
    reference = f"oci:{layout}:bench"
    return [tool("encfs"), "mount", reference, str(target), "-k", str(keys.private), "--allow-unsigned", *options]


@dataclass(frozen=True, slots=True)
class Ours:
    """An artifact in an OCI layout, mounted by `encfs mount`."""

    name: str
    stored: Path
    keys: KeyFiles
    usage: Usage
    mount_options: Sequence[str] = ()

    @classmethod
    def make(
        cls,
        name: str,
        source: Path,
        directory: Path,
        keys: KeyFiles,
        options: Sequence[str] = (),
        *,
        mount_options: Sequence[str] = (),
    ) -> Ours:
        stored = directory / f"{source.name}-{name.replace(' ', '-')}"
        say(f"encrypting {source.name} for {name}")
        usage = run_measured(encrypt_command(source, stored, keys, options))
        return cls(name, stored, keys, usage, mount_options)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Mounted]:
        options = ["--foreground", *self.mount_options]
        with foreground(lambda target: mount_command(self.stored, target, self.keys, options)) as mounted:
            yield mounted


@dataclass(frozen=True, slots=True)
class Gocryptfs:
    """The peer at its defaults."""

    name: str
    stored: Path
    password_file: Path

    @classmethod
    def make(cls, source: Path, directory: Path) -> Gocryptfs:
        stored = directory / f"{source.name}-gocryptfs"
        stored.mkdir()
        password_file = directory / "gocryptfs.password"
        password_file.write_text("benchmark\n")
        say(f"encrypting {source.name} for gocryptfs")
        run([tool("gocryptfs"), "-init", "-q", "-passfile", password_file, stored])
        contender = cls("gocryptfs", stored, password_file)
        with contender.mounted() as mounted:
            target = mounted.path / source.name if source.is_file() else mounted.path
            run([tool("cp"), "-a", "-T", source, target])
        return contender

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Mounted]:
        program = [tool("gocryptfs"), "-q", "-fg", "-passfile", str(self.password_file), str(self.stored)]
        with foreground(lambda target: [*program, str(target)]) as mounted:
            yield mounted


class _Start(Protocol):
    def __call__(self, target: Path, /) -> list[str]: ...


@contextlib.contextmanager
def foreground(command: _Start) -> Iterator[Mounted]:
    """Start a daemon in the foreground, wait until its mount answers, and leave nothing behind."""
    target = Path(tempfile.mkdtemp(prefix="encfs-bench-mount-"))
    try:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command(target), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
            try:
                _wait_for_mount(process, target, errors)
                yield Mounted(target, process.pid)
            finally:
                unmount(target)
                _end(process)
    finally:
        target.rmdir()


def _wait_for_mount(process: subprocess.Popen[bytes], target: Path, errors: object) -> None:
    deadline = time.monotonic() + _MOUNT_TIMEOUT
    while not os.path.ismount(target):
        if process.poll() is not None or time.monotonic() > deadline:
            errors.seek(0)  # type: ignore[attr-defined]
            text = errors.read().decode(errors="replace").strip()  # type: ignore[attr-defined]
            raise RuntimeError(f"{process.args!r} did not mount: {text}")
        time.sleep(0.01)
    os.stat(target)


def unmount(target: Path) -> None:
    """Unmount where something is mounted; the page cache of the mount goes with it."""
    # What the kernel made of a FUSE mount only root can unmount, and fusermount3 does not.
    command = [tool("umount")] if os.geteuid() == 0 else [shutil.which("fusermount3") or tool("fusermount"), "-u"]
    for _ in range(50):
        if not os.path.ismount(target):
            return
        subprocess.run([*command, str(target)], capture_output=True, check=False)
        if os.path.ismount(target):
            time.sleep(0.1)
    run([*command, "-l" if os.geteuid() == 0 else "-z", target])


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
