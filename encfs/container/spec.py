"""What is run and how: from an image's config and what the caller asks for. Data, and its way to the other process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from encfs.errors import FormatError, UsageError

if TYPE_CHECKING:
    from encfs.image.config import ImageConfig

#: As container runtimes have it where an image says nothing.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NAME = re.compile(r"[^=\0]+")
_SIGNAL = re.compile(r"(?:SIG)?([A-Z0-9+-]+)")


@dataclass(frozen=True, slots=True)
class Bind:
    """A file or directory of this machine, seen at `target` in the container."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Requests:
    """What the caller wants otherwise than the image. `entrypoint` None: the image's; empty: none.

    `environment` are values to add or change, `tmpfs` directories that are empty and in memory.
    """

    command: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] | None = None
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    user: str | None = None
    working_directory: str | None = None
    binds: tuple[Bind, ...] = ()
    tmpfs: tuple[str, ...] = ()
    read_only: bool = False
    new_privileges: bool = False
    host_files: bool = True


@dataclass(frozen=True, slots=True)
class Spec:
    """All that the other process is told. `parts` and `backend` say what the FUSE mount holds.

    `environment` is for the command alone, and in no `repr`: images keep secrets in it.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    user: str
    working_directory: str
    binds: tuple[Bind, ...]
    tmpfs: tuple[str, ...]
    read_only: bool
    new_privileges: bool
    host_files: bool
    parts: int
    backend: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


def parse_spec(content: bytes) -> Spec:
    """What `Spec.to_json` made; both sides are of one version."""
    document = json.loads(content)
    document["binds"] = tuple(Bind(**bind) for bind in document["binds"])
    document["arguments"], document["tmpfs"] = tuple(document["arguments"]), tuple(document["tmpfs"])
    return Spec(**document)


def make_spec(config: ImageConfig, requests: Requests, *, parts: int, backend: str) -> Spec:
    """The image's config with what was asked for otherwise.

    Arguments after the image take the place of its command and follow its entry point; another entry point takes the
    place of both. Raises: UsageError where there is nothing to run.
    """
    if requests.entrypoint is None:
        arguments = config.entrypoint + (requests.command or config.command)
    else:
        arguments = requests.entrypoint + requests.command
    if not arguments or not arguments[0]:
        raise UsageError("the image has no command, and none was given", hint="name one: encfs run IMAGE -- COMMAND")
    if any("\0" in text for text in arguments):
        raise FormatError("an argument of the image's command holds a NUL")
    directory = requests.working_directory or config.working_directory or "/"
    if not directory.startswith("/") or "\0" in directory:
        raise UsageError(f"the working directory {directory!r} is not absolute")
    return Spec(
        arguments=arguments,
        environment=_environment(config, requests),
        user=config.user if requests.user is None else requests.user,
        working_directory=directory,
        binds=requests.binds,
        tmpfs=requests.tmpfs,
        read_only=requests.read_only,
        new_privileges=requests.new_privileges,
        host_files=requests.host_files,
        parts=parts,
        backend=backend,
    )


def _environment(config: ImageConfig, requests: Requests) -> dict[str, str]:
    """Nothing of this process's own environment but the terminal's type."""
    environment = {"PATH": DEFAULT_PATH, "HOSTNAME": socket.gethostname()}
    if os.isatty(0) and os.environ.get("TERM"):
        environment["TERM"] = os.environ["TERM"]
    for name, value in (*config.environment, *requests.environment):
        if "\0" in name + value:
            raise FormatError("a variable of the image's environment holds a NUL")
        environment[name] = value
    return environment


def parse_variable(text: str) -> tuple[str, str]:
    """`NAME=VALUE`, or `NAME` for the value it has here. Raises: UsageError."""
    name, equals, value = text.partition("=")
    if not _NAME.fullmatch(name):
        raise UsageError("a variable is not of the form NAME=VALUE or NAME")
    if not equals and name not in os.environ:
        raise UsageError(f"the variable {name} is not set here", hint=f"give its value: -e {name}=VALUE")
    return name, value if equals else os.environ[name]


def parse_bind(text: str) -> Bind:
    """`SOURCE:TARGET[:ro]`, both absolute. Raises: UsageError."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or parts[2:] not in ([], ["ro"], ["rw"]):
        raise UsageError(f"{text} is not of the form SOURCE:TARGET[:ro]")
    source, target = parts[0], parts[1]
    if not source.startswith("/") or not is_fit_target(target):
        raise UsageError(f"{text}: both sides of a bind mount are absolute paths, the target not the root")
    return Bind(source, target, parts[2:] == ["ro"])


def is_fit_target(path: str) -> bool:
    """Whether something can be mounted there in a container: below its root, written without detours."""
    return path.startswith("/") and os.path.normpath(path) == path.rstrip("/") != "" and not path.startswith("//")


def stop_signal(config: ImageConfig) -> int:
    """The number of the signal that asks the image's command to end. Raises: FormatError."""
    text = config.stop_signal
    if not text:
        return signal.SIGTERM
    match = _SIGNAL.fullmatch(text)
    number = int(text) if text.isdecimal() and len(text) < 4 else None
    if number is None and match is not None:
        number = getattr(signal, f"SIG{match[1]}", None)
    if number is None or number not in signal.valid_signals():
        raise FormatError("the image's config names a StopSignal that is none", hint="report it to the image's author")
    return int(number)
