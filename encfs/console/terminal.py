"""What the commands of both programs share: where their output goes and how they end.

Results go to standard output, as lines for people or as one JSON object with `--json`; messages, warnings, progress and
errors go to standard error. Knows nothing of option parsing (`commandline`) and is used by no library module.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from encfs.console.drawing import FancyProgress, PlainProgress
from encfs.errors import EncfsError, NotFoundError, StorageError, UsageError
from encfs.progress import NoProgress, Progress

ProgressMode = Literal["auto", "none", "plain", "fancy"]

#: What a process killed by a signal is reported as by shells: 128 + its number.
SIGNAL_EXIT_BASE = 128
#: Exit code of an error that is no `EncfsError`, which is a bug (EX_SOFTWARE of sysexits.h).
INTERNAL_ERROR_EXIT_CODE = 70
#: What Python's RuntimeError says then, wherever a thread was to be started.
_NO_THREAD = "can't start new thread"

#: Python's import system, by the module names of its functions.
_IMPORT_SYSTEM = frozenset({"importlib._bootstrap", "importlib._bootstrap_external"})
#: Seconds until a signal that came in the middle of it is looked at again.
_MOMENT = 0.005

#: Warnings that are kept for `--json`; a mount in the foreground may log many more.
_MAX_WARNINGS = 100

_LOGGERS = ("encfs", "imagetool")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options that every command has."""

    json: bool = False
    progress: ProgressMode | None = None
    debug: bool = False
    quiet: bool = False
    verbose: bool = False

    def merged(self, other: Settings) -> Settings:
        """These settings with what `other` asks for on top."""
        return Settings(
            json=self.json or other.json,
            progress=other.progress or self.progress,
            debug=self.debug or other.debug,
            quiet=self.quiet or other.quiet,
            verbose=self.verbose or other.verbose,
        )


