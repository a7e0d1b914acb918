"""The process that sets up a container and then waits for its command: `python -I -m encfs.container.init DESCRIPTOR`.

It is started with an empty environment and knows neither keys nor artifact: nothing of them is to be found in what the
container can see of it. It makes the namespaces and the FUSE mount, whose descriptor it gives to the process that
serves, and becomes two: one that waits outside, and the first process of the container's pid namespace. All of them
end with the process that started them, and with the first process of a pid namespace all others in it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable
from typing import NoReturn

from encfs.container import channel as channels
from encfs.container.mapping import Mapped, Mapper, check_user
from encfs.container.root import change_root
from encfs.container.signals import block_signals, exit_code, wait_for
from encfs.container.spec import Spec, parse_spec
from encfs.container.users import Account, find_account
from encfs.errors import EncfsError, MountError, NotFoundError, StorageError
from encfs.mount import kernel
from encfs.mount.assembly import open_fuse

#: prctl(2)
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
#: Exit codes of shells: not found, and found but not to be executed.
NOT_FOUND, NOT_EXECUTABLE = 127, 126
_MAX_ACCOUNTS = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    parent = os.getppid()
    mask = block_signals()
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    channels.close_all_but(channel.fileno())
    try:
        confined = not kernel.may_mount()
        mapped = _make_namespaces(confined)
        _die_with(parent)
        served, fuse = open_fuse(allow_other=True, default_permissions=True)
        channels.send(channel, b"fuse", served)
        os.close(served)
        content, _ = channels.receive(channel)
        if not content:
            return 1
        spec = parse_spec(content)
        first = _fork(lambda: _be_first(channel, fuse, spec, mask, mapped))
    except (EncfsError, OSError) as error:
        return _report(channel, error)
    os.close(fuse)
    channel.close()
    return exit_code(wait_for(first))


def _make_namespaces(confined: bool) -> Mapped | None:
    """Who there is in a user namespace; None without one."""
    mapper = Mapper() if confined else None
    kinds = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID
    try:
        kernel.unshare(kinds | (kernel.CLONE_NEWUSER if confined else 0))
    except kernel.MountCallError as error:
        raise MountError(error.message, hint="run as root, or allow user namespaces to users (sysctl user)") from None
    mapped = mapper.map_users() if mapper is not None else None
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE, "")
    return mapped


def _die_with(parent: int) -> None:
    """End when the parent does; at once where it has already. After namespaces are made, which forget it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _fork(work: Callable[[], int]) -> int:
    """A child that does `work` and ends with what it returns: its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = work()
    finally:
        os._exit(code)


def _be_first(channel: socket.socket, fuse: int, spec: Spec, mask: set[int], mapped: Mapped | None) -> int:
    """The first process of the pid namespace: the root filesystem, the command, and waiting for it."""
    _die_with(0)
    try:
        change_root(fuse, spec, in_user_namespace=mapped is not None)
        account = find_account(spec.user, _read_accounts("/etc/passwd"), _read_accounts("/etc/group"))
        if mapped is not None:
            check_user(mapped, account.uid, account.gid)
        may_set_groups = mapped is None or mapped.groups > 1
        command = _fork(lambda: _become(channel, spec, account, mask, may_set_groups=may_set_groups))
    except (EncfsError, OSError) as error:
        return _report(channel, error)
    channel.close()
    return exit_code(wait_for(command))


def _report(channel: socket.socket, error: EncfsError | OSError) -> int:
    """Tell the process that serves why there is no container; the exit code."""
    if isinstance(error, OSError):
        error = MountError(f"the container cannot be set up: {error.strerror or error}")
    try:
        channels.send(channel, channels.error_message(error))
    except (BrokenPipeError, ConnectionResetError):
        # The process that serves has ended first, and has said why.
        return error.exit_code
    return error.exit_code


def _read_accounts(path: str) -> str:
    """A bounded, regular file of the image; nothing where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"the image's {path} cannot be read: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        try:
            return file.read(_MAX_ACCOUNTS).decode("utf-8", "surrogateescape")
        except OSError as error:
            raise StorageError(f"the image's {path} cannot be read: {error.strerror}") from None


def _become(channel: socket.socket, spec: Spec, account: Account, mask: set[int], *, may_set_groups: bool) -> NoReturn:
    """Become the command, as the user that it is for."""
    code = NOT_EXECUTABLE
    try:
        environment = {"HOME": account.home, **spec.environment}
        if may_set_groups:
            os.setgroups(account.groups)
        os.setgid(account.gid)
        os.setuid(account.uid)
        os.umask(0o022)
        if not spec.new_privileges:
            _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.chdir(spec.working_directory)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            # Python ignores them, and a program inherits that.
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvpe(spec.arguments[0], spec.arguments, environment)  # noqa: S606 - there is no shell in it
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        code = NOT_FOUND if missing else NOT_EXECUTABLE
        what = f"{spec.arguments[0]} cannot be run in the container: {error.strerror}"
        channels.send(channel, channels.error_message(NotFoundError(what) if missing else StorageError(what)))
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
