"""The runtime directory: one control socket per mount, and the log files of daemons in the background.

Not here: what is said over the sockets (`control`, `client`).
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from encfs.errors import StorageError

#: Names another runtime directory (an absolute path).
ENVIRONMENT_VARIABLE = "ENCFS_RUNTIME_DIR"
_MODE = 0o700
_SOCKET_SUFFIX = ".sock"
_LOG_SUFFIX = ".log"
#: As `RotatingFileHandler` names the older file.
_OLD_LOG_SUFFIX = ".log.1"
_SUFFIXES = frozenset({_SOCKET_SUFFIX, _LOG_SUFFIX, _OLD_LOG_SUFFIX})


def existing_runtime_directory() -> Path | None:
    """This user's runtime directory; None where there is none yet. Raises: as `runtime_directory`."""
    return _checked(_choose())


def runtime_directory() -> Path:
    """This user's runtime directory, made if need be.

    $ENCFS_RUNTIME_DIR, or /run/encfs for root (whose sessions must all see the same mounts), or $XDG_RUNTIME_DIR/encfs,
    or /run/user/UID/encfs, or encfs-UID in the directory for temporary files.
    Raises: StorageError where it belongs to somebody else, others may enter it, or it cannot be made.
    """
    path = _choose()
    try:
        path.mkdir(mode=_MODE, exist_ok=True, parents=True)
    except OSError as error:
        raise _unusable(path, error.strerror or "unknown error") from None
    checked = _checked(path)
    if checked is None:
        raise _unusable(path, "it was removed meanwhile")
    return checked


def _checked(path: Path) -> Path | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error.strerror or "unknown error") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise _unusable(path, "it must be a directory of this user with mode 0700")
    return path


def _unusable(path: Path, why: str) -> StorageError:
    return StorageError(
        f"the runtime directory {path} cannot be used: {why}", hint=f"name another one in {ENVIRONMENT_VARIABLE}"
    )


def _choose() -> Path:
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        if not os.path.isabs(chosen):
            raise StorageError(f"{ENVIRONMENT_VARIABLE} is not an absolute path")
        return Path(chosen)
    user = os.geteuid()
    if user == 0:
        return Path("/run/encfs")
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(session):
        return Path(session) / "encfs"
    home = Path(f"/run/user/{user}")
    return home / "encfs" if home.is_dir() else Path(tempfile.gettempdir()) / f"encfs-{user}"


def _name(mountpoint: str) -> str:
    """One daemon's files: several may serve one mount point, where one was unmounted lazily and still has users."""
    return f"{_prefix(mountpoint)}{os.getpid()}"


def _prefix(mountpoint: str) -> str:
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + "-"


def socket_path(directory: Path, mountpoint: str) -> Path:
    """The control socket of this process for a mount point."""
    return directory / (_name(mountpoint) + _SOCKET_SUFFIX)


def log_path(directory: Path, mountpoint: str) -> Path:
    """The log file of this process for a mount point, unless another one is asked for."""
    return directory / (_name(mountpoint) + _LOG_SUFFIX)


def sockets(directory: Path) -> list[Path]:
    """All control sockets, of daemons that live or not."""
    return sorted(
        path for path in directory.iterdir() if path.suffix == _SOCKET_SUFFIX and not path.name.startswith(".")
    )


def belongs_to(path: Path, mountpoint: str) -> bool:
    """Whether this is the control socket of a daemon that was started for `mountpoint`."""
    return path.name.startswith(_prefix(mountpoint))


def remove_own_files(directory: Path, mountpoint: str) -> None:
    """Remove this process's control socket and log."""
    for suffix in (_SOCKET_SUFFIX, _LOG_SUFFIX, _OLD_LOG_SUFFIX):
        (directory / (_name(mountpoint) + suffix)).unlink(missing_ok=True)


def remove_leftovers(directory: Path, mountpoint: str, alive: Collection[Path]) -> None:
    """Remove what daemons of this mount point left, but not the files of those whose socket is in `alive`."""
    keep = {path.name.removesuffix(_SOCKET_SUFFIX) for path in alive}
    for path in directory.iterdir():
        stem, dot, suffix = path.name.partition(".")
        if stem.startswith(_prefix(mountpoint)) and stem not in keep and dot + suffix in _SUFFIXES:
            path.unlink(missing_ok=True)


def has_leftovers(directory: Path, mountpoint: str, alive: Collection[Path]) -> bool:
    """Whether a daemon of this mount point left something; not counting those whose socket is in `alive`."""
    keep = {path.name.removesuffix(_SOCKET_SUFFIX) for path in alive}
    names = (path.name.partition(".")[0] for path in directory.iterdir())
    return any(stem.startswith(_prefix(mountpoint)) and stem not in keep for stem in names)


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for `path` that fits a socket address (107 bytes), however long the directory's path is."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`, in place of a stale one. It answers from the moment it can be seen."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with short_path(temporary) as address:
            server.bind(address)
        server.listen()
        temporary.rename(path)
    except OSError as error:
        server.close()
        temporary.unlink(missing_ok=True)
        raise StorageError(f"the control socket {path} cannot be made: {error.strerror}") from None
    return server
