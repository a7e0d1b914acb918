"""A PostgreSQL cluster of a test's own: Debian's server, as another user than root, on a socket in a directory."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "PostgreSQL's server is not installed (scripts/install-packages test)"
    return found[-1].parent


class Postgres:
    """A running cluster; each `database` is empty."""

    def __init__(self, directory: Path, user: str) -> None:
        self._directory, self._user = directory, user
        self.data = str(directory / "data")

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self._directory} -c fsync=off"
        self.tool("pg_ctl", "-D", self.data, "-w", "-l", str(self._directory / "log"), "-o", options, "start")

    def stop(self) -> None:
        self.tool("pg_ctl", "-D", self.data, "-m", "immediate", "stop")

    def database(self) -> str:
        name = f"broker_{uuid.uuid4().hex}"
        self.tool("createdb", "-h", str(self._directory), name)
        return f"postgresql://{self._user}@/{name}?host={self._directory}"

    def tool(self, name: str, *words: str) -> None:
        command = [str(_binaries() / name), *words]
        if os.geteuid() == 0:  # the server refuses to run as root
            command = [
                "setpriv",
                f"--reuid={self._user}",
                "--regid",
                str(pwd.getpwnam(self._user).pw_gid),
                "--clear-groups",
                *command,
            ]
        done = subprocess.run(
            command,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    # Not pytest's directory: the path of a socket has at most 107 bytes, and another user must get there.
    directory = Path(tempfile.mkdtemp(prefix="encfs-pg-"))
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() == 0:
        os.chown(directory, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
    server = Postgres(directory, user)
    try:
        server.tool("initdb", "-D", server.data, "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory)