class Terminal:
    """The output of one command."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.settings = Settings()
        self._warnings: list[str] = []
        self._started = False
        self._display: FancyProgress | None = None

    def configure(self, settings: Settings) -> None:
        """Take these settings over and show the log of the library accordingly."""
        self.settings = settings
        level = logging.WARNING
        if settings.debug:
            level = logging.DEBUG
        elif settings.verbose:
            level = logging.INFO
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            for handler in [one for one in logger.handlers if isinstance(one, _LogHandler)]:
                logger.removeHandler(handler)
            logger.addHandler(_LogHandler(self))
            logger.setLevel(level)
            logger.propagate = False

    # Standard output

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes to standard output. Ends the process quietly where the reader has gone, as SIGPIPE would."""
        self._started = True
        if sys.stdout is None:
            raise StorageError("standard output is closed")
        with _writing():
            sys.stdout.buffer.write(data)

    def line(self, text: str) -> None:
        """One line for people; nothing with `--json`."""
        if not self.settings.json:
            self.write(_encode(printable(text)) + b"\n")

    def result(self, document: Mapping[str, object], lines: Iterable[str] = ()) -> None:
        """The outcome of a command: `document` with `--json`, else `lines`."""
        if self.settings.json:
            self.write(_dump({**document, "warnings": self._warnings}) + b"\n")
        for line in lines:
            self.line(line)

    def stream(
        self, head: Mapping[str, object], member: str, items: Iterable[tuple[Mapping[str, object], str]]
    ) -> None:
        """The same for a long list, in constant memory: its documents become the array `member` of the object."""
        if not self.settings.json:
            for _, line in items:
                self.line(line)
            return
        self.write(_dump(head)[:-1] + (b", " if head else b"") + _dump(member) + b": [")
        separator = b"\n"
        for document, _ in items:
            self.write(separator + _dump(document))
            separator = b",\n"
        self.write(b'\n], "warnings": ' + _dump(self._warnings) + b"}\n")

    def flush(self) -> None:
        """Before the exit code is decided: a full disk behind standard output is a failure, too."""
        if self._started and sys.stdout is not None:
            with _writing():
                sys.stdout.flush()

    # Standard error

    def note(self, text: str) -> None:
        """What is good to know; not with `--quiet`."""
        if not self.settings.quiet:
            self._message(text)

    def detail(self, text: str) -> None:
        """Only with `--verbose`."""
        if self.settings.verbose or self.settings.debug:
            self._message(text)

    def warn(self, text: str) -> None:
        """Something the user should act upon. Also in the member `warnings` of `--json`; shown with `--quiet`, too."""
        if len(self._warnings) < _MAX_WARNINGS:
            self._warnings.append(text)
        self._message(f"warning: {text}")

    def alarm(self, text: str) -> None:
        """Something that went wrong and does not end the command."""
        self._message(f"error: {text}")

    def error(self, error: EncfsError) -> None:
        """The one line of a failure; with `--json` also an object on standard output, unless one was begun already."""
        self._message(f"error: {error}")
        if self.settings.debug:
            # Without the values of locals, which may be secrets.
            traceback.print_exception(error)
        self._error_document(error, error.exit_code)

    def internal_error(self, error: BaseException) -> None:
        """A bug. Its text may quote anything, so it is shown only with `--debug`."""
        shown = EncfsError(
            f"internal error ({type(error).__name__})",
            hint="this is a bug: run again with --debug and report what it prints",
        )
        self._message(f"error: {shown}")
        if self.settings.debug:
            traceback.print_exception(error)
        self._error_document(shown, INTERNAL_ERROR_EXIT_CODE)

    def _error_document(self, error: EncfsError, exit_code: int) -> None:
        if not self.settings.json or self._started:
            return
        described = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        try:
            self.write(_dump({"error": described, "exit_code": exit_code}) + b"\n")
            self.flush()
        except StorageError:
            # The command has failed already, and its exit code says why.
            return

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """What to hand to a library function that takes long."""
        mode = self.settings.progress or "auto"
        terminal = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
        if mode == "auto":
            mode = "fancy" if terminal else "none"
        elif mode == "fancy" and not terminal:
            mode = "plain"
        if self.settings.quiet or mode == "none":
            yield NoProgress()
        elif mode == "plain":
            plain = PlainProgress(self._message)
            try:
                yield plain
            finally:
                plain.close()
        else:
            fancy = FancyProgress()
            self._display = fancy
            try:
                yield fancy
            finally:
                self._display = None
                fancy.close()

    def _message(self, text: str) -> None:
        line = f"{self.program}: {printable(text)}"
        if self._display is not None and self._display.print_above(line):
            return
        if sys.stderr is None:
            return
        try:
            sys.stderr.buffer.write(_encode(line) + b"\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            # Nobody listens any more; the exit code still tells how it ended.
            return


class _LogHandler(logging.Handler):
    """Shows what the library logs as the program's own messages."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.ERROR:
            self._terminal.alarm(text)
        elif record.levelno >= logging.WARNING:
            self._terminal.warn(text)
        elif record.levelno >= logging.INFO:
            # Only with --verbose, or of a service, which lets such lines through (`encfs.mount.logs`).
            self._terminal.note(text)
        else:
            self._terminal.detail(text)


def printable(text: str) -> str:
    """`text` with every character escaped that could move the cursor, hide, reorder or break the line.

    Names and messages come from artifacts that nobody trusts, and must not drive a terminal.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escape(one) for one in text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def _encode(text: str) -> bytes:
    # A closed standard stream is None.
    encoding = sys.stdout.encoding if sys.stdout is not None else "utf-8"
    return text.encode(encoding, "backslashreplace")


def _dump(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "backslashreplace")


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(SIGNAL_EXIT_BASE + signal.SIGPIPE) from None
    except OSError as error:
        _discard_output()
        raise StorageError(f"cannot write to standard output: {os.strerror(error.errno or 0)}") from error


def _discard_output() -> None:
    # What is still buffered must not fail once more when the interpreter shuts down.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn what the operating system may throw anywhere into typed errors."""
    try:
        yield
    except MemoryError as error:
        raise EncfsError("out of memory", hint="free some, or give smaller cache and segment sizes") from error
    except RuntimeError as error:
        if str(error) != _NO_THREAD:
            raise
        raise EncfsError(
            "the system lets no more threads be started", hint="raise the limit of processes (ulimit -u, pids.max)"
        ) from error
    except EOFError as error:
        raise UsageError("standard input ended where an answer was expected", hint="name a file instead") from error
    except OSError as error:
        raise _translate(error) from error


def _translate(error: OSError) -> EncfsError:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{where}{reason}", hint="free some space or choose another place")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFoundError(f"{where}{reason}")
    return StorageError(f"{where}{reason}")


def run(terminal: Terminal, call: Callable[[], int]) -> int:
    """Run a command to its end: its exit code, with every failure reported in one line.

    SIGINT, SIGTERM and SIGHUP unwind it like an exception, so that nothing half-made stays behind; the exit code is
    then 128 + the signal's number.
    """
    noticed: list[int] = []
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            noticed.append(number)
        if not noticed:
            return  # an alarm that is not ours
        if frame is not None and frame.f_globals.get("__name__") in _IMPORT_SYSTEM:
            # In the middle of its own locks an exception gets lost, or leaves one locked for ever: a moment later.
            signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, _MOMENT)
            return
        received.append(noticed[0])
        raise KeyboardInterrupt

    with _handling(interrupt):
        try:
            with translated_errors():
                code = call()
                terminal.flush()
        except EncfsError as error:
            terminal.error(error)
            code = error.exit_code
        except KeyboardInterrupt:
            received = received or [signal.SIGINT]
            code = 0
        except Exception as error:  # noqa: BLE001 -- the last line of defence: anything else is a bug
            terminal.internal_error(error)
            code = INTERNAL_ERROR_EXIT_CODE
    if received:
        terminal.note(f"interrupted by {signal.Signals(received[0]).name}")
        return SIGNAL_EXIT_BASE + received[0]
    return code


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.getsignal(number) for number in (*numbers, signal.SIGALRM)}
    for number in numbers:
        # nohup and background jobs of a shell ignore some of them on purpose.
        if previous[number] != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) is handler:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in previous.items():
            if old is not None:
                signal.signal(number, old)
