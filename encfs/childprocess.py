"""Run a helper program that is given a secret or gives one: bounded in time and output, nothing in its arguments.

For programs that speak over standard input and output. Output is read into one buffer that the caller wipes; of what
goes to standard error a little is kept, to be shown.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from encfs.errors import KeyProviderError
from encfs.keys.secrets import wipe
from encfs.strictjson import show_name

#: Bytes of standard error that are kept.
MAX_ERRORS = 4096
_PIECE = 64 << 10
_SHOWN = 300


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """What a program left: `output` is the caller's to wipe."""

    status: int
    output: bytearray = field(repr=False)
    errors: bytes = field(repr=False)

    def complaint(self) -> str:
        """The last line it wrote to standard error, safe to show: printable ASCII, cut short."""
        lines = [line.strip() for line in self.errors.decode("utf-8", "replace").splitlines() if line.strip()]
        if not lines:
            return "it said nothing"
        text = ascii(lines[-1])[1:-1]
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def run_bounded(words: Sequence[str], content: bytes | bytearray, *, limit: int, timeout: float, what: str) -> Finished:
    """Run `words` with `content` on standard input; `what` names the program in messages.

    It gets this process's environment, a session of its own, and no terminal. Where this fails, whatever it started
    goes with it; where it ends well, that is its own affair.

    Raises: KeyProviderError where it cannot be started, does not end in `timeout` seconds, or writes more than `limit`
    bytes.
    """
    try:
        process = subprocess.Popen(
            list(words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "malformed argument"
        raise KeyProviderError(f"{what} cannot be started: {show_name(words[0])}: {reason}") from None
    with process:
        try:
            return _Conversation(process, content, limit, time.monotonic() + timeout, what, timeout).run()
        except BaseException:
            # It was not waited for yet, so its number still means it and what it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


class _Conversation:
    """Feeds standard input and drains both outputs at once, so that neither side waits for the other for ever."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        content: bytes | bytearray,
        limit: int,
        deadline: float,
        what: str,
        timeout: float,
    ) -> None:
        self._process = process
        self._content = memoryview(content)
        self._limit = limit
        self._deadline = deadline
        self._what = what
        self._timeout = timeout
        self._output = bytearray()
        self._errors = bytearray()

    def run(self) -> Finished:
        try:
            self._talk()
            status = self._process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            wipe(self._output)
            raise KeyProviderError(f"{self._what} did not end within {self._timeout:.0f} seconds") from None
        except BaseException:
            wipe(self._output)
            raise
        return Finished(status, self._output, bytes(self._errors))

    def _talk(self) -> None:
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        if stdin is None or stdout is None or stderr is None:
            raise KeyProviderError(f"{self._what} has no standard streams")
        os.set_blocking(stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            while selector.get_map():
                left = self._deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    raise subprocess.TimeoutExpired(self._what, self._timeout)
                for key, _ in ready:
                    if key.fileobj is stdin:
                        done = self._feed(stdin.fileno())
                    elif key.fileobj is stdout:
                        done = self._drain(stdout.fileno(), self._output, self._limit)
                    else:
                        done = self._drain(stderr.fileno(), self._errors, None)
                    if done:
                        selector.unregister(key.fileobj)
                        if key.fileobj is stdin:
                            stdin.close()

    def _feed(self, descriptor: int) -> bool:
        try:
            self._content = self._content[os.write(descriptor, self._content[:_PIECE]) :]
        except BrokenPipeError:
            return True  # it may answer without having read everything
        except BlockingIOError:
            return False
        return not self._content

    def _drain(self, descriptor: int, kept: bytearray, limit: int | None) -> bool:
        piece = os.read(descriptor, _PIECE)
        if limit is None:
            # The end of it tells most.
            kept += piece
            del kept[:-MAX_ERRORS]
        elif len(kept) + len(piece) > limit:
            raise KeyProviderError(f"{self._what} answered with more than {limit} bytes")
        else:
            kept += piece
        return not piece
