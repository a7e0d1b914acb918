"""`passphrase:` asks on the terminal; `passphrase:file=PATH`, `passphrase:fd=N`, `passphrase:command=COMMAND` do not.

The command is split into words as a shell would, but no shell is started. It gets neither input nor a terminal; what it
writes to its output (at most 1 KiB) is the passphrase; it must end with status 0 within a minute.
"""

from __future__ import annotations

import getpass
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence

from encfs.errors import KeyFileError, KeyProviderError, WrongKeyError
from encfs.keys.files import read_key_file
from encfs.keys.recipients import Recipient, unwrap_with_passphrase
from encfs.keys.secrets import MAX_PASSPHRASE_SIZE, Passphrase, parse_passphrase, wipe

#: Seconds a passphrase command may take: long enough for a person to unlock a password store.
COMMAND_TIMEOUT = 60.0

_TERMINAL = "/dev/tty"
# Room for a line end behind the longest passphrase, and one byte more to notice that it is too long.
_READ_SIZE = MAX_PASSPHRASE_SIZE + 3


class PassphraseProvider:
    """Unwraps with a passphrase, which is asked for once and kept until `close`."""

    def __init__(self, rest: str) -> None:
        self._method, self._argument = _parse(rest)
        self._passphrase: Passphrase | None = None

    @property
    def uri(self) -> str:
        # A command line may hold a secret.
        shown = "" if self._method in ("", "command") else f"={self._argument}"
        return f"passphrase:{self._method}{shown}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        if not any(recipient.kind == "passphrase" for recipient in recipients):
            # Nobody is asked for a passphrase that cannot help.
            raise WrongKeyError(f"{self.uri} is for recipients of type passphrase, and the keyring has none")
        if self._passphrase is None:
            self._passphrase = _read(self._method, self._argument, confirm=False)
        return unwrap_with_passphrase(self._passphrase, recipients, self.uri)

    def close(self) -> None:
        if self._passphrase is not None:
            self._passphrase.wipe()
        self._passphrase = None


def read_passphrase(rest: str, *, confirm: bool = False) -> Passphrase:
    """The passphrase that `passphrase:` + `rest` stands for; a new one that is typed is asked for twice with `confirm`.

    Raises: KeyFileError for a malformed `rest` or passphrase; NotFoundError, StorageError where a file cannot be read;
    KeyProviderError without a terminal, or where the command fails.
    """
    method, argument = _parse(rest)
    return _read(method, argument, confirm=confirm)


def _parse(rest: str) -> tuple[str, str]:
    method, separator, argument = rest.partition("=")
    match method:
        case "" if not separator:
            return "", ""
        case "file" if argument:
            return method, argument
        case "fd" if argument.isascii() and argument.isdecimal() and len(argument) < 8:
            return method, argument
        case "command" if argument:
            _split(argument)
            return method, argument
    raise KeyFileError(
        "passphrase: is followed by something other than a source",
        hint="write passphrase:, passphrase:file=PATH, passphrase:fd=N or passphrase:command=COMMAND",
    )


def _read(method: str, argument: str, *, confirm: bool) -> Passphrase:
    match method:
        case "file":
            content, access = read_key_file(argument)
            try:
                access.check()
                return parse_passphrase(content, argument)
            finally:
                wipe(content)
        case "fd":
            return parse_passphrase(_drain_descriptor(int(argument)), f"file descriptor {argument}")
        case "command":
            return parse_passphrase(_run(_split(argument)), "the passphrase command's output")
        case _:
            return _ask(confirm=confirm)


def _ask(*, confirm: bool) -> Passphrase:
    try:
        # getpass would fall back to standard input, with echo.
        os.close(os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        raise KeyProviderError(
            "there is no terminal to ask for a passphrase",
            hint="use passphrase:file=PATH, passphrase:fd=N or passphrase:command=COMMAND",
        ) from None
    passphrase = _ask_once("Passphrase: ")
    if confirm:
        again = _ask_once("Again: ")
        same = again.secret == passphrase.secret
        again.wipe()
        if not same:
            passphrase.wipe()
            raise KeyFileError("the two passphrases differ")
    return passphrase


def _ask_once(prompt: str) -> Passphrase:
    try:
        return parse_passphrase(bytearray(getpass.getpass(prompt).encode("utf-8", "surrogateescape")), "what was typed")
    except EOFError:
        raise KeyProviderError("no passphrase was typed") from None


def _drain_descriptor(descriptor: int) -> bytearray:
    try:
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            return _drain(file.fileno(), None)
    except OSError as error:
        raise KeyProviderError(
            f"cannot read a passphrase from file descriptor {descriptor}: {error.strerror}"
        ) from None


def _drain(descriptor: int, deadline: float | None) -> bytearray:
    """Everything up to the end, or as much as shows that it is too long.

    Raises: TimeoutError past the deadline (a `time.monotonic` value), OSError.
    """
    content = bytearray(_READ_SIZE)
    filled = 0
    with memoryview(content) as view:
        while filled < _READ_SIZE:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                    wipe(view)
                    raise TimeoutError
            count = os.readv(descriptor, [view[filled:]])
            if count == 0:
                break
            filled += count
    del content[filled:]
    return content


def _split(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise KeyFileError(f"the passphrase command cannot be split into words: {error}") from None
    if not words:
        raise KeyFileError("the passphrase command is empty")
    return words


def _run(words: Sequence[str]) -> bytearray:
    deadline = time.monotonic() + COMMAND_TIMEOUT
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "malformed argument"
        raise KeyProviderError(f"the passphrase command cannot be started: {reason}") from None
    content = bytearray()
    try:
        with process:
            try:
                if process.stdout is None:
                    raise KeyProviderError("the passphrase command has no output")
                content = _drain(process.stdout.fileno(), deadline)
                if len(content) == _READ_SIZE:
                    wipe(content)
                    raise KeyFileError(f"the passphrase command's output is longer than {MAX_PASSPHRASE_SIZE} bytes")
                status = process.wait(max(0.0, deadline - time.monotonic()))
            finally:
                if process.returncode is None:
                    # Whatever the command started shares its session and goes with it.
                    os.killpg(process.pid, signal.SIGKILL)
    except (TimeoutError, subprocess.TimeoutExpired):
        wipe(content)
        raise KeyProviderError(f"the passphrase command did not end within {COMMAND_TIMEOUT:.0f} seconds") from None
    if status != 0:
        wipe(content)
        raise KeyProviderError(f"the passphrase command failed with status {status}")
    return content
