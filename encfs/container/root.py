"""The mounts of a container: its root, /proc, /dev, /sys, what is bound into it; then nothing else is left to be seen.

Whatever comes from this machine is opened before the root changes, and mounted after it: no link of the image leads
anywhere but into the image. Not here: namespaces and processes (`init`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from encfs.container.spec import Bind, Spec
from encfs.errors import MountError
from encfs.mount import kernel
from encfs.mount.assembly import Recipe, assemble

#: Where the new root is put together, in a mount namespace that ends with the container.
_SCRATCH = "/proc"
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
#: Name resolution is this machine's, since its network is.
_HOST_FILES = ("/etc/resolv.conf", "/etc/hosts")
_QUIET = kernel.ATTR_NOSUID | kernel.ATTR_NODEV | kernel.ATTR_NOEXEC


@dataclass(frozen=True, slots=True)
class _Part:
    """A mount to be attached at `target`; `is_file`: it is a file, and mounted on one."""

    mounted: int
    target: str
    is_file: bool = False


def change_root(fuse: int, spec: Spec, *, in_user_namespace: bool) -> None:
    """Make the image's root filesystem this mount namespace's, which must be private. `fuse` is taken over.

    Raises: MountError.
    """
    with ExitStack() as stack:
        parts = [_opened(stack, part) for part in _parts(spec, in_user_namespace=in_user_namespace)]
        devices = {name: stack.enter_context(kernel.closing(_device(name))) for name in _DEVICES}
        recipe = Recipe(
            parts=spec.parts,
            backend="erofs" if spec.backend == "erofs" else "fuse",
            overlay=True,
            writable=True,
            suid=spec.new_privileges,
            in_user_namespace=in_user_namespace,
        )
        with kernel.closing(fuse):
            assembled = assemble(fuse, recipe, _SCRATCH)
        _enter(assembled.mount)
        for part in parts:
            _attach(part)
        _fill_dev(devices)
    _make_directories(spec.working_directory)
    if spec.read_only:
        with kernel.closing(os.open("/", os.O_PATH | os.O_CLOEXEC)) as root:
            kernel.set_attributes(root, kernel.ATTR_RDONLY)


def _opened(stack: ExitStack, part: _Part) -> _Part:
    stack.callback(os.close, part.mounted)
    return part


def _parts(spec: Spec, *, in_user_namespace: bool) -> Iterator[_Part]:
    """What is mounted into the root, in order."""
    yield _Part(kernel.new_mount("proc", {}, _QUIET), "/proc")
    yield _Part(_sysfs(in_user_namespace=in_user_namespace), "/sys")
    quiet_dev = kernel.ATTR_NOSUID | kernel.ATTR_NOEXEC
    yield _Part(kernel.new_mount("tmpfs", {"mode": "755", "size": "65536k"}, quiet_dev), "/dev")
    terminals = {"ptmxmode": "0666", "mode": "0620"} | ({} if in_user_namespace else {"gid": "5"})
    yield _Part(kernel.new_mount("devpts", terminals, quiet_dev), "/dev/pts")
    yield _Part(kernel.new_mount("tmpfs", {"mode": "1777"}, _QUIET), "/dev/shm")  # noqa: S108 - the container's own
    if spec.read_only:
        yield _Part(_memory(), "/tmp")  # noqa: S108 - the container's own
    for path in spec.tmpfs:
        yield _Part(_memory(), path)
    if spec.host_files:
        for path in _HOST_FILES:
            if os.path.isfile(path):
                yield _bound(Bind(path, path, read_only=True))
    for bind in spec.binds:
        yield _bound(bind)


def _device(name: str) -> int:
    mounted = kernel.clone_mount(f"/dev/{name}")
    kernel.set_attributes(mounted, kernel.ATTR_NOSUID | kernel.ATTR_NOEXEC)
    return mounted


def _memory() -> int:
    return kernel.new_mount("tmpfs", {"mode": "1777"}, kernel.ATTR_NOSUID | kernel.ATTR_NODEV)


def _sysfs(*, in_user_namespace: bool) -> int:
    """Read-only. Without a network namespace of its own a user namespace gets no new one, but this machine's."""
    if not in_user_namespace:
        return kernel.new_mount("sysfs", {}, _QUIET | kernel.ATTR_RDONLY)
    mounted = kernel.clone_mount("/sys", recursive=True)
    kernel.set_attributes(mounted, _QUIET | kernel.ATTR_RDONLY, recursive=True)
    return mounted


def _bound(bind: Bind) -> _Part:
    mounted = kernel.clone_mount(bind.source, recursive=not os.path.isfile(bind.source))
    attributes = kernel.ATTR_NOSUID | kernel.ATTR_NODEV | (kernel.ATTR_RDONLY if bind.read_only else 0)
    kernel.set_attributes(mounted, attributes, recursive=True)
    return _Part(mounted, bind.target, is_file=not stat.S_ISDIR(os.fstat(mounted).st_mode))


def _enter(root: int) -> None:
    """Change to the new root, and let go of the old one."""
    place = f"{_SCRATCH}/root"
    os.mkdir(place)
    with kernel.closing(root):
        kernel.attach(root, place)
    os.chdir(place)
    try:
        kernel.pivot_root(".", ".")
    except kernel.MountCallError as error:
        raise MountError(
            f"{error.message}; this machine's own root may be an initramfs", hint="switch to another root first"
        ) from None
    kernel.unmount(".")
    os.chdir("/")


def _attach(part: _Part) -> None:
    if part.is_file:
        _make_file(part.target)
    else:
        _make_directories(part.target)
    kernel.attach(part.mounted, part.target)


def _fill_dev(devices: dict[str, int]) -> None:
    for name, mounted in devices.items():
        _make_file(f"/dev/{name}")
        kernel.attach(mounted, f"/dev/{name}")
    for name, target in _LINKS.items():
        os.symlink(target, f"/dev/{name}")


def _make_directories(path: str) -> None:
    try:
        os.makedirs(path, 0o755, exist_ok=True)
    except OSError as error:
        raise MountError(f"{path} cannot be made in the container: {error.strerror}") from None


def _make_file(path: str) -> None:
    """A file to mount on; a link in its place would not be followed, and goes (the image itself stays as it is)."""
    _make_directories(os.path.dirname(path))
    try:
        if os.path.islink(path):
            os.unlink(path)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except OSError as error:
        raise MountError(f"{path} cannot be made in the container: {error.strerror}") from None
